"""The README's tables of measured times, from a results file: `bench --results FILE --markdown`."""

from collections.abc import Iterable, Sequence
from typing import Any

from jax_deepgemm.cli import moe, quantizers
from jax_deepgemm.cli.compare import KEY_FIELDS

WHOLE_OP = "The whole op is all kernels of the call, those in which XLA prepares operands included."
PART_HEADINGS = {
    "uneven": "Uneven groups: the ragged operation, and padding to the contiguous layout and back; "
    "all kernels of the call, but for the first time:",
    "scheduler": "The same rows in 8 of more and more groups, the others empty:",
    "jax": "The same product by JAX's own tools, in bf16:",
}


def markdown(document: dict[str, Any]) -> str:
    """What was measured where, a table of the rows and, where there are any, of the `moe` parts."""
    where = (
        f"{document['gpu']}, driver {document['driver']}, CUDA {document['cuda']}, "
        f"JAX {document['jax']}, {document['date']}: `{document['command']}`."
    )
    blocks = [where, _rows_table(document["rows"])]
    if _has_whole_op(document["rows"]):
        blocks.append(WHOLE_OP)
    for part, entries in moe.parts_of(document).items():
        if entries:
            blocks += [PART_HEADINGS[part], _moe_table(entries)]
    if measured := document.get("quantize"):
        for name, caption in quantizers.captions(measured).items():
            lines = quantizers.lines_of(measured, name)
            blocks += [caption, _table(quantizers.HEADINGS[name], lines)]
    return "\n\n".join(blocks)


def _rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row; m is that of each group."""
    baselines = dict.fromkeys(
        name for row in rows for name in row["baselines"] if name.endswith("_us")
    )
    heads = ["op", "groups", "m", "n", "k", "time, us"]
    grouped = _has_whole_op(rows)
    heads += ["whole op, us"] if grouped else []
    heads += ["TFLOP/s", "GB/s", "error", *map(_heading, baselines)]
    lines = []
    for row in rows:
        cells = [str(row[field]) for field in KEY_FIELDS]
        cells.append("failed" if "failed" in row else _number(row, "time_us", ".1f"))
        cells += [_number(row, "op_us", ".1f")] if grouped else []
        cells += [_number(row, "tflops", ".0f"), _number(row, "gbs", ".0f")]
        cells.append(_number(row, "error", ".1e"))
        lines.append(cells + [_number(row["baselines"], name, ".1f") for name in baselines])
    return _table(heads, lines)


def _has_whole_op(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether any row is of a grouped operation."""
    return any("op_us" in row for row in rows)


def _moe_table(entries: Sequence[dict[str, Any]]) -> str:
    """Times of all kernels of every contender, and that of our kernel alone."""
    contenders = moe.contenders_of(entries)
    heads = [*moe.ENTRY_FIELDS, "ragged kernel, us", *(f"{name}, us" for name in contenders)]
    lines = []
    for entry in entries:
        cells = [str(entry[field]) for field in moe.ENTRY_FIELDS]
        cells.append(_number(entry["ragged"], "time_us", ".1f"))
        cells += [_number(entry.get(name, {}), "op_us", ".1f") for name in contenders]
        lines.append(cells)
    return _table(heads, lines)


def _heading(baseline: str) -> str:
    return f"{baseline.removesuffix('_us')}, us"


def _number(fields: dict[str, Any], name: str, form: str) -> str:
    """A field, or a dash where it was not measured."""
    return format(fields[name], form) if name in fields else "-"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in (heads, *lines))
    return "\n".join([head, "|--:" * len(heads) + "|", *body])
