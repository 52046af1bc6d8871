"""Random problems and the oracle that judges results."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm import quantize_per_block, quantize_per_token
from jax_deepgemm.cli.shapes import Shape

# Rounding normals' products to bf16 gives 1.4e-6 by itself.
MAX_ERROR = 5e-6

# float64 products of more rows than this are not worth their time and memory.
MAX_CHECKED_ROWS = 4096

ORACLE = (
    "error = 1 - 2<d,x>/(<d,d>+<x,x>), x the float64 product of the dequantised operands, "
    f"over all rows (above m = {MAX_CHECKED_ROWS}: a random {MAX_CHECKED_ROWS} with the first "
    "and the last)"
)

Pair = tuple[jax.Array, jax.Array]


class Problem(NamedTuple):
    """Operands of one dense problem, as `(values, scales)` pairs."""

    shape: Shape
    lhs: Pair
    rhs: Pair


def random_problem(shape: Shape, seed: int) -> Problem:
    """Quantised standard normals on the default device."""
    # The "rbg" generator compiles several times faster than threefry on a GPU.
    return Problem(shape, *_random_operands(jax.random.key(seed, impl="rbg"), shape))


def random_problems(shapes: Sequence[Shape], seed: int) -> list[Problem]:
    """One problem for each shape; their generators compile in parallel."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(random_problem, shapes, range(seed, seed + len(shapes))))


@functools.partial(jax.jit, static_argnames="shape")
def _random_operands(key: jax.Array, shape: Shape) -> tuple[Pair, Pair]:
    key_a, key_b = jax.random.split(key)
    a = jax.random.normal(key_a, (shape.m, shape.k), jnp.float32)
    b = jax.random.normal(key_b, (shape.n, shape.k), jnp.float32)
    return quantize_per_token(a), quantize_per_block(b)


def product_error(d: jax.Array, problem: Problem) -> float:
    """Distance of `d` from the float64 product of the dequantised operands.

    Args:
        d: bf16 [m, n], the result under test.
        problem: its operands.

    Returns:
        1 - 2<d,x>/(<d,d>+<x,x>), NaN when `d` holds one. See `ORACLE` for the rows compared.
    """
    (a, sfa), rhs = problem.lhs, problem.rhs
    m = problem.shape.m
    if m > MAX_CHECKED_ROWS:
        middle = np.random.default_rng().choice(m - 2, MAX_CHECKED_ROWS - 2, replace=False) + 1
        rows = np.concatenate([[0], np.sort(middle), [m - 1]])
        a, sfa, d = a[rows], sfa[rows], d[rows]
    with jax.enable_x64(True):
        return float(_error_float64(d, (a, sfa), rhs))


@jax.jit
def _error_float64(d: jax.Array, lhs: Pair, rhs: Pair) -> jax.Array:
    (a, sfa), (b, sfb) = lhs, rhs
    a64 = a.astype(jnp.float64) * _spread(sfa, 1, a.shape)
    b64 = b.astype(jnp.float64) * _spread(sfb, 128, b.shape)
    x, d64 = a64 @ b64.T, d.astype(jnp.float64)
    return 1 - 2 * jnp.vdot(d64, x) / (jnp.vdot(d64, d64) + jnp.vdot(x, x))


def _spread(scales: jax.Array, block_rows: int, shape: tuple[int, ...]) -> jax.Array:
    """One scale per element: each covers block_rows x 128 elements."""
    spread = jnp.repeat(jnp.repeat(scales, block_rows, axis=0), 128, axis=1)
    return spread[: shape[0], : shape[1]]


def dequantize_dot(lhs: Pair, rhs: Pair) -> jax.Array:
    """What JAX offers without this package: dequantise to bf16, then XLA's own dot."""
    (a, sfa), (b, sfb) = lhs, rhs
    wide_a = (a.astype(jnp.float32) * _spread(sfa, 1, a.shape)).astype(jnp.bfloat16)
    wide_b = (b.astype(jnp.float32) * _spread(sfb, 128, b.shape)).astype(jnp.bfloat16)
    return jnp.matmul(wide_a, wide_b.T)
