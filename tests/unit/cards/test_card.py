"""What a name means: fields, bases, overlays, paths."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lading.cards.card import (
    FIELDS,
    ArchitectureEntry,
    AssetCard,
    CardEntry,
    CheckpointRef,
    checkpoint_ref,
    resolve_architecture,
    resolve_card,
    split_gated,
    split_name,
)
from lading.errors import AssetCardError
from lading.system.uris import path_uri, uri_path


def entry(name: str, /, _folder: str | None = None, **metadata: Any) -> CardEntry:
    plain, env = split_name(name)

    return CardEntry(
        name=plain,
        env=env or "",
        metadata=metadata,
        folder=None if _folder is None else Path(_folder),
        source=f"{name}.yaml[0]",
    )


def resolve(name: str, entries: Sequence[CardEntry], envs: Sequence[str] = ()) -> AssetCard | None:
    def look_up(name: str) -> Mapping[str, CardEntry]:
        return {entry.env: entry for entry in entries if entry.name == name}

    return resolve_card(name, envs, look_up)


def resolved(name: str, entries: Sequence[CardEntry], envs: Sequence[str] = ()) -> AssetCard:
    card = resolve(name, entries, envs)
    assert card is not None

    return card


def failure(act: Callable[[], object]) -> AssetCardError:
    with pytest.raises(AssetCardError) as error:
        act()

    return error.value


# --- fields ----------------------------------------------------------------------------------------------------------


CHAIN = (
    entry("root", url="r", shared="r", only=None),
    entry("mid", base="root", shared="m"),
    entry("leaf", base="mid"),
)


def test_fields_climb_the_bases() -> None:
    card = resolved("leaf", CHAIN)

    assert [each.name for each in card.chain()] == ["leaf", "mid", "root"]
    assert card.field("shared").value == "m"
    assert card.field("url").value == "r"
    assert card.has_field("url")
    assert not card.has_field("nothing")
    assert card.maybe_get_field("nothing") is None
    assert card.metadata == {"base": "mid"}
    assert card.fields() == {"url": "r", "shared": "m"}


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("name", [*FIELDS[1:], "owner"])
def test_a_null_takes_back_what_a_base_says(name: str, overlay: bool) -> None:
    bases = [entry("root", **{name: {}}), entry("mid", base="root", **{name: {}})]
    leaf = [entry("leaf", base="mid"), entry("leaf@user", **{name: None})] if overlay else []
    card = resolved("leaf", bases + (leaf or [entry("leaf", base="mid", **{name: None})]), ["user"])

    assert not card.has_field(name)
    assert card.maybe_get_field(name) is None
    assert name not in card.fields()
    failure(lambda: card.field(name))


def test_a_null_takes_back_the_base() -> None:
    entries = [entry("root", url="r"), entry("leaf", base="root"), entry("leaf@user", base=None)]

    assert resolved("leaf", entries).has_field("url")
    assert not resolved("leaf", entries, ["user"]).has_field("url")
    assert [each.name for each in resolved("leaf", entries, ["user"]).chain()] == ["leaf"]


def test_a_missing_field_names_the_card_that_was_asked() -> None:
    error = failure(lambda: resolved("leaf", CHAIN).field("nothing"))

    assert error.name == "leaf"
    found = "The card 'leaf' and its bases have no field 'nothing' (leaf.yaml[0])."
    assert str(error) == f"{found} State it in the card."


@pytest.mark.parametrize(
    ("value", "kls"), [("a", str), (1, int), (1.0, float), (True, bool), ([1], list), ({"a": 1}, dict)]
)
def test_as(value: object, kls: type) -> None:
    field = AssetCard("x", {"y": value}).field("y")

    assert field.as_(kls) == value
    for other in {str, int, float, bool, list, dict} - {kls}:
        error = failure(lambda other=other: field.as_(other))
        assert error.name == "x"
        assert f"'y' of the card 'x' is expected to be of type {other.__name__}, but is {value!r}" in str(error)


@pytest.mark.parametrize(
    ("value", "uri"),
    [
        ("hg://a/b", "hg://a/b"),
        ("https://x/y.tar", "https://x/y.tar"),
        ("file:///a", "file:///a"),
        ("  hg://a/b  ", "hg://a/b"),
        ("/a/b.pt", "file:///a/b.pt"),
        ("b.pt", "file:///cards/b.pt"),
        ("../b c", "file:///b c"),
        ("b:c", "file:///cards/b:c"),
        ("~/b", f"file://{Path.home()}/b"),
    ],
)
def test_as_uri(value: str, uri: str) -> None:
    assert resolved("x", [entry("x", "/cards", y=value)]).field("y").as_uri() == uri


def test_a_relative_path_resolves_against_the_file_that_states_it() -> None:
    entries = [
        entry("base", "/base", checkpoint="c.pt", tokenizer="t"),
        entry("leaf", "/leaf", base="base", tokenizer="t"),
        entry("leaf@user", "/user", other="o"),
    ]
    card = resolved("leaf", entries, ["user"])

    assert card.field("checkpoint").as_uri() == "file:///base/c.pt"
    assert card.field("tokenizer").as_uri() == "file:///leaf/t"
    assert card.field("other").as_uri() == "file:///user/o"


def test_paths_that_lead_nowhere() -> None:
    assert "does not come from a file" in str(failure(AssetCard("x", {"y": "a/b"}).field("y").as_uri))
    assert "is empty" in str(failure(AssetCard("x", {"y": " "}).field("y").as_uri))
    assert "expected to be of type str" in str(failure(AssetCard("x", {"y": 1}).field("y").as_uri))


def test_uris_of_paths() -> None:
    assert path_uri(Path("/a b/%20/ü")) == "file:///a b/%20/ü"
    assert uri_path("file:///a b/%20/ü") == Path("/a b/%20/ü")
    assert uri_path("hg://a/b") is None


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, CheckpointRef(uri="", gated=True, info_url=None)),
        ({"url": "u"}, CheckpointRef(uri="", gated=True, info_url="u")),
        ({"checkpoint": None, "url": "u"}, CheckpointRef(uri="", gated=True, info_url="u")),
        ({"checkpoint": "hg://a/b"}, CheckpointRef(uri="hg://a/b", gated=False, info_url=None)),
        ({"checkpoint": "hg://a", "url": "u"}, CheckpointRef(uri="hg://a", gated=False, info_url="u")),
        (
            {"checkpoint": "https://a/b.tar", "checkpoint_path": "c/d.pth"},
            CheckpointRef(uri="https://a/b.tar", gated=False, info_url=None, path="c/d.pth"),
        ),
        ({"checkpoint": "https://a/;gated=true"}, CheckpointRef(uri="https://a/", gated=True, info_url="https://a/")),
        (
            {"checkpoint": "https://a/; Gated = True", "url": "u"},
            CheckpointRef(uri="https://a/", gated=True, info_url="u"),
        ),
        ({"checkpoint": "https://a/;gated=false"}, CheckpointRef(uri="https://a/", gated=False, info_url=None)),
        # What is no word of fairseq2's cards is a part of the name: to drop it would ask for something else.
        ({"checkpoint": "hg://a/b@main;rm"}, CheckpointRef(uri="hg://a/b@main;rm", gated=False, info_url=None)),
        ({"checkpoint": "/x;y/z"}, CheckpointRef(uri="file:///x;y/z", gated=False, info_url=None)),
        ({"checkpoint": "https://a/b;v=1?c;d"}, CheckpointRef(uri="https://a/b;v=1?c;d", gated=False, info_url=None)),
        (
            {"checkpoint": "hg://a/b;v=1;gated=true", "url": "u"},
            CheckpointRef(uri="hg://a/b;v=1", gated=True, info_url="u"),
        ),
    ],
)
def test_checkpoints(metadata: dict[str, Any], expected: CheckpointRef) -> None:
    assert checkpoint_ref(AssetCard("x", metadata)) == expected


@pytest.mark.parametrize("key", ["checkpoint", "checkpoint_path", "url"])
def test_checkpoints_of_the_wrong_type(key: str) -> None:
    metadata = {"checkpoint": "hg://a", key: 1}

    assert failure(lambda: checkpoint_ref(AssetCard("x", metadata))).name == "x"


def test_schemes() -> None:
    assert checkpoint_ref(AssetCard("x", {"checkpoint": "hg://a/b"})).scheme == "hg"
    assert checkpoint_ref(AssetCard("x", {"checkpoint": "/a"})).scheme == "file"
    assert checkpoint_ref(AssetCard("x", {})).scheme == ""


# --- names and overlays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a", ("a", None)), ("a@", ("a", "")), (" a @ b ", ("a", "b")), ("a@b@c", ("a", "b@c")), ("", ("", None))],
)
def test_split_name(name: str, expected: tuple[str, str | None]) -> None:
    assert split_name(name) == expected


OVERLAID = (
    entry("base", url="b", license="b"),
    entry("base@user", url="bu"),
    entry("base@cluster", license="bc"),
    entry("leaf", base="base", config={"a": 1, "b": 2}),
    entry("leaf@user", config={"a": 3}),
    entry("leaf@other", base="orphan"),
    entry("orphan", url="o"),
)


@pytest.mark.parametrize(
    ("envs", "expected"),
    [
        ((), {"url": "b", "license": "b", "config": {"a": 1, "b": 2}}),
        (("user",), {"url": "bu", "license": "b", "config": {"a": 3}}),
        (("cluster",), {"url": "b", "license": "bc", "config": {"a": 1, "b": 2}}),
        (("user", "cluster"), {"url": "bu", "license": "b", "config": {"a": 3}}),
        (("cluster", "user"), {"url": "b", "license": "bc", "config": {"a": 3}}),
        (("nowhere",), {"url": "b", "license": "b", "config": {"a": 1, "b": 2}}),
        (("other",), {"url": "o", "config": {"a": 1, "b": 2}}),
    ],
)
def test_the_first_overlay_that_exists_is_laid_over_each_card_of_the_chain(
    envs: tuple[str, ...], expected: dict[str, object]
) -> None:
    assert resolved("leaf", OVERLAID, envs).fields() == expected


def test_an_overlay_alone_makes_no_card() -> None:
    assert resolve("x", [entry("x@user", url="u")], ["user"]) is None
    assert resolve("x", []) is None


def test_sources() -> None:
    card = resolved("leaf", OVERLAID, ["user"])

    assert card.source == "leaf.yaml[0]"
    assert card.source_of("config") == "leaf@user.yaml[0]"
    assert card.source_of("base") == "leaf.yaml[0]"
    assert card.base is not None
    assert card.base.source_of("url") == "base@user.yaml[0]"
    assert card.base.source_of("license") == "base.yaml[0]"


def test_entries_are_not_changed_by_overlays() -> None:
    resolved("leaf", OVERLAID, ["user"])

    assert OVERLAID[3].metadata == {"base": "base", "config": {"a": 1, "b": 2}}


# --- bases that lead nowhere -----------------------------------------------------------------------------------------


def test_a_base_that_does_not_exist() -> None:
    error = failure(lambda: resolve("a", [entry("a", base="b"), entry("b", base="c")]))

    assert error.name == "a"
    found = "The card 'b' is based on 'c', which is not in the catalog (b.yaml[0])."
    assert str(error) == f"{found} Import the card of that name, or correct the `base`."


@pytest.mark.parametrize(
    ("bases", "cycle"),
    [({"a": "a"}, "a → a"), ({"a": "b", "b": "a"}, "a → b → a"), ({"a": "b", "b": "c", "c": "b"}, "a → b → c → b")],
)
def test_cycles(bases: dict[str, str], cycle: str) -> None:
    error = failure(lambda: resolve("a", [entry(name, base=base) for name, base in bases.items()]))

    assert error.name == "a"
    assert f"form a cycle: {cycle} (" in str(error)


def test_an_overlay_can_close_a_cycle_and_open_one() -> None:
    entries = [entry("a", base="b"), entry("b"), entry("b@user", base="a"), entry("a@home", base=None)]

    assert resolved("a", entries).field("base").value == "b"
    assert "form a cycle" in str(failure(lambda: resolve("a", entries, ["user"])))
    assert resolved("a", entries, ["home"]).base is None


def test_long_chains() -> None:
    entries = {f"c{i}": entry(f"c{i}", base=f"c{i + 1}") for i in range(5_000)}
    entries["c5000"] = entry("c5000", url="u")

    card = resolve_card("c0", (), lambda name: {"": entries[name]})

    assert card is not None
    assert card.field("url").value == "u"
    assert sum(1 for _ in card.chain()) == 5_001


# --- architectures ---------------------------------------------------------------------------------------------------


def architecture(name: str, base: str | None = None, **config: object) -> ArchitectureEntry:
    return ArchitectureEntry(name=name, family="toy", base=base, config=config, source=f"{name}.yaml[0]")


def test_architectures_state_their_bases_first() -> None:
    entries = {"a": architecture("a", "b", x=1), "b": architecture("b", "c", y=2), "c": architecture("c", z=3)}

    found = resolve_architecture("a", "toy", entries.get)

    assert found is not None
    assert (found.name, found.family) == ("a", "toy")
    assert found.overrides == ({"z": 3}, {"y": 2}, {"x": 1})
    assert found.sources == ("c.yaml[0]", "b.yaml[0]", "a.yaml[0]")
    assert resolve_architecture("d", "toy", entries.get) is None


def test_architectures_whose_bases_lead_nowhere() -> None:
    entries = {"a": architecture("a", "b"), "b": architecture("b", "a"), "c": architecture("c", "d")}

    assert "form a cycle: a → b → a" in str(failure(lambda: resolve_architecture("a", "toy", entries.get)))
    assert "'c' is based on 'd', which is not in the catalog (c.yaml[0])" in str(
        failure(lambda: resolve_architecture("c", "toy", entries.get))
    )


def test_cards_travel_between_ranks() -> None:
    card = resolved("leaf", OVERLAID, ["user"])
    copy = pickle.loads(pickle.dumps(card))

    assert copy == card
    assert copy.source_of("config") == card.source_of("config")


def test_an_address_of_very_many_spaces_is_taken_apart_at_once() -> None:
    address = f"https://example.com/x;{' ' * 1_000_000}gated{' ' * 1_000_000}y"

    assert split_gated(address) == (address, False)


def test_the_page_of_a_gated_address_is_without_its_secrets() -> None:
    card = AssetCard("tiny", {"checkpoint": "https://me:Secret@example.com/x?token=Secret;gated=true"})

    assert checkpoint_ref(card).info_url == "https://example.com/x"
