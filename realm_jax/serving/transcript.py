"""What a sequence has said so far: tokens to text, log-probabilities, and the finished output."""

import time

import numpy as np

from realm_jax.serving.request import (
    DraftMetrics,
    FinishReason,
    GenerationOutput,
    PromptLogprob,
    RequestMetrics,
    Sequence,
    TextDelta,
    TokenLogprob,
    Usage,
)
from realm_jax.tokenizer import TextStream, Tokenizer


class Transcript:
    """The readable side of one sequence; tokens are pushed as they are read from the device."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self.sequence = sequence
        params = sequence.request.params
        ends = () if params.ignore_eos else tokenizer.eog_ids
        self.stop_ids = frozenset((*ends, *params.stop_token_ids))
        has_form = params.structured_output is not None  # which a removed space might break
        self._text = TextStream(
            tokenizer, params.stop, params.skip_special_tokens, continues=True, verbatim=has_form
        )
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._prompt_logprobs: list[PromptLogprob | None] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None for _ in sequence.request.prompt_ids]
        self._hidden: np.ndarray | None = None  # the sum of the prompt's hidden states so far
        self._num_hidden = 0

    @property
    def met_stop_string(self) -> bool:
        return self._text.stopped is not None

    @property
    def wants_logprobs(self) -> bool:
        return self._logprobs is not None

    def push(self, tokens: list[int]) -> str:
        """The text that these tokens add; a token that ended the sequence adds none."""
        if not tokens:
            return ""
        self.sequence.first_token_at = self.sequence.first_token_at or time.perf_counter()
        said = tokens
        if self.sequence.finish_reason is FinishReason.STOP and tokens[-1] in self.stop_ids:
            said = tokens[:-1]
        return "".join(self._text.push(token) for token in said)

    def push_logprob(self, token: int, chosen: float, top_ids: np.ndarray, top: np.ndarray) -> None:
        """Log-probabilities of a token, with as many alternatives as the request asked for."""
        if self._logprobs is None:
            return
        count = self.sequence.request.params.logprobs or 0
        pairs = [[int(i), float(p)] for i, p in zip(top_ids[:count], top[:count], strict=True)]
        self._logprobs.append({"token_id": token, "logprob": chosen, "top": pairs})

    def push_prompt(
        self, first: int, chosen: np.ndarray, is_greedy: np.ndarray, top_ids: np.ndarray, top: np.ndarray
    ) -> None:
        """Log-probabilities of the prompt's tokens from index `first` on."""
        prompt, count = self.sequence.request.prompt_ids, self.sequence.request.params.prompt_logprobs or 0
        assert self._prompt_logprobs is not None
        values = zip(chosen.tolist(), is_greedy.tolist(), top_ids.tolist(), top.tolist(), strict=True)
        for i, (logprob, greedy, ids, tops) in enumerate(values, first):
            pairs: list[list[int | float]] = [[a, b] for a, b in zip(ids[:count], tops[:count], strict=True)]
            self._prompt_logprobs[i] = {
                "token_id": prompt[i],
                "logprob": logprob,
                "top": pairs,
                "is_greedy": greedy,
            }

    def push_hidden(self, hidden: np.ndarray) -> None:
        """Hidden states [T, D] of the prompt's next tokens."""
        part = hidden.astype(np.float64).sum(axis=0)
        self._hidden = part if self._hidden is None else self._hidden + part
        self._num_hidden += len(hidden)

    def _embedding(self) -> list[float] | None:
        """The sum of all hidden states, which has the mean's direction, scaled to length 1."""
        if self._hidden is None or self._num_hidden < self.sequence.prompt_length:
            return None
        length = float(np.linalg.norm(self._hidden)) or 1.0
        return (self._hidden / length).astype(np.float32).tolist()

    def delta(self, text: str, tokens: list[int]) -> TextDelta:
        """These tokens' share of the output, with the whole output if the sequence has ended."""
        request, known = self.sequence.request, self._logprobs
        mine = None if known is None else known[len(known) - len(tokens) :]
        if self.sequence.finish_reason is None:
            return TextDelta(request.id, self.sequence.sample_index, text, tokens, None, mine)
        text += self._text.finish()
        if self.met_stop_string:  # even where its last token was the last allowed
            self.sequence.finish_reason = FinishReason.STOP
        return TextDelta(request.id, self.sequence.sample_index, text, tokens, self._output(), mine)

    def _output(self) -> GenerationOutput:
        sequence, request = self.sequence, self.sequence.request
        assert sequence.finish_reason is not None
        first = sequence.first_token_at
        return GenerationOutput(
            request_id=request.id,
            sample_index=sequence.sample_index,
            prompt_token_ids=list(request.prompt_ids),
            text=self._text.text,
            token_ids=list(sequence.token_ids),
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            finish_reason=sequence.finish_reason,
            seed=request.seed,
            usage=Usage(len(request.prompt_ids), len(sequence.token_ids), sequence.reused),
            metrics=RequestMetrics(
                first_token_s=None if first is None else first - request.arrival,
                finished_s=time.perf_counter() - request.arrival,
                drafts=None if sequence.drafts is None else DraftMetrics.of(sequence.drafts),
            ),
            embedding=self._embedding(),
        )
