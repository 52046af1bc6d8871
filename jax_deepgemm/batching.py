"""What the rules for `jax.vmap` share. A batch always becomes one launch, or is refused.

It stays a dimension of its own until a device computes its part: folded into others before XLA
splits the program, it would take shardings with it that XLA can then only undo by gathering.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_deepgemm.ffi.primitive import Batches

NAMES = ("a", "sfa", "b", "sfb")
"""The first operands of every operation."""


def to_front(operands: Sequence[jax.Array], axes: Sequence[int | None]) -> list[jax.Array]:
    """Returns the operands with their batch axis, where they have one, first."""
    return [
        operand if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    ]


def fold(x: jax.Array, batches: int, into: int) -> jax.Array:
    """Makes the first dimensions, batches and one more, one: matrices one below the other.

    Args:
        x: [*batches, ...].
        batches: how many they are.
        into: size of the dimension behind them.
    """
    return x.reshape(math.prod(x.shape[:batches]) * into, *x.shape[batches + 1 :])


def positions(batches: Batches, *whose: str) -> list[int]:
    """Where among all batches those are that are exactly one of `whose`."""
    return [index for index, of in enumerate(batches) if of in whose]


def refusal(
    function: str, wanted: str, names: Sequence[str], axes: Sequence[int | None]
) -> NotImplementedError:
    """The error of an operation that takes `wanted` and was given batches on other axes."""
    got = ", ".join(f"{name} {axis}" for name, axis in zip(names, axes, strict=True))
    return NotImplementedError(f"{function}: jax.vmap takes {wanted}; got the batch axes {got}")
