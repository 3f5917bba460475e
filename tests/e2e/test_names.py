"""Names wherever one is taken: cards, paths, addresses, repositories of the hub."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

import lading
from lading import AssetCard, AssetStore, ModelNotKnownError, NotSupportedError, load_model
from lading.checkpoints.names import find_card
from lading.errors import AddressError
from lading.families.hg import get_hg_model_hub
from lading.families.llama import get_llama_model_hub
from lading.families.qwen import get_qwen_model_hub
from tests.helpers.cached_repository import CONFIG as CARD_CONFIG
from tests.helpers.cached_repository import add_cards
from tests.helpers.make_adapter import Q_PROJ, factors, write_adapter
from tests.helpers.make_checkpoint import CONFIG, make, qwen_config
from tests.servers.hub import FakeHub

Cli = Callable[..., Result]
Run = Callable[..., subprocess.CompletedProcess[str]]

OTHER_THETA = 12_345.0
"""The rotary base of the second revision, by which a model shows its revision."""


# --- with a hub ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = make(tmp_path_factory.mktemp("repositories") / "tiny")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with FakeHub() as hub:
        tiny = hub.add("Acme/Tiny", files)
        tiny.commit({**files, "config.json": json.dumps({**CONFIG, "rope_theta": OTHER_THETA}).encode()}, "v2")
        hub.add("acme/strange", {**files, "config.json": b'{"model_type": "strange", "auto_map": {}}'})
        yield hub


@pytest.fixture
def hub(shared_hub: FakeHub) -> FakeHub:
    shared_hub.behave()
    return shared_hub


@pytest.fixture
def run(process: Run, hub: FakeHub, tmp_path: Path) -> Run:
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "LADING_OFFLINE": "",
    }

    def run(*words: str | Path, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = process(*words, env=env | more)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def requested(hub: FakeHub) -> int:
    return len(hub.requests)


def test_a_repository_is_loaded_by_its_id_without_a_card(run: Run, hub: FakeHub) -> None:
    report = json.loads(run("load", "acme/tiny", "--json", "--no-progress").stdout)
    assert (report["name"], report["family"], report["model_class"]) == ("hg://acme/tiny", "qwen", "Qwen")
    assert "tiny" not in run("list", "-q").stdout

    # All other commands know it by the same name, and ask for nothing that is here.
    hub.behave()
    assert json.loads(run("load", "hg://acme/tiny", "--json").stdout)["tensors"] == report["tensors"]
    assert run("path", "acme/tiny").stdout.endswith("/model.safetensors\n")
    assert run("check", "acme/tiny", "-q").stdout
    assert run("verify", "acme/tiny", "-q").stdout
    assert run("plan", "acme/tiny", "--tp", "2", "-q").stdout
    assert "no difference" in run("diff", "acme/tiny", "hg://acme/tiny").stderr
    assert requested(hub) == 0
    run("load", "acme/tiny", LADING_OFFLINE="1")

    assert "Nothing was removed" in run("rm", "acme/tiny", code=7).stderr
    assert "freed" in run("rm", "acme/tiny", "--yes").stdout
    assert "not on this machine. `lading pull hg://acme/tiny` fetches it" in run("path", "acme/tiny", code=2).stderr


def test_a_repository_is_pulled_indexed_and_written_by_its_id(run: Run, tmp_path: Path) -> None:
    assert json.loads(run("index", "acme/tiny", "--json").stdout)["uri"] == "hg://acme/tiny"
    pulled = json.loads(run("pull", "acme/tiny", "--json", "--no-progress").stdout)
    assert {file["name"] for file in pulled} == {"config.json", "model.safetensors"}
    for command in ("convert", "export"):
        run(command, "acme/tiny", tmp_path / command, "--no-progress", LADING_OFFLINE="1")
        assert json.loads((tmp_path / command / "config.json").read_text())["rope_theta"] == CONFIG["rope_theta"]


@pytest.mark.slow
def test_a_repository_that_no_family_reads_is_pulled_all_the_same(run: Run) -> None:
    assert run("pull", "acme/strange", "--no-progress").stdout
    assert "'strange'" in run("load", "acme/strange", code=7).stderr


PRINT_THETA = "import sys, lading; print(lading.load_model({}, progress=False).model.rotary_emb.theta)"


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "named",
    ["'acme/tiny@v2'", "'hg://acme/tiny@v2'", "'hf://ACME/Tiny@v2'", "'acme/tiny', revision='v2'",
     "'hg://acme/tiny', revision='v2'", "'acme/tiny@main', revision='v2'", "'mine', revision='v2'"],
)  # fmt: skip
def test_a_revision_in_the_name_or_beside_it(run: Run, tmp_path: Path, named: str) -> None:
    cards = tmp_path / "cards.yaml"
    cards.write_text("name: mine\nmodel_family: qwen\ncheckpoint: hg://Acme/Tiny\n")
    run("import", cards)
    assert run("-c", PRINT_THETA.format(named)).stdout == f"{OTHER_THETA}\n"
    # The card itself is as it was.
    assert run("-c", PRINT_THETA.format("'mine'")).stdout == f"{CONFIG['rope_theta']}\n"


def test_what_no_revision_names(run: Run) -> None:
    assert "not the revision" in run("load", "acme/tiny@v3", code=2).stderr
    assert "revision" in run("load", "acme/tiny@../x", code=2).stderr


@pytest.mark.slow
def test_the_card_that_has_the_repository_counts(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    cards = tmp_path / "cards.yaml"
    cards.write_text(
        f"name: z_base\ncheckpoint: hf://ACME/tiny\n{CARD_CONFIG}---\nname: a_child\nbase: z_base\n"
        f"---\nname: other\ncheckpoint: hg://acme/tiny@v2\n{CARD_CONFIG}"
    )
    run("import", cards)
    for name in ("acme/tiny", "hg://Acme/Tiny", "hf://acme/tiny"):
        assert json.loads(run("load", name, "--json", "--no-progress").stdout)["name"] == "z_base"
    assert json.loads(run("load", "acme/tiny@v2", "--json", "--no-progress").stdout)["name"] == "other"
    assert json.loads(run("show", "acme/tiny", "--json").stdout)["name"] == "z_base"


def test_an_unknown_repository(run: Run, hub: FakeHub) -> None:
    for command in ("load", "check", "plan", "pull", "index"):
        stderr = run(command, "acme/none", code=2).stderr
        assert "No model named 'acme/none' is in the catalog" in stderr
        assert "no such repository" in stderr
        assert stderr.count("\n") == 1
    for command in ("rm", "show"):
        assert "No model named 'acme/none'" in run(command, "acme/none", code=2).stderr

    # What can be known without the hub is known without it.
    hub.behave()
    for command, code in (("path", 2), ("verify", 2), ("rm", 2), ("show", 2)):
        run(command, "acme/none", code=code)
    assert requested(hub) == 0


def test_offline_a_repository_is_what_the_cache_has(run: Run, hub: FakeHub) -> None:
    stderr = run("load", "acme/tiny", code=2, LADING_OFFLINE="1").stderr
    assert "No model named 'acme/tiny' is in the catalog" in stderr
    assert "LADING_OFFLINE" in stderr
    assert requested(hub) == 0


def test_a_hub_that_cannot_be_reached_is_no_unknown_name(run: Run, hub: FakeHub) -> None:
    hub.misbehave("info", "401")
    hub.misbehave("info", "html")
    assert "acme/tiny" in run("load", "acme/tiny", code=5).stderr


def test_the_tokenizer_of_a_repository(run: Run, hub: FakeHub) -> None:
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    config = {"bos_token": "a"}
    hub.add("acme/words", {"tokenizer.json": json.dumps(tokenizer).encode(),
                           "tokenizer_config.json": json.dumps(config).encode()})  # fmt: skip
    code = "import lading; print(lading.load_tokenizer({}, progress=False).vocab_info.size)"
    assert run("-c", code.format("'acme/words'")).stdout == "1\n"
    assert run("-c", code.format("'hg://acme/words', revision='main'")).stdout == "1\n"
    code = "import lading; print(lading.load_tokenizer('acme/words', progress=False).vocab_info.bos_idx)"
    assert run("-c", code, LADING_OFFLINE="1").stdout == "0\n"
    code = "import lading\ntry: lading.load_tokenizer('acme/no')\nexcept lading.ModelNotKnownError as e: print(e)"
    assert "no such repository" in run("-c", code).stdout


# --- without a hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def store(catalog: Path) -> AssetStore:
    return lading.get_asset_store()


def test_a_word_is_never_a_folder(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "word")
    monkeypatch.chdir(tmp_path)
    for command in ("load", "check", "plan", "index", "verify", "path", "pull", "rm", "show"):
        assert "write './word'" in cli(command, "word", code=2).stderr
    with pytest.raises(ModelNotKnownError, match=r"write '\./word'"):
        load_model("word")
    load_model("./word", progress=False)
    load_model(Path("word"), progress=False)


@pytest.mark.parametrize("name", ["./org/m", "../here/org/m", "org/m", "~/org/m", ".//org/../org/m/", "link", "file"])
def test_every_spelling_of_a_path_is_the_card_that_has_it(
    store: AssetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = make(tmp_path / "here" / "org" / "m")
    (tmp_path / "here" / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    target = {"link": "./link", "file": f"file://{folder}"}.get(name, name)
    assert isinstance(find_card(target, store), Path)
    add_cards(tmp_path, mine=str(folder))
    for each in (target, Path(target)) if "://" not in target else (target,):
        found = find_card(each, store)
        assert isinstance(found, AssetCard)
        assert found.name == "mine"


def test_a_card_comes_first(store: AssetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "org" / "m")
    monkeypatch.chdir(tmp_path)
    add_cards(tmp_path, **{"org/m": "hg://some/where"})
    found = find_card("org/m", store)
    assert isinstance(found, AssetCard)
    assert found.name == "org/m"
    assert isinstance(find_card("./org/m", store), Path)
    with pytest.raises(ModelNotKnownError, match="environment 'cluster'"):
        find_card("org/m@cluster", store)


def test_the_card_itself_rather_than_one_based_on_it(store: AssetStore, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    path = tmp_path / "cards.yaml"
    path.write_text(
        f"name: base\ncheckpoint: {tmp_path}\ncheckpoint_path: m\n{CARD_CONFIG}---\nname: a\nbase: base\n"
        f"---\nname: elsewhere@user\ncheckpoint: {folder}\n---\nname: elsewhere\n{CARD_CONFIG}"
        f"---\nname: file\ncheckpoint: {folder}/model.safetensors\n{CARD_CONFIG}"
    )
    lading.import_cards(path)
    assert [find_card(each, store).name for each in (folder, folder / "model.safetensors")] == ["base", "file"]
    path.write_text(path.read_text().replace("checkpoint_path: m", "checkpoint_path: n"))
    lading.import_cards(path, replace=True)
    assert find_card(folder, store).name == "elsewhere"


@pytest.mark.parametrize("damage", ["garbage", "locked"])
def test_a_path_needs_no_catalog(catalog: Path, tmp_path: Path, damage: str) -> None:
    if damage == "garbage":
        catalog.write_bytes(b"SQLite format 3\0" + bytes(4096))
    else:
        catalog.chmod(0)
        catalog.parent.chmod(0o500)
    try:
        load_model(make(tmp_path / "m"), progress=False)
        load_model(f"{tmp_path}/m", progress=False)
    finally:
        catalog.parent.chmod(0o700)


def test_what_has_no_revision(store: AssetStore, tmp_path: Path) -> None:
    add_cards(tmp_path, mine=str(make(tmp_path / "m")), web="https://example.com/m.safetensors")
    for target in (tmp_path / "m", str(tmp_path / "m"), "mine", "web", "https://example.com/m.safetensors"):
        with pytest.raises(NotSupportedError, match="no revisions"):
            find_card(target, store, revision="v1")
    for target in ("hg://org/name", "org/name"):
        with pytest.raises(AddressError, match=r"\.\./x"):
            find_card(target, store, revision="../x", ask=False)


@pytest.mark.parametrize(
    ("name", "error"),
    [("hg://", AddressError), ("https://", AddressError), ("a/b/c", Path), ("a b/c", Path), ("/", Path),
     ("", ModelNotKnownError), ("a\0b", ModelNotKnownError), ("\udc80/x", Path), ("ünïcode", ModelNotKnownError),
     ("x" * 5000, ModelNotKnownError), ("nope", ModelNotKnownError), (3, TypeError), (None, TypeError)],
)  # fmt: skip
def test_names_of_other_forms(store: AssetStore, name: str, error: type[Exception] | type[Path]) -> None:
    if error is Path:
        assert isinstance(find_card(name, store), Path)
    else:
        with pytest.raises(error):
            find_card(name, store)


def test_an_address_shows_no_secret(store: AssetStore) -> None:
    card = find_card("https://user:secret@example.com/m.safetensors?token=secret", store)
    assert isinstance(card, AssetCard)
    assert card.name == "https://example.com/m.safetensors"


# --- the config.json beside the weights ------------------------------------------------------------------------------


def cards(folder: Path, text: str) -> None:
    path = folder / "cards.yaml"
    path.write_text(text)
    lading.import_cards(path, replace=True)


def test_a_card_without_an_architecture_is_what_config_json_says(catalog: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    cards(
        tmp_path,
        f"name: plain\nmodel_family: qwen\ncheckpoint: {folder}\n"
        f"---\nname: tuned\nbase: plain\nmodel_config: {{dropout_p: 0.5}}\n"
        f"---\nname: no_family\ncheckpoint: {folder}\n",
    )
    hub = get_qwen_model_hub()
    assert hub.get_model_config("plain") == hub.get_model_config("no_family") == qwen_config()
    tuned = hub.get_model_config("tuned")
    assert (tuned.dropout_p, tuned.rope_theta, tuned.num_layers) == (0.5, CONFIG["rope_theta"], 2)
    expected = load_model(AssetCard("x", {"checkpoint": str(folder)}), progress=False).state_dict()
    for name in ("plain", "tuned", "no_family"):
        found = load_model(name, progress=False)
        assert type(found).__name__ == "Qwen"
        assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    with pytest.raises(lading.AssetCardError, match=r"'llama'.*'qwen'"):
        get_llama_model_hub().load_model("no_family", progress=False)


def test_show_says_what_config_json_states(cli: Cli, catalog: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    cards(tmp_path, f"name: tuned\nmodel_family: qwen\ncheckpoint: {folder}\nmodel_config: {{num_layers: 3}}\n")
    shown = json.loads(cli("show", "tuned", "--json").stdout)
    assert (shown["config"]["num_layers"], shown["config"]["vocab_size"]) == (3, CONFIG["vocab_size"])
    assert shown["config_from"]["vocab_size"] == {"kind": "file", "name": "config.json"}
    assert shown["config_from"]["num_layers"] == {"kind": "card", "name": "tuned"}
    assert shown["config_from"]["dropout_p"] == {"kind": "family", "name": "qwen"}
    assert shown["config"]["rope_theta"] == CONFIG["rope_theta"]
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "rope_theta"}))
    without = json.loads(cli("show", "tuned", "--json").stdout)
    assert without["config_from"]["rope_theta"] == {"kind": "family", "name": "qwen"}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert json.loads(cli("show", folder, "--json").stdout) == shown
    (folder / "config.json").write_text("{")
    assert "expected a JSON object" in json.loads(cli("show", "tuned", "--json").stdout)["problem"]


def test_config_json_holds_no_directives(catalog: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Qwen3ForCausalLM"], "_del_": ["x"]}))
    cards(tmp_path, f"name: odd\nmodel_family: hg\ncheckpoint: {folder}\nmodel_config: {{hf_name: mine}}\n")
    config = get_hg_model_hub().get_model_config("odd")
    assert (config.hf_name, config.hf_config["_del_"], config.custom_model_class) == ("mine", ["x"], "Qwen3ForCausalLM")


def test_the_same_class_by_path_and_by_card(catalog: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    copy = make(tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Qwen3ForCausalLM"]}))
    (copy / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Qwen3ForCausalLM"]}))
    cards(tmp_path, f"name: hugging\nmodel_family: hg\ncheckpoint: {folder}\n")
    classes = {type(load_model(each, progress=False)).__name__ for each in ("hugging", folder, str(folder))}
    assert classes == {"Qwen3ForCausalLM"}
    assert type(load_model(copy, progress=False)).__name__ == "Qwen"


THETA = "config.json"


@pytest.fixture
def contradicted(catalog: Path, tmp_path: Path) -> Path:
    """Cards whose numbers are not those of the folder's ``config.json``, or are."""
    folder = make(tmp_path / "m")

    def numbers(theta: str) -> str:
        return CARD_CONFIG.replace("64}", f"64, rope_theta: {theta}}}")

    architecture = (
        "architecture: tiny\nfamily: qwen\nconfig: {model_dim: 32, max_seq_len: 64, vocab_size: 100, "
        "tied_embeddings: true, num_layers: 2, num_attn_heads: 4, num_key_value_heads: 2, head_dim: 8, "
        "qkv_proj_bias: false, q_norm: true, k_norm: true, ffn_inner_dim: 64, rope_theta: 10000.0}\n"
    )
    cards(
        tmp_path,
        f"{architecture}---\nname: by_arch\nmodel_family: qwen\nmodel_arch: tiny\ncheckpoint: {folder}\n"
        f"---\nname: right_arch\nbase: by_arch\nmodel_config: {{rope_theta: 1.0e6, dropout_p: 0.1}}\n"
        f"---\nname: by_numbers\ncheckpoint: {folder}\n{numbers('10000.0')}"
        f"---\nname: right_numbers\ncheckpoint: {folder}\n{numbers('1000000')}",
    )
    return folder


