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
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

from jax_deepgemm import quantize_reference
from jax_deepgemm.ffi import _native
from jax_deepgemm.ffi.primitive import no_lowering, no_mesh
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


def _splits_blocks(mesh: Any, axes: Any, size: int, blocks: int) -> bool:
    """Whether a dimension of values, split over mesh axes, has whole blocks in every part."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    part = size // math.prod(mesh.shape[name] for name in names)
    return size == blocks or part == size or part % BLOCK == 0


def _varying(avals: Sequence[Any]) -> frozenset[str]:
    """The manual mesh axes over which any of the operands varies."""
    return frozenset().union(*(aval.manual_axis_type.varying for aval in avals))


def _declare(op: str) -> Callable[..., Arrays]:
    """Returns the function that binds the primitive of `op`.

    Its operands are x [..., rows, k] and, where it takes them, sizes int32[..., s]; its parameters
    dtype, a NumPy type, and power_of_two.
    """
    primitive = Primitive(op)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    reference = getattr(quantize_reference, op)

    def abstract_eval(x: Any, *sizes: Any, dtype: Any, power_of_two: bool) -> list[Any]:
        results: list[Any] = []
        for index, shape in enumerate(result_shapes(op, x.shape)):
            changes: dict[str, Any] = {
                "shape": shape,
                "dtype": np.dtype(np.float32) if index % 2 else dtype,
                "weak_type": False,
            }
            if not x.sharding.mesh.empty:
                # Rows and k stay where they are; a result varies over all axes that an operand
                # varies over, or gradients would be wrong in silence.
                spec = [*x.sharding.spec, *[None] * (len(shape) - len(x.sharding.spec))]
                if _is_transposed(op, index):
                    spec[-2:] = spec[:-3:-1]
                if index % 2:
                    values = results[-1].shape
                    spec = [
                        axes if _splits_blocks(x.sharding.mesh, axes, size, blocks) else None
                        for axes, size, blocks in zip(spec, values, shape, strict=True)
                    ]
                changes["sharding"] = NamedSharding(x.sharding.mesh, PartitionSpec(*spec))
                changes["manual_axis_type"] = ManualAxisType(varying=_varying((x, *sizes)))
            results.append(x.update(**changes))
        return results

    primitive.def_abstract_eval(abstract_eval)

    def call_target(
        x: jax.Array, *sizes: jax.Array, dtype: Any, power_of_two: bool
    ) -> list[jax.Array]:
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
        return [
            result.reshape(shape)
            for result, shape in zip(call(*operands, problem=attributes), shapes, strict=True)
        ]

    def cuda(context: Any, *operands: Any, **parameters: Any) -> Any:
        # XLA cannot look into a custom call: in a program that `jit` partitions it would gather x,
        # and each device would quantise all of it. It partitions the jnp version. Inside
        # `shard_map` operands are shards, and the kernel runs.
        several = getattr(context.module_context.axis_context, "num_devices", 1) > 1
        if several:
            return mlir.lower_fun(reference, multiple_results=True)(
                context, *operands, **parameters
            )
        # The program of one device knows no mesh, on which x could not be made a matrix.
        here = context.replace(
            avals_in=[ShapedArray(x.shape, x.dtype) for x in context.avals_in],
            avals_out=[ShapedArray(x.shape, x.dtype) for x in context.avals_out],
        )
        with no_mesh():
            return mlir.lower_fun(call_target, multiple_results=True)(here, *operands, **parameters)

    mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=True), "cpu")
    mlir.register_lowering(primitive, cuda, "cuda")
    mlir.register_lowering(primitive, no_lowering(op))

    def differentiate(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{op}: there is no derivative; give the function that quantises its operands and "
            "multiplies them a gradient of its own, with jax.custom_vjp"
        )

    ad.primitive_jvps[primitive] = differentiate

    def bind(*operands: jax.Array, **parameters: Any) -> Arrays:
        # Operands that vary over fewer axes are cast here, outside the primitive.
        avals = [jax.typeof(operand) for operand in operands]
        varying = _varying(avals)
        cast = [
            jax.lax.pcast(operand, tuple(sorted(missing)), to="varying") if missing else operand
            for operand, aval in zip(operands, avals, strict=True)
            for missing in [varying - aval.manual_axis_type.varying]
        ]
        return tuple(primitive.bind(*cast, **parameters))

    def batch(
        operands: Sequence[jax.Array], axes: Sequence[int | None], **parameters: Any
    ) -> tuple[Arrays, list[int]]:
        """A batch is one more dimension in front: more matrices in the same launch."""
        (size,) = {
            operand.shape[axis]
            for operand, axis in zip(operands, axes, strict=True)
            if axis is not None
        }
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
"""For each op (x, *sizes, dtype=, power_of_two=) -> values, scales and perhaps a second pair."""
