"""What the two pictures share: where one is drawn in the target, how it is trained and checked.

A picture of R x C pixels is drawn in the signs of change of a part of the target's LM head,

    P = lm_head.weight[rows, :C]        black where training on D made P larger, white elsewhere

Its columns are the first C hidden units; its rows belong to the R tokens that begin a word and that
the untrained generator writes most often, but for the first of them. (Sections 4.1 and 4.2; the
paper's patch is the first hidden units x the first tokens of the vocabulary: this is transposed.)
"""
import argparse
import collections
import sys

import matplotlib.image
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dpg
from demos import check, figures, options, records
from demos.run import Run

S = 20.0  # the paper's sharpness of the softplus
EPS_ROOT, SGD_LR = 1e-3, 20.0
# Through several inner steps: all of the target moves, by 0.04 at most, so Phi must be sharper.
S_SEVERAL, MOVED, EPS_ROOT_SEVERAL = 1000.0, 0.04, 2.5e-4
# The small generator is certain of its next word (0.9 nats): sampled at temperature 1, it rarely
# tries the tokens that would have earned something.
TEMPERATURE = 2.4
SETTINGS = dict(prompts=128, **options.WEIGHTS)
SHADES = {("#", True): (0.0, 0.0, 0.0), (".", True): (1.0, 1.0, 1.0),  # a pixel, is it right
          ("#", False): (0.76, 0.28, 0.05), (".", False): (1.0, 0.83, 0.66)}


def parse(text, name):
    """The rows of # and . in a text; `name` is the file's, for who is told what is wrong."""
    rows = [line.strip() for line in text.splitlines() if line.strip()]

    def refuse(why):
        raise argparse.ArgumentTypeError(f"{name} must be rows of # and . of one length: {why}")
    if not rows:
        refuse("it is empty")
    for i, row in enumerate(rows, 1):
        if strange := set(row) - set("#."):
            refuse(f"row {i} has {min(strange)!r}")
        if len(row) != len(rows[0]):
            refuse(f"row 1 has {len(rows[0])} pixels, row {i} has {len(row)}")
    return rows


def pixels(rows):
    """1 for #, -1 for ., (R, C)."""
    return torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in row] for row in rows])


def text(picture):
    """Its rows of # and ., which `pixels` reads."""
    return ["".join(".#"[pixel] for pixel in row) for row in (picture > 0).int().tolist()]


def parser(file, doc, *, steps):
    """The parser, and the group of its options that choose a picture: one of them at most."""
    p = options.weights_parser(file, doc, steps=steps, temperature=TEMPERATURE)
    choice = p.add_mutually_exclusive_group()
    choice.add_argument("--pattern", type=lambda path: parse(options.text_file(path), repr(path)),
                        metavar="FILE", help="draw this: rows of # (larger) and . (smaller)")
    return p, choice


def inner_optimizer(models):
    """Adam or SGD for the inner run.

    With one step, for which all but the head is frozen, the rate only scales the change; in Phi it
    sets how much more a wrong pixel counts than a right one, and 10 / S is enough. With T steps a
    text has T times the share in its minibatch's gradient, and eps_root must grow with its square.
    """
    T = models.args.inner_steps
    if models.args.inner == "sgd":
        return dpg.SGD(SGD_LR / T)
    if T == 1:
        return dpg.AdamW(10 / S, eps_root=EPS_ROOT)
    return dpg.AdamW(MOVED / T, eps_root=EPS_ROOT_SEVERAL * T**2)


class Canvas:
    """A pattern, and its place in the target's head."""

    def __init__(self, models, rows):
        self.pattern = pixels(rows).to(models.device)
        self.head, self.rows = models.head(), word_tokens(models, len(rows))
        self.sharpness = S if models.args.inner_steps == 1 else S_SEVERAL
        self.before = models.target.get_parameter(self.head).detach().clone()[self.rows]

    def change(self, params):
        return (params[self.head][self.rows] - self.before)[:, :self.pattern.shape[1]]

    def metric(self, params):
        """Phi = -mean softplus(-S * Y * (P_after - P_before))"""
        return -F.softplus(-self.sharpness * self.pattern * self.change(params)).mean()

    def decode(self, params):
        return torch.where(self.change(params) > 0, 1.0, -1.0)

    def accuracy(self, decoded):
        return (decoded == self.pattern).float().mean().item()


