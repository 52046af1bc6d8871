"""The dense operation: checks, primitive, documentation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm import reference
from jax_deepgemm.config import GemmConfig
from jax_deepgemm.custom_call import declare_gemm, options
from jax_deepgemm.operands import Operand, check_pairs, check_static


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
    check_static("gemm_fp8_fp8_bf16_nt", m=batch * m)
    d = bind(a.reshape(batch * m, k), sfa.reshape(batch * m, sfa.shape[2]), b, sfb, **parameters)
    return d.reshape(batch, m, b.shape[0]), 0


_gemm = declare_gemm(
    "gemm_fp8_fp8_bf16_nt",
    op="dense",
    reference=reference.gemm_fp8_fp8_bf16_nt,
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
    operands, sizes = check_pairs(name, lhs, rhs)
    return _gemm(*operands, **options(name, "dense", sizes, config))
