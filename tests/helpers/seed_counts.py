"""Write the number of parameters into the package's cards: ``python -m tests.helpers.seed_counts``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lading.cards.card import ArchitectureEntry, AssetCard, CardEntry, resolve_architecture, resolve_card
from lading.cards.card_file import parse
from lading.cards.config import resolve_config
from lading.models.family import Family, get_family
from lading.models.shapes import count_parameters

SEEDS = Path(__file__).parents[2] / "seeds"

OF_TRANSFORMERS = {"hg_qwen3_0.6b": "qwen3_0.6b", "hg_qwen3_1.7b": "qwen3_1.7b"}
"""Cards whose configuration is in the repository, and others for the same repository."""


def models() -> Iterator[tuple[Path, AssetCard, Family[Any, Any], Any]]:
    """Yield the cards with an architecture, with their file, family and configuration."""
    files = [(path, parse(path.read_bytes(), source=str(path))) for path in sorted(SEEDS.glob("*.yaml"))]
    cards: dict[str, CardEntry] = {entry.name: entry for _, file in files for entry in file.cards}
    architectures: dict[tuple[str, str], ArchitectureEntry] = {
        (entry.family, entry.name): entry for _, file in files for entry in file.architectures
    }
    for path, file in files:
        for entry in file.cards:
            card = resolve_card(entry.name, (), lambda name: {"": cards[name]} if name in cards else {})
            assert card is not None
            name, arch = card.maybe_get_field("model_family"), card.maybe_get_field("model_arch")
            if name is None or arch is None:
                continue
            family = get_family(name.as_(str))
            found = resolve_architecture(
                arch.as_(str), family.name, lambda name, of=family.name: architectures.get((of, name))
            )
            yield path, card, family, resolve_config(card, found, family.config_kls)


def counts() -> dict[str, int]:
    """Return the number of parameters of each card's model that its architecture tells."""
    found = {card.name: count_parameters(family, config) for _, card, family, config in models() if family.shapes}

    return found | {name: found[same] for name, same in OF_TRANSFORMERS.items()}


def main() -> None:
    """Write them below the architecture and the configuration of each card."""
    found = counts()
    for path in sorted(SEEDS.glob("*.yaml")):
        documents = path.read_text(encoding="utf-8").split("\n---\n")
        for i, document in enumerate(documents):
            name = re.search(r"^name: (.+)$", document, re.MULTILINE)
            if name is not None and name[1] in found:
                document = re.sub(r"^parameters: .*\n", "", document, flags=re.MULTILINE)
                documents[i] = re.sub(
                    r"^model_arch: .*\n", rf"\g<0>parameters: {found[name[1]]}\n", document, count=1, flags=re.MULTILINE
                )
        path.write_text("\n---\n".join(documents), encoding="utf-8")


if __name__ == "__main__":
    main()
