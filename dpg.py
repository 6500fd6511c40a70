"""Dataset Policy Gradient (DPG): train a generator so that a model trained on its text scores well.

A generator pi_theta writes a dataset D = {x_1..x_N}. A target model is trained on D by supervised
fine-tuning (SFT), A(w, D), where example i has loss weight w_i. A differentiable metric Phi (higher
is better) scores the trained target; Phi(w) is short for Phi(A(w, D)). DPG rewards each example
with its metagradient,

    tau_i = d Phi(A(w, D)) / d w_i   at w = 1         (positive: more weight on x_i raises Phi)

and improves the generator along sum_i tau_i grad_theta log pi_theta(x_i), an estimate of the
policy gradient, grad_theta E Phi.

The method is from "Synthetic Data for any Differentiable Target" (Thrush et al., 2026),
https://arxiv.org/abs/2604.08423v1, whose sections are cited below. The code is written from that
text; test_dpg.py holds it against finite differences and exact enumeration.

    symbol      name here               is                                          shape
    D           examples                token rows, and which tokens are labels     (N, L), (N, L)
    w           weights                 loss weights, per example or per token      (N,) or (N, L)
    l_i         -                       (1/L) sum_t mask_it * nll_it                scalar
    A           sft, with an optimizer  one pass of T steps over N = T*B examples   -> parameters
    T, B        steps, N // steps       inner steps, examples per minibatch         int
    Phi         metric                  callable(parameters) -> scalar, to maximise
    tau         Attribution.tau         the metagradient, the reward                (N,) or (N, L)
    pi_theta    policy                  the generator, a causal transformers model
    x_i         Rollouts.tokens         what the policy wrote, made into row i of D (N, L_new)
    G           samples                 rollouts of each of P_n prompts, N = P_n*G  int
    A_it        advantages              rewards to go, centred, scaled       (N,) or (N, L_new)

Departures from the paper; what is known of their cost is said where the code is:
 1. One policy update on all rollouts of a step: no importance ratio to clip (`dpg_step`).
 2. Losses are divided by the constants B and L: w_i = 0 leaves no trace of x_i (`_loss`).
 3. Rewards are centred in any groups, not only per prompt, or not at all (`advantages`).
 4. Scaled, they are divided by their standard deviation with no constant added (`advantages`).
 5. On request, a reward for each token (`advantages`).
 6. On request, an entropy bonus and a KL term, as exact sums (`policy_gradient_loss`).
 7. All rollouts train one target, the paper's cross-group batching; its ablation, G targets, one
    for each g, is left out. A has one pass, a constant rate, no clipping, no bfloat16.

Room 1 is the method, up to `dpg_step`, which is Algorithm 1. Room 2: the same in less memory and on
several processes. Room 3: checks; of your models (`check_target`, `check_policy`), of arguments.

Usage (a test runs this):

    >>> import torch, dpg
    >>> _ = torch.manual_seed(0)
    >>> target = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5)).double()
    >>> D = dpg.Examples(torch.tensor([[0, 1, 2], [0, 3, 4]]), torch.tensor([[0, 1, 1], [0, 1, 1]]))
    >>> phi = dpg.lm_metric(target, dpg.Examples(D.tokens[:1], D.mask[:1]))  # know the first row
    >>> dpg.check_target(target, D, phi, dpg.SGD(lr=0.1)) < 1e-6
    True
    >>> (dpg.metagradient(target, D, phi, dpg.SGD(lr=0.1)).tau > 0).tolist()
    [True, False]
"""

import contextlib
import functools
import inspect
import math
import numbers
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

Params = dict[str, Tensor]  # keyed as model.named_parameters(): tied weights once
Metric = Callable[[Params], Tensor]  # runs a model by torch.func.functional_call(model, params, x)
Optimizer = object  # SGD, AdamW, or one of your own whose `init` and `update` are pure functions


# ============================================================================= room 1: the method

class Examples(NamedTuple):
    """A dataset D (section 3.1): rows of token ids, padded on the right, and which are labels."""

    tokens: Tensor  # (N, L) int64
    mask: Tensor  # (N, L) bool, int or 0/1 float; column 0 has nothing to predict it from, so 0


@dataclass(frozen=True)
class SGD:
    """Plain gradient descent, p <- p - lr * g, as a pure function; differentiable."""

    lr: float

    def __post_init__(self):
        _check(vars(self))

    def init(self, params: Params) -> dict:
        return {}

    def update(self, params: Params, grads: Params, state: dict) -> tuple[Params, dict]:
        return {k: p - self.lr * grads[k] for k, p in params.items()}, state


@dataclass(frozen=True)
class AdamW:
    """AdamW as a pure function; differentiable (appendix E for the default betas).

    p <- p - lr * (m_hat / (sqrt(v_hat + eps_root) + eps) + weight_decay * p)

    With eps_root = 0 this is torch.optim.AdamW. Above 0 it keeps the derivative finite where
    v_hat is 0, and decides what tau can see: at T = 1 a step is about lr g / sqrt(g^2 +
    eps_root), so a coordinate with g^2 far above eps_root moves by about lr at any w near 1, and
    adds almost nothing to tau. With eps_root = 10 s^2, s the largest |entry| of any grad l_i / B,
    tau's bias (`_loss`) was 5 % at T = 1 (demos/estimators.py); with the default, the
    paper's number (there for a sum of micro-batches' means), it may be far larger."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_root: float = 1e-9
    weight_decay: float = 0.0

    def __post_init__(self):
        _check(vars(self))

    def init(self, params: Params) -> dict:
        return {"step": 0} | {s: {k: _nothing(p) for k, p in params.items()} for s in "mv"}

    def update(self, params: Params, grads: Params, state: dict) -> tuple[Params, dict]:
        (b1, b2), t = self.betas, state["step"] + 1
        c1, c2 = 1 - b1**t, 1 - b2**t  # m_hat = m / c1, v_hat = v / c2
        new, m, v = {}, {}, {}
        for k, p in params.items():
            m[k] = state["m"][k].lerp(grads[k], 1 - b1)  # b1 m + (1 - b1) g
            v[k] = state["v"][k].lerp(grads[k].square(), 1 - b2)  # b2 v + (1 - b2) g^2
            # sqrt(c2) is taken out of the denominator: m / (sqrt(v + c2 eps_root) + sqrt(c2) eps)
            ratio = _AdamRatio.apply(m[k], v[k], c2 * self.eps_root, c2**0.5 * self.eps)
            kept = p - self.lr * self.weight_decay * p if self.weight_decay else p
            new[k] = torch.add(kept, ratio, alpha=-self.lr * c2**0.5 / c1)
        return new, {"step": t, "m": m, "v": v}


def sft(model: nn.Module, examples: Examples, optimizer: Optimizer, *,
        weights: Tensor | None = None, steps: int = 1, microbatch: int | None = None) -> Params:
    """A(w, D), section 3.1: the parameters after one pass of supervised fine-tuning, as a dict.

    The N examples are split in order into `steps` minibatches of B = N / steps, one for each step.
    `weights` is w, (N,), or (N, L) for each token; None is all ones. The result is differentiable
    in w where w requires gradients. The model maps token ids to logits (N, L, V), or to an output
    with .logits, is causal, and computes each row by itself. It is not changed; its parameters with
    requires_grad=False are constants. `microbatch` bounds the rows computed at once. ValueError for
    arguments that do not fit together, for a model that draws random numbers (dropout), is in half
    precision, reads its parameters by another way than its modules' attributes or, where w requires
    gradients, has a backward without a derivative; for an optimizer that writes to the model."""
    _check(locals())
    run = _Run(model, examples, optimizer, weights, steps, microbatch)
    graph = weights is not None and weights.requires_grad and torch.is_grad_enabled()
    with _full_precision():
        for *_, g, _, (params, _) in _train(run, run.z0, range(steps), "run" if graph else None):
            pass
        _check_run(run, g)
    return run.all | params


def _train(run, z, steps, graph=None):
    """The training loop of A, from z = (parameters, optimizer state), for these of its T steps.

    Yields k, z, the gradient g, the loss and z after the step. graph="run" keeps autograd's graph
    of the whole run, back to w, through each g (create_graph=True), which is a derivative already.
    "update" keeps that of each update alone, from z and g (`_replay`); None keeps none."""
    for k in steps:
        g, loss = run.gradient(k, z[0], graph == "run")  # of `_loss` of minibatch k
        z, g = _leaf((z, g)) if graph == "update" else (z, g)
        new = tree_map_only(Tensor, lambda x: x, (z[0], g, z[1]))  # dicts that may be written to
        with torch.set_grad_enabled(graph is not None):
            after = run.optimizer.update(*new)
        yield k, z, g, loss, after
        z = after


def _loss(model, params, examples, weights, B):
    """(1/B) sum_i w_i l_i of a minibatch, l_i = (1/L) sum_t mask_it * nll_it; or w_it on nll_it.

    B and L = tokens.shape[1] are constants, not counts of what was written, and x_i stands in one
    summand alone, with the factor w_i. So A(w, D) with w_i = 0 has no trace of x_i, and its Phi,
    subtracted as a baseline, changes no expectation: given the prompts the x_i are independent, and
    E grad log pi(x_i) = 0. With F = E Phi(w = 1), any optimizer and T, other weights 1, exactly

        grad F = E[ sum_i (Phi(w = 1) - Phi(w_i = 0)) grad log pi(x_i) ].

    tau_i, the slope at w_i = 1, is the first-order stand-in for that difference, and the bias of
    DPG E[ sum_i (tau_i - difference) grad log pi(x_i) ] (`advantages` may add to it). It is 0 where
    Phi(w) is affine in each w_i, as at T = 1 with SGD and Phi linear in the parameters; else it
    falls with lr or an example's share 1/B (SGD), or as eps_root grows (AdamW)."""
    nll = _nll(model, params, examples)  # -log p of each label, 0 off the mask: (rows, L - 1)
    w = weights[:, 1:] if weights.ndim == 2 else weights[:, None]
    return (w * nll).sum() / (B * examples.tokens.shape[1])


