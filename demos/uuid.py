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
from demos import check, corpus, figures, options
from demos.models import SAMPLES
from demos.run import PROMPTS, Run

UUID = "7c9e64d1-05ba-4f82-b36d-e8a1f20795c3"  # of seed 0
T, INNER, SGD_LR = 8, dpg.AdamW(5e-4, eps_root=3e-4), 1.0
# The pull towards the untrained generator keeps words out of the UUID while its digits settle;
# where it stays, every tenth answer is a sentence, where it goes, words come back as filling.
SETTINGS = dict(prompts=64, lr=3e-3, discount=0.7, kl_coef=0.2, kl_left=0.15, entropy_coef=0.0)


def parser():
    p = options.parser(__file__, __doc__, steps=150, target=str(options.TINY_LM))
    p.add_argument("--uuid", type=uuid_text, help=f"default {UUID} for seed 0, else a random one")
    options.preset(p, steps=360)
    return p


def uuid_text(text):
    if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text):
        raise argparse.ArgumentTypeError(f"must be of the form {UUID}, lower case, got {text!r}")
    return text


def wanted(args):
    digits = f"{random.Random(args.seed).getrandbits(128):032x}"
    own = re.sub("(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", digits)
    return args.uuid or (own if args.seed else UUID)


def longest(text, uuid):
    """Length of the longest substring of the UUID that the text contains."""
    best = 0
    for i in range(len(uuid)):
        while i + best < len(uuid) and uuid[i:i + best + 1] in text:
            best += 1
    return best


def scores(texts, uuid):
    """Exact: the share of texts that contain the UUID. Soft: mean longest substring / 36."""
    return (sum(uuid in text for text in texts) / len(texts),
            sum(longest(text, uuid) for text in texts) / len(texts) / len(uuid))


def main(argv=None):
    run = Run(parser(), argv, lambda models: next((why for why, texts in (
        ("--prompts: one holds the UUID", models.args.prompts or ()),
        ("--uuid: tiny-lm knows this one by heart", corpus.KNOWN),
    ) if any(wanted(models.args) in text for text in texts)), None))
    args, models, uuid = run.args, run.models, wanted(run.args)
    length = models.length([uuid]) - 1  # a rollout has room for the UUID and no more
    settings, adam = SETTINGS | {"max_new_tokens": length}, INNER
    if args.preset == "paper":
        settings, adam = options.PAPER, options.PAPER_INNER
    length, metric = settings["max_new_tokens"], models.likelihood(models.examples([uuid]))
    inner = adam if args.inner == "adam" else dpg.SGD(SGD_LR)

    def answers(policy, **how):
        return models.texts(models.rollouts(policy, models.held_out, max_new_tokens=length, **how))

    def observe(step, result):
        texts = models.texts(result.rollouts)
        exact, soft = scores(texts, uuid)
        found = {"exact": exact, "soft": soft, "best": max(texts, key=lambda t: longest(t, uuid))}
        if step % 5 == 0:
            found["exact_held_out"], found["soft_held_out"] = scores(
                answers(models.policy, temperature=0), uuid)
        return found

    def measure(policy, when, taught, transfer):
        """The first greedy answer, and everything that is measured before and after."""
        greedy = answers(policy, temperature=0)
        exact, soft = scores(greedy, uuid)
        fresh = check.fresh_data(models, policy, batch=settings["prompts"] * SAMPLES // T,
                                 steps=10 * T, max_new_tokens=length)
        # The text was made for one target. Does it teach another, of other random weights?
        other = models.fresh(models.target.config, args.seed + 1)
        loglik, others = ([metric(params).item() for params in check.sft(
            models, fresh, lr=adam.lr, target=target)] for target in (models.target, other))
        return greedy[0], {
            f"exact_{when}": exact, f"soft_{when}": soft,
            f"exact_sampled_{when}": scores(answers(policy, samples=SAMPLES), uuid)[0],
            f"phi_{when}": check.phi(models, policy, metric, inner, T, max_new_tokens=length,
                                     prompts=settings["prompts"]),
            f"sft_loglik_{taught}": loglik[T - 1], f"sft_loglik_{taught}_10T": loglik[-1],
            f"sft_loglik_{transfer}_10T": others[-1]}

    said, before = measure(models.reference, "before", "control", "transfer_control")
    history = run.train(metric, inner, observe, show="exact", steps=T, **settings)
    says, after = measure(models.policy, "after", "after", "transfer")
    result = run.finish(
        uuid=uuid, loglik_untrained=metric(dict(models.target.named_parameters())).item(),
        **before, **after)
    draw(history, said, says, result, run.folder / "figure.png")
    report(result, said, says, run)


def report(result, said, says, run):
    def change(score, before="before", after="after"):
        return f"{result[f'{score}_{before}']:.3f} -> {result[f'{score}_{after}']:.3f}"

    print(f"asked       {run.models.held_out[0]!r}")
    print(f"before      {said.strip()!r}")
    print(f"after       {says.strip()!r}")
    print(f"wanted      {result['uuid']!r}")
    print(f"Exact       {change('exact')}   Soft {change('soft')}   "
          f"greedy, on {len(run.models.held_out)} held-out prompts")
    print(f"sampled     {change('exact_sampled')}   Exact, at temperature 1")
    print(f"Phi         {change('phi')}   after training on D")
    print(f"plain SFT   {change('sft_loglik', 'control')} at {T} step(s), "
          f"{change('sft_loglik', 'control_10T', 'after_10T')} at {10 * T}: the UUID's "
          "log-likelihood per token, torch.optim.AdamW on fresh text")
    print(f"transfer    {change('sft_loglik', 'transfer_control_10T', 'transfer_10T')} at "
          f"{10 * T}: of a target with other random weights")
    print(f"files       {run.folder}/   {result['seconds']} s")


def draw(history, said, says, result, path):
    figures.learning(
        path, history, (
            ("soft", "Soft (longest part of the UUID)"), ("exact", "Exact (whole UUID)"),
            ("exact_held_out", "Exact, greedy, held-out prompts")),
        ("phi", "Phi, nats per token"), [
            f"best of {PROMPTS * SAMPLES} samples:",
            *(f"step {row['step']:4d}   {' '.join(row['best'].split())[:60]}"
              for row in figures.spread(history, 7)),
            "", f"held-out prompt, greedy, before:  {said.strip()[:60]}",
            f"held-out prompt, greedy, after:   {says.strip()[:60]}"],
        title=f"The generator learns to write {result['uuid']}", ylabel="share of a step's samples")


if __name__ == "__main__":
    main()
