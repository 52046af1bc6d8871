"""Automatic sharding, explicit meshes and shard_map's corners, on eight CPU devices.

How an operation is split is decided in Python (jax_deepgemm/partitioning.py) and is the same on
GPUs; tests/gpu/test_devices.py repeats what the kernels can change. The plain cases of
`jax.shard_map` stand with the operations.
"""

import collections
import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import jax_deepgemm
from jax_deepgemm.ffi import _native
from jax_deepgemm.partitioning import Dimensions, automatic_plan, dimension_sizes, spec_axes
from tests import grouped_cases, numerics
from tests.lowering import cuda_calls, cuda_text, problem_of

P = PartitionSpec

# The dimensions of (a, sfa, b, sfb, assignment) and d, a letter each; i, j: n, k in blocks of 128.
DIMENSIONS = {
    "dense": (("mk", "mj", "nk", "ij"), "mn"),
    "contiguous": (("mk", "mj", "gnk", "gij", "m"), "mn"),
    "masked": (("gmk", "gmj", "gnk", "gij", "g"), "gmn"),
    "ragged": (("mk", "mj", "gnk", "gij", "s"), "mn"),
}

Plan = dict[str, Any]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Also where there is a GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def mesh_of(kind: AxisType = AxisType.Auto, **axes: int) -> Mesh:
    names = tuple(axes)
    devices = jax.devices("cpu")[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(
        tuple(axes.values()), names, axis_types=(kind,) * len(names), devices=devices
    )


def spec(letters: str, plan: Plan) -> PartitionSpec:
    return P(*(plan.get(letter) for letter in letters))


class Case(NamedTuple):
    """An operation's operands, its exact result, and a function of flat operands."""

    op: str
    operands: tuple[Any, ...]
    oracle: np.ndarray[Any, Any]
    function: Callable[..., jax.Array]

    def put(self, mesh: Mesh, plan: Plan) -> list[jax.Array]:
        """The operands split as the plan says; scales, too, where that cuts no block."""
        letters, _ = DIMENSIONS[self.op]
        shapes = [operand.shape for operand in self.operands]
        sizes = dimension_sizes(Dimensions(letters, ""), shapes)
        scales = dict(plan)
        for block, name in (("i", "n"), ("j", "k")):
            parts = np.prod([mesh.shape[axis] for axis in np.atleast_1d(plan.get(name, ()))])
            if name in plan and sizes[name] / parts % 128 == 0:
                scales[block] = plan[name]
        return [
            jax.device_put(operand, NamedSharding(mesh, spec(names, scales)))
            for operand, names in zip(self.operands, letters, strict=True)
        ]

    def check(self, d: jax.Array) -> None:
        assert d.shape == self.oracle.shape
        assert numerics.error(d, self.oracle) < numerics.BF16_TOLERANCE


def make(op: str, rows: int, n: int, k: int, groups: int = 8) -> Case:
    if op == "dense":
        operands = numerics.dense_operands(rows, n, k, seed=3)
        oracle = numerics.dense_oracle(operands)
        return Case(
            op,
            operands,
            oracle,
            lambda a, sfa, b, sfb: jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb)),
        )
    problem = grouped_cases.Problem(op, groups, rows, n, k)
    operands_ = problem.operands(seed=3)
    (array,) = problem.random_arrays(np.random.default_rng(5))
    return Case(
        op,
        (*operands_, array),
        problem.oracle(operands_, array),
        lambda *operands: grouped_cases.call(op, *operands),
    )


# --- Parts of an axis ----------------------------------------------------------------------------
#
# XLA splits a dimension over a part of a mesh axis where a reshape leaves less of it.


def test_experts_fewer_than_devices() -> None:
    groups, max_m, n, k = 4, 32, 128, 256
    operands = numerics.grouped_operands((groups, max_m), groups, n, k, seed=3)
    counts = np.full(groups, max_m, np.int32)

    def masked(a: Any, sfa: Any, b: Any, sfb: Any, counts: Any) -> jax.Array:
        a, sfa = a.reshape(groups, max_m, k), sfa.reshape(groups, max_m, -1)
        return grouped_cases.call("masked", a, sfa, b, sfb, counts)

    rows = NamedSharding(mesh_of(x=8), P("x"))
    a, sfa, b, sfb = operands
    split = [jax.device_put(x.reshape(groups * max_m, -1), rows) for x in (a, sfa)]
    d = jax.jit(masked)(*split, b, sfb, counts)
    assert numerics.error(d, numerics.masked_oracle(operands, counts)) < numerics.BF16_TOLERANCE


def test_heads_fewer_than_devices() -> None:
    operands = numerics.dense_operands(16, 512, 256, seed=3)
    weights = numerics.dense_operands(8, 128, 128, seed=4)

    def heads(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
        d = jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb)).reshape(64, 128)
        lhs = jax_deepgemm.quantize_per_token(d)
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt(lhs, (weights.b, weights.sfb))

    a, sfa, b, sfb = operands
    columns = NamedSharding(mesh_of(x=8), P("x"))
    alone = jax.jit(heads)(*operands)
    d = jax.jit(heads)(a, sfa, jax.device_put(b, columns), sfb)
    np.testing.assert_array_equal(d.astype(np.float32), alone.astype(np.float32))


def test_a_slice_of_split_rows() -> None:
    operands = numerics.dense_operands(4, 128, 256, seed=3)

    def sliced(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
        lhs = (a.reshape(4, 16, -1)[:, 0], sfa.reshape(4, 16, -1)[:, 0])
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt(lhs, (b, sfb))

    rows = NamedSharding(mesh_of(x=8), P("x"))
    a, sfa, b, sfb = operands
    split = [jax.device_put(np.repeat(x, 16, axis=0), rows) for x in (a, sfa)]
    d = jax.jit(sliced)(*split, b, sfb)
    assert numerics.error(d, numerics.dense_oracle(operands)) < numerics.BF16_TOLERANCE


# --- Communication -------------------------------------------------------------------------------

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(function: Callable[..., Any], *arguments: Any) -> collections.Counter[str]:
    """How often each kind of communication stands in what XLA compiles."""
    return collectives_of(jax.jit(function).lower(*arguments).compile())


def collectives_of(program: jax.stages.Compiled) -> collections.Counter[str]:
    text = program.as_text()
    assert text is not None
    return collections.Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text))


