"""What a catalog costs: writing it, a million cards, a manifest of 100,000 tensors, the command line, 200 folders.

    python benchmarks/catalog.py                        # a million cards: some minutes, 4 GB of memory, 2 GB of disk
    python benchmarks/catalog.py --cards 20000 --rounds 3

Everything is compared within one run, taking turns: the import with sqlite3's `executemany` of the same rows, the large
catalog with one of 100 cards that gives the same answers, the command with a process that only imports what it needs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

import harness

from lading.cards.card import CardEntry, checkpoint_ref
from lading.cards.card_file import CardFile
from lading.cards.overrides import layers_of, merge_layers
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.import_cards import import_files
from lading.catalog.open import open_catalog
from lading.catalog.records import CheckpointContents
from lading.catalog.store import AssetStore
from lading.formats.manifest import Manifest, Shard
from lading.models.family import get_family
from lading.models.shapes import targets_of_config
from lading.planning.box import Box
from lading.planning.plan import Wanted, plan
from lading.system.settings import Settings

PARTS = ("bulk", "scale", "manifest", "pages", "process", "folders")

CARDS = ("sources", "families", "cards")
CHECKPOINTS = ("checkpoints", "shards", "tensors")

SMALL = 100
BULK = 100_000
TENSORS = 100_000
PAGES = 10_000
BATCH = 100_000

Rows = list[list[Any]]
Part = dict[str, Rows]

FAMILIES = ("llama", "mistral", "bert", "gemma", "phi", "t5", "wav2vec2", "falcon", "olmo", "mpt", "bloom", "opt")
LICENSES = ("apache-2.0", "mit", "llama3", "cc-by-nc-4.0", "gemma", "openrail")
TASKS = ("chat", "summarization", "translation", "speech recognition", "code completion", "classification")
LANGUAGES = ("en", "de", "fr", "es", "zh", "hi", "ar", "sw")


# --- cards -----------------------------------------------------------------------------------------------------------


def cards(count: int) -> Iterator[CardEntry]:
    """Cards that look real: bases two levels deep, a dozen families; 50 of them are the same whatever ``count``."""
    yield from _common()

    rng = random.Random(count)
    made = 50
    for family_number in range(1, 1_000_000):
        family = FAMILIES[family_number % len(FAMILIES)]
        root = f"{family}_{family_number}"
        yield _card(root, model_family=family, license=rng.choice(LICENSES), url=f"https://example.com/{root}")
        made += 1
        for size in (1, 3, 8, 14, 70):
            base = f"{root}_{size}b"
            yield _card(
                base, base=root, model_arch=f"{family}_{size}b", checkpoint=f"hg://{family}-team/{base}",
                tokenizer=f"hg://{family}-team/{base}",
            )  # fmt: skip
            made += 1
            for tune in range(200):
                if made >= count:
                    return
                task = rng.choice(TASKS)
                yield _card(
                    f"{base}_{task.replace(' ', '_')}_{tune}",
                    base=base,
                    checkpoint=f"hg://user{rng.randrange(50_000)}/{base}-{tune}",
                    task=task,
                    languages=rng.sample(LANGUAGES, 2),
                    description=f"{family} {size}B fine-tuned for {task}, {rng.randrange(1, 100)}h of data",
                    model_config={"dropout_p": rng.randrange(10) / 10},
                )
                made += 1


def _common() -> Iterator[CardEntry]:
    yield _card("qwen_bench", model_family="bench_family", license="apache-2.0", checkpoint="hg://bench/base")
    for n in range(39):
        yield _card(f"qwen_bench_{n}", base="qwen_bench", model_arch="qwen3_0.6b", checkpoint=f"hg://bench/{n}")
    for n in range(10):
        yield _card(f"asr_{n}", base="qwen_bench", description="A zyzzyva hears speech after 777h of data")


def _card(name: str, **metadata: object) -> CardEntry:
    return CardEntry(name=name, metadata=metadata)


def card_files(count: int) -> Iterator[CardFile]:
    """The cards in files as a parser would give them."""
    made = cards(count)
    number = 0
    while piece := tuple(islice(made, BATCH)):
        text = f"bench{number}"
        yield CardFile(
            source=f"file:///bench/{text}.jsonl", sha256=sha256(text.encode()).hexdigest(), cards=piece,
            architectures=(), problems=(),
        )  # fmt: skip
        number += 1


def settings(path: Path) -> Settings:
    """Settings of a catalog in the file ``path``, without cards of the user."""
    return Settings(
        database_url=f"sqlite:///{path}", cache_dir=path.parent / "cache", card_paths=(), env=None, offline=True
    )


def make_catalog(path: Path, count: int) -> AssetStore:
    """A catalog of ``count`` cards, besides the package's own."""
    database = open_catalog(settings(path))
    for file in card_files(count):
        import_files(database, [file])

    return AssetStore(database)


