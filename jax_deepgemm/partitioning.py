"""How an operation is split over devices where the user leaves that to XLA or to types.

A plan says which dimensions are split over which mesh axes; `compute` is what a device does then:

- m and n: nothing but its own rows and columns of the result;
- k: its part of the sum; the parts, rounded to bfloat16, are added in float32 and rounded again;
- groups: its own groups, zero in rows of others; in the sum over devices, all terms of a row but
  one are zero, and no bit of that one changes. Masked groups are problems apart: no sum.

Of a sum over devices each gets all, or the part of it that it is to keep.

Weights stay where they are wherever that is possible: see `automatic_plan`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)
from numpy.typing import NDArray

from jax_deepgemm._version import __version__
from jax_deepgemm.ffi import _native
from jax_deepgemm.ffi.primitive import Batches, free_axis, no_mesh
from jax_deepgemm.reference import BLOCK

Axes = tuple[str, ...]
"""Mesh axes that one dimension is split over, the major one first."""

Plan = Mapping[str, Axes]
"""The axes of each of the dimensions g, m, n and k.

Two letters, such as km: the sum over the first, which is split, leaves each device one part of the
second dimension of the result.
"""


class Dimensions(NamedTuple):
    """The dimensions of an operation's arrays, a letter each.

    g, m, n and k can be split, and so can batches, which are capitals; i and j are n and k in
    blocks of 128. Others stay whole.
    """

    operands: tuple[str, ...]  # a, sfa, b, sfb, and the arrays that assign rows to groups
    result: str

    @property
    def batches(self) -> str:
        """The dimensions of batches."""
        return "".join(filter(str.isupper, self.result))

    def with_batches(self, batches: Batches) -> "Dimensions":
        """The same behind batches; the arrays that assign rows to groups have A's."""
        assert len(batches) <= len(ascii_uppercase), "more nested batches than letters"
        letters = ascii_uppercase[: len(batches)]
        a, b = (
            "".join(letter for letter, of in zip(letters, batches, strict=True) if whose in of)
            for whose in "ab"
        )
        of_operand = (a, a, b, b, *(a for _ in self.operands[4:]))
        operands = tuple(map("".join, zip(of_operand, self.operands, strict=True)))
        return Dimensions(operands, letters + self.result)

    @property
    def sums_groups(self) -> bool:
        """Whether rows have one of the groups, so that split groups give parts of a sum."""
        return "g" in self.operands[2] and "g" not in self.result


class Shard(NamedTuple):
    """One device's part of the dimensions that can be split: where it begins, and how long it is.

    `starts` has those that are split; a start is a traced number.
    """

    starts: dict[str, Any]
    sizes: dict[str, int]


Localize = Callable[..., tuple[Sequence[jax.Array], dict[str, Any]]]
"""(shard, arrays that assign rows to groups, parameters) -> the same for the shard.

An array comes split if its dimension is m or g of the result, else whole.
"""


def localize_nothing(
    shard: Shard, arrays: Sequence[jax.Array], parameters: dict[str, Any]
) -> tuple[Sequence[jax.Array], dict[str, Any]]:
    """The rule of an operation without groups."""
    return arrays, parameters


Check = Callable[[jax.Array, jax.Array, dict[str, Any]], None]
"""(a, b, parameters), one device's: raises if the caller's configuration is none for them."""


def check_nothing(a: jax.Array, b: jax.Array, parameters: dict[str, Any]) -> None:
    """The rule where any kernel will do."""


