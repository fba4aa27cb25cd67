"""Models on disk."""

from __future__ import annotations

from everstate.checkpoints.files import read_tensors, replace_file, write_tensors
from everstate.checkpoints.load import load, load_config, load_model, save

__all__ = ["load", "load_config", "load_model", "read_tensors", "replace_file", "save", "write_tensors"]
