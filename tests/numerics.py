"""Operands, oracle and error measure that the CPU and GPU tests share, in NumPy float64."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = 128
E4M3 = ml_dtypes.float8_e4m3fn
# Largest error of a bf16 result that is right; rounding to bf16 alone gives about 6e-7.
BF16_TOLERANCE = 5e-6
# What `check` allows a result of float32 sums. Rounding to bf16 moves a value by up to 2**-8 of it,
# so a row of few values by an error of 2**-17.
FLOAT32_SUMS = {"row_tolerance": 8e-6, "value_tolerance": 3e-4}


class DenseOperands(NamedTuple):
    """Flat operands of the dense GEMM, on the host."""

    a: NDArray[ml_dtypes.float8_e4m3fn]  # [m, k]
    sfa: NDArray[np.float32]  # [m, ceil(k/128)]
    b: NDArray[ml_dtypes.float8_e4m3fn]  # [n, k]
    sfb: NDArray[np.float32]  # [ceil(n/128), ceil(k/128)]


class GroupedOperands(NamedTuple):
    """Flat operands of the grouped GEMMs, on the host; what assigns rows to groups comes beside."""

    a: NDArray[ml_dtypes.float8_e4m3fn]  # [m, k], or masked: [num_groups, max_m, k]
    sfa: NDArray[np.float32]  # [m, ceil(k/128)], or masked: [num_groups, max_m, ceil(k/128)]
    b: NDArray[ml_dtypes.float8_e4m3fn]  # [num_groups, n, k]
    sfb: NDArray[np.float32]  # [num_groups, ceil(n/128), ceil(k/128)]


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def random_values(rng: np.random.Generator, *shape: int) -> NDArray[ml_dtypes.float8_e4m3fn]:
    """Normal numbers cast to e4m3fn, of standard deviation 64: most of the exponents occur."""
    return (64 * rng.standard_normal(shape, dtype=np.float32)).clip(-448, 448).astype(E4M3)


def random_scales(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Scales between 2**-9 and 2**-7, log-uniform: a wrong or missing scale is a large error."""
    return np.exp2(rng.uniform(-9, -7, shape)).astype(np.float32)


def dense_operands(m: int, n: int, k: int, *, seed: int) -> DenseOperands:
    rng = np.random.default_rng([seed, m, n, k])
    return DenseOperands(
        random_values(rng, m, k),
        random_scales(rng, m, ceil_div(k, BLOCK)),
        random_values(rng, n, k),
        random_scales(rng, ceil_div(n, BLOCK), ceil_div(k, BLOCK)),
    )


def grouped_operands(
    rows: int | tuple[int, int], num_groups: int, n: int, k: int, *, seed: int
) -> GroupedOperands:
    """Operands with `rows` rows of A: m of them, or masked (num_groups, max_m)."""
    shape = (rows,) if isinstance(rows, int) else rows
    rng = np.random.default_rng([seed, *shape, num_groups, n, k])
    return GroupedOperands(
        random_values(rng, *shape, k),
        random_scales(rng, *shape, ceil_div(k, BLOCK)),
        random_values(rng, num_groups, n, k),
        random_scales(rng, num_groups, ceil_div(n, BLOCK), ceil_div(k, BLOCK)),
    )


def dequantize64(values: ArrayLike, scales: ArrayLike, *, block_rows: int) -> NDArray[np.float64]:
    """values * scales in float64; block_rows is 1 (per token) or 128 (per block)."""
    values, scales = np.asarray(values), np.asarray(scales)
    rows, k = values.shape[-2:]
    spread = scales.astype(np.float64).repeat(block_rows, axis=-2).repeat(BLOCK, axis=-1)
    return values.astype(np.float64) * spread[..., :rows, :k]


def dense_oracle(operands: DenseOperands) -> NDArray[np.float64]:
    """The exact product of the dequantised operands, float64[m, n]."""
    a, sfa, b, sfb = operands
    return dequantize64(a, sfa, block_rows=1) @ dequantize64(b, sfb, block_rows=BLOCK).T


def row_groups_oracle(operands: GroupedOperands, row_groups: ArrayLike) -> NDArray[np.float64]:
    """The exact product of every row with its group's matrix, zero where that is no group.

    float64[m, n], the contract of `contiguous` and, by `ragged_row_groups`, of `ragged`.
    """
    groups = np.asarray(row_groups)
    d = np.zeros((len(operands.a), operands.b.shape[1]))
    for group in range(len(operands.b)):
        rows = groups == group
        if rows.any():
            a, sfa, b, sfb = operands.a[rows], operands.sfa[rows], *_matrix(operands, group)
            d[rows] = dense_oracle(DenseOperands(a, sfa, b, sfb))
    return d


