"""`lading browse`: the catalog in a browser, read-only, for the user who started it."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.cookiejar import CookieJar
from io import StringIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

import pytest
from datasette.utils import parse_metadata

import lading
import lading.cli.browse
from lading.catalog.query import view_columns
from tests.helpers.chromium import CHROMIUM, chromium

METADATA = parse_metadata((Path(lading.cli.browse.__file__).parent / "metadata.yaml").read_text(encoding="utf-8"))
DESCRIBED = METADATA["databases"]["catalog"]
SQL_PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")

HOSTILE = "<script>document.title = 'owned'</script>"

MORE_CARDS = f"""\
name: tiny_copy
base: tiny
---
name: {json.dumps(HOSTILE)}
base: tiny
license: "<img src=x onerror=alert(1)>"
---
name: Bär & Söhne/größe?a=1#x
base: tiny
---
name: signed
model_family: qwen
model_arch: qwen3_0.6b
checkpoint: https://someone:hunter2@example.com/model.safetensors?sig=s3cr3tsig#s3cr3tfragment
tokenizer: https://example.com/tokenizer.json?token=s3cr3ttoken
notes: {{places: ["s3://k3y:s3cr3tkey@bucket/a", "see https://example.com/?s3cr3tquery or ask"]}}
"""

SECRETS = ("hunter2", "s3cr3t", "k3y")


class Client:
    """A client of the site, logged in if it opened the address that the command printed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.home = address.partition("/-/")[0]
        self._open = build_opener(ProxyHandler({}), HTTPCookieProcessor(CookieJar())).open

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and the body of a page."""
        try:
            with self._open(path if "://" in path else self.home + path, timeout=60) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def log_in(self) -> None:
        assert self.get(self.address)[0] == 200


@pytest.fixture
def serving(catalog: Path, tmp_path: Path) -> Callable[[], object]:
    """Runs the command in a process of its own; gives the process and a client."""

    @contextmanager
    def run(*words: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
        with (
            open(tmp_path / "stderr", "w") as errors,
            subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "lading", "browse", "--port", "0", *words],
                stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True, env={**os.environ},
            ) as process,
        ):  # fmt: skip
            try:
                assert process.stdout is not None
                address = process.stdout.readline().strip()
                assert address, (tmp_path / "stderr").read_text()
                yield process, Client(address)
            finally:
                process.kill()

    return run


@pytest.fixture
def more_cards(cards: Path, cli) -> None:
    path = cards.with_name("more.yaml")
    path.write_text(MORE_CARDS)
    cli("import", path)
    cli("index", "tiny")
    cli("index", "tiny_copy")


def questions() -> dict[str, str]:
    """The addresses of all questions, with values for their parameters."""
    values = {"path": "tiny", "model": "tiny"}
    found = {}
    for name, query in DESCRIBED["queries"].items():
        names = re.findall(r":(\w+)", query["sql"])
        found[name] = f"/catalog/{name}?{urlencode({n: values[n] for n in names})}"
    return found


def views_and_tables() -> list[str]:
    found = lading.query("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").rows
    return [name for (name,) in found if not name.startswith("card_search")]


# --- without a browser ------------------------------------------------------------------------------------------------


def test_who_sees_what(serving, more_cards, cli, catalog):
    """Only the user who started it sees anything, secrets are hidden, and nothing is written."""
    pages = [
        "/", "/catalog", "/-/model?name=tiny", "/-/model?name=signed", "/-/plan.svg?name=tiny", "/-/databases.json",
        f"/catalog.json?{urlencode({'sql': 'select * from cards'})}",
        f"/catalog?{urlencode({'sql': 'select checkpoint_uri, search_text from cards'})}",
        *questions().values(),
        *(f"/catalog/{name}{form}" for name in views_and_tables() for form in ("", ".json?_size=max", ".csv")),
    ]  # fmt: skip
    hidden = [
        f"/catalog?{urlencode({'sql': sql})}"
        for sql in (
            "select search_text from card_search",
            "select rowid from card_search where card_search match 's3cr3tsig'",
            "select block from card_search_data",
            "select term from card_search_idx",
        )
    ]
    with serving() as (process, client):
        before = sha256(catalog.read_bytes()).hexdigest()
        stranger = Client(client.address)
        client.log_in()
        # The address works once.
        assert stranger.get(stranger.address)[0] == 403
        for page in [*pages, *hidden]:
            status, body = stranger.get(page)
            assert status == 403, page
            assert "tiny" not in body

        for page in pages:
            status, body = client.get(page)
            assert status == 200, (page, body)
            for secret in SECRETS:
                assert secret not in body, (page, secret)
        for page in hidden:
            assert client.get(page)[0] == 400, page
        assert client.get("/catalog.db")[0] == 403

        # What is left of an address.
        _, body = client.get("/catalog/models.json?name=signed&_shape=array")
        assert json.loads(body)[0]["checkpoint"] == "https://example.com/model.safetensors"
        _, body = client.get("/catalog/cards.json?name=signed&_shape=array")
        notes = json.loads(json.loads(body)[0]["metadata"])["notes"]
        assert notes == {"places": ["s3://bucket/a", "see https://example.com/"]}

        for sql in ("delete from cards", "attach 'x' as y", "pragma journal_mode = delete", "vacuum into 'x'"):
            assert client.get(f"/catalog?{urlencode({'sql': sql})}")[0] == 400
        assert sha256(catalog.read_bytes()).hexdigest() == before

        # The catalog is alive.
        assert "[]" in client.get("/catalog/models.json?name=tiny_new&_shape=array")[1]
        path = catalog.parent / "new.yaml"
        path.write_text("name: tiny_new\nbase: tiny\n")
        cli("import", path)
        assert "tiny_new" in client.get("/catalog/models.json?name=tiny_new&_shape=array")[1]
        assert "tiny" in client.get("/-/model?name=tiny_new")[1]

        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert (catalog.parents[3] / "stderr").read_text().splitlines()[-1] == "lading: interrupted"


def test_pages(serving, more_cards, cli):
    with serving() as (_, client):
        client.log_in()

        # The same search as that of the command line.
        for words in ("apache tin", "BÄR sohne", "qwen3 0.6b", "nothing like it", "***", "tiny_c"):
            expected = cli("list", "--search", words, "-q").stdout.split("\n")[:-1]
            _, body = client.get(f"/catalog/models.csv?_size=max&_search={quote(words)}")
            assert [row["name"] for row in csv.DictReader(StringIO(body))] == expected, words

        # Names of strangers are text, and lead to their pages.
        for name in (HOSTILE, "Bär & Söhne/größe?a=1#x"):
            status, body = client.get(f"/-/model?{urlencode({'name': name})}")
            assert status == 200
            assert HOSTILE not in body
            assert "<img src=x" not in body
        status, body = client.get("/-/model?name=" + quote("tin"))
        assert status == 404
        assert "Did you mean" in body
        for page in ("/-/model", "/-/plan.svg", "/-/plan.svg?name=tin", "/-/plan.svg?name=tiny_arch"):
            assert client.get(page)[0] == 404, page
        for tp in ("0", "-1", "x", "1e3", "1025", "9" * 5_000, "٣"):
            assert client.get(f"/-/plan.svg?{urlencode({'name': 'tiny', 'tp': tp})}")[0] == 400, tp

        # A broken card has a reason, not a page.
        status, body = client.get("/-/model?name=tiny_dangling")
        assert (status, "tiny_missing" in body) == (404, True)

        # A model that shares the checkpoint.
        _, body = client.get(f"/catalog/sharing.json?{urlencode({'model': 'tiny', '_shape': 'array'})}")
        assert {"model": "tiny_copy", "shares": "the checkpoint", "file": None} in json.loads(body)


def test_questions_are_for_the_command_line_too(more_cards):
    values = {"path": "tiny", "model": "tiny"}
    models = {}
    for name, query in DESCRIBED["queries"].items():
        names = re.findall(r":(\w+)", query["sql"])
        result = lading.query(query["sql"], {n: values[n] for n in names})
        models[name] = {row.get("model") for row in result.to_dicts()}

    for name in ("here", "bf16-under-10-gb", "largest", "users-of-a-file", "unverified", "recent"):
        assert "tiny" in models[name], name
    assert models["sharing"] >= {"tiny_copy", "tiny_child"}
    assert models["based-on"] == {"tiny_child", "tiny_copy", HOSTILE, "Bär & Söhne/größe?a=1#x"}
    assert models["broken"] == {"tiny_dangling"}
    assert models["failed-checks"] == set()


@pytest.mark.slow
def test_files_that_models_share(home, cli, tmp_path):
    """Copies of a file, and two cards that name one file."""
    from tests.helpers.make_checkpoint import make

    config = json.dumps({"model_dim": 32, "num_layers": 2})
    cards = []
    for name in ("one", "two"):
        make(tmp_path / name)
        cards.append(f"name: {name}\nmodel_family: qwen\nmodel_config: {config}\ncheckpoint: {tmp_path / name}\n")
    cards.append(
        f"name: file\nmodel_family: qwen\nmodel_config: {config}\n"
        f"checkpoint: {tmp_path / 'one' / 'model.safetensors'}\n"
    )
    (tmp_path / "cards.yaml").write_text("---\n".join(cards))
    cli("import", tmp_path / "cards.yaml")
    for name in ("one", "two", "file"):
        cli("index", name)

    def sharing() -> set[tuple[str, str, str | None]]:
        return set(lading.query(DESCRIBED["queries"]["sharing"]["sql"], {"model": "one"}).rows)

    assert sharing() == {("file", "a file at the same path", str(tmp_path / "one" / "model.safetensors"))}
    with lading.get_asset_store().database.write() as connection:
        connection.exec_driver_sql(
            f"UPDATE shards SET sha256 = '{'0' * 64}' WHERE checkpoint_id IN "
            f"(SELECT id FROM checkpoints WHERE uri LIKE '%/one' OR uri LIKE '%/two')"
        )
    assert ("two", "a file of the same SHA-256", "model.safetensors") in sharing()


def test_descriptions_are_those_of_the_documentation(catalog):
    assert DESCRIBED["tables"].keys() == {view for view, _ in view_columns(lading.get_asset_store().database)}
    of_models = DESCRIBED["tables"]["models"]["columns"]
    for view, described in DESCRIBED["tables"].items():
        columns = described["columns"]
        assert list(columns) == list(lading.query(f"SELECT * FROM {view} LIMIT 0").columns)
        section = SQL_PAGE.partition(f"\n### `{view}`\n")[2].partition("\n### ")[0].partition("\n## ")[0]
        rows = re.findall(r"^\| (`.+`) \| (.+) \|$", section.partition("| status |")[0], re.MULTILINE)
        documented = {name: text.replace("`", "") for names, text in rows for name in re.findall(r"\w+", names)}
        if view == "assets":  # "those of `models`, followed by `problem`"
            documented = {name: text for name, text in columns.items() if of_models.get(name, text) == text}
        assert columns.keys() == documented.keys()
        for name, text in documented.items():
            if text.startswith("as in models"):
                assert columns[name].partition(";")[0] == of_models[name].partition(";")[0]
                assert columns[name].endswith(text.partition(";")[2])
            else:
                assert columns[name] == text


@pytest.mark.parametrize(
    ("url", "hint"),
    [("postgresql+psycopg://me:hunter2@db.example/lading", "psql"), ("sqlite://", "LADING_DATABASE_URL to a file")],
)
def test_a_catalog_elsewhere(cli, monkeypatch, url, hint):
    monkeypatch.setenv("LADING_DATABASE_URL", url)

    result = cli("browse", code=2)

    assert len(result.stderr.splitlines()) == 1
    assert hint in result.stderr
    assert "hunter2" not in result.stderr


def test_without_datasette(cli, monkeypatch):
    def nothing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", nothing)

    result = cli("browse", code=2)

    assert len(result.stderr.splitlines()) == 1
    assert "it is not installed" in result.stderr
    assert "pip install 'lading-hub[browse]'" in result.stderr


def test_another_datasette(cli, monkeypatch, tmp_path):
    (tmp_path / "datasette-1.0.dist-info").mkdir()
    (tmp_path / "datasette-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: datasette\nVersion: 1.0"
    )
    monkeypatch.syspath_prepend(tmp_path)

    assert "but version 1.0 is installed" in cli("browse", code=2).stderr


def test_a_port_in_use(cli):
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = cli("browse", "--port", str(other.getsockname()[1]), code=8)

    assert len(result.stderr.splitlines()) == 1
    assert "--port 0" in result.stderr


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_session(serving, more_cards, tmp_path):
    with serving() as (_, client), chromium(tmp_path / "profile") as tab:
        tab.open(client.address)
        assert tab.texts("h1") == ["The catalog of lading"]
        assert tab.texts(".questions a") == [query["title"] for query in DESCRIBED["queries"].values()]

        # Search as a user does.
        tab.evaluate("document.querySelector('[name=_search]').value = 'tiny mit'")
        tab.act("document.querySelector('[role=search]').submit()")
        assert tab.texts("td.col-name") == ["tiny_child"]
        assert "the name that load_model takes" in tab.texts("dl.column-descriptions dd")
        tab.act("document.querySelector('td.col-name a').click()")
        assert tab.texts("h1") == ["tiny_child"]

        tab.open(f"{client.home}/-/model?name=tiny")
        summary = dict(zip(tab.texts("#summary th"), tab.texts("#summary td"), strict=True))
        assert (summary["status"], summary["size"], summary["tensors"]) == ("ready", "43.6 kB", "24 in 1 shard")
        fields = tab.texts("#card td:first-child")
        assert "checkpoint" in fields
        config = zip(*(tab.texts(f"#configuration td:nth-child({n})") for n in (1, 2)), strict=True)
        assert dict(config)["head_dim"] == "8"
        assert tab.texts("#layers td:first-child") == ["model.layers.0", "model.layers.1", "in no layer"]
        assert {"tiny_child", "tiny_copy", HOSTILE} <= set(tab.texts("#sharing td:first-child"))
        assert tab.evaluate("document.title") == "tiny"

        # The picture, for one rank and then for two.
        def picture() -> str:
            script = "document.querySelector('iframe').contentDocument.documentElement?.textContent"
            return str(tab.evaluate(script))

        wait_for(lambda: "tiny on 1 rank" in picture())
        tab.evaluate("document.querySelector('[name=tp]').value = 2; document.querySelector('.plan-sizes').submit()")
        wait_for(lambda: "tiny on 2 ranks" in picture())
        assert "model.layers.0.mlp.down_proj.weight BF16 [32, 64]" in picture()

        # From a layer to its tensors.
        tab.act("document.querySelector('#layers a').click()")
        assert {name.rpartition("layers.")[2][:2] for name in tab.texts("td.col-tensor")} == {"0."}

        # A question.
        tab.open(f"{client.home}/catalog/bf16-under-10-gb")
        assert "tiny" in tab.texts("td.col-model")
        assert "43.6 kB" in tab.texts("td.col-bytes")

        assert [url for url in tab.requested if not url.startswith((client.home + "/", "data:"))] == []


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
