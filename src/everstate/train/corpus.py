"""The text and the tokenizer that a recipe names."""

from __future__ import annotations

from everstate.data import Documents, open_documents, split, stdlib_documents
from everstate.data.pack import document_tokens
from everstate.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from everstate.train.config import DataRecipe


def open_tokenizer(data: DataRecipe) -> Tokenizer:
    """Bytes, or the tokenizer of a folder. Raises `TokenizerError` when it cannot be used."""
    return ByteTokenizer() if data.tokenizer == "bytes" else load_tokenizer(data.tokenizer)


def open_corpus(data: DataRecipe) -> tuple[Documents, Documents | None]:
    """The documents to train on, and those held out if there are any. Raises `DataError` when there is no text."""
    if data.source == "stdlib":
        documents = stdlib_documents()
    else:
        documents = open_documents(*data.paths, patterns=data.patterns, exclude=data.exclude, field=data.field)
    return split(documents, data.held_out) if data.held_out else (documents, None)


def tokens_per_epoch(documents: Documents, tokenizer: Tokenizer) -> int:
    """Tokens that one reading of the corpus predicts: it has to be read once to know."""
    return sum(max(len(document_tokens(tokenizer, document.text)) - 1, 0) for document in documents)
