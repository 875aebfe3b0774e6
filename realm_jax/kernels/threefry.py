"""Random bits as `jax.random` makes them, in one pass over the numbers.

R rows, A numbers a row.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(
    keys: UInt32[Array, "R 2"], counts: UInt32[Array, "R A"]
) -> tuple[UInt32[Array, "R A"], UInt32[Array, "R A"]]:
    """The words of (0, count) under each row's key: Threefry-2x32, 20 rounds (Salmon et al. 2011).

    `jax.random` loops over the rounds on CPU: up to three times slower, and more to compile.
    """
    first, second = keys[:, :1], keys[:, 1:]
    schedule = (first, second, first ^ second ^ jnp.uint32(PARITY))
    low, high = jnp.broadcast_to(first, counts.shape), counts + second
    for i in range(5):
        for distance in ROTATIONS[i % 2]:
            low = low + high
            high = low ^ (high << jnp.uint32(distance) | high >> jnp.uint32(32 - distance))
        low = low + schedule[(i + 1) % 3]
        high = high + (schedule[(i + 2) % 3] + jnp.uint32(i + 1))
    return low, high
