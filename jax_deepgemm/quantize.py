"""Block-scaled FP8 quantisation in `jax.numpy`: activations in 1 x 128, weights in 128 x 128.

The inverse, `dequantize_per_token` and `dequantize_per_block`, is in `reference.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.typing import ArrayLike

from jax_deepgemm.reference import BLOCK

_FLOAT_TYPES = ("bfloat16", "float16", "float32", "float64")
_E4M3_MAX = 448.0  # the largest e4m3fn number
_SMALLEST_NORMAL = 2.0**-126  # of float32


class Quantized(NamedTuple):
    """An FP8 array with the scales of its blocks: the operand of every GEMM of this package.

    Element [i, j] stands for `values[i, j] * scales[i, j // 128]` after `quantize_per_token`, and
    for `values[i, j] * scales[i // 128, j // 128]` after `quantize_per_block`.

    Attributes:
        values: float8_e4m3fn, the shape of the array that was quantised.
        scales: float32, one for each block; positive, finite and normal.
    """

    values: jax.Array
    scales: jax.Array


# Exported functions that take or return one can be saved.
export.register_namedtuple_serialization(Quantized, serialized_name="jax_deepgemm.Quantized")


def quantize_per_token(x: ArrayLike, *, power_of_two: bool = False) -> Quantized:
    """Casts activations to FP8, values = x / scales, with scales = amax / 448 per 1 x 128 block.

    amax is the largest finite magnitude among a row's 128 consecutive values of k (fewer in the
    last block if k is no multiple of 128), so that it becomes 448, the largest e4m3fn number.

    - A block without a finite non-zero value gets the scale 1; its zeros stay zeros.
    - NaN and +-Inf become NaN, the one non-finite value of e4m3fn. They do not count in amax: the
      rest of their block keeps its accuracy.
    - Scales stop at 2**-126, the smallest normal float32, and subnormal float32 input may become
      zero, as XLA flushes it on some backends.

    Args:
        x: bfloat16, float16, float32 or float64 [..., m, k]; float64 is rounded to float32 first.
        power_of_two: rounds each scale up to a power of two, so that scaling is exact.

    Returns:
        Quantized(float8_e4m3fn[..., m, k], float32[..., m, ceil(k/128)]).

    Raises:
        TypeError: x is not one of these floating-point types
            ("quantize_per_token: x must be ..., got int32[4, 128]").
        ValueError: x has fewer than two dimensions (same form).

    Source: DeepSeek-V3 technical report, section 3.3.2 (fine-grained quantisation).
    """
    quantized: Quantized = _quantize(_checked("quantize_per_token", x, "m"), 1, power_of_two)
    return quantized


def quantize_per_block(x: ArrayLike, *, power_of_two: bool = False) -> Quantized:
    """Casts weights to FP8, values = x / scales, with scales = amax / 448 per 128 x 128 block.

    Blocks at the lower and right edge are smaller if n or k is no multiple of 128. Zero blocks,
    NaN, Inf and tiny values are treated as by `quantize_per_token`.

    Args:
        x: bfloat16, float16, float32 or float64 [..., n, k]; float64 is rounded to float32 first.
        power_of_two: rounds each scale up to a power of two, so that scaling is exact.

    Returns:
        Quantized(float8_e4m3fn[..., n, k], float32[..., ceil(n/128), ceil(k/128)]).

    Raises:
        TypeError: x is not one of these floating-point types
            ("quantize_per_block: x must be ..., got int32[128, 128]").
        ValueError: x has fewer than two dimensions (same form).

    Source: DeepSeek-V3 technical report, section 3.3.2 (fine-grained quantisation).
    """
    quantized: Quantized = _quantize(_checked("quantize_per_block", x, "n"), BLOCK, power_of_two)
    return quantized


def _checked(function: str, x: ArrayLike, rows: str) -> jax.Array:
    """Returns x as an array, or raises in the name of `function`, whose x is [..., rows, k]."""
    array = jnp.asarray(x)
    expected = f"{', '.join(_FLOAT_TYPES[:-1])} or {_FLOAT_TYPES[-1]} [..., {rows}, k]"
    message = f"{function}: x must be {expected}, got {array.dtype}{list(array.shape)}"
    if array.dtype.name not in _FLOAT_TYPES:
        raise TypeError(message)
    if array.ndim < 2:
        raise ValueError(message)
    return array


# Compiled as one function so that a call outside jit makes no full-size float32 temporaries.
@partial(jax.jit, static_argnums=(1, 2))
def _quantize(x: jax.Array, block_rows: int, power_of_two: bool) -> Quantized:
    """Quantises x [..., rows, k] in blocks of `block_rows` x 128."""
    *batch, rows, k = x.shape
    row_blocks, k_blocks = -(-rows // block_rows), -(-k // BLOCK)

    x = x.astype(jnp.float32)
    padding = (row_blocks * block_rows - rows, k_blocks * BLOCK - k)
    if any(padding):
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, extra) for extra in padding])
    # One dimension at a time, the reshapes keep a sharding of rows or k, explicit ones too.
    padded_k = k_blocks * BLOCK
    blocks = x.reshape(*batch, row_blocks, block_rows, padded_k)
    blocks = blocks.reshape(*batch, row_blocks, block_rows, k_blocks, BLOCK)

    finite = jnp.isfinite(blocks)
    amax = jnp.max(jnp.where(finite, jnp.abs(blocks), 0.0), axis=(-3, -1))
    scales = _power_of_two_scales(amax) if power_of_two else _scales(amax)
    # Below 2**-126 a float32 is zero to some backends and not to others: a zero to all here.
    scales = jnp.where(amax >= _SMALLEST_NORMAL, scales, 1.0)

    # One reciprocal per block instead of one division per value. Its rounding can carry amax past
    # 448 by a few units in the last place, which the cast rounds back.
    scaled = blocks * (1.0 / scales)[..., :, None, :, None]
    values = jnp.where(finite, scaled, jnp.nan).astype(jnp.float8_e4m3fn)
    values = values.reshape(*batch, row_blocks, block_rows, padded_k).reshape(x.shape)
    values = values[..., :rows, :k]
    return Quantized(values, scales)


def _scales(amax: jax.Array) -> jax.Array:
    """Returns amax / 448, not below the smallest normal float32."""
    # XLA turns a division by a constant into this multiplication; written out, it is the same
    # everywhere. It differs from the division by at most one unit in the last place.
    return jnp.maximum(amax * np.float32(1.0 / _E4M3_MAX), _SMALLEST_NORMAL)


def _power_of_two_scales(amax: jax.Array) -> jax.Array:
    """Returns the smallest normal power of two that is not below amax / 448, exactly."""
    # 448 = 1.75 * 2**8, so amax = 1.f * 2**e needs 2**(e - 8), or twice that if 1.f > 1.75. Adding
    # 1 - 0.75 (less one unit) to the fraction carries into the exponent in just that case.
    bits = lax.bitcast_convert_type(amax, jnp.uint32)
    exponent = ((bits + 0x1FFFFF) >> 23).astype(jnp.int32) - 8
    return lax.bitcast_convert_type(jnp.maximum(exponent, 1) << 23, jnp.float32)
