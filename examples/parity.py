"""Parity: after each bit, is the number of ones so far odd? A state that turns can tell, one that only fades cannot."""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import everstate
from everstate.bench.report import machine

LENGTHS = (40, 64, 128, 256, 512)  # trained on the first, measured on all
MAMBA3 = {"type": "mamba3", "d_state": 16, "headdim": 16, "dt_min": 0.3, "dt_max": 2.0}
MODELS = {"mamba3": MAMBA3, "mamba3 held still": MAMBA3, "mamba2": {"type": "mamba2", "d_state": 16, "headdim": 16}}


@torch.no_grad()
def accuracy(model, length):
    bits = torch.randint(2, (64, length), generator=torch.Generator().manual_seed(1))
    logits, _ = model(bits, model.init_state(64))
    return (logits.argmax(-1) == bits.cumsum(1) % 2).double().mean().item()


def train(name, seed, steps):
    config = {"d_model": 40, "vocab_size": 2, "tie_embeddings": False, "layout": "ssm", "mixers": {"ssm": MODELS[name]}}
    model = everstate.LM(everstate.ModelConfig(**config), seed=seed)
    model.norm = torch.nn.Identity()  # so that the size of an answer counts: alike at all times, by exact half turns
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05, cycle_momentum=False)
    run = {"model": name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "curve": []}
    draw, begin = torch.Generator().manual_seed(seed), time.process_time()
    for step in range(1, steps + 1):
        # Each sequence has its own share of ones, so that an error of the zeros cannot make up for one of the ones.
        bits = (torch.rand(16, LENGTHS[0], generator=draw) < torch.rand(16, 1, generator=draw)).long()
        logits, _ = model(bits, model.init_state(16))
        cross_entropy(logits.flatten(0, 1), (bits.cumsum(1) % 2).flatten(), label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
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
seeds, steps = ((0,), 4) if given.quick else ((0, 1, 2), 3000)
runs = [train(name, seed, steps) for name in MODELS for seed in seeds]
if given.json:
    given.json.write_text(json.dumps({"machine": machine(torch.device("cpu")), "runs": runs}, indent=1) + "\n")
