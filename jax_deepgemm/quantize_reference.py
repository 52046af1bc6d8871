"""The quantisers in `jax.numpy`: specification, CPU lowering and test oracle in one.

Every step is an IEEE float32 operation that all backends round alike, or an operation on integers,
so a kernel can give the same bits: there is no division but 1/x, no multiplication that a compiler
could fuse with an addition, and float32 numbers below 2**-126 are made zeros by hand, because some
backends flush them and others do not.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.reference import BLOCK

# The largest finite number of an FP8 type is 1.75 * 2**exponent.
LARGEST_EXPONENT = {"float8_e4m3fn": 8, "float8_e5m2": 15}
NAN_CODE = np.uint8(0x7F)  # of both types
_SMALLEST_NORMAL = np.float32(2.0**-126)
_LARGEST = np.finfo(np.float32).max
_SIGN, _MAGNITUDE, _EXPONENT = np.uint32(1 << 31), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)

# 2**-f for 0 <= f <= 1 is c0 - f * (c1 - f * (c2 - f * (c3 - f * c4))), to 2**-18, and exact at
# both ends. c0 and c1 are here times 2**24, c2 2**26, c3 2**28, c4 2**30: then each difference has
# 24 bits whatever f is. So it is a float32 number with a known unit, and csrc/kernels/quantize.cuh,
# which has the same, takes a step in one fused multiply-add that rounds towards zero.
EXP2_POLYNOMIAL = (0x1000000, 0xB16C1C, 0xF526C3, 0xD99C69, 0x6F0C76)
EXP2_SHIFTS = (18, 18, 18, 16)  # of f, and from a coefficient's scale to the next, last one first
_LOG2_E = np.float32(np.log2(np.e) * 2**16)


def flush(x: jax.Array) -> jax.Array:
    """Returns x with zeros of the same sign in the place of numbers below 2**-126."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return _as_float(jnp.where((bits & _EXPONENT) == 0, bits & _SIGN, bits))


def quantize(
    x: jax.Array, block_rows: int, dtype: Any, power_of_two: bool
) -> tuple[jax.Array, jax.Array]:
    """Quantises x [..., rows, k] in blocks of `block_rows` x 128.

    Returns:
        dtype[..., rows, k] and float32[..., ceil(rows/block_rows), ceil(k/128)].
    """
    *batch, rows, k = x.shape
    row_blocks, k_blocks = -(-rows // block_rows), -(-k // BLOCK)

    x = x.astype(jnp.float32)
    padding = (row_blocks * block_rows - rows, k_blocks * BLOCK - k)
    if any(padding):
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, extra) for extra in padding])
    # One dimension at a time, the reshapes keep a sharding of rows or k, explicit ones too.
    padded_k = k_blocks * BLOCK
    blocks = x.reshape(*batch, row_blocks, block_rows, padded_k)
    blocks = flush(blocks.reshape(*batch, row_blocks, block_rows, k_blocks, BLOCK))

    finite = jnp.isfinite(blocks)
    amax = jnp.max(jnp.where(finite, jnp.abs(blocks), 0.0), axis=(-3, -1))
    scales = block_scales(amax, dtype, power_of_two)
    # One reciprocal per block instead of one division per value. Its rounding can carry amax past
    # the largest FP8 number by a few units in the last place, which the cast rounds back.
    scaled = blocks * (1.0 / scales)[..., :, None, :, None]
    # XLA's cast of NaN to e5m2 is not the same bits in every fusion.
    code = lax.bitcast_convert_type(jnp.where(finite, scaled, 0.0).astype(dtype), jnp.uint8)
    values = lax.bitcast_convert_type(jnp.where(finite, code, NAN_CODE), dtype)
    values = values.reshape(*batch, row_blocks, block_rows, padded_k).reshape(x.shape)
    return values[..., :rows, :k], scales


def block_scales(amax: jax.Array, dtype: Any, power_of_two: bool) -> jax.Array:
    """Returns the scales of blocks with these largest magnitudes."""
    exponent = LARGEST_EXPONENT[np.dtype(dtype).name]
    scales = _power_of_two_scales(amax, exponent) if power_of_two else _amax_scales(amax, exponent)
    return jnp.where(amax >= _SMALLEST_NORMAL, scales, 1.0)


def _amax_scales(amax: jax.Array, exponent: int) -> jax.Array:
    """Returns amax / largest, not below the smallest normal float32."""
    # XLA turns a division by a constant into this multiplication; written out, it is the same
    # everywhere. It differs from the division by at most one unit in the last place.
    return jnp.maximum(amax * np.float32(1.0 / (1.75 * 2**exponent)), _SMALLEST_NORMAL)


def _power_of_two_scales(amax: jax.Array, largest_exponent: int) -> jax.Array:
    """Returns the smallest normal power of two that is not below amax / largest, exactly."""
    # The largest FP8 number is 1.75 * 2**q, so amax = 1.f * 2**e needs 2**(e - q), or twice that if
    # 1.f > 1.75. Adding 1 - 0.75 (less one unit) to the fraction carries into the exponent in just
    # that case.
    bits = lax.bitcast_convert_type(amax, jnp.uint32)
    exponent = ((bits + 0x1FFFFF) >> 23).astype(jnp.int32) - largest_exponent
    return lax.bitcast_convert_type(jnp.maximum(exponent, 1) << 23, jnp.float32)


