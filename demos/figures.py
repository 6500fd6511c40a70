"""Draws the READMEs' pictures again, or the picture of a run; what pictures share stands here too.

    python demos/figures.py                     # demos/*.png, from demos/results/<demo>/
    python demos/figures.py runs/uuid           # runs/uuid/figure.png
    python demos/figures.py --keep runs/uuid    # the READMEs' one is to be this run's

A picture is drawn from the small files of its run, which --keep copies to demos/results.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import argparse
import importlib
import json
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from demos import options, records

PICTURES = records.DEMOS  # where the READMEs' are
FILES = ("result.json", "metrics.jsonl", "validation.jsonl")  # what a picture is drawn from
DRAWN_BY = dict(uuid="strings", smollm2="strings", qr_code="patterns", sixty_seven="patterns")
WIDTH, INK, GREY = 8.3, "#24292f", "#6e7781"  # inches of GitHub's page
BLUE, ORANGE, GREEN = COLOURS = "#1f5fbf", "#d9570d", "#3d8f5f"
matplotlib.rcParams.update({
    "font.size": 9.5, "axes.titlesize": 10, "figure.titlesize": 12.5, "legend.fontsize": 9,
    "legend.frameon": False, "savefig.dpi": 180, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": GREY, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "lines.linewidth": 1.8,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS)})


def figure(height, title):
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    made.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    made.suptitle(title)
    return made


def read(folder):
    """What a run left: its result, and the rows of its metrics and of its validation."""
    result, *rows = (pathlib.Path(folder) / name for name in FILES)
    return json.loads(result.read_text(encoding="utf-8")), *map(records.rows, rows)


def texts(axis, title, rows):
    """A line for each label and text, in which the part from `start` to `end` stands out."""
    axis.axis("off")
    axis.set_title(title, color=GREY)
    axis.set(xlim=(0, 1), ylim=(max(1, len(rows)) - 0.5, -0.5))
    size = min(16, 720 / max([len(text) for _, text, _, _ in rows], default=1))
    for y, (label, text, start, end) in enumerate(rows):
        axis.text(0.11, y, label, ha="right", va="center_baseline", color=GREY)
        for part, how in ((range(start, end), {"color": BLUE, "weight": "bold"}),
                          ({*range(len(text))} - {*range(start, end)}, {"color": GREY})):
            shown = "".join(c if i in part else " " for i, c in enumerate(re.sub(r"\s", " ", text)))
            if shown.strip():  # a sample may hold any character
                axis.text(0.14, y, shown, family="monospace", size=size, va="center_baseline",
                          parse_math=False, **how)


def level(axis, y, what):
    """A line to compare with."""
    axis.axhline(y, color=GREY, lw=1, ls=":", label=what)


def spread(history, n):
    """n of its rows, or fewer, evenly from the first to the last."""
    places = dict.fromkeys(i * (len(history) - 1) // (n - 1) for i in range(n))
    return [history[i] for i in places] if history else []


def deviation(runs):
    """The standard deviation of the sample, over the first axis; of one run 0."""
    runs = np.asarray(runs, dtype=float)
    return np.std(runs, axis=0, ddof=1) if len(runs) > 1 else np.zeros(runs.shape[1:])


def draw(folder, path):
    demo = read(folder)[0]["demo"]
    importlib.import_module(f"demos.{DRAWN_BY.get(demo, demo)}").draw(folder, path)
    print(path)


def keep(folder):
    """Copies what the picture of a run is drawn from to demos/results."""
    kept = records.RESULTS / read(folder)[0]["demo"]
    kept.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).exists():
            text = (folder / name).read_text(encoding="utf-8")
            (kept / name).write_text(records.anywhere(text), encoding="utf-8")


def main(argv=None):
    p = options.Parser(__file__, __doc__)
    p.add_argument("folders", nargs="*", type=run, help="of the runs whose figure.png is drawn "
                   "(default: the READMEs' pictures)")
    p.add_argument("--keep", action="store_true", help="make theirs the READMEs' pictures")
    args = p.parse_args(argv)
    for folder in args.folders:
        if args.keep:
            keep(folder)
        else:
            draw(folder, folder / "figure.png")
    for result in sorted(records.RESULTS.glob("*/result.json")) * (args.keep or not args.folders):
        draw(result.parent, PICTURES / f"{result.parent.name}.png")


def run(text):
    folder = pathlib.Path(text)
    if not (folder / "result.json").exists():
        raise argparse.ArgumentTypeError(f"{text!r} has no result.json of a complete run")
    return folder


if __name__ == "__main__":
    main()
