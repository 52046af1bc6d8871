"""The compiler, what is read from its log, the toolchain's errors, and the driver's device list."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import cuda.pathfinder
import pytest

from jax_deepgemm.ffi import _native
from jax_deepgemm.ffi.toolchain import locate_nvrtc, toolchain
from tests.jit_process import nvrtc, reports, run, run_package

CATCH = """
def message(call):
    try:
        call()
    except native.Error as error:
        report({"message": str(error), "runtime_error": isinstance(error, RuntimeError)})
"""


@pytest.mark.parametrize("portable", [False, True])
def test_digest_is_sha256(portable: bool) -> None:
    random = b"".join(hashlib.sha512(bytes([i])).digest() for i in range(256))
    for data in [random[:length] for length in range(200)] + [random, random * 10]:
        assert _native.digest(data, portable) == hashlib.sha256(data).hexdigest()


def test_resources(tmp_path: Path) -> None:
    body = """
report(native.jit_compile("shared", "shared", '''
extern "C" __global__ void shared(float* x) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[255 - threadIdx.x];
}''', {})["resources"])
report(native.jit_compile("local", "local", '''
extern "C" __global__ void local(float* x, int n) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i];
  for (int i = 0; i < n; ++i) v[(i * 7) % 64] += v[i % 64];
  for (int i = 0; i < 64; ++i) x[i] = v[i];
}''', {})["resources"])
report(native.jit_compile("spill", "spill", '''
extern "C" __global__ void __launch_bounds__(1024) spill(float* x) {
  float v[128];
  for (int i = 0; i < 128; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = v[127 - i] * v[i];
}''', {})["resources"])
"""
    shared, local, spill = reports(run(body, tmp_path))
    assert 0 < shared["registers"] <= 64
    assert (shared["spill_bytes"], shared["stack_bytes"]) == (0, 0)
    assert (local["spill_bytes"], local["stack_bytes"]) == (0, 64 * 4)
    assert spill["registers"] == 64
    assert spill["spill_bytes"] > 0
    assert not any(result["wgmma_serialized"] for result in (shared, local, spill))


def test_resources_are_those_of_the_entry(tmp_path: Path) -> None:
    body = """
TEXT = '''
template <int kSize> __device__ void shuffle(float* x, int n) {
  float v[kSize];
  for (int i = 0; i < kSize; ++i) v[i] = x[i];
  for (int i = 0; i < n; ++i) v[(i * 7) % kSize] += v[i % kSize];
  for (int i = 0; i < kSize; ++i) x[i] = v[i];
}
extern "C" __global__ void before(float* x, int n) { shuffle<64>(x, n); }
extern "C" __global__ void entry(float* x, int n) { shuffle<128>(x, n); }
extern "C" __global__ void entry_after(float* x, int n) { shuffle<256>(x, n); }
'''
for name in ("before", "entry", "entry_after", "absent"):
    report(native.jit_compile(name, name, TEXT, {})["resources"])
"""
    results = reports(run(body, tmp_path))
    assert [result["stack_bytes"] for result in results] == [256, 512, 1024, -1]
    assert results[3]["registers"] == results[3]["spill_bytes"] == -1


@pytest.mark.parametrize("printf", ["", 'printf("x");'], ids=["clean", "printf"])
def test_serialized_wgmma_is_noticed(printf: str, tmp_path: Path) -> None:
    # A printf anywhere in a kernel makes ptxas wait after every wgmma (message C7510).
    body = f"""
report(native.jit_compile("mma", "mma", r'''
extern "C" __global__ void __launch_bounds__(128) mma(float* x, unsigned long long a) {{
  float d[4] = {{x[0], x[1], x[2], x[3]}};
  {printf}
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int k = 0; k < 4; ++k)
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {{%0, %1, %2, %3}}, "
                 "%4, %4, 1, 1, 1;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + 2 * k));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) x[4 * threadIdx.x + i] = d[i];
}}''', {{}}))
"""
    for _ in ("compiled", "disk"):
        (result,) = reports(run(body, tmp_path))
        assert result["resources"]["wgmma_serialized"] == bool(printf)
        assert ("(C75" in result["log"]) == bool(printf)


def test_headers_may_include_each_other(tmp_path: Path) -> None:
    body = """
