"""The engine: schedule -> run -> commit, the one generation loop."""

import contextlib
import functools
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from realm_jax.banks import Bank, check_adapter, empty_bank
from realm_jax.buckets import Buckets
from realm_jax.config import MAX_LORAS_PER_REQUEST, EngineConfig, Numerics
from realm_jax.decoding import StepOutput, Strategy
from realm_jax.errors import CapacityError, RequestError
from realm_jax.lora import Adapter
from realm_jax.model import Transformer
from realm_jax.programs import Programs
from realm_jax.sampling_rows import SamplingRows
from realm_jax.scoring import TargetLogprobs
from realm_jax.serving.adapters import LoadAdapter
from realm_jax.serving.packing import PromptTargets, prompt_targets
from realm_jax.serving.request import FinishReason, Request, Sequence, TextDelta
from realm_jax.serving.runner import Runner
from realm_jax.serving.scheduler import Copy, Decode, Prefill, Scheduler
from realm_jax.serving.transcript import Transcript
from realm_jax.tokenizer import Tokenizer
from realm_jax.weights import Params


@dataclass(frozen=True)
class _Decoded:
    """A step that the device was given and whose tokens have not been read."""

    sequences: tuple[Sequence | None, ...]  # by row
    output: StepOutput


@dataclass(frozen=True)
class _Prefilled:
    """A prefill call that the device was given and of which nothing has been read."""

    plan: Prefill
    output: StepOutput
    scored: PromptTargets | None
    logprobs: TargetLogprobs | None