def lm_metric(model: nn.Module, examples: Examples) -> Metric:
    """A metric: the mean log-likelihood per label token of `examples`, nats (sections 4.4, 4.5)."""
    _check(locals())

    def metric(params: Params) -> Tensor:
        parts = (_nll(model, params, Examples(*part)).sum() for part in _chunks(None, *examples))
        return -sum(parts) / examples.mask.count_nonzero()

    return metric


class Attribution(NamedTuple):
    """What `metagradient` returns, without a graph."""

    tau: Tensor  # (N,), or (N, L) with 0 where the mask is 0
    metric: float  # Phi(A(w, D)), at `weights`, or at w = 1
    params: Params  # A(w, D)
    losses: Tensor  # (steps,): minibatch k's loss before update k


def metagradient(model: nn.Module, examples: Examples, metric: Metric, optimizer: Optimizer, *,
                 steps: int = 1, per_token: bool = False, method: str = "unroll",
                 weights: Tensor | None = None, microbatch: int | None = None,
                 checkpoint_every: int = 1, offload: bool = False,
                 group: "dist.ProcessGroup | None" = None) -> Attribution:
    """tau = d Phi(A(w, D)) / d w at w = 1 (section 3.1), exact, by double backward.

    With per_token=True w has an entry per token: tau is (N, L), and at w = 1 its row sums are the
    per-example tau. `weights`, of tau's shape, takes the derivative there instead of at 1 (what
    for: "midpoint" in demos/estimators.py). Method "unroll" is the definition, and the faster one;
    "replay" (`_replay`, which tells of `microbatch`, `checkpoint_every`, `offload` and `group`)
    gives the same numbers with less memory.

    Errors: those of `sft`; ValueError for a metric that is no scalar, or reads no parameter that
    training changes (a gradient of 0 is no error: tau is 0), and for a layer whose backward cannot
    be differentiated (what it takes for a constant `check_target` alone can see); `NotFinite` for
    losses, Phi or tau not finite (with eps_root = 0 where v_hat is exactly 0)."""
    _check(locals())
    with torch.enable_grad(), _full_precision():
        run = _Run(model, examples, optimizer, _leaf(weights), steps, microbatch, group, per_token)
        tau, phi, params, losses = (_unroll(run, metric) if method == "unroll" else
                                    _replay(run, metric, checkpoint_every, offload))
    _check_tau(run, tau)
    return Attribution(tau, phi.item(), _leaf(run.all | params, False), torch.stack(losses))


def _unroll(run, metric):
    """The definition: train, look at Phi, differentiate."""
    losses = []
    for *_, g, loss, (params, _) in _train(run, run.z0, range(run.T), graph="run"):
        losses.append(loss)
    phi, adjoint = _phi(run, metric, _leaf(params), losses)  # Phi, d Phi / d params
    # The second derivative is taken here: back through every update and every gradient of the run,
    # to w. A g depends on its w, and by its parameters on earlier steps (a Hessian-vector product);
    # the initial parameters depend on no w, so the first step needs d g / d w alone.
    g = [x for x in g.values() if x.requires_grad]  # the last step's, for `_check_linear`
    tau, *of_g = _vjp(params.values(), [run.weights, *g], adjoint, 1)  # (d params / d w)^T adjoint
    _check_linear(run, -1, tau.chunk(run.T)[-1], g, of_g)
    return tau, phi, params, losses


class Rollouts(NamedTuple):
    """What a policy wrote. N = prompts x samples rows; the samples of one prompt are adjacent."""

    prompt_tokens: Tensor  # (N, P) int64, padded on the left
    prompt_mask: Tensor  # (N, P) int64
    tokens: Tensor  # (N, L_new) int64
    mask: Tensor  # (N, L_new) int64: 1 up to and including the first end-of-text

    def examples(self, start: int) -> Examples:
        """The dataset D: rows [start] + rollout, no prompt (section 3.1), (N, L_new + 1)."""
        _check({"start": start})
        return Examples(F.pad(self.tokens, (1, 0), value=start), F.pad(self.mask, (1, 0)))


@torch.no_grad()
def generate(model: nn.Module, prompts, *, samples: int, max_new_tokens: int,
             temperature: float = 1.0, seed: int | Sequence[int], eos_token_id: int | None = None,
             microbatch: int | None = None) -> Rollouts:
    """Sample from the policy: `samples` rollouts for each prompt, in `max_new_tokens` columns.

    `prompts` is a pair (tokens, attention mask), both (P_n, P) and padded on the left, or what a
    tokenizer returns with padding_side="left". A rollout ends at the first end-of-text, by default
    the one of the model's generation config. Temperature 0 takes the most likely token. Each prompt
    has a random stream of its own, from `seed` and its place, or from its entry where `seed` is a
    sequence. So what is written for it does not depend (but for rounding) on the other prompts or
    on `microbatch`, the rows computed at once, at least one prompt's. No global state is used."""
    _check(locals())
    return _rollouts(model, prompts, samples, max_new_tokens, temperature, seed, eos_token_id,
                     microbatch)[0]


class TokenLogProbs(NamedTuple):
    """log pi of each sampled token, and what else was asked for; all (N, L_new), 0 off the mask."""

    log_probs: Tensor
    entropy: Tensor | None  # of the next-token distribution, nats
    kl: Tensor | None  # KL(pi || reference) of these, both at `temperature`, nats


def token_log_probs(model: nn.Module, rollouts: Rollouts, *, temperature: float = 1.0,
                    entropy: bool = False, reference: nn.Module | None = None):
    """log pi_theta(x_it | prompt, x_i<t), (N, L_new), 0 where the mask is 0; differentiable.
    With entropy=True or a reference a `TokenLogProbs`: both are exact sums over the vocabulary."""
    _check(locals())
    log_pi = _next_token_log_probs(model, rollouts, temperature)  # (N, L_new, V)
    labels, pi = rollouts.mask != 0, log_pi.exp()

    def expected(x):  # under pi; a token that is never drawn adds 0, not 0 * infinity
        return torch.where(labels, (pi * x.masked_fill(pi == 0, 0)).sum(2), 0)

    kl, chosen = None, log_pi.gather(2, rollouts.tokens[..., None])[..., 0].where(labels, 0)
    if reference is not None:
        with torch.no_grad():
            log_ref = _next_token_log_probs(reference, rollouts, temperature)
        _require(log_ref.shape == log_pi.shape, "reference must have the vocabulary of model")
        kl = expected(log_pi - log_ref)
    elif not entropy:
        return chosen
    return TokenLogProbs(chosen, -expected(log_pi) if entropy else None, kl)


