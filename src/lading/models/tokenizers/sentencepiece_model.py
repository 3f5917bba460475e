"""Models of sentencepiece."""

from __future__ import annotations

from collections.abc import Sequence

from lading.formats.files import corrupt
from lading.models.tokenizers.vocabulary import VocabularyInfo, import_library


class SentencePieceModel:
    """A ``sentencepiece.SentencePieceProcessor``."""

    def __init__(self, data: bytes, label: str, *, first: Sequence[str] = (), last: Sequence[str] = ()) -> None:
        """
        :param first: control tokens to put before the pieces of the model, whose indices move up.
        :param last: control tokens to put behind them.
        """
        package = import_library("sentencepiece", label)
        # Messages of protocol buffers can be concatenated: a repeated field, such as the pieces, then holds all.
        data = b"".join([*map(_control_piece, first), data, *map(_control_piece, last)])
        try:
            self.native = package.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # sentencepiece raises a RuntimeError
            raise corrupt(
                label, "", expected="a tokenizer that sentencepiece reads", found=f"an error: {error}"
            ) from error

        unk, bos, eos, pad = (
            None if index < 0 else index
            for index in (self.native.unk_id(), self.native.bos_id(), self.native.eos_id(), self.native.pad_id())
        )
        self.vocab_info = VocabularyInfo(self.native.get_piece_size(), unk, bos, eos, pad)

    def encode(self, text: str) -> list[int]:
        indices: list[int] = self.native.encode(text)
        return indices

    def tokenize(self, text: str) -> list[str]:
        pieces: list[str] = self.native.encode(text, out_type=str)
        return pieces

    def decode(self, indices: Sequence[int], *, skip_special_tokens: bool) -> str:
        # Control tokens have no text, so that none needs skipping.
        text: str = self.native.decode(list(indices))
        return text

    def detokenize(self, tokens: Sequence[str], *, skip_special_tokens: bool) -> str:
        text: str = self.native.decode_pieces(list(tokens))
        return text

    def token_to_index(self, token: str) -> int | None:
        index: int = self.native.piece_to_id(token)  # for an unknown piece, that of the unknown token

        return index if self.native.id_to_piece(index) == token else None


def _control_piece(token: str) -> bytes:
    """Return a message with the one piece ``token``, of the type CONTROL.

    Source: ``ModelProto`` and ``SentencePiece`` in sentencepiece_model.proto.
    """
    text = token.encode()
    piece = b"\x0a" + _varint(len(text)) + text + b"\x18\x03"

    return b"\x0a" + _varint(len(piece)) + piece


def _varint(number: int) -> bytes:
    head = bytearray()
    while number >= 0x80:
        head.append(number & 0x7F | 0x80)
        number >>= 7

    return bytes([*head, number])
