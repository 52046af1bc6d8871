"""The operations in float32 `jax.numpy`: specification, CPU lowering and test oracle in one.

A function here says what the kernel of the same name computes, on any backend. Operands come as
flat arguments, already checked by the public operation; shapes are those of its docstring.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # values of k, and rows of a weight matrix, that share one scale


def _spread(scales: jax.Array, size: int, axis: int) -> jax.Array:
    """Repeats each scale over its block along `axis`; the last block ends at `size`."""
    before, after = scales.shape[:axis], scales.shape[axis + 1 :]
    num_blocks = scales.shape[axis]
    copies = jnp.broadcast_to(
        jnp.expand_dims(scales, axis + 1), (*before, num_blocks, BLOCK, *after)
    )
    # jnp.repeat would do, but refuses an axis that is sharded explicitly.
    repeated = copies.reshape(*before, num_blocks * BLOCK, *after)
    return lax.slice_in_dim(repeated, 0, size, axis=axis)


def dequantize_per_token(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns `values * scales` with one scale per row and 128 values of k.

    Args:
        values: float8_e4m3fn[..., m, k].
        scales: float32[..., m, ceil(k/128)].

    Returns:
        float32[..., m, k].
    """
    *_, k = values.shape
    return values.astype(jnp.float32) * _spread(scales, k, axis=scales.ndim - 1)


def dequantize_per_block(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns `values * scales` with one scale per 128 rows and 128 values of k.

    Args:
        values: float8_e4m3fn[..., n, k].
        scales: float32[..., ceil(n/128), ceil(k/128)].

    Returns:
        float32[..., n, k].
    """
    *_, n, _ = values.shape
    return dequantize_per_token(values, _spread(scales, n, axis=scales.ndim - 2))


def gemm_fp8_fp8_bf16_nt(a: jax.Array, sfa: jax.Array, b: jax.Array, sfb: jax.Array) -> jax.Array:
    """Returns d = dequantize(a, sfa) @ dequantize(b, sfb).T, rounded once, to bfloat16.

    Args:
        a: float8_e4m3fn[m, k].
        sfa: float32[m, ceil(k/128)].
        b: float8_e4m3fn[n, k].
        sfb: float32[ceil(n/128), ceil(k/128)].

    Returns:
        bfloat16[m, n].
    """
    # Both operands are dequantised whole, at four bytes a value. Cutting k or n into chunks was
    # no faster on a CPU and saved little: XLA moves the widening of FP8 out of such a loop.
    d = lax.dot_general(
        dequantize_per_token(a, sfa),
        dequantize_per_block(b, sfb),
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return d.astype(jnp.bfloat16)
