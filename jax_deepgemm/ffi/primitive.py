"""Declares an operation of this package as a JAX primitive, in one call."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

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

if TYPE_CHECKING:  # which imports this module
    from jax_deepgemm.partitioning import Partitioning

Shape = tuple[int, ...]

Batches = tuple[str, ...]
"""For each dimension that `jax.vmap` added, the outermost first, whose it is.

That is "a" for A's, "b" for B's, "ab" for one of both. The operands begin with those that are
theirs, in this order, and the result with all.
"""


class Batching(NamedTuple):
    """An operation's rules for `jax.vmap`. A batch stays a dimension until a device computes it."""

    admit: Callable[[Sequence[jax.Array], Sequence[int | None]], tuple[Sequence[jax.Array], str]]
    """(operands, batch axes) -> operands with the batch in front, and whose it is; or refuses."""

    fold: Callable[..., jax.Array] | None = None
    """(bind, batches, operands, parameters) -> result, by one launch of an operation on a device.

    `bind` is the operation's own. None if no batch is admitted.
    """


def declare(
    name: str,
    *,
    target: str,
    dtype: Any,
    attributes: Callable[..., Mapping[str, int]],
    reference: Callable[..., jax.Array],
    operand_layouts: Sequence[tuple[int, ...] | None],
    prepare: Callable[..., Sequence[jax.Array]],
    batching: Batching,
    partitioning: "Partitioning",
) -> "Operation":
    """Declares a primitive: operands are positional, parameters not.

    Args:
        name: the primitive's name, as jaxprs show it.
        target: the CUDA custom-call target.
        dtype: of the result.
        attributes: (*operand avals, **parameters) -> the target's integers, as one struct
            "problem".
        reference: (*operands) -> result in jax.numpy; the CPU lowering.
        operand_layouts: for each operand None or the major-to-minor order the target reads.
        prepare: (*operands) -> what the target takes in their place, in jax.numpy. The target's
            result is a matrix, too: the rows of the result, whatever the dimensions before its
            last.
        batching: the rules for `jax.vmap`.
        partitioning: how the operation is split over devices.
    """
    dtype = np.dtype(dtype)
    primitive = Primitive(f"{name}_local")  # what one device computes
    _give_type(name, primitive, partitioning, dtype)

    def cpu(*operands: jax.Array, **_: Any) -> jax.Array:
        return reference(*operands)

    def cuda(*operands: jax.Array, **parameters: Any) -> jax.Array:
        shape = partitioning.result_shape(operands)
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
    operation = Operation(name, primitive, dtype, batching, partitioning)
    operation.differentiate_never(primitive)
    operation.batch(primitive, ())
    return operation


def _give_type(name: str, primitive: Primitive, partitioning: "Partitioning", dtype: Any) -> None:
    """Declares how a primitive is evaluated, and the type of its result."""

    def abstract_eval(*operands: Any, **_: Any) -> ShapedArray:
        refuse_unreduced(name, operands)
        shape = partitioning.result_shape(operands)
        mesh = get_abstract_mesh()
        if mesh.empty:
            return ShapedArray(shape, dtype)
        # The result varies over every manual mesh axis that an operand varies over. A type that
        # said less would make gradients wrong in silence.
        return ShapedArray(
            shape,
            dtype,
            sharding=NamedSharding(mesh, PartitionSpec(*[None] * len(shape))),
            manual_axis_type=ManualAxisType(varying=varying_axes(operands)),
        )

    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract_eval)


