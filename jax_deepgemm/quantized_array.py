"""The pair of FP8 values and scales that quantisers return and every operation takes."""

import math
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_deepgemm import reference
from jax_deepgemm.arguments import is_array
from jax_deepgemm.operands import Operand, describe, unconverted
from jax_deepgemm.reference import BLOCK

_NO_ARITHMETIC = "a QuantizedArray has no arithmetic: call its dequantize() first"


class QuantizedArray(NamedTuple):
    """An FP8 array with the scales of its blocks: the operand of every GEMM of this package.

    It is a plain pair: `values, scales = quantized` unpacks it, every operation takes it, and JAX
    sees a pytree of two arrays, so that `jit`, `vmap`, `shard_map`, `device_put` and checkpoint
    libraries handle it as any other. Its blocks follow from its shapes: as many rows of scales as
    of values are scales per row and 128 values of k, fewer are scales per 128 x 128.

    Element [..., i, j] stands for `values[..., i, j] * scales[..., i, j // 128]` after
    `quantize_per_token`, and for `values[..., i, j] * scales[..., i // 128, j // 128]` after
    `quantize_per_block`.

    Attributes:
        values: float8_e4m3fn or float8_e5m2, the shape of the array that was quantised.
        scales: float32, one for each block; positive, finite and normal.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for, which is that of the values."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of dimensions of the values."""
        return len(self.values.shape)

    @property
    def dtype(self) -> Any:
        """The FP8 type of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of the scales."""
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in self)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns that share a scale: (1, 128) or (128, 128)."""
        return block_shape("QuantizedArray", self.values, self.scales)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Returns values * scales; see `dequantize`."""
        return dequantize(self, dtype)

    # A tuple's operators would join and repeat the pair.
    def __add__(self, other: Any) -> NoReturn:
        raise TypeError(_NO_ARITHMETIC)

    def __mul__(self, other: Any) -> NoReturn:
        raise TypeError(_NO_ARITHMETIC)

    def __rmul__(self, other: Any) -> NoReturn:
        raise TypeError(_NO_ARITHMETIC)


# Exported functions that take or return one can be saved. The name is the class' first one: it
# stands in files.
export.register_namedtuple_serialization(QuantizedArray, serialized_name="jax_deepgemm.Quantized")


def block_shape(function: str, values: Any, scales: Any) -> tuple[int, int]:
    """Returns (1, 128) or (128, 128), or raises ValueError if scales have neither shape."""
    *batch, rows, k = values.shape
    k_blocks = -(-k // BLOCK)
    # A single row is the same in both; it counts as a token.
    for block_rows in (1, BLOCK):
        if tuple(scales.shape) == (*batch, -(-rows // block_rows), k_blocks):
            return block_rows, BLOCK
    leading = "".join(f"{size}, " for size in batch)
    raise ValueError(
        f"{function}: scales of values [{leading}{rows}, {k}] must be [{leading}{rows}, {k_blocks}]"
        f" (1 x 128 blocks) or [{leading}{-(-rows // BLOCK)}, {k_blocks}] (128 x 128 blocks), "
        f"got {list(scales.shape)}"
    )


def dequantize(quantized: Operand, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns values * scales, computed in float32 and rounded once, to `dtype`.

    Args:
        quantized: (values, scales) of any quantiser: float8_e4m3fn or float8_e5m2 [..., rows, k]
            with float32 [..., rows, ceil(k/128)] or [..., ceil(rows/128), ceil(k/128)]. What a
            quantiser that transposes returned comes back transposed.
        dtype: of the result.

    Returns:
        dtype[..., rows, k].

    Raises:
        TypeError: quantized is no pair of arrays, values are no FP8 or scales no float32
            ("dequantize: ... must be ..., got ...").
        ValueError: the scales have another shape (same form).
    """
    name = "dequantize"
    if not isinstance(quantized, tuple | list) or len(quantized) != 2:
        raise TypeError(
            f"{name}: quantized must be a pair (values, scales), got {type(quantized).__name__}"
        )
    values, scales = quantized
    for part in (values, scales):
        if not is_array(part):
            raise TypeError(
                f"{name}: quantized must be a pair (values, scales) of arrays, "
                f"got {type(part).__name__}"
            )
    values, scales = unconverted(values), unconverted(scales)
    if values.dtype not in (jnp.float8_e4m3fn, jnp.float8_e5m2) or len(values.shape) < 2:
        raise TypeError(
            f"{name}: values must be float8_e4m3fn or float8_e5m2 [..., rows, k], "
            f"got {describe(values)}"
        )
    if scales.dtype != jnp.float32:
        raise TypeError(f"{name}: scales must be float32, got {describe(scales)}")
    rows, _ = block_shape(name, values, scales)
    function = reference.dequantize_per_token if rows == 1 else reference.dequantize_per_block
    return function(jnp.asarray(values), jnp.asarray(scales)).astype(dtype)


def quantized_sharding(
    sharding: NamedSharding, shape: tuple[int, ...], block_rows: int = BLOCK
) -> QuantizedArray:
    """Returns the shardings of values and scales that keep each block on one device.

    For `jax.device_put(quantized, ...)`, `jax.jit`'s in_shardings and checkpoint libraries: both
    arrays are split over the same mesh axes, so that a device has the scales of just its values.

    Args:
        sharding: of the values.
        shape: of the values, [..., rows, k].
        block_rows: rows that share a scale: 128 after `quantize_per_block`, 1 after
            `quantize_per_token`.

    Returns:
        QuantizedArray(sharding of the values, sharding of the scales).

    Raises:
        TypeError: sharding is no NamedSharding.
        ValueError: a shard would end within a block
            ("quantized_sharding: shards of rows must be a multiple of 128 ..., got 64"), the
            shape has fewer than two dimensions, or block_rows is neither 1 nor 128.
    """
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"quantized_sharding: sharding must be a NamedSharding, got {type(sharding).__name__}"
        )
    if len(shape) < 2:
        raise ValueError(
            f"quantized_sharding: shape must be that of values [..., rows, k], got {list(shape)}"
        )
    if block_rows not in (1, BLOCK):
        raise ValueError(f"quantized_sharding: block_rows must be 1 or {BLOCK}, got {block_rows!r}")
    local = sharding.shard_shape(shape)
    for axis, (name, block) in enumerate((("rows", block_rows), ("k", BLOCK)), start=-2):
        if local[axis] != shape[axis] and local[axis] % block:
            raise ValueError(
                f"quantized_sharding: shards of {name} must be a multiple of {block}, or a block "
                f"would lie on two devices, got {local[axis]} of {shape[axis]} ({sharding.spec})"
            )
    scales = NamedSharding(
        sharding.mesh, PartitionSpec(*sharding.spec), memory_kind=sharding.memory_kind
    )
    return QuantizedArray(sharding, scales)  # type: ignore[arg-type]
