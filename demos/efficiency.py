"""Which credit, baseline and inner optimizer learns from the fewest samples?

Runs demos/sixty_seven.py and demos/uuid.py with their defaults and with one choice changed at a
time, over several seeds, and draws when each has learned. A run that is complete in the folder is
not run again; several of these can run side by side on one folder.

The measures: for "67" pixel accuracy 1.0 of a step's training batch; for the UUID Exact 0.95, the
share of greedy answers to held-out prompts that contain all of it, looked at every fifth step.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import json
import subprocess

import numpy as np

from demos import figures, options, records

DEMOS = {  # a number of metrics.jsonl, from where on it counts as learned, and its name
    "sixty_seven": ("pixel_accuracy", 1.0, '"67": all pixels right'),
    "uuid": ("exact_held_out", 0.95, "UUID: Exact 0.95"),
}
VARIANTS = {
    "default: token, batch, Adam": (),
    "credit per example": ("--credit", "example"),
    "baseline of the prompt's group": ("--baseline", "group"),
    "SGD inside": ("--inner", "sgd"),
}


def main(argv=None):
    parser = options.Parser(__file__, __doc__)
    parser.add_argument("--seeds", type=options.positive, default=5, help="how many (default 5)")
    parser.add_argument("--steps", type=options.count, help="generator steps (default the demo's)")
    parser.add_argument("--demo", choices=DEMOS, action="append", help="default: both")
    parser.add_argument("--out", default="runs/efficiency", help="folder (default %(default)s)")
    args = parser.parse_args(argv)
    out, curves = pathlib.Path(args.out), {}
    for seed in range(args.seeds):
        for demo in args.demo or DEMOS:
            for i, (variant, changed) in enumerate(VARIANTS.items()):
                folder = out / f"{demo}-{i}-{seed}"
                curves[demo, variant, seed] = folder / "metrics.jsonl"
                if (folder / "result.json").exists():
                    continue
                try:
                    folder.mkdir(parents=True)
                except FileExistsError:
                    continue  # another process is at it
                steps = [] if args.steps is None else ["--steps", str(args.steps)]
                subprocess.run([sys.executable, pathlib.Path(__file__).parent / f"{demo}.py",
                                "--seed", str(seed), "--out", folder, *changed, *steps],
                               check=True, stdout=subprocess.DEVNULL)
    missing = [path for path in curves.values() if not (path.parent / "result.json").exists()]
    if missing:
        parser.exit(1, f"not complete, by another process or at all: {missing[0].parent} and "
                       f"{len(missing) - 1} more; delete such a folder to have it run again\n")
    (out / "result.json").write_text(json.dumps(
        {"demo": "efficiency", "first": summary(curves, args)}) + "\n")
    draw(out, out / "figure.png")
    print(f"files       {out}/")


def summary(curves, args):
    """Prints who learned when; for each demo and variant the step, or None, of each seed."""
    found = {}
    for demo in args.demo or DEMOS:
        key, enough, what = DEMOS[demo]
        print(f"{demo}: first step with {key} >= {enough}")
        for variant in VARIANTS:
            runs = [records.rows(curves[demo, variant, seed]) for seed in range(args.seeds)]
            first = [next((row["step"] for row in run if row.get(key, 0) >= enough), None)
                     for run in runs]
            there = [step for step in first if step is not None]
            spread = f"{np.mean(there):.0f} +- {figures.deviation(there):.0f}" if there else "-"
            print(f"  {variant:32} {len(there)} of {len(runs)} seeds, at step {spread:10} {first}")
            found.setdefault(what, {})[variant] = first
    return found


def draw(folder, path):
    found = figures.read(folder)[0]["first"]
    figure = figures.figure(2.8, "Generator steps until it is learned: the fewer the better")
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axis, (what, variants) in zip(axes, found.items()):
        for y, first in enumerate(variants.values()):
            there = [step for step in first if step is not None]
            mean, end = np.mean(there or 0), max(there, default=0)
            axis.barh(y, mean, height=0.6, color=figures.GREY if y else figures.BLUE, alpha=0.6)
            axis.plot(there, [y] * len(there), "o", color=figures.INK, ms=3.5)
            axis.text(end, y, f"  {len(there)} of {len(first)} seeds", va="center",
                      in_layout=False)
        axis.set(title=what, xlabel="generator step", xlim=(0, 1.4 * axis.get_xlim()[1]))
    axes[0].set(yticks=range(len(variants)), yticklabels=variants)
    axes[0].invert_yaxis()
    figure.supxlabel("bar: mean of the seeds that learned; dots: these seeds", fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main()
