"""Result rows: build calls for (problem, config) pairs, check them, time them in one trace."""

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jax_deepgemm import GemmConfig
from jax_deepgemm.cli import tables
from jax_deepgemm.cli.problem import (
    MAX_ERROR,
    Problem,
    dequantize_dot,
    operation,
    product_error,
)
from jax_deepgemm.cli.shapes import DENSE, Shape
from jax_deepgemm.cli.timing import Call, Flush, kernel_times_us

# Every kernel of this package is named so.
KERNEL_PREFIX = "dg_"

# One line of a results file, as the README of benchmarks/ describes it.
Row = dict[str, Any]


class Candidate(NamedTuple):
    """A config to run on a problem."""

    problem: Problem
    config: GemmConfig


def shape_row(shape: Shape, config: GemmConfig | None) -> Row:
    """The part of a row that identifies it; config None means that no kernel is involved."""
    return shape._asdict() | {"config": dataclasses.asdict(config) if config else {}}


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
        candidates: what to run. Those of one problem that follow one another are timed by turns.
        flush: run before each timed call.
        iterations: timed calls of each candidate.
        xla_baseline: also time dequantising and XLA's dot of dense problems, in the same trace.

    Returns:
        A row for each candidate; one that raised has "failed", with the message, and no time.
    """
    rows = [shape_row(problem.shape, config) for problem, config in candidates]
    with tables.progress_bar() as bar:
        task = bar.add_task("compiling", total=len(rows))

        def build(candidate: Candidate) -> Call | Exception:
            problem, config = candidate
            try:
                return Call(
                    operation(problem.shape, config),
                    *problem.operands,
                    kernel_prefix=KERNEL_PREFIX,
                )
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
                timed.append((row, problem))
            except (RuntimeError, ValueError) as failure:
                row["failed"] = str(failure)
            bar.advance(task)

        # Once a problem, however many candidates it has.
        plain = {
            id(problem): problem
            for problem, _ in candidates
            if xla_baseline and problem.shape.op == DENSE
        }
        task = bar.add_task("XLA's own dot", total=len(plain), visible=bool(plain))
        for problem in plain.values():
            calls.append(Call(dequantize_dot, problem.lhs, problem.rhs))
            calls[-1]().block_until_ready()
            bar.advance(task)

        task = bar.add_task("timing", total=len(calls))
        same = itertools.groupby(timed, key=lambda each: id(each[1]))
        together = [len(list(rows_of_one)) for _, rows_of_one in same] + [1] * len(plain)
        times = kernel_times_us(calls, flush, iterations, lambda: bar.advance(task), together)

    for (row, problem), (kernel_us, op_us) in zip(timed, times[: len(timed)], strict=True):
        row |= time_fields(problem.shape, kernel_us)
        if problem.shape.op != DENSE:
            row["op_us"] = round(statistics.median(op_us), 3)
    xla = {
        key: round(statistics.median(kernel_us), 3)
        for key, (kernel_us, _) in zip(plain, times[len(timed) :], strict=True)
    }
    for (problem, _), row in zip(candidates, rows, strict=True):
        if id(problem) in xla:
            row["baselines"] = {"xla_dequantize_dot_us": xla[id(problem)]}
    return rows
