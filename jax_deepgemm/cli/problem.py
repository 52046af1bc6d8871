"""Random problems, the operations that solve them, and the oracle that judges results."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

import jax_deepgemm
from jax_deepgemm import GemmConfig, quantize_per_block, quantize_per_token
from jax_deepgemm.cli.shapes import CONTIGUOUS, DENSE, MASKED, RAGGED, Shape

# Rounding normals' products to bf16 gives 1.4e-6 by itself.
MAX_ERROR = 5e-6

# float64 products of more rows than this are not worth their time and memory.
MAX_CHECKED_ROWS = 4096

ORACLE = (
    "error = 1 - 2<d,x>/(<d,d>+<x,x>), x the float64 product of the dequantised operands, "
    f"over all rows (above {MAX_CHECKED_ROWS}: a random {MAX_CHECKED_ROWS} with the first and the "
    "last of every group)"
)

Pair = tuple[jax.Array, jax.Array]
Rows = NDArray[np.int64]


class Problem(NamedTuple):
    """Operands of one problem, as its operation takes them."""

    shape: Shape
    lhs: Pair  # a [m, k] with its scales; masked: [groups, m_per_group, k]
    rhs: Pair  # b [groups, n, k] with its scales; dense: [n, k]
    grouping: tuple[jax.Array, ...]  # int32: m_indices, masked_m or group_sizes; dense: none

    @property
    def operands(self) -> tuple[Pair | jax.Array, ...]:
        """The arguments of `operation`'s result."""
        return (self.lhs, self.rhs, *self.grouping)


def operation(shape: Shape, config: GemmConfig | None = None) -> Callable[..., jax.Array]:
    """The public operation for this shape; it takes a problem's `operands`."""
    if shape.op == DENSE:
        return functools.partial(jax_deepgemm.gemm_fp8_fp8_bf16_nt, config=config)
    if shape.op == CONTIGUOUS:
        return functools.partial(
            jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous, config=config
        )
    if shape.op == MASKED:
        return functools.partial(
            jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked,
            expected_m=shape.m_per_group,
            config=config,
        )
    return functools.partial(jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_ragged, config=config)


def random_problem(shape: Shape, seed: int) -> Problem:
    """Quantised standard normals on the default device, every group full."""
    # The "rbg" generator compiles several times faster than threefry on a GPU.
    lhs, rhs = _random_operands(jax.random.key(seed, impl="rbg"), shape)
    sizes = jnp.full(shape.groups, shape.m_per_group, jnp.int32)
    grouping = {
        DENSE: (),
        CONTIGUOUS: (jnp.repeat(jnp.arange(shape.groups, dtype=jnp.int32), shape.m_per_group),),
        MASKED: (sizes,),
        RAGGED: (sizes,),
    }
    return Problem(shape, lhs, rhs, grouping[shape.op])


