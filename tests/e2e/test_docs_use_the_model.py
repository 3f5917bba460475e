"""docs/how-to/use-the-model.md: its examples are one program, over a tiny model with a tokenizer."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from tests.helpers.make_checkpoint import make
from tests.helpers.nursery import Nursery

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "use-the-model.md").read_text(encoding="utf-8")

CARD = """\
name: my_qwen
model_family: qwen
model_config: {model_dim: 32, max_seq_len: 128, vocab_size: 100, tied_embeddings: true, num_layers: 2,
               num_attn_heads: 4, num_key_value_heads: 2, head_dim: 8, qkv_proj_bias: false, q_norm: true,
               k_norm: true, ffn_inner_dim: 64, rope_theta: 1000000.0}
checkpoint: my-qwen
"""

CHECKS = """
assert tuple(served.model.embed_tokens.weight.shape) == (100, 32)
assert "user: the ship" in text and chat_ids.size(1) > 2
assert output.shape[0] == 2
assert tuple(patches.shape) == (2, 196, 192)
assert 0 < loss < 20
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
assert tuned.generate(inputs.input_ids, max_new_tokens=8, eos_id=end)[0].tolist() == answer[0].tolist()
assert len(rows) == len(found) > 10
assert all(torch.equal(a.float(), b) for a, b in zip(tuned.parameters(), named.parameters(), strict=True))
"""


def make_model(folder: Path) -> None:
    """Write a checkpoint with a tokenizer and a chat template."""
    make(folder)
    names = ["[PAD]", "<end>", "?", "user", ":", "the", "ship", "carries", "coal", "and", "grain"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(names[:2])
    words.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "pad_token": "[PAD]",
        "chat_template": "{% for message in messages %}{{ message.role }}: {{ message.content }}<end>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_the_page(catalog: Path, nursery: Nursery, tmp_path: Path) -> None:
    make_model(tmp_path / "my-qwen")
    (tmp_path / "cards.yaml").write_text(CARD)
    program = "".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    assert nursery.run(["import", "cards.yaml"], os.environ, cwd=tmp_path).code == 0
    done = nursery.run(["-c", program + CHECKS], os.environ, cwd=tmp_path)

    assert done.code == 0, done.err
    assert "<ExportReport: " in done.out
    assert re.search(r"<LoadPlan: my_qwen, [\d.]+ kB in 1 file, 2 ranks, at most [\d.]+ kB of memory each>", done.out)
