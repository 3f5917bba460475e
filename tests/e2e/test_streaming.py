"""Models that are read straight from a web server or the hub: the same values, verified, and no file of weights."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.test_misbehaving_servers import cases
from tests.helpers.cache_tools import files_in
from tests.helpers.fault_world import INDEX, Place, World
from tests.helpers.make_adapter import factors, write_adapter
from tests.helpers.make_checkpoint import make, qwen_card, tensors
from tests.helpers.nursery import Ended
from tests.servers import hostile
from tests.servers.hostile import Behaviour, Exchange, at, drips, drops, first, honest, serve, status
from tests.servers.s3 import Moto, use_s3

SHARD = "model-00002-of-00002.safetensors"

LOAD = """
import hashlib, json, sys
from lading.models.hub import load_with_report
from lading.transfer import requests

requests._STEP = requests.WINDOW = 4096  # a file of some kilobytes takes several requests
requests.GAP = 0
name, dtype, keywords = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
try:
    model, report = load_with_report(name, dtype=dtype, progress=False, **keywords)
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)
digest = hashlib.sha256()
for name, tensor in sorted(model.state_dict().items()):
    digest.update(name.encode() + tensor.float().numpy().tobytes())
print(json.dumps([digest.hexdigest(), report.streamed, report.verified, report.bytes_read, report.reads]))
"""


def load(place: Place, name: str, dtype: str = "keep", *, impatient: bool = False, **keywords: object) -> Ended:
    ways = {"impatient": True} if impatient else {}
    return place.world.nursery.run(["-c", LOAD, name, dtype, json.dumps(keywords)], place.env, **ways)


def values(ended: Ended) -> list[object]:
    """The digest of all values; whether they were streamed, whether verified; bytes, requests."""
    assert ended.code == 0, ended
    found: list[object] = json.loads(ended.out)
    return found


def audit(place: Place) -> list[tuple[object, ...]]:
    return place.sql("SELECT DISTINCT method, result FROM verifications ORDER BY id")


def require_no_weights(place: Place) -> None:
    assert not [path for folder in (place.cache, place.hub) for path in folder.rglob("*") if path.stat().st_size > 9000]
    paths = [str(path) for (path,) in place.sql("SELECT path FROM copies WHERE file LIKE '%.safetensors'")]
    assert not [path for path in paths if path.startswith(str(place.folder))]


# --- what comes of it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("web", "keep"), ("far", "float32"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("web", "float32"), ("far", "keep")]),
    ],
)  # fmt: skip
def test_a_stream_makes_the_model_that_files_make(place: Place, name: str, dtype: str) -> None:
    expected = values(load(place, "near", dtype))[0]
    digest, streamed, verified, size, requests = values(load(place, name, dtype, stream=True))

    assert (digest, streamed) == (expected, True)
    assert verified == (name == "far")  # the hub publishes a SHA-256
    assert isinstance(size, int)
    assert isinstance(requests, int)
    assert 40_000 < size < 60_000
    assert requests > 4
    require_no_weights(place)


def test_the_first_stream_records_the_digests_that_later_ones_check(place: Place, world: World) -> None:
    before = values(load(place, "web", stream=True))
    assert before[2] is False
    assert audit(place) == [("blake3", "recorded"), ("unverified", "recorded")]
    again = values(load(place, "web", stream=True, verify="always"))
    assert (again[0], again[2]) == (before[0], True)

    world.web.behavior = at({f"/m/{SHARD}": damaged})
    for verify in ("auto", "always"):
        ended = load(place, "web", stream=True, verify=verify)
        assert ended.code == 1
        assert re.fullmatch(
            r"DigestMismatchError: .*-00002-.*not those that were verified.*lading index web.*\n", ended.err
        )
    assert ("blake3", "mismatch") in audit(place)
    assert values(load(place, "web", stream=True, verify="never"))[0] != before[0]


def damaged(exchange: Exchange) -> None:
    """Other weights under the validator of before, near the end of the file."""
    data, wanted = exchange.data or b"", exchange.wanted()
    if exchange.command == "HEAD" or wanted is None:
        honest(exchange)
        return
    start, end = wanted
    body = (data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])[start:end]
    exchange.answer(206, {**exchange.about(), "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, body)


def test_a_file_that_is_not_the_published_one_is_refused(place: Place, world: World) -> None:
    place.run("index", "far")
    world.hub.misbehave(SHARD, "corrupt")
    ended = load(place, "far", stream=True)
    assert ended.code == 1
    assert "DigestMismatchError" in ended.err
    assert "is not the file that was published" in ended.err
    assert ("sha256", "mismatch") in audit(place)
    world.behave()
    assert values(load(place, "far", stream=True, verify="always"))[2] is True


def test_what_cannot_be_verified_is_not_streamed_if_all_is_to_be(place: Place) -> None:
    ended = load(place, "web", stream=True, verify="always")
    assert ended.code == 1
    assert "NotSupportedError" in ended.err
    assert SHARD in ended.err
    assert "`lading pull web`" in ended.err


# --- whether it streams -----------------------------------------------------------------------------------------------


def test_files_that_are_here_are_read_here(place: Place, world: World) -> None:
    place.run("pull", "web", "--no-progress")
    world.web.requests.clear()
    assert values(load(place, "web", stream=True))[1:3] == [False, None]
    assert world.web.requests == []


def test_by_the_card(place: Place, tmp_path: Path, world: World) -> None:
    card = qwen_card("thin", world.uris["web"])
    (tmp_path / "thin.yaml").write_text(card + "stream: true\n")
    place.run("import", tmp_path / "thin.yaml")
    shown = json.loads(place.run("load", "thin", "--no-progress", "--json").out)
    assert (shown["streamed"], shown["verified"]) == (True, False)
    assert "unverified" not in place.run("load", "thin", "--no-progress").out
    assert values(load(place, "thin", stream="auto"))[1] is True
    require_no_weights(place)
    assert values(load(place, "thin", stream="auto", mmap=True))[1] is False  # only a file can be mapped

    (tmp_path / "thin.yaml").write_text(card + "stream: sometimes\n")
    assert (
        "thin.yaml[0].stream: expected true, false or auto" in place.run("import", tmp_path / "thin.yaml", code=3).err
    )


def test_on_the_command_line(place: Place) -> None:
    out = place.run("load", "web", "--stream", "--no-progress").out
    assert re.search(r"^streamed +43\.\d kB in 2 requests\nchecked +unverified$", out, re.MULTILINE)
    require_no_weights(place)
    assert "streamed" not in place.run("load", "web", "--no-stream", "--no-progress").out
    assert "streamed" not in place.run("load", "web", "--stream", "--no-progress").out


@pytest.mark.parametrize("room", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_the_cache_has_no_room_for_is_streamed(place: Place, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    full = (
        "" if room else "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9999, 9999, 40000)\n"
    )
    monkeypatch.setattr("tests.e2e.test_streaming.LOAD", full + LOAD)
    assert values(load(place, "web", stream="auto"))[1] is not room
    assert bool(files_in(place.cache, "blobs")) >= room


def test_what_cannot_be_streamed(place: Place, tmp_path: Path, world: World) -> None:
    torch.save(tensors(), tmp_path / "model.pt")
    with serve({"/model.pt": (tmp_path / "model.pt").read_bytes()}) as server:
        (tmp_path / "old.yaml").write_text(qwen_card("old", server.url("/model.pt")))
        place.run("import", tmp_path / "old.yaml")
        ended = load(place, "old", stream=True)
        assert "NotSupportedError" in ended.err
        assert "`lading pull old`" in ended.err
        require_no_weights(place)
        # Its tensors are known only once it is here, and then it is read here.
        assert values(load(place, "old", stream="auto"))[1] is False
        assert values(load(place, "old", stream=True))[1] is False
        for file in place.cache.rglob("*"):
            if file.is_file() and file.stat().st_size > 9000:
                file.unlink()
        ended = load(place, "old", stream=True)
        assert "NotSupportedError" in ended.err
        assert "`lading pull old`" in ended.err
        assert values(load(place, "old", stream="auto"))[1] is False

    assert "must not be given together" in load(place, "web", stream=True, mmap=True).err
    assert "`stream` must be" in load(place, "web", stream="perhaps").err
    place.run("index", "web")
    env = {**place.env, "LADING_OFFLINE": "1"}
    done = world.nursery.run(["load", "web", "--stream", "--no-progress"], env)
    assert done.code == 5
    assert len(done.errors) == 1
    assert re.search(r"LADING_OFFLINE .*not streamed.*`lading pull web`", done.errors[0])


def test_pinned_files_are_verified_or_refused(place: Place, tmp_path: Path, world: World) -> None:
    pins = ", ".join(f"{name}: {digest}" for name, digest in world.shards.items())
    (tmp_path / "pinned.yaml").write_text(qwen_card("pinned", world.uris["web"]) + f"sha256: {{{pins}}}\n")
    place.run("import", tmp_path / "pinned.yaml")
    assert values(load(place, "pinned", stream=True))[2] is True
    assert values(load(place, "pinned", stream=True, verify="never"))[2] is True
    world.web.behavior = at({f"/m/{SHARD}": damaged})
    assert "DigestMismatchError" in load(place, "pinned", stream=True, verify="never").err


def test_by_the_digests_that_a_card_publishes(place: Place, tmp_path: Path, world: World) -> None:
    """The first stream of a machine that has never seen the bytes."""
    place.run("digests", "near", "--write", tmp_path / "digests.json", "--no-progress")
    card = qwen_card("thin", world.uris["web"]) + "digests: ./digests.json\n"
    (tmp_path / "thin.yaml").write_text(card)
    place.run("import", tmp_path / "thin.yaml")
    assert values(load(place, "thin", stream=True, verify="always"))[1:3] == [True, True]
    world.web.behavior = at({f"/m/{SHARD}": damaged})
    assert re.match(r"DigestMismatchError: .*digests\.json", load(place, "thin", stream=True).err)


def test_another_checkpoint_under_the_address(place: Place, tmp_path: Path, world: World) -> None:
    place.run("index", "web")
    files = dict(world.web.files)
    other = make(tmp_path / "other", shards=2)
    first_shard = other / "model-00001-of-00002.safetensors"
    save_file({name: t.float() for name, t in load_file(first_shard).items()}, first_shard)
    try:
        world.web.files = {f"/m/{path.name}": path.read_bytes() for path in other.iterdir()}
        ended = load(place, "web", stream=True)
        assert "CorruptModelCheckpointError" in ended.err
        assert "lading index" in ended.err
    finally:
        world.web.files = files


@pytest.mark.parametrize("validators", [True, False])
def test_headers_are_read_again_only_if_validators_do_not_show_the_same_content(
    place: Place, world: World, monkeypatch: pytest.MonkeyPatch, validators: bool
) -> None:
    place.run("index", "web")
    expected = values(load(place, "near"))[0]
    monkeypatch.setattr(world.web, "etags", validators)
    world.web.requests.clear()

    assert values(load(place, "web", stream=True))[:2] == [expected, True]

    assert bool(world.web.gets(f"/m/{INDEX}")) == (not validators)


def test_an_adapter_is_merged_into_a_stream(place: Place, tmp_path: Path, world: World) -> None:
    write_adapter(tmp_path / "adapter", factors("model.layers.0.mlp.up_proj", 64, 32))
    for name, base in (("near_tuned", "near"), ("web_tuned", "web")):
        card = f"name: {name}\nbase: {base}\nadapter: {tmp_path / 'adapter'}\n"
        (tmp_path / f"{name}.yaml").write_text(card)
        place.run("import", tmp_path / f"{name}.yaml")
    for dtype in ("keep", "float16"):  # rounded twice, a value would differ
        expected = values(load(place, "near_tuned", dtype))[0]
        assert expected != values(load(place, "near", dtype))[0]
        assert values(load(place, "web_tuned", dtype, stream=True))[:2] == [expected, True]


def test_a_copy_of_a_tied_parameter_is_compared(place: Place, tmp_path: Path) -> None:
    found = []
    for differs in (0, 1):
        folder = make(tmp_path / "tied")
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + differs
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with serve({f"/{path.name}": path.read_bytes() for path in folder.iterdir()}) as server:
            name = f"tied{differs}"
            (tmp_path / f"{name}.yaml").write_text(qwen_card(name, server.url("/model.safetensors")))
            place.run("import", tmp_path / f"{name}.yaml")
            found.append(load(place, name, stream=True))
    assert values(found[0])[:2] == [values(load(place, "near"))[0], True]
    assert re.match("ModelCheckpointMismatchError: .*different values", found[1].err)


def test_an_object_store(place: Place, tmp_path: Path, moto: Moto, world: World) -> None:
    bucket = moto.bucket()
    for path, data in world.web.files.items():
        bucket.put(path.removeprefix("/"), data)
    (tmp_path / "s3.yaml").write_text(qwen_card("s3", f"{bucket.uri}/m"))
    place.run("import", tmp_path / "s3.yaml")
    with pytest.MonkeyPatch.context() as patch:
        use_s3(patch, moto.url)
        env = {**place.env, **{name: value for name, value in os.environ.items() if name.startswith("AWS_")}}
    ended = world.nursery.run(["-c", LOAD, "s3", "keep", json.dumps({"stream": True})], env)
    assert values(ended)[:2] == [values(load(place, "near"))[0], True]
    require_no_weights(place)


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from lading import simulate_gangs
from lading.models.hub import load_with_report

def status(key):
    return int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0]) << 10

gangs = simulate_gangs(1, **{sys.argv[1]: 4}) if sys.argv[1] else None
load_with_report("near", gangs=gangs, progress=False)  # imports, and what libraries keep
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
model, report = load_with_report("large", dtype=sys.argv[2], gangs=gangs, stream=True, progress=False)
local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
print(status("VmHWM") - before - sum(p.nbytes for p in local), sum(p.nbytes for p in local))
"""


