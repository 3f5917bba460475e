"""Causal self-attention over latent vectors (https://arxiv.org/abs/2405.04434).

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lading.errors import InternalError
from lading.families.nn.attention import AttentionInputs, attend, split_heads
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.norm import RMSNorm
from lading.families.nn.rope import rotate, rotate_adjacent
from lading.families.nn.uninitialized import Linear

_EPS = 1e-6
"""The number that the normalizations of latent vectors add to the mean square, whatever that of the model."""


class LatentSelfAttention(nn.Module):
    """Attention whose keys and values are projections of one latent vector for each token.

    A cache holds that vector and the rotated key, which all heads share, instead of the keys and values of each head.

    :param layer: the index of the layer, which identifies its vectors in a cache.
    """

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()

        if spec.latent is None:
            raise InternalError("latent attention is built without its options")
        self.latent = latent = spec.latent
        self.layer = layer
        self.scale = spec.attn_scale
        self.rotate = rotate_adjacent if spec.adjacent_rotary else rotate

        heads, dim, rank = spec.num_attn_heads, spec.model_dim, latent.key_value_rank
        self.q_proj: Linear | None = None
        if latent.query_rank is None:
            self.q_proj = Linear(dim, heads * latent.query_dim, bias=False)
        else:
            self.q_a_proj = Linear(dim, latent.query_rank, bias=latent.bias)
            self.q_a_layernorm = RMSNorm(latent.query_rank, eps=_EPS)
            self.q_b_proj = Linear(latent.query_rank, heads * latent.query_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(dim, rank + latent.rotary_dim, bias=latent.bias)
        self.kv_a_layernorm = RMSNorm(rank, eps=_EPS)
        self.kv_b_proj = Linear(rank, heads * (latent.head_dim + latent.value_dim), bias=False)
        # Ranks with different heads use the same key; the plan for tensor parallelism adds up its gradients here.
        self.shared_key = nn.Identity()
        self.o_proj = Linear(heads * latent.value_dim, dim, bias=latent.bias)

    def forward(self, x: Tensor, given: AttentionInputs) -> Tensor:
        """Apply attention to (N, S, model_dim) → the same shape."""
        of = self.latent
        queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_proj is None else self.q_proj(x)
        q, q_rotated = torch.split(split_heads(queries, of.query_dim), [of.head_dim, of.rotary_dim], -1)
        vector, key = torch.split(self.kv_a_proj_with_mqa(x), [of.key_value_rank, of.rotary_dim], -1)
        vector = self.kv_a_layernorm(vector)[:, None]
        # With angles in float32, the rotation is in float32 as well.
        key = self.rotate(self.shared_key(key)[:, None], *given.rotary).to(key.dtype)
        q = torch.cat((q, self.rotate(q_rotated, *given.rotary).to(q.dtype)), -1)

        if given.cache is not None:
            vector, key = given.cache.append(self.layer, vector, key)

        expanded = split_heads(self.kv_b_proj(vector[:, 0]), of.head_dim + of.value_dim)
        k, v = torch.split(expanded, [of.head_dim, of.value_dim], -1)
        k = torch.cat((k, key.expand(-1, k.size(1), -1, -1)), -1)

        y: Tensor = self.o_proj(attend(q, k, v, given.mask, scale=self.scale))

        return y
