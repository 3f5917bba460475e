"""The check that a checkpoint fits a model, from its manifest alone: no tensor is read."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lading.checkpoints.adapter import Adapter
from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.formats.manifest import FLOATS, SCALE_SUFFIX, SCALED, Manifest
from lading.models.adapters import NO_MERGE, Merge, match_adapters
from lading.models.family import Family
from lading.models.shapes import targets_of_config
from lading.models.targets import Targets
from lading.planning.block_scales import misfits_of_scales, scale_shape
from lading.planning.composition import Source, shape_of, tensors_of, with_tensors
from lading.planning.rules import Route, route
from lading.system.display import counted, human_bytes, human_count, representation

_MAX_LINES = 20
"""The most problems that an error lists; it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The result of a check: whether a checkpoint fits a model, and the problems."""

    family: str
    problems: tuple[str, ...]
    """The problems, a line each: missing, unexpected, claimed twice, of another shape or dtype, or quantized."""
    quantized: Mapping[str, str]
    """The quantized tensors that weights need, and their dtypes."""
    tensors: int
    """The number of tensors in the checkpoint."""
    matched: int
    """Tensors that make a parameter or a persistent buffer."""
    tied: Mapping[str, str]
    """Tensors that are other copies of a tied parameter, and the parameter; a load checks that they are equal."""
    dropped: tuple[str, ...]
    """Tensors that the family's rules know and a model does not need."""
    drawn: tuple[str, ...]
    """The parameters and persistent buffers that the checkpoint lacks by design; a load initializes them."""
    parameters: int
    """The elements of the model's parameters and persistent buffers, counting tied ones once."""
    bytes: int
    """The bytes of the matched tensors in the checkpoint."""
    advice: str
    """Advice on how to solve the problems; empty without problems."""
    contradictions: tuple[str, ...] = ()
    """Contradictions between the card and the ``config.json`` beside the weights, a clause each. It fits all the same,
    but a load computes with the numbers of the card."""

    @property
    def fits(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        return representation(
            self,
            f"it fits {self.family}" if self.fits else f"{counted(len(self.problems), 'problem')} with {self.family}",
            f"{counted(len(self.contradictions), 'contradiction')} with config.json" if self.contradictions else "",
            f"{self.matched} of {counted(self.tensors, 'tensor')} needed",
            f"{human_count(self.parameters)} parameters",
            human_bytes(self.bytes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The match of the tensors of a checkpoint, and of adapters, with the targets of a model."""

    family: Family[Any, Any]
    config: Any
    manifest: Manifest
    targets: Targets
    routed: Route
    """The tensors of the checkpoint that make targets, except for targets that an adapter has whole."""
    merge: Merge = NO_MERGE
    """The changes that the adapters make."""

    def copies(self) -> list[tuple[int, Source, str]]:
        """Return the target, source and name of each further copy of a tied parameter that has bytes of its own.

        ``torch.save`` writes tensors that share memory once, under several names.
        """
        manifest = self.manifest
        first: dict[object, int] = {}

        def in_place_of(tensor: int) -> int:
            if tensor in manifest.scales:
                return tensor  # its values depend on other bytes, too
            place = manifest.shard_ids[tensor], manifest.offsets[tensor], manifest.pieces.get(tensor)
            return first.setdefault((place, manifest.dtypes[tensor], manifest.shapes[tensor]), tensor)

        routed = self.routed
        sources = dict(routed.sources()) if routed.duplicates else {}

        return [
            (target, copy, name)
            for (target, copy), name in zip(routed.duplicates, routed.further_names, strict=True)
            if with_tensors(copy, in_place_of) != with_tensors(sources[target], in_place_of)
        ]

    def block_dims(self) -> array[int]:
        """Return for each tensor the dim along which digests cut it: that of the ranks, so that they can check."""
        plan = self.family.parallel_plan(self.config)
        dims = array("b", [0]) * len(self.manifest)
        for target, tensor in zip(self.routed.targets, self.routed.tensors, strict=True):
            dim = plan.shard_dim(self.targets.names[target])
            if dim < len(self.manifest.shapes[tensor]):
                dims[tensor] = dim
        for tensor, scales in self.manifest.scales.items():
            if dims[tensor] < len(self.manifest.shapes[scales]):
                dims[scales] = dims[tensor]

        return dims


def check_manifest(
    manifest: Manifest, family: Family[Any, Any], config: Any, adapters: Sequence[Adapter] = ()
) -> CheckReport:
    """Check whether the checkpoint of ``manifest``, with ``adapters``, fits the model that ``family`` builds from
    ``config``.

    :raises TypeError: ``config`` is not of the family's class.
    """
    return report_fit(match(manifest, targets_of_config(family, config), family, config, adapters))


def fit(
    checkpoint: Checkpoint,
    targets: Targets,
    family: Family[Any, Any],
    config: Any,
    adapters: Sequence[Adapter] = (),
) -> Match:
    """Match a checkpoint, and adapters, with the targets of a model that they fit.

    :raises ModelCheckpointMismatchError: they do not fit; with all problems together.
    :raises NotSupportedError: weights are quantized.
    """
    found = match(checkpoint.manifest, targets, family, config, adapters)
    require_fit(report_fit(found), path=checkpoint.where, name=checkpoint.name)

    return found


def match(
    manifest: Manifest,
    targets: Targets,
    family: Family[Any, Any],
    config: Any,
    adapters: Sequence[Adapter] = (),
) -> Match:
    """Match tensors of a checkpoint, and of adapters, with parameters and persistent buffers of a model."""
    routed = _route(manifest, targets, family, config)
    merge = NO_MERGE
    if adapters:
        merge = match_adapters(adapters, manifest, targets, routed, family=family, config=config)
        routed = routed.without(merge.replaced)

    return Match(family=family, config=config, manifest=manifest, targets=targets, routed=routed, merge=merge)


def _route(manifest: Manifest, targets: Targets, family: Family[Any, Any], config: Any) -> Route:
    """Return the tensors that make the targets, without those targets that the checkpoint may lack by design."""
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


def report_fit(match: Match) -> CheckReport:
    """Report as :func:`check_manifest`, for tensors that have been matched."""
    manifest, targets, routed = match.manifest, match.targets, match.routed
    quantized = {manifest.names[t]: manifest.dtypes[t] for t in _quantized(manifest, targets, routed)}
    problems = [f"quantized: {name} is stored as {dtype}" for name, dtype in quantized.items()]
    problems += _problems(manifest, targets, routed)
    advice = _advice(targets, routed, match.family) if problems else _OF_ADAPTERS
    problems += match.merge.problems

    tied = {
        manifest.names[tensor]: targets.names[target]
        for target, source in routed.duplicates
        for tensor in tensors_of(source)
    }
    matched = [t for i, t in enumerate(routed.tensors) if i not in routed.composed]
    # A tensor that is cut makes several parameters.
    matched += dict.fromkeys(t for source in routed.composed.values() for t in tensors_of(source))
    matched += [manifest.scales[t] for t in matched if t in manifest.scales]
    known = {manifest.names[t] for t in matched} | tied.keys() | set(routed.unexpected)
    known.update(name for _, names in routed.clashes for name in names)

    return CheckReport(
        family=match.family.name,
        problems=tuple(problems),
        quantized=quantized,
        tensors=len(manifest),
        matched=len(matched),
        tied=tied,
        dropped=tuple(name for name in manifest.names if name not in known),
        drawn=routed.drawn,
        parameters=sum(map(math.prod, targets.shapes)),
        bytes=sum(map(manifest.nbytes, matched)),
        advice=(advice or "Check the architecture and the overrides.") if problems else "",
    )


_OF_ADAPTERS = "Check that the adapter was trained on this base."


def _advice(targets: Targets, routed: Route, family: Family[Any, Any]) -> str | None:
    """Return what the names that do not fit suggest; ``None`` where they suggest nothing."""
    missing, unexpected = routed.missing, routed.unexpected
    if wrapper := _wrapper(missing, unexpected):
        return (
            f"The names in the checkpoint begin with {wrapper!r}, which a wrapper such as torch.compile, "
            "DistributedDataParallel or Lightning puts in front. Save the state dict of the module inside it, or one "
            f"without the prefix: `{{k.removeprefix({wrapper!r}): v for k, v in state_dict.items()}}`."
        )
    if routed.clashes or routed.incomplete:
        return None
    if family.explain is not None and (explained := family.explain(missing, unexpected)):
        return explained
    if not missing and unexpected and (layers := _further_layers(targets.names, unexpected)):
        return (
            f"The model has fewer layers than the checkpoint: {layers} is not in it. Correct the number of layers; or, "
            "where the layer is of a draft head that predicts further tokens and the family is `hg`, state "
            "`num_nextn_predict_layers` beside `num_hidden_layers` in config.json."
        )

    return None


def _wrapper(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return what stands before all names in the checkpoint, if the model lacks just those without it."""
    wanted = set(missing)
    first = next(iter(unexpected), "")
    # From the outermost module on: names may repeat themselves.
    for end in (match.end() for match in re.finditer(r"\.", first)):
        prefix = first[:end]
        if all(name.startswith(prefix) for name in unexpected):
            inside = {name.removeprefix(prefix) for name in unexpected}
            if wanted & inside and 2 * len(wanted & inside) >= len(wanted):
                return prefix

    return None


_LAYER = re.compile(r"(?:^|.*\.)layers\.([0-9]{1,9})\.")


def _further_layers(names: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return the first layer of ``unexpected``, if these are all of layers behind those of the model."""
    own = max((int(match[1]) for name in names if (match := _LAYER.match(name))), default=None)
    found = [_LAYER.match(name) for name in unexpected]
    if own is None or not all(match is not None and int(match[1]) > own for match in found):
        return None

    return min((match for match in found if match is not None), key=lambda match: int(match[1]))[0].removesuffix(".")


def require_fit(report: CheckReport, *, path: Path | str, name: str) -> None:
    """Make sure that a checkpoint fits.

    :param path: its path or address, for the error.
    :param name: of the model.

    :raises ModelCheckpointMismatchError: it does not; with all problems together.
    :raises NotSupportedError: its weights are quantized.
    """
    if report.quantized:
        tensor, dtype = next(iter(report.quantized.items()))
        raise NotSupportedError(
            f"The checkpoint at {path} holds the weight {tensor!r} as {dtype}: it is quantized, which lading does not "
            "load. Use the checkpoint in its original precision."
        )

    if problems := report.problems:
        # The name of a tensor may hold line breaks, but a problem is a line.
        shown = ["\\n".join(problem.splitlines()) for problem in _some(problems)]
        if more := len(problems) - len(shown):
            shown.append(f"… and {more} more")
        raise ModelCheckpointMismatchError(
            path,
            f"The checkpoint at {path} does not fit the configuration of {name}: {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}. {report.advice}\n  " + "\n  ".join(shown),
            problems,
        )


def _some(problems: Sequence[str]) -> list[str]:
    """Return the problems that an error lists; with missing names, also the unexpected ones."""
    missing = [problem for problem in problems if problem.startswith("missing: ")]
    others = [problem for problem in problems if not problem.startswith("missing: ")]
    if len(problems) <= _MAX_LINES or not missing:
        return list(problems[:_MAX_LINES])
    num_others = min(len(others), max(_MAX_LINES // 2, _MAX_LINES - len(missing)))

    return [*missing[: _MAX_LINES - num_others], *others[:num_others]]


_WIDER: Mapping[str, frozenset[str]] = {
    "I8": frozenset({"I16", "I32", "I64"}),
    "I16": frozenset({"I32", "I64"}),
    "I32": frozenset({"I64"}),
    "U8": frozenset({"I16", "I32", "I64"}),
}
"""The integer dtypes that hold all numbers of another one: checkpoints store counters in narrower ones."""


def _quantized(manifest: Manifest, targets: Targets, routed: Route) -> list[int]:
    """Return the tensors for weights whose values are meaningless without separate scales."""
    return [
        tensor
        for target, source in routed.sources()
        for tensor in tensors_of(source)
        if _is_float(targets, target)
        and manifest.dtypes[tensor] not in FLOATS
        and not (manifest.scales and manifest.dtypes[tensor] in SCALED)  # with scales, or a problem without
    ]


def _problems(manifest: Manifest, targets: Targets, routed: Route) -> list[str]:
    """Return everything that is missing, unexpected, claimed twice, mis-shaped or of another dtype, one line each."""
    shapes = dict(zip(targets.names, targets.shapes, strict=True))
    found = [f"missing: {name} {list(shapes[name])}" for name in routed.missing]
    found += [f"unexpected: {name}" for name in routed.unexpected]
    found += [f"claimed by {len(names)} tensors: {target} by {', '.join(names)}" for target, names in routed.clashes]

    found += [f"incomplete: {name}: {why}" for name, why in routed.incomplete]

    found += problems_of_scales(manifest, routed)

    for target, source in [*routed.sources(), *routed.duplicates]:
        name, shape = name_of(source, manifest), shape_of(source, manifest.shapes)
        wanted = targets.dtypes[target]
        stored = next((d for d in _dtypes(source, manifest) if d != wanted and wanted not in _WIDER.get(d, ())), None)
        if shape != targets.shapes[target]:
            expected, is_ = list(targets.shapes[target]), list(shape)
            found.append(f"mis-shaped: {name} is expected to be {expected}, but is {is_}")
        elif not _is_float(targets, target) and stored is not None:
            found.append(f"of another dtype: {name} is expected to be {wanted}, but is {stored}")

    return found


def problems_of_scales(manifest: Manifest, routed: Route) -> list[str]:
    """Return what is missing or does not fit among the scales of blocks, one line each."""
    of_others = set(manifest.scales.values())
    found = [
        f"unexpected: {name}"
        for i, name in enumerate(manifest.names)
        if name.endswith(SCALE_SUFFIX) and i not in of_others and name not in routed.unexpected
    ]
    needed = dict.fromkeys(t for _, source in (*routed.sources(), *routed.duplicates) for t in tensors_of(source))
    for tensor in needed if manifest.scales else ():
        if manifest.dtypes[tensor] in SCALED and tensor not in manifest.scales:
            shape = scale_shape(manifest.shapes[tensor])
            found.append(f"missing: {manifest.names[tensor]}{SCALE_SUFFIX} {list(shape)}")
        found += misfits_of_scales(manifest, tensor)

    return found


def name_of(source: Source, manifest: Manifest) -> str:
    """Return the name of ``source`` for a message: its tensor, or the first one and the number of others."""
    first, *others = tensors_of(source)

    return manifest.names[first] + (f" with {len(others)} more" if others else "")


def _dtypes(source: Source, manifest: Manifest) -> list[str]:
    return [manifest.dtypes[tensor] for tensor in tensors_of(source)]


def _is_float(targets: Targets, target: int) -> bool:
    dtype = targets.dtypes[target]

    return dtype is None or dtype in FLOATS
