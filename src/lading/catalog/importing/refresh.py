"""The update of a catalog at its opening: registered families, the package's cards, the user's card files.

An opening without news costs a few milliseconds: it hashes the package's files and the user's small ones, looks at the
state of larger ones, and writes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from lading.cards.documents.document import MAX_FILE_BYTES
from lading.catalog.database.statements import intact
from lading.catalog.importing.apply import apply
from lading.catalog.importing.write import forget
from lading.catalog.records import newer, now
from lading.catalog.schema import FAMILIES, SOURCES, FamilyRow, SourceRow
from lading.system.entry_points import FAMILIES_GROUP, registered
from lading.system.filesystem import FileStat, path_exists, read_regular
from lading.system.settings import Settings
from lading.system.uris import path_uri, uri_path
from lading.system.version import __version__

if TYPE_CHECKING:
    from lading.cards.card_file import CardFile

SUFFIXES = (".yaml", ".yml", ".jsonl")
"""The endings of card files."""

_SEEDS = "lading.seeds"
"""The package with lading's own card files; and the group of the entry points that name such packages of others."""

_HASHED = 8 << 20
"""The largest size in bytes at which lading compares a card file by content, as a copy can have the size and the times
of another file. It reads a larger one again if its status changed after the import: machines that share a catalog see
different times, so the catalog does not record them."""

_log = logging.getLogger("lading")


def card_files(path: Path) -> Iterator[Path]:
    """Yield the card files in a folder and the folders below it, by name; or ``path`` itself, if it is not a folder.

    This skips hidden entries, such as ``.github`` in a repository or ``..data`` in a volume of Kubernetes.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # missing, or not readable for this user, as in another's home
        return
    if not stat.S_ISDIR(mode):
        yield path
        return

    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The differences between the catalog and the world."""

    families: Mapping[str, str | None]
    """The changed entry points of families; ``None`` for one that no package registers any more."""
    seeds: Mapping[str, bytes] | None
    """The card files of packages by URI, if any of them changed."""
    changed: Mapping[str, FileStat]
    """The user's card files that changed, and their state."""
    gone: frozenset[str]
    """The user's card files that no longer exist."""
    warnings: Mapping[str, str]
    """Warnings about card files, by their URI or by their folder."""

    def __bool__(self) -> bool:
        return bool(self.families or self.seeds is not None or self.changed or self.gone)


def find_changes(session: Session, settings: Settings) -> Changes:
    """Compare the catalog with the world."""
    sources = {row.uri: row for row in session.execute(select(SOURCES))}
    changed, gone, warnings = _user_news(sources, settings)

    return Changes(
        families=_family_news(session), seeds=_seed_news(sources), changed=changed, gone=gone, warnings=warnings
    )


def apply_changes(session: Session, settings: Settings) -> None:
    """Update the catalog; log what is wrong in a file of the user, and import the rest."""
    news = find_changes(session, settings)
    _take(session, news)
    warnings = dict(news.warnings)
    # A withdrawn row may have hidden that of another file, which has to be read again.
    again = find_changes(session, settings)
    _take(session, again)
    for uri in again.changed:
        warnings.pop(uri, None)
    for line in warnings.values():
        _log.warning("%s", line)


def _take(session: Session, news: Changes) -> None:
    _take_families(session, news.families)
    if news.seeds is not None:
        _take_seeds(session, news.seeds)
    if news.changed or news.gone:
        _take_user_files(session, news)


# --- families ---------------------------------------------------------------------------------------------------------


def _family_news(session: Session) -> dict[str, str | None]:
    present = {entry.name: entry.value for entry in registered(FAMILIES_GROUP)}
    with intact("a family"):
        known = {row.name: row.entry_point for row in session.execute(select(FAMILIES))}
    lost = [name for name, entry_point in known.items() if entry_point is not None and name not in present]

    return {name: value for name, value in present.items() if known.get(name) != value} | dict.fromkeys(lost)


def _take_families(session: Session, families: Mapping[str, str | None]) -> None:
    for name, entry_point in families.items():
        row = session.get(FamilyRow, name)
        if row is None:
            session.add(FamilyRow(name=name, entry_point=entry_point))
        else:
            row.entry_point = entry_point
    if None in families.values():
        forget(session, ())


# --- the package's cards ----------------------------------------------------------------------------------------------


def _seed_news(sources: Mapping[str, Row[Any]]) -> dict[str, bytes] | None:
    seeds = {
        f"package:{_SEEDS}/{file.name}": file.read_bytes()
        for file in files(_SEEDS).iterdir()
        if file.name.endswith(SUFFIXES)
    }
    for entry in registered(_SEEDS):
        try:
            folder = _package_folder(entry.module)
            seeds |= {
                f"package:{entry.module}/{file.name}": file.read_bytes()
                for file in sorted(folder.iterdir())
                if file.name.endswith(SUFFIXES)
            }
        except (ImportError, OSError, ValueError) as error:  # the mistake of another package must not close the catalog
            _log.warning(
                "The cards of the package %s, entry point %r, are not read: %s", entry.module, entry.name, error
            )
    stored = {uri: row for uri, row in sources.items() if row.kind == "seed"}
    if {uri: row.sha256 for uri, row in stored.items()} == {uri: _sha256(data) for uri, data in seeds.items()}:
        return None
    # Two versions of lading may share a catalog: the older one does not undo the newer one's cards.
    if any(newer(row.version, __version__) for row in stored.values()):
        return None

    return seeds


def _package_folder(package: str) -> Path:
    """Return the folder of a package without importing it, as that may import torch.

    :raises ModuleNotFoundError: the package does not exist.
    """
    top, *inner = package.split(".")
    spec = importlib.util.find_spec(top)
    for location in () if spec is None else spec.submodule_search_locations or ():
        folder = Path(location, *inner)
        if folder.is_dir():
            return folder

    raise ModuleNotFoundError(f"the package {package!r} does not exist")


