"""Print what fairseq2 ships as JSON: the cards of each of its files, and what those of each family resolve to.

Run it where fairseq2 0.8.1 is installed::

    python tests/parity/dump_fairseq2_cards.py > tests/parity/fairseq2_cards.json
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fairseq2
from fairseq2.assets import AssetCard, get_asset_store
from ruamel.yaml import YAML

FAMILIES = {
    "gemma3n": "gemma3n",
    "hg": "hg",
    "jepa": "jepa",
    "llama": "llama",
    "llama4": "llama",
    "mistral": "mistral",
    "nllb": "nllb",
    "olmo": "olmo",
    "qwen": "qwen",
    "s2t_conformer": "s2t_conformer",
    "s2t_transformer": "s2t_transformer",
    "wav2vec2": "wav2vec2",
    "wav2vec2_asr": "wav2vec2",
}
"""Each with the file of its cards."""


def resolved(card: AssetCard) -> dict[str, Any]:
    """All fields of a card and its bases; those that fairseq2 adds to each are between underscores."""
    fields = {} if card.base is None else resolved(card.base)
    fields.update(card.metadata)

    return {key: value for key, value in fields.items() if key not in ("base", "__source__", "__base_path__")}


def main() -> None:
    folder = Path(fairseq2.__file__).parent / "assets" / "cards"
    yaml = YAML(typ="safe", pure=True)
    cards = {str(path.relative_to(folder)): list(yaml.load_all(path)) for path in sorted(folder.rglob("*.yaml"))}

    fairseq2.init_fairseq2()
    store = get_asset_store()
    # Asked for by name: its store lists nothing, as one of its cards has a base that does not exist.
    families = {
        family: {
            card["name"]: fields
            for card in cards[f"models/{file}.yaml"]
            if (fields := resolved(store.retrieve_card(card["name"])))["model_family"] == family
        }
        for family, file in FAMILIES.items()
    }

    json.dump({"fairseq2": version("fairseq2"), "files": cards, "resolved": families}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
