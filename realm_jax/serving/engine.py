"""The engine: schedule -> run -> commit, the one generation loop."""

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from realm_jax.buckets import Buckets
from realm_jax.config import EngineConfig, Numerics
from realm_jax.decoding import Guess, Strategy
from realm_jax.errors import RequestError
from realm_jax.grammars import Grammars, Verdict
from realm_jax.lora import Adapter
from realm_jax.model import Transformer
from realm_jax.parallel import Placement
from realm_jax.programs import Programs
from realm_jax.sampling import TokenLogprobs
from realm_jax.sampling_rows import SamplingRows
from realm_jax.serving.adapters import LoadAdapter
from realm_jax.serving.drafting import Drafting
from realm_jax.serving.in_flight import Decoded, Prefilled
from realm_jax.serving.packing import prompt_targets
from realm_jax.serving.plans import Copy, Decode, Prefill
from realm_jax.serving.registry import AdapterRegistry
from realm_jax.serving.request import DraftMetrics, FinishReason, Request, Sequence, TextDelta
from realm_jax.serving.runner import Runner
from realm_jax.serving.scheduler import Scheduler
from realm_jax.serving.stopwatch import Stopwatch
from realm_jax.serving.transcript import Transcript
from realm_jax.tokenizer import Tokenizer
from realm_jax.weights import Params