# --- bulk import -----------------------------------------------------------------------------------------------------


def bulk(folder: Path, count: int, rounds: int) -> Part:
    """Rates of import beside those of ``executemany`` of the same rows into the same tables, indexes and all."""
    empty = folder / "empty.sqlite"
    open_catalog(settings(empty))
    (file,) = card_files(min(count, BULK))
    manifest = make_manifest(min(count, TENSORS))
    target = folder / "bulk.sqlite"

    def by_lading() -> tuple[float, float]:
        shutil.copy(empty, target)
        database = open_catalog(settings(target))
        start = time.perf_counter()
        import_files(database, [file])
        middle = time.perf_counter()
        record_checkpoint(database, CheckpointContents(uri="hg://bench/base", manifest=manifest))
        return middle - start, time.perf_counter() - middle

    by_lading()
    with closing(sqlite3.connect(target)) as connection:
        rows = {name: _new_rows(connection, empty, name) for name in (*CARDS, *CHECKPOINTS)}
        words = connection.execute("SELECT id, search_text FROM cards ORDER BY id").fetchall()[-len(rows["cards"]) :]

    def raw(search: bool) -> tuple[float, float]:
        shutil.copy(empty, target)
        with closing(sqlite3.connect(target, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            indexed = {"card_search (rowid, search_text)": words} if search else {}
            first = _insert(connection, {name: rows[name] for name in CARDS} | indexed)
            second = _insert(connection, {name: rows[name] for name in CHECKPOINTS})
        return first, second

    found: dict[str, list[tuple[float, float]]] = {"lading": [], "raw": [], "raw without search": []}
    for _ in range(rounds):
        found["lading"].append(by_lading())
        found["raw"].append(raw(search=True))
        found["raw without search"].append(raw(search=False))

    table: Rows = [["rows", "lading, rows/s", "executemany, rows/s", "ratio", "goal: at least", ""]]
    for what, number, part, other in (
        ("cards", len(rows["cards"]), 0, "raw"),
        ("cards, beside no search index there", len(rows["cards"]), 0, "raw without search"),
        ("tensors", len(rows["tensors"]), 1, "raw"),
    ):
        ours, theirs = [run[part] for run in found["lading"]], [run[part] for run in found[other]]
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        table.append(
            [f"{number:,} {what}", f"{number / statistics.median(ours):,.0f}",
             f"{number / statistics.median(theirs):,.0f}", f"{ratio:.2f}", "0.2", _met(ratio >= 0.2)]
        )  # fmt: skip

    return {"rows": table}


def _new_rows(connection: sqlite3.Connection, before: Path, table: str) -> list[tuple[object, ...]]:
    """The rows that ``before`` does not have."""
    connection.execute("ATTACH ? AS before", (str(before),))
    rows = connection.execute(f"SELECT * FROM main.{table} EXCEPT SELECT * FROM before.{table}").fetchall()
    connection.execute("DETACH before")

    return rows


def _insert(connection: sqlite3.Connection, tables: dict[str, list[tuple[object, ...]]]) -> float:
    start = time.perf_counter()
    connection.execute("BEGIN IMMEDIATE")
    for table, rows in tables.items():
        if rows:
            connection.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)
    connection.execute("COMMIT")

    return time.perf_counter() - start


# --- a large catalog beside a small one ------------------------------------------------------------------------------


def scale(small: AssetStore, large: AssetStore, rounds: int, count: int) -> Part:
    """The same questions, with the same answers, to a small and a large catalog."""
    questions: dict[str, Callable[[AssetStore], object]] = {
        "retrieve_card": lambda store: store.retrieve_card("qwen_bench_7"),
        "show": _show,
        "list 'qwen*' --limit 20": lambda store: store.models("qwen*", limit=20),
        "list --limit 20": lambda store: len(store.models(limit=20)),
        "list --family, 50 models": lambda store: store.models(family="bench_family"),
        "find_cards, 50 cards": lambda store: [c.name for c in store.find_cards("model_family", "bench_family")],
        "list --search, a rare word": lambda store: store.models(search="zyzzyva"),
        "list --search, two common words": lambda store: store.models(search="speech 777h"),
    }
    table: Rows = [["question", "100 cards, ms", f"{count:,} cards, ms", "ratio", "goal: at most", ""]]
    for name, ask in questions.items():
        if ask(small) != ask(large):
            sys.exit(f"{name}: the two catalogs answer differently")
        times: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(rounds * 20):
            for i, store in enumerate((small, large)):
                start = time.perf_counter()
                ask(store)
                times[i].append(time.perf_counter() - start)
        a, b = statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3
        table.append([name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}", "1.5", _met(b / a <= 1.5)])

    return {"rows": table}


def _show(store: AssetStore) -> object:
    """What `lading show` asks."""
    card = store.retrieve_card("qwen_bench_7")
    summary = store.summary(card)
    architecture = store.maybe_architecture(card.field("model_arch").as_(str), "qwen")

    return summary, architecture, store.checkpoint(checkpoint_ref(card).uri)


# --- a large manifest ------------------------------------------------------------------------------------------------


def make_manifest(count: int) -> Manifest:
    """A mixture of experts: many tensors of few shapes, in shards of some gigabytes."""
    names, shapes, shard_ids, offsets = [], [], array("I"), array("q")
    per_shard, at = 1_000, 0
    for i in range(count):
        expert, kind = divmod(i, 3)
        layer, expert = divmod(expert, 384)
        if i % per_shard == 0:
            at = 100_000
        names.append(f"model.layers.{layer}.mlp.experts.{expert}.{('gate', 'up', 'down')[kind]}_proj.weight")
        shapes.append((7_168, 2_048) if kind == 2 else (2_048, 7_168))
        shard_ids.append(i // per_shard)
        offsets.append(at)
        at += 2 * 2_048 * 7_168
    shards = -(-count // per_shard)

    return Manifest(
        format="safetensors",
        shards=tuple(
            Shard(name=f"model-{i + 1:05}-of-{shards:05}.safetensors", size=100_000 + per_shard * 2 * 2_048 * 7_168)
            for i in range(shards)
        ),
        names=names,
        dtypes=["BF16"] * count,
        shapes=shapes,
        shard_ids=shard_ids,
        offsets=offsets,
        index_name="model.safetensors.index.json",
    )


def manifest(store: AssetStore, rounds: int) -> Part:
    """A manifest of 100,000 tensors written, read and planned."""
    given = make_manifest(TENSORS)
    uri = "hg://bench/7"
    writes, reads, wholes = [], [], []

    for n in range(rounds):
        start = time.perf_counter()
        record_checkpoint(store.database, CheckpointContents(uri=f"{uri}?{n}" if n else uri, manifest=given))
        writes.append(time.perf_counter() - start)

        start = time.perf_counter()
        card = store.retrieve_card("qwen_bench_7")
        architecture = store.architecture(card.field("model_arch").as_(str), "qwen")
        merge_layers({}, layers_of(card, architecture))
        middle = time.perf_counter()
        stored = store.checkpoint(checkpoint_ref(card).uri)
        reads.append(time.perf_counter() - middle)
        _plan(stored.manifest)
        wholes.append(time.perf_counter() - start)

    tracemalloc.start()
    stored = store.checkpoint(uri)
    kept = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    assert stored is not None
    assert len(stored.manifest) == TENSORS

    whole = statistics.median(wholes)
    return {
        "rows": [
            ["what", "figure", "goal: at most", ""],
            ["write", f"{statistics.median(writes):.2f} s", "", ""],
            ["read", f"{statistics.median(reads):.2f} s", "", ""],
            ["card, config, manifest and plan", f"{whole:.2f} s", "1.5 s", _met(whole <= 1.5)],
            ["memory that the manifest keeps", f"{kept:.1f} MB", "40 MB", _met(kept <= 40)],
        ]
    }


def _plan(stored: Manifest) -> None:
    whole = {shape: Box.whole(shape) for shape in set(stored.shapes)}
    wanted = Wanted(
        tensors=range(len(stored)), boxes=[whole[shape] for shape in stored.shapes], dtypes=list(stored.dtypes)
    )
    made = plan(stored, wanted)
    assert made.read_bytes == stored.total_bytes


# --- the command line ------------------------------------------------------------------------------------------------


def process(folder: Path, rounds: int) -> Part:
    """Commands beside a process that only imports what they cannot do without; `path` also beside `show`."""
    environment = _environment(folder) | {"LADING_DATABASE_URL": f"sqlite:///{folder / 'list.sqlite'}"}
    model = str(_local_model(folder))
    for words in (["import", model], ["index", "local"]):  # the first one makes the catalog, too
        subprocess.run([sys.executable, "-m", "lading", *words], env=environment, check=True, capture_output=True)
    run = "from lading.cli import main; main()"
    commands = {
        "import sqlalchemy.orm, click": ["import sqlalchemy.orm, click"],
        "lading list": [run, "list"],
        "lading show": [run, "show", "local"],
        "lading path": [run, "path", "local"],
        "lading check": [run, "check", "local"],
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for n in range(rounds * 3 + 1):
        for name, command in commands.items():
            ran = _measured(*command, environment=environment)
            if n:
                runs[name].append(ran)

    seconds = {name: [second for second, _ in ran] for name, ran in runs.items()}
    floor, *others = commands
    goals = {"lading list": (floor, 1.5), "lading path": ("lading show", 1.3)}
    table: Rows = [["process", "s", "peak memory, MB", "ratio", "beside", "goal: at most", ""]]
    for name in (floor, *others):
        beside, goal = goals.get(name, (floor, None))
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[beside], strict=True))
        table.append(
            [name, f"{statistics.median(seconds[name]):.3f}", f"{max(peak for _, peak in runs[name]):.0f}",
             "" if name == floor else f"{ratio:.2f}", "" if name == floor else beside, goal or "",
             "" if goal is None else _met(ratio <= goal)]
        )  # fmt: skip

    return {"rows": table}


# The kernel's figure for a process that has ended also covers the moment before it became this program.
_PEAK = """
import atexit
from pathlib import Path
def keep():
    lines = Path("/proc/self/status").read_text().splitlines()
    print("peak", next(line.split()[1] for line in lines if line.startswith("VmHWM")), flush=True)
atexit.register(keep)
"""


def _measured(code: str, *arguments: str, environment: dict[str, str]) -> tuple[float, float]:
    """Run code in a process of its own; return its seconds, and its peak memory in megabytes."""
    start = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", _PEAK + code, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start

    return seconds, int(ran.stdout.split()[-1]) / 1e3


def _local_model(folder: Path) -> Path:
    """Write a model whose weights are a hole in its file, and return a card for it."""
    family = get_family("qwen")
    header: dict[str, object] = {}
    end = 0
    targets = targets_of_config(family, family.config_kls(num_layers=4))
    for name, shape in zip(targets.names, targets.shapes, strict=True):
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    card = folder / "local.yaml"
    card.write_text(
        "name: local\nmodel_family: qwen\nmodel_config: {num_layers: 4}\ncheckpoint: ./model.safetensors\n",
        encoding="utf-8",
    )

    return card


# --- the pages of `lading browse` ------------------------------------------------------------------------------------


def pages(folder: Path, rounds: int) -> Part:
    """The pages that a browser gets: of 10,000 cards, a thousand with a manifest of 300 tensors."""
    store = make_catalog(folder / "pages.sqlite", PAGES)
    manifest = make_manifest(300)
    models = [model for model in store.models() if model.checkpoint][:1_000]
    for model in models:
        assert model.checkpoint is not None
        record_checkpoint(
            store.database, CheckpointContents(uri=model.checkpoint, manifest=manifest), cards=[model.name]
        )
    environment = os.environ | {"LADING_DATABASE_URL": store.database.url, "XDG_CONFIG_HOME": str(folder)}
    addresses = {
        "/": "/", "models": "/catalog/models", "a search": "/catalog/models?_search=chat+en",
        "models by size": "/catalog/models?_sort_desc=bytes", "tensors": "/catalog/model_tensors",
        "a question": "/catalog/bf16-under-10-gb", "a model": f"/-/model?name={models[0].name}",
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in addresses}
    command = [sys.executable, "-m", "lading", "browse", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        login = server.stdout.readline().strip()
        browser = build_opener(ProxyHandler({}), HTTPCookieProcessor())
        browser.open(login).read()
        for _ in range(rounds * 3):
            for name, address in addresses.items():
                start = time.perf_counter()
                browser.open(login.partition("/-/")[0] + address).read()
                times[name].append(time.perf_counter() - start)
        server.kill()

    return {
        "rows": [
            ["page", "s", "goal: at most", ""],
            *([name, f"{(s := statistics.median(t)):.3f}", "1 s", _met(s <= 1)] for name, t in times.items()),
        ]
    }


def _environment(folder: Path) -> dict[str, str]:
    """The environment of commands, which find their modules compiled, as what is installed is, after a first round."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE" and not k.startswith("LADING_")}

    return inherited | {"XDG_CONFIG_HOME": str(folder), "PYTHONPYCACHEPREFIX": str(folder / "compiled")}


# --- folders of one's own --------------------------------------------------------------------------------------------

QWEN = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936, "max_position_embeddings": 40_960,
    "tie_word_embeddings": True, "rope_theta": 1_000_000, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
LAYER = {
    "input_layernorm": (1024,), "post_attention_layernorm": (1024,), "self_attn.q_proj": (2048, 1024),
    "self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024), "self_attn.o_proj": (1024, 2048),
    "self_attn.q_norm": (128,), "self_attn.k_norm": (128,), "mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}  # fmt: skip


def make_folders(folder: Path, count: int) -> None:
    """Fine-tunes of a model of 0.6 billion parameters, whose weights are holes in the files."""
    shapes = {"model.embed_tokens.weight": (151_936, 1024), "model.norm.weight": (1024,)}
    shapes |= {f"model.layers.{n}.{name}.weight": shape for n in range(28) for name, shape in LAYER.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()

    for n in range(count):
        tuned = folder / f"tuned-{n}"
        tuned.mkdir(parents=True)
        with (tuned / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        (tuned / "config.json").write_text(json.dumps(QWEN))
        (tuned / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-0.6B\n---\n")


def folders(folder: Path, rounds: int) -> Part:
    """`lading add` of 200 folders, and `lading path` beside `lading show`."""
    make_folders(folder / "models", 200)
    environment = _environment(folder)
    lading = [sys.executable, "-m", "lading"]
    commands = {
        "add": [*lading, "add", str(folder / "models")],
        "add, again": [*lading, "add", str(folder / "models")],
        "list --local": [*lading, "list", "--local"],
        "path": [*lading, "path", "tuned-7"],
        "show": [*lading, "show", "tuned-7"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, float] = {}
    for n in range(rounds + 1):
        environment["LADING_DATABASE_URL"] = f"sqlite:///{folder / f'add{n}.sqlite'}"
        subprocess.run([*lading, "list"], env=environment, check=True, capture_output=True)
        for name, command in commands.items():
            for _ in range(1 if name == "add" else 3):
                start = time.perf_counter()
                memory[name] = _run(command, environment)
                if n:  # the first one compiles what it imports
                    seconds[name].append(time.perf_counter() - start)

    found = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = found["path"] / found["show"]
    goals = {"add": ("10 s", found["add"] <= 10), "path": ("1.3 times show", ratio <= 1.3)}
    return {
        "rows": [
            ["lading, 200 folders", "s", "MB", "goal: at most", ""],
            *(
                [name, f"{found[name]:.2f}", f"{memory[name]:.0f}", goal, "" if met is None else _met(met)]
                for name in commands
                for goal, met in [goals.get(name, ("", None))]
            ),
        ]
    }


def _run(command: list[str], environment: dict[str, str]) -> float:
    """Run a command, and return the most memory that it had, in MB."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")

    return usage.ru_maxrss / 1e3


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


def show(title: str, part: Part) -> None:
    """Print a part as Markdown."""
    head, *rows = part["rows"]
    print(f"\n{title}\n")
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(map(str, line))} |", flush=True)


def main() -> None:
    """Measure everything, print it, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=1_000_000, help="of the large catalog")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--save", metavar="NAME", help="keep the figures as benchmarks/results/NAME.json")
    options = parser.parse_args()
    wanted = options.only or PARTS

    harness.DATA.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"benchmark": "catalog", "rounds": options.rounds}
    with tempfile.TemporaryDirectory(dir=harness.DATA) as name:
        folder = Path(name)
        if "bulk" in wanted:
            results["bulk"] = bulk(folder, options.cards, options.rounds)
            show("Bulk import", results["bulk"])
        small = make_catalog(folder / "small.sqlite", SMALL)
        if "scale" in wanted:
            start = time.perf_counter()
            large = make_catalog(folder / "large.sqlite", options.cards)
            print(f"{options.cards:,} cards in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            results["scale"] = scale(small, large, options.rounds, options.cards)
            show("A large catalog beside a small one", results["scale"])
        if "manifest" in wanted:
            results["manifest"] = manifest(small, options.rounds)
            show("A manifest of 100,000 tensors", results["manifest"])
        if "pages" in wanted:
            results["pages"] = pages(folder, options.rounds)
            show("The pages of a catalog of 10,000 cards", results["pages"])
        if "process" in wanted:
            results["process"] = process(folder, options.rounds)
            show("The command line", results["process"])
        if "folders" in wanted:
            results["folders"] = folders(folder, options.rounds)
            show("Folders of one's own", results["folders"])

    results["machine"] = harness.machine()
    if options.save:
        harness.save(options.save, results)


if __name__ == "__main__":
    main()
