"""The FFMA interleaver on cubins from NVRTC: what it changes, and all that it must not change."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda.pathfinder
import pytest

from jax_deepgemm.ffi import _native
from jax_deepgemm.ffi.toolchain import toolchain
from tests.jit_process import GEMM, nvrtc, run, run_package

# 128 bits, little endian: opcode 11-0, destination 23-16, operands 31-24, 39-32 and 71-64,
# yield 109 (0 = yield), reuse 125-122.
FFMA = 0x223
OPCODE = 0xFFF
NO_YIELD = 1 << 109
REUSE = 0xF << 122
PERIOD = 7

# Promotion as in a GEMM: two scales of a thread, each for half of its partial sums, here kept in
# registers. Without wgmma ptxas leaves the yield bits alone.
PROMOTE = """
extern "C" __global__ void __launch_bounds__(256) promote(float* x, const float* s) {
  float total[64], part[64];
  for (int i = 0; i < 64; ++i) part[i] = total[i] = x[i * 256 + threadIdx.x];
#pragma unroll 1
  for (int k = 0; k < 1000; ++k) {
    __syncthreads();
    float s0 = s[2 * k], s1 = s[2 * k + 1];
    for (int i = 0; i < 64; ++i) total[i] += (i & 2 ? s1 : s0) * part[i];
  }
  for (int i = 0; i < 64; ++i) x[i * 256 + threadIdx.x] = total[i];
}
extern "C" __global__ void __launch_bounds__(256) few(float* x, float a, float b) {
  float v[8];
  for (int i = 0; i < 8; ++i) v[i] = x[i * 256 + threadIdx.x];
#pragma unroll 1
  for (int k = 0; k < 1000; ++k) {
    __syncthreads();
    for (int i = 0; i < 8; ++i) v[i] = v[i] * a + b;
  }
  for (int i = 0; i < 8; ++i) x[i * 256 + threadIdx.x] = v[i];
}
"""


@pytest.fixture(scope="module")
def promotion(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """PROMOTE as NVRTC compiles it: its run does not alternate."""
    nvrtc()
    cache = tmp_path_factory.mktemp("cache")
    body = f"print(native.jit_compile('promote', 'promote', '''{PROMOTE}''', {{}})['image'].hex())"
    return bytes.fromhex(run(body, cache, DG_DISABLE_FFMA_INTERLEAVE="1").stdout)


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """GEMM as NVRTC compiles it."""
    nvrtc()
    cache = tmp_path_factory.mktemp("cache")
    body = GEMM + "print(image.hex())"
    return bytes.fromhex(run_package(body, cache, DG_DISABLE_FFMA_INTERLEAVE="1").stdout)


def words(image: bytes, offset: int, count: int) -> list[int]:
    """`count` instructions from a byte offset."""
    return [
        int.from_bytes(image[offset + 16 * i : offset + 16 * (i + 1)], "little")
        for i in range(count)
    ]


def text_section(image: bytes, kernel: str) -> tuple[int, int]:
    """The file offset and size of a kernel's code, from the ELF section headers."""
    table = int.from_bytes(image[0x28:0x30], "little")
    count = int.from_bytes(image[0x3C:0x3E], "little")
    names_index = int.from_bytes(image[0x3E:0x40], "little")
    headers = [image[table + 64 * i : table + 64 * (i + 1)] for i in range(count)]
    offsets = [int.from_bytes(header[24:32], "little") for header in headers]
    for header, offset in zip(headers, offsets, strict=True):
        name = image[offsets[names_index] + int.from_bytes(header[:4], "little") :]
        if name.startswith(f".text.{kernel}\0".encode()):
            return offset, int.from_bytes(header[32:40], "little")
    raise AssertionError(f"no code of {kernel}")


def run_offset(image: bytes, ffmas: dict[str, Any]) -> int:
    """The file offset of a run."""
    start, _ = text_section(image, ffmas["section"].removeprefix(".text."))
    return start + int(ffmas["offset"])


def instructions(image: bytes, ffmas: dict[str, Any]) -> list[int]:
    """Those of a run."""
    return words(image, run_offset(image, ffmas), ffmas["length"])


def yields(ffma: int) -> bool:
    return not ffma & NO_YIELD


def shared_slots(ffma: int, following: int) -> int:
    """Reuse bits of the operands, but the first one's result, that two instructions share."""
    bits = 0
    for slot, position in enumerate((24, 32, 64)):
        operand = ffma >> position & 0xFF
        if operand not in (255, ffma >> 16 & 0xFF) and operand == following >> position & 0xFF:
            bits |= 1 << (122 + slot)
    return bits


