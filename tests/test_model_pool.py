"""The pool of models, whatever comes in whatever order: within its budget, and nobody waits for ever.

Its models have no weights, and the test decides over their loading.
"""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax.errors import AccessError, CapacityError, ModelFileError
from realm_jax.llm import LLM
from realm_jax.serving.server import model_pool
from realm_jax.serving.server.engine_thread import EngineThread
from realm_jax.serving.server.errors import ApiError
from realm_jax.serving.server.model_pool import ModelPool
from realm_jax.serving.server.naming import ModelNames
from realm_jax.serving.server.pooled_model import PooledModel, tenant_for
from realm_jax.serving.tenants import EVERY, Tenant


@pytest.fixture(scope="module", autouse=True)
def nothing_to_give_back() -> Iterator[None]:
    """To collect garbage takes longer than all else here."""
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(model_pool, "collect_garbage", lambda: None)
        yield


class FakeLoader:
    """Loads nothing, as often as it is asked to, unless it is broken."""

    is_local = True

    def __init__(self, size: int) -> None:
        self.size, self.loads, self.is_broken = size, 0, False
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def needed_bytes(self, adapters: Mapping[str, Path], memory_limit: int) -> int:
        if self.size > memory_limit:
            raise CapacityError(f"it takes {self.size}; memory is {memory_limit}")
        return self.size

    def load(self, adapters: Mapping[str, Path], memory_limit: int | None) -> LLM:
        assert self.may_go_on.wait(60)
        if self.is_broken:
            raise ModelFileError("/secret/path.gguf is broken")
        self.loads += 1
        engine = SimpleNamespace(adapters=SimpleNamespace(named=dict(adapters)))
        return cast(LLM, SimpleNamespace(engine=engine, model=SimpleNamespace(context=64)))


class Attached(set[str]):
    """The engine's thread and the metrics, as far as the pool knows them: what is attached."""

    async def attach(self, model: str, llm: LLM) -> None:
        assert model not in self
        self.add(model)

    async def detach(self, model: str) -> None:
        self.remove(model)

    def on_memory(self, model: str, *, is_loaded: bool) -> None:
        pass


def pool_of(*sizes: int, **options: Any) -> tuple[ModelPool, Attached, list[FakeLoader]]:
    loaders, attached = [FakeLoader(size) for size in sizes], Attached()
    models = [PooledModel(ModelNames((f"m{i}",)), loader) for i, loader in enumerate(loaders)]
    return ModelPool(models, cast(EngineThread, attached), attached, **options), attached, loaders


async def ended(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 10), min_size=2, max_size=4),
    uses=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), min_size=1, max_size=24),
)
def test_all_are_served_within_the_budget_and_none_loses_its_model(
    sizes: list[int], uses: list[tuple[int, int, bool]]
) -> None:
    """uses: which model, for how long, and whether the client leaves while it waits."""

    async def run() -> None:
        pool, attached, _ = pool_of(*sizes, memory=10, idle_seconds=0.002)
        served = 0

        async def use(index: int, turns: int) -> None:
            nonlocal served
            model = pool.models[index % len(sizes)]
            async with pool.using(model) as llm:
                for _ in range(turns + 1):
                    assert model.llm is llm and model.name in attached, "it was taken away"
                    assert sum(m.size for m in pool.models if m.llm is not None) <= 10
                    await asyncio.sleep(0)
            served += 1

        tasks = [asyncio.ensure_future(use(index, turns)) for index, turns, _ in uses]
        await asyncio.sleep(0)
        leaving = [task for task, (*_, leaves) in zip(tasks, uses, strict=True) if leaves]
        for task in leaving:
            task.cancel()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert served >= len(uses) - len(leaving)
        assert all(task.cancelled() or task.exception() is None for task in tasks)
        await ended(lambda: not attached)  # idle for long enough, all of them
        assert [m.users for m in pool.models] == [0] * len(sizes)
        assert not any(m.waiting or m.is_leaving for m in pool.models)
        pool.close()
        assert pool.stop()

    asyncio.run(run())


def test_the_one_used_longest_ago_leaves() -> None:
    async def run() -> None:
        pool, attached, loaders = pool_of(4, 4, 4, memory=10)
        for index in (0, 1, 0, 2):  # 1 is older than 0
            async with pool.using(pool.models[index]):
                pass
        assert attached == {"m0", "m2"} and [each.loads for each in loaders] == [1, 1, 1]
        pool.close()

    asyncio.run(run())


def test_a_model_that_is_never_idle_does_not_keep_another_out() -> None:
    async def run() -> None:
        pool, attached, loaders = pool_of(8, 8, memory=10)
        busy, other = pool.models
        await pool.acquire(busy)
        wanted = asyncio.ensure_future(pool.acquire(other))
        await ended(lambda: busy.is_leaving)
        late = asyncio.ensure_future(pool.acquire(busy))  # behind who came before it
        await asyncio.sleep(0.01)
        assert not wanted.done() and not late.done() and attached == {"m0"}, "it has a user"
        pool.release(busy)
        await wanted
        assert attached == {"m1"} and not late.done()
        pool.release(other)
        await late
        assert attached == {"m0"} and loaders[0].loads == 2

        wanted = asyncio.ensure_future(pool.acquire(other))  # who leaves again makes nobody leave
        await ended(lambda: busy.is_leaving)
        wanted.cancel()
        await ended(lambda: not busy.is_leaving)
        assert busy.is_open and attached == {"m0"}
        pool.release(busy)
        pool.close()

    asyncio.run(run())


