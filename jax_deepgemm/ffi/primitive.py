"""Declares an operation of this package as a JAX primitive, in one call."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import (
    AbstractMesh,
    AxisType,
    ManualAxisType,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
    use_abstract_mesh,
)

Shape = tuple[int, ...]


def declare(
    name: str,
    *,
    target: str,
    result: Callable[..., tuple[Shape, Any]],
    attributes: Callable[..., Mapping[str, int]],
    reference: Callable[..., jax.Array],
    operand_layouts: Sequence[tuple[int, ...] | None],
    prepare: Callable[..., Sequence[jax.Array]] = lambda *operands: operands,
    batching_rule: Callable[..., tuple[jax.Array, int]] | None = None,
    partition: Callable[..., Callable[..., jax.Array]] | None = None,
    explicit: Callable[..., jax.Array | None] | None = None,
) -> Callable[..., jax.Array]:
    """Returns the function that binds a new primitive; operands are positional, parameters not.

    Where XLA may partition the program, that is outside of `jax.shard_map` or over an axis that it
    leaves out, the primitive carries the jaxpr of a call that XLA asks how to split. It has a rule
    for `jax.vmap`, which such a call has not; and JAX, which looks for the call in jaxprs, finds it
    there. Each device then binds a primitive without one.

    Args:
        name: the primitive's name, as jaxprs show it.
        target: the CUDA custom-call target.
        result: (*operand avals) -> shape and dtype of the result.
        attributes: (*operand avals, **parameters) -> the target's integers, as one struct
            "problem".
        reference: (*operands) -> result in jax.numpy; the CPU lowering.
        operand_layouts: for each operand None or the major-to-minor order the target reads.
        prepare: (*operands) -> what the target takes in their place, in jax.numpy. The target's
            result is a matrix, too: the rows of the result, whatever the dimensions before its
            last.
        batching_rule: (bind, operands, batch axes, parameters) -> batched result and its axis.
        partition: (bind on one device, operand shapes, parameters, mesh) -> the operation on
            operands that XLA may split; without it XLA computes everything on every device. The
            mesh is that of a `jax.shard_map` with a `free_axis`, else None.
        explicit: (bind on each device, operands, parameters) -> the result on a mesh with explicit
            axes, None if the operands' types have no such axes.
    """
    primitive = Primitive(f"{name}_local")  # what one device computes
    partitioned = Primitive(name)  # with the parameter `call`

    def abstract_eval(*operands: Any, **_: Any) -> ShapedArray:
        shape, dtype = result(*operands)
        mesh = get_abstract_mesh()
        if mesh.empty:
            return ShapedArray(shape, np.dtype(dtype))
        # The result varies over every manual mesh axis that an operand varies over. A type that
        # said less would make gradients wrong in silence.
        return ShapedArray(
            shape,
            np.dtype(dtype),
            sharding=NamedSharding(mesh, PartitionSpec(*[None] * len(shape))),
            manual_axis_type=ManualAxisType(varying=_varying(operands)),
        )

    for each in (primitive, partitioned):
        each.def_impl(functools.partial(xla.apply_primitive, each))
        each.def_abstract_eval(abstract_eval)

    def cpu(*operands: jax.Array, **_: Any) -> jax.Array:
        return reference(*operands)

    def cuda(*operands: jax.Array, **parameters: Any) -> jax.Array:
        shape, dtype = result(*operands)
        problem = {
            # int64 whatever the caller's type: the target decodes exactly that.
            key: np.int64(value)
            for key, value in attributes(*operands, **parameters).items()
        }
        matrix = jax.ShapeDtypeStruct((math.prod(shape[:-1]), shape[-1]), dtype)
        call = jax.ffi.ffi_call(target, matrix, input_layouts=operand_layouts)
        d: jax.Array = call(*prepare(*operands), problem=problem)
        return d.reshape(shape)

    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(cuda, multiple_results=False), platform="cuda")
    mlir.register_lowering(primitive, no_lowering(name))

    def differentiate(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: there is no derivative; give the function that quantises its operands and "
            "calls it a gradient of its own, with jax.custom_vjp"
        )

    ad.primitive_jvps[primitive] = ad.primitive_jvps[partitioned] = differentiate

    def bind_here(*operands: jax.Array, **parameters: Any) -> jax.Array:
        """On this device, or on each device of a `jax.shard_map`."""
        output: jax.Array = primitive.bind(*_cast_alike(operands), **parameters)
        return output

    @functools.lru_cache(maxsize=4096)  # one object for one call: JAX's caches compare identities
    def call_of(
        shapes: tuple[Any, ...],
        parameters: tuple[tuple[str, Any], ...],
        manual: AbstractMesh | None,
        shardy: bool,
    ) -> ClosedJaxpr | Callable[..., Sequence[jax.Array]]:
        assert partition is not None
        structs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        with no_mesh():
            call = jax.make_jaxpr(partition(bind_here, structs, dict(parameters), manual))(*structs)
        # JAX refuses to lower such a call, if it sees one, without devices.
        return call if manual is None else jaxpr_as_fun(call)

    def bind_splittable(*operands: jax.Array, **parameters: Any) -> jax.Array:
        """As XLA splits it, where the context leaves that to XLA."""
        if partition is None:
            return bind_here(*operands, **parameters)
        meshes = (get_abstract_mesh(), *(jax.typeof(operand).sharding.mesh for operand in operands))
        mesh = next((mesh for mesh in meshes if not mesh.empty), None)
        manual = mesh if mesh is not None and AxisType.Manual in mesh.axis_types else None
        # The call is not the same for XLA's older partitioner.
        shardy = bool(getattr(jax.config, "jax_use_shardy_partitioner", True))
        nothing_is_left = mesh is not None and AxisType.Auto not in mesh.axis_types
        if nothing_is_left or (manual is not None and not (shardy and free_axis(manual))):
            return bind_here(*operands, **parameters)
        shapes = tuple((operand.shape, operand.dtype) for operand in operands)
        call = call_of(shapes, tuple(sorted(parameters.items())), manual, shardy)
        output: jax.Array = partitioned.bind(*_cast_alike(operands), call=call, **parameters)
        return output

    def bind(*operands: jax.Array, **parameters: Any) -> jax.Array:
        if explicit is not None:
            split = explicit(bind_splittable, operands, parameters)
            if split is not None:
                return split
        return bind_splittable(*operands, **parameters)

    def lower(
        context: Any,
        *operands: Any,
        call: ClosedJaxpr | Callable[..., Sequence[jax.Array]],
        **parameters: Any,
    ) -> Any:
        def here(*operands: jax.Array) -> jax.Array:
            with no_mesh():
                return bind_here(*operands, **parameters)

        def split(*operands: jax.Array) -> jax.Array:
            function = jaxpr_as_fun(call) if isinstance(call, ClosedJaxpr) else call
            return function(*operands)[0]

        def gathered(*operands: jax.Array) -> jax.Array:
            return bind_here(*operands, **parameters)

        axes = context.module_context.axis_context
        function = here if getattr(axes, "num_devices", None) == 1 else split
        if not isinstance(call, ClosedJaxpr) and isinstance(axes.mesh, AbstractMesh):
            function = gathered  # JAX wants the devices of a call that XLA asks, here unknown
        return mlir.lower_fun(function, multiple_results=False)(context, *operands)

    mlir.register_lowering(partitioned, lower)

    if batching_rule is not None:
        rule = batching_rule

        def batch(
            operands: Sequence[jax.Array],
            axes: Sequence[int | None],
            call: Any = None,
            **parameters: Any,
        ) -> tuple[jax.Array, int]:
            return rule(bind, operands, axes, parameters)

        batching.primitive_batchers[primitive] = batch
        batching.primitive_batchers[partitioned] = batch

    return bind


def no_lowering(name: str) -> Callable[..., NoReturn]:
    """The lowering of an operation for all platforms but those that it exists for: it raises."""

    def lower(context: Any, *_: Any, **__: Any) -> NoReturn:
        platforms = context.platforms or context.module_context.platforms
        others = [platform for platform in platforms if platform not in ("cpu", "cuda")]
        raise NotImplementedError(
            f"{name}: it exists for CPUs (platform cpu) and for Hopper GPUs (platform cuda, "
            f"sm_90), and not for {', '.join(others)}"
        )

    return lower


def no_mesh() -> contextlib.AbstractContextManager[Any]:
    """Leaves the mesh of the context: one device's program knows no other."""
    return use_abstract_mesh(AbstractMesh((), ()))


def _varying(avals: Sequence[Any]) -> frozenset[str]:
    """The manual mesh axes over which any of the operands varies."""
    return frozenset().union(*(aval.manual_axis_type.varying for aval in avals))


def _cast_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Casts operands that vary over fewer mesh axes than others.

    That is done outside the primitive, where the cast's transpose (a psum) belongs.
    """
    varying = _varying([jax.typeof(operand) for operand in operands])
    return [_cast_to_varying(operand, varying) for operand in operands]


def _cast_to_varying(operand: jax.Array, varying: frozenset[str]) -> jax.Array:
    missing = varying - jax.typeof(operand).manual_axis_type.varying
    return jax.lax.pcast(operand, tuple(sorted(missing)), to="varying") if missing else operand


def free_axis(mesh: AbstractMesh) -> str | None:
    """The one axis that is left to XLA inside a `jax.shard_map` over others, None if there is none.

    Nor is there one if there are several: XLA does not say in which order it takes the devices
    along them, so that operations are not split over any.
    """
    free = [
        (name, kind)
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and mesh.shape[name] > 1
    ]
    return free[0][0] if len(free) == 1 and free[0][1] == AxisType.Auto else None
