"""float8_e5m2 on either side: what is computed on the CPU, and what is compiled for the GPU."""

import os
import pathlib
import re
import subprocess
from typing import Any

import cuda.pathfinder
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm import GemmConfig, ffi
from tests import grouped_cases, numerics
from tests.lowering import cuda_calls, cuda_text, problem_of

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
MIXES = [
    pytest.param(a, b, id=f"{np.dtype(a).name[7:]}-{np.dtype(b).name[7:]}")
    for a in (E4M3, E5M2)
    for b in (E4M3, E5M2)
]
OPS = ("dense", *grouped_cases.OPS)


def cast(operands: Any, a_type: Any, b_type: Any) -> Any:
    """The operands in other types: rounded, so that the oracle sees what the operation does."""
    return operands._replace(a=operands.a.astype(a_type), b=operands.b.astype(b_type))


def call(op: str, operands: Any, array: Any) -> jax.Array:
    a, sfa, b, sfb = operands
    if op == "dense":
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb))
    return grouped_cases.call(op, a, sfa, b, sfb, array)


@pytest.mark.parametrize(("a_type", "b_type"), MIXES)
@pytest.mark.parametrize("op", OPS)
def test_agrees_with_float64(op: str, a_type: Any, b_type: Any) -> None:
    with jax.default_device(jax.devices("cpu")[0]):
        if op == "dense":
            operands = cast(numerics.dense_operands(33, 136, 272, seed=7), a_type, b_type)
            d, expected = call(op, operands, None), numerics.dense_oracle(operands)
        else:
            problem = grouped_cases.Problem(op, 3, 140, 136, 272)
            operands = cast(problem.operands(seed=7), a_type, b_type)
            (array,) = problem.random_arrays(np.random.default_rng(2))
            d, expected = call(op, operands, array), problem.oracle(operands, array)
    numerics.check(d, expected, **numerics.FLOAT32_SUMS)


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan, 57344.0])
def test_values_that_e4m3_lacks(special: float) -> None:
    """e5m2 has infinities, and numbers up to 57344."""
    operands = cast(numerics.dense_operands(4, 16, 128, seed=8), E5M2, E4M3)
    operands.a[1, 3] = special
    with jax.default_device(jax.devices("cpu")[0]):
        d = np.asarray(call("dense", operands, None)).astype(np.float64)
    with np.errstate(invalid="ignore"):
        expected = numerics.dense_oracle(operands)
    assert (np.isfinite(d) == np.isfinite(expected)).all()
    assert numerics.error(d[[0, 2, 3]], expected[[0, 2, 3]]) < numerics.BF16_TOLERANCE


@pytest.mark.parametrize(("a_type", "b_type"), MIXES)
@pytest.mark.parametrize("op", OPS)
def test_custom_call_says_the_types(op: str, a_type: Any, b_type: Any) -> None:
    if op == "dense":
        operands: Any = numerics.dense_operands(8, 16, 128, seed=0)
        array = None
    else:
        problem = grouped_cases.Problem(op, 2, 128, 16, 128)
        operands = problem.operands(seed=0)
        (array,) = problem.random_arrays(np.random.default_rng(0))
    operands = cast(operands, a_type, b_type)
    (cuda_call,) = cuda_calls(cuda_text(lambda *x: call(op, x, array), *operands))
    attributes = problem_of(cuda_call)
    assert (attributes["a_type"], attributes["b_type"]) == (a_type == E5M2, b_type == E5M2)
    names = {E4M3: "f8E4M3FN", E5M2: "f8E5M2"}
    assert re.findall(r"f8E\w+", cuda_call)[:2] == [names[a_type], names[b_type]]


@pytest.mark.parametrize(("a_type", "b_type"), MIXES)
def test_a_batch_of_both_keeps_the_types(a_type: Any, b_type: Any) -> None:
    operands = cast(numerics.dense_operands(8, 16, 128, seed=0), a_type, b_type)
    batched = [jnp.stack([x, x]) for x in operands]
    function = jax.vmap(lambda *x: call("dense", x, None))
    (cuda_call,) = cuda_calls(cuda_text(function, *batched))
    attributes = problem_of(cuda_call)
    assert (attributes["op"], attributes["a_type"], attributes["b_type"]) == (
        2,
        a_type == E5M2,
        b_type == E5M2,
    )


@pytest.mark.parametrize(("a_type", "b_type"), MIXES)
def test_tensor_cores_are_told_the_types(a_type: Any, b_type: Any, tmp_path: pathlib.Path) -> None:
    """Each mix compiles to a kernel of its own, whose instructions name its types."""
    try:
        cuda.pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except cuda.pathfinder.DynamicLibNotFoundError:
        assert "CI" not in os.environ, "continuous integration must have NVRTC"
        pytest.skip("NVRTC is not installed (pip install 'jax_deepgemm[test]' brings it)")
    report = ffi.compile_kernel(
        256,
        512,
        GemmConfig(128, 128, 4, 2),
        a_dtype=np.dtype(a_type).name,
        b_dtype=np.dtype(b_type).name,
    )
    assert report.spill_bytes == 0
    assert not report.wgmma_serialized
    assert ("e5m2" in report.name) == (E5M2 in (a_type, b_type))
    disassembler = cuda.pathfinder.find_nvidia_binary_utility("nvdisasm")
    if disassembler is None:
        assert "CI" not in os.environ, "continuous integration must have nvdisasm"
        pytest.skip("nvdisasm is not installed (pip install 'jax_deepgemm[test]' brings it)")
    cached = pathlib.Path(report.path).read_bytes()
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(cached[cached.index(b"\x7fELF") :])
    listing = subprocess.run(
        [disassembler, "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    names = {E4M3: "E4M3", E5M2: "E5M2"}
    found = set(re.findall(r"QGMMA\.\w+\.F32\.(\w+)\.(\w+)", listing))
    assert found == {(names[a_type], names[b_type])}


def test_compile_kernel_refuses_other_types() -> None:
    with pytest.raises(ValueError, match=r"a_dtype must be float8_e4m3fn or float8_e5m2, got 'e5'"):
        ffi.compile_kernel(256, 512, GemmConfig(128, 128, 4, 2), a_dtype="e5")
