"""Text from prompts: the short way, over one prompt or several at once."""

from __future__ import annotations

from typing import overload

from everstate.core.errors import RequestError
from everstate.engine.runner import decode_, prefill_
from everstate.engine.sampler import Sampling
from everstate.models import LM
from everstate.tokenizers import StreamDecoder, Tokenizer


@overload
def generate(
    model: LM, tokenizer: Tokenizer, prompt: str, *, max_tokens: int = ..., temperature: float = ...,
    top_k: int = ..., top_p: float = ..., min_p: float = ..., seed: int = ...,
) -> str: ...  # fmt: skip
@overload
def generate(
    model: LM, tokenizer: Tokenizer, prompt: list[str], *, max_tokens: int = ..., temperature: float = ...,
    top_k: int = ..., top_p: float = ..., min_p: float = ..., seed: int = ...,
) -> list[str]: ...  # fmt: skip
def generate(
    model: LM,
    tokenizer: Tokenizer,
    prompt: str | list[str],
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> str | list[str]:
    """What the model writes after `prompt` (without the prompt), up to `max_tokens` tokens or an end-of-text token.

    Several prompts, of any lengths, run as one batch, each as if it were alone: the same seed gives the same text. See
    `Sampling` for the settings and `Session` for streaming. Raises `RequestError` for settings out of range and for
    a prompt without any token.
    """
    if max_tokens < 1:
        raise RequestError(f"max_tokens is {max_tokens}; ask for at least 1 token")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = [bos + tokenizer.encode(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
    if not prompts:
        raise RequestError("no prompt was given; give a string or a list of at least one string")
    state = model.init_state(len(prompts), context=max(map(len, prompts)) + max_tokens)
    written: list[list[int]] = [[] for _ in prompts]
    logits = prefill_(model, prompts, state)
    samplings, lengths = [sampling] * len(prompts), [len(prompt) for prompt in prompts]
    for step in decode_(model, logits, state, samplings, lengths, stop=tokenizer.eos_ids, max_tokens=max_tokens):
        for row, (token, _) in step.items():
            written[row].append(token)
    texts = [_text(tokenizer, tokens) for tokens in written]
    return texts[0] if isinstance(prompt, str) else texts


def _text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """What the tokens say as the continuation of a prompt."""
    decoder = StreamDecoder(tokenizer, continued=True)
    return decoder.push(token for token in tokens if token not in tokenizer.eos_ids) + decoder.flush()
