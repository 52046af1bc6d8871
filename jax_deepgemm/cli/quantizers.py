"""Quantisers against the memory's bandwidth, and a linear layer end to end.

Part of `bench`. Each entry of `quantizers` is one operation on one input: its time, the bytes that
it must move (input, values, scales) per second, that rate as a fraction of a large copy's in the
same run, and what XLA makes of the same operation written in jnp. Each entry of `end_to_end` is
quantise + GEMM of bfloat16 activations, against bfloat16 products.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import jax_deepgemm
from jax_deepgemm import quantize_reference
from jax_deepgemm.cli import harness
from jax_deepgemm.cli.problem import dequantize_dot
from jax_deepgemm.cli.timing import Call, Flush, kernel_times_us
from jax_deepgemm.quantize_call import OPS

Entry = dict[str, Any]
ENTRY_FIELDS = ("op", "form", "groups", "m", "k", "dtype")  # which say what it measures
END_TO_END_FIELDS = ("op", "m", "n", "k")

COPY_BYTES = 2**30
# e4m3 keeps 3 bits: rounding normals gives 0.026.
MAX_CAST_ERROR = 0.03
MAX_LAYER_ERROR = 0.05


class Case(NamedTuple):
    """An operation on x [groups, m, columns], of which the first `valid` rows of a group count."""

    op: str
    groups: int
    m: int
    k: int  # columns of the values
    form: str = "dense"
    valid: int | None = None
    dtype: str = "bfloat16"

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of the input."""
        columns = 2 * self.k if self.op == "silu_mul_quantize" else self.k
        return (*((self.groups,) if self.form == "masked" else ()), self.m, columns)

    @property
    def rows(self) -> int:
        """Rows that count, of all groups."""
        return (self.m if self.valid is None else self.valid) * self.groups

    @property
    def nbytes(self) -> int:
        """Bytes that must be read and written."""
        element = np.dtype(self.dtype).itemsize
        columns = self.x_shape[-1]
        values, token_scales = self.rows * self.k, 4 * self.rows * -(-self.k // 128)
        column_scales = 4 * self.k * -(-self.rows // 128)
        written = {
            "quantize_per_block": values + 4 * -(-self.rows // 128) * -(-self.k // 128),
            "quantize_per_token_transposed": values + column_scales,
            "quantize_per_token_both": 2 * values + token_scales + column_scales,
        }.get(self.op, values + token_scales)
        return self.rows * columns * element + written

    @property
    def sizes(self) -> dict[str, jax.Array]:
        """The argument that says which rows count."""
        if self.form == "masked":
            return {"masked_m": jnp.full(self.groups, self.rows // self.groups, jnp.int32)}
        if self.form == "ragged":
            return {"group_sizes": jnp.full(8, self.rows // 8, jnp.int32)}
        return {}


CASES = (
    *(Case(op, 1, m, 7168) for op in OPS for m in (4096, 8192)),
    Case("silu_mul_quantize", 1, 8192, 2048),
    Case("quantize_per_token", 1, 64, 7168),
    Case("quantize_per_token", 1, 4096, 7168, dtype="float32"),
    *(Case(op, 8, 2048, 7168, "masked", 1024) for op in ("quantize_per_token", OPS[-1])),
    *(Case(op, 1, 16384, 7168, "ragged", 8192) for op in ("quantize_per_token", OPS[-1])),
)
LAYERS = ((4096, 7168, 2048), (64, 4096, 7168))  # m, n, k


class PairCall(Call):
    """A call that returns several arrays, scales transposed so that nothing need move them.

    Results of a program lie in memory row by row; scales lie column by column in the middle of one.
    """

    def __call__(self) -> jax.Array:
        """Dispatches the call; returns the first array, ready when all are."""
        results = self._compiled(*self._operands)
        first: jax.Array = jax.tree.leaves(results)[0]
        return first

    def results(self) -> list[jax.Array]:
        """The call's arrays, scales as the operation returns them."""
        leaves = jax.tree.leaves(self._compiled(*self._operands))
        return [jnp.moveaxis(x, 0, -1) if i % 2 else x for i, x in enumerate(leaves)]


def _with_scales_in_front(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*operands: Any) -> list[jax.Array]:
        leaves = jax.tree.leaves(function(*operands))
        return [jnp.moveaxis(x, -1, 0) if i % 2 else x for i, x in enumerate(leaves)]

    return call


def _natural(op: str) -> Callable[..., Any]:
    """The operation as one writes it in jnp."""
    fp8 = jnp.float8_e4m3fn

    def silu_mul(x: jax.Array) -> Any:
        gate, up = (part.astype(jnp.float32) for part in jnp.split(x, 2, axis=-1))
        return quantize_reference.quantize(jax.nn.silu(gate) * up, 1, fp8, False)

    if op == "silu_mul_quantize":
        return silu_mul
    reference = quantize_reference.jitted[op]
    return lambda x: reference(x, dtype=fp8, power_of_two=False)


def measure_cases(
    cases: Sequence[Case], flush: Flush, iterations: int, seed: int, copy_gbs: float
) -> Iterator[Entry]:
    """Checks and times each case, and XLA's version of it, in one trace a case."""
    for index, case in enumerate(cases):
        key = jax.random.key(seed + index, impl="rbg")
        x = jax.random.normal(key, case.x_shape, jnp.float32).astype(case.dtype)
        operation = getattr(jax_deepgemm, case.op)
        names, sizes = tuple(case.sizes), tuple(case.sizes.values())

        def ours(
            x: jax.Array, *sizes: jax.Array, operation: Any = operation, names: Any = names
        ) -> Any:
            return operation(x, **dict(zip(names, sizes, strict=True)))

        # XLA's version takes the rows that count only: it has no form that skips rows.
        counted = x.reshape(case.groups, -1, x.shape[-1])[:, : case.valid].reshape(case.rows, -1)
        entry: Entry = dict(
            zip(
                ENTRY_FIELDS,
                (case.op, case.form, case.groups, case.m, case.k, case.dtype),
                strict=True,
            )
        ) | {"rows": case.rows}
        try:
            own = PairCall(
                _with_scales_in_front(ours), x, *sizes, kernel_prefix=harness.KERNEL_PREFIX
            )
            plain = PairCall(_with_scales_in_front(_natural(case.op)), counted)
            entry |= _compare(case, own.results(), plain.results(), counted)
            (kernel_us, op_us), (_, xla_us) = kernel_times_us([own, plain], flush, iterations)
        except (RuntimeError, ValueError) as failure:
            yield entry | {"failed": str(failure)}
            continue
        time_us = statistics.median(kernel_us)
        xla = statistics.median(xla_us)
        low, high = (float(v) for v in np.percentile(kernel_us, [10, 90]))
        gbs = case.nbytes / time_us / 1e3
        yield entry | {
            "time_us": round(time_us, 3),
            "spread_us": [round(low, 3), round(high, 3)],
            "op_us": round(statistics.median(op_us), 3),
            "gbs": round(gbs, 1),
            "copy_fraction": round(gbs / copy_gbs, 3),
            "baselines": {
                "xla_us": round(xla, 3),
                "xla_gbs": round(case.nbytes / xla / 1e3, 1),
                "xla_copy_fraction": round(case.nbytes / xla / 1e3 / copy_gbs, 3),
            },
        }


def _compare(
    case: Case, ours: Sequence[jax.Array], plain: Sequence[jax.Array], x: jax.Array
) -> Entry:
    """How far the values are from what they stand for, and how many bytes differ from XLA's."""
    transposed = case.op == "quantize_per_token_transposed"

    def counted(array: jax.Array) -> jax.Array:
        if case.form == "dense":
            return array
        grouped = array.reshape(case.groups, -1, array.shape[-1])
        return grouped[:, : case.valid].reshape(case.rows, -1)

    wide = x.astype(jnp.float32)
    if case.op == "silu_mul_quantize":
        gate, up = jnp.split(wide, 2, axis=-1)
        wide = jax.nn.silu(gate) * up

    def byte(array: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(array, jnp.uint8)

    errors, different = [], []
    for i in range(0, len(ours), 2):  # one pair or two, the second of the transposed copy
        values, scales = map(counted, ours[i : i + 2])
        right = wide.T if transposed or i > 0 else wide
        error = jnp.linalg.norm(jax_deepgemm.dequantize((values, scales)) - right)
        errors.append(float(error / jnp.linalg.norm(right)))
        if not errors[-1] <= MAX_CAST_ERROR:
            raise ValueError(f"wrong result: error {errors[-1]:.1e}")
        different.append(float(jnp.mean(byte(values) != byte(plain[i]), dtype=jnp.float32)))
    return {"error": max(errors), "differs_from_xla": max(different)}


def copy_gigabytes_per_second(flush: Flush, iterations: int) -> float:
    """Bytes read and written per second by a large copy: an exclusive or, lest it be a no-op."""
    x = jnp.zeros(COPY_BYTES // 4, jnp.uint32)
    call = Call(lambda x: x ^ np.uint32(1), x)
    call().block_until_ready()
    ((_, op_us),) = kernel_times_us([call], flush, iterations)
    return 2 * COPY_BYTES / statistics.median(op_us) / 1e3


# --- End to end ----------------------------------------------------------------------------------


def _layer(x: jax.Array, weight: Any) -> jax.Array:
    """What a linear layer costs: both kernels."""
    return jax_deepgemm.gemm_fp8_fp8_bf16_nt(jax_deepgemm.quantize_per_token(x), weight)


def _dequantized_layer(x: jax.Array, weight: Any) -> jax.Array:
    """Quantises x as ours does, then multiplies in bfloat16 what both stand for."""
    lhs = quantize_reference.jitted["quantize_per_token"](
        x, dtype=jnp.float8_e4m3fn, power_of_two=False
    )
    return dequantize_dot(lhs, weight)


def _dequantized_weight(x: jax.Array, weight: Any) -> jax.Array:
    """Dequantises the weight to bfloat16 and leaves x as it is."""
    return jnp.matmul(x, jax_deepgemm.dequantize(weight, jnp.bfloat16).T)


def end_to_end(
    flush: Flush, iterations: int, seed: int, cublas: Sequence[dict[str, Any]]
) -> Iterator[Entry]:
    """Quantise + GEMM against bfloat16, all kernels of each call.

    Args:
        flush: run before each timed call.
        iterations: timed calls of each.
        seed: of the operands.
        cublas: for each of LAYERS what PyTorch's process measured, or nothing.
    """
    for index, (m, n, k) in enumerate(LAYERS):
        key_x, key_w = jax.random.split(jax.random.key(seed + index, impl="rbg"))
        x = jax.random.normal(key_x, (m, k), jnp.float32).astype(jnp.bfloat16)
        w = jax.random.normal(key_w, (n, k), jnp.float32).astype(jnp.bfloat16)
        weight = jax_deepgemm.quantize_per_block(w)
        entry: Entry = dict(zip(END_TO_END_FIELDS, ("quantize_gemm", m, n, k), strict=True))
        try:
            calls = {
                "ours": Call(_layer, x, weight),
                "xla_bf16_dot_us": Call(lambda x, w: jnp.matmul(x, w.T), x, w),
                "xla_dequantize_weight_dot_us": Call(_dequantized_weight, x, weight),
                "xla_quantize_dequantize_dot_us": Call(_dequantized_layer, x, weight),
            }
            results = {name: call().astype(jnp.float32) for name, call in calls.items()}
            wanted = results["xla_bf16_dot_us"]
            error = float(jnp.linalg.norm(results["ours"] - wanted) / jnp.linalg.norm(wanted))
            if not error <= MAX_LAYER_ERROR:
                raise ValueError(f"wrong result: error {error:.1e}")
            times = kernel_times_us(list(calls.values()), flush, iterations)
        except (RuntimeError, ValueError) as failure:
            yield entry | {"failed": str(failure)}
            continue
        medians = [round(statistics.median(op_us), 3) for _, op_us in times]
        yield entry | {
            "time_us": medians[0],
            "tflops": round(2 * m * n * k / medians[0] / 1e6, 1),
            "error": error,
            "baselines": dict(zip(list(calls)[1:], medians[1:], strict=True))
            | (dict(cublas[index]) if index < len(cublas) else {}),
        }


# --- The document --------------------------------------------------------------------------------


def measure_all(
    flush: Flush, iterations: int, seed: int, cublas: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yields the part of a results file as it grows."""
    copy_gbs = copy_gigabytes_per_second(flush, iterations)
    document: dict[str, Any] = {
        "copy_gbs": round(copy_gbs, 1),
        "quantizers": [],
        "end_to_end": [],
    }
    yield document
    for entry in measure_cases(CASES, flush, iterations, seed, copy_gbs):
        document["quantizers"].append(entry)
        yield document
    for entry in end_to_end(flush, iterations, seed, cublas):
        document["end_to_end"].append(entry)
        yield document


def entries_of(document: dict[str, Any]) -> list[Entry]:
    """All entries of a results file, or none if it was made without --quantize."""
    part = document.get("quantize", {})
    return [*part.get("quantizers", []), *part.get("end_to_end", [])]


def is_good(entry: Entry) -> bool:
    """Whether the entry holds a right result."""
    return "failed" not in entry


def _cells(part: str, entry: Entry) -> list[str]:
    fields = ENTRY_FIELDS if part == "quantizers" else END_TO_END_FIELDS
    cells = [str(entry[field]) for field in fields]
    if "failed" in entry:
        return [*cells, "failed"]
    cells.append(f"{entry['time_us']:.1f}")
    if part == "quantizers":
        xla = entry["baselines"]
        cells += [f"{entry['gbs']:.0f}", f"{entry['copy_fraction']:.0%}"]
        return [*cells, f"{xla['xla_us']:.1f}", f"{xla['xla_copy_fraction']:.0%}"]
    values = (entry["baselines"].get(name) for name in BASELINES)
    return [
        *cells,
        f"{entry['tflops']:.0f}",
        *("-" if value is None else f"{value:.1f}" for value in values),
    ]


BASELINES = (
    "xla_bf16_dot_us",
    "xla_dequantize_weight_dot_us",
    "xla_quantize_dequantize_dot_us",
    "cublaslt_bf16_us",
)
HEADINGS = {
    "quantizers": [*ENTRY_FIELDS, "time, us", "GB/s", "of copy", "xla, us", "xla, of copy"],
    "end_to_end": [
        *END_TO_END_FIELDS,
        "time, us",
        "TFLOP/s",
        *(f"{name.removesuffix('_us')}, us" for name in BASELINES),
    ],
}


def captions(part: dict[str, Any]) -> dict[str, str]:
    """What stands above each table."""
    return {
        "quantizers": f"Quantisers; a large copy reached {part['copy_gbs']:.0f} GB/s in the same "
        "run:",
        "end_to_end": "Quantising bfloat16 activations and multiplying them, all kernels of the "
        "call:",
    }


def lines_of(part: dict[str, Any], name: str) -> list[list[str]]:
    """The cells of a table."""
    width = len(HEADINGS[name])
    lines = [_cells(name, entry) for entry in part[name]]
    return [line + ["-"] * (width - len(line)) for line in lines]


def tables_of(document: dict[str, Any]) -> Iterator[Table]:
    """The tables that `bench` prints."""
    part = document.get("quantize")
    if not part:
        return
    for name in HEADINGS:
        table = Table(title=captions(part)[name])
        for heading in HEADINGS[name]:
            table.add_column(heading, justify="right")
        for line in lines_of(part, name):
            table.add_row(*line)
        yield table
