"""A model with an output projection that may be its embedding table, and greedy generation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lading.families.nn.uninitialized import Embedding, Linear


class LanguageModel(nn.Module):
    """The base of models that end in logits; a subclass calls :meth:`_add_head` after it has its other modules."""

    lm_head: Linear | None

    @abstractmethod
    def embedding(self) -> Embedding | None:
        """Return the module whose table a tied head uses, or ``None`` if this part of the model does not have it."""

    def _add_head(self, model_dim: int, vocab_size: int, *, tied: bool) -> None:
        self.tied_embeddings = tied
        # A tied head is created on the meta device, because its own table is replaced.
        self.lm_head = Linear(model_dim, vocab_size, bias=False, device="meta" if tied else None)
        self._tie()

    def _tie(self) -> None:
        table = self.embedding()
        if self.tied_embeddings and table is not None and self.lm_head is not None:
            self.lm_head.weight = table.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # `to_empty` and other moves from the meta device create a new parameter under each name of a tied one.
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        self._tie()

        return self


def generate_greedily(
    step: Callable[[Tensor], Tensor],
    prompt: Tensor,
    *,
    max_new_tokens: int,
    max_seq_len: int,
    eos_id: int | Sequence[int] | None,
    pad_idx: int | None,
) -> Tensor:
    """Continue ``prompt`` (N, S) with the likeliest token, again and again → (N, S + T) with T ≤ ``max_new_tokens``.

    :param step: a function that takes the tokens since its last call, (N, S) and then (N, 1), and returns the logits
        (N, V) of the next one.
    :param eos_id: the token, or tokens, that end a sequence; the rest is filled with ``pad_idx``, or with the first of
        these if ``pad_idx`` is ``None``. The call returns when all sequences have ended.

    :raises ValueError: the prompt is empty, ``max_new_tokens`` is negative, or both exceed ``max_seq_len``.
    """
    n, prompt_len = prompt.shape
    if prompt_len == 0:
        raise ValueError("the prompt must hold at least one token a sequence, but is empty")
    if max_new_tokens < 0:
        raise ValueError(f"`max_new_tokens` must not be negative, but is {max_new_tokens}")
    if prompt_len + max_new_tokens > max_seq_len:
        raise ValueError(
            f"the prompt has {prompt_len} tokens and `max_new_tokens` is {max_new_tokens}, which together exceed the "
            f"model's `max_seq_len` of {max_seq_len}"
        )

    ends = None if eos_id is None else torch.as_tensor(eos_id, device=prompt.device).reshape(-1)
    if ends is not None and len(ends) == 0:
        ends = None  # an empty list ends no sequence and has no token to fill with
    finished = torch.zeros(n, dtype=torch.bool, device=prompt.device)

    ids = [prompt]
    for _ in range(max_new_tokens):
        token = step(ids[-1]).argmax(-1)

        if ends is not None:
            filler = ends[0] if pad_idx is None else ends.new_tensor(pad_idx)
            token = torch.where(finished, filler, token)
            finished |= torch.isin(token, ends)
        ids.append(token[:, None])
        if ends is not None and bool(finished.all()):
            break

    return torch.cat(ids, dim=1)
