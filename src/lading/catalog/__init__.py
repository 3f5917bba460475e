"""The catalog: a database of families, architectures, cards, checkpoints and their tensors, used as an ORM.

The public names are :func:`session`, which opens queries of the rows, and the classes of the rows
(:mod:`~lading.catalog.schema`). Python imports them at their first use. Other functions of lading return the values of
:mod:`~lading.catalog.records`.

:mod:`~lading.catalog.store` answers questions, :mod:`~lading.catalog.import_cards` and
:mod:`~lading.catalog.importing` import card files, :mod:`~lading.catalog.checkpoints` records files and their tensors,
:mod:`~lading.catalog.query` runs SQL, and :mod:`~lading.catalog.database` connects, migrates and explains failures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.catalog.read_only_session import session
    from lading.catalog.schema import (
        ArchitectureRow,
        ArtifactRow,
        CardCheckpointRow,
        CardRow,
        CheckpointRow,
        CopyRow,
        DigestDocumentRow,
        FamilyRow,
        PieceRow,
        ShardRow,
        SourceRow,
        TensorRow,
        VerificationRow,
    )

__all__ = [
    "ArchitectureRow",
    "ArtifactRow",
    "CardCheckpointRow",
    "CardRow",
    "CheckpointRow",
    "CopyRow",
    "DigestDocumentRow",
    "FamilyRow",
    "PieceRow",
    "ShardRow",
    "SourceRow",
    "TensorRow",
    "VerificationRow",
    "session",
]

if not TYPE_CHECKING:
    _homes = dict.fromkeys(__all__, f"{__name__}.schema") | {"session": f"{__name__}.read_only_session"}
    __getattr__ = deferred(globals(), **_homes)


def __dir__() -> list[str]:
    return sorted(__all__)
