"""Draws the two loops of the method, the figure of the README.

    python demos/loops.py            # writes demos/loops.png, in a second
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import matplotlib

from demos import options

INK, PAPER, FORWARD, BACK = "#24292f", "#f6f8fa", "#1f5fbf", "#c2410c"
BOXES = {  # the left edge, the width, the name, what it is
    "policy": (0.3, 2.2, r"generator $\pi_\theta$", "a language model"),
    "data": (3.9, 2.4, r"dataset $D$", r"texts $x_i$ with weights $w_i = 1$"),
    "inner": (7.6, 2.6, r"training $A(w, D)$", "of a copy of the target model"),
    "metric": (11.5, 2.2, r"metric $\Phi$", "one number, to be raised"),
}
TOP, BOTTOM = 2.75, 1.75  # of the boxes


def draw(path):
    matplotlib.use("Agg")
    from matplotlib import patches, pyplot as plt
    figure, axis = plt.subplots(figsize=(11, 3))
    axis.set(xlim=(0, 14), ylim=(0.2, 4.1))
    axis.axis("off")
    axis.add_patch(patches.FancyBboxPatch(
        (0.1, 0.27), 13.8, 3.76, boxstyle="round,pad=0,rounding_size=0.25", fc=PAPER, ec="none"))

    def arrow(start, end, colour, bend=0.0, line="-"):
        axis.add_patch(patches.FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=16,
            lw=1.8, ls=line, color=colour, shrinkA=0, shrinkB=0))

    def say(x, y, text, colour=INK, size=10, **how):
        axis.text(x, y, text, color=colour, fontsize=size, ha="center", va="center", **how)

    for left, width, name, what in BOXES.values():
        axis.add_patch(patches.FancyBboxPatch(
            (left, BOTTOM), width, TOP - BOTTOM, boxstyle="round,pad=0,rounding_size=0.12",
            fc="white", ec=INK, lw=1.2))
        say(left + width / 2, TOP - 0.33, name, size=13)
        say(left + width / 2, BOTTOM + 0.27, what, size=8.5)

    names, level = list(BOXES), (TOP + BOTTOM) / 2
    back = (r"reward $\tau_i$", r"$\tau_i = d\Phi \, / \, dw_i$", r"$d\Phi$")
    for (a, b), verb, slope in zip(zip(names, names[1:]), ("writes", "", ""), back):
        start, end = sum(BOXES[a][:2]) + 0.06, BOXES[b][0] - 0.06
        arrow((start, level + 0.16), (end, level + 0.16), FORWARD)
        arrow((end, level - 0.16), (start, level - 0.16), BACK, line="-" if a != "policy" else "--")
        say((start + end) / 2, level + 0.36, verb, FORWARD)
        say((start + end) / 2, BOTTOM - 0.25, slope, BACK)
    x = BOXES["inner"][0] + BOXES["inner"][1] / 2  # the inner loop
    arrow((x + 0.75, TOP + 0.05), (x - 0.75, TOP + 0.05), FORWARD, bend=1.0)
    say(x, TOP + 0.98, "inner loop: $T$ training steps", FORWARD)
    say(7, 0.95, "back: a derivative, through all of the training, to the weight of each text; "
        "dashed: only as a reward", BACK)
    say(7, 0.55, "outer loop: the generator is updated by the policy gradient, and writes anew")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def main(argv=None):
    parser = options.Parser(__file__, __doc__)
    parser.add_argument("--out", default=str(pathlib.Path(__file__).resolve().parent / "loops.png"),
                        help="the file (default demos/loops.png)")
    draw(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
