"""Text in and text out: every token stands for a string of bytes, and everything else follows from that."""

from __future__ import annotations

from everstate.tokenizers.base import Tokenizer
from everstate.tokenizers.byte import ByteTokenizer
from everstate.tokenizers.chat import ChatTemplate
from everstate.tokenizers.file import PieceTokenizer, RankTokenizer
from everstate.tokenizers.folder import fingerprint, load_tokenizer, save_tokenizer
from everstate.tokenizers.gguf import tokenizer_of_gguf
from everstate.tokenizers.hf import HFTokenizer
from everstate.tokenizers.stream import StreamDecoder, StreamEncoder, encode_stream

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "HFTokenizer",
    "PieceTokenizer",
    "RankTokenizer",
    "StreamDecoder",
    "StreamEncoder",
    "Tokenizer",
    "encode_stream",
    "fingerprint",
    "load_tokenizer",
    "save_tokenizer",
    "tokenizer_of_gguf",
]
