"""What `import jax_deepgemm` does, what it leaves to the first call, and what it exports."""

import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import pytest
from packaging.version import Version

import jax_deepgemm
from jax_deepgemm import ffi

FUNCTIONS = [
    "backend",
    "dequantize",
    "gemm_fp8_fp8_bf16_nt",
    "get_col_major_tma_aligned_tensor",
    "get_m_alignment_for_contiguous_layout",
    "get_num_sms",
    "get_tma_aligned_size",
    "legal_configs",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    "m_grouped_gemm_fp8_fp8_bf16_nt_ragged",
    "quantize_per_block",
    "quantize_per_token",
    "quantize_per_token_both",
    "quantize_per_token_transposed",
    "quantized_sharding",
    "select_config",
    "set_num_sms",
    "silu_mul_quantize",
    "smem_bytes",
]
CLASSES = ["GemmConfig", "Linear", "Quantized", "QuantizedArray"]


def run_fresh(code: str) -> str:
    """Returns what a fresh interpreter prints for `code`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_the_driver_nor_nvrtc() -> None:
    mapped = run_fresh("import jax_deepgemm; print(open('/proc/self/maps').read())")
    assert "_native" in mapped, "the extension itself must be among the mapped files"
    assert "libcuda.so" not in mapped
    assert "libnvrtc" not in mapped


def test_import_starts_no_jax_backend() -> None:
    # JAX refuses to change the number of CPU devices once a backend has started.
    devices = run_fresh(
        "import os; os.environ.pop('XLA_FLAGS', None)\n"
        "import jax, jax_deepgemm\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(len(jax.devices('cpu')))"
    )
    assert devices == "3"


@pytest.mark.parametrize("module", ["rich", "torch", "jax_deepgemm.cli"])
def test_import_leaves_out(module: str) -> None:
    assert run_fresh(f"import sys, jax_deepgemm; print({module!r} in sys.modules)") == "False"


def test_package_is_typed() -> None:
    assert importlib.resources.files(jax_deepgemm).joinpath("py.typed").is_file()


def test_version_is_pep_440_and_the_installed_one() -> None:
    assert Version(jax_deepgemm.__version__) == Version(importlib.metadata.version("jax-deepgemm"))


@pytest.mark.parametrize("built", [(0, 4), (1, 0)])
def test_newer_ffi_api_than_the_runtime_is_refused(built: tuple[int, int]) -> None:
    with pytest.raises(ImportError, match=r"(?i)reinstall|rebuild|install|upgrade") as raised:
        ffi._check_api_version(built, (0, 3))
    message = str(raised.value)
    assert "{}.{}".format(*built) in message and "0.3" in message


@pytest.mark.parametrize("runtime", [(0, 3), (0, 5), (1, 0)])
def test_same_or_older_ffi_api_is_accepted(runtime: tuple[int, int]) -> None:
    assert ffi._check_api_version((0, 3), runtime) is None


def test_supported_names_are_exported() -> None:
    exported = set(jax_deepgemm.__all__)
    assert exported - {"__version__"} == set(FUNCTIONS + CLASSES)
    assert all(hasattr(jax_deepgemm, name) for name in exported)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_documents_its_arguments_and_result(name: str) -> None:
    function = getattr(jax_deepgemm, name)
    documentation = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    for argument in signature.parameters:
        assert f"{argument}:" in documentation, f"{name} does not say what {argument} is"
    if signature.return_annotation not in (None, "None"):
        assert "Returns" in documentation, f"{name} does not say what it returns"


@pytest.mark.parametrize("name", CLASSES)
def test_class_documents_its_fields(name: str) -> None:
    documented = getattr(jax_deepgemm, name)
    documentation = inspect.getdoc(documented) or ""
    for field in documented.__annotations__:
        assert field in documentation, f"{name} does not say what {field} is"
    # What NamedTuple and dataclass write by themselves is no documentation.
    assert not documentation.startswith(f"{name}(")
