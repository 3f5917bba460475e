"""The decoder-only language model of all decoder families, and its random initialization.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lading.errors import NotSupportedError
from lading.families.nn.cache import KeyValueCache
from lading.families.nn.decoder import Decoder
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.experts import Experts
from lading.families.nn.language_model import LanguageModel, generate_greedily
from lading.families.nn.norm import RMSNorm
from lading.families.nn.uninitialized import Embedding


class DecoderLM(LanguageModel):
    """A decoder with an output projection; its parameters are uninitialized.

    A pipeline stage is a model without some of its modules: the embedding on all stages but the first, the final
    normalization and the output projection on all but the last.
    """

    decoder_kls: ClassVar[type[Decoder]] = Decoder

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()

        self.spec = spec

        self.model = self.decoder_kls(spec)
        self._add_head(spec.model_dim, spec.vocab_size, tied=spec.tied_embeddings)

    def embedding(self) -> Embedding | None:
        """Return the module of the embedding table, which is on the first pipeline stage."""
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Map token ids (N, S), int64 → logits (N, S, V).

        A pipeline stage other than the first takes the hidden states (N, S, model_dim) of the stage before it instead
        of token ids, and a stage other than the last returns hidden states of that shape. All stages take the same mask
        and positions; each has its own cache.

        :param attention_mask: (N, S_total), where S_total includes the tokens in ``cache``; 1 is a token, 0 padding.
        :param position_ids: (N or 1, S), the positions of the rotary embeddings; by default they continue after the
            tokens in ``cache``. The tokens that a token attends to depend on the order in the sequence, not on these.
        :param cache: the keys and values of earlier calls, to which those of this call are appended.
        :param last_only: whether to compute the logits of the last token only: (N, 1, V).

        :raises ValueError: there are more tokens than ``max_seq_len``, the attention mask has another shape, or a stage
            that takes hidden states gets token ids, or vice versa.
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
        if (cap := self.spec.final_logit_soft_cap) is not None:
            logits = torch.tanh(logits / cap) * cap

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
        """Continue ``input_ids`` (N, S) greedily → (N, S + T) with T ≤ ``max_new_tokens``, including the prompt.

        The mode of the module does not change: call ``eval()`` first on a model with dropout.

        :param eos_id: the token, or tokens, that end a sequence; the rest is filled with ``pad_idx``, or with the first
            of these if the model has no ``pad_idx``. The call returns when all sequences have ended.
        :param attention_mask: (N, S), 1 for a token and 0 for padding, which must be on the left.

        :raises ValueError: the prompt is empty, there are more tokens than ``max_seq_len``, ``max_new_tokens`` is
            negative, or the mask has another shape or padding on the right.
        :raises NotSupportedError: this is a pipeline stage.
        """
        if self.model.embed_tokens is None or self.lm_head is None:
            raise NotSupportedError(
                "A pipeline stage cannot generate by itself. Load the model without `pp`, or pass hidden states and "
                "tokens between the stages."
            )

        mask: Tensor | None = None
        position_ids: Tensor | None = None
        if attention_mask is not None:
            mask = attention_mask.to(input_ids.device, torch.bool)
            if mask.shape != input_ids.shape or not bool(mask[:, -1:].all()):
                raise ValueError(
                    f"`attention_mask` must be of shape {tuple(input_ids.shape)} and have its padding on the left, but "
                    f"is of shape {tuple(mask.shape)} and its last column is {mask[:, -1:].long().flatten().tolist()}"
                )
            position_ids = (mask.cumsum(-1) - 1).clamp_(min=0)

        cache = KeyValueCache()

        def step(ids: Tensor) -> Tensor:
            nonlocal mask, position_ids
            logits: Tensor = self(ids, attention_mask=mask, position_ids=position_ids, cache=cache, last_only=True)
            if mask is not None and position_ids is not None:
                mask = torch.cat((mask, mask.new_ones(mask.size(0), 1)), dim=1)
                position_ids = position_ids[:, -1:] + 1

            return logits[:, -1]

        return generate_greedily(
            step,
            input_ids,
            max_new_tokens=max_new_tokens,
            max_seq_len=self.spec.max_seq_len,
            eos_id=eos_id,
            pad_idx=self.spec.pad_idx,
        )


@torch.no_grad()
def init_decoder(
    model: DecoderLM,
    name: str,
    parameter: Tensor,
    *,
    std: float | None = None,
    std_scale: Literal["none", "layer", "stack"] = "stack",
) -> None:
    """Initialize ``parameter`` randomly: weights from normal distributions truncated at three standard deviations.

    Biases, other vectors and the embedding of padding become zero, norms one.

    :param name: the name of the parameter in ``model``, whose own tensor is not used.
    :param std: the standard deviation; ``None`` means ``input_dim ** -0.5`` of each projection.
    :param std_scale: the divisor of the standard deviations of projections inside the layers: ``sqrt(2 * (i + 1))`` in
        the i-th layer (``layer``), ``sqrt(2 * (num_layers + 1))`` (``stack``) or 1 (``none``).
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

    if leaf.endswith("bias"):
        parameter.zero_()
        return
    if isinstance(module, RMSNorm):
        parameter.fill_(1.0 - module.offset)
        return
    if parameter.dim() == 1:
        parameter.zero_()
        return

    is_transposed = isinstance(module, Experts) and module.transposed
    s = parameter.size(-2 if is_transposed else -1) ** -0.5 if std is None else std
    if path.startswith("model.layers.") and std_scale != "none":
        depth = int(path.split(".")[2]) if std_scale == "layer" else model.spec.num_layers
        s /= (2 * (depth + 1)) ** 0.5
    nn.init.trunc_normal_(parameter, std=s, a=-3 * s, b=3 * s)

    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        parameter[module.padding_idx].zero_()
