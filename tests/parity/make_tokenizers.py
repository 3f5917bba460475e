"""Write the tiny tokenizers that ``dump_fairseq2_tokenizers.py`` and ``test_fairseq2_tokenizers.py`` read.

Run it where lading is installed with its extra ``tokenizers``::

    python tests/parity/make_tokenizers.py tests/parity/fairseq2_tokenizers
"""

from __future__ import annotations

import base64
import io
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = [
    "a bill of lading lists what a ship carries", "the gang loads coal and grain, and salt", "it's the ship's bill",
    "Schiffe tragen Kohle über die Nordsee", "le navire porte du charbon", "корабль везёт уголь", "船は石炭を運ぶ",
]  # fmt: skip


def pieces(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, vocab_size=110, hard_vocab_limit=False,
        normalization_rule_name="identity", minloglevel=2, **options,
    )  # fmt: skip

    return model.getvalue()


def ranks() -> bytes:
    """Bytes, then pairs of tokens, the most frequent first."""
    tokens = [bytes([i]) for i in range(256)]
    texts = [[bytes([byte]) for byte in f" {word}".encode()] for text in SENTENCES for word in text.split()]
    while len(tokens) < 320:
        pairs = Counter(pair for text in texts for pair in pairwise(text))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        tokens.append(left + right)
        for text in texts:
            for i in range(len(text) - 2, -1, -1):
                if text[i : i + 2] == [left, right]:
                    text[i : i + 2] = [left + right]

    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def words() -> str:
    """Byte-level BPE, with the control tokens of all families, and what transformers changes when it reads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer.add_special_tokens(
        [
            "<bos>", "<eos>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|begin_of_text|>",
            "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
        ]
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16, pad_token="<pad>", pad_id=tokenizer.token_to_id("<pad>"))

    return tokenizer.to_str()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plain.model").write_bytes(pieces())
    (folder / "speech.model").write_bytes(
        pieces(bos_id=0, pad_id=1, eos_id=2, unk_id=3, user_defined_symbols=["<lang:de>", "<lang:fr>"])
    )
    (folder / "ranks.tiktoken").write_bytes(ranks())
    (folder / "tokenizer.json").write_text(words(), encoding="utf-8")


if __name__ == "__main__":
    main()