@pytest.mark.parametrize("name", ["by_arch", "by_numbers"])
def test_numbers_that_contradict_config_json_are_reported(
    contradicted: Path, cli: Cli, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model = load_model(name, progress=False)
    assert model.model.rotary_emb.theta == 10_000.0  # the card counts
    (warning,) = [record.getMessage() for record in caplog.records if "contradicts" in record.getMessage()]
    assert f"{name}: the card contradicts" in warning
    assert "10000.0 by the card, but 1000000.0 in config.json" in warning

    report = lading.check_model(name)
    assert report.fits
    assert [text.partition(" is ")[0].rpartition(".")[2] for text in report.contradictions] == ["rope_theta"]
    assert "1 contradiction with config.json" in repr(report)
    text = cli("check", name).stdout
    assert "10000.0 by the card, but 1000000.0 in config.json" in text


@pytest.mark.parametrize("name", ["right_arch", "right_numbers"])
def test_numbers_that_agree_are_not(contradicted: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    load_model(name, progress=False)
    assert lading.check_model(name).contradictions == ()
    assert "contradicts" not in caplog.text


def test_a_config_json_that_cannot_be_compared(contradicted: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = contradicted / "config.json"
    path.write_text(json.dumps({**CONFIG, "hidden_act": "relu"}))
    assert "hidden_act" in lading.check_model("by_arch").contradictions[0]
    load_model("by_arch", progress=False)  # the card counts
    for other in ({"model_type": "gpt2"}, {}):  # of another family, or of none
        path.write_text(json.dumps(other))
        assert lading.check_model("by_arch").contradictions == ()
    path.unlink()
    assert lading.check_model("by_arch").contradictions == ()


@pytest.mark.slow
def test_contradictions_of_a_repository(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "cards.yaml"
    path.write_text(f"name: far\ncheckpoint: hg://acme/tiny\n{CARD_CONFIG}".replace("64}", "64, rope_theta: 7.0}"))
    run("import", path)
    for _ in range(2):  # also without a request
        assert "in config.json" in run("load", "far", "--no-progress").stderr
        hub.misbehave("info", "503")
    assert json.loads(run("check", "far", "--json").stdout)["contradictions"]


def test_dtypes_by_name_in_memory(catalog: Path, tmp_path: Path) -> None:
    model = load_model(make(tmp_path / "m"), progress=False)
    for i, (name, dtype) in enumerate(
        [("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("keep", torch.float32)]
    ):
        lading.export_model(model, "qwen", qwen_config(), tmp_path / f"out{i}", dtype=name)
        assert {t.dtype for t in load_file(tmp_path / f"out{i}" / "model.safetensors").values()} == {dtype}
    with pytest.raises(ValueError, match="in memory"):
        lading.export_model(model, "qwen", qwen_config(), tmp_path / "out", dtype="auto")
    with pytest.raises(TypeError, match="bf17"):
        lading.export_model(model, "qwen", qwen_config(), tmp_path / "out", dtype="bf17")


def test_what_the_catalog_does_not_know_of_a_place(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "my folder" / "tiny")
    for name in ("my folder/tiny", "./my folder/tiny", str(tmp_path / "my folder" / "tiny")):
        assert f"Run `lading index '{name}'`" in cli("rm", name, code=2).stderr
    assert "The file or folder does not exist" in cli("show", "./nowhere", code=2).stderr
    assert "Run `lading index hg://org/name`" in cli("show", "hg://org/name", code=2).stderr
    assert "write './my folder'" in cli("show", "my folder", code=2).stderr


def test_a_place_that_the_catalog_does_not_know_is_shown(
    cli: Cli, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "my folder" / "tiny")
    write_adapter(tmp_path / "lora", factors(Q_PROJ, 32, 32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    before = lading.query("select count(*) from checkpoints").rows
    for name in ("my folder/tiny", "./my folder/tiny", f"file://{tmp_path}/my folder/tiny"):
        shown = json.loads(cli("show", name, "--json").stdout)
        assert (shown["status"], shown["kind"], shown["bytes"]) == ("unregistered", "checkpoint", 43_648)
        assert shown["checkpoint"]["local_path"] == str(tmp_path / "my folder" / "tiny")
    assert len(cli("show", name, "--tensors", "-q").stdout.splitlines()) == 24
    assert f"local path  {tmp_path}/lora\n" in (found := cli("show", "./lora").stdout)
    assert "kind        lora adapter\n" in found
    assert "expected" in cli("show", "./empty", code=2).stderr
    cli("show", "./bad.safetensors", code=4)
    assert lading.query("select count(*) from checkpoints").rows == before

    lading.add_checkpoints(tmp_path / "lora", fields={"base": "qwen3_0.6b"})
    assert json.loads(cli("show", "./lora", "--json").stdout)["name"] == "lora"
    assert cli("path", "./my folder/tiny").stdout == f"{tmp_path}/my folder/tiny\n"


@pytest.mark.parametrize(
    "words",
    [
        ("add", ""),
        ("adopt", ""),
        ("import", ""),
        ("relocate", "", "x"),
        ("relocate", "x", ""),
        ("convert", "x", ""),
        ("export", "x", ""),
        ("export-cards", "-o", ""),
        ("plan", "x", "--picture", ""),
        ("db", "backup", ""),
        ("db", "restore", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(cli: Cli, words: tuple[str, ...]) -> None:
    assert "expected a path, found ''" in cli(*words, code=2).stderr


def test_files_that_a_removal_has_forgotten_are_indexed_again(cli: Cli, tmp_path: Path) -> None:
    make(tmp_path / "tiny")
    cli("add", tmp_path / "tiny")
    cli("rm", "tiny")
    assert "`lading index tiny`" in cli("verify", "tiny", code=2).stderr
    cli("index", "tiny")
    cli("verify", "tiny")
