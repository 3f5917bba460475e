"""What only shows in a process of its own: what is imported, signals, pipes, terminals, completion."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.make_checkpoint import make

HEAVY = {"torch", "pydantic", "alembic", "ruamel.yaml", "numpy", "transformers", "huggingface_hub"}


def modules_after(*lines: str) -> dict[str, set[str]]:
    """All that is imported after each of some command lines, one after the other in one new interpreter."""
    code = (
        "import shlex, sys\n"
        "from lading.cli.app import app\n"
        "for line in sys.argv[1:]:\n"
        "    try: app(shlex.split(line))\n"
        "    except SystemExit as done: assert not done.code, done.code\n"
        "    print('\\nMODULES', *sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True, check=True).stdout
    found = [set(words.split()) for words in re.findall(r"^MODULES (.*)$", out, re.MULTILINE)]
    return dict(zip(lines, found, strict=True))


def test_questions_import_nothing_heavy(catalog):
    questions = (
        "list",
        "show qwen3_0.6b",
        "show qwen3_0.6b llama3_8b mistral_7b_instruct gemma3_12b bert-base-uncased wav2vec2_asr_base_10h",
        "families",
        "archs qwen",
        "sql 'select name from models limit 1'",
        "list 'nothing*'",
        "env",
        "db path",
    )
    assert [(line, heavy) for line, modules in modules_after(*questions).items() if (heavy := modules & HEAVY)] == []


def broken_family(site: Path) -> None:
    """Install a package with a family whose module is missing."""
    info = site / "bad-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lading.families]\nbad = nowhere.at_all:FAMILY\n")


def test_a_family_that_cannot_be_imported_is_shown_without_its_defaults(program, catalog, tmp_path):
    broken_family(tmp_path / "site")
    card = tmp_path / "card.yaml"
    card.write_text("name: theirs\nmodel_family: bad\nmodel_config: {width: 3}\ncheckpoint: hg://a/b\n")
    env = {"PYTHONPATH": str(tmp_path / "site")}
    program("import", card, env=env)
    done = program("show", "theirs", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(
        r"^problem +The model family 'bad' is registered as 'nowhere.at_all:FAMILY', which cannot be imported",
        done.stdout,
        re.MULTILINE,
    )
    assert re.search(r"^width +3 +card theirs$", done.stdout, re.MULTILINE)


def test_a_family_that_cannot_be_imported_leaves_the_cards_of_others_alone(program, cards, tmp_path):
    broken_family(tmp_path / "site")
    done = program("load", "tiny", "--no-progress", env={"PYTHONPATH": str(tmp_path / "site")})
    assert (done.returncode, done.stderr) == (0, "")


def test_help_opens_no_catalog(empty_home):
    lines = ("--help", "load --help", "--version")
    without = HEAVY | {"sqlalchemy"}
    assert [(line, heavy) for line, modules in modules_after(*lines).items() if (heavy := modules & without)] == []
    assert not (empty_home / "data").exists()


def test_as_a_module_and_as_a_program(program):
    version = program("--version").stdout
    assert re.fullmatch(r"lading \d+\.\d+\.\d+\S*\n", version)
    script = Path(sys.executable).with_name("lading")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == version


def test_the_first_use_makes_a_catalog(home, process, catalog):
    catalog.unlink()
    done = process("list", "qwen3_0.6b", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "qwen3_0.6b\n", "")
    assert catalog.exists()


@pytest.mark.slow
def test_paths_in_other_scripts_work_in_a_locale_of_ascii_alone(program, process, tmp_path):
    folder = tmp_path / "модель-é-模型"
    make(folder)
    (tmp_path / "cards.yaml").write_text(f"name: named\nmodel_family: hg\ncheckpoint: {folder}\n", encoding="utf-8")
    assert process("import", tmp_path / "cards.yaml").returncode == 0
    assert process("index", "named").returncode == 0

    ascii_alone = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = program("path", "named", env=ascii_alone)
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{folder}\n", "")
    assert program("show", "named", env=ascii_alone).returncode == 0


def test_a_reader_that_leaves_is_no_failure(program):
    reader, writer = os.pipe()
    os.close(reader)
    done = program("list", "--json", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("words", "code"), [(("list", "nobody"), 2), (("--nope",), 2), (("sql", "drop table cards"), 7)]
)
def test_the_exit_code_holds_without_a_reader_of_the_output(program, words, code):
    reader, writer = os.pipe()
    os.close(reader)
    done = program(*words, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == code


@pytest.mark.slow
def test_head(program):
    done = program("list", "-q", stdout=subprocess.PIPE)
    lading = f"'{sys.executable}' -m lading"
    one = subprocess.run(["bash", "-c", f"{lading} list -q | head -1"], capture_output=True, text=True, check=True)
    assert (one.stdout, one.stderr) == (done.stdout.partition("\n")[0] + "\n", "")


def test_a_full_disk(program):
    with open("/dev/full", "w") as full:
        done = program("list", stdout=full)
    assert (done.returncode, done.stderr) == (8, "lading: error: No space left on device\n")


def test_without_stdout(program, catalog):
    code = f"exec '{sys.executable}' -m lading list >&-"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert program("db", "check").stdout == "ok\n"


@pytest.mark.few(1)
@pytest.mark.parametrize("words", [(), ("--debug",)])
def test_ctrl_c(catalog, words):
    child = subprocess.Popen(
        [sys.executable, "-m", "lading", *words, "import", "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    # More than a pipe holds: it is written only when the command has begun to read.
    child.stdin.write("# a comment\n" * 20_000)
    child.stdin.flush()
    with child.stdin, child.stderr:
        for _ in range(20):
            time.sleep(0.2)
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(1)
                break
        child.wait(10)
        stderr = child.stderr.read()
    assert child.returncode == 130
    assert stderr.endswith("lading: interrupted\n")
    assert ("Traceback" in stderr) == bool(words)


def test_ctrl_c_where_python_drops_exceptions(catalog):
    """The first interruption comes in the callback of a weak reference, and none follows."""
    code = (
        "import sys, weakref\n"
        "import lading.cli\n"
        "from lading.cli import app\n"
        "class Module: ...\n"
        "def interrupt(_): raise KeyboardInterrupt\n"
        "def lose(command=app.app):\n"
        "    module = Module()\n"
        "    reference = weakref.ref(module, interrupt)\n"
        "    del module\n"
        "    command()\n"
        "app.app = lose\n"
        "sys.argv = ['lading', 'import', '-']\n"
        "lading.cli.main()\n"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        code = child.wait(60)
        assert child.stderr is not None
        assert (code, child.stderr.read()) == (130, "lading: interrupted\n")


@pytest.mark.slow
def test_a_terminal_of_few_letters(program):
    env = {"PYTHONIOENCODING": "latin-1"}
    assert program("sql", "select '日本é' as x", "-q", env=env, text=False).stdout == b"\\u65e5\\u672c\xe9\n"
    assert program("show", "日本", env=env).returncode == 2


def on_terminal(*words: str, columns: int, **env: str) -> str:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "lading", *words],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm", **env},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(ours)
    assert child.wait(timeout=30) == 0
    return written.decode().replace("\r\n", "\n")


def test_on_a_terminal_a_table_fits_and_is_colored(catalog):
    text = on_terminal("list", columns=50)
    assert "\x1b[1mname" in text
    plain = re.sub(r"\x1b\[\d*m", "", text)
    assert max(map(len, plain.splitlines())) <= 50
    assert "…" in plain
    assert on_terminal("list", columns=50, NO_COLOR="1") == plain


def test_not_on_a_terminal_nothing_is_cut(process):
    text = process("list", env={"COLUMNS": "50"}).stdout
    assert max(map(len, text.splitlines())) > 50
    assert "\x1b" not in text
    assert "…" not in text


@pytest.fixture
def complete(nursery):
    """What the shell is offered for a line, in the given environment."""

    def complete(line: str, **env: str) -> list[str]:
        request = {"_LADING_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = nursery.run([], {**os.environ, **request, **env})
        assert (done.code, done.err) == (0, "")
        return done.out.split()

    return complete


def test_completion(catalog, complete):
    assert "plain,list" in complete("lading l")
    assert complete("lading show qwen3_0.") == ["plain,qwen3_0.6b", "plain,qwen3_0.6b_base"]
    assert complete("lading load mistral_7b_i")
    assert complete("lading archs ol") == ["plain,olmo"]
    assert complete("lading list --family mis") == ["plain,mistral"]
    assert complete("lading load ./x") == ["file,./x"]
    assert complete("lading check qwen3_0.") == ["plain,qwen3_0.6b", "plain,qwen3_0.6b_base"]
    assert complete("lading diff x qwen/qwen3_0.") == ["plain,qwen/qwen3_0.6b"]
    assert complete("lading diff y/x") == ["file,y/x"]
    assert complete("lading show [") == []


def test_completion_neither_makes_a_catalog_nor_complains(empty_home, complete):
    assert complete("lading show q") == []
    assert not (empty_home / "data").exists()
    assert complete("lading show q", LADING_DATABASE_URL="nonsense") == []


def test_the_script_for_the_shell(process):
    assert "_LADING_COMPLETE=bash_complete" in process(env={"_LADING_COMPLETE": "bash_source"}).stdout


def test_completion_waits_for_no_lock(catalog, complete):
    (catalog.parent / "later.yaml").write_text("name: later\n")
    # Of another process: one file has one set of locks in a process.
    script = (
        "import sqlite3, sys\n"
        f"c = sqlite3.connect({str(catalog)!r}, isolation_level=None)\n"
        "c.execute(f'PRAGMA journal_mode = {sys.argv[1]}')\n"
        "c.execute(f'BEGIN {sys.argv[2]}')\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    whole = ["plain,qwen3_0.6b", "plain,qwen3_0.6b_base"]
    for mode, lock, expected in (("delete", "EXCLUSIVE", []), ("wal", "IMMEDIATE", whole)):
        command = [sys.executable, "-c", script, mode, lock]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdin is not None
            assert holder.stdout.readline() == b"held\n"
            assert complete("lading show qwen3_0.", LADING_CARDS=str(catalog.parent)) == expected
            holder.stdin.close()


# --- streams that are closed -----------------------------------------------------------------------------------------


def with_closed(streams: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = shlex.join([sys.executable, "-m", "lading", *words])
    return subprocess.run(["bash", "-c", f"exec {command} {streams}"], capture_output=True, text=True, check=False)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sql",), "Missing argument 'QUERY'"),
        (("sql", "-"), "stdin is closed"),
        (("import", "-"), "stdin is closed"),
        (("import", "-", "--dry-run"), "stdin is closed"),
    ],
    ids=" ".join,
)
def test_without_stdin(catalog, words, message):
    done = with_closed("<&-", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "streams",
    ["<&-", "<&- >&- 2>&-", *(pytest.param(each, marks=pytest.mark.slow) for each in (">&-", "2>&-", "<&- 2>&-"))],
)
def test_no_file_takes_the_place_of_a_closed_stream(catalog, tmp_path, streams):
    (tmp_path / "open.py").write_text(
        "import sys\n"
        "from lading.cli import main\n"
        "sys.argv = ['lading', '--version']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "number = open(sys.argv[0] + '.out', 'w').fileno()\n"
        "open(__file__ + '.number', 'w').write(str(number))\n"
    )
    command = shlex.join([sys.executable, str(tmp_path / "open.py")])
    subprocess.run(["bash", "-c", f"exec {command} {streams}"], capture_output=True, check=True, cwd=tmp_path)
    assert int((tmp_path / "open.py.number").read_text()) > 2
    assert with_closed(streams, "db", "check").returncode == 0


def test_a_query_without_an_end_on_stdin(program):
    with open("/dev/zero", "rb") as zeros:
        done = program("sql", "-", stdin=zeros)
    assert done.returncode == 2
    assert "longer than 1,000,000 bytes" in done.stderr


# --- no home ---------------------------------------------------------------------------------------------------------


NO_HOME = dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "LADING_DATABASE_URL"))


AS_A_NUMBER = """
import pwd, sys
def missing(uid): raise KeyError(uid)
pwd.getpwuid = missing
from lading.cli import main
sys.argv[0] = "lading"
main()
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("home", [None, "some/where", pytest.param("", marks=pytest.mark.slow)])
def test_without_a_home(nursery, tmp_path, home):
    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user without an entry in passwd, and without a home."""
        merged = {**os.environ, **NO_HOME, "HOME": home, **env}
        given = {name: value for name, value in merged.items() if value is not None}
        done = nursery.run(["-c", AS_A_NUMBER, *words], given, cwd=tmp_path)
        return subprocess.CompletedProcess(words, done.code, done.out, done.err)

    done = run("list", "qwen3_0.6b", "-q")
    assert (done.returncode, done.stdout) == (0, "qwen3_0.6b\n")
    assert "Set LADING_DATABASE_URL" in done.stderr

    card = tmp_path / "card.yaml"
    card.write_text("name: mine\n")
    for words, code in [
        (("import", str(card)), 6), (("db", "check"), 6), (("db", "upgrade"), 6), (("db", "backup"), 6),
        (("du",), 0), (("path", "qwen3_0.6b"), 2), (("adopt", str(tmp_path)), 6),
    ]:  # fmt: skip
        done = run(*words)
        assert done.returncode == code, (words, done)
        assert "bug in lading" not in done.stderr
        assert "Traceback" not in done.stderr

    url = f"sqlite:///{tmp_path}/c.sqlite"
    done = run("import", str(card), LADING_DATABASE_URL=url)
    assert done.returncode == 0
    done = run("list", "mine", "--all", "-q", LADING_DATABASE_URL=url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "")
    # No folder called `~`, or of a relative home, is made.
    assert {p.name for p in tmp_path.iterdir()} - {"c.sqlite-wal", "c.sqlite-shm"} == {"card.yaml", "c.sqlite"}
