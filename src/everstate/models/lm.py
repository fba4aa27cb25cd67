"""The language model: an embedding, a flat list of residual blocks, a norm and a head."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everstate.core.dtypes import state_dtype
from everstate.core.errors import RequestError
from everstate.core.kernels import refusal
from everstate.core.packing import Packing
from everstate.core.state import Slots, named_tensors
from everstate.mixers import Mixer, State, build_mixer
from everstate.mixers.base import allocate_, cast_
from everstate.mixers.modules import Linear, Norm, build_norm, is_plain, is_untouched, scaled
from everstate.mixers.parallel import cast_state
from everstate.models.config import ModelConfig
from everstate.models.step import step_blocks_
from everstate.ops import Normed, linear

EMBEDDING_STD = 0.02


class Block(nn.Module):
    """One residual block: `x + multiplier * mixer(norm(x))`, or `x + multiplier * norm(mixer(x))` with `norm_after`.

    The multiplier is one for all blocks of a model: what a block gives is added, times it, when the next takes.
    """

    norm: Norm
    mixer: Mixer

    def __init__(self, norm: Norm, mixer: Mixer, *, norm_after: bool, multiplier: float) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.norm_after = norm_after
        self.multiplier = multiplier

    @property
    def is_plain(self) -> bool:
        """Whether the norm is before the mixer, and nobody has put anything in the place of what a block does."""
        return not self.norm_after and is_untouched(self, Block, "input", "take", "give")

    def input(self, x: Float[Tensor, "*b d"], dtype: torch.dtype) -> Float[Tensor, "*b d"]:
        """What the mixer reads of the residual stream."""
        return (x if self.norm_after else self.norm(x)).to(dtype)

    def take(
        self, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"] | None, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
        """The residual stream with what the block before gave it, and what the mixer reads of it."""
        if y is None or self.norm_after:
            x = x if y is None else torch.add(x, y, alpha=self.multiplier)
            return x, self.input(x, dtype)
        x, h = self.norm.add(x, y, self.multiplier)
        return x, h.to(dtype)

    def give(self, y: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """What the residual stream is to be given, before the multiplier, of what the mixer gave."""
        return self.norm(y) if self.norm_after else y


class LM(nn.Module):
    """A language model built from a `ModelConfig`; the same weights read segments (`forward`) and tokens (`step_`).

    A `seed` gives the same weights on every device; on the `meta` device nothing is allocated. The residual stream is
    float32 (float64 for float64 weights) whatever the weights are. Raises `ConfigError` for shapes that do not fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            # Given a weight, the module draws none, for which torch would first import its compiler: 1.5 seconds.
            weight = torch.empty(config.vocab_size, config.d_model)
            self.embedding = nn.Embedding(config.vocab_size, config.d_model, _weight=weight)
            self.blocks = nn.ModuleList(
                Block(
                    build_norm(config.norm, config.d_model, config.norm_eps),
                    build_mixer(config.mixer_table(name), config.d_model, device="meta"),
                    norm_after=name in config.post_norm,
                    multiplier=config.residual_multiplier,
                )
                for name in config.blocks
            )
            self.norm = build_norm(config.norm, config.d_model, config.norm_eps)
            self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        cast_(self, dtype)
        if torch.device(device).type != "meta":
            allocate_(self, device)
            self._init(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _init(self, generator: torch.Generator) -> None:
        """Values of every parameter; what adds to the residual stream is scaled by 1 / sqrt(blocks), as in GPT-2."""
        weights = [self.embedding.weight] + ([] if self.head is None else [self.head.weight])
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=generator) * EMBEDDING_STD)
        self.norm.init_()
        for block in self.layers:
            block.norm.init_()
            block.mixer.init_(generator)
            for name, parameter in block.mixer.named_parameters():
                if name.endswith("out_proj.weight"):
                    parameter.div_(len(self.blocks) ** 0.5)

    @property
    def quantised(self) -> bool:
        """Whether weights are 8 bits wide; see `quantize_`."""
        return any(isinstance(part, Linear) and part.scale is not None for part in self.modules())

    def quantize_(self) -> LM:
        """Round the weights of all linear maps, the head's too, to 8 bits, with one factor for each output.

        Decoding then reads half as many bytes. The model can be run and no longer trained or saved. Returns itself.
        """
        if self.head is None:
            self.head = Linear(self.config.d_model, self.config.vocab_size, bias=False)
            self.head.weight = nn.Parameter(self.embedding.weight.detach())
        for part in self.modules():
            if isinstance(part, Linear):
                part.quantize_()
        return self

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast("list[Block]", list(self.blocks))

    @property
    def causal(self) -> bool:
        """Whether no output sees what comes later, so that the model can be trained to predict, and be stepped."""
        return all(block.mixer.causal for block in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (those that must stay in float32 aside)."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.embedding.weight.device

    @property
    def head_weight(self) -> Float[Tensor, "v d"]:
        """The weight of the output head, be it tied or not."""
        return self.embedding.weight if self.head is None else self.head.matrix()

    @property
    def reads_undivided(self) -> bool:
        """Whether nothing but a linear map reads what the last norm gives, so that its division may be left to that."""
        own = is_untouched(self, LM, "logits", "finish")
        return own and self.config.logit_multiplier == 1.0 and (self.head is None or is_plain(self.head))

    def init_state(self, batch: int, *, context: int | None = None, dtype: torch.dtype | None = None) -> State:
        """The state before the first token of `batch` sequences: one state per block.

        `context` bounds how many past tokens full attention can look back to; models without it do not read it.
        `dtype` is that of recurrent states, by default float32; with bfloat16 they take half the memory, and what is
        added to a state is rounded. Raises `RequestError` where a layer cannot step such states.
        """
        state = tuple(block.mixer.init_state(batch, context=context) for block in self.layers)
        if dtype is None:
            return state
        return tuple(cast_state(block.mixer, part, dtype) for block, part in zip(self.layers, state, strict=True))

    @torch.no_grad()
    def deferred(self, state: State) -> State:
        """The same state in a form for many steps, which need not write all of it with every token; see `Mixer`.

        Layers take turns, so that with each token some are written.
        """
        parts = enumerate(zip(self.layers, state, strict=True))
        return tuple(b.mixer.deferred(part, i) if isinstance(b.mixer, Mixer) else part for i, (b, part) in parts)

    @torch.no_grad()
    def settle_(self, state: State) -> None:
        """Write what a state that `deferred` gave has put off, so that the one it was made of is up to date."""
        for block, part in zip(self.layers, state, strict=True):
            if isinstance(block.mixer, Mixer):
                block.mixer.settle_(part)

    def forward(
        self,
        tokens: Int[Tensor, "b l"],
        state: State,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l v"], State]:
        """Read a segment: the logits of the token after each, and the state after the last.

        Pure: `state` is left as it was. With `packing`, `tokens` is one row of sequences end to end and the state has
        one row per sequence. `delta_t` is the time before each token, 1 being regular. Raises `RequestError` for token
        ids outside the vocabulary, an empty segment, or a state of another batch.
        """
        x, state = self.hidden(tokens, state, packing, delta_t)
        return self.logits(x), state

    def hidden(
        self,
        tokens: Int[Tensor, "b l"],
        state: State,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], State]:
        """`forward` without the head: what a loss or a prefill needs, at a fraction of the memory of all logits."""
        self._check(tokens, state, packing)
        x, y, after, dtype = self._embed(tokens), None, [], self.dtype
        for block, before in zip(self.layers, state, strict=True):
            x, h = block.take(x, y, dtype)
            y, new = block.mixer(h, before, packing, delta_t)
            y = block.give(y)
            after.append(new)
        return self.finish(x, y), tuple(after)

    def logits(self, hidden: Float[Tensor, "*b d"] | Normed) -> Float[Tensor, "*b v"]:
        """The head, applied to outputs of `hidden`."""
        cap = self.config.logit_softcap
        logits = linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def step_(
        self,
        tokens: Int[Tensor, " b"],
        state: State,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b v"]:
        """Read one token for each of the rows `slots` of a pool of states (None: all rows), writing them in place.

        Raises `RequestError` for ids outside the vocabulary, and for rows that do not fit the tokens or occur twice.
        """
        self._check_step(tokens, state, slots)
        # Rows picked by index: what PyTorch has for an embedding of few rows takes five times as long on a GPU.
        x, y, dtype = self._widened(self.embedding.weight[tokens]), None, self.dtype
        if refusal(x) is None:  # elsewhere there are no launches to save, and asking who may takes time
            return self.logits(step_blocks_(self, x, state, slots, delta_t))
        for block, pool in zip(self.layers, state, strict=True):
            x, h = block.take(x, y, dtype)
            y = block.give(block.mixer.step_(h, pool, slots, delta_t))
        return self.logits(self.finish(x, y))

    def _embed(self, tokens: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """The residual stream before the first block."""
        return self._widened(self.embedding(tokens))

    def _widened(self, rows: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return scaled(rows.to(state_dtype(self.dtype)), self.config.embedding_multiplier)

    def finish(self, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"] | None = None) -> Float[Tensor, "*b d"]:
        """What the head reads after the last block gave `y`; the multiplier of the logits is in it, for every loss."""
        multiplier = self.config.residual_multiplier
        if y is not None and isinstance(self.norm, Norm):
            h = self.norm.add(x, y, multiplier)[1]
        else:  # another module in place of the norm, as in examples/parity.py, has one argument
            h = self.norm(x if y is None else torch.add(x, y, alpha=multiplier))
        return scaled(h, self.config.logit_multiplier).to(self.dtype)

    def _check(self, tokens: Tensor, state: State, packing: Packing | None) -> None:
        """The border: what a user can get wrong about a segment."""
        rows = self._check_kinds(tokens, state, "b l")
        batch, length = tokens.shape
        if length == 0:
            raise RequestError("an empty segment cannot be read; give at least one token")
        if packing is not None:
            packing.check(batch, length, rows)
        elif rows not in (None, batch):
            raise RequestError(f"the state has {rows} rows and tokens {batch}; make it with init_state({batch})")
        self._check_ids(tokens)

    def _check_step(self, tokens: Tensor, state: State, slots: Slots) -> None:
        """The border: what a user can get wrong about a step."""
        held, given = self._check_kinds(tokens, state, "b"), len(tokens)
        rows = held if slots is None else len(slots)
        if rows not in (None, given) or given == 0:
            where = "state has" if slots is None else "slots name"
            raise RequestError(
                f"the {where} {rows} rows and tokens {given}; give one token for each row, and at least one"
            )
        if slots is not None and slots.device.type == "cpu" and not torch.compiler.is_compiling():
            named = slots.tolist()
            if len(set(named)) < given or (held is not None and not 0 <= min(named) <= max(named) < held):
                raise RequestError(f"slots {named} must name different rows of the {held} that the state has")
        self._check_ids(tokens)

    def _check_kinds(self, tokens: Tensor, state: State, shape: str) -> int | None:
        """Refuse what are no ids or no state of this model; the rows that the state holds, None without any."""
        if tokens.is_floating_point() or tokens.ndim != len(shape.split()):
            given = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise RequestError(f"tokens are {given} and must be integer ids of shape ({shape})")
        if len(state) != len(self.blocks):
            raise RequestError(
                f"the state has {len(state)} parts and the model {len(self.blocks)} blocks; "
                "make it with init_state of this model"
            )
        return next((tensor.shape[0] for _, tensor in named_tensors(state)), None)

    def _check_ids(self, tokens: Tensor) -> None:
        # On a GPU, or under a compiler, looking at the values would stall the device: there the engine has checked.
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}; "
                "ids go from 0 to vocab_size - 1: use the tokenizer that belongs to the model"
            )
