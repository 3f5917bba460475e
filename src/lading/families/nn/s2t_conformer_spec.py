"""The options of an S2T Conformer, and its parallel plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lading.families.nn.encoder_decoder_spec import EncoderDecoderSpec, encoder_decoder_plan, subsampler_shapes
from lading.families.nn.shapes import Shapes, projection, under
from lading.families.nn.speech_spec import LayerSpec, layer_splits
from lading.models.parallel_plan import ParallelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class S2TConformerSpec(EncoderDecoderSpec):
    """The options of an encoder of filter banks with Conformer layers, and of the decoder.

    :raises ValueError: the sizes are not valid.
    """

    conformer: LayerSpec
    """The options of the encoder's layers."""

    def encoder_shapes(self) -> Shapes:
        """Return the parameters of the encoder."""
        found = under("conv", subsampler_shapes(self)) | projection("linear", self.model_dim, self.model_dim)
        layer = self.conformer.layer_shapes()
        for i in range(self.num_encoder_layers):
            found |= under(f"layers.{i}", layer)

        return found


def s2t_conformer_plan(spec: S2TConformerSpec) -> ParallelPlan:
    """Return the parallel plan, in which the convolutions of the encoder are not split."""
    plan = encoder_decoder_plan(spec)

    return replace(plan, tensor={**layer_splits(spec.conformer, "model.encoder.layers.*"), **(plan.tensor or {})})
