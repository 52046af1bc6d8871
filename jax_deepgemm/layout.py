"""Alignment of operands in memory, by DeepGEMM's names."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

_TMA_BYTES = 16  # strides of arrays that TMA reads are multiples of this
_M_ALIGNMENT = 128  # rows


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """Returns the smallest size >= x whose bytes are a multiple of 16, as TMA strides must be.

    Args:
        x: number of elements.
        element_size: bytes of one element: 1, 2, 4, 8 or 16.

    Raises:
        ValueError: element_size does not divide 16.
    """
    if element_size < 1 or _TMA_BYTES % element_size != 0:
        raise ValueError(
            f"get_tma_aligned_size: element_size must divide {_TMA_BYTES}, got {element_size}"
        )
    multiple = _TMA_BYTES // element_size
    return -(-x // multiple) * multiple


def get_m_alignment_for_contiguous_layout() -> int:
    """Returns the number of rows to which each group of a contiguous layout is aligned."""
    return _M_ALIGNMENT


def get_col_major_tma_aligned_tensor(x: jax.Array) -> jax.Array:
    """Asks XLA to store `x` with its second to last axis contiguous, as the kernels read SFA.

    Never needed: operations ask for this layout themselves, and the fusion that computes the
    scales writes it. It lets a program state the layout where the scales are made. The padding of
    m to 16 bytes, which DeepGEMM does here as well, happens inside the operations.

    Args:
        x: float32[..., m, ceil(k/128)].

    Returns:
        The same array.

    Raises:
        ValueError: x has fewer than two dimensions.
    """
    if x.ndim < 2:
        raise ValueError(
            f"get_col_major_tma_aligned_tensor: x must have at least 2 dimensions, got {x.ndim}"
        )
    *batch, m, k = range(x.ndim)
    constrained: jax.Array = with_layout_constraint(x, Layout(major_to_minor=(*batch, k, m)))
    return constrained
