"""How near an 8B-shaped model comes to its device's limits, as JSON: random weights, made on the device.

    scripts/bench_8b --weights int4 int8 bf16

Through the engine and its own compiled programs: one sequence's decode as a fraction of the time in which the
weights and the cache could be read once, a prompt as a fraction of its multiplications at the device's rate,
and tokens per second in total of batches. --layers, --hidden and so on make it small enough for any machine.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_matmul import format_of, random_words

from realm_jax import runtime
from realm_jax.architectures import Parameter, parameters
from realm_jax.benchmark.throughput import time_generation, time_prompts
from realm_jax.config import Activation, EngineConfig, LayerKind, ModelConfig, Numerics, QKNorm, RopeConfig
from realm_jax.decoding import Autoregressive
from realm_jax.ggml import GGMLType
from realm_jax.model import Transformer
from realm_jax.nodes import Dense, Kernel, Scale, Words
from realm_jax.parallel import place
from realm_jax.projections import rotary
from realm_jax.serving.engine import Engine
from realm_jax.tokenizer import Tokenizer
from realm_jax.weights import Params

TYPES = {"int4": GGMLType.Q4_0, "int8": GGMLType.Q8_0, "bf16": None}


def model_config(given: argparse.Namespace) -> ModelConfig:
    """Llama 3's architecture in the asked sizes."""
    head = given.hidden // given.heads
    return ModelConfig(
        architecture="llama",
        vocab_size=given.vocab,
        context_length=1 << 17,
        hidden_size=given.hidden,
        num_layers=given.layers,
        num_heads=given.heads,
        num_kv_heads=given.kv_heads,
        head_dim=head,
        ffn_size=given.ffn,
        norm_eps=1e-5,
        ropes=(("global", RopeConfig(head, 500_000.0, interleaved=True)),),
        layers=(LayerKind(),) * given.layers,
        activation=Activation.SWIGLU,
        attention_scale=head**-0.5,
        attention_softcap=None,
        logit_softcap=None,
        embedding_scale=1.0,
        qk_norm=QKNorm.NONE,
        post_norms=False,
        moe=None,
    )


def random_params(config: ModelConfig, kind: GGMLType | None, numerics: Numerics) -> Params:
    """Weights of one type, or in bf16, made on the device."""
    params: Params = {"rope": {name: rotary(rope, None, numerics) for name, rope in config.ropes}}
    for number, parameter in enumerate(parameters(config)):
        *parents, leaf = parameter.path
        tree = params
        for name in parents:
            tree = tree.setdefault(name, {})
        tree[leaf] = _random_node(parameter, kind, jax.random.key(number))
    return params


def _random_node(parameter: Parameter, kind: GGMLType | None, key: jax.Array) -> Scale | Kernel:
    if parameter.is_vector:
        return Scale(jnp.ones(parameter.parts[0].shape))
    outputs, inputs = sum(part.shape[0] for part in parameter.parts), parameter.parts[0].shape[1]
    if kind is None:
        weight = jax.jit(lambda: jax.random.normal(key, (outputs, inputs), jnp.bfloat16) * inputs**-0.5)
        return Dense(weight())
    form = format_of(kind, inputs)
    return Words(jax.jit(lambda: random_words(key, form, outputs))(), form=form, dtype="bfloat16")


def tokenizer(vocab: int) -> Tokenizer:
    """Of so many tokens without meaning."""
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"] + [f"t{i} " for i in range(3, vocab)],
            "tokenizer.ggml.scores": np.zeros(vocab, np.float32),
            "tokenizer.ggml.token_type": np.array([2, 3, 3] + [1] * (vocab - 3), np.int32),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
    )


