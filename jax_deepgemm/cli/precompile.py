"""Fill the kernel cache ahead of time, in parallel. Needs NVRTC, no GPU."""

import argparse
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax_deepgemm
from jax_deepgemm import GemmConfig
from jax_deepgemm.arguments import H100_MEMORY_GBS, H100_SMS, H200_MEMORY_GBS
from jax_deepgemm.cli import tables
from jax_deepgemm.cli.shapes import NAMED_SHAPES, SHAPES_HELP, Shape, parse_count, parse_shapes
from jax_deepgemm.config import check_problem
from jax_deepgemm.ffi import KernelReport, _native, compile_kernel

# What a kernel is compiled for, apart from the SM count: op, m, n, k and the config. It may serve
# other m, and any number of groups (see `compile_kernel`).
Kernel = tuple[str, int, int, int, GemmConfig]


def add_shapes_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --shapes, whose value is a list of tuples of `Shape`."""
    parser.add_argument(
        "--shapes",
        type=parse_shapes,
        nargs="+",
        default=[NAMED_SHAPES["seed"]],
        metavar="SHAPES",
        help=f"{SHAPES_HELP} (default: seed)",
    )


def given_shapes(args: argparse.Namespace) -> list[Shape]:
    """Shapes of the command line, each once."""
    return list(dict.fromkeys(itertools.chain(*args.shapes)))


def selected_kernels(shapes: Iterable[Shape], num_sms: int, memory_gbs: int) -> list[Kernel]:
    """Kernels that selection picks for the shapes, each once."""
    kernels: dict[str, Kernel] = {}
    for shape in shapes:
        config = jax_deepgemm.select_config(
            **shape.selection, num_sms=num_sms, memory_gbs=memory_gbs
        )
        problem = check_problem("selected_kernels", **shape.selection, num_sms=num_sms)
        name = _native.kernel_name(problem, config.fields)
        kernels.setdefault(name, (shape.op, shape.m, shape.n, shape.k, config))
    return list(kernels.values())


def compile_kernels(
    kernels: Sequence[Kernel], num_sms: int, jobs: int | None = None
) -> dict[Kernel, KernelReport | Exception]:
    """Compiles in threads, with a progress bar.

    Args:
        kernels: what to compile.
        num_sms: SM count of the GPU that will run them.
        jobs: threads; the CPU count when not given.

    Returns:
        In the order of `kernels`: the report, or the error that says why there is none.
    """
    outcomes: dict[Kernel, KernelReport | Exception] = {}
    with (
        tables.progress_bar() as bar,
        ThreadPoolExecutor(jobs or os.cpu_count()) as pool,
    ):
        task = bar.add_task("compiling kernels", total=len(kernels))
        futures = {
            pool.submit(compile_kernel, n, k, config, m=m, op=op, num_sms=num_sms): kernel
            for kernel in kernels
            for op, m, n, k, config in [kernel]
        }
        for future in as_completed(futures):
            try:
                outcomes[futures[future]] = future.result()
            except (RuntimeError, ValueError) as error:
                outcomes[futures[future]] = error
            bar.advance(task)
    return {kernel: outcomes[kernel] for kernel in kernels}


def report_kernels(
    shapes: Iterable[Shape], num_sms: int, memory_gbs: int, jobs: int | None = None
) -> int:
    """Compiles what selection picks for the shapes and prints the table.

    Returns:
        Exit status: 1 when a kernel did not compile.
    """
    outcomes = compile_kernels(selected_kernels(shapes, num_sms, memory_gbs), num_sms, jobs)
    reports = [
        (*kernel, outcome)
        for kernel, outcome in outcomes.items()
        if isinstance(outcome, KernelReport)
    ]
    if reports:
        tables.console.print(tables.kernels_table(reports))
    # One cause (NVRTC is missing, say) fails every kernel: each message once.
    errors = {str(outcome) for outcome in outcomes.values() if isinstance(outcome, Exception)}
    for error in errors:
        tables.console.print(error, style="red", markup=False)
    return 1 if errors else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `compile`."""
    add_shapes_argument(parser)
    parser.add_argument(
        "--num-sms",
        type=parse_count,
        default=H100_SMS,
        help=f"SM count of the GPU to compile for ({H100_SMS})",
    )
    parser.add_argument(
        "--memory-gbs",
        type=parse_count,
        default=H100_MEMORY_GBS,
        help=f"peak rate of its memory, GB/s ({H100_MEMORY_GBS}; {H200_MEMORY_GBS} for an H200)",
    )
    parser.add_argument("--jobs", type=parse_count, help="compiler threads (the CPU count)")


def run(args: argparse.Namespace) -> int:
    """Runs `compile`."""
    return report_kernels(given_shapes(args), args.num_sms, args.memory_gbs, args.jobs)
