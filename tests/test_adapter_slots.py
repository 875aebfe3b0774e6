"""Which adapters stand on the device, and what a request may say of them."""

import pytest

from realm_jax.errors import RequestError
from realm_jax.serving.adapters import AdapterSlots
from realm_jax.serving.request import chosen_adapters


def test_the_adapter_used_longest_ago_gives_way():
    slots = AdapterSlots(2)

    def use(*names: str) -> list[tuple[str, int]] | None:
        if not slots.acquire(names):
            return None
        loads = []
        while (load := slots.next_load()) is not None:
            loads.append((load.name, load.slot))
        return loads

    assert use("a") == [("a", 1)]
    assert use("b") == [("b", 2)]
    assert use("c") is None  # both are held
    slots.release(["a"])
    assert use("a") == []  # still there
    slots.release(["a"])
    slots.release(["b"])
    assert use("c", "b") == [("c", 1)]  # not b, which is wanted
    assert use("c", "b", "b") == []
    for _ in range(2):
        slots.release(["c", "b"])
    slots.forget("b")
    assert use("d") == [("d", 2)]
    assert slots.index_of("b") is None


def test_what_a_request_says_of_scales_is_bounded():
    for scale in (10**400, 1e39, float("inf"), float("nan")):
        with pytest.raises(RequestError, match="give one from -1e30 to 1e30"):
            chosen_adapters([["a", scale]])
    with pytest.raises(RequestError, match="it must be an adapter's name"):
        chosen_adapters([["a"]])
