"""lm-evaluation-harness: its requests, answered by the engine.

    realm eval hellaswag --limit 100
    lm_eval.simple_evaluate(RealmLM(LLM("model.gguf")), tasks=["hellaswag"])

Importing this module registers `RealmLM` as lm_eval's model "realm".
"""

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from realm_jax.chat import ChatTemplate
from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.llm import LLM
from realm_jax.params import SamplingParams


@contextmanager
def lm_eval_needed() -> Iterator[None]:
    """What is imported inside is there; else UnsupportedError says what to install."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UnsupportedError(
            f"evaluation needs lm_eval 0.4.13: {error} (pip install 'realm-jax[eval]')"
        ) from error


with lm_eval_needed():
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
        warning_once,
    )

MAX_GEN_TOKS = 256  # where a task says nothing, as lm_eval's other models have it
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
SAMPLING += ("frequency_penalty", "seed", "min_tokens", "ignore_eos")

logger = logging.getLogger("lm_eval.realm")  # its lines look like lm_eval's own, and go where those go


class RealmLM(TemplateLM):
    """A model of this package, as lm_eval sees one.

    max_length: tokens that may stand before the last one of a text; that one is not fed to the model, but
    has its place in the context.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm
        self.max_length = llm.model.context - 1
        self._template: ChatTemplate | None = None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "RealmLM":
        """A model of its own; arg_dict: the arguments of `LLM`, by name.

        additional_config, lm_eval's batch_size and device, has no meaning here: it is set even if unasked.
        """
        options = dict(arg_dict)
        options.pop("trust_remote_code", None)  # of data sets; lm_eval tells the model too
        logger.info("loading %s", options.get("model"))
        return cls(LLM(**options, on_compile=lambda program: logger.info("compiling %s", program)))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "RealmLM":
        """The same from `model=model.gguf,dtype=float32`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The end token. Raises UnsupportedError if the file names none."""
        if self.llm.tokenizer.eos_id is None:
            raise UnsupportedError(f"{self.llm.model.path.name} has no end token, which lm_eval asks for")
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or the end token where there is no BOS."""
        bos = self.llm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, special ones parsed; with BOS if the model wants it and the text has none."""
        tokenizer = self.llm.tokenizer
        ids = tokenizer.encode(string, add_special=False, parse_special=True)
        bos = tokenizer.bos_id
        if add_special_tokens is False or not tokenizer.add_bos or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the model's first choice.

        What does not fit is cut from the left, with a warning.
        """
        contexts = []
        for texts, context, continuation in requests:
            if not continuation:
                raise RequestError(
                    f"continuation {texts[1]!r} adds no token to its context, whose last token it merges with"
                )
            if len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation is {len(continuation):,} tokens; the context is "
                    f"{self.max_length + 1:,} and must hold one more (raise --ctx-size)"
                )
            contexts.append(context[-(self.max_length + 1 - len(continuation)) :])
        self._warn_of_cuts([context for _, context, _ in requests], contexts)
        scores = self.llm.score(contexts, [continuation for _, _, continuation in requests])
        return [(score.total, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, every token given as much before it as the context holds.

        A text starts after `prefix_token_id`, which is not scored.
        """
        owners, contexts, continuations = [], [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                owners.append(i)
                contexts.append(context)
                continuations.append(continuation)
        totals = [0.0] * len(requests)
        for i, score in zip(owners, self.llm.score(contexts, continuations), strict=True):
            totals[i] += score.total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string.

        A context that leaves no room for `max_gen_toks` is cut from the left, with a warning.
        """
        pairs: list[Any] = [request.args for request in requests]
        whole = [self.tok_encode(text) or [self.prefix_token_id] for text, _ in pairs]
        params = [sampling_params(gen_kwargs) for _, gen_kwargs in pairs]
        contexts = []
        for ids, each in zip(whole, params, strict=True):
            assert each.max_tokens is not None
            if each.max_tokens > self.max_length:
                raise RequestError(
                    f"max_gen_toks is {each.max_tokens:,}; the context is {self.max_length + 1:,} and must "
                    "hold one more (raise --ctx-size, or lower it with --gen_kwargs max_gen_toks=N)"
                )
            contexts.append(ids[-(self.max_length + 1 - each.max_tokens) :])
        self._warn_of_cuts(whole, contexts)
        return [output.text for output in self.llm.generate(contexts, params)]

    def _warn_of_cuts(self, whole: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]) -> None:
        cut = [len(a) - len(b) for a, b in zip(whole, kept, strict=True) if len(a) > len(b)]
        if cut:
            logger.warning(
                "%s of %s requests did not fit the context of %s tokens and were cut from the left, by up to "
                "%s tokens (raise --ctx-size)",
                *(f"{n:,}" for n in (len(cut), len(whole), self.max_length + 1, max(cut))),
            )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that conversations go through from now on: the model's, or its one of that name.

        Raises UnsupportedError if it has none, RequestError if none of that name.
        """
        if chat_template is False:
            return None
        model = self.llm.model
        self._template = model.require_template()
        if isinstance(chat_template, str):
            named = ChatTemplate.require(model.metadata, model.path.name, name=chat_template)
            self._template = replace(self._template, template=named.template)
        return self._template.template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to where the model answers, or continues the last message.

        A template that refuses system messages gets the conversation without them, with a warning.
        """
        template = self._template or self.llm.model.require_template()
        try:
            text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        except RequestError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            warning_once(logger, f"system messages are left out: {error}")
            text = template.render(others, add_generation_prompt=add_generation_prompt)
        return text if add_generation_prompt else _up_to(text, chat_history[-1]["content"])

    @property
    def tokenizer_name(self) -> str:
        """The file and its template: lm_eval keeps built requests under this name."""
        template = self._template or self.llm.model.template
        digest = hashlib.sha256((template.template if template else "").encode("utf-8", "surrogateescape"))
        return f"{self.llm.model.path.stem}-{digest.hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Facts of the model for lm_eval's report."""
        model = self.llm.model
        return {"model_file": model.path.name, "model_dtype": model.numerics.dtype, "context": model.context}


def sampling_params(gen_kwargs: Mapping[str, Any]) -> SamplingParams:
    """What a task's generation arguments ask for: greedy unless it sets a temperature.

    Seeds come from `random`, which lm_eval seeds (--seed). Raises RequestError for an unknown argument.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), MAX_GEN_TOKS))
    until, max_tokens = given.pop("until"), given.pop("max_gen_toks")
    if not isinstance(do_sample := given.pop("do_sample"), bool):
        raise RequestError(f"do_sample is {do_sample!r}; it must be true or false")
    if given.get("num_beams") == 1:  # some tasks say that they want no beam search
        del given["num_beams"]
    if unknown := sorted(given.keys() - set(SAMPLING)):
        raise RequestError(
            f"generation argument {unknown[0]} is unknown here; known are until, max_gen_toks, do_sample, "
            + ", ".join(SAMPLING)
        )
    given.setdefault("temperature", 0.0)
    if given["temperature"] != 0:
        given.setdefault("seed", random.getrandbits(32))
    stop = [text for text in until if text not in ("", None)]  # lm_eval's models read "" as none
    return SamplingParams(**given, max_tokens=max_tokens, stop=stop)


def _up_to(text: str, content: str) -> str:
    """The rendered conversation to the end of its last content, as Transformers' continue_final_message."""
    start = text.rfind(content.strip())
    if start < 0:
        raise RequestError(
            f"the chat template changes the last message, which cannot be continued: {content!r}"
        )
    end = content.lstrip() if text.startswith(content.lstrip(), start) else content.strip()
    return text[: start + len(end)]


register_model("realm")(RealmLM)
