"""Runs `python -m jax_deepgemm bench`, writing to benchmarks/results/<gpu>.json.

python benchmarks/run.py                            the seed's dense shapes
python benchmarks/run.py --shapes decode --sweep    any option of `bench`
"""

import pathlib
import sys

from jax_deepgemm.cli import main

RESULTS = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    sys.exit(main(["bench", "--output", str(RESULTS), *sys.argv[1:]]))