def test_who_leaves_as_the_model_comes_holds_nothing() -> None:
    """And who comes as the idle model is about to leave keeps it."""

    async def run() -> None:
        pool, attached, _ = pool_of(4, idle_seconds=0.01)
        (only,) = pool.models
        grant = pool._grant

        def leave(model: PooledModel) -> None:
            grant(model)
            client.cancel()

        pool._grant = leave
        client = asyncio.ensure_future(pool.acquire(only))
        await asyncio.gather(client, return_exceptions=True)
        assert client.cancelled() and only.users == 0
        pool._grant = grant
        await ended(lambda: not attached)

        async with pool.using(only):
            pass
        async with pool._turn:
            await asyncio.sleep(0.03)  # its time is over, and something else is loaded
            await pool.acquire(only)
        await asyncio.sleep(0.03)
        assert attached and only.is_open, "it has a user"
        pool.release(only)
        pool.close()

    asyncio.run(run())


def test_a_failure_is_for_those_who_waited_and_the_next_may_succeed() -> None:
    async def run() -> None:
        pool, attached, (good, bad) = pool_of(4, 4, memory=10)
        first, second = pool.models
        async with pool.using(first):
            bad.is_broken = True
            bad.may_go_on.clear()
            waiting = [asyncio.ensure_future(pool.acquire(second)) for _ in range(3)]
            await ended(lambda: second.status == "loading")
            async with pool.using(first):  # others go on meanwhile
                bad.may_go_on.set()
            found = await asyncio.gather(*waiting, return_exceptions=True)
            for error in found:
                assert isinstance(error, ApiError) and error.status == 500
                assert error.code == "model_load_failed" and "secret" not in str(error)
            assert second.has_failed and second.status == "unloaded" and attached == {"m0"}
            bad.is_broken = False
            async with pool.using(second):
                assert attached == {"m0", "m1"} and not second.has_failed
        assert good.loads == 1
        pool.close()

    asyncio.run(run())


def test_what_can_never_fit_is_said_at_the_start() -> None:
    async def run() -> None:
        pool, *_ = pool_of(4, 11, memory=10)
        with pytest.raises(CapacityError, match="model m1: it takes 11; memory is 10"):
            await pool.start()
        pool, *_ = pool_of(4, 7, memory=10)
        for model in pool.models:
            model.preload = True
        with pytest.raises(CapacityError, match=r"the models to preload need 0.0 MB together"):
            await pool.start()
        pool, attached, (_, bad) = pool_of(4, 4)
        for model in pool.models:
            model.preload = True
        bad.is_broken = True
        await pool.start()  # the log says so; the other one serves
        assert attached == {"m0"}
        pool, _, (bad,) = pool_of(4)
        pool.models[0].preload = bad.is_broken = True
        with pytest.raises(ModelFileError, match="is broken"):
            await pool.start()

    asyncio.run(run())


def test_a_name_finds_its_model_for_those_who_may_use_it() -> None:
    pool, *_ = pool_of(1, 1, 1)
    for model, adapters in zip(pool.models, (["poet"], ["clerk"], []), strict=True):
        model.adapters.update({name: Path(name) for name in adapters})
    anyone, one = Tenant("any", adapters=(EVERY,)), Tenant("one", models=("m1",), adapters=(EVERY,))
    assert [pool.find(name, anyone).name for name in (None, "m1", "poet", "clerk")] == [
        "m0",
        "m1",
        "m0",
        "m1",
    ]
    assert pool.find(None, one).name == "m1" and pool.find("clerk", one).name == "m1"
    for hidden in ("m0", "poet", "nothing"):
        with pytest.raises(ApiError, match="does not exist") as caught:
            pool.find(hidden, one)
        assert caught.value.status == 404
    with pytest.raises(AccessError):
        pool.find(None, Tenant("none", models=()))
    own = Tenant("own", adapters=("clerk",), default_adapter="clerk")
    assert pool.find(None, own).name == "m1"
    assert tenant_for(pool.models[1], own, pool.models).default_adapter == "clerk"
    assert tenant_for(pool.models[0], own, pool.models).default_adapter is None
    unknown = Tenant("unknown", adapters=("x",), default_adapter="x")  # refused with the request, as ever
    assert tenant_for(pool.models[0], unknown, pool.models).default_adapter == "x"


class CountedEngine:
    """An engine that notes its steps, so many of them."""

    def __init__(self, name: str, left: int, steps: list[str]) -> None:
        self._name, self._left, self._steps = name, left, steps
        self.scheduler = SimpleNamespace(slots=SimpleNamespace(taken=tuple), num_waiting=0)

    @property
    def has_work(self) -> bool:
        return self._left > 0

    def step(self) -> list[Any]:
        self._left -= 1
        self._steps.append(self._name)
        return []


def test_engines_that_have_work_take_turns() -> None:
    steps: list[str] = []

    class Observer:
        def on_load(self, model: str, running: int, waiting: int) -> None:
            pass

        def on_delta(self, delta: Any, model: str, tenant: str, adapter: str) -> None:
            pass

    async def run() -> None:
        thread, more = EngineThread(Observer()), {"a": 40, "b": 20, "idle": 0}
        for name, left in more.items():
            llm = SimpleNamespace(engine=CountedEngine(name, left, steps))
            attaching.append(asyncio.ensure_future(thread.attach(name, cast(LLM, llm))))
        await asyncio.sleep(0)  # all are in the queue before the thread reads it
        thread.start()
        await asyncio.gather(*attaching)
        await ended(lambda: len(steps) == 60)
        assert thread.stop()

    attaching: list[asyncio.Future[None]] = []
    asyncio.run(run())
    assert steps == ["a", "b"] * 20 + ["a"] * 20
