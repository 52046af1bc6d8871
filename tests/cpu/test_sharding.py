"""Automatic sharding, explicit meshes and shard_map's corners, on eight CPU devices.

How an operation is split is decided in Python (jax_deepgemm/partitioning.py) and is the same on
GPUs; tests/gpu/test_devices.py repeats what the kernels can change. The plain cases of
`jax.shard_map` stand with the operations.
"""

import collections
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jax_deepgemm
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
        whole = {"m": 1, "g": 1, "n": 128, "k": 128}
        sizes = dict(zip("".join(letters), np.concatenate([x.shape for x in self.operands])))
        scales = dict(plan)
        for block, name in (("i", "n"), ("j", "k")):
            parts = np.prod([mesh.shape[axis] for axis in np.atleast_1d(plan.get(name, ()))])
            if name in plan and sizes[name] / parts % whole[name] == 0:
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


COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(function: Callable[..., Any], *arguments: Any) -> collections.Counter[str]:
    """How often each kind of communication stands in what XLA compiles."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return collections.Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text))


def gathered(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The types of what XLA gathers, such as "f8e4m3fn[64,512]"."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return re.findall(r"= (\w+\[[\d,]*\])\S* all-gather(?:-start)?\(", text)


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
def test_automatic_sharding(
    op: str, plan: Plan, communicated: set[str], n: int, k: int
) -> None:
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
    allowed = communicated | ({"all-gather"} if "cut" in plan else set())
    assert set(collectives(case.function, *operands)) == allowed
