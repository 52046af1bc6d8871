"""Two processes that multiply together through `jax.distributed`, each with two CPU devices."""

from tests.processes import run_processes


def test_two_processes() -> None:
    outputs = run_processes(2, "cpu", seconds=300)
    assert ["OK" in output.splitlines() for output in outputs] == [True, True], outputs
