"""The language model as a whole: the laws hold end to end, and its border is guarded."""

from __future__ import annotations

import tomllib

import pytest
import torch
from torch import Tensor

from everstate.core import state as states
from everstate.core.errors import ConfigError, RequestError
from everstate.core.packing import Packing
from everstate.data import Batch
from everstate.models import LM, ModelConfig, cost
from everstate.train.lanes import segment_loss

HYBRID = ModelConfig(
    d_model=16,
    vocab_size=50,
    layout="2 * (ssm mlp) attn old mlp",
    mixers={
        "ssm": {"type": "mamba3", "d_state": 8, "headdim": 8},
        "old": {"type": "mamba1", "d_state": 4},
        "attn": {"type": "attention", "nheads": 2, "window": 8},
        "mlp": {"type": "mlp", "d_hidden": 24},
    },
)


@pytest.fixture(scope="module")
def model() -> LM:
    return LM(HYBRID, dtype=torch.float64)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(0))


def test_split_step_and_packing_agree(model: LM) -> None:
    ids = tokens(2, 40)
    whole, final = model(ids, model.init_state(2))
    first, middle = model(ids[:, :17], model.init_state(2))
    second, last = model(ids[:, 17:], middle)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-10)
    pool = model.init_state(2)
    for t in range(40):
        assert torch.allclose(model.step_(ids[:, t], pool), whole[:, t], atol=1e-10)
    for got, stepped, expected in zip(*map(states.tensors, (last, pool, final)), strict=True):
        assert torch.allclose(got, expected, atol=1e-10)
        assert torch.allclose(stepped, expected, atol=1e-10)
    packed, after = model(ids.flatten()[None], model.init_state(2), Packing.of_lengths([40, 40]))
    assert torch.allclose(packed.view(2, 40, -1), whole, atol=1e-10)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*map(states.tensors, (after, final)), strict=True))


def test_logits_are_hidden_through_the_head(model: LM) -> None:
    hidden, _ = model.hidden(tokens(1, 5), model.init_state(1))
    assert torch.equal(model.logits(hidden), model(tokens(1, 5), model.init_state(1))[0])


def test_a_seed_is_a_model() -> None:
    one, same, other = LM(HYBRID, seed=1), LM(HYBRID, seed=1), LM(HYBRID, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    LM(HYBRID)
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_and_untied_heads() -> None:
    untied = LM(ModelConfig(**{**HYBRID.table(), "tie_embeddings": False}))
    assert untied.head is not None
    assert untied.head_weight is untied.head.weight
    tied = LM(HYBRID)
    assert tied.head_weight is tied.embedding.weight
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 50 * 16


def test_low_precision_keeps_dynamics_in_float32() -> None:
    model = LM(HYBRID, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["embedding.weight"] is torch.bfloat16
    assert dtypes["blocks.0.mixer.dt_bias"] is torch.float32
    logits, _ = model(tokens(1, 9), model.init_state(1))
    assert logits.dtype is torch.bfloat16
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("bad", [-1, 50])
def test_ids_outside_the_vocabulary_are_refused(model: LM, bad: int) -> None:
    with pytest.raises(RequestError, match=f"token id {bad} is outside the vocabulary of 50"):
        model(torch.tensor([[3, bad]]), model.init_state(1))
    with pytest.raises(RequestError, match=f"token id {bad}"):
        model.step_(torch.tensor([bad]), model.init_state(1))


def test_segments_and_states_that_do_not_fit_are_refused(model: LM) -> None:
    with pytest.raises(RequestError, match="empty segment"):
        model(tokens(1, 0), model.init_state(1))
    with pytest.raises(RequestError, match=r"3 rows and tokens 2; make it with init_state\(2\)"):
        model(tokens(2, 4), model.init_state(3))
    with pytest.raises(RequestError, match="2 sequences"):
        model(tokens(1, 4), model.init_state(1), Packing.of_lengths([2, 2]))
    with pytest.raises(RequestError, match="delta_t"):
        model(tokens(1, 4), model.init_state(1), None, torch.ones(1, 4, dtype=torch.float64))


def test_steps_that_do_not_fit_are_refused(model: LM) -> None:
    pool = model.init_state(3)
    for ids, slots, message in (
        (tokens(1, 2)[0], None, "3 rows and tokens 2"),
        (tokens(1, 2)[0], torch.tensor([1, 1]), "different rows"),
        (tokens(1, 2)[0], torch.tensor([0, 3]), "different rows of the 3"),
        (tokens(1, 0)[0], torch.tensor([], dtype=torch.int64), "at least one"),
    ):
        with pytest.raises(RequestError, match=message):
            model.step_(ids, pool, slots)
    with pytest.raises(RequestError, match="2 parts and the model 7 blocks"):
        model(tokens(1, 2), pool[:2])


def test_elapsed_time_reaches_the_mixers() -> None:
    table = {"type": "mamba2", "headdim": 8}
    model = LM(ModelConfig(d_model=16, vocab_size=50, layout="a", mixers={"a": table}))
    regular, _ = model(tokens(1, 9), model.init_state(1))
    same, _ = model(tokens(1, 9), model.init_state(1), None, torch.ones(1, 9))
    slower, _ = model(tokens(1, 9), model.init_state(1), None, torch.full((1, 9), 3.0))
    assert torch.equal(regular, same)
    assert not torch.allclose(regular, slower)


def test_config_to_toml_and_back() -> None:
    assert ModelConfig.parse(tomllib.loads(HYBRID.to_toml())) == HYBRID
    table = {"type": "mamba2", "headdim": 8, "dt_limit": (0.0, float("inf"))}
    tuples = ModelConfig(d_model=16, vocab_size=9, layout="a", mixers={"a": table})
    assert ModelConfig.parse(tomllib.loads(tuples.to_toml())) == tuples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modl": 3}, "unknown key 'd_modl'; did you mean 'd_model'"),
        ({"layout": "ssm mpl"}, "layout names 'mpl', which is no mixer; did you mean 'mlp'"),
        ({"layout": "ssm mlp attn"}, "mixers describes 'old', which layout 'ssm mlp attn' does not use"),
        ({"mixers": {"ssm": {"type": "mamba9"}}}, "mixers.ssm: unknown mixer type 'mamba9'; did you mean 'mamba"),
        ({"mixers": {"ssm": {"d_state": 9}}}, "no 'type' that is a name"),
        ({"mixers": {"ssm": {"type": "mamba3", "d_stat": 9}}}, "mixers.ssm.*unknown key 'd_stat'; did you mean 'd_sta"),
        ({"mixers": {"ssm": {"type": 3}}}, "no 'type' that is a name"),
        ({"mixers": {"ssm": {"type": "mamba3", "dt_min": 2.0, "dt_max": 1.0}}}, "dt_min = 2.0 is above dt_max = 1.0"),
        ({"d_model": 0}, "d_model: .*greater than 0"),
    ],
)
def test_config_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig(**{**HYBRID.table(), **change})
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_are_found_when_the_model_is_built() -> None:
    config = ModelConfig(d_model=16, vocab_size=9, layout="a", mixers={"a": {"type": "mamba2", "headdim": 7}})
    with pytest.raises(ConfigError, match="headdim = 7 does not divide d_inner = 32"):
        LM(config)
    for table, message in (
        ({"headdim": 8, "ngroups": 3}, "ngroups = 3 does not divide nheads = 4"),
        ({"headdim": 8, "dt_limit": (1.0, 0.5)}, "dt_limit .* is not 0 <= low < high"),
        ({"headdim": 8, "A_init_range": (-1.0, 16.0)}, "A_init_range .* is not 0 < low <= high"),
    ):
        with pytest.raises(ConfigError, match=message):
            LM(ModelConfig(d_model=16, vocab_size=9, layout="a", mixers={"a": {"type": "mamba2", **table}}))


