"""A published config, of which every key is read, known to say nothing, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from everstate.core.errors import CheckpointError

SILENT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures",
    "attention_dropout", "attn_implementation", "attn_implementation_autoset", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "cache_implementation", "chunk_size", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "fused_add_norm", "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "language_model_only", "length_penalty",
    "logits_to_keep", "mamba_chunk_size", "mamba_ssm_cache_dtype", "mamba_ssm_dtype", "max_length",
    "max_position_embeddings", "max_seq_len", "min_length", "model_type", "n_ctx", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_logits_to_keep", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "pad_vocab_size_multiple",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "quantization_config", "remove_invalid_values",
    "repetition_penalty", "rescale_prenorm_residual", "resid_pdrop", "residual_in_fp32", "return_dict",
    "return_dict_in_generate", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "time_step_floor",
    "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_associative_scan", "use_bfloat16", "use_cache", "use_flash_attention_2",
    "use_mamba_fast_path", "use_mamba_kernels", "use_mambapy", "use_mem_eff_path", "use_return_dict",
})  # fmt: skip
"""Keys that say nothing about the function: bookkeeping, initial values, training, and the choice of kernels."""


class Settings:
    """The keys of a published config. What nobody has asked for when it is `closed` is refused.

    file: what messages call it.
    """

    def __init__(self, table: Mapping[str, Any], file: Path | str = "config.json") -> None:
        self.file = file
        # A key without a value is a key that is not there.
        self._left = {key: _plain(value) for key, value in table.items() if value is not None}

    @classmethod
    def of_file(cls, path: Path) -> Settings:
        """Read a JSON file. Raises `CheckpointError` when it is none."""
        return cls(read_json(path), path)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, *keys: str, default: Any = None) -> Any:
        """The value of the first key that is there, all being spellings of one setting; else the default."""
        given = {key: self._left.pop(key) for key in keys if key in self._left}
        values = list(given.values())
        if any(value != values[0] for value in values):
            raise self.error(f"{given} are one setting with two values; keep one of them")
        return values[0] if given else default

    def peek(self, *keys: str, default: Any = None) -> Any:
        """As `take`, and the keys stay to be taken."""
        return next((self._left[key] for key in keys if key in self._left), default)

    def integer(self, *keys: str, default: int | None = None) -> int:
        """A positive whole number; without a default it has to be there."""
        value = self._required(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{keys[0]} = {value!r} is no positive whole number")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite number; without a default it has to be there."""
        value = self._required(keys, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"{keys[0]} = {value!r} is no finite number")
        return float(value)

    def positive(self, *keys: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(*keys, default=default)
        if value <= 0:
            raise self.error(f"{keys[0]} = {value!r} is not above zero")
        return value

    def count(self, *keys: str, default: int) -> int:
        """A whole number from zero on."""
        value = self.take(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(f"{keys[0]} = {value!r} is no whole number from zero on")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None where there is none."""
        return self.number(key) if key in self else None

    def integer_or_auto(self, *keys: str) -> int | None:
        """A positive whole number; None where the config says "auto" or nothing."""
        value = self.take(*keys, default="auto")
        if value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{keys[0]} = {value!r} is neither a positive whole number nor 'auto'")
        return value

    def numbers(self, *keys: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """As many numbers as the default has; they may be infinite."""
        value = self.take(*keys, default=default)
        numeric = isinstance(value, list | tuple) and all(
            isinstance(each, int | float) and not isinstance(each, bool) and not math.isnan(each) for each in value
        )
        if not numeric or len(value) != len(default):
            raise self.error(f"{keys[0]} = {value!r} is no list of {len(default)} numbers")
        return tuple(float(each) for each in value)

    def indices(self, *keys: str) -> list[int] | None:
        """A list of whole numbers from zero on, or None where there is none."""
        return self._list(keys, "whole numbers", lambda each: isinstance(each, int) and each >= 0)

    def words(self, *keys: str) -> list[str] | None:
        """A list of words, or None where there is none."""
        return self._list(keys, "words", lambda each: isinstance(each, str))

    def text(self, *keys: str) -> str | None:
        """A word, or None where there is none."""
        value = self.take(*keys)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{keys[0]} = {value!r} is no text")
        return value

    def flag(self, *keys: str, default: bool) -> bool:
        """True or false."""
        value = self.take(*keys, default=default)
        if not isinstance(value, bool):
            raise self.error(f"{keys[0]} = {value!r} is neither true nor false")
        return value

    def choice(self, *keys: str, default: Any = None, among: Mapping[Any, Any]) -> Any:
        """What `among` has for the value, which must be one that it lists."""
        value = self._required(keys, default)
        if not isinstance(value, str | int | float) or value not in among:
            allowed = ", ".join(repr(key) for key in among)
            raise self.error(f"{keys[0]} = {value!r} is not implemented; Everstate has {allowed}")
        return among[value]

    def only(self, **wanted: Any) -> None:
        """Settings that have one value in every model that we know; any other is refused."""
        for key, value in wanted.items():
            given = self.take(key, default=value)
            if given != value:
                raise self.error(f"{key} = {given!r} is not implemented; Everstate has {value!r}")

    def ignore(self, *keys: str) -> None:
        """Keys that say nothing in this family."""
        for key in keys:
            self._left.pop(key, None)

    def ignore_all(self, prefix: str) -> None:
        """All keys that begin so: those of a part that this model does not have."""
        self.ignore(*[key for key in self._left if key.startswith(prefix)])

    def nested(self, key: str) -> Settings:
        """The settings in a table of their own, empty where there is none."""
        table = self.take(key, default={})
        if not isinstance(table, dict):
            raise self.error(f"{key} = {table!r} is no table")
        return Settings(table, f"{self.file}: {key}")

    def closed(self) -> None:
        """Refuse what is left, but for switches that are off and lists and tables that are empty."""
        for key, value in self._left.items():
            if key not in SILENT and value is not False and value not in ([], {}):
                raise self.error(
                    f"{key} = {value!r} is a setting that Everstate does not know; update everstate, or take the key "
                    "out if it says nothing about the outputs"
                )

    def error(self, problem: str) -> CheckpointError:
        """An error about this config."""
        return CheckpointError(f"{self.file}: {problem}")

    def _list(self, keys: tuple[str, ...], kind: str, fits: Callable[[Any], bool]) -> list[Any] | None:
        value = self.take(*keys)
        if value is not None and not (isinstance(value, list) and all(fits(each) for each in value)):
            raise self.error(f"{keys[0]} = {value!r} is no list of {kind}")
        return value

    def _required(self, keys: tuple[str, ...], default: Any) -> Any:
        value = self.take(*keys, default=default)
        if value is None:
            raise self.error(f"{' or '.join(keys)} is missing; the config is not complete: download it again")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises `CheckpointError` when it is missing or none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give the folder of a model") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} holds no table of settings; download it again")
    return table


def _plain(value: Any) -> Any:
    """JSON has no infinity, and there are several ways around it."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _plain(v) for k, v in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
