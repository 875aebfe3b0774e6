"""Every shape that an engine compiles: the one place where lengths are padded."""

from dataclasses import dataclass

from realm_jax.config import BLOCK, MIN_ROWS, TILE, EngineConfig

DRAFT_ROWS = (4, 8, 16, 32, 64)
"""Rows of a step that verifies guesses of one sequence, and its newest token."""


@dataclass(frozen=True)
class Pool:
    """`slots` sequences of up to `capacity` cached tokens, stepped together.

    rows: how many a decode step may compute: of leading slots, or with drafts of any. tiles: how many a
    prefill call may.
    """

    capacity: int
    slots: int
    rows: tuple[int, ...]
    tiles: tuple[int, ...]

    def rows_for(self, used: int) -> int:
        """The smallest compiled number of rows that covers the first `used` slots."""
        return next(rows for rows in self.rows if rows >= used)

    def tiles_for(self, waiting: int) -> int:
        """How many tiles a call has, when so many wait: a larger call only if three quarters are used."""
        return max((t for t in self.tiles if 4 * waiting >= 3 * t), default=self.tiles[0])


@dataclass(frozen=True)
class Buckets:
    """The pools of slots, and the shapes of the calls on them."""

    pools: tuple[Pool, ...]  # by growing capacity; a sequence moves up by one copy
    max_num_seqs: int  # sequences that run at once, in all pools together
    widths: tuple[int, ...] = (0,)  # how many adapters a row may have in a call; 0 = the model alone
    deterministic: bool = False

    @classmethod
    def plan(
        cls,
        context: int,
        config: EngineConfig,
        least_rows: int = MIN_ROWS,
        adapter_widths: tuple[int, ...] = (),
        draft_tokens: int = 0,
    ) -> "Buckets":
        """Buckets for sequences of up to `context` tokens, steps of at least `least_rows` rows.

        draft_tokens: how many guesses of one sequence a step may verify.

        Attention reads only the blocks that its longest row has filled, so a large capacity costs memory,
        not time. Few sequences are long: past 1,024 tokens slots shrink as capacity grows.
        """
        most = max(config.max_num_batched_tokens // TILE, 1)
        top = -(-context // BLOCK) * BLOCK
        capacities = [c for c in (1024, 8192) if c < top]
        draft_rows = next(r for r in DRAFT_ROWS if r > draft_tokens) if draft_tokens else 0
        pools = []
        for capacity in (*capacities, top):
            slots = max(min(config.max_num_seqs, config.max_num_seqs * 1024 // capacity), MIN_ROWS)
            most_rows = max(slots, draft_rows)
            steps = (least_rows, 4, 8, 16) if not pools or draft_rows else (least_rows,)
            fewer = sorted({r for r in steps if r < most_rows})
            smaller = (t for t in ((1, 4) if not pools else (1,)) if t < most)
            if config.deterministic:
                fewer = smaller = ()
            pools.append(Pool(capacity, slots, (*fewer, most_rows), (*smaller, most)))
        widths = adapter_widths[-1:] if config.deterministic else adapter_widths
        return cls(tuple(pools), config.max_num_seqs, (0, *widths), config.deterministic)

    def width_for(self, adapters: int, rank: int) -> int:
        """The smallest compiled number of adapters a row that covers so many. rank: the bank's, 0 without.

        A deterministic run with adapters has one width, whatever stands in the batch.
        """
        if self.deterministic and rank:
            return self.widths[-1]
        return next(width for width in self.widths if width >= adapters)

    @property
    def cached_tokens(self) -> int:
        """Tokens that all slots of all pools hold."""
        return sum(pool.slots * pool.capacity for pool in self.pools)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Every number of tiles that some pool's call may have."""
        return tuple(sorted({tiles for pool in self.pools for tiles in pool.tiles}))

    def programs(self, rank: int = 0) -> list[str]:
        """The name of every program that may be compiled for these shapes. rank: that of the adapters."""
        names, widths = [], self.widths if rank else (0,)
        for i, pool in enumerate(self.pools):
            names += [prefill_name(tiles, pool, width, rank) for width in widths for tiles in pool.tiles]
            names += [decode_name(rows, pool, width, rank) for width in widths for rows in pool.rows]
            sources = (pool, self.pools[i - 1]) if i else (pool,)
            names += [copy_name(source, pool) for source in sources]
        return names + [score_name(tiles) for tiles in self.tiles]


def prefill_name(tiles: int, pool: Pool, width: int = 0, rank: int = 0) -> str:
    """What a user reads of a prefill program, for rows with up to `width` adapters of a rank."""
    return f"prefill {tiles * TILE} tokens, capacity {pool.capacity}{_adapters(width, rank)}"


def decode_name(rows: int, pool: Pool, width: int = 0, rank: int = 0) -> str:
    """What a user reads of a decode program, for rows with up to `width` adapters of a rank."""
    return f"decode {rows} rows, capacity {pool.capacity}{_adapters(width, rank)}"


def _adapters(width: int, rank: int) -> str:
    return f", adapters {width} x rank {rank}" if width else ""


def copy_name(source: Pool, target: Pool) -> str:
    """What a user reads of the program that copies a slot."""
    return f"copy from capacity {source.capacity} to {target.capacity}"


def score_name(tiles: int) -> str:
    """What a user reads of the program that scores prompt tokens."""
    return f"score {tiles * TILE} tokens"
