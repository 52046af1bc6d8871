"""The FP8 linear layer as a Flax NNX module; needs the extra `flax`.

Not imported by `jax_deepgemm`: `from jax_deepgemm import nnx`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx  # type: ignore[import-not-found, unused-ignore]

from jax_deepgemm.arguments import is_array
from jax_deepgemm.config import FP8_TYPES
from jax_deepgemm.linear import linear
from jax_deepgemm.operands import Operand, Sizes, check_array
from jax_deepgemm.quantize import quantize_per_block
from jax_deepgemm.quantized_array import QuantizedArray
from jax_deepgemm.reference import BLOCK


class QuantizedWeight(nnx.Variable):  # type: ignore[misc, unused-ignore]
    """FP8 values, or their scales: parameters that no optimiser is to touch."""


class Linear(nnx.Module):  # type: ignore[misc, unused-ignore]
    """A linear layer for inference: `linear` of an FP8 weight, for people who do not handle pairs.

    A drop-in for the call of a `flax.nnx.Linear` in bfloat16: y = x @ kernel + bias. It has no
    gradient. The weight is stored as GEMMs want it, [out_features, in_features], in two variables
    of the type `QuantizedWeight`, so that `nnx.split`, `nnx.state` and checkpoint libraries see
    arrays.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        weight: Operand | None = None,
        bias: jax.Array | None = None,
    ) -> None:
        """Makes the layer.

        Args:
            in_features: k, a multiple of 16.
            out_features: n, a multiple of 8.
            use_bias: whether there is a bias.
            weight: a pair (values, scales) [n, k] of 128 x 128 blocks; None: zeros, to be filled
                from a checkpoint.
            bias: [n]; None: zeros.

        Raises:
            TypeError: weight is no pair, or an array has the wrong dtype.
            ValueError: weight or bias does not have these features, weight has other blocks, or
                there is a bias and use_bias is False.
        """
        if weight is None:
            weight = QuantizedArray(
                jnp.zeros((out_features, in_features), jnp.float8_e4m3fn),
                jnp.ones((-(-out_features // BLOCK), -(-in_features // BLOCK)), jnp.float32),
            )
        if not isinstance(weight, tuple | list) or len(weight) != 2:
            raise TypeError(
                f"nnx.Linear: weight must be a pair (values, scales), got {type(weight).__name__}"
            )
        values, scales = weight
        features = {"n": out_features, "k": in_features}
        for size in ("n", "k"):
            features[f"ceil({size}/{BLOCK})"] = -(-features[size] // BLOCK)
        blocks = ("ceil(n/128)", "ceil(k/128)")
        _check("weight's values", values, FP8_TYPES, ("n", "k"), features)
        _check("weight's scales", scales, ("float32",), blocks, features)
        if bias is not None:
            if not use_bias:
                raise ValueError("nnx.Linear: bias must be None where use_bias is False")
            _check("bias", bias, ("bfloat16", "float16", "float32", "float64"), ("n",), features)
        self.in_features = in_features
        self.out_features = out_features
        self.values = QuantizedWeight(jnp.asarray(values))
        self.scales = QuantizedWeight(jnp.asarray(scales))
        if bias is None:
            bias = jnp.zeros(out_features, jnp.bfloat16)
        self.bias: Any = nnx.Param(jnp.asarray(bias)) if use_bias else None

    @classmethod
    def from_linear(cls, layer: Any, *, power_of_two: bool = False) -> "Linear":
        """Returns the FP8 layer of a trained `flax.nnx.Linear`, whose kernel is [k, n]."""
        kernel = layer.kernel[...]
        bias = None if layer.bias is None else layer.bias[...]
        return cls(
            kernel.shape[0],
            kernel.shape[1],
            use_bias=bias is not None,
            weight=quantize_per_block(kernel.T, power_of_two=power_of_two),
            bias=bias,
        )

    @property
    def weight(self) -> QuantizedArray:
        """The pair [out_features, in_features]."""
        return QuantizedArray(self.values[...], self.scales[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns bfloat16[..., out_features] of x [..., in_features]."""
        return linear(x, self.weight, None if self.bias is None else self.bias[...])


def _check(
    argument: str, array: Any, dtypes: Sequence[str], names: Sequence[str], sizes: Sizes
) -> None:
    if not is_array(array):
        raise TypeError(f"nnx.Linear: {argument} must be an array, got {type(array).__name__}")
    check_array("nnx.Linear", argument, array, dtypes, names, sizes)
