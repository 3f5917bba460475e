from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lading.families.nn.cache import KeyValueCache


def tokens(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (2, 3, count, 4) that tell which token they are of."""
    keys = torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None].expand(2, 3, count, 4)

    return keys, -keys


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.none() | st.integers(1, 12))
def test_it_gives_what_the_window_reaches(chunks: list[int], window: int | None) -> None:
    cache = KeyValueCache()
    seen = 0

    for count in chunks:
        assert cache.num_tokens == seen
        keys, values = cache.append(0, *tokens(seen, count), window=window)

        first = 0 if window is None else max(0, seen - (window - 1))
        seen += count
        expected = tokens(first, seen - first)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])


def test_layers_are_apart() -> None:
    cache = KeyValueCache()
    cache.append(0, *tokens(0, 3))
    cache.append(1, *tokens(50, 3))

    assert cache.append(0, *tokens(3, 1))[0][0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert cache.append(1, *tokens(53, 1))[0][0, 0, :, 0].tolist() == [50, 51, 52, 53]
    assert cache.num_tokens == 4


def test_a_window_bounds_the_memory() -> None:
    cache = KeyValueCache()
    cache.append(0, *tokens(0, 5000), window=8)
    largest = 0
    for i in range(300):
        keys, _ = cache.append(0, *tokens(5000 + i, 1), window=8)
        largest = max(largest, keys.untyped_storage().nbytes())

    assert keys[0, 0, :, 0].tolist() == list(range(5292, 5300))
    assert largest <= 100 * 2 * 3 * 4 * 4


def test_tokens_are_copied_seldom() -> None:
    cache = KeyValueCache()
    storages = {cache.append(0, *tokens(i, 1))[0].untyped_storage().data_ptr() for i in range(2000)}

    assert len(storages) < 12


def test_no_gradient_goes_through() -> None:
    keys, values = (t.clone().requires_grad_() for t in tokens(0, 3))

    found = KeyValueCache().append(0, keys, values)

    assert not found[0].requires_grad
    assert not found[1].requires_grad


def test_an_empty_cache_has_seen_nothing() -> None:
    assert KeyValueCache().num_tokens == 0