def silu_mul(x: jax.Array) -> jax.Array:
    """Returns silu(gate) * up in float32, x [..., 2f] being gate, then up: float32[..., f].

    silu(g) = g / (1 + exp(-g)) is computed as max(g, g * e) * (1 / (1 + e)) with e = exp(-|g|), so
    that nothing overflows; see `exp_negative`. Where finite numbers multiply to more than float32
    holds, the result is the largest float32.
    """
    f = x.shape[-1] // 2
    gate = flush(lax.slice_in_dim(x, 0, f, axis=-1).astype(jnp.float32))
    up = flush(lax.slice_in_dim(x, f, 2 * f, axis=-1).astype(jnp.float32))
    e = exp_negative(jnp.abs(gate))
    numerator = jnp.maximum(gate, flush(gate * e))
    silu = flush(numerator * (1.0 / (1.0 + e)))
    product = silu * up
    finite = jnp.isfinite(gate) & jnp.isfinite(up)
    return jnp.where(finite, jnp.clip(product, -_LARGEST, _LARGEST), product)


def exp_negative(x: jax.Array) -> jax.Array:
    """Returns exp(-x) for x >= 0, to 2**-16.7 + 2**-24 * x; 0 where it is below 2**-126.

    exp(-x) = 2**-(n + f), by integers: x * log2(e) rounded to float32, then to 16 bits of fraction,
    and a polynomial in f whose every step is rounded down.
    """
    y = x * _LOG2_E
    end = 128 * 2**16
    fixed = jnp.round(jnp.where(y < end, y, np.float32(end))).astype(jnp.uint32)
    f = fixed & 0xFFFF
    power = jnp.full_like(f, EXP2_POLYNOMIAL[-1])
    for coefficient, shift in zip(EXP2_POLYNOMIAL[-2::-1], EXP2_SHIFTS, strict=True):
        power = np.uint32(coefficient) - _multiply_shift(f, power, shift)
    bits = power + ((np.uint32(125) - (fixed >> 16)) << 23)  # power in [2**23, 2**24]
    return jnp.where(fixed <= 126 * 2**16, _as_float(bits), 0.0)


def _multiply_shift(x: jax.Array, y: jax.Array, shift: int) -> jax.Array:
    """Returns x * y / 2**shift rounded up, x < 2**16, y < 2**24, without 64-bit types."""
    low = (x * (y & 0xFF) + 0xFF) >> 8
    return (x * (y >> 8) + low + np.uint32(2 ** (shift - 8) - 1)) >> (shift - 8)


def _as_float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def valid_rows(rows: int, sizes: jax.Array) -> jax.Array:
    """Returns bool[..., rows, 1]: which rows are among the first sum(sizes), sizes [..., s].

    Negative sizes count as 0, and what exceeds the rows is cut off.
    """
    counts = jnp.clip(sizes, 0, rows).astype(jnp.uint32)
    # A plain sum could overflow, and XLA cannot partition a reduction that is none: by halves.
    while (length := counts.shape[-1]) > 1:
        counts = jnp.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, length % 2)])
        half = counts.shape[-1] // 2
        counts = jnp.minimum(counts[..., :half] + counts[..., half:], np.uint32(rows))
    row = jnp.expand_dims(jnp.arange(rows, dtype=jnp.uint32), range(counts.ndim - 1))
    return (row < counts)[..., None]


def clear_invalid_rows(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns x [..., rows, k] with zeros in the place of rows that do not count."""
    return jnp.where(valid_rows(x.shape[-2], sizes), x, jnp.zeros((), x.dtype))


def fill_invalid_rows(
    values: jax.Array, scales: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns both as `quantize_per_token` leaves them: rows that do not count are 0, scaled by 1.

    No bit of the others changes, of a NaN neither.
    """
    valid = valid_rows(values.shape[-2], sizes)
    codes = jnp.where(valid, lax.bitcast_convert_type(values, jnp.uint8), np.uint8(0))
    return lax.bitcast_convert_type(codes, values.dtype), jnp.where(valid, scales, 1.0)


# --- The operations ------------------------------------------------------------------------------

Results = tuple[jax.Array, ...]


def _valid(x: jax.Array, sizes: tuple[jax.Array, ...]) -> jax.Array:
    return clear_invalid_rows(x, *sizes) if sizes else x


def quantize_per_token(x: jax.Array, *sizes: jax.Array, dtype: Any, power_of_two: bool) -> Results:
    """Values and scales of 1 x 128 blocks; rows that do not count give zeros with the scale 1."""
    return quantize(_valid(x, sizes), 1, dtype, power_of_two)


def quantize_per_block(x: jax.Array, *, dtype: Any, power_of_two: bool) -> Results:
    """Values and scales of 128 x 128 blocks."""
    return quantize(x, BLOCK, dtype, power_of_two)


def quantize_per_token_transposed(x: jax.Array, *, dtype: Any, power_of_two: bool) -> Results:
    """Values and scales of the 1 x 128 blocks of x transposed."""
    return quantize(jnp.swapaxes(x, -1, -2), 1, dtype, power_of_two)


def quantize_per_token_both(x: jax.Array, *, dtype: Any, power_of_two: bool) -> Results:
    """Values and scales of the 1 x 128 blocks of x, then of x transposed."""
    return (
        *quantize_per_token(x, dtype=dtype, power_of_two=power_of_two),
        *quantize_per_token_transposed(x, dtype=dtype, power_of_two=power_of_two),
    )


def silu_mul_quantize(x: jax.Array, *sizes: jax.Array, dtype: Any, power_of_two: bool) -> Results:
    """Values and scales of the 1 x 128 blocks of silu(gate) * up."""
    return quantize(silu_mul(_valid(x, sizes)), 1, dtype, power_of_two)


jitted = {
    function.__name__: partial(jax.jit, static_argnames=("dtype", "power_of_two"))(function)
    for function in (
        quantize_per_token,
        quantize_per_block,
        quantize_per_token_transposed,
        quantize_per_token_both,
        silu_mul_quantize,
    )
}
"""The same as XLA compiles them, on any backend: what the benchmark compares kernels with."""