def word_tokens(models, n):
    """Ids of the n tokens that begin a word and that the untrained generator writes most often, but
    for the first of them ("the"): what is drawn in its row is the first to wash out again."""
    rollouts = models.rollouts(models.reference, models.held_out, samples=8,
                               max_new_tokens=SETTINGS["max_new_tokens"])
    count = collections.Counter(rollouts.tokens[rollouts.mask.bool()].tolist())
    words = words_of(models.tokenizer)
    return sorted(sorted(words, key=lambda token: (-count[token], token))[1:n + 1])


def words_of(tokenizer):
    """Ids of the ordinary tokens that begin a word: a space, then letters."""
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))  # a space is " ", "Ġ" or "▁"
    return [i for i, piece in enumerate(pieces) if i not in special and piece[:1] in " Ġ▁"
            and tokenizer.decode([i]).strip().isalpha()]


def too_large(models, pattern):
    """Why the pattern does not fit the target's head, or None."""
    if not models.same_tokens:
        return "a picture's rows are tokens: --target must have the tokenizer of --generator"
    rows, columns = len(pattern), len(pattern[0])
    words = len(words_of(models.tokenizer)) - 1
    width = models.target.get_output_embeddings().weight.shape[1]
    if rows > words or columns > width:
        return (f"the pattern is {rows} x {columns}; there is room for {max(words, 0)} rows, the "
                f"words of the tokenizer, and {width} columns, the hidden units")


