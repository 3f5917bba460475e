"""Imports of card files into the catalog."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

from lading.cards.documents.document import MAX_FILE_BYTES
from lading.catalog.database.database import Database
from lading.catalog.importing.apply import apply
from lading.catalog.importing.changes import PROGRAM, STDIN
from lading.catalog.importing.refresh import card_files
from lading.catalog.memory_cards import MEMORY, remember
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import ImportReport
from lading.system.filesystem import FileStat, UnfitFileError, expand_home, read_regular
from lading.system.uris import path_uri, uri_path

if TYPE_CHECKING:
    from lading.cards.card_file import CardFile


def import_cards(
    *cards: str | Path | Iterable[Mapping[str, object]],
    source: str | None = None,
    replace: bool = False,
    keep_going: bool = False,
    dry_run: bool = False,
    store: CardStore | None = None,
) -> ImportReport:
    """Import cards and architectures from files and folders, or from mappings, in one transaction.

    Importing the same file again applies its changes and removals. A name that another source states with the same
    content stays as it is. An unknown base or family is a warning, as files come in any order; bases that form a cycle
    are a problem.

    :param cards: files and folders; or mappings with the fields of cards and architectures, as in a card file.
    :param source: the name of the source of mappings. Importing it again applies changes and removals; by default,
        only changes. ``"memory"`` keeps them out of the catalog: they last as long as this process, which finds them by
        their names, but does not list them.
    :param replace: replace cards that came from another source.
    :param keep_going: import the good cards of files that also hold bad ones.
    :param dry_run: only report what would change.

    :raises CardFileError: with all problems of all files; nothing was imported.
    :raises FileNotFoundError: a path does not exist.
    :raises CatalogError: the catalog cannot be written.
    :raises TypeError: a mapping holds something else than plain values and paths.
    :raises ValueError: ``source``, for files.
    """
    paths = [each for each in cards if isinstance(each, str | Path)]
    mappings = [mapping for each in cards if not isinstance(each, str | Path) for mapping in each]
    if paths and source is not None:
        raise ValueError("`source` is only for cards in mappings, as a file is a source of its own")
    files = collect(paths)  # a wrong path does not even create a catalog
    if mappings or len(cards) > len(paths):
        files.append(_as_file(mappings, PROGRAM if source is None else source))
    database = open_store(store).database
    if source == MEMORY:
        with database.session() as session:
            return remember(session, files[0], replace=replace, keep_going=keep_going, dry_run=dry_run)

    return import_files(database, files, replace=replace, keep_going=keep_going, dry_run=dry_run)


def _as_file(mappings: Iterable[Mapping[str, object]], source: str) -> CardFile:
    """Return the file of cards that these mappings would make.

    :raises TypeError: a mapping holds something else than plain values and paths.
    """
    from lading.cards.card_file import parse

    lines = "\n".join(json.dumps(mapping, default=_plain) for mapping in mappings)

    return parse(lines.encode(), source=source, label=source, json_lines=True)


def _plain(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a card in a mapping holds plain values and paths, but one has {value!r}")


def collect(paths: Sequence[str | Path], *, stdin: BinaryIO | None = None) -> list[CardFile]:
    """Read card files; the ``problems`` of each say what is wrong with it.

    :param paths: files (JSON Lines if they end in ``.jsonl``, else YAML), folders (their ``*.yaml``, ``*.yml`` and
        ``*.jsonl``, at any depth, hidden ones apart), or ``-`` for ``stdin``, whose first character decides between
        the two formats.

    :raises FileNotFoundError: nothing is at a path, or no card file in a folder.
    :raises OSError: a file cannot be read.
    """
    from lading.cards.card_file import parse, unfit

    files: dict[str, CardFile] = {}  # reads a path that occurs twice only once
    for path in paths:
        if str(path) == "-":
            if stdin is None and sys.stdin is None:
                raise FileNotFoundError(errno.ENOENT, "Nothing can be read, as stdin is closed", "-")
            data = (stdin or sys.stdin.buffer).read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                files[STDIN] = unfit(STDIN, f"{STDIN}: expected at most {MAX_FILE_BYTES:,} bytes, found more")
                continue
            files[STDIN] = parse(data, source=STDIN, label=STDIN, json_lines=data.lstrip().startswith(b"{"))
            continue

        top = expand_home(path).absolute()
        if not top.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        found = list(card_files(top))
        if not found:
            raise FileNotFoundError(errno.ENOENT, "The folder holds no card file (*.yaml, *.yml, *.jsonl)", str(path))
        for file in found:
            uri = path_uri(file)
            label = file.name if file == top else file.relative_to(top).as_posix()
            try:
                data = read_regular(file, at_most=MAX_FILE_BYTES)
            except UnfitFileError as error:
                files[uri] = unfit(uri, f"{label}: {error.strerror}")
                continue
            files[uri] = parse(data, source=uri, folder=file.parent, label=label, json_lines=file.suffix == ".jsonl")

    return list(files.values())


class _DryRun(Exception):  # noqa: N818  (not an error: it ends the transaction without a commit)
    def __init__(self, report: ImportReport) -> None:
        self.report = report


def import_files(
    database: Database,
    files: Sequence[CardFile],
    *,
    kind: str = "import",
    replace: bool = False,
    keep_going: bool = False,
    dry_run: bool = False,
) -> ImportReport:
    """Import files that were read, as :func:`import_cards`.

    :param kind: ``import``, or ``user`` for the watched files.
    """
    try:
        with database.session(write=True) as session:
            report = apply(
                session, files, kind=kind, replace=replace, keep_going=keep_going, stats=_unchanged_since_read(files)
            )
            if dry_run:
                raise _DryRun(report)
    except _DryRun as done:
        return done.report

    return report


def _unchanged_since_read(files: Iterable[CardFile]) -> dict[str, FileStat]:
    """Return the states of files whose content is still as read: only those may be recorded beside the content."""
    stats: dict[str, FileStat] = {}
    for file in files:
        path = uri_path(file.source)
        try:
            if path is not None:
                stat = FileStat.from_stat(os.stat(path))
                if hashlib.sha256(read_regular(path, at_most=MAX_FILE_BYTES)).hexdigest() == file.sha256:
                    stats[file.source] = stat
        except OSError:
            continue

    return stats
