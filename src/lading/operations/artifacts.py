"""Artifacts in the places that a search for checkpoints finds."""

from __future__ import annotations

from pathlib import Path

from lading import formats
from lading.formats.artifacts import Artifact, ArtifactFiles, quantized_artifact, read_artifact
from lading.formats.config_json import quantization_of, read_hf_config
from lading.operations.find_checkpoints import FoundCheckpoint, require_inside, require_links_inside


def artifact_at(
    path: Path, place: FoundCheckpoint, files: ArtifactFiles | None = None, *, restrict: bool = True
) -> Artifact | None:
    """Return the artifact at a path; ``None`` if a checkpoint that lading loads may be there.

    :param place: the place that links may not leave.
    :param files: the files of an artifact, if the search recognized it by their names.
    :param restrict: as :func:`lading.formats.index` takes it.

    :raises PolicyError: a link among the files leads out of the place.
    :raises CheckpointNotFoundError: nothing is there that lading recognizes (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: it is damaged, or is not what the names of the files say.
    :raises NotSupportedError: it is quantized, and its tensors cannot be read.
    :raises OSError: it cannot be read.
    """
    if files is not None:
        paths = files.paths()
        require_inside(paths, place)
        return read_artifact(files.kind, paths)

    require_links_inside(path, place)
    scheme = quantization_of(read_hf_config(path))

    return None if scheme is None else quantized_artifact(scheme, formats.index(path, restrict=restrict))
