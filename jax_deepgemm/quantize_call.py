"""Quantisers as JAX primitives: abstract evaluation, the CPU's reference, the GPU's custom call.

In a program that `jax.jit` spreads over several GPUs the reference takes the custom call's place.

One custom-call target serves all of them: x as a matrix, then, where only some rows count, the
sizes that say which; a struct of integers says what to do. csrc/ffi/quantize_handlers.cc is the
other side. Scales of tokens leave it m-contiguous, as GEMMs read them, so that nothing stands
between the two kernels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import (
    AbstractMesh,
    AxisType,
    ManualAxisType,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from jax_deepgemm import quantize_reference
from jax_deepgemm.ffi import _native
from jax_deepgemm.ffi.primitive import (
    cast_alike,
    no_lowering,
    no_mesh,
    refuse_unreduced,
    varying_axes,
)
from jax_deepgemm.operands import check_static
from jax_deepgemm.reference import BLOCK

Shape = tuple[int, ...]
Arrays = tuple[jax.Array, ...]

# The order is csrc/kernels/quantize_params.h's.
OPS = (
    "quantize_per_token",
    "quantize_per_block",
    "quantize_per_token_transposed",
    "quantize_per_token_both",
    "silu_mul_quantize",
)
INPUT_TYPES = ("bfloat16", "float16", "float32")
OUTPUT_TYPES = ("float8_e4m3fn", "float8_e5m2")


class QuantizeProblem(NamedTuple):
    """What a launch computes; the fields are the custom call's attributes, int64 there."""

    op: int
    """Index into OPS."""
    input: int
    """Index into INPUT_TYPES."""
    output: int
    """Index into OUTPUT_TYPES."""
    power_of_two: int
    """1: scales are powers of two."""
    batch: int
    """Matrices, one below the other."""
    rows: int
    """Rows of a matrix."""
    k: int
    """Columns of the values: half of x's columns for SwiGLU."""
    num_sizes: int
    """Sizes per matrix whose sum is the number of rows that count; 0: all rows do."""


def problem_of(
    op: str, x: Any, sizes: Sequence[Any], *, dtype: Any, power_of_two: bool
) -> QuantizeProblem:
    """The launch for x [..., rows, k] and at most one array of sizes [..., s]."""
    *batch, rows, columns = x.shape
    num_batches = math.prod(batch)
    if op in ("quantize_per_token", "silu_mul_quantize") and not sizes:
        # Tokens do not know of their neighbours: one matrix, and no ragged tiles.
        num_batches, rows = 1, num_batches * rows
    return QuantizeProblem(
        op=OPS.index(op),
        input=INPUT_TYPES.index(np.dtype(x.dtype).name),
        output=OUTPUT_TYPES.index(np.dtype(dtype).name),
        power_of_two=int(power_of_two),
        batch=num_batches,
        rows=rows,
        k=columns // 2 if op == "silu_mul_quantize" else columns,
        num_sizes=sizes[0].shape[-1] if sizes else 0,
    )


