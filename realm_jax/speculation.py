"""Which strategy a run has: plain decoding, or a drafter beside it, if that fits the model; its engine."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from realm_jax.config import EngineConfig, ModelConfig
from realm_jax.decoding import Autoregressive, Strategy
from realm_jax.drafters import Drafter, DraftModel, NGram
from realm_jax.errors import CapacityError, RealmError, RequestError, UnsupportedError
from realm_jax.loading import LoadedModel, LoadProgress, load_model
from realm_jax.model import Transformer
from realm_jax.processors import UNCHANGED, EachRow, Unchanged
from realm_jax.programs import Programs
from realm_jax.serving.drafting import Drafting
from realm_jax.serving.engine import Engine
from realm_jax.speculative import Speculative
from realm_jax.tokenizer import Tokenizer
from realm_jax.weights import Params

_log = logging.getLogger(__name__)


def resolve_spec_type(config: EngineConfig, draft_model: str | Path | None) -> str:
    """none, ngram or draft. Raises RequestError where type and draft model contradict each other."""
    if draft_model is None and config.spec_type == "draft":
        raise RequestError("spec_type is 'draft'; name the model that drafts (--draft-model)")
    if draft_model is not None and config.spec_type not in ("auto", "draft"):
        raise RequestError(
            f"spec_type is {config.spec_type!r} and a draft model is given; leave one of both out"
        )
    if config.spec_type == "auto":
        return "none" if draft_model is None else "draft"
    return config.spec_type


def fitting(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """The configuration without what the model's layers do not allow."""
    if not (model.is_recurrent and config.prefix_caching):
        return config
    _log.info("prefixes are not reused: recurrent layers have one state for a whole sequence")
    return replace(config, prefix_caching=False)


def _refuse_recurrent(model: LoadedModel, wanted: str) -> None:
    if model.config.is_recurrent:
        raise UnsupportedError(
            f"{wanted}, but {model.path.name} has recurrent layers, whose state cannot take back a "
            "wrong guess (leave out spec_type and the draft model)"
        )


def load_draft(
    path: Path, target: LoadedModel, config: EngineConfig, on_load: LoadProgress | None
) -> LoadedModel:
    """The draft model, for the target's context and in the memory that the target leaves.

    Raises as `load_model` does, RequestError where the draft was trained for a shorter context, and
    UnsupportedError where one of both has recurrent layers.
    """
    _refuse_recurrent(target, "a draft model is given")
    memory = None if target.spare is None else max(target.spare, 1)
    try:
        draft = load_model(path, replace(config, ctx_size=target.context, memory=memory), on_load)
    except CapacityError as error:
        raise CapacityError(f"the draft model, in what the model leaves of --memory: {error}") from error
    except RealmError as error:
        raise type(error)(f"the draft model: {error}") from error
    _refuse_recurrent(draft, "it was to draft")
    return draft


@dataclass(frozen=True)
class Parts:
    """What an engine is made of, whoever computes with it."""

    config: EngineConfig
    target: LoadedModel
    draft: LoadedModel | None
    spec_type: str
    on_compile: Callable[[str], None] | None

    def engine(
        self, model: Transformer, programs: Programs, processor: EachRow | Unchanged = UNCHANGED
    ) -> Engine:
        """An engine of these weights, computed by the model.

        Raises UnsupportedError for a draft model whose vocabulary or context is not the target's.
        """
        strategy, params, drafting = self._strategy(Autoregressive(model, self.target.numerics, processor))
        return Engine(
            strategy,
            model,
            params,
            self.target.tokenizer,
            context=self.target.context,
            config=fitting(self.config, self.target.config),
            numerics=self.target.numerics,
            placement=self.target.placement,
            spare=(self.draft or self.target).spare,
            drafting=drafting,
            programs=programs,
            on_compile=self.on_compile,
        )

    def _strategy(self, plain: Autoregressive) -> tuple[Strategy, Params, Drafting | None]:
        """The strategy, the params that it takes, and who decides how much is guessed."""
        target, draft = self.target, self.draft
        if self.spec_type == "none":
            return plain, target.params, None
        _refuse_recurrent(target, f"spec_type is {self.spec_type!r}")
        drafter: Drafter = NGram()
        params = target.params
        if draft is not None:
            check_vocabulary(target.tokenizer, draft.tokenizer, draft.path.name)
            drafter = DraftModel(draft.transformer, draft.numerics, target.config.vocab_size)
            params = params | {"draft": draft.params}
        return Speculative(plain, drafter), params, Drafting(self.config.spec_tokens, is_free=drafter.is_free)


def check_vocabulary(target: Tokenizer, draft: Tokenizer, name: str) -> None:
    """Raises UnsupportedError if a token id of the draft may mean another text than the target's."""
    problems = [
        f"its {what} is {mine!r}, the model's {other!r}"
        for what, mine, other in (
            ("kind of tokenizer", draft.kind, target.kind),
            ("BOS token", draft.bos_id, target.bos_id),
            ("EOS token", draft.eos_id, target.eos_id),
            ("add_bos", draft.add_bos, target.add_bos),
        )
        if mine != other
    ]
    count = min(draft.vocab_size, target.vocab_size)
    for i in range(count):
        if (mine := draft.token_text(i)) != (other := target.token_text(i)):
            problems.append(f"its token {i} is {mine!r}, the model's {other!r}")
            break
    if problems:
        raise UnsupportedError(
            f"{name} cannot draft for this model: {'; '.join(problems)} (give a model of the same vocabulary)"
        )