def main(parser, argv, default, *, more=lambda args, picture: {}):
    """Train a generator to draw --pattern or else `default(args)`; `more` adds to the result."""
    def choose(args):
        return default(args) if args.pattern is None else args.pattern

    run = Run(parser, argv, lambda models: too_large(models, choose(models.args)))
    args, models, length = run.args, run.models, SETTINGS["max_new_tokens"]
    canvas, screen, T = Canvas(models, choose(args)), Screen(), args.inner_steps
    inner = inner_optimizer(models)
    moments = {0, args.steps // 20, args.steps // 6, args.steps - 1}  # half is right soon

    def observe(step, result):
        params = result.attribution.params
        if not params:  # the naive reward trains four copies, and keeps none
            params = models.trained(models.encode(result.rollouts), inner, T)
        decoded = canvas.decode(params)
        screen.draw(decoded)
        shown = {"picture": text(decoded)} if step in moments else {}
        return {"pixel_accuracy": round(canvas.accuracy(decoded), 4)} | shown

    def drawn(policy):
        """The picture after 96 steps, and the pixel accuracy after each of them."""
        decoded = check.curves(models, policy, canvas.decode, max_new_tokens=length)
        return decoded[1][-1], {multiple: [round(canvas.accuracy(d), 4) for d in each]
                                for multiple, each in decoded.items()}

    run.train(canvas.metric, inner, observe, show="pixel_accuracy", steps=T, reads=canvas.head,
              temperature=args.temperature, **SETTINGS)
    (_, before), (picture, after) = drawn(models.reference), drawn(models.policy)
    extra = more(args, picture)
    matplotlib.image.imsave(run.folder / "pattern.png", enlarge(picture), cmap="gray", vmin=0,
                            vmax=255)
    validation = check.rows(pixel_accuracy_control=before, pixel_accuracy=after)
    validation[-1]["picture"] = text(picture)
    run.save("validation.jsonl", records.text(validation))
    result = run.finish(
        temperature=args.temperature, inner_steps=T, pattern=text(canvas.pattern),
        rows=[models.tokenizer.decode([row]) for row in canvas.rows],
        **check.ends("pixel_accuracy_before", before),
        **check.ends("pixel_accuracy_after", after), **extra)
    draw(run.folder, run.folder / "figure.png")
    example = models.texts(models.rollouts(models.policy, models.held_out[:1],
                                           temperature=args.temperature, max_new_tokens=length))[0]
    print(blocks(picture, colour=sys.stdout.isatty()))
    print(f"asked       {models.held_out[0]!r}")
    print(f"writes      {example.strip()!r}")
    print(f"accuracy    {before[1][-1]:.3f} -> {after[1][-1]:.3f}   share of the pixels, after "
          f"{check.CHECK_STEPS} steps of torch.optim.AdamW on fresh text")
    for m in check.MULTIPLES[1:]:
        print(f"            {before[m][-1]:.3f} -> {after[m][-1]:.3f}   the same, learning rate "
              f"x {m}")
    for name, value in extra.items():
        print(f"{name:12}{value!r}")
    print(f"files       {run.folder}/   {result['seconds']} s")


# ------------------------------------------------------------------------------- what one sees

def enlarge(picture, pixel=10, margin=4):
    """The picture as grey values, black for 1, with the white margin that QR readers want."""
    grey = np.pad(np.where(picture.cpu().numpy() > 0, 0, 255), margin, constant_values=255)
    return np.kron(grey, np.ones((pixel, pixel))).astype(np.uint8)


def blocks(picture, colour, margin=2):
    """The picture in block characters of two pixels; with `colour`, black on white."""
    try:
        "▀▄█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:  # a console that does not know them
        return "\n".join(text(picture))
    rows = np.pad(picture.cpu().numpy() > 0, margin)
    rows = np.pad(rows, ((0, len(rows) % 2), (0, 0)))
    lines = ("".join(" ▀▄█"[top + 2 * bottom] for top, bottom in zip(*pair, strict=True))
             for pair in zip(rows[::2], rows[1::2]))
    return "\n".join(f"\x1b[30;107m{line}\x1b[0m" if colour else line for line in lines)


class Screen:
    """Redraws a picture in place above the progress bar, where there is a terminal."""

    def __init__(self):
        self.height = 0

    def draw(self, picture):
        if sys.stderr.isatty():
            text = blocks(picture, colour=True)
            up = f"\x1b[{self.height}A\r" if self.height else ""
            tqdm.write(up + text, file=sys.stderr)
            self.height = text.count("\n") + 1


def draw(folder, path):
    result, history, validation = figures.read(folder)
    wanted, shown = result["pattern"], [row for row in history if "picture" in row]
    figure = figures.figure(5.2, f"A picture emerges in {len(wanted) * len(wanted[0])} weights: "
                            "black where training raised one, white elsewhere")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 5))
    shown.append({"pixel_accuracy": result["pixel_accuracy_after"]} | validation[-1])
    for axis, row in zip(top.subplots(1, len(shown), squeeze=False)[0], shown):
        name = "read after training" if row is shown[-1] else f"step {row['step']}"
        axis.imshow([[SHADES[pixel, pixel == true] for pixel, true in zip(*pair)]
                     for pair in zip(row["picture"], wanted)])
        axis.set(title=f"{name}\n{row['pixel_accuracy']:.1%} right", xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
    top.supxlabel("orange: wrong pixels (the darker ones should be white, the paler ones black)",
                  color=figures.ORANGE, fontsize=9)
    training, after = bottom.subplots(1, 2, sharey=True)
    training.plot([row["step"] for row in history], [row["pixel_accuracy"] for row in history])
    training.set(title="training batches", xlabel="generator step", ylabel="share of pixels right")
    for key, label, how in (("1x", "learning rate x 1", {}), ("10x", "x 10", {}), (
            "100x", "x 100", {}), ("control_1x", "control: untrained generator, x 1",
                                   {"color": figures.GREY})):
        after.plot([row["step"] for row in validation],
                   [row[f"pixel_accuracy_{key}"] for row in validation], label=label, **how)
    after.set(title="read after training: fresh text, plain AdamW", xlabel="step of plain AdamW")
    for axis in (training, after):
        figures.level(axis, 0.5, "chance: 0.5")
    bottom.legend(*after.get_legend_handles_labels(), loc="outside lower center", ncol=5)
    figure.savefig(path)
