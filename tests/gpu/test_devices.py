"""Several GPUs: first calls at once, one that is not the first, sharding, several processes.

Skipped where JAX sees fewer than two sm_90 GPUs. Numbers are compared bit for bit with one GPU's
where no sum is split: with a configuration given, because selection looks at a device's own shape.
"""

import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jax_deepgemm
from jax_deepgemm import GemmConfig
from tests import grouped_cases, numerics
from tests.gpu import support
from tests.processes import run_processes

P = PartitionSpec
CONFIG = GemmConfig(64, 64, 4, 1)

# How (a, sfa, b, sfb) are split; what XLA communicates then, and whether sums are split.
DENSE_SPLITS = {
    "m": ((P("x"), P("x"), P(), P()), set(), False),
    "n": ((P(), P(), P("x"), P("x")), set(), False),
    "k": ((P(None, "x"),) * 4, {"all-reduce"}, True),
}


@pytest.fixture
def gpus() -> list[jax.Device]:
    found = [gpu for gpu in jax.devices("cuda") if gpu.compute_capability == "9.0"]
    if len(found) < 2:
        pytest.skip(f"needs two sm_90 GPUs, and JAX has {len(found)}")
    return found


def mesh_of(gpus: list[jax.Device], kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((len(gpus),), ("x",), axis_types=(kind,), devices=gpus)


def dense(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
    return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb), config=CONFIG)


def ragged(a: Any, sfa: Any, b: Any, sfb: Any, *arrays: Any) -> jax.Array:
    return grouped_cases.call("ragged", a, sfa, b, sfb, *arrays, config=CONFIG)


def put(operands: Any, mesh: Mesh, specs: Any) -> list[jax.Array]:
    return [
        jax.device_put(operand, NamedSharding(mesh, spec))
        for operand, spec in zip(operands, specs, strict=True)
    ]


def run(function: Any, *arguments: Any, **options: Any) -> tuple[jax.Array, set[str]]:
    """The result, and what kinds of communication the program has; compiled once."""
    program = jax.jit(function, **options).lower(*arguments).compile()
    text = program.as_text()
    assert text is not None
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return program(*arguments), set(re.findall(rf" ({kinds})(?:-start)?\(", text))


def test_all_gpus_first_call_at_once(gpus: list[jax.Device]) -> None:
    """Kernels that nobody has compiled yet: each GPU's thread compiles or waits, and loads."""
    operands = numerics.dense_operands(77, 1112, 1168, seed=support.SEED)
    oracle = numerics.dense_oracle(operands)
    barrier = threading.Barrier(len(gpus), timeout=60)
    results: dict[jax.Device, jax.Array] = {}

    def work(gpu: jax.Device) -> None:
        local = [jax.device_put(x, gpu) for x in operands]
        barrier.wait()
        results[gpu] = jax.jit(dense)(*local)

    threads = [threading.Thread(target=work, args=(gpu,), daemon=True) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert set(results) == set(gpus), "a deadlock, or an error that is printed above"
    assert len({support.bits(results[gpu]) for gpu in gpus}) == 1
    support.check(results[gpus[-1]], oracle)
    assert all(results[gpu].devices() == {gpu} for gpu in gpus)


def test_a_gpu_that_is_not_the_first(gpus: list[jax.Device]) -> None:
    operands = numerics.dense_operands(65, 1128, 1168, seed=support.SEED)
    with jax.default_device(gpus[-1]):
        d = dense(*map(jnp.asarray, operands))
    assert d.devices() == {gpus[-1]}
    support.check(d, numerics.dense_oracle(operands))


@pytest.mark.parametrize("how", ["automatic", "explicit", "shard_map"])
@pytest.mark.parametrize(("specs", "communicated", "sums"), DENSE_SPLITS.values(), ids=DENSE_SPLITS)
def test_dense(
    how: str, specs: Any, communicated: set[str], sums: bool, gpus: list[jax.Device]
) -> None:
    operands = numerics.dense_operands(128 * len(gpus), 512 * len(gpus), 2048, seed=support.SEED)
    mesh = mesh_of(gpus, AxisType.Explicit if how == "explicit" else AxisType.Auto)
    shards = put(operands, mesh, specs)
    function: Any = dense
    if how == "shard_map":

        def body(*shards: Any) -> jax.Array:
            d = dense(*shards)
            return jax.lax.psum(d.astype(jnp.float32), "x").astype(d.dtype) if sums else d

        out = {"m": P("x"), "n": P(None, "x"), "k": P()}
        name = next(name for name, split in DENSE_SPLITS.items() if split[0] is specs)
        function = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out[name])
    d, kinds = run(function, *shards)
    assert kinds == communicated
    whole = jax.jit(dense)(*(jax.device_put(x, gpus[0]) for x in operands))
    if sums:
        assert numerics.error(d, numerics.dense_oracle(operands)) < numerics.BF16_TOLERANCE
    else:
        support.check(d, numerics.dense_oracle(operands))
        assert support.bits(d) == support.bits(whole)