def gathered(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The shapes of what XLA gathers, such as "64,512"; on the CPU FP8 is widened for that."""
    return gathered_by(jax.jit(function).lower(*arguments).compile())


def gathered_by(program: jax.stages.Compiled) -> list[str]:
    text = program.as_text()
    assert text is not None
    return re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)


# --- Automatic sharding --------------------------------------------------------------------------

# rows, n, k, groups; axes; how dimensions are split; what XLA must communicate.
ROWS = {"dense": 64, "contiguous": 1024, "masked": 24, "ragged": 200}
SPLITS: dict[str, tuple[Plan, set[str]]] = {
    "m": ({"m": "x"}, set()),
    "n": ({"n": "x"}, set()),
    "k": ({"k": "x"}, {"all-reduce"}),
    "m-n": ({"m": "x", "n": "y"}, set()),
    "m-k": ({"m": "y", "k": "x"}, {"all-reduce"}),
    "n-k": ({"n": "y", "k": "x"}, {"all-reduce"}),
    "m-by-both": ({"m": ("x", "y")}, set()),
    "n-by-both": ({"n": ("y", "x")}, set()),
}
GROUP_SPLITS: dict[str, tuple[Plan, set[str]]] = {
    "g": ({"g": "x"}, {"all-reduce"}),
    "g-m": ({"g": "x", "m": "y"}, {"all-reduce"}),
    "g-n": ({"g": "x", "n": "y"}, {"all-reduce"}),
    "g-k": ({"g": "y", "k": "x"}, {"all-reduce"}),
    "g-by-both": ({"g": ("x", "y")}, {"all-reduce"}),
}
CASES = [
    pytest.param(op, plan, communicated, id=f"{op}-{name}")
    for op in DIMENSIONS
    for name, (plan, communicated) in (SPLITS | (GROUP_SPLITS if op != "dense" else {})).items()
]


@pytest.mark.parametrize(("op", "plan", "communicated"), CASES)
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (192, 656)], ids=["blocks", "cut-blocks"])
def test_automatic_sharding(op: str, plan: Plan, communicated: set[str], n: int, k: int) -> None:
    """Nothing is gathered, sums are added up, and the result stays split."""
    case = make(op, ROWS[op], n, k)
    operands = case.put(mesh_of(x=4, y=2), plan)
    d = jax.jit(case.function)(*operands)
    case.check(d)
    _, letters = DIMENSIONS[op]
    split = NamedSharding(d.sharding.mesh, spec(letters, plan))
    assert d.sharding.is_equivalent_to(split, d.ndim)
    if op == "masked" and "k" not in plan:
        communicated = set()  # groups are independent
    assert set(collectives(case.function, *operands)) == communicated


# How a [m, k], b [n, k] come and d is wanted (None: as XLA likes), and what this communicates: as
# much as jnp.dot does (True), or else this, where dot gathers b or adds up what it then slices.
AGAINST_DOT = {
    "m": (P("x"), P(), None, True),
    "n": (P(), P("x"), None, True),
    "k": (P(None, "x"), P(None, "x"), None, True),
    "m-and-n": (P("x"), P("y"), None, True),
    "m-and-k": (P("x", "y"), P(None, "y"), None, True),
    "k-of-a": (P(None, "x"), P(), None, True),
    "k-of-b": (P(), P(None, "x"), None, "all-reduce"),
    "result-is-wanted-whole": (P("x"), P(), P(), True),
    "rows-scattered-after-the-sum": (P(None, "x"), P(None, "x"), P("x"), "reduce-scatter"),
    "one-axis-for-m-and-n": (P("x"), P("x"), None, True),
    "weights-sharded-for-storage": (P("x"), P("x"), P("x"), True),
    "weights-sharded-for-storage-by-k": (P("x"), P(None, "x"), P("x"), True),
    "rows-sharded-for-storage": (P("x"), P("x"), P(None, "x"), True),
    "k-of-b-and-rows-wanted": (P(), P(None, "x"), P("x"), "reduce-scatter"),
}


@pytest.mark.parametrize(("a", "b", "d", "same"), AGAINST_DOT.values(), ids=list(AGAINST_DOT))
def test_communicates_like_dot(
    a: PartitionSpec, b: PartitionSpec, d: PartitionSpec | None, same: bool | str
) -> None:
    mesh = mesh_of(x=4, y=2)
    case = make("dense", 64, 512, 1024)
    operands = [
        jax.device_put(operand, NamedSharding(mesh, split))
        for operand, split in zip(case.operands, (a, a, b, b), strict=True)
    ]
    matrices = [
        jax.device_put(np.asarray(x).astype(jnp.bfloat16), NamedSharding(mesh, split))
        for x, split in ((case.operands[0], a), (case.operands[2], b))
    ]
    options = {} if d is None else {"out_shardings": NamedSharding(mesh, d)}
    ours = jax.jit(case.function, **options)
    dot = jax.jit(lambda x, w: jnp.dot(x, w.T), **options)
    case.check(ours(*operands))
    assert ours(*operands).sharding.is_equivalent_to(dot(*matrices).sharding, 2)
    kinds = set(collectives(ours, *operands))
    if same is True:
        assert kinds == set(collectives(dot, *matrices))
    else:
        assert kinds == {same}
        # On GPUs, XLA makes a sum and a slice of it one reduce-scatter; on the CPU it does not.
        assert set(collectives(dot, *matrices)) & {"all-gather", "all-reduce"}


def test_weights_are_gathered_for_split_rows_alone() -> None:
    """That is where rows keep the weights' axis from A to the result, as for stored shards."""
    mesh = mesh_of(x=8)
    case = make("dense", 64, 1024, 1024)
    (names, result), shape = DIMENSIONS["dense"], "1024,1024"
    splits: list[Plan] = [{}, {"m": "x"}, {"n": "x"}, {"k": "x"}]
    for of_a, of_b, of_d in itertools.product(splits, splits[2:], splits[:3]):
        operands = [
            jax.device_put(operand, NamedSharding(mesh, spec(letters, plan)))
            for operand, letters, plan in zip(
                case.operands, names, (of_a, of_a, of_b, of_b), strict=True
            )
        ]
        function = jax.jit(case.function, out_shardings=NamedSharding(mesh, spec(result, of_d)))
        case.check(function(*operands))
        stored = of_a == of_d == {"m": "x"}
        assert (shape in gathered(function, *operands)) == stored, f"{of_a}, {of_b}, {of_d}"


@pytest.mark.parametrize("op", DIMENSIONS)
def test_plans_keep_weights_in_place(op: str) -> None:
    """The same of every operation's plans, whatever comes and is wanted; groups come first."""
    names, result = DIMENSIONS[op]
    dimensions = Dimensions(names, result)
    sizes = dict.fromkeys("gmnk", 1024)
    choices = [None, "x", "y", ("x", "y")]
    for of_a, of_b in itertools.product("mk", set("gnk") & set(names[2])):
        for axes in itertools.product(choices, repeat=4):
            # An axis splits one dimension of an array.
            if axes[2] and axes[3] and set(axes[2]) & set(axes[3]):
                continue
            splits = [{of_a: axes[0]}] * 2 + [{of_b: axes[1]}] * 2
            specs = [spec(letters, split) for letters, split in zip(names, splits, strict=False)]
            wanted = spec(result, {"m": axes[2], "n": axes[3]})
            plan = automatic_plan(dimensions, specs, wanted, sizes, {"x": 2, "y": 4}, 1)
            used = [axis for name in "gmnk" for axis in plan.get(name, ())]
            assert len(used) == len(set(used)), f"an axis splits two dimensions: {plan}"
            of_weights = spec_axes(specs[2], names[2].index(of_b))
            stored = of_a == "m" and of_b != "g" and axes[0] == axes[2]
            if of_weights and not (stored and set(of_weights) & set(plan["m"])):
                assert plan[of_b] == of_weights, f"{splits}, {wanted}: {plan}"


# How a and its assignment of rows, b, and d (None: as XLA likes) are split, and what that
# communicates in the masked operation and in the two whose rows have one group each; whether XLA's
# own communicates all of this, too. Where it does not, it gathers A, weights or sums instead.
AGAINST_XLA: dict[str, tuple[Plan, Plan, Plan | None, set[str], set[str], bool]] = {
    "rows": ({"m": "x"}, {}, None, set(), set(), True),
    "groups": ({"g": "x"}, {"g": "x"}, None, set(), {"all-reduce"}, True),
    "groups-of-weights": ({}, {"g": "x"}, None, set(), {"all-reduce"}, True),
    "n": ({}, {"n": "x"}, None, set(), set(), True),
    "k": ({"k": "x"}, {"k": "x"}, None, {"all-reduce"}, {"all-reduce"}, True),
    "k-of-a": ({"k": "x"}, {}, None, {"all-reduce"}, {"all-reduce"}, False),
    "k-of-weights": ({}, {"k": "x"}, None, {"all-reduce"}, {"all-reduce"}, False),
    "rows-and-n": ({"m": "x"}, {"n": "y"}, None, set(), set(), True),
    "groups-and-n": ({"g": "x"}, {"g": "x", "n": "y"}, None, set(), {"all-reduce"}, True),
    "rows-and-n-on-one-axis": (
        {"m": "x"},
        {"n": "x"},
        None,
        {"all-gather"},
        {"all-gather"},
        True,
    ),
    "rows-and-groups-on-one-axis": (
        {"m": "x"},
        {"g": "x"},
        None,
        {"all-gather"},
        {"all-gather", "reduce-scatter"},
        False,
    ),
    "weights-sharded-for-storage-by-n": (
        {"m": "x"},
        {"n": "x"},
        {"m": "x"},
        {"all-gather"},
        {"all-gather"},
        True,
    ),
    "weights-sharded-for-storage-by-k": (
        {"m": "x"},
        {"k": "x"},
        {"m": "x"},
        {"all-gather"},
        {"all-gather"},
        True,
    ),
    "rows-scattered-after-the-sum": (
        {"k": "x"},
        {"k": "x"},
        {"m": "x"},
        {"reduce-scatter"},
        {"reduce-scatter"},
        False,
    ),
    "result-is-wanted-whole": ({"m": "x"}, {}, {}, {"all-gather"}, {"all-gather"}, True),
}


def kinds_of(program: jax.stages.Compiled) -> set[str]:
    """How a program communicates; what is to be split otherwise, some of XLA's releases gather."""
    return {kind.replace("all-to-all", "all-gather") for kind in collectives_of(program)}


@pytest.mark.parametrize(
    ("of_a", "of_b", "of_d", "masked", "others", "same"),
    AGAINST_XLA.values(),
    ids=list(AGAINST_XLA),
)
@pytest.mark.parametrize("op", grouped_cases.OPS)
def test_groups_communicate_like_xlas_own(
    op: str,
    of_a: Plan,
    of_b: Plan,
    of_d: Plan | None,
    masked: set[str],
    others: set[str],
    same: bool,
) -> None:
    """As jnp.einsum or jax.lax.ragged_dot: weights are gathered only where these gather them."""
    n, k, mesh = 256, 512, mesh_of(x=4, y=2)  # no other dimension has these sizes
    case = make(op, ROWS[op], n, k)
    (a, sfa, b, sfb, array), result = DIMENSIONS[op]

    def put(x: Any, letters: str, plan: Plan) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, spec(letters, plan)))

    operands = [
        put(x, letters, plan)
        for x, letters, plan in zip(
            case.operands, (a, sfa, b, sfb, array), (of_a, of_a, of_b, of_b, of_a), strict=True
        )
    ]
    matrices = [
        put(np.asarray(case.operands[i]).astype(jnp.bfloat16), letters, plan)
        for i, letters, plan in ((0, a, of_a), (2, b, of_b))
    ]
    sizes = put(np.full(8, ROWS[op] // 8, np.int32), "s", {})

    def xlas(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        if op == "masked":
            return jnp.einsum("gmk,gnk->gmn", x, w)
        return jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), sizes)

    options = {} if of_d is None else {"out_shardings": NamedSharding(mesh, spec(result, of_d))}
    ours = jax.jit(case.function, **options).lower(*operands).compile()
    case.check(ours(*operands))
    kinds = kinds_of(ours)
    assert kinds == (masked if op == "masked" else others)

    def gathers_weights(program: jax.stages.Compiled) -> bool:
        shapes = [set(shape.split(",")) for shape in gathered_by(program)]
        return any({str(n), str(k)} <= shape for shape in shapes)

    if same or gathers_weights(ours):
        theirs = jax.jit(xlas, **options).lower(*matrices, sizes).compile()
        assert kinds <= kinds_of(theirs) or not same
        assert gathers_weights(theirs) or not gathers_weights(ours)


SCATTERED = [
    ("dense", {"k": "x"}, P("x"), {"reduce-scatter"}),
    ("dense", {"k": "x"}, P(None, "x"), {"reduce-scatter"}),
    ("dense", {"k": "x"}, P("x", "y"), {"reduce-scatter"}),
    ("dense", {"k": ("y", "x")}, P(("y", "x")), {"reduce-scatter"}),
    ("dense", {"k": ("y", "x")}, P(("x", "y")), {"all-reduce"}),
    ("contiguous", {"g": ("y", "x")}, P(("y", "x")), {"reduce-scatter"}),
    ("masked", {"k": "x"}, P(None, "x"), {"reduce-scatter"}),
    ("masked", {"k": "x"}, P("x"), {"reduce-scatter"}),
    ("ragged", {"g": "x"}, P("x"), {"reduce-scatter"}),
    ("ragged", {"g": "x"}, P(None, "x"), {"all-reduce"}),
    ("ragged", {"g": "x", "k": "y"}, P("y", "x"), {"reduce-scatter", "all-reduce"}),
    ("ragged", {"g": "x", "k": "y"}, P("x", "y"), {"reduce-scatter"}),
]


@pytest.mark.parametrize(("op", "plan", "wanted", "communicated"), SCATTERED)
def test_sum_is_scattered_where_the_result_is_split(
    op: str, plan: Plan, wanted: PartitionSpec, communicated: set[str]
) -> None:
    """Each device adds up what it keeps, and not all."""
    case = make(op, 32 if op == "masked" else ROWS[op], 256, 1024)
    mesh = mesh_of(x=4, y=2)
    operands = case.put(mesh, plan)
    function = jax.jit(case.function, out_shardings=NamedSharding(mesh, wanted))
    d = function(*operands)
    case.check(d)
    assert set(collectives(function, *operands)) == communicated
    if "k" not in plan:
        whole = jax.jit(case.function)(*case.operands)
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint16) for x in (d, whole)))