@pytest.mark.parametrize(
    ("layers", "axis", "dtype"),
    [
        (2, "", "float32"),
        *(
            pytest.param(16, *case, marks=pytest.mark.slow)
            for case in [("", "float32"), ("", "keep"), ("tp", "float32"), ("tp", "keep"), ("sdp", "keep")]
        ),
    ],
)
def test_the_memory_beside_the_parameters(
    place: Place, world: World, tmp_path: Path, layers: int, axis: str, dtype: str
) -> None:
    save_file(tensors(layers, dim=1024, ffn=4096), tmp_path / "large.safetensors")
    with serve({"/large.safetensors": (tmp_path / "large.safetensors").read_bytes()}) as server:
        card = qwen_card("large", server.url("/large.safetensors"))
        card = card.replace("model_dim: 32", "model_dim: 1024").replace("ffn_inner_dim: 64", "ffn_inner_dim: 4096")
        (tmp_path / "large.yaml").write_text(card.replace("num_layers: 2", f"num_layers: {layers}"))
        place.run("import", tmp_path / "large.yaml")
        ended = world.nursery.run(["-c", MEASURE, axis, dtype], place.env)
    assert ended.code == 0, ended
    beside, parameters = map(int, ended.out.split())
    assert beside <= 64 << 20
    assert parameters >= 50 << 20