def test_n_that_cuts_blocks_of_scales(gpus: list[jax.Device]) -> None:
    n = 96 * len(gpus)  # not a multiple of 128 for each
    operands = numerics.dense_operands(100, n, 1024, seed=support.SEED)
    shards = put(operands, mesh_of(gpus), (P(), P(), P("x"), P()))
    d, kinds = run(dense, *shards)
    assert not kinds
    whole = jax.jit(dense)(*(jax.device_put(x, gpus[0]) for x in operands))
    assert support.bits(d) == support.bits(whole)


def test_sum_is_scattered(gpus: list[jax.Device]) -> None:
    """Each GPU adds up the rows that it keeps, of k's sum and of the groups'."""
    count = len(gpus)
    mesh = mesh_of(gpus)
    rows = NamedSharding(mesh, P("x"))
    operands = numerics.dense_operands(64 * count, 256, 1024, seed=support.SEED)
    d, kinds = run(dense, *put(operands, mesh, (P(None, "x"),) * 4), out_shardings=rows)
    assert kinds == {"reduce-scatter"}
    assert numerics.error(d, numerics.dense_oracle(operands)) < numerics.BF16_TOLERANCE

    problem = grouped_cases.Problem("ragged", 2 * count, 100 * count, 256, 512)
    experts = problem.operands(support.SEED)
    (sizes,) = problem.random_arrays(np.random.default_rng(support.SEED))
    shards = put((*experts, sizes), mesh, (P(), P(), P("x"), P("x"), P()))
    d, kinds = run(ragged, *shards, out_shardings=rows)
    assert kinds == {"reduce-scatter"}
    support.check(d, problem.oracle(experts, sizes))


