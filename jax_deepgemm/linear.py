"""A linear layer for inference: bfloat16 in, FP8 in between, bfloat16 out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import ArrayLike

from jax_deepgemm.arguments import is_array
from jax_deepgemm.gemm import gemm_fp8_fp8_bf16_nt
from jax_deepgemm.operands import Operand, describe, unconverted
from jax_deepgemm.quantize import quantize_per_block, quantize_per_token
from jax_deepgemm.quantized_array import QuantizedArray


def linear(x: ArrayLike, weight: Operand, bias: ArrayLike | None = None) -> jax.Array:
    """Returns x @ dequantize(weight).T + bias, x quantised on the way, for any leading dimensions.

    x is cast by `quantize_per_token`, the product is `gemm_fp8_fp8_bf16_nt`; on a GPU these are two
    kernels, with nothing between them. The bias is added in float32 to the product, which is
    bfloat16, and rounded again.

    Args:
        x: bfloat16, float16 or float32 [..., k]; k is a multiple of 16.
        weight: float8_e4m3fn[n, k] and float32[ceil(n/128), ceil(k/128)], for example from
            `quantize_per_block` or a checkpoint. n is a multiple of 8.
        bias: floating point [n].

    Returns:
        bfloat16[..., n].

    Raises:
        TypeError: weight is no pair, or an array has the wrong dtype.
        ValueError: x has no dimension, or an array has the wrong shape. Messages name the function
            that refuses, the argument, what was expected and what came.
    """
    if isinstance(x, tuple):
        raise TypeError(f"linear: x must be an array, got {type(x).__name__}")
    x = jnp.asarray(x)
    if x.ndim < 1:
        raise ValueError(f"linear: x must be [..., k], got {describe(x)}")
    multiply = gemm_fp8_fp8_bf16_nt
    for _ in range(x.ndim - 2):  # more rows of one product, which may be split over devices
        multiply = jax.vmap(multiply, in_axes=(0, None))
    d = multiply(quantize_per_token(jnp.atleast_2d(x)), weight)
    n = d.shape[-1]
    if bias is not None:
        if not is_array(bias):
            raise TypeError(f"linear: bias must be an array [{n}], got {type(bias).__name__}")
        given = unconverted(bias)
        if not jnp.issubdtype(given.dtype, jnp.floating):
            raise TypeError(f"linear: bias must be floating point [{n}], got {describe(given)}")
        if given.shape != (n,):
            raise ValueError(f"linear: bias must be [{n}] (n), got {describe(given)}")
        # With as many dimensions: JAX may be told to refuse arrays of fewer.
        bias = jnp.expand_dims(jnp.asarray(given, jnp.float32), range(d.ndim - 1))
        d = (d.astype(jnp.float32) + bias).astype(jnp.bfloat16)
    return d.reshape(n) if x.ndim == 1 else d


class Linear(NamedTuple):
    """A linear layer's weight in FP8 and its bias; called, it is `linear`.

    A pytree, as parameters are: it goes through `jax.jit` as an argument. `Linear.quantize` makes
    one of a float weight; a checkpoint's weight goes in as it is.

    Attributes:
        weight: QuantizedArray [n, k] of 128 x 128 blocks.
        bias: floating point [n], or None.
    """

    weight: QuantizedArray
    bias: ArrayLike | None = None

    @classmethod
    def quantize(
        cls, weight: ArrayLike, bias: ArrayLike | None = None, *, power_of_two: bool = False
    ) -> "Linear":
        """Returns the layer with a float weight [n, k] quantised by `quantize_per_block`."""
        return cls(quantize_per_block(weight, power_of_two=power_of_two), bias)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Returns bfloat16[..., n] of x [..., k]; see `linear`."""
        return linear(x, self.weight, self.bias)


# Exported functions that take one can be saved. The name stands in files.
export.register_namedtuple_serialization(Linear, serialized_name="jax_deepgemm.Linear")
