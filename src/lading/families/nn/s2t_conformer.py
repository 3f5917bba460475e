"""The module of S2T Conformer: Conformer layers over filter banks, and a Transformer decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lading.families.nn.attention import bidirectional_mask
from lading.families.nn.conformer import ConformerLayer, init_conformer
from lading.families.nn.encoder_decoder import (
    EncoderDecoder,
    FilterBankSubsampler,
    TransformerDecoder,
    check_length,
    init_encoder_decoder,
    subsample,
)
from lading.families.nn.positions import SinusoidalPositions
from lading.families.nn.relative_positions import embed_distances
from lading.families.nn.s2t_conformer_spec import S2TConformerSpec
from lading.families.nn.speech_layers import Positions
from lading.families.nn.transformer import EncoderOutput
from lading.families.nn.uninitialized import Embedding, Linear


class ConformerEncoder(nn.Module):
    """An encoder of log-mel filter banks with Conformer layers; its parameters are uninitialized."""

    def __init__(self, spec: S2TConformerSpec) -> None:
        super().__init__()

        self.max_seq_len = spec.max_source_seq_len
        self.scale = spec.model_dim**0.5
        self.dropout_p = spec.input_dropout_p

        self.conv = FilterBankSubsampler(spec)
        relative = spec.conformer.pos_encoder_type == "relative"
        self.embed_positions = (
            None if relative else SinusoidalPositions(spec.model_dim, first=spec.first_source_position, dropout_p=0.0)
        )
        self.linear = Linear(spec.model_dim, spec.model_dim)
        self.layers = nn.ModuleList(ConformerLayer(spec.conformer) for _ in range(spec.num_encoder_layers))

    def forward(self, source: Tensor, source_mask: Tensor | None) -> EncoderOutput:
        """Encode (N, S, num_fbank_channels); ``source_mask`` is as :meth:`EncoderDecoder.forward` takes it."""
        x, padding = subsample(self.conv, source, source_mask)
        check_length("max_source_seq_len", self.max_seq_len, x.size(1))

        positions = Positions()
        if self.embed_positions is not None:
            x = self.embed_positions(x, padding)
        else:
            x = x * self.scale
            positions = Positions(embed_distances(x.size(1), x.size(2), device=x.device, dtype=x.dtype))
        x = dropout(self.linear(x), self.dropout_p, self.training)

        mask = bidirectional_mask(padding)
        for layer in self.layers:
            x = layer(x, mask, positions)

        return EncoderOutput(hidden=x, padding=padding)


class S2TConformer(EncoderDecoder):
    """A model from filter banks to text."""

    def __init__(self, spec: S2TConformerSpec) -> None:
        table = Embedding(spec.vocab_size, spec.model_dim, padding_idx=spec.pad_idx)

        super().__init__(spec, ConformerEncoder(spec), TransformerDecoder(spec, table))


@torch.no_grad()
def init_s2t_conformer(model: S2TConformer, name: str, parameter: Tensor) -> None:
    """Initialize ``parameter`` randomly, as in other encoders with a decoder."""
    path, _, leaf = name.rpartition(".")
    if not init_conformer(model.get_submodule(path), leaf, parameter):
        init_encoder_decoder(model, name, parameter)
