"""The key/value cache of incremental decoding, and the keys and values that layers share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Layer:
    keys: Tensor
    """The buffer (N, H, capacity, head_dim), in which positions ``start`` to ``end`` are in use."""
    values: Tensor
    start: int = 0
    end: int = 0
    seen: int = 0
    """The number of tokens seen, including those that have left the window."""

    def held(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, self.start : self.end], self.values[:, :, self.start : self.end]

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Append keys and values; if the buffers are full, move to buffers half as large again."""
        end = self.end + keys.size(2)

        if end > self.keys.size(2):
            held_keys, held_values = self.held()
            end -= self.start
            self.start, self.end = 0, held_keys.size(2)
            self.keys = _grow_buffer(held_keys, like=keys, capacity=end + end // 2 + 64)
            self.values = _grow_buffer(held_values, like=values, capacity=end + end // 2 + 64)

        self.keys[:, :, self.end : end] = keys
        self.values[:, :, self.end : end] = values
        self.end = end


def _grow_buffer(held: Tensor, *, like: Tensor, capacity: int) -> Tensor:
    buffer = like.new_empty((like.size(0), like.size(1), capacity, like.size(3)))
    buffer[:, :, : held.size(2)] = held

    return buffer


class KeyValueCache:
    """Keys and values of the tokens that a decoder has seen, per layer; it starts empty and grows as needed.

    A layer with an attention window keeps only the tokens that its window can still reach. A cache is for inference:
    its keys and values carry no gradient.
    """

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    @property
    def num_tokens(self) -> int:
        """The number of tokens seen, padding included."""
        return next(iter(self._layers.values())).seen if self._layers else 0

    def append(self, layer: int, keys: Tensor, values: Tensor, *, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Append the keys and values (N, H, S, head_dim) of new tokens, and return those that the tokens may attend to.

        The result, (N, H, K, head_dim), ends with the new tokens; the next call may overwrite it.

        :param window: the number of tokens, itself included, that a token of this layer attends to.
        """
        keys, values = keys.detach(), values.detach()
        new = keys.size(2)
        state = self._layers.get(layer)
        if state is None:
            state = self._layers[layer] = _Layer(keys[:, :, :0], values[:, :, :0])
        state.seen += new

        if window is not None:
            state.start = max(state.start, state.end - (window - 1))

        if window is None or new < window:
            state.write(keys, values)
            return state.held()

        # The new tokens alone fill the window of the next ones: do not keep a long prompt in memory beyond it.
        held_keys, held_values = state.held()
        result = torch.cat((held_keys, keys), dim=2), torch.cat((held_values, values), dim=2)
        state.start = state.end
        tail = slice(new - (window - 1), new)
        state.write(keys[:, :, tail], values[:, :, tail])

        return result


class SharedKeyValues:
    """The keys and values that several layers attend to in one call of a decoder, with their gradients.

    It is not a ``dict``, which torch copies on its way into a sharded module, so that what the module adds to it is
    lost.

    :param layers: the indices of the layers whose keys and values others attend to.
    """

    def __init__(self, layers: Collection[int] = ()) -> None:
        self._layers = layers
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def offer(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep what ``layer`` attends to, if other layers do so too."""
        if layer in self._layers:
            self._held[layer] = keys, values

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that ``layer`` has offered."""
        return self._held[layer]
