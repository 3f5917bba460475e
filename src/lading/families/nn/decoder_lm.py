"""The decoder-only language model of all families of decoders, and the random numbers that a new one begins with.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lading.errors import NotSupportedError
from lading.families.nn.cache import KeyValueCache
from lading.families.nn.decoder import Decoder
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.norm import RMSNorm
from lading.families.nn.uninitialized import Linear


class DecoderLM(nn.Module):
    """A decoder with an output projection; its parameters are uninitialised.

    A stage of a pipeline is one that lacks some of its modules: the embedding on all stages but the first, the last
    normalisation and the output projection on all but the last.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()

        self.spec = spec

        self.model = Decoder(spec)
        # On the meta device where it is tied, as the table it would have of its own is not wanted.
        device = "meta" if spec.tied_embeddings else None
        self.lm_head: Linear | None = Linear(spec.model_dim, spec.vocab_size, bias=False, device=device)
        self._tie()

    def _tie(self) -> None:
        table = self.model.embed_tokens
        if self.spec.tied_embeddings and table is not None and self.lm_head is not None:
            self.lm_head.weight = table.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # `to_empty` and other moves from the meta device make a new parameter under each name of a tied one.
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        self._tie()

        return self

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Token ids (N, S), int64 → logits (N, S, V).

        A stage of a pipeline, unless it is the first, takes the hidden states (N, S, model_dim) of the one before it
        instead of token ids, and gives hidden states of that shape, unless it is the last. All stages take the same
        mask and positions; each has a cache of its own.

        :param attention_mask: (N, S_total), where S_total counts the tokens in ``cache`` too; 1 is a token, 0 padding.
        :param position_ids: (N or 1, S), what the rotary embeddings turn by; by default the tokens count on from those
            in ``cache``. What a token attends to depends on its place in the sequence, not on these.
        :param cache: what earlier calls have seen; this call's tokens are appended to it.
        :param last_only: whether to compute the logits of the last token only: (N, 1, V).

        :raises ValueError: more tokens than ``max_seq_len``, an attention mask of another shape, or token ids for a
            stage that takes hidden states, or the reverse.
        """
        first = self.model.embed_tokens is not None
        if input_ids.dim() != (2 if first else 3):
            expected = "token ids (N, S)" if first else f"hidden states (N, S, {self.spec.model_dim})"
            raise ValueError(f"{expected} are expected, but `input_ids` is of shape {tuple(input_ids.shape)}")

        total = input_ids.size(1) + (0 if cache is None else cache.num_tokens)
        if total > self.spec.max_seq_len:
            raise ValueError(
                f"the model's `max_seq_len` is {self.spec.max_seq_len}, but the sequence (those in the cache included) "
                f"has {total} tokens"
            )
        if attention_mask is not None and attention_mask.shape != (input_ids.size(0), total):
            raise ValueError(
                f"`attention_mask` must be of shape {(input_ids.size(0), total)}, the tokens in the cache included, "
                f"but is of shape {tuple(attention_mask.shape)}"
            )

        x: Tensor = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache)
        if self.lm_head is None:
            return x
        logits: Tensor = self.lm_head(x[:, -1:] if last_only else x)

        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        eos_id: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Continue ``input_ids`` (N, S) greedily; returns (N, S + T) with T ≤ ``max_new_tokens``, the prompt in front.

        The module's mode is left as it is: call ``eval()`` first on a model with dropout.

        :param eos_id: the token, or tokens, after which a sequence has ended; the rest is ``pad_idx``, or the first of
            these where the model has no ``pad_idx``. When all sequences have ended, so does the call.
        :param attention_mask: (N, S), 1 for a token and 0 for padding, which must be on the left.

        :raises ValueError: an empty prompt, more tokens than ``max_seq_len``, a negative ``max_new_tokens``, or a mask
            of another shape or with padding on the right.
        :raises NotSupportedError: this is a stage of a pipeline.
        """
        if self.model.embed_tokens is None or self.lm_head is None:
            raise NotSupportedError(
                "A stage of a pipeline cannot generate by itself. Load the model without `pp`, or carry hidden states "
                "and tokens between the stages."
            )
        n, prompt_len = input_ids.shape
        if prompt_len == 0:
            raise ValueError("`input_ids` must hold at least one token a sequence, but is empty")
        if max_new_tokens < 0:
            raise ValueError(f"`max_new_tokens` must not be negative, but is {max_new_tokens}")
        if prompt_len + max_new_tokens > self.spec.max_seq_len:
            raise ValueError(
                f"the prompt has {prompt_len} tokens and `max_new_tokens` is {max_new_tokens}, which together exceed "
                f"the model's `max_seq_len` of {self.spec.max_seq_len}"
            )

        mask: Tensor | None = None
        position_ids: Tensor | None = None
        if attention_mask is not None:
            mask = attention_mask.to(input_ids.device, torch.bool)
            if mask.shape != input_ids.shape or not bool(mask[:, -1].all()):
                raise ValueError(
                    f"`attention_mask` must be of shape {(n, prompt_len)} and have its padding on the left, but is of "
                    f"shape {tuple(mask.shape)} and its last column is {mask[:, -1].long().tolist()}"
                )
            position_ids = (mask.cumsum(-1) - 1).clamp_(min=0)

        ends = None if eos_id is None else torch.as_tensor(eos_id, device=input_ids.device).reshape(-1)
        if ends is not None and len(ends) == 0:
            ends = None  # there is no first of them to fill up with, and nothing that has ended
        finished = torch.zeros(n, dtype=torch.bool, device=input_ids.device)

        cache = KeyValueCache()
        ids = [input_ids]

        for _ in range(max_new_tokens):
            logits = self(ids[-1], attention_mask=mask, position_ids=position_ids, cache=cache, last_only=True)
            token = logits[:, -1].argmax(-1)

            if ends is not None:
                filler = ends[0] if self.spec.pad_idx is None else ends.new_tensor(self.spec.pad_idx)
                token = torch.where(finished, filler, token)
                finished |= torch.isin(token, ends)
            ids.append(token[:, None])
            if ends is not None and bool(finished.all()):
                break

            if mask is not None and position_ids is not None:
                mask = torch.cat((mask, mask.new_ones(n, 1)), dim=1)
                position_ids = position_ids[:, -1:] + 1

        return torch.cat(ids, dim=1)


