"""Programs on one GPU: CUDA graphs, threads, memory, what is freed, when errors come."""

import gc
import json
import os
import pathlib
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_deepgemm
from jax_deepgemm.cli.timing import NO_CUDA_GRAPHS
from jax_deepgemm.ffi import _native
from tests import grouped_cases, numerics
from tests.gpu import support

ROOT = pathlib.Path(__file__).parents[2]
WIDTH = 256


def dense(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
    return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb))


def layer(x: jax.Array, weights: Any) -> jax.Array:
    """Keeps shape and size of the numbers."""
    d = jax_deepgemm.gemm_fp8_fp8_bf16_nt(jax_deepgemm.quantize_per_token(x), weights)
    return d.astype(jnp.float32) * WIDTH**-0.5


def model(x: jax.Array, layers: Any) -> jax.Array:
    for weights in layers:
        x = layer(x, weights)
    return x


def model_operands(layers: int, seed: int) -> tuple[jax.Array, list[Any]]:
    rng = np.random.default_rng([seed, layers])
    weights = [
        jax_deepgemm.quantize_per_block(rng.standard_normal((WIDTH, WIDTH), dtype=np.float32))
        for _ in range(layers)
    ]
    return jnp.asarray(rng.standard_normal((64, WIDTH), dtype=np.float32)), weights


def launches_of(run: Callable[[], jax.Array]) -> int:
    """How many launches of ours the host made for a run: none where a graph is replayed."""
    before = _native.launches()
    run().block_until_ready()
    return _native.launches() - before


# --- CUDA graphs ---------------------------------------------------------------------------------


def test_programs_are_captured_by_default() -> None:
    """From the third run on the host launches none of the program's kernels itself."""
    x, layers = model_operands(12, support.SEED)
    program = jax.jit(model).lower(x, layers).compile()
    kernels = 2 * 12  # a layer quantises and multiplies
    assert launches_of(lambda: program(x, layers)) >= kernels
    launches_of(lambda: program(x, layers))  # records
    assert [launches_of(lambda: program(x, layers)) for _ in range(3)] == [0, 0, 0]
    singly = jax.jit(model).lower(x, layers).compile(NO_CUDA_GRAPHS)
    singly(x, layers)
    assert [launches_of(lambda: singly(x, layers)) for _ in range(3)] == [kernels] * 3


def test_graph_is_recorded_again_when_buffers_move() -> None:
    x, layers = model_operands(12, support.SEED)
    program = jax.jit(model).lower(x, layers).compile()
    expected = [support.bits(program(x, layers)) for _ in range(4)]
    assert len(set(expected)) == 1
    moved = x + 1
    copies = jax.tree.map(jnp.copy, layers)
    recorded = [launches_of(lambda: program(moved, copies)) for _ in range(4)]
    assert recorded[0] + recorded[1] >= 12, "the graph was replayed with the old buffers"
    assert recorded[-1] == 0
    want = support.bits(jax.jit(model).lower(moved, copies).compile(NO_CUDA_GRAPHS)(moved, copies))
    # Back and forth, while all results are alive, so that they too lie elsewhere.
    alive = [program(moved, copies), program(x, layers), program(moved, copies)]
    assert [support.bits(d) for d in alive] == [want, expected[0], want]


def test_graph_after_other_programs_have_evicted_it() -> None:
    x, layers = model_operands(12, support.SEED)
    program = jax.jit(model).lower(x, layers).compile()
    expected = [support.bits(program(x, layers)) for _ in range(3)]
    for i in range(3):
        y, others = model_operands(8 + i, support.SEED + i)
        other = jax.jit(model).lower(y, others).compile()
        for _ in range(3):
            other(y, others)
        assert support.bits(program(x, layers)) == expected[0]


def test_sixty_layers() -> None:
    """One program gives the bits of sixty calls, captured or not."""
    x, layers = model_operands(60, support.SEED)
    program = jax.jit(model)
    single = jax.jit(layer)
    expected = x
    for weights in layers:
        expected = single(expected, weights)
    for _ in range(4):
        assert support.bits(program(x, layers)) == support.bits(expected)
    assert launches_of(lambda: program(x, layers)) == 0


# --- Stress --------------------------------------------------------------------------------------


def mixed_calls() -> list[tuple[Any, tuple[Any, ...], np.ndarray[Any, Any]]]:
    """Jitted operations of many shapes, their operands on the GPU, and the oracle's results."""
    calls: list[tuple[Any, tuple[Any, ...], np.ndarray[Any, Any]]] = []
    for i, (m, n, k) in enumerate(((1, 136, 272), (64, 520, 1040), (300, 264, 144), (7, 1032, 80))):
        operands = numerics.dense_operands(m, n, k, seed=support.SEED + i)
        oracle = numerics.dense_oracle(operands)
        calls.append((jax.jit(dense), tuple(map(jnp.asarray, operands)), oracle))
    for i, op in enumerate(grouped_cases.OPS):
        problem = grouped_cases.Problem(op, 4, 256, 136, 272)
        grouped = problem.operands(support.SEED)
        (array,) = problem.random_arrays(np.random.default_rng(support.SEED + i))

        def call(*operands: Any, op: str = op) -> jax.Array:
            return grouped_cases.call(op, *operands)

        arrays = tuple(map(jnp.asarray, (*grouped, array)))
        calls.append((jax.jit(call), arrays, problem.oracle(grouped, array)))
    return calls