def test_sum_over_groups_is_exact() -> None:
    case = make("ragged", 200, 256, 256)
    case.operands[1][3, 0] = np.nan
    case.operands[0][5] = -0.0
    whole = jax.jit(case.function)(*case.operands)
    shards = case.put(mesh_of(x=8), {"g": "x"})
    split = jax.jit(case.function)(*shards)
    np.testing.assert_array_equal(*(np.asarray(d).view(np.uint16) for d in (whole, split)))
    text = jax.jit(case.function).lower(*shards).compile().as_text()
    assert text is not None
    assert re.search(r"u32\[200,128\]\S* all-reduce", text), "more bytes than the result has"


@pytest.mark.parametrize("offset", [-3, 0, 2, 2**31 - 1, -(2**31)])
def test_split_groups_keep_the_offset(offset: int) -> None:
    """Also where it is so large that adding to it overflows."""
    problem = grouped_cases.Problem("ragged", 4, 100, 64, 128)
    operands = problem.operands(seed=1)
    sizes = np.array([30, 0, 7, 20, 11, 5], np.int32)
    mesh = mesh_of(x=4)
    case = Case("ragged", (*operands, sizes), np.empty(0), lambda *_: jnp.empty(0))
    shards = case.put(mesh, {"g": "x"})
    d = jax.jit(lambda *x: grouped_cases.call("ragged", *x, np.int32(offset)))(*shards)
    expected = problem.oracle(operands, sizes, offset)
    assert numerics.error(d, expected) < numerics.BF16_TOLERANCE


