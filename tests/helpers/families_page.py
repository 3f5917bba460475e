"""Write ``docs/families.md`` from the catalog and the families: ``python -m tests.helpers.families_page``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lading.catalog.store import AssetStore, get_asset_store
from lading.models.family import Family, get_family
from lading.models.parallel_plan import Split
from lading.planning.rules import rename
from tests.helpers.native_families import NATIVE

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

NAMES_IN_CHECKPOINTS: Mapping[str, Sequence[str]] = {
    "Meta": ("layers.0.attention.wq.weight", "module.blocks.0.attn.proj.weight"),
    "fairseq": (
        "encoder.layers.0.fc1.weight",
        "encoder.layers.0.ffn1.w_1.weight",
        "encoder.conformer_layers.0.ffn1.w_1.weight",
        "w2v_encoder.w2v_model.encoder.layers.0.fc1.weight",
    ),
    "fairseq2": ("encoder.layers.0.self_attn.output_proj.weight", "decoder.layers.0.self_attn.output_proj.weight"),
}
"""Tensors that only checkpoints of that origin have."""

ENCODER_ONLY = {("jepa_classifier", "Meta")}
"""Origins whose names a family reads for its encoder alone."""

HEAD = """\
# Families

<!-- `python -m tests.helpers.families_page` writes this page. -->

The families that lading comes with. *config.json* is the `model_type` of the Hugging Face repositories that a family
reads. A class in parentheses means that the family reads only this class; "of `gemma3`" means that it reads a part of
these larger models. Where such repositories exist, parameters have their names. *Other names* are those of other
checkpoints that a family reads, in any [format](reference/checkpoint-formats.md); *Meta* are the names of Meta's files,
which Mistral AI's have, too. The last columns are the [axes of parallelism](how-to/load-on-many-devices.md); along an
axis without "yes", ranks hold copies.

| family | architectures | cards | config.json | other names | tp | sdp | pp | ep |
|---|---|---|---|---|---|---|---|---|
"""


def families() -> list[Family[Any, Any]]:
    """Return the families of this package, without those of other packages."""
    return [get_family(name) for name in sorted([*NATIVE, "hg"])]


def _config_json(family: Family[Any, Any]) -> str:
    if family.reads_other_model_types:
        return "any other"
    types, classes, wholes = (
        ", ".join(f"`{name}`" for name in sorted(names))
        for names in (family.hf_model_types, family.hf_architectures, family.hf_part_of)
    )

    return types + (f" ({classes})" if classes else "") + (f", of {wholes}" if wholes else "")


def _other_names(family: Family[Any, Any]) -> str:
    if family.shapes is None:
        return "as transformers"
    config = family.config_kls()
    parameters = family.shapes(config)

    return ", ".join(
        origin
        for origin, names in NAMES_IN_CHECKPOINTS.items()
        if (family.name, origin) not in ENCODER_ONLY
        and any(name in parameters for name in rename(names, family.rules_for(config, names)))
    )


def _axes(family: Family[Any, Any]) -> list[str]:
    if family.complete is not None:
        return ["by class", "by class", "", ""]
    plan = family.parallel_plan(family.config_kls())
    experts = plan.tensor is not None and Split.EXPERTS in plan.tensor.values()
    served = (plan.tensor is not None, plan.units is not None, plan.stages is not None, experts)

    return ["yes" if each else "" for each in served]


def _row(family: Family[Any, Any], store: AssetStore) -> str:
    cells = [
        f"[`{family.name}`](#{family.name})",
        str(len(store.architectures(family.name))),
        str(len(list(store.models(family=family.name)))),
        _config_json(family),
        _other_names(family),
        *_axes(family),
    ]

    return f"| {' | '.join(cells)} |\n"


def _section(family: Family[Any, Any], store: AssetStore) -> Iterator[str]:
    kls = family.kls if isinstance(family.kls, str) else f"{family.kls.__module__}:{family.kls.__name__}"
    models = "any class of transformers" if family.reads_other_model_types else f"the class `{kls.partition(':')[2]}`"
    yield f"\n## {family.name}\n\n"
    yield f"Models of {models}, configured by `{family.config_kls.__name__}`: "
    yield f"`lading.families.{family.name}.get_{family.name}_model_hub()`.\n"
    for kind, names in (
        ("Architectures", [each.name for each in store.architectures(family.name)]),
        ("Cards", [each.name for each in store.models(family=family.name)]),
    ):
        if names:
            yield f"\n{kind}: {', '.join(f'`{name}`' for name in sorted(names))}.\n"


def page(store: AssetStore) -> str:
    """Return the page for a catalog with only this package's cards."""
    found = families()
    rows = "".join(_row(family, store) for family in found)

    return HEAD + rows + "".join(part for family in found for part in _section(family, store))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LADING_DATABASE_URL"] = f"sqlite:///{folder}/catalog.db"
        os.environ["XDG_CONFIG_HOME"] = folder  # where no cards are
        for name in ("LADING_CARDS", "LADING_ENV"):
            os.environ.pop(name, None)
        PAGE.write_text(page(get_asset_store()), encoding="utf-8")


if __name__ == "__main__":
    main()
