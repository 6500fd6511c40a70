"""Can a real pretrained language model be led to write a code that nobody asked it for?

    python demos/smollm2.py                             # the model is fetched from its hub
    python demos/smollm2.py --generator FILE.gguf       # or read from a file (README)

As demos/uuid.py, but generator and target are SmolLM2-135M-Instruct, which is asked in its chat
format to rephrase sentences. Phi is the log-likelihood that the target gives to a code of six
characters after one training step on the answers. The reward never compares strings.

Only the last 10 of the 30 blocks are trained, in both (--layers): gradients end there, and what is
frozen is held once for generator, target and reference. --layers 30 trains them all.

The README has the results over seeds, with controls: a table that demos/tables.py makes.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import argparse
import random

import dpg
from demos import options, strings
from demos.run import Run

SETTINGS, INNER, SGD_LR = strings.SMOLLM2, strings.SMOLLM2_INNER, 0.1
LENGTH = 6  # characters of a code


def parser():
    p = options.parser(__file__, __doc__, steps=120, generator=options.SMOLLM2)
    p.add_argument("--code", type=code, help="what to write (default: drawn from --seed)")
    p.set_defaults(**options.PRESETS["smollm2"])
    return p


def code(text):
    if not text.isprintable() or not text.strip() == text != "":
        raise argparse.ArgumentTypeError(f"must be text without spaces around it, got {text!r}")
    return text


def drawn(seed, length=LENGTH):
    """A code of hexadecimal digits. No two letters are neighbours: the tokenizer would merge them,
    and places would no longer be tokens."""
    rng, text = random.Random(seed), ""
    while len(text) < length:
        text += rng.choice("0123456789" if text[-1:].isalpha() else "0123456789abcdef")
    return text


def main(argv=None):
    run = Run(parser(), argv, lambda models: "--prompts: one holds the code" if any(
        wanted(models.args) in text for text in models.args.prompts or ()) else None)
    strings.main(run, "code", wanted(run.args), 1,
                 INNER if run.args.inner == "adam" else dpg.SGD(SGD_LR), SETTINGS,
                 sft_lr=INNER.lr, show="best", every=15, samples=1)


def wanted(args):
    return args.code or drawn(args.seed)


if __name__ == "__main__":
    main()