def _take_seeds(session: Session, seeds: Mapping[str, bytes]) -> None:
    stored = session.scalars(select(SourceRow.uri).where(SourceRow.kind == "seed"))
    report = apply(
        session,
        [_parse(uri, data, folder=None) for uri, data in sorted(seeds.items())],
        kind="seed",
        keep_going=True,
        gone=set(stored) - seeds.keys(),
    )
    for line in report.problems:
        _log.warning("A card that comes with a package was left out: %s", line)


# --- the user's cards -------------------------------------------------------------------------------------------------


def _user_news(
    sources: Mapping[str, Row[Any]], settings: Settings
) -> tuple[dict[str, FileStat], frozenset[str], dict[str, str]]:
    """Compare the sources with the user's card files: those that changed, those that are gone, and what to say."""
    changed: dict[str, FileStat] = {}
    warnings: dict[str, str] = {}
    present: set[str] = set()

    for file in (file for path in settings.card_paths for file in card_files(path)):
        uri = path_uri(file)
        present.add(uri)
        row = sources.get(uri)
        try:
            uri.encode()
            found, same = _compare(file, row)
        except OSError as error:  # not a regular file, not readable for this user, or a dangling link
            kept = "" if row is None or row.kind != "user" else "; its cards stay in the catalog"
            warnings[uri] = f"The card file {file} cannot be read{kept}: {error.strerror or error}."
            continue
        except UnicodeEncodeError:
            warnings[uri] = f"The card file {str(file)!r} is not imported, as its name is not Unicode text. Rename it."
            continue
        if not same:
            changed[uri] = found
        elif row is not None and row.problems is not None and row.kind == "user":
            warnings[uri] = f"Not all of the card file {file} is in the catalog: {row.problems}"

    gone: set[str] = set()
    for uri, row in sources.items():
        path = uri_path(uri)
        if row.kind != "user" or uri in present or path is None:
            continue
        watched = next((top for top in settings.card_paths if path.is_relative_to(top)), None)
        folder, out_of_sight = _out_of_sight(path, watched)
        if out_of_sight is None:
            gone.add(uri)
        elif watched is not None and (watched == settings.card_paths[0] or path_exists(watched)):
            # The store warns if nothing is at the path in LADING_CARDS.
            warnings[str(folder)] = (
                f"The cards from {folder} stay in the catalog: {out_of_sight}. To remove them, make "
                "it a folder with any other file in it."
            )

    return changed, frozenset(gone), warnings


def _compare(file: Path, row: Row[Any] | None) -> tuple[FileStat, bool]:
    """Return the state of a card file, and whether its content is the one that ``row`` records.

    :raises OSError: it cannot be read.
    """
    found = FileStat.from_stat(os.stat(file))
    # This refuses a file that is too large, which would otherwise count as changed each time.
    large = _HASHED < found.size <= MAX_FILE_BYTES
    data = None if large else read_regular(file, at_most=MAX_FILE_BYTES)
    if row is None or (row.size, row.mtime_ns) != (found.size, found.mtime_ns):
        return found, False

    if data is None:
        return found, found.ctime_ns < datetime.fromisoformat(row.imported_at).timestamp() * 1e9

    return found, _sha256(data) == row.sha256


def _out_of_sight(path: Path, watched: Path | None) -> tuple[Path, str | None]:
    """Return the folder that should show whether a card file is gone, and why it does not; ``None`` if it is gone.

    Only a readable folder with other contents proves that a file is gone: a missing one may be a share that is not
    mounted, and an empty one its mount point.

    :param watched: the folder or the file by which ``path`` is watched; ``None`` if it no longer is.
    """
    folder = path.parent
    try:
        os.lstat(path)
        return folder, "it is not watched"
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            return folder, f"it cannot be looked at ({error.strerror})"

    while True:
        try:
            with os.scandir(folder) as entries:
                if next(entries, None) is not None:
                    return folder, None
            return folder, "it is empty, like the folder of a share that is not mounted"
        except FileNotFoundError:
            if watched is None or not folder.is_relative_to(watched) or folder == watched:
                return folder, "it does not exist, like a share that is not mounted"
            folder = folder.parent
        except OSError as error:
            return folder, f"it cannot be read ({error.strerror})"


def _take_user_files(session: Session, news: Changes) -> None:
    known = {row.uri: row for row in session.scalars(select(SourceRow))}
    parsed: list[CardFile] = []

    for uri, found in news.changed.items():
        path = uri_path(uri)
        assert path is not None
        try:
            data = read_regular(path, at_most=MAX_FILE_BYTES)
        except OSError as error:
            _log.warning("The card file %s cannot be read, so its cards were not imported: %s", path, error)
            continue
        row = known.get(uri)
        if row is not None and row.sha256 == _sha256(data):
            row.kind, row.size, row.mtime_ns, row.imported_at = "user", found.size, found.mtime_ns, now()
        else:
            parsed.append(_parse(uri, data, folder=path.parent))

    report = apply(session, parsed, kind="user", keep_going=True, stats=news.changed, gone=news.gone)
    for line in report.warnings:
        _log.warning("%s", line)
    for line in report.problems:
        _log.warning("Not all of your cards were imported: %s", line)


def _parse(uri: str, data: bytes, *, folder: Path | None) -> CardFile:
    # Reading YAML imports many modules, and most openings read no YAML.
    from lading.cards.card_file import parse

    return parse(data, source=uri, folder=folder, label=uri.rpartition("/")[2], json_lines=uri.endswith(".jsonl"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
