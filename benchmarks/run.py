"""Runs `python -m jax_deepgemm bench`, writing to benchmarks/results/<gpu>.json.

python benchmarks/run.py                   everything that is published
python benchmarks/run.py --no-moe --sweep    any option of `bench`; --no-... leaves out a part
"""

import pathlib
import sys

from jax_deepgemm.cli import main

RESULTS = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    published = ["--shapes", "seed", "decode", "ragged", "--moe", "--chain", "--quantize"]
    published += ["--baselines", "torch", "stream"]
    sys.exit(main(["bench", *published, "--output", str(RESULTS), *sys.argv[1:]]))
