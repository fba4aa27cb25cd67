"""Draw what `parity.py --json` measured: accuracy over training, and at lengths that were never trained on."""

import json
import sys

from matplotlib import pyplot

source, target = sys.argv[1:] or ("benchmarks/results/parity.json", "docs/learn/parity.png")
with open(source, encoding="utf-8") as file:
    runs = json.load(file)["runs"]
styles = {"mamba3": "C0", "mamba3 held still": "C1", "mamba2": "C2"}
figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for run in runs:
    name, curve = run["model"], run["curve"]
    label = f"{name} ({run['parameters']:,} parameters)" if run["seed"] == 0 else None
    lengths = [key for key in curve[-1] if key.isdecimal()]
    left.plot([p["step"] for p in curve], [p["40"] for p in curve], styles[name], label=label)
    left.plot([p["step"] for p in curve], [p["256"] for p in curve], styles[name], linestyle=":")
    right.plot(
        [int(key) for key in lengths], [curve[-1][key] for key in lengths], styles[name], marker="o", label=label
    )
left.set(xlabel="training step", ylabel="tokens answered rightly", title="length 40 (solid), 256 (dotted)")
right.set(xlabel="length of the sequence", xscale="log", title="after training on length 40")
right.set_xticks([int(key) for key in lengths], lengths, minor=False)
right.minorticks_off()
right.legend(fontsize="small", loc="center right")
figure.savefig(target, dpi=110)
