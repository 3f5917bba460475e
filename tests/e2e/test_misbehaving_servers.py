"""Whatever a server does wrong, `lading pull` ends with the right exit code and one line; and the next one succeeds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.helpers.cache_tools import files_in
from tests.helpers.fault_world import Place, World
from tests.servers import hostile
from tests.servers.hostile import Behaviour, at, drips, drops, first, length, on_get, on_ranges, redirect, status

FINE, MISSING, DAMAGED, SOURCE, REFUSED = 0, 2, 4, 5, 7
SHARD = "model-00002-of-00002.safetensors"


def require_end(world: World, place: Place, name: str, code: int, says: str, **ways: object) -> None:
    """The pull ends with the code and, unless it succeeds, with one line that says so; nothing half is left."""
    done = world.nursery.run(["pull", name, "--no-progress"], place.env, **ways)
    assert done.code == code, done
    assert len(done.errors) == (code != FINE), done
    assert code == FINE or re.fullmatch(rf"lading: error: .*({says}).*", done.errors[0]), done
    place.require_consistent(world.shards)
    # What came before it failed is noted by its path, for a later removal, but is no shard of a checkpoint.
    assert (place.sql("SELECT count(*) FROM copies WHERE file NOT LIKE '/%'") == [(0,)]) == (code != FINE)


def require_recovery(world: World, place: Place, name: str) -> None:
    world.behave()
    require_end(world, place, name, FINE, "")
    assert files_in(place.cache, "tmp") == []


def wrong_name(name: str) -> Behaviour:
    """The index says that the tensors are in a file of this name."""

    def behave(exchange: hostile.Exchange) -> None:
        data = json.dumps({"weight_map": {"a": name}}).encode()
        exchange.answer(200, {"Content-Type": "application/json"}, data)

    return at({"/m/model.safetensors.index.json": behave})


def of_shard(behavior: Behaviour) -> Behaviour:
    return at({f"/m/{SHARD}": behavior})


def cases(names: Iterable[str], *, slow: set[str]) -> list[object]:
    """The quick tier leaves out what is of the same kind as something in it."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


WEB: dict[str, tuple[Behaviour, int, str]] = {
    "drops each time": (drops(100), SOURCE, "ends early|broke off|closed"),
    "drops in the weights": (of_shard(drops(100)), SOURCE, "."),
    "drops once": (of_shard(first(1, drops(100))), FINE, ""),
    "half the length": (length(0.5), DAMAGED, "."),
    "twice the length": (of_shard(length(2)), DAMAGED, "."),
    "two lengths": (hostile.two_lengths, SOURCE, "."),
    "no ranges": (hostile.without_ranges, FINE, ""),
    "another range": (of_shard(on_ranges(hostile.shifted_range)), SOURCE, "."),
    "another total": (of_shard(on_ranges(hostile.other_total)), SOURCE, "."),
    "more than the range": (of_shard(on_ranges(hostile.long_range)), FINE, ""),
    "416": (of_shard(on_ranges(status(416))), SOURCE, "416"),
    "another content each time": (of_shard(hostile.new_content_each_time), SOURCE, "."),
    "drips": (of_shard(on_get(drips)), SOURCE, "."),
    "drips headers": (hostile.drips_headers, SOURCE, "."),
    "silent": (hostile.silent, SOURCE, "."),
    "silent in the body": (of_shard(on_get(hostile.silent_body)), SOURCE, "."),
    "redirects in a loop": (redirect("?again"), SOURCE, "redirect"),
    "redirects out of http": (of_shard(redirect("ftp://localhost/x")), REFUSED, "over https only"),
    "redirects outward without TLS": (of_shard(redirect("http://192.0.2.1/x")), REFUSED, "plain http is refused"),
    "429": (status(429, {"Retry-After": "1000"}), SOURCE, "429"),
    "503": (of_shard(status(503)), SOURCE, "503"),
    "503 once": (first(1, status(503)), FINE, ""),
    "401": (status(401), REFUSED, "401"),
    "403": (of_shard(status(403)), REFUSED, "403"),
    "404": (status(404), MISSING, "404"),
    "404 of a shard": (of_shard(status(404)), DAMAGED, SHARD),
    "500": (of_shard(status(500)), SOURCE, "500"),
    "a web page": (hostile.html, SOURCE, "."),
    "a web page in disguise": (of_shard(hostile.html_in_disguise), DAMAGED, "."),
    "gzip": (of_shard(hostile.compressed), SOURCE, "."),
    "endless": (hostile.endless, SOURCE, "does not say how many bytes"),
    "no HTTP": (hostile.garbage, SOURCE, "."),
    "a name that leads out": (wrong_name("../../../etc/passwd"), DAMAGED, "."),
    "an absolute name": (wrong_name("/etc/passwd"), DAMAGED, "."),
    "a name with a line break": (wrong_name("a\nb.safetensors"), DAMAGED, "."),
}


