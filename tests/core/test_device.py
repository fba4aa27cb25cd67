"""Names of devices, from a recipe, a command line or a call."""

from __future__ import annotations

import pytest
import torch

from everstate.core.device import device_named
from everstate.core.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "count", "sentence"),
    [
        ("gpu", 2, "device = 'gpu' names no device; give cpu, cuda or cuda:1"),
        ("cuda", 0, "device = 'cuda', and PyTorch sees no GPU here; give cpu"),
        ("cuda:2", 2, "device = 'cuda:2', and PyTorch sees 2 here; give cpu, or cuda:0 to cuda:1"),
        (torch.device("cuda:2"), 2, "device = 'cuda:2', and PyTorch sees 2 here; give cpu, or cuda:0 to cuda:1"),
    ],
)
def test_one_that_is_not_there(
    name: torch.device | str, count: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError) as error:
        device_named(name)
    assert str(error.value) == sentence


@pytest.mark.parametrize("name", ["cpu", "meta", "cuda", "cuda:1"])
def test_one_that_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named(name) == device_named(torch.device(name)) == torch.device(name)
