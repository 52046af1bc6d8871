"""Sweeps: the configurations of a problem timed beside the selected one, and what selection loses.

A row's "sweep" maps configurations, written as kernels' names end, to the median time in
microseconds, or to the reason why there is none: one line each in a results file.
"""

import argparse
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from jax_deepgemm import GemmConfig, device
from jax_deepgemm.cli.compare import geometric_mean, row_key
from jax_deepgemm.cli.harness import Candidate, Row, is_good, measure
from jax_deepgemm.cli.shapes import Shape
from jax_deepgemm.cli.tables import shape_cells, shape_headings
from jax_deepgemm.cli.timing import Flush
from jax_deepgemm.config import check_problem
from jax_deepgemm.ffi import _native

# Shapes in one trace: what an interrupted sweep loses.
BATCH_SHAPES = 16


def parse_factor(text: str) -> float:
    """Parses by how much a configuration may be estimated slower than the best; for argparse."""
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not factor >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor from 1 up")
    return factor


def config_text(config: GemmConfig) -> str:
    """As the name of its kernel ends: `64x32_s8_w1_c1x1x4_r8`."""
    return (
        f"{config.block_m}x{config.block_n}_s{config.num_stages}_w{config.math_warpgroups}"
        f"_c{config.cluster_m}x{config.cluster_n}x{config.cluster_k}_r{config.raster_m}"
    )


def parse_config_text(text: str) -> GemmConfig:
    """The configuration that `config_text` writes so.

    Raises:
        ValueError: it writes none so.
    """
    match = re.fullmatch(r"(\d+)x(\d+)_s(\d+)_w(\d+)_c(\d+)x(\d+)x(\d+)_r(\d+)", text)
    if not match:
        raise ValueError(f"{text!r} is not a configuration like 64x32_s8_w1_c1x1x4_r8")
    return GemmConfig(*map(int, match.groups()))


def contenders(shape: Shape, gpu: device.Gpu, factor: float) -> list[GemmConfig]:
    """What selection chooses among, estimated to take at most `factor` times the least estimate."""
    problem = check_problem("contenders", **shape.selection, **gpu)
    configs = _native.candidates(problem)
    estimates = _native.estimates_us(problem, configs)
    most = factor * min(estimates)
    return [
        GemmConfig(*config)
        for config, estimate in zip(configs, estimates, strict=True)
        if estimate <= most
    ]


def measure_swept(
    selected: Sequence[Candidate],
    gpu: device.Gpu,
    factor: float,
    flush: Flush,
    iterations: int,
    *,
    xla_baseline: bool = False,
) -> list[Row]:
    """`measure`, with all contenders of each problem in the same trace, timed by turns.

    Args:
        selected: problems, each with the configuration that selection picks.
        gpu: what selection knows of it.
        factor: see `contenders`.
        flush: run before each timed call.
        iterations: timed calls of each configuration.
        xla_baseline: as `measure` has it.

    Returns:
        The row of each selected candidate, with "sweep" and, where its result and another's are
        right, "best", the fastest of them, "best_us" and "regret", how much longer the selected
        one takes.
    """
    swept = [
        [
            Candidate(problem, each)
            for each in dict.fromkeys((config, *contenders(problem.shape, gpu, factor)))
        ]
        for problem, config in selected
    ]
    everything = list(itertools.chain(*swept))
    rows = iter(measure(everything, flush, iterations, xla_baseline=xla_baseline))
    return [_with_sweep(list(itertools.islice(rows, len(candidates)))) for candidates in swept]


def _with_sweep(rows: Sequence[Row]) -> Row:
    """The first row of a problem, with a summary of all."""
    outcomes = {config_text(GemmConfig(**row["config"])): outcome(row) for row in rows}
    times = {text: time for text, time in outcomes.items() if isinstance(time, float)}
    summary: Row = {"sweep": outcomes}
    if is_good(rows[0]):
        best = min(times, key=lambda text: times[text])
        regret = rows[0]["time_us"] / times[best] - 1
        summary |= {"best": best, "best_us": times[best], "regret": round(regret, 4)}
    return rows[0] | summary


def outcome(row: Row) -> float | str:
    """A right row's time in microseconds; else what is wrong with it."""
    if is_good(row):
        return float(row["time_us"])
    return str(row.get("failed") or f"error {row['error']:.1e}")


def sweep_table(rows: Sequence[Row]) -> Table:
    """Per shape: how many configs ran, and what selection loses to the best of them."""
    regrets = {row_key(row): row["regret"] for row in rows if "regret" in row}
    table = Table(title="sweep: selected against best config", caption=regret_text(regrets))
    shape_headings(table)
    for heading in ("ran", "failed", "selected us", "best us", "regret"):
        table.add_column(heading, justify="right")
    table.add_column("best")
    for row in rows:
        ran = sum(isinstance(each, float) for each in row["sweep"].values())
        cells = [*shape_cells(row), str(ran), str(len(row["sweep"]) - ran)]
        if "regret" in row:
            times = (f"{row[field]:.2f}" for field in ("time_us", "best_us"))
            cells += [*times, f"{row['regret']:.1%}", row["best"]]
        table.add_row(*cells)
    return table


def regret_text(regrets: Mapping[tuple[Any, ...], float]) -> str:
    """Geometric mean and worst of what selection loses, by the key of a row."""
    if not regrets:
        return "no shape has a right result"
    worst = max(regrets, key=lambda key: regrets[key])
    mean = geometric_mean([1 + regret for regret in regrets.values()]) - 1
    return (
        f"regret over {len(regrets)} shapes: geometric mean {mean:.2%}, "
        f"worst {regrets[worst]:.1%} at {Shape(*worst)}"
    )