def advantages(tau: Tensor, mask: Tensor, *, group_size: int | None = None, baseline: str = "none",
               scale: bool = False, discount: float | None = None) -> Tensor:
    """Rewards tau to advantages A, same shape.

    tau is (N,), per example, and `discount` None; or (N, L_new), per token (not in the paper), and
    `discount` in [0, 1] makes the reward-to-go R_it = sum_{s >= t} discount^(s - t) tau_is. Credit
    Phi(w = 1) - Phi(w_is = 0 for all s >= t) would make the policy gradient exact: the row's losses
    that remain, of s < t, do not see x_it, for the target is causal. With 1 R_it is its first-order
    stand-in. Below 1, what a token does to later losses, as context and by what is written after
    it, counts too little, with 0 its own loss alone: as a rule more bias and less variance.

    Groups are `group_size` adjacent rows: G, a prompt's samples, as in the paper's GRPO; N / T, an
    inner minibatch, since rewards of early and late steps differ in size; None, the whole batch.
    baseline "mean" subtracts the group's mean, "loo" the mean of the others; per token, of the rows
    with a label at the same position. tau_j depends on x_i through the run they share, so both add
    bias, and as a rule lower the variance. Where tau_j does not see x_i (T = 1, SGD, Phi linear in
    the parameters) "loo" adds none. Of n rows "mean" is (n - 1) / n times "loo"; a row alone at its
    position (the longest text's end) gets 0 from "mean", and from "loo" its reward.

    scale=True divides by the standard deviation about the means, one for all labels of the group: a
    step is as long whatever the unit of Phi or, centred, the spread. It adds a bias of order 1/n,
    and at any n another: all groups weigh the same. Where rewards differ by no more than rounding
    (1e-12 of the group's largest, 1e-5 in float32) "mean" and "loo" give exactly 0; where they do
    so at all positions of a group, scale=True does with "none" too. A group of one row, which would
    always get 0, can be neither scaled nor centred by "mean"."""
    _check(locals())
    labels = (mask != 0).to(tau.dtype) if tau.ndim == 2 else torch.ones_like(tau)[:, None]
    labels = labels.view(-1, group_size or len(tau), labels.shape[1])  # (groups, size, positions)
    t = torch.arange(labels.shape[2], device=tau.device, dtype=tau.dtype)  # per example: one
    with _full_precision():
        to_go = torch.tril((discount or 0) ** (t[:, None] - t).clamp(min=0))
        reward = (tau.view_as(labels) * labels) @ to_go * labels
    # Divide by the largest reward of the group first: the square of 1e-23 is 0 in float32.
    unit = reward.abs().amax((1, 2), keepdim=True)  # (groups, 1, 1)
    reward = reward / torch.where(unit > 0, unit, 1)
    n = labels.sum(1, keepdim=True)  # (groups, 1, positions)
    centred = (reward - reward.sum(1, keepdim=True) / n.clamp(min=1)) * labels
    spread = centred.amax(1, keepdim=True) - centred.amin(1, keepdim=True)
    centred = torch.where(spread > (1e-12 if tau.dtype == torch.float64 else 1e-5), centred, 0)
    value = centred if baseline == "mean" else reward
    if baseline == "loo":  # without others there is no baseline
        value = torch.where(n > 1, centred * n / (n - 1).clamp(min=1), reward)
    if scale:
        std = (centred.square().sum((1, 2), keepdim=True) / labels.sum((1, 2), keepdim=True)).sqrt()
        unit, value = 1, torch.where(std > 0, value / std, 0)
    return (value * unit).reshape(tau.shape)


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
                         entropy: Tensor | None = None, entropy_coef: float = 0.0,
                         kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """-(1/N) sum_it A_it log pi_it: minus its gradient, times N, is the estimator (section 3.2).

    log_probs and mask are (N, L_new), advantages (N,) or (N, L_new). No text's sum is divided by
    its length: it would not be grad log pi(x_i). -entropy_coef (1/N) sum_it H_it and kl_coef (1/N)
    sum_it KL_it, from `token_log_probs`, are terms of another objective than Phi; their gradient
    leaves out how theta changes which prefixes are visited."""
    _check(locals())
    terms = -advantages.detach().view(len(log_probs), -1) * log_probs
    terms = terms - (entropy_coef * entropy if entropy_coef else 0)
    terms = terms + (kl_coef * kl if kl_coef else 0)
    return (terms * mask).sum() / len(log_probs)


class StepResult(NamedTuple):
    """What one `dpg_step` saw, of all processes together."""

    rollouts: Rollouts
    attribution: Attribution
    advantages: Tensor  # (N,) or (N, L_new)
    entropy: float  # of the policy, nats per token
    kl: float  # to the reference, nats per token (nan without one)


@torch.enable_grad()
def dpg_step(policy: nn.Module, policy_optimizer: torch.optim.Optimizer, prompts,
             encode: Callable[[Rollouts], Examples], reward: Callable[[Examples], Attribution], *,
             samples: int, max_new_tokens: int, seed: int, temperature: float = 1.0,
             group_size: int | None = None, baseline: str = "mean", scale: bool = True,
             discount: float | None = None, entropy_coef: float = 0.0, kl_coef: float = 0.0,
             reference: nn.Module | None = None, microbatch: int | None = None,
             group: "dist.ProcessGroup | None" = None) -> StepResult:
    """One iteration of Algorithm 1: write a dataset, train on it, attribute, improve the writer.

    `encode` makes the target's training rows, one of each rollout: partial(Rollouts.examples,
    start=...) where the models share a tokenizer, or text encoded anew, padded on the right to a
    fixed length (then credit is per example). `reward` makes their `Attribution`:
    partial(metagradient, target, metric=..., optimizer=...), each time from the same target, a
    copy, with per_token=True where a `discount` is given, and a `microbatch` and `group` of its
    own. `policy` and `policy_optimizer` are changed in place; pi_theta is the policy at
    `temperature`. Unlike `advantages` it centres and scales by default: rewards may be 1e-9, and a
    plain step would do nothing; where all are 0 it warns. Each step needs a `seed` of its own.
    `_Processes` tells of `group`."""
    _check(locals())
    crew, (tokens, mask) = _Processes(group), _pair(prompts)
    tokens, mask, seeds = map(crew.share, (tokens, mask, _seeds(seed, len(tokens))))
    rollouts = generate(policy, (tokens, mask), samples=samples, max_new_tokens=max_new_tokens,
                        temperature=temperature, seed=seeds, microbatch=microbatch)  # D ~ pi_theta
    examples = encode(Rollouts(*(x.clone() for x in rollouts)))  # a copy: it may be written to
    attribution = _rewarded(policy, reward, examples, rollouts, crew)  # tau = d Phi(A(w, D)) / d w
    written = Rollouts(*(crew.gather(x, samples) for x in rollouts))
    attribution = attribution._replace(tau=crew.gather(attribution.tau, samples))
    tau = attribution.tau.to(written.mask.device)
    tau = tau[:, 1:] if tau.ndim == 2 else tau  # the start token is no action
    credit = advantages(tau, written.mask, group_size=group_size, baseline=baseline, scale=scale,
                        discount=discount)  # A_it
    mine = crew.share(credit.unflatten(0, (-1, samples))).flatten(0, 1)
    policy.zero_grad()
    totals = 0  # of entropy, KL and tokens
    for *part, part_credit in _chunks(microbatch, *rollouts, mine):
        part = Rollouts(*part)
        log_probs, entropy, kl = token_log_probs(policy, part, temperature=temperature,
                                                 entropy=True, reference=reference)
        loss = policy_gradient_loss(log_probs, part_credit, part.mask, entropy=entropy,
                                    entropy_coef=entropy_coef, kl=kl, kl_coef=kl_coef)
        (loss * len(part_credit) / len(credit)).backward()
        kl = entropy * math.nan if kl is None else kl
        totals += torch.stack([x.detach().sum() for x in (entropy, kl, part.mask)])
    _update(policy, policy_optimizer, crew)  # a step up sum_it A_it grad log pi_it / N
    (totals,) = crew.sum([totals])
    return StepResult(written, attribution, credit, *(totals[:2] / totals[2]).tolist())


# =============================================================================== room 2: the scale

