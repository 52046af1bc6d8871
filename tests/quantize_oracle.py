"""The quantisers in NumPy, to the bit, and the inputs that CPU and GPU tests give them.

Written from the formula in jax_deepgemm/quantize.py, apart from the jnp version and the kernels.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

TINY = np.float32(2.0**-126)
LARGEST_FLOAT = np.finfo(np.float32).max
FP8_TYPES = ("float8_e4m3fn", "float8_e5m2")
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
INPUT_TYPES = ("bfloat16", "float16", "float32")

Array = NDArray[Any]


class Expected(NamedTuple):
    values: Array
    scales: Array


def flush(x: Array) -> Array:
    """Zeros of the same sign in the place of numbers below 2**-126."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def quantize(x: Array, block_rows: int, fp8: str, power_of_two: bool) -> Expected:
    """Values and scales of x [..., rows, k] in blocks of block_rows x 128, block by block."""
    x = flush(x.astype(np.float32))
    *batch, rows, k = x.shape
    row_blocks, k_blocks = -(-rows // block_rows), -(-k // 128)
    values = np.empty(x.shape, fp8)
    scales = np.empty((*batch, row_blocks, k_blocks), np.float32)
    padded = np.zeros((*batch, row_blocks * block_rows, k_blocks * 128), np.float32)
    padded[..., :rows, :k] = x
    blocks = padded.reshape(*batch, row_blocks, block_rows, k_blocks, 128)
    finite = np.isfinite(blocks)
    amax = np.where(finite, np.abs(blocks), np.float32(0)).max(axis=(-3, -1), initial=0)
    scales = block_scales(amax, fp8, power_of_two)
    reciprocal = np.float32(1) / scales
    assert np.isfinite(reciprocal).all() and (reciprocal >= TINY).all()
    scaled = np.where(finite, blocks, np.float32(0)) * reciprocal[..., :, None, :, None]
    # Beyond the largest FP8 number by the reciprocal's rounding only, which the cast rounds back.
    assert (np.abs(scaled) < LARGEST[fp8] * (1 + 2.0**-20)).all()
    values = np.where(finite, scaled.astype(fp8).view(np.uint8), np.uint8(0x7F)).view(fp8)
    return Expected(values.reshape(padded.shape)[..., :rows, :k].copy(), scales)


def block_scales(amax: Array, fp8: str, power_of_two: bool) -> Array:
    if power_of_two:
        # The smallest power of two at or above amax / largest, by exact float64 arithmetic.
        with np.errstate(divide="ignore"):
            exponent = np.ceil(np.log2(amax.astype(np.float64) / LARGEST[fp8]))
        for step in (-1, 1):  # log2 may be off by a rounding
            candidate = exponent - 1 if step < 0 else exponent
            fits = np.ldexp(1.0, candidate.clip(-1000, 1000).astype(int)) * LARGEST[fp8] >= amax
            exponent = np.where(fits, candidate, exponent + (step > 0))
        scales = np.ldexp(1.0, exponent.clip(-126, 127).astype(int)).astype(np.float32)
    else:
        scales = np.maximum(amax * np.float32(1 / LARGEST[fp8]), TINY)
    return np.where(amax < TINY, np.float32(1), scales)


def exp_negative(x: Array) -> Array:
    """exp(-x) for x >= 0, by the integers that quantize_reference.py describes."""
    y = x * np.float32(np.log2(np.e) * 2**16)
    fixed = np.rint(np.where(y < 2**23, y, np.float32(2**23))).astype(np.int64)
    n, f = fixed >> 16, fixed & 0xFFFF
    power = np.full_like(f, 0x6F0C76)
    for c, shift in ((0xD99C69, 18), (0xF526C3, 18), (0xB16C1C, 18), (0x1000000, 16)):
        power = (c << shift) - f * power >> shift
        assert ((power >= 2**23) & (power <= 2**24)).all()
    result = np.ldexp(power.astype(np.float64), -24 - n)
    result = np.where(result < TINY, 0, result)
    exact = result.astype(np.float32)
    assert (exact == result).all()
    return exact


def silu_mul(x: Array) -> Array:
    """silu(gate) * up of x [..., 2f], float32."""
    f = x.shape[-1] // 2
    gate, up = (flush(part.astype(np.float32)) for part in (x[..., :f], x[..., f:]))
    with np.errstate(all="ignore"):
        e = exp_negative(np.abs(gate))
        numerator = np.maximum(gate, flush(gate * e))
        silu = flush(numerator * (np.float32(1) / (np.float32(1) + e)))
        product = silu * up
    clipped = np.clip(product, -LARGEST_FLOAT, LARGEST_FLOAT)
    return np.where(np.isfinite(gate) & np.isfinite(up), clipped, product)


def expected(op: str, x: Array, fp8: str, power_of_two: bool) -> list[Array]:
    """What the operation of that name returns, flat: values, scales and perhaps a second pair."""
    if op == "quantize_per_block":
        return [*quantize(x, 128, fp8, power_of_two)]
    if op == "silu_mul_quantize":
        return [*quantize(silu_mul(x), 1, fp8, power_of_two)]
    rows = [*quantize(x, 1, fp8, power_of_two)]
    columns = [*quantize(np.swapaxes(x, -1, -2), 1, fp8, power_of_two)]
    return {
        "quantize_per_token": rows,
        "quantize_per_token_transposed": columns,
        "quantize_per_token_both": rows + columns,
    }[op]


OPS = (
    "quantize_per_token",
    "quantize_per_block",
    "quantize_per_token_transposed",
    "quantize_per_token_both",
    "silu_mul_quantize",
)

# What inputs there are; each may also come with a few values that are not finite.
KINDS = ("normal", "wide", "tiny", "subnormal", "huge", "zero", "ties", "mixed", "bad")


def inputs(kind: str, shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Array:
    """Random numbers of a kind, as `dtype`."""
    normal = rng.standard_normal(shape)
    if kind == "normal":
        x = normal
    elif kind == "wide":
        x = normal * np.exp2(rng.integers(-40, 40, shape))
    elif kind == "tiny":  # around the smallest normal float32
        x = normal * np.exp2(rng.integers(-130, -110, shape))
    elif kind == "subnormal":
        x = normal * 2.0**-128
    elif kind == "huge":
        x = np.clip(normal * 2.0**127, -LARGEST_FLOAT, LARGEST_FLOAT)
    elif kind == "ties":  # within a few units in the last place of where FP8 rounding tips over
        amax = np.exp2(rng.uniform(-9, 9, (*shape[:-1], 1))).astype(np.float32)
        parts = []
        for fp8 in FP8_TYPES:
            codes = np.arange(128, dtype=np.uint8).view(fp8).astype(np.float32)
            codes = np.sort(codes[np.isfinite(codes) & (codes >= 0)])
            middle = rng.choice((codes[1:] + codes[:-1]) / 2, shape)
            part = (middle * (amax * np.float32(1 / LARGEST[fp8]))).astype(np.float32)
            parts.append((part.view(np.int32) + rng.integers(-2, 3, shape)).astype(np.int32))
        x = np.where(rng.random((*shape[:-1], 1)) < 0.5, *parts).view(np.float32)
        x[..., ::128] = amax
        x = np.minimum(np.abs(x), amax) * rng.choice([-1, 1], shape)
    elif kind == "zero":
        x = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    else:
        pieces = [inputs(part, shape, "float64", rng) for part in KINDS[:6]]
        # Whole blocks and single values of each kind.
        choice = rng.integers(len(pieces), size=shape)
        columns = np.broadcast_to(np.arange(shape[-1]) // 128 % len(pieces), shape)
        choice = np.where(rng.random(shape) < 0.7, columns, choice)
        x = np.choose(choice, pieces)
    if kind == "bad":
        bad = rng.choice([np.nan, -np.nan, np.inf, -np.inf], shape)
        x = np.where(rng.random(shape) < 0.01, bad, x)
        flat = x.reshape(-1, shape[-1])
        if flat.size:
            flat[0, : shape[-1] // 2] = np.inf  # whole blocks, too
            flat[-1, :] = np.nan
    if dtype == "float64":
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        result = x.astype(np.float32).astype(dtype)
    if kind not in ("bad",):  # beyond a type's range is its largest number here
        largest = float(ml_dtypes.finfo(dtype).max)
        result = np.where(np.isfinite(x), np.clip(x, -largest, largest), x).astype(dtype)
        result = np.where(np.isinf(result.astype(np.float32)), np.copysign(largest, x), result)
    return result.astype(dtype)


def assert_same_bits(got: Any, wanted: Array, what: str = "") -> None:
    """Compares bytes: signs of zeros and NaNs, too."""
    got = np.asarray(got)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), what
    unsigned = {1: np.uint8, 4: np.uint32}[wanted.dtype.itemsize]
    different = np.ascontiguousarray(got).view(unsigned) != np.ascontiguousarray(wanted).view(
        unsigned
    )
    if different.any():
        index = tuple(int(i[0]) for i in np.nonzero(different))
        raise AssertionError(
            f"{what}: {different.sum()} of {different.size} differ, first at {index}: "
            f"{got[index]!r} instead of {wanted[index]!r}"
        )
