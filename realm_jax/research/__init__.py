"""The model as an object of study: activations by name, edits, gradients, samplers of one's own.

    llm = LLM("model.gguf", dtype="float32")
    found = research.run(llm, "The Eiffel Tower is in", capture=["layers.*.resid_post"])
    lens = research.logit_lens(llm, found)
    steered = research.variant(llm, edit={"layers.14.resid_post": lambda x: x + vector})

On the same file and the same, maybe quantized, weights that are served; there is no second model.
"""

from realm_jax.processors import LogitsProcessor, Written
from realm_jax.research.activations import Forward, forward, names, run
from realm_jax.research.lens import Lens, logit_lens, token_logprobs, unembed
from realm_jax.research.plots import plot_attention, plot_lens, plot_logprobs
from realm_jax.research.probe import AtPositions, Edit
from realm_jax.research.variants import variant

__all__ = [
    "AtPositions",
    "Edit",
    "Forward",
    "Lens",
    "LogitsProcessor",
    "Written",
    "forward",
    "logit_lens",
    "names",
    "plot_attention",
    "plot_lens",
    "plot_logprobs",
    "run",
    "token_logprobs",
    "unembed",
    "variant",
]
