"""The dense operation: checks, primitive, documentation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm import reference
from jax_deepgemm.batching import NAMES, Batched, merge, refusal, to_front
from jax_deepgemm.config import GemmConfig
from jax_deepgemm.custom_call import declare_gemm, options
from jax_deepgemm.grouped import bind_masked
from jax_deepgemm.operands import Operand, check_pairs, check_static
from jax_deepgemm.partitioning import Dimensions, Partitioning
from jax_deepgemm.reference import BLOCK

_NAME = "gemm_fp8_fp8_bf16_nt"


def _batch(
    bind: Callable[..., jax.Array],
    operands: Sequence[jax.Array],
    axes: Sequence[int | None],
    parameters: dict[str, Any],
) -> Batched:
    """A batch of A is more rows, one of B more columns, and one of both a group for each."""
    a_axis, sfa_axis, b_axis, sfb_axis = axes
    if (a_axis is None) != (sfa_axis is None) or (b_axis is None) != (sfb_axis is None):
        raise refusal(_NAME, "values and their scales together", NAMES, axes)
    a, sfa, b, sfb = to_front(operands, axes)
    m, n, k = a.shape[-2], b.shape[-2], a.shape[-1]
    if b_axis is None:
        check_static(_NAME, m=a.shape[0] * m)
        d = bind(merge(a), merge(sfa), b, sfb, **parameters)
        return d.reshape(a.shape[0], m, n), 0
    batch = b.shape[0]
    check_static(_NAME, batch=batch)
    if a_axis is None and n % BLOCK == 0:  # the scales of one B end where those of the next begin
        d = bind(a, sfa, merge(b), merge(sfb), **parameters)
        return d.reshape(m, batch, n), 1
    if batch == 0:
        return jnp.zeros((batch, m, n), jnp.bfloat16), 0
    if a_axis is None:
        a, sfa = (jnp.broadcast_to(x, (batch, *x.shape)) for x in (a, sfa))
    sizes = {"num_groups": batch, "max_m": m, "n": n, "k": k}
    # The same SMs as when the operation was called, not as many as are allowed by now.
    grouped = options(
        _NAME,
        "masked",
        sizes,
        parameters["config"],
        expected_m=max(1, m),
        batch_invariant=parameters["batch_invariant"],
    ) | {"num_sms": parameters["num_sms"]}
    counts = jnp.full((batch,), m, jnp.int32)
    return bind_masked(a, sfa, b, sfb, counts, fill_zero=False, **grouped), 0


_gemm = declare_gemm(
    _NAME,
    op="dense",
    reference=reference.gemm_fp8_fp8_bf16_nt,
    batching_rule=_batch,
    partitioning=Partitioning(_NAME, Dimensions(("mk", "mj", "nk", "ij"), "mn")),
)


def gemm_fp8_fp8_bf16_nt(
    lhs: Operand,
    rhs: Operand,
    *,
    config: GemmConfig | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies two block-scaled FP8 matrices: d = dequantize(a, sfa) @ dequantize(b, sfb).T.

    d[i, j] = sum over x of a[i, x] * sfa[i, x // 128] * b[j, x] * sfb[j // 128, x // 128]

    Partial sums over 128 values of k come from the FP8 tensor cores and are accumulated, times
    their scales, in float32. Either matrix may be float8_e5m2 instead of float8_e4m3fn, whose range
    gradients want. On a CPU the same call computes `reference.gemm_fp8_fp8_bf16_nt`. Results are
    bitwise the same from run to run.

    Args:
        lhs: (a, sfa): float8_e4m3fn[m, k] and float32[m, ceil(k/128)], for example from
            `quantize_per_token`. m may be 0; k is a multiple of 16. Sizes are static: `jax.export`
            works with fixed shapes and not with symbolic ones.
        rhs: (b, sfb): float8_e4m3fn[n, k] and float32[ceil(n/128), ceil(k/128)], for example from
            `quantize_per_block`. n is a multiple of 8.
        config: the kernel to run on a GPU; by default `select_config` chooses by shape.
        batch_invariant: whether a row's bits, on a GPU, are to depend on nothing but the row, its
            matrix, n and k, and not on m, on other rows or on how rows are grouped. It takes
            configurations that split k away from selection, which costs time where m is small.

    Returns:
        bfloat16[m, n].

    Raises:
        TypeError: an operand is no pair, or an array has the wrong dtype.
        ValueError: an array has the wrong shape, or the configuration is illegal for it. Messages
            name the function, the argument, what was expected and what came.

    Source:
        DeepSeek-V3 technical report, section 3.3.2; DeepGEMM's function of the same name.
    """
    operands, sizes = check_pairs(_NAME, lhs, rhs)
    parameters = options(_NAME, "dense", sizes, config, batch_invariant=batch_invariant)
    return _gemm(*operands, **parameters)
