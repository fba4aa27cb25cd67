"""Small tokenizers of the two kinds that are published, trained or written here."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, UNKNOWN = "<|bos|>", "<|end of text|>", "<unk>"

TEXTS = [
    "Hello world, the quick brown fox jumps over the lazy dog. It's 2024!",
    "def main() -> None:\n    print('hello')\n\n\nif __name__ == '__main__':\n    main()\n",
    "L'état naïf, c'est moi. 日本語の文章。 Привет, мир 🙂🙂",
]

# The words of Llama-3: unlike those of GPT-2 they join punctuation to line ends and cut digits in threes.
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@lru_cache
def byte_level(words: str = "gpt2") -> str:
    """A byte-level BPE: the kind of GPT-NeoX, Llama-3, Falcon and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words == "gpt2")
    if words == "llama":
        from tokenizers import Regex

        plain = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated"), plain])
    tokenizer.pre_tokenizer = plain
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<think>", "<no thought é日>"])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return str(tokenizer.to_str())


@lru_cache
def sentencepiece(spaces: str = "prepend") -> str:
    """A BPE with byte fallback and a space put in front: the kind of Llama-2, Mistral and Jamba."""
    vocab = {UNKNOWN: 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "▁"), ("h", "e"), ("▁", "he"), ("l", "l"), ("▁", "w"), ("o", "r")]
    for token in ["▁", *"abcdehlorw", *("".join(pair) for pair in merges)]:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    elif spaces == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([UNKNOWN, "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())