class Operation:
    """A declared operation; called, it binds its primitive.

    Where XLA may partition the program, that is outside of `jax.shard_map` or over an axis that it
    leaves out, it binds a primitive that carries the jaxpr of a call that XLA asks how to split. It
    has a rule for `jax.vmap`, which such a call has not; and JAX, which looks for the call in
    jaxprs, finds it there. Each device then binds a primitive without one.
    """

    def __init__(
        self,
        name: str,
        primitive: Primitive,
        dtype: Any,
        batching: Batching,
        partitioning: "Partitioning",
    ) -> None:
        """Made by `declare`, which says what the arguments are; `primitive` is one device's."""
        self._name = name
        self._primitive = primitive
        self._dtype = dtype
        self._batching = batching
        self._partitioning = partitioning
        self._with_batches: dict[Batches, Callable[..., jax.Array]] = {}
        self._lock = threading.Lock()

    def __call__(self, *operands: jax.Array, **parameters: Any) -> jax.Array:
        """As the context and the operands' types say."""
        return self.with_batches(())(*operands, **parameters)

    def here(self, *operands: jax.Array, **parameters: Any) -> jax.Array:
        """On this device, or on each device of a `jax.shard_map`."""
        output: jax.Array = self._primitive.bind(*cast_alike(operands), **parameters)
        return output

    def with_batches(self, batches: Batches) -> Callable[..., jax.Array]:
        """The same for operands that begin with batches."""
        with self._lock:  # one primitive for one call: JAX's caches compare identities
            if batches not in self._with_batches:
                self._with_batches[batches] = self._declare_split(batches)
            return self._with_batches[batches]

    def differentiate_never(self, primitive: Primitive) -> None:
        """Makes derivatives of a primitive raise."""

        def differentiate(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(
                f"{self._name}: there is no derivative; give the function that quantises its "
                "operands and calls it a gradient of its own, with jax.custom_vjp"
            )

        ad.primitive_jvps[primitive] = differentiate

    def batch(self, primitive: Primitive, batches: Batches) -> None:
        """Gives a primitive, whose operands begin with batches, its rule for `jax.vmap`."""

        def batch(
            operands: Sequence[jax.Array],
            axes: Sequence[int | None],
            call: Any = None,
            **parameters: Any,
        ) -> tuple[jax.Array, int]:
            batched, whose = self._batching.admit(operands, axes)
            return self.with_batches((whose, *batches))(*batched, **parameters), 0

        batching.primitive_batchers[primitive] = batch

    def _declare_split(self, batches: Batches) -> Callable[..., jax.Array]:
        """Returns the function that binds the operation on operands that begin with batches."""
        partitioned = Primitive(self._name)  # with the parameter `call`
        partitioning = self._partitioning.with_batches(batches)
        _give_type(self._name, partitioned, partitioning, self._dtype)
        self.differentiate_never(partitioned)
        self.batch(partitioned, batches)

        def bind_here(*operands: jax.Array, **parameters: Any) -> jax.Array:
            if not batches:
                return self.here(*operands, **parameters)
            fold = self._batching.fold
            assert fold is not None
            return fold(self.here, batches, operands, parameters)

        @functools.lru_cache(maxsize=4096)  # one object for one call: see with_batches
        def call_of(
            shapes: tuple[Any, ...],
            parameters: tuple[tuple[str, Any], ...],
            manual: AbstractMesh | None,
            shardy: bool,
        ) -> ClosedJaxpr | Callable[..., Sequence[jax.Array]]:
            structs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
            call = partitioning.automatic(bind_here, structs, dict(parameters), manual)
            with no_mesh():
                jaxpr = jax.make_jaxpr(call)(*structs)
            # JAX refuses to lower such a call, if it sees one, without devices.
            return jaxpr if manual is None else jaxpr_as_fun(jaxpr)

        def bind_splittable(*operands: jax.Array, **parameters: Any) -> jax.Array:
            """As XLA splits it, where the context leaves that to XLA."""
            meshes = (get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in operands))
            mesh = next((mesh for mesh in meshes if not mesh.empty), None)
            manual = mesh if mesh is not None and AxisType.Manual in mesh.axis_types else None
            # The call is not the same for XLA's older partitioner.
            shardy = bool(getattr(jax.config, "jax_use_shardy_partitioner", True))
            nothing_is_left = mesh is not None and AxisType.Auto not in mesh.axis_types
            if nothing_is_left or (manual is not None and not (shardy and free_axis(manual))):
                return bind_here(*operands, **parameters)
            shapes = tuple((operand.shape, operand.dtype) for operand in operands)
            call = call_of(shapes, tuple(sorted(parameters.items())), manual, shardy)
            output: jax.Array = partitioned.bind(*cast_alike(operands), call=call, **parameters)
            return output

        def bind(*operands: jax.Array, **parameters: Any) -> jax.Array:
            refuse_unreduced(self._name, [jax.typeof(operand) for operand in operands])
            split = partitioning.explicit(bind_splittable, operands, parameters)
            return bind_splittable(*operands, **parameters) if split is None else split

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


def refuse_unreduced(function: str, avals: Sequence[Any]) -> None:
    """Raises if a type says that an operand, or its gradient, is yet to be added up over an axis.

    The result's type would not say so, and the numbers would be wrong in silence.
    """
    remedies = {"unreduced": "jax.lax.psum it", "reduced": "jax.lax.pcast it to 'varying'"}
    for aval in avals:
        for kind, remedy in remedies.items():
            manual = getattr(aval.manual_axis_type, kind, ())
            axes = manual or getattr(aval.sharding.spec, kind, ())
            if axes:
                raise NotImplementedError(
                    f"{function}: operands must not be {kind} over a mesh axis, got "
                    f"{aval.dtype.name}{list(aval.shape)} {kind} over {', '.join(sorted(axes))}: "
                    f"{remedy if manual else 'jax.sharding.reshard it'} first"
                )


def varying_axes(avals: Sequence[Any]) -> frozenset[str]:
    """The manual mesh axes over which any of the operands varies."""
    return frozenset().union(*(aval.manual_axis_type.varying for aval in avals))


def cast_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Casts operands that vary over fewer mesh axes than others.

    That is done outside the primitive, where the cast's transpose (a psum) belongs.
    """
    varying = varying_axes([jax.typeof(operand) for operand in operands])
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
