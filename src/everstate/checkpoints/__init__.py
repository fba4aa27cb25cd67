"""Models on disk, in our own format and in those that others publish."""

from __future__ import annotations

from everstate.checkpoints.export import check_new, export
from everstate.checkpoints.files import read_tensors, replace_file, write_tensors
from everstate.checkpoints.load import Summary, load, load_config, load_model, load_tokenizer_of, save, summary

__all__ = [
    "Summary",
    "check_new",
    "export",
    "load",
    "load_config",
    "load_model",
    "load_tokenizer_of",
    "read_tensors",
    "replace_file",
    "save",
    "summary",
    "write_tensors",
]
