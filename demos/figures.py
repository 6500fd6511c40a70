"""The picture that a run with text as its target leaves: learning curves, and what was written;
and the spread that figures and scripts show."""
import re

import matplotlib
import numpy as np


def learning(path, history, curves, grey, lines, *, title, ylabel):
    """`curves` and `grey` are pairs of a key of the history and its label; the second has an axis
    of its own. `lines` stand below."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.2), height_ratios=(2, 1))
    for key, label in curves:
        rows = [row for row in history if key in row]
        top.plot([row["step"] for row in rows], [row[key] for row in rows], label=label)
    top.set(ylabel=ylabel, ylim=(-0.02, 1.02), xlabel="generator step", title=title)
    if len(curves) > 1:
        top.legend(loc="lower right", fontsize="small")
    right, (key, label) = top.twinx(), grey
    right.plot([row["step"] for row in history], [row[key] for row in history], color="grey", lw=1)
    right.set_ylabel(f"{label} (grey)", color="grey")
    if all(row[key] >= 0 for row in history):
        right.set_ylim(bottom=0)
    bottom.axis("off")
    lines = [re.sub(r"\s", " ", line)[:96] for line in lines]
    bottom.text(0, 1, "\n".join(lines), family="monospace", va="top", fontsize=9,
                parse_math=False)  # a sample may hold any character
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def spread(history, n):
    """n of its rows, or fewer, evenly from the first to the last."""
    return [history[i * (len(history) - 1) // (n - 1)] for i in range(n)] if history else []


def deviation(runs):
    """The standard deviation of the sample, over the first axis; of one run 0."""
    runs = np.asarray(runs, dtype=float)
    return np.std(runs, axis=0, ddof=1) if len(runs) > 1 else np.zeros(runs.shape[1:])
