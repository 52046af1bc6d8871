"""The profiler finds our kernels on the GPU, their times are possible, and JAX's tools run."""

import argparse

import jax
import pytest

import jax_deepgemm
from jax_deepgemm import device
from jax_deepgemm.cli import bench, moe
from jax_deepgemm.cli.harness import Candidate, is_good, measure
from jax_deepgemm.cli.problem import random_problem
from jax_deepgemm.cli.shapes import Shape
from jax_deepgemm.cli.timing import Flush

PEAK_TFLOPS = 1979  # dense FP8 of an H100 or H200 SXM, datasheet
PEAK_GBS = 4800  # HBM3e of an H200, datasheet


def candidates(shapes: list[Shape]) -> list[Candidate]:
    gpu = device.selection()
    return [
        Candidate(random_problem(shape, seed), jax_deepgemm.select_config(**shape.selection, **gpu))
        for seed, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("dirty_l2", [False, True])
def test_times_are_possible(dirty_l2: bool) -> None:
    shapes = [Shape.dense(4096, 4096, 7168), Shape.dense(64, 24576, 1536)]
    flush = Flush(jax.devices("cuda")[0], dirty_l2=dirty_l2)
    prefill, decode = measure(candidates(shapes), flush, 5, xla_baseline=True)
    assert is_good(prefill) and is_good(decode)
    assert PEAK_TFLOPS / 4 < prefill["tflops"] < PEAK_TFLOPS
    # More than the memory gives would mean that the operands came from the L2.
    assert PEAK_GBS / 8 < decode["gbs"] < PEAK_GBS
    for row in (prefill, decode):
        assert row["baselines"]["xla_dequantize_dot_us"] > row["time_us"]


def test_loads_alone_take_less() -> None:
    flush = Flush(jax.devices("cuda")[0], dirty_l2=False)
    rows = measure(
        candidates([Shape.dense(4096, 4096, 7168), Shape.dense(64, 24576, 1536)]), flush, 5
    )
    bench._add_streams(rows, argparse.Namespace(iterations=5, dirty_l2=False, num_sms=None))
    prefill, decode = ({"time_us": row["time_us"], **row["baselines"]} for row in rows)
    assert prefill["stream_us"] < 0.95 * prefill["time_us"]
    assert 0.7 * decode["time_us"] < decode["stream_us"] < 1.02 * decode["time_us"]


def test_times_of_groups_are_possible() -> None:
    shapes = [
        Shape("contiguous", 4, 2048, 4096, 7168),
        Shape("masked", 4, 256, 7168, 2048),
        Shape("ragged", 4, 2048, 4096, 7168),
        Shape("ragged", 64, 10, 4096, 7168),
    ]
    rows = measure(candidates(shapes), Flush(jax.devices("cuda")[0], dirty_l2=False), 5)
    for row in rows:
        assert is_good(row), row
        assert row["tflops"] < PEAK_TFLOPS and row["gbs"] < PEAK_GBS
        assert row["op_us"] >= row["time_us"]
    contiguous, _, ragged, experts = rows
    for prefill in (contiguous, ragged):
        assert prefill["tflops"] > PEAK_TFLOPS / 4
    assert experts["gbs"] > PEAK_GBS / 8


def test_uneven_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding launches kernels of XLA's beside ours, and all of them are counted."""
    monkeypatch.setattr(moe, "EXPERT_WEIGHTS", ((4096, 7168),))
    flush = Flush(jax.devices("cuda")[0], dirty_l2=False)
    for entry in moe.uneven(flush, 5, seed=0):
        ragged, padded = entry["ragged"], entry["padded"]
        assert moe.is_good(entry), entry
        assert ragged["op_us"] >= ragged["time_us"] > 0
        assert padded["op_us"] > 1.02 * padded["time_us"]


def test_jax_tools() -> None:
    (entry,) = moe.jax_tools(Flush(jax.devices("cuda")[0], dirty_l2=False), 3, seed=0)
    assert entry["ragged"]["time_us"] < entry[moe.LAX]["op_us"]
    # Only a package that its module imports may be missing.
    pallas = entry[moe.PALLAS]
    assert "op_us" in pallas or pallas["failed"].startswith("ModuleNotFoundError"), pallas
