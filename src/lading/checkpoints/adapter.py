"""LoRA adapters: the checkpoints that a card adds to its own, and their configurations."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.extra_files import read_or_fetch_config
from lading.checkpoints.locate import card_checkpoint
from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats.adapter_config import ADAPTER_CONFIG_NAME, ADAPTER_NAME, LoraConfig, parse_adapter_config

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter whose tensors are known; its file may still be elsewhere."""

    checkpoint: Checkpoint
    config: LoraConfig
    weight: float
    """The factor of what it adds to the weights."""


def card_adapters(
    card: AssetCard, base: Checkpoint, store: AssetStore, *, progress: bool = False, accept_others: bool = False
) -> tuple[Adapter, ...]:
    """Return the adapters of a card, in the order in which they are merged, without fetching remote ones.

    :param base: the checkpoint of the card. An adapter that was trained on another one is logged.

    :raises AssetCardError: the card states them in another form.
    :raises CheckpointNotFoundError: nothing is at the place of an adapter, or its configuration is not beside it.
    :raises NotSupportedError: an adapter is of another type than LoRA.

    It also raises what :func:`lading.checkpoints.locate.card_checkpoint` does, whose parameters the others are.
    """
    found = []
    for ref in adapter_refs(card):
        try:
            checkpoint = card_checkpoint(ref.card, store, progress=progress, accept_others=accept_others)
        except CheckpointNotFoundError as error:
            raise _pickled(Path(ref.card.name).parent) or error from None
        stated = read_or_fetch_config(checkpoint, store, ADAPTER_CONFIG_NAME)
        if not stated:
            raise CheckpointNotFoundError(
                checkpoint.where,
                f"The adapter of the card {card.name!r} at {checkpoint.where}: expected {ADAPTER_CONFIG_NAME} beside "
                "it, found no such file. Copy it from where the adapter was saved.",
            )
        config = parse_adapter_config(stated, label=checkpoint.where)
        if config.base is not None and not _is_of(config.base, base):
            log.warning(
                "the adapter %s was trained on %s, and is merged into %s", checkpoint.where, config.base, base.where
            )
        found.append(Adapter(checkpoint=checkpoint, config=config, weight=ref.weight))

    return tuple(found)


def _pickled(folder: Path) -> NotSupportedError | None:
    """Return the error for a folder with an adapter of an old version of PEFT; ``None`` if it is not one."""
    old = folder / "adapter_model.bin"
    if not old.is_file():
        return None

    return NotSupportedError(
        f"{folder}: expected {ADAPTER_NAME}, found only {old.name}, which an old version of PEFT wrote. Save the "
        "adapter again with `save_pretrained`."
    )


def _is_of(stated: str, base: Checkpoint) -> bool:
    """Return whether the last part of a name or path occurs in the address of the base: folders move."""
    last = stated.rstrip("/").rpartition("/")[2].casefold()

    return last in f"{base.uri} {base.where}".casefold()
