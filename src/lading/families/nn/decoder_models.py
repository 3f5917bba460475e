"""The language models of the decoder families, which differ in their options only."""

from __future__ import annotations

from lading.families.nn.decoder_lm import DecoderLM


class DeepSeek(DecoderLM):
    """A DeepSeek language model."""


class Gemma3(DecoderLM):
    """A Gemma 3 language model."""


class LLaMA(DecoderLM):
    """A LLaMA language model."""


class Llama4(DecoderLM):
    """A Llama 4 language model."""


class Mistral(DecoderLM):
    """A Mistral language model."""


class Mixtral(DecoderLM):
    """A Mixtral language model."""


class OLMO(DecoderLM):
    """An OLMo language model."""


class Qwen(DecoderLM):
    """A Qwen language model."""


class Qwen3MoE(DecoderLM):
    """A mixture of experts of Qwen 3."""
