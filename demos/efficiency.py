"""Which credit, baseline and inner optimizer learns from the fewest samples?

Runs demos/sixty_seven.py and demos/uuid.py with their defaults and with one choice changed at a
time, over several seeds, and draws how fast each learns. A run that is complete in the folder is
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

import matplotlib
import numpy as np

from demos import options
from demos.figures import deviation

DEMOS = {  # the number of metrics.jsonl that is drawn, and what counts as learned
    "sixty_seven": ("pixel_accuracy", 1.0),
    "uuid": ("exact_held_out", 0.95),
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
    found = summary(curves, args)
    draw(found, out / "figure.png")
    print(f"files       {out}/")


def summary(curves, args):
    """Prints who learned when; for each demo and variant its steps and curves (seeds, steps)."""
    found = {}
    for demo in args.demo or DEMOS:
        key, enough = DEMOS[demo]
        print(f"{demo}: first step with {key} >= {enough}")
        for variant in VARIANTS:
            runs = [[json.loads(line) for line in
                     curves[demo, variant, seed].read_text().splitlines()]
                    for seed in range(args.seeds)]
            steps = [row["step"] for row in runs[0] if key in row]
            rows = [[row[key] for row in run if key in row] for run in runs]
            first = [next((step for step, value in zip(steps, row) if value >= enough), None)
                     for row in rows]
            there = [step for step in first if step is not None]
            spread = f"{np.mean(there):.0f} +- {deviation(there):.0f}" if there else "-"
            print(f"  {variant:32} {len(there)} of {len(rows)} seeds, at step {spread:10} {first}")
            found.setdefault(demo, {})[variant] = steps, np.array(rows)
    return found


def draw(found, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 4), squeeze=False)
    for axis, (demo, variants) in zip(axes[0], found.items()):
        for (variant, (steps, rows)), style in zip(variants.items(), ("-", "--", "-.", ":")):
            mean, std = rows.mean(0), deviation(rows)
            line, = axis.plot(steps, mean, style, label=variant)  # styles: two may coincide at zero
            axis.fill_between(steps, mean - std, mean + std, alpha=0.15,
                              color=line.get_color())
        axis.set(title=f"demos/{demo}.py", xlabel="generator step", ylim=(-0.02, 1.02),
                 ylabel=DEMOS[demo][0].replace("_", " "))
    axes[0, 0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
