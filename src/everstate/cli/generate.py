"""`everstate generate`: continue a prompt of any length, streaming, in memory that does not grow."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everstate.cli.loading import Device, Dtype, Revision, TokenizerAt, dtype_of, reading_bar
from everstate.core.errors import DataError, RequestError

if TYPE_CHECKING:
    import torch

    from everstate.engine import Session
    from everstate.tokenizers import Tokenizer

WEIGHTS = "int8"
CHUNK = 65_536
"""Bytes of a file or of standard input that are read at once."""


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; '-', or nothing without --resume, reads standard input.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A folder, a .gguf file, or a repository of the hub.")
    ] = "demo/model",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from this file.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=0, help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the fewest tokens that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this likely relative to the best.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens that full attention may look back.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue from this saved state.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the state to this file at the end.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message; write the answer to it.")] = False,
    tokenizer: TokenizerAt = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    weights: Annotated[str | None, typer.Option(help="int8 rounds the weights to 8 bits, faster on a GPU.")] = None,
    state_dtype: Annotated[str | None, typer.Option(help="bfloat16 halves recurrent states; default float32.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of the text.")] = False,
) -> None:
    """Continue a prompt from an argument, a file or standard input, and print the text as it is written."""
    chunks, name = _prompt(prompt, file, optional=resume is not None)

    from everstate import checkpoints
    from everstate.engine import Sampling, Session

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    kept = _state_dtype(weights, state_dtype, resume)
    with reading_bar() as watch:
        lm, words = checkpoints.load(
            model, tokenizer=tokenizer, revision=revision, device=device, dtype=dtype_of(dtype), watch=watch
        )
    lm = lm if weights is None else lm.quantize_()
    session = Session.load(resume, lm, words) if resume else Session(lm, words, context=context, state_dtype=kept)
    started = time.perf_counter()
    if chunks is not None:
        _read(session, words, chunks, name, chat)
    read, prompt_tokens = time.perf_counter(), session.tokens_read
    text = _show(session.write(max_tokens, sampling), silent=as_json)
    if save_state is not None:
        session.save(save_state)
    if as_json:
        seconds = {"read_seconds": read - started, "write_seconds": time.perf_counter() - read}
        typer.echo(json.dumps({"text": text, **_counts(session, prompt_tokens), **seconds}, ensure_ascii=False))


def _state_dtype(weights: str | None, name: str | None, resume: Path | None) -> torch.dtype | None:
    """The dtype of a new session's states, after what the options cannot mean has been refused."""
    if weights not in (None, WEIGHTS):
        raise RequestError(f"--weights {weights} is not known; give {WEIGHTS}, or leave it out for those of the model")
    if resume is not None and name is not None:
        raise RequestError("a saved state has a dtype of its own; leave out --state-dtype or --resume")
    return dtype_of(name)


def _read(session: Session, words: Tokenizer, chunks: Iterator[str | bytes], name: str, chat: bool) -> None:
    """Read the prompt, as a message with `chat`."""
    if chat:
        session.read_tokens(_message(words, chunks, name))
    else:
        session.read_stream(chunks, name=name)


def _message(tokenizer: Tokenizer, chunks: Iterator[str | bytes], name: str) -> list[int]:
    """The prompt as a message of a user, in the model's own words for a conversation."""
    if tokenizer.chat is None:
        raise RequestError("the model has no chat template, so it knows no conversations; leave --chat out")
    parts = [chunk.encode() if isinstance(chunk, str) else chunk for chunk in chunks]
    try:
        content = b"".join(parts).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    messages = [{"role": "user", "content": content}]
    text = tokenizer.chat.render(messages, add_generation_prompt=True, now=datetime.now(UTC))
    return tokenizer.encode(text, special=True)


def _counts(session: Session, prompt_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": session.tokens_read - prompt_tokens,
        "state_bytes": session.state_bytes,
    }


def _show(pieces: Iterator[str], silent: bool) -> str:
    """Print the pieces as they come; give back the whole text."""
    written = []
    for piece in pieces:
        written.append(piece)
        if not silent:
            print(piece, end="", flush=True)
    if not silent:
        print()
    return "".join(written)


def _prompt(prompt: str | None, file: Path | None, *, optional: bool) -> tuple[Iterator[str | bytes] | None, str]:
    """The prompt in chunks, and what messages call it; with `optional`, nothing given means that there is none."""
    if prompt not in (None, "-") and file is not None:
        raise RequestError("both a prompt and --file were given; give one of them")
    if file is not None:
        return _chunks(file), str(file)
    if prompt not in (None, "-"):
        return iter([str(prompt)]), "the prompt"
    if prompt is None and optional:
        return None, ""
    if prompt is None and sys.stdin.isatty():
        raise RequestError("no prompt was given; give it as an argument, with --file, or on standard input")
    return _chunks(sys.stdin.fileno()), "standard input"


def _chunks(source: Path | int) -> Iterator[bytes]:
    """The bytes of a file, read piece by piece."""
    try:
        with open(source, "rb", closefd=isinstance(source, Path)) as opened:
            yield from iter(partial(opened.read, CHUNK), b"")
    except OSError as error:
        raise DataError(f"cannot read the prompt: {error}; give the path of a text file") from None
