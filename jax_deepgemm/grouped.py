"""The grouped operations: checks, primitives, documentation.

Each multiplies every row of A by one of several weight matrices, and says in its own way by which:

- contiguous: an index per row; the rows of a group begin at multiples of 128;
- masked: as many rows for each group, of which the first few count;
- ragged: consecutive rows for each group, as many as its size says.

Indices, counts and sizes live on the device: no kernel is compiled for them, and nothing waits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm import reference
from jax_deepgemm.arguments import integer, is_array
from jax_deepgemm.batching import NAMES, fold, positions, refusal, to_front
from jax_deepgemm.config import GemmConfig
from jax_deepgemm.custom_call import check_options, declare_gemm, options
from jax_deepgemm.ffi.primitive import Batches, Batching
from jax_deepgemm.layout import get_m_alignment_for_contiguous_layout
from jax_deepgemm.operands import (
    Operand,
    check_integers,
    check_pairs,
    check_static,
    describe,
    values_are_checked,
)
from jax_deepgemm.partitioning import Dimensions, Partitioning, Shard

_CONTIGUOUS = "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous"
_MASKED = "m_grouped_gemm_fp8_fp8_bf16_nt_masked"
_RAGGED = "m_grouped_gemm_fp8_fp8_bf16_nt_ragged"

_FILLS = ("undefined", "zero")

Local = tuple[Sequence[jax.Array], dict[str, Any]]
"""Arrays that assign rows to groups, and parameters, as one device of several gets them."""


def _admit_contiguous(
    operands: Sequence[jax.Array], axes: Sequence[int | None]
) -> tuple[Sequence[jax.Array], str]:
    a_axis, sfa_axis, b_axis, sfb_axis, _ = axes
    names = (*NAMES, "m_indices")
    if a_axis is None or sfa_axis is None or (b_axis is None) != (sfb_axis is None):
        wanted = "a batch of a and sfa, and of b and sfb both or neither"
        raise refusal(_CONTIGUOUS, wanted, names, axes)
    a, sfa, b, sfb, indices = to_front(operands, axes)
    m = a.shape[-2]
    if m % get_m_alignment_for_contiguous_layout():
        wanted = "a batch of layouts whose m is a multiple of 128, so that the next one is aligned"
        raise refusal(_CONTIGUOUS, f"{wanted} (m is {m})", names, axes)
    check_static(_CONTIGUOUS, batch=a.shape[0])
    indices = jnp.broadcast_to(indices, a.shape[:-1])
    return (a, sfa, b, sfb, indices), "a" if b_axis is None else "ab"


def _fold_contiguous(
    bind: Callable[..., jax.Array],
    batches: Batches,
    operands: Sequence[jax.Array],
    parameters: dict[str, Any],
) -> jax.Array:
    """A batch is more rows, and with a batch of B more groups."""
    a, sfa, b, sfb, indices = operands
    *sizes, m, k = a.shape
    num_groups, n = b.shape[-3:-1]
    if 0 in sizes:
        return jnp.zeros_like(a, shape=(*sizes, m, n), dtype=jnp.bfloat16)
    if own := positions(batches, "ab"):  # matrices of each entry of the batch
        first = jnp.zeros((1,) * indices.ndim, jnp.int32)
        for i in own:
            along = [size if axis == i else 1 for axis, size in enumerate((*sizes, 1))]
            first = sizes[i] * first + jnp.arange(sizes[i], dtype=jnp.int32).reshape(along)
        held = (indices >= 0) & (indices < num_groups)
        indices = jnp.where(held, num_groups * first + indices, -1)
    rows = [fold(x, len(sizes), m) for x in (a, sfa, indices)]
    matrices = [fold(x, b.ndim - 3, num_groups) for x in (b, sfb)]
    total = {"num_groups": matrices[0].shape[0], "m": rows[0].shape[0], "n": n, "k": k}
    check_options(_CONTIGUOUS, "contiguous", total, parameters)
    d = bind(*rows[:2], *matrices, rows[2], **parameters)
    return d.reshape(*sizes, m, n)


def _admit_masked(
    operands: Sequence[jax.Array], axes: Sequence[int | None]
) -> tuple[Sequence[jax.Array], str]:
    if None in axes[:4]:
        raise refusal(_MASKED, "a batch of a, sfa, b and sfb together", (*NAMES, "masked_m"), axes)
    *matrices, counts = to_front(operands, axes)
    a = matrices[0]
    check_static(_MASKED, batch=a.shape[0])
    return (*matrices, jnp.broadcast_to(counts, a.shape[:-2])), "ab"


def _fold_masked(
    bind: Callable[..., jax.Array],
    batches: Batches,
    operands: Sequence[jax.Array],
    parameters: dict[str, Any],
) -> jax.Array:
    """A batch of everything is more groups."""
    a, _, b, _, _ = operands
    *sizes, num_groups, max_m, k = a.shape
    n = b.shape[-2]
    if 0 in sizes:
        return jnp.zeros_like(a, shape=(*sizes, num_groups, max_m, n), dtype=jnp.bfloat16)
    folded = [fold(x, len(sizes), num_groups) for x in operands]
    total = {"num_groups": folded[0].shape[0], "max_m": max_m, "n": n, "k": k}
    check_options(_MASKED, "masked", total, parameters)
    d = bind(*folded, **parameters)
    return d.reshape(*sizes, num_groups, max_m, n)


def _admit_ragged(
    operands: Sequence[jax.Array], axes: Sequence[int | None]
) -> tuple[Sequence[jax.Array], str]:
    raise refusal(
        _RAGGED,
        "no batch, because rows of no group may stand between one and the next: make the batch "
        "part of the rows and of the groups",
        (*NAMES, "group_sizes", "group_offset"),
        axes,
    )


def _block_groups(num_groups: int, m_indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns m_indices, and for each block of 128 rows what the kernel wants to know of it.

    That is -1 for a block without a row of a group, or else twice the group, plus 1 if the block
    has padding rows, too: those past m are some. The kernel looks at single rows only then.
    """
    m = m_indices.shape[0]
    block_m = get_m_alignment_for_contiguous_layout()
    num_blocks = -(-m // block_m)
    groups = jnp.pad(m_indices, (0, num_blocks * block_m - m), constant_values=-1)
    groups = groups.reshape(num_blocks, block_m)
    is_padding = (groups < 0) | (groups >= num_groups)
    # One reduction of two values, so that XLA makes one kernel of it.
    group, has_padding = lax.reduce(
        (jnp.where(is_padding, -1, groups), is_padding.astype(jnp.int32)),
        (np.int32(-1), np.int32(0)),
        lambda x, y: (jnp.maximum(x[0], y[0]), jnp.maximum(x[1], y[1])),
        dimensions=(1,),
    )
    return m_indices, jnp.where(group < 0, -1, 2 * group + has_padding)


def _local_indices(shard: Shard, arrays: Sequence[jax.Array], parameters: dict[str, Any]) -> Local:
    (indices,) = arrays
    if "g" in shard.starts:
        start, size = shard.starts["g"], shard.sizes["g"]
        held = (indices >= start) & (indices < start + size)
        indices = jnp.where(held, indices - start, -1)
    return (indices,), parameters


def _local_counts(shard: Shard, arrays: Sequence[jax.Array], parameters: dict[str, Any]) -> Local:
    (counts,) = arrays
    if "m" in shard.starts:
        size = shard.sizes["m"]
        # Counts may be any numbers: clipped first, so that the difference does not overflow.
        counts = jnp.clip(counts, 0, shard.starts["m"] + size) - shard.starts["m"]
        parameters = parameters | {"expected_m": min(parameters["expected_m"], size)}
    return (counts,), parameters


def _local_sizes(shard: Shard, arrays: Sequence[jax.Array], parameters: dict[str, Any]) -> Local:
    sizes, offset = arrays
    if "m" in shard.starts:
        start, size = shard.starts["m"], shard.sizes["m"]
        ends = reference.group_ends(sizes, np.iinfo(np.int32).max).astype(jnp.int32)
        ends = jnp.clip(ends, start, start + size) - start
        sizes = jnp.diff(ends, prepend=0)
    if "g" in shard.starts:
        offset = offset + shard.starts["g"]
    return (sizes, offset), parameters


_contiguous = declare_gemm(
    _CONTIGUOUS,
    op="contiguous",
    reference=reference.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous,
    batching=Batching(_admit_contiguous, _fold_contiguous),
    partitioning=Partitioning(
        _CONTIGUOUS,
        Dimensions(("mk", "mj", "gnk", "gij", "m"), "mn"),
        _local_indices,
        m_unit=get_m_alignment_for_contiguous_layout(),
    ),
    num_arrays=2,
    assign=_block_groups,
)

masked = declare_gemm(
    _MASKED,
    op="masked",
    reference=reference.m_grouped_gemm_fp8_fp8_bf16_nt_masked,
    batching=Batching(_admit_masked, _fold_masked),
    partitioning=Partitioning(
        _MASKED, Dimensions(("gmk", "gmj", "gnk", "gij", "g"), "gmn"), _local_counts
    ),
    num_arrays=1,
)

_ragged = declare_gemm(
    _RAGGED,
    op="ragged",
    reference=reference.m_grouped_gemm_fp8_fp8_bf16_nt_ragged,
    batching=Batching(_admit_ragged),
    partitioning=Partitioning(
        _RAGGED, Dimensions(("mk", "mj", "gnk", "gij", "s", "o"), "mn"), _local_sizes
    ),
    num_arrays=2,
)


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Operand,
    rhs: Operand,
    m_indices: ArrayLike,
    *,
    config: GemmConfig | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies every row by the matrix of its index: d[i] = a[i] @ b[m_indices[i]].T.

    Operands are dequantised as by `gemm_fp8_fp8_bf16_nt`, which says more about the numbers. Rows
    without a group are padding: they may hold anything, NaN too, and come back as zeros.

    Args:
        lhs: (a, sfa): float8_e4m3fn[m, k] and float32[m, ceil(k/128)], for example from
            `quantize_per_token`. m may be any number, k is a multiple of 16.
        rhs: (b, sfb): float8_e4m3fn[num_groups, n, k] and
            float32[num_groups, ceil(n/128), ceil(k/128)], for example from `quantize_per_block`.
            n is a multiple of 8.
        m_indices: int32[m]: the group of each row; -1, or any other number that is no index of b,
            marks padding. Of the rows [128 * i, 128 * i + 128), for every i, all that are no
            padding must belong to one group (`get_m_alignment_for_contiguous_layout`). This is not
            checked: where groups share such a block, rows of all but its largest index are
            undefined on a GPU.
        config: the kernel to run on a GPU; by default `select_config` chooses by shape.
        batch_invariant: as for `gemm_fp8_fp8_bf16_nt`.

    Returns:
        bfloat16[m, n].

    Raises:
        TypeError: an operand is no pair, m_indices no array, or an array has the wrong dtype.
        ValueError: an array has the wrong shape, or the configuration is illegal for it. Messages
            name the function, the argument, what was expected and what came.

    Source:
        DeepGEMM's function of the same name.
    """
    operands, sizes = check_pairs(_CONTIGUOUS, lhs, rhs, groups=("num_groups",))
    indices = check_integers(_CONTIGUOUS, "m_indices", m_indices, ("m",), sizes)
    parameters = options(_CONTIGUOUS, "contiguous", sizes, config, batch_invariant=batch_invariant)
    return _contiguous(*operands, indices, **parameters)


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Operand,
    rhs: Operand,
    masked_m: ArrayLike,
    expected_m: SupportsIndex,
    *,
    fill: Literal["undefined", "zero"] = "undefined",
    config: GemmConfig | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies the first rows of every group by its matrix: d[g, i] = a[g, i] @ b[g].T.

    i runs from 0 to masked_m[g] - 1. Operands are dequantised as by `gemm_fp8_fp8_bf16_nt`, which
    says more about the numbers. The rows of a from masked_m[g] on may hold anything, NaN too.

    Args:
        lhs: (a, sfa): float8_e4m3fn[num_groups, max_m, k] and
            float32[num_groups, max_m, ceil(k/128)], for example from `quantize_per_token`. max_m
            may be any number, k is a multiple of 16.
        rhs: (b, sfb): float8_e4m3fn[num_groups, n, k] and
            float32[num_groups, ceil(n/128), ceil(k/128)], for example from `quantize_per_block`.
            n is a multiple of 8.
        masked_m: int32[num_groups]: the rows of each group. A negative number counts as 0, one
            above max_m as max_m.
        expected_m: the rows of a group that are to be expected, at least 1; more than max_m counts
            as max_m. A hint by which the kernel is chosen, without influence on what is computed.
        fill: what becomes of the rows of d from masked_m[g] on. "undefined": on a GPU they are not
            written and hold whatever was in that memory, NaN perhaps; where it is traced under
            `jax.debug_nans` or `jax.debug_infs`, they are zeros. "zero": they are zeros.
        config: the kernel to run on a GPU; by default `select_config` chooses by shape.
        batch_invariant: as for `gemm_fp8_fp8_bf16_nt`.

    Returns:
        bfloat16[num_groups, max_m, n].

    Raises:
        TypeError: an operand is no pair, masked_m no array, expected_m no integer, or an array has
            the wrong dtype.
        ValueError: an array has the wrong shape, expected_m or fill is none of the values above, or
            the configuration is illegal for the shapes. Messages name the function, the argument,
            what was expected and what came.

    Source:
        DeepGEMM's function of the same name, whose rows from masked_m[g] on are undefined.
    """
    operands, sizes = check_pairs(
        _MASKED, lhs, rhs, rows=("num_groups", "max_m"), groups=("num_groups",)
    )
    counts = check_integers(_MASKED, "masked_m", masked_m, ("num_groups",), sizes)
    if not isinstance(fill, str) or fill not in _FILLS:
        raise ValueError(f"{_MASKED}: fill must be one of {', '.join(_FILLS)}, got {fill!r}")
    expected_m = integer(_MASKED, "expected_m", expected_m, bits=64)
    parameters = options(
        _MASKED, "masked", sizes, config, expected_m=expected_m, batch_invariant=batch_invariant
    )
    fill_zero = fill == "zero" or values_are_checked()
    return masked(*operands, counts, fill_zero=fill_zero, **parameters)


def m_grouped_gemm_fp8_fp8_bf16_nt_ragged(
    lhs: Operand,
    rhs: Operand,
    group_sizes: ArrayLike,
    group_offset: ArrayLike | None = None,
    *,
    config: GemmConfig | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies consecutive rows by the matrix of their group, like `jax.lax.ragged_dot`.

    d[i] = a[i] @ b[g - group_offset].T, where group g owns the group_sizes[g] rows that follow
    those of group g - 1. Sizes may be any numbers, 0 too: nothing is aligned and nothing padded.
    Operands are dequantised as by `gemm_fp8_fp8_bf16_nt`, which says more about the numbers.

    Rows of no group, behind the last one, are zero, and so are rows of groups that b does not hold:
    with experts spread over devices, each passes all rows and sizes, its own b and the offset of
    its first expert, and the sum over devices is the whole result. What a holds in those rows, NaN
    perhaps, does not matter.

    Args:
        lhs: (a, sfa): float8_e4m3fn[m, k] and float32[m, ceil(k/128)], rows sorted by group, for
            example from `quantize_per_token`. m may be any number, k is a multiple of 16.
        rhs: (b, sfb): float8_e4m3fn[num_groups, n, k] and
            float32[num_groups, ceil(n/128), ceil(k/128)], for example from `quantize_per_block`.
            n is a multiple of 8.
        group_sizes: int32[num_sizes]; num_sizes is num_groups, or with group_offset at least
            num_groups. A negative size counts as 0; what exceeds m in all is cut off.
        group_offset: int32, a number or an array of shape () or (1,): b holds the groups
            group_offset, ..., group_offset + num_groups - 1. Those of them that are no index of
            group_sizes are empty.
        config: the kernel to run on a GPU; by default `select_config` chooses by shape.
        batch_invariant: as for `gemm_fp8_fp8_bf16_nt`.

    Returns:
        bfloat16[m, n].

    Raises:
        TypeError: an operand is no pair, group_sizes no array, group_offset no integer, or an array
            has the wrong dtype.
        ValueError: an array has the wrong shape, or the configuration is illegal for it. Messages
            name the function, the argument, what was expected and what came.

    Source:
        `jax.lax.ragged_dot` for the semantics; DeepGEMM has no such function.
    """
    operands, sizes = check_pairs(_RAGGED, lhs, rhs, groups=("num_groups",))
    name = "num_groups" if group_offset is None else "num_sizes"
    group_sizes = check_integers(_RAGGED, "group_sizes", group_sizes, (name,), sizes)
    if group_sizes.shape[0] < sizes["num_groups"]:
        raise ValueError(
            f"{_RAGGED}: group_sizes must have at least the {sizes['num_groups']} groups of b, "
            f"got {describe(group_sizes)}"
        )
    offset = _offset(group_offset, group_sizes)
    parameters = options(_RAGGED, "ragged", sizes, config, batch_invariant=batch_invariant)
    return _ragged(*operands, group_sizes, offset, **parameters)


@functools.partial(jax.jit, keep_unused=True)
def _zero(like: jax.Array) -> jax.Array:
    return jnp.zeros(1, jnp.int32)


def _offset(group_offset: Any, group_sizes: jax.Array) -> jax.Array:
    """Returns the offset as int32[1], as the custom call takes it."""
    if group_offset is None:
        if not isinstance(group_sizes, jax.core.Tracer):
            # Where operations run one by one, a program makes it on the devices of the sizes:
            # nothing is copied from the host.
            zero: jax.Array = _zero(group_sizes)
            return zero
        group_offset = 0
    if not is_array(group_offset):
        number = integer(_RAGGED, "group_offset", group_offset, bits=32)
        return jnp.asarray([number], jnp.int32)
    names = ("1",) * len(group_offset.shape)
    if group_offset.shape not in ((), (1,)):
        raise ValueError(
            f"{_RAGGED}: group_offset must be one number, got {describe(group_offset)}"
        )
    return check_integers(_RAGGED, "group_offset", group_offset, names, {"1": 1}).reshape(1)
