"""The catalog as an ORM: how its rows lead to one another, what goes with what, and the session that only reads."""

from __future__ import annotations

import importlib.util
import re
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import delete, exc, func, insert, inspect, select, text, update
from sqlalchemy.orm import Session

import lading
from lading import PolicyError
from lading.catalog import (
    ArchitectureRow,
    CardCheckpointRow,
    CardRow,
    CheckpointRow,
    CopyRow,
    FamilyRow,
    PieceRow,
    ShardRow,
    SourceRow,
    TensorRow,
    VerificationRow,
)
from lading.catalog import session as open_session
from lading.catalog.checkpoints.record import record_checkpoint, record_files
from lading.catalog.database.database import Database
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.records import Check, CheckpointContents
from lading.catalog.schema import Row
from lading.catalog.store import AssetStore
from lading.errors import CatalogError, InternalError, QueryError
from lading.formats.manifest import Manifest, Piece, Shard
from lading.system.settings import Settings
from tests.helpers.catalog_tools import card_file, make_copies, make_manifest, settings_in, without_seeds

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

CARDS = """\
name: base
model_family: qwen
---
name: qwen3_0.6b
base: base
checkpoint: hg://a/m
---
name: qwen3_4b
base: base
checkpoint: hg://a/n
---
name: other
model_family: llama
---
architecture: big
family: qwen
config: {num_layers: 48}
"""


