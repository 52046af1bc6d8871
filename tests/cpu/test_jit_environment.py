"""The environment variables: each one's meaning, its off values, and that it is read once."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.jit_process import GEMM, ROOT, nvrtc, reports, run, run_package

COMPILE = "report(compile())"

# Switch -> what it prints while a kernel is compiled.
SWITCHES = {
    "DG_PTXAS_VERBOSE": "ptxas info    : Used ",
    "DG_PRINT_REG_REUSE": "FFMA runs of scale: 0",
    "DG_JIT_PRINT_NVCC_COMMAND": "scale: NVRTC --gpu-architecture=sm_90a -std=c++20",
    "DG_JIT_DEBUG": "jit: scale: compiled in ",
}


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("there is no nvcc on the PATH")
    return found


@pytest.mark.parametrize("value", ["1", "yes"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_prints(switch: str, value: str, tmp_path: Path) -> None:
    stderr = run(COMPILE, tmp_path, **{switch: value}).stderr
    assert stderr.startswith("jax_deepgemm: ")
    assert SWITCHES[switch] in stderr


@pytest.mark.parametrize("value", ["", "0"])
def test_switches_off_print_nothing(value: str, tmp_path: Path) -> None:
    assert run(COMPILE, tmp_path, **dict.fromkeys(SWITCHES, value)).stderr == ""


@pytest.mark.parametrize("value", ["1", "0", ""])
@pytest.mark.parametrize(
    ("switch", "constant", "on", "off"),
    [("DG_RACECHECK", "kArrivalsPerWarp", 32, 1), ("DG_STREAM_ONLY", "kStreamsOnly", 1, 0)],
)
def test_switch_makes_other_kernels(
    switch: str, constant: str, on: int, off: int, value: str, tmp_path: Path
) -> None:
    body = """
from jax_deepgemm import GemmConfig
from jax_deepgemm.config import check_problem
from jax_deepgemm.ffi import _native
problem = check_problem("test", 64, 136, 304, num_sms=132, op="dense")
print(_native.kernel_source(problem, GemmConfig(64, 64, 4, 1).fields)[0])
"""
    text = run_package(body, tmp_path, **{switch: value}).stdout
    assert f"constexpr int {constant} = {on if value == '1' else off};" in text


def test_debug_tells_where_a_kernel_came_from(tmp_path: Path) -> None:
    stderr = run(COMPILE + "\n" + COMPILE, tmp_path, DG_JIT_DEBUG="1").stderr
    (file,) = (tmp_path / "cache").iterdir()
    assert f"jit: scale: written to {file}\n" in stderr
    assert stderr.endswith("jax_deepgemm: jit: scale: memory hit\n")
    stderr = run(COMPILE, tmp_path, DG_JIT_DEBUG="1").stderr
    assert stderr == f"jax_deepgemm: jit: scale: disk hit {file}\n"


def test_ptxas_report_is_printed_on_a_disk_hit_too(tmp_path: Path) -> None:
    run(COMPILE, tmp_path)
    assert " registers" in run(COMPILE, tmp_path, DG_PTXAS_VERBOSE="1").stderr


@pytest.mark.parametrize(
    ("cache_dir", "expected"),
    [("", ".jax_deepgemm"), ("~/kernels", "kernels"), ("~", "."), ("{home}/given", "given")],
    ids=["default", "tilde", "home", "absolute"],
)
def test_cache_dir(cache_dir: str, expected: str, tmp_path: Path) -> None:
    body = COMPILE + "\nreport(native.toolchain())"
    compiled, toolchain = reports(run(body, cache_dir.format(home=tmp_path), HOME=str(tmp_path)))
    folder = tmp_path / expected / "cache"
    assert Path(compiled["path"]) == next(iter(folder.iterdir()))
    assert Path(toolchain["cache_dir"]) == tmp_path / expected


GROUPING_LOCALE = """
#include <locale>
struct Grouping : std::numpunct<char> {
  char do_thousands_sep() const override { return ','; }
  std::string do_grouping() const override { return "\\3"; }
};
extern "C" void group_digits() { std::locale::global(std::locale(std::locale(), new Grouping)); }
"""


def test_sources_do_not_follow_the_locale(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to make a locale with")
    library = tmp_path / "locale.so"
    (tmp_path / "locale.cc").write_text(GROUPING_LOCALE)
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "locale.cc")]
    subprocess.run(command, check=True)
    body = f"""
import ctypes
from jax_deepgemm import GemmConfig
from jax_deepgemm.config import check_problem
from jax_deepgemm.ffi import _native
def sources():
    problem = check_problem("test", 4096, 7168, 16384, num_sms=132)
    config = GemmConfig(block_m=128, block_n=128, num_stages=5, raster_m=1024).fields
    yield _native.kernel_name(problem, config), _native.kernel_source(problem, config)
    yield _native.quantize_kernel_source((0, 0, 0, 0, 1, 1024, 1024, 0))
