"""The dense kernel on a Hopper GPU against float64, its memory behaviour and its repeatability.

Everything that the listed cases need is compiled beforehand, in threads (`compiled_ahead`).
"""

import concurrent.futures
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jax_deepgemm
from jax_deepgemm import GemmConfig, gemm_fp8_fp8_bf16_nt
from jax_deepgemm.cli.shapes import NAMED_SHAPES
from tests import numerics
from tests.gpu import support
from tests.gpu.support import CONFIGS, SEED, SENTINEL, bits, sm_limit


class Case(NamedTuple):
    """One problem, the kernel for it (None: the selected one) and the SM limit (0: none)."""

    m: int
    n: int
    k: int
    config: GemmConfig | None = None
    num_sms: int = 0


def case_id(case: Case) -> str:
    return f"m{case.m}-n{case.n}-k{case.k}{support.config_id(case.config, case.num_sms)}"


def operand_shapes(m: int, n: int, k: int) -> list[jax.ShapeDtypeStruct]:
    k_blocks = numerics.ceil_div(k, 128)
    return [
        jax.ShapeDtypeStruct((m, k), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((m, k_blocks), jnp.float32),
        jax.ShapeDtypeStruct((n, k), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((numerics.ceil_div(n, 128), k_blocks), jnp.float32),
    ]


def flat(a: Any, sfa: Any, b: Any, sfb: Any, config: GemmConfig | None = None) -> jax.Array:
    return gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb), config=config)


@functools.cache
def build(case: Case) -> Callable[..., jax.Array]:
    """The jitted operation for one case, compiled."""
    function = functools.partial(flat, config=case.config)
    with sm_limit(case.num_sms):
        lowered = jax.jit(function).lower(*operand_shapes(case.m, case.n, case.k))
    return lowered.compile()


def random_operands(m: int, n: int, k: int, index: int = 0) -> numerics.DenseOperands:
    """Operands that are others in every run, and for every index of a run."""
    return numerics.dense_operands(m, n, k, seed=SEED + index)


def check(d: jax.Array, operands: numerics.DenseOperands) -> None:
    support.check(d, numerics.dense_oracle(operands))


# --- Cases ---------------------------------------------------------------------------------------

SEED_CASES = [
    Case(shape.m, shape.n, shape.k)
    for shape in sorted(NAMED_SHAPES["dense"], key=lambda shape: (shape.n, shape.k, shape.m))
]

EDGE_CASES = [
    Case(m, n, k)
    for n, k in [(1096, 1040), (136, 304), (8, 16)]
    for m in [0, 1, 2, 3, 7, 63, 64, 65, 127, 128, 129, 333, 1000, 4097]
]

# The second time on 7 SMs: every CTA walks through many tiles, and does not divide them evenly.
CONFIG_CASES = [
    case
    for config in CONFIGS
    for case in (Case(333, 776, 1040, config), Case(333, 776, 5 * 128 + 16, config, num_sms=7))
]

# A main loop for each place in a block of 128 columns at which a tile may begin: all of them, with
# k-blocks enough for that.
LOOP_CASES = [
    Case(333, 8 * width + 8, 12 * 128 + 16, GemmConfig(128, width, 3, 2))
    for width in (144, 160, 176, 192, 224)
]

# Selection and launches with fewer SMs than the GPU has.
SM_CASES = [Case(333, 776, 400, num_sms=num_sms) for num_sms in (1, 2, 7, 66, 1000)]

# One config of each way in which CTAs and warpgroups work together.
SAMPLE = [
    None,
    GemmConfig(64, 72, 4, 1, raster_m=1),
    GemmConfig(64, 112, 4, 2),
    GemmConfig(256, 128, 3, 2, raster_m=3),
    GemmConfig(128, 128, 4, 2, cluster_m=2, raster_m=1),
    GemmConfig(128, 256, 3, 2, cluster_m=2, raster_m=1),
    GemmConfig(128, 112, 4, 2, cluster_n=2),
    GemmConfig(64, 112, 4, 2, cluster_k=4),
    GemmConfig(128, 96, 2, 2, cluster_k=2),
]
# The bytes of D are a multiple of the allocator's 256, so that guards begin where D ends.
POISON_CASES = [Case(336, 776, 656, config) for config in SAMPLE] + [
    Case(80, 136, 304),
    Case(16, 8, 16),
]
REPEAT_CASES = [Case(333, 776, 656, config, num_sms=7 if config else 0) for config in SAMPLE]
BAD_VALUE_CASES = [Case(73, 264, 656, config) for config in SAMPLE]


