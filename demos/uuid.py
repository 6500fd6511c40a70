"""Can text that was only asked to be rephrasings teach a model one specific UUID? (section 4.5)

A generator that rephrases sentences is trained by DPG. Phi is the log-likelihood that a target
model gives to one UUID after training on the generator's text. No prompt holds the UUID, no text
that the generator was trained on holds it, and the reward never compares strings; yet the
generator comes to write it, to the last digit.

As in the paper, generator and target start from one pretrained model. It knows 64 other identifiers
by heart, as real models know strings (KNOWN in demos/corpus.py): a target that knows none sees
which digits the UUID has, but hardly where they stand.

The README has the results over seeds, with controls: a table that demos/tables.py makes.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and this file would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import argparse
import random
import re

import dpg
from demos import corpus, options, strings
from demos.run import Run

UUID = "7c9e64d1-05ba-4f82-b36d-e8a1f20795c3"  # of seed 0
T, INNER, SGD_LR = 8, dpg.AdamW(5e-4, eps_root=3e-4), 0.03  # about lr / sqrt(eps_root)
# The pull towards the untrained generator keeps words out of the UUID while its digits settle;
# where it stays, every tenth answer is a sentence, where it goes, words come back as filling.
# At a temperature above 1 a digit is still tried anew when its neighbours have settled; the scores
# are taken at 1, where the generator is surer. The inner rate ends at four times its own: a target
# that learns more of the text tells the last digits' places better, but at first learns noise.
SETTINGS = dict(prompts=64, lr=3e-3, discount=0.7, kl_coef=0.2, kl_left=0.15, entropy_coef=0.0,
                temperature=1.25, rise=4.0)


def parser():
    p = options.parser(__file__, __doc__, steps=160)
    p.add_argument("--uuid", type=uuid_text, help=f"default {UUID} for seed 0, else a random one")
    options.presets(p, paper=360, smollm2=300)
    return p


def uuid_text(text):
    if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text):
        raise argparse.ArgumentTypeError(f"must be of the form {UUID}, lower case, got {text!r}")
    return text


def wanted(args):
    digits = f"{random.Random(args.seed).getrandbits(128):032x}"
    own = re.sub("(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", digits)
    return args.uuid or (own if args.seed else UUID)


def main(argv=None):
    run = Run(parser(), argv, lambda models: next((why for why, texts in (
        ("--prompts: one holds the UUID", models.args.prompts or ()),
        ("--uuid: tiny-lm knows this one by heart", corpus.KNOWN),
    ) if any(wanted(models.args) in text for text in texts)), None))
    args, uuid = run.args, wanted(run.args)
    steps, adam, settings = {
        "laptop": (T, INNER, SETTINGS), "paper": (1, options.PAPER_INNER, options.PAPER),
        "smollm2": (1, strings.SMOLLM2_INNER, strings.SMOLLM2)}[args.preset]
    small = args.preset == "laptop"
    strings.main(run, "uuid", uuid, steps, adam if args.inner == "adam" else dpg.SGD(SGD_LR),
                 settings, sft_lr=adam.lr, every=5 if small else 15, transfer=small)


if __name__ == "__main__":
    main()