class Bench:
    """One form of the weights, and what bounds it."""

    def __init__(self, given: argparse.Namespace, weights: str) -> None:
        self.given, self.config = given, model_config(given)
        options = {"weights": "dense" if weights == "bf16" else "quantized", "dtype": "bfloat16"}
        self.options = EngineConfig.from_options(kernels=given.kernels, **options)
        self.numerics = runtime.resolve_numerics(self.options)
        self.params = random_params(self.config, TYPES[weights], self.numerics)
        multiplied = [self.params[name] for name in self.params if name not in ("embedding", "rope")]
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(multiplied))
        self.rng = np.random.default_rng(0)

    def engine(self, sequences: int, context: int, prefill: int) -> Engine:
        config = EngineConfig.from_options(
            kernels=self.given.kernels,
            dtype="bfloat16",
            weights=self.options.weights,
            max_num_seqs=sequences,
            max_num_batched_tokens=prefill,
            ctx_size=context,
            prefix_caching=False,
        )
        model = Transformer(self.config)
        strategy = Autoregressive(model, self.numerics)
        words = tokenizer(self.config.vocab_size)
        return Engine(
            strategy,
            model,
            self.params,
            words,
            context=context,
            config=config,
            numerics=self.numerics,
            placement=place(config),
        )

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return self.rng.integers(3, self.config.vocab_size, (count, length)).tolist()

    def prefill(self) -> dict[str, Any]:
        """One prompt, as a fraction of its multiplications at the device's rate."""
        c, length = self.config, self.given.prompt
        engine = self.engine(1, length + 64, length)
        time_prompts(engine, self.prompts(1, length))
        took = min(time_prompts(engine, self.prompts(1, length)) for _ in range(self.given.repeats))
        per_layer = c.hidden_size * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        per_layer += 3 * c.hidden_size * c.ffn_size
        attention = 2 * c.num_heads * c.head_dim * length**2 * c.num_layers  # of which half is masked
        flops = 2 * (per_layer * c.num_layers * length + c.hidden_size * c.vocab_size) + attention
        bound = flops / self.given.flops
        return {"test": f"pp{length}", "batch": 1, **_row(length / took, bound / took)}

    def decode(self, engine: Engine, batch: int) -> dict[str, Any]:
        """Steps of so many sequences, as a fraction of the time in which what they read can be read once."""
        given, c = self.given, self.config
        time_generation(engine, self.prompts(batch, given.depth), 2)
        sample = time_generation(engine, self.prompts(batch, given.depth), given.tokens)
        cache = 4 * c.num_layers * c.num_kv_heads * c.head_dim * (given.depth + given.tokens // 2) * batch
        bound = (self.weight_bytes + cache) / given.bandwidth
        step = sample.seconds * batch / sample.tokens
        rates = _row(sample.tokens / sample.seconds, bound / step)
        return {"test": f"tg{given.tokens}", "batch": batch, **rates}

    def rows(self) -> list[dict[str, Any]]:
        """One sequence, the prompt, then the batches."""
        given = self.given
        context = given.depth + given.tokens + 256
        found = [self.prefill()]
        for batches in ([b for b in given.batch if b == 1], [b for b in given.batch if b > 1]):
            if batches:
                engine = self.engine(max(batches), context, 512)
                found += [self.decode(engine, batch) for batch in batches]
                del engine
        return found


def _row(rate: float, fraction: float) -> dict[str, float]:
    return {"tokens_per_second": float(f"{rate:.5g}"), "fraction": float(f"{fraction:.3g}")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--kernels", default="pallas", choices=("pallas", "xla", "reference"))
    sizes = {"layers": 32, "hidden": 4096, "heads": 32, "kv-heads": 8, "ffn": 14336, "vocab": 128256}
    lengths = {"prompt": 2048, "depth": 128, "tokens": 64, "repeats": 3}
    for name, default in (sizes | lengths).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second (default: an H200's)")
    parser.add_argument("--flops", type=float, default=790e12, help="of bf16, a second (default: an H200's)")
    given = parser.parse_args()
    forms = []
    for weights in given.weights:
        bench = Bench(given, weights)
        rows = bench.rows()
        forms.append({"weights": weights, "weight_bytes": bench.weight_bytes, "rows": rows})
    print(
        json.dumps(
            {"device": jax.devices()[0].device_kind, "kernels": given.kernels, "forms": forms}, indent=2
        )
    )


if __name__ == "__main__":
    main()
