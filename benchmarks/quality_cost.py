"""Draw quality against the cost of training, from the figures in quality.json.

Each dot is one run: the seconds that alignment, training and polishing took, and the kept gain (the share of what LoRA
on the full model gains that the full model has with the recovered adapter). A line joins the seeds of one setting. The
seconds come from a crowded machine, so they compare orders of magnitude only.

    python benchmarks/quality_cost.py

Needs matplotlib and nothing else; writes quality_cost.png beside this script.
"""

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent


class Setting(NamedTuple):
    """A setting of quality.json, and how the picture shows it; `offset` places the label, in points from the dot."""

    name: str
    label: str
    colour: str
    offset: tuple[int, int]


FULL, PAPER, ALIGNED, ANCHORED, POLISHED = "#555555", "#6baed6", "#e6a700", "#238b45", "#a50f15"
SETTINGS = [
    Setting("LoRA on the full model", "LoRA on the full model", FULL, (-250, 8)),
    Setting("QLoRA on the full model", "QLoRA on the full model", FULL, (-138, -3)),
    Setting("p=0.5 taylor, align none", "LoRAM as in the paper, pruned at 0.5", PAPER, (-66, -14)),
    Setting("p=0.75 taylor, align none", "the same, pruned at 0.75", PAPER, (8, -4)),
    Setting("p=0.5 taylor, align distill 25", "aligned, 25 steps", ALIGNED, (2, -14)),
    Setting("p=0.5 taylor, align distill 100", "aligned, 100 steps", ALIGNED, (-40, 9)),
    Setting(
        "p=0.5 taylor, align none, anchor_gradients False, anchor_steps 5",
        "anchored without gradients, 0.5",
        ANCHORED,
        (2, -15),
    ),
    Setting("p=0.5 taylor, align none, anchor_steps 5", "anchored, 0.5", ANCHORED, (7, -3)),
    Setting("p=0.75 taylor, align none, anchor_steps 5", "anchored, 0.75", ANCHORED, (7, -3)),
    Setting("p=0.5 taylor, align none, anchor_steps 5, 12 steps, polished 8 0.001", "", POLISHED, (0, 0)),
    Setting("p=0.75 taylor, align none, anchor_steps 5, 12 steps, polished 8 0.001", "", POLISHED, (0, 0)),
    Setting(
        "p=0.85 taylor, align none, anchor_steps 5, 12 steps, polished 8 0.001",
        "anchored, last 8 of 20 steps polished;\nfrom the top 0.5, 0.75, 0.85",
        POLISHED,
        (-205, -17),
    ),
]


def runs(setting: Setting) -> list[tuple[float, float]]:
    """Return (seconds, kept gain in percent) of each run of a setting, the fastest first."""
    rows = json.loads((HERE / "quality.json").read_text(encoding="utf-8"))["rows"]
    return sorted(
        (sum(row["seconds"].get(part, 0.0) for part in ("align", "train", "polish")), 100 * row["kept_gain"])
        for row in rows
        if row["name"] == setting.name
    )


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(8.6, 5), layout="constrained")
    for setting in SETTINGS:
        seconds, gains = zip(*runs(setting), strict=True)
        axes.plot(seconds, gains, "o-", color=setting.colour, markersize=6, linewidth=1.2)
        axes.annotate(
            setting.label,
            (seconds[-1], gains[-1]),
            xytext=setting.offset,
            textcoords="offset points",
            color=setting.colour,
            fontsize=9,
        )
    axes.set_xscale("log")
    ticks = [200, 300, 500, 1000, 2000, 3000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(180, 4000)
    axes.set_ylim(0, 109)
    axes.set_xlabel("seconds of alignment, training and polishing on one thread of a busy CPU (one dot per run)")
    axes.set_ylabel("kept gain, % of what LoRA on the full model gains")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "quality_cost.png", dpi=130)


if __name__ == "__main__":
    main()
