"""The adapters that requests may name: in host memory, and the ones in use on the device.

They come and go while others run. Nothing is compiled for one, unless its rank is of a larger bucket than
any before; then the bank is made anew.
"""

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax

from realm_jax.banks import Bank, bank_bytes, check_adapter, empty_bank, put
from realm_jax.config import MAX_LORAS_PER_REQUEST, EngineConfig, ModelConfig, Numerics
from realm_jax.errors import CapacityError, RequestError
from realm_jax.lora import Adapter
from realm_jax.parallel import Placement
from realm_jax.serving.adapters import AdapterSlots, LoadAdapter
from realm_jax.serving.request import checked_scale
from realm_jax.serving.runner import Runner

Named = tuple[tuple[str, float], ...]
"""Adapters of a request, and what each one's change is multiplied by."""


class AdapterRegistry:
    """Adapters by name, and their slots in the runner's bank.

    spare: bytes that a bank may take; None = no limit.
    """

    def __init__(
        self,
        runner: Runner,
        slots: AdapterSlots,
        model: ModelConfig,
        numerics: Numerics,
        placement: Placement,
        config: EngineConfig,
        spare: int | None,
    ) -> None:
        self._runner, self._slots = runner, slots
        self._model, self._numerics, self._placement = model, numerics, placement
        self._max_loras, self._spare = config.max_loras, spare
        self._adapters: dict[str, Adapter] = {}
        if config.max_lora_rank is not None:
            runner.bank = self._new_bank(config.max_lora_rank)

    @property
    def named(self) -> Mapping[str, Adapter]:
        """Those that requests may name."""
        return MappingProxyType(self._adapters)

    def add(self, name: str, adapter: Adapter) -> None:
        """Requests may name the adapter; those that run go on as they were.

        Raises RequestError for a name that is taken, UnsupportedError for what only folding can apply.
        """
        if name in self._adapters:
            raise RequestError(f"adapter {name!r} is loaded already; unload it first, or choose another name")
        check_adapter(adapter, self._model)
        if adapter.rank > self._runner.bank.rank:
            bank = self._new_bank(adapter.rank)
            for standing in self._slots.standing:
                bank = put(bank, self._model, standing.slot, self._adapters[standing.name])
            self._runner.bank = bank
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """The adapter is gone; no request uses it. Raises RequestError for one that is not loaded."""
        if name not in self._adapters:
            raise RequestError(f"adapter {name!r} is not loaded; {self._loaded}")
        self._slots.forget(name)
        del self._adapters[name]

    def put(self, plan: LoadAdapter) -> None:
        """The adapter stands in its slot; where that fails, all are loaded anew before the next use."""
        try:
            self._runner.bank = self._put(plan)
        except BaseException:
            self._slots.load_again()
            self._runner.bank = self._new_bank(self._runner.bank.rank)
            raise

    def _put(self, plan: LoadAdapter) -> Bank:
        return put(self._runner.bank, self._model, plan.slot, self._adapters[plan.name])

    def lose(self) -> None:
        """Nothing stands in the bank; nobody uses it."""
        self._slots.clear()
        if self._runner.bank.places:
            self._runner.bank = self._new_bank(self._runner.bank.rank)

    def _new_bank(self, rank: int) -> Bank:
        """An empty bank. Raises CapacityError where there is no memory for it."""
        shape = self._model, self._numerics, self._max_loras, rank, self._placement
        needed = bank_bytes(*shape)
        if self._spare is not None and needed > self._spare:
            raise CapacityError(
                f"{self._max_loras} adapters of rank {rank} take {needed / 1e6:,.1f} MB; memory leaves "
                f"{max(self._spare, 0) / 1e6:,.1f} MB (raise --memory, or lower max_loras)"
            )
        try:
            return jax.block_until_ready(empty_bank(*shape))
        except jax.errors.JaxRuntimeError as error:
            raise CapacityError(
                f"no memory for {self._max_loras} adapters of rank {rank}, {needed / 1e6:,.1f} MB (lower "
                f"max_loras): {str(error).splitlines()[0]}"
            ) from error

    def check(self, adapters: Named) -> None:
        """Raises RequestError for adapters that a request cannot name."""
        most = min(MAX_LORAS_PER_REQUEST, self._max_loras)
        if len(adapters) > most:
            raise RequestError(f"a request names {len(adapters)} adapters; {most} is the most")
        for name, scale in adapters:
            if name not in self._adapters:
                raise RequestError(f"adapter {name!r} is not loaded; {self._loaded}")
            checked_scale(name, scale)

    @contextlib.contextmanager
    def standing(self, adapters: Named) -> Iterator[tuple[Bank, list[tuple[int, float]]]]:
        """The bank, in which these adapters stand while the context is open, and their slots and scales.

        Raises CapacityError if running sequences use all of its slots.
        """
        self.check(adapters)
        names = [name for name, _ in adapters]
        if not self._slots.acquire(names):
            raise CapacityError(f"{self._max_loras} adapters are in use; max_loras allows no more at once")
        try:
            while (load := self._slots.next_load()) is not None:
                self.put(load)
            found = [(self._slots.index_of(name) or 0, scale) for name, scale in adapters]
            yield self._runner.bank_for(len(found)), found
        finally:
            self._slots.release(names)

    @property
    def _loaded(self) -> str:
        return f"loaded: {', '.join(sorted(self._adapters))}" if self._adapters else "none is loaded"
