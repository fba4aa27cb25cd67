"""Bytes as tokens: nothing to train, nothing to download, and every text can be written."""

from __future__ import annotations

import re

from everstate.tokenizers.base import Tokenizer, utf8_of
from everstate.tokenizers.chat import ChatTemplate, chat_files, chat_tokens
from everstate.tokenizers.toml import ByteTable

BOS, EOS = 256, 257
NAMES = {"<|bos|>": BOS, "<|eos|>": EOS}


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is `<|bos|>` 257 is `<|eos|>`; nothing is padding or unknown."""

    vocab_size = 258
    bos_id = BOS
    eos_ids = (EOS,)
    leading = b""

    def __init__(self, chat: ChatTemplate | None = None) -> None:
        self.chat = chat

    def encode(self, text: str, *, special: bool = False, continued: bool = False) -> list[int]:
        if not special:
            return self.encode_bytes(utf8_of(text))
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, NAMES))})", text):
            ids += [NAMES[part]] if part in NAMES else self.encode_bytes(utf8_of(part))
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """The token ids of any bytes, be they text or not."""
        return list(data)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < BOS else b""

    def safe_cut(self, text: str, *, special: bool = False) -> int:
        """Everywhere; with `special`, before what may be the beginning of a special token's name."""
        longest = max(map(len, NAMES))
        begun = text.rfind("<", max(0, len(text) - longest + 1)) if special else -1
        return begun if begun >= 0 else len(text)

    def files(self) -> dict[str, str | bytes]:
        table = ByteTable(type="bytes", tokens=chat_tokens(self.chat))
        return {"tokenizer.toml": table.to_toml(), **chat_files(self.chat)}