def random_problems(shapes: Sequence[Shape], seed: int) -> list[Problem]:
    """One problem for each shape; their generators compile in parallel."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(random_problem, shapes, range(seed, seed + len(shapes))))


@functools.partial(jax.jit, static_argnames="shape")
def _random_operands(key: jax.Array, shape: Shape) -> tuple[Pair, Pair]:
    op, groups, m_per_group, n, k = shape
    key_a, key_b = jax.random.split(key)
    rows = (groups, m_per_group) if op == MASKED else (groups * m_per_group,)
    a = jax.random.normal(key_a, (*rows, k), jnp.float32)
    b, sfb = random_weights(key_b, groups, n, k)
    return quantize_per_token(a), (b[0], sfb[0]) if op == DENSE else (b, sfb)


def random_weights(key: jax.Array, groups: int, n: int, k: int) -> Pair:
    """Quantised normals b [groups, n, k] with their scales; jittable.

    One group after the other: in float32 the weights of 512 experts would not fit into a GPU.
    """

    def weights(key: jax.Array) -> Pair:
        return quantize_per_block(jax.random.normal(key, (n, k), jnp.float32))

    b, sfb = jax.lax.map(weights, jax.random.split(key, groups))
    return b, sfb


def product_error(d: jax.Array, problem: Problem) -> float:
    """Distance of `d` from the float64 product of the dequantised operands.

    Args:
        d: bf16 [m, n], or [groups, m_per_group, n]: the result under test.
        problem: its operands.

    Returns:
        1 - 2<d,x>/(<d,d>+<x,x>), NaN when `d` holds one. See `ORACLE` for the rows compared.
    """
    op, groups, m_per_group, n, k = problem.shape
    (a, sfa), (b, sfb) = problem.lhs, problem.rhs
    if op == DENSE:
        b, sfb = b[None], sfb[None]
    lhs = a.reshape(-1, k), sfa.reshape(-1, sfa.shape[-1])
    return grouped_error(d.reshape(-1, n), lhs, (b, sfb), np.full(groups, m_per_group))


def grouped_error(d: jax.Array, lhs: Pair, rhs: Pair, sizes: ArrayLike) -> float:
    """`product_error` for groups of any sizes, whose rows follow one another.

    Args:
        d: [m, n], the result under test.
        lhs: a [m, k] with its scales.
        rhs: b [groups, n, k] with its scales.
        sizes: [groups], rows of each group; not all of them 0.
    """
    checked = list(_checked_rows(np.asarray(sizes, np.int64)))
    # One group at a time, because of the float64 weights; padded to one size, for one program.
    most = max(len(rows) for _, rows in checked)
    with jax.enable_x64(True):
        sums = jnp.zeros(3, jnp.float64)
        for group, rows in checked:
            valid = np.arange(most) < len(rows)
            sums += _products_float64(d, lhs, rhs, group, np.resize(rows, most), valid)
        dd, dx, xx = map(float, sums)
    return 1 - 2 * dx / (dd + xx)


def _checked_rows(sizes: Rows) -> Iterator[tuple[int, Rows]]:
    """For each group that has rows, those to compare: an equal share, the first and the last."""
    ends = np.cumsum(sizes)
    share = max(2, MAX_CHECKED_ROWS // int(np.count_nonzero(sizes)))
    rng = np.random.default_rng()
    for group, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        rows = np.arange(end - size, end)
        if size > share:
            middle = rng.choice(rows[1:-1], share - 2, replace=False)
            rows = np.concatenate([rows[:1], np.sort(middle), rows[-1:]])
        if size:
            yield group, rows


@jax.jit
def _products_float64(
    d: jax.Array, lhs: Pair, rhs: Pair, group: int, rows: Rows, valid: NDArray[np.bool]
) -> jax.Array:
    """<d,d>, <d,x> and <x,x> over the valid ones of some rows of a group."""
    a, sfa = (array[rows] for array in lhs)
    b, sfb = (array[group] for array in rhs)
    a64 = a.astype(jnp.float64) * _spread(sfa, 1, a.shape)
    b64 = b.astype(jnp.float64) * _spread(sfb, 128, b.shape)
    x, d64 = (jnp.where(valid[:, None], y, 0) for y in (a64 @ b64.T, d[rows].astype(jnp.float64)))
    return jnp.stack([jnp.vdot(d64, d64), jnp.vdot(d64, x), jnp.vdot(x, x)])


def _spread(scales: jax.Array, block_rows: int, shape: tuple[int, ...]) -> jax.Array:
    """One scale per element of [..., rows, k]: each covers block_rows x 128 elements."""
    spread = jnp.repeat(jnp.repeat(scales, block_rows, axis=-2), 128, axis=-1)
    return spread[..., : shape[-2], : shape[-1]]


def dequantize_bf16(lhs: Pair, rhs: Pair) -> Pair:
    """Both operands as bf16, without scales."""
    (a, sfa), (b, sfb) = lhs, rhs
    wide_a = (a.astype(jnp.float32) * _spread(sfa, 1, a.shape)).astype(jnp.bfloat16)
    wide_b = (b.astype(jnp.float32) * _spread(sfb, 128, b.shape)).astype(jnp.bfloat16)
    return wide_a, wide_b


def dequantize_dot(lhs: Pair, rhs: Pair) -> jax.Array:
    """What JAX offers without this package: dequantise to bf16, then XLA's own dot."""
    a, b = dequantize_bf16(lhs, rhs)
    return jnp.matmul(a, b.T)
