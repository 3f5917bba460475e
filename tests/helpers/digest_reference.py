"""The definition of a tensor's digests in `lading.formats.digests`, sentence by sentence, as slowly as it reads."""

from __future__ import annotations

import math

from blake3 import blake3

from lading.formats.manifest import BITS


def reference(
    dtype: str, shape: tuple[int, ...], dim: int, data: bytes, leaf: int = 1 << 20
) -> tuple[list[bytes], str]:
    """The digests of all blocks, and the root in hexadecimal."""
    bits = math.prod(shape) * BITS[dtype]
    assert len(data) * 8 == bits

    if not shape or not data:
        k = 1
    else:
        k = math.gcd(shape[dim], 8)
        while bits // (math.prod(shape[:dim]) * k) % 8 and k > 1:
            k //= 2
    rows = math.prod(shape[:dim]) if k > 1 else 1
    segment = len(data) // (rows * k)

    g = 1
    while 2 * g * k * segment <= leaf and g < max(1, rows):
        g *= 2

    def digest(context: str, *parts: bytes) -> bytes:
        return blake3(b"".join(parts), derive_key_context=f"lading tensor digest 1, {context}").digest()

    blocks = []
    for b in range(k):
        leaves = []
        for first in range(0, rows, g):
            held = b"".join(
                data[(row * k + b) * segment : (row * k + b + 1) * segment]
                for row in range(first, min(first + g, rows))
            )
            leaves += [digest("leaf", held[at : at + leaf]) for at in range(0, len(held), leaf)]
        blocks.append(digest("block", *leaves))

    line = f"{dtype} {','.join(str(n) for n in shape)} {dim} {k}\n"

    return blocks, digest("root", line.encode(), *blocks).hex()