def result_shapes(op: str, shape: Shape) -> list[Shape]:
    """Shapes of values, scales and, where there are two pairs, the second pair's."""
    *batch, rows, columns = shape
    k = columns // 2 if op == "silu_mul_quantize" else columns

    def pair(rows: int, k: int, block_rows: int = 1) -> list[Shape]:
        return [(*batch, rows, k), (*batch, -(-rows // block_rows), -(-k // BLOCK))]

    if op == "quantize_per_block":
        return pair(rows, k, BLOCK)
    if op == "quantize_per_token_transposed":
        return pair(k, rows)
    if op == "quantize_per_token_both":
        return pair(rows, k) + pair(k, rows)
    return pair(rows, k)


def _is_transposed(op: str, index: int) -> bool:
    return op == "quantize_per_token_transposed" or (op == "quantize_per_token_both" and index > 1)


def _mesh(avals: Sequence[Any]) -> AbstractMesh:
    """The mesh that types tell of, empty if they tell of none."""
    meshes: list[AbstractMesh] = [aval.sharding.mesh for aval in avals]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def _result_specs(op: str, x: Any, mesh: AbstractMesh) -> list[PartitionSpec]:
    """How results are split on an explicit mesh: rows and k stay where they are.

    A dimension of scales is whole where a shard of the values ends within a block, and one of
    values where it does not divide, as half of the columns that SwiGLU takes may not.
    """

    def split(axes: Any, size: int, unit: int) -> Any:
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[name] for name in names)
        return axes if parts == 1 or size % (parts * unit) == 0 else None

    spec = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
    shapes = result_shapes(op, x.shape)
    specs = []
    for index, shape in enumerate(shapes):
        values = shapes[index - index % 2]
        of_values = [*spec[:-2], *spec[:-3:-1]] if _is_transposed(op, index) else spec
        specs.append(
            PartitionSpec(
                *(
                    split(axes, size, 1 if size == blocks else BLOCK)
                    for axes, size, blocks in zip(of_values, values, shape, strict=True)
                )
            )
        )
    return specs


def _declare(op: str) -> Callable[..., Arrays]:
    """Returns the function that binds the primitive of `op`.

    Its operands are x [..., rows, k] and, where it takes them, sizes int32[..., s]; its parameters
    dtype, a NumPy type, power_of_two, and fill: whether rows that do not count are zeros on a GPU,
    too. They are within the primitive, because JAX checks what a primitive returns.
    """
    primitive = Primitive(op)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))

    def reference(*operands: jax.Array, fill: bool, **parameters: Any) -> Arrays:
        results: Arrays = getattr(quantize_reference, op)(*operands, **parameters)
        return results

    def abstract_eval(x: Any, *sizes: Any, dtype: Any, **_: Any) -> list[Any]:
        refuse_unreduced(op, (x, *sizes))
        mesh = _mesh((x, *sizes))
        specs = _result_specs(op, x, mesh)
        results = []
        for index, (shape, spec) in enumerate(zip(result_shapes(op, x.shape), specs, strict=True)):
            changes: dict[str, Any] = {
                "shape": shape,
                "dtype": np.dtype(np.float32) if index % 2 else dtype,
                "weak_type": False,
            }
            if not mesh.empty:
                changes["sharding"] = NamedSharding(mesh, spec)
                # A result varies over all axes that an operand varies over, or gradients would be
                # wrong in silence.
                changes["manual_axis_type"] = ManualAxisType(varying=varying_axes((x, *sizes)))
            results.append(x.update(**changes))
        return results

    primitive.def_abstract_eval(abstract_eval)

    def call_target(
        x: jax.Array, *sizes: jax.Array, dtype: Any, power_of_two: bool, fill: bool
    ) -> Sequence[jax.Array]:
        problem = problem_of(op, x, sizes, dtype=dtype, power_of_two=power_of_two)
        shapes = result_shapes(op, x.shape)
        matrices, layouts = [], []
        for index, shape in enumerate(shapes):
            rows, columns = math.prod(shape[:-1]), shape[-1]
            matrices.append(
                jax.ShapeDtypeStruct((rows, columns), jnp.float32 if index % 2 else dtype)
            )
            layouts.append((1, 0) if index % 2 and op != "quantize_per_block" else None)
        call = jax.ffi.ffi_call(_native.QUANTIZE_TARGET, matrices, output_layouts=layouts)
        matrix = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # either may be 0
        operands = [matrix, *(size.reshape(-1) for size in sizes)]
        # int64 whatever the caller's type: the target decodes exactly that.
        attributes = {key: np.int64(value) for key, value in problem._asdict().items()}
        results = [
            result.reshape(shape)
            for result, shape in zip(call(*operands, problem=attributes), shapes, strict=True)
        ]
        return quantize_reference.fill_invalid_rows(*results, *sizes) if fill else results

    def partitioned(context: Any, *operands: Any, **parameters: Any) -> Any:
        """The jnp version, which XLA partitions, over explicit axes like over automatic ones.

        Types cannot say how a reshape splits blocks that shards cut. XLA can, and reduces over the
        devices that share a block.
        """
        mesh = _mesh(context.avals_in)
        lower = functools.partial(mlir.lower_fun, multiple_results=True)
        if AxisType.Explicit not in mesh.axis_types:
            return lower(reference)(context, *operands, **parameters)
        kinds = [AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types]
        automatic = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=tuple(kinds))
        # Over axes that were automatic, XLA may split what the types do not.
        rest = PartitionSpec.UNCONSTRAINED if AxisType.Auto in mesh.axis_types else None

        def split(*operands: jax.Array, **parameters: Any) -> list[jax.Array]:
            return [
                jax.lax.with_sharding_constraint(
                    result, PartitionSpec(*(axes or rest for axes in aval.sharding.spec))
                )
                for result, aval in zip(
                    reference(*operands, **parameters), context.avals_out, strict=True
                )
            ]

        def untyped(aval: Any) -> Any:
            return aval.update(sharding=NamedSharding(automatic, PartitionSpec()))

        here = context.replace(
            avals_in=[untyped(aval) for aval in context.avals_in],
            avals_out=[untyped(aval) for aval in context.avals_out],
        )
        with use_abstract_mesh(automatic):
            return lower(split)(here, *operands, **parameters)

    def cuda(context: Any, *operands: Any, **parameters: Any) -> Any:
        # XLA cannot look into a custom call: in a program that `jit` partitions it would gather x,
        # and each device would quantise all of it. It partitions the jnp version. Inside
        # `shard_map` operands are shards, and the kernel runs.
        if getattr(context.module_context.axis_context, "num_devices", 1) > 1:
            return partitioned(context, *operands, **parameters)
        # The program of one device knows no mesh, on which x could not be made a matrix.
        here = context.replace(
            avals_in=[ShapedArray(x.shape, x.dtype) for x in context.avals_in],
            avals_out=[ShapedArray(x.shape, x.dtype) for x in context.avals_out],
        )
        with no_mesh():
            return mlir.lower_fun(call_target, multiple_results=True)(here, *operands, **parameters)

    mlir.register_lowering(primitive, partitioned, "cpu")
    mlir.register_lowering(primitive, cuda, "cuda")
    mlir.register_lowering(primitive, no_lowering(op))

    def differentiate(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{op}: there is no derivative; give the function that quantises its operands and "
            "multiplies them a gradient of its own, with jax.custom_vjp"
        )

    ad.primitive_jvps[primitive] = differentiate

    def bind(*operands: jax.Array, **parameters: Any) -> Arrays:
        refuse_unreduced(op, [jax.typeof(operand) for operand in operands])
        return tuple(primitive.bind(*cast_alike(operands), **parameters))

    def batch(
        operands: Sequence[jax.Array], axes: Sequence[int | None], **parameters: Any
    ) -> tuple[Arrays, list[int]]:
        """A batch is one more dimension in front: more matrices in the same launch."""
        (size,) = {
            operand.shape[axis]
            for operand, axis in zip(operands, axes, strict=True)
            if axis is not None
        }
        check_static(op, batch=size)
        batched = [
            jnp.broadcast_to(operand, (size, *operand.shape))
            if axis is None
            else jnp.moveaxis(operand, axis, 0)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        results = bind(*batched, **parameters)
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batch
    return bind


bind: dict[str, Callable[..., Arrays]] = {op: _declare(op) for op in OPS}
"""For each op (x, *sizes, dtype=, power_of_two=, fill=) -> values, scales; perhaps two pairs."""