headers = {"outer.cuh": '#include "folder/inner.cuh"', "folder/inner.cuh": HEADERS["factor.cuh"]}
report(compile(body=text("scale").replace("factor", "outer"), headers=headers))
"""
    assert reports(run(body, tmp_path))[0]["origin"] == "compiled"


def test_compile_error_has_kernel_compiler_and_log(tmp_path: Path) -> None:
    body = CATCH + 'message(lambda: compile(body="not a kernel"))\nreport(native.toolchain())'
    error, tools = reports(run(body, tmp_path))
    assert error["runtime_error"]
    assert error["message"].startswith(
        "nvrtcCompileProgram: NVRTC_ERROR_COMPILATION while compiling scale with NVRTC "
        f"{tools['version']} ({tools['path']}):\nscale.cu(1): error: "
    )


def test_ptxas_error_has_the_log(tmp_path: Path) -> None:
    body = CATCH + (
        "message(lambda: compile(body='''extern \"C\" __global__ void scale() "
        "{ asm(\"nonsense;\"); }'''))"
    )
    (error,) = reports(run(body, tmp_path))
    assert "Not a name of any known instruction: 'nonsense'" in error["message"]


def test_missing_nvrtc_is_one_error_and_looked_for_again(tmp_path: Path) -> None:
    body = (
        CATCH
        + """
import os
def absent():
    raise RuntimeError("NVRTC not found: install it")
native.set_nvrtc_locator(absent)
message(compile)
message(native.toolchain)
native.set_nvrtc_locator(lambda: os.devnull)
message(compile)
native.set_nvrtc_locator(lambda: NVRTC)
report(compile())
"""
    )
    first, second, not_a_library, good = reports(run(body, tmp_path))
    assert first == second == {"message": "NVRTC not found: install it", "runtime_error": True}
    assert not_a_library["message"].startswith("NVRTC cannot be loaded: /dev/null")
    assert good["origin"] == "compiled"


def test_locate_nvrtc_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise cuda.pathfinder.DynamicLibNotFoundError(f'Failure finding "{name}":\n  many\n  lines')

    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", load)
    with pytest.raises(RuntimeError) as raised:
        locate_nvrtc()
    assert str(raised.value) == (
        "NVRTC not found: looked for libnvrtc with cuda-pathfinder (pip packages, conda, system "
        'libraries, CUDA_HOME). Install it with: pip install "jax_deepgemm[cuda13]" (or cuda12 '
        'for CUDA 12). DynamicLibNotFoundError: Failure finding "nvrtc": many lines'
    )


def test_toolchain_names_nvrtc() -> None:
    path = nvrtc()
    _native.set_nvrtc_locator(locate_nvrtc)  # As jax_deepgemm.ffi does at import.
    info = toolchain()
    assert (info.compiler, info.path) == ("NVRTC", path)
    assert int(info.version.split(".")[0]) >= 12


# Enough of a driver to list two devices and to plan kernels for them. INIT is what cuInit returns,
# MAJOR.0 the devices' compute capability, MISSING an entry point that the driver is too old for.
# Handles are no ordinals, and no context is current.
FAKE_DRIVER = """
#include <string.h>
static int init(unsigned flags) { (void)flags; return INIT; }
static int error_name(int code, const char** name) {
  *name = code == 999 ? "CUDA_ERROR_UNKNOWN" : 0; return code == 999 ? 0 : 1; }
static int error_string(int code, const char** text) {
  *text = code == 999 ? "unknown error" : 0; return code == 999 ? 0 : 1; }
static int device_count(int* count) { *count = 2; return 0; }
static int device(int* handle, int ordinal) { *handle = 10 + ordinal; return 0; }
static int device_name(char* name, int length, int handle) {
  strncpy(name, handle == 10 ? "Fake GPU 0" : "Fake GPU 1", length); return 0; }
static int attribute(int* value, int which, int handle) {
  *value = which == 75 ? MAJOR : which == 76 ? 0 : which == 16 ? 122 + handle :
           which == 36 ? (handle == 10 ? 2619000 : 0) : which == 37 ? 5120 : -1;
  return 0; }
static int no_context(int* handle) { (void)handle; return 201; }
static int unused(void) { return 1; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags,
                        void* status) {
  (void)version; (void)flags; (void)status;
  struct { const char* name; void* function; } table[] = {
      {"cuInit", init}, {"cuGetErrorName", error_name}, {"cuGetErrorString", error_string},
      {"cuDeviceGetCount", device_count}, {"cuDeviceGet", device}, {"cuDeviceGetName", device_name},
      {"cuDeviceGetAttribute", attribute}, {"cuCtxGetDevice", no_context}, {MISSING, 0}};
  *function = unused;
  for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); ++i)
    if (strcmp(table[i].name, name) == 0) *function = table[i].function;
  return 0;
}
"""


def build_driver(folder: Path, init: int = 0, major: int = 9, missing: str = "") -> str:
    """Builds FAKE_DRIVER and returns the LD_LIBRARY_PATH to find it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build a driver with")
    source = folder / "driver.c"
    source.write_text(FAKE_DRIVER)
    output = folder / "libcuda.so.1"
    defines = [f"-DINIT={init}", f"-DMAJOR={major}", f'-DMISSING="{missing}"']
    subprocess.run([compiler, "-shared", "-fPIC", *defines, source, "-o", output], check=True)
    return str(folder)


