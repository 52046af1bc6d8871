"""The dense operation: checks, primitive, documentation."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm import reference
from jax_deepgemm.batching import NAMES, positions, refusal, to_front
from jax_deepgemm.config import GemmConfig
from jax_deepgemm.custom_call import check_options, declare_gemm, options
from jax_deepgemm.ffi.primitive import Batches, Batching
from jax_deepgemm.grouped import masked
from jax_deepgemm.operands import Operand, check_pairs, check_static
from jax_deepgemm.partitioning import Dimensions, Partitioning
from jax_deepgemm.reference import BLOCK

_NAME = "gemm_fp8_fp8_bf16_nt"


def _admit(
    operands: Sequence[jax.Array], axes: Sequence[int | None]
) -> tuple[Sequence[jax.Array], str]:
    a_axis, sfa_axis, b_axis, sfb_axis = axes
    if (a_axis is None) != (sfa_axis is None) or (b_axis is None) != (sfb_axis is None):
        raise refusal(_NAME, "values and their scales together", NAMES, axes)
    a, sfa, b, sfb = to_front(operands, axes)
    whose = ("a" if a_axis is not None else "") + ("b" if b_axis is not None else "")
    check_static(_NAME, batch=(b if a_axis is None else a).shape[0])
    return (a, sfa, b, sfb), whose


def _fold(
    bind: Callable[..., jax.Array],
    batches: Batches,
    operands: Sequence[jax.Array],
    parameters: dict[str, Any],
) -> jax.Array:
    """A batch of A is more rows, one of B more columns, and one of both a group for each."""
    a, _, b, _ = operands
    (m, k), n = a.shape[-2:], b.shape[-2]
    of_a, of_b = iter(a.shape[:-2]), iter(b.shape[:-2])
    sizes = []
    for whose in batches:
        size = next(of_a) if "a" in whose else next(of_b)
        sizes.append(size if whose != "ab" else next(of_b))
    if 0 in sizes:
        return jnp.zeros_like(a, shape=(*sizes, m, n), dtype=jnp.bfloat16)

    groups, rows, columns = (positions(batches, whose) for whose in ("ab", "a", "b"))
    if n % BLOCK:  # the scales of one B do not end where those of the next begin
        groups, columns = sorted([*groups, *columns]), []
    group_sizes = [sizes[i] for i in groups]

    def stack(x: jax.Array, whose: str, merged: list[int]) -> jax.Array:
        """Of x [its batches, p, q] makes [all groups, merged batches and p, q]."""
        held = [i for i, of in enumerate(batches) if whose in of]
        order = [held.index(i) for i in (*groups, *merged) if i in held]
        x = x.transpose(*order, x.ndim - 2, x.ndim - 1)
        # A, where the groups are matrices B alone.
        x = jnp.expand_dims(x, [place for place, i in enumerate(groups) if i not in held])
        x = jnp.broadcast_to(x, (*group_sizes, *x.shape[len(groups) :]))
        leading = [math.prod(group_sizes)] if groups else []
        return x.reshape(*leading, math.prod(x.shape[len(groups) : -1]), x.shape[-1])

    stacked = [
        *(stack(x, "a", rows) for x in operands[:2]),
        *(stack(x, "b", columns) for x in operands[2:]),
    ]
    m_all, n_all = stacked[0].shape[-2], stacked[2].shape[-2]
    if groups:
        num_groups = math.prod(group_sizes)
        # The same SMs as when the operation was called, not as many as are allowed by now.
        grouped = options(
            _NAME,
            "masked",
            {"num_groups": num_groups, "max_m": m_all, "n": n_all, "k": k},
            parameters["config"],
            expected_m=max(1, m_all),
            batch_invariant=parameters["batch_invariant"],
            num_sms=parameters["num_sms"],
        )
        counts = jnp.full((num_groups,), m_all, jnp.int32)
        d = masked.here(*stacked, counts, fill_zero=False, **grouped)
    else:
        check_options(_NAME, "dense", {"m": m_all, "n": n_all, "k": k}, parameters)
        d = bind(*stacked, **parameters)
    d = d.reshape(*(sizes[i] for i in (*groups, *rows)), m, *(sizes[i] for i in columns), n)
    order = [*groups, *rows, "m", *columns, "n"]
    return d.transpose(*(order.index(name) for name in (*range(len(batches)), "m", "n")))


_gemm = declare_gemm(
    _NAME,
    op="dense",
    reference=reference.gemm_fp8_fp8_bf16_nt,
    batching=Batching(_admit, _fold),
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
