"""What a bug report needs: versions, GPUs, compiler, cache, environment."""

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path

import jax
from rich.table import Table

import jax_deepgemm
from jax_deepgemm.cli import machine, tables
from jax_deepgemm.ffi import _native, toolchain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` has no options."""


def run(args: argparse.Namespace) -> int:
    """Runs `info`; works without GPU, driver and compiler."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("python", f"{platform.python_version()}, {platform.platform()}")
    for package, version in machine.installed_versions().items():
        table.add_row(package, version)
    table.add_row("backend", _or_error(jax_deepgemm.backend))
    for device in jax.devices():
        table.add_row("device", f"{device.id}: {device.platform}, {device.device_kind}")
    gpus = machine.query_gpus()
    for gpu in gpus:
        table.add_row("gpu", ", ".join(f"{key} {value}" for key, value in gpu.items()))
    if not gpus:
        table.add_row("gpu", "nvidia-smi lists none")
    table.add_row("compiler", _or_error(_compiler))
    for name, value in sorted(os.environ.items()):
        if name.startswith("DG_"):
            table.add_row(name, value)
    cache = _native.cache_dir()
    sizes = _file_sizes(Path(cache)) if cache else {}
    table.add_row(
        "cache",
        f"{cache}: {len(sizes)} files, {sum(sizes.values())} bytes"
        if cache
        else "none: neither DG_CACHE_DIR nor HOME is set",
    )
    tables.console.print(table)
    for path, size in sizes.items():
        print(f"{size:>10}  {path}")
    return 0


def _file_sizes(folder: Path) -> dict[Path, int]:
    """Bytes of every file below a folder, by its path there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder): path.stat().st_size for path in files}


def _or_error(describe: Callable[[], str]) -> str:
    """What `describe` returns, or says when it raises."""
    try:
        return describe()
    except RuntimeError as error:
        return str(error)


def _compiler() -> str:
    tools = toolchain()
    return f"{tools.compiler} {tools.version}, {tools.path}"
