"""What every GPU test prints: how to repeat its random numbers."""

import pytest

from tests.gpu import support


@pytest.fixture(autouse=True)
def seed_in_the_report() -> None:
    """Pytest shows what is printed here with every test that fails."""
    print(f"DG_TEST_SEED={support.SEED}")