def test_bad_values_stay_in_their_row_where_shards_cut_blocks() -> None:
    """A shard's zeros meet a neighbour's infinite scale only in rows that have it anyway."""
    case = make("dense", 16, 192, 656)
    sfa = np.array(case.operands[1])
    sfa[0, 3] = np.inf
    clean = jax.jit(case.function)(*case.operands)
    dirty = case._replace(operands=(case.operands[0], sfa, *case.operands[2:]))
    for plan in ({"k": "x"}, {"n": "x"}, {"k": "x", "n": "y"}):
        d = np.asarray(jax.jit(case.function)(*dirty.put(mesh_of(x=4, y=2), plan)))
        assert not np.isfinite(d[0]).any()
        assert numerics.error(d[1:], np.asarray(clean)[1:]) < numerics.BF16_TOLERANCE


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("op", DIMENSIONS)
def test_rank_promotion_is_never_needed(op: str, kind: AxisType) -> None:
    """Nor by a device for its part of the rows, of the groups or of what it sums."""
    case = make(op, ROWS[op], 192, 656)
    mesh = mesh_of(kind, x=4, y=2)
    with jax.numpy_rank_promotion("raise"):
        for plan in ({"m": "x", "k": "y"}, {"n": "x", "m" if op == "dense" else "g": "y"}):
            case.check(jax.jit(case.function)(*case.put(mesh, plan)))


@pytest.mark.parametrize("op", DIMENSIONS)
def test_sizes_that_do_not_divide_stay_whole(op: str) -> None:
    """XLA would pad a shard; here the dimension is computed on every device."""
    case = make(op, 37, 72, 144, groups=3)
    mesh = mesh_of(x=8)
    function = jax.jit(
        lambda *operands: case.function(
            *(jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("x"))) for x in operands)
        )
    )
    case.check(function(*(jax.device_put(x, NamedSharding(mesh, P())) for x in case.operands)))


@pytest.mark.parametrize(("rows", "split"), [(8, False), (64, False), (128, True), (192, False)])
def test_contiguous_blocks_of_rows_are_not_cut(rows: int, split: bool) -> None:
    """Shards of rows would begin inside the 128 rows that must have one group."""
    case = make("contiguous", 8 * rows, 64, 128, groups=3)
    operands = case.put(mesh_of(x=8), {"m": "x"})
    case.check(jax.jit(case.function)(*operands))
    # Rows that are not split are gathered, all of them.
    assert ("all-gather" in collectives(case.function, *operands)) == (not split)


def test_split_masked_rows_take_any_count() -> None:
    """Numbers out of range, too, from which a shard's first row can not be taken."""
    problem = grouped_cases.Problem("masked", 8, 24, 64, 128)
    operands = problem.operands(seed=2)
    counts = np.array([-(2**31), 2**31 - 1, -1, 0, 1, 5, 6, 24], np.int32)
    case = Case(
        "masked",
        (*operands, counts),
        problem.oracle(operands, counts),
        lambda *x: grouped_cases.call("masked", *x),
    )
    d = jax.jit(case.function)(*case.put(mesh_of(x=4), {"m": "x"}))
    case.check(d)
    assert not np.asarray(d)[0].any()


def test_masked_hint_follows_split_rows() -> None:
    """The hint is rows of a group; a device that has fewer is told so."""
    case = make("masked", 64, 64, 128)

    def body(*operands: jax.Array) -> jax.Array:
        return grouped_cases.call("masked", *operands, expected_m=50)

    mesh = mesh_of(AxisType.Explicit, x=8)
    with jax.set_mesh(mesh):
        (call,) = cuda_calls(cuda_text(body, *case.put(mesh, {"m": "x"})))
    problem = problem_of(call)
    assert (problem["m"], problem["expected_m"]) == (8 * 8, 8)


@pytest.mark.parametrize("op", DIMENSIONS)
def test_vmap_of_split_operands(op: str) -> None:
    """What is split without a batch is split with one."""
    if op == "ragged":
        pytest.skip("jax.vmap of the ragged operation raises")
    case = make(op, ROWS[op], 256, 256)
    mesh = mesh_of(x=4)
    batched = [
        jax.device_put(jnp.stack([x] * 2), NamedSharding(mesh, P(None, *spec(names, {"n": "x"}))))
        for x, names in zip(case.operands, DIMENSIONS[op][0], strict=True)
    ]
    sfb = DIMENSIONS[op][0][3]
    batched[3] = jax.device_put(batched[3], NamedSharding(mesh, P(*[None] * (1 + len(sfb)))))
    function = jax.jit(jax.vmap(case.function))
    d = function(*batched)
    case.check(d[0])
    case.check(d[1])
    *_, columns = d.sharding.spec
    assert columns == "x"
    assert "all-gather" not in collectives(function, *batched)


def test_vmap_of_a_split_batch_stays_split() -> None:
    case = make("dense", 16, 256, 256)
    mesh = mesh_of(x=4)
    a, sfa, b, sfb = case.operands
    split, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    a, sfa = (jax.device_put(np.stack([x] * 4), split) for x in (a, sfa))
    b, sfb = (jax.device_put(x, whole) for x in (b, sfb))
    function = jax.jit(jax.vmap(case.function, in_axes=(0, 0, None, None)))
    d = function(a, sfa, b, sfb)
    case.check(d[2])
    assert d.sharding.is_equivalent_to(split, 3)
    assert not collectives(function, a, sfa, b, sfb)


def stacked(case: Case, whose: str, count: int) -> list[jax.Array]:
    """The case's operands, those of A ("a"), of B ("b") or of both `count` times."""
    arrays = len(case.operands) - 4
    of_operands = ("a", "a", "b", "b", *("a" for _ in range(arrays)))
    return [
        jnp.stack([jnp.asarray(x)] * count) if of in whose else jnp.asarray(x)
        for x, of in zip(case.operands, of_operands, strict=True)
    ]


