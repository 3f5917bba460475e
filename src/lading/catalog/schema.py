"""The rows of the catalog and how they refer to one another. Inside lading only values leave this package.

A row that cannot exist without another one goes with it (``ON DELETE CASCADE``, by the database itself). The audit
(:class:`VerificationRow`) outlives its checkpoint, and a family takes neither cards nor architectures with it.

The tables themselves are made by the migrations in ``lading.migrations``, and so are the views; a test finds no
difference between the two. On SQLite all tables are ``STRICT``; free-form content is JSON in a text column, so that the
same schema serves PostgreSQL. Times are ISO 8601 in UTC.
"""

from typing import ClassVar

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    column,
    event,
    exists,
    table,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, foreign, mapped_column, relationship

from lading.catalog.records import CopyKind

_STRICT = {"sqlite_strict": True}
_STRICT_CLUSTERED = {"sqlite_strict": True, "sqlite_with_rowid": False}

_OWNED = "all, delete-orphan"
"""The cascade to rows that cannot exist without this one."""


def _json(column: str) -> CheckConstraint:
    # PostgreSQL lacks the function before version 16, and its own type would read differently.
    return CheckConstraint(f"json_valid({column})", name=f"{column}_is_json").ddl_if(dialect="sqlite")


class Row(DeclarativeBase):
    """The base of all rows."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    # STRICT tables lack BIGINT, and an INTEGER of SQLite has 64 bits anyway.
    type_annotation_map: ClassVar = {
        str: Text(),
        int: BigInteger().with_variant(Integer(), "sqlite"),
        bytes: LargeBinary(),
    }


class SourceRow(Row):
    """A source of cards and architectures: a packaged file, a card file of the user, or an imported file.

    Sources of checkpoints are something else: :mod:`lading.sources`.
    """

    __tablename__ = "sources"
    __table_args__ = (
        CheckConstraint("kind IN ('seed', 'user', 'import')", name="kind"),
        _STRICT,
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    uri: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    sha256: Mapped[str | None]
    """The SHA-256 of the imported content; ``None`` makes lading read the source again."""
    size: Mapped[int | None]
    mtime_ns: Mapped[int | None]
    imported_at: Mapped[str]
    version: Mapped[str]
    """The version of lading that imported it."""
    problems: Mapped[str | None]
    """The problems of documents that could not be imported, one line each."""

    cards: Mapped[list["CardRow"]] = relationship(
        back_populates="source", cascade=_OWNED, passive_deletes=True, order_by=lambda: CardRow.position
    )
    architectures: Mapped[list["ArchitectureRow"]] = relationship(
        back_populates="source", cascade=_OWNED, passive_deletes=True, order_by=lambda: ArchitectureRow.position
    )


class FamilyRow(Row):
    """A model family that an installed package registers, or that only cards and architectures name."""

    __tablename__ = "families"
    __table_args__ = (CheckConstraint("name <> ''", name="name"), _STRICT_CLUSTERED)

    name: Mapped[str] = mapped_column(primary_key=True)
    entry_point: Mapped[str | None]
    """The entry point that registers it: ``package.module:OBJECT``."""

    # The database refuses to delete a family that a row names; "all" keeps the ORM from emptying that row instead.
    architectures: Mapped[list["ArchitectureRow"]] = relationship(
        back_populates="family_row", passive_deletes="all", order_by=lambda: ArchitectureRow.name
    )
    cards: Mapped[list["CardRow"]] = relationship(
        back_populates="family_row", passive_deletes="all", order_by=lambda: CardRow.name
    )


class ArchitectureRow(Row):
    """The numbers of a family's configuration, as one document of a card file states them."""

    __tablename__ = "architectures"
    __table_args__ = (CheckConstraint("name <> ''", name="name"), _json("config"), _STRICT_CLUSTERED)

    family: Mapped[str] = mapped_column(ForeignKey("families.name"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str | None]
    config: Mapped[str]
    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id", ondelete="CASCADE"), index=True)
    position: Mapped[int]
    """The number of the document in its source, counted from zero."""

    family_row: Mapped["FamilyRow"] = relationship(back_populates="architectures")
    source: Mapped["SourceRow"] = relationship(back_populates="architectures")


class CardRow(Row):
    """One document of a card file: a card, or an overlay to it.

    The row keeps the resolved values of a card, which lading updates whenever the card or one of its bases changes. In
    an overlay these columns are empty: each process chooses its overlays.
    """

    __tablename__ = "cards"
    __table_args__ = (
        UniqueConstraint("name", "env", name="uq_cards_name"),
        CheckConstraint("name <> ''", name="name"),
        CheckConstraint("gated IN (0, 1)", name="gated"),
        _json("metadata"),
        # Overlays are few: an index of them alone shows at once whether an environment exists.
        Index("ix_cards_env", "env", sqlite_where=text("env <> ''")),
        # With the name, so that the list of a family needs no sort.
        Index("ix_cards_family", "family", "name"),
        _STRICT,
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    env: Mapped[str] = mapped_column(server_default="")
    """The environment of an overlay; empty for the card itself."""
    metadata_: Mapped[str] = mapped_column("metadata", key="metadata_")
    """All fields but the name, as JSON."""
    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id", ondelete="CASCADE"), index=True)
    position: Mapped[int]
    folder: Mapped[str | None]
    """The folder against which relative paths resolve."""

    base: Mapped[str | None] = mapped_column(index=True)
    """The card that this one is based on, which need not exist."""
    family: Mapped[str | None] = mapped_column(ForeignKey("families.name"))
    arch: Mapped[str | None] = mapped_column(index=True)
    checkpoint_uri: Mapped[str | None] = mapped_column(index=True)
    checkpoint_path: Mapped[str | None]
    license: Mapped[str | None]
    gated: Mapped[int] = mapped_column(server_default="0")
    info_url: Mapped[str | None]
    problem: Mapped[str | None]
    """The reason that the card cannot be used: a missing base, a field of a wrong type."""
    search_text: Mapped[str | None]
    """The words of its name and its fields, folded. The last column, so that other queries do not read past it."""

    source: Mapped["SourceRow"] = relationship(back_populates="cards")
    family_row: Mapped["FamilyRow | None"] = relationship(back_populates="cards")
    link: Mapped["CardCheckpointRow | None"] = relationship(back_populates="card", cascade=_OWNED, passive_deletes=True)
    checkpoint: Mapped["CheckpointRow | None"] = relationship(secondary="card_checkpoints", viewonly=True)
    """The checkpoint that its models are loaded from, once that was loaded or indexed; written as ``link``."""


_SEARCH = (
    """
CREATE VIRTUAL TABLE card_search USING fts5(
    search_text, content='cards', content_rowid='id', tokenize='ascii', columnsize=0
)
""",
    """
CREATE TRIGGER card_search_delete AFTER DELETE ON cards WHEN old.search_text IS NOT NULL BEGIN
    INSERT INTO card_search (card_search, rowid, search_text) VALUES ('delete', old.id, old.search_text);
END
""",
)
"""The full-text index of the cards, whose text stays where it is.

Cascades delete cards, too, and only a trigger sees that. The writers of cards index new ones in bulk: each firing of a
trigger makes the index write out all that it holds, and costs four times the row.
"""

for _statement in _SEARCH:
    event.listen(CardRow.__table__, "after_create", DDL(_statement.strip()).execute_if(dialect="sqlite"))  # type: ignore[no-untyped-call]


_PIECES = table("pieces", column("checkpoint_id", BigInteger()))


class CheckpointRow(Row):
    """A checkpoint whose tensors are known."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        CheckConstraint("bytes >= 0 AND parameters >= 0 AND tensors >= 0", name="counts"),
        _json("metadata"),
        _STRICT,
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    uri: Mapped[str] = mapped_column(unique=True)
    revision: Mapped[str] = mapped_column(server_default="")
    format: Mapped[str]
    bytes: Mapped[int]
    """The size of all tensors in bytes, headers apart."""
    parameters: Mapped[int]
    dtypes: Mapped[str]
    """The dtypes, that of the most elements first, separated by commas."""
    tensors: Mapped[int]
    index_name: Mapped[str | None]
    metadata_: Mapped[str] = mapped_column("metadata", key="metadata_")
    indexed_at: Mapped[str]
    version: Mapped[str]

    shards: Mapped[list["ShardRow"]] = relationship(
        back_populates="checkpoint", cascade=_OWNED, passive_deletes=True, order_by=lambda: ShardRow.position
    )
    copies: Mapped[list["CopyRow"]] = relationship(
        back_populates="checkpoint",
        cascade=_OWNED,
        passive_deletes=True,
        order_by=lambda: (CopyRow.file, CopyRow.place),
    )
    links: Mapped[list["CardCheckpointRow"]] = relationship(
        back_populates="checkpoint", cascade=_OWNED, passive_deletes=True
    )
    cards: Mapped[list["CardRow"]] = relationship(
        secondary="card_checkpoints", viewonly=True, order_by=lambda: CardRow.name
    )
    """The cards whose models are loaded from it; written as ``links``."""
    verifications: Mapped[list["VerificationRow"]] = relationship(
        primaryjoin=lambda: CheckpointRow.uri == foreign(VerificationRow.uri),
        viewonly=True,
        order_by=lambda: VerificationRow.id,
    )
    """The checks of its files, by its URI: they stay when it goes."""
    digest_document: Mapped["DigestDocumentRow | None"] = relationship(
        back_populates="checkpoint", cascade=_OWNED, passive_deletes=True
    )
    """The document that publishes its digests."""
    in_pieces: Mapped[bool] = column_property(
        # A part of the same query, as a query of its own for each checkpoint would serve only the rarest case.
        exists().where(_PIECES.c.checkpoint_id == id).correlate_except(_PIECES)  # noqa: A003 (the column)
    )
    """``True`` if any of its tensors lies in several pieces."""


class ShardRow(Row):
    """A file of a checkpoint."""

    __tablename__ = "shards"
    __table_args__ = (
        UniqueConstraint("checkpoint_id", "name"),
        CheckConstraint("position >= 0 AND size >= 0", name="numbers"),
        # For searches of files by their content. On PostgreSQL, too, the migrations make this index and that of digests
        # partial; stating it here would import that dialect, in 16 ms, whatever the database.
        Index("ix_shards_sha256", "sha256", sqlite_where=text("sha256 IS NOT NULL")),
        _STRICT_CLUSTERED,
    )

    checkpoint_id: Mapped[int] = mapped_column(
        ForeignKey("checkpoints.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    size: Mapped[int]
    sha256: Mapped[str | None]

    checkpoint: Mapped["CheckpointRow"] = relationship(back_populates="shards")
    tensors: Mapped[list["TensorRow"]] = relationship(
        back_populates="shard_row", cascade=_OWNED, passive_deletes=True, order_by=lambda: TensorRow.position
    )


class TensorRow(Row):
    """A tensor of a checkpoint, in the order of its manifest."""

    __tablename__ = "tensors"
    __table_args__ = (
        ForeignKeyConstraint(
            ["checkpoint_id", "shard"], ["shards.checkpoint_id", "shards.position"], ondelete="CASCADE"
        ),
        UniqueConstraint("checkpoint_id", "name"),
        CheckConstraint('parameters >= 0 AND bytes >= 0 AND "offset" >= 0', name="numbers"),
        _json("shape"),
        # For searches of equal tensors by their digest.
        Index("ix_tensors_digest", "digest", sqlite_where=text("digest IS NOT NULL")),
        _STRICT_CLUSTERED,
    )

    checkpoint_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    shard: Mapped[int]
    """The position of its shard; of its first one, if it lies in several pieces."""
    name: Mapped[str]
    dtype: Mapped[str]
    shape: Mapped[str]
    parameters: Mapped[int]
    bytes: Mapped[int]
    offset: Mapped[int]
    """The byte of the shard's file at which it begins."""
    digest: Mapped[str | None]
    """The digest of all its bytes, as :mod:`lading.formats.digests` defines it; equal tensors have equal ones."""

    shard_row: Mapped["ShardRow"] = relationship(back_populates="tensors")
    """The shard at the position ``shard``."""
    pieces: Mapped[list["PieceRow"]] = relationship(
        back_populates="tensor", cascade=_OWNED, passive_deletes=True, order_by=lambda: PieceRow.number
    )
    """Its pieces, if there are several; one alone is where ``shard`` and ``offset`` say."""


class PieceRow(Row):
    """A part of a tensor that lies in several, as ranks saved it: contiguous and row-major in one file."""

    __tablename__ = "pieces"
    __table_args__ = (
        ForeignKeyConstraint(
            ["checkpoint_id", "position"],
            ["tensors.checkpoint_id", "tensors.position"],
            name="fk_pieces_tensor",
            ondelete="CASCADE",
        ),
        ForeignKeyConstraint(
            ["checkpoint_id", "shard"],
            ["shards.checkpoint_id", "shards.position"],
            name="fk_pieces_shard",
            ondelete="CASCADE",
        ),
        CheckConstraint('number >= 0 AND "offset" >= 0', name="numbers"),
        _json("starts"),
        _json("shape"),
        _STRICT_CLUSTERED,
    )

    checkpoint_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """The position of the tensor."""
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    shard: Mapped[int]
    """The position of its shard."""
    offset: Mapped[int]
    """The byte of the shard's file at which it begins."""
    starts: Mapped[str]
    """The index of its first element in the tensor, as JSON."""
    shape: Mapped[str]

    tensor: Mapped["TensorRow"] = relationship(back_populates="pieces")
    shard_row: Mapped["ShardRow"] = relationship(viewonly=True)
    """The shard at the position ``shard``."""


class ValidatorRow(Row):
    """The HTTP validator of a file when it was indexed, at a source without revisions and digests."""

    __tablename__ = "validators"
    __table_args__ = (
        ForeignKeyConstraint(
            ["checkpoint_id", "position"], ["shards.checkpoint_id", "shards.position"], ondelete="CASCADE"
        ),
        _STRICT_CLUSTERED,
    )

    checkpoint_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """The position of the file."""
    validator: Mapped[str]


class DigestRow(Row):
    """The digests of the blocks of a tensor, by which a part of it can be checked."""

    __tablename__ = "digests"
    __table_args__ = (
        ForeignKeyConstraint(
            ["checkpoint_id", "position"], ["tensors.checkpoint_id", "tensors.position"], ondelete="CASCADE"
        ),
        CheckConstraint("dim >= 0", name="dim"),
        _STRICT_CLUSTERED,
    )

    checkpoint_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """The digest of the tensor."""
    dim: Mapped[int]
    """The dim along which the blocks lie."""
    blocks: Mapped[bytes]
    """The digests of the blocks, concatenated."""


class DigestDocumentRow(Row):
    """The document of a card from which the digests of a checkpoint's tensors were taken."""

    __tablename__ = "digest_documents"
    __table_args__ = (_STRICT_CLUSTERED,)

    checkpoint_id: Mapped[int] = mapped_column(
        ForeignKey("checkpoints.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    uri: Mapped[str]
    """The address of the document, without secrets."""
    sha256: Mapped[str]
    """The SHA-256 of the document."""
    taken_at: Mapped[str]

    checkpoint: Mapped["CheckpointRow"] = relationship(back_populates="digest_document")


class CopyRow(Row):
    """A local copy of a file of a checkpoint, and its state when lading last saw it."""

    __tablename__ = "copies"
    __table_args__ = (
        CheckConstraint("size >= 0", name="numbers"),
        CheckConstraint("kind IN ('source', 'cache', 'hub', 'adopted')", name="kind"),
        _STRICT_CLUSTERED,
    )

    checkpoint_id: Mapped[int] = mapped_column(
        ForeignKey("checkpoints.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    file: Mapped[str] = mapped_column(primary_key=True)
    """The name of a shard or of the index file within the checkpoint; the path of an extra file, or of one that was
    fetched for an earlier revision."""
    place: Mapped[str] = mapped_column(primary_key=True)
    """The machine, or the network file system, where ``path`` means this copy."""
    path: Mapped[str]
    size: Mapped[int]
    mtime_ns: Mapped[int]
    ctime_ns: Mapped[int]
    inode: Mapped[int]
    """The inode number as a signed number: some file systems use all 64 bits."""
    recorded_at: Mapped[str]
    verified_at: Mapped[str | None]
    kind: Mapped[CopyKind] = mapped_column(Text(), server_default="source")
    """The owner: the card's own source, lading's cache, the cache of the hub's client, or an adopted folder. lading
    removes only files that it fetched."""

    checkpoint: Mapped["CheckpointRow"] = relationship(back_populates="copies")


class VerificationRow(Row):
    """A check of a file against a digest. Rows are only ever added."""

    __tablename__ = "verifications"
    __table_args__ = (CheckConstraint("result IN ('match', 'mismatch', 'recorded')", name="result"), _STRICT)

    id: Mapped[int] = mapped_column(primary_key=True)
    uri: Mapped[str]
    """The checkpoint."""
    file: Mapped[str]
    path: Mapped[str]
    method: Mapped[str]
    expected: Mapped[str | None]
    found: Mapped[str | None]
    result: Mapped[str]
    version: Mapped[str]
    at: Mapped[str]

    checkpoint: Mapped["CheckpointRow | None"] = relationship(
        primaryjoin=lambda: foreign(VerificationRow.uri) == CheckpointRow.uri, viewonly=True
    )
    """The checkpoint, as long as the catalog knows it."""


class ArtifactRow(Row):
    """Weights on a machine that lading does not load, as the last adoption found them."""

    __tablename__ = "artifacts"
    __table_args__ = (
        CheckConstraint("bytes >= 0 AND files >= 0 AND tensors >= 0", name="counts"),
        _STRICT_CLUSTERED,
    )

    uri: Mapped[str] = mapped_column(primary_key=True)
    """The ``file://`` URI of its file or folder."""
    place: Mapped[str] = mapped_column(primary_key=True)
    """The machine, or the network file system."""
    kind: Mapped[str] = mapped_column(primary_key=True)
    """``gguf``, ``lora adapter``, ``quantized (awq)`` and so on."""
    files: Mapped[int]
    bytes: Mapped[int]
    """The size of its files."""
    tensors: Mapped[int | None]
    dtypes: Mapped[str]
    """The dtypes that its headers state, that of the most elements first, separated by commas; may be empty."""
    reason: Mapped[str]
    """The reason that lading does not load it."""
    found_at: Mapped[str]
    version: Mapped[str]


class CardCheckpointRow(Row):
    """The link from a card to the checkpoint of its models."""

    __tablename__ = "card_checkpoints"
    __table_args__ = (_STRICT,)

    card_id: Mapped[int] = mapped_column(
        ForeignKey("cards.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoints.id", ondelete="CASCADE"), index=True)
    linked_at: Mapped[str]

    card: Mapped["CardRow"] = relationship(back_populates="link")
    checkpoint: Mapped["CheckpointRow"] = relationship(back_populates="links")


def _table(row: type[Row]) -> Table:
    assert isinstance(row.__table__, Table)
    return row.__table__


# lading reads and writes tensors and their digests as columns, as a checkpoint may have 100,000 of them.
TENSORS, PIECES, DIGESTS, DOCUMENTS, VALIDATORS = map(
    _table, (TensorRow, PieceRow, DigestRow, DigestDocumentRow, ValidatorRow)
)

# A load reads other rows as columns, too: the first use of a mapped class sets up all relationships, which takes 20 to
# 40 ms, as long as reading 50 MB.
SOURCES, FAMILIES, ARCHITECTURES, CARDS, CHECKPOINTS, SHARDS, COPIES = map(
    _table, (SourceRow, FamilyRow, ArchitectureRow, CardRow, CheckpointRow, ShardRow, CopyRow)
)
