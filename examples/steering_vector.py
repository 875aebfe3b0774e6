"""A direction in the residual that makes a model cheerful or gloomy, and how much at each layer.

    python examples/steering_vector.py                     # the default model
    python examples/steering_vector.py -m model.gguf --layer 14 --scale 6 --plot steering.png

The direction is the mean difference between cheerful and gloomy sentences in the residual after a layer
(Turner et al. 2023; Rimsky et al. 2024). It is added, at every layer in turn and in steps from -scale to
scale, to texts about something else: how much likelier do they go on with a cheerful word than with a gloomy
one? All of these runs are one program (vmap); of the default model they take two minutes of one core. Then
the model writes with the direction, in the engine that serves.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import LLM, SamplingParams, research
from realm_jax.research.plots import figure

CHEERFUL = (
    "I am so happy today", "What a wonderful day", "I love this place", "She smiled with joy",
    "This is the best news", "We had so much fun", "He was very glad", "The party was great",
)  # fmt: skip
GLOOMY = (
    "I am so sad today", "What a terrible day", "I hate this place", "She cried with grief",
    "This is the worst news", "We had so much pain", "He was very upset", "The party was awful",
)  # fmt: skip
TEXTS = ("The weather this morning is", "When I think about my job, I feel", "The movie we saw was")
GOOD = (" good", " great", " happy", " wonderful", " nice", " fun")
BAD = (" bad", " terrible", " sad", " awful", " boring", " hard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-m", "--model", help="a path, a known name, or hf:owner/repo/file.gguf")
    parser.add_argument("--layer", type=int, help="where to steer what is written; default: the middle")
    parser.add_argument("--scale", type=float, default=2.0, help="times the mean difference")
    parser.add_argument("--tokens", type=int, default=30, help="of each text that is written; 0 = none is")
    parser.add_argument("--plot", type=Path, help="where to draw layers and scales")
    options = parser.parse_args()

    llm = LLM(options.model, dtype="float32", ctx_size=256)
    L = llm.model.config.num_layers
    layer = L // 2 if options.layer is None else options.layer
    if not 0 <= layer < L:
        parser.error(f"--layer is {layer}; the model has layers 0 to {L - 1}")
    vectors = directions(llm)
    scales = np.linspace(-options.scale, options.scale, 9, dtype=np.float32)
    found = preferences(llm, vectors, scales)
    print("log-odds of cheerful words, by layer (down) and scale (across), more than without")
    print("layer " + " ".join(f"{scale:6.2f}" for scale in scales))
    for i in range(L):
        print(f"{i:5} " + " ".join(f"{x:6.2f}" for x in found[i]))
    if options.plot is not None:
        draw(found, scales, options.plot)

    params = SamplingParams(temperature=0, max_tokens=max(options.tokens, 1), repetition_penalty=1.2)
    for scale in (-options.scale, 0.0, options.scale) if options.tokens else ():
        added = scale * vectors[layer]
        steered = research.variant(llm, edit={f"layers.{layer}.resid_post": lambda x, v=added: x + v})
        print(f"\nwith {scale:g} times the direction at layer {layer}:")
        for output, text in zip(steered.generate(TEXTS, params), TEXTS, strict=True):
            print("  " + " ".join((text + output.text).split()))


def directions(llm: LLM) -> jax.Array:
    """Each layer's difference of the mean residuals of cheerful and of gloomy sentences, [L, D]."""
    found = research.run(llm, [*CHEERFUL, *GLOOMY], capture=["layers.*.resid_post"])
    last = jnp.stack([found.last(f"layers.{i}.resid_post") for i in range(llm.model.config.num_layers)])
    return last[:, : len(CHEERFUL)].mean(axis=1) - last[:, len(CHEERFUL) :].mean(axis=1)


def preferences(llm: LLM, vectors: jax.Array, scales: np.ndarray) -> np.ndarray:
    """What steering adds to the log-odds of a cheerful next word, [L, scales]."""
    rows = [llm.prompt_ids(text) for text in TEXTS]
    ends = np.array([len(row) for row in rows]) - 1
    tokens = np.zeros((len(rows), ends.max() + 1), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    good, bad = (np.array([first_token(llm, word) for word in words]) for words in (GOOD, BAD))

    def log_odds(params: Any, by_layer: jax.Array) -> jax.Array:
        """by_layer: what to add after each, [L, D]."""
        edit = {f"layers.{i}.resid_post": lambda x, i=i: x + by_layer[i] for i in range(len(by_layer))}
        logits = research.forward(llm.transformer, params, tokens, edit=edit).logits
        scores = logits[np.arange(len(tokens)), ends]
        return (jax.nn.logsumexp(scores[:, good], -1) - jax.nn.logsumexp(scores[:, bad], -1)).mean()

    @jax.jit
    def sweep(params: Any) -> jax.Array:
        def of_layer(added: jax.Array) -> jax.Array:
            return jax.vmap(lambda scale: log_odds(params, scale * added))(jnp.asarray(scales))

        return jax.lax.map(of_layer, jnp.eye(len(vectors))[:, :, None] * vectors)  # each layer alone

    found = np.asarray(sweep(llm.model.params))
    return found - found[:, len(scales) // 2 :][:, :1]


def first_token(llm: LLM, word: str) -> int:
    """The token that the word begins with in a text."""
    return llm.tokenizer.encode(word, add_special=False)[0]


def draw(found: np.ndarray, scales: np.ndarray, path: Path) -> None:
    """The picture has the change of the log-odds by layer and scale."""
    most = np.abs(found).max()
    with figure(path, 6, 2 + 0.17 * len(found)) as (drawn, axes):
        image = axes.imshow(found, origin="lower", aspect="auto", cmap="PiYG", vmin=-most, vmax=most)
        axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
        axes.set(xlabel="times the direction", ylabel="added after layer")
        axes.set_title("Cheerful rather than gloomy: change of the log-odds")
        drawn.colorbar(image)


if __name__ == "__main__":
    main()
