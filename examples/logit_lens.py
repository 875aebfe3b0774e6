"""What each layer would say next: the residual after every layer, read by the model's own head.

    python examples/logit_lens.py                          # the default model
    python examples/logit_lens.py -m model.gguf --text "The capital of France is" --plot lens.png

Prints, for what follows the text, each layer's best token, and what it gives to the model's final answer.
"""

import argparse
from pathlib import Path

import numpy as np

from realm_jax import LLM, research


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-m", "--model", help="a path, a known name, or hf:owner/repo/file.gguf")
    parser.add_argument("--text", default="The Eiffel Tower is in the city of")
    parser.add_argument("--plot", type=Path, help="where to draw every token's lens")
    options = parser.parse_args()

    llm = LLM(options.model, dtype="float32", ctx_size=256)
    found = research.run(llm, options.text, capture=["layers.*.resid_post"])
    lens = research.logit_lens(llm, found, best=1)

    answer = int(found.logits[0, -1].argmax())
    residuals = found.layers("resid_post")[:, 0, -1]
    logits = np.asarray(research.unembed(llm.transformer, llm.model.params, residuals))
    ranks = (logits > logits[:, [answer]]).sum(axis=1) + 1
    print(f"after {options.text!r} the model says {llm.tokenizer.decode([answer], continues=True)!r}")
    print("layer  best token       probability  entropy  rank of the answer")
    for layer, rank in enumerate(ranks):
        best = llm.tokenizer.decode([int(lens.ids[layer, 0, -1, 0])], continues=True)
        probability = float(np.exp(lens.logprobs[layer, 0, -1, 0]))
        entropy = float(lens.entropy[layer, 0, -1])
        print(f"{layer:5}  {best!r:16} {probability:11.3f}  {entropy:7.2f}  {rank:,}")
    if options.plot is not None:
        research.plot_lens(llm, found, lens, options.plot)


if __name__ == "__main__":
    main()
