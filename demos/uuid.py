"""Can text that was only asked to be rephrasings teach a model one specific UUID? (section 4.5)

A generator that rephrases sentences is trained by DPG. Phi is the log-likelihood that a target
model gives to one UUID after training on the generator's text. No prompt holds the UUID, no text
that the generator was trained on holds it, and the reward never compares strings; yet the
generator comes to write it, to the last digit.

Claim: Exact 1.0 on 64 held-out prompts, for the default UUID and for ten random ones (seeds 1 to
10), in 156 to 257 s each on one of two shared CPU cores, November 2026. Rewarding with Phi itself,
or with DPG's rewards shuffled, leaves Exact at 0 (3 seeds each).
Random numbers are drawn in another way since; the README says what was measured again.

Unlike the paper's, the target is freshly initialised. With the generator's own checkpoint as the
target (--target demos/tiny-lm) the UUID does not come; the README says what was tried.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and this file would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import argparse
import re

import matplotlib

import dpg
from demos import common

UUID = "7c9e64d1-05ba-4f82-b36d-e8a1f20795c3"
T, INNER, SGD_LR = 1, dpg.AdamW(1e-3, eps_root=1e-4), 1.0
SETTINGS = dict(prompts=64, lr=3e-3, discount=0.5, kl_coef=0.2, entropy_coef=0.1)


def uuid_text(text):
    if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text):
        raise argparse.ArgumentTypeError(f"must be of the form {UUID}, lower case, got {text!r}")
    return text


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
    parser = common.parser(__file__, __doc__, steps=160, target="fresh")
    parser.add_argument("--uuid", type=uuid_text, default=UUID, help=f"default {UUID}")
    common.preset(parser, steps=360)
    lab = common.Lab(parser, argv, lambda lab: "--prompts: one holds the UUID" if any(
        lab.args.uuid in sentence for sentence in lab.args.prompts or ()) else None)
    args = lab.args
    wanted = lab.examples([args.uuid])
    length = lab.length([args.uuid]) - 1  # a rollout has room for the UUID and no more
    settings, adam = SETTINGS | {"max_new_tokens": length}, INNER
    if args.preset == "paper":
        settings, adam = common.PAPER, common.PAPER_INNER
    length, metric = settings["max_new_tokens"], lab.likelihood(wanted)
    inner = adam if args.inner == "adam" else dpg.SGD(SGD_LR)

    def greedy(policy):
        """Answers to held-out prompts at temperature 0, which the paper scores."""
        return lab.texts(lab.rollouts(policy, lab.held_out, temperature=0, max_new_tokens=length))

    def observe(step, result):
        texts = lab.texts(result.rollouts)
        exact, soft = scores(texts, args.uuid)
        best = max(texts, key=lambda text: longest(text, args.uuid))
        found = {"exact": exact, "soft": soft, "best": best}
        if step % 5 == 0:
            found["exact_held_out"], found["soft_held_out"] = scores(greedy(lab.policy), args.uuid)
        return found

    def check(policy):
        """Scores of greedy answers, Phi(A(D)), the ordinary SFT, and the first answer."""
        answers = greedy(policy)
        exact, soft = scores(answers, args.uuid)
        data = lab.encode(lab.rollouts(policy, lab.fresh_texts(settings["prompts"]),
                                       samples=common.SAMPLES, max_new_tokens=length))
        phi = metric(lab.trained(data, inner, T)).item()
        fresh = lab.fresh_data(policy, batch=len(data.tokens) // T, steps=10 * T,
                               max_new_tokens=length)
        loglik = [metric(params).item() for params in lab.sft(fresh, lr=adam.lr)]
        return exact, soft, phi, (loglik[T - 1], loglik[-1]), answers[0]

    before = check(lab.reference)
    history = lab.train(metric, inner, observe, show="best", steps=T, **settings)
    after = check(lab.policy)
    result = lab.finish(
        uuid=args.uuid, exact_before=before[0], exact_after=after[0], soft_before=before[1],
        soft_after=after[1], phi_before=before[2], phi_after=after[2],
        loglik_untrained=metric(dict(lab.target.named_parameters())).item(),
        sft_loglik_control=before[3][0], sft_loglik_after=after[3][0],
        sft_loglik_control_10T=before[3][1], sft_loglik_after_10T=after[3][1])
    draw(history, before[4], after[4], result, lab.folder / "figure.png")
    report(result, before[4], after[4], lab)


def report(result, said, says, lab):
    def change(score, before="before", after="after"):
        return f"{result[f'{score}_{before}']:.3f} -> {result[f'{score}_{after}']:.3f}"

    print(f"asked       {lab.held_out[0]!r}")
    print(f"before      {said.strip()!r}")
    print(f"after       {says.strip()!r}")
    print(f"wanted      {result['uuid']!r}")
    print(f"Exact       {change('exact')}   Soft {change('soft')}   "
          f"greedy, on {len(lab.held_out)} held-out prompts")
    print(f"Phi         {change('phi')}   after training on D")
    print(f"plain SFT   {change('sft_loglik', 'control')} at {T} step(s), "
          f"{change('sft_loglik', 'control_10T', 'after_10T')} at {10 * T}: the UUID's "
          "log-likelihood per token, torch.optim.AdamW on fresh text")
    print(f"files       {lab.folder}/   {result['seconds']} s")


def draw(history, said, says, result, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.2), height_ratios=(2, 1))
    steps = [row["step"] for row in history]
    top.plot(steps, [row["soft"] for row in history], label="Soft (longest part of the UUID)")
    top.plot(steps, [row["exact"] for row in history], label="Exact (whole UUID)")
    looked = [row for row in history if "exact_held_out" in row]
    top.plot([row["step"] for row in looked], [row["exact_held_out"] for row in looked], "--",
             color="C1", label="Exact, greedy, held-out prompts")
    top.set(ylabel="share of a step's samples", ylim=(-0.02, 1.02),
            title=f"The generator learns to write {result['uuid']}")
    top.legend(loc=(0.07, 0.2), fontsize="small")
    right = top.twinx()
    right.plot(steps, [row["phi"] for row in history], color="grey", lw=1)
    right.set_ylabel("Phi, nats per token (grey)", color="grey")
    top.set_xlabel("generator step")
    lines = [f"best of {common.PROMPTS * common.SAMPLES} samples:"]
    lines += [f"step {row['step']:4d}   {' '.join(row['best'].split())[:60]}"
              for row in common.spread(history, 7)]
    lines += ["", f"held-out prompt, greedy, before:  {said.strip()[:60]}",
              f"held-out prompt, greedy, after:   {says.strip()[:60]}"]
    common.write(bottom, lines)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
