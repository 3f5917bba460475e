"""A model hub for PyTorch whose catalog is a SQLite database.

The names below are all that is public here; they are imported when they are first used, as torch alone takes longer
than a question to the catalog.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lading.version import __version__ as __version__

if TYPE_CHECKING:
    from lading.adoption import Adoption as Adoption
    from lading.adoption import adopt_checkpoints as adopt_checkpoints
    from lading.card import Architecture as Architecture
    from lading.card import AssetCard as AssetCard
    from lading.card import AssetCardField as AssetCardField
    from lading.catalog.doors import import_cards as import_cards
    from lading.catalog.doors import query as query
    from lading.catalog.store import AssetStore as AssetStore
    from lading.catalog.store import get_asset_store as get_asset_store
    from lading.check import CheckReport as CheckReport
    from lading.diff import DiffReport as DiffReport
    from lading.doors import check_model as check_model
    from lading.doors import diff_models as diff_models
    from lading.doors import plan_load as plan_load
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
    from lading.export import ExportReport as ExportReport
    from lading.export import convert_checkpoint as convert_checkpoint
    from lading.export import export_model as export_model
    from lading.family import Family as Family
    from lading.gangs import Gang as Gang
    from lading.gangs import Gangs as Gangs
    from lading.gangs import create_fake_gangs as create_fake_gangs
    from lading.gangs import create_gangs as create_gangs
    from lading.gangs import simulate_gangs as simulate_gangs
    from lading.holdings import DiskUsage as DiskUsage
    from lading.holdings import Holding as Holding
    from lading.holdings import disk_usage as disk_usage
    from lading.hub import GlobalModelLoader as GlobalModelLoader
    from lading.hub import ModelHub as ModelHub
    from lading.hub import ModelHubAccessor as ModelHubAccessor
    from lading.hub import load_model as load_model
    from lading.keymap import Rule as Rule
    from lading.locate import index_checkpoint as index_checkpoint
    from lading.manifest import Manifest as Manifest
    from lading.nn.sharding import ParallelPlan as ParallelPlan
    from lading.nn.sharding import Split as Split
    from lading.nn.sharding import Stages as Stages
    from lading.planning import LoadPlan as LoadPlan
    from lading.pull import PullReport as PullReport
    from lading.pull import pull_model as pull_model
    from lading.removal import Removal as Removal
    from lading.removal import remove_model as remove_model
    from lading.removal import remove_orphans as remove_orphans
    from lading.repack import RepackReport as RepackReport
    from lading.repack import repack_model as repack_model
    from lading.report import LoadReport as LoadReport
    from lading.tokenizer import load_tokenizer as load_tokenizer
    from lading.verify import VerifyReport as VerifyReport
    from lading.verify import verify_model as verify_model

_HOME = {
    "Adoption": "adoption",
    "adopt_checkpoints": "adoption",
    "AssetCard": "card",
    "AssetCardField": "card",
    "Architecture": "card",
    "import_cards": "catalog.doors",
    "query": "catalog.doors",
    "AssetStore": "catalog.store",
    "get_asset_store": "catalog.store",
    "CheckReport": "check",
    "index_checkpoint": "locate",
    "DiffReport": "diff",
    "check_model": "doors",
    "diff_models": "doors",
    "plan_load": "doors",
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
    "convert_checkpoint": "export",
    "export_model": "export",
    "ExportReport": "export",
    "Family": "family",
    "Gang": "gangs",
    "Gangs": "gangs",
    "create_fake_gangs": "gangs",
    "create_gangs": "gangs",
    "simulate_gangs": "gangs",
    "DiskUsage": "holdings",
    "Holding": "holdings",
    "disk_usage": "holdings",
    "GlobalModelLoader": "hub",
    "ModelHub": "hub",
    "ModelHubAccessor": "hub",
    "load_model": "hub",
    "Rule": "keymap",
    "Removal": "removal",
    "remove_model": "removal",
    "remove_orphans": "removal",
    "LoadPlan": "planning",
    "pull_model": "pull",
    "PullReport": "pull",
    "repack_model": "repack",
    "RepackReport": "repack",
    "load_tokenizer": "tokenizer",
    "verify_model": "verify",
    "VerifyReport": "verify",
    "LoadReport": "report",
    "Manifest": "manifest",
    "ParallelPlan": "nn.sharding",
    "Split": "nn.sharding",
    "Stages": "nn.sharding",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value

    return value


def __dir__() -> list[str]:
    return sorted(__all__)
