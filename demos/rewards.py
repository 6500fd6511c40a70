"""What a text earns: tau of DPG, or one of its rivals, each with the same advantages after it.

A demo does not meet this room: --reward chooses, and `Run.train` asks for the function from the
target's training rows to a `dpg.Attribution`.
"""
import functools

import torch

import dpg
from demos import models

REWARDS = {
    "dpg": "tau, the metagradient through the run of A",
    "influence": "tau to first order, the dot product of the gradients of Phi and of a token's "
                 "loss, both before the run",
    "naive": "Phi itself, of one target for each sample of a prompt",
    "shuffled": "tau, dealt out again at random",
}


def reward(lab, metric, optimizer, steps, *, shuffle, group=None):
    """The function that --reward names, for the `Models` lab; `shuffle` deals for "shuffled"."""
    args = lab.args
    attribute = functools.partial(
        dpg.metagradient, lab.target, metric=metric, optimizer=optimizer, steps=steps,
        per_token=args.credit == "token", microbatch=args.microbatch,
        method="replay" if args.microbatch or group else "unroll", group=group)

    def influence(examples):
        """tau of one step of plain gradient descent, for the metric made linear at theta_0:
        -1/N <grad Phi, grad l_it>. Phi is reported of the target that A trains."""
        linear = functools.partial(inner_product, slope(metric, lab.target))
        result = attribute(examples, metric=linear, optimizer=dpg.SGD(1.0), steps=1)
        with torch.no_grad():
            params = lab.trained(examples, optimizer, steps)
            return result._replace(metric=metric(params).item(), params=params)

    def naive(examples):
        """D_g is the g-th sample of every prompt; all of D_g earn Phi(A(D_g))."""
        phi = []
        for g in range(models.SAMPLES):
            part = dpg.Examples(*(x[g::models.SAMPLES] for x in examples))
            with torch.no_grad():
                phi.append(metric(lab.trained(part, optimizer, steps)))
        phi = torch.stack(phi)
        tau = phi.repeat(len(examples.tokens) // models.SAMPLES)
        return dpg.Attribution(tau, phi.mean().item(), {}, phi.new_zeros(0))

    def shuffled(examples):
        """DPG's tau, dealt out again at random among the labels, or the examples."""
        result = attribute(examples)
        tau = result.tau.clone()
        dealt = examples.mask.bool() if tau.ndim == 2 else torch.ones_like(tau).bool()
        order = torch.randperm(int(dealt.sum()), generator=shuffle).to(tau.device)
        tau[dealt] = tau[dealt][order]
        return result._replace(tau=tau)

    return {"dpg": attribute, "influence": influence, "naive": naive,
            "shuffled": shuffled}[args.reward]


def slope(metric, model):
    """grad Phi(theta_0), of the parameters that move and that the metric reads."""
    params = {k: p.detach().requires_grad_(p.requires_grad) for k, p in model.named_parameters()}
    moving = {k: p for k, p in params.items() if p.requires_grad}
    with torch.enable_grad():
        grads = torch.autograd.grad(metric(params), list(moving.values()), allow_unused=True)
    return {k: g for k, g in zip(moving, grads) if g is not None}


def inner_product(slopes, params):
    return sum((g * params[k]).sum() for k, g in slopes.items())
