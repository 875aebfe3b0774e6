"""LLM: the Python front. Every method enters the same engine."""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from realm_jax import hub, runtime, scoring, speculation
from realm_jax.config import EngineConfig
from realm_jax.errors import RequestError
from realm_jax.loading import LoadProgress, load_model
from realm_jax.lora import read as read_adapter
from realm_jax.model import Transformer
from realm_jax.params import SamplingParams
from realm_jax.processors import UNCHANGED, EachRow, Unchanged
from realm_jax.programs import Programs
from realm_jax.prompts import Prompt, as_batch, prompt_ids, split
from realm_jax.scoring import Score
from realm_jax.serving.request import (
    Adapters,
    FinishReason,
    GenerationOutput,
    Request,
    TextDelta,
    checked_scale,
    chosen_adapters,
    each_adapters,
    leaders_first,
)
from realm_jax.tools import Toolset

Message = Mapping[str, Any]


class LLM:
    """A model ready to generate.

        llm = LLM()                                     # the default model
        llm = LLM("model.gguf", ctx_size=2048, dtype="float32")
        llm.generate(["Once upon", "The capital of"], SamplingParams(max_tokens=16))

    model: a path, a known name, or hf:owner/repo/file.gguf. draft_model: a smaller one of the same
    vocabulary, which guesses tokens ahead: the output is the same, sooner. lora: adapters that calls may
    name. fold: adapters that become part of the model, each with a scale or 1. engine_config: fields of
    `EngineConfig`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        draft_model: str | Path | None = None,
        lora: Mapping[str, str | Path] | None = None,
        fold: Sequence[str | Path | tuple[str | Path, float]] = (),
        on_load: LoadProgress | None = None,
        on_compile: Callable[[str], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        **engine_config: Any,
    ) -> None:
        self.engine_config = EngineConfig.from_options(**engine_config)
        spec_type = speculation.resolve_spec_type(self.engine_config, draft_model)
        path = hub.resolve(model, offline=self.engine_config.offline)
        drafts = (
            () if draft_model is None else (hub.resolve(draft_model, offline=self.engine_config.offline),)
        )
        runtime.configure(self.engine_config)
        if on_notice is not None and (missing := runtime.missing_kernels(self.engine_config)):
            on_notice(f"native kernels are not used, XLA's alone are slower: {missing}")
        programs = Programs(runtime.program_folder(hub.cache_dir()))
        # the arithmetic is known first: it makes the C++ kernels ready, which programs call
        numerics, folded = runtime.resolve_numerics(self.engine_config), [_with_scale(each) for each in fold]
        files = [(each.resolve(), each.stat().st_size, each.stat().st_mtime_ns) for each in (path, *drafts)]
        programs.expect((files, self.engine_config, numerics, folded))
        self.model = load_model(path, self.engine_config, on_load, folded)
        self.draft = next(
            (speculation.load_draft(p, self.model, self.engine_config, on_load) for p in drafts), None
        )
        self.tokenizer = self.model.tokenizer
        self.transformer = self.model.transformer
        self._parts = speculation.Parts(self.engine_config, self.model, self.draft, spec_type, on_compile)
        self.processor: EachRow | Unchanged = UNCHANGED
        self.engine = self._parts.engine(self.transformer, programs)
        self._new_seed = runtime.seeds(self.model.placement.is_shared)
        self._ids = itertools.count()
        self._mailboxes: dict[str, deque[TextDelta]] = {}  # by request
        for name, adapter in (lora or {}).items():
            self.load_adapter(name, adapter)

    def variant(self, transformer: Transformer, processor: EachRow | Unchanged) -> "LLM":
        """An LLM of the same weights and adapters, with an engine of its own that computes by these.

        Its programs are compiled anew and not kept on disk. See `realm_jax.research.variant`.
        """
        made = copy.copy(self)
        made.transformer, made.processor, made._mailboxes = transformer, processor, {}
        made.engine = self._parts.engine(transformer, Programs(), processor)
        for name, adapter in self.engine.adapters.named.items():
            made.engine.load_adapter(name, adapter)
        return made

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Calls may name the adapter, a GGUF or PEFT file or folder.

        Raises ModelFileError for one that is broken or does not fit the model, UnsupportedError for one that
        only `fold` can apply, RequestError for a name that is taken.
        """
        self.engine.load_adapter(name, read_adapter(Path(path), self.model.base))

    def adapter_digests(self) -> dict[str, Any]:
        """What tells this model's adapters from others: those that are folded in, and those by name."""
        named = {name: adapter.digest() for name, adapter in self.engine.adapters.named.items()}
        return {"folded": [[adapter.digest(), scale] for adapter, scale in self.model.folded], "named": named}

    def unload_adapter(self, name: str) -> None:
        """The adapter is gone. Raises RequestError while a request uses it."""
        self.engine.unload_adapter(name)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Adapters | Sequence[Adapters] = None,
    ) -> list[GenerationOutput]:
        """One output per prompt and sample, in the order of the prompts.

        Text is encoded with special tokens added and parsed; token lists are used as they are. No chat
        template is applied. params: one for all, or one per prompt. lora: None, an adapter's name, or a list
        of (name, scale); or a list of these, one per prompt.
        """
        batch = as_batch(prompts)
        each = [params] * len(batch) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(batch):
            raise RequestError(
                f"params has {len(each)} entries for {len(batch)} prompts; give one, or one each"
            )
        adapters = each_adapters(lora, len(batch))
        requests = [
            self._request(self.prompt_ids(p), one, mine)
            for p, one, mine in zip(batch, each, adapters, strict=True)
        ]
        outputs = {
            (d.request_id, d.sample_index): d.output for d in self._run(requests) if d.output is not None
        }
        return [outputs[r.id, sample] for r in requests for sample in range(r.params.n)]

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, lora: Adapters = None
    ) -> GenerationOutput:
        """The answer to a conversation, through the model's chat template.

        Raises RequestError if params asks for more than one sample.
        """
        if params is not None and params.n != 1:
            raise RequestError(f"n is {params.n}; chat gives one answer (use generate with chat_prompt)")
        return self.generate([self.chat_prompt(messages)], params, lora=[chosen_adapters(lora)])[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, lora: Adapters = None
    ) -> Iterator[TextDelta]:
        """The output as it comes; the last delta of each sample carries the whole."""
        return self._run([self._request(self.prompt_ids(prompt), params, chosen_adapters(lora))])

    def chat_prompt(
        self, messages: Sequence[Message], *, tools: Toolset | None = None, **variables: Any
    ) -> list[int]:
        """The token ids of a conversation, up to where the model answers. variables: for the template."""
        text = self.model.chat_text(messages, tools, **variables)
        ids = self.tokenizer.encode(text, add_special=False, parse_special=True)
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def logits(self, token_ids: Sequence[int], *, lora: Adapters = None) -> np.ndarray:
        """float32 [T, V]: row t scores the token that follows the first t + 1."""
        ids = self.prompt_ids(token_ids)
        if not 1 <= len(ids) <= self.model.context:
            raise RequestError(f"token_ids has {len(ids):,} tokens; give from 1 to {self.model.context:,}")
        vocab = self.model.config.vocab_size
        if (wrong := next((i for i in ids if not 0 <= i < vocab), None)) is not None:
            raise RequestError(f"token_ids has token id {wrong}; the vocabulary has {vocab:,}")
        with self.engine.adapters.standing(chosen_adapters(lora)) as (bank, adapters):
            return scoring.logits(
                self.transformer, self.model.params, ids, self.model.numerics, bank, adapters
            )

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, lora: Adapters | Sequence[Adapters] = None
    ) -> Float[np.ndarray, "N D"]:
        """Each prompt's embedding: the mean of its tokens' hidden states after the last norm, of length 1."""
        batch, params = as_batch(prompts), SamplingParams(max_tokens=0)
        adapters = each_adapters(lora, len(batch))
        requests = [
            replace(self._request(self.prompt_ids(prompt), params, mine), embeds=True)
            for prompt, mine in zip(batch, adapters, strict=True)
        ]
        found = {d.request_id: d.output.embedding for d in self._run(requests) if d.output is not None}
        return np.array([found[request.id] for request in requests], np.float32)

    def score(
        self, prompts: Prompt | Sequence[Prompt], continuations: Sequence[Prompt] | None = None
    ) -> list[Score]:
        """Log-probabilities of each prompt's tokens, or of each prompt's continuation.

        Tokens that prompts have in common at their beginnings are computed once. Text continues text:
        the continuation is what both together have after the prompt's tokens, and a token that spans both.
        """
        batch, whole = as_batch(prompts), continuations is None
        if continuations is None:
            pairs = [(self.prompt_ids(prompt), []) for prompt in batch]
        elif len(continuations) != len(batch):
            raise RequestError(f"continuations has {len(continuations)} entries for {len(batch)} prompts")
        else:
            pairs = [split(self.tokenizer, *pair) for pair in zip(batch, continuations, strict=True)]
        requests = [self._score_request(*pair, whole=whole) for pair in pairs]
        outputs: dict[str, GenerationOutput] = {}
        for delta in self._run(leaders_first(requests, self.engine.buckets.max_num_seqs)):
            if delta.output is not None:
                outputs[delta.request_id] = delta.output
        return [_score(outputs[r.id], 0 if whole else r.score_from) for r in requests]

    def _score_request(self, context: list[int], more: list[int], *, whole: bool) -> Request:
        if not context:
            raise RequestError("there is no context to score from; give at least one token before")
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        first = 1 if whole else len(context)
        return Request(f"request-{next(self._ids)}", (*context, *more), params, seed=0, score_from=first)

    def _run(self, requests: Sequence[Request]) -> Iterator[TextDelta]:
        """Deltas of these requests until all have ended; leaving early aborts what is left.

        Several runs may interleave: whichever steps the engine puts the others' deltas in their mailboxes.
        """
        mailbox: deque[TextDelta] = deque()
        waiting = {(request.id, sample) for request in requests for sample in range(request.params.n)}
        try:
            for request in requests:
                self.engine.add_request(request)
                self._mailboxes[request.id] = mailbox
            while waiting:
                while not mailbox:
                    for delta in self.engine.step():
                        if delta.request_id in self._mailboxes:  # else one that was lost and is left
                            self._mailboxes[delta.request_id].append(delta)
                delta = mailbox.popleft()
                if delta.output is not None:
                    waiting.discard((delta.request_id, delta.sample_index))
                yield delta
        finally:
            for request in requests:
                self.engine.abort(request.id)
                self._mailboxes.pop(request.id, None)

    def _request(
        self,
        ids: Sequence[int],
        params: SamplingParams | None,
        adapters: tuple[tuple[str, float], ...] = (),
    ) -> Request:
        params = params or SamplingParams()
        seed = self._new_seed() if params.seed is None else params.seed
        return Request(f"request-{next(self._ids)}", tuple(ids), params, seed, adapters=adapters)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens: text encoded with special tokens added and parsed, token ids as they are."""
        return prompt_ids(self.tokenizer, prompt)


def _with_scale(given: str | Path | tuple[str | Path, float]) -> tuple[Path, float]:
    """An adapter to fold and what its change is multiplied by."""
    path, scale = given if isinstance(given, tuple) else (given, 1.0)
    return Path(path), checked_scale(path, scale)


def _score(output: GenerationOutput, start: int) -> Score:
    """What the output says of the prompt's tokens from `start` on."""
    known = (output.prompt_logprobs or [])[start:]
    return Score(
        token_ids=output.prompt_token_ids[start:],
        logprobs=[None if each is None else each["logprob"] for each in known],
        is_greedy=all(each is None or each["is_greedy"] for each in known),
    )


__all__ = ["LLM", "FinishReason", "GenerationOutput", "SamplingParams", "Score", "TextDelta"]