class _Run:
    """One run of A: its minibatches with their weights, and the derivatives of their losses.

    A loss is a sum over rows, and so are its derivatives: over micro-batches of `microbatch` rows,
    and over the processes of a `group`, each with rows of its own."""

    def __init__(self, model, examples, optimizer, weights, T, microbatch, group=None,
                 per_token=False):
        self.model, self.optimizer, self.T = model, optimizer, T
        self.microbatch, self.crew = microbatch, _Processes(group)
        self.all = {k: p.detach() for k, p in model.named_parameters()}
        self.params = _leaf({k: p for k, p in model.named_parameters() if p.requires_grad})
        _require(self.params, "model has no parameter with requires_grad=True")
        ones = next(iter(self.params.values())).new_ones(examples.tokens.shape[:1 + per_token])
        self.weights = _leaf(ones) if weights is None else weights
        self.batches = list(zip(*(x.chunk(T) for x in (*examples, self.weights))))
        self.reached = set()  # names of the parameters that a loss depends on
        self.before = [(p, p._version) for p in model.parameters()]  # for `_check_model`
        self.z0 = self.params, optimizer.init(self.params)

    def parts(self, k, params, graph):
        """The share that each micro-batch of minibatch k has in the gradient and in the loss."""
        B = len(self.batches[k][0]) * self.crew.world
        own = [p for p in self.model.parameters() if p.requires_grad]  # those of before the run
        for *part, w in _chunks(self.microbatch, *self.batches[k]):
            with torch.enable_grad():
                loss = _loss(self.model, self.all | params, Examples(*part), w, B)
                grads = [None] * 2 * len(own) if not loss.requires_grad else torch.autograd.grad(
                    loss, [*params.values(), *own], create_graph=graph, allow_unused=True)
            _require(all(g is None for g in grads[len(own):]), "model: it reads a parameter by "
                     "another way than its module's attribute, past torch.func.functional_call")
            self.reached |= {k for k, g in zip(params, grads) if g is not None}
            grads = _dense(grads, params.values())
            _require(not graph or all(g.requires_grad or not g.any() for g in grads), _ONCE)
            yield [*grads, loss.detach()]

    def gradient(self, k, params, graph=False):
        """d loss_k / d params, and loss_k; with a graph it can be differentiated in both."""
        params = {k: p if graph and p.requires_grad else _leaf(p) for k, p in params.items()}
        *grads, loss = self.crew.sum(_total(self.parts(k, params, graph)))
        # Autograd may hand out one tensor twice: to each its own. The loss, no view of all of them.
        return {k: g.view_as(g) for k, g in zip(params, grads)}, loss.clone()


def _replay(run, metric, every, offload):
    """`_unroll` by the chain rule: states are stored, all else is computed again, step by step.

    z_k is (parameters, optimizer state) before step k, g_k(z_k, w_k) the gradient, z_{k+1} =
    update(z_k, g_k). From the end back, the adjoint of x being d Phi / d x:

        adjoint of g_k = (d update / d g)^T adjoint of z_{k+1}
        tau_k          = (d g_k / d w_k)^T adjoint of g_k
        adjoint of z_k = (d update / d z)^T adjoint of z_{k+1} + (d g_k / d z)^T adjoint of g_k

    Beyond the states memory does not grow with T, nor, with `microbatch` set, with N; each step
    costs one more forward and backward pass. A state with its g, 4 times the parameters with AdamW,
    is stored every `every` steps. From 2 on, or with offload, which stores in host memory, what is
    between is computed again: one more pass, T / every + every states."""
    device, last = run.weights.device, (run.T - 1) // every * every
    starts, kept, losses, taus = {}, {}, [], []  # of stretches; of steps, with the update's graph
    for k, z, g, loss, after in _train(run, run.z0, range(run.T), "update"):
        if k >= last or every == 1 and not offload:
            kept[k] = z, g, after
        elif k % every == 0:
            starts[k] = _leaf(z, False, "cpu" if offload else device)
        losses.append(loss)
    params = _leaf(after[0])
    phi, adjoint = _phi(run, metric, params, losses)
    adjoint += map(_nothing, _tensors(after[1]))
    del z, g, after  # the last step's: `kept` lets go of them in time
    for k in reversed(range(run.T)):
        if k not in kept:  # walk its stretch again
            first = k - k % every
            z = _leaf(starts.pop(first), False, device)
            for j, z, g, _, after in _train(run, z, range(first, k + 1), "update"):
                kept[j] = z, g, after
        tau, adjoint = _back(run, k, *kept.pop(k), adjoint)
        taus.insert(0, tau)
    return torch.cat(taus), phi, params, losses


def _back(run, k, z, g, after, adjoint):
    """tau_k, and the adjoint of z_k (nobody needs that of z_0), from the adjoint of z_{k+1}."""
    params, inputs = (list(z[0].values()), _tensors(z)) if k else ([], [])
    found = _vjp(_tensors(after), [*g.values(), *inputs], adjoint, len(g))
    of_g, of_z = found[:len(g)], found[len(g):]
    tau = None if k else _tangents(run, z[0], g, of_g)
    if tau is not None:
        return tau, []
    # d <gradient, of_g> / d w_k, and / d params, a Hessian-vector product
    tau, *products = _total(_vjp(part[:-1], [run.batches[k][2], *params], of_g)
                            for part in run.parts(k, z[0], graph=True))
    _check_linear(run, k, tau, g.values(), of_g)
    return tau, [*map(torch.add, of_z, run.crew.sum(products)), *of_z[len(products):]]


def _tangents(run, params, g, of_g):
    """tau_0 by one forward-mode pass: <g, of_g> is linear in w, its derivative by w_it the tangent
    of nll_it along of_g, over B L. None where a layer has no forward derivative, or not the one of
    backward (hooks, no_grad), and where a w is 0 and `_linear` could not tell."""
    tokens, _, w = run.batches[0]
    try:
        with torch.no_grad(), forward_ad.dual_level():
            duals = run.all | {k: forward_ad.make_dual(params[k], a) for k, a in zip(g, of_g)}
            tau = [forward_ad.unpack_dual(_nll(run.model, duals, Examples(*part))).tangent
                   for *part, _ in _chunks(run.microbatch, *run.batches[0])]
    except NotImplementedError:
        tau = [None]
    if any(run.crew.everyones(any(x is None for x in tau) or not w.all())):
        return None
    tau = F.pad(torch.cat(tau), (1, 0)) / (tokens.numel() * run.crew.world)
    tau = (tau if w.ndim == 2 else tau.sum(1)).to(w.dtype)
    return tau if _linear(run, 0, tau, g.values(), of_g) else None


def _linear(run, k, tau, g, of_g):
    """Whether <w_k, tau_k> = <g_k, of_g>, as it must be, for g_k is linear in w_k: not where the
    backward of a layer cannot be differentiated, as many fused kernels' can not."""
    each = run.batches[k][2].detach() * tau
    total, size = run.crew.sum([each.sum(), each.abs().sum()])
    products = map(torch.mul, g, of_g)  # one at a time
    wanted, terms = map(sum, zip(*((x.nansum(), x.abs_().nansum()) for x in products)))
    rounding = 100 * torch.finfo(tau.dtype).eps * terms
    return not (total - wanted).abs() > 1e-4 * size + rounding  # NaN is told by `_check_tau`


class _AdamRatio(torch.autograd.Function):
    """m / (sqrt(v + a) + b), whose graph keeps m and v alone, which the optimizer's state holds
    anyway: autograd's own would keep two more copies of the parameters at each step."""

    @staticmethod
    def forward(ctx, m, v, a, b):
        ctx.save_for_backward(m, v)
        ctx.a, ctx.b = a, b
        return m / (v + a).sqrt_().add_(b)

    @staticmethod
    def backward(ctx, adjoint):
        m, v = ctx.saved_tensors
        root = (v + ctx.a).sqrt_()
        of_m = adjoint / (root + ctx.b)
        of_v = (of_m * m).div_((root + ctx.b).mul_(root)).mul_(-0.5)
        return of_m, of_v, None, None


def _vjp(outputs, inputs, adjoints, gradients=0):
    """The sum over outputs of (d output / d input)^T adjoint, for each input. Where outputs are an
    update's, and the first so many inputs `gradients`, or made of them, one must be reached."""
    pairs = [(x, a) for x, a in zip(outputs, adjoints, strict=True) if x.requires_grad]
    found = [None] * len(inputs) if not pairs else torch.autograd.grad(
        [x for x, _ in pairs], inputs, [a for _, a in pairs], allow_unused=True)
    _require(not gradients or any(x is not None for x in found[:gradients]),
             "optimizer: its update is detached from the gradients, so nothing earns a reward")
    return _dense(found, inputs)


def _dense(grads, inputs):
    """The gradients, of as many inputs, with zeros where there is none."""
    return [_nothing(x) if g is None else g for g, x in zip(grads, inputs)]


