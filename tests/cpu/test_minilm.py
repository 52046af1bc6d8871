"""The MiniLM example: right in float32, and in FP8 close to it."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_deepgemm

pytest.importorskip("safetensors", reason="needs the extra `examples`")
pytest.importorskip("tokenizers", reason="needs the extra `examples`")

EXAMPLE = Path(__file__).parents[2] / "examples" / "minilm_fp8.py"


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.spec_from_file_location("minilm_fp8", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(minilm):
    try:
        return minilm.model_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def comparison(minilm, folder):
    return minilm.compare(folder)


def embed_float32(minilm, folder, texts):
    token_ids, mask = minilm.tokenize(folder, texts)
    model = minilm.load_model(folder)
    return np.asarray(minilm.embed(model, token_ids, mask, minilm.linear_float32))


def test_float32_gives_the_published_similarities(minilm, folder):
    # The example and the figures of the quickstart of Sentence Transformers, for this model.
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    embeddings = embed_float32(minilm, folder, texts)
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(embeddings @ embeddings.T, published, atol=6e-5)


def test_embedding_does_not_depend_on_padding(minilm, folder):
    short, long = minilm.SENTENCES[6], max(minilm.SENTENCES, key=len)
    alone = embed_float32(minilm, folder, [short])
    padded = embed_float32(minilm, folder, [short, long])
    np.testing.assert_allclose(padded[0], alone[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(padded, axis=1), 1, atol=1e-6)


def test_every_linear_layer_runs_in_fp8(minilm, folder, monkeypatch):
    shapes = []
    layers = sys.modules[jax_deepgemm.Linear.__module__]
    gemm = layers.gemm_fp8_fp8_bf16_nt

    def counting(lhs, rhs):
        shapes.append(rhs[0].shape)
        return gemm(lhs, rhs)

    monkeypatch.setattr(layers, "gemm_fp8_fp8_bf16_nt", counting)
    token_ids, mask = minilm.tokenize(folder, ["One layer after the other."])
    model = minilm.quantize(minilm.load_model(folder))
    # The undecorated function: a trace from jit's cache would call nothing.
    jax.eval_shape(lambda: minilm.embed.__wrapped__(model, token_ids, mask, minilm.linear_fp8))
    assert shapes == 6 * [*4 * [(384, 384)], (1536, 384), (384, 1536)]


def test_fp8_embeddings_are_close_to_float32(minilm, comparison):
    assert len(minilm.SENTENCES) == len(set(minilm.SENTENCES)) == len(comparison.cosine) >= 50
    # Measured: 0.99617 and 0.99778.
    assert comparison.cosine.min() > 0.9955
    assert comparison.cosine.mean() > 0.9973
    # FP8 must differ from float32: equal embeddings would mean that it did not run.
    assert comparison.cosine.max() < 0.9999


def test_fp8_retrieves_what_float32_retrieves(minilm, comparison):
    assert len(minilm.QUERIES) >= 10
    assert comparison.accuracy_float32 == 1
    assert comparison.accuracy_fp8 == 1
    assert comparison.top1_agreement == 1
    # Measured: 0.929 (5 of 70 differ) and 0.9949.
    assert comparison.top5_overlap > 0.89
    assert comparison.spearman > 0.99


def test_missing_model_is_one_sentence(minilm, monkeypatch):
    monkeypatch.setattr(minilm, "MODEL_PACKAGE", "no_such_model_package")
    with pytest.raises(SystemExit, match=r"^The model is missing; install it with `pip install"):
        minilm.main()


def test_main_prints_both_tables(minilm, folder, comparison, monkeypatch, capsys):
    monkeypatch.setattr(minilm, "compare", lambda _: comparison)
    minilm.main()
    printed = capsys.readouterr().out
    assert f"{comparison.cosine.min():.5f}" in printed
    assert "Spearman" in printed
    assert jax_deepgemm.backend() in printed
