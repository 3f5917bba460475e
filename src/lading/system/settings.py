"""Settings of this process, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal, Self

import platformdirs

from lading.errors import SettingsError
from lading.system.filesystem import NO_HOME, expand_home, location_id, storage_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of this process; hashable, so that a catalog can be kept per settings."""

    database_url: str | None = field(repr=False)  # may hold a password
    """The SQLAlchemy URL of the catalog. ``LADING_DATABASE_URL``; default: ``catalog.sqlite`` in the platform's data
    folder; ``None`` if the user has no home folder."""
    cache_dir: Path
    """The folder of fetched files. ``LADING_CACHE_DIR``; default: the platform's cache folder."""
    card_paths: tuple[Path, ...]
    """Folders and files of the user's own cards: ``<config folder>/cards``, then ``LADING_CARDS`` (a path list)."""
    env: str | None
    """The default environment, whose overlays (``name@env``) apply to cards. ``LADING_ENV``."""
    offline: bool
    """True if no socket may be opened. ``LADING_OFFLINE`` or ``HF_HUB_OFFLINE``, the latter as huggingface_hub reads
    it."""
    huge_pages: Literal["auto", "always", "never"] = "auto"
    """The page size of the memory that a load fills: as large as is cheap, always large, or always small.
    ``LADING_HUGE_PAGES``."""

    @property
    def catalog_id(self) -> str:
        """The id of the catalog, by which a shared cache keeps its entries apart; empty for a catalog in memory.

        It is derived from the location of the database, as nothing in a catalog distinguishes it from its copies.
        """
        if self.database_url is None:
            return ""
        scheme, _, rest = self.database_url.partition("://")
        if scheme.partition("+")[0] != "sqlite":
            # The user, the password and the driver's parameters do not identify the database.
            text = f"{scheme.partition('+')[0]}://{rest.rpartition('@')[2].partition('?')[0]}"
        else:
            name = rest.removeprefix("/")
            if name in ("", ":memory:"):
                return ""
            path = Path(os.path.realpath(storage_path(name)))
            text = f"{location_id(path.parent)}:{path}"

        return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read the settings from ``environ`` (default: the process's environment).

        :raises SettingsError: ``LADING_OFFLINE`` or ``LADING_HUGE_PAGES`` has an invalid value.
        """
        env = os.environ if environ is None else environ

        data = _folder(platformdirs.user_data_path)
        cards = [_folder(platformdirs.user_config_path) / "cards"]
        cards += [expand_home(p).absolute() for p in env.get("LADING_CARDS", "").split(os.pathsep) if p.strip()]
        cache = env.get("LADING_CACHE_DIR", "").strip()

        return cls(
            database_url=env.get("LADING_DATABASE_URL", "").strip()
            or (None if data.is_relative_to(NO_HOME) else f"sqlite:///{data / 'catalog.sqlite'}"),
            cache_dir=storage_path(cache) if cache else _folder(platformdirs.user_cache_path),
            card_paths=tuple(cards),
            env=env.get("LADING_ENV", "").strip() or None,
            offline=_switch("LADING_OFFLINE", env.get("LADING_OFFLINE", ""))
            or _hub_switch(env.get("HF_HUB_OFFLINE", "")),
            huge_pages=_huge_pages(env.get("LADING_HUGE_PAGES", "")),
        )


def _folder(find: Callable[..., Path]) -> Path:
    """Return lading's folder by the conventions of the platform; below :data:`NO_HOME` if the user has no home."""
    try:
        return storage_path(find("lading", appauthor=False))
    except RuntimeError:  # HOME is not an absolute path, and the user has no entry in passwd
        return NO_HOME / "lading"


_YES = ("1", "true", "yes", "on", "y")
_NO = ("0", "false", "no", "off", "n")


def _switch(name: str, value: str) -> bool:
    word = value.strip().lower()
    if word and word not in _YES + _NO:
        # Reading it as "no" would open connections that the user may have meant to forbid.
        raise SettingsError(
            f"{name} is expected to be one of {', '.join(_YES)}, or of {', '.join(_NO)}, but is {value!r}. Set it to "
            "one of these, or unset it."
        )

    return word in _YES


def _huge_pages(value: str) -> Literal["auto", "always", "never"]:
    match value.strip().lower():
        case "" | "auto":
            return "auto"
        case "always":
            return "always"
        case "never":
            return "never"

    raise SettingsError(
        f"LADING_HUGE_PAGES is expected to be auto, always or never, but is {value!r}. Set it to one of these, or "
        "unset it."
    )


def _hub_switch(value: str) -> bool:
    """Return whether ``huggingface_hub.constants`` reads ``value`` as true; it reads anything else as false."""
    return value.upper() in {"1", "ON", "YES", "TRUE"}