# --- faults -----------------------------------------------------------------------------------------------------------


def behind_the_header(behavior: Behaviour) -> Behaviour:
    """Misbehave in the weights of one file."""

    def behave(exchange: Exchange) -> None:
        wanted = exchange.wanted()
        (behavior if wanted is not None and wanted[0] > 0 else honest)(exchange)

    return at({f"/m/{SHARD}": behave})


def expires(exchange: Exchange) -> None:
    """Redirect to an address that holds for two requests."""
    path, _, token = exchange.path.partition("?signed=")
    if not token:
        exchange.answer(302, {"Location": f"{path}?signed={exchange.hub.count('signatures')}"})
    elif exchange.hub.count(f"uses of {token}") > 2:
        exchange.answer(403)
    else:
        honest(exchange)


RECOVERS: dict[str, Behaviour] = {
    "503 twice": behind_the_header(first(2, status(503))),
    "drops once": behind_the_header(first(1, drops(100))),
    "a signed address that expires": at({f"/m/{SHARD}": expires}),
}

FAILS: dict[str, tuple[Behaviour, str]] = {
    "503": (behind_the_header(status(503)), "FetchError"),
    "drops": (behind_the_header(drops(100)), "FetchError"),
    "drips": (behind_the_header(drips), "FetchError"),
    "another object in between": (behind_the_header(hostile.new_content_each_time), "FetchError"),
    "another range": (behind_the_header(hostile.shifted_range), "FetchError"),
    "another total": (behind_the_header(hostile.other_total), "FetchError"),
    "endless": (behind_the_header(hostile.endless), "FetchError|DigestMismatchError"),
}


