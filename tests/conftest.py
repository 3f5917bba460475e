from __future__ import annotations

import os

# Before torch is imported: its thread pools would fight with the other test processes for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each client of an HTTP library reads all certificates that it finds, which takes longer than a pull from loopback.
# Here it finds none; a test of TLS names its own file.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)

import compileall
import gc
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import is_hypothesis_test, settings

import lading
from lading.catalog.open import open_catalog
from tests.helpers import catalog_tools
from tests.helpers.examples import QUICK
from tests.helpers.interpreters import Interpreters
from tests.helpers.postgresql_server import Server, find_programs, running
from tests.servers.s3 import Bucket, Moto, moto_server, use_s3

MEMORY = Path("/dev/shm")
"""The place of the files of the quick tier, if it has room: each commit to a disk waits for it."""

# The machines are shared: an example may take its time.
settings.register_profile("full", deadline=None, print_blob=True)
settings.register_profile("quick", settings.get_profile("full"), max_examples=QUICK)


def pytest_configure(config: pytest.Config) -> None:
    """Try fewer examples in the quick tier; before the modules of tests, which ask for them, are imported."""
    # Each worker rewrites the assertions of all modules of tests when it imports them, which takes seconds unless kept.
    sys.dont_write_bytecode = False
    quick = config.option.markexpr == "not slow"
    settings.load_profile("quick" if quick else "full")
    if quick and _has_room(MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    if not hasattr(config, "workerinput"):
        # So that the interpreters that tests start need not compile it, even where Python writes no bytecode.
        compileall.compile_dir(Path(lading.__file__).parent, quiet=2)


def _has_room(folder: Path) -> bool:
    """Tell whether a folder can hold the files of a run, and programs among them."""
    return folder.is_dir() and shutil.disk_usage(folder).free > 4 << 30 and not os.statvfs(folder).f_flag & os.ST_NOEXEC


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the tests that try examples in the slow tier too, where they try all.

    In the quick tier SQLite has the cases of each test, or a few of them, and PostgreSQL the first one.
    """
    cases = defaultdict(list)
    on_postgresql = set()
    for item in items:
        if config.option.markexpr == "slow" and is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.slow)
        callspec = getattr(item, "callspec", None)
        if callspec is None or item.get_closest_marker("slow"):
            continue
        test = item.nodeid.partition("[")[0]
        if "postgresql" not in callspec.params.values():
            cases[test].append(item)
        elif test in on_postgresql:
            item.add_marker(pytest.mark.slow)
        else:
            on_postgresql.add(test)
    for matrix in cases.values():
        if few := matrix[0].get_closest_marker("few"):
            _leave_few(matrix, *few.args)


def _leave_few(matrix: list[pytest.Item], count: int) -> None:
    """Leave ``count`` cases in the quick tier: the first, the last, and those evenly between, across a grid."""
    last = len(matrix) - 1
    quick = {round(i * last / max(1, count - 1)) for i in range(count)}
    for i, item in enumerate(matrix):
        if i not in quick:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave all modules and tests out of later garbage collections, which take 0.7 s each with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _not_the_users_catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests that ask for no home of their own share a new one: the user's catalog may be of another version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LADING_DATABASE_URL", raising=False)
        for name in ("DATA", "CONFIG"):
            patch.setenv(f"XDG_{name}_HOME", str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog as it is after its first use; to read the package's cards takes longer than to copy it."""
    path = tmp_path_factory.mktemp("template") / "catalog.sqlite"
    open_catalog(catalog_tools.settings_in(path.parent))
    return path


@pytest.fixture
def home(empty_home: Path, template: Path) -> Path:
    """A home after the first use, with the package's cards: whatever lading writes by default, it writes below it."""
    folder = empty_home / "data" / "lading"
    folder.mkdir(parents=True)
    shutil.copy(template, folder / "catalog.sqlite")
    return empty_home


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home before the first use."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("LADING_DATABASE_URL", "LADING_CACHE_DIR", "LADING_CARDS", "LADING_ENV", "LADING_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # Who needs a network has one on loopback, and says so; to look for another one takes seconds.
    monkeypatch.setenv("LADING_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(home))
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(home / name.lower()))
    return home


@pytest.fixture(scope="session")
def interpreters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreters]:
    """Processes for code that must not share what this one has imported or done."""
    server = Interpreters(tmp_path_factory.mktemp("interpreters"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    """A server of S3's protocol, which misbehaves on command; without its package, its tests are skipped."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("obstore", reason="obstore is not installed")
    with moto_server() as server:
        yield server


@pytest.fixture
def s3(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, which the environment gives access to."""
    use_s3(monkeypatch, moto.url)
    return moto.bucket()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A PostgreSQL server; without its programs or its driver, the tests that need one are skipped."""
    pytest.importorskip("psycopg", reason="no PostgreSQL: `pip install 'psycopg[binary]'`")
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL: `apt-get install postgresql`")
    with running(programs) as server:
        yield server


@pytest.fixture(scope="session")
def _catalog_without_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "catalog.sqlite"
    catalog_tools.make_without_rows(f"sqlite:///{path}")

    return path


@pytest.fixture
def copied_catalogs(_catalog_without_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the catalogs of ``settings_in`` be there already, without rows, for tests that are not of first use."""
    monkeypatch.setattr(catalog_tools, "database_url", catalog_tools.CopiedFiles(_catalog_without_rows).url)


@contextmanager
def _databases(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], str]]:
    """Give the URLs of catalogs without rows, by folder, in the kind of database that a fixture is asked for."""
    if request.param == "postgresql":
        server: Server = request.getfixturevalue("postgresql")
        with server.databases() as url:
            yield url
    else:
        yield catalog_tools.CopiedFiles(request.getfixturevalue("_catalog_without_rows")).url


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each kind of database that a catalog may be in, which ``settings_in`` then names: there already, without rows."""
    with _databases(request) as url:
        monkeypatch.setattr(catalog_tools, "database_url", url)
        yield request.param


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared_databases(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], str]]:
    """The URLs of catalogs that all tests of a file may ask, and none may change; in each kind of database."""
    with _databases(request) as url:
        yield url


@pytest.fixture(autouse=True)
def _no_simulated_world_is_left() -> Iterator[None]:
    """What was simulated must not be seen by other tests: other libraries look at the default process group too."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_backend() == "fake":
        distributed.destroy_process_group()
