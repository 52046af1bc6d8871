"""The grouped kernels on a Hopper GPU against float64, their memory behaviour and repeatability.

Everything that the listed cases need is compiled beforehand, in threads (`compiled_ahead`). Which
rows belong to which group is data: one compiled program runs with many assignments.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_deepgemm import GemmConfig
from jax_deepgemm.cli.shapes import NAMED_SHAPES, Shape
from tests import numerics
from tests.gpu import support
from tests.gpu.support import SEED, SENTINEL, bits, check
from tests.grouped_cases import OPS, Problem, call, plant


class Case(NamedTuple):
    """One problem, the kernel for it (None: the selected one) and the SM limit (0: none)."""

    problem: Problem
    config: GemmConfig | None = None
    num_sms: int = 0

    def __str__(self) -> str:
        return f"{self.problem}{support.config_id(self.config, self.num_sms)}"


def operation(case: Case, fill: str = "zero") -> Callable[..., jax.Array]:
    return functools.partial(call, case.problem.op, config=case.config, fill=fill)


@functools.cache
def build(case: Case) -> Callable[..., jax.Array]:
    """The jitted operation for one case, compiled."""
    with support.sm_limit(case.num_sms):
        lowered = jax.jit(operation(case)).lower(*case.problem.shapes())
    return lowered.compile()


# --- Cases ---------------------------------------------------------------------------------------

# CTAs that share B would work on different groups, so there is no cluster along m.
CONFIGS = [config for config in support.CONFIGS if config.cluster_m == 1]

# Sizes that are no multiples of anything: tiles end inside groups, groups inside tiles.
PROBLEMS = [
    Problem("contiguous", 5, 900, 392, 656),
    Problem("masked", 6, 129, 392, 656),
    Problem("ragged", 9, 700, 392, 656),
]

# The second time on 7 SMs: every CTA walks through many tiles. The kernel is the same.
CONFIG_CASES = [
    Case(problem, config, num_sms)
    for problem in PROBLEMS
    for config in CONFIGS
    for num_sms in (0, 7)
]

EDGE_CASES = [
    Case(Problem(op, num_groups, rows, n, k))
    for op in OPS
    for num_groups, n, k in [(1, 8, 16), (8, 136, 304)]
    for rows in [0, 1, 2, 8, 33, 64, 129, 257]
]

# More groups than a warp has lanes, each lane with more than one; most groups with few rows.
MANY_GROUPS_CASES = [
    Case(Problem(op, num_groups, rows, 136, 304), config, num_sms)
    for op, num_groups, rows in [
        ("contiguous", 300, 300 * 128 + 5),
        ("masked", 33, 40),
        ("masked", 300, 8),
        ("masked", 512, 3),
        ("ragged", 33, 500),
        ("ragged", 300, 3000),
        ("ragged", 512, 512),
        ("ragged", 512, 40),
    ]
    for config, num_sms in [(None, 0), (GemmConfig(256, 64, 3, 2), 7)]
]

# One config of each way in which CTAs and warpgroups work together.
SAMPLE = [
    None,
    GemmConfig(64, 72, 4, 1, raster_m=1),
    GemmConfig(64, 112, 4, 2),
    GemmConfig(256, 128, 3, 2, raster_m=3),
    GemmConfig(128, 256, 3, 2, raster_m=3),
    GemmConfig(128, 112, 4, 2, cluster_n=2),
    GemmConfig(64, 112, 4, 2, cluster_k=4),
    GemmConfig(128, 96, 2, 2, cluster_k=2),
]

PATTERN_CASES = [
    Case(problem, config, num_sms)
    for problem in [
        Problem("contiguous", 8, 8 * 128, 136, 304),
        Problem("masked", 8, 70, 136, 304),
        Problem("ragged", 8, 8 * 70, 136, 304),
    ]
    for config, num_sms in [(None, 0), (GemmConfig(256, 64, 3, 2), 7)]
]
REPEAT_CASES = [
    Case(problem, config, num_sms=7 if config else 0) for problem in PROBLEMS for config in SAMPLE
]
BAD_VALUE_CASES = [Case(Problem(op, 3, 384, 136, 656), config) for op in OPS for config in SAMPLE]
RANDOM_CASES = [
    Case(Problem(op, 8, rows, 136, 656), config)
    for op, rows in [("contiguous", 900), ("masked", 300), ("ragged", 600)]
    for config in SAMPLE
]
# The bytes of D are a multiple of the allocator's 256, so that guards begin where D ends.
POISON_CASES = [
    Case(Problem(op, num_groups, rows, 136, 656), config)
    for op, num_groups, rows in [
        ("contiguous", 3, 400),
        ("masked", 16, 1),
        ("masked", 16, 8),
        ("masked", 16, 33),
        ("masked", 16, 129),
        ("ragged", 5, 400),
    ]
    for config in SAMPLE
]
# DeepSeek-V3's experts, as DeepGEMM times them.
SEED_SHAPES = NAMED_SHAPES["grouped"]


def each(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in cases])


@pytest.fixture(scope="session", autouse=True)
def compiled_ahead() -> None:
    """Compiles kernels, their XLA programs and the oracles of large cases in parallel."""
    cases = {
        *CONFIG_CASES,
        *EDGE_CASES,
        *MANY_GROUPS_CASES,
        *PATTERN_CASES,
        *REPEAT_CASES,
        *BAD_VALUE_CASES,
        *RANDOM_CASES,
        *(Case(problem_of(shape)) for shape in SEED_SHAPES),
    }
    builds: list[Callable[[], Any]] = [
        functools.partial(build, case) for case in sorted(cases, key=str)
    ]
    builds += [functools.partial(build_judge, shape) for shape in SEED_SHAPES]
    support.compile_ahead(builds)


def generator(case: Case, index: int = 0) -> np.random.Generator:
    """Other numbers in every run, for every case, and for every index of a run."""
    return np.random.default_rng([SEED, index, *str(case).encode()])


# --- Right numbers -------------------------------------------------------------------------------


@each(CONFIG_CASES + EDGE_CASES + MANY_GROUPS_CASES)
def test_agrees_with_float64(case: Case) -> None:
    problem = case.problem
    operands = problem.operands(SEED)
    for index in range(2):
        arrays = problem.random_arrays(generator(case, index))
        check(build(case)(*operands, *arrays), problem.oracle(operands, *arrays))


@each(PATTERN_CASES)
def test_every_pattern_of_empty_groups(case: Case) -> None:
    problem = case.problem
    operands = problem.operands(SEED)
    on_device = list(map(jnp.asarray, operands))
    patterns = [problem.present(pattern) for pattern in range(2**8)]
    # In one go, before the host looks at any: launches that follow each other closely.
    results = [build(case)(*on_device, *map(jnp.asarray, arrays)) for arrays in patterns]
    for arrays, d in zip(patterns, results, strict=True):
        check(d, problem.oracle(operands, *arrays))


@each(RANDOM_CASES)
@settings(max_examples=15, deadline=None, print_blob=True)
@given(data=st.data())
def test_random_groups(case: Case, data: st.DataObject) -> None:
    problem = case.problem
    if problem.op == "contiguous":
        seed = data.draw(st.integers(0, 2**32 - 1))
        arrays = problem.random_arrays(np.random.default_rng(seed))
    else:
        sizes = st.integers(0, 300) | st.sampled_from([0, 1, -1, 64, 128, 2**31 - 1, -(2**31)])
        drawn = data.draw(st.lists(sizes, min_size=8, max_size=8))
        arrays = (np.array(drawn, np.int32),)
    operands = problem.operands(SEED)
    check(build(case)(*operands, *arrays), problem.oracle(operands, *arrays))


@pytest.mark.parametrize("config", SAMPLE[1:], ids=lambda config: support.config_id(config)[1:])
def test_slices_of_the_groups_add_up(config: GemmConfig) -> None:
    problem = Problem("ragged", 12, 600, 136, 656)
    a, sfa, b, sfb = problem.operands(SEED)
    (sizes,) = problem.random_arrays(generator(Case(problem, config)))
    gemm = jax.jit(operation(Case(problem, config)))
    whole = gemm(a, sfa, b, sfb, sizes)
    check(whole, problem.oracle(problem.operands(SEED), sizes))
    parts = []
    for first in (0, 3, 6, 9, -3, 12, 2**31 - 1, -(2**31)):  # from -3 on they hold no group
        held = slice(first % 12, first % 12 + 3)
        d = gemm(a, sfa, b[held], sfb[held], sizes, np.int32(first))
        groups = numerics.ragged_row_groups(sizes, 600, 3, first)
        part = numerics.GroupedOperands(a, sfa, b[held], sfb[held])
        check(d, numerics.row_groups_oracle(part, groups))
        parts.append(np.asarray(d).astype(np.float32))
    # A row is in one part, and zero in the others.
    np.testing.assert_array_equal(sum(parts), np.asarray(whole).astype(np.float32))


def test_eager_and_hints() -> None:
    problem = PROBLEMS[1]
    operands = problem.operands(SEED)
    arrays = problem.random_arrays(generator(Case(problem), 9))
    expected = problem.oracle(operands, *arrays)
    for expected_m in (1, 40, 129, 10**6):
        check(call("masked", *operands, *arrays, expected_m=expected_m), expected)


def problem_of(shape: Shape) -> Problem:
    rows = shape.m_per_group if shape.op == "masked" else shape.m
    return Problem(shape.op, shape.groups, rows, shape.n, shape.k)


@functools.cache
def build_judge(shape: Shape) -> Callable[..., tuple[jax.Array, ...]]:
    """(*operands, d, rows of each group) -> the largest errors of a group, on the GPU, compiled."""
    g, m, n = shape.groups, shape.m_per_group, shape.n

    def judge(
        a: jax.Array, sfa: jax.Array, b: jax.Array, sfb: jax.Array, d: jax.Array, counts: jax.Array
    ) -> tuple[jax.Array, ...]:
        a, sfa, d = (x.reshape(g, m, -1) for x in (a, sfa, d))
        # One group after the other: in float64 all of them would not fit.
        errors = jax.lax.map(lambda group: support.judge(*group), (a, sfa, b, sfb, d, counts))
        return tuple(error.max() for error in errors)

    *operands, _ = problem_of(shape).shapes()
    d = jax.ShapeDtypeStruct((*operands[0].shape[:-1], n), jnp.bfloat16)
    counts = jax.ShapeDtypeStruct((g,), jnp.int32)
    with jax.enable_x64(True):
        jitted = jax.jit(judge, compiler_options=support.UNTUNED)
        return jitted.lower(*operands, d, counts).compile()


@pytest.mark.parametrize("shape", SEED_SHAPES, ids=str)
def test_seed_shape(shape: Shape) -> None:
    # Every element is compared in float64 on the GPU; the products are 10 TFLOP in all.
    g, m, n, k = shape.groups, shape.m_per_group, shape.n, shape.k
    problem = problem_of(shape)
    rng = np.random.default_rng([SEED, g, m, n, k])
    k_blocks = numerics.ceil_div(k, 128)
    operands = [
        jax.device_put(support.random_bytes(rng, *problem.a_rows, k)),
        jax.device_put(numerics.random_scales(rng, *problem.a_rows, k_blocks)),
        jax.device_put(support.random_bytes(rng, g, n, k)),
        jax.device_put(numerics.random_scales(rng, g, numerics.ceil_div(n, 128), k_blocks)),
    ]
    counts = jnp.full(g, m, jnp.int32)
    if shape.op == "contiguous":
        arrays = {
            "contiguous": jnp.repeat(jnp.arange(g, dtype=jnp.int32), m),
            "ragged": counts,  # the same work
        }
    else:
        counts = jnp.asarray(rng.integers(m // 2, m + 1, g), jnp.int32)
        arrays = {"masked": counts}
    for op, array in arrays.items():
        d = build(Case(problem._replace(op=op)))(*operands, array)
        support.check_errors(build_judge(shape)(*operands, d, counts))


# --- Where it writes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "fill"),
    [
        pytest.param(case, fill, id=f"{case}-{fill}")
        for case in POISON_CASES
        for fill in (["undefined", "zero"] if case.problem.op == "masked" else ["zero"])
    ],
)
def test_writes_what_it_should_and_nothing_else(case: Case, fill: str) -> None:
    # D lies in memory that holds SENTINEL, between two arrays of SENTINEL: a value that is left out
    # is far off, and a store past either end of D or past a group's rows is seen.
    problem = case.problem
    operands = problem.operands(SEED)
    (array,) = problem.random_arrays(generator(case))
    shape = (*problem.a_rows, problem.n)
    before, poison, after = support.neighbours(shape)
    d = support.write_into(operation(case, fill), poison, *operands, array)
    expected = problem.oracle(operands, array)
    result = np.asarray(d)
    if fill == "undefined":
        valid = np.arange(problem.rows) < array[:, None]
        np.testing.assert_array_equal(result[~valid].astype(np.float32), SENTINEL)
        result = np.where(valid[..., None], result, np.zeros_like(result))
    check(result, expected)
    for guard in (before, after):
        np.testing.assert_array_equal(np.asarray(guard).astype(np.float32), SENTINEL)


@each(BAD_VALUE_CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_bad_values_stay_in_their_row_and_expert(case: Case, bad: float) -> None:
    planted = plant(case.problem, bad, seed=SEED)
    gemm = build(case)
    planted.check(gemm(*planted.bad), gemm(*planted.clean))


# --- The same again ------------------------------------------------------------------------------


@each(REPEAT_CASES)
def test_same_bits_every_time(case: Case) -> None:
    problem = case.problem
    host = problem.operands(SEED)
    arrays = problem.random_arrays(generator(case))
    operands = [jnp.asarray(operand) for operand in (*host, *arrays)]
    gemm = build(case)
    first = gemm(*operands)
    check(first, problem.oracle(host, *arrays))
    expected = bits(first)
    assert {bits(d) for d in [gemm(*operands) for _ in range(20)]} == {expected}
    with support.busy_gpu():
        assert {bits(gemm(*operands)) for _ in range(20)} == {expected}


# Each operation twice, with small and with large groups.
GRAPH_PROBLEMS = [
    *(Problem(op, 4, 520, 136, 304) for op in OPS),
    *(Problem(op, 9, 33, 264, 144) for op in OPS),
]


def chain(operands: list[numerics.GroupedOperands], arrays: list[Any]) -> list[jax.Array]:
    """Six operations in one program."""
    return [
        call(problem.op, *part, *array)
        for problem, part, array in zip(GRAPH_PROBLEMS, operands, arrays, strict=True)
    ]


def test_graph_replayed_with_other_groups() -> None:
    # XLA records so many operations in a row into one CUDA graph. It launches them singly at first,
    # then records, then replays, and records again for arrays at other addresses. Freed arrays'
    # memory is given to the next ones, so that here it mostly replays.
    program = jax.jit(chain, compiler_options={"xla_gpu_graph_min_graph_size": 1})
    operands = [problem.operands(SEED) for problem in GRAPH_PROBLEMS]
    on_device = jax.device_put(operands)
    kept = []
    for run in range(10):
        rng = np.random.default_rng([SEED, run])
        arrays = [problem.random_arrays(rng) for problem in GRAPH_PROBLEMS]
        results = program(on_device, jax.device_put(arrays))
        for problem, part, array, d in zip(GRAPH_PROBLEMS, operands, arrays, results, strict=True):
            check(d, problem.oracle(part, *array))
        if run > 6:  # From here on results get other memory.
            kept.append(results)
        del results, d
