"""The options of the decoder of Gemma 3n."""

from __future__ import annotations

from dataclasses import dataclass

from lading.families.nn.checks import require_positive, require_size, require_symbol
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.shapes import Shapes, projection

MAX_STATES = 100
"""The largest number of states of a token, above that of any model, and small enough to create their modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3nSpec(DecoderSpec):
    """The options of a decoder with alternating updates, low-rank residuals and embeddings per layer.

    :raises ValueError: the sizes are not valid.
    """

    altup_num_inputs: int
    """The number of states of each token; a layer computes one of them."""
    altup_active_idx: int
    """The index of the state that layers compute."""
    altup_coef_clip: float
    """The bound of the weights of the coefficients in training."""
    altup_correct_scale: bool
    """True if the computed state is scaled where the embeddings per layer are added."""
    laurel_rank: int
    """The rank of the residuals."""
    vocab_size_per_layer_input: int
    """The number of symbols that have an embedding for each layer."""
    hidden_size_per_layer_input: int
    """The width of these embeddings."""

    def __post_init__(self) -> None:
        DecoderSpec.__post_init__(self)
        require_positive(
            self, "altup_num_inputs", "laurel_rank", "vocab_size_per_layer_input", "hidden_size_per_layer_input"
        )
        if self.altup_num_inputs > MAX_STATES:
            raise ValueError(f"`altup_num_inputs` must be at most {MAX_STATES}, but is {self.altup_num_inputs}")
        if not 0 <= self.altup_active_idx < self.altup_num_inputs:
            raise ValueError(
                f"`altup_active_idx` must be an index of the {self.altup_num_inputs} states, but is "
                f"{self.altup_active_idx}"
            )
        if not self.altup_coef_clip >= 0:
            raise ValueError(f"`altup_coef_clip` must not be negative, but is {self.altup_coef_clip}")
        require_size("the width of the embeddings of all layers together", self.per_layer_dim)
        require_symbol(self.pad_idx, self.vocab_size_per_layer_input)

    @property
    def per_layer_dim(self) -> int:
        """The width of the embeddings of all layers together."""
        return self.num_layers * self.hidden_size_per_layer_input

    def _decoder_shapes(self) -> Shapes:
        dim, further = self.model_dim, range(self.altup_num_inputs - 1)
        found = DecoderSpec._decoder_shapes(self)
        found["embed_tokens_per_layer.weight"] = (self.vocab_size_per_layer_input, self.per_layer_dim)
        found |= projection("per_layer_model_projection", dim, self.per_layer_dim, bias=False)
        found["per_layer_projection_norm.weight"] = (self.hidden_size_per_layer_input,)
        for name in ("altup_projections", "altup_unembed_projections"):
            for i in further:
                found |= projection(f"{name}.{i}", dim, dim, bias=False)

        return found

    def _layer_shapes(self, layer: int) -> Shapes:
        dim, states, own = self.model_dim, self.altup_num_inputs, self.hidden_size_per_layer_input

        return {
            **DecoderSpec._layer_shapes(self, layer),
            "altup.correct_output_scale": (dim,),
            **projection("altup.correction_coefs", states, states, bias=False),
            **projection("altup.prediction_coefs", states, states**2, bias=False),
            **projection("altup.modality_router", dim, states, bias=False),
            "altup.router_norm.weight": (dim,),
            **projection("laurel.linear_left", dim, self.laurel_rank, bias=False),
            **projection("laurel.linear_right", self.laurel_rank, dim, bias=False),
            "laurel.post_laurel_norm.weight": (dim,),
            **projection("per_layer_input_gate", dim, own, bias=False),
            **projection("per_layer_projection", own, dim, bias=False),
            "post_per_layer_input_norm.weight": (dim,),
        }