@pytest.fixture
def database(any_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr(refresh, "files", lambda package: tmp_path / "seeds")
    settings = settings_in(tmp_path)
    monkeypatch.setenv("LADING_DATABASE_URL", settings.database_url or "")
    monkeypatch.setenv("LADING_CARDS", "")
    return make(settings, tmp_path)


@pytest.fixture(scope="module")
def shared_store(shared_databases: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> AssetStore:
    """The same catalog, for tests that do not change it."""
    folder = tmp_path_factory.mktemp("shared")
    with without_seeds():
        return AssetStore(make(settings_in(folder, database_url=shared_databases(folder)), folder))


def make(settings: Settings, folder: Path) -> Database:
    database = open_catalog(settings)
    import_files(database, [card_file(CARDS)])
    manifest = make_manifest()
    copies = make_copies(manifest, folder)
    record_checkpoint(database, CheckpointContents(uri="hg://a/m", manifest=manifest, copies=copies))
    check = Check(
        file=copies[0].file, path=copies[0].path, stat=copies[0].stat, method="sha256", expected="a", found="a"
    )
    record_files(database, uri="hg://a/m", checks=[check])
    return database


@pytest.fixture
def store(database: Database) -> AssetStore:
    return AssetStore(database)


# --- relationships ---------------------------------------------------------------------------------------------------


def test_rows_lead_to_one_another(shared_store: AssetStore) -> None:
    with open_session(shared_store) as s:
        card = s.scalars(select(CardRow).where(CardRow.name == "qwen3_0.6b")).one()
        checkpoint = card.checkpoint
        assert checkpoint is not None
        assert checkpoint.uri == card.checkpoint_uri
        assert checkpoint.cards == [card]
        assert card.link in checkpoint.links
        assert card.family_row is not None
        assert [c.name for c in card.family_row.cards] == ["base", "qwen3_0.6b", "qwen3_4b"]
        assert [a.name for a in card.family_row.architectures] == ["big"]
        assert card.family_row.architectures[0].source is card.source
        assert [c.name for c in card.source.cards] == ["base", "qwen3_0.6b", "qwen3_4b", "other"]
        assert [shard.name for shard in checkpoint.shards] == [shard.name for shard in make_manifest().shards]
        assert sum(len(shard.tensors) for shard in checkpoint.shards) == checkpoint.tensors == 6
        assert checkpoint.shards[1].tensors[0].shard_row is checkpoint.shards[1]
        assert len(checkpoint.copies) == 3
        assert checkpoint.copies[0].checkpoint is checkpoint
        assert [v.result for v in checkpoint.verifications] == ["match"]
        assert checkpoint.verifications[0].checkpoint is checkpoint
        assert not checkpoint.in_pieces


def test_conditions_go_through_relationships(shared_store: AssetStore) -> None:
    with open_session(shared_store) as s:
        where = (CardRow.family == "qwen", CardRow.checkpoint.has(CheckpointRow.bytes < 10e9))
        assert s.scalars(select(CardRow.name).where(*where)).all() == ["qwen3_0.6b"]
        without = select(FamilyRow.name).where(~FamilyRow.cards.any(CardRow.checkpoint.has()))
        assert s.scalars(without.where(FamilyRow.cards.any())).all() == ["llama"]


def test_a_checkpoint_takes_what_cannot_be_without_it(database: Database) -> None:
    with database.session(write=True) as s:
        s.delete(s.scalars(select(CheckpointRow)).one())
    with database.session() as s:
        for row in (CheckpointRow, ShardRow, TensorRow, CopyRow, CardCheckpointRow):
            assert s.scalar(select(func.count()).select_from(row)) == 0
        check = s.scalars(select(VerificationRow)).one()
        assert (check.uri, check.checkpoint) == ("hg://a/m", None)
        assert s.scalars(select(CardRow).where(CardRow.name == "qwen3_0.6b")).one().checkpoint is None


def test_a_source_takes_its_cards_and_architectures(database: Database) -> None:
    with database.session(write=True) as s:
        s.delete(s.scalars(select(SourceRow)).one())
    with database.session() as s:
        assert s.scalars(select(CardRow)).all() == s.scalars(select(ArchitectureRow)).all() == []
        assert s.scalars(select(CheckpointRow.uri)).all() == ["hg://a/m"]


def test_a_family_takes_no_card_with_it(database: Database) -> None:
    def forget() -> None:
        with database.session(write=True) as s:
            s.delete(s.scalars(select(FamilyRow).where(FamilyRow.name == "qwen")).one())

    with pytest.raises((InternalError, CatalogError), match=r"(?i)foreign key"):
        forget()
    with database.session() as s:
        assert s.scalars(select(CardRow.name).where(CardRow.family == "qwen").order_by("name")).all() == [
            "base",
            "qwen3_0.6b",
            "qwen3_4b",
        ]


# --- a session that only reads ---------------------------------------------------------------------------------------


def change_a_card(s: Session) -> None:
    s.scalars(select(CardRow).where(CardRow.name == "qwen3_0.6b")).one().license = "mine"


def commit_a_change(s: Session) -> None:
    change_a_card(s)
    s.commit()


def query_after_a_change(s: Session) -> None:
    s.add(FamilyRow(name="new"))
    s.scalars(select(FamilyRow)).all()


def delete_a_checkpoint(s: Session) -> None:
    s.delete(s.scalars(select(CheckpointRow)).one())


def savepoint(s: Session) -> None:
    with s.begin_nested():
        change_a_card(s)


@pytest.mark.parametrize(
    ("write", "call"),
    [
        (change_a_card, "import_cards"),
        (commit_a_change, "import_cards"),
        (query_after_a_change, "import_cards"),
        (delete_a_checkpoint, "index_checkpoint"),
        (savepoint, "import_cards"),
        (lambda s: s.commit(), "import_cards"),
        (lambda s: s.execute(delete(CardRow)), "import_cards"),
        (lambda s: s.execute(update(ShardRow).values(sha256=None)), "index_checkpoint"),
        (lambda s: s.execute(delete(CopyRow)), "remove_model"),
        (lambda s: s.execute(insert(VerificationRow), [{"uri": "u"}]), "verify_model"),
        (lambda s: s.execute(text("DELETE FROM cards")), "import_cards"),
        (lambda s: s.connection().exec_driver_sql("DROP TABLE pieces"), "index_checkpoint"),
        (lambda s: s.bulk_insert_mappings(inspect(FamilyRow), [{"name": "new"}]), "import_cards"),
    ],
)
def test_a_write_is_refused_and_names_the_call(
    shared_store: AssetStore, write: Callable[[Session], object], call: str
) -> None:
    def attempt() -> None:
        with open_session(shared_store) as s:
            write(s)

    with pytest.raises(PolicyError, match=call):
        attempt()
    with shared_store.database.session() as s:
        assert s.scalars(select(FamilyRow.name).where(FamilyRow.name == "new")).all() == []
        assert s.scalars(select(CardRow.license).where(CardRow.name == "qwen3_0.6b")).all() == [None]
        assert s.scalar(select(func.count()).select_from(ShardRow).where(ShardRow.sha256.is_not(None))) == 2


def test_a_session_reads_on_after_a_refusal(shared_store: AssetStore) -> None:
    with open_session(shared_store) as s:
        with pytest.raises(PolicyError):
            s.execute(delete(CardRow))
        s.rollback()
        assert s.scalars(select(CardRow.name).where(CardRow.name == "qwen3_0.6b")).all() == ["qwen3_0.6b"]


def test_sql_that_is_not_understood(shared_store: AssetStore) -> None:
    def ask() -> None:
        with open_session(shared_store) as s:
            s.execute(text("SELECT x FROM nowhere"))

    with pytest.raises(QueryError, match="nowhere"):
        ask()


def test_a_catalog_in_memory_can_be_written_afterwards(tmp_path: Path) -> None:
    store = AssetStore(open_catalog(settings_in(tmp_path, database_url="sqlite://")))
    with open_session(store) as s:
        assert s.scalars(select(CardRow.name).limit(1)).all()
    import_files(store.database, [card_file("name: new\n")])
    assert "new" in store.asset_names


def test_the_columns_of_a_row_stay_known(shared_store: AssetStore) -> None:
    with open_session(shared_store) as s:
        card = s.scalars(select(CardRow).where(CardRow.name == "qwen3_0.6b")).one()
    assert card.checkpoint_uri == "hg://a/m"
    with pytest.raises(exc.SQLAlchemyError):
        _ = card.source


# --- the documentation -----------------------------------------------------------------------------------------------


def test_the_examples(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    exec("".join(EXAMPLES), {})
    printed = capsys.readouterr().out
    assert len(EXAMPLES) >= 5
    assert "model-00001.safetensors" in printed
    assert "('match', " in printed


def test_the_classes_that_a_user_of_the_types_would_write(database: Database) -> None:
    spec = importlib.util.spec_from_file_location("catalog_user", ROOT / "tests" / "typing" / "catalog_user.py")
    assert spec is not None
    assert spec.loader is not None
    user = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(user)
    assert user.sizes("qwen") == {"qwen3_0.6b": make_manifest().total_bytes}
    assert user.last_results("hg://a/m") == {make_manifest().shards[0].name: "match"}


def test_the_relationships_are_the_documented_ones() -> None:
    rows = re.findall(r"^\| `(\w+Row)` \| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
    documented = {name: (table, set(re.findall(r"`(\w+)`", to))) for name, table, to in rows}
    assert documented == {
        mapper.class_.__name__: (str(mapper.local_table), set(mapper.relationships.keys()))
        for mapper in Row.registry.mappers
        if hasattr(lading.catalog, mapper.class_.__name__)
    }
    assert documented.keys() == set(lading.catalog.__all__) - {"session"}


# --- tensors in pieces -----------------------------------------------------------------------------------------------


def pieced() -> Manifest:
    """Three tensors that four ranks saved: one whole, one cut by rows into three parts, one by columns into two."""
    return Manifest(
        format="torch",
        shards=tuple(Shard(name=f"__{rank}_0.distcp", size=10_000) for rank in range(4)),
        names=["norm", "up", "down"],
        dtypes=["F32", "BF16", "BF16"],
        shapes=[(8,), (9, 4), (4, 6)],
        shard_ids=array("I", [0, 1, 2]),
        offsets=array("q", [64, 128, 64]),
        pieces={
            1: (Piece((0, 0), (4, 4), 1, 128), Piece((4, 0), (4, 4), 2, 512), Piece((8, 0), (1, 4), 3, 64)),
            2: (Piece((0, 0), (4, 3), 2, 64), Piece((0, 3), (4, 3), 3, 1024)),
        },
    )


def test_pieces_go_through_the_catalog(store: AssetStore) -> None:
    manifest = pieced()
    record_checkpoint(store.database, CheckpointContents(uri="hg://a/n", manifest=manifest))
    stored = store.checkpoint("hg://a/n")
    assert stored is not None
    assert stored.manifest.pieces == manifest.pieces
    assert stored.manifest.tensors_equal(manifest)

    with open_session(store) as s:
        assert s.scalar(select(func.count()).select_from(PieceRow)) == 5  # one piece has no row
        checkpoint = s.scalars(select(CheckpointRow).where(CheckpointRow.in_pieces)).one()
        tensor = checkpoint.shards[1].tensors[0]
        assert [(p.shard_row.name, p.starts, p.shape) for p in tensor.pieces] == [
            ("__1_0.distcp", "[0,0]", "[4,4]"),
            ("__2_0.distcp", "[4,0]", "[4,4]"),
            ("__3_0.distcp", "[8,0]", "[1,4]"),
        ]
        assert tensor.pieces[0].tensor is tensor

    record_checkpoint(store.database, CheckpointContents(uri="hg://a/n", manifest=make_manifest()))
    stored = store.checkpoint("hg://a/n")
    assert stored is not None
    assert stored.manifest.pieces == {}
    with open_session(store) as s:
        assert s.scalars(select(PieceRow)).all() == []


def test_other_pieces_are_another_manifest(store: AssetStore) -> None:
    manifest = pieced()
    record_checkpoint(store.database, CheckpointContents(uri="hg://a/n", manifest=manifest))
    other = Manifest(
        **{
            **{name: getattr(manifest, name) for name in manifest.__dataclass_fields__},
            "pieces": manifest.pieces | {2: (Piece((0, 0), (4, 3), 2, 64), Piece((0, 3), (4, 3), 3, 2048))},
        }
    )
    assert not manifest.tensors_equal(other)
    record_checkpoint(store.database, CheckpointContents(uri="hg://a/n", manifest=other))
    stored = store.checkpoint("hg://a/n")
    assert stored is not None
    assert stored.manifest.pieces == other.pieces