# Whose the batch is, n, and what is split by which axis: letters of operands, v for the batch.
SPLIT_BATCHES = (
    ("dense", "a", 24, {"v": "x"}),
    ("dense", "a", 256, {"m": "x"}),
    ("dense", "a", 24, {"v": "x", "m": "y"}),
    ("dense", "b", 256, {"n": "x"}),
    ("dense", "b", 24, {"n": "x"}),
    ("dense", "b", 24, {"v": "x", "m": "y"}),
    ("dense", "b", 256, {"v": "x", "m": "y"}),
    ("dense", "ab", 256, {"v": "x", "n": "y"}),
    ("dense", "ab", 24, {"m": "x", "n": "y"}),
    ("contiguous", "a", 24, {"v": "x", "m": "y"}),
    ("contiguous", "ab", 24, {"v": "x"}),
    ("masked", "ab", 24, {"g": "x"}),
    ("masked", "ab", 24, {"v": "x", "g": "y"}),
)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("op", "whose", "n", "plan"),
    SPLIT_BATCHES,
    ids=lambda x: "".join(x) if isinstance(x, dict) else str(x),
)
def test_vmap_keeps_what_is_split(
    op: str, whose: str, n: int, plan: dict[str, str], kind: AxisType
) -> None:
    """A batch is a dimension like others: nothing is gathered, and nothing computed twice."""
    case = make(op, ROWS[op], n, 256)
    mesh = mesh_of(kind, x=4, y=2)
    names, result = DIMENSIONS[op]
    of_operands = ("a", "a", "b", "b", *("a" for _ in names[4:]))
    letters = [
        "v" + name if of in whose else name for name, of in zip(names, of_operands, strict=True)
    ]
    operands = []
    for x, name in zip(stacked(case, whose, 4), letters, strict=True):
        # Scales of blocks of n are not split: a part of it has none of its own.
        split = {dimension: axis for dimension, axis in plan.items() if dimension in name}
        operands.append(jax.device_put(x, NamedSharding(mesh, spec(name, split))))
    axes = tuple(0 if name.startswith("v") else None for name in letters)
    with jax.set_mesh(mesh):
        function = jax.jit(jax.vmap(case.function, axes))
        d = function(*operands)
        # JAX 0.10 gathers the batch of a jax.shard_map, which an explicit mesh makes of what else
        # is split, under jax.vmap.
        if jax.__version_info__ >= (0, 11) or kind == AxisType.Auto or len(plan) == 1:
            assert not collectives(function, *operands)
    assert d.sharding.is_equivalent_to(
        NamedSharding(mesh, spec("v" + result, plan)), 1 + len(result)
    )
    for i in range(4):
        case.check(np.asarray(d)[i])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_linear_keeps_a_split_sequence(kind: AxisType) -> None:
    mesh = mesh_of(kind, x=8)
    x = np.random.default_rng(0).standard_normal((4, 64, 256), np.float32).astype(jnp.bfloat16)
    layer = jax_deepgemm.Linear.quantize(np.ones((128, 256), np.float32), np.ones(128, np.float32))
    split = NamedSharding(mesh, P(None, "x"))
    here = jax.device_put(x, split)
    on_all = jax.tree.map(lambda w: jax.device_put(w, NamedSharding(mesh, P())), layer)
    function = jax.jit(lambda layer, x: layer(x))
    with jax.set_mesh(mesh):
        d = function(on_all, here)
        assert not collectives(function, on_all, here)
    assert d.sharding.is_equivalent_to(split, 3)
    np.testing.assert_array_equal(np.asarray(d), layer(x))


@pytest.mark.parametrize("op", DIMENSIONS)
def test_inside_control_flow(op: str) -> None:
    case = make(op, ROWS[op], 256, 256)
    operands = case.put(mesh_of(x=4), {"n": "x"})

    def loop(*operands: jax.Array) -> jax.Array:
        _, d = jax.lax.scan(lambda c, _: (c, case.function(*operands)), 0, None, length=2)
        return d[1]

    case.check(jax.jit(loop)(*operands))
    assert "all-gather" not in collectives(loop, *operands)


def test_eager_calls_follow_their_operands() -> None:
    case = make("dense", 64, 256, 256)
    d = case.function(*case.put(mesh_of(x=4), {"m": "x"}))
    case.check(d)
    assert d.sharding.spec[0] == "x"


def test_equal_calls_are_one_call() -> None:
    """JAX's caches compare the call's identity: another one would be compiled again."""
    case = make("dense", 8, 16, 48)

    def call() -> Any:  # of a function that JAX has not traced yet
        return jax.make_jaxpr(lambda *x: case.function(*x))(*case.operands).eqns[-1].params["call"]

    assert call() is call()


def test_the_older_partitioner() -> None:
    """GSPMD, which a flag of JAX brings back, asks another function."""
    case = make("dense", 64, 256, 256)
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        d = jax.jit(case.function)(*case.put(mesh_of(x=4), {"m": "x"}))
        case.check(d)
        assert d.sharding.is_equivalent_to(NamedSharding(d.sharding.mesh, P("x")), 2)
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


def test_module_names_release_and_target() -> None:
    """Or the persistent cache would take another release's program for this one's."""
    case = make("dense", 64, 256, 256)
    text = jax.jit(case.function).lower(*case.put(mesh_of(x=4), {"m": "x"})).as_text()
    what = f"{jax_deepgemm.__version__} {_native.GEMM_TARGET} gemm_fp8_fp8_bf16_nt "
    assert what.encode().hex().upper() in text


def configured(op: str) -> tuple[Case, Callable[..., jax.Array]]:
    """An operation with a kernel of its own, which needs the four k-blocks that it has."""
    case = make(op, ROWS[op], 512, 512)
    rows, groups = ROWS[op], {} if op == "dense" else {"num_groups": 8}
    configs = jax_deepgemm.legal_configs(
        8 * rows if op == "masked" else rows, 512, 512, op=op, **groups
    )
    config = next(config for config in configs if config.cluster_k == 4)
    if op != "dense":
        return case, lambda *operands: grouped_cases.call(op, *operands, config=config)
    return case, lambda a, sfa, b, sfb: jax_deepgemm.gemm_fp8_fp8_bf16_nt(
        (a, sfa), (b, sfb), config=config
    )


PART_WITHOUT_KERNEL = (
    r"_nt\w*: config: cluster_k must be at most the number of k-blocks \(1\), got 4: "
    r"GemmConfig\(.*cluster_k=4.*\), on one device's m = \d+, n = 512, k = 128"
)


@pytest.mark.parametrize("op", DIMENSIONS)
def test_config_is_checked_for_a_device_as_xla_splits(op: str) -> None:
    """How that is, XLA knows when it compiles."""
    case, function = configured(op)
    jax.jit(function).lower(*case.put(mesh_of(x=4), {"n": "x"})).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match=PART_WITHOUT_KERNEL):
        jax.jit(function).lower(*case.put(mesh_of(x=4), {"k": "x"})).compile()


@pytest.mark.parametrize("op", DIMENSIONS)
def test_config_is_checked_for_a_device_of_an_explicit_mesh(op: str) -> None:
    """As inside `jax.shard_map`, when it is traced."""
    case, function = configured(op)
    mesh = mesh_of(AxisType.Explicit, x=4)
    cuda_text(function, *case.put(mesh, {"n": "x"}))
    for call in (jax.jit(function).trace, function):
        with pytest.raises(ValueError, match=PART_WITHOUT_KERNEL):
            call(*case.put(mesh, {"k": "x"}))


