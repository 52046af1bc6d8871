"""Command line of jax_deepgemm.

    python -m jax_deepgemm            multiply DeepSeek-V3's shapes, check and time them
    python -m jax_deepgemm info       what a bug report needs
    python -m jax_deepgemm compile    fill the kernel cache ahead of time
    python -m jax_deepgemm bench      time kernels with a cold, clean L2

Every command is one module with `add_arguments(parser)` and `run(args)`, whose result is the exit
status.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from jax_deepgemm.cli import bench, demo, info, precompile

COMMANDS = {"info": info, "compile": precompile, "bench": bench}


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program name; empty for the main job.

    Returns:
        Exit status: 0, 1 (something is wrong or missing, or nobody reads the output any more),
        2 (malformed arguments).
    """
    parser = argparse.ArgumentParser(prog="python -m jax_deepgemm", description=demo.__doc__)
    parser.set_defaults(run=demo.run)
    commands = parser.add_subparsers(title="other commands", metavar="{info,compile,bench}")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").split("\n", 1)[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # of `info | head`
        # What is still buffered has to go somewhere, or Python complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
