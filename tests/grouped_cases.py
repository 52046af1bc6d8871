"""Problems of the grouped operations that the CPU and GPU tests share.

One class speaks for all three, so that a test is written once: what differs is how rows are
assigned to groups, and the oracle (tests/numerics.py) that knows what that means.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jax_deepgemm
from tests import numerics

OPS = ("contiguous", "masked", "ragged")

Arrays = tuple[NDArray[np.int32], ...]


def name_of(op: str) -> str:
    """The public function, which messages begin with."""
    return f"m_grouped_gemm_fp8_fp8_bf16_nt_{op}"


def call(
    op: str, a: Any, sfa: Any, b: Any, sfb: Any, *arrays: Any, fill: str = "zero", **options: Any
) -> jax.Array:
    """The public function on flat operands; `fill`, which only one takes, is "zero" by default."""
    if op == "masked":
        options["fill"] = fill
        if "expected_m" not in options:
            options["expected_m"] = max(1, a.shape[1])
    function = getattr(jax_deepgemm, name_of(op))
    d: jax.Array = function((a, sfa), (b, sfb), *arrays, **options)
    return d


class Problem(NamedTuple):
    """Sizes of one problem."""

    op: str
    num_groups: int
    rows: int  # m, or masked: max_m
    n: int
    k: int

    def __str__(self) -> str:
        """The id of a test."""
        return f"{self.op}-g{self.num_groups}-m{self.rows}-n{self.n}-k{self.k}"

    @property
    def a_rows(self) -> tuple[int, ...]:
        """The dimensions of A before k."""
        return (self.num_groups, self.rows) if self.op == "masked" else (self.rows,)

    def operands(self, seed: int) -> numerics.GroupedOperands:
        rows = (self.num_groups, self.rows) if self.op == "masked" else self.rows
        return numerics.grouped_operands(rows, self.num_groups, self.n, self.k, seed=seed)

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """What `call` takes, without a group_offset."""
        g, k_blocks = self.num_groups, numerics.ceil_div(self.k, 128)
        entries = self.rows if self.op == "contiguous" else g
        return [
            jax.ShapeDtypeStruct((*self.a_rows, self.k), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((*self.a_rows, k_blocks), jnp.float32),
            jax.ShapeDtypeStruct((g, self.n, self.k), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((g, numerics.ceil_div(self.n, 128), k_blocks), jnp.float32),
            jax.ShapeDtypeStruct((entries,), jnp.int32),
        ]

    def random_arrays(self, rng: np.random.Generator) -> Arrays:
        """An assignment: uneven, with empty groups, rows of no group, numbers out of range."""
        g = self.num_groups
        if self.op == "contiguous":
            blocks = rng.integers(-1, g, numerics.ceil_div(self.rows, 128))
            return (numerics.contiguous_layout(rng, blocks, self.rows, g),)
        if self.op == "masked":
            counts = rng.integers(0, self.rows + 1, g)
            odd = rng.choice([0, 1, self.rows, self.rows + 1, -1, 2**31 - 1, -(2**31)], g)
            return (np.where(rng.random(g) < 0.5, counts, odd).astype(np.int32),)
        shares = rng.dirichlet(np.full(g, 0.5)) * rng.choice([0.9, 1, 1.1])
        sizes = np.floor(shares * self.rows).astype(np.int32)
        sizes[rng.random(g) < 0.2] = rng.choice([0, -1, -(2**31)])
        return (sizes,)

    def present(self, pattern: int) -> Arrays:
        """An assignment in which group i has rows just if bit i of the pattern is set."""
        bits = np.array([pattern >> i & 1 for i in range(self.num_groups)])
        if self.op == "contiguous":
            blocks = np.full(numerics.ceil_div(self.rows, 128), -1)
            blocks[: bits.sum()] = np.flatnonzero(bits)
            return (blocks.repeat(128)[: self.rows].astype(np.int32),)
        most = self.rows if self.op == "masked" else self.rows // self.num_groups
        return ((bits * (1 + np.arange(self.num_groups) * 5 % most)).astype(np.int32),)

    def oracle(
        self, operands: numerics.GroupedOperands, array: Any, offset: int = 0
    ) -> NDArray[np.float64]:
        """The exact result, zero in rows without a group."""
        if self.op == "masked":
            return numerics.masked_oracle(operands, array)
        if self.op == "ragged":
            array = numerics.ragged_row_groups(array, self.rows, self.num_groups, offset)
        return numerics.row_groups_oracle(operands, array)


class Planted(NamedTuple):
    """Arguments of `call` with bad values in them, the same without, and what those may reach."""

    bad: tuple[Any, ...]
    clean: tuple[Any, ...]
    hit: NDArray[np.bool_]  # like D
    padding: NDArray[np.bool_]  # rows of D

    def check(self, d: Any, clean_d: Any) -> None:
        """Compares the results, `call` with fill="zero"."""
        d, clean_d = (np.asarray(x).astype(np.float32) for x in (d, clean_d))
        assert not np.isfinite(d[self.hit]).any()
        np.testing.assert_array_equal(d[~self.hit], clean_d[~self.hit])
        assert not clean_d[self.padding].any()


def plant(problem: Problem, bad: float, *, seed: int) -> Planted:
    """Spoils one expert's weights and scales, two rows, and all padding rows.

    The problem has three groups, 384 rows (or for each group) and n above 128.
    """
    assert problem.num_groups == 3 and problem.rows == 384 and problem.n > 128
    clean = problem.operands(seed)
    expert, padding = np.zeros((2, *problem.a_rows), bool)
    rows: list[Any]
    if problem.op == "contiguous":
        array = np.repeat(np.array([0, 1, 2], np.int32), 128)
        array[[3, 200, 300]] = -1
        expert, padding = array == 1, array < 0
        rows = [0, 290]
    elif problem.op == "masked":
        array = np.array([100, 3, 384], np.int32)
        expert[1, :3] = padding[0, 100:] = padding[1, 3:] = True
        rows = [(0, 99), (2, 60)]
    else:
        array = np.array([50, 7, 160], np.int32)
        expert[50:57] = padding[217:] = True
        rows = [49, 216]
    a, sfa, b, sfb = (operand.copy() for operand in clean)
    b[1, 5, 17] = np.nan
    sfb[1, 1, -1] = bad  # columns 128 to 255
    a[rows[0]] = np.nan
    sfa[rows[1]] = bad
    a[padding], sfa[padding] = np.nan, bad

    hit = np.zeros((*problem.a_rows, problem.n), bool)
    hit[expert, 5] = hit[expert, 128:256] = True
    for row in rows:
        hit[row] = True
    return Planted((a, sfa, b, sfb, array), (*clean, array), hit, padding)
