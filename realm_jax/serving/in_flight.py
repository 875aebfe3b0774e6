"""Calls that the device was given and of which nothing has been read."""

from dataclasses import dataclass

import jax

from realm_jax.decoding import StepOutput
from realm_jax.scoring import TargetLogprobs
from realm_jax.serving.packing import PromptTargets
from realm_jax.serving.plans import Decode, Prefill
from realm_jax.serving.request import Sequence


@dataclass(frozen=True)
class Decoded:
    """A step, or the ends of prompts."""

    sequences: tuple[Sequence | None, ...]  # by row
    output: StepOutput
    plan: Decode | None = None  # of a step; None of prompts' ends
    given: float = 0.0  # when


@dataclass(frozen=True)
class Prefilled:
    """A prefill call."""

    plan: Prefill
    output: StepOutput
    scored: PromptTargets | None
    logprobs: TargetLogprobs | None
    hidden: jax.Array | None  # [B, T, D], where a prompt's embedding is wanted
