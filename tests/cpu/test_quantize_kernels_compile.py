"""Every kernel of the quantisers compiles to sound sm_90a code; no GPU is needed.

The kernel is specialised to the operation, the types and a few properties of the sizes, so a
handful of sizes of each gives all of them.
"""

import concurrent.futures
import itertools
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import cuda.pathfinder
import numpy as np
import pytest

from jax_deepgemm.ffi import _native
from jax_deepgemm.quantize_call import INPUT_TYPES, OPS, OUTPUT_TYPES, QuantizeProblem

SIZED = ("quantize_per_token", "silu_mul_quantize")
# rows and k: a full GPU, a few tiles of one or two widths, then sizes without wide loads or stores.
SIZES = [(4096, 7168), (512, 2560), (64, 1024), (4096, 7170), (64, 130), (4097, 7168), (65, 130)]


def problems() -> dict[str, QuantizeProblem]:
    """One problem for each kernel, by its name."""
    found: dict[str, QuantizeProblem] = {}
    for op, x, out, power_of_two, (rows, k), sizes in itertools.product(
        range(len(OPS)), range(len(INPUT_TYPES)), range(len(OUTPUT_TYPES)), (0, 1), SIZES, (0, 3)
    ):
        if sizes == 0 or OPS[op] in SIZED:
            problem = QuantizeProblem(op, x, out, power_of_two, 1, rows, k, sizes)
            found.setdefault(_native.quantize_kernel_name(problem), problem)
    return found


PROBLEMS = problems()


def build(name: str) -> dict[str, Any]:
    text, headers = _native.quantize_kernel_source(PROBLEMS[name])
    return _native.jit_compile(name, name, text, headers)


@pytest.fixture(scope="module")
def builds() -> Iterator[dict[str, concurrent.futures.Future[dict[str, Any]]]]:
    """All kernels, compiling in threads."""
    try:
        cuda.pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except cuda.pathfinder.DynamicLibNotFoundError:
        assert "CI" not in os.environ, "continuous integration must have NVRTC"
        pytest.skip("NVRTC is not installed (pip install 'jax_deepgemm[test]' brings it)")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(build, name) for name in PROBLEMS}
        pool.shutdown(cancel_futures=True)


def test_every_variant_is_here() -> None:
    names = "\n".join(PROBLEMS)
    for part in ("_g1", "_g2", "_g4", "_pow2", "_sizes", "_oddk", "_oddm", "_f16_", "_e5m2"):
        assert part in names
    # Widths of tiles 4, 2, 1 of tokens and 2, 1 of SwiGLU, with and without sizes and wide loads;
    # wide loads or not of blocks; those and wide stores or not of the two that transpose.
    assert len(PROBLEMS) == 3 * 2 * 2 * (3 * 2 * 2 + 2 * 2 * 2 + 2 + 2 * 4) - 3 * 4 * 2 * 1 * 2


@pytest.mark.parametrize("name", PROBLEMS)
def test_resources(name: str, builds: dict[str, concurrent.futures.Future[dict[str, Any]]]) -> None:
    result = builds[name].result()
    resources = result["resources"]
    assert resources["spill_bytes"] == 0, result["log"]
    assert resources["stack_bytes"] == 0, result["log"]
    # Blocks of 256 threads share an SM's 65536 registers, which come in eights a thread.
    blocks = re.search(r"kMinBlocks = (\d)", _native.quantize_kernel_source(PROBLEMS[name])[0])
    assert blocks is not None
    registers = -(-resources["registers"] // 8) * 8
    assert 0 < registers * 256 * int(blocks[1]) <= 65536
    assert re.search(r"\b\d+ bytes smem\b", result["log"]), "static shared memory is used"


@pytest.mark.parametrize("op", OPS)
def test_loads_are_wide_and_come_first(
    op: str,
    builds: dict[str, concurrent.futures.Future[dict[str, Any]]],
    tmp_path: pathlib.Path,
) -> None:
    disassembler = cuda.pathfinder.find_nvidia_binary_utility("nvdisasm")
    if disassembler is None:
        assert "CI" not in os.environ, "continuous integration must have nvdisasm"
        pytest.skip("nvdisasm is not installed (pip install 'jax_deepgemm[test]' brings it)")
    name = next(name for name in PROBLEMS if name.startswith(f"dg_{op}_bf16_"))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(builds[name].result()["image"])
    done = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True)
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([\w.]+)", done.stdout, re.MULTILINE)
    loads = [i for i, opcode in enumerate(opcodes) if opcode.startswith("LDG")]
    # Eight times 16 bytes a lane, and no other load; nothing is used before all are under way.
    assert len(loads) == 8
    assert all(".128" in opcodes[i] for i in loads)
    used = [i for i, opcode in enumerate(opcodes) if opcode.startswith(("FMNMX", "F2FP", "SHFL"))]
    assert loads[-1] < used[0]
    stores = {opcode for opcode in opcodes if opcode.startswith("STG")}
    assert any(".64" in store or ".128" in store for store in stores)
    assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("op", 5, "there is no op 5"),
        ("input", -1, "there is no input -1"),
        ("output", 2, "there is no output 2"),
        ("rows", -1, "sizes must not be negative"),
        ("rows", 2**31 - 1, "there are too many rows or columns"),
        ("k", 2**31, "there are too many rows or columns"),
        ("batch", 2**40, "there are too many rows or columns"),
    ],
)
def test_impossible_problems(field: str, value: int, message: str) -> None:
    problem = QuantizeProblem(0, 0, 0, 0, 1, 64, 128, 0)._replace(**{field: value})
    with pytest.raises(_native.Error, match=message):
        _native.quantize_kernel_name(problem)


def test_only_tokens_take_sizes() -> None:
    with pytest.raises(_native.Error, match="only tokens take sizes"):
        _native.quantize_kernel_name(QuantizeProblem(1, 0, 0, 0, 1, 64, 128, 3))


@pytest.mark.parametrize(
    ("op", "rows", "k", "grid"),
    [
        ("quantize_per_token", 4096, 7168, 128 * 14),
        ("quantize_per_token", 64, 7168, 2 * 56),
        ("quantize_per_token", 0, 7168, 0),
        ("quantize_per_token", 33, 129, 2 * 2),
        ("silu_mul_quantize", 4096, 2048, 128 * 8),
        ("quantize_per_block", 4097, 7168, 33 * 56),
        ("quantize_per_token_both", 128, 130, 1 * 2),
    ],
)
def test_grid(op: str, rows: int, k: int, grid: int) -> None:
    problem = QuantizeProblem(OPS.index(op), 0, 0, 0, 1, rows, k, 0)
    assert _native.quantize_grid_size(problem, 132) == grid
    three = np.array(problem._replace(batch=3))
    assert _native.quantize_grid_size(three, 132) == 3 * grid or op in SIZED


def test_grid_with_sizes() -> None:
    """A CTA a tile, but no more than a GPU holds at twice: three or four an SM here."""
    for op, rows, grid in [
        ("quantize_per_token", 64, 3 * 2 * 56),
        ("quantize_per_token", 2**20, 132 * 3 * 2),
        ("silu_mul_quantize", 2**20, 132 * 4 * 2),
    ]:
        problem = QuantizeProblem(OPS.index(op), 0, 0, 0, 3, rows, 7168, 1)
        assert _native.quantize_grid_size(problem, 132) == grid
