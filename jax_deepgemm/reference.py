"""The operations in float32 `jax.numpy`: specification, CPU lowering and test oracle in one.

A function here says what the kernel of the same name computes, on any backend. Operands come as
flat arguments, already checked by the public operation; shapes are those of its docstring. Where
they say float8_e4m3fn, A or B or both may be float8_e5m2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 128  # values of k, and rows of a weight matrix, that share one scale
_TILE_M = 128  # rows that grouped operations multiply at a time


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


# Groups are picked from arrays of bytes: on a CPU, XLA slices FP8 only after widening it, and that
# is all groups, those without rows, too.
def _to_bytes(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.uint8)


def _from_bytes(values: jax.Array, like: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, like.dtype)


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    a: jax.Array, sfa: jax.Array, b: jax.Array, sfb: jax.Array, m_indices: jax.Array
) -> jax.Array:
    """Returns d[i] = a[i] @ b[m_indices[i]].T of the dequantised operands.

    Args:
        a: float8_e4m3fn[m, k].
        sfa: float32[m, ceil(k/128)].
        b: float8_e4m3fn[num_groups, n, k].
        sfb: float32[num_groups, ceil(n/128), ceil(k/128)].
        m_indices: int32[m]; rows whose index is no group are zero. In any order: what the kernel
            asks for beyond that, aligned segments, makes no difference here.

    Returns:
        bfloat16[m, n].
    """
    m, k = a.shape
    num_groups, n, _ = b.shape
    groups = jnp.where((m_indices >= 0) & (m_indices < num_groups), m_indices, num_groups)
    b_bytes = _to_bytes(b)

    def multiply(tile: tuple[jax.Array, ...]) -> jax.Array:
        """Multiplies a tile of rows by the matrix of each group in it, one after the other."""
        a, sfa, groups = tile

        def next_group(group: jax.Array | int) -> jax.Array:
            return jnp.min(jnp.where(groups > group, groups, num_groups))

        def add_group(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d, group = state
            product = gemm_fp8_fp8_bf16_nt(a, sfa, _from_bytes(b_bytes[group], b), sfb[group])
            return jnp.where((groups == group)[:, None], product, d), next_group(group)

        # Made of an operand, zero varies over the mesh axes that it varies over.
        zero = jnp.zeros_like(a, jnp.bfloat16, (a.shape[0], n))
        d, _ = lax.while_loop(
            lambda state: state[1] < num_groups, add_group, (zero, next_group(-1))
        )
        return d

    # Only one matrix at a time is dequantised, and none for every row.
    tile_m = max(1, min(m, _TILE_M))
    num_tiles = -(-m // tile_m)
    padding = num_tiles * tile_m - m
    tiles = (
        jnp.pad(a, ((0, padding), (0, 0))).reshape(num_tiles, tile_m, k),
        jnp.pad(sfa, ((0, padding), (0, 0))).reshape(num_tiles, tile_m, -(-k // BLOCK)),
        jnp.pad(groups, (0, padding), constant_values=num_groups).reshape(num_tiles, tile_m),
    )
    d: jax.Array = lax.map(multiply, tiles)
    return d.reshape(num_tiles * tile_m, n)[:m]


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    a: jax.Array, sfa: jax.Array, b: jax.Array, sfb: jax.Array, masked_m: jax.Array
) -> jax.Array:
    """Returns d[g, i] = a[g, i] @ b[g].T of the dequantised operands, zero from i = masked_m[g] on.

    Args:
        a: float8_e4m3fn[num_groups, max_m, k].
        sfa: float32[num_groups, max_m, ceil(k/128)].
        b: float8_e4m3fn[num_groups, n, k].
        sfb: float32[num_groups, ceil(n/128), ceil(k/128)].
        masked_m: int32[num_groups], any numbers.

    Returns:
        bfloat16[num_groups, max_m, n].
    """
    row = jnp.arange(a.shape[1], dtype=jnp.int32)[:, None]

    def multiply(group: tuple[jax.Array, ...]) -> jax.Array:
        a_bytes, sfa, b_bytes, sfb, count = group
        a_group, b_group = _from_bytes(a_bytes, a), _from_bytes(b_bytes, b)
        d = gemm_fp8_fp8_bf16_nt(a_group, sfa, b_group, sfb)
        return jnp.where(row < count, d, 0)

    d: jax.Array = lax.map(multiply, (_to_bytes(a), sfa, _to_bytes(b), sfb, masked_m))
    return d


def group_ends(sizes: jax.Array, m: int) -> jax.Array:
    """The row behind each group's last, as uint32: a sum that stops at m cannot overflow."""
    ends: jax.Array = lax.associative_scan(
        lambda x, y: jnp.minimum(x + y, np.uint32(m)),
        jnp.clip(sizes, 0, m).astype(jnp.uint32),
    )
    return ends


def m_grouped_gemm_fp8_fp8_bf16_nt_ragged(
    a: jax.Array,
    sfa: jax.Array,
    b: jax.Array,
    sfb: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
) -> jax.Array:
    """Returns d[i] = a[i] @ b[g - group_offset].T of the dequantised operands, i a row of group g.

    Args:
        a: float8_e4m3fn[m, k], rows sorted by group.
        sfa: float32[m, ceil(k/128)].
        b: float8_e4m3fn[num_groups, n, k].
        sfb: float32[num_groups, ceil(n/128), ceil(k/128)].
        group_sizes: int32[num_sizes]: group g owns as many rows, behind those of the groups before
            it. Negative sizes count as 0, and what exceeds m is cut off.
        group_offset: int32[1]: the first group that b holds. Rows of groups that b does not hold,
            and rows of no group, are zero.

    Returns:
        bfloat16[m, n].
    """
    m = a.shape[0]
    row = jnp.arange(m, dtype=jnp.uint32)[:, None]
    # As many groups end at or before the row.
    group = jnp.sum(group_ends(group_sizes, m)[None] <= row, axis=1, dtype=jnp.int32)
    # The difference overflows only where it is far out of range, and stays out of range.
    held = jnp.where(group < group_sizes.shape[0], group - group_offset, -1)
    return m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(a, sfa, b, sfb, held)
