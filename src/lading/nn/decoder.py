"""The decoder-only language model that the LLaMA, Qwen and Mistral families share.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lading.errors import NotSupportedError
from lading.nn.attention import AttentionMask, CausalSelfAttention, causal_mask
from lading.nn.cache import KeyValueCache
from lading.nn.ffn import GatedFeedForward
from lading.nn.norm import RMSNorm
from lading.nn.rope import RotaryEmbedding, Scaling
from lading.nn.sharding import ParallelPlan, Split, Stages
from lading.nn.uninitialized import Embedding, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """All switches of the shared decoder.

    :raises ValueError: sizes that make no decoder, such as key/value heads that don't divide the attention heads.
    """

    model_dim: int
    vocab_size: int
    max_seq_len: int
    num_layers: int
    num_attn_heads: int
    num_key_value_heads: int
    ffn_inner_dim: int
    norm_eps: float
    rope_theta: float
    head_dim: int | None = None
    """``None`` means ``model_dim // num_attn_heads``."""
    rope_scaling: Scaling | None = None
    pad_idx: int | None = None
    tied_embeddings: bool = False
    """Whether the output projection *is* the embedding table."""
    qkv_proj_bias: bool = False
    output_proj_bias: bool = False
    ffn_bias: bool = False
    q_norm: bool = False
    """Whether queries are normalised head by head, before the rotary embedding."""
    k_norm: bool = False
    attn_window_len: int | None = None
    """The number of tokens, itself included, that a token attends to."""
    num_full_attn_layers: int = 0
    """The number of layers, from the first, that have no window."""
    full_attn_layers: frozenset[int] = frozenset()
    """The indices of further layers that have no window."""
    window_rope_theta: float | None = None
    """Of layers with a window, whose frequencies are then not scaled; ``None`` where they turn as all do."""
    wide_rotary: bool = False
    """Whether queries and keys are turned in float32, whatever their dtype."""
    norms: Literal["before", "after", "both"] = "before"
    """Whether layers normalise what their blocks read, what these give before it is added, or both."""
    wide_norm: bool = False
    """Whether weights of normalisations are applied in float32, whatever the dtype."""
    norm_offset: float = 0.0
    """What weights of normalisations are counted from."""
    norm_whole: bool = False
    """Whether ``q_norm`` and ``k_norm`` are over all heads together."""
    attn_scale: float | None = None
    """Of the attention scores; ``None`` means ``head_dim ** -0.5``."""
    ffn_activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    """What embeddings are multiplied by, in their dtype."""
    dropout_p: float = 0.0
    """Of the embeddings and of the outputs of attention and feed-forward blocks."""

    def __post_init__(self) -> None:
        for name in (
            "model_dim",
            "vocab_size",
            "max_seq_len",
            "num_layers",
            "num_attn_heads",
            "num_key_value_heads",
            "attn_head_dim",
            "ffn_inner_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, but is {getattr(self, name)}")

        if self.num_attn_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_attn_heads` must be a multiple of `num_key_value_heads`, but they are {self.num_attn_heads} and "
                f"{self.num_key_value_heads}"
            )
        if self.attn_head_dim % 2 != 0:
            raise ValueError(f"the heads must be of even width for rotary embeddings, but are of {self.attn_head_dim}")
        if not self.norm_eps > 0 or not self.rope_theta > 0:
            raise ValueError(
                f"`norm_eps` and `rope_theta` must be positive, but are {self.norm_eps} and {self.rope_theta}"
            )
        for name in ("window_rope_theta", "attn_scale", "embed_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, but is {value}")
        if self.pad_idx is not None and not 0 <= self.pad_idx < self.vocab_size:
            raise ValueError(f"`pad_idx` must be an index of the {self.vocab_size} symbols, but is {self.pad_idx}")
        if self.attn_window_len is not None and self.attn_window_len < 1:
            raise ValueError(f"`attn_window_len` must be positive, but is {self.attn_window_len}")
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"`dropout_p` must be in [0, 1), but is {self.dropout_p}")

    @property
    def attn_head_dim(self) -> int:
        """The width of an attention head."""
        return self.model_dim // self.num_attn_heads if self.head_dim is None else self.head_dim

    def window_of(self, layer: int) -> int | None:
        """The attention window of layer ``layer``; ``None`` where it attends to all tokens before."""
        full = layer < self.num_full_attn_layers or layer in self.full_attn_layers

        return None if full else self.attn_window_len

    def norm(self, dim: int) -> RMSNorm:
        """A normalisation of that width."""
        return RMSNorm(dim, eps=self.norm_eps, wide=self.wide_norm, offset=self.norm_offset)


class DecoderLayer(nn.Module):
    """Attention and a feed-forward network, each normalised before or after, and added to its input."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()

        self.dropout_p = spec.dropout_p

        self.self_attn = CausalSelfAttention(
            spec.model_dim,
            num_heads=spec.num_attn_heads,
            num_key_value_heads=spec.num_key_value_heads,
            head_dim=spec.attn_head_dim,
            qkv_bias=spec.qkv_proj_bias,
            output_bias=spec.output_proj_bias,
            q_norm=spec.q_norm,
            k_norm=spec.k_norm,
            norm=spec.norm,
            norm_whole=spec.norm_whole,
            scale=spec.attn_scale,
            window=spec.window_of(layer),
            layer=layer,
        )
        self.mlp = GatedFeedForward(
            spec.model_dim, spec.ffn_inner_dim, bias=spec.ffn_bias, activation=spec.ffn_activation
        )

        # In Hugging Face's names, `post_attention_layernorm` is the first one after attention: it normalises what that
        # gives, or else what the feed-forward network reads.
        self.norms = spec.norms
        if spec.norms != "after":
            self.input_layernorm = spec.norm(spec.model_dim)
        self.post_attention_layernorm = spec.norm(spec.model_dim)
        if spec.norms == "both":
            self.pre_feedforward_layernorm = spec.norm(spec.model_dim)
        if spec.norms != "before":
            self.post_feedforward_layernorm = spec.norm(spec.model_dim)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, cache: KeyValueCache | None = None
    ) -> Tensor:
        """(N, S, model_dim) → the same shape."""
        y = self.self_attn(x if self.norms == "after" else self.input_layernorm(x), rotary, mask, cache)
        if self.norms != "before":
            y = self.post_attention_layernorm(y)
        x = x + dropout(y, self.dropout_p, self.training)

        if self.norms == "before":
            y = self.mlp(self.post_attention_layernorm(x))
        else:
            y = self.mlp(x if self.norms == "after" else self.pre_feedforward_layernorm(x))
            y = self.post_feedforward_layernorm(y)

        return x + dropout(y, self.dropout_p, self.training)


class Decoder(nn.Module):
    """Embedding, layers and the last normalisation: token ids to hidden states."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()

        self.dropout_p = spec.dropout_p
        self.embed_scale = spec.embed_scale
        self.wide_rotary = spec.wide_rotary

        # Of these and the layers, a stage of a pipeline has some; the others are ``None`` there.
        self.embed_tokens: Embedding | None = Embedding(spec.vocab_size, spec.model_dim, padding_idx=spec.pad_idx)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer) for layer in range(spec.num_layers))
        self.norm: RMSNorm | None = spec.norm(spec.model_dim)
        self.rotary_emb = RotaryEmbedding(spec.attn_head_dim, theta=spec.rope_theta, scaling=spec.rope_scaling)
        self.window_rotary_emb: RotaryEmbedding | None = None
        if spec.window_rope_theta is not None:
            self.window_rotary_emb = RotaryEmbedding(spec.attn_head_dim, theta=spec.window_rope_theta)

        self.windows = tuple(spec.window_of(layer) for layer in range(spec.num_layers))

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(N, S) → (N, S, model_dim); the parameters are those of :meth:`DecoderLM.forward`."""
        new = input_ids.size(1)
        past = 0 if cache is None else cache.num_tokens

        x = input_ids
        if self.embed_tokens is not None:
            x = self.embed_tokens(input_ids)
            if self.embed_scale != 1.0:
                # Rounded, as it is in the training of half precision checkpoints.
                x = x * torch.tensor(self.embed_scale, dtype=x.dtype, device="cpu").item()
            x = dropout(x, self.dropout_p, self.training)

        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=x.device)[None]
        turn_dtype = torch.float32 if self.wide_rotary else x.dtype
        rotary = self.rotary_emb(position_ids, turn_dtype)
        window_rotary = rotary
        if self.window_rotary_emb is not None:
            window_rotary = self.window_rotary_emb(position_ids, turn_dtype)

        padding = None if attention_mask is None else attention_mask.to(x.device, torch.bool)
        layers = [pair for pair in zip(self.layers, self.windows, strict=True) if pair[0] is not None]
        masks = {
            window: causal_mask(new, past=past, window=window, padding=padding, device=x.device)
            for window in {window for _, window in layers}
        }

        for layer, window in layers:
            x = layer(x, rotary if window is None else window_rotary, masks[window], cache)

        y: Tensor = x if self.norm is None else self.norm(x)

        return y


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


def decoder_plan(spec: DecoderSpec) -> ParallelPlan:
    """How a :class:`DecoderLM` is split: attention by heads, feed-forward networks by their inner width, embedding and
    output by symbols (https://arxiv.org/abs/1909.08053), layer by layer where parameters are sharded, and into stages
    between layers.
    """
    layer = "model.layers.*"
    attention = {
        "q_proj": Split.COLUMN,
        "k_proj": Split.KEY_VALUE,
        "v_proj": Split.KEY_VALUE,
        "o_proj": Split.ROW,
        "q_norm": Split.HEADS,
        "k_norm": Split.HEADS,
    }
    divisible = {"num_attn_heads": spec.num_attn_heads, "ffn_inner_dim": spec.ffn_inner_dim}
    if spec.norm_whole:
        # A normalisation over all heads needs them all.
        attention = dict.fromkeys(attention, Split.REPLICATED)
        del divisible["num_attn_heads"]

    return ParallelPlan(
        tensor={
            "model.embed_tokens": Split.VOCABULARY,
            **{f"{layer}.self_attn.{name}": split for name, split in attention.items()},
            f"{layer}.mlp.gate_proj": Split.COLUMN,
            f"{layer}.mlp.up_proj": Split.COLUMN,
            f"{layer}.mlp.down_proj": Split.ROW,
            f"{layer}.input_layernorm": Split.REPLICATED,
            f"{layer}.post_attention_layernorm": Split.REPLICATED,
            f"{layer}.pre_feedforward_layernorm": Split.REPLICATED,
            f"{layer}.post_feedforward_layernorm": Split.REPLICATED,
            "model.norm": Split.REPLICATED,
            "lm_head": Split.LOGITS,
        },
        divisible=divisible,
        num_key_value_heads=spec.num_key_value_heads,
        units=(layer,),
        stages=Stages(
            layers=layer,
            num_layers=spec.num_layers,
            first=("model.embed_tokens",),
            last=("model.norm", "lm_head"),
        ),
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
