"""What the rules for `jax.vmap` share. A batch always becomes one launch, or is refused."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Batched = tuple[jax.Array, int]
"""What a rule returns: the result and its batch axis."""

NAMES = ("a", "sfa", "b", "sfb")
"""The first operands of every operation."""


def to_front(operands: Sequence[jax.Array], axes: Sequence[int | None]) -> list[jax.Array]:
    """Returns the operands with their batch axis, where they have one, first."""
    return [
        operand if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    ]


def merge(x: jax.Array) -> jax.Array:
    """Returns x with its first two axes made one: a batch, one below the other."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def refusal(
    function: str, wanted: str, names: Sequence[str], axes: Sequence[int | None]
) -> NotImplementedError:
    """The error of an operation that takes `wanted` and was given batches on other axes."""
    got = ", ".join(f"{name} {axis}" for name, axis in zip(names, axes, strict=True))
    return NotImplementedError(f"{function}: jax.vmap takes {wanted}; got the batch axes {got}")