class Engine:
    """Runs requests to their ends, many at once, on slots of fixed shape.

    Each `step` gives the device its next call and then reads the tokens of the call before, so that the
    host works while the device does.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: Transformer,
        params: Params,
        tokenizer: Tokenizer,
        *,
        context: int,
        config: EngineConfig,
        numerics: Numerics,
        programs: Programs | None = None,
        on_compile: Callable[[str], None] | None = None,
    ) -> None:
        self.buckets = Buckets.plan(context, config, numerics.least_rows, numerics.adapter_widths)
        self.scheduler = Scheduler(
            self.buckets,
            context,
            max_queue=config.max_queue,
            max_loras=config.max_loras,
            prefix_caching=config.prefix_caching,
        )
        self._runner = Runner(strategy, model, params, self.buckets, programs or Programs(), on_compile)
        self._tokenizer = tokenizer
        self._vocab = model.config.vocab_size
        self._model, self._max_loras = model.config, config.max_loras
        self._adapters: dict[str, Adapter] = {}
        self._new_bank = functools.partial(empty_bank, model.config, numerics, config.max_loras)
        if config.max_lora_rank is not None:
            self._runner.bank = self._new_bank(config.max_lora_rank)
        self._in_flight: deque[_Decoded | _Prefilled] = deque()
        self._transcripts: dict[str, list[Transcript]] = {}  # by request
        self._deadlines: list[tuple[float, str]] = []  # a heap of times and requests
        self._lost: list[TextDelta] = []  # ends of the sequences that a failed step took with it

    @property
    def programs(self) -> dict[str, float]:
        """The programs that have run: name -> seconds of the first call, compilation included."""
        return self._runner.programs

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._lost)

    def add_request(self, request: Request) -> None:
        """The request runs with the next steps.

        Raises RequestError if it cannot be served, CapacityError if too many wait.
        """
        if request.id in self._transcripts:
            raise RequestError(f"request id {request.id!r} is in use; choose another")
        self._check_token_ids(request)
        self._check_adapters(request.adapters)
        sequences = self.scheduler.add(request)
        self._transcripts[request.id] = [Transcript(sequence, self._tokenizer) for sequence in sequences]
        if request.timeout is not None:
            heapq.heappush(self._deadlines, (request.arrival + request.timeout, request.id))

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> list[TextDelta]:
        """The request ends now and its slots are free; an unknown or finished id is ignored."""
        ended = []
        for transcript in list(self._transcripts.get(request_id, ())):
            if transcript.sequence.finish_reason is None:
                self.scheduler.finish(transcript.sequence, reason)
                ended.append(self._deltas(transcript, []))
        return ended

    def step(self) -> list[TextDelta]:
        """Give the device its next call, and return what the call before it produced.

        Whatever this raises ends all sequences: donated state is gone, and nobody knows which tokens were
        made. The next step returns their ends, as aborted; requests added later run as in a new engine.
        """
        if self._lost:
            lost, self._lost = self._lost, []
            return lost
        try:
            return self._end_expired() + self._step()
        except BaseException:
            self._lose_all()
            raise

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        """Requests may name the adapter; those that run are not disturbed.

        Nothing is compiled for it, unless its rank is of a larger bucket than any before. Raises RequestError
        for a name that is taken, UnsupportedError for an adapter that only folding can apply.
        """
        if name in self._adapters:
            raise RequestError(f"adapter {name!r} is loaded already; unload it first, or choose another name")
        check_adapter(adapter, self._model)
        if adapter.rank > self._runner.bank.rank:
            self._runner.bank = self._new_bank(adapter.rank)
            for standing in self.scheduler.adapters.standing:
                self._runner.load_adapter(standing.slot, self._adapters[standing.name])
        self._adapters[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """The adapter is gone. Raises RequestError for one that is not loaded, or that a request uses."""
        if name not in self._adapters:
            raise RequestError(f"adapter {name!r} is not loaded; {self._loaded()}")
        if users := [
            r for r, (first, *_) in self._transcripts.items() if name in first.sequence.request.adapter_names
        ]:
            raise RequestError(
                f"adapter {name!r} is used by {len(users)} requests; let them end, or abort them"
            )
        self.scheduler.adapters.forget(name)
        self.scheduler.slots.forget_adapter(name)
        del self._adapters[name]

    @contextlib.contextmanager
    def standing(
        self, adapters: tuple[tuple[str, float], ...]
    ) -> Iterator[tuple[Bank, list[tuple[int, float]]]]:
        """The bank, in which these adapters stand while the context is open, and where.

        Raises CapacityError if running sequences use all of its slots.
        """
        self._check_adapters(adapters)
        names, slots = [name for name, _ in adapters], self.scheduler.adapters
        if not slots.acquire(names):
            raise CapacityError(f"{self._max_loras} adapters are in use; max_loras allows no more at once")
        try:
            while (load := slots.next_load()) is not None:
                self._runner.load_adapter(load.slot, self._adapters[load.name])
            found = [(slots.index_of(name) or 0, scale) for name, scale in adapters]
            yield self._runner.bank_for(len(found)), found
        finally:
            slots.release(names)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Those that requests may name."""
        return self._adapters

    def warmup(self) -> int:
        """Every program that the configuration can reach is compiled; returns how many there are.

        Raises RequestError while requests run: warming up writes to their slots.
        """
        if self.has_work:
            raise RequestError("warmup needs an idle engine; finish or abort the running requests")
        self._in_flight.clear()  # steps past the end of sequences that have ended
        self.scheduler.forget()
        self._runner.warmup()
        return len(self.programs)

    def _lose_all(self) -> None:
        self._in_flight.clear()
        self._runner.forget()
        self.scheduler.forget()
        for request_id in list(self._transcripts):
            self._lost += self.abort(request_id)
        self.scheduler.forget()

    def _end_expired(self) -> list[TextDelta]:
        ended: list[TextDelta] = []
        while self._deadlines and self._deadlines[0][0] <= time.perf_counter():
            ended += self.abort(heapq.heappop(self._deadlines)[1], FinishReason.TIMEOUT)
        return ended

    def _step(self) -> list[TextDelta]:
        plan = self.scheduler.schedule()
        while isinstance(plan, Copy | LoadAdapter):
            if isinstance(plan, Copy):
                self._runner.copy(plan)
            else:
                self._runner.load_adapter(plan.slot, self._adapters[plan.name])
            plan = self.scheduler.schedule()
        match plan:
            case Prefill():
                scored = prompt_targets(plan)
                output, logprobs = self._runner.prefill(plan, self._sampling_row, scored)
                if scored is not None or any(tile.is_last for tile in plan.tiles):
                    self._in_flight.append(_Prefilled(plan, output, scored, logprobs))
            case Decode():
                self._in_flight.append(_Decoded(plan.sequences, self._runner.decode(plan)))
        if self._in_flight and (plan is None or len(self._in_flight) > 1):
            call = self._in_flight.popleft()
            return self._commit_prompts(call) if isinstance(call, _Prefilled) else self._commit_step(call)
        return []

    def _sampling_row(self, sequence: Sequence) -> SamplingRows:
        return SamplingRows.of(
            sequence.request.params,
            seed=sequence.request.seed,
            sample_index=sequence.sample_index,
            stop_ids=tuple(self._transcript(sequence).stop_ids),
            prompt=sequence.prompt_length,
            vocab=self._vocab,
        )

    def _commit_prompts(self, call: _Prefilled) -> list[TextDelta]:
        if call.scored is not None and call.logprobs is not None:
            found = call.logprobs
            arrays = [np.asarray(x) for x in (found.chosen, found.is_greedy, found.top_ids, found.top)]
            for row, (tile, span) in enumerate(zip(call.plan.tiles, call.scored.spans, strict=True)):
                if tile.sequence.finish_reason is None and span:
                    wanted = slice(span.start, span.stop)
                    self._transcript(tile.sequence).push_prompt(
                        tile.start + span.start + 1, *(x[row, wanted] for x in arrays)
                    )
        rows = tuple(tile.sequence if tile.is_last else None for tile in call.plan.tiles)
        return self._commit_step(_Decoded(rows, call.output))

    def _commit_step(self, call: _Decoded) -> list[TextDelta]:
        live = [
            (row, self._transcript(sequence))
            for row, sequence in enumerate(call.sequences)
            if sequence is not None and sequence.finish_reason is None
        ]
        if not live:
            return []
        tokens, counts = np.asarray(call.output.tokens), np.asarray(call.output.counts)
        if any(transcript.wants_logprobs for _, transcript in live):
            found = call.output.logprobs
            chosen, top_ids, top = map(np.asarray, (found.chosen, found.top_ids, found.top))
            for row, transcript in live:
                transcript.push_logprob(int(tokens[row, 0]), float(chosen[row]), top_ids[row], top[row])
        return [self._deltas(transcript, tokens[row, : counts[row]].tolist()) for row, transcript in live]

    def _deltas(self, transcript: Transcript, tokens: list[int]) -> TextDelta:
        sequence = transcript.sequence
        taken = self.scheduler.commit(sequence, tokens, transcript.stop_ids)
        text = transcript.push(taken)
        if transcript.met_stop_string:
            self.scheduler.finish(sequence, FinishReason.STOP)
        delta = transcript.delta(text, taken)
        if sequence.finish_reason is not None:
            self._forget(sequence.request.id)
        return delta

    def _transcript(self, sequence: Sequence) -> Transcript:
        return self._transcripts[sequence.request.id][sequence.sample_index]

    def _forget(self, request_id: str) -> None:
        if all(t.sequence.finish_reason is not None for t in self._transcripts[request_id]):
            del self._transcripts[request_id]

    def _loaded(self) -> str:
        return f"loaded: {', '.join(sorted(self._adapters))}" if self._adapters else "none is loaded"

    def _check_adapters(self, adapters: tuple[tuple[str, float], ...]) -> None:
        most = min(MAX_LORAS_PER_REQUEST, self._max_loras)
        if len(adapters) > most:
            raise RequestError(f"a request names {len(adapters)} adapters; {most} is the most")
        for name, scale in adapters:
            if name not in self._adapters:
                raise RequestError(f"adapter {name!r} is not loaded; {self._loaded()}")
            if not math.isfinite(scale):
                raise RequestError(f"the scale of adapter {name!r} is {scale}; it must be a finite number")

    def _check_token_ids(self, request: Request) -> None:
        params = request.params
        named = {
            "prompt": request.prompt_ids,
            "logit_bias": params.logit_bias,
            "stop_token_ids": params.stop_token_ids,
        }
        for name, ids in named.items():
            if (wrong := next((i for i in ids if not 0 <= i < self._vocab), None)) is not None:
                raise RequestError(f"{name} has token id {wrong}; the vocabulary has {self._vocab:,}")