def list_devices(tmp_path: Path, init: int, missing: str = "") -> dict[str, object]:
    """What cuda_devices returns or raises with a driver whose cuInit returns `init`."""
    path = build_driver(tmp_path, init=init, missing=missing)
    body = CATCH + "message(lambda: report({'devices': native.cuda_devices()}))"
    (result,) = reports(run(body, tmp_path, LD_LIBRARY_PATH=path))
    return result


HOPPER = {"major": 9, "minor": 0}


def test_cuda_devices(tmp_path: Path) -> None:
    assert list_devices(tmp_path, init=0)["devices"] == [
        {"name": "Fake GPU 0", "ordinal": 0, **HOPPER, "num_sms": 132, "memory_gbs": 3352},
        {"name": "Fake GPU 1", "ordinal": 1, **HOPPER, "num_sms": 133, "memory_gbs": 0},
    ]


def test_driver_without_device_lists_none(tmp_path: Path) -> None:
    assert list_devices(tmp_path, init=100) == {"devices": []}


def test_driver_error_names_call_and_code(tmp_path: Path) -> None:
    expected = "cuInit: CUDA_ERROR_UNKNOWN (unknown error)"
    assert list_devices(tmp_path, init=999)["message"] == expected
    assert list_devices(tmp_path, init=998)["message"] == "cuInit: CUresult 998"


def test_driver_that_is_too_old(tmp_path: Path) -> None:
    assert list_devices(tmp_path, init=0, missing="cuLibraryLoadData")["message"] == (
        "the CUDA driver (libcuda.so.1) is too old: it has no cuLibraryLoadData; jax_deepgemm "
        "needs a driver for CUDA 12.0 or newer"
    )


# Without a GPU, XLA's CPU compiler runs the instantiate handler, which plans, checks the device and
# compiles; nothing is launched.
INSTANTIATE = """
import json
import jax, jax.numpy as jnp, numpy as np
import jax_deepgemm
from jax_deepgemm.ffi import _native

jax.devices()  # Registrations before this are queued, and types would come after targets.
jax.ffi.register_ffi_type(_native.GEMM_STATE_TYPE, _native.gemm_state_type(), platform="cpu")
jax.ffi.register_ffi_target(_native.GEMM_TARGET, _native.gemm_handlers(), platform="cpu")
dense = {"op": 0, "num_groups": 1, "m": 64, "expected_m": 0, "n": 136, "k": 144}
options = dict.fromkeys(["num_sms", "fill_zero", *jax_deepgemm.GemmConfig.__dataclass_fields__], 0)
problem = {key: np.int64(x) for key, x in (dense | options).items()}
call = jax.ffi.ffi_call(_native.GEMM_TARGET, jax.ShapeDtypeStruct((64, 136), jnp.bfloat16))

def outcome(action):
    try:
        return action()
    except RuntimeError as error:
        return str(error)

compiled = outcome(lambda: bool(jax.jit(lambda: call(problem=problem)).lower().compile()))
print(json.dumps({"compiled": compiled, "num_sms": outcome(jax_deepgemm.get_num_sms)}))
"""


@pytest.mark.parametrize("major", [8, 10])
def test_gpu_must_be_hopper(major: int, tmp_path: Path) -> None:
    path = build_driver(tmp_path, major=major)
    (result,) = reports(run_package(INSTANTIATE, tmp_path, LD_LIBRARY_PATH=path))
    assert result == {
        "compiled": "UNIMPLEMENTED: gemm_fp8_fp8_bf16_nt: this kernel needs a Hopper GPU "
        f"(sm_90: H100, H200, GH200), but device 10 is Fake GPU 0 (sm_{major}0)",
        "num_sms": "get_num_sms: there is no Hopper GPU here; call set_num_sms first",
    }
    assert not (tmp_path / "cache").exists()


def test_hopper_gpu_gets_a_kernel(tmp_path: Path) -> None:
    nvrtc()
    path = build_driver(tmp_path)
    (result,) = reports(run_package(INSTANTIATE, tmp_path, LD_LIBRARY_PATH=path))
    assert result == {"compiled": True, "num_sms": 132}
    assert len(list((tmp_path / "cache").iterdir())) == 1


# What `python -m jax_deepgemm compile` does for the problem of INSTANTIATE.
COMPILE_AHEAD = """
import json
from jax_deepgemm import ffi, select_config
print(json.dumps(ffi.compile_kernel(136, 144, select_config(64, 136, 144)).source))
"""


def test_programs_take_kernels_that_were_compiled_ahead(tmp_path: Path) -> None:
    nvrtc()
    path = build_driver(tmp_path)
    assert reports(run_package(COMPILE_AHEAD, tmp_path)) == ["compiled"]
    debug = run_package(INSTANTIATE, tmp_path, LD_LIBRARY_PATH=path, DG_JIT_DEBUG="1").stderr
    assert ": disk hit " in debug
    assert ": compiled in " not in debug


def test_no_driver_lists_none() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert _native.cuda_devices() == []
    else:
        pytest.skip("this machine has a CUDA driver")