def long_runs(cubin: bytes) -> tuple[bytes, list[dict[str, Any]]]:
    """The cubin after the pass, and the runs that it rewrote."""
    image, runs = _native.interleave(cubin)
    return image, [ffmas for ffmas in runs if ffmas["alternates"]]


def test_ptxas_alternates_kernels_with_two_math_warpgroups(cubin: bytes) -> None:
    # What the pass is for. A compiler that no longer does has to be measured anew.
    _, runs = long_runs(cubin)
    newer = {"13.5": [64, 62]}  # NVRTC 13.5 puts one more instruction among a loop's additions
    lengths = newer.get(toolchain().version, [64, 63])
    assert [ffmas["length"] for ffmas in runs] == lengths
    for ffmas in runs:
        assert 0.4 < ffmas["yield_before"] / ffmas["length"] < 0.6


def test_one_in_seven_yields_afterwards(cubin: bytes) -> None:
    image, runs = long_runs(cubin)
    for ffmas in runs:
        assert ffmas["length"] >= 16
        yielding = [i for i, word in enumerate(instructions(image, ffmas)) if yields(word)]
        assert yielding == list(range(PERIOD - 1, ffmas["length"], PERIOD))
        assert ffmas["yield_after"] == len(yielding)
        assert ffmas["yield_before"] == sum(map(yields, instructions(cubin, ffmas)))


def test_shared_operands_are_kept_up_to_the_next_yield(cubin: bytes) -> None:
    image, runs = long_runs(cubin)
    for ffmas in runs:
        before, after = instructions(cubin, ffmas), instructions(image, ffmas)
        for word, following in itertools.pairwise(after):
            assert word & REUSE == (0 if yields(word) else shared_slots(word, following))
        if ffmas["length"] % PERIOD == 0:
            assert after[-1] & REUSE == 0
        for field, words_ in (("reuse_before", before), ("reuse_after", after)):
            assert ffmas[field] == sum(bool(word & REUSE) for word in words_)
        assert ffmas["reuse_after"] > ffmas["reuse_before"]


@pytest.mark.parametrize("reuse", [0, 1 << 123])
def test_last_of_a_run_keeps_what_the_compiler_says(reuse: int, cubin: bytes) -> None:
    # What comes after it is no FFMA.
    _, runs = long_runs(cubin)
    ffmas = next(ffmas for ffmas in runs if ffmas["length"] % PERIOD != 0)
    offset = run_offset(cubin, ffmas) + 16 * (ffmas["length"] - 1)
    word = words(cubin, offset, 1)[0] & ~REUSE | reuse
    changed = cubin[:offset] + word.to_bytes(16, "little") + cubin[offset + 16 :]
    image, _ = _native.interleave(changed)
    assert words(image, offset, 1)[0] & REUSE == reuse


@pytest.mark.parametrize("what", ["result", "zero"])
def test_not_kept(what: str, cubin: bytes) -> None:
    # An FFMA that writes the register that the next one multiplies with, and two that multiply with
    # register 255, which is zero and is not read.
    _, (ffmas, *_) = long_runs(cubin)
    offset = run_offset(cubin, ffmas)
    first, second = words(cubin, offset, 2)
    assert shared_slots(first, second) == 1 << 123
    if what == "result":
        first = first & ~(0xFF << 16) | (first >> 32 & 0xFF) << 16
    else:
        first, second = first | 0xFF << 32, second | 0xFF << 32
    changed = b"".join(word.to_bytes(16, "little") for word in (first, second))
    image, _ = _native.interleave(cubin[:offset] + changed + cubin[offset + 32 :])
    assert words(image, offset, 1)[0] & REUSE == 0


def test_runs_that_do_not_alternate_stay(promotion: bytes) -> None:
    image, runs = _native.interleave(promotion)
    assert image == promotion
    assert sum(ffmas["length"] for ffmas in runs) >= 48
    for ffmas in runs:
        assert ffmas["section"] == ".text.promote"
        assert not ffmas["alternates"]
        assert ffmas["yield_before"] == ffmas["yield_after"]
        assert ffmas["reuse_before"] == ffmas["reuse_after"] > 0


def test_nothing_but_yield_and_reuse_bits_of_the_runs_changes(cubin: bytes) -> None:
    image, runs = long_runs(cubin)
    assert image != cubin
    assert len(image) == len(cubin)
    expected = bytearray(image)
    for ffmas in runs:
        start = run_offset(image, ffmas)
        for offset in range(start, start + 16 * ffmas["length"], 16):
            (old,), (new,) = words(cubin, offset, 1), words(image, offset, 1)
            assert old & OPCODE == FFMA
            assert (old ^ new) & ~(NO_YIELD | REUSE) == 0
            expected[offset : offset + 16] = cubin[offset : offset + 16]
    assert bytes(expected) == cubin