@pytest.mark.parametrize("split", ["n", "k"])
def test_shard_map_leaves_an_axis_to_xla(split: str, gpus: list[jax.Device]) -> None:
    """XLA splits columns or k over two GPUs of each of the mapped axis' rows of GPUs."""
    count = len(gpus) // 2
    mesh = jax.make_mesh(
        (count, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=gpus[: 2 * count]
    )
    # Two rows of tiles on each GPU: with one, where a column of tiles begins in k depends on n.
    operands = numerics.dense_operands(128 * count, 512, 1024, seed=support.SEED)
    last, rows, columns = P(None, "y"), P("x"), P("y")
    specs = (P("x", "y"), P("x", "y"), last, last)
    if split == "n":
        specs = (rows, rows, columns, columns)
    mapped = jax.shard_map(
        dense, mesh=mesh, in_specs=(rows, rows, P(), P()), out_specs=rows, axis_names={"x"}
    )
    d, kinds = run(mapped, *put(operands, mesh, specs))
    assert kinds == ({"all-reduce"} if split == "k" else set())
    if split == "k":
        assert numerics.error(d, numerics.dense_oracle(operands)) < numerics.BF16_TOLERANCE
    else:
        whole = jax.jit(dense)(*(jax.device_put(x, gpus[0]) for x in operands))
        assert support.bits(d) == support.bits(whole)


@pytest.mark.parametrize("how", ["automatic", "explicit", "shard_map"])
@pytest.mark.parametrize("split", ["groups", "rows", "n"])
def test_ragged(split: str, how: str, gpus: list[jax.Device]) -> None:
    if how == "shard_map" and split == "rows":
        pytest.skip("each shard of rows would need group sizes of its own, from the user")
    count = len(gpus)
    problem = grouped_cases.Problem("ragged", 4 * count, 128 * count, 256 * count, 1024)
    operands = problem.operands(support.SEED)
    (sizes,) = problem.random_arrays(np.random.default_rng(support.SEED))
    specs = {
        "groups": (P(), P(), P("x"), P("x"), P()),
        "rows": (P("x"), P("x"), P(), P(), P()),
        "n": (P(), P(), P(None, "x"), P(None, "x"), P()),
    }[split]
    mesh = mesh_of(gpus, AxisType.Explicit if how == "explicit" else AxisType.Auto)
    shards = put((*operands, sizes), mesh, specs)
    function: Any = ragged
    if how == "shard_map":

        def body(a: Any, sfa: Any, b: Any, sfb: Any, sizes: Any) -> jax.Array:
            if split == "n":
                return ragged(a, sfa, b, sfb, sizes)
            d = ragged(a, sfa, b, sfb, sizes, jax.lax.axis_index("x") * b.shape[0])
            return jax.lax.psum(d.astype(jnp.float32), "x").astype(d.dtype)

        out = P(None, "x") if split == "n" else P()
        function = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out)
    d, kinds = run(function, *shards)
    assert kinds == ({"all-reduce"} if split == "groups" else set())
    whole = jax.jit(ragged)(*(jax.device_put(x, gpus[0]) for x in (*operands, sizes)))
    support.check(whole, problem.oracle(operands, sizes))
    assert support.bits(d) == support.bits(whole)


@pytest.mark.parametrize("op", ["contiguous", "masked"])
def test_other_groups(op: str, gpus: list[jax.Device]) -> None:
    count = len(gpus)
    problem = grouped_cases.Problem(op, 2 * count, 128 * count, 256, 512)
    operands = problem.operands(support.SEED)
    (array,) = problem.random_arrays(np.random.default_rng(support.SEED))
    groups = (P("x"), P("x")) if op == "masked" else (P(), P())
    shards = put((*operands, array), mesh_of(gpus), (*groups, P("x"), P("x"), groups[0]))

    def call(*operands: Any) -> jax.Array:
        return grouped_cases.call(op, *operands, config=CONFIG)

    whole = jax.jit(call)(*(jax.device_put(x, gpus[0]) for x in (*operands, array)))
    assert support.bits(jax.jit(call)(*shards)) == support.bits(whole)
    support.check(whole, problem.oracle(operands, array))


def test_every_gpu_from_a_thread_of_its_own(gpus: list[jax.Device]) -> None:
    """Many programs on all GPUs at once, and one that runs on all of them between."""
    problems = [
        numerics.dense_operands(50 + i, 264, 528, seed=support.SEED + i) for i in range(len(gpus))
    ]
    oracles = [numerics.dense_oracle(operands) for operands in problems]
    jitted = jax.jit(dense)
    everywhere = numerics.dense_operands(64, 256, 512 * len(gpus), seed=support.SEED)
    shards = put(everywhere, mesh_of(gpus), (P(None, "x"),) * 4)
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            local = [jax.device_put(x, gpus[index]) for x in problems[index]]
            first = jitted(*local)
            support.check(first, oracles[index])
            for _ in range(200):
                d = jitted(*local)
            assert support.bits(d) == support.bits(first)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(gpus))]
    for thread in threads:
        thread.start()
    results = [jitted(*shards) for _ in range(20)]
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not failures, failures
    assert len({support.bits(d) for d in results}) == 1
    expected = numerics.dense_oracle(everywhere)
    assert numerics.error(results[0], expected) < numerics.BF16_TOLERANCE


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes(count: int, gpus: list[jax.Device]) -> None:
    """One GPU each, through `jax.distributed`."""
    if len(gpus) < count:
        pytest.skip(f"needs {count} sm_90 GPUs, and JAX has {len(gpus)}")
    outputs = run_processes(count, "cuda", seconds=150)
    assert ["OK" in output.splitlines() for output in outputs] == [True] * count, outputs
