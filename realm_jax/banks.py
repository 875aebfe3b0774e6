"""Banks of adapters: their factors for every projection of a model, side by side on the device.

A slot of a bank is one row of numbers; slot 0 stays zeros, for rows without an adapter. L slots, N numbers
of a slot, M projections.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.architectures import Parameter, parameters, unread_tensors
from realm_jax.config import MAX_LORA_RANK, ModelConfig, Numerics
from realm_jax.errors import UnsupportedError
from realm_jax.kernels.low_rank import LANES, LowRankForm
from realm_jax.lora import Adapter, LowRank
from realm_jax.lora.banked import AdapterRows, Banked, NativeBanked
from realm_jax.parallel import OneDevice, Placement
from realm_jax.parallel.shares import Whole
from realm_jax.weights import Params

RANKS = tuple(LANES << i for i in range((MAX_LORA_RANK // LANES).bit_length()))
"""The ranks that banks are made for; factors of fewer are filled up with zeros."""


ONE_DEVICE = OneDevice()


@dataclass(frozen=True)
class Place:
    """A projection that adapters may change: where it stands in the params and in a slot."""

    path: tuple[str, ...]
    tensors: tuple[str, ...]  # its parts
    form: LowRankForm


@struct.dataclass
class Bank:
    """The adapters of a model. One of no places changes nothing, and costs nothing.

    width: how many adapters a row of the call may have; the first places of its row count.
    """

    factors: Any  # [L, N] float32 or bfloat16; uint16 in pairs for the C++ kernel. None without places
    ranks: jax.Array | None  # [L, M]
    places: tuple[Place, ...] = struct.field(pytree_node=False)
    node: type[Banked] = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    placement: Placement = struct.field(pytree_node=False, default=ONE_DEVICE)

    def adapt(self, params: Params, rows: AdapterRows) -> Params:
        """The params with each row's adapters over their projections."""
        rows = rows.first(self.width)
        for place in self.places:
            params = _wrapped(params, place.path, functools.partial(self._over, rows, place.form))
        return params

    def _over(self, rows: AdapterRows, form: LowRankForm, base: Any) -> Banked:
        assert self.factors is not None and self.ranks is not None
        return self.node(base, self.factors, self.ranks, rows, form)

    @property
    def rank(self) -> int:
        """The largest rank that fits."""
        return self.places[0].form.rank if self.places else 0


NO_ADAPTERS = Bank(None, None, (), Banked, 0)


def rank_bucket(rank: int) -> int:
    """The rank of a bank that holds adapters of this one. Raises UnsupportedError past the largest."""
    if rank > RANKS[-1]:
        raise UnsupportedError(
            f"the adapter's rank is {rank}; {RANKS[-1]} is the most for requests (fold it: --lora PATH)"
        )
    return next(each for each in RANKS if each >= rank)


def empty_bank(
    config: ModelConfig, numerics: Numerics, slots: int, rank: int, placement: Placement = ONE_DEVICE
) -> Bank:
    """A bank for so many adapters, and slot 0."""
    places = tuple(_places(placement.local(config), rank_bucket(rank)))
    is_native = numerics.kernels == "native" and all(place.form.inputs % 2 == 0 for place in places)
    shape = slots + 1, places[-1].form.stop
    if not is_native and shape[1] >= 1 << 31:
        raise UnsupportedError(
            f"an adapter of rank {rank} takes {shape[1]:,} numbers; 2^31 is the limit (fold it)"
        )
    dtype = jnp.dtype(jnp.uint16 if is_native else numerics.dtype)
    factors = placement.split(config, lambda _: jnp.zeros(shape, dtype))
    ranks = placement.same(lambda: jnp.zeros((slots + 1, len(places)), jnp.int32))
    node = NativeBanked if is_native else Banked
    bank = Bank(factors, ranks, places, node, numerics.adapter_widths[-1], placement)
    return put(bank, config, 0, Adapter("", {}))  # compiled here, not for a request


def bank_bytes(
    config: ModelConfig, numerics: Numerics, slots: int, rank: int, placement: Placement = ONE_DEVICE
) -> int:
    """What the arrays of such a bank take on a device."""
    places = tuple(_places(placement.local(config), rank_bucket(rank)))
    each = 2 if numerics.dtype == "bfloat16" else 4
    return (slots + 1) * (places[-1].form.stop * each + len(places) * 4)


def check_adapter(adapter: Adapter, config: ModelConfig) -> None:
    """Raises UnsupportedError for an adapter that only folding can apply."""
    known = {tensor for place in _places(config, LANES) for tensor in place.tensors} | unread_tensors(config)
    problems = [f"changes {name}" for name in adapter.deltas if name not in known]
    problems += [f"replaces {name}" for name in adapter.replaced]
    if adapter.magnitudes:
        problems.append("is a DoRA")
    if not adapter.deltas and not problems:
        problems.append("changes nothing")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UnsupportedError(
            f"{adapter.name} {', '.join(problems[:5])}{more}: requests can name adapters of the layers' "
            "projections alone; fold it into the model instead (--lora PATH)"
        )
    rank_bucket(adapter.rank)


