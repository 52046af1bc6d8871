"""A picture of a results file under the GPU's roofline: how far each shape is from its limit."""

import argparse
import importlib
import importlib.util
from typing import Any

from jax_deepgemm.cli.machine import gpu_stem

# What was measured of each GPU, by the stem of its results file: the memory's rate in TB/s, and the
# best FP8 GEMM without promotion under the power limit, TFLOP/s. The H100's memory streams
# 3.07 TB/s of weights, a bit more than it copies; an H200 copies 4.3, bytes read and written.
ROOFS = {"h100": (3.1, 1575.0), "h200": (4.3, 1590.0)}

# One colour for each operation, told apart by the colour-blind as well (Okabe and Ito's palette).
COLOURS = {
    "dense": "#0072B2",
    "contiguous": "#D55E00",
    "masked": "#009E73",
    "ragged": "#CC79A7",
}

Figure = Any  # matplotlib.figure.Figure, which is imported where it is needed


def require_matplotlib() -> None:
    """Raises argparse.ArgumentTypeError, before anything is measured, if there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            'the plot needs matplotlib: pip install "jax_deepgemm[bench]"'
        )


def roofline_figure(document: dict[str, Any]) -> Figure:
    """Returns a figure of every row's TFLOP/s over its flops per byte, under the roof if known.

    Args:
        document: a results file's contents.
    """
    # A Figure without pyplot: no window system, no global state.
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(8, 5.5), dpi=150, layout="constrained"
    )
    axes = figure.add_subplot(xscale="log", yscale="log")
    rows = [row for row in document["rows"] if "failed" not in row]
    points = [(row["op"], 1e3 * row["tflops"] / row["gbs"], row["tflops"]) for row in rows]
    for op, colour in COLOURS.items():
        mine = [(x, y) for of, x, y in points if of == op]
        if mine:
            axes.scatter(*zip(*mine, strict=True), s=28, color=colour, label=op, zorder=3)
    roof = ROOFS.get(gpu_stem(document["gpu"]))
    if roof and points:
        bandwidth, peak = roof
        x = sorted([min(x for _, x, _ in points) / 2, peak / bandwidth, 2e4])
        label = f"{bandwidth:g} TB/s, {peak:g} TFLOP/s (measured)"
        axes.plot(x, [min(peak, bandwidth * at) for at in x], color="0.4", lw=1.2, label=label)
        axes.set_xlim(x[0], max(1e4, *(x for _, x, _ in points)))
    axes.set(
        xlabel="FP8 flops per byte that must move",
        ylabel="TFLOP/s",
        title=f"{document['gpu']}, {document['date']}",
    )
    axes.grid(which="both", linewidth=0.3, color="0.85")
    if points:
        axes.legend(frameon=False, loc="lower right")
    return figure