# --- Explicit meshes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "plan", "communicated"), CASES)
def test_explicit_mesh(op: str, plan: Plan, communicated: set[str]) -> None:
    """The operands' types say what is split; the result's type says it, too."""
    case = make(op, ROWS[op], 192, 656)
    mesh = mesh_of(AxisType.Explicit, x=4, y=2)
    operands = case.put(mesh, plan)
    _, letters = DIMENSIONS[op]

    def check_type(*operands: jax.Array) -> jax.Array:
        d = case.function(*operands)
        assert jax.typeof(d).sharding.spec == spec(letters, plan)
        return d

    case.check(jax.jit(check_type)(*operands))
    if op == "masked" and "k" not in plan:
        communicated = set()
    assert set(collectives(case.function, *operands)) == communicated


@pytest.mark.parametrize("op", DIMENSIONS)
def test_explicit_mesh_of_the_context(op: str) -> None:
    case = make(op, ROWS[op], 192, 256)
    mesh = mesh_of(AxisType.Explicit, x=4, y=2)
    operands = case.put(mesh, {"m": "x", "k": "y"})
    _, letters = DIMENSIONS[op]
    with jax.set_mesh(mesh):
        for function in (case.function, jax.jit(case.function)):
            d = function(*operands)
            assert jax.typeof(d).sharding.spec == spec(letters, {"m": "x"})
            case.check(d)


@pytest.mark.parametrize("op", DIMENSIONS)
def test_explicit_mesh_without_a_context(op: str) -> None:
    """Operands alone say which mesh it is, and operations run one by one."""
    case = make(op, ROWS[op], 256, 256)
    d = case.function(*case.put(mesh_of(AxisType.Explicit, x=4, y=2), {"n": "y"}))
    case.check(d)
    _, letters = DIMENSIONS[op]
    assert jax.typeof(d).sharding.spec == spec(letters, {"n": "y"})


@pytest.mark.parametrize("plan", [{}, {"m": "x"}, {"n": "y"}], ids=["whole", "m", "n"])
@pytest.mark.parametrize("on_mesh", [0, 2], ids=["a", "b"])
@pytest.mark.parametrize("op", DIMENSIONS)
def test_explicit_mesh_of_some_operands(op: str, on_mesh: int, plan: Plan) -> None:
    """Others are on no mesh: arrays that nobody placed, and NumPy's."""
    case = make(op, ROWS[op], 256, 256)
    placed = case.put(mesh_of(AxisType.Explicit, x=4, y=2), plan)
    for elsewhere in (jnp.asarray, np.asarray):
        operands = [elsewhere(operand) for operand in case.operands]
        operands[on_mesh : on_mesh + 2] = placed[on_mesh : on_mesh + 2]
        d = case.function(*operands)
        case.check(d)
        letters, result = DIMENSIONS[op]
        kept = {name: axis for name, axis in plan.items() if name in letters[on_mesh]}
        assert jax.typeof(d).sharding.spec == spec(result, kept)


def test_explicit_mesh_of_all_but_the_group_offset() -> None:
    """An int becomes an array that is on no mesh."""
    case = make("ragged", ROWS["ragged"], 64, 256)
    a, sfa, b, sfb, sizes = case.put(mesh_of(AxisType.Explicit, x=4, y=2), {"m": "x"})
    case.check(jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_ragged((a, sfa), (b, sfb), sizes, 0))


def test_explicit_mesh_lowers_one_call_per_device() -> None:
    case = make("dense", 64, 1024, 1024)
    mesh = mesh_of(AxisType.Explicit, x=4, y=2)
    (call,) = cuda_calls(cuda_text(case.function, *case.put(mesh, {"m": "y", "n": "x"})))
    problem = problem_of(call)
    assert (problem["m"], problem["n"], problem["k"]) == (32, 256, 1024)


REFUSED = {
    "k-of-a-alone": (
        (P(None, "x"), P()),
        r"gemm_fp8_fp8_bf16_nt: dimension k must be sharded alike in a and b, got \('x',\) and "
        r"\(\): jax.sharding.reshard one of them",
    ),
    "k-of-b-alone": ((P(), P(None, "x")), r"dimension k must .* got \(\) and \('x',\)"),
    "one-axis-twice": (
        (P("x"), P("x")),
        r"gemm_fp8_fp8_bf16_nt: a mesh axis must shard one dimension, got 'x' for m and for n of "
        r"b: jax.sharding.reshard one operand",
    ),
}


@pytest.mark.parametrize(("specs", "message"), REFUSED.values(), ids=list(REFUSED))
def test_explicit_types_that_contradict_are_refused(
    specs: tuple[PartitionSpec, PartitionSpec], message: str
) -> None:
    case = make("dense", 64, 256, 1024)
    mesh = mesh_of(AxisType.Explicit, x=4)
    splits = [specs[0], specs[0], specs[1], P()]
    operands = [
        jax.device_put(x, NamedSharding(mesh, split))
        for x, split in zip(case.operands, splits, strict=True)
    ]
    for function in (case.function, jax.jit(case.function)):
        with pytest.raises(ValueError, match=message):
            function(*operands)


def test_explicit_rows_that_cut_contiguous_blocks_are_refused() -> None:
    case = make("contiguous", 256, 64, 128, groups=2)
    operands = case.put(mesh_of(AxisType.Explicit, x=4), {"m": "x"})
    with pytest.raises(
        ValueError, match="m must be sharded in multiples of 128 rows, got 256 rows"
    ):
        case.function(*operands)


@pytest.mark.parametrize("op", ["contiguous", "ragged"])
def test_explicit_groups_of_no_rows(op: str) -> None:
    case = make(op, 0, 24, 256)
    d = case.function(*case.put(mesh_of(AxisType.Explicit, x=8), {"g": "x"}))
    assert d.shape == (0, 24)


def test_explicit_vmap_of_a_split_batch() -> None:
    case = make("dense", 16, 256, 256)
    mesh = mesh_of(AxisType.Explicit, x=4, y=2)
    a, sfa, b, sfb = case.operands
    with jax.set_mesh(mesh):
        a, sfa = (jax.device_put(np.stack([x] * 4), NamedSharding(mesh, P("x"))) for x in (a, sfa))
        b, sfb = (jax.device_put(x, NamedSharding(mesh, P("y"))) for x in (b, sfb))
        d = jax.jit(jax.vmap(case.function, in_axes=(0, 0, None, None)))(a, sfa, b, sfb)
    assert jax.typeof(d).sharding.spec == P("x", None, "y")
    case.check(np.asarray(d)[2])


# --- shard_map -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("op", DIMENSIONS)
def test_shard_map_over_some_axes(op: str, kind: AxisType) -> None:
    """Partial-manual: the other axis is left to XLA, or to types."""
    case = make(op, ROWS[op], 256, 256)
    mesh = mesh_of(kind, x=4, y=2)
    names, letters = DIMENSIONS[op]
    plan = {"masked": {"g": "x"}, "dense": {"m": "x"}}.get(op, {"m": "x"})
    if op == "ragged":
        plan = {}  # rows of a shard would need sizes of their own
    varying = []

    def body(*shards: jax.Array) -> jax.Array:
        d = case.function(*shards)
        varying.append(jax.typeof(d).manual_axis_type.varying)
        return d

    specs, out = tuple(spec(x, plan) for x in names), spec(letters, plan)
    operands = [
        jax.device_put(x, NamedSharding(mesh, split))
        for x, split in zip(case.operands, specs, strict=True)
    ]
    split = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, axis_names={"x"})
    with jax.set_mesh(mesh):
        case.check(jax.jit(split)(*operands))
    assert set(varying) == {frozenset({"x"} if plan else ())}


