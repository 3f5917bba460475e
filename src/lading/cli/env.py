"""`lading env`."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from lading.cli.command import command
from lading.cli.options import one_object
from lading.cli.output import write_json, write_pairs
from lading.errors import LadingError
from lading.system.display import counted
from lading.system.uris import shown_uri

_PACKAGES = ("torch", "sqlalchemy", "safetensors", "huggingface_hub", "transformers", "obstore")

_SHOWN = frozenset(
    {
        "LADING_CARDS", "LADING_ENV", "LADING_CACHE_DIR", "LADING_OFFLINE", "LADING_HUGE_PAGES", "HF_HOME",
        "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES",
    }
)  # fmt: skip
"""The variables whose values are shown: they hold no secrets."""

_NAMED = re.compile(
    r"(LADING|HF|HUGGING_FACE|AWS|GOOGLE|AZURE)_\w+|CUDA_VISIBLE_DEVICES|(https?|all|no)_proxy", re.IGNORECASE
)
"""The variables that change what lading does, and those that look as if they did."""


@command("env")
@one_object
def env(as_json: bool) -> None:
    """Print the information for a bug report.

    These are versions, paths and settings. Values that may hold a secret are not shown. Neither torch is imported nor
    the catalog opened.

    For example: lading env --json
    """
    from lading.system.version import __version__

    found: dict[str, object] = {
        "lading": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "cuda": _torch_cuda(),
        "nvidia_driver": _driver(),
        "sqlite": sqlite3.sqlite_version,
        "extras": _installed_extras(),
        **_places(),
    }
    variables = dict(_variables())
    if as_json:
        write_json({**found, "environment": variables})
    else:
        lines = {name: ", ".join(value) or None if isinstance(value, list) else value for name, value in found.items()}
        write_pairs({**lines, **variables})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _installed_extras() -> list[str]:
    """Return the extras whose packages are all installed, of whatever version; none if lading runs from its source."""
    from lading.system.version import DISTRIBUTION

    try:
        found = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return []
    needs = found.requires or ()

    return [extra for extra in found.metadata.get_all("Provides-Extra") or () if _is_installed(extra, needs)]


def _is_installed(extra: str, needs: Iterable[str]) -> bool:
    mark = re.compile(rf"""extra == ["']{re.escape(extra)}["']""")
    names = [found[0] for need in needs if mark.search(need) and (found := re.match(r"[\w.-]+", need))]

    return all(_version(name) is not None for name in names)


def _torch_cuda() -> str | None:
    """Return the version of CUDA that torch was built for; ``None`` if it was built without, or is not installed."""
    torch = find_spec("torch")
    for folder in () if torch is None else torch.submodule_search_locations or ():
        version = Path(folder, "version.py")
        if version.is_file() and (found := re.search(r"^cuda\b.*= '(.+)'$", version.read_text(), re.MULTILINE)):
            return found[1]

    return None


def _driver() -> str | None:
    """Return the version of NVIDIA's driver and the number of its devices, as Linux tells them."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        devices = sum(1 for _ in Path("/proc/driver/nvidia/gpus").iterdir())
    except OSError:
        return None
    found = re.search(r"\b\d+(\.\d+)+\b", text)

    return f"{found[0] if found else 'unknown'}, {counted(devices, 'device')}"


def _places() -> Mapping[str, object]:
    """Return the places of the catalog, the cache and the cards, or what is wrong with the settings that name them."""
    from lading.catalog.database.target import Target
    from lading.system.settings import Settings

    try:
        settings = Settings.from_environment()
    except LadingError as error:
        return {"problem": error.message}
    places = {"cache": str(settings.cache_dir), "cards": [str(path) for path in settings.card_paths]}
    try:
        target = Target.from_url(settings.database_url)
    except LadingError as error:
        return {"problem": error.message, **places}

    return {"catalog": str(target), **places}


def _variables() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if _NAMED.fullmatch(name):
            yield name, shown_uri(value) if name in _SHOWN else "set, not shown"