def test_eight_threads_of_a_thousand_calls() -> None:
    calls = mixed_calls()
    start = threading.Barrier(8)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng([support.SEED, seed])
        try:
            start.wait()  # so that all compile at the same time
            first: dict[int, bytes] = {}
            for i in range(1000):
                which = int(rng.integers(len(calls)))
                jitted, operands, oracle = calls[which]
                d = jitted(*operands)
                if which not in first:
                    support.check(d, oracle)
                    first[which] = support.bits(d)
                elif i % 20 == 0:
                    assert support.bits(d) == first[which]
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not failures, failures


def test_memory_is_flat_after_ten_thousand_calls() -> None:
    calls = mixed_calls()
    gpu = jax.devices("cuda")[0]

    def resident_bytes() -> int:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def run(count: int) -> None:
        for i in range(count):
            jitted, operands, _ = calls[i % len(calls)]
            d = jitted(*operands)
            if i % 100 == 99:
                d.block_until_ready()
        d.block_until_ready()
        gc.collect()

    run(2000)
    host, device = resident_bytes(), (gpu.memory_stats() or {})["bytes_in_use"]
    libraries = _native.loaded_libraries()
    run(10_000)
    assert resident_bytes() - host < 8 << 20
    assert (gpu.memory_stats() or {})["bytes_in_use"] == device
    assert _native.loaded_libraries() == libraries


# --- What is freed, and when errors come ---------------------------------------------------------


def test_clear_caches_frees_the_modules() -> None:
    """And a program that is compiled again loads them again."""
    operands = [jnp.asarray(x) for x in numerics.dense_operands(33, 776, 784, seed=support.SEED)]

    def free() -> int:
        jax.clear_caches()
        gc.collect()
        return _native.loaded_libraries()

    before = free()
    for _ in range(2):
        expected = support.bits(jax.jit(dense)(*operands))
        assert _native.loaded_libraries() > before
        again = jax.jit(lambda *x: dense(*x) * 1)
        assert support.bits(again(*operands)) == expected
        loaded = _native.loaded_libraries()
        assert loaded == before + 1, "two programs share one kernel"
        del again
        assert free() == before
    # A program that is still held keeps what it launches.
    held = jax.jit(dense).lower(*operands).compile()
    held(*operands)
    assert free() == before + 1
    assert support.bits(held(*operands)) == expected


def test_kernels_outlive_what_is_queued() -> None:
    """A program that is dropped while its runs wait has their kernels until they are over."""
    x, layers = model_operands(60, support.SEED)
    for options in (NO_CUDA_GRAPHS, {}):
        program = jax.jit(model).lower(x, layers).compile(options)
        want = support.bits(program(x, layers))
        results = [program(x, layers) for _ in range(50)]
        del program
        jax.clear_caches()
        gc.collect()
        assert {support.bits(d) for d in results} == {want}


def test_error_of_a_run_comes_by_the_time_it_is_waited_for() -> None:
    """A call made by hand whose buffers are not what its attributes say; then work goes on."""
    names = ("op", "num_groups", "m", "expected_m", "n", "k", "num_sms", "fill_zero")
    problem = dict.fromkeys(names, 0) | {"num_groups": 1, "m": 8, "n": 64, "k": 128}
    problem |= dict.fromkeys(jax_deepgemm.GemmConfig.__dataclass_fields__, 0)
    call = jax.ffi.ffi_call(_native.GEMM_TARGET, jax.ShapeDtypeStruct((8, 64), jnp.bfloat16))
    attributes = {name: np.int64(value) for name, value in problem.items()}
    a, sfa, b, sfb = (jnp.asarray(x) for x in numerics.dense_operands(8, 64, 128, seed=0))
    program = jax.jit(lambda *operands: call(*operands, problem=attributes))
    assert support.bits(program(a, sfa, b, sfb)) == support.bits(dense(a, sfa, b, sfb))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"gemm_fp8_fp8_bf16_nt: b must be \[64"):
        jax.block_until_ready(program(a, sfa, b[:32], sfb))
    assert support.bits(program(a, sfa, b, sfb)) == support.bits(dense(a, sfa, b, sfb))


# --- What is saved -------------------------------------------------------------------------------


def old_exports() -> list[pathlib.Path]:
    return sorted((ROOT / "tests/data").glob("*.jax_export"))


@pytest.mark.parametrize("path", old_exports(), ids=lambda path: path.stem)
def test_older_export_still_runs(path: pathlib.Path) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export saves through flatbuffers")
    exported = export.deserialize(bytearray(path.read_bytes()))
    if path.stem.startswith("dense"):
        dense_operands = numerics.dense_operands(70, 136, 256, seed=support.SEED)
        d = exported.call(*dense_operands)
        support.check(d, numerics.dense_oracle(dense_operands))
    else:
        problem = grouped_cases.Problem("ragged", 3, 70, 136, 256)
        operands = problem.operands(support.SEED)
        (sizes,) = problem.random_arrays(np.random.default_rng(support.SEED))
        support.check(exported.call(*operands, sizes), problem.oracle(operands, sizes))


CACHED = """
import json
import jax
from tests import numerics
import jax_deepgemm

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
operands = numerics.dense_operands(64, 136, 256, seed=0)
gemm = jax.jit(lambda a, sfa, b, sfb: jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb)))
error = numerics.error(gemm(*operands), numerics.dense_oracle(operands))
assert jax_deepgemm.backend().startswith("cuda")
print(json.dumps([error, [event.rsplit("/", 1)[1] for event in events]]))
"""


def test_persistent_compilation_cache(tmp_path: pathlib.Path) -> None:
    """A second process loads the program, plans and loads the kernel again, and is right."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    seen = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CACHED],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        error, events = json.loads(done.stdout.splitlines()[-1])
        assert error < numerics.BF16_TOLERANCE
        seen.append(set(events))
    assert "cache_misses" in seen[0]
    assert "cache_hits" in seen[1] and "cache_misses" not in seen[1]
