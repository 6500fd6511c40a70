"""Through how many training steps must a picture be trained, to last? (the ablation of section 4.2)

Runs demos/sixty_seven.py with T = 1, 8 and 32 inner steps, and draws how much of the picture stands
in the weights after 1 to 96 steps of plain training on fresh text, at three learning rates. The
generator steps and the texts in each are the same; rate, eps_root and sharpness of Phi are others
with T = 1 than with more (patterns.inner_optimizer says why).
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import json

import numpy as np

from demos import check, figures, options, sixty_seven

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
            _, _, rows = figures.read(folder)
            for m in check.MULTIPLES:
                curves.setdefault(T, {}).setdefault(m, []).append(
                    [row[f"pixel_accuracy_{m}x"] for row in rows])
    for m in check.MULTIPLES:
        for T, each in curves.items():
            last = [run[-1] for run in each[m]]
            print(f"learning rate x {m:3}   T = {T:2}   {np.mean(last):.3f} +- "
                  f"{figures.deviation(last):.3f}   after {len(rows)} steps, {len(last)} seed(s)")
    (out / "result.json").write_text(json.dumps({"demo": "inner_steps", "curves": curves}) + "\n")
    draw(out, out / "figure.png")
    print(f"files       {out}/")


def draw(folder, path):
    curves = figures.read(folder)[0]["curves"]
    seeds = len(next(iter(curves.values()))["1"])
    figure = figures.figure(3.4, "How much of the picture still stands after plain training")
    axes = figure.subplots(1, len(check.MULTIPLES), sharey=True)
    for axis, m in zip(axes, check.MULTIPLES):
        for T, each in curves.items():
            runs = np.array(each[str(m)])  # (seeds, steps)
            steps, mean, std = range(1, runs.shape[1] + 1), runs.mean(0), figures.deviation(runs)
            axis.plot(steps, mean, label=f"trained through T = {T}")
            axis.fill_between(steps, mean - std, np.minimum(mean + std, 1), alpha=0.2, lw=0)
        axis.set(title=f"learning rate x {m}", xlabel="step of plain AdamW")
    axes[0].set_ylabel("share of pixels right")
    bands = f"mean of {seeds} seeds; bands: ± standard deviation" if seeds > 1 else "one seed"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3,
                  title=bands)
    figure.savefig(path)


if __name__ == "__main__":
    main()