@torch.no_grad()
def init_decoder(
    model: DecoderLM,
    name: str,
    parameter: Tensor,
    *,
    std: float | None = None,
    std_scale: Literal["none", "layer", "stack"] = "stack",
) -> None:
    """Fill ``parameter`` with random numbers: weights from normal distributions cut at three standard deviations.

    Biases become zero, norms one, and so does the padding's embedding zero.

    :param name: of the parameter in ``model``, whose own tensor is not looked at.
    :param std: the standard deviation; ``None`` means ``input_dim ** -0.5`` of each projection.
    :param std_scale: what the standard deviations of the projections inside the layers are divided by:
        ``sqrt(2 * (i + 1))`` of the i-th layer (``layer``), ``sqrt(2 * (num_layers + 1))`` (``stack``) or nothing.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

    if leaf == "bias":
        parameter.zero_()
        return
    if isinstance(module, RMSNorm):
        parameter.fill_(1.0 - module.offset)
        return

    s = parameter.size(1) ** -0.5 if std is None else std
    if path.startswith("model.layers.") and std_scale != "none":
        depth = int(path.split(".")[2]) if std_scale == "layer" else model.spec.num_layers
        s /= (2 * (depth + 1)) ** 0.5
    nn.init.trunc_normal_(parameter, std=s, a=-3 * s, b=3 * s)

    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        parameter[module.padding_idx].zero_()