def each(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case_id(case)) for case in cases])


@pytest.fixture(scope="session", autouse=True)
def compiled_ahead() -> None:
    """Compiles kernels, their XLA programs and the oracles of large cases in parallel."""
    cases = {
        *SEED_CASES,
        *EDGE_CASES,
        *CONFIG_CASES,
        *LOOP_CASES,
        *SM_CASES,
        *REPEAT_CASES,
        *BAD_VALUE_CASES,
    }
    builds = [functools.partial(build, case) for case in sorted(cases, key=case_id)]
    builds += [functools.partial(build_judge, case.m, case.n, case.k) for case in SEED_CASES]
    support.compile_ahead(builds)


# --- Right numbers -------------------------------------------------------------------------------


@functools.cache
def build_judge(m: int, n: int, k: int) -> Callable[..., tuple[jax.Array, ...]]:
    """(*operands, d) -> the three errors that `check` looks at, on the GPU, compiled."""
    with jax.enable_x64(True):
        shapes = [*operand_shapes(m, n, k), jax.ShapeDtypeStruct((m, n), jnp.bfloat16)]
        return jax.jit(support.judge, compiler_options=support.UNTUNED).lower(*shapes).compile()


@functools.lru_cache(maxsize=1)
def large_weights(n: int, k: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng([SEED, n, k])
    scales = numerics.random_scales(rng, numerics.ceil_div(n, 128), numerics.ceil_div(k, 128))
    return jax.device_put(support.random_bytes(rng, n, k)), jax.device_put(scales)


@each(SEED_CASES)
def test_seed_shape(case: Case) -> None:
    # Every element of D is compared in float64 on the GPU: all 18 products together are 2 TFLOP,
    # a tenth of a second for an H100's float64 tensor cores.
    m, n, k, *_ = case
    rng = np.random.default_rng([SEED, m, n, k])
    a = jax.device_put(support.random_bytes(rng, m, k))
    sfa = jax.device_put(numerics.random_scales(rng, m, numerics.ceil_div(k, 128)))
    b, sfb = large_weights(n, k)
    d = build(case)(a, sfa, b, sfb)
    support.check_errors(build_judge(m, n, k)(a, sfa, b, sfb, d))


@each(EDGE_CASES + CONFIG_CASES + LOOP_CASES + SM_CASES)
def test_agrees_with_float64(case: Case) -> None:
    operands = random_operands(case.m, case.n, case.k)
    check(build(case)(*operands), operands)


@settings(
    max_examples=25,
    deadline=None,
    print_blob=True,
    # Each example compiles a kernel: no time to shrink one.
    phases=[Phase.explicit, Phase.generate],
)
@given(
    m=st.integers(0, 600),
    n=st.integers(1, 187).map(lambda blocks: 8 * blocks),
    k=st.integers(1, 187).map(lambda blocks: 16 * blocks),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_shapes(m: int, n: int, k: int, seed: int) -> None:
    operands = numerics.dense_operands(m, n, k, seed=seed)
    check(jax.jit(flat)(*operands), operands)


def test_vmap_and_eager() -> None:
    parts = [random_operands(45, 136, 304, i) for i in range(3)]
    _, _, b, sfb = parts[0]
    a, sfa = (np.stack([part[i] for part in parts]) for i in (0, 1))
    d = jax.vmap(flat, in_axes=(0, 0, None, None))(a, sfa, b, sfb)
    for i in range(3):
        check(d[i], numerics.DenseOperands(a[i], sfa[i], b, sfb))


def test_vmap_of_both_is_one_launch() -> None:
    parts = [random_operands(45, 136, 304, i) for i in range(5)]
    d = jax.vmap(flat)(*(np.stack([part[i] for part in parts]) for i in range(4)))
    for i, part in enumerate(parts):
        check(d[i], part)


def test_limit_of_sms_is_put_back() -> None:
    before = jax_deepgemm.get_num_sms()
    with sm_limit(7):
        assert jax_deepgemm.get_num_sms() == 7
    assert jax_deepgemm.get_num_sms() == before
    assert before == jax.devices("cuda")[0].core_count


# --- Where it writes -----------------------------------------------------------------------------


@each(POISON_CASES)
def test_writes_all_of_d_and_nothing_else(case: Case) -> None:
    # D lies in memory that holds SENTINEL, between two arrays of SENTINEL: a value that is left out
    # is far off, and a store past either end of D changes a guard. (What a store would hit further
    # away, and reads outside of the operands, are for compute-sanitizer: sanitize.py.)
    operands = random_operands(case.m, case.n, case.k)
    before, poison, after = support.neighbours((case.m, case.n))
    gemm = functools.partial(flat, config=case.config)
    d = support.write_into(gemm, poison, *operands, num_sms=case.num_sms)
    check(d, operands)
    for guard in (before, after):
        np.testing.assert_array_equal(np.asarray(guard).astype(np.float32), SENTINEL)


@each(BAD_VALUE_CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_bad_values_stay_in_their_row_and_column(case: Case, bad: float) -> None:
    clean = random_operands(case.m, case.n, case.k)
    a, sfa, b, sfb = (operand.copy() for operand in clean)
    a[3, 200] = np.nan
    sfa[70, 5] = bad  # the last, partial k-block, and the last rows
    b[260, 1] = np.nan
    sfb[1, 2] = bad  # columns 128 to 255
    gemm = build(case)
    d = np.asarray(gemm(a, sfa, b, sfb)).astype(np.float32)

    hit = np.zeros(d.shape, bool)
    hit[[3, 70], :] = hit[:, 260] = hit[:, 128:256] = True
    assert not np.isfinite(d[hit]).any()
    np.testing.assert_array_equal(d[~hit], np.asarray(gemm(*clean)).astype(np.float32)[~hit])


# --- The same again ------------------------------------------------------------------------------


@each(REPEAT_CASES)
def test_same_bits_every_time(case: Case) -> None:
    host = random_operands(case.m, case.n, case.k)
    operands = [jnp.asarray(operand) for operand in host]
    gemm = build(case)
    first = gemm(*operands)
    check(first, host)
    expected = bits(first)
    assert {bits(d) for d in [gemm(*operands) for _ in range(20)]} == {expected}
    with support.busy_gpu():
        assert {bits(gemm(*operands)) for _ in range(20)} == {expected}


def chain(a: jax.Array, *rest: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Six operations, each multiplying what the last one gave: [(a of the operation, d), ...]."""
    steps = []
    for i in range(6):
        sfa, b, sfb = rest[3 * i : 3 * i + 3]
        d = flat(a, sfa, b, sfb)
        steps.append((a, d))
        a = jnp.clip(64 * d.astype(jnp.float32), -448, 448).astype(jnp.float8_e4m3fn)
    return steps


def test_a_chain_of_operations_in_one_program() -> None:
    # XLA records so many in a row into one CUDA graph and replays it: on the first runs it may
    # launch, record or update the graph, each time for other buffers and other numbers.
    program = jax.jit(chain, compiler_options={"xla_gpu_graph_min_graph_size": 1})
    kept = []  # So that every run gets other memory.
    for run in range(4):
        parts = [random_operands(130, 272, 272, 6 * run + i) for i in range(6)]
        arguments = [jnp.asarray(x) for part in parts for x in part[1:]]
        results = program(jnp.asarray(parts[0].a), *arguments)
        for part, (a, d) in zip(parts, results, strict=True):
            check(d, part._replace(a=np.asarray(a)))
        kept.append((arguments, results))


def test_threads_compile_and_run_different_shapes() -> None:
    # No other test has these (n, k): their kernels are compiled here.
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        cases = [(60 + 50 * i, 72 + 120 * index, 176 + 48 * index) for i in range(3)]
        barrier.wait()
        for m, n, k in cases:
            operands = random_operands(m, n, k)
            for _ in range(3):
                check(jax.jit(flat)(*operands), operands)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, index) for index in range(4)]:
            future.result()


def test_threads_compile_and_run_the_same_shape() -> None:
    barrier = threading.Barrier(4)
    operands = random_operands(200, 584, 368)

    def work() -> bytes:
        barrier.wait()
        return bits(jax.jit(lambda *operands: flat(*operands))(*operands))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = {future.result() for future in [pool.submit(work) for _ in range(4)]}
    assert results == {bits(flat(*operands))}
    check(flat(*operands), operands)
