"""Result rows: build calls for (problem, config) pairs, check them, time them in one trace."""

import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jax_deepgemm import GemmConfig, gemm_fp8_fp8_bf16_nt
from jax_deepgemm.cli import tables
from jax_deepgemm.cli.problem import MAX_ERROR, Problem, dequantize_dot, product_error
from jax_deepgemm.cli.shapes import Shape
from jax_deepgemm.cli.timing import Call, Flush, kernel_times_us

# Every kernel of this package is named so.
KERNEL_PREFIX = "dg_"

# One line of a results file, as the README of benchmarks/ describes it.
Row = dict[str, Any]


class Candidate(NamedTuple):
    """A config to run on a problem."""

    problem: Problem
    config: GemmConfig


def dense_row(shape: Shape, config: GemmConfig | None) -> Row:
    """The part of a row that identifies it; config None means that no kernel is involved."""
    return {
        "op": "dense",
        "groups": 1,
        "m_per_group": shape.m,
        "n": shape.n,
        "k": shape.k,
        "config": dataclasses.asdict(config) if config else {},
    }


def time_fields(shape: Shape, times_us: Sequence[float]) -> Row:
    """The measured part of a row: median time, rates at the median, 10th and 90th percentile."""
    low_us, median_us, high_us = map(float, np.percentile(times_us, [10, 50, 90]))
    return {
        "time_us": round(median_us, 3),
        "spread_us": [round(low_us, 3), round(high_us, 3)],
        "tflops": round(shape.flops / median_us / 1e6, 3),
        "gbs": round(shape.nbytes / median_us / 1e3, 3),
    }


def is_good(row: Row) -> bool:
    """Whether the row holds a right result."""
    return "failed" not in row and row["error"] <= MAX_ERROR


def measure(
    candidates: Sequence[Candidate], flush: Flush, iterations: int, *, xla_baseline: bool = False
) -> list[Row]:
    """Compiles, checks and times candidates on the GPU.

    Args:
        candidates: what to run.
        flush: run before each timed call.
        iterations: timed calls of each candidate.
        xla_baseline: also time dequantising and XLA's dot, in the same trace.

    Returns:
        A row for each candidate; one that raised has "failed", with the message, and no time.
    """
    rows = [dense_row(problem.shape, config) for problem, config in candidates]
    with tables.progress_bar() as bar:
        task = bar.add_task("compiling", total=len(rows))

        def build(candidate: Candidate) -> Call | Exception:
            problem, config = candidate
            gemm = functools.partial(gemm_fp8_fp8_bf16_nt, config=config)
            try:
                return Call(gemm, problem.lhs, problem.rhs, kernel_prefix=KERNEL_PREFIX)
            except (RuntimeError, ValueError) as error:
                return error
            finally:
                bar.advance(task)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(build, candidates))

        task = bar.add_task("checking", total=len(rows))
        calls, timed = [], []
        for (problem, _), row, call in zip(candidates, rows, built, strict=True):
            try:
                if isinstance(call, Exception):
                    raise call
                error = product_error(call(), problem)
                if math.isnan(error):
                    raise ValueError("the result holds NaN")
                row["error"] = error
                calls.append(call)
                timed.append((row, problem.shape))
            except (RuntimeError, ValueError) as failure:
                row["failed"] = str(failure)
            bar.advance(task)

        if xla_baseline:
            task = bar.add_task("XLA's own dot", total=len(candidates))
            for problem, _ in candidates:
                calls.append(Call(dequantize_dot, problem.lhs, problem.rhs))
                calls[-1]().block_until_ready()
                bar.advance(task)

        task = bar.add_task("timing", total=len(calls))
        times = kernel_times_us(calls, flush, iterations, lambda: bar.advance(task))

    for (row, shape), times_us in zip(timed, times[: len(timed)], strict=True):
        row |= time_fields(shape, times_us)
    if xla_baseline:
        for row, times_us in zip(rows, times[len(timed) :], strict=True):
            median_us = round(statistics.median(times_us), 3)
            row["baselines"] = {"xla_dequantize_dot_us": median_us}
    return rows
