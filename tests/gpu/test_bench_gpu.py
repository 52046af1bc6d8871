"""The profiler finds our kernels on the GPU, and their times are physically possible."""

import jax
import pytest

import jax_deepgemm
from jax_deepgemm.cli.harness import Candidate, is_good, measure
from jax_deepgemm.cli.problem import random_problem
from jax_deepgemm.cli.shapes import Shape
from jax_deepgemm.cli.timing import Flush

PEAK_TFLOPS = 1979  # dense FP8 of an H100 or H200 SXM, datasheet
PEAK_GBS = 4800  # HBM3e of an H200, datasheet


@pytest.mark.parametrize("dirty_l2", [False, True])
def test_times_are_possible(dirty_l2: bool) -> None:
    shapes = [Shape(4096, 4096, 7168), Shape(64, 24576, 1536)]
    candidates = [
        Candidate(
            random_problem(shape, seed),
            jax_deepgemm.select_config(*shape, num_sms=jax_deepgemm.get_num_sms()),
        )
        for seed, shape in enumerate(shapes)
    ]
    flush = Flush(jax.devices("cuda")[0], dirty_l2=dirty_l2)
    prefill, decode = measure(candidates, flush, 5, xla_baseline=True)
    assert is_good(prefill) and is_good(decode)
    assert PEAK_TFLOPS / 4 < prefill["tflops"] < PEAK_TFLOPS
    # More than the memory gives would mean that the operands came from the L2.
    assert PEAK_GBS / 8 < decode["gbs"] < PEAK_GBS
    for row in (prefill, decode):
        assert row["baselines"]["xla_dequantize_dot_us"] > row["time_us"]