LEFT_TO_XLA = [
    pytest.param(op, {name: "y"}, id=f"{op}-{name}")
    for op, names in (("dense", "nk"), ("contiguous", "gnk"), ("masked", "mnk"), ("ragged", "gnk"))
    for name in names
]


@pytest.mark.parametrize(
    ("kind", "reverse"),
    [(AxisType.Auto, False), (AxisType.Explicit, True)],
    ids=["beside-auto", "beside-explicit"],
)
@pytest.mark.parametrize(("op", "left"), LEFT_TO_XLA)
def test_shard_map_leaves_an_axis_to_xla(
    op: str, left: Plan, kind: AxisType, reverse: bool
) -> None:
    """XLA splits the operation over it: n and k are cut inside blocks, and nothing is gathered."""
    case = make(op, 24 if op == "masked" else ROWS[op], 192, 656)
    devices = np.array(jax.devices("cpu")[:8])
    mesh = (
        Mesh(devices[::-1].reshape(2, 4), ("y", "x"), axis_types=(AxisType.Auto, kind))
        if reverse
        else Mesh(devices.reshape(4, 2), ("x", "y"), axis_types=(kind, AxisType.Auto))
    )
    manual: Plan = {"masked": {"g": "x"}, "ragged": {}}.get(op, {"m": "x"})
    names, letters = DIMENSIONS[op]
    operands = case.put(mesh, manual | left)
    mapped = jax.shard_map(
        case.function,
        mesh=mesh,
        in_specs=tuple(spec(x, manual) for x in names),
        out_specs=spec(letters, manual),
        axis_names={"x"},
    )
    with jax.set_mesh(mesh):
        d = jax.jit(mapped)(*operands)
        case.check(d)
        if "k" in left:
            case.check(mapped(*operands))  # op by op
    assert d.sharding.is_equivalent_to(NamedSharding(mesh, spec(letters, manual | left)), d.ndim)
    summed = "k" in left or "g" in left
    assert set(collectives(mapped, *operands)) == ({"all-reduce"} if summed else set())
    # Not the CPU's program alone, which XLA splits without asking.
    assert cuda_text(mapped, *operands).count("@CustomSPMDPartitioning") == 1


def test_shard_map_that_leaves_two_axes_gathers() -> None:
    """In which order XLA takes their devices is not known: a part would be another's."""
    case = make("dense", 64, 512, 512)
    mesh = mesh_of(x=2, y=2, z=2)
    operands = case.put(mesh, {"m": "x", "n": ("z", "y")})
    rows = P("x")
    mapped = jax.shard_map(
        case.function,
        mesh=mesh,
        in_specs=(rows, rows, P(), P()),
        out_specs=rows,
        axis_names={"x"},
    )
    case.check(jax.jit(mapped)(*operands))
    (call,) = cuda_calls(cuda_text(mapped, *operands))
    assert problem_of(call)["n"] == 512


@pytest.mark.parametrize("context", [False, True], ids=["operands-say", "context-says"])
@pytest.mark.parametrize(
    ("plan", "explicit"),
    [
        ({"m": "x", "n": "y"}, P("x")),
        ({"k": "x", "n": "y"}, P()),
        ({"n": "x", "k": "y"}, P(None, "x")),
        ({"n": "y"}, P()),
    ],
    ids=["m", "k", "n", "none"],
)
def test_auto_axis_beside_an_explicit_one(
    plan: Plan, explicit: PartitionSpec, context: bool
) -> None:
    """Types say what the one splits, and XLA decides over the other."""
    case = make("dense", 64, 512, 512)
    devices = np.array(jax.devices("cpu")[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("x", "y"), axis_types=(AxisType.Explicit, AxisType.Auto))
    operands = case.put(mesh, plan)

    def check_type(*operands: jax.Array) -> jax.Array:
        d = case.function(*operands)
        assert jax.typeof(d).sharding.spec == P(*explicit, *[None] * (2 - len(explicit)))
        return d

    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        d = jax.jit(check_type)(*operands)
        case.check(d)
        assert d.sharding.is_equivalent_to(NamedSharding(mesh, spec("mn", plan)), 2)
        assert set(collectives(case.function, *operands)) == (
            {"all-reduce"} if "k" in plan else set()
        )
        case.check(case.function(*operands))


@pytest.mark.parametrize("manual", ["y", ""], ids=["all-axes", "some-axes"])
@pytest.mark.parametrize("op", DIMENSIONS)
def test_shard_map_lowers_without_devices(op: str, manual: str) -> None:
    """For a mesh that exists elsewhere: nothing here asks for the devices."""
    case = make(op, ROWS[op], 256, 256)
    mesh = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    specs = tuple(P() for _ in case.operands)
    mapped = jax.shard_map(
        case.function, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"x", *manual}
    )
    whole = NamedSharding(mesh, P())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in case.operands]
    assert len(cuda_calls(cuda_text(mapped, *shapes))) == 1


# --- Types that say of a sum that it is yet to be taken ------------------------------------------


def quantize_flat(x: Any) -> list[jax.Array]:
    return jax.tree.leaves(jax_deepgemm.quantize_per_token(x))


@pytest.mark.parametrize("index", range(4), ids=["a", "sfa", "b", "sfb"])
@pytest.mark.parametrize(
    ("kind", "spec", "remedy"),
    [
        ("unreduced", P("x"), r"jax\.lax\.psum it first"),
        ("reduced", P(), r"jax\.lax\.pcast it to 'varying' first"),
    ],
    ids=["unreduced", "reduced"],
)
def test_shard_map_refuses_unreduced_operands(
    kind: str, spec: PartitionSpec, remedy: str, index: int
) -> None:
    """Their result would be one shard's term of the sum, and replicated by its type."""
    case = make("dense", 64, 256, 256)

    def function(*operands: jax.Array) -> Any:
        cast = list(operands)
        cast[index] = jax.lax.pcast(cast[index], "x", to=kind)
        return case.function(*cast)

    specs = [P()] * 4
    specs[index] = spec
    operands = list(case.operands)
    if kind == "unreduced":
        operands[index] = np.concatenate([operands[index]] * 4)
    mapped = jax.shard_map(function, mesh=mesh_of(x=4), in_specs=tuple(specs), out_specs=P())
    shape = re.escape(f"{case.operands[index].dtype}{list(case.operands[index].shape)}")
    message = rf"gemm_fp8_fp8_bf16_nt: operands must not be {kind} .* got {shape}.* x: {remedy}"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(mapped, *operands)


@pytest.mark.parametrize(("kind", "spec"), [("unreduced", P("x")), ("reduced", P())])
def test_shard_map_refuses_to_quantize_unreduced_arrays(kind: str, spec: PartitionSpec) -> None:
    def function(x: jax.Array) -> Any:
        return quantize_flat(jax.lax.pcast(x, "x", to=kind))

    mapped = jax.shard_map(function, mesh=mesh_of(x=4), in_specs=spec, out_specs=P())
    message = rf"quantize_per_token: operands must not be {kind} .* got float32\[\d+, 128\] {kind}"
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(mapped)(np.ones((64, 128), np.float32))


