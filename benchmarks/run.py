"""Runs `python -m jax_deepgemm bench`, writing to benchmarks/results/<gpu>.json.

python benchmarks/run.py                                     everything that is published
python benchmarks/run.py --shapes decode --no-moe --no-chain --sweep    any option of `bench`
"""

import pathlib
import sys

from jax_deepgemm.cli import main

RESULTS = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    published = ["--shapes", "seed", "ragged", "--moe", "--chain"]
    sys.exit(main(["bench", *published, "--output", str(RESULTS), *sys.argv[1:]]))
