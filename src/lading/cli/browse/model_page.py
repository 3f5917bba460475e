"""The contents of the page of a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from lading.cards.card import CONFIG_KEYS
from lading.catalog.query import run_query
from lading.catalog.store import AssetStore
from lading.cli.output import text
from lading.cli.show import config_rows, fields_of, look_up, summary_pairs
from lading.errors import CheckpointNotFoundError
from lading.formats.manifest import Manifest, by_layer
from lading.system.display import human_bytes, human_count
from lading.system.needs import needs_torch
from lading.system.uris import without_secrets

AXES = ("tp", "ep", "sdp", "pp", "rdp")
"""The axes of gangs that a picture can have."""

MOST_RANKS = 1_024
"""The most ranks of a picture."""


def model_page(name: str, store: AssetStore, sharing: str) -> dict[str, object]:
    """Return the values of the page of a model, as text without secrets.

    :param sharing: the query for the models that share its files; ``:model`` is its name.

    :raises LadingError: as :meth:`lading.catalog.store.AssetStore.retrieve_card`.
    """
    found = look_up(store.retrieve_card(name), store)
    manifest = None if found.checkpoint is None else found.checkpoint.manifest

    return {
        "name": found.card.title,
        "summary": {label: _shown(value) for label, value in summary_pairs(found).items()},
        "fields": [tuple(map(_shown, row)) for row in fields_of(found.card) if row[0] not in CONFIG_KEYS],
        "config": [tuple(map(_shown, row)) for row in config_rows(found)],
        "indexed": manifest is not None,
        "layers": [] if manifest is None else list(_layers(found.card.name, manifest)),
        "sharing": run_query(store.database, sharing, {"model": found.card.name}).rows,
        "axes": AXES,
        "most_ranks": MOST_RANKS,
    }


def plan_picture(name: str, store: AssetStore, *, tp: int, ep: int, sdp: int, pp: int, rdp: int) -> str:
    """Return the picture of the plan of a model whose tensors the catalog knows.

    :raises LadingError: it does not know them, or as :func:`lading.operations.plan.plan_load`.
    """
    found = look_up(store.retrieve_card(name), store)
    if found.checkpoint is None:
        hint = f"The tensors of {name!r} are not in the catalog yet. Run `lading index {name}`."
        raise CheckpointNotFoundError(name, hint)

    with needs_torch("The plan of a load"):
        from lading.operations.plan import plan_load
        from lading.operations.plan_svg import picture

    return picture(plan_load(found.card, tp=tp, ep=ep, sdp=sdp, pp=pp, rdp=rdp, ranks=(0,), store=store))


def _shown(value: object) -> str:
    return without_secrets(text(value))


def _layers(name: str, manifest: Manifest) -> Iterator[dict[str, object]]:
    """Yield the layers of a manifest; ``filter`` is the part of an address that selects the rows of their tensors."""
    for layer, places in by_layer(manifest.names).items():
        dtypes = Counter(manifest.dtypes[i] for i in places)
        yield {
            "name": layer or "in no layer",
            "tensors": len(places),
            "parameters": human_count(sum(math.prod(manifest.shapes[i]) for i in places)),
            "bytes": human_bytes(sum(map(manifest.nbytes, places))),
            "dtypes": ", ".join(dtype for dtype, _ in dtypes.most_common()),
            "filter": {"model": name} | ({"tensor__startswith": f"{layer}."} if layer else {}),
        }