def dimension_sizes(dimensions: Dimensions, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The size of each dimension of the operands."""
    return {
        name: size
        for names, shape in zip(dimensions.operands, shapes, strict=True)
        for name, size in zip(names, shape, strict=True)
    }


def spec_axes(spec: PartitionSpec, index: int) -> Axes:
    """The mesh axes of one dimension of a PartitionSpec."""
    entry = spec[index] if index < len(spec) else None
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def automatic_plan(
    dimensions: Dimensions,
    operand_specs: Sequence[PartitionSpec],
    result_spec: PartitionSpec,
    sizes: Mapping[str, int],
    mesh_shape: Mapping[str, int],
    m_unit: int,
) -> dict[str, Axes]:
    """Chooses a plan that fits the shardings which XLA found for the operands and the result.

    An axis splits one dimension. Where two want it, the groups of the weights come first; then rows
    that are split in A and in the result alike, as for data parallelism; then k and n of the
    weights; and then what is left of the result and of A. So weights are gathered just where rows
    claim their axis on the way in and on the way out. A batch of A is more rows, one of B more
    columns, and one of both more groups.

    Args:
        dimensions: of the operation.
        operand_specs: how each operand comes.
        result_spec: how the result is wanted.
        sizes: of each dimension.
        mesh_shape: of the mesh.
        m_unit: rows of the result must be split in multiples of this.
    """
    a, b = dimensions.operands[0], dimensions.operands[2]

    def axes_of(names: str, spec: PartitionSpec, name: str) -> Axes:
        return spec_axes(spec, names.index(name)) if name in names else ()

    batches = dimensions.batches
    shared = [name for name in batches if name in a and name in b]
    columns = [name for name in batches if name not in a]
    of_a = {name: axes_of(a, operand_specs[0], name) for name in f"{batches}gmk"}
    of_b = {name: axes_of(b, operand_specs[2], name) for name in f"{batches}gnk"}
    of_d = {name: axes_of(dimensions.result, result_spec, name) for name in f"{batches}gmn"}
    plan: dict[str, Axes] = {name: () for name in f"{batches}gmnk" if name in a or name in b}
    used: set[str] = set()

    def claim(name: str, axes: Axes) -> None:
        if name not in plan or plan[name]:
            return
        unit = m_unit if name == "m" else 1
        taken: list[str] = []
        parts = 1
        for axis in axes:
            parts *= mesh_shape[axis]
            # XLA pads where a dimension does not divide; a kernel computes what there is.
            if axis in used or sizes[name] % (parts * unit):
                break
            taken.append(axis)
        if math.prod(mesh_shape[axis] for axis in taken) > 1:
            plan[name] = tuple(taken)
            used.update(taken)

    for name in (*shared, "g"):
        claim(name, of_b[name])
    for name in (*batches, "g", "m"):
        claim(name, of_a[name] if of_a[name] == of_d[name] else ())
    for name in ("k", *columns, "n"):
        claim(name, of_b[name])
    for name in (*batches, "g", "m", "n"):
        claim(name, of_d[name])
    for name in (*batches, "g", "m", "k"):
        claim(name, of_a[name])
    # Where the result is wanted split as a sum is, each device adds up what it keeps.
    for summed in ("g", "k") if dimensions.sums_groups else ("k",):
        for name in (*batches, "g", "m", "n"):
            axes = plan[summed]
            wanted = axes and of_d[name] == axes and not plan.get(name)
            divides = sizes.get(name, 0) % math.prod(mesh_shape[axis] for axis in axes) == 0
            # The groups' sum takes two columns at a time, which may not be cut.
            if wanted and divides and (summed, name) != ("g", "n"):
                plan[summed + name] = axes
    return plan


def explicit_plan(
    function: str,
    dimensions: Dimensions,
    operand_specs: Sequence[PartitionSpec],
    sizes: Mapping[str, int],
    mesh_shape: Mapping[str, int],
    m_unit: int,
) -> dict[str, Axes]:
    """Reads the plan from the types of A and B on an explicit mesh.

    Raises:
        ValueError: they contradict each other; the message begins with `function`.
    """
    plan: dict[str, Axes] = {}
    owner: dict[str, str] = {}
    for argument, index in (("a", 0), ("b", 2)):
        for position, name in enumerate(dimensions.operands[index]):
            axes = spec_axes(operand_specs[index], position)
            if name in plan and plan[name] != axes:
                raise ValueError(
                    f"{function}: dimension {_long(name)} must be sharded alike in a and b, got "
                    f"{plan[name]} and {axes}: jax.sharding.reshard one of them"
                )
            plan[name] = axes
            for axis in axes:
                if owner.setdefault(axis, name) != name:
                    raise ValueError(
                        f"{function}: a mesh axis must shard one dimension, got {axis!r} for "
                        f"{_long(owner[axis])} and for {_long(name)} of {argument}: "
                        "jax.sharding.reshard one operand"
                    )
    parts = math.prod(mesh_shape[axis] for axis in plan["m"])
    if parts > 1 and sizes["m"] % (parts * m_unit):
        raise ValueError(
            f"{function}: m must be sharded in multiples of {m_unit} rows, "
            f"got {sizes['m']} rows in {parts} parts"
        )
    return plan


def _long(name: str) -> str:
    """What messages call a dimension."""
    if name.isupper():
        return "of jax.vmap"
    return "num_groups" if name == "g" else name


def operand_specs(
    dimensions: Dimensions, plan: Plan, sizes: Mapping[str, int], mesh_shape: Mapping[str, int]
) -> list[PartitionSpec]:
    """How a plan's operands are split. Scales are, if no block of 128 is cut."""
    whole_blocks = dict(plan)
    for block, name in (("i", "n"), ("j", "k")):
        cut = sizes[name] // _parts(plan, name, mesh_shape) % BLOCK
        whole_blocks[block] = () if cut else plan[name]
    return [_spec(names, whole_blocks) for names in dimensions.operands]


def result_spec(dimensions: Dimensions, plan: Plan) -> PartitionSpec:
    """How a plan's result is split."""
    scattered = {name[1]: axes for name, axes in plan.items() if len(name) == 2}
    return _spec(dimensions.result, {**plan, **scattered})


def _spec(names: str, plan: Plan) -> PartitionSpec:
    return PartitionSpec(*(plan.get(name) or None for name in names))


def _parts(plan: Plan, name: str, mesh_shape: Mapping[str, int]) -> int:
    return math.prod(mesh_shape[axis] for axis in plan.get(name, ()))


def compute(
    function: Callable[..., jax.Array],
    dimensions: Dimensions,
    localize: Localize,
    plan: Plan,
    sizes: Mapping[str, int],
    mesh_shape: Mapping[str, int],
    operands: Sequence[jax.Array],
    parameters: dict[str, Any],
    check: Check = check_nothing,
) -> jax.Array:
    """Computes one device's part of the result, inside a program that runs on all devices.

    Args:
        function: (*operands, **parameters) -> result; the operation on one device.
        dimensions: of the operation.
        localize: what becomes of the other arrays and of the parameters.
        plan: as `automatic_plan` or `explicit_plan` returned it.
        sizes: of each dimension, before it is split.
        mesh_shape: of the mesh.
        operands: this device's, split as `operand_specs` says.
        parameters: of the operation as a whole.
        check: whether there is a kernel for the part.
    """
    a, sfa, b, sfb, *arrays = operands
    single = [name for name in plan if len(name) == 1]  # no sum over one that splits another
    local = {name: sizes[name] // _parts(plan, name, mesh_shape) for name in single}
    shard = Shard(
        {name: lax.axis_index(plan[name]) * size for name, size in local.items() if plan[name]},
        local,
    )
    assignment, parameters = localize(shard, arrays, parameters)
    if "k" in shard.starts and local["k"] % BLOCK:
        a, sfa, _ = _place(a, sfa, shard.starts["k"], a.ndim - 1)
        b, sfb, _ = _place(b, sfb, shard.starts["k"], b.ndim - 1)
    first_column = None
    if "n" in shard.starts and local["n"] % BLOCK:
        b, sfb, first_column = _place(b, sfb, shard.starts["n"], b.ndim - 2)
    check(a, b, parameters)
    d = function(a, sfa, b, sfb, *assignment, **parameters)
    if first_column is not None:
        d = lax.dynamic_slice_in_dim(d, first_column, local["n"], axis=d.ndim - 1)
    kept = {name[0]: dimensions.result.index(name[1]) for name in plan if len(name) == 2}
    if dimensions.sums_groups and plan["g"]:
        d = _sum_of_one(d, plan["g"], kept.get("g"))
    if plan["k"]:
        d = _sum(d.astype(jnp.float32), plan["k"], kept.get("k")).astype(d.dtype)
    return d


def _sum(d: jax.Array, axes: Axes, kept: int | None) -> jax.Array:
    """Adds up over devices; each keeps its part of the dimension `kept`, or all if that is None."""
    total: jax.Array = (
        lax.psum(d, axes)
        if kept is None
        else lax.psum_scatter(d, axes, scatter_dimension=kept, tiled=True)
    )
    return total


def _sum_of_one(d: jax.Array, axes: Axes, kept: int | None) -> jax.Array:
    """Adds up over devices what is +0 on all but one of them, without changing a bit.

    Two values at a time, as an integer: no sign of a zero and no NaN is lost, it takes no more
    than the bytes of d, and XLA's CPU compiler aborts on some sums of bfloat16.
    """
    *rows, n = d.shape
    even = jnp.pad(d, [(0, 0)] * len(rows) + [(0, 1)]) if n % 2 else d
    pairs = lax.bitcast_convert_type(even.reshape(*rows, -(-n // 2), 2), jnp.uint32)
    total = lax.bitcast_convert_type(_sum(pairs, axes, kept), d.dtype)
    return total.reshape(*total.shape[:-2], even.shape[-1])[..., :n]


def _place(
    values: jax.Array, scales: jax.Array, start: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """Puts a shard that cuts blocks of 128 where it lies in them, among zeros.

    Args:
        values: the shard.
        scales: of all shards: those of other devices' blocks are needed, and they are few.
        start: where the shard begins.
        axis: along which it is one.

    Returns:
        Values that begin with a block, their scales, and where the shard begins in the values.
    """
    size = values.shape[axis]
    inside_one_block = BLOCK % size == 0
    most = 0 if inside_one_block else BLOCK - math.gcd(size, BLOCK)
    padded = -(-(size + most) // 16) * 16  # n is a multiple of 8 and k of 16, for any shard
    offset: jax.Array | int = 0 if inside_one_block else start % BLOCK
    if padded != size:
        shape = tuple(padded if i == axis else n for i, n in enumerate(values.shape))
        # Made of an operand, zeros vary over the mesh axes that it varies over.
        zeros = jnp.zeros_like(values, shape=shape)
        values = lax.dynamic_update_slice_in_dim(zeros, values, offset, axis)
    num_blocks = -(-padded // BLOCK)
    room = [(0, num_blocks if i == axis else 0) for i in range(scales.ndim)]
    scales = lax.dynamic_slice_in_dim(jnp.pad(scales, room), start // BLOCK, num_blocks, axis)
    return values, scales, offset


class Partitioning(NamedTuple):
    """How one operation is partitioned; the functions are what `ffi.primitive.declare` asks for.

    Attributes:
        function: the public operation.
        dimensions: of its arrays.
        localize: what becomes of the arrays that assign rows to groups.
        m_unit: rows are split in multiples of it.
        check: whether there is a kernel for one device's part.
    """

    function: str
    dimensions: Dimensions
    localize: Localize = localize_nothing
    m_unit: int = 1
    check: Check = check_nothing

    def with_batches(self, batches: Batches) -> "Partitioning":
        """The same for operands and a result that begin with batches."""
        # One device's part of a batch is checked when it is folded.
        check = check_nothing if batches else self.check
        return self._replace(dimensions=self.dimensions.with_batches(batches), check=check)

    def result_shape(self, operands: Sequence[Any]) -> tuple[int, ...]:
        """Shape of the result of these operands."""
        sizes = dimension_sizes(self.dimensions, [operand.shape for operand in operands])
        return tuple(sizes[name] for name in self.dimensions.result)

    def automatic(
        self,
        bind: Callable[..., jax.Array],
        shapes: Sequence[Any],
        parameters: dict[str, Any],
        manual: AbstractMesh | None,
    ) -> Callable[..., jax.Array]:
        """Returns the operation as a call that XLA asks, once it knows shardings, how to split.

        Args:
            bind: as for `compute`.
            shapes: of the operands.
            parameters: of the operation.
            manual: inside a `jax.shard_map` that leaves an axis to XLA (`free_axis`), its mesh.
        """
        sizes = dimension_sizes(self.dimensions, [shape.shape for shape in shapes])
        axis = None if manual is None else free_axis(manual)

        def whole(*operands: jax.Array) -> jax.Array:
            return bind(*operands[:-1], **parameters)

        def plan_for(
            mesh: Mesh, arguments: Sequence[Any], result: Any
        ) -> tuple[Mesh | AbstractMesh, dict[str, Axes]]:
            """The mesh of which axes split dimensions, and by which they do."""
            split: Mesh | AbstractMesh = mesh
            if axis is not None:
                assert manual is not None
                split = AbstractMesh((manual.shape[axis],), (axis,))
                specs = [_spec_on_axis(axis, x) for x in (*arguments[:-1], result)]
            else:
                if mesh.empty:
                    devices = sorted(arguments[0].sharding.device_set, key=lambda device: device.id)
                    split = mesh = Mesh(np.array(devices), ("devices",))
                specs = [spec_on(mesh, x) for x in (*arguments[:-1], result)]
            *of_operands, of_result = specs
            plan = automatic_plan(
                self.dimensions, of_operands, of_result, sizes, split.shape, self.m_unit
            )
            return split, plan

        def partition(mesh: Mesh, arguments: Sequence[Any], result: Any) -> tuple[Any, ...]:
            split, plan = plan_for(mesh, arguments, result)

            def part(*operands: jax.Array) -> jax.Array:
                # Called eagerly, this runs under the `jax.shard_map`, and types must say what they
                # vary over.
                with no_mesh() if manual is None else use_abstract_mesh(_of_kind(manual, "Manual")):
                    return compute(
                        bind,
                        self.dimensions,
                        self.localize,
                        plan,
                        sizes,
                        split.shape,
                        operands[:-1],
                        parameters,
                        self.check,
                    )

            specs = operand_specs(self.dimensions, plan, sizes, split.shape)
            arg_shardings = (*(NamedSharding(split, spec) for spec in specs), _replicated(split))
            d_sharding = NamedSharding(split, result_spec(self.dimensions, plan))
            # What the parts communicate is numbered for the whole program.
            program = split if manual is None else _of_kind(manual, "Auto")
            return program, part, d_sharding, arg_shardings

        def infer(mesh: Mesh, arguments: Sequence[Any], result: Any) -> NamedSharding:
            split, plan = plan_for(mesh, arguments, result)
            return NamedSharding(split, result_spec(self.dimensions, plan))

        call = custom_partitioning(whole)
        call.def_partition(
            partition,
            infer_sharding_from_operands=infer,
            decode_shardings=False,  # JAX raises for what XLA may choose: see spec_on
            sharding_rule=self._sharding_rule(),
            reduction_factors=("k", *("g" for _ in "g" if self.dimensions.sums_groups)),
        )
        # All that XLA's module says of the call, beside shapes, is the number of a callback. JAX's
        # persistent cache may take that for equal, and may be told to ignore it: this constant
        # makes calls that differ differ there, too, and those of different releases. No device's
        # program has it.
        what = (
            f"{__version__} {_native.GEMM_TARGET} {self.function} {self.dimensions} "
            f"{sorted(parameters.items())}"
        )
        tag = np.frombuffer(what.encode(), np.uint8)
        return lambda *operands: call(*operands, tag)

    def _sharding_rule(self) -> str:
        # Scales have dimensions of their own: what splits the values splits them.
        operands = [" ".join(names) for names in (*self.dimensions.operands, "z")]
        return f"{', '.join(operands)} -> {' '.join(self.dimensions.result)}"

    def explicit(
        self,
        bind: Callable[..., jax.Array],
        operands: Sequence[jax.Array],
        parameters: dict[str, Any],
    ) -> jax.Array | None:
        """Splits the operation as the operands' types say, None if they say nothing.

        Raises:
            ValueError: the types contradict each other.
        """
        types = [jax.typeof(operand) for operand in operands]
        mesh = next((t.sharding.mesh for t in types if not t.sharding.mesh.empty), None)
        if mesh is None or AxisType.Explicit not in mesh.axis_types:
            return None
        sizes = dimension_sizes(self.dimensions, [t.shape for t in types])
        specs = [t.sharding.spec for t in types]
        plan = explicit_plan(self.function, self.dimensions, specs, sizes, mesh.shape, self.m_unit)
        call = _explicit_call(
            self,
            bind,
            mesh,
            tuple(plan.items()),
            tuple(sizes.items()),
            tuple(sorted(parameters.items())),
        )
        return call(*operands)


@functools.lru_cache(maxsize=4096)  # one function for one call, so that it is compiled once
def _explicit_call(
    partitioning: Partitioning,
    bind: Callable[..., jax.Array],
    mesh: AbstractMesh,
    plan_items: tuple[tuple[str, Axes], ...],
    size_items: tuple[tuple[str, int], ...],
    parameters: tuple[tuple[str, Any], ...],
) -> Callable[..., jax.Array]:
    """The operation under the types of an explicit mesh: its operands become split as planned."""
    dimensions, plan, sizes = partitioning.dimensions, dict(plan_items), dict(size_items)
    in_specs = tuple(operand_specs(dimensions, plan, sizes, mesh.shape))

    def part(*shards: jax.Array) -> jax.Array:
        return compute(
            bind,
            dimensions,
            partitioning.localize,
            plan,
            sizes,
            mesh.shape,
            shards,
            dict(parameters),
            partitioning.check,
        )

    def call(*operands: jax.Array) -> jax.Array:
        resharded = [
            jax.sharding.reshard(operand, NamedSharding(mesh, spec))
            for operand, spec in zip(operands, in_specs, strict=True)
        ]
        if not any(plan.values()):
            return bind(*resharded, **dict(parameters))
        split = jax.shard_map(
            part,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=result_spec(dimensions, plan),
            # Only over the axes that it is split over: `jax.vmap` may keep another for the batch.
            axis_names={axis for axes in plan.values() for axis in axes},
        )
        d: jax.Array = split(*resharded)
        return d

    # Op by op, JAX 0.11.2 crashes on some operations of a shard_map, and an operand that is on no
    # mesh cannot be resharded; together with one that is on the mesh, it can.
    return jax.jit(call)


def _replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _of_kind(mesh: AbstractMesh, kind: str) -> AbstractMesh:
    kinds = (AxisType[kind],) * len(mesh.axis_names)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)


def _spec_on_axis(axis: str, argument: Any) -> PartitionSpec:
    """How XLA splits an argument by the one axis of its choice: what is split, that axis splits."""
    if argument.sharding is None:  # a result of which nothing is known
        return PartitionSpec()
    parts = argument.sharding.shard_shape(argument.shape)
    split = (whole != part for whole, part in zip(argument.shape, parts, strict=True))
    return PartitionSpec(*(axis if each else None for each in split))


def spec_on(mesh: Mesh, argument: Any) -> PartitionSpec:
    """How XLA splits an argument, by the mesh's axes.

    A dimension that no whole axes split counts as one that is not split: XLA may choose a part of
    an axis, after a reshape for example, and moves the argument to where the plan wants it.
    """
    sharding = getattr(argument, "sharding", None)
    if sharding is None:
        return PartitionSpec()
    if isinstance(sharding, NamedSharding):  # a result of which nothing is known
        return sharding.spec
    count, ndim = mesh.devices.size, len(argument.shape)
    # Of sizes that any split divides.
    indices = sharding.devices_indices_map((count,) * ndim)
    starts = np.array(
        [[part.start or 0 for part in indices[device]] for device in mesh.devices.flat], int
    ).reshape(*mesh.devices.shape, ndim)
    return PartitionSpec(*(_axes_of(mesh, starts[..., i]) for i in range(ndim)))


def _axes_of(mesh: Mesh, starts: NDArray[np.int_]) -> Axes:
    """The axes, major first, that split a dimension whose parts begin at `starts`, by device."""
    shards = len(np.unique(starts))
    part = starts // (mesh.devices.size // shards)
    for length in range(mesh.devices.ndim + 1):
        for axes in itertools.permutations(range(mesh.devices.ndim), length):
            sizes = [mesh.devices.shape[axis] for axis in axes]
            if 1 in sizes or math.prod(sizes) != shards:
                continue
            position = np.zeros(mesh.devices.shape, int)
            for axis, size in zip(axes, sizes, strict=True):
                along = np.arange(size).reshape([-1 if i == axis else 1 for i in range(part.ndim)])
                position = position * size + along
            if np.array_equal(position, part):
                return tuple(mesh.axis_names[axis] for axis in axes)
    return ()
