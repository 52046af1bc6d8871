"""A user's file type-checks: `mypy --strict` against the package's own annotations."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

import jax_deepgemm

USERS_FILE = """
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_deepgemm as dg


class Weights(NamedTuple):
    values: jax.Array
    scales: jax.Array


def linear(x: jax.Array, weights: Weights) -> jax.Array:
    y: jax.Array = dg.gemm_fp8_fp8_bf16_nt(dg.quantize_per_token(x), weights)
    return y


def experts(x: jax.Array, weights: dg.Quantized, sizes: jax.Array) -> jax.Array:
    lhs = dg.quantize_per_token(x, power_of_two=True)
    reveal_type(lhs)
    y = dg.m_grouped_gemm_fp8_fp8_bf16_nt_ragged(lhs, weights, sizes, group_offset=1)
    reveal_type(y)
    return y


config: dg.GemmConfig = dg.select_config(64, 256, 512, op="masked", num_groups=4, expected_m=8)
tokens = np.zeros((4, 16, 512), np.float32)
d = dg.m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    (tokens, tokens), (tokens, tokens), np.ones(4, np.int32), 8, fill="zero", config=config
)
c = dg.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    (tokens, tokens), (tokens, tokens), jnp.zeros(4, jnp.int32)
)
e = dg.m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    (tokens, tokens), (tokens, tokens), np.ones(4, np.int32), np.int32(8)
)
layer = dg.Linear.quantize(tokens[0], np.zeros(16, np.float32))
stored = dg.Linear(dg.quantize_per_block(tokens[0]))
reveal_type(layer.weight)
scales: jax.Array = stored.weight.scales
if stored.bias is None:
    y: jax.Array = stored(tokens[1])
floats: jax.Array = dg.dequantize((tokens[0], tokens[0]), jnp.bfloat16)
dg.set_num_sms(np.int64(66))
config = dg.select_config(np.int64(64), 256, 512, num_groups=np.int32(4), op="ragged")
where: str = dg.backend()
sms: int = dg.get_num_sms()
"""

MISTAKES = """
import jax_deepgemm as dg

dg.gemm_fp8_fp8_bf16_nt(1, 2)
dg.gemm_fp8_fp8_bf16_nt((1, 2), (3, 4), config={"block_m": 64})
dg.m_grouped_gemm_fp8_fp8_bf16_nt_masked((1, 2), (3, 4), 5, 6, fill="nothing")
dg.get_num_sms().upper()
dg.Linear("weight", bias="bias").weight.no_such_attribute
dg.m_grouped_gemm_fp8_fp8_bf16_nt_masked((1, 2), (3, 4), 5, 6.0)
dg.set_num_sms(66.0)
dg.select_config(64, 256, 512.0)
"""


def check(source: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("mypy") is None:
        assert "CI" not in os.environ, "continuous integration must have mypy"
        pytest.skip("mypy is not installed (pip install 'jax_deepgemm[test]' brings it)")
    file = folder / "users_file.py"
    file.write_text(source)
    environment = dict(os.environ)
    # mypy finds what is installed, but not what an editable install only points to.
    package = pathlib.Path(jax_deepgemm.__file__).parents[1]
    if "site-packages" not in package.parts:
        environment["MYPYPATH"] = str(package)
    # Silent about what it follows: a user's mypy is about installed packages.
    options = ["--strict", "--follow-imports=silent", "--no-color-output"]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, file.name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_users_file_type_checks(tmp_path: pathlib.Path) -> None:
    done = check(USERS_FILE, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    quantized, product, weight = (line for line in done.stdout.splitlines() if "Revealed" in line)
    assert "jax_deepgemm.quantized_array.QuantizedArray" in quantized
    assert "jax_deepgemm.quantized_array.QuantizedArray" in weight
    assert product.endswith('.Array"')


def test_a_users_mistakes_are_found(tmp_path: pathlib.Path) -> None:
    done = check(MISTAKES, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for line in (4, 5, 6, 7, 8, 9, 10, 11):
        assert f"users_file.py:{line}: error" in done.stdout
