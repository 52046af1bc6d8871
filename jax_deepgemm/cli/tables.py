"""Tables and progress bars of the command line."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jax_deepgemm import GemmConfig
from jax_deepgemm.cli.compare import KEY_FIELDS
from jax_deepgemm.cli.problem import MAX_ERROR
from jax_deepgemm.ffi import KernelReport

# Tables are wider than the 80 columns that rich assumes of a pipe or a log file.
console = Console(width=None if sys.stdout.isatty() else 160)


def progress_bar() -> Progress:
    """A bar on stderr, so that stdout can be piped."""
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def tile_text(config: GemmConfig) -> str:
    """Tile, warpgroups and cluster: `128x160, 2 wg, cluster 2x1x1` (m x n x k)."""
    cluster = f"{config.cluster_m}x{config.cluster_n}x{config.cluster_k}"
    suffix = "" if cluster == "1x1x1" else f", cluster {cluster}"
    return f"{config.block_m}x{config.block_n}, {config.math_warpgroups} wg{suffix}"


def shape_headings(table: Table) -> None:
    """Adds the columns that `shape_cells` fills."""
    table.add_column("op")
    for heading in ("groups", "m", "n", "k"):
        table.add_column(heading, justify="right")


def shape_cells(row: dict[str, Any]) -> list[str]:
    """What a row measures; m is that of each group."""
    return [str(row[field]) for field in KEY_FIELDS]


def results_table(rows: Sequence[dict[str, Any]], lowering: str, time_heading: str) -> Table:
    """One line per result row (see `jax_deepgemm.cli.bench`); an empty config shows as a dash."""
    table = Table(title=f"FP8 GEMMs: {lowering}")
    shape_headings(table)
    table.add_column("lowering")
    table.add_column("tile", no_wrap=True)
    for heading in ("stages", time_heading, "TFLOP/s", "GB/s", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        config = GemmConfig(**row["config"]) if row["config"] else None
        shape = shape_cells(row)
        platform = lowering.split(":")[0]
        plan = [tile_text(config), str(config.num_stages)] if config else ["-", "-"]
        if "failed" in row:
            table.add_row(*shape, platform, *plan, f"[red]{row['failed'].splitlines()[0]}")
            continue
        error = f"{row['error']:.1e}"
        table.add_row(
            *shape,
            platform,
            *plan,
            f"{row['time_us']:.2f}",
            f"{row['tflops']:.4g}",
            f"{row['gbs']:.4g}",
            error if row["error"] <= MAX_ERROR else f"[red]{error}",
        )
    return table


def kernels_table(reports: Sequence[tuple[str, int, int, int, GemmConfig, KernelReport]]) -> Table:
    """Resources of compiled kernels: (op, m, n, k, config, report) each."""
    table = Table(title="kernels for sm_90a")
    table.add_column("op")
    table.add_column("n", justify="right")
    table.add_column("k", justify="right")
    table.add_column("tile", no_wrap=True)
    headings = ("stages", "registers", "spill bytes", "stack bytes", "shared bytes")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("wgmma")
    table.add_column("seconds", justify="right")
    table.add_column("from")
    for op, _, n, k, config, report in reports:
        table.add_row(
            "dense, parts" if op == "dense" and "_parts_n" in report.name else op,
            str(n),
            str(k),
            tile_text(config),
            str(config.num_stages),
            str(report.registers),
            *(f"[red]{size}" if size else "0" for size in (report.spill_bytes, report.stack_bytes)),
            str(report.smem_bytes),
            "[red]serialised" if report.wgmma_serialized else "async",
            f"{report.compile_seconds:.2f}",
            report.source,
        )
    return table


def baselines_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Times of the baselines beside ours; a failure shows its reason."""
    names = sorted({name for row in rows for name in row["baselines"]})
    table = Table(title="baselines, us")
    shape_headings(table)
    for heading in ("ours", *(name.removesuffix("_us") for name in names)):
        table.add_column(heading, justify="right")
    for row in rows:
        ours = f"{row['time_us']:.2f}" if "time_us" in row else "failed"
        values = (str(row["baselines"].get(name, "")).strip() for name in names)
        last_lines = (value.splitlines()[-1] if value else "" for value in values)
        table.add_row(*shape_cells(row), ours, *last_lines)
    return table
