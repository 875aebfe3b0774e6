"""The engine: schedule -> run -> commit, the one generation loop."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.config import Buckets, decode_name, move_name, prefill_name
from realm_jax.decoding import DecodeState, PrefillChunk, StepOutput, Strategy, move
from realm_jax.errors import CapacityError, RequestError
from realm_jax.sampling import SamplingRows
from realm_jax.serving.request import FinishReason, Request, Sequence, TextDelta
from realm_jax.serving.scheduler import Decode, Move, Plan, Prefill, Scheduler
from realm_jax.serving.transcript import Transcript
from realm_jax.tokenizer import Tokenizer
from realm_jax.weights import Params

Result = TypeVar("Result")


@dataclass(frozen=True)
class _InFlight:
    """A call that the device was given and whose tokens have not been read."""

    sequences: tuple[Sequence | None, ...]  # by row
    output: StepOutput


class Engine:
    """Runs requests to their ends, many at once, on slots of fixed shape.

    Each `step` gives the device its next call and then reads the tokens of the call before, so that the
    host works while the device does.
    """

    def __init__(
        self,
        strategy: Strategy,
        params: Params,
        tokenizer: Tokenizer,
        buckets: Buckets,
        *,
        context: int,
        vocab: int,
        on_compile: Callable[[str], None] | None = None,
    ) -> None:
        self.buckets = buckets
        self.programs: dict[str, float] = {}  # name -> seconds of its first call, compilation included
        self._on_compile = on_compile
        self.scheduler = Scheduler(buckets, context)
        self._strategy = strategy
        self._params = params
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._states: dict[int, DecodeState] = {}  # by pool, made when first used
        self._in_flight: deque[_InFlight] = deque()
        self._transcripts: dict[str, list[Transcript]] = {}  # by request
        self._lost: list[TextDelta] = []  # ends of the sequences that a failed step took with it

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._lost)

    def add_request(self, request: Request) -> None:
        """The request runs with the next steps. Raises RequestError if it cannot be served."""
        if request.id in self._transcripts:
            raise RequestError(f"request id {request.id!r} is in use; choose another")
        self._check_token_ids(request)
        sequences = self.scheduler.add(request)
        self._transcripts[request.id] = [Transcript(sequence, self._tokenizer) for sequence in sequences]

    def abort(self, request_id: str) -> list[TextDelta]:
        """The request ends now and its slots are free; an unknown or finished id is ignored."""
        ended = []
        for transcript in list(self._transcripts.get(request_id, ())):
            if transcript.sequence.finish_reason is None:
                self.scheduler.finish(transcript.sequence, FinishReason.ABORT)
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
            return self._step()
        except BaseException:
            self._lose_all()
            raise

    def _lose_all(self) -> None:
        self._in_flight.clear()
        self._states.clear()
        for request_id in list(self._transcripts):
            self._lost += self.abort(request_id)

    def _step(self) -> list[TextDelta]:
        plan = self.scheduler.schedule()
        if plan is not None:
            self._run(plan)
        if self._in_flight and (plan is None or len(self._in_flight) > 1):
            return self._commit(self._in_flight.popleft())
        return []

    def warmup(self) -> int:
        """Every program that the configuration can reach is compiled; returns how many there are.

        Raises RequestError while requests run: warming up writes to their slots.
        """
        if self.has_work:
            raise RequestError("warmup needs an idle engine; finish or abort the running requests")
        self._in_flight.clear()  # steps past the end of sequences that have ended
        row = SamplingRows.greedy(1, self._vocab)
        for i, pool in enumerate(self.buckets.pools):
            for bucket in self.buckets.chunks:
                self._run_prefill(i, _chunk((), 0, 0, bucket, False, row))
            for rows in pool.rows:
                self._run_step(i, np.zeros(rows, np.bool_))
            if i:
                self._run_move(Move(i - 1, 0, i, 0))
        jax.block_until_ready(self._states)
        return len(self.programs)

    def _run(self, plan: Plan) -> None:
        match plan:
            case Prefill():
                output = self._run_prefill(plan.pool, self._chunk_of(plan))
                if plan.is_last:
                    self._in_flight.append(_InFlight((plan.sequence,), output))
            case Decode():
                active = np.array([sequence is not None for sequence in plan.sequences])
                self._in_flight.append(_InFlight(plan.sequences, self._run_step(plan.pool, active)))
            case Move():
                self._run_move(plan)

    def _run_prefill(self, pool: int, chunk: PrefillChunk) -> StepOutput:
        name = prefill_name(chunk.tokens.shape[1], self.buckets.pools[pool])
        state = self._state(pool)
        self._states[pool], output = self._call(
            name, lambda: self._strategy.prefill(self._params, state, chunk)
        )
        return output

    def _run_step(self, pool: int, active: np.ndarray) -> StepOutput:
        name = decode_name(len(active), self.buckets.pools[pool])
        state = self._state(pool)
        self._states[pool], output = self._call(
            name, lambda: self._strategy.step(self._params, state, jnp.asarray(active))
        )
        return output

    def _run_move(self, plan: Move) -> None:
        source, target = self._state(plan.from_pool), self._state(plan.to_pool)
        slots = jnp.int32(plan.from_slot), jnp.int32(plan.to_slot)
        name = move_name(self.buckets.pools[plan.to_pool])
        self._states[plan.to_pool] = self._call(name, lambda: move(source, target, *slots))

    def _call(self, name: str, program: Callable[[], Result]) -> Result:
        """The program's result; its first call, which compiles it, is announced and timed."""
        if name in self.programs:
            return program()
        if self._on_compile is not None:
            self._on_compile(name)
        start = time.perf_counter()
        result = program()
        self.programs[name] = time.perf_counter() - start
        return result

    def _chunk_of(self, plan: Prefill) -> PrefillChunk:
        sequence = plan.sequence
        row = SamplingRows.of(
            sequence.request.params,
            seed=sequence.request.seed,
            sample_index=sequence.sample_index,
            stop_ids=tuple(self._transcript(sequence).stop_ids),
            prompt=sequence.prompt_length,
            vocab=self._vocab,
        )
        return _chunk(plan.tokens, plan.slot, plan.start, plan.bucket, plan.is_last, row)

    def _state(self, pool: int) -> DecodeState:
        if pool not in self._states:
            shape = self.buckets.pools[pool]
            try:
                self._states[pool] = jax.block_until_ready(self._strategy.empty_state(shape))
            except jax.errors.JaxRuntimeError as error:
                raise CapacityError(
                    f"no memory for the caches of {shape.slots} sequences of {shape.capacity:,} tokens "
                    f"(lower --ctx-size or max_num_seqs): {str(error).splitlines()[0]}"
                ) from error
        return self._states[pool]

    def _commit(self, call: _InFlight) -> list[TextDelta]:
        tokens, counts = np.asarray(call.output.tokens), np.asarray(call.output.counts)
        live = [
            (row, self._transcript(sequence))
            for row, sequence in enumerate(call.sequences)
            if sequence is not None and sequence.finish_reason is None
        ]
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


def _chunk(
    tokens: tuple[int, ...], slot: int, start: int, bucket: int, is_last: bool, row: SamplingRows
) -> PrefillChunk:
    padded = np.zeros((1, bucket), np.int32)
    padded[0, : len(tokens)] = tokens
    return PrefillChunk(
        tokens=jnp.asarray(padded),
        slot=jnp.int32(slot),
        start=jnp.int32(start),
        length=jnp.int32(len(tokens)),
        is_last=jnp.bool_(is_last),
        sampling=row,
    )