def ragged_row_groups(
    group_sizes: ArrayLike, m: int, num_groups: int, offset: int = 0
) -> NDArray[np.int64]:
    """For each of m rows the index into b of its group, -1 if b does not hold it: int64[m]."""
    rows = np.full(m, -1)
    start = 0
    for group, size in enumerate(np.asarray(group_sizes).tolist()):  # Python's do not overflow
        end = min(start + max(size, 0), m)
        if 0 <= group - offset < num_groups:
            rows[start:end] = group - offset
        start = end
    return rows


def masked_oracle(operands: GroupedOperands, masked_m: ArrayLike) -> NDArray[np.float64]:
    """The exact product of every group, zero from its count on: float64[num_groups, max_m, n]."""
    num_groups, max_m, _ = operands.a.shape
    d = np.zeros((num_groups, max_m, operands.b.shape[1]))
    for group, count in enumerate(np.asarray(masked_m).clip(0, max_m)):
        a, sfa = operands.a[group, :count], operands.sfa[group, :count]
        d[group, :count] = dense_oracle(DenseOperands(a, sfa, *_matrix(operands, group)))
    return d


def contiguous_layout(
    rng: np.random.Generator, group_of_block: ArrayLike, m: int, num_groups: int
) -> NDArray[np.int32]:
    """m_indices for blocks of 128 rows of these groups, with padding anywhere in them.

    A block is full, or has its padding at its end, or all over; padding is -1 or another number
    that is no group. int32[m], m at most 128 for each block.
    """
    indices = np.asarray(group_of_block, np.int32).repeat(BLOCK).reshape(-1, BLOCK)
    for block in indices:
        kind = rng.integers(3)
        if kind == 1:
            block[rng.integers(BLOCK + 1) :] = -1
        elif kind == 2:
            holes = rng.random(BLOCK) < rng.random()
            block[holes] = rng.choice([-1, -2, num_groups, 2**31 - 1, -(2**31)], holes.sum())
    return indices.reshape(-1)[:m]


def _matrix(operands: GroupedOperands, group: int) -> tuple[NDArray[Any], NDArray[Any]]:
    return operands.b[group], operands.sfb[group]


def check(
    d: Any, expected: NDArray[np.float64], *, row_tolerance: float, value_tolerance: float
) -> None:
    """Asserts that every element of a bfloat16 result is right.

    Args:
        d: the result.
        expected: the oracle's.
        row_tolerance: largest `error` of a row.
        value_tolerance: largest error of one value beyond its rounding to bf16, in parts of its
            row's root mean square. A row of zeros must be exactly that, +0.
    """
    assert d.dtype == ml_dtypes.bfloat16
    assert d.shape == expected.shape
    d = np.asarray(d)
    assert worst_row_error(d, expected) < row_tolerance
    excess = np.abs(d.astype(np.float64) - expected) - np.abs(expected) / 256
    rms = np.sqrt(np.square(expected).mean(axis=-1, keepdims=True))
    assert (excess <= value_tolerance * rms).all()
    assert not d[rms[..., 0] == 0].view(np.uint16).any()
    if np.count_nonzero(expected) > 1000:  # Fewer values may all be rounded unluckily.
        assert error(d, expected) < BF16_TOLERANCE


def error(actual: ArrayLike, expected: ArrayLike) -> float:
    """1 - 2<x,y> / (<x,x> + <y,y>) in float64: 0 if equal, infinite if either is not finite."""
    x, y = _pair(actual, expected)
    return float(_error(x.ravel(), y.ravel()))


def worst_row_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """The largest `error` of a row (last axis): sees a single wrong value in a large matrix."""
    return float(_error(*_pair(actual, expected)).max(initial=0.0))


def _pair(actual: ArrayLike, expected: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    x, y = (np.asarray(array).astype(np.float64) for array in (actual, expected))
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {x.shape} and {y.shape}")
    return x, y


def _error(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    # The same fraction as <x-y,x-y> / (<x,x> + <y,y>), which does not cancel where x is close to y.
    finite = np.isfinite(x).all(axis=-1) & np.isfinite(y).all(axis=-1)
    with np.errstate(invalid="ignore"):  # Inf - Inf
        distance = np.square(x - y).sum(axis=-1)
        power = (np.square(x) + np.square(y)).sum(axis=-1)
    ratio = np.divide(distance, power, out=np.zeros_like(power), where=finite & (power > 0))
    return np.where(finite, ratio, np.inf)
