"""Documents to batches: parallel streams of text for training that carries the state on."""

from __future__ import annotations

from everstate.data.loader import Loader
from everstate.data.pack import Batch, byte_lengths, bytes_in
from everstate.data.source import Document, Documents, Texts, open_documents, split
from everstate.data.stdlib import stdlib_documents

__all__ = [
    "Batch",
    "Document",
    "Documents",
    "Loader",
    "Texts",
    "byte_lengths",
    "bytes_in",
    "open_documents",
    "split",
    "stdlib_documents",
]
