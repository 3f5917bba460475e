"""Does a checkpoint fit a model? All that does not, told from its manifest: no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lading.compose import tensors_of
from lading.construct import build_on_meta, check_config_type
from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.family import Family
from lading.keymap import Route, route
from lading.manifest import Manifest
from lading.transfer import fit
from lading.transfer.targets import Targets, targets_of

_MAX_LINES = 20
"""Problems that an error lists; the rest it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Whether a checkpoint fits a model, and how."""

    family: str
    problems: tuple[str, ...]
    """All that is missing, unexpected, claimed twice, mis-shaped, of another dtype or quantised, a line each."""
    quantised: Mapping[str, str]
    """Tensors that weights would be made of although they are quantised, and their dtypes."""
    tensors: int
    """In the checkpoint."""
    matched: int
    """Tensors that make a parameter or a persistent buffer."""
    tied: Mapping[str, str]
    """Tensors that are further copies of a tied parameter, and the parameter; a load makes sure that they are equal."""
    dropped: tuple[str, ...]
    """Tensors that the family's rules know and a model does not need."""
    drawn: tuple[str, ...]
    """Parameters and persistent buffers that the checkpoint may lack, and does: a load gives them as in a new model."""
    parameters: int
    """Elements of the model's parameters and persistent buffers, tied ones once."""
    bytes: int
    """Of the tensors that are matched, in the checkpoint."""

    @property
    def fits(self) -> bool:
        return not self.problems


def check_manifest(manifest: Manifest, family: Family[Any, Any], config: Any) -> CheckReport:
    """Whether the checkpoint of ``manifest`` fits the model that ``family`` makes of ``config``.

    :raises TypeError: ``config`` is not of the family's class.
    """
    check_config_type(config, family)
    targets = targets_of(build_on_meta(family, config), dtype=None)
    routed = match(manifest, targets, family, config)

    return report_fit(manifest, targets, routed, family=family.name)


def match(manifest: Manifest, targets: Targets, family: Family[Any, Any], config: Any) -> Route:
    """Which tensors of a checkpoint make which parameters and persistent buffers of a model."""
    routed = route(
        manifest.names,
        targets.names,
        family.rules_for(config, manifest.names),
        targets.aliases,
        shapes=manifest.shapes,
        target_shapes=targets.shapes,
    )
    if family.may_lack is None or not routed.missing:
        return routed

    drawn = set(family.may_lack(config, routed.missing))

    return replace(
        routed,
        missing=tuple(name for name in routed.missing if name not in drawn),
        drawn=tuple(name for name in routed.missing if name in drawn),
    )


def report_fit(manifest: Manifest, targets: Targets, routed: Route, *, family: str) -> CheckReport:
    """As :func:`check_manifest`, for a model that is built and whose tensors have been assigned.

    :param family: its name.
    """
    quantised = {manifest.names[t]: manifest.dtypes[t] for t in fit.quantised(manifest, targets, routed)}
    problems = [f"quantised: {name} is stored as {dtype}" for name, dtype in quantised.items()]
    problems += fit.problems(manifest, targets, routed)

    tied = {
        manifest.names[tensor]: targets.names[target]
        for target, source in routed.duplicates
        for tensor in tensors_of(source)
    }
    matched = [t for i, t in enumerate(routed.tensors) if i not in routed.composed]
    matched += [t for source in routed.composed.values() for t in tensors_of(source)]
    known = {manifest.names[t] for t in matched} | tied.keys() | set(routed.unexpected)
    known.update(name for _, names in routed.clashes for name in names)

    return CheckReport(
        family=family,
        problems=tuple(problems),
        quantised=quantised,
        tensors=len(manifest),
        matched=len(matched),
        tied=tied,
        dropped=tuple(name for name in manifest.names if name not in known),
        drawn=routed.drawn,
        parameters=sum(map(math.prod, targets.shapes)),
        bytes=sum(map(manifest.nbytes, matched)),
    )


def require_fit(report: CheckReport, *, path: Path | str, name: str) -> None:
    """Make sure that a checkpoint fits.

    :param path: its path or address, for the error.
    :param name: of the model.

    :raises ModelCheckpointMismatchError: it does not; with all problems together.
    :raises NotSupportedError: its weights are quantised.
    """
    if report.quantised:
        tensor, dtype = next(iter(report.quantised.items()))
        raise NotSupportedError(
            f"The checkpoint at {path} holds the weight {tensor!r} as {dtype}: it is quantised, which lading does not "
            "load. Use the checkpoint in its original precision."
        )

    if problems := report.problems:
        # The name of a tensor may hold line breaks, but a problem is a line.
        shown = ["\\n".join(problem.splitlines()) for problem in problems[:_MAX_LINES]]
        if more := len(problems) - len(shown):
            shown.append(f"… and {more} more")
        raise ModelCheckpointMismatchError(
            path,
            f"The checkpoint at {path} does not fit the configuration of {name}: {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}. Check the architecture and the overrides.\n  "
            + "\n  ".join(shown),
            problems,
        )
