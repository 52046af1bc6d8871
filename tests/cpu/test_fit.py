"""benchmarks/fit.py: sweeps that a model with other constants wrote are fitted."""

import json
import pathlib
from typing import Any

import pytest

from benchmarks import fit
from jax_deepgemm import GemmConfig
from jax_deepgemm.cli.shapes import NAMED_SHAPES
from jax_deepgemm.cli.sweep import config_text
from jax_deepgemm.config import check_problem
from jax_deepgemm.ffi import _native

SELECTION = {"num_sms": 132, "memory_gbs": 3352}
# Far enough from the model's own for other choices.
OTHER = {"min_k_block_cycles": 500.0, "multicast_us": 9.0, "launch_us": 2.5, "hbm_share": 0.7}
SHAPES = NAMED_SHAPES["decode"][::4]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """A results file of a machine that is as the model with `OTHER` constants says."""
    rows = []
    for shape in SHAPES:
        problem = check_problem("test", **shape.selection, **SELECTION)
        configs = _native.candidates(problem)
        times = _native.estimates_us(problem, configs, OTHER)
        texts = [config_text(GemmConfig(*config)) for config in configs]
        sweep: dict[str, float | str] = dict(zip(texts, times, strict=True))
        sweep[texts[0]] = "it raised"
        rows.append(shape._asdict() | {"sweep": sweep})
    return {"selection": SELECTION, "rows": rows}


def test_sweeps_are_read(document: dict[str, Any]) -> None:
    sweeps = fit.read_sweeps(document)
    assert [sweep.shape for sweep in sweeps] == list(SHAPES)
    for sweep, row in zip(sweeps, document["rows"], strict=True):
        assert len(sweep.configs) == len(row["sweep"]) - 1
        assert sweep.times_us.tolist() == [*row["sweep"].values()][1:]
        assert sweep.estimates_us({}).tolist() != sweep.times_us.tolist()
        assert sweep.estimates_us(OTHER).tolist() == sweep.times_us.tolist()
        assert sweep.regret(OTHER) == 0
    assert fit.loss(sweeps, OTHER) == 0
    empty = document | {"rows": [SHAPES[0]._asdict() | {"sweep": {"": "all raised"}}]}
    assert fit.read_sweeps(empty) == []


def test_only_candidates_are_chosen(document: dict[str, Any]) -> None:
    row = document["rows"][0]
    lone = GemmConfig(64, 192, 3, 1, 1, 1, 1, 8)  # promotes while its tensor cores idle
    swept = row | {"sweep": row["sweep"] | {config_text(lone): 1e-3}}
    (sweep,) = fit.read_sweeps(document | {"rows": [swept]})
    added = sweep.configs.index(lone.fields)
    estimates = sweep.times_us.copy()
    assert estimates.argmin() == added != sweep.choice(estimates)
    assert sweep.regret(OTHER) > 1  # than the fastest, whether it can be chosen or not
    alone = row | {"sweep": {config_text(lone): 1.0}}
    assert fit.read_sweeps(document | {"rows": [alone]}) == []


def test_swaths_of_other_heights_count_as_todays(document: dict[str, Any]) -> None:
    row = document["rows"][0]
    *fields, height = _native.candidates(check_problem("test", **SHAPES[0].selection, **SELECTION))[
        0
    ]
    texts = [config_text(GemmConfig(*fields, other * height)) for other in (4, 2, 3)]
    swept = row | {"sweep": dict(zip(texts, (1.0, 2.0, 3.0), strict=True))}
    (sweep,) = fit.read_sweeps(document | {"rows": [swept]})
    assert sweep.configs == [(*fields, height)]
    assert sweep.times_us.tolist() == [2.0]  # of the closest height
    assert sweep.candidates.all()


def test_fit_finds_better_constants(
    document: dict[str, Any], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps = fit.read_sweeps(document)
    before = fit.loss(sweeps, {})
    found = fit.fit(sweeps, 300, 1)
    assert fit.loss(sweeps, found) < before / 2
    assert found == fit.fit(sweeps, 300, 1)
    other = fit.fit(sweeps, 300, 1, keep=("launch_us",))
    assert other["launch_us"] == _native.cost_constants()["launch_us"] != found["launch_us"]
    assert other["hbm_share"] != _native.cost_constants()["hbm_share"]

    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(document))
    second = tmp_path / "other.json"
    second.write_text(json.dumps(document | {"rows": document["rows"][:1]}))
    held_out = f"{SHAPES[1].n}x{SHAPES[1].k}"
    assert held_out != f"{SHAPES[0].n}x{SHAPES[0].k}"
    fit.main([str(path), str(second), "--steps", "300", "--seed", "1", "--hold-out", held_out])
    printed = capsys.readouterr().out
    assert printed.count("sweep.json, before") == printed.count("sweep.json, after") == 2
    assert printed.count("other.json, before: regret over 1 shapes") == 1
    was = _native.cost_constants()
    assert printed.count("  double ") == len(was)
    assert f"// was {was['launch_us']:g}" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hold-out", "2112"], "'2112' is not NxK"),
        (["--keep", "clock"], "'clock' is none of clock_ghz, "),
        (["--hold-out", *{f"{shape.n}x{shape.k}" for shape in SHAPES}], "no sweep is left"),
    ],
)
def test_arguments(
    document: dict[str, Any],
    arguments: list[str],
    message: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        fit.main([str(path), *arguments])
    assert message in capsys.readouterr().err


def test_unknown_constants_are_refused() -> None:
    problem = check_problem("test", **SHAPES[0].selection, **SELECTION)
    with pytest.raises(_native.Error, match="is none of cost_constants"):
        _native.estimates_us(problem, _native.candidates(problem), {"clock": 1.0})