SLOW = {"503 twice", "503", "drops", "drips", "another total", "endless"}
"""What is of the same kind as something in the quick tier."""


@pytest.mark.parametrize("what", cases(RECOVERS, slow=SLOW))
def test_a_failed_request_is_repeated_alone(place: Place, world: World, what: str) -> None:
    expected = values(load(place, "near"))[0]
    world.web.behavior = RECOVERS[what]
    assert values(load(place, "web", stream=True))[0] == expected


@pytest.mark.parametrize("what", cases(FAILS, slow=SLOW))
def test_a_server_that_misbehaves_ends_the_load(place: Place, world: World, what: str) -> None:
    expected = values(load(place, "web", stream=True))[0]
    files = dict(world.web.files)
    world.web.behavior, error = FAILS[what]
    ended = load(place, "web", stream=True, impatient=True)
    world.web.files = files
    assert ended.code == 1
    assert re.match(rf"({error}): ", ended.err), ended
    world.behave()
    assert values(load(place, "web", stream=True))[:3] == [expected, True, True]
    require_no_weights(place)
    assert files_in(place.cache, "tmp") == []


def test_an_interrupt_ends_all_requests(place: Place, world: World) -> None:
    """Also one that a server never answers; until then, the bytes and their rate are shown."""
    place.run("index", "web")
    held = threading.Event()

    def holds(exchange: Exchange) -> None:
        held.set()
        exchange.hub.closing.wait(30)
        exchange.close()

    world.web.behavior = behind_the_header(holds)
    child = world.nursery.start(["load", "web", "--stream"], place.env)
    assert held.wait(30)
    time.sleep(1)  # a bar appears after half a second
    struck = time.monotonic()
    child.signal(signal.SIGINT)
    ended = child.wait()
    assert time.monotonic() - struck < 10
    assert ended.code == 130
    assert re.search(r"stream: .*B/s", ended.err)


def test_secrets_of_an_address_are_in_no_message(place: Place, tmp_path: Path, world: World) -> None:
    secret = f"{world.uris['web']}?token=s3cret"
    (tmp_path / "secret.yaml").write_text(qwen_card("secret", secret))
    place.run("import", tmp_path / "secret.yaml")
    place.run("index", "secret")
    world.web.behavior = behind_the_header(status(503))
    done = world.nursery.run(["load", "secret", "--stream", "--no-progress"], place.env, impatient=True)
    assert done.code == 5
    assert "s3cret" not in done.out + done.err
    assert INDEX not in str(place.sql("SELECT path FROM verifications"))
