"""Block sizes of the products by quantized weights, by kind of device, rows and arithmetic."""

from collections.abc import Mapping

FEW_ROWS = 64
"""Up to so many rows a product is bound by memory, and one tile holds them all."""

Sizes = Mapping[str, int]

SIZES: Mapping[tuple[str, str], Mapping[str, Sizes]] = {
    ("gpu", ""): {
        "few": {"outputs": 64, "programs": 1024, "warps": 4, "stages": 3},
        "many": {"rows": 128, "outputs": 128, "programs": 0, "warps": 8, "stages": 3},
        "many/float32": {"rows": 64, "outputs": 64, "programs": 0, "warps": 4, "stages": 2},
    },
    ("gpu", "cpu"): {  # interpreted: a program costs more than what it computes
        "few": {"outputs": 256, "programs": 2, "warps": 4, "stages": 1},
        "many": {"rows": 128, "outputs": 256, "programs": 0, "warps": 4, "stages": 1},
    },
    ("tpu", ""): {
        "few": {"outputs": 512, "inputs": 1024},
        "many": {"rows": 256, "outputs": 512, "inputs": 1024},
    },
}


def sizes(platform: str, kind: str, bucket: str) -> Sizes:
    """Of a bucket such as "many/float32"; what is not listed is that of "many"."""
    kinds = [of_kind for (where, of_kind) in SIZES if where == platform and kind.startswith(of_kind)]
    for of_kind in sorted(kinds, key=len, reverse=True):
        table = SIZES[platform, of_kind]
        for name in (bucket, bucket.split("/", maxsplit=1)[0]):
            if name in table:
                return table[name]
    raise LookupError(f"no block sizes for {platform} {bucket}")