def test_cost_counts_what_the_model_has() -> None:
    model = LM(HYBRID)
    counted = cost(HYBRID, context=100)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.state_bytes == states.nbytes(model.init_state(1))
    assert counted.kv_cache_bytes == 2 * 2 * 16 * 4 * 100
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert counted.flops_per_token > 2 * 0.9 * matrices
    assert cost(HYBRID, context=10**6).state_bytes == counted.state_bytes
    huge = ModelConfig(d_model=8192, vocab_size=100_000, layout="200 * (mamba2 mlp)")
    assert cost(huge).parameters > 10**11


MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logit_multiplier": 0.5, "logit_softcap": 2.0}


def test_multipliers_norm_after_and_softcap_written_out() -> None:
    config = ModelConfig(
        d_model=16,
        vocab_size=50,
        layout="mlp late",
        mixers={"late": {"type": "mlp"}},
        post_norm=("late",),
        **MULTIPLIED,
    )
    model, ids = LM(config, dtype=torch.float64), tokens(2, 5)
    mlp, late = model.layers
    x = 3.0 * model.embedding.weight[ids]
    x = x + 0.4 * mlp.mixer.read(mlp.norm(x))
    x = x + 0.4 * late.norm(late.mixer.read(x))
    logits = 0.5 * model.norm(x) @ model.embedding.weight.T
    torch.testing.assert_close(model(ids, model.init_state(2))[0], 2.0 * torch.tanh(logits / 2.0))
    torch.testing.assert_close(model.step_(ids[:, 0], model.init_state(2)), 2.0 * torch.tanh(logits[:, 0] / 2.0))


def test_the_loss_of_training_knows_the_multipliers_and_the_softcap() -> None:
    table = {"mamba2": {"type": "mamba2", "headdim": 8}}
    model = LM(ModelConfig(d_model=16, vocab_size=50, layout="mamba2", mixers=table, **MULTIPLIED), dtype=torch.float64)
    row = tokens(1, 9)
    nothing = torch.tensor([-1])
    batch = Batch(row[:, :-1], row[:, 1:], Packing.of_lengths([8]), continues=nothing, last=nothing)
    logits, _ = model(row[:, :-1], model.init_state(1))
    wanted = torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="sum")
    torch.testing.assert_close(segment_loss(model, batch, model.init_state(1))[0], wanted)


def test_post_norm_names_blocks() -> None:
    with pytest.raises(ConfigError, match="post_norm names 'atn', which is no block; did you mean 'attn'"):
        ModelConfig(
            d_model=16, vocab_size=50, layout="attn mlp", mixers={"attn": {"type": "attention"}}, post_norm=("atn",)
        )