before = list(sources())
ctypes.CDLL({str(library)!r}).group_digits()
print(list(sources()) == before)
"""
    assert run_package(body, tmp_path).stdout == "True\n"


def test_relative_cache_dir_stays_where_it_is(tmp_path: Path) -> None:
    relative = os.path.relpath(tmp_path / "kernels", ROOT)  # the process starts there
    body = f"""
import os
report(compile("one"))
os.chdir({str(tmp_path)!r})
report(compile("two"))
"""
    paths = [Path(result["path"]) for result in reports(run(body, relative))]
    assert all(path.is_absolute() for path in paths)
    kept = (tmp_path / "kernels" / "cache").iterdir()
    assert {path.resolve() for path in paths} == {path.resolve() for path in kept}


def test_cache_dir_in_the_home_of_who_has_none(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become a user whom the password database does not know")
    body = "import os\nos.setreuid(54321, 0)\ndel os.environ['HOME']\nreport(native.toolchain())"
    (toolchain,) = reports(run(body, "~/kernels"))
    assert toolchain["cache_dir"] == ""


@pytest.mark.parametrize(
    ("switches", "interleaved"),
    [
        ({}, True),
        ({"DG_DISABLE_FFMA_INTERLEAVE": "0"}, True),
        ({"DG_DISABLE_FFMA_INTERLEAVE": "1"}, False),
    ],
    ids=["default", "on", "off"],
)
def test_disable_ffma_interleave(
    switches: dict[str, str], interleaved: bool, tmp_path: Path
) -> None:
    nvrtc()
    body = GEMM + "print(any(run['alternates'] for run in _native.interleave(image)[1]))"
    assert run_package(body, tmp_path, **switches).stdout == f"{not interleaved}\n"


def test_print_reg_reuse_counts_runs_on_a_disk_hit_too(tmp_path: Path) -> None:
    nvrtc()
    stderr = run_package(GEMM, tmp_path, DG_PRINT_REG_REUSE="1").stderr
    assert stderr.startswith("jax_deepgemm: FFMA runs of gemm: ")
    assert "\n  .text.dg_gemm_" in stderr
    assert run_package(GEMM, tmp_path, DG_PRINT_REG_REUSE="1").stderr == stderr


def test_print_reg_reuse_prints_nothing_without_the_interleaver(tmp_path: Path) -> None:
    nvrtc()
    switches = {"DG_PRINT_REG_REUSE": "1", "DG_DISABLE_FFMA_INTERLEAVE": "1"}
    assert run_package(GEMM, tmp_path, **switches).stderr == ""


def test_variables_are_read_once(tmp_path: Path) -> None:
    body = f"""
import os
compile("one")
os.environ["DG_JIT_DEBUG"] = "1"
os.environ["DG_CACHE_DIR"] = {str(tmp_path / "other")!r}
report(compile("two"))
"""
    done = run(body, tmp_path / "first")
    assert done.stderr == ""
    assert reports(done)[0]["path"].startswith(str(tmp_path / "first"))


def test_nvcc_compiler(tmp_path: Path) -> None:
    path = nvcc()
    done = run(
        COMPILE + "\nreport(native.toolchain())",
        tmp_path,
        DG_NVCC_COMPILER=path,
        DG_JIT_PRINT_NVCC_COMMAND="1",
    )
    compiled, toolchain = reports(done)
    assert compiled["origin"] == "compiled"
    assert compiled["resources"]["registers"] > 0
    assert compiled["resources"]["spill_bytes"] == 0
    assert (toolchain["compiler"], toolchain["path"]) == ("NVCC", path)
    assert f"scale: {path} -gencode=arch=compute_90a,code=sm_90a -cubin" in done.stderr
    # NVRTC's cubin is another key.
    (by_nvrtc,) = reports(run(COMPILE, tmp_path))
    assert by_nvrtc["origin"] == "compiled"
    assert by_nvrtc["path"] != compiled["path"]


# Stands for nvcc where there is none: notes its arguments and what the input folder has, prints
# what ptxas would, and gives out the cubin beside it.
FAKE_NVCC = """#!/bin/sh
here={folder}
if [ "$1" = --version ]; then
  echo "Cuda compilation tools, release 13.0, V$(cat $here/version)"
  exit
fi
printf '%s\\n' "$@" >>$here/arguments
for word; do input=$word; done
(cd "$(dirname "$input")" && cat *.cu include/factor.cuh) >$here/input
while [ "$1" != -o ]; do shift; done
cp $here/scale.cubin "$2"
cat <<'END'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scale' for 'sm_90a'
ptxas info    : Function properties for scale
    24 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 77 registers, used 0 barriers
END
"""


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    folder = tmp_path / "toolkit"
    folder.mkdir()
    image = run("print(compile()['image'].hex())", folder / "nvrtc").stdout
    (folder / "scale.cubin").write_bytes(bytes.fromhex(image))
    (folder / "version").write_text("13.0.88")
    path = folder / "nvcc"
    path.write_text(FAKE_NVCC.format(folder=shlex.quote(str(folder))))
    path.chmod(0o755)
    return path


def test_command_line_and_log_of_nvcc(fake_nvcc: Path, tmp_path: Path) -> None:
    variables = {"DG_NVCC_COMPILER": str(fake_nvcc), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    body = """
