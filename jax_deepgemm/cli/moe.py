"""Mixture of experts as it comes: uneven groups, mostly empty groups, and JAX's own tools.

Part of `bench`, whose rows have equal and full groups. Each part here is a list of entries; an
entry says which groups it is about and how each contender did (`measure_contenders`):

    uneven      the ragged operation against padding every group to the alignment of the contiguous
                layout, multiplying there and moving the rows back
    scheduler   the same 8 groups of rows among up to 512: what finding them costs
    jax         jax.lax.ragged_dot and the ragged dot among JAX's Pallas examples, both in bf16
"""

import functools
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

import jax_deepgemm
from jax_deepgemm.cli import harness
from jax_deepgemm.cli.problem import (
    MAX_ERROR,
    Pair,
    dequantize_bf16,
    grouped_error,
    random_weights,
)
from jax_deepgemm.cli.shapes import EXPERT_WEIGHTS
from jax_deepgemm.cli.timing import Call, Flush, kernel_times_us

# An entry of a part, as the README of benchmarks/ describes it.
Entry = dict[str, Any]
ENTRY_FIELDS = ("groups", "rows", "largest", "n", "k")  # which say what it measures
Sizes = NDArray[np.int32]

DRAW_SEED = 0  # of the group sizes; operands are new in every run
SKEWED_GROUPS, SKEWED_ROWS = 8, 32768
SMALL_GROUPS, SMALL_GROUP_ROWS = 256, 10

SCHEDULED_GROUPS = (8, 32, 128, 256, 384, 512)
BUSY_GROUPS, BUSY_GROUP_ROWS = 8, 64
SCHEDULED_WEIGHTS = (4096, 7168)  # n, k

JAX_GROUPS, JAX_GROUP_ROWS = 4, 8192
JAX_WEIGHTS = (4096, 7168)
# How a contender can fail, those among JAX's experimental modules included: what they need is not
# installed, their interface is another one, or they cannot be compiled or run.
FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError)
BF16_MAX_ERROR = 1e-4  # JAX's own tools get the operands rounded to bf16
LAX, PALLAS = "lax_ragged_dot_bf16", "pallas_mosaic_gpu_ragged_dot_bf16"
PALLAS_MODULE = "jax.experimental.pallas.ops.gpu.ragged_dot_mgpu"
# The part of that module's own search (its `main`) that large groups can win.
PALLAS_CONFIGS: tuple[dict[str, int], ...] = tuple(
    {
        "block_m": block_m,
        "block_n": 128,
        "block_k": 64,
        "max_concurrent_steps": steps,
        "grid_block_n": grid_block_n,
        "transpose_rhs": transpose_rhs,
    }
    for (block_m, steps), grid_block_n, transpose_rhs in itertools.product(
        ((128, 5), (192, 4)), (1, 8), (False, True)
    )
)


class Problem(NamedTuple):
    """Operands of the ragged operation; the host knows the group sizes as well."""

    lhs: Pair
    rhs: Pair
    group_sizes: jax.Array
    sizes: Sizes

    @property
    def entry(self) -> Entry:
        """The part of an entry that says what was measured."""
        groups, n, k = self.rhs[0].shape
        rows, largest = int(self.sizes.sum()), int(self.sizes.max())
        return dict(zip(ENTRY_FIELDS, (groups, rows, largest, n, k), strict=True))


class Contender(NamedTuple):
    """One way to multiply the rows of each group."""

    function: Callable[..., jax.Array]
    operands: tuple[Any, ...]
    ours: bool = True  # runs this package's kernels


def random_problem(sizes: Sizes, n: int, k: int, seed: int) -> Problem:
    """Quantised standard normals on the default device."""
    key_a, key_b = jax.random.split(jax.random.key(seed, impl="rbg"))
    a = jax.random.normal(key_a, (int(sizes.sum()), k), jnp.float32)
    rhs = jax.jit(random_weights, static_argnums=(1, 2, 3))(key_b, len(sizes), n, k)
    return Problem(jax_deepgemm.quantize_per_token(a), rhs, jnp.asarray(sizes), sizes)


def ragged(problem: Problem) -> Contender:
    """The operation that takes the groups as they are."""
    operation = jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_ragged
    return Contender(operation, (problem.lhs, problem.rhs, problem.group_sizes))


