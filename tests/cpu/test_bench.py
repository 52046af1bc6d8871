"""The benchmark without a GPU: profile parsing, rows, sweep, results file, comparison.

The harness runs here as it does on a GPU, with the CPU's part of the profile in the place of the
GPU's: XLA names the HLO module of its CPU kernels too.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

import jax_deepgemm
from jax_deepgemm import GemmConfig
from jax_deepgemm.cli import bench, chain, harness, machine, main, moe, sweep, tables, timing
from jax_deepgemm.cli.compare import geometric_mean, matching_times, row_time_us, yardstick
from jax_deepgemm.cli.harness import Candidate, measure
from jax_deepgemm.cli.markdown import markdown
from jax_deepgemm.cli.problem import (
    dequantize_dot,
    grouped_error,
    product_error,
    random_problem,
)
from jax_deepgemm.cli.shapes import Shape
from jax_deepgemm.cli.timing import Call, call_times_us, host_calls_us, kernel_events

SHAPE = Shape.dense(64, 256, 384)
GROUPED = Shape("ragged", 3, 40, 256, 384)
CONFIGS = [GemmConfig(64, block_n, 4) for block_n in (64, 128, 256)]
WRONG, RAISING = CONFIGS[1], CONFIGS[2]

GPU_PROFILE = """
planes {
  name: "/host:CPU"
  lines { name: "Stream #1" events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "dg_on_the_host" } }
}
planes {
  name: "/device:GPU:0"
  lines { name: "XLA Modules" events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
  lines {
    name: "Stream #14(Compute)"
    timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 30000000 duration_ps: 3500000
             stats { metadata_id: 1 str_value: "jit_gemm" } }
    events { metadata_id: 2 offset_ps: 20000000 duration_ps: 800000
             stats { metadata_id: 1 str_value: "jit_gemm" } }
    events { metadata_id: 1 offset_ps: 10000000 duration_ps: 2500000
             stats { metadata_id: 1 str_value: "jit_gemm" } }
    events { metadata_id: 2 offset_ps: 0 duration_ps: 600000
             stats { metadata_id: 1 str_value: "jit_gemm" } }
    events { metadata_id: 3 offset_ps: 40000000 duration_ps: 90000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "dg_gemm_64x128" } }
  event_metadata { key: 2 value { id: 2 name: "transpose_fusion" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_module" } }
}
"""


class NoFlush:
    """A CPU has no L2 to flush."""

    method = "nothing is flushed"

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self) -> None: ...


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for the GPU; two of its "kernels" misbehave."""

    def gemm(lhs: Any, rhs: Any, *, config: GemmConfig | None = None) -> jax.Array:
        if config == RAISING:
            raise ValueError("this config raises")
        factor = 1.5 if config == WRONG else 1
        return factor * dequantize_dot(lhs, rhs)

    monkeypatch.setattr(timing, "DEVICE_PLANE", "/host:CPU")
    monkeypatch.setattr(timing, "STREAM_LINE", "")
    monkeypatch.setattr(harness, "KERNEL_PREFIX", "")
    monkeypatch.setattr(jax_deepgemm, "gemm_fp8_fp8_bf16_nt", gemm)
    # dequantize_dot rounds its operands to bf16.
    monkeypatch.setattr(harness, "MAX_ERROR", 1e-4)
    monkeypatch.setattr(bench, "Flush", NoFlush)
    monkeypatch.setattr(machine, "hopper_gpu", lambda: jax.devices("cpu")[0])
    monkeypatch.setattr(jax_deepgemm.device, "get_num_sms", lambda: 132)
    monkeypatch.setattr(jax_deepgemm, "select_config", lambda **problem: CONFIGS[0])
    monkeypatch.setattr(sweep, "contenders", lambda *_: CONFIGS)
    monkeypatch.setattr(tables, "console", tables.Console(width=200))


def test_time_between_kernels() -> None:
    """Two runs of three kernels; the second kernel of a run overlaps the first."""
    starts = ((0, 1000), (500, 300), (1200, 100), (5000, 1000), (5600, 900), (6700, 100))
    events = [timing.KernelEvent("dg", "jit_chain", *each) for each in starts]
    assert chain.summary(events, 2) == {
        "kernels": 3,
        "span_us": 1.6,
        "between_us": 0.2,
        "gap_us": 0.1,
        "gap_p90_us": 0.2,
    }
    with pytest.raises(RuntimeError, match="6 kernels for 4 runs"):
        chain.summary(events, 4)


@pytest.mark.usefixtures("cpu_as_gpu")
def test_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, whose kernels stand in for the GPU's; their number may differ from run to run."""
    monkeypatch.setattr(chain, "LAYERS", 2)
    monkeypatch.setattr(chain, "ROWS", 4)
    monkeypatch.setattr(chain, "WIDTH", 128)
    monkeypatch.setattr(chain, "NO_CUDA_GRAPHS", {})
    monkeypatch.setattr(chain, "summary", lambda events, runs: {"kernels": len(events) / runs})
    result = chain.measure(2, seed=0)
    assert set(result) == set(chain.FIELDS)
    for name in ("graphs", "no_graphs"):
        assert result[name]["kernels"] > 0
        assert result[name]["wall_us"] > 0


@pytest.fixture
def small_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that a CPU multiplies in a moment, and one configuration of JAX's kernel."""
    monkeypatch.setattr(moe, "SKEWED_ROWS", 300)
    monkeypatch.setattr(moe, "SMALL_GROUPS", 5)
    monkeypatch.setattr(moe, "EXPERT_WEIGHTS", ((24, 144), (16, 128)))
    monkeypatch.setattr(moe, "SCHEDULED_GROUPS", (8, 16))
    monkeypatch.setattr(moe, "SCHEDULED_WEIGHTS", (24, 144))
    monkeypatch.setattr(moe, "JAX_GROUP_ROWS", 40)
    monkeypatch.setattr(moe, "JAX_WEIGHTS", (24, 144))


# What a results file says about the machine.
WHERE = {"gpu": "g", "driver": "d", "cuda": "c", "jax": "j", "date": "t", "command": "x"}


def script(folder: pathlib.Path, code: str) -> str:
    """A program in place of one that times something in a process of its own."""
    path = folder / "program.py"
    path.write_text(code)
    return str(path)


def dense(m: int, **fields: Any) -> dict[str, Any]:
    return {"op": "dense", "groups": 1, "m_per_group": m, "n": 8, "k": 16, **fields}


class TestProfile:
    def test_stream_lines_of_the_gpu_in_time_order(self) -> None:
        profile = ProfileData.from_text_proto(GPU_PROFILE)
        events = kernel_events(profile)
        names = ["transpose_fusion", "dg_gemm_64x128"] * 2 + ["MemcpyD2D"]
        assert [event.name for event in events] == names
        assert [event.duration_ns for event in events] == [600, 2500, 800, 3500, 90000]
        assert [event.module for event in events] == ["jit_gemm"] * 4 + [""]

    @pytest.mark.parametrize("prefix, times", [("dg_", [2.5, 3.5]), ("", [3.1, 4.3])])
    def test_times_of_a_call(self, prefix: str, times: list[float]) -> None:
        events = kernel_events(ProfileData.from_text_proto(GPU_PROFILE))
        assert call_times_us(events, "jit_gemm", 2, prefix) == pytest.approx(times)

    @pytest.mark.parametrize("module, repetitions", [("jit_gemm", 3), ("jit_other", 2)])
    def test_kernels_that_do_not_add_up_raise(self, module: str, repetitions: int) -> None:
        events = kernel_events(ProfileData.from_text_proto(GPU_PROFILE))
        with pytest.raises(RuntimeError, match=f"kernels dg_\\* of {module}.*jit_gemm:dg_gemm"):
            call_times_us(events, module, repetitions, "dg_")

    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_each_call_finds_its_own_kernels(self) -> None:
        small, large = (Call(jnp.matmul, x, x) for x in (jnp.ones((8, 8)), jnp.ones((900, 900))))
        times = timing.kernel_times_us([large, small, large], lambda: None, 5)
        assert [len(each.kernel_us) for each in times] == [5, 5, 5]
        assert statistics.median(times[0].kernel_us) > statistics.median(times[1].kernel_us) > 0

    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_calls_that_are_compared_take_turns(self) -> None:
        """In random order, each as often as the others; those of the next group come after."""
        x = jnp.ones((8, 8))
        order: list[int] = []

        class Noted(Call):
            def __call__(self) -> jax.Array:
                order.append(calls.index(self))
                return super().__call__()

        calls = [Noted(jnp.matmul, x, x) for _ in range(4)]
        done: list[int] = []
        times = timing.kernel_times_us(calls, list, 9, lambda: done.append(len(order)), [3, 1])
        assert [len(each.kernel_us) for each in times] == [9] * 4
        turns = [tuple(order[i : i + 3]) for i in range(0, 27, 3)]
        assert {tuple(sorted(turn)) for turn in turns} == {(0, 1, 2)} and len(set(turns)) > 2
        assert order[27:] == [3] * 9
        assert done == [27, 27, 27, 36]

    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_kernels_of_interest_and_all(self) -> None:
        def two_kernels(x: jax.Array) -> jax.Array:
            return jnp.sort(x @ x, axis=0)

        x = jnp.ones((300, 300))
        (both,) = timing.kernel_times_us([Call(two_kernels, x, kernel_prefix="sort")], list, 3)
        for kernel_us, op_us in zip(*both, strict=True):
            assert 0 < kernel_us < op_us


READ_BYTES = tuple(length // 250_000 for length in timing.READ_BYTES)


class TestFlush:
    @pytest.mark.parametrize("dirty_l2", [False, True])
    def test_writes_one_buffer_in_place(
        self, dirty_l2: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(timing, "GIGABYTE", 4000)
        monkeypatch.setattr(timing, "READ_BYTES", READ_BYTES)
        flush = timing.Flush(jax.devices("cpu")[0], dirty_l2=dirty_l2)
        assert ("then reads" in flush.method) is not dirty_l2
        address = flush._written.unsafe_buffer_pointer()
        flush()
        assert flush._written.unsafe_buffer_pointer() == address
        assert flush._written.min() == 1

    def test_begins_with_reads_of_different_lengths(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "GIGABYTE", 4000)
        monkeypatch.setattr(timing, "READ_BYTES", READ_BYTES)
        flush = timing.Flush(jax.devices("cpu")[0], dirty_l2=False)
        read = [int(next(flush._read_some)(flush._unchanged)) for _ in range(16)]  # of ones
        assert read == [length // 4 for length in 2 * READ_BYTES]
        assert sorted(READ_BYTES) == [200 * eighths for eighths in range(8)]


class TestMeasure:
    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_rows(self) -> None:
        problem = random_problem(SHAPE, 0)
        candidates = [Candidate(problem, config) for config in (RAISING, *CONFIGS[:2])]
        raising, right, wrong = measure(candidates, NoFlush(), 4, xla_baseline=True)  # type: ignore[arg-type]

        assert raising["failed"] == "this config raises" and "time_us" not in raising
        assert not harness.is_good(raising)
        assert right["error"] < 1e-4 < wrong["error"]
        assert harness.is_good(right) and not harness.is_good(wrong)

        assert bench.row_shape(right) == SHAPE and "op_us" not in right
        assert right["config"]["block_n"] == 64 and wrong["config"]["block_n"] == 128
        low, high = right["spread_us"]
        assert 0 < low <= right["time_us"] <= high
        seconds = right["time_us"] * 1e-6
        assert right["tflops"] == pytest.approx(SHAPE.flops / seconds / 1e12, rel=0.05, abs=1e-3)
        assert right["gbs"] == pytest.approx(SHAPE.nbytes / seconds / 1e9, rel=0.05, abs=1e-3)
        for row in (raising, right, wrong):
            assert row["baselines"]["xla_dequantize_dot_us"] > 0

    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_candidates_of_one_problem_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def no_times(calls: list[Call], *rest: Any) -> list[timing.CallTimes]:
            asked.append(rest[-1])  # together
            return [timing.CallTimes([1.0], [1.0])] * len(calls)

        monkeypatch.setattr(harness, "kernel_times_us", no_times)
        one, other = (random_problem(SHAPE, seed) for seed in (0, 1))
        configs = [(one, RAISING), *((one, config) for config in CONFIGS[:2]), (other, CONFIGS[0])]
        rows = measure([Candidate(*each) for each in configs], NoFlush(), 1, xla_baseline=True)  # type: ignore[arg-type]
        assert asked == [[2, 1, 1, 1]]  # without the one that raises; XLA's of both problems
        assert ["time_us" in row for row in rows] == [False, True, True, True]

    @pytest.mark.usefixtures("cpu_as_gpu")
    @pytest.mark.parametrize("op", ["contiguous", "masked", "ragged"])
    def test_rows_of_groups(self, op: str) -> None:
        shape = Shape(op, groups=2, m_per_group=128, n=264, k=272)
        candidates = [Candidate(random_problem(shape, 0), CONFIGS[0])]
        (row,) = measure(candidates, NoFlush(), 3, xla_baseline=True)  # type: ignore[arg-type]
        assert bench.row_shape(row) == shape
        assert harness.is_good(row) and row["error"] < 5e-6
        assert row["op_us"] >= row["time_us"] > 0
        assert "baselines" not in row, "XLA's dot is timed for dense shapes"

    def test_baseline_computes_the_product(self) -> None:
        problem = random_problem(Shape.dense(64, 264, 400), 0)
        d = dequantize_dot(problem.lhs, problem.rhs)
        assert product_error(d, problem) < 1e-4

    def test_host_cost_counts_every_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0  # a clock that stands still but for the calls
        order = []

        def call(name: str, seconds: float) -> jax.Array:
            nonlocal now
            now += seconds
            order.append(name)
            return jnp.zeros(())

        monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
        calls = {
            "slow": functools.partial(call, "slow", 3e-6),
            "fast": functools.partial(call, "fast", 1e-6),
        }
        assert host_calls_us(calls, rounds=3, repetitions=4) == {"slow": 3.0, "fast": 1.0}
        assert order == ["slow", "fast"] + (["slow"] * 4 + ["fast"] * 4) * 3


class TestCommand:
    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_results_file(self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        peers = {"gpu": "other", "date": "then", "rows": [dense(64, deepgemm_us=1.0)]}
        peers["rows"][0] |= {"n": SHAPE.n, "k": SHAPE.k}
        (tmp_path / "peers.json").write_text(json.dumps(peers))
        status = main(
            [
                *("bench", "--shapes", f"{SHAPE},128x256x384", "--iterations", "3"),
                *("--output", str(tmp_path), "--baselines", "xla"),
                *("--compare", str(tmp_path / "peers.json")),
            ]
        )
        assert status == 0
        (path,) = set(tmp_path.glob("*.json")) - {tmp_path / "peers.json"}
        document = json.loads(path.read_text())
        expected = "gpu driver cuda jax date commit command method gpu_state host_call_us rows"
        assert set(expected.split()) <= set(document)
        assert set(document["host_call_us"]) == {"jax_deepgemm", "xla_dot"}
        assert "median of 3 calls, spread_us" in document["method"]
        first, second = document["rows"]
        assert first["baselines"]["deepgemm_us"] == 1.0
        assert set(second["baselines"]) == {"xla_dequantize_dot_us"}
        output = capsys.readouterr().out
        assert "geometric mean" in output and f"{first['time_us']:.3f}" in output

        arguments = ["bench", "--results", str(path), "--compare", str(path)]
        assert main(arguments) == 0
        assert "1.000" in capsys.readouterr().out

    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_num_sms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jax_deepgemm.device, "_num_sms_limit", 0)
        arguments = ["bench", "--shapes", str(SHAPE), "--iterations", "2", "--baselines", "none"]
        assert main([*arguments, "--num-sms", "66"]) == 0
        assert jax_deepgemm.device.num_sms_limit() == 66

    @pytest.mark.usefixtures("cpu_as_gpu", "small_moe")
    def test_groups_and_moe(
        self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        peer = GROUPED._asdict() | {"deepgemm_us": 1.0}
        peers = {"gpu": "other", "date": "then", "rows": [peer]}
        (tmp_path / "peers.json").write_text(json.dumps(peers))
        output = tmp_path / "results.json"
        status = main(
            [
                *("bench", "--shapes", f"{GROUPED},{SHAPE}", "--iterations", "2", "--moe"),
                *("--output", str(output), "--baselines", "none"),
                *("--compare", str(tmp_path / "peers.json")),
            ]
        )
        assert status == 0
        printed = capsys.readouterr().out
        assert "uneven groups" in printed and "geometric mean" in printed
        document = json.loads(output.read_text())
        grouped, _ = document["rows"]
        assert grouped["baselines"] == {"deepgemm_us": 1.0}
        sizes = {part: len(entries) for part, entries in document["moe"].items()}
        assert sizes == {"uneven": 4, "scheduler": 2, "jax": 1}

        assert main(["bench", "--results", str(output), "--markdown"]) == 0
        assert capsys.readouterr().out == markdown(document) + "\n"
        assert main(["bench", "--results", str(output), "--compare", str(output)]) == 0
        assert "uneven groups" in capsys.readouterr().out

        document["moe"]["uneven"][0]["padded"] = {"failed": "it did not work"}
        output.write_text(json.dumps(document))
        assert main(["bench", "--results", str(output)]) == 1
        assert "it did not work" in capsys.readouterr().out

    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_sweep(self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "sweep.json"
        arguments = ["bench", "--sweep", "--baselines", "none", "--output", str(output)]
        assert main([*arguments, "--shapes", str(SHAPE), "--iterations", "3"]) == 0
        document = json.loads(output.read_text())
        (row,) = document["rows"]
        texts = list(map(sweep.config_text, CONFIGS))
        assert list(row["sweep"]) == texts
        assert "median of 3 calls by turns" in document["method"]
        assert row["sweep"][texts[0]] == row["best_us"] == row["time_us"]
        assert row["best"] == texts[0], "a wrong config is never the best"
        assert row["sweep"][texts[1]].startswith("error ")
        assert row["sweep"][texts[2]] == "this config raises"
        assert row["regret"] == 0
        capsys.readouterr()
        assert main(["bench", "--results", str(output)]) == 0
        assert "regret" in capsys.readouterr().out

    @pytest.mark.usefixtures("cpu_as_gpu")
    @pytest.mark.parametrize("config, status", [("block_n=128", 1), ("block_n=256", 1), ("", 0)])
    def test_explicit_config(self, config: str, status: int) -> None:
        arguments = ["bench", "--shapes", str(SHAPE), "--iterations", "2", "--baselines", "none"]
        assert main([*arguments, "--config", config] if config else arguments) == status

    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_torch_that_is_missing_or_fails_is_named(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
    ) -> None:
        arguments = argparse.Namespace(iterations=2, dirty_l2=False)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        answer = bench._torch_baselines([SHAPE, GROUPED], arguments)
        assert answer["rows"] == {SHAPE: {"cublaslt_failed": "torch is not installed"}}

        crash = script(tmp_path, "raise SystemExit('no CUDA here')")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: "found")
        monkeypatch.setattr(bench.torch_baseline, "__file__", crash)
        answer = bench._torch_baselines([SHAPE], arguments)
        assert answer["rows"] == {SHAPE: {"cublaslt_failed": "no CUDA here"}}

    def test_torch_is_asked_for_dense_shapes(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
    ) -> None:
        code = (
            "import json, sys\n"
            "request = json.loads(sys.argv[1])\n"
            "read = request['read_bytes']\n"
            "rows = [{'mnk': shape, 'read': read} for shape in request['shapes']]\n"
            "print(json.dumps({'torch': {}, 'rows': rows}))"
        )
        monkeypatch.setattr("importlib.util.find_spec", lambda name: "found")
        monkeypatch.setattr(bench.torch_baseline, "__file__", script(tmp_path, code))
        arguments = argparse.Namespace(iterations=2, dirty_l2=False)
        answer = bench._torch_baselines([GROUPED, SHAPE], arguments)
        reads = list(timing.READ_BYTES)
        assert answer["rows"] == {SHAPE: {"mnk": [64, 256, 384], "read": reads}}

    def test_streams_are_asked_for_with_their_configs(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
    ) -> None:
        code = (
            "import json, os, sys\n"
            "request = json.loads(sys.argv[1])\n"
            "assert os.environ['DG_STREAM_ONLY'] == '1' and request['num_sms'] == 66\n"
            "print(json.dumps([config['block_n'] for _, config in request['kernels']]))"
        )
        monkeypatch.setattr(bench, "STREAM", [script(tmp_path, code)])
        arguments = argparse.Namespace(iterations=2, dirty_l2=False, num_sms=66)
        rows = [harness.shape_row(shape, CONFIGS[0]) for shape in (GROUPED, SHAPE, SHAPE)]
        rows[1]["failed"] = "it raised"
        bench._add_streams(rows, arguments)
        assert "baselines" not in rows[0] | rows[1]
        assert rows[2]["baselines"] == {"stream_us": CONFIGS[0].block_n}

        script(tmp_path, "raise SystemExit('no GPU here')")
        bench._add_streams(rows, arguments)
        assert rows[2]["baselines"]["stream_failed"] == "no GPU here"

    def test_stream_without_a_gpu_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package_root = str(pathlib.Path(jax_deepgemm.__file__).parents[1])
        monkeypatch.setenv("PYTHONPATH", package_root)
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        rows = [harness.shape_row(SHAPE, CONFIGS[0])]
        bench._add_streams(rows, argparse.Namespace(iterations=2, dirty_l2=False, num_sms=66))
        assert rows[0]["baselines"] == {"stream_failed": machine.why_no_gpu()}

    def test_without_a_gpu(self) -> None:
        root = pathlib.Path(__file__).parents[2]
        package_root = str(pathlib.Path(jax_deepgemm.__file__).parents[1])
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": package_root}
        for command in (["-m", "jax_deepgemm", "bench"], ["benchmarks/run.py"]):
            done = subprocess.run(
                [sys.executable, *command],
                capture_output=True,
                text=True,
                cwd=root,
                env=environment,
            )
            assert done.returncode == 1
            assert "need an sm_90 GPU" in done.stderr and len(done.stderr.splitlines()) == 1

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--config", "block_q=64"], "'block_q=64' is not FIELD=VALUE"),
            (["--config", "block_m"], "'block_m' is not FIELD=VALUE"),
            (["--config", "block_m=64", "--sweep"], "not allowed with"),
            (["--sweep", "0.9"], "'0.9' is not a factor from 1 up"),
            (["--sweep", "all"], "'all' is not a factor from 1 up"),
            (["--compare", "/nowhere.json"], "/nowhere.json: [Errno 2]"),
            (["--output", "/nowhere/results.json"], "there is no folder /nowhere"),
            (["--num-sms", "0"], "'0' is not a number from 1 to"),
            (["--iterations", "0"], "'0' is not a number from 1 to"),
            (["--config", "block_m=99999999999"], "'99999999999' is not a number from 1 to"),
        ],
    )
    def test_malformed_arguments(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    ENTRY_ALONE: ClassVar = {"uneven": [], "scheduler": [], "jax": [{"n": 8}]}

    # What load_results and load_peer refuse: fields of the document, fields of its row (None: to be
    # left out), and what is said.
    BROKEN = (
        ({"gpu": None}, {}, "without gpu", True),
        ({"rows": None}, {}, "without rows", True),
        ({"host_call_us": None}, {}, "without host_call_us", False),
        ({}, {"n": None, "op": None}, "a row is not as `bench` writes it: without n, op", True),
        ({}, {"config": None}, "without config", False),
        ({}, {"time_us": None, "error": None}, "without error, time_us", False),
        ({}, {"config": {"block_q": 64}}, "config: ", False),
        ({"moe": {"jax": []}}, {}, "moe is not as `bench` writes it: without scheduler", False),
        ({"moe": ENTRY_ALONE}, {}, "without groups, k, largest, ragged, rows", False),
    )

    @pytest.mark.parametrize("document_changes, row_changes, message, also_peer", BROKEN)
    def test_results_file_that_lacks_something(
        self,
        document_changes: dict[str, Any],
        row_changes: dict[str, Any],
        message: str,
        also_peer: bool,
        tmp_path: pathlib.Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def change(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in (fields | changes).items() if value is not None}

        row = dense(64, time_us=1.0, tflops=1.0, gbs=1.0, error=0.0, config={}, baselines={})
        document = WHERE | {"host_call_us": {}, "rows": [row]}
        path = tmp_path / "results.json"
        path.write_text(json.dumps(document))
        assert main(["bench", "--results", str(path), "--compare", str(path)]) == 0

        broken = change(document | {"rows": [change(row, row_changes)]}, document_changes)
        path.write_text(json.dumps(broken))
        for option in ("--results", "--compare") if also_peer else ("--results",):
            with pytest.raises(SystemExit) as stopped:
                main(["bench", option, str(path)])
            assert stopped.value.code == 2
            assert f"argument {option}: {path}" in (said := capsys.readouterr().err)
            assert message in said

    @pytest.mark.parametrize("text", ["{}", "[]", "1"])
    @pytest.mark.parametrize("option", ["--results", "--compare"])
    def test_json_that_is_no_results_file(
        self, option: str, text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            main(["bench", option, str(tmp_path / "results.json")])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert "is not as `bench` writes it: without " in said and "date, " in said

    def test_batches_fit_into_memory(self) -> None:
        most_bytes = 2 * SHAPE.nbytes
        large = SHAPE._replace(m_per_group=4096)
        shapes = [SHAPE, SHAPE, SHAPE, large, SHAPE]
        assert bench.batches(shapes, 5, most_bytes) == [[SHAPE, SHAPE], [SHAPE], [large], [SHAPE]]
        assert bench.batches(shapes, 1, most_bytes) == [[shape] for shape in shapes]
        assert bench.batches([], 0) == []

    def test_config(self) -> None:
        assert bench.parse_config("block_m=64, cluster_n=2") == {"block_m": 64, "cluster_n": 2}

    @pytest.mark.parametrize(
        "kind, stem", [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("cpu", "cpu")]
    )
    def test_file_is_named_after_the_gpu(self, kind: str, stem: str) -> None:
        assert machine.gpu_stem(kind) == stem


class TestMoe:
    def test_draws_are_uneven_and_the_same_each_time(self) -> None:
        skewed, small = moe.skewed_sizes(), moe.small_sizes()
        assert skewed.sum() == 32768 and len(skewed) == 8
        assert skewed.max() > 5 * skewed.min() and any(skewed % 128)
        assert len(small) == 256 and 9 < small.mean() < 11 and small.min() < 5
        assert list(moe.skewed_sizes()) == list(skewed) and list(moe.small_sizes()) == list(small)

    @pytest.mark.parametrize("groups", moe.SCHEDULED_GROUPS)
    def test_busy_groups_are_scattered(self, groups: int) -> None:
        sizes = moe.scattered_sizes(groups)
        assert len(sizes) == groups
        assert list(sizes[sizes > 0]) == [64] * 8
        assert sizes[-(groups // 8) :].any(), "as far as the end"

    @pytest.mark.parametrize(
        "sizes", [[5, 0, 200, 128], [0, 0, 1], [256, 129, 0], [3], [128, 128], [0, 300, 0]]
    )
    def test_padding_and_back_is_the_ragged_product(self, sizes: list[int]) -> None:
        problem = moe.random_problem(np.array(sizes, np.int32), 72, 144, seed=0)
        function, operands, _ = moe.ragged(problem)
        d = moe.padded_gemm(*operands)
        assert grouped_error(d, problem.lhs, problem.rhs, problem.sizes) < 5e-6
        assert jnp.array_equal(d, function(*operands))

    @pytest.mark.parametrize("sizes", [[128] * 4, [1] * 256, [129, 129], [0, 0], [127] * 3])
    def test_padded_rows_are_enough(self, sizes: list[int]) -> None:
        needed = sum(-(-size // 128) * 128 for size in sizes)
        assert needed <= moe.padded_rows(sum(sizes), len(sizes)) < needed + 128 * len(sizes)

    @pytest.mark.usefixtures("cpu_as_gpu", "small_moe")
    def test_entries(self) -> None:
        first, *_, last = moe.uneven(NoFlush(), 2, seed=0)  # type: ignore[arg-type]
        assert (first["groups"], first["rows"]) == (8, 300) and first["padded_rows"] == 1280
        assert (last["n"], last["k"]) == (16, 128) and last["groups"] == 5
        for entry in (first, last):
            for name in ("ragged", "padded"):
                assert entry[name]["op_us"] >= entry[name]["time_us"] > 0
                assert entry[name]["error"] < 5e-6
        for entry in moe.scheduler(NoFlush(), 2, seed=0):  # type: ignore[arg-type]
            assert entry["rows"] == 8 * 64 and entry["ragged"]["time_us"] > 0

    @pytest.mark.usefixtures("cpu_as_gpu")
    def test_contenders_that_raise_or_are_wrong(self) -> None:
        def raising(*operands: Any) -> jax.Array:
            raise NotImplementedError("not on this machine")

        def wrong(*operands: Any) -> jax.Array:
            return 1.5 * right.function(*operands)

        problem = moe.random_problem(np.array([3, 4], np.int32), 16, 128, seed=0)
        right = moe.ragged(problem)
        contenders = {
            "ragged": right,
            "wrong": right._replace(function=wrong),
            "raising": right._replace(function=raising),
        }
        entry = moe.measure_contenders(contenders, problem, NoFlush(), 2)  # type: ignore[arg-type]
        assert entry["ragged"]["op_us"] > 0
        assert entry["raising"] == {"failed": "NotImplementedError: not on this machine"}
        assert entry["wrong"]["failed"].startswith("ValueError: wrong result: error ")
        assert moe.is_good(entry)
        assert not moe.is_good(entry | {"padded": entry["wrong"]})

    @pytest.mark.usefixtures("cpu_as_gpu", "small_moe")
    def test_best_config_of_pallas(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Module:
            """Calls XLA's ragged dot; with tall blocks slower, with wide grids not at all."""

            @staticmethod
            def ragged_dot(
                a: jax.Array, b: jax.Array, *, group_sizes: jax.Array, **config: Any
            ) -> jax.Array:
                if config["grid_block_n"] == 8:
                    raise ValueError("too much shared memory")
                if config["transpose_rhs"]:
                    b = jnp.swapaxes(b, 1, 2)
                work = 400 if config["block_m"] == 192 else 1
                a = jax.lax.fori_loop(0, work, lambda _, x: jnp.sort(x, axis=1), a[:, ::-1]) * 0 + a
                return jax.lax.ragged_dot(a, b, group_sizes)

        monkeypatch.setattr(moe.importlib, "import_module", lambda name: Module)
        (entry,) = moe.jax_tools(NoFlush(), 2, seed=0)  # type: ignore[arg-type]
        assert list(entry)[-3:] == ["ragged", moe.LAX, moe.PALLAS]
        for name in ("ragged", moe.LAX, moe.PALLAS):
            assert entry[name]["op_us"] > 0
        config = entry[moe.PALLAS]["config"]
        assert (config["block_m"], config["grid_block_n"]) == (128, 1)

    @pytest.mark.usefixtures("cpu_as_gpu", "small_moe")
    def test_pallas_that_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(moe, "PALLAS_MODULE", "no_such_module")
        (entry,) = moe.jax_tools(NoFlush(), 2, seed=0)  # type: ignore[arg-type]
        assert "No module named 'no_such_module'" in entry[moe.PALLAS]["failed"]
        assert moe.is_good(entry)


class TestMarkdown:
    TIMES: ClassVar = {"time_us": 2.25, "tflops": 3.4, "gbs": 5.6, "error": 1e-6}

    def lines(self, **document: Any) -> list[str]:
        return markdown(WHERE | document).splitlines()

    def test_dense_rows_alone(self) -> None:
        rows = [dense(4, **self.TIMES, baselines={"peer_us": 7.0, "other_failed": "why"})]
        assert self.lines(rows=rows) == [
            "g, driver d, CUDA c, JAX j, t: `x`.",
            "",
            "| op | groups | m | n | k | time, us | TFLOP/s | GB/s | error | peer, us |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            "| dense | 1 | 4 | 8 | 16 | 2.2 | 3 | 6 | 1.0e-06 | 7.0 |",
        ]

    def test_rows_of_all_kinds(self) -> None:
        grouped = GROUPED._asdict() | self.TIMES | {"op_us": 3.0, "baselines": {}}
        failed = dense(4, failed="why", baselines={"peer_us": 7.0})
        rows = [dense(4, **self.TIMES, baselines={}), failed, grouped]
        assert self.lines(rows=rows)[2:] == [
            "| op | groups | m | n | k | time, us | whole op, us | TFLOP/s | GB/s | error "
            "| peer, us |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            "| dense | 1 | 4 | 8 | 16 | 2.2 | - | 3 | 6 | 1.0e-06 | - |",
            "| dense | 1 | 4 | 8 | 16 | failed | - | - | - | - | 7.0 |",
            "| ragged | 3 | 40 | 256 | 384 | 2.2 | 3.0 | 3 | 6 | 1.0e-06 | - |",
            "",
            "The whole op is all kernels of the call, those in which XLA prepares operands "
            "included.",
        ]

    def test_moe(self) -> None:
        entry = {"groups": 2, "rows": 9, "largest": 7, "n": 8, "k": 16}
        entry |= {"ragged": {"time_us": 1.0, "op_us": 2.0}, "padded": {"failed": "why"}}
        lines = self.lines(rows=[], moe={"uneven": [entry], "scheduler": [], "jax": []})
        assert lines[-3:] == [
            "| groups | rows | largest | n | k | ragged kernel, us | ragged, us | padded, us |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|",
            "| 2 | 9 | 7 | 8 | 16 | 1.0 | 2.0 | - |",
        ]


class TestCompare:
    def test_geometric_mean(self) -> None:
        assert geometric_mean([0.5, 2.0]) == pytest.approx(1)
        assert geometric_mean([2.0, 4.0, 8.0]) == pytest.approx(4)

    def test_rows_match_by_what_they_measure(self) -> None:
        ours = [dense(1, time_us=3.0), dense(2, time_us=4.0), dense(8, failed="x")]
        theirs = [
            dense(2, deepgemm_us=2.0),
            dense(1, time_us=1.0) | {"op": "masked"},
            dense(8, deepgemm_us=1.0),
        ]
        key = ("dense", 1, 2, 8, 16)
        assert matching_times(ours, theirs) == [(key, 4.0, 2.0)]

    def test_time_comes_before_a_peers(self) -> None:
        assert row_time_us(dense(1, time_us=3.0, deepgemm_us=2.0)) == 3.0
        assert row_time_us(dense(1, deepgemm_us=2.0)) == 2.0
        assert row_time_us(dense(1, failed="x")) is None

    def test_yardstick(self) -> None:
        theirs = [dense(1, time_us=1.0), dense(2, deepgemm_us=2.0)]
        assert yardstick(dense(2), theirs) == {"deepgemm_us": 2.0}
        assert yardstick(dense(1), theirs) == {}

    def test_nothing_in_common(
        self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [dense(m, time_us=1.0, tflops=1.0, gbs=1.0, error=0.0) for m in (1, 2)]
        for name, row in zip("ab", rows, strict=True):
            row |= {"config": {}, "baselines": {}}
            document = WHERE | {"host_call_us": {}, "rows": [row]}
            (tmp_path / name).write_text(json.dumps(document))
        arguments = ["--results", str(tmp_path / "a"), "--compare", str(tmp_path / "b")]
        assert main(["bench", *arguments]) == 1
        assert "no shape in common" in capsys.readouterr().err


class TestMachine:
    def test_cuda_version(self) -> None:
        class Device:
            class client:
                platform_version = "PJRT C API\ncuda 13000"

        device: Any = Device()
        assert machine.cuda_version(device) == "13.0"
        assert machine.cuda_version(jax.devices("cpu")[0]) == ""

    def test_gpus_come_from_nvidia_smi(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
    ) -> None:
        script = tmp_path / "nvidia-smi"
        values = "NVIDIA H100, 580.1, 81559 MiB, 1980 MHz, 700.00 W, 345 MHz, 70.1 W, 30"
        script.write_text(f"#!/bin/sh\necho '{values}'\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        (gpu,) = machine.query_gpus()
        assert gpu["driver_version"] == "580.1" and gpu["clocks.sm"] == "345 MHz"
        script.unlink()
        assert machine.query_gpus() == []
