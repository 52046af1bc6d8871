"""Argument types: problem shapes, as text or named sets, and counts."""

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from jax_deepgemm import get_m_alignment_for_contiguous_layout
from jax_deepgemm.cli.compare import KEY_FIELDS, row_key
from jax_deepgemm.config import OPS

MAX_SIZE = 2**31 - 65537  # of m, n and k: tile arithmetic is in 32 bits
MAX_COUNT = 2**31 - 1

DENSE, CONTIGUOUS, MASKED, RAGGED = OPS


class Shape(NamedTuple):
    """A problem whose groups are all full and of one size; its fields identify a result row.

    Every group g is a product D_g[m_per_group, n] = A_g[m_per_group, k] B_g[n, k]^T.
    """

    op: str  # one of OPS
    groups: int  # 1 if dense
    m_per_group: int
    n: int
    k: int

    @classmethod
    def dense(cls, m: int, n: int, k: int) -> "Shape":
        """D[m, n] = A[m, k] B[n, k]^T."""
        return cls(DENSE, 1, m, n, k)

    def __str__(self) -> str:
        """The notation of the command line."""
        sizes = f"{self.m_per_group}x{self.n}x{self.k}"
        return sizes if self.op == DENSE else f"{self.op}:{self.groups}x{sizes}"

    @property
    def m(self) -> int:
        """Rows of all groups."""
        return self.groups * self.m_per_group

    @property
    def selection(self) -> dict[str, Any]:
        """What `select_config` and `legal_configs` want to know, apart from the SM count."""
        # Of no rows nothing is to be expected.
        expected_m = (self.m_per_group or None) if self.op == MASKED else None
        return {
            "m": self.m,
            "n": self.n,
            "k": self.k,
            "op": self.op,
            "num_groups": self.groups,
            "expected_m": expected_m,
        }

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two."""
        return 2 * self.m * self.n * self.k

    @property
    def operand_bytes(self) -> int:
        """Bytes of fp8 operands and float32 scales; every group has weights of its own."""
        k_blocks, n_blocks = -(-self.k // 128), -(-self.n // 128)
        scales = 4 * k_blocks * (self.m + self.groups * n_blocks)
        return (self.m + self.groups * self.n) * self.k + scales

    @property
    def nbytes(self) -> int:
        """Bytes that must move: operands read once, bf16 D written once."""
        return self.operand_bytes + 2 * self.m * self.n


# (n, k) of DeepSeek-V3's dense layers and of its experts, in the order of DeepGEMM's tables.
DENSE_WEIGHTS = (
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
)
EXPERT_WEIGHTS = ((4096, 7168), (7168, 2048))


def _dense(*tokens: int) -> tuple[Shape, ...]:
    return tuple(Shape.dense(m, n, k) for m in tokens for n, k in DENSE_WEIGHTS)


def _grouped(op: str, *groups: tuple[int, int]) -> tuple[Shape, ...]:
    """Shapes of (number of groups, rows of each)."""
    return tuple(Shape(op, g, m, n, k) for g, m in groups for n, k in EXPERT_WEIGHTS)


class Model(NamedTuple):
    """A mixture of experts whose layers are multiplied; sizes are those of its configuration."""

    weights: tuple[tuple[int, int], ...]  # (n, k) of the dense layers, attention's first
    hidden: int
    expert_hidden: int
    experts: int
    experts_per_token: int = 8

    @property
    def expert_weights(self) -> tuple[tuple[int, int], ...]:
        """(n, k) of gate and up together, and of down."""
        return ((2 * self.expert_hidden, self.hidden), (self.hidden, self.expert_hidden))

    def decode(self, *tokens: int) -> tuple[Shape, ...]:
        """All of a layer's products, every expert on one device."""
        return tuple(
            shape
            for m in tokens
            for shape in (
                *(Shape.dense(m, n, k) for n, k in self.weights),
                *(Shape(RAGGED, *self._busy(m), n, k) for n, k in self.expert_weights),
            )
        )

    def training(self, tokens: int, devices: int) -> tuple[Shape, ...]:
        """The forward products of one device, which has its share of the experts."""
        groups = self.experts // devices
        rows = tokens * self.experts_per_token * devices // self.experts
        return (
            *(Shape.dense(tokens, n, k) for n, k in self.weights),
            *(Shape(RAGGED, groups, rows, n, k) for n, k in self.expert_weights),
        )

    def _busy(self, tokens: int) -> tuple[int, int]:
        """Experts that get rows, and how many each, if tokens spread evenly."""
        rows = tokens * self.experts_per_token
        return min(rows, self.experts), max(1, rows // self.experts)


# From the models' published configurations.
MODELS = {
    "deepseek-v3": Model(DENSE_WEIGHTS, 7168, 2048, 256),
    "qwen3-moe": Model(((9216, 4096), (4096, 8192)), 4096, 1536, 128),  # 235B-A22B
    "kimi-k2": Model(((2112, 7168), (12288, 1536), (16384, 512), (7168, 8192)), 7168, 2048, 384),
    "glm": Model(((14336, 5120), (5120, 12288), (24576, 5120)), 5120, 1536, 160),  # 4.5
}
DECODE_TOKENS = (1, 4, 16, 64, 256)
TRAINING_TOKENS, TRAINING_DEVICES = 8192, 8

_DENSE = _dense(64, 128, 4096)
_GROUPED = _grouped(CONTIGUOUS, (4, 8192), (8, 4096)) + _grouped(
    MASKED, (1, 1024), (2, 512), (4, 256)
)
NAMED_SHAPES = {
    "seed": _DENSE + _GROUPED,
    "dense": _DENSE,
    "grouped": _GROUPED,
    "decode": _dense(1, 8, 16, 32, 48),
    "ragged": _grouped(
        RAGGED, (4, 8192), (8, 4096), (8, 64), (32, 64), (256, 10), (384, 8), (512, 8)
    ),
    **{name: model.decode(*DECODE_TOKENS) for name, model in MODELS.items()},
    "training": tuple(
        dict.fromkeys(  # models share some
            shape
            for model in MODELS.values()
            for shape in model.training(TRAINING_TOKENS, TRAINING_DEVICES)
        )
    ),
}

SHAPES_HELP = (
    "MxNxK (dense) or OP:GxMxNxK (OP contiguous, masked or ragged, G groups of M rows), separated "
    "by commas or spaces, or a named set: seed (the next two), dense (DeepSeek-V3's dense shapes, "
    "m = 64, 128, 4096), grouped (its experts, contiguous and masked), ragged (up to 512 experts), "
    "decode (as dense, m = 1, 8, 16, 32, 48), a model's layers at 1 to 256 tokens "
    f"({', '.join(MODELS)}), training (all of them at {TRAINING_TOKENS} tokens per device), or "
    "@FILE: those of a results file"
)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parses `64x2112x7168,ragged:256x10x4096x7168,decode` and the like; an argparse `type`."""
    shapes: list[Shape] = []
    for word in filter(None, re.split(r"[,\s]+", text)):
        if word in NAMED_SHAPES:
            shapes += NAMED_SHAPES[word]
        elif word.startswith("@"):
            shapes += _shapes_of_results(Path(word[1:]))
        else:
            shapes.append(_parse_shape(word))
    if not shapes:
        raise argparse.ArgumentTypeError("expected at least one shape")
    return tuple(dict.fromkeys(shapes))


def _shapes_of_results(path: Path) -> list[Shape]:
    """What the rows of a results file measure."""
    try:
        rows = json.loads(path.read_text())["rows"]
        shapes = [Shape(*row_key(row)) for row in rows]
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no text
        raise argparse.ArgumentTypeError(f"@{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"@{path} is not a results file, whose rows have {', '.join(KEY_FIELDS)}"
        ) from error
    return [_parse_shape(str(shape)) for shape in shapes]


def _parse_shape(word: str) -> Shape:
    grouped = "|".join((CONTIGUOUS, MASKED, RAGGED))
    match = re.fullmatch(rf"(?:({grouped}):(\d+)x)?(\d+)x(\d+)x(\d+)", word)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{word!r} is neither MxNxK (like 64x7168x2048) nor OP:GxMxNxK "
            f"(like masked:4x256x7168x2048) nor @FILE nor one of {', '.join(NAMED_SHAPES)}"
        )
    op, groups, m, n, k = match.groups()
    shape = Shape(op or DENSE, int(groups or 1), int(m), int(n), int(k))
    sizes = (shape.groups, shape.m_per_group, shape.n, shape.k)
    if min(sizes) < 1 or max(*sizes, shape.m) > MAX_SIZE or shape.n % 8 or shape.k % 16:
        raise argparse.ArgumentTypeError(
            f"{word!r}: groups and m must be at least 1, n a multiple of 8, k a multiple of 16, "
            f"and neither these nor the rows of all groups above {MAX_SIZE}"
        )
    alignment = get_m_alignment_for_contiguous_layout()
    if shape.op == CONTIGUOUS and shape.m_per_group % alignment:
        raise argparse.ArgumentTypeError(
            f"{word!r}: the groups of a contiguous layout are aligned to {alignment} rows"
        )
    return shape


def parse_count(text: str) -> int:
    """Parses a positive number; an argparse `type`."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_COUNT}")
    return int(text)
