"""The roofline picture of `bench --plot`."""

import argparse
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from jax_deepgemm.cli import main, roofline

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/h100.json"


def row(op: str, tflops: float, gbs: float) -> dict[str, Any]:
    return {"op": op, "tflops": tflops, "gbs": gbs}


def document(gpu: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"gpu": gpu, "date": "2026-01-02", "rows": list(rows)}


def test_points_and_roof() -> None:
    rows = [row("dense", 300, 3000), row("dense", 1400, 500), row("ragged", 50, 2500)]
    failed = {"op": "masked", "failed": "it did not run"}
    figure = roofline.roofline_figure(document("NVIDIA H100 80GB HBM3", *rows, failed))
    (axes,) = figure.axes
    points = {each.get_label(): each.get_offsets().tolist() for each in axes.collections}
    # 300 TFLOP/s at 3000 GB/s are 100 flops for each byte.
    assert points == {"dense": [[100, 300], [2800, 1400]], "ragged": [[20, 50]]}
    (roof,) = axes.lines
    x, y = roof.get_data()
    np.testing.assert_allclose(x[:2], [10, 1575 / 3.1])
    np.testing.assert_allclose(y, [31, 1575, 1575])
    assert all(at <= min(1575, 3.1 * x) for x, at in [*points["dense"], *points["ragged"]])
    # From the start of the roof: what a linear axis leaves beside its points is below 0, and a
    # logarithmic one then shows 300 decades.
    assert axes.get_xlim() == (10, 1e4)
    assert axes.get_xscale() == axes.get_yscale() == "log"


@pytest.mark.parametrize("rows", [[], [row("dense", 300, 3000)]], ids=["no rows", "one row"])
def test_gpu_without_a_known_roof(rows: list[dict[str, Any]]) -> None:
    (axes,) = roofline.roofline_figure(document("NVIDIA L4", *rows)).axes
    assert not axes.lines
    assert len(axes.collections) == len(rows)


@pytest.mark.parametrize("gpu", roofline.ROOFS)
def test_results_are_under_the_roof(gpu: str) -> None:
    # What is published cannot be faster than what was measured as the limit.
    document = json.loads((RESULTS.parent / f"{gpu}.json").read_text())
    bandwidth, peak = roofline.ROOFS[gpu]
    (axes,) = roofline.roofline_figure(document).axes
    assert sum(len(points.get_offsets()) for points in axes.collections) == len(document["rows"])
    for points in axes.collections:
        for x, y in points.get_offsets():
            assert y < min(peak, bandwidth * x)


def test_command_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "roofline.png"
    assert main(["bench", "--results", str(RESULTS), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "contiguous" in capsys.readouterr().out


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentTypeError, match="needs matplotlib: pip install"):
        roofline.require_matplotlib()
