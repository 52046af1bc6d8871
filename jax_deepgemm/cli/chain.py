"""A model's layers in one program: what time passes between its kernels, and what a call costs.

Each layer quantises its input and multiplies it by weights of its own. XLA captures such programs
into CUDA graphs by default; the same without graphs is measured beside.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jax_deepgemm
from jax_deepgemm.cli.problem import random_weights
from jax_deepgemm.cli.timing import NO_CUDA_GRAPHS, KernelEvent, kernel_events, profiled

LAYERS = 60
ROWS = 64
WIDTH = 2048

FIELDS = ("layers", "m", "n", "k", "graphs", "no_graphs")


def model(x: jax.Array, layers: Sequence[Any]) -> jax.Array:
    """X through all layers; every one keeps the size of the numbers about the same."""
    for weights in layers:
        lhs = jax_deepgemm.quantize_per_token(x)
        d = jax_deepgemm.gemm_fp8_fp8_bf16_nt(lhs, weights)
        x = d.astype(jnp.float32) * WIDTH**-0.5
    return x


def operands(seed: int) -> tuple[jax.Array, list[Any]]:
    """The input and the weights of `LAYERS` layers."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), LAYERS + 1)
    make = jax.jit(random_weights, static_argnums=(1, 2, 3))
    layers = [jax.tree.map(lambda part: part[0], make(key, 1, WIDTH, WIDTH)) for key in keys[1:]]
    return jax.random.normal(keys[0], (ROWS, WIDTH), jnp.float32), layers


def measure(iterations: int, seed: int) -> dict[str, Any]:
    """Returns "chain" of a results file: both programs' summaries, see `summary`."""
    x, layers = operands(seed)
    result: dict[str, Any] = {"layers": LAYERS, "m": ROWS, "n": WIDTH, "k": WIDTH}
    options: dict[str, dict[str, str | bool]] = {"graphs": {}, "no_graphs": NO_CUDA_GRAPHS}
    for name, flags in options.items():
        compiled = jax.jit(model).lower(x, layers).compile(flags)
        for _ in range(3):  # runs eagerly, then captures
            compiled(x, layers).block_until_ready()
        with profiled() as profiles:
            for _ in range(iterations):
                compiled(x, layers).block_until_ready()
        result[name] = summary(kernel_events(profiles[0]), iterations)
        start = time.perf_counter()
        for _ in range(iterations):
            compiled(x, layers).block_until_ready()
        result[name]["wall_us"] = round((time.perf_counter() - start) / iterations * 1e6, 1)
    return result


def summary(events: Sequence[KernelEvent], repetitions: int) -> dict[str, Any]:
    """What a trace of nothing but `repetitions` runs of one program says about a run.

    Returns:
        "kernels" of a run; medians over runs of "span_us", from the first kernel's start to the
        last one's end, and of "between_us", the part of it in which no kernel ran; and over all
        pairs of neighbours "gap_us", the median time between two kernels, and "gap_p90_us".
    """
    per_run, rest = divmod(len(events), repetitions)
    if not per_run or rest:
        raise RuntimeError(f"the trace has {len(events)} kernels for {repetitions} runs")
    spans, between, gaps = [], [], []
    for first in range(0, len(events), per_run):
        run = events[first : first + per_run]
        start = end = run[0].start_ns
        idle = 0.0
        for event in run:
            if event is not run[0]:
                gaps.append(max(0.0, event.start_ns - end) / 1e3)
                idle += gaps[-1]
            end = max(end, event.start_ns + event.duration_ns)
        spans.append((end - start) / 1e3)
        between.append(idle)
    gaps = sorted(gaps) or [0.0]
    return {
        "kernels": per_run,
        "span_us": round(statistics.median(spans), 1),
        "between_us": round(statistics.median(between), 1),
        "gap_us": round(statistics.median(gaps), 2),
        "gap_p90_us": round(gaps[int(0.9 * (len(gaps) - 1))], 2),
    }


def text(chain: dict[str, Any]) -> str:
    """The measurement in two lines."""
    heading = f"{chain['layers']} layers of {chain['m']} x {chain['n']} x {chain['k']}, us:"
    lines = [
        f"{name.replace('_', ' ')}: {chain[name]['kernels']} kernels in {chain[name]['span_us']}, "
        f"{chain[name]['between_us']} of it between them ({chain[name]['gap_us']} each, 90 % at "
        f"most {chain[name]['gap_p90_us']}); a call {chain[name]['wall_us']}"
        for name in ("graphs", "no_graphs")
    ]
    return "\n".join([heading, *lines])
