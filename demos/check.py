"""The checks: plain SFT of the target on fresh text, and tau held against the truth.

A demo writes `fresh_data` with the untrained generator and with the trained one, and measures the
target after each step of `sft` on it; or it asks for the `curves` of both.
"""
import copy
import sys

import torch
from tqdm import tqdm

import dpg
from demos import models

# For metrics of the target's weights: 96 steps on fresh text, at the rate that moves the head by as
# much of its scale as the paper's steps do, and at 10 and 100 times this rate.
CHECK_STEPS, CHECK_BATCH, MULTIPLES = 96, 64, (1, 10, 100)


def fresh_data(lab, policy, *, batch, steps, max_new_tokens, temperature=1.0):
    """`steps` batches of what the policy writes for held-out prompts."""
    who = "untrained" if policy is lab.reference else "trained"
    print(f"check: the {who} generator writes {steps * batch} texts for held-out prompts, and the "
          "target is trained on them", file=sys.stderr)
    written = lab.encode(lab.rollouts(
        policy, lab.fresh_texts(steps * batch // models.SAMPLES), samples=models.SAMPLES, step=-2,
        max_new_tokens=max_new_tokens, temperature=temperature))
    return [dpg.Examples(*part) for part in zip(*(x.chunk(steps) for x in written))]


def sft(lab, batches, *, lr, target=None):
    """Ordinary SFT of a copy of the target: torch.optim.AdamW and the model's own loss.

    Yields the parameters after each batch, for a metric."""
    model = models.twin(lab.target if target is None else target)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    for batch in tqdm(batches, "check: steps of SFT", file=sys.stderr, leave=False):
        optimizer.zero_grad()
        for tokens, mask in zip(*(x.split(lab.args.microbatch or len(x)) for x in batch)):
            labels = tokens.masked_fill(mask == 0, -100)
            share = mask.sum() / batch.mask.sum()  # the model's loss is a mean over labels
            (share * model(tokens, labels=labels, use_cache=False).loss).backward()
        optimizer.step()
        yield dict(model.named_parameters())


def curves(lab, policy, measure, *, max_new_tokens):
    """measure(params) after each step of ordinary SFT on fresh text, for each multiple of the
    paper's movement."""
    data = fresh_data(lab, policy, batch=CHECK_BATCH, steps=CHECK_STEPS,
                      max_new_tokens=max_new_tokens, temperature=lab.args.temperature)
    return {multiple: [measure(params) for params in
                       sft(lab, data, lr=multiple * lab.paper_lr(CHECK_STEPS))]
            for multiple in MULTIPLES}


def phi(lab, policy, metric, inner, steps, *, prompts, max_new_tokens):
    """Phi after A on what the policy writes for so many held-out prompts."""
    data = lab.encode(lab.rollouts(policy, lab.fresh_texts(prompts), samples=models.SAMPLES,
                                   max_new_tokens=max_new_tokens))
    return metric(lab.trained(data, inner, steps)).item()


def ends(name, curves):
    """The last value of each of the curves, named for result.json."""
    return {name + (f"_{m}x" if m > 1 else ""): curve[-1] for m, curve in curves.items()}


def rows(**curves):
    """For validation.jsonl: of each step of SFT a row, with all that was measured after it."""
    named = {f"{name}_{m}x": curve for name, each in curves.items() for m, curve in each.items()}
    return [{"step": step} | dict(zip(named, values))
            for step, values in enumerate(zip(*named.values()), 1)]


# ------------------------------------------------------------------------ tau against the truth

def self_check(lab, metric, inner, steps, how, prompts, error):
    """Holds tau and log pi of the models of this run against the truth, and says so in a line.

    In float64: in float32 a small learning rate leaves nothing to see."""
    target = copy.deepcopy(lab.target).double()
    texts = lab.fresh_texts(max(prompts, steps))
    written = lab.encode(lab.rollouts(lab.policy, texts, samples=models.SAMPLES, step=-3, **how))
    few = dpg.Examples(*(x[:2 * steps] for x in written))
    try:
        off = dpg.check_target(target, few, metric, inner, steps=steps,
                               per_token=lab.args.credit == "token")
        drawn = dpg.check_policy(lab.policy, lab.prompts(texts[:4]), **how)
    except ValueError as problem:
        error(f"self-check: {problem}")
    left = left_out(lab, target, written, metric, inner, steps)
    print(f"self-check  tau against differences {off:.0e}, log pi against the draw "
          f"{drawn:.0e}, tau against leaving an example out {left:.0%}")


def left_out(lab, target, examples, metric, inner, steps, n=4):
    """How far tau_i is from Phi(w = 1) - Phi(w_i = 0), which it stands in for: of n examples
    evenly spread over the run, relative to the norm of the differences."""
    how = dict(steps=steps, microbatch=lab.args.microbatch)
    result = dpg.metagradient(target, examples, metric, inner, method="replay", **how)
    where, phi = range(0, len(result.tau) // n * n, len(result.tau) // n), []
    for i in where:
        weights = torch.ones_like(result.tau)
        weights[i] = 0
        with torch.no_grad():
            phi.append(metric(dpg.sft(target, examples, inner, weights=weights, **how)))
    difference = result.metric - torch.stack(phi)
    return ((result.tau[list(where)] - difference).norm() / difference.norm()).item()
