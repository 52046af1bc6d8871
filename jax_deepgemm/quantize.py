"""Block-scaled FP8 quantisation: activations in 1 x 128 blocks, weights in 128 x 128.

On a GPU each function is one kernel that reads its input once (csrc/kernels/quantize.cuh), on a
CPU it is `quantize_reference`; both give the same bits. The inverse is `dequantize`. Where
`jax.jit` spreads a program over several GPUs, outside `jax.shard_map`, XLA partitions and compiles
the jnp version, whose last bit is XLA's. On explicit meshes (`AxisType.Explicit`) values are split
like x, and so are scales, but for the dimensions in which shards end within a block of 128: there
every device has all scales.

All of them compute, for each block, in float32 with IEEE rounding to the nearest:

    amax   = the largest finite magnitude in the block
    scale  = max(amax * fl(1 / largest), 2**-126), largest = 448 (e4m3fn) or 57344 (e5m2); or the
             smallest power of two, at least 2**-126, that is not below amax / largest;
             1 if amax < 2**-126
    values = fp8(x * fl(1 / scale)), to the nearest, ties to even; NaN (0x7f) where x is not finite

where fl is rounding to float32, and float32 numbers below 2**-126 count as zeros of their sign.
The block's largest magnitude becomes `largest` but for power-of-two scales; nothing finite becomes
NaN or Inf.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_deepgemm.arguments import boolean
from jax_deepgemm.operands import check_integers, check_static, describe, values_are_checked
from jax_deepgemm.quantize_call import OUTPUT_TYPES, bind
from jax_deepgemm.quantized_array import QuantizedArray

Quantized = QuantizedArray
"""The earlier name of `QuantizedArray`."""

_FLOAT_TYPES = ("bfloat16", "float16", "float32", "float64")


def quantize_per_token(
    x: ArrayLike,
    *,
    power_of_two: bool = False,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    masked_m: ArrayLike | None = None,
    group_sizes: ArrayLike | None = None,
) -> QuantizedArray:
    """Casts activations to FP8, values = x / scales, with one scale per 1 x 128 block.

    scale = amax / largest, of the largest finite magnitude among a row's 128 consecutive values of
    k (fewer in the last block if k is no multiple of 128) and the largest FP8 number, 448 for
    e4m3fn. The module's docstring has the formula to the bit.

    - A block without a finite non-zero value gets the scale 1; its zeros stay zeros.
    - NaN and +-Inf become NaN. They do not count in amax: the rest of their block keeps its
      accuracy.
    - float32 numbers below 2**-126 are zeros, and scales stop there.

    Args:
        x: bfloat16, float16, float32 or float64 [..., m, k]; float64 is rounded to float32 first.
        power_of_two: rounds each scale up to a power of two, so that scaling is exact.
        dtype: float8_e4m3fn, which GEMMs take, or float8_e5m2.
        masked_m: int32[num_groups], of x [num_groups, max_m, k]: only the first masked_m[g] rows of
            group g count, as for `m_grouped_gemm_fp8_fp8_bf16_nt_masked`. On a GPU the others are
            neither read nor written, and hold whatever was in that memory; on a CPU, or traced
            under `jax.debug_nans` or `jax.debug_infs`, they are zeros with the scale 1.
        group_sizes: int32[num_sizes], of x [m, k]: only the first sum(group_sizes) rows count, as
            for `m_grouped_gemm_fp8_fp8_bf16_nt_ragged`; negative sizes count as 0. The others as
            with masked_m.

    Returns:
        QuantizedArray(dtype[..., m, k], float32[..., m, ceil(k/128)]). In one jitted program on a
        GPU the scales lie in memory as a GEMM reads them, m contiguous, and nothing stands between
        the two kernels. Results of a program lie row by row.

    Raises:
        TypeError: x, dtype, masked_m or group_sizes is of another type
            ("quantize_per_token: x must be ..., got int32[4, 128]").
        ValueError: x has fewer than two dimensions, masked_m or group_sizes does not fit it, or
            both are given (same form).

    Source: DeepSeek-V3 technical report, section 3.3.2 (fine-grained quantisation).
    """
    name = "quantize_per_token"
    array = _checked(name, x, "[..., m, k]")
    sizes = _sizes(name, array, "k", masked_m, group_sizes)
    options = _options(name, dtype, power_of_two, has_sizes=bool(sizes))
    return QuantizedArray(*bind[name](array, *sizes, **options))


def quantize_per_block(
    x: ArrayLike, *, power_of_two: bool = False, dtype: DTypeLike = jnp.float8_e4m3fn
) -> QuantizedArray:
    """Casts weights to FP8, values = x / scales, with one scale per 128 x 128 block.

    Blocks at the lower and right edge are smaller if n or k is no multiple of 128. Zero blocks,
    NaN, Inf and tiny values are treated as by `quantize_per_token`.

    Args:
        x: bfloat16, float16, float32 or float64 [..., n, k]; float64 is rounded to float32 first.
        power_of_two: rounds each scale up to a power of two, so that scaling is exact.
        dtype: float8_e4m3fn, which GEMMs take, or float8_e5m2.

    Returns:
        QuantizedArray(dtype[..., n, k], float32[..., ceil(n/128), ceil(k/128)]).

    Raises:
        TypeError: x or dtype is of another type
            ("quantize_per_block: x must be ..., got int32[128, 128]").
        ValueError: x has fewer than two dimensions (same form).

    Source: DeepSeek-V3 technical report, section 3.3.2 (fine-grained quantisation).
    """
    name = "quantize_per_block"
    array = _checked(name, x, "[..., n, k]")
    return QuantizedArray(*bind[name](array, **_options(name, dtype, power_of_two)))


def quantize_per_token_transposed(
    x: ArrayLike, *, power_of_two: bool = False, dtype: DTypeLike = jnp.float8_e4m3fn
) -> QuantizedArray:
    """Casts to FP8 with one scale per 128 x 1 block, along m, and transposes, in one pass.

    The result is `quantize_per_token` of x transposed. The gradient of a weight, dy.T @ x, sums
    over tokens: that is the GEMM of two arrays with m last, and scales along m.

    Args:
        x: bfloat16, float16, float32 or float64 [..., m, k]; float64 is rounded to float32 first.
        power_of_two: rounds each scale up to a power of two, so that scaling is exact.
        dtype: float8_e4m3fn, which GEMMs take, or float8_e5m2.

    Returns:
        QuantizedArray(dtype[..., k, m], float32[..., k, ceil(m/128)]).

    Raises:
        TypeError: x or dtype is of another type
            ("quantize_per_token_transposed: x must be ..., got int32[4, 128]").
        ValueError: x has fewer than two dimensions (same form).

    Source: DeepSeek-V3 technical report, section 3.3.2 (128 x 1 tiles in the backward pass).
    """
    name = "quantize_per_token_transposed"
    array = _checked(name, x, "[..., m, k]")
    return QuantizedArray(*bind[name](array, **_options(name, dtype, power_of_two)))


def quantize_per_token_both(
    x: ArrayLike, *, power_of_two: bool = False, dtype: DTypeLike = jnp.float8_e4m3fn
) -> tuple[QuantizedArray, QuantizedArray]:
    """Returns `quantize_per_token` and `quantize_per_token_transposed` of x, which is read once.

    Training needs both of an activation: along k for the forward product, along m for the gradient
    of the weight.

    Args:
        x: bfloat16, float16, float32 or float64 [..., m, k]; float64 is rounded to float32 first.
        power_of_two: rounds each scale up to a power of two, so that scaling is exact.
        dtype: float8_e4m3fn, which GEMMs take, or float8_e5m2.

    Returns:
        QuantizedArray(dtype[..., m, k], float32[..., m, ceil(k/128)]) and
        QuantizedArray(dtype[..., k, m], float32[..., k, ceil(m/128)]).

    Raises:
        TypeError: x or dtype is of another type
            ("quantize_per_token_both: x must be ..., got int32[4, 128]").
        ValueError: x has fewer than two dimensions (same form).

    Source: DeepSeek-V3 technical report, section 3.3.2.
    """
    name = "quantize_per_token_both"
    array = _checked(name, x, "[..., m, k]")
    results = bind[name](array, **_options(name, dtype, power_of_two))
    return QuantizedArray(*results[:2]), QuantizedArray(*results[2:])


def silu_mul_quantize(
    x: ArrayLike,
    *,
    power_of_two: bool = False,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    masked_m: ArrayLike | None = None,
    group_sizes: ArrayLike | None = None,
) -> QuantizedArray:
    """SwiGLU and the cast of its result, in one pass: `quantize_per_token(silu(gate) * up)`.

    gate is x[..., :f] and up x[..., f:], as one GEMM with the weights of both returns them; silu(g)
    is g / (1 + exp(-g)). The product is computed in float32, not rounded to x's type in between,
    with a relative error of at most 2**-16.7 + 2**-24 * |gate|, by the same steps and to the same
    bits on every backend (`quantize_reference.silu_mul`). exp counts as zero below 2**-126, and so
    does the product for gates below about -87. Finite numbers whose product float32 cannot hold
    give its largest number.

    Args:
        x: bfloat16, float16, float32 or float64 [..., m, 2f]; float64 is rounded to float32 first.
        power_of_two: as for `quantize_per_token`.
        dtype: as for `quantize_per_token`.
        masked_m: as for `quantize_per_token`.
        group_sizes: as for `quantize_per_token`.

    Returns:
        QuantizedArray(dtype[..., m, f], float32[..., m, ceil(f/128)]).

    Raises:
        TypeError: x, dtype, masked_m or group_sizes is of another type
            ("silu_mul_quantize: x must be ..., got int32[4, 128]").
        ValueError: x has fewer than two dimensions or an odd number of columns, masked_m or
            group_sizes does not fit it, or both are given (same form).

    Source: DeepSeek-V3 technical report, section 3.2; Shazeer, "GLU Variants Improve Transformer".
    """
    name = "silu_mul_quantize"
    array = _checked(name, x, "[..., m, 2f]")
    if array.shape[-1] % 2:
        raise ValueError(
            f"{name}: x must be [..., m, 2f], gate and up side by side, got "
            f"{array.dtype}{list(array.shape)}"
        )
    sizes = _sizes(name, array, "2f", masked_m, group_sizes)
    options = _options(name, dtype, power_of_two, has_sizes=bool(sizes))
    return QuantizedArray(*bind[name](array, *sizes, **options))


def _checked(function: str, x: ArrayLike, form: str) -> jax.Array:
    """Returns x as an array of at most 32 bits, or raises in the name of `function`."""
    wanted = f"{function}: x must be {', '.join(_FLOAT_TYPES[:-1])} or {_FLOAT_TYPES[-1]} {form}"
    no_array = f"{function}: x must be an array, got {type(x).__name__}"
    if isinstance(x, tuple):
        raise TypeError(no_array)
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        of_no_numbers = isinstance(x, np.ndarray)
        raise TypeError(f"{wanted}, got {describe(x)}" if of_no_numbers else no_array) from error
    message = f"{wanted}, got {describe(array)}"
    if array.dtype.name not in _FLOAT_TYPES:
        raise TypeError(message)
    if array.ndim < 2:
        raise ValueError(message)
    check_static(function, **{f"x.shape[{axis}]": size for axis, size in enumerate(array.shape)})
    return array.astype(jnp.float32) if array.dtype == jnp.float64 else array


def _options(
    function: str, dtype: DTypeLike, power_of_two: bool, has_sizes: bool = False
) -> dict[str, Any]:
    """Returns a primitive's parameters, or raises in the name of `function`."""
    wanted = f"{function}: dtype must be {' or '.join(OUTPUT_TYPES)}"
    if dtype is None:  # float64, to NumPy
        raise TypeError(f"{wanted}, got None")
    try:
        output = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{wanted}, got {dtype!r}") from error
    if output.name not in OUTPUT_TYPES:
        raise TypeError(f"{wanted}, got {output.name}")
    return {
        "dtype": output,
        "power_of_two": boolean(function, "power_of_two", power_of_two),
        "fill": has_sizes and values_are_checked(),
    }


def _sizes(
    function: str, x: jax.Array, columns: str, masked_m: Any, group_sizes: Any
) -> tuple[jax.Array, ...]:
    """Returns what the primitive takes beside x: sizes [..., s] that add up to the valid rows."""
    if masked_m is None and group_sizes is None:
        return ()
    if masked_m is not None and group_sizes is not None:
        raise ValueError(f"{function}: masked_m and group_sizes must not be given together")
    argument = "group_sizes" if masked_m is None else "masked_m"
    form = ("m", columns) if masked_m is None else ("num_groups", "max_m", columns)
    if x.ndim != len(form):
        raise ValueError(
            f"{function}: x must be [{', '.join(form)}] where {argument} is given, "
            f"got {x.dtype}{list(x.shape)}"
        )
    if masked_m is None:
        sizes = check_integers(function, argument, group_sizes, ("num_sizes",), {})
        return (sizes if sizes.shape[0] else jnp.zeros(1, jnp.int32),)
    counts = check_integers(
        function, argument, masked_m, ("num_groups",), {"num_groups": x.shape[0]}
    )
    return (counts.reshape(-1, 1),)
