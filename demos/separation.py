"""Does tau see at which place of a UUID a digit stands?

    python demos/pretrain.py --known 0 --out runs/no-identifiers   # 3 min: knows none by heart
    python demos/separation.py demos/tiny-lm runs/no-identifiers fresh

Texts of which each digit is right with probability 1/2 are rewarded as in demos/uuid.py. Reported
is, over UUIDs and places, how much more a right digit earns than a wrong one, in standard
deviations of the advantage, and the same of the place that a tenth of all places is worse than.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import importlib
import random

import torch

import dpg
from demos import corpus, options
from demos.models import SAMPLES, Models

DIGITS = "0123456789abcdef"


def separations(models, uuid, rng):
    """Right minus wrong, for each place of this UUID that is a digit."""
    demo = importlib.import_module("demos.uuid")
    n = demo.SETTINGS["prompts"] * SAMPLES
    texts = ["".join(c if c == "-" or rng.random() < 0.5 else rng.choice(DIGITS) for c in uuid)
             for _ in range(n)]
    data = models.examples(texts)
    tau = dpg.metagradient(models.target, data, models.likelihood(models.examples([uuid])),
                           demo.INNER, steps=demo.T, per_token=True).tau[:, 1:]
    earned = dpg.advantages(tau, data.mask[:, 1:], group_size=n // demo.T, baseline="mean",
                            scale=True, discount=demo.SETTINGS["discount"])
    right = torch.tensor([[c == wanted for c, wanted in zip(text, uuid)] for text in texts])
    return [(earned[:, t][right[:, t]].mean() - earned[:, t][~right[:, t]].mean()).item()
            for t, c in enumerate(uuid) if c != "-"]


def main(argv=None):
    p = options.Parser(__file__, __doc__)
    p.add_argument("target", nargs="+", help='folders, or "fresh"')
    p.add_argument("--uuids", type=options.positive, default=20, help="how many (default 20)")
    p.add_argument("--seed", type=options.seed, default=100, help="of the first (default 100)")
    args = p.parse_args(argv)
    for target in args.target:
        given = options.parser(__file__, __doc__, steps=0, target=target).parse_args([])
        models, found = Models(given, torch.device("cpu"), p.error), []
        for seed in range(args.seed, args.seed + args.uuids):
            rng = random.Random(seed)
            found += separations(models, corpus.random_uuid(rng), rng)
        found = torch.tensor(found)
        print(f"{target:24} right - wrong {found.mean():.2f}, of the tenth place from below "
              f"{found.quantile(0.1):.2f}, n = {args.uuids} UUIDs")


if __name__ == "__main__":
    main()
