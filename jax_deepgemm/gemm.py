"""The dense operation: checks, primitive, documentation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_deepgemm import reference
from jax_deepgemm.arguments import H100_SMS, is_array
from jax_deepgemm.config import GemmConfig, check_config, check_problem
from jax_deepgemm.device import num_sms_limit
from jax_deepgemm.ffi import _native
from jax_deepgemm.ffi.primitive import declare
from jax_deepgemm.layout import get_tma_aligned_size

BLOCK = reference.BLOCK
Operand = tuple[ArrayLike, ArrayLike]


def _result(a: Any, sfa: Any, b: Any, sfb: Any) -> tuple[tuple[int, ...], Any]:
    return (a.shape[0], b.shape[0]), jnp.bfloat16


def _attributes(
    a: Any, sfa: Any, b: Any, sfb: Any, *, config: GemmConfig | None, num_sms: int
) -> dict[str, int]:
    m, k = a.shape
    fields = config.fields if config else (0,) * len(GemmConfig.__dataclass_fields__)
    return {
        "m": m,
        "n": b.shape[0],
        "k": k,
        "num_sms": num_sms,
        **dict(zip(GemmConfig.__dataclass_fields__, fields, strict=True)),
    }


def _pad_scales(
    a: jax.Array, sfa: jax.Array, b: jax.Array, sfb: jax.Array
) -> tuple[jax.Array, ...]:
    """SFA with m padded to 16 bytes: it is read m-contiguous, and TMA wants such strides."""
    m = sfa.shape[0]
    padding = get_tma_aligned_size(m, sfa.dtype.itemsize) - m
    return a, jnp.pad(sfa, ((0, padding), (0, 0))) if padding else sfa, b, sfb


def _batch(
    bind: Callable[..., jax.Array],
    operands: Sequence[jax.Array],
    axes: Sequence[int | None],
    parameters: dict[str, Any],
) -> tuple[jax.Array, int]:
    """A batch of A with one B is one GEMM with more rows."""
    a, sfa, b, sfb = operands
    a_axis, sfa_axis, b_axis, sfb_axis = axes
    if a_axis is None or sfa_axis is None or b_axis is not None or sfb_axis is not None:
        raise NotImplementedError(
            "gemm_fp8_fp8_bf16_nt: jax.vmap takes a batch of both a and sfa with one b and sfb "
            f"(in_axes ((int, int), (None, None))), got ((a {a_axis}, sfa {sfa_axis}), "
            f"(b {b_axis}, sfb {sfb_axis}))"
        )
    a = jnp.moveaxis(a, a_axis, 0)
    sfa = jnp.moveaxis(sfa, sfa_axis, 0)
    batch, m, k = a.shape
    _check_static("gemm_fp8_fp8_bf16_nt", m=batch * m)
    d = bind(a.reshape(batch * m, k), sfa.reshape(batch * m, sfa.shape[2]), b, sfb, **parameters)
    return d.reshape(batch, m, b.shape[0]), 0


_gemm = declare(
    "gemm_fp8_fp8_bf16_nt",
    target=_native.GEMM_TARGET,
    result=_result,
    attributes=_attributes,
    reference=reference.gemm_fp8_fp8_bf16_nt,
    operand_layouts=(None, (1, 0), None, None),
    prepare=_pad_scales,
    batching_rule=_batch,
)


def gemm_fp8_fp8_bf16_nt(
    lhs: Operand, rhs: Operand, *, config: GemmConfig | None = None
) -> jax.Array:
    """Multiplies two block-scaled FP8 matrices: d = dequantize(a, sfa) @ dequantize(b, sfb).T.

    d[i, j] = sum over x of a[i, x] * sfa[i, x // 128] * b[j, x] * sfb[j // 128, x // 128]

    Partial sums over 128 values of k come from the FP8 tensor cores and are accumulated, times
    their scales, in float32. On a CPU the same call computes `reference.gemm_fp8_fp8_bf16_nt`.
    Results are bitwise the same from run to run.

    Args:
        lhs: (a, sfa): float8_e4m3fn[m, k] and float32[m, ceil(k/128)], for example from
            `quantize_per_token`. m may be 0; k is a multiple of 16. Sizes are static: `jax.export`
            works with fixed shapes and not with symbolic ones.
        rhs: (b, sfb): float8_e4m3fn[n, k] and float32[ceil(n/128), ceil(k/128)], for example from
            `quantize_per_block`. n is a multiple of 8.
        config: the kernel to run on a GPU; by default `select_config` chooses by shape.

    Returns:
        bfloat16[m, n].

    Raises:
        TypeError: an operand is no pair, or an array has the wrong dtype.
        ValueError: an array has the wrong shape, or the configuration is illegal for it. Messages
            name the function, the argument, what was expected and what came.

    Source:
        DeepSeek-V3 technical report, section 3.3.2; DeepGEMM's function of the same name.
    """
    name = "gemm_fp8_fp8_bf16_nt"
    a, sfa = _pair(name, "lhs", "(a, sfa)", lhs)
    b, sfb = _pair(name, "rhs", "(b, sfb)", rhs)
    _check(name, "a", a, jnp.float8_e4m3fn, (None, None), "m, k")
    m, k = a.shape
    _check_static(name, m=m, k=k)
    _check(name, "b", b, jnp.float8_e4m3fn, (None, k), "n, k")
    n = b.shape[0]
    _check_static(name, n=n)
    k_blocks, n_blocks = -(-k // BLOCK), -(-n // BLOCK)
    _check(name, "sfa", sfa, jnp.float32, (m, k_blocks), "m, ceil(k/128)")
    _check(name, "sfb", sfb, jnp.float32, (n_blocks, k_blocks), "ceil(n/128), ceil(k/128)")
    limit = num_sms_limit()
    problem = check_problem(name, m, n, k, limit or H100_SMS)
    if config is not None:
        check_config(name, problem, config)
    return _gemm(a, sfa, b, sfb, config=config, num_sms=limit)


def _pair(name: str, argument: str, form: str, pair: Operand) -> tuple[jax.Array, jax.Array]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            f"{name}: {argument} must be a pair {form} of values and scales, "
            f"got {type(pair).__name__}"
        )
    for part in pair:
        if not is_array(part):
            raise TypeError(
                f"{name}: {argument} must be a pair {form} of arrays, got {type(part).__name__}"
            )
    return jnp.asarray(pair[0]), jnp.asarray(pair[1])


def _check_static(name: str, **sizes: Any) -> None:
    """Raises if a size is symbolic, as `jax.export` may make it: kernels are compiled for sizes."""
    for argument, size in sizes.items():
        if not isinstance(size, int):
            raise ValueError(f"{name}: {argument} must be static, got {size}")


def _check(
    name: str,
    argument: str,
    array: jax.Array,
    dtype: Any,
    shape: tuple[int | None, ...],
    meaning: str,
) -> None:
    """Raises unless the array has this dtype and shape (None: any size)."""
    right_dtype = array.dtype == np.dtype(dtype)
    right_shape = array.ndim == len(shape) and all(
        want is None or size == want for size, want in zip(array.shape, shape, strict=True)
    )
    if right_dtype and right_shape:
        return
    sizes = meaning.split(", ")
    wanted = ", ".join(
        part if want is None else str(want) for part, want in zip(sizes, shape, strict=True)
    )
    error = ValueError if right_dtype else TypeError
    raise error(
        f"{name}: {argument} must be {np.dtype(dtype).name}[{wanted}] ({meaning}), "
        f"got {array.dtype.name}[{', '.join(map(str, array.shape))}]"
    )
