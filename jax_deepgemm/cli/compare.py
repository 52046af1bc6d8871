"""Compare two results files row by row."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

KEY_FIELDS = ("op", "groups", "m_per_group", "n", "k")
# Yardstick files hold a peer's times and name it.
YARDSTICK_FIELD = "deepgemm_us"
TIME_FIELDS = ("time_us", YARDSTICK_FIELD)


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measures."""
    return tuple(row[field] for field in KEY_FIELDS)


def row_time_us(row: dict[str, Any]) -> float | None:
    """Time of a row, whichever of `TIME_FIELDS` it has; None when it has none (it failed)."""
    return next((float(row[field]) for field in TIME_FIELDS if field in row), None)


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product of n positive values."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def matching_times(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> list[tuple[tuple[Any, ...], float, float]]:
    """(key, our time, their time) of every row that both have, in our order."""
    other = {row_key(row): row_time_us(row) for row in theirs}
    matches = []
    for row in ours:
        mine, their = row_time_us(row), other.get(row_key(row))
        if mine is not None and their is not None:
            matches.append((row_key(row), mine, their))
    return matches


def yardstick(row: dict[str, Any], theirs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The peer's time of the same work as a baseline; empty when there is none."""
    return next(
        (
            {YARDSTICK_FIELD: other[YARDSTICK_FIELD]}
            for other in theirs
            if YARDSTICK_FIELD in other and row_key(other) == row_key(row)
        ),
        {},
    )


def comparison_table(ours: dict[str, Any], theirs: dict[str, Any]) -> Table:
    """Ratios of the times in two documents with common rows; below 1 means that ours is faster."""
    matches = matching_times(ours["rows"], theirs["rows"])
    titles = (f"{document['gpu']} of {document['date']}" for document in (ours, theirs))
    table = Table(title=" against ".join(titles), show_footer=True)
    mean = geometric_mean([mine / their for _, mine, their in matches])
    for field in KEY_FIELDS:
        table.add_column(field, justify="right")
    table.add_column("us", justify="right")
    table.add_column("its us", justify="right", footer="geometric mean")
    table.add_column("ratio", justify="right", footer=f"{mean:.3f}")
    for key, mine, their in matches:
        table.add_row(*map(str, key), f"{mine:.2f}", f"{their:.2f}", f"{mine / their:.3f}")
    return table