def _nothing(x):
    """Zeros of x's shape, to be read only: one number in memory."""
    return x.detach().new_zeros(()).expand_as(x)


def _total(lists):
    """The sum of lists of tensors, entry by entry; one list at a time is held."""
    return functools.reduce(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], lists)


def _leaf(tree, requires_grad=True, device=None):
    """The same nest of dicts, tuples and lists, each tensor a new leaf of the graph."""
    return tree_map_only(Tensor, lambda x: x.detach().to(device).requires_grad_(
        requires_grad and x.is_floating_point()), tree)


def _tensors(tree):
    leaves = [x for x in tree_leaves(tree) if not isinstance(x, (int, float, str, type(None)))]
    _require(all(isinstance(x, Tensor) and not x.is_complex() for x in leaves), "optimizer: its "
             "state must be made of real tensors and numbers in dicts, tuples and lists")
    return [x for x in leaves if x.is_floating_point()]


def _chunks(size, *columns):
    """Rows of several columns, `size` at a time; None: all, but on a CPU as many as stay in its
    cache, about 2000 tokens of the first column (demos/benchmark.py)."""
    n, length = columns[0].shape
    size = size or (max(1, 2048 // length) if columns[0].device.type == "cpu" else n)
    return (tuple(x[first:first + size] for x in columns) for first in range(0, n, size))


def _nll(model, params, examples):
    """-log p of every label given the tokens before it, 0 where the mask is 0: (N, L - 1)."""
    # Padding is on the right and the model causal: no label sees it, no attention mask is needed.
    logits = _logits(model, params, examples.tokens[:, :-1])  # (N, L - 1, V)
    labels = examples.tokens[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return torch.where(examples.mask[:, 1:] != 0, nll.view_as(labels), 0)


def _logits(model, params, tokens):
    """What the model gives, (N, L, V), with these parameters in place of its own."""
    # Each slot once: `functional_call` leaves wrong weights in a module that has two names.
    names = {id(p): name for name, p in model.named_parameters()}
    _require(set(names.values()) <= set(params), "metric: its model has parameters that those it "
             "is given do not name; is it the target?")
    slots = {f"{path}.{k}".lstrip("."): params[names[id(p)]] for path, m in model.named_modules()
             for k, p in m.named_parameters(recurse=False, remove_duplicate=False)}
    slots |= {k: x.clone() for k, x in model.named_buffers()}  # the model's own stay as they are
    options = _accepted(model, use_cache=False) if hasattr(model, "config") else {}
    # Activation checkpointing computes anew after `functional_call` has put the model's own
    # parameters back: it would be wrong in silence. It works by hooks.
    no_hooks = torch.autograd.graph.disable_saved_tensors_hooks(
        "model: activation checkpointing inside cannot be attributed")
    # Fused kernels are differentiable only once.
    with sdpa_kernel(SDPBackend.MATH), no_hooks, _pure(model):
        out = torch.func.functional_call(model, slots, (tokens,), options, tie_weights=False)
    logits = getattr(out, "logits", out)
    _require(isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == tokens.shape,
             "model must return logits (N, L, V) or an object with .logits; from tokens "
             f"{tuple(tokens.shape)} {type(model).__name__} made {_short(logits)}")
    return logits


def _accepted(model, **options):
    """Those of the options that the model's forward takes."""
    known = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())  # as wrappers do
    return {k: v for k, v in options.items() if takes_all or k in known}


def _pair(prompts):
    """Token ids and attention mask, from a pair or by the tokenizer's names."""
    named = isinstance(prompts, Mapping)
    return (prompts["input_ids"], prompts["attention_mask"]) if named else tuple(prompts)


def _seeds(seed, n):
    """A seed for each of n prompts: hashed, since streams of neighbouring seeds may be alike."""
    return seed if isinstance(seed, (list, tuple)) else [
        random.Random(f"{seed} {place}").getrandbits(32) for place in range(n)]


def _rollouts(model, prompts, samples, length, temperature, seed, eos=None, microbatch=None):
    """What `generate` returns, and the log-probability under which each token was drawn."""
    eos = model.generation_config.eos_token_id if eos is None else eos
    tokens, mask = (x.long().repeat_interleave(samples, 0) for x in _pair(prompts))  # (N, P)
    eos = tokens.new_tensor([] if eos is None else eos).view(-1)
    streams = [torch.Generator(tokens.device).manual_seed(int(s))
               for s in _seeds(seed, len(tokens) // samples)]
    rows = max(1, (microbatch or len(tokens)) // samples)
    with _pure(model):
        parts = [_sample(model, *part, length, temperature, streams[i * rows:][:rows], eos)
                 for i, part in enumerate(_chunks(rows * samples, tokens, mask))]
    new, log_pi = map(torch.cat, zip(*parts))  # (N, L_new)
    ended = torch.isin(new, eos).long()
    return Rollouts(tokens, mask, new, (ended.cumsum(1) - ended == 0).long()), log_pi


def _sample(model, tokens, mask, length, temperature, streams, eos):
    """Texts (rows, length) for these prompts, a stream for the adjacent samples of each.

    Of softmax(logits / temperature) argmax_j (logit_j / temperature - log e_j) is a sample, where
    the e_j are exponential (Gumbel-max)."""
    P, cache = tokens.shape[1], _prefix(model, tokens, mask, length)
    tokens, mask = F.pad(tokens, (0, length)), F.pad(mask, (0, length), value=1)
    log_pi, ended = torch.zeros_like(tokens[:, P:], dtype=torch.float32), tokens[:, P] < 0
    for t in range(P, P + length):
        logits, cache = _read(model, tokens[:, :t], mask[:, :t], 1, cache)
        logits = logits[:, 0] / (temperature or 1)  # (rows, V)
        _require(logits.amax(1).isfinite().all(), "model: its logits are NaN or infinite; is it "
                 "trained in float16, or at too high a rate? eager attention in float64 gives that "
                 'with padding on the left: load it with attn_implementation="sdpa"', NotFinite)
        chosen = logits - _exponential(streams, logits).log_() if temperature else logits
        tokens[:, t:] = torch.where(ended, tokens[:, t - 1], chosen.argmax(1))[:, None]
        log_pi[:, t - P] = logits.log_softmax(1).gather(1, tokens[:, t:t + 1])[:, 0]
        ended |= torch.isin(tokens[:, t], eos)
        if ended.all():
            break
    return tokens[:, P:], log_pi


def _exponential(streams, like):
    """Exponential random numbers, (rows, V)."""
    uniform = torch.empty(len(like), 2, like.shape[1], device=like.device, dtype=torch.float32)
    for rows, stream in zip(uniform.chunk(len(streams)), streams, strict=True):
        rows.uniform_(generator=stream)
    # A float32 has 24 random bits; with as many more no token is too improbable to be drawn.
    coarse, fine = uniform.unbind(1)
    return fine.mul_(2.0**-24).add_(coarse).neg_().log1p_().neg_()


def _next_token_log_probs(model, rollouts, temperature):
    """log pi of every token of the vocabulary at each place of the rollouts, (N, L_new, V)."""
    prompts, mask, new, _ = rollouts
    tokens, length = torch.cat([prompts, new], 1)[:, :-1], new.shape[1]
    with _pure(model):
        cache = _prefix(model, prompts, mask, length)
        mask = F.pad(mask.long(), (0, length - 1), value=1)
        logits, _ = _read(model, tokens, mask, length, cache, use_cache=False)
    return F.log_softmax(logits / temperature, dim=2)


def _read(model, tokens, mask, keep, cache=None, use_cache=True):
    """A policy's logits after each of the last `keep` tokens, (rows, keep, V), and its cache, where
    it has one of all that it read. What is in the `cache` given is not read again."""
    # Padding is on the left: places count from a prompt's first real token.
    places = (mask.cumsum(1) - 1).clamp(min=0)
    new = slice(0 if cache is None else cache.get_seq_length(), None)
    options = _accepted(model, position_ids=places[:, new], past_key_values=cache,
                        use_cache=use_cache, logits_to_keep=keep)
    out = model(tokens[:, new], attention_mask=mask, **options)
    # Recurrent states have no such cache, and a wrapper's has tokens of its own: read all again.
    cache = getattr(out, "past_key_values", None) if "past_key_values" in options else None
    usable = getattr(cache, "is_croppable", False) and cache.get_seq_length() == tokens.shape[1]
    logits = out.logits[:, -keep:]  # drawn from in float32, whatever the model's type
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, cache if usable else None


def _prefix(model, tokens, mask, length):
    """The keys and values of prompts but for their last token, once for all samples of one prompt;
    differentiable. None where texts are no shorter, and little would be saved. See test_12."""
    rows, of = torch.cat([tokens, mask.long()], 1).unique_consecutive(dim=0, return_inverse=True)
    if tokens.shape[1] <= length or len(rows) == len(tokens):
        return None
    cache = _read(model, *(x[:, :-1] for x in rows.chunk(2, 1)), 1)[1]
    if cache is not None:
        cache.reorder_cache(of)
    return cache


@contextlib.contextmanager
def _pure(model):
    """Refuses a model that draws from a global random state: each call is another function."""
    devices = {x.device for x in model.parameters() if x.is_cuda}
    before = torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)
    yield
    after = torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)
    torch.set_rng_state(before[0])
    _require(all(map(torch.equal, before, after)), f"model: a {type(model).__name__} (target, "
             "policy or reference) draws random numbers (dropout?); call its eval()")


@contextlib.contextmanager
def _full_precision():
    """TF32 products lose 13 of 24 bits, and tau is a difference of such products: not in a run.
    Convolutions on a GPU are in TF32 unless told otherwise. A setting that was inherited is so
    again afterwards: those above are read, and put to "none", first."""
    cudnn, mkldnn, kept = torch.backends.cudnn, torch.backends.mkldnn, {}
    try:
        for x in (torch.backends, cudnn, torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn,
                  mkldnn.matmul, mkldnn.conv, mkldnn.rnn):
            kept[x], x.fp32_precision = x.fp32_precision, "none"
        for x in kept:
            x.fp32_precision = "ieee"
        yield
    finally:
        for x, own in kept.items():
            x.fp32_precision = own


class _Processes:
    """The K processes of a `group`; without one every method gives back what it is given.

    In `dpg_step` each calls with the same arguments, and `reward` bound to the group: it writes for
    every K-th prompt and attributes its own rows, and all make the same update from all rewards;
    that of a single process, where K divides the prompts of each inner minibatch. In `metagradient`
    `examples` and tau are this process's rows, as many on each, and minibatch k is the processes'
    k-th minibatches together; `metric` must be the same everywhere. A process that refuses what
    it is given, or reads NaN in its policy's logits, leaves the others waiting; `NotFinite` of all
    else stops all. Equal to one process by test_12."""

    def __init__(self, group):
        self.group, self.rank, self.world = group, 0, 1
        if group is not None:
            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def everyones(self, value):
        """The value that each process has."""
        values = [value] * self.world
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, tensors):
        """The sums over the processes. Not in place: autograd may return one tensor twice."""
        if self.group is None or not tensors:
            return tensors
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([x.numel() for x in tensors])
        return [part.view_as(x).to(x.dtype) for part, x in zip(parts, tensors)]

    def share(self, rows):
        """This process's part of what belongs to the prompts: r, r + K, r + 2K ..."""
        return rows[self.rank::self.world]

    def gather(self, x, samples):
        """The rows of all processes, in the order of the prompts."""
        parts = [part.unflatten(0, (-1, samples)) for part in self.everyones(x.cpu())]
        return torch.stack(parts, 1).flatten(0, 2).to(x.device)


def _update(policy, optimizer, crew):
    """A step of the policy's optimizer, with the gradients of all processes; all stop, or none."""
    reached, coarse = crew.everyones([p.grad is not None for p in policy.parameters()]), []
    held = {id(p) for part in optimizer.param_groups for p in part["params"]}
    for (name, p), *somewhere in zip(policy.named_parameters(), *reached, strict=True):
        if any(somewhere):
            p.grad, = crew.sum([torch.zeros_like(p) if p.grad is None else p.grad])
            _require(p.grad.isfinite().all(), f"policy: the gradient of {name} is not finite, its "
                     "training diverged (lower policy_optimizer's lr); nothing changed", NotFinite)
            coarse += [(p, p.detach().clone())] if p.element_size() < 4 and id(p) in held else []
    optimizer.step()
    meant = sum((p.grad != 0).sum() for p, _ in coarse)
    moved = sum((p != before).sum() for p, before in coarse)
    if moved < 0.5 * meant:
        warnings.warn(f"policy: only {moved / meant:.0%} of its half-precision weights moved, for "
                      "a step is below their spacing: train it in float32, or at a higher rate")


# ============================================================================== room 3: the checks

class _Double(torch.utils._python_dispatch.TorchDispatchMode, contextlib.ContextDecorator):
    """float64 stays float64 where a model asks for float32, as the norms of most do; what it is
    multiplied by there becomes float64."""

    def __torch_dispatch__(self, call, types, given=(), named=None):
        kinds = {x.dtype for x in given if isinstance(x, Tensor)}
        if call is torch.ops.aten._to_copy.default and given[0].dtype is torch.float64:
            named = {k: v for k, v in (named or {}).items() if v is not torch.float32}
        if "mm" in call.__name__ and kinds == {torch.float32, torch.float64}:
            given = tree_map_only(Tensor, Tensor.double, given)
        return call(*given, **(named or {}))


@_Double()
@_full_precision()
def check_target(model: nn.Module, examples: Examples, metric: Metric, optimizer: Optimizer, *,
                 steps: int = 1, per_token: bool = False, method: str = "unroll",
                 tolerance: float = 0.05, seed: int = 0) -> float:
    """Whether tau is the derivative for this target, metric and optimizer: before a long run.

    Along a random direction of w (from `seed`) tau is held against fourth-order central differences
    of Phi(A(w, D)): 13 runs of `sft`, 2 of `metagradient`. Returns how far apart they are, in norms
    of tau; allowed is what the disagreement and the rounding of the differences explain, at least
    1e-6 (in float32 2e-3). ValueError: they are farther apart (something is detached, not smooth,
    or wrong twice differentiated, as torch 2.13's weight_norm is); the differences cannot tell
    within `tolerance`; a label sees a later token, or another row; two equal calls differ; the
    model was changed."""
    _check(locals())
    state = [*model.parameters(), *model.buffers()]
    before = [x.detach().clone() for x in state]
    with torch.random.fork_rng():  # a metric may draw from it, and differ
        tau, again = (metagradient(model, examples, metric, optimizer, steps=steps,
                                   per_token=per_token, method=method).tau for _ in range(2))
    size, fine = tau.double().norm().item(), tau.dtype == torch.float64
    _require(0 < size < math.inf, f"metric: tau has norm {size}, there is nothing to compare; does "
             "no example reach what it reads, or is it at its limit?")
    _require((tau - again).norm() <= (1e-8 if fine else 1e-4) * size, "model or metric: two equal "
             "calls differ; call model.eval(), or find what remembers or draws random numbers")
    tokens, half = examples.tokens[:, :-1], examples.tokens.shape[1] // 2
    way = torch.randn(tau.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    way = way.to(tau) * (examples.mask if per_token else 1)

    @torch.no_grad()
    def phi(h):
        return metric(sft(model, examples, optimizer, weights=1 + h * way, steps=steps)).item()

    with torch.no_grad():
        whole, *alone = (_logits(model, dict(model.named_parameters()), x) for x in (
            tokens, tokens[-1:, :half], tokens[-1:, :half + 1]))  # one cuts a block of tokens
    _require(all((x - whole[-1:, :x.shape[1]]).abs().max() <= (1e-6 if fine else 1e-3)
                 * whole.abs().max() for x in alone),
             "model: a label sees later tokens, or other rows; is its attention causal?")
    tiny, here = (1e-9 if fine else 1e-5), phi(0)  # so near, only rounding bends Phi
    noise = max(abs(phi(h) + phi(-h) - 2 * here) for h in (tiny, 2 * tiny, 3 * tiny))
    noise = max(noise, torch.finfo(tau.dtype).eps * abs(here))
    h = min(max(3e3 * noise / size, 1e-6), 0.2)  # small, for there may be kinks, but not too small
    far, near, nearest = ((phi(x) - phi(-x)) / (2 * x) for x in (h, h / 4, h / 16))
    rough, slope = (16 * near - far) / 15, (16 * nearest - near) / 15  # of fourth order
    bound = max(2 * (abs(rough - slope) + 16 / h * noise) / size, 1e-6 if fine else 2e-3)
    off = abs((tau * way).sum().item() - slope) / size
    _require(all(map(torch.equal, state, before)), "model: a parameter or buffer was changed")
    _require(bound <= tolerance, f"model or metric: differences of Phi in {tau.dtype} are good to "
             f"{bound:.0%} of tau, and cannot tell; does the metric see what training changes? "
             + ("Is all of it in float64?" if fine else "Check copy.deepcopy(model).double()"))
    _require(off <= bound, f"tau is off by {off:.1e} of its norm, the differences by {bound:.1e}: "
             "something in model or metric is detached, or is not smooth")
    return off


@torch.no_grad()
@_full_precision()
def check_policy(model: nn.Module, prompts, *, max_new_tokens: int, samples: int = 2,
                 temperature: float = 1.0, seed: int = 0) -> float:
    """Whether `token_log_probs` are those that `generate` draws from: before a long run.

    Compares the log-probability under which each token was drawn with that of `token_log_probs`,
    in the padded batch and for each prompt alone. Returns the largest difference in nats.
    ValueError where it is above 1e-3 (in half precision 0.3; below temperature 1 over it): the
    model sees padding or later tokens, or depends on how it is called."""
    _check(locals())
    rollouts, drawn = _rollouts(model, prompts, samples, max_new_tokens, temperature, seed)
    worst = 0.0
    for n in (len(drawn), samples):
        for *part, own in _chunks(n, *rollouts, drawn):
            pad = int((part[1] == 0).sum(1).min())
            part = Rollouts(part[0][:, pad:], part[1][:, pad:], *part[2:])
            found = token_log_probs(model, part, temperature=temperature)
            off = torch.where(part.mask != 0, found - own, 0).abs().nan_to_num(math.inf)
            worst = max(worst, off.max().item())
    most = 1e-3 if next(model.parameters()).element_size() > 2 else 0.3
    _require(worst * min(temperature, 1) <= most, f"model: tokens were drawn with log-probabilities"
             f" {worst:.2g} nats from those of token_log_probs: does it see padding, or later "
             "tokens?")
    return worst


class NotFinite(FloatingPointError, ValueError):
    """NaN or infinity arose in a run. The message names where, and the likely cause."""


def _phi(run, metric, params, losses):
    """Phi(A(w, D)) and d Phi / d parameters, after a run whose losses are finite."""
    for step, loss in enumerate(losses):
        why = "lower lr, or raise eps" if step else "the model itself gives no finite loss"
        _require(loss.isfinite(), f"the loss of step {step} of the inner run is {loss.item()}: "
                 + why, NotFinite)
    phi = metric(run.all | params)
    _check_model(run)
    _require(isinstance(phi, Tensor) and phi.numel() == 1 and phi.requires_grad,
             "metric must return one number that depends on the parameters that it is given, by "
             f"torch.func.functional_call, and not detached; got {_short(phi)}")
    _require(phi.isfinite(), f"metric is {phi.item()} after the last step of the inner run; is it "
             "defined for these parameters? Otherwise lower lr", NotFinite)
    adjoint = torch.autograd.grad(phi.sum(), list(params.values()), allow_unused=True)
    reads = run.reached & {k for k, a in zip(params, adjoint) if a is not None}
    _require(any(run.crew.everyones(bool(reads))), "metric does not depend on any parameter that "
             "training on the examples changes; does it run the model with those it is given?")
    return phi.detach(), _dense(adjoint, params.values())


def _check_model(run):
    _require(all(p is q and version == q._version for (p, version), q in zip(
        run.before, run.model.parameters(), strict=True)), "metric or optimizer: it changed the "
        "target's own parameters. Does it write to what it is given? In a metric a module with two "
        "names needs torch.func.functional_call(..., tie_weights=False)")


def _check_run(run, g):
    """A run of `sft`: the model is as before; where there is a graph, g can be differentiated."""
    _check_model(run)
    if g := [x for x in g.values() if x.requires_grad]:
        tau, = torch.autograd.grad(g, [run.batches[-1][2]], of_g := [x.detach() for x in g],
                                   retain_graph=True, materialize_grads=True)
        _check_linear(run, -1, tau, g, of_g)


def _check_linear(run, k, tau, g, of_g):
    _require(_linear(run, k, tau, g, of_g), _ONCE)


_ONCE = ("model: a layer's backward cannot be differentiated (a fused kernel, or an "
         "autograd.Function that is differentiable once?)")


def _check_tau(run, tau):
    bad = sum(run.crew.everyones((~tau.isfinite()).nonzero()[:1, 0].tolist()), [])
    _require(not bad, f"tau of example {bad} is not finite: lower lr, or raise eps_root (at 0 Adam "
             "has no derivative where a gradient is 0)", NotFinite)


_ASKING = []  # the policies of `dpg_step`s that wait for a reward


def _rewarded(policy, reward, examples, rollouts, crew):
    """What `reward` returns, none of whose targets may move with the policy (`_Call.target`)."""
    _ASKING.append(policy)
    try:
        found = reward(examples)
    finally:
        _ASKING.pop()
    _require(isinstance(found, Attribution) and isinstance(found.tau, Tensor)
             and isinstance(found.metric, numbers.Real) and math.isfinite(found.metric),
             "reward must return an Attribution, as metagradient: tau a tensor, metric a number")
    phis, earns = zip(*crew.everyones((found.metric, bool(found.tau.any()))))
    if not any(earns):
        warnings.warn("tau is 0 for all that was written, and nothing is learned from it: does no "
                      "text reach what metric reads, or is metric at its limit?")
    _require(max(phis) - min(phis) <= 1e-3 * abs(phis[0]), f"reward: the processes have the metrics"
             f" {phis}; does it have the group, and one target?")
    rows = examples.tokens[:, 1:].to(rollouts.tokens.device)
    _require(found.tau.ndim == 1 or rows.shape == rollouts.tokens.shape and (
        (rows == rollouts.tokens) | (rollouts.mask == 0)).all(), "encode: where tau is per token "
        "its rows must be a start token and then the tokens that were written")
    return found


def _require(condition, message, error=ValueError):
    if not condition:
        raise error(message)


def _short(x):
    if isinstance(x, nn.Module):
        return f"a {type(x).__name__} in {', '.join({str(p.dtype) for p in x.parameters()})}"
    return str(tree_map_only(Tensor, lambda t: f"{t.dtype} {tuple(t.shape)}", x))[:100]


def _check(given):
    """Holds each argument of a call against the rule of its name; a name without one fails."""
    call = _Call(given)
    for name, x in given.items():
        what, right, optional = _RULES[name]
        try:
            fits, why = x is None and optional or right(call, x), None
        except Exception as error:  # a rule that x breaks by its type is not met
            fits, why = False, error
        if not fits:
            sizes = "".join(f", {c} = {n}" for c, n in call.items() if c[0].isupper())
            raise ValueError(f"{name} must be {what}; got {_short(x)}{sizes}") from why


def _real(x):
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and abs(x) < 1e18


def _whole(x, low=0, high=2**31):
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and low <= x < high


def _apart(policy, x):
    """Whether no update of the policy moves model x: a target must not drift, and the KL to a
    reference in the same memory would be 0."""
    moved = {p.data_ptr() for p in policy.parameters() if p.requires_grad}
    return moved.isdisjoint(p.data_ptr() for p in x.parameters() if p.numel())


class _Call(dict):
    """The arguments of a call, and the sizes of its shapes: a letter has one value in a call."""

    def rows(self):
        return self["N"] if "N" in self else self.setdefault("N", self["P_n"] * self["samples"])

    def fits(self, x, shapes):
        """Whether x has one of the shapes, as "N or N L"."""
        return any(len(names) == x.ndim and all(
            self.setdefault(c, n) == n > 0 for c, n in zip(names, x.shape))
            for names in map(str.split, shapes.split(" or ")))

    def finite(self, x, shapes):
        return (self.fits(x, shapes) and x.dtype in (torch.float32, torch.float64)
                and x.isfinite().all())

    def mask(self, x, shapes):
        return (self.fits(x, shapes) and ((x == 0) | (x == 1)).all()
                and (x.ndim == 1 or x.any(1).all()))

    def texts(self, tokens, mask, shape):
        """Whether the model knows the tokens: a GPU would only abort."""
        model = self.get("model", self.get("policy"))
        config = getattr(model, "config", None)
        tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        self.places = getattr(config, "max_position_embeddings", math.inf)
        return (self.fits(tokens, shape) and self.mask(mask, shape) and tokens.dtype == torch.int64
                and tokens.device == mask.device == next(model.parameters()).device
                and 0 <= tokens.min()
                and tokens.max() < getattr(config, "vocab_size", max(tables, default=math.inf)))

    def prompts(self, x, rows="P_n"):
        tokens, mask = _pair(x)
        return (self.texts(tokens, mask, f"{rows} P") and mask[:, -1].all()
                and (mask.long().diff(dim=1) >= 0).all())

    def target(self, x):
        places = [p.data_ptr() for p in x.parameters() if p.numel()]
        owners = [id(p) for _, p in x.named_parameters(remove_duplicate=False)]
        return ({p.dtype for p in x.parameters()} <= {torch.float32, torch.float64}
                and all(isinstance(p, nn.Parameter) for p in x.parameters())
                and not {*places} & {b.data_ptr() for b in x.buffers() if b.numel()}
                and len(set(places)) == len(places) > 0  # else `functional_call` would untie them
                # torch drops the gradient of a padding row, but not where a head is the same weight
                and not any(isinstance(m, nn.Embedding) and (
                    m.max_norm or m.scale_grad_by_freq or m.sparse or m.padding_idx is not None
                    and owners.count(id(m.weight)) > 1) for m in x.modules())
                and getattr(getattr(x, "config", None), "_attn_implementation", None) in (
                    None, "eager", "sdpa")
                and not any(p._backward_hooks for p in x.parameters())  # a run has its own
                and all(_apart(policy, x) for policy in _ASKING)
                and not torch.is_autocast_enabled(next(x.parameters()).device.type)
                and not torch.is_inference_mode_enabled())

    def group(self, x):
        crew, model = _Processes(x), self.get("model", self.get("policy"))
        same = self.get("N"), self.get("L"), x is not None and sum(
            p.detach().sum(dtype=torch.float64).item() for p in model.parameters())
        return self.get("P_n", 0) % crew.world == 0 and len(set(crew.everyones(same))) == 1


_POLICY, _FINITE = "a model with a generation_config, as transformers' have", (
    "finite, in float32 or float64, ")
_TABLE = [  # names (with "?": or None), what it must be, and whether x is, in the call c
    ("lr tolerance", "a number above 0", lambda c, x: _real(x) and x > 0),
    ("eps eps_root weight_decay", "a number, at least 0", lambda c, x: _real(x) and x >= 0),
    ("betas", "two numbers in [0, 1)",
     lambda c, x: len(x) == 2 and all(_real(beta) and 0 <= beta < 1 for beta in x)),
    ("temperature", "a number above 0 (in `generate` 0 too)",
     lambda c, x: _real(x) and (x > 0 or x == 0 and "eos_token_id" in c)),
    ("entropy_coef", "a number, at least 0; above 0 it needs entropy",
     lambda c, x: _real(x) and (x == 0 or x > 0 and c.get("entropy", 0) is not None)),
    ("kl_coef", "a number, at least 0; above 0 it needs kl, in `dpg_step` a reference",
     lambda c, x: _real(x) and (x == 0 or x > 0 and c.get("kl", c.get("reference")) is not None)),
    ("discount", "in [0, 1] where tau is per token, None where it is per example", lambda c, x:
     (x is None or _real(x) and 0 <= x <= 1)
     and ("tau" not in c or c["tau"].ndim == 1 + (x is not None))),
    ("samples checkpoint_every microbatch?", "a whole number above 0", lambda c, x: _whole(x, 1)),
    ("steps group_size?", "a positive divisor of N", lambda c, x: _whole(x, 1)
     and c.rows() % x == 0),
    ("max_new_tokens", "a whole number above 0, within the model's places",
     lambda c, x: _whole(x, 1) and c["P"] + x - 1 <= c.places),
    ("seed", "a whole number, or one of 32 bits for each prompt", lambda c, x:
     all(_whole(s, 0, 2**32) for s in x) and len(x) == c["P_n"] if isinstance(x, (list, tuple))
     else _whole(x, -math.inf, math.inf)),
    ("start", "a token id", lambda c, x: _whole(x)),
    ("eos_token_id?", "a token id, or several", lambda c, x:
     all(map(_whole, x if isinstance(x, (list, tuple)) else [x]))),
    ("per_token offload", "True or False", lambda c, x: isinstance(x, bool)),
    ("scale", "True or False, and False where a group is one row", lambda c, x: isinstance(x, bool)
     and (not x or (c.get("group_size") or c.rows()) > 1)),
    ("method", '"unroll" or "replay", and "replay" with checkpoint_every, offload or group',
     lambda c, x: x == "replay" or x == "unroll" and c.get("group") is None
     and c.get("checkpoint_every", 1) == 1 and not c.get("offload")),
    ("baseline", '"none", "mean" or "loo", and not "mean" where a group is one row', lambda c, x:
     x in ("none", "loo") or x == "mean" and (c.get("group_size") or c.rows()) > 1),
    ("metric encode reward", "a function", lambda c, x: callable(x)),
    ("optimizer", "dpg.SGD(...), dpg.AdamW(...), or have their init and update",
     lambda c, x: not isinstance(x, type) and x.init and x.update),
    ("policy_optimizer", "a torch.optim.Optimizer of the policy's own parameters, not all frozen, "
     "that minimizes",
     lambda c, x: {id(p) for part in x.param_groups for p in part["params"]}
     <= {id(p) for p in c["policy"].parameters()}
     and any(p.requires_grad for part in x.param_groups for p in part["params"])
     and not any(part.get("maximize") for part in x.param_groups)),
    ("model", "a torch.nn.Module; a target in float32 or float64, attn_implementation \"sdpa\" or "
     '"eager", its weights each a Parameter in a memory of its own (tied: one Parameter, of no '
     "embedding with a padding_idx), none with a hook, max_norm, scale_grad_by_freq or sparse, "
     "outside of torch.autocast and torch.inference_mode, in a reward no part of the policy but a "
     "copy (copy.deepcopy); a policy " + _POLICY,
     lambda c, x: c.target(x) if "examples" in c else x.generation_config),
    ("policy", _POLICY, lambda c, x: x.generation_config),
    ("reference?", _POLICY + ", and a copy (copy.deepcopy) that the policy's update does not move",
     lambda c, x: x.generation_config and ("policy" not in c or _apart(c["policy"], x))),
    ("group?", "a process group: one model and examples of one shape on all its processes, a number"
     " of prompts that it divides", _Call.group),
    ("examples", "Examples on the model's device: int64 tokens (N, L) in its vocabulary and places,"
     " a mask of 0 and 1 with a label in each row, none in column 0 (put a start token there)",
     lambda c, x: isinstance(x, Examples) and c.texts(*x, "N L") and c["L"] - 1 <= c.places
     and not x.mask[:, 0].any()),
    ("prompts", "int64 token ids in the model's vocabulary and an attention mask, padded on the "
     'left: a pair, or tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")',
     _Call.prompts),
    ("rollouts", "Rollouts: prompts padded on the left, int64 tokens in the model's vocabulary and "
     "places, a mask of 0 and 1 with a label in each row", lambda c, x:
     isinstance(x, Rollouts) and c.prompts(x[:2], "N") and c.texts(*x[2:], "N L_new")
     and c["P"] + c["L_new"] - 1 <= c.places),
    ("mask", "0 and 1, with a label in each row, (N L_new); where tau is (N), (N) will do",
     lambda c, x: c.mask(x, "N L_new" if "L_new" in c else "N L_new or N")),
    ("tau", _FINITE + "(N or N L_new), outside of torch.autocast", lambda c, x:
     c.finite(x, "N or N L_new") and not torch.is_autocast_enabled(x.device.type)),
    ("advantages", _FINITE + "(N or N L_new)", lambda c, x: c.finite(x, "N or N L_new")),
    ("log_probs kl?", _FINITE + "(N L_new)", lambda c, x: c.finite(x, "N L_new")),
    ("entropy", _FINITE + "(N L_new), or None (in `token_log_probs` True or False)", lambda c, x:
     isinstance(x, bool) if "rollouts" in c else x is None or c.finite(x, "N L_new")),
    ("weights?", _FINITE + "(N or N L), in tau's shape", lambda c, x: c.finite(
        x, {True: "N L", None: "N or N L"}.get(c.get("per_token"), "N"))),
]
_RULES = {name.strip("?"): (what + ", or None" * ("?" in name), right, "?" in name)
          for names, what, right in _TABLE for name in names.split()}
