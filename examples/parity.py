"""Parity: after each bit, is the number of ones so far odd? A state that turns can tell, one that only fades cannot."""

import argparse
import json
import time
import tomllib
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import everstate
from everstate.bench.report import machine

RECIPE = tomllib.loads((Path(__file__).parent.parent / "recipes" / "parity.toml").read_text())
TRAIN = RECIPE["train"]
LENGTHS = (TRAIN["length"], 64, 128, 256, 512)  # trained on the first, measured on all


@torch.no_grad()
def accuracy(model, length):
    bits = torch.randint(2, (64, length), generator=torch.Generator().manual_seed(1))
    return (model(bits, model.init_state(64))[0].argmax(-1) == bits.cumsum(1) % 2).double().mean().item()


def train(name, seed, steps):
    config = everstate.ModelConfig(**RECIPE["model"], mixers={"ssm": RECIPE["mixers"][name.split()[0]]})
    model, count = everstate.LM(config, seed=seed), TRAIN["sequences"]
    model.norm = torch.nn.Identity()  # so that the size of an answer counts: alike at all times, by exact half turns
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=TRAIN["betas"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAIN["lr"], steps, pct_start=0.05, cycle_momentum=False)
    run = {"model": name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "curve": []}
    draw, begin = torch.Generator().manual_seed(seed), time.process_time()
    for step in range(1, steps + 1):
        # Each sequence has its own share of ones, so that an error of the zeros cannot make up for one of the ones.
        bits = (torch.rand(count, LENGTHS[0], generator=draw) < torch.rand(count, 1, generator=draw)).long()
        logits, _ = model(bits, model.init_state(count))
        cross_entropy(logits.transpose(1, 2), bits.cumsum(1) % 2, label_smoothing=TRAIN["label_smoothing"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if name == "mamba3 held still":
            model.blocks[0].mixer.in_proj.weight.data[-4:] = 0.0  # the rates at which its four pairs turn
        if step % 200 == 0 or step == steps:
            right = {str(length): round(accuracy(model, length), 4) for length in LENGTHS}
            run["curve"].append({"step": step, "cpu_seconds": round(time.process_time() - begin), **right})
            print(f"{name:18} seed {seed} step {step:5}  accuracy by length {right}", flush=True)
    return run


options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--quick", action="store_true", help="a few steps of one seed")
options.add_argument("--json", type=Path, help="where to write what was measured")
given = options.parse_args()
torch.set_num_threads(1)  # so small a model is slower on more
seeds, steps = ((0,), 4) if given.quick else (TRAIN["seeds"], TRAIN["steps"])
runs = [train(name, seed, steps) for name in ("mamba3", "mamba3 held still", "mamba2") for seed in seeds]
if given.json:
    given.json.write_text(json.dumps({"machine": machine(torch.device("cpu")), "runs": runs}, indent=1) + "\n")
