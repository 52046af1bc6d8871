"""Fits the constants of selection's cost model to the sweeps of results files; needs no GPU.

Prints what selection loses on the sweeps before and after, also on weights that take no part in the
fit, and the constants to put into csrc/gemm/cost_model.h.
"""

import argparse
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from jax_deepgemm.cli.shapes import Shape, parse_count
from jax_deepgemm.cli.sweep import parse_config_text, regret_text
from jax_deepgemm.config import Problem, check_problem
from jax_deepgemm.ffi import _native

Constants = dict[str, float]
Floats = NDArray[np.float64]

# How the search goes: each step scales some of the constants a little, and stays if it is better.
STEP = 0.08  # standard deviation of the logarithm
CHANGED = 0.25  # of the constants
MOST = 4.0  # by how much, either way, a constant may leave its first value

# What the logarithm of a time is off counts this much beside the logarithm of the regret: it keeps
# estimates true where no choice depends on them, yet.
ERROR_WEIGHT = 0.15


class Sweep(NamedTuple):
    """The timed configurations of one problem."""

    shape: Shape
    problem: Problem
    configs: list[tuple[int, ...]]
    times_us: Floats
    candidates: NDArray[np.bool_]  # which of them selection chooses among today

    def estimates_us(self, constants: Constants) -> Floats:
        """What the model says of every configuration."""
        return np.array(_native.estimates_us(self.problem, self.configs, constants))

    def choice(self, estimates_us: Floats) -> int:
        """The configuration that selection takes if it estimates these times."""
        return int(np.argmin(np.where(self.candidates, estimates_us, np.inf)))

    def regret(self, constants: Constants) -> float:
        """How much longer the model's choice takes than the fastest, as a fraction."""
        choice = self.choice(self.estimates_us(constants))
        return float(self.times_us[choice] / self.times_us.min() - 1)


def read_sweeps(document: dict[str, Any]) -> list[Sweep]:
    """The sweeps of a results file of `bench --sweep`.

    What raised or was wrong is left out, and sweeps that timed nothing that selection would take.
    """
    sweeps = []
    for row in document["rows"]:
        timed = {text: time for text, time in row["sweep"].items() if isinstance(time, float)}
        if timed:
            shape = Shape(*(row[field] for field in Shape._fields))
            problem = check_problem("read_sweeps", **shape.selection, **document["selection"])
            # As selection has them today. Of swaths (the last field) the closest height counts: the
            # model cares little for it, but it has changed since some were timed.
            todays = {config[:-1]: config for config in map(tuple, _native.candidates(problem))}
            closest: dict[tuple[int, ...], tuple[float, float, tuple[int, ...]]] = {}
            for text, time in timed.items():
                config = tuple(parse_config_text(text).fields)
                today = todays.get(config[:-1], config)
                entry = (abs(math.log(config[-1] / today[-1])), time, today)
                closest[config[:-1]] = min(entry, closest.get(config[:-1], entry))
            configs = [today for *_, today in closest.values()]
            candidates = np.array([config[:-1] in todays for config in configs])
            if candidates.any():
                times = np.array([time for _, time, _ in closest.values()])
                sweeps.append(Sweep(shape, problem, configs, times, candidates))
    return sweeps


def loss(sweeps: Sequence[Sweep], constants: Constants) -> float:
    """What `fit` makes small, 0 for a model that is always right."""
    regrets, errors = [], []
    for sweep in sweeps:
        estimates = sweep.estimates_us(constants)
        fastest = sweep.times_us.min()
        regrets.append(math.log(sweep.times_us[sweep.choice(estimates)] / fastest))
        # Slow configurations need not be estimated well, if only they are not chosen.
        weights = (fastest / sweep.times_us) ** 8
        errors.append(np.average(np.log(estimates / sweep.times_us) ** 2, weights=weights))
    return float(np.mean(regrets)) + ERROR_WEIGHT * math.sqrt(np.mean(errors))


def fit(
    sweeps: Sequence[Sweep],
    steps: int,
    seed: int,
    keep: Collection[str] = (),
    progress: Callable[[Sequence[int]], Any] = lambda steps: steps,
) -> Constants:
    """Looks for constants with a smaller `loss`, from those of the model on.

    Args:
        sweeps: what to fit to.
        steps: of the search.
        seed: of the search; the same one finds the same constants.
        keep: names of constants that stay as they are.
        progress: wraps the steps, to show them.
    """
    rng = np.random.default_rng(seed)
    first = _native.cost_constants()
    names = list(first)
    free = np.array([name not in keep for name in names])
    start = best = np.log(list(first.values()))
    least = loss(sweeps, first)
    for _ in progress(range(steps)):
        changed = free & (rng.random(len(names)) < CHANGED)
        trial = best + changed * rng.normal(0, STEP, len(names))
        trial = np.clip(trial, start - math.log(MOST), start + math.log(MOST))
        value = loss(sweeps, dict(zip(names, map(float, np.exp(trial)), strict=True)))
        if value < least:
            best, least = trial, value
    # As they are to be written: three digits.
    return {name: float(f"{value:.3g}") for name, value in zip(names, np.exp(best), strict=True)}


def report(title: str, sweeps: Sequence[Sweep], constants: Constants) -> None:
    """Prints the regret of some constants."""
    regrets = {tuple(sweep.shape): sweep.regret(constants) for sweep in sweeps}
    print(f"{title}: {regret_text(regrets)}")


def parse_weight(text: str) -> tuple[int, int]:
    """Parses NxK; an argparse `type`."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not NxK (like 14336x5120)")
    return int(match[1]), int(match[2])


def parse_constant(text: str) -> str:
    """Checks the name of a constant; an argparse `type`."""
    names = list(_native.cost_constants())
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
    return text


def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--hold-out", nargs="+", type=parse_weight, default=[], metavar="NxK")
    parser.add_argument(
        "--keep",
        nargs="+",
        type=parse_constant,
        default=[],
        metavar="CONSTANT",
        help="constants to leave as they are: the sweeps have nothing that tells them",
    )
    parser.add_argument("--steps", type=parse_count, default=4000, help="of the search (4000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    sweeps = {path: read_sweeps(json.loads(path.read_text())) for path in args.results}
    kept: dict[pathlib.Path, list[Sweep]] = {path: [] for path in sweeps}
    held_out: dict[pathlib.Path, list[Sweep]] = {path: [] for path in sweeps}
    for path, swept in sweeps.items():
        for sweep in swept:
            held = (sweep.shape.n, sweep.shape.k) in args.hold_out
            (held_out if held else kept)[path].append(sweep)
    fitted_to = [sweep for swept in kept.values() for sweep in swept]
    if not fitted_to:
        parser.error("no sweep is left to fit to")
    before = _native.cost_constants()
    fitted = fit(fitted_to, args.steps, args.seed, args.keep, lambda steps: track(steps, "fitting"))
    for title, constants in (("before", before), ("after", fitted)):
        for path in args.results:
            report(f"{path.name}, {title}", kept[path], constants)
            if held_out[path]:
                report(f"{path.name}, {title}, not fitted to", held_out[path], constants)
    for name, value in fitted.items():
        print(f"  double {name} = {value:g};  // was {before[name]:g}")


if __name__ == "__main__":
    main(sys.argv[1:])
