"""Through how many training steps must a picture be trained, to last? (the ablation of section 4.2)

Runs demos/sixty_seven.py with T = 1, 8 and 32 inner steps, and draws how much of the picture stands
in the weights after 1 to 96 steps of plain training on fresh text, at three learning rates. The
generator steps and the texts in each are the same; with T = 1 the inner learning rate is larger
(patterns.inner_optimizer says why).
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import json

import matplotlib
import numpy as np

from demos import check, options, sixty_seven
from demos.figures import deviation

INNER_STEPS = (1, 8, 32)


def main(argv=None):
    parser = options.Parser(__file__, __doc__)
    parser.add_argument("--seeds", type=options.positive, default=1, help="how many (default 1)")
    parser.add_argument("--steps", type=options.count, help="generator steps (default those of 67)")
    parser.add_argument("--out", default="runs/inner_steps", help="folder (default %(default)s)")
    args = parser.parse_args(argv)
    out, curves = pathlib.Path(args.out), {}
    for T in INNER_STEPS:
        for seed in range(args.seeds):
            folder = out / f"T{T}-seed{seed}"
            if not (folder / "result.json").exists():  # else complete, and not run again
                sixty_seven.main(
                    ["--inner-steps", str(T), "--seed", str(seed), "--out", str(folder)]
                    + ([] if args.steps is None else ["--steps", str(args.steps)]))
            lines = (folder / "validation.jsonl").read_text().splitlines()
            curves.setdefault(T, []).append([json.loads(line) for line in lines])
    for multiple in check.MULTIPLES:
        for T, runs in curves.items():
            last = [run[-1][f"pixel_accuracy_{multiple}x"] for run in runs]
            print(f"learning rate x {multiple:3}   T = {T:2}   {np.mean(last):.3f} +- "
                  f"{deviation(last):.3f}   after {len(runs[0])} steps, {len(runs)} seed(s)")
    draw(curves, out / "figure.png")
    print(f"files       {out}/")


def draw(curves, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, len(check.MULTIPLES), figsize=(13, 3.6), sharey=True)
    for axis, multiple in zip(axes, check.MULTIPLES):
        for T, runs in curves.items():
            accuracy = np.array([[row[f"pixel_accuracy_{multiple}x"] for row in run]
                                 for run in runs])
            steps, mean, std = range(1, accuracy.shape[1] + 1), accuracy.mean(0), deviation(accuracy)
            axis.plot(steps, mean, label=f"trained through T = {T}")
            axis.fill_between(steps, mean - std, mean + std, alpha=0.2)
        axis.set(title=f"learning rate x {multiple}", xlabel="step of plain AdamW",
                 ylim=(-0.02, 1.02))
    axes[0].set_ylabel("pixel accuracy")
    axes[0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
