"""Two processes that multiply together through `jax.distributed`, each with two CPU devices."""

from tests.processes import run_processes


def test_two_processes() -> None:
    run_processes(2, "cpu", seconds=300)
