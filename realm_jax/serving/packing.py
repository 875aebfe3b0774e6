"""A prefill plan as the arrays that the device takes. NumPy only: jit takes these as they are."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from realm_jax.buckets import Pool
from realm_jax.config import MAX_LORAS_PER_REQUEST, TILE
from realm_jax.decoding import PromptTiles, StepRows, mask_words
from realm_jax.lora.banked import AdapterRows
from realm_jax.sampling_rows import SamplingRows
from realm_jax.serving.plans import Decode, Prefill, Tile
from realm_jax.serving.request import Sequence


@dataclass(frozen=True)
class PromptTargets:
    """Which prompt tokens a prefill call is asked to score.

    spans: by tile, the indices t of the tokens whose next token is wanted.
    """

    targets: np.ndarray  # int32 [B, T]: the token after each token
    spans: tuple[range, ...]
    wants_top: bool


def pack_prompts(
    plan: Prefill, pool: Pool, row_of: Callable[[Sequence], SamplingRows], vocab: int
) -> PromptTiles:
    """The plan's tiles, padded to its number of rows. row_of: the sampling parameters of a sequence."""
    B = plan.rows
    tokens = np.zeros((B, TILE), np.int32)
    slots = np.full(B, pool.slots, np.int32)
    starts, lengths = np.zeros(B, np.int32), np.zeros(B, np.int32)
    is_last = np.zeros(B, np.bool_)
    adapters = no_adapters(B)
    idle = SamplingRows.greedy(1, vocab)
    rows = [idle] * B
    masks = np.zeros((B, mask_words(vocab)), np.uint32)
    for i, tile in enumerate(plan.tiles):
        tokens[i, : len(tile.tokens)] = tile.tokens
        slots[i], starts[i], lengths[i] = tile.slot, tile.start, len(tile.tokens)
        is_last[i] = tile.is_last
        for j, (_, scale) in enumerate(tile.sequence.request.adapters):
            adapters.index[i, j], adapters.scale[i, j] = tile.sequence.bank_slots[j], scale
        if tile.is_last:
            rows[i] = row_of(tile.sequence)
            if tile.sequence.matcher is not None:
                masks[i] = tile.sequence.matcher.allowed
    return PromptTiles(tokens, slots, starts, lengths, is_last, adapters, SamplingRows.join(rows), masks)


def pack_rows(plan: Decode, pool: Pool) -> StepRows:
    """The plan's rows: a sequence's first one is its newest token, the others are guesses."""
    slots, offsets = np.full(plan.rows, pool.slots, np.int32), np.zeros(plan.rows, np.int32)
    for i, sequence in enumerate(plan.sequences):
        if sequence is not None and sequence.slot is not None:
            slots[i] = sequence.slot
            offsets[i] = offsets[i - 1] + 1 if i and plan.sequences[i - 1] is sequence else 0
    return StepRows(slots, offsets)


def pack_masks(plan: Decode, pool: Pool, vocab: int) -> np.ndarray | None:
    """The masks of the plan's sequences by slot [S, W]; None where no answer has a form."""
    formed = [s for s in plan.sequences if s is not None and s.matcher is not None]
    if not formed:
        return None
    masks = np.zeros((pool.slots, mask_words(vocab)), np.uint32)
    for sequence in formed:
        if sequence.matcher is not None and sequence.slot is not None:
            masks[sequence.slot] = sequence.matcher.allowed
    return masks


def no_adapters(rows: int) -> AdapterRows:
    """Rows that have none, in host memory."""
    shape = rows, MAX_LORAS_PER_REQUEST
    return AdapterRows(np.zeros(shape, np.int32), np.zeros(shape, np.float32))


def prompt_targets(plan: Prefill) -> PromptTargets | None:
    """What is to be scored of these tiles, if anything."""
    spans = [_span(tile) for tile in plan.tiles]
    if not any(spans):
        return None
    targets = np.zeros((plan.rows, TILE), np.int32)
    for row, tile, span in zip(targets, plan.tiles, spans, strict=False):
        prompt = tile.sequence.request.prompt_ids
        row[span.start : span.stop] = prompt[tile.start + span.start + 1 : tile.start + span.stop + 1]
    wants_top = any(
        span and tile.sequence.request.params.prompt_logprobs
        for tile, span in zip(plan.tiles, spans, strict=True)
    )
    return PromptTargets(targets, tuple(spans), wants_top)


def _span(tile: Tile) -> range:
    """The tokens of a tile whose next token is one of the prompt's that its request wants scored."""
    request = tile.sequence.request
    if request.params.prompt_logprobs is None:
        return range(0)
    first = max(request.score_from - 1 - tile.start, 0)
    return range(first, len(tile.tokens) - tile.is_last)