result = compile()
report(result)
report(native.toolchain())
report({"image": None, "is_elf": result["image"].startswith(b"\\x7fELF"), "text": text("scale")})
"""
    done = run(body, tmp_path / "cache", DG_JIT_PRINT_NVCC_COMMAND="1", **variables)
    compiled, toolchain, rest = reports(done)
    arguments = (fake_nvcc.parent / "arguments").read_text().splitlines()
    source = arguments[-1]
    folder = source.removesuffix("/scale.cu")
    assert folder.startswith(f"{tmp_path}/temporary/jax_deepgemm.")
    assert arguments == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-cubin",
        "-std=c++20",
        "--expt-relaxed-constexpr",
        "--generate-line-info",
        "--ptxas-options=-v",
        f"-I{folder}/include",
        "-o",
        f"{folder}/scale.cubin",
        source,
    ]
    assert done.stderr == f"jax_deepgemm: scale: {fake_nvcc} {' '.join(arguments)}\n"
    factor = "constexpr float kFactor = 3.0f;"
    assert (fake_nvcc.parent / "input").read_text() == rest["text"] + factor
    assert list((tmp_path / "temporary").iterdir()) == []
    assert compiled["origin"] == "compiled"
    assert rest["is_elf"]
    assert compiled["log"].startswith("ptxas info    : 0 bytes gmem\n")
    assert compiled["resources"] == {
        "registers": 77,
        "spill_bytes": 12,
        "stack_bytes": 24,
        "wgmma_serialized": False,
    }
    assert toolchain == {
        "compiler": "NVCC",
        "version": "13.0.88",
        "path": str(fake_nvcc),
        "cache_dir": str(tmp_path / "cache"),
    }


def test_key_covers_nvcc_and_its_version(fake_nvcc: Path, tmp_path: Path) -> None:
    def origin(**variables: str) -> str:
        (result,) = reports(run(COMPILE, tmp_path, **variables))
        return str(result["origin"])

    nvcc = {"DG_NVCC_COMPILER": str(fake_nvcc)}
    assert [origin(), origin(**nvcc), origin(**nvcc)] == ["compiled", "compiled", "disk"]
    (fake_nvcc.parent / "version").write_text("13.0.89")
    assert origin(**nvcc) == "compiled"
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        assert [origin(**nvcc, **{name: "-G"}) for _ in range(2)] == ["compiled", "disk"]


def test_nvcc_where_children_are_not_waited_for(fake_nvcc: Path, tmp_path: Path) -> None:
    body = "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n" + COMPILE
    nvcc = {"DG_NVCC_COMPILER": str(fake_nvcc)}
    (result,) = reports(run(body, tmp_path / "cache", **nvcc))
    assert result["resources"]["registers"] == 77
    # Then whether it made what it was to make is all that is known.
    (fake_nvcc.parent / "scale.cubin").unlink()
    failing = (
        body.replace("report(compile())", "")
        + """
try:
    compile("other")
except RuntimeError as error:
    print(error)
"""
    )
    message = run(failing, tmp_path / "cache", **nvcc).stdout
    assert message.startswith("nvcc: exit status 0 while compiling other")
    assert "ptxas info    : Used 77 registers" in message


def test_nvcc_error_has_the_log(tmp_path: Path) -> None:
    body = """
try:
    compile("bad", headers={"factor.cuh": ""})
except native.Error as error:
    report({"message": str(error)})
"""
    path = nvcc()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = run(body, tmp_path, DG_NVCC_COMPILER=path, TMPDIR=str(temporary))
    message = reports(done)[0]["message"]
    assert message.startswith("nvcc: exit status ")
    assert "while compiling bad with NVCC 1" in message
    assert path in message
    assert 'identifier "kFactor" is undefined' in message
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/no/such/nvcc", "DG_NVCC_COMPILER: cannot run /no/such/nvcc: No such file or directory"),
        ("true", "DG_NVCC_COMPILER: true --version is not an nvcc's (exit status 0):"),
        ("false", "DG_NVCC_COMPILER: false --version is not an nvcc's (exit status 1):"),
    ],
    ids=["missing", "silent", "failing"],
)
def test_nvcc_that_is_none(path: str, expected: str, tmp_path: Path) -> None:
    body = """
try:
    compile()
except native.Error as error:
    report({"message": str(error)})
"""
    (result,) = reports(run(body, tmp_path, DG_NVCC_COMPILER=path))
    assert result["message"].startswith(expected)


def test_empty_nvcc_compiler_means_nvrtc(tmp_path: Path) -> None:
    (result,) = reports(run("report(native.toolchain())", tmp_path, DG_NVCC_COMPILER=""))
    assert result["compiler"] == "NVRTC"
