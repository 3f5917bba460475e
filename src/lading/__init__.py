"""A model hub for PyTorch whose catalog is a SQLite database.

The names below are all that is public here; they are imported when they are first used, as torch alone takes longer
than a question to the catalog.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lading.system.deferred import deferred
from lading.system.version import __version__ as __version__

if TYPE_CHECKING:
    from lading import catalog as catalog
    from lading.cards.card import Architecture as Architecture
    from lading.cards.card import AssetCard as AssetCard
    from lading.cards.card import AssetCardField as AssetCardField
    from lading.catalog.edit_cards import remove_cards as remove_cards
    from lading.catalog.edit_cards import rename_card as rename_card
    from lading.catalog.import_cards import import_cards as import_cards
    from lading.catalog.own_store import CardStore as CardStore
    from lading.catalog.query import QueryResult as QueryResult
    from lading.catalog.query import query as query
    from lading.catalog.records import CardChange as CardChange
    from lading.catalog.store import AssetStore as AssetStore
    from lading.catalog.store import get_asset_store as get_asset_store
    from lading.checkpoints.locate import index_checkpoint as index_checkpoint
    from lading.errors import AssetCardError as AssetCardError
    from lading.errors import AssetNotFoundError as AssetNotFoundError
    from lading.errors import CardFileError as CardFileError
    from lading.errors import CatalogError as CatalogError
    from lading.errors import CatalogOutdatedError as CatalogOutdatedError
    from lading.errors import CorruptModelCheckpointError as CorruptModelCheckpointError
    from lading.errors import DigestMismatchError as DigestMismatchError
    from lading.errors import FetchError as FetchError
    from lading.errors import GangError as GangError
    from lading.errors import InternalError as InternalError
    from lading.errors import LadingError as LadingError
    from lading.errors import ModelArchitectureNotKnownError as ModelArchitectureNotKnownError
    from lading.errors import ModelCheckpointError as ModelCheckpointError
    from lading.errors import ModelCheckpointMismatchError as ModelCheckpointMismatchError
    from lading.errors import ModelConfigError as ModelConfigError
    from lading.errors import ModelFamilyNotKnownError as ModelFamilyNotKnownError
    from lading.errors import ModelGatedError as ModelGatedError
    from lading.errors import ModelNotKnownError as ModelNotKnownError
    from lading.errors import NotSupportedError as NotSupportedError
    from lading.errors import PolicyError as PolicyError
    from lading.errors import QueryError as QueryError
    from lading.errors import TorchNotFoundError as TorchNotFoundError
    from lading.formats.manifest import Manifest as Manifest
    from lading.gangs import Gang as Gang
    from lading.gangs import Gangs as Gangs
    from lading.gangs import create_fake_gangs as create_fake_gangs
    from lading.gangs import create_gangs as create_gangs
    from lading.gangs import simulate_gangs as simulate_gangs
    from lading.models.accessor import ModelHubAccessor as ModelHubAccessor
    from lading.models.device import CPU as CPU
    from lading.models.device import DataType as DataType
    from lading.models.device import Device as Device
    from lading.models.device import get_current_device as get_current_device
    from lading.models.family import Family as Family
    from lading.models.family import register_family as register_family
    from lading.models.fit import CheckReport as CheckReport
    from lading.models.hub import GlobalModelLoader as GlobalModelLoader
    from lading.models.hub import ModelHub as ModelHub
    from lading.models.hub import load_model as load_model
    from lading.models.parallel_plan import ParallelPlan as ParallelPlan
    from lading.models.parallel_plan import Split as Split
    from lading.models.parallel_plan import Stages as Stages
    from lading.models.report import LoadReport as LoadReport
    from lading.models.resolve import get_model_family_name as get_model_family_name
    from lading.models.targets import Buffer as Buffer
    from lading.models.tokenizers.load import load_tokenizer as load_tokenizer
    from lading.models.tokenizers.tokenizer import TokenDecoder as TokenDecoder
    from lading.models.tokenizers.tokenizer import TokenEncoder as TokenEncoder
    from lading.models.tokenizers.tokenizer import Tokenizer as Tokenizer
    from lading.models.tokenizers.vocabulary import VocabularyInfo as VocabularyInfo
    from lading.operations.add import AddedCard as AddedCard
    from lading.operations.add import add_checkpoints as add_checkpoints
    from lading.operations.adopt import Adoption as Adoption
    from lading.operations.adopt import adopt_checkpoints as adopt_checkpoints
    from lading.operations.check import check_model as check_model
    from lading.operations.diff import DiffReport as DiffReport
    from lading.operations.diff import diff_models as diff_models
    from lading.operations.digests import DigestReport as DigestReport
    from lading.operations.digests import read_digests as read_digests
    from lading.operations.digests import write_digests as write_digests
    from lading.operations.disk_usage import DiskUsage as DiskUsage
    from lading.operations.disk_usage import DiskUsageEntry as DiskUsageEntry
    from lading.operations.disk_usage import disk_usage as disk_usage
    from lading.operations.export import ExportReport as ExportReport
    from lading.operations.export import convert_checkpoint as convert_checkpoint
    from lading.operations.export import export_model as export_model
    from lading.operations.plan import LoadPlan as LoadPlan
    from lading.operations.plan import plan_load as plan_load
    from lading.operations.pull import PullReport as PullReport
    from lading.operations.pull import pull_model as pull_model
    from lading.operations.register import register_model as register_model
    from lading.operations.relocate import relocate_checkpoints as relocate_checkpoints
    from lading.operations.remove import Removal as Removal
    from lading.operations.remove import remove_model as remove_model
    from lading.operations.remove import remove_orphans as remove_orphans
    from lading.operations.training_checkpoints import register_checkpoint_models as register_checkpoint_models
    from lading.operations.verify import VerifyReport as VerifyReport
    from lading.operations.verify import verify_model as verify_model
    from lading.planning.rules import Rule as Rule

_HOME = {
    "AddedCard": "operations.add",
    "add_checkpoints": "operations.add",
    "register_model": "operations.register",
    "register_checkpoint_models": "operations.training_checkpoints",
    "CardChange": "catalog.records",
    "remove_cards": "catalog.edit_cards",
    "rename_card": "catalog.edit_cards",
    "relocate_checkpoints": "operations.relocate",
    "Adoption": "operations.adopt",
    "adopt_checkpoints": "operations.adopt",
    "AssetCard": "cards.card",
    "AssetCardField": "cards.card",
    "Architecture": "cards.card",
    "import_cards": "catalog.import_cards",
    "query": "catalog.query",
    "QueryResult": "catalog.query",
    "AssetStore": "catalog.store",
    "CardStore": "catalog.own_store",
    "get_asset_store": "catalog.store",
    "CheckReport": "models.fit",
    "index_checkpoint": "checkpoints.locate",
    "DiffReport": "operations.diff",
    "check_model": "operations.check",
    "diff_models": "operations.diff",
    "plan_load": "operations.plan",
    "AssetCardError": "errors",
    "AssetNotFoundError": "errors",
    "CardFileError": "errors",
    "CatalogError": "errors",
    "CatalogOutdatedError": "errors",
    "CorruptModelCheckpointError": "errors",
    "DigestMismatchError": "errors",
    "FetchError": "errors",
    "GangError": "errors",
    "InternalError": "errors",
    "LadingError": "errors",
    "ModelArchitectureNotKnownError": "errors",
    "ModelCheckpointError": "errors",
    "ModelCheckpointMismatchError": "errors",
    "ModelConfigError": "errors",
    "ModelFamilyNotKnownError": "errors",
    "ModelGatedError": "errors",
    "ModelNotKnownError": "errors",
    "NotSupportedError": "errors",
    "PolicyError": "errors",
    "QueryError": "errors",
    "RefusedPickleError": "errors",
    "TorchNotFoundError": "errors",
    "convert_checkpoint": "operations.export",
    "export_model": "operations.export",
    "ExportReport": "operations.export",
    "Family": "models.family",
    "register_family": "models.family",
    "get_model_family_name": "models.resolve",
    "CPU": "models.device",
    "DataType": "models.device",
    "Device": "models.device",
    "get_current_device": "models.device",
    "Gang": "gangs",
    "Gangs": "gangs",
    "create_fake_gangs": "gangs",
    "create_gangs": "gangs",
    "simulate_gangs": "gangs",
    "DiskUsage": "operations.disk_usage",
    "DiskUsageEntry": "operations.disk_usage",
    "disk_usage": "operations.disk_usage",
    "GlobalModelLoader": "models.hub",
    "ModelHub": "models.hub",
    "ModelHubAccessor": "models.accessor",
    "load_model": "models.hub",
    "Rule": "planning.rules",
    "Removal": "operations.remove",
    "remove_model": "operations.remove",
    "remove_orphans": "operations.remove",
    "LoadPlan": "operations.plan",
    "pull_model": "operations.pull",
    "PullReport": "operations.pull",
    "load_tokenizer": "models.tokenizers.load",
    "Tokenizer": "models.tokenizers.tokenizer",
    "TokenEncoder": "models.tokenizers.tokenizer",
    "TokenDecoder": "models.tokenizers.tokenizer",
    "VocabularyInfo": "models.tokenizers.vocabulary",
    "verify_model": "operations.verify",
    "VerifyReport": "operations.verify",
    "DigestReport": "operations.digests",
    "read_digests": "operations.digests",
    "write_digests": "operations.digests",
    "LoadReport": "models.report",
    "Manifest": "formats.manifest",
    "Buffer": "models.targets",
    "ParallelPlan": "models.parallel_plan",
    "Split": "models.parallel_plan",
    "Stages": "models.parallel_plan",
}

__all__ = [*_HOME, "__version__", "catalog"]


_get = deferred(globals(), **{name: f"{__name__}.{home}" for name, home in _HOME.items()})


def __getattr__(name: str) -> object:
    return import_module(f"{__name__}.catalog") if name == "catalog" else _get(name)


def __dir__() -> list[str]:
    return sorted(__all__)
