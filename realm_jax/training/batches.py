"""Examples -> batches of few fixed shapes, in an order that the seed alone decides.

B rows, T tokens.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from realm_jax.training.data import Example

STEP = 16
"""Lengths are multiples of it."""
BUCKETS = 4
"""So many lengths at most: each is a program to compile."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one bucket; rows and tokens that fill it up are no targets."""

    tokens: np.ndarray  # int32 [B, T]
    is_target: np.ndarray  # bool [B, T]
    length: int  # tokens that are no filling, of all rows

    @property
    def targets(self) -> int:
        return int(self.is_target.sum())


@dataclass(frozen=True, eq=False)
class Batches:
    """The examples in batches of `size` rows, epoch after epoch, each in an order of its own."""

    examples: Sequence[Example]
    size: int
    seed: int

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The buckets' lengths: the longest example, its half, and so on."""
        longest = max(len(example.ids) for example in self.examples)
        return sorted({_round_up(longest / 2**i) for i in range(BUCKETS)})

    @functools.cached_property
    def per_epoch(self) -> int:
        """Batches that hold every example once."""
        return sum(-(-len(each) // self.size) for each in self._members.values())

    @functools.cached_property
    def _members(self) -> dict[int, list[int]]:
        """The numbers of each bucket's examples."""
        found: dict[int, list[int]] = {length: [] for length in self.lengths}
        for number, example in enumerate(self.examples):
            found[next(length for length in self.lengths if length >= len(example.ids))].append(number)
        return {length: members for length, members in found.items() if members}

    def starting_at(self, index: int) -> Iterator[Batch]:
        """All batches from that number on, counted through the epochs, without end."""
        first, skipped = divmod(index, self.per_epoch)
        for epoch in itertools.count(first):
            for length, rows in self._order(epoch)[skipped:]:
                yield self._batch(length, rows)
            skipped = 0

    def in_order(self) -> list[Batch]:
        """Every example once, without any shuffling."""
        return [
            self._batch(length, members[i : i + self.size])
            for length, members in self._members.items()
            for i in range(0, len(members), self.size)
        ]

    def _order(self, epoch: int) -> list[tuple[int, list[int]]]:
        """The epoch's batches: the length and the examples of each."""
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for length, members in self._members.items():
            shuffled = rng.permutation(members).tolist()
            batches += [(length, shuffled[i : i + self.size]) for i in range(0, len(shuffled), self.size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _batch(self, length: int, rows: Sequence[int]) -> Batch:
        tokens, is_target = np.zeros((self.size, length), np.int32), np.zeros((self.size, length), bool)
        for row, number in enumerate(rows):
            example = self.examples[number]
            tokens[row, : len(example.ids)] = example.ids
            is_target[row, : len(example.ids)] = example.is_target
        return Batch(tokens, is_target, sum(len(self.examples[number].ids) for number in rows))


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and a share of them kept for evaluation: at least one, if the share is not 0."""
    kept = min(math.ceil(share * len(examples)), len(examples) - 1)
    order = np.random.default_rng([seed, 1 << 32]).permutation(len(examples)).tolist()
    return [examples[i] for i in sorted(order[kept:])], [examples[i] for i in sorted(order[:kept])]


def _round_up(length: float) -> int:
    return max(STEP, math.ceil(length / STEP) * STEP)
