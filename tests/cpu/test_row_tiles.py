"""How the kernel cuts rows into tiles, against a few lines of Python.

The device code itself, compiled for the CPU with fibers for the lanes of its warp
(tests/row_tiles_emulation.cc): up to thousands of groups, which a GPU test has no room for.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np
import pytest

SOURCE = pathlib.Path(__file__).parents[1] / "row_tiles_emulation.cc"
CONTIGUOUS, MASKED, RAGGED = 1, 2, 3  # csrc/kernels/grouping.h
ZERO, MULTIPLY, MULTIPLY_MASK = 1, 2, 3  # TileKind
ALIGNMENT = 128


class Tile(NamedTuple):
    m: int
    rows: int
    group: int
    kind: int


@functools.cache
def program(grouping: int, block_m: int, raster_m: int) -> pathlib.Path:
    """The emulation for one kernel's constants."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = pathlib.Path(tempfile.mkdtemp()) / "row_tiles"
    constants = {"GROUPING": grouping, "BLOCK_M": block_m, "RASTER_M": raster_m}
    defines = [f"-D{name}={value}" for name, value in constants.items()]
    command = [compiler, "-std=c++20", "-O1", *defines, "-o", str(path), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def search(
    kernel: tuple[int, int, int], params: list[int], groups: list[int], detail: int = 0
) -> tuple[list[Tile], int]:
    """All row tiles as the device code finds them, and how many of them multiply."""
    numbers = [*params, len(groups), *groups, detail]
    done = subprocess.run(
        [program(*kernel)],
        input=" ".join(map(str, numbers)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    count, multiply_count = map(int, head.split())
    tiles = [Tile(*map(int, line.split())) for line in lines]
    assert len(tiles) == count
    return tiles, multiply_count


def cut(m: int, rows: int, group: int, kind: int, block_m: int) -> list[Tile]:
    return [Tile(m + i, rows - i, group, kind) for i in range(0, max(rows, 0), block_m)]


KERNELS = [(64, 8), (128, 3), (256, 32)]  # block_m, raster_m
GROUPS = [1, 31, 33, 300, 1025, 3000]


@pytest.mark.parametrize(("block_m", "raster_m"), KERNELS)
@pytest.mark.parametrize("num_groups", GROUPS)
@pytest.mark.parametrize("fill", [0, 1])
def test_masked(num_groups: int, fill: int, block_m: int, raster_m: int) -> None:
    rng = np.random.default_rng([num_groups, block_m])
    max_m = 300
    counts = rng.choice([-7, 0, 1, 64, 129, 299, 300, 999], num_groups).tolist()
    params = [num_groups * max_m, num_groups, 0, max_m, fill]
    tiles, multiply_count = search((MASKED, block_m, raster_m), params, counts)
    valid = np.clip(counts, 0, max_m).tolist()
    wanted = [tile for g, n in enumerate(valid) for tile in cut(g * max_m, n, g, MULTIPLY, block_m)]
    assert multiply_count == len(wanted)
    if fill:
        for g, n in enumerate(valid):
            wanted += cut(g * max_m + n, max_m - n, g, ZERO, block_m)
    assert tiles == wanted


@pytest.mark.parametrize(("block_m", "raster_m"), KERNELS)
@pytest.mark.parametrize("num_groups", GROUPS)
@pytest.mark.parametrize("sizes", ["small", "mostly empty", "too many rows"])
@pytest.mark.parametrize("offset", [0, 3, -2])
def test_ragged(num_groups: int, sizes: str, offset: int, block_m: int, raster_m: int) -> None:
    rng = np.random.default_rng([num_groups, block_m, len(sizes)])
    num_sizes = num_groups + 4
    choices = {
        "small": [0, 1, 10, 70],
        "mostly empty": [0] * 40 + [500],
        "too many rows": [-5, 0, 900, 2**31 - 1],
    }[sizes]
    group_sizes = rng.choice(choices, num_sizes).tolist()
    m = int(np.clip(group_sizes, 0, 1000).sum()) + 77
    tiles, multiply_count = search(
        (RAGGED, block_m, raster_m), [m, num_groups, num_sizes, 0, 0], group_sizes, offset
    )
    ends = np.minimum(np.cumsum(np.clip(np.array(group_sizes, np.int64), 0, m)), m).tolist()
    starts = [0, *ends[:-1]]
    wanted = []
    for group in range(num_groups):
        index = group + offset
        if 0 <= index < num_sizes:
            rows = ends[index] - starts[index]
            wanted += cut(starts[index], rows, group, MULTIPLY, block_m)
    assert multiply_count == len(wanted)
    behind = ends[min(num_groups + offset, num_sizes) - 1] if num_groups + offset > 0 else 0
    before = starts[offset] if offset > 0 else 0
    wanted += cut(behind, m - behind, num_groups, ZERO, block_m)
    wanted += cut(0, before, num_groups + 1, ZERO, block_m)
    assert tiles == wanted


@pytest.mark.parametrize(("block_m", "raster_m"), KERNELS)
@pytest.mark.parametrize("blocks", [1, 2, 63, 64, 65, 1000, 2051])
def test_contiguous(blocks: int, block_m: int, raster_m: int) -> None:
    """Blocks of 128 rows: the group twice, plus 1 where there is padding; -1 without a group."""
    rng = np.random.default_rng([blocks, block_m])
    m = blocks * ALIGNMENT - 5
    groups = np.sort(rng.integers(0, 7, blocks))
    block_groups = np.where(
        rng.random(blocks) < 0.3, -1, 2 * groups + (rng.random(blocks) < 0.2)
    ).tolist()
    params = [m, 7, 0, 0, 0]
    tiles, multiply_count = search((CONTIGUOUS, block_m, raster_m), params, block_groups)
    # Rows of the tiles, one by one, whatever the cut.
    height = min(block_m, ALIGNMENT)
    kinds: dict[int, tuple[int, int]] = {}
    for i, tile in enumerate(tiles):
        assert (tile.kind == ZERO) == (i >= multiply_count)
        for row in range(tile.m, tile.m + min(tile.rows, block_m), height):
            assert row not in kinds, "a row has two tiles"
            kinds[row] = (tile.kind, tile.group)
    for row in range(0, m, height):
        value = block_groups[row // ALIGNMENT]
        kind, group = kinds[row]
        if value >= 0:
            assert group == value >> 1
            assert kind in ((MULTIPLY_MASK,) if value & 1 else (MULTIPLY, MULTIPLY_MASK))
        else:
            assert kind in (ZERO, MULTIPLY_MASK)
    assert len(kinds) == -(-m // height)
