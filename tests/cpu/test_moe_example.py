"""The mixture-of-experts example: right against float32, jitted, and loud when it is wrong."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm

EXAMPLE = Path(__file__).parents[2] / "examples" / "moe_forward.py"
TOKENS = 13


@pytest.fixture(scope="module")
def moe():
    """The example with fewer and smaller experts, some of which get no token."""
    spec = importlib.util.spec_from_file_location("moe_forward", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EXPERTS, module.TOP_K, module.WIDTH, module.HIDDEN = 24, 3, 160, 80
    return module


@pytest.fixture(scope="module")
def layers(moe):
    """The layer in float32 and in FP8."""
    keys = jax.random.split(jax.random.key(1), 3)
    router, gate_up, down = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            keys,
            (
                (moe.EXPERTS, moe.WIDTH),
                (moe.EXPERTS, 2 * moe.HIDDEN, moe.WIDTH),
                (moe.EXPERTS, moe.WIDTH, moe.HIDDEN),
            ),
            strict=True,
        )
    )
    # Experts are liked in unequal measure, so that groups are uneven.
    router *= jnp.linspace(0.1, 3, moe.EXPERTS)[:, None]
    layer = moe.Layer(router, gate_up / moe.WIDTH**0.5, down / moe.HIDDEN**0.5)
    quantized = map(jax_deepgemm.quantize_per_block, (layer.gate_up, layer.down))
    return layer, moe.Layer(router, *quantized)


def float64_block(moe, x, layer):
    """The block in NumPy, one token and one expert after the other."""
    router, gate_up, down = (np.asarray(w, np.float64) for w in layer)
    y = np.zeros(x.shape)
    for token, out in zip(np.asarray(x, np.float64), y, strict=True):
        scores = router @ token
        best = np.argsort(-scores)[: moe.TOP_K]
        weights = np.exp(scores[best] - scores[best].max())
        for expert, weight in zip(best, weights / weights.sum(), strict=True):
            gate, up = np.split(gate_up[expert] @ token, 2)
            out += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return y


def relative_error(y, z):
    return np.linalg.norm(np.asarray(y, np.float64) - z) / np.linalg.norm(z)


def test_reference_is_a_mixture_of_experts(moe, layers):
    x = jax.random.normal(jax.random.key(2), (TOKENS, moe.WIDTH))
    assert relative_error(moe.reference(x, layers[0]), float64_block(moe, x, layers[0])) < 1e-5


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_block_is_the_reference(moe, layers, name, tokens):
    layer, quantized = layers
    x = jax.random.normal(jax.random.key(3), (tokens, moe.WIDTH))
    sizes = np.bincount(np.ravel(moe.route(x, layer.router)[1]), minlength=moe.EXPERTS)
    assert sizes.min() == 0 and (tokens == 1 or sizes.max() > 1), "uneven and empty groups"
    y = getattr(moe, name)(x, quantized)
    assert y.shape == x.shape and y.dtype == jnp.float32
    assert relative_error(y, moe.reference(x, quantized)) < 1e-3
    # Three FP8 roundings cost a few percent. Less would mean that they did not happen.
    assert 0.01 < relative_error(y, float64_block(moe, x, layer)) < 0.1


@pytest.mark.parametrize(
    "name, operation",
    [
        ("prefill", "m_grouped_gemm_fp8_fp8_bf16_nt_ragged"),
        ("decode", "m_grouped_gemm_fp8_fp8_bf16_nt_masked"),
    ],
)
def test_block_multiplies_in_grouped_fp8(moe, layers, name, operation):
    x = jnp.zeros((TOKENS, moe.WIDTH))
    jaxpr = str(jax.make_jaxpr(getattr(moe, name))(x, layers[1]))
    assert jaxpr.count(f"{operation}[") == 2


def test_is_shown_whole_on_a_page():
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_main_prints_errors_and_backend(moe, capsys):
    with pytest.raises(SystemExit) as stopped:
        moe.main()
    printed = capsys.readouterr().out
    assert not stopped.value.code, printed
    assert printed.count("error ") == 2 and jax_deepgemm.backend() in printed


@pytest.mark.parametrize("limit", ["MAX_ERROR", "MAX_FP8_COST"])
def test_large_error_is_a_failure(moe, monkeypatch, limit):
    monkeypatch.setattr(moe, limit, -1)
    with pytest.raises(SystemExit) as stopped:
        moe.main()
    assert stopped.value.code