def test_runs_are_maximal(cubin: bytes) -> None:
    _, runs = _native.interleave(cubin)
    for ffmas in runs:
        start = run_offset(cubin, ffmas)
        before, after = (
            words(cubin, start - 16, 1)[0],
            words(cubin, start + 16 * ffmas["length"], 1)[0],
        )
        assert before & OPCODE != FFMA
        assert after & OPCODE != FFMA


def test_short_runs_are_none(promotion: bytes) -> None:
    _, runs = _native.interleave(promotion)
    offset, size = text_section(promotion, "few")
    is_ffma = [word & OPCODE == FFMA for word in words(promotion, offset, size // 16)]
    longest = max(len(list(group)) for same, group in itertools.groupby(is_ffma) if same)
    assert 4 <= longest < 16
    assert {ffmas["section"] for ffmas in runs} == {".text.promote"}


def test_pass_is_idempotent(cubin: bytes) -> None:
    image, _ = _native.interleave(cubin)
    again, runs = _native.interleave(image)
    assert again == image
    assert not any(ffmas["alternates"] for ffmas in runs)


def test_run_alternates_save_for_one_pair(cubin: bytes) -> None:
    # ptxas leaves such irregularities.
    image, (ffmas, *_) = long_runs(cubin)
    offset = run_offset(cubin, ffmas) + 16 * (ffmas["length"] // 2)
    (word,) = words(cubin, offset, 1)
    irregular = cubin[:offset] + (word ^ NO_YIELD).to_bytes(16, "little") + cubin[offset + 16 :]
    again, _ = _native.interleave(irregular)
    assert again == image


@functools.cache
def nvdisasm() -> str:
    """The path of nvdisasm; skips the test, with the reason, where there is none."""
    path = cuda.pathfinder.find_nvidia_binary_utility("nvdisasm")
    if path is None:
        assert "CI" not in os.environ, "continuous integration must have nvdisasm"
        pytest.skip('there is no nvdisasm; pip install "nvidia-cuda-nvdisasm"')
    return path


def disassemble(image: bytes, folder: Path) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(image)
    return subprocess.run(
        [nvdisasm(), "--print-code", file], check=True, capture_output=True, text=True
    ).stdout


def test_disassembly_differs_in_reuse_only(cubin: bytes, tmp_path: Path) -> None:
    image, runs = long_runs(cubin)
    before, after = disassemble(cubin, tmp_path), disassemble(image, tmp_path)
    assert before.count(" FFMA ") >= sum(ffmas["length"] for ffmas in runs)
    assert before != after
    assert before.replace(".reuse", "") == after.replace(".reuse", "")
    count = sum(ffmas["reuse_after"] - ffmas["reuse_before"] for ffmas in runs)
    lines = [len(re.findall(r"FFMA.*\.reuse", text)) for text in (before, after)]
    assert lines[1] - lines[0] == count
    # What is kept is what the next instruction reads in its place.
    code = re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) +;", after)
    for text, following in itertools.pairwise(code):
        if text.startswith("FFMA ") and following.startswith("FFMA "):
            operands, next_operands = (each.split()[1:] for each in (text, following))
            for kept, read in zip(operands, next_operands, strict=True):
                if ".reuse" in kept:
                    assert kept.split(".")[0] == read.rstrip(",").split(".")[0]


@pytest.mark.parametrize("length", [64, 1000, 4000])
def test_truncated_image_is_an_error(length: int, cubin: bytes) -> None:
    with pytest.raises(_native.Error, match=r"^not an sm_90 cubin: .* outside the file"):
        _native.interleave(cubin[:length])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda image: b"", "too short for an ELF header"),
        (lambda image: b"x" * 1000, "not a 64-bit ELF file with sections"),
        (lambda image: image[:4] + b"\x01" + image[5:], "not a 64-bit ELF file with sections"),
        (
            lambda image: image[:0x28] + b"\xff" * 8 + image[0x30:],
            "section header outside the file",
        ),
    ],
    ids=["empty", "foreign", "32-bit", "wild-offset"],
)
def test_malformed_image_is_an_error(
    damage: Callable[[bytes], bytes], message: str, cubin: bytes
) -> None:
    with pytest.raises(_native.Error, match=f"^not an sm_90 cubin: {message}$"):
        _native.interleave(damage(cubin))