@pytest.mark.parametrize("kind", ["unreduced", "reduced"])
def test_explicit_types_of_unreduced_operands_are_refused(kind: str) -> None:
    case = make("dense", 64, 256, 256)
    mesh = mesh_of(AxisType.Explicit, x=4)
    split = P(None, None, **{kind: {"x"}})

    def typed(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))

    a, sfa, b, sfb = case.operands
    for function, operands in (
        (case.function, (typed(a), sfa, b, sfb)),
        (case.function, (a, sfa, b, typed(sfb))),
        (quantize_flat, (typed(np.ones((64, 128), np.float32)),)),
    ):
        message = rf"must not be {kind} over a mesh axis, got .* x: jax\.sharding\.reshard it first"
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(function, *operands)


def quantized_linear(x: jax.Array, w: jax.Array) -> jax.Array:
    lhs = jax_deepgemm.quantize_per_token(x)
    rhs = jax_deepgemm.quantize_per_block(w)
    return jax_deepgemm.gemm_fp8_fp8_bf16_nt(lhs, rhs).astype(jnp.float32)


@jax.custom_vjp
def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T in FP8, and its gradient."""
    return quantized_linear(x, w)


def linear_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x, w), (x, w)


def linear_backward(
    residuals: tuple[jax.Array, jax.Array], d: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    return quantized_linear(d, w.T), quantized_linear(d.T, x.T)


linear.defvjp(linear_forward, linear_backward)


@jax.custom_vjp
def nested(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same with another gradient of one's own around it."""
    return linear(x, w)


def nested_forward(x: jax.Array, w: jax.Array) -> Any:
    return jax.vjp(linear, x, w)


nested.defvjp(nested_forward, lambda linear_transpose, d: linear_transpose(d))


@pytest.mark.parametrize("layer", [linear, nested], ids=["linear", "nested"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("how", ["shard_map", "jit"])
def test_gradients_on_four_devices(
    how: str, kind: AxisType, layer: Callable[[jax.Array, jax.Array], jax.Array]
) -> None:
    """A gradient of one's own is that of one device: no factor of four, no part missing."""
    rng = np.random.default_rng(0)
    x, w, t = (
        rng.standard_normal(s, dtype=np.float32) for s in ((512, 256), (128, 256), (512, 128))
    )

    def loss(x: jax.Array, w: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(layer(x, w) - t))

    expected = jax.jit(jax.grad(loss, (0, 1)))(x, w, t)
    mesh = mesh_of(kind, x=4)
    rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    arrays = [jax.device_put(v, s) for v, s in ((x, rows), (w, whole), (t, rows))]

    def body(x: jax.Array, w: jax.Array, t: jax.Array) -> jax.Array:
        # Outside the custom gradient, where the cast's transpose is the sum over devices.
        w = jax.lax.pcast(w, "x", to="varying")
        return jax.lax.psum(loss(x, w, t), "x")

    function = loss
    if how == "shard_map":
        function = jax.shard_map(body, mesh=mesh, in_specs=(P("x"), P(), P("x")), out_specs=P())
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.grad(function, (0, 1)))(*arrays)
    for a, e in zip(actual, expected, strict=True):
        # Shards of rows are quantised in other blocks: FP8's errors differ, and no more than that.
        assert numerics.error(np.asarray(a), np.asarray(e)) < 2e-3
        np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(e), rtol=1e-2)


def experts(op: str, x: jax.Array, w: jax.Array, array: jax.Array) -> jax.Array:
    """Rows times their group's matrix, in FP8, with a gradient that is float32's."""

    @jax.custom_vjp
    def layer(x: jax.Array, w: jax.Array, array: jax.Array) -> jax.Array:
        lhs, rhs = jax_deepgemm.quantize_per_token(x), jax_deepgemm.quantize_per_block(w)
        return grouped_cases.call(op, *lhs, *rhs, array).astype(jnp.float32)

    def forward(x: jax.Array, w: jax.Array, array: jax.Array) -> Any:
        d = layer(x, w, array)
        # Of the same rows, so that the residuals vary as the operation's result does.
        return d, (x, w, array, d)

    def backward(residuals: Any, d: jax.Array) -> Any:
        x, w, array, out = residuals
        kept = jnp.where(out == 0, 0, d)
        if op == "masked":
            return jnp.einsum("gmn,gnk->gmk", kept, w), jnp.einsum("gmn,gmk->gnk", kept, x), None
        groups = len(w)
        ends = jnp.cumsum(array) if op == "ragged" else None
        of_row = array if ends is None else jnp.searchsorted(ends, jnp.arange(len(x)), "right")
        hot = (of_row[:, None] == jnp.arange(groups)).astype(jnp.float32)
        return (
            jnp.einsum("mg,mn,gnk->mk", hot, kept, w),
            jnp.einsum("mg,mn,mk->gnk", hot, kept, x),
            None,
        )

    layer.defvjp(forward, backward)
    return layer(x, w, array)


@pytest.mark.parametrize("op", grouped_cases.OPS)
def test_gradients_of_groups_on_four_devices(op: str) -> None:
    """Weights on every device: each adds up the gradients of its rows, and XLA those, once."""
    groups, n, k = 4, 24, 144
    rng = np.random.default_rng(0)
    rows = (groups, 32) if op == "masked" else (512,)
    x, w, t = (
        rng.standard_normal(s, dtype=np.float32) for s in ((*rows, k), (groups, n, k), (*rows, n))
    )
    array = {
        "contiguous": np.arange(4, dtype=np.int32).repeat(128),
        "masked": np.full(groups, 8, np.int32),
        "ragged": np.array([10, 60, 8, 50], np.int32),
    }[op]

    def loss(x: jax.Array, w: jax.Array, t: jax.Array, array: jax.Array) -> jax.Array:
        d = experts(op, x, w, array)
        return jnp.sum(jnp.where(d == 0, 0, jnp.square(d - t)))

    split = P(None, "x") if op == "masked" else P("x")
    of_array = P("x") if op == "contiguous" else P()

    def body(x: jax.Array, w: jax.Array, t: jax.Array, array: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(x, jax.lax.pcast(w, "x", to="varying"), t, array), "x")

    # What each device is to compute, one after the other: the same counts for each shard of rows.
    def alone(x: jax.Array, w: jax.Array, t: jax.Array) -> jax.Array:
        def shard(i: int, v: jax.Array) -> jax.Array:
            return jnp.split(v, 4, axis=1 if op == "masked" else 0)[i]

        arrays = jnp.split(jnp.asarray(array), 4) if op == "contiguous" else [array] * 4
        return jnp.sum(jnp.stack([loss(shard(i, x), w, shard(i, t), arrays[i]) for i in range(4)]))

    mesh = mesh_of(x=4)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(split, P(), split, of_array), out_specs=P())
    expected = jax.jit(jax.grad(alone, (0, 1)))(x, w, t)
    actual = jax.jit(jax.grad(mapped, (0, 1)))(x, w, t, array)
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(np.asarray(e)).max() > 1
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=1e-3, atol=1e-3)
