"""Any sequence of imports, against a model of a few lines: who owns a name, and what a card resolves to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lading.cards.card import CardEntry
from lading.cards.card_file import CardFile
from lading.catalog.database.database import Database
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.importing.derived import stale_columns
from lading.catalog.open import open_catalog
from lading.catalog.query import run_query as query
from lading.catalog.store import AssetStore
from lading.errors import AssetCardError, CardFileError
from tests.helpers.catalog_tools import settings_in

NAMES = "abcde"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder: Path = tmp_path_factory.mktemp("seeds")
    with mock.patch.object(refresh, "files", return_value=folder):
        return open_catalog(settings_in(folder, database_url="sqlite://"))


Content = dict[str, object]
cards = st.dictionaries(
    st.sampled_from(NAMES),
    st.fixed_dictionaries(
        {},
        optional={
            "base": st.sampled_from([*NAMES, "nowhere"]),
            "model_family": st.sampled_from(["one", "two", 3]),
            "checkpoint": st.sampled_from(["hg://x", "./relative", None]),
        },
    ),
    max_size=len(NAMES),
)
imports = st.lists(st.tuples(st.sampled_from(["x", "y"]), cards, st.booleans()), max_size=6)


@dataclass
class Model:
    """What the catalog should hold: the owner and the content of each name."""

    rows: dict[str, tuple[str, Content]] = field(default_factory=dict)

    def take(self, source: str, cards: dict[str, Content], replace: bool) -> bool:
        """Import; false, and nothing done, where that should fail."""
        rows = {name: row for name, row in self.rows.items() if row[0] != source or name in cards}
        for name, content in cards.items():
            owner, known = rows.get(name, (source, content))
            if owner != source and (content != known or content.get("checkpoint") == "./relative"):
                if not replace:
                    return False
                owner = source
            if owner == source:
                rows[name] = (source, content)

        for name in rows:
            seen = {name}
            at = rows[name][1].get("base")
            while isinstance(at, str) and at in rows:
                if at in seen:
                    return False
                seen.add(at)
                at = rows[at][1].get("base")

        self.rows = rows
        return True


@given(imports)
def test_any_sequence_of_imports(database: Database, steps: list[tuple[str, dict[str, Content], bool]]) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("DELETE FROM sources")

    model = Model()
    for source, cards, replace in steps:
        entries = tuple(
            CardEntry(name=name, metadata=content, folder=Path("/", source), source=f"{source}.yaml[{i}]")
            for i, (name, content) in enumerate(cards.items())
        )
        file = CardFile(
            source=f"file:///{source}/{source}.yaml", sha256="", cards=entries, architectures=(), problems=()
        )
        before = model.rows.keys()
        try:
            report = import_files(database, [file], replace=replace)
        except CardFileError:
            assert not model.take(source, cards, replace)
        else:
            assert model.take(source, cards, replace)
            assert set(report.added) == model.rows.keys() - before
            assert set(report.removed) == before - model.rows.keys()
            assert {*report.added, *report.changed, *report.unchanged} == cards.keys()

        store = AssetStore(database)
        assert {e.name: (e.folder.name if e.folder else "", e.metadata) for e in store.entries()[0]} == model.rows
        with database.session() as session:
            assert stale_columns(session) == []
        for name, family, problem in query(database, "SELECT name, family, problem FROM assets").rows:
            try:
                found = store.retrieve_card(str(name)).maybe_get_field("model_family")
            except AssetCardError:
                assert problem is not None
            else:
                assert family == (found.value if found is not None and isinstance(found.value, str) else None)
