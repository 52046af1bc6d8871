"""Kernel selection and the rules of legality; no GPU is needed."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_deepgemm
from jax_deepgemm import GemmConfig, ffi, legal_configs, select_config, smem_bytes
from jax_deepgemm.arguments import H200_MEMORY_GBS
from jax_deepgemm.cli.shapes import NAMED_SHAPES, Shape
from jax_deepgemm.config import OPS, Problem, check_problem
from jax_deepgemm.ffi import _native

MAX_SMEM_BYTES = 232_448  # of one block on sm_90

# What the rules are tried on: every field has room to move.
PROBLEM = check_problem("test", 333, 776, 1040, num_sms=132)
BASE = GemmConfig(block_m=64, block_n=64, num_stages=4, math_warpgroups=1)

AWKWARD = [
    Shape.dense(0, 8, 16),
    Shape("masked", 1, 0, 8, 16),
    Shape.dense(1, 8, 16),
    Shape.dense(1, 24, 128),
    Shape.dense(7, 136, 144),
    Shape.dense(333, 776, 1040),
    Shape.dense(4097, 1096, 656),
    Shape.dense(100_000, 129_280, 7168),
    Shape("contiguous", 3, 0, 8, 16),
    Shape("contiguous", 300, 128, 136, 144),
    Shape("masked", 1, 1, 8, 16),
    Shape("masked", 300, 33, 136, 144),
    Shape("ragged", 1, 333, 776, 1040),
    Shape("ragged", 512, 1, 136, 144),
]
ALL_SHAPES = [
    *NAMED_SHAPES["seed"],
    *NAMED_SHAPES["decode"],
    *NAMED_SHAPES["ragged"],
    *AWKWARD,
]
every_shape = pytest.mark.parametrize("shape", [pytest.param(s, id=str(s)) for s in ALL_SHAPES])

ns = st.integers(1, 4096).map(lambda blocks: 8 * blocks)
ks = st.integers(1, 1024).map(lambda blocks: 16 * blocks)
random_shapes = st.builds(Shape.dense, st.integers(0, 70_000), ns, ks) | st.builds(
    Shape, st.sampled_from(OPS[1:]), st.integers(1, 600), st.integers(0, 3000), ns, ks
)


def check_selection(shape: Shape, num_sms: int) -> None:
    problem = check_problem("test", **shape.selection, num_sms=num_sms)
    candidates = legal_configs(**shape.selection, num_sms=num_sms)
    assert len(set(candidates)) == len(candidates) > 0
    for config in candidates:
        assert _native.why_illegal(problem, config.fields) == ""
        assert smem_bytes(config) <= MAX_SMEM_BYTES
        assert config.cluster_m * config.cluster_n * config.cluster_k <= num_sms

    selected = select_config(**shape.selection, num_sms=num_sms)
    assert selected == select_config(**shape.selection, num_sms=num_sms)
    # The first of those with the lowest estimate.
    estimates = _native.estimates_us(problem, [config.fields for config in candidates])
    assert min(estimates) > 0
    assert selected == candidates[estimates.index(min(estimates))]


# --- Selection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sms", [1, 3, 66, 114, 132], ids="sms{}".format)
@every_shape
def test_selects_the_best_of_legal_candidates(shape: Shape, num_sms: int) -> None:
    check_selection(shape, num_sms)


@settings(max_examples=25, deadline=None)
@given(shape=random_shapes, num_sms=st.integers(1, 160))
def test_selects_for_random_shapes(shape: Shape, num_sms: int) -> None:
    check_selection(shape, num_sms)


def test_default_is_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither the machine's GPU nor the limit of set_num_sms matters.
    monkeypatch.setattr(_native, "cuda_devices", lambda: pytest.fail("looked for a GPU"))
    monkeypatch.setattr("jax_deepgemm.device._num_sms_limit", 3)
    for shape in ALL_SHAPES:
        selection = shape.selection
        assert select_config(**selection) == select_config(**selection, num_sms=132)
        assert legal_configs(**selection) == legal_configs(**selection, num_sms=132)


def test_candidates_are_of_every_kind() -> None:
    configs = legal_configs(4096, 4096, 7168)
    for name, values in {
        "block_m": {64, 128, 256},
        "math_warpgroups": {1, 2},
        "cluster_m": {1, 2},
        "cluster_n": {1, 2},
        "cluster_k": {1, 2, 4},
    }.items():
        assert {getattr(config, name) for config in configs} == values
    assert any(config.block_n & (config.block_n - 1) for config in configs)


@pytest.mark.parametrize("function", [select_config, legal_configs])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 8, 16, 132), "m must not be negative, got -1"),
        ((2**31, 8, 16, 132), "m must be at most 2147418111, got 2147483648"),
        ((1, 2**31, 16, 132), "n must be at most 2147418111, got 2147483648"),
        ((1, 8, 2**31, 132), "k must be at most 2147418111, got 2147483648"),
        ((2**24, 2**24, 16, 132), "m * n must be at most 2^40, got 16777216 * 16777216"),
        ((1, 12, 16, 132), "n must be a positive multiple of 8, got 12"),
        ((1, 0, 16, 132), "n must be a positive multiple of 8, got 0"),
        ((1, -8, 16, 132), "n must be a positive multiple of 8, got -8"),
        ((1, 8, 24, 132), "k must be a positive multiple of 16, got 24"),
        ((1, 8, 0, 132), "k must be a positive multiple of 16, got 0"),
        ((1, 8, 16, 0), "num_sms must be at least 1, got 0"),
        ((1, 8, 16, -5), "num_sms must be at least 1, got -5"),
    ],
    ids=str,
)
def test_unsupported_problem(
    function: Any, arguments: tuple[int, int, int, int], message: str
) -> None:
    *shape, num_sms = arguments
    with pytest.raises(ValueError) as raised:
        function(*shape, num_sms=num_sms)
    assert str(raised.value) == f"{function.__name__}: {message}"


@pytest.mark.parametrize("function", [select_config, legal_configs])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "grouped"}, "op must be one of dense, contiguous, masked, ragged, got 'grouped'"),
        ({"op": 3}, "op must be one of dense, contiguous, masked, ragged, got 3"),
        ({"num_groups": 2}, "num_groups must be 1 for a dense problem, got 2"),
        ({"op": "ragged", "num_groups": 0}, "there must be at least one group, got 0"),
        ({"op": "masked", "num_groups": 0}, "there must be at least one group, got 0"),
        (
            {"op": "contiguous", "num_groups": 2**30},
            "num_groups * n must be at most 2147418111, got 1073741824 * 8",
        ),
        (
            {"op": "masked", "num_groups": 3},
            "m must be a multiple of num_groups for a masked problem, got 64 and 3",
        ),
        ({"op": "masked", "expected_m": 0}, "expected_m must be at least 1, got 0"),
        ({"expected_m": 1}, 'expected_m is for op "masked", not for "dense"'),
        ({"op": "ragged", "expected_m": 1}, 'expected_m is for op "masked", not for "ragged"'),
    ],
    ids=str,
)
def test_unsupported_groups(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        function(64, 8, 16, **options)
    assert str(raised.value) == f"{function.__name__}: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 2}, "num_groups must be 1 for a dense problem, got 2"),
        (
            {"op": OPS.index("masked"), "num_groups": 3},
            "m must be a multiple of num_groups for a masked problem, got 64 and 3",
        ),
        ({"expected_m": -1}, "expected_m must not be negative, got -1"),
        ({"expected_m": 2**62}, f"expected_m must be at most 2147418111, got {2**62}"),
    ],
    ids=str,
)
def test_native_side_does_not_rely_on_python(change: dict[str, int], message: str) -> None:
    # A custom call written by hand meets no other check.
    problem = Problem(op=0, num_groups=1, m=64, expected_m=0, n=8, k=16, num_sms=132)
    assert _native.why_unsupported(problem) == ""
    assert _native.why_unsupported(problem._replace(**change)) == message


def test_expected_m_is_kept_inside_a_group() -> None:
    def expected(m: int, expected_m: int | None) -> int:
        options = {"op": "masked", "num_groups": 4, "expected_m": expected_m}
        return check_problem("test", m, 8, 16, 132, **options).expected_m

    assert [expected(400, x) for x in (1, 99, 100, 101, 10**15)] == [1, 99, 100, 100, 100]
    assert expected(0, 7) == 1
    assert expected(400, None) == 0  # unknown: as many as there is room for


def test_selection_knows_how_many_rows_are_expected() -> None:
    options = {"op": "masked", "num_groups": 32}
    # Few rows in groups with room for many want smaller tiles.
    few = select_config(32 * 1024, 4096, 7168, **options, expected_m=8)
    all_of_them = select_config(32 * 1024, 4096, 7168, **options, expected_m=1024)
    assert few.block_m < all_of_them.block_m
    assert select_config(32 * 1024, 4096, 7168, **options) == all_of_them


SIZES = {"m": 64, "n": 8, "k": 16, "num_sms": 132, "num_groups": 1}


@pytest.mark.parametrize("function", [select_config, legal_configs])
@pytest.mark.parametrize("argument", SIZES)
def test_size_that_is_no_integer(function: Any, argument: str) -> None:
    for value in (64.5, "64", None):
        with pytest.raises(TypeError) as raised:
            function(**(SIZES | {argument: value}))
        message = f"{function.__name__}: {argument} must be an integer, got {value!r}"
        assert str(raised.value) == message
    for value in (10**30, -(10**30)):
        with pytest.raises(ValueError) as raised:
            function(**(SIZES | {argument: value}))
        bits = 32 if argument.startswith("num_") else 64
        message = f"{function.__name__}: {argument} must fit into {bits} bits, got {value}"
        assert str(raised.value) == message
    numpy_size = np.int64(SIZES[argument])
    assert function(**(SIZES | {argument: numpy_size})) == function(**SIZES)


# --- Legality ------------------------------------------------------------------------------------


def why_illegal(**changes: int) -> str:
    """What is wrong with PROBLEM and BASE after changes of their fields."""
    problem = {name: x for name, x in changes.items() if name in Problem._fields}
    config = {name: x for name, x in changes.items() if name not in problem}
    return _native.why_illegal(
        PROBLEM._replace(**problem), dataclasses.replace(BASE, **config).fields
    )


RULES: list[tuple[dict[str, int], str]] = [
    ({"block_m": 96}, "block_m must be 64, 128 or 256, got 96"),
    ({"block_m": 512}, "block_m must be 64, 128 or 256, got 512"),
    ({"math_warpgroups": 0}, "math_warpgroups must be 1 or 2, got 0"),
    ({"math_warpgroups": 3}, "math_warpgroups must be 1 or 2, got 3"),
    ({"block_n": 8}, "block_n must be a multiple of 8 between 16 and 256, got 8"),
    ({"block_n": 20}, "block_n must be a multiple of 8 between 16 and 256, got 20"),
    ({"block_n": 264}, "block_n must be a multiple of 8 between 16 and 256, got 264"),
    (
        {"block_n": 72, "math_warpgroups": 2},
        "block_n must be a multiple of 16 where two warpgroups split a tile's columns, got 72",
    ),
    (
        {"block_n": 200, "block_m": 128, "math_warpgroups": 2},
        "block_n must be a multiple of 16 where two warpgroups split a tile's columns, got 200",
    ),
    (
        {"cluster_m": 2, "cluster_n": 2},
        "only one of cluster_m, cluster_n and cluster_k may be above 1",
    ),
    (
        {"cluster_m": 2, "cluster_k": 2},
        "only one of cluster_m, cluster_n and cluster_k may be above 1",
    ),
    ({"cluster_m": 3}, "cluster_m must be 1 or 2, got 3"),
    ({"cluster_n": 4}, "cluster_n must be 1 or 2, got 4"),
    ({"cluster_k": 3}, "cluster_k must be 1, 2 or 4, got 3"),
    ({"cluster_k": 8}, "cluster_k must be 1, 2 or 4, got 8"),
    (
        {"cluster_k": 4, "num_sms": 3},
        "a cluster of 4 CTAs needs as many SMs, but num_sms is 3",
    ),
    (
        {"cluster_m": 2, "block_n": 72},
        "block_n must be a multiple of 16 with cluster_m = 2: each CTA loads whole 8-row groups, "
        "got 72",
    ),
    (
        {"cluster_k": 2, "block_m": 128},
        "cluster_k > 1 needs one wave of 64 rows per math warpgroup",
    ),
    (
        {"cluster_k": 4, "k": 384},
        "cluster_k must be at most the number of k-blocks (3), got 4",
    ),
    (
        {"block_m": 256, "block_n": 136, "math_warpgroups": 2},
        "a tile of 256x136 needs 204 accumulator registers per thread of 2 math warpgroups, "
        "the limit is 192",
    ),
    # Four waves of 64 rows each: the kernel has one or two.
    ({"block_m": 256}, "block_m must be at most 128 with one math warpgroup, got 256"),
    (
        {"block_n": 200},
        "a tile of 64x200 needs 200 accumulator registers per thread of 1 math warpgroups, "
        "the limit is 192",
    ),
    ({"num_stages": 1}, "num_stages must be between 2 and 32, got 1"),
    ({"num_stages": 33}, "num_stages must be between 2 and 32, got 33"),
    ({"raster_m": 0}, "raster_m must be between 1 and 1024, got 0"),
    ({"raster_m": 1025}, "raster_m must be between 1 and 1024, got 1025"),
    *[
        rule
        for op in range(1, len(OPS))
        for rule in [
            (
                {"op": op, "raster_m": 33},
                "raster_m must be at most 32 for grouped operations: a lane looks up each row, "
                "got 33",
            ),
            (
                {"op": op, "cluster_m": 2},
                "cluster_m must be 1 for grouped operations: CTAs that share B must work on one "
                "group, got 2",
            ),
        ]
    ],
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [pytest.param(*rule, id="-".join(f"{k}{v}" for k, v in rule[0].items())) for rule in RULES],
)
def test_rule(changes: dict[str, int], message: str) -> None:
    assert why_illegal() == ""
    assert why_illegal(**changes) == message


def test_rule_of_shared_memory() -> None:
    why = why_illegal(num_stages=16)
    assert why.startswith("num_stages must be small enough for ")
    assert f"{MAX_SMEM_BYTES} bytes of shared memory" in why
    assert why.endswith(", got 16")


def test_just_inside_the_rules() -> None:
    for changes in (
        {"block_n": 72},
        {"block_n": 80, "math_warpgroups": 2},
        {"block_n": 72, "block_m": 128, "math_warpgroups": 2},
        {"block_n": 80, "cluster_m": 2},
        {"block_n": 72, "cluster_n": 2},
        {"block_n": 192},
        {"block_n": 256, "math_warpgroups": 2, "num_stages": 3},
        {"block_m": 128, "block_n": 192, "math_warpgroups": 2},
        {"block_m": 128, "block_n": 256, "math_warpgroups": 2, "num_stages": 3},
        {"block_m": 256, "block_n": 128, "math_warpgroups": 2, "num_stages": 2},
        {"cluster_k": 4, "k": 512},
        {"cluster_k": 4, "num_sms": 4},
        {"num_stages": 2},
        {"num_stages": 12},
        {"raster_m": 1024},
        *[{"op": op, "raster_m": 32, "cluster_n": 2} for op in range(1, len(OPS))],
    ):
        assert why_illegal(**changes) == ""


def test_native_fields_are_in_the_order_of_the_dataclass() -> None:
    # Each rule names the field that it is about.
    bad = {
        "block_m": 96,
        "block_n": 8,
        "num_stages": 1,
        "math_warpgroups": 3,
        "cluster_m": 0,
        "cluster_n": 0,
        "cluster_k": 0,
        "raster_m": 0,
    }
    assert list(bad) == [field.name for field in dataclasses.fields(GemmConfig)]
    for name, value in bad.items():
        assert why_illegal(**{name: value}).startswith(f"{name} must be ")
        assert why_illegal(**{name: value}).endswith(f", got {value}")


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        GemmConfig,
        block_m=st.sampled_from([64, 128, 256]),
        block_n=st.integers(2, 32).map(lambda blocks: 8 * blocks),
        num_stages=st.integers(1, 33),
        math_warpgroups=st.sampled_from([1, 2]),
        cluster_m=st.sampled_from([1, 2]),
        cluster_n=st.sampled_from([1, 2]),
        cluster_k=st.sampled_from([1, 2, 4]),
        raster_m=st.integers(1, 64),
    ),
    st.integers(0, len(OPS) - 1),
)
def test_legal_configs_fit(config: GemmConfig, op: int) -> None:
    legal = _native.why_illegal(PROBLEM._replace(op=op), config.fields) == ""
    if legal:
        assert 0 < smem_bytes(config) <= MAX_SMEM_BYTES
    # The operation, the compiler and the rules agree.
    rejected = None
    try:
        _native.kernel_source(PROBLEM._replace(op=op), config.fields)
    except RuntimeError as error:
        rejected = str(error)
    assert legal == (rejected is None)


# Corners of what the rules allow and selection never asks for.
CORNERS = [
    GemmConfig(64, 192, 2, 1),
    GemmConfig(64, 256, 2, 2),
    GemmConfig(64, 16, 16, 1, raster_m=1),
    GemmConfig(64, 16, 2, 2, cluster_k=4),
    GemmConfig(64, 128, 4, 1, cluster_k=2),
    GemmConfig(128, 64, 2, 1, cluster_m=2),
    GemmConfig(128, 128, 2, 1),
    GemmConfig(128, 128, 2, 2, cluster_k=2),
    GemmConfig(128, 24, 2, 2, cluster_n=2),
    GemmConfig(128, 208, 2, 2),
    GemmConfig(128, 256, 3, 2, cluster_m=2),
    GemmConfig(256, 128, 2, 2, cluster_m=2),
]


@pytest.mark.parametrize("config", CORNERS, ids=lambda c: "-".join(map(str, c.fields)))
def test_what_is_legal_compiles(config: GemmConfig) -> None:
    assert _native.why_illegal(PROBLEM, config.fields) == ""
    report = ffi.compile_kernel(PROBLEM.n, PROBLEM.k, config)
    assert (report.spill_bytes, report.stack_bytes) == (0, 0)
    assert not report.wgmma_serialized
    assert report.smem_bytes == smem_bytes(config)


@pytest.mark.parametrize("config", [GemmConfig(64, 64, 4, 1), GemmConfig(128, 128, 5, cluster_m=2)])
def test_rows_that_fill_no_tile_have_a_kernel_of_their_own(config: GemmConfig) -> None:
    full, part = (
        [ffi.compile_kernel(776, 1040, config, m=m) for m in ms]
        for ms in (
            (1, config.block_m, 5 * config.block_m),
            (config.block_m + 1, 5 * config.block_m - 1),
        )
    )
    assert len({report.path for report in full}) == len({report.path for report in part}) == 1
    assert part[0].name == full[0].name.replace("_dense_", "_dense_parts_")
    for report in (full[0], part[0]):
        assert (report.spill_bytes, report.stack_bytes) == (0, 0)
        assert not report.wgmma_serialized


WIDE = GemmConfig(128, 256, 3, cluster_m=2)


@pytest.mark.parametrize(
    ("problem", "config", "grid"),
    [
        ({"m": 4096, "n": 4096, "k": 7168}, WIDE, 128),  # 256 clusters of tiles: 4 x 64
        ({"m": 4096, "n": 7168, "k": 2048}, WIDE, 128),  # 448: 7 x 64
        ({"m": 4096, "n": 7168, "k": 1920}, WIDE, 132),  # few k-blocks: all SMs
        ({"m": 4096, "n": 2112, "k": 7168}, GemmConfig(128, 192, 4), 132),  # no such tall tiles
        ({"m": 256, "n": 512, "k": 7168}, WIDE, 4),
        ({"m": 0, "n": 512, "k": 7168}, WIDE, 0),
        # Only the device knows how many tiles there are.
        (
            {"m": 8192, "n": 4096, "k": 7168, "op": "contiguous", "num_groups": 4},
            GemmConfig(256, 128, 3),
            132,
        ),
    ],
)
def test_grid(problem: dict[str, Any], config: GemmConfig, grid: int) -> None:
    fields = check_problem("test_grid", num_sms=132, **problem)
    assert _native.grid_size(fields, config.fields) == grid


def test_two_rows_of_tiles_do_not_split_k_on_an_h200() -> None:
    """Where they did, an H200 took 10 to 20 % longer than estimated; one row of tiles may."""
    for n, k in ((7168, 16384), (4096, 7168)):
        selected = select_config(128, n, k, memory_gbs=H200_MEMORY_GBS)
        assert selected.block_m == 128 or selected.cluster_k == 1


def test_128_rows_on_an_h200() -> None:
    """What was up to 14 % faster there than what selection took before."""
    one_tile_for_all_rows = select_config(128, 2112, 7168, memory_gbs=H200_MEMORY_GBS)
    assert one_tile_for_all_rows.fields[:2] == (128, 32) and one_tile_for_all_rows.cluster_k == 2
    # Estimated to take as long as 128 x 64, which is 7 % slower.
    wide = select_config(128, 24576, 1536, memory_gbs=H200_MEMORY_GBS)
    assert wide.fields[:2] == (64, 128) and wide.math_warpgroups == 2


def widths_between(m: int, n: int, k: int) -> set[int]:
    """Widths of candidates whose tiles begin anywhere in a block of 128 columns."""
    widths = {config.block_n for config in legal_configs(m, n, k)}
    return {width for width in widths if width > 16 and width % 32 != 0}


def test_widths_between_even_out_rounds() -> None:
    # 3 rounds of 352 tiles of 128x192 have 44 tiles to spare, of 384 of 128x176 12.
    assert select_config(4096, 2112, 7168).block_n == 176
    assert widths_between(4096, 2112, 7168) == {144, 176}
    # Too few k-blocks for a loop for each offset.
    assert widths_between(4096, 2112, 11 * 128) == set()
    assert widths_between(4096, 2112, 12 * 128) == {144, 176}
    # 6 rounds of 99 x 8 tiles, 7 of 100 x 8.
    assert 176 in widths_between(99 * 128, 8 * 176, 7168)
    assert 176 not in widths_between(100 * 128, 8 * 176, 7168)
    # Where all tiles run at once, and those of 128 columns do, too, they are sooner done.
    assert 144 not in widths_between(256, 8192, 8192)
    assert 144 in widths_between(256, 9216, 8192)


def test_128x256_is_preferred_to_its_transpose() -> None:
    for rows, sharing in ((4096, 1), (16384, 2)):  # B: where CTAs have time to drift apart
        selected = select_config(rows, 4096, 7168, num_sms=132)
        assert (selected.block_m, selected.block_n, selected.cluster_m) == (128, 256, sharing)


def swath_rows(m: int, n: int, k: int, config: tuple[int, ...], **grouping: Any) -> int:
    """The height of swaths that selection gives these tiles."""
    for candidate in _native.candidates(check_problem("test", m, n, k, 132, **grouping)):
        if (*candidate[:2], *candidate[4:7]) == config:
            return int(candidate[-1])
    raise AssertionError("no candidate")


def test_swaths() -> None:
    plain, shared = (128, 256, 1, 1, 1), (128, 256, 2, 1, 1)
    # 32 CTAs, or all clusters, make a square: 8 x 4 tiles of 128 x 256, 8 x 8 of 256 x 256.
    # Clusters that share have a multiple of the 8 GPCs: 8, not 7 x 10 tiles of 256 x 192.
    assert swath_rows(4096, 7168, 7168, plain) == swath_rows(4096, 7168, 7168, shared) == 8
    assert swath_rows(8192, 7168, 7168, (128, 192, 2, 1, 1)) == 8
    # 18 rows of tiles make three even swaths.
    assert swath_rows(18 * 128, 7168, 16384, plain) == 6
    # A of all rows stays in L2.
    assert swath_rows(4096, 7168, 2048, plain) == 32
    # Whole groups of 2 rows of tiles: all CTAs would make a square at 10 and 13.
    masked = {"op": "masked", "num_groups": 4, "expected_m": 200}
    assert swath_rows(1024, 3072, 5120, (128, 96, 1, 1, 1), **masked) == 10
    assert swath_rows(1024, 3072, 5120, (128, 160, 1, 1, 1), **masked) == 12


def split_k_height(rows: int, columns: int, block_m: int, block_n: int, k: int) -> int:
    """The height for which the clusters of a GPC, every eighth, ask for the fewest rows."""
    clusters = min(rows * columns, 66)
    stays = rows * columns <= clusters or columns * block_n * k <= 1 << 25
    heights = [1, 2, 4, 8, 16, 32]
    heights = [height for height in heights if height < 2 * min(rows, 32)]
    heights = heights[1 if rows > 1 else 0 :] if stays else heights[-1:]

    def asked_for(height: int) -> int:
        tiles = [
            (top + row, column)
            for top in range(0, rows, height)
            for column in range(columns)
            for row in range(min(height, rows - top))
        ]
        total = 0
        for gpc in range(8):
            mine = tiles[gpc:clusters:8]
            total += block_m * len({row for row, _ in mine})
            total += block_n * len({column for _, column in mine})
        return total

    return min(heights, key=asked_for)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 12, 16, 31, 33, 64])
@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (64, 128), (128, 64), (128, 160)])
def test_swaths_of_split_k(rows: int, block_m: int, block_n: int) -> None:
    tiles = (block_m, block_n, 1, 1, 2)
    for columns in (1, 3, 4, 7, 8, 16, 33, 66, 100):
        m, n = rows * block_m, columns * block_n
        expected = split_k_height(rows, columns, block_m, block_n, 7168)
        assert swath_rows(m, n, 7168, tiles) == expected, (m, n)


def test_swaths_of_split_k_that_were_timed() -> None:
    """On an H200: 5 to 28 % faster than one swath, or than rows of tiles one by one."""
    assert swath_rows(1024, 1024, 7168, (128, 128, 1, 1, 2)) == 2
    assert swath_rows(512, 2112, 7168, (128, 64, 1, 1, 2)) == 2
    assert swath_rows(2048, 576, 7168, (128, 160, 1, 1, 2)) == 4
    # B, 117 MB, would not stay in L2 from one swath to the next.
    assert swath_rows(256, 7168, 16384, (128, 128, 1, 1, 2)) == 2
    assert swath_rows(256, 7168, 16384, (64, 224, 1, 1, 2)) == 4


def test_a_wave_that_queues_has_a_stage_more() -> None:
    """Weights in flight, 6.3 MB on an H100, are 7 stages of 112 tiles of 64 x 64."""
    assert select_config(64, 7168, 2048, num_sms=132).num_stages == 8


# --- The dataclass -------------------------------------------------------------------------------


def test_config_is_a_value() -> None:
    config = select_config(PROBLEM.m, PROBLEM.n, PROBLEM.k)
    assert GemmConfig(*config.fields) == config
    assert hash(GemmConfig(*config.fields)) == hash(config)
    assert config != dataclasses.replace(config, raster_m=config.raster_m + 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_m = 64  # type: ignore[misc]
    assert all(type(field) is int for field in config.fields)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GemmConfig)])
def test_field_that_is_no_integer(field: str) -> None:
    for value in ("96", 96.0, None):
        with pytest.raises(TypeError) as raised:
            dataclasses.replace(BASE, **{field: value})  # type: ignore[arg-type]
        assert str(raised.value) == f"GemmConfig: {field} must be an integer, got {value!r}"
    for value in (2**40, -(2**31) - 1):
        with pytest.raises(ValueError) as raised:
            dataclasses.replace(BASE, **{field: value})
        assert str(raised.value) == f"GemmConfig: {field} must fit into 32 bits, got {value}"
    # NumPy's integers become Python's, which JSON can hold.
    config = dataclasses.replace(BASE, **{field: np.int64(getattr(BASE, field))})
    assert config == BASE
    assert all(type(value) is int for value in config.fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GemmConfig(-64, 64, 4), "block_m must be 64, 128 or 256, got -64"),
        (GemmConfig(64, 63, 4), "block_n must be a multiple of 8 between 16 and 256, got 63"),
        (GemmConfig(64, 64, -4), "num_stages must be between 2 and 32, got -4"),
        (GemmConfig(64, 64, 4, cluster_k=0), "cluster_k must be 1, 2 or 4, got 0"),
        (
            GemmConfig(128, 128, 8),
            "num_stages must be small enough for 232448 bytes of shared memory "
            "(this needs N), got 8",
        ),
    ],
    ids=str,
)
def test_smem_bytes_of_no_kernel(config: GemmConfig, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        smem_bytes(config)
    # The number of bytes is the layout's, of which this test knows nothing.
    said = re.sub(r"needs \d+", "needs N", str(raised.value))
    assert said == f"smem_bytes: config: {message}"


def test_smem_bytes_of_another_thing() -> None:
    with pytest.raises(TypeError) as raised:
        smem_bytes(BASE.fields)  # type: ignore[arg-type]
    assert str(raised.value) == "smem_bytes: config must be a GemmConfig, got tuple"


def test_smem_bytes_needs_no_problem() -> None:
    # A config that only a large k or many SMs allow.
    assert smem_bytes(dataclasses.replace(BASE, cluster_k=4)) > smem_bytes(BASE)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((2113, 512, BASE), ValueError, "n must be a positive multiple of 8, got 2113"),
        ((512, 24, BASE), ValueError, "k must be a positive multiple of 16, got 24"),
        ((512.0, 512, BASE), TypeError, "n must be an integer, got 512.0"),
        (
            (512, 512, GemmConfig(96, 64, 4)),
            ValueError,
            "config: block_m must be 64, 128 or 256, got 96",
        ),
        (
            (512, 384, dataclasses.replace(BASE, cluster_k=4)),
            ValueError,
            "config: cluster_k must be at most the number of k-blocks (3), got 4",
        ),
        ((512, 512, None), TypeError, "config must be a GemmConfig, got NoneType"),
    ],
    ids=str,
)
def test_compile_kernel_of_no_kernel(
    arguments: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as raised:
        ffi.compile_kernel(*arguments)
    assert str(raised.value) == f"compile_kernel: {message}"


def test_sources_of_a_kernel_are_its_own() -> None:
    """A change to a quantiser does not change the cache key of a GEMM."""
    _, headers = _native.kernel_source(PROBLEM, BASE.fields)
    included = {"gemm.cuh"}
    for text in headers.values():
        included.update(re.findall(r'^#include "(.+)"', text, re.MULTILINE))
    assert set(headers) == included


def test_smem_bytes_counts_the_rings() -> None:
    # One more stage: A and B in fp8, SFA and SFB in float32, which tile it is, and two barriers.
    deeper = dataclasses.replace(BASE, num_stages=BASE.num_stages + 1)
    scales = BASE.block_m * 4 + 4 * 4
    stage = (BASE.block_m + BASE.block_n) * 128 + scales + 4 * 4 + 2 * 8
    assert smem_bytes(deeper) - smem_bytes(BASE) == stage
    assert jax_deepgemm.smem_bytes is smem_bytes


def test_memory_rate_decides_how_deep_rings_are() -> None:
    slow = select_config(64, 7168, 16384)
    fast = select_config(64, 7168, 16384, memory_gbs=H200_MEMORY_GBS)
    assert slow.num_stages < fast.num_stages
    shallow = dataclasses.replace(fast, num_stages=slow.num_stages)
    assert shallow == slow, "nothing else differs here"


@pytest.mark.parametrize("memory_gbs", [0, -1])
def test_memory_rate_is_positive(memory_gbs: int) -> None:
    with pytest.raises(ValueError) as raised:
        select_config(64, 256, 512, memory_gbs=memory_gbs)
    assert str(raised.value) == f"select_config: memory_gbs must be at least 1, got {memory_gbs}"