IN_VAIN = {"drips", "drips headers", "silent", "silent in the body"}
"""What is waited for in vain, however long."""


SLOW_WEB = {
    "drops in the weights", "twice the length", "another total", "416", "silent", "redirects out of http", "503", "403",
    "500", "an absolute name", "a name with a line break", "drips headers", "503 once", "429", "a web page",
}  # fmt: skip


@pytest.mark.few(5)
@pytest.mark.parametrize("what", cases(WEB, slow=SLOW_WEB))
def test_a_web_server(world: World, place: Place, what: str) -> None:
    world.web.behavior, code, says = WEB[what]
    before = dict(world.web.files)
    require_end(world, place, "web", code, says, **({"impatient": True} if what in IN_VAIN else {}))
    world.web.files = before
    require_recovery(world, place, "web")


HUB: dict[str, tuple[str, str, int, str]] = {
    "a bit that flips": (SHARD, "corrupt", DAMAGED, "is not what the hub publishes"),
    "half the body": (SHARD, "short", SOURCE, "."),
    "a longer body": (SHARD, "long", SOURCE, "."),
    "no ranges": (SHARD, "ignore-range", SOURCE, "does not serve ranges"),
    "another range": (SHARD, "wrong-range", SOURCE, "."),
    "gzip": (SHARD, "gzip", SOURCE, "."),
    "a web page": (SHARD, "html", SOURCE, "."),
    "late": (SHARD, "slow", FINE, ""),
    "redirects in a loop": (SHARD, "loop", SOURCE, "."),
    "redirects out of http": (SHARD, "downgrade", SOURCE, "."),
    "another commit": (SHARD, "other-commit", SOURCE, "."),
    "another tag": (SHARD, "tag:../../x", SOURCE, "."),
    "429": (SHARD, "429", SOURCE, "429"),
    "503": (SHARD, "503", SOURCE, "503"),
    "401": (SHARD, "401", SOURCE, "."),
    "403": (SHARD, "403", REFUSED, "Request access"),
    "404": (SHARD, "404", MISSING, "."),
    "nonsense about the repository": ("info", "html", SOURCE, "."),
    "a loop about the repository": ("info", "loop", SOURCE, "."),
    "503 about the repository": ("info", "503", SOURCE, "."),
}


SLOW_HUB = {
    "a longer body", "another range", "redirects out of http", "429", "a loop about the repository",
    "503 about the repository", "half the body", "503", "404", "a web page",
}  # fmt: skip


@pytest.mark.few(3)
@pytest.mark.parametrize("what", cases(HUB, slow=SLOW_HUB))
def test_a_hub(world: World, place: Place, what: str) -> None:
    target, fault, code, says = HUB[what]
    world.hub.misbehave(target, fault, 2 if fault == "slow" else 1_000_000)
    require_end(world, place, "far", code, says)
    require_recovery(world, place, "far")


def _renamed(answer: dict[str, Any]) -> None:
    for sibling in answer["siblings"]:
        sibling["rfilename"] = f"../{sibling['rfilename']}"


ANSWERS: dict[str, tuple[Callable[[dict[str, Any]], object], int]] = {
    "names that lead out": (_renamed, MISSING),
    "no commit": (lambda answer: answer.pop("sha"), SOURCE),
    "a commit that is a path": (lambda answer: answer.update(sha="../../x"), SOURCE),
    "an id that is a path": (lambda answer: answer.update(id="../../x"), SOURCE),
    "no files": (lambda answer: answer.update(siblings=[]), MISSING),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("what", cases(ANSWERS, slow={"no commit", "an id that is a path"}))
def test_what_a_hub_says_of_a_repository(world: World, place: Place, what: str) -> None:
    world.hub.rewrite, code = ANSWERS[what]
    require_end(world, place, "far", code, ".")
    require_recovery(world, place, "far")


@pytest.mark.slow
def test_a_hub_that_hands_out_on_request(world: World, place: Place) -> None:
    repository = world.hub.repositories["some/tiny"]
    repository.gated = True
    require_end(world, place, "far", REFUSED, "Request access")
    repository.gated, repository.private = False, True
    require_end(world, place, "far", MISSING, "HF_TOKEN")
    repository.private = False
    require_recovery(world, place, "far")
