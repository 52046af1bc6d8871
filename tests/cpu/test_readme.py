"""What the README says is so: its example runs, its tables are the measured ones, its links lead
somewhere, and it prints both commands."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from jax_deepgemm.cli.markdown import markdown

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = "benchmarks/results/h100.json"
VARIABLES = sorted(set(re.findall("DG_[A-Z_]+", (ROOT / "csrc/jit/environment.cc").read_text())))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

# Appended to the example: its result is the product that it says it is, but for the rounding of
# both operands to FP8 (a few percent of each value).
CHECK = """
import jax.numpy as jnp
expected = x @ w.T
assert y.dtype == jnp.bfloat16 and y.shape == expected.shape
error = jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
assert 0.001 < error < 0.05, error
"""


def blocks(language: str) -> list[str]:
    """Returns the README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_example_computes_the_product() -> None:
    example = blocks("python")[0]
    done = subprocess.run([sys.executable, "-c", example + CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(64, 384) bfloat16" in done.stdout


def test_table_is_the_measured_one() -> None:
    found = re.search(
        rf"^<!-- table: {re.escape(RESULTS)} -->\n(.*?)\n<!-- end of table -->$",
        README,
        flags=re.MULTILINE | re.DOTALL,
    )
    assert found, "the README has lost the marks of its table"
    file = ROOT / RESULTS
    expected = markdown(json.loads(file.read_text())) if file.exists() else "Not measured yet."
    command = f"python -m jax_deepgemm bench --results {RESULTS} --markdown"
    assert found[1] == expected, f"the README's tables must be what `{command}` prints"


def links(page: pathlib.Path) -> list[tuple[str, str]]:
    """The files, "" for the page itself, and sections that it links to."""
    return re.findall(r"\]\(([^)#:]*)#?([^)#:]*)\)", page.read_text())


def anchors(page: pathlib.Path) -> set[str]:
    """What GitHub calls the sections of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    assert links(page)
    for file, section in links(page):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not section or section in anchors(target), f"{file}#{section}"


@pytest.mark.parametrize("ending", ["-m jax_deepgemm", "-m pytest"])
def test_command_is_one_line_for_a_fresh_machine(ending: str) -> None:
    commands = [block.strip() for block in blocks("bash") if block.rstrip().endswith(ending)]
    assert len(commands) == 1
    assert "\n" not in commands[0]
    assert commands[0].startswith("python3 -m venv .venv && .venv/bin/pip install ")


@pytest.mark.parametrize("variable", VARIABLES)
def test_environment_variable_is_described(variable: str) -> None:
    assert f"| `{variable}` |" in README
