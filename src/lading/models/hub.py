"""The public calls: hubs of families, and ``load_model``.

The calls and their meaning are those of fairseq2 0.8.1's ``fairseq2.models.hub``, so that code written for it works.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, Unpack, cast, final, overload

import torch
from torch import Tensor
from torch.nn import Module

from lading.cards.card import AssetCard, StreamMode, is_stream_mode
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint, path_checkpoint
from lading.checkpoints.names import as_path, find_card
from lading.checkpoints.verification import Verify, require_mode
from lading.errors import (
    ModelArchitectureNotKnownError,
)
from lading.formats.folder import nested
from lading.gangs import Gangs, create_fake_gangs
from lading.gangs.compare import digest
from lading.models.construct import create_model, gc_disabled
from lading.models.device import get_current_device, require_usable
from lading.models.family import Family, check_config_type
from lading.models.loader import LoadOptions, agreed, load
from lading.models.report import LoadReport
from lading.models.resolve import arch_config, model_config, resolve_model
from lading.models.tensors import iter_tensors
from lading.system.settings import Settings
from lading.transfer.dtypes import DType, parse_dtype

ModelT = TypeVar("ModelT", bound=Module)
ModelConfigT = TypeVar("ModelConfigT")
CardT = TypeVar("CardT", bound=AssetCard | str | Path)


class TransferKeywords(TypedDict, total=False):
    """The keywords that say how a load moves the bytes; :meth:`ModelHub.load_model` describes all keywords."""

    load_rank0_only: bool
    verify: Verify
    cooperative: bool
    stream: StreamMode | None


class SharedKeywords(TransferKeywords, total=False):
    """The keywords of every load, apart from its place."""

    dtype: torch.dtype | str | None
    mmap: bool
    progress: bool


class GangsKeywords(SharedKeywords, total=False):
    """The keywords of a load onto gangs."""

    gangs: Gangs | None


class DeviceKeywords(SharedKeywords, total=False):
    """The keywords of a load onto a device."""

    device: torch.device | str | None


class LoadKeywords(GangsKeywords, DeviceKeywords, total=False):
    """The keywords of a load, before it is known that only one place is among them."""


@final
class ModelHub(Generic[ModelT, ModelConfigT]):
    """The models of one family: its cards, its architectures, and the ways to make and to load a model.

    Get one by the accessor of the family, such as :func:`lading.families.qwen.get_qwen_model_hub`.
    """

    def __init__(self, family: Family[ModelT, ModelConfigT], asset_store: CardStore) -> None:
        self._family = family
        self._asset_store = open_store(asset_store)

    def iter_cards(self) -> Iterator[AssetCard]:
        """Yield the cards of this family; log and skip bad ones."""
        return self._asset_store.find_cards("model_family", self._family.name)

    def get_archs(self) -> set[str]:
        """Return the names of the family's architectures."""
        return {arch.name for arch in self._asset_store.architectures(self._family.name)}

    def get_arch_config(self, arch: str) -> ModelConfigT:
        """Return a new configuration of the architecture ``arch``.

        :raises ModelArchitectureNotKnownError: the family has none of this name.
        """
        return cast(ModelConfigT, arch_config(arch, self._family, self._asset_store))

    def maybe_get_arch_config(self, arch: str) -> ModelConfigT | None:
        """Return the configuration like :meth:`get_arch_config`, but ``None`` for an unknown name."""
        try:
            return self.get_arch_config(arch)
        except ModelArchitectureNotKnownError:
            return None

    def get_model_config(self, card: AssetCard | str | Path, *, revision: str | None = None) -> ModelConfigT:
        """Return a new configuration of a model: the architecture that its card names, with the card's overrides.

        If the card names no architecture, this is the configuration in the ``config.json`` beside its checkpoint, with
        the card's overrides, and raises what :meth:`load_model` does.

        :param card: as :meth:`load_model` takes it; likewise ``revision``.

        :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
        :raises AssetCardError: the card is of another family, names an architecture that is not known, or states
            overrides that do not fit.
        """
        found = find_card(card, self._asset_store, revision=revision, family=self._family.name)
        if isinstance(found, AssetCard) and (found.has_field("model_arch") or not found.has_field("checkpoint")):
            return cast(ModelConfigT, model_config(found, self._family, self._asset_store))

        return cast(ModelConfigT, resolve_model(found, self._asset_store, family=self._family).config)

    @overload
    def create_new_model(
        self,
        config: ModelConfigT,
        *,
        gangs: Gangs | None = None,
        dtype: torch.dtype | str | None = None,
        meta: bool = False,
        init_rank0_only: bool = False,
    ) -> ModelT: ...

    @overload
    def create_new_model(
        self,
        config: ModelConfigT,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        meta: bool = False,
        init_rank0_only: bool = False,
    ) -> ModelT: ...

    def create_new_model(
        self,
        config: ModelConfigT,
        *,
        gangs: Gangs | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        meta: bool = False,
        init_rank0_only: bool = False,
    ) -> ModelT:
        """Create a model with random parameters, by the scheme of its architecture.

        The values depend on torch's random generator, which advances, and on the names of the parameters: after the
        same ``torch.manual_seed(…)``, any gangs and a single device of the same kind make equal models. In gangs, the
        generator of the first rank decides.

        :param gangs: instead of ``device``; the model is on ``gangs.root.device``, and this rank gets its part.
        :param device: default: the current device.
        :param dtype: of parameters and persistent buffers, also by its name; default: ``torch.get_default_dtype()``.
        :param meta: make it on the meta device, without memory.
        :param init_rank0_only: accepted for code that was written for fairseq2. Every rank initializes its own part,
            without a broadcast, so that this changes nothing.

        :raises ValueError: both ``gangs`` and ``device``, or a meta device without ``meta``.
        :raises TypeError: ``config`` is not of the family's class, or ``dtype`` is not a dtype.
        :raises NotSupportedError: the family does not support ``meta``; a size does not divide over ``gangs.tp``, or
            the number of experts over ``gangs.ep × gangs.tp``; or there are more ranks in ``gangs.pp`` than layers.
        :raises GangError: another rank failed, or asks for something else.
        """
        effective = _effective_gangs(gangs, "cpu" if meta and gangs is None and device is None else device)
        concrete = _effective_dtype(dtype)
        if not isinstance(concrete, torch.dtype):
            raise ValueError("`dtype` must be a dtype for a new model, as no checkpoint states one")

        model = agreed(
            effective, lambda: create_model(self._family, config, gangs=effective, dtype=concrete, meta=meta)
        )

        return cast(ModelT, model)

    @overload
    def load_model(
        self,
        card: AssetCard | str | Path,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        config: ModelConfigT | None = None,
        **keywords: Unpack[GangsKeywords],
    ) -> ModelT: ...

    @overload
    def load_model(
        self,
        card: AssetCard | str | Path,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        config: ModelConfigT | None = None,
        **keywords: Unpack[DeviceKeywords],
    ) -> ModelT: ...

    def load_model(
        self,
        card: AssetCard | str | Path,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        gangs: Gangs | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        config: ModelConfigT | None = None,
        load_rank0_only: bool = False,
        mmap: bool = False,
        progress: bool = True,
        verify: Verify = "auto",
        cooperative: bool = False,
        stream: StreamMode | None = None,
    ) -> ModelT:
        """Load a model with its pretrained weights, in train mode.

        :param card: a card; the name of one; a path; or the address of a repository of the hub, ``org/name`` or
            ``hg://org/name``. A path or an address means the card that has this checkpoint; without one, the
            ``config.json`` beside it describes the model.
        :param revision: a branch, a tag or a commit of a repository, as in ``org/name@revision``.
        :param state_dict: the dotted path of the state dict, ``"ema.module"``, in the file or the checkpoint of
            ``torch.distributed.checkpoint`` at a path, if that holds several. Default: that of the model, under one of
            the usual names. A card states its own.
        :param gangs: instead of ``device``; this applies their parallelism.
        :param device: default: the current device.
        :param dtype: the dtype of parameters and persistent buffers, also by its name, such as ``"bfloat16"`` or
            ``"bf16"``; default: ``torch.get_default_dtype()``. ``"auto"`` is that of the ``config.json`` beside the
            checkpoint, else the most common one of the checkpoint; ``"keep"`` keeps that of each tensor. Tensors that
            a class keeps in float32 stay so under every dtype.
        :param config: instead of the card's configuration, for slight changes such as dropout.
        :param load_rank0_only: accepted for code that was written for fairseq2. Every rank reads its own part, without
            a broadcast, so that this changes nothing.
        :param mmap: map the files instead of reading them, if no cast is needed and the device is the CPU.
        :param progress: show a bar on stderr when it takes longer than half a second.
        :param verify: ``"auto"`` checks, during the load, the files that were not verified in the state that they are
            in; ``"always"`` checks all; ``"never"`` nothing.
        :param cooperative: the ranks of a host each read a part of the files and exchange it, so that every byte comes
            from storage once. All ranks have to pass the same.
        :param stream: ``True`` reads the parts of the files that this rank needs straight from the source of the
            checkpoint into memory, unless the files are on this machine; ``False`` fetches the files first; ``"auto"``
            streams if the cache has no room for them. Default: as the card's field ``stream`` says, else ``False``.

        :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
        :raises AssetCardError: the card is of another family, names an architecture that is not known, or states
            overrides that do not fit.
        :raises ModelGatedError: the card names no checkpoint; the publisher hands it out on request.
        :raises FetchError: the checkpoint cannot be fetched.
        :raises FileNotFoundError: nothing is at the place of the checkpoint.
        :raises ModelCheckpointError: the checkpoint is damaged, does not fit the configuration, or is not the one that
            was published or recorded.
        :raises NotSupportedError: the checkpoint is quantized, or of no known family; ``revision`` for something
            without revisions; a size does not divide over ``gangs.tp``, or the number of experts over
            ``gangs.ep × gangs.tp``; or there are more ranks in ``gangs.pp`` than layers.
        :raises ValueError: both ``gangs`` and ``device``, or a meta device; ``mmap`` with ``cooperative`` or
            ``stream``; or ``state_dict`` for something else than a path.
        :raises TypeError: ``config`` is not of the family's class, or ``dtype`` is not a dtype.
        """
        options = load_options(
            revision=revision,
            gangs=gangs,
            device=device,
            dtype=dtype,
            mmap=mmap,
            progress=progress,
            verify=verify,
            cooperative=cooperative,
            stream=stream,
        )
        model, _ = _load(_inside(card, state_dict), self._family, self._asset_store, options, config)

        return cast(ModelT, model)

    @overload
    def load_custom_model(
        self,
        path: Path | str,
        config: ModelConfigT,
        *,
        state_dict: str | None = None,
        restrict: bool | None = None,
        **keywords: Unpack[GangsKeywords],
    ) -> ModelT: ...

    @overload
    def load_custom_model(
        self,
        path: Path | str,
        config: ModelConfigT,
        *,
        state_dict: str | None = None,
        restrict: bool | None = None,
        **keywords: Unpack[DeviceKeywords],
    ) -> ModelT: ...

    def load_custom_model(
        self,
        path: Path | str,
        config: ModelConfigT,
        *,
        state_dict: str | None = None,
        restrict: bool | None = None,
        **keywords: Unpack[LoadKeywords],
    ) -> ModelT:
        """Load a model from a checkpoint file or folder that is not in the catalog.

        :param path: the path of the file or folder.
        :param config: the configuration of the checkpoint's model.
        :param restrict: refuse a file of ``torch.save`` that names anything that a state dict does not need, instead of
            ignoring it; ``None``: the family's default. lading imports nothing that a file names in either case.

        The other parameters, and what is raised, are as for :meth:`load_model`.
        """
        options = load_options(restrict=self._restrict(restrict), **keywords)
        place = _inside(Path(path), state_dict)

        def load_path() -> tuple[Module, LoadReport]:
            _require_same(options.gangs, place, self._family, config, options.restrict)
            return load(place, self._family, self._asset_store, options, config=config)

        model, _ = agreed(options.gangs, load_path)

        return cast(ModelT, model)

    def iter_checkpoint(
        self,
        path: Path | str,
        config: ModelConfigT,
        *,
        gangs: Gangs | None = None,
        mmap: bool = False,
        restrict: bool | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield pairs (parameter name, tensor) of a checkpoint, one tensor in memory at a time, on the CPU.

        Names are those of the parameters, after the family's rules; dtypes are the checkpoint's own.

        :param gangs: yield only this rank's part of a parameter that is split over them, and nothing of other stages of
            a pipeline. Under tensor or expert parallelism all ranks have to call this, for the same checkpoint.

        :raises FileNotFoundError: nothing is at ``path``.
        :raises ModelCheckpointError: the checkpoint is damaged, or does not fit the configuration.
        :raises NotSupportedError: a size of the configuration does not divide over ``gangs.tp``, or the number of
            experts over ``gangs.ep × gangs.tp``; there are more ranks in ``gangs.pp`` than layers; or a tensor has a
            dtype that torch lacks.
        :raises TypeError: ``config`` is not of the family's class.
        """
        check_config_type(config, self._family)

        all_gangs = gangs or create_fake_gangs("cpu")
        settings = self._asset_store.settings
        together = all_gangs.tp.size * all_gangs.ep.size > 1

        def find() -> Checkpoint:
            if together:
                _require_same(all_gangs, Path(path), self._family, config, self._restrict(restrict))
            return path_checkpoint(Path(path), cache=settings.cache_dir, restrict=self._restrict(restrict))

        checkpoint = agreed(all_gangs, find) if together else find()

        return iter_tensors(
            checkpoint, self._family, config, gangs=all_gangs, mmap=mmap, huge_pages=settings.huge_pages
        )

    def _restrict(self, asked: bool | None) -> bool:
        return self._family.restrict if asked is None else asked


class GlobalModelLoader:
    """A loader of models of any family: the card names the family."""

    def __init__(
        self, asset_store: CardStore | None = None, families: Mapping[str, Family[Any, Any]] | None = None
    ) -> None:
        """Make a loader.

        :param asset_store: default: the default store.
        :param families: the families that a card may name, by name; default: those that are registered.
        """
        self._asset_store = None if asset_store is None else open_store(asset_store)
        self._families = families

    @overload
    def load(
        self,
        card: AssetCard | str | Path,
        gangs: Gangs | None = None,
        device: None = None,
        dtype: torch.dtype | str | None = None,
        config: object | None = None,
        mmap: bool = False,
        progress: bool = True,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        **keywords: Unpack[TransferKeywords],
    ) -> Module: ...

    @overload
    def load(
        self,
        card: AssetCard | str | Path,
        gangs: None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        config: object | None = None,
        mmap: bool = False,
        progress: bool = True,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        **keywords: Unpack[TransferKeywords],
    ) -> Module: ...

    def load(
        self,
        card: AssetCard | str | Path,
        gangs: Gangs | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        config: object | None = None,
        mmap: bool = False,
        progress: bool = True,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        **keywords: Unpack[TransferKeywords],
    ) -> Module:
        """Load a model as :func:`load_model` does."""
        options = load_options(
            revision=revision, gangs=gangs, device=device, dtype=dtype, mmap=mmap, progress=progress, **keywords
        )

        return self._load(card, state_dict, options, config)[0]

    @overload
    def load_with_report(
        self,
        card: AssetCard | str | Path,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        config: object | None = None,
        restrict: bool = True,
        **keywords: Unpack[GangsKeywords],
    ) -> tuple[Module, LoadReport]: ...

    @overload
    def load_with_report(
        self,
        card: AssetCard | str | Path,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        config: object | None = None,
        restrict: bool = True,
        **keywords: Unpack[DeviceKeywords],
    ) -> tuple[Module, LoadReport]: ...

    def load_with_report(
        self,
        card: AssetCard | str | Path,
        *,
        revision: str | None = None,
        state_dict: str | None = None,
        config: object | None = None,
        restrict: bool = True,
        **keywords: Unpack[LoadKeywords],
    ) -> tuple[Module, LoadReport]:
        """Load a model as :meth:`load` does, and return a report of the load, too.

        :param restrict: as :func:`lading.formats.index` takes it; for a path.
        """
        options = load_options(revision=revision, restrict=restrict, **keywords)

        return self._load(card, state_dict, options, config)

    def _load(
        self, card: AssetCard | str | Path, state_dict: str | None, options: LoadOptions, config: object
    ) -> tuple[Module, LoadReport]:
        options = replace(options, families=self._families)

        return _load(_inside(card, state_dict), None, self._asset_store, options, config)


@overload
def load_model(
    card: AssetCard | str | Path,
    *,
    revision: str | None = None,
    state_dict: str | None = None,
    config: object | None = None,
    **keywords: Unpack[GangsKeywords],
) -> Module: ...


@overload
def load_model(
    card: AssetCard | str | Path,
    *,
    revision: str | None = None,
    state_dict: str | None = None,
    config: object | None = None,
    **keywords: Unpack[DeviceKeywords],
) -> Module: ...


def load_model(
    card: AssetCard | str | Path,
    *,
    revision: str | None = None,
    state_dict: str | None = None,
    gangs: Gangs | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    config: object | None = None,
    load_rank0_only: bool = False,
    mmap: bool = False,
    progress: bool = True,
    verify: Verify = "auto",
    cooperative: bool = False,
    stream: StreamMode | None = None,
) -> Module:
    """Load a model of any family with its pretrained weights, in train mode.

    For a known family, its own hub returns the right type: ``get_qwen_model_hub().load_model(…)``. Parameters and
    errors are as for :meth:`ModelHub.load_model`; a card without a family, or with one that is not registered, raises
    :class:`AssetCardError`.
    """
    options = load_options(
        revision=revision, gangs=gangs, device=device, dtype=dtype, mmap=mmap, progress=progress, verify=verify,
        cooperative=cooperative, stream=stream,
    )  # fmt: skip

    return _load(_inside(card, state_dict), None, None, options, config)[0]


load_with_report = GlobalModelLoader().load_with_report
"""The load of :func:`load_model`, which also returns a report: phases, bytes, reads."""


# --- arguments --------------------------------------------------------------------------------------------------------


def _load(
    card: AssetCard | str | Path,
    family: Family[Any, Any] | None,
    store: AssetStore | None,
    options: LoadOptions,
    config: Any,
) -> tuple[Module, LoadReport]:
    def resolve_and_load() -> tuple[Module, LoadReport]:
        _require_same(options.gangs, card, family, config, options.revision)
        return load(card, family, store, options, config=config)

    with gc_disabled():  # a collection visits all objects of torch, which takes as long as reading a gigabyte
        return agreed(options.gangs, resolve_and_load)


def _inside(card: CardT, state_dict: str | None) -> CardT | Path:
    """Return the path of a state dict in the checkpoint at a path; without a state dict, ``card`` as it is.

    :raises ValueError: ``card`` is not a path, or ``state_dict`` is not a dotted path.
    """
    if state_dict is None:
        return card
    path = as_path(card)
    if path is None:
        raise ValueError("`state_dict` is only for a checkpoint at a path, as a card states its own")

    return nested(path, state_dict)


def _require_same(
    gangs: Gangs, card: AssetCard | str | Path, family: Family[Any, Any] | None, config: object, *more: object
) -> None:
    """Check that all ranks ask for the same model: all of them would load what rank 0 finds.

    :raises GangError: they do not; the message names the model of each.
    """
    if gangs.root.channel is None:
        return
    asked: object = str(card)
    if isinstance(card, AssetCard):  # its fields may be secret
        asked = f"the card {card.name} with the fields {digest(card.fields()).hex()[:16]}"
    elif isinstance(card, Path):
        asked = card.absolute()

    gangs.root.same(
        {"model": asked, "family": None if family is None else family.name, "config": config, "options": more}, "model"
    )


def load_options(
    *, revision: str | None = None, restrict: bool = True, **keywords: Unpack[LoadKeywords]
) -> LoadOptions:
    """Return the options that the keywords of a load ask for.

    :raises ValueError: both ``gangs`` and ``device``, or a meta device; or ``mmap`` with ``cooperative`` or ``stream``.
    :raises TypeError: ``gangs`` or ``dtype`` is of another type.
    """
    verify = keywords.get("verify", "auto")
    mmap, cooperative = keywords.get("mmap", False), keywords.get("cooperative", False)
    require_mode(verify)
    if mmap and cooperative:
        raise ValueError("`mmap` and `cooperative` must not be given together: mapped files are not read")
    stream = keywords.get("stream")
    if stream is not None and not is_stream_mode(stream):
        raise ValueError(f"`stream` must be True, False or 'auto', but is {stream!r}")
    if mmap and stream is True:
        raise ValueError("`mmap` and `stream` must not be given together: only files on this machine are mapped")

    effective = _effective_gangs(keywords.get("gangs"), keywords.get("device"))

    return LoadOptions(
        gangs=effective,
        dtype=_effective_dtype(keywords.get("dtype")),
        settings=agreed(effective, Settings.from_environment),
        mmap=mmap,
        progress=keywords.get("progress", True),
        verify=verify,
        cooperative=cooperative,
        stream=stream,
        revision=revision,
        restrict=restrict,
    )


def _effective_gangs(gangs: Gangs | None, device: torch.device | str | None) -> Gangs:
    if gangs is not None:
        if not isinstance(gangs, Gangs):
            raise TypeError(
                f"`gangs` must be Gangs, as `create_gangs` makes them, but is of type {type(gangs).__name__}"
            )
        if device is not None:
            raise ValueError("`gangs` and `device` must not be given together: gangs have their own device")
        if gangs.root.device.type == "meta":
            raise ValueError("`gangs` must be on a device that holds data, but are on the meta device")
        return gangs

    return create_fake_gangs(require_usable(get_current_device() if device is None else device))


def _effective_dtype(dtype: torch.dtype | str | None) -> DType:
    if dtype is None:
        return torch.get_default_dtype()
    found = parse_dtype(dtype)
    if isinstance(found, torch.dtype) and not found.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point dtype, but is {found}")

    return found