def put(bank: Bank, config: ModelConfig, slot: int, adapter: Adapter) -> Bank:
    """The bank with the adapter in a slot. The old bank's arrays are gone. config: of the whole model."""
    dtype = jax.tree.leaves(bank.factors)[0].dtype

    def numbers(of: Whole) -> np.ndarray:
        return _row(bank, of.adapter(adapter), dtype)[None]

    row, ranks = bank.placement.split(config, numbers), _ranks(bank, adapter)[None]
    factors, kept = _put(bank.placement, (bank.factors, bank.ranks), (row, ranks), np.int32(slot))
    return bank.replace(factors=factors, ranks=kept)  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _put(placement: Placement, kept: Any, rows: Any, slot: Int[Array, ""]) -> Any:
    return placement.update(_written, kept, rows, slot)


def _written(kept: tuple[Array, Array], rows: tuple[Array, Array], slot: Array) -> tuple[Array, Array]:
    zero = jnp.zeros((), jnp.int32)
    return jax.tree.map(lambda x, row: jax.lax.dynamic_update_slice(x, row, (slot, zero)), kept, rows)


def _places(config: ModelConfig, rank: int) -> Iterable[Place]:
    """Every matrix of the layers but those of experts, in the order in which the layers use them."""
    start = 0
    wanted = [p for p in parameters(config) if _is_projection(p)]
    for column, p in enumerate(wanted):
        outputs = tuple(part.shape[-2] for part in p.parts)
        form = LowRankForm(p.parts[0].shape[-1], outputs, rank, start, column)
        yield Place(p.path, tuple(f"{part.name}.weight" for part in p.parts), form)
        start = form.stop


def _is_projection(p: Parameter) -> bool:
    return p.path[-1] == "kernel" and not p.is_vector and all(part.expert is None for part in p.parts)


def _ranks(bank: Bank, adapter: Adapter) -> np.ndarray:
    """The adapter's rank at each place."""
    ranks = np.zeros(len(bank.places), np.int32)
    for place in bank.places:
        found = [adapter.deltas[name].rank for name in place.tensors if name in adapter.deltas]
        ranks[place.form.column] = max(found, default=0)
    return ranks


def _row(bank: Bank, adapter: Adapter, dtype: np.dtype) -> np.ndarray:
    """The adapter's factors as a slot has them."""
    numbers = np.zeros(bank.places[-1].form.stop, np.float32)
    is_native = bank.node is NativeBanked
    for place in bank.places:
        form = place.form
        deltas = [adapter.deltas.get(name) for name in place.tensors]
        if all(delta is None for delta in deltas):
            continue
        a, b = _factors(form, deltas)
        numbers[form.start : form.start_b] = (in_vectors(a) if is_native else a).reshape(-1)
        numbers[form.start_b : form.stop] = (in_vectors(b) if is_native else b).reshape(-1)
    return numbers.astype(ml_dtypes.bfloat16).view(np.uint16) if is_native else numbers.astype(dtype)


def _factors(form: LowRankForm, deltas: list[LowRank | None]) -> tuple[np.ndarray, np.ndarray]:
    """a [I, P R] and b [R, padded outputs] of all parts, zeros where a part is not changed."""
    a = np.zeros((form.inputs, len(deltas), form.rank), np.float32)
    b = np.zeros((form.rank, sum(form.padded)), np.float32)
    column = 0
    for part, (delta, padded) in enumerate(zip(deltas, form.padded, strict=True)):
        if delta is not None:
            a[:, part, : delta.rank] = delta.a.T
            b[: delta.rank, column : column + form.outputs[part]] = np.float32(delta.scale) * delta.b.T
        column += padded
    return a.reshape(form.inputs, -1), b


def in_vectors(factor: Float[np.ndarray, "I O"]) -> Float[np.ndarray, "O/16 I/2 16 2"]:
    """As the C++ kernel reads it: of 16 outputs after another, two inputs side by side."""
    inputs, outputs = factor.shape
    return factor.reshape(inputs // 2, 2, outputs // LANES, LANES).transpose(2, 0, 3, 1)


def _wrapped(tree: Params, path: tuple[str, ...], wrap: Any) -> Params:
    """The tree with the node at the path wrapped; the given one is left alone."""
    name, *rest = path
    return tree | {name: _wrapped(tree[name], tuple(rest), wrap) if rest else wrap(tree[name])}
