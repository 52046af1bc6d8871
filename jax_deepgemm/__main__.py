"""`python -m jax_deepgemm`: see `jax_deepgemm.cli`."""

import sys

from jax_deepgemm.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