def measure_contenders(
    contenders: Mapping[str, Contender], problem: Problem, flush: Flush, iterations: int
) -> Entry:
    """Checks contenders and times them in one trace.

    Returns:
        For each contender its "error" and "op_us", the time of all kernels of the call; "time_us",
        that of this package's kernels alone, if it is ours; or "failed", with the reason.
    """
    results: Entry = {}
    calls: dict[str, Call] = {}
    for name, (function, operands, ours) in contenders.items():
        try:
            call = Call(function, *operands, kernel_prefix=harness.KERNEL_PREFIX if ours else "")
            error = grouped_error(call(), problem.lhs, problem.rhs, problem.sizes)
            if not error <= (MAX_ERROR if ours else BF16_MAX_ERROR):
                raise ValueError(f"wrong result: error {error:.1e}")
        except FAILURES as failure:
            results[name] = {"failed": f"{type(failure).__name__}: {failure}"}
            continue
        results[name] = {"error": error}
        calls[name] = call
    times = kernel_times_us(list(calls.values()), flush, iterations)
    for name, (kernel_us, op_us) in zip(calls, times, strict=True):
        results[name]["op_us"] = round(statistics.median(op_us), 3)
        if contenders[name].ours:
            results[name]["time_us"] = round(statistics.median(kernel_us), 3)
    return results


# --- Uneven groups -------------------------------------------------------------------------------


def skewed_sizes() -> Sizes:
    """A few large groups and many small ones: weights 1, 1/2, 1/3, ... in random order."""
    rng = np.random.default_rng(DRAW_SEED)
    weights = 1 / np.arange(1, SKEWED_GROUPS + 1)
    sizes = rng.multinomial(SKEWED_ROWS, weights / weights.sum())
    return rng.permutation(sizes).astype(np.int32)


def small_sizes() -> Sizes:
    """Many groups of a few rows, Poisson distributed, as at decode."""
    rng = np.random.default_rng(DRAW_SEED)
    return rng.poisson(SMALL_GROUP_ROWS, SMALL_GROUPS).astype(np.int32)


def padded_rows(rows: int, groups: int) -> int:
    """Rows of the contiguous layout, enough for whatever the group sizes turn out to be."""
    alignment = jax_deepgemm.get_m_alignment_for_contiguous_layout()
    return (rows + groups * (alignment - 1)) // alignment * alignment


def padded_gemm(lhs: Pair, rhs: Pair, group_sizes: jax.Array) -> jax.Array:
    """What the ragged operation computes, by way of the contiguous layout, sizes on the device."""
    (a, sfa), (b, _) = lhs, rhs
    rows, groups = a.shape[0], b.shape[0]
    alignment = jax_deepgemm.get_m_alignment_for_contiguous_layout()
    padded_sizes = -(-group_sizes // alignment) * alignment
    ends, padded_ends = jnp.cumsum(group_sizes), jnp.cumsum(padded_sizes)
    shifts = (padded_ends - padded_sizes) - (ends - group_sizes)

    padded_row = jnp.arange(padded_rows(rows, groups), dtype=jnp.int32)
    group = jnp.minimum(_group_of(padded_row, padded_ends), groups - 1)
    source = padded_row - shifts[group]
    m_indices = jnp.where(source < ends[group], group, -1)
    source = jnp.where(source < ends[group], source, 0)
    padded = jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
        (a[source], sfa[source]), rhs, m_indices
    )
    row = jnp.arange(rows, dtype=jnp.int32)
    d: jax.Array = padded[row + shifts[_group_of(row, ends)]]
    return d


def _group_of(rows: jax.Array, ends: jax.Array) -> jax.Array:
    """Groups of rows: how many end at or before each. One fusion, where a search is a loop."""
    group: jax.Array = jnp.sum(rows[:, None] >= ends, axis=1, dtype=jnp.int32)
    return group


def uneven(flush: Flush, iterations: int, seed: int) -> Iterator[Entry]:
    """The ragged operation against padding, the contiguous operation, and unpadding."""
    for sizes, (n, k) in itertools.product((skewed_sizes(), small_sizes()), EXPERT_WEIGHTS):
        problem = random_problem(sizes, n, k, seed)
        contenders = {
            "ragged": ragged(problem),
            "padded": Contender(padded_gemm, ragged(problem).operands),
        }
        times = measure_contenders(contenders, problem, flush, iterations)
        padded = padded_rows(int(sizes.sum()), len(sizes))
        yield problem.entry | {"padded_rows": padded} | times


# --- The scheduler -------------------------------------------------------------------------------


