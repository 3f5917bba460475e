"""The modules of BERT, and their random initialization.

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize

from lading.errors import NotSupportedError
from lading.families.bert_config import BertConfig, checked
from lading.families.nn.attention import AttentionMask, bidirectional_mask
from lading.families.nn.encoder_blocks import AttentionHeads, Intermediate, LayerStack
from lading.families.nn.uninitialized import Embedding, LayerNorm, Linear


class _Embeddings(nn.Module):
    """The normalized sum of the embeddings of words, positions and token types."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.dropout_p = config.dropout_p

        self.word_embeddings = Embedding(config.vocab_size, config.model_dim, padding_idx=config.pad_idx)
        self.position_embeddings = Embedding(config.max_seq_len, config.model_dim)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.model_dim)
        self.LayerNorm = LayerNorm(config.model_dim, eps=config.norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embed three index tensors (N or 1, S) → (N, S, model_dim)."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = self.LayerNorm(x + self.position_embeddings(position_ids))

        return dropout(x, self.dropout_p, self.training)


class _BlockOutput(nn.Module):
    """The end of a block: a projection, the residual and the normalization."""

    def __init__(self, input_dim: int, config: BertConfig) -> None:
        super().__init__()

        self.dropout_p = config.dropout_p

        self.dense = Linear(input_dim, config.model_dim)
        self.LayerNorm = LayerNorm(config.model_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map (N, S, input_dim) and the residual (N, S, model_dim) → (N, S, model_dim)."""
        y: Tensor = self.LayerNorm(dropout(self.dense(x), self.dropout_p, self.training) + residual)

        return y


class _AttentionBlock(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.self = AttentionHeads(config.model_dim, config.num_attn_heads, dropout_p=config.attn_dropout_p)
        self.output = _BlockOutput(config.model_dim, config)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        y: Tensor = self.output(self.self(x, mask), x)

        return y


class _Layer(nn.Module):
    """Attention and a feed-forward network, each with a residual and then normalized."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        self.attention = _AttentionBlock(config)
        tanh = config.ffn_activation == "gelu_tanh"
        self.intermediate = Intermediate(config.model_dim, config.ffn_inner_dim, tanh=tanh)
        self.output = _BlockOutput(config.ffn_inner_dim, config)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        x = self.attention(x, mask)
        y: Tensor = self.output(self.intermediate(x), x)

        return y


class _Pooler(nn.Module):
    """A projection of the first token, trained with the next-sentence objective."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()

        self.dense = Linear(model_dim, model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → (N, model_dim)."""
        return torch.tanh(self.dense(x[:, 0]))


class Bert(nn.Module):
    """A BERT encoder; its parameters are uninitialized."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()

        checked(config)

        self.max_seq_len = config.max_seq_len
        self.pooling = config.pooling
        self.normalize = config.normalize

        self.embeddings = _Embeddings(config)
        self.encoder = LayerStack(_Layer(config) for _ in range(config.num_layers))
        self.pooler = _Pooler(config.model_dim) if config.pooler else None

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Map token ids (N, S), int64 → the hidden states of the last layer (N, S, model_dim).

        :param attention_mask: (N, S); 1 is a token, 0 padding.
        :param token_type_ids: (N, S); by default 0.
        :param position_ids: (N or 1, S); by default from 0 upward.

        :raises ValueError: there are more tokens than ``max_seq_len``, or the attention mask has another shape.
        """
        if input_ids.size(1) > self.max_seq_len:
            raise ValueError(
                f"the model's `max_seq_len` is {self.max_seq_len}, but the sequence has {input_ids.size(1)} tokens"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must be of the shape of `input_ids`, {tuple(input_ids.shape)}, but is of shape "
                f"{tuple(attention_mask.shape)}"
            )

        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)[None]

        x = self.embeddings(input_ids, token_type_ids, position_ids)
        padding = None if attention_mask is None else attention_mask.to(x.device, torch.bool)
        y: Tensor = self.encoder(x, bidirectional_mask(padding))

        return y

    def pooled_output(self, hidden: Tensor) -> Tensor:
        """Project hidden states (N, S, model_dim) → (N, model_dim), as trained on pairs of sentences.

        :raises NotSupportedError: the model has no pooler.
        """
        if self.pooler is None:
            raise NotSupportedError(
                "This model has no pooler. Load it with a configuration whose `pooler` is true, if its checkpoint has "
                "one."
            )
        y: Tensor = self.pooler(hidden)

        return y

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Embed sentences, token ids (N, S) → (N, model_dim), by the ``pooling`` of the configuration.

        The mode of the module does not change: call ``eval()`` first to disable dropout.

        :raises NotSupportedError: the ``pooling`` of the configuration is ``none``.
        """
        if self.pooling == "none":
            raise NotSupportedError(
                "This model has no embeddings of sentences. Load it with a configuration whose `pooling` is 'mean' or "
                "'cls', as in its training."
            )

        hidden = self(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)

        if self.pooling == "cls":
            embedding = hidden[:, 0]
        elif attention_mask is None:
            embedding = hidden.mean(1)
        else:
            weights = attention_mask.to(hidden)[:, :, None]
            embedding = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)

        return normalize(embedding, dim=-1) if self.normalize else embedding


@torch.no_grad()
def init_bert(model: Bert, config: BertConfig, name: str, parameter: Tensor) -> None:
    """Draw weights from a normal distribution; biases and the embedding of padding become zero, norms one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

    if leaf == "bias":
        parameter.zero_()
    elif isinstance(module, nn.LayerNorm):
        parameter.fill_(1.0)
    else:
        nn.init.normal_(parameter, std=config.init_std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            parameter[module.padding_idx].zero_()
