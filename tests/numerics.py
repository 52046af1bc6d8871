"""Operands, oracle and error measure that the CPU and GPU tests share, in NumPy float64."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = 128
E4M3 = ml_dtypes.float8_e4m3fn
# Largest error of a bf16 result that is right; rounding to bf16 alone gives about 6e-7.
BF16_TOLERANCE = 5e-6


class DenseOperands(NamedTuple):
    """Flat operands of the dense GEMM, on the host."""

    a: NDArray[ml_dtypes.float8_e4m3fn]  # [m, k]
    sfa: NDArray[np.float32]  # [m, ceil(k/128)]
    b: NDArray[ml_dtypes.float8_e4m3fn]  # [n, k]
    sfb: NDArray[np.float32]  # [ceil(n/128), ceil(k/128)]


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