def scattered_sizes(groups: int) -> Sizes:
    """The busy groups, spread evenly among others that are empty."""
    sizes = np.zeros(groups, np.int32)
    sizes[np.arange(BUSY_GROUPS) * groups // BUSY_GROUPS] = BUSY_GROUP_ROWS
    return sizes


def scheduler(flush: Flush, iterations: int, seed: int) -> Iterator[Entry]:
    """The same work among more and more groups."""
    for groups in SCHEDULED_GROUPS:
        problem = random_problem(scattered_sizes(groups), *SCHEDULED_WEIGHTS, seed)
        times = measure_contenders({"ragged": ragged(problem)}, problem, flush, iterations)
        yield problem.entry | times


# --- JAX's own tools -----------------------------------------------------------------------------


def jax_tools(flush: Flush, iterations: int, seed: int) -> Iterator[Entry]:
    """What JAX offers for the same work: bf16 operands, twice the bytes and half the peak rate."""
    sizes = np.full(JAX_GROUPS, JAX_GROUP_ROWS, np.int32)
    problem = random_problem(sizes, *JAX_WEIGHTS, seed)
    a, b_nk = jax.jit(dequantize_bf16)(problem.lhs, problem.rhs)
    b_kn = jnp.swapaxes(b_nk, 1, 2)
    contenders = {
        "ragged": ragged(problem),
        LAX: Contender(jax.lax.ragged_dot, (a, b_kn, problem.group_sizes), ours=False),
    }
    for i, config in enumerate(PALLAS_CONFIGS):
        operands = (a, b_nk if config["transpose_rhs"] else b_kn, problem.group_sizes)
        function = functools.partial(_pallas_ragged_dot, config)
        contenders[f"{PALLAS} {i}"] = Contender(function, operands, ours=False)
    results = measure_contenders(contenders, problem, flush, iterations)

    configured = [
        results.pop(f"{PALLAS} {i}") | {"config": config} for i, config in enumerate(PALLAS_CONFIGS)
    ]
    timed = [result for result in configured if "failed" not in result]
    best = min(timed, key=lambda result: float(result["op_us"]), default=configured[0])
    yield problem.entry | results | {PALLAS: best}


def _pallas_ragged_dot(
    config: dict[str, int], a: jax.Array, b: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    # Imported when it is called: it is an example, and needs packages that JAX does not.
    module = importlib.import_module(PALLAS_MODULE)
    d: jax.Array = module.ragged_dot(a, b, group_sizes=group_sizes, **config)
    return d


# --- All parts -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Flush, int, int], Iterator[Entry]]] = {
    "uneven": uneven,
    "scheduler": scheduler,
    "jax": jax_tools,
}
TITLES = {
    "uneven": "uneven groups: ragged against padding and the contiguous layout",
    "scheduler": f"{BUSY_GROUPS} busy groups among empty ones",
    "jax": "JAX's own tools",
}


def parts_of(document: dict[str, Any]) -> dict[str, list[Entry]]:
    """The parts that a results file has: all, or none if it was made without --moe."""
    return {part: document["moe"][part] for part in PARTS} if "moe" in document else {}


def contenders_of(entries: Sequence[Entry]) -> list[str]:
    """Names of the contenders of a part, in order."""
    names = [name for entry in entries for name, value in entry.items() if isinstance(value, dict)]
    return list(dict.fromkeys(names))


def is_good(entry: Entry) -> bool:
    """Whether our own operations computed the right result; JAX's tools may fail."""
    return all("failed" not in entry[name] for name in ("ragged", "padded") if name in entry)


def moe_table(part: str, entries: Sequence[Entry]) -> Table:
    """One line per entry: which groups, then each contender's time or the reason for none."""
    table = Table(title=f"{TITLES[part]}, us of all kernels (of ours alone)")
    contenders = contenders_of(entries)
    for heading in (*ENTRY_FIELDS, *contenders):
        table.add_column(heading, justify="right")
    for entry in entries:
        cells = [str(entry[field]) for field in ENTRY_FIELDS]
        table.add_row(*cells, *(_cell(entry.get(name, {})) for name in contenders))
    return table


def _cell(result: Entry) -> str:
    if "failed" in result:
        return f"[red]{result['failed'].splitlines()[0]}"
    own = f" ({result['time_us']:.1f})" if "time_us" in result else ""
    return f"{result['op_us']:.1f}{own}" if "op_us" in result else ""
