"""The family and the architecture of a model, recognized by its ``config.json``, as a card states them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lading.cards.config import architecture_config
from lading.catalog.store import AssetStore
from lading.errors import AssetCardError, NotSupportedError
from lading.models.family import Family, family_of_model_type
from lading.models.hf_config import family_beside


class Recognizer:
    """The fields of cards for many checkpoints: equal files are read once, and so is each family's architectures."""

    def __init__(self, store: AssetStore) -> None:
        self._store = store
        self._known: dict[str, Mapping[str, object]] = {}
        self._architectures: dict[str, dict[str, str]] = {}

    def fields(self, hf_config: Mapping[str, object], where: Path | str) -> Mapping[str, object]:
        """Return ``model_family``, and ``model_arch`` if an architecture has exactly the numbers of ``config.json``.

        The family is the one that reads all model types, if the type's own family does not support the model.

        :param where: the place of the checkpoint that the file lies beside, for messages.

        :raises NotSupportedError: as :func:`lading.models.hf_config.family_beside`.
        :raises ModelCheckpointMismatchError: a key has a value of a wrong type, or they describe no model.
        """
        family = family_beside(hf_config, where)
        key = json.dumps(hf_config, sort_keys=True)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._read(family, hf_config)

        return found

    def _read(self, family: Family[Any, Any], hf_config: Mapping[str, object]) -> Mapping[str, object]:
        assert family.from_hf is not None
        if family.reads_other_model_types:
            return {"model_family": family.name}
        try:
            config = family.from_hf(hf_config)
        except NotSupportedError:
            other = family_of_model_type("")  # the type of no family
            if other is None:
                raise
            return {"model_family": other.name}
        arch = self._architecture(family, config)

        return {"model_family": family.name} | ({} if arch is None else {"model_arch": arch})

    def _architecture(self, family: Family[Any, Any], config: Any) -> str | None:
        """Return the architecture with the numbers of a configuration; ``None`` without one, or if several differ."""
        if family.name not in self._architectures:
            # What config.json cannot say, such as masks in training, tells apart architectures that look alike in it.
            found: dict[str, dict[str, str]] = {}
            for architecture in self._store.resolved_architectures(family.name):
                try:
                    own = architecture_config(architecture, family.config_kls)
                    alike = found.setdefault(_described(family, own, as_read=True), {})
                    alike.setdefault(_described(family, own), architecture.name)
                except (AssetCardError, NotSupportedError):
                    continue  # it is not valid, or no config.json describes it
            self._architectures[family.name] = {
                described: next(iter(alike.values())) for described, alike in found.items() if len(alike) == 1
            }

        try:
            return self._architectures[family.name].get(_described(family, config))
        except NotSupportedError:
            return None


def _described(family: Family[Any, Any], config: Any, *, as_read: bool = False) -> str:
    """Return the ``config.json`` of a configuration as text, equal for equal models.

    :param as_read: that of the configuration that is read back from it.

    :raises NotSupportedError: the family does not write it.
    """
    if family.to_hf is None or family.from_hf is None:
        raise NotSupportedError(f"The {family.name} family does not write config.json.")
    values = family.to_hf(config)

    return json.dumps(family.to_hf(family.from_hf(values)) if as_read else values, sort_keys=True)
