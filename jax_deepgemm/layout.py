"""Alignment of operands in memory, by DeepGEMM's names."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike

from jax_deepgemm.arguments import integer, is_array

_TMA_BYTES = 16  # strides of arrays that TMA reads are multiples of this
_M_ALIGNMENT = 128  # rows


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """Returns the smallest size >= x whose bytes are a multiple of 16, as TMA strides must be.

    Args:
        x: number of elements, at least 0.
        element_size: bytes of one element: 1, 2, 4, 8 or 16.

    Raises:
        TypeError: an argument is no integer.
        ValueError: x is negative, or element_size does not divide 16.
    """
    x = integer("get_tma_aligned_size", "x", x, bits=64)
    element_size = integer("get_tma_aligned_size", "element_size", element_size, bits=64)
    if x < 0:
        raise ValueError(f"get_tma_aligned_size: x must be at least 0, got {x}")
    if element_size < 1 or _TMA_BYTES % element_size != 0:
        raise ValueError(
            f"get_tma_aligned_size: element_size must divide {_TMA_BYTES}, got {element_size}"
        )
    multiple = _TMA_BYTES // element_size
    return -(-x // multiple) * multiple


def get_m_alignment_for_contiguous_layout() -> int:
    """Returns the number of rows to which each group of a contiguous layout is aligned."""
    return _M_ALIGNMENT


def get_col_major_tma_aligned_tensor(x: ArrayLike) -> jax.Array:
    """Asks XLA to store `x` with its last axis outermost and m contiguous, as kernels read SFA.

    Never needed: operations ask for this layout themselves, and the fusion that computes the
    scales writes it. It lets a program state the layout where the scales are made. DeepGEMM also
    pads m to 16 bytes here; these kernels do without.

    Args:
        x: float32[..., m, ceil(k/128)].

    Returns:
        The same array.

    Raises:
        TypeError: x is no array.
        ValueError: x has fewer than two dimensions.
    """
    name = "get_col_major_tma_aligned_tensor"
    if not is_array(x):
        raise TypeError(f"{name}: x must be an array, got {type(x).__name__}")
    array = jnp.asarray(x)
    if array.ndim < 2:
        raise ValueError(f"{name}: x must have at least 2 dimensions, got {array.ndim}")
    # Operations flatten all dimensions before k into m, so these stay together.
    *rows, k = range(array.ndim)
    constrained: jax.Array = with_layout_constraint(array, Layout(major_to_minor=(k, *rows)))
    return constrained