_OUTCOMES = {Guess.NONE: None, Guess.WRONG: False, Guess.RIGHT: True}


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
        placement: Placement,
        spare: int | None = None,
        drafting: Drafting | None = None,
        programs: Programs | None = None,
        on_compile: Callable[[str], None] | None = None,
    ) -> None:
        self.buckets = Buckets.plan(
            context,
            config,
            numerics.least_rows,
            numerics.adapter_widths,
            config.spec_tokens if drafting is not None else 0,
        )
        self.scheduler = Scheduler(
            self.buckets,
            context,
            max_queue=config.max_queue,
            max_loras=config.max_loras,
            prefix_caching=config.prefix_caching,
            drafting=drafting,
        )
        self._is_shared = placement.is_shared
        self._stopwatch = Stopwatch(None if placement.is_shared else drafting)  # clocks differ
        self._runner = Runner(strategy, model, params, self.buckets, programs or Programs(), on_compile)
        self._tokenizer = tokenizer
        self._vocab = model.config.vocab_size
        self.grammars = Grammars(tokenizer, self._vocab)
        self.adapters = AdapterRegistry(
            self._runner, self.scheduler.adapters, model.config, numerics, placement, config, spare
        )
        self._in_flight: deque[Decoded | Prefilled] = deque()
        self._transcripts: dict[str, list[Transcript]] = {}  # by request
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._num_added = itertools.count()
        self._lost: list[TextDelta] = []  # ends of the sequences that a failed step took with it

    @property
    def programs(self) -> dict[str, float]:
        """The programs that have run: name -> seconds of the first call, compilation included."""
        return self._runner.programs

    @property
    def drafts(self) -> DraftMetrics | None:
        """What became of all guesses so far; None where nothing guesses."""
        drafting = self.scheduler.drafting
        return None if drafting is None else DraftMetrics.of(drafting.total)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._lost)

    def add_request(self, request: Request) -> None:
        """The request runs with the next steps.

        Raises RequestError if it cannot be served, CapacityError if too many wait. A grammar is compiled here
        if `grammars` has not done so before, which another thread may ask for.
        """
        if request.id in self._transcripts:
            raise RequestError(f"request id {request.id!r} is in use; choose another")
        if request.timeout is not None and self._is_shared:
            raise RequestError(
                f"timeout is {request.timeout} s; processes that compute together have no clock in common "
                "(leave it out, or abort the request in all of them)"
            )
        self._check_token_ids(request)
        self.adapters.check(request.adapters)
        form = request.params.structured_output
        grammar = None if form is None else self.grammars.compile(form)
        sequences = self.scheduler.add(request)
        for sequence in sequences:
            sequence.matcher = None if grammar is None else grammar.matcher()
        self._transcripts[request.id] = [Transcript(sequence, self._tokenizer) for sequence in sequences]
        if request.timeout is not None:
            end = request.arrival + request.timeout
            heapq.heappush(self._deadlines, (end, next(self._num_added), request))

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
        """As `AdapterRegistry.add`."""
        self.adapters.add(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """As `AdapterRegistry.remove`. Raises RequestError while a request uses the adapter."""
        running = (transcripts[0].sequence.request for transcripts in self._transcripts.values())
        if users := sum(name in request.adapter_names for request in running):
            raise RequestError(f"adapter {name!r} is used by {users} requests; let them end, or abort them")
        self.adapters.remove(name)
        self.scheduler.slots.forget_adapter(name)

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
        self.adapters.lose()

    def _end_expired(self) -> list[TextDelta]:
        ended: list[TextDelta] = []
        while self._deadlines and self._deadlines[0][0] <= time.perf_counter():
            request = heapq.heappop(self._deadlines)[2]
            mine = self._transcripts.get(request.id)
            if mine and mine[0].sequence.request is request:  # its id may be another's by now
                ended += self.abort(request.id, FinishReason.TIMEOUT)
        return ended

    def _step(self) -> list[TextDelta]:
        plan = self.scheduler.schedule()
        while isinstance(plan, Copy | LoadAdapter):
            self._stopwatch.disturb()
            if isinstance(plan, Copy):
                self._runner.copy(plan)
            else:
                self.adapters.put(plan)
            plan = self.scheduler.schedule()
        if plan is not None:
            self._give(plan)
        if self._in_flight and (plan is None or len(self._in_flight) > 1):
            call = self._in_flight.popleft()
            return self._commit_prompts(call) if isinstance(call, Prefilled) else self._commit_step(call)
        return []

    def _give(self, plan: Prefill | Decode) -> None:
        """The device has the plan's call."""
        given, known = self._stopwatch.now(), len(self.programs)
        if isinstance(plan, Decode):
            self._in_flight.append(Decoded(plan.sequences, self._runner.decode(plan), plan, given))
        else:
            scored = prompt_targets(plan)
            output, logprobs, hidden = self._runner.prefill(plan, self._sampling_row, scored)
            embeds = any(tile.sequence.request.embeds for tile in plan.tiles)
            if embeds or scored is not None or any(tile.is_last for tile in plan.tiles):
                kept = hidden if embeds else None
                self._in_flight.append(Prefilled(plan, output, scored, logprobs, kept))
        if isinstance(plan, Prefill) or len(self.programs) > known:
            self._stopwatch.disturb()

    def _sampling_row(self, sequence: Sequence) -> SamplingRows:
        return SamplingRows.of(
            sequence.request.params,
            seed=sequence.request.seed,
            sample_index=sequence.sample_index,
            stop_ids=tuple(self._transcript(sequence).stop_ids),
            prompt=sequence.prompt_length,
            vocab=self._vocab,
        )

    def _commit_prompts(self, call: Prefilled) -> list[TextDelta]:
        if call.scored is not None and call.logprobs is not None:
            found = call.logprobs
            arrays = [np.asarray(x) for x in (found.chosen, found.is_greedy, found.top_ids, found.top)]
            for row, (tile, span) in enumerate(zip(call.plan.tiles, call.scored.spans, strict=True)):
                if tile.sequence.finish_reason is None and span:
                    wanted = slice(span.start, span.stop)
                    self._transcript(tile.sequence).push_prompt(
                        tile.start + span.start + 1, *(x[row, wanted] for x in arrays)
                    )
        if call.hidden is not None:
            hidden = np.asarray(call.hidden)
            for row, tile in enumerate(call.plan.tiles):
                if tile.sequence.finish_reason is None and tile.sequence.request.embeds:
                    self._transcript(tile.sequence).push_hidden(hidden[row, : len(tile.tokens)])
        rows = tuple(tile.sequence if tile.is_last else None for tile in call.plan.tiles)
        return self._commit_step(Decoded(rows, call.output))

    def _commit_step(self, call: Decoded) -> list[TextDelta]:
        """What the rows gave; those of one sequence stand together."""
        tokens, is_real = np.asarray(call.output.tokens), np.asarray(call.output.is_real)
        self._stopwatch.read(call.plan, call.given)
        deltas = []
        for sequence, group in itertools.groupby(range(len(call.sequences)), call.sequences.__getitem__):
            if sequence is None or sequence.finish_reason is not None:
                continue
            asked = list(group)
            rows = [row for row in asked if is_real[row]]
            if call.plan is not None and call.output.guesses is not None:
                guesses = np.asarray(call.output.guesses)
                self.scheduler.settle(sequence, len(asked), [_OUTCOMES[guesses[row]] for row in rows])
            transcript = self._transcript(sequence)
            logprobs = call.output.logprobs if transcript.wants_logprobs else None
            deltas.append(self._deltas(transcript, [(int(tokens[row]), row) for row in rows], logprobs))
        return deltas

    def _deltas(
        self, transcript: Transcript, tokens: list[tuple[int, int]], found: TokenLogprobs | None = None
    ) -> TextDelta:
        """The sequence is longer by these tokens, up to its end. tokens: each with the row that gave it."""
        sequence, taken, text = transcript.sequence, [], ""
        for token, row in tokens:
            if not self.scheduler.commit(sequence, [token], transcript.stop_ids):
                break
            if found is not None:
                chosen, top_ids, top = (np.asarray(x)[row] for x in (found.chosen, found.top_ids, found.top))
                transcript.push_logprob(token, float(chosen), top_ids, top)
            taken.append(token)
            text += transcript.push([token])
            if transcript.met_stop_string:
                self.scheduler.finish(sequence, FinishReason.STOP)
            self._advance(sequence, token)
        delta = transcript.delta(text, taken)
        if sequence.finish_reason is not None:
            self._forget(sequence.request.id)
        return delta

    def _advance(self, sequence: Sequence, token: int) -> None:
        """What may follow the token is known; the sequence has ended if nothing may."""
        if sequence.matcher is None or sequence.finish_reason is FinishReason.STOP:
            return
        verdict = sequence.matcher.advance(token)
        if verdict is Verdict.COMPLETE:
            self.scheduler.finish(sequence, FinishReason.STOP)
            sequence.finish_reason = FinishReason.STOP  # even where its last token was the last allowed
        elif verdict is Verdict.STUCK:
            self.scheduler.finish(sequence, FinishReason.ERROR)

    def _transcript(self, sequence: Sequence) -> Transcript:
        return self._transcripts[sequence.request.id][sequence.sample_index]

    def _forget(self, request_id: str) -> None:
        if all(t.sequence.finish_reason is not None for t in self._transcripts[request_id]):
            del self._transcripts[request_id]

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
