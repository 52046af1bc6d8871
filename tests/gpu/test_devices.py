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


def collectives(function: Any, *arguments: Any) -> set[str]:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", text))


def test_all_gpus_first_call_at_once(gpus: list[jax.Device]) -> None:
    """Kernels that nobody has compiled yet: each GPU's thread compiles or waits, and loads."""
    operands = numerics.dense_operands(77, 1112, 1168, seed=support.SEED)
    oracle = numerics.dense_oracle(operands)
    barrier = threading.Barrier(len(gpus))
    results: dict[jax.Device, jax.Array] = {}

    def work(gpu: jax.Device) -> None:
        local = [jax.device_put(x, gpu) for x in operands]
        barrier.wait()
        results[gpu] = jax.jit(dense)(*local)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
    d = jax.jit(function)(*shards)
    whole = jax.jit(dense)(*(jax.device_put(x, gpus[0]) for x in operands))
    if sums:
        assert numerics.error(d, numerics.dense_oracle(operands)) < numerics.BF16_TOLERANCE
    else:
        support.check(d, numerics.dense_oracle(operands))
        assert support.bits(d) == support.bits(whole)
    assert collectives(function, *shards) == communicated


def test_n_that_cuts_blocks_of_scales(gpus: list[jax.Device]) -> None:
    n = 96 * len(gpus)  # not a multiple of 128 for each
    operands = numerics.dense_operands(100, n, 1024, seed=support.SEED)
    shards = put(operands, mesh_of(gpus), (P(), P(), P("x"), P()))
    d = jax.jit(dense)(*shards)
    whole = jax.jit(dense)(*(jax.device_put(x, gpus[0]) for x in operands))
    assert support.bits(d) == support.bits(whole)
    assert not collectives(dense, *shards)


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
    d = jax.jit(function)(*shards)
    whole = jax.jit(ragged)(*(jax.device_put(x, gpus[0]) for x in (*operands, sizes)))
    support.check(whole, problem.oracle(operands, sizes))
    assert support.bits(d) == support.bits(whole)
    assert collectives(function, *shards) == ({"all-reduce"} if split == "groups" else set())


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

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_two_processes(gpus: list[jax.Device]) -> None:
    """One GPU each, through `jax.distributed`."""
    outputs = run_processes(2, "cuda", seconds=240)
    assert ["OK" in output.splitlines() for output in outputs] == [True, True], outputs
