"""Argument types: problem shapes, in `MxNxK` notation or named sets, and counts."""

import argparse
import re
from typing import NamedTuple

MAX_SIZE = 2**31 - 65537  # of m, n and k: tile arithmetic is in 32 bits
MAX_COUNT = 2**31 - 1


class Shape(NamedTuple):
    """A dense problem, D[m, n] = A[m, k] B[n, k]^T."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        """The notation of the command line."""
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two."""
        return 2 * self.m * self.n * self.k

    @property
    def nbytes(self) -> int:
        """Bytes that must move: fp8 operands and float32 scales read once, bf16 D written once."""
        k_blocks, n_blocks = -(-self.k // 128), -(-self.n // 128)
        scales = 4 * k_blocks * (self.m + n_blocks)
        return self.m * self.k + self.n * self.k + scales + 2 * self.m * self.n


# (n, k) of DeepSeek-V3's dense layers, in the order of DeepGEMM's table.
DENSE_WEIGHTS = (
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)


def _dense(*tokens: int) -> tuple[Shape, ...]:
    return tuple(Shape(m, n, k) for m in tokens for n, k in DENSE_WEIGHTS)


NAMED_SHAPES = {"seed": _dense(64, 128, 4096), "decode": _dense(1, 8, 16, 32)}

SHAPES_HELP = (
    "MxNxK, separated by commas or spaces, or a named set: "
    "seed (DeepSeek-V3's dense shapes, m = 64, 128, 4096) or decode (the same, m = 1, 8, 16, 32)"
)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parses `64x2112x7168,seed` and the like; an argparse `type`."""
    shapes: list[Shape] = []
    for word in filter(None, re.split(r"[,\s]+", text)):
        if word in NAMED_SHAPES:
            shapes += NAMED_SHAPES[word]
            continue
        if not re.fullmatch(r"\d+x\d+x\d+", word):
            raise argparse.ArgumentTypeError(
                f"{word!r} is neither MxNxK (like 64x7168x2048) nor one of "
                f"{', '.join(NAMED_SHAPES)}"
            )
        shape = Shape(*map(int, word.split("x")))
        if min(shape) < 1 or max(shape) > MAX_SIZE or shape.n % 8 or shape.k % 16:
            raise argparse.ArgumentTypeError(
                f"{word!r}: m must be at least 1, n a multiple of 8, k a multiple of 16, "
                f"and none above {MAX_SIZE}"
            )
        shapes.append(shape)
    if not shapes:
        raise argparse.ArgumentTypeError("expected at least one shape")
    return tuple(dict.fromkeys(shapes))


def parse_count(text: str) -> int:
    """Parses a positive number; an argparse `type`."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_COUNT}")
    return int(text)
