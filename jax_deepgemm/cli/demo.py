"""Multiply DeepSeek-V3's dense and grouped shapes through jax.jit, check and time every result.

On an sm_90 GPU: the full shapes, timed by kernel. Elsewhere: reduced shapes through the CPU
lowering, and the GPU kernels of the full shapes compiled for sm_90a.
"""

import argparse
import secrets
import time

import jax

import jax_deepgemm
from jax_deepgemm import device
from jax_deepgemm.arguments import H100_MEMORY_GBS, H100_SMS
from jax_deepgemm.cli import machine, precompile, tables
from jax_deepgemm.cli.harness import Candidate, Row, is_good, measure, shape_row, time_fields
from jax_deepgemm.cli.problem import (
    MAX_ERROR,
    ORACLE,
    operation,
    product_error,
    random_problem,
    random_problems,
)
from jax_deepgemm.cli.shapes import NAMED_SHAPES, Shape
from jax_deepgemm.cli.timing import Call, Flush, wall_times_us

# What the reduced shapes are divided by. It keeps n a multiple of 8 and k of 16, keeps contiguous
# groups aligned, and gives k and n that are no multiples of 128.
REDUCTION = 8
GPU_ITERATIONS = 20
CPU_ITERATIONS = 3


def run(args: argparse.Namespace) -> int:
    """Runs the main job."""
    seed = secrets.randbits(32)
    gpu = machine.hopper_gpu()
    start = time.monotonic()
    if gpu:
        rows, lowering = _on_gpu(gpu, seed), jax_deepgemm.backend()
    else:
        tables.console.print(machine.why_no_gpu())
        with jax.default_device(jax.devices("cpu")[0]):
            rows, lowering = _on_cpu(seed), jax_deepgemm.backend()
    heading = "kernel us" if gpu else "wall us"
    tables.console.print(tables.results_table(rows, lowering, heading))
    tables.console.print(f"{ORACLE}. Operands: quantised normals, seed {seed}.")
    good = sum(map(is_good, rows))
    seconds = time.monotonic() - start
    tables.console.print(f"{good} of {len(rows)} below {MAX_ERROR:.0e}, {seconds:.0f} s")
    status = 0 if good == len(rows) else 1
    if not gpu:
        status |= precompile.report_kernels(NAMED_SHAPES["seed"], H100_SMS, H100_MEMORY_GBS)
    return status


def _on_gpu(gpu: jax.Device, seed: int) -> list[Row]:
    chip = device.selection()
    candidates = [
        Candidate(problem, jax_deepgemm.select_config(**problem.shape.selection, **chip))
        for problem in random_problems(NAMED_SHAPES["seed"], seed)
    ]
    return measure(candidates, Flush(gpu, dirty_l2=False), GPU_ITERATIONS)


def _on_cpu(seed: int) -> list[Row]:
    rows = []
    with tables.progress_bar() as bar:
        for i, full in enumerate(bar.track(NAMED_SHAPES["seed"], description="CPU lowering")):
            shape = reduced(full)
            problem = random_problem(shape, seed + i)
            call = Call(operation(shape), *problem.operands)
            row = shape_row(shape, None) | {"error": product_error(call(), problem)}
            rows.append(row | time_fields(shape, wall_times_us(call, CPU_ITERATIONS)))
    return rows


def reduced(shape: Shape) -> Shape:
    """A shape with the same n : k that a CPU multiplies in a moment; decode keeps its m."""
    m, n, k = shape.m_per_group, shape.n // REDUCTION, shape.k // REDUCTION
    return shape._replace(m_per_group=m if m <= 128 else m // REDUCTION, n=n, k=k)
