"""Dataset Policy Gradient (DPG): train a generator so that a model trained on its text scores well.

A generator pi_theta writes a dataset D = {x_1..x_n}. A target model is trained on D by ordinary
supervised fine-tuning, A(w, D), where example i has loss weight w_i. A differentiable metric Phi
(higher is better) scores the trained target. DPG rewards each example with its metagradient,

    tau_i = d Phi(A(w, D)) / d w_i   at w = 1         (positive: more weight on x_i raises Phi)

and improves the generator by policy gradient, theta <- theta + lr * sum_i tau_i grad log pi(x_i).

The method is from "Synthetic Data for any Differentiable Target" (Thrush et al., 2026),
https://arxiv.org/abs/2604.08423v1; sections and equations cited below are that version's. The code
here is written from the text of the paper, and test_dpg.py holds it against the truth.

    symbol      name here               is                                          shape
    D           examples                token rows, and which tokens are labels     (N, L), (N, L)
    w           weights                 loss weights, per example or per token      (N,) or (N, L)
    l_i         -                       (1/L) sum_t mask_it * nll_it                scalar
    A           sft, with an optimizer  one pass of T steps over N = T*B examples   -> parameters
    T, B        steps, N // steps       inner steps, examples per minibatch         int
    Phi         metric                  callable(parameters) -> scalar, to maximise
    tau         Attribution.tau         the metagradient, the reward                (N,) or (N, L)
    pi_theta    policy                  the generator, a model with `generate`
    x_i         Rollouts.tokens         what the policy wrote after its prompt      (N, L_new)
    G           samples                 rollouts of one prompt, adjacent rows       int

Departures from the paper, numbered, each with what it costs in bias:

 1. One policy update per step, on all rollouts at once, not clipped minibatches over several
    updates. No importance ratio, hence no clipping bias; it costs generator steps.
 2. The loss of a step is a mean over B rows, a row's loss is divided by the constant L, and masked
    positions count in it. No sample can change a denominator, so w_i = 0 leaves no trace of x_i and
    grad F = E[sum_i (Phi(w = 1) - Phi(w_i = 0)) grad log pi(x_i)] holds exactly, for any optimizer
    and T. tau_i is the first-order stand-in for that difference; that is DPG's only bias. It is
    zero where Phi is affine in each w_i; with SGD it falls with lr and with each example's share
    1/B. (The official code sums micro-batch means: its eps_root is on another scale.)
 3. Baselines are a choice, "none" by default; the paper's GRPO centres each group of G. tau_j of
    another example depends on x_i through the shared training run, so a baseline made of rewards
    moves the expectation. "loo" does not where tau_j cannot see x_i (T = 1, SGD, Phi linear);
    "mean" holds tau_i itself and scales by (n - 1) / n even there. It buys variance with bias.
 4. Per-token credit: weights w_it per token give tau_it in the same double backward. The reward of
    token t is the discounted sum of tau_is over s >= t. With discount = 1 this is the first-order
    stand-in for Phi(w = 1) - Phi(w_is = 0 for s >= t), where the second run does not see x_it: with
    that difference the policy gradient is exact. discount < 1 drops what a token does as context
    for later ones: biased, with less variance.
 5. An entropy bonus and a KL term to a reference policy, both off by default, both exact sums over
    the vocabulary at each sampled position. They change the objective, not the estimator of Phi;
    how theta changes which positions are visited is left out of their gradient, as is common.
 6. Scaled advantages divide by the group's own spread, with no absolute constant: rewards are 1e-4
    to 1e-9. Scaling by a sampled spread changes the step length and adds bias of order 1/n.

Where tau goes blind: at T = 1 Adam's step is g / (sqrt(g^2 + eps_root) + eps). Coordinates with |g|
well above sqrt(eps_root) are saturated: they move by lr whatever the weights are, and add nothing
to tau. `metagradient` returns the unsaturated share of each step (`AdamW.seen`). Choose eps_root
large against (|grad l_i| / B)^2, the square of one example's share of a minibatch's gradient: the
bias of tau is 0.05 with eps_root = 10 times that and 0.2 with 1 (enumerated, T = 1,
demos/estimators.py, which also shows a better estimator for where eps_root must stay small).

Not here: several passes over D, learning-rate schedules or gradient clipping inside A, bfloat16.

Usage (a test runs this):

    >>> import torch, dpg
    >>> _ = torch.manual_seed(0)
    >>> target = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5)).double()
    >>> D = dpg.Examples(torch.tensor([[0, 1, 2], [0, 3, 4]]), torch.tensor([[0, 1, 1], [0, 1, 1]]))
    >>> wanted = dpg.Examples(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]))
    >>> phi = dpg.lm_metric(target, wanted)
    >>> result = dpg.metagradient(target, D, phi, dpg.SGD(lr=0.1))
    >>> result.tau.tolist()[0] > 0 > result.tau.tolist()[1]
    True
"""

import collections
import copy
import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

Params = dict[str, Tensor]  # keyed as model.named_parameters(): tied weights stand once
Metric = Callable[[Params], Tensor]


# ------------------------------------------------------------------------------ data and optimizers


class Examples(NamedTuple):
    """A dataset D (section 3.1): rows of token ids, and which of them are labels of the loss."""

    tokens: Tensor  # (N, L) int64
    mask: Tensor  # (N, L) bool, int or 0/1 float; column 0 has nothing to predict it from, so 0


@dataclass(frozen=True)
class SGD:
    """Plain gradient descent, p <- p - lr * g, as a pure function; differentiable."""

    lr: float

    def __post_init__(self):
        _check_number(self.lr, "lr", above=True)

    def init(self, params: Params) -> dict:
        return {}

    def update(self, params: Params, grads: Params, state: dict) -> tuple[Params, dict]:
        return {k: p - self.lr * grads[k] for k, p in params.items()}, state

    def seen(self, state: dict) -> float:
        return 1.0  # the step is proportional to the gradient


@dataclass(frozen=True)
class AdamW:
    """AdamW as a pure function; differentiable, once (appendix E for the default betas).

    p <- p - lr * (m_hat / (sqrt(v_hat + eps_root) + eps) + weight_decay * p)

    eps_root stands inside the root: sqrt has no finite derivative at 0, and a coordinate whose
    gradient is 0 would turn every metagradient into NaN. It also sets which coordinates tau can see
    (header). With eps_root = 0 this is torch.optim.AdamW.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_root: float = 1e-9
    weight_decay: float = 0.0

    def __post_init__(self):
        _check_number(self.lr, "lr", above=True)
        _require(isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
                 and all(_is_number(b) and 0 <= b < 1 for b in self.betas),
                 f"betas must be two numbers in [0, 1), got {self.betas!r}")
        for name in ("eps", "eps_root", "weight_decay"):
            _check_number(getattr(self, name), name)

    def init(self, params: Params) -> dict:
        def zeros():
            return {k: torch.zeros_like(p) for k, p in params.items()}
        return {"step": 0, "m": zeros(), "v": zeros()}

    def update(self, params: Params, grads: Params, state: dict) -> tuple[Params, dict]:
        step, new, m, v = state["step"] + 1, {}, {}, {}
        for k, p in params.items():
            new[k], m[k], v[k] = _AdamW.apply(p, grads[k], state["m"][k], state["v"][k], self, step)
        return new, {"step": step, "m": m, "v": v}

    def seen(self, state: dict) -> float:
        """How much of the last step still depends on the size of its gradient, 0 to 1.

        At T = 1 a coordinate's step u = g / (r + eps), r = sqrt(g^2 + eps_root), has the slope
        s u / g with s = (eps_root + eps r) / (r (r + eps)); this is the mean of s, weighted by |u|.
        1 is as with SGD; at 0 the step is the gradient's sign, and tau is blind. For T > 1 with
        v_hat for g^2, m_hat for g. Large tensors are measured at every k-th coordinate.
        """
        strides = [(x.numel() // 2**10) | 1 for x in state["m"].values()]  # odd: no matrix's column
        m, v = ([x.detach().flatten()[::k] for x, k in zip(state[name].values(), strides)]
                for name in ("m", "v"))
        k = torch.tensor(strides).repeat_interleave(torch.tensor([len(x) for x in m]))
        m, v = torch.cat(m).cpu().double(), torch.cat(v).cpu().double()
        r = (v / (1 - self.betas[1] ** state["step"]) + self.eps_root).sqrt().clamp(min=1e-150)
        u = k * m.abs() / (r + self.eps)
        s = (self.eps_root + self.eps * r) / (r * (r + self.eps))
        return float((u * s).sum() / u.sum()) if u.any() else 1.0


class _AdamW(torch.autograd.Function):
    """One tensor's update and, by hand, its derivative: autograd's takes three times the passes
    over memory, which at small batches is a fifth of the whole. With c_i = 1 - b_i^step,

        m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2,   p' = (1 - lr wd) p - rate m' / root
        rate = lr sqrt(c2) / c1,  root = sqrt(v' + c2 eps_root) + sqrt(c2) eps
    """

    @staticmethod
    def forward(ctx, p, g, m, v, o, step):
        (b1, b2), c1, c2 = o.betas, 1 - o.betas[0] ** step, 1 - o.betas[1] ** step
        ctx.betas, ctx.keep, ctx.rate = o.betas, 1 - o.lr * o.weight_decay, o.lr * c2**0.5 / c1
        ctx.eps, ctx.eps_root = c2**0.5 * o.eps, c2 * o.eps_root
        m = m.lerp(g, 1 - b1)
        v = (b2 * v).addcmul_(g, g, value=1 - b2)
        root = (v + ctx.eps_root).sqrt_().add_(ctx.eps)
        ctx.save_for_backward(g, m, v)
        return torch.addcdiv(ctx.keep * p if ctx.keep != 1 else p, m, root, value=-ctx.rate), m, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dp, dm, dv):  # the adjoints of p', m', v'
        (g, m, v), (b1, b2) = ctx.saved_tensors, ctx.betas
        root = (v + ctx.eps_root).sqrt_().add_(ctx.eps)
        _require(ctx.eps_root > 0 or bool((root > ctx.eps).all()), "eps_root = 0, but the gradient "
                 "of a coordinate is exactly 0, where Adam has no derivative; set eps_root > 0")
        ratio = dp / root
        dm = torch.add(dm, ratio, alpha=-ctx.rate)
        dv = torch.addcdiv(dv, ratio.mul_(m), root.mul_(root - ctx.eps), value=ctx.rate / 2)
        dg = torch.addcmul((1 - b1) * dm, g, dv, value=2 * (1 - b2))
        return ctx.keep * dp if ctx.keep != 1 else dp, dg, dm.mul_(b1), dv.mul_(b2), None, None


Optimizer = SGD | AdamW


# ------------------------------------------------------------------- the learning algorithm A(w, D)


def sft(model: nn.Module, examples: Examples, optimizer: Optimizer, *,
        weights: Tensor | None = None, steps: int = 1, microbatch: int | None = None) -> Params:
    """A(w, D), section 3.1: the parameters after one pass of supervised fine-tuning, as a dict.

    The N examples are split in order into `steps` minibatches of B = N / steps. The loss of one is
    (1/B) sum_i w_i l_i with l_i = (1/L) sum_t mask_it * nll_it. `weights` is (N,), or (N, L) to
    weight each token's nll; None is all ones. The result is differentiable (once) in `weights`
    where these require gradients. The model itself is not changed: the run starts from its
    parameters and a new optimizer state at every call. Parameters with requires_grad=False are
    constants. A step's gradient is summed over micro-batches of `microbatch` rows: less memory,
    the same numbers. None: all rows at once, but on a CPU about 2000 tokens, which stay in its
    cache.

    Errors: ValueError for data, weights or steps that do not fit together, a model with active
    dropout, in half precision, or with an attention kernel that has no second derivative.
    """
    _check_run(model, examples, steps, microbatch)
    n, length = examples.tokens.shape
    if weights is None:
        weights = _ones(model, (n,))
    _check_weights(weights, examples, (n,), (n, length))
    _check_optimizer(optimizer)
    params, frozen = _parameters(model)
    loss, state = _Loss(model, frozen, microbatch), optimizer.init(params)
    graph = weights.requires_grad and torch.is_grad_enabled()
    for batch, w in _minibatches(examples, weights, steps):
        grads, _ = loss.gradient(params, batch, w, graph)
        with torch.set_grad_enabled(graph):
            params, state = optimizer.update(params, grads, state)
    return _merge(model, params, frozen)


@dataclass(frozen=True)
class _Loss:
    """The loss of a minibatch, (1/B) sum_i w_i l_i, and its derivatives. They are sums over rows:
    taken `microbatch` rows at a time, and each process of `group` has rows of its own."""

    model: nn.Module
    frozen: Params
    microbatch: int | None = None
    group: "dist.ProcessGroup | None" = None

    def gradient(self, params, batch, weights, graph=False):
        """d loss / d params, and the loss; with a graph it can be differentiated in both inputs."""
        params = params if graph else _leaf(params)
        total, value = None, 0
        for part, w in self._parts(batch, weights):
            grads, part_value = self._part(params, part, w, len(batch.tokens), graph)
            total = grads if total is None else [a + b for a, b in zip(total, grads)]
            value = value + part_value
        *total, value = _all_reduce([*total, value], self.group)
        return dict(zip(params, total)), value

    def pull_back(self, params, batch, weights, adjoint, second):
        """With s = <gradient, adjoint>: d s / d weights, this process's rows of tau; and
        d s / d params, a Hessian-vector product (not `second`: []). None where s is blind to it."""
        inputs = [weights, *(params.values() if second else ())]
        total = [None] * len(inputs)
        for part, w in self._parts(batch, weights):
            grads, _ = self._part(params, part, w, len(batch.tokens), True)
            outputs, sides = _linked(grads, adjoint)
            total = _add(total, torch.autograd.grad(outputs, inputs, sides, allow_unused=True))
        tau, *products = total
        if self.group is not None:  # what this process's rows do not reach, another's may
            products = [torch.zeros_like(p) if x is None else x
                        for p, x in zip(inputs[1:], products, strict=True)]
        return tau, _all_reduce(products, self.group)

    def whole(self, batch):
        """Whether this process computes the minibatch, all of it, and in one part."""
        rows = len(batch.tokens)
        return self.group is None and _rows_at_once(self.microbatch, batch.tokens) >= rows

    def _parts(self, batch, weights):
        size = _rows_at_once(self.microbatch, batch.tokens)
        parts = (x.split(size) for x in (*batch, weights))
        return [(Examples(t, m), w) for t, m, w in zip(*parts, strict=True)]

    def _part(self, params, batch, weights, rows, graph):
        rows *= 1 if self.group is None else dist.get_world_size(self.group)  # of all processes: B
        w = weights[:, 1:] if weights.ndim == 2 else weights[:, None]
        # Activation checkpointing computes anew after `functional_call` has put the model's own
        # parameters back: it would be wrong in silence. It works by hooks.
        with torch.enable_grad(), disable_saved_tensors_hooks("model: activation checkpointing "
                                                              "inside cannot be attributed"):
            nll = _nll(self.model, params | self.frozen, batch)  # (rows, L - 1): columns 1..L-1
            loss = (w * nll).sum() / (rows * batch.tokens.shape[1])
            # A parameter that the logits do not depend on has gradient zero.
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=graph,
                                        materialize_grads=True)
        return grads, loss.detach()


def _all_reduce(tensors, group):
    """The sums over the processes. Not in place: autograd may return one tensor twice."""
    if group is None or not tensors:
        return tensors
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat, group=group)
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]


def _rows_at_once(microbatch, tokens):
    """Unless told otherwise all, but on a CPU what stays in its cache (demos/benchmark.py)."""
    n, length = tokens.shape
    return microbatch or (max(1, 2048 // length) if tokens.device.type == "cpu" else n)


def _nll(model, params, examples):
    """-log p of every label given the tokens before it, 0 where the mask is 0: (N, L - 1)."""
    # Rows are padded on the right and the model is causal: no label sees what follows it, so no
    # attention mask is needed.
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels can be differentiated only once
        # A cache of keys and values is of no use in training, and costs memory.
        cache = _accepted(model, use_cache=False) if hasattr(model, "config") else {}
        out = functional_call(model, params, (examples.tokens[:, :-1],), cache)
        logits = _logits(out, model)  # (N, L - 1, V)
    labels = examples.tokens[:, 1:]
    largest = int(labels.max())
    _require(largest < logits.shape[2],
             f"tokens must be below the vocabulary's {logits.shape[2]}, got {largest}")
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return nll.view_as(labels) * examples.mask[:, 1:]


def _accepted(model, **options):
    """Those of the options that the model's forward takes."""
    known = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())  # as wrappers do
    return {k: v for k, v in options.items() if takes_all or k in known}


def lm_metric(model: nn.Module, examples: Examples, *, microbatch: int | None = None) -> Metric:
    """A metric: the mean log-likelihood per label token of `examples`, in nats.

    The text targets of sections 4.4 and 4.5 are metrics of this form. With `microbatch` the logits
    exist for so many rows at a time, and are computed again in the backward pass.
    """
    _check_examples(examples, "examples", model)
    _check_microbatch(microbatch)
    count = examples.mask.count_nonzero()

    def total(params: Params, part: Examples) -> Tensor:
        return _nll(model, params, part).sum()

    def metric(params: Params) -> Tensor:
        if microbatch is None:
            return -total(params, examples) / count
        parts = (x.split(microbatch) for x in examples)
        return -sum(checkpoint(total, params, Examples(*part), use_reentrant=False,
                               preserve_rng_state=False) for part in zip(*parts)) / count

    return metric


# ------------------------------------------------------------------------------- the metagradient


class NotFinite(FloatingPointError, ValueError):
    """NaN or infinity arose in a run. The message names where, and the likely cause."""


class Attribution(NamedTuple):
    """What `metagradient` returns; all detached."""

    tau: Tensor  # (N,), or (N, L) with 0 where the mask is 0
    metric: float  # Phi(A(w, D)), at w = 1 unless given
    params: Params  # A(w, D)
    losses: Tensor  # (steps,): minibatch k's loss before update k
    seen: Tensor | None = None  # (steps,): `AdamW.seen` of update k; below 0.9 mistrust tau


def metagradient(model: nn.Module, examples: Examples, metric: Metric, optimizer: Optimizer, *,
                 steps: int = 1, per_token: bool = False, method: str = "unroll",
                 weights: Tensor | None = None, microbatch: int | None = None,
                 checkpoint_every: int = 1, offload: bool = False,
                 group: "dist.ProcessGroup | None" = None) -> Attribution:
    """tau = d Phi(A(w, D)) / d w at w = 1 (section 3.1), exact, by double backward.

    With per_token=True w has an entry per token: tau is (N, L), and its row sums are the
    per-example tau. `weights`, of tau's shape, takes the derivative there instead of at 1
    (demos/estimators.py says what for). The two methods give the same numbers:

    "unroll" keeps the graph of the whole run. It is the definition, and the faster one; its memory
    grows with N.

    "replay" stores states and rebuilds the rest, one step and, of this, `microbatch` rows at a time
    (None: as in `sft`): beyond the states its memory does not grow with T, nor, with `microbatch`
    set, with N. One more forward and backward pass of each step, but of the last one only where it
    is more than one micro-batch or there is a `group`. A state is the parameters, the optimizer's
    moments and the gradient, 4 times the parameters with AdamW (what the update of an optimizer of
    your own keeps for its derivative comes on top). It is stored every `checkpoint_every` steps,
    with offload=True in host memory. From 2 on the states between are computed again: one more
    pass, T / k + k states.

    With a process `group` (replay only), `examples` are this process's rows, as many on each, and
    so is tau. Minibatch k of the run is the processes' k-th minibatches put together; `metric` must
    be the same function everywhere. (With "unroll", `microbatch` bounds no memory.) A process that
    refuses its arguments leaves the others waiting, as ever; `NotFinite` stops all.

    Errors: those of `sft`; ValueError for a metric that is not a scalar or does not depend on the
    parameters, for an unknown method, and for eps_root = 0 where a gradient is exactly 0;
    `NotFinite` for losses, a Phi or a tau that are not finite.
    """
    _check_run(model, examples, steps, microbatch, group)
    _check_optimizer(optimizer)
    _require(callable(metric), "metric must be a function of the parameters")
    _require(method in ("unroll", "replay"), f'method must be "unroll" or "replay", got {method!r}')
    _check_count(checkpoint_every, "checkpoint_every")
    _check_flag(per_token, "per_token")
    _check_flag(offload, "offload")
    for name, given in (("checkpoint_every", checkpoint_every != 1), ("offload", offload),
                        ("group", group is not None)):
        _require(not given or method == "replay", f'{name} needs method="replay"')
    shape = tuple(examples.tokens.shape if per_token else examples.tokens.shape[:1])
    weights = _check_weights(_ones(model, shape) if weights is None else weights, examples, shape)
    params, frozen = _parameters(model)
    loss = _Loss(model, frozen, microbatch, group)

    def measured(params):
        return _measure(metric, _merge(model, params, frozen))

    with torch.enable_grad():
        batches = _minibatches(examples, _leaf(weights), steps)
        if method == "unroll":
            found = _unroll(loss, batches, measured, optimizer, params)
        else:
            found = _replay(loss, batches, measured, optimizer, params, checkpoint_every, offload)
    taus, phi, params, losses, seen = found
    _require(any(tau is not None for tau in taus), _BLIND)
    tau = torch.cat([torch.zeros_like(w) if tau is None else tau
                     for tau, (_, w) in zip(taus, batches, strict=True)]).detach()
    bad = (~torch.isfinite(tau)).nonzero()[:1, 0].tolist()
    bad = [(rank, *rows) for rank, rows in enumerate(_everywhere(bad, group)) if rows]
    if bad:
        rank, row = bad[0]
        where = "" if group is None else f" of process {rank}"
        raise NotFinite(f"tau of example {row}{where}, in step {row // len(batches[0][1])} of the "
                        "inner run, is not finite: its derivatives overflow; lower lr or raise "
                        "eps_root")
    if per_token:
        tau = torch.where(examples.mask != 0, tau, 0)  # exactly 0, where autograd leaves -0
    params = {k: p.detach() for k, p in _merge(model, params, frozen).items()}
    return Attribution(tau, phi.item(), params, torch.stack(losses), torch.tensor(seen))


_BLIND = "metric does not depend on any parameter that training on the examples changes"


def _unroll(loss, batches, metric, optimizer, params):
    """The definition: train with a graph, then differentiate the metric."""
    state, losses, seen = optimizer.init(params), [], []
    for batch, w in batches:
        grads, value = loss.gradient(params, batch, w, graph=True)
        params, state = optimizer.update(params, grads, state)
        losses.append(value)
        seen.append(optimizer.seen(state))
    _check_losses(losses)
    phi = metric(params)
    # autograd walks only the paths that end in a weight, and none passes through the initial
    # parameters: no Hessian-vector product is spent on the first step, so none at all at T = 1.
    taus = torch.autograd.grad(phi, [w for _, w in batches], allow_unused=True)
    return taus, phi, params, losses, seen


def _replay(loss, batches, metric, optimizer, params, every, offload):
    """The same by the chain rule. z_k is (parameters, optimizer state) before step k, g_k(z_k, w_k)
    the gradient, z_{k+1} = update(z_k, g_k). From the end back, the adjoint of x being d Phi / d x:

        adjoint of g_k = (d update / d g)^T adjoint of z_{k+1}
        tau_k          = (d g_k / d w_k)^T adjoint of g_k
        adjoint of z_k = (d update / d z)^T adjoint of z_{k+1} + (d g_k / d z)^T adjoint of g_k
    """
    device, starts = next(iter(params.values())).device, range(0, len(batches), every)
    z, kept, losses, seen = (params, optimizer.init(params)), [], [], []

    def link(z, grads):
        """A step: z, g, and the z after, with the graph of the update."""
        return z, grads, optimizer.update(z[0], grads, z[1])

    def walk(z, first, back):
        """Steps first .. first + every - 1, as links, and the z after. If the way back begins here,
        the last g keeps its graph too, where that is no larger than `pull_back`'s."""
        trail, stop = [], min(first + every, len(batches))
        for k in range(first, stop):
            z = _leaf(z)
            graph = back and k + 1 == stop and loss.whole(batches[k][0])
            grads, value = loss.gradient(z[0], *batches[k], graph)
            trail.append(link(z, grads if graph else _leaf(grads)))
            z = _map(Tensor.detach, trail[-1][2])
            if len(losses) < len(batches):  # the first time
                losses.append(value)
                seen.append(optimizer.seen(z[1]))
        return trail, z

    for first in starts:
        trail = None  # the states of one stretch are enough
        trail, z = walk(z, first, back=first == starts[-1])
        if first != starts[-1]:
            stored = trail[0] if every == 1 else trail[0][:1]  # only z where it is walked again
            kept.append(_map(lambda x: x.detach().to("cpu"), stored[:2]) if offload else stored)
    _check_losses(losses)
    trained = _leaf(z[0])
    phi = metric(trained)
    taus, state = [], _tensors(z[1])
    adjoint = [*torch.autograd.grad(phi, list(trained.values()), allow_unused=True),
               *(None for _ in state)]
    for first in reversed(starts):
        if first != starts[-1]:
            stored = kept.pop()
            if offload:
                stored = _leaf(_map(lambda x: x.to(device), stored))
            if every > 1:
                trail, _ = walk(*stored, first, back=True)
            else:
                trail = [link(*stored) if offload else stored]
        while trail:
            k = first + len(trail) - 1
            z, grads, after = trail.pop()
            graph = not all(g.is_leaf for g in grads.values())
            outputs, sides = _linked(_tensors(after), adjoint)
            # The first step's parameters and state need no adjoint.
            inputs = [*([batches[k][1]] if graph else grads.values()), *(_tensors(z) if k else ())]
            found = torch.autograd.grad(outputs, inputs, sides, allow_unused=True)
            if graph:  # through g too
                tau, *adjoint = found
            else:
                of_g, of_z = found[:len(grads)], found[len(grads):]
                tau, products = loss.pull_back(z[0], *batches[k], of_g, second=k > 0)
                adjoint = [*_add(of_z[:len(products)], products), *of_z[len(products):]]
            taus.append(tau)
    return taus[::-1], phi, trained, losses, seen


def _linked(outputs, adjoints):
    """The outputs that have an adjoint and a graph, and their adjoints."""
    pairs = [(x, a) for x, a in zip(outputs, adjoints, strict=True)
             if a is not None and x.requires_grad]
    return [x for x, _ in pairs], [a for _, a in pairs]


def _add(first, second):
    """The sums, entry by entry, where None is zero."""
    return [a if b is None else b if a is None else a + b
            for a, b in zip(first, second, strict=True)]


def _map(change, tree):
    """The same nest of dicts, tuples and lists (parameters, states), each tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {k: _map(change, x) for k, x in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_map(change, part) for part in tree)
    if not (tree is None or isinstance(tree, (int, float, str))):
        raise TypeError("optimizer: its state must be made of tensors and numbers in dicts, tuples "
                        f"and lists, got {type(tree).__name__}")
    return tree


def _leaf(tree):
    """The same tree with each tensor a new leaf of the graph."""
    return _map(lambda x: x.detach().requires_grad_(), tree)


def _tensors(tree) -> list[Tensor]:
    """The tensors of such a nest, in order."""
    found = []
    _map(found.append, tree)
    return found


def _measure(metric, params):
    phi = metric(params)
    _require(isinstance(phi, Tensor) and phi.numel() == 1,
             "metric must return a tensor with one element")
    _require(phi.requires_grad, _BLIND)
    if not torch.isfinite(phi):
        raise NotFinite(f"metric is {phi.item()} after the last step of the inner run; is it "
                        "defined for these parameters? Otherwise lower lr")
    return phi.reshape(())


def _minibatches(examples, weights, steps):
    parts = (x.chunk(steps) for x in (*examples, weights))
    return [(Examples(t, m), w) for t, m, w in zip(*parts, strict=True)]


def _parameters(model):
    """The parameters in two dicts: trained (new leaves on the same memory), and constant."""
    named = dict(model.named_parameters())
    params = {k: p.detach().requires_grad_() for k, p in named.items() if p.requires_grad}
    return params, {k: p.detach() for k, p in named.items() if not p.requires_grad}


def _merge(model, params, frozen):
    both = params | frozen
    return {k: both[k] for k, _ in model.named_parameters()}


# ------------------------------------------------------------------------ the generator policy pi


class Rollouts(NamedTuple):
    """What a policy wrote. N = prompts x samples rows; the samples of one prompt are adjacent."""

    prompt_tokens: Tensor  # (N, P) int64, padded on the left
    prompt_mask: Tensor  # (N, P) int64
    tokens: Tensor  # (N, L_new) int64
    mask: Tensor  # (N, L_new) int64: 1 up to and including the first end-of-text

    def examples(self, start: int) -> Examples:
        """The dataset D: rows [start] + rollout, no prompt (section 3.1), (N, L_new + 1)."""
        _require(_is_whole(start) and 0 <= start < 2**31,
                 f"start must be a token id, got {start!r}")
        tokens = F.pad(self.tokens, (1, 0), value=start)
        return Examples(tokens, F.pad(self.mask, (1, 0), value=0))


@torch.no_grad()
def generate(model: nn.Module, prompts, *, samples: int, max_new_tokens: int,
             temperature: float = 1.0, seed: int | Sequence[int], eos_token_id: int | None = None,
             microbatch: int | None = None) -> Rollouts:
    """Sample from the policy: `samples` rollouts for each prompt, in `max_new_tokens` columns.

    `prompts` is a pair (tokens, attention mask), both (P_n, P) and padded on the left, or what a
    tokenizer returns with padding_side="left". A rollout ends at the first end-of-text, by default
    the one of the model's generation config. Temperature 0 takes the most likely token.

    Each prompt has a random stream of its own, from `seed` and its place, or from its own of a
    sequence of seeds: what is written for it does not depend on which others it is computed with,
    at most `microbatch` rows at once (but at least one prompt's). The global random state is not
    used. (Give each step of a training run a seed of its own.)
    """
    tokens, mask = _check_prompts(prompts)
    _check_count(samples, "samples")
    _check_count(max_new_tokens, "max_new_tokens")
    _check_number(temperature, "temperature")
    _check_microbatch(microbatch)
    _check_policy(model)
    _check_tokens(model, tokens, "prompts", tokens.shape[1] + max_new_tokens - 1)
    seeds = _prompt_seeds(seed, len(tokens)) if _is_whole(seed) else seed
    _require(isinstance(seeds, Sequence) and len(seeds) == len(tokens)
             and all(_is_whole(each) and 0 <= each < 2**63 for each in seeds),
             f"seed must be a whole number, or one of 63 bits for each of {len(tokens)} prompts")
    own = model.generation_config
    eos = own.eos_token_id if eos_token_id is None else eos_token_id
    eos = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    _require(all(_is_whole(each) and 0 <= each < 2**31 for each in eos),
             f"eos_token_id must be a token id, or several, got {eos_token_id!r}")
    pad = eos[0] if eos else 0
    # A hub model's generation config may cut or bend the distribution, and transformers merges it
    # into any config given to `generate`: samples would not come from pi. This shallow copy of the
    # model shares its parameters and has a config of its own.
    sampler = copy.copy(model)
    sampler.generation_config = type(own)(eos_token_id=eos or None, pad_token_id=pad)
    parts, size = [], len(tokens) if microbatch is None else max(1, microbatch // samples)
    for first in range(0, len(tokens), size):
        part = slice(first, first + size)  # of the prompts
        some, known = (x[part].repeat_interleave(samples, 0) for x in (tokens, mask))
        noise = [] if temperature == 0 else [
            _gumbel(temperature, samples, seeds[part], tokens.device)]
        new = sampler.generate(some, attention_mask=known, max_new_tokens=max_new_tokens,
                               do_sample=False, logits_processor=noise)[:, some.shape[1]:]
        parts.append(F.pad(new, (0, max_new_tokens - new.shape[1]), value=pad))
    new = torch.cat(parts)  # (N, L_new)
    ended = torch.isin(new, torch.tensor(eos, dtype=new.dtype, device=new.device)).long()
    tokens, mask = (x.repeat_interleave(samples, 0) for x in (tokens, mask))  # (N, P)
    return Rollouts(tokens, mask, new, (ended.cumsum(1) - ended == 0).long())


def _prompt_seeds(seed, n):
    """A seed for each of n prompts: hashed, since streams of neighbouring seeds may be alike."""
    return [random.Random(f"{seed} {place}").getrandbits(63) for place in range(n)]


def _gumbel(temperature, samples, seeds, device):
    """Turns the choice of the largest logit into a sample from softmax(logits / temperature):
    argmax_j (logit_j / temperature - log e_j), where the e_j are exponential (Gumbel-max)."""
    streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def perturbed(_, logits):  # (rows, V)
        uniform = torch.empty(len(logits), 2, logits.shape[1], device=logits.device,
                              dtype=torch.float32)
        for rows, stream in zip(uniform.split(samples), streams, strict=True):
            rows.uniform_(generator=stream)
        # A float32 has 24 random bits; with as many more no token is too improbable to be drawn.
        coarse, fine = uniform.unbind(1)
        exponential = fine.mul_(2.0**-24).add_(coarse).neg_().log1p_().neg_()
        return logits / float(temperature) - exponential.log_()

    return perturbed


class TokenLogProbs(NamedTuple):
    """log pi of each sampled token, and what else was asked for; all (N, L_new), 0 off the mask."""

    log_probs: Tensor
    entropy: Tensor | None  # of the next-token distribution, nats
    kl: Tensor | None  # KL(pi || reference) of the next-token distributions, nats


def token_log_probs(model: nn.Module, rollouts: Rollouts, *, temperature: float = 1.0,
                    entropy: bool = False, reference: nn.Module | None = None):
    """log pi_theta(x_it | prompt, x_i<t), (N, L_new), 0 where the mask is 0; differentiable.

    With entropy=True or a reference model the result is a `TokenLogProbs`: entropy and KL are exact
    sums over the vocabulary, not estimates from the sampled token.
    """
    _check_number(temperature, "temperature", above=True)  # the choice at 0 has no gradient
    _check_policy(model)
    _check_rollouts(model, rollouts)
    _check_flag(entropy, "entropy")
    log_pi = _next_token_log_probs(model, rollouts, temperature)  # (N, L_new, V)
    mask = rollouts.mask
    chosen = log_pi.gather(2, rollouts.tokens[..., None])[..., 0] * mask
    if not entropy and reference is None:
        return chosen
    pi = log_pi.exp()
    entropies = -(pi * log_pi).sum(2) * mask if entropy else None
    kl = None
    if reference is not None:
        _check_policy(reference, "reference")
        with torch.no_grad():
            log_ref = _next_token_log_probs(reference, rollouts, temperature)
        _require(log_ref.shape == log_pi.shape, "reference must have the vocabulary of model, "
                 f"{log_pi.shape[2]} tokens, got {log_ref.shape[2]}")
        kl = (pi * (log_pi - log_ref)).sum(2) * mask
    return TokenLogProbs(chosen, entropies, kl)


def _next_token_log_probs(model, rollouts, temperature):
    tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], 1)[:, :-1]
    mask = torch.cat([rollouts.prompt_mask, torch.ones_like(rollouts.tokens)], 1)[:, :-1]
    length = rollouts.tokens.shape[1]
    # With padding on the left, positions count from a prompt's first real token, as in `generate`.
    out = model(tokens, attention_mask=mask, **_accepted(
        model, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
        logits_to_keep=length))
    logits = _logits(out, model)[:, -length:]
    # `generate` samples from float32 logits, whatever the model's type.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits / float(temperature), dim=2)


# ------------------------------------------------------------------------------------ the estimator


def advantages(tau: Tensor, mask: Tensor, *, group_size: int | None = None, baseline: str = "none",
               scale: bool = False, discount: float | None = None) -> Tensor:
    """Rewards to advantages, same shape as tau.

    tau is (N,), per example, and `discount` None; or (N, L_new), per token, and `discount` in
    [0, 1] makes the reward-to-go R_it = sum_{s >= t} discount^(s - t) tau_is (departure 4).

    Groups are `group_size` adjacent rows, None for the whole batch: G centres within a prompt
    (GRPO), N / T within an inner minibatch, whose rewards share a level. baseline "mean" subtracts
    the group's mean, "loo" the mean of the others (departure 3); per token, means are over the rows
    that have a label at the same position; one without others keeps its reward with "loo".
    scale=True divides by the group's standard deviation about the mean. A spread as small as
    rounding errors counts as zero: where a group (per token, a position of it) has none among
    several rows, "mean" and "loo" give exactly 0, and so does scale where the whole group has none.
    """
    _check_tensor(tau, "tau", floating=True)
    _check_tensor(mask, "mask")
    _require(tau.ndim in (1, 2) and len(tau) > 0 and tau.shape[-1] > 0,
             f"tau must be (N,) or (N, L_new), got {tuple(tau.shape)}")
    _require(bool(torch.isfinite(tau).all()), "tau must be finite")
    _require(mask.shape[:1] == tau.shape[:1],
             f"mask must have the N = {tau.shape[0]} rows of tau, got {tuple(mask.shape)}")
    _check_mask(mask, "mask")
    _require(baseline in ("none", "mean", "loo"),
             f'baseline must be "none", "mean" or "loo", got {baseline!r}')
    _check_flag(scale, "scale")
    n = tau.shape[0]
    size = n if group_size is None else group_size
    _require(_is_whole(size) and size >= 1 and n % size == 0,
             f"group_size must divide N = {n}, got {group_size!r}")
    if tau.ndim == 1:
        _require(discount is None, "discount needs tau per token, (N, L_new)")
        labels = torch.ones_like(tau)[:, None]
        reward = tau[:, None]
    else:
        _require(_is_discount(discount),
                 f"discount must be in [0, 1] when tau is per token, got {discount!r}")
        _require(mask.shape == tau.shape,
                 f"mask must have the shape of tau {tuple(tau.shape)}, got {tuple(mask.shape)}")
        labels = (mask != 0).to(tau.dtype)
        reward, columns = torch.zeros_like(tau[:, 0]), []
        for column in (tau * labels).flip(1).unbind(1):
            reward = column + discount * reward
            columns.append(reward)
        reward = torch.stack(columns[::-1], 1)
    # Divide by the largest reward of the group first: squares of 1e-20 do not exist in float32.
    labels = labels.view(-1, size, labels.shape[1])  # (groups, size, positions)
    reward = reward.view_as(labels) * labels
    unit = reward.abs().amax((1, 2), keepdim=True)  # (groups, 1, 1)
    unit = torch.where(unit > 0, unit, 1)
    reward = reward / unit
    count = labels.sum(1, keepdim=True)  # (groups, 1, positions)
    total = reward.sum(1, keepdim=True)
    level = total / count.clamp(min=1)
    high = torch.where(labels > 0, reward, -math.inf).amax(1, keepdim=True)
    low = torch.where(labels > 0, reward, math.inf).amin(1, keepdim=True)
    flat = (high - low <= (1e-12 if tau.dtype == torch.float64 else 1e-5)) & (count > 1)
    centred = torch.where(flat, 0, reward - level) * labels
    if baseline == "mean":
        value = centred
    elif baseline == "loo":
        others = (total - reward) / (count - 1).clamp(min=1)  # nobody else: no baseline
        value = torch.where(flat, 0, reward - others) * labels
    else:
        value = reward
    if scale:
        square = centred.square().sum((1, 2), keepdim=True)
        spread = (square / labels.sum((1, 2), keepdim=True)).sqrt()
        value = torch.where(spread > 0, value / spread, 0)
    else:
        value = value * unit
    return value.reshape(tau.shape)


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor, *,
                         entropy: Tensor | None = None, entropy_coef: float = 0.0,
                         kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """-(1/N) sum_it A_it log pi_it: minus its gradient, times N, is the estimator (section 3.2).

    log_probs and mask are (N, L_new), advantages (N,) or (N, L_new). The optional terms
    -entropy_coef (1/N) sum_it H_it and kl_coef (1/N) sum_it KL_it take what `token_log_probs`
    gives. No token count stands in a denominator: dividing by it would favour some lengths.
    """
    for name, value in (("log_probs", log_probs), ("advantages", advantages)):
        _check_tensor(value, name, floating=True)
        _require(bool(torch.isfinite(value).all()), f"{name} must be finite")
    _check_tensor(mask, "mask")
    _require(log_probs.ndim == 2 and log_probs.numel() > 0,
             f"log_probs must be (N, L_new), got {tuple(log_probs.shape)}")
    _require(log_probs.shape == mask.shape, f"mask must have the shape of log_probs "
             f"{tuple(log_probs.shape)}, got {tuple(mask.shape)}")
    _check_mask(mask, "mask")
    _require(advantages.shape in (log_probs.shape, log_probs.shape[:1]),
             f"advantages must be (N,) or (N, L_new) for log_probs {tuple(log_probs.shape)}, "
             f"got {tuple(advantages.shape)}")
    n = log_probs.shape[0]
    each = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None]
    loss = -(each * log_probs * mask).sum() / n
    for name, term, coef, sign in (("entropy", entropy, entropy_coef, -1), ("kl", kl, kl_coef, 1)):
        _check_number(coef, f"{name}_coef")
        _require(coef == 0 or term is not None, f"{name}_coef needs {name}, from token_log_probs")
        if coef != 0:
            _check_tensor(term, name, floating=True)
            _require(term.shape == mask.shape, f"{name} must have the shape of log_probs")
            _require(bool(torch.isfinite(term).all()), f"{name} must be finite")
            loss = loss + sign * float(coef) * (term * mask).sum() / n
    return loss


class StepResult(NamedTuple):
    """What one `dpg_step` saw, of all processes together."""

    rollouts: Rollouts
    attribution: Attribution
    advantages: Tensor  # (N,) or (N, L_new)
    entropy: float  # of the policy, nats per token
    kl: float  # to the reference, nats per token (nan without one)


def dpg_step(policy: nn.Module, policy_optimizer: torch.optim.Optimizer, prompts,
             encode: Callable[[Rollouts], Examples], reward: Callable[[Examples], Attribution], *,
             samples: int, max_new_tokens: int, seed: int, temperature: float = 1.0,
             group_size: int | None = None, baseline: str = "none", scale: bool = False,
             discount: float | None = None, entropy_coef: float = 0.0, kl_coef: float = 0.0,
             reference: nn.Module | None = None, microbatch: int | None = None,
             group: "dist.ProcessGroup | None" = None) -> StepResult:
    """One iteration of Algorithm 1: write a dataset, train on it, attribute, improve the writer.

    `encode` makes the target's training rows of what was written: `Rollouts.examples` with a start
    token where the models share a tokenizer, or text encoded anew (then credit is per example).
    `reward` maps these to an `Attribution`: for DPG, `metagradient` with its other arguments bound
    (functools.partial). `policy` and `policy_optimizer` are changed in place; all else is as in the
    functions called. Each step needs a `seed` of its own.

    With a process `group` each process calls this with the same arguments (and `reward` bound to
    the group): it writes for every K-th prompt, attributes its own rows, and all make the same
    update from all rewards. Where K divides the prompts of each inner minibatch, these are those of
    a single process.
    """
    _check_step(policy, samples, seed, temperature, discount, entropy_coef, kl_coef, reference,
                microbatch)
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    tokens, mask = _check_prompts(prompts)
    _require(len(tokens) % world == 0,
             f"prompts must be a multiple of the {world} processes, got {len(tokens)}")
    how = dict(group_size=group_size, baseline=baseline, scale=scale)
    n = len(tokens) * samples
    advantages(torch.ones(n), torch.ones(n, 1), **how)  # refused now, not after the inner run
    share = slice(rank, None, world)
    rollouts = generate(policy, (tokens[share], mask[share]), samples=samples,
                        max_new_tokens=max_new_tokens, temperature=temperature,
                        seed=_prompt_seeds(seed, len(tokens))[share],
                        microbatch=microbatch)  # D ~ pi_theta
    attribution = reward(encode(rollouts))  # tau = d Phi(A(w, D)) / d w
    if not isinstance(attribution, Attribution):
        raise TypeError(f"reward must return an Attribution, got {type(attribution).__name__}")
    written = Rollouts(*(_gather(x, samples, group) for x in rollouts))
    attribution = attribution._replace(tau=_gather(attribution.tau, samples, group))
    tau = attribution.tau.to(written.mask.device)
    if tau.ndim == 2:
        tau = tau[:, 1:]  # the start token is no action
    _require(tau.shape in (written.mask.shape, written.mask.shape[:1]), "reward: tau must be (N,), "
             f"or (N, L_new + 1) for rows as Rollouts.examples makes them, got {tuple(tau.shape)}")
    credit = advantages(tau, written.mask, discount=discount, **how)
    mine = credit.unflatten(0, (-1, samples))[share].flatten(0, 1)
    policy.zero_grad()
    totals = tau.new_zeros(3)  # of entropy, KL, tokens
    size = _rows_at_once(microbatch, rollouts.tokens)
    for rows in zip(*(x.split(size) for x in rollouts), mine.split(size)):
        part, part_credit = Rollouts(*rows[:-1]), rows[-1]
        log_probs, entropy, kl = token_log_probs(policy, part, temperature=temperature,
                                                 entropy=True, reference=reference)
        loss = policy_gradient_loss(log_probs, part_credit, part.mask, entropy=entropy,
                                    entropy_coef=entropy_coef, kl=kl, kl_coef=kl_coef)
        (loss * len(part_credit) / len(credit)).backward()
        kl = entropy * math.nan if kl is None else kl
        totals += torch.stack([entropy.sum(), kl.sum(), part.mask.sum()]).detach()
    if group is not None:
        dist.all_reduce(totals, group=group)
        reached = _everywhere([p.grad is not None for p in policy.parameters()], group)
        for p, *somewhere in zip(policy.parameters(), *reached, strict=True):
            if any(somewhere):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad, group=group)
    for name, p in policy.named_parameters():  # summed: all processes stop, or none
        if p.grad is not None and not torch.isfinite(p.grad).all():
            raise NotFinite(f"the policy's gradient of {name} is not finite: its own training "
                            "diverged (lower the rate of policy_optimizer); nothing was changed")
    policy_optimizer.step()
    entropy, kl = (totals[:2] / totals[2]).tolist()
    return StepResult(written, attribution, credit, entropy, kl)


def _everywhere(value, group):
    """The value that each process has."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _gather(x, samples, group):
    """The rows of all processes, process r having those of prompts r, r + K, r + 2K ..."""
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack([part.unflatten(0, (-1, samples)) for part in parts], 1).flatten(0, 2)


# ------------------------------------------------------------------------------------------- checks


def _require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_discount(value):
    return _is_number(value) and 0 <= value <= 1


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(value, name, above=False):
    _require(_is_number(value) and 0 <= value < math.inf and (value > 0 or not above),
             f"{name} must be a finite number, {'above' if above else 'at least'} 0, got {value!r}")


def _check_flag(value, name):
    _require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")


def _check_tensor(value, name, floating=False):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    _require(not value.is_complex() and (value.is_floating_point() or not floating),
             f"{name} must be real{', in floating point' if floating else ''}, got {value.dtype}")


def _check_optimizer(optimizer):
    if not all(hasattr(optimizer, name) for name in ("init", "update", "seen")):
        raise TypeError(f"optimizer must have init, update and seen, as SGD and AdamW have, got "
                        f"{type(optimizer).__name__}")


def _check_step(policy, samples, seed, temperature, discount, entropy_coef, kl_coef, reference,
                microbatch):
    """What `dpg_step` would otherwise be refused for only after the inner run."""
    _check_policy(policy)
    _check_count(samples, "samples")
    _require(_is_whole(seed), f"seed must be a whole number, got {seed!r}")
    _check_number(temperature, "temperature", above=True)  # the choice at 0 has no gradient
    _require(discount is None or _is_discount(discount),
             f"discount must be None, or in [0, 1] when tau is per token, got {discount!r}")
    _check_number(entropy_coef, "entropy_coef")
    _check_number(kl_coef, "kl_coef")
    _require(kl_coef == 0 or reference is not None, "kl_coef needs a reference")
    if reference is not None:
        _check_policy(reference, "reference")
    _check_microbatch(microbatch)


def _check_weights(weights, examples, *shapes):
    _check_tensor(weights, "weights", floating=True)
    _require(weights.dtype in (torch.float32, torch.float64),
             f"weights must be float32 or float64, got {weights.dtype}")
    _require(weights.shape in shapes, f"weights must have shape {' or '.join(map(str, shapes))}, "
             f"got {tuple(weights.shape)}")
    _require(weights.device == examples.tokens.device, "weights must be on the model's device")
    _require(bool(torch.isfinite(weights).all()), "weights must be finite")
    return weights


def _check_losses(losses):
    for step, loss in enumerate(losses):
        if not torch.isfinite(loss):
            raise NotFinite(f"the loss of step {step} of the inner run is {loss.item()}: " + (
                "it diverged; lower lr" if step else "the model itself gives no finite loss"))


def _ones(model, shape):
    p = next(model.parameters())
    return torch.ones(shape, dtype=p.dtype, device=p.device)


def _logits(out, model):
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise TypeError(f"model must return logits (N, L, V) or an object with .logits; "
                        f"{type(model).__name__} returned {type(logits).__name__}")
    return logits


def _check_mask(mask, name):
    _require(bool(((mask == 0) | (mask == 1)).all()), f"{name} must hold only 0 and 1")
    empty = (mask.flatten(1) == 0).all(1).nonzero().flatten().tolist() if mask.ndim > 1 else []
    _require(not empty, f"{name} has no label in rows {empty[:5]}")


def _check_examples(examples, name, model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _require(any(True for _ in model.parameters()), "model has no parameters")
    if not isinstance(examples, Examples):
        raise TypeError(f"{name} must be Examples(tokens, mask), got {type(examples).__name__}")
    tokens, mask = examples
    _check_tensor(tokens, f"{name}.tokens")
    _check_tensor(mask, f"{name}.mask")
    _require(tokens.ndim == 2 and tokens.dtype == torch.int64 and tokens.numel() > 0,
             f"{name}.tokens must be (N, L) int64, got {tuple(tokens.shape)} {tokens.dtype}")
    _require(mask.shape == tokens.shape, f"{name}.mask must have the shape of tokens "
             f"{tuple(tokens.shape)}, got {tuple(mask.shape)}")
    _require(not bool(mask[:, 0].any()), f"{name}.mask has a label in column 0, which no token "
             "precedes; put a start token there")
    _require(mask.device == tokens.device, f"{name}.mask must be on the device of tokens")
    _check_mask(mask, f"{name}.mask")
    _check_tokens(model, tokens, f"{name}.tokens", tokens.shape[1] - 1)
    _check_padding(model, examples, name)
    _check_mode(model)


def _check_count(value, name):
    _require(_is_whole(value) and 1 <= value < 2**31,
             f"{name} must be a whole number, at least 1, got {value!r}")


def _check_microbatch(value):
    if value is not None:
        _check_count(value, "microbatch")


def _check_padding(model, examples, name):
    """torch drops the gradient of an embedding's padding_idx. Where the head has the same weight,
    that row moves all the same, and tau would miss what it does as an input."""
    uses = collections.Counter(map(id, (p for _, p in model.named_parameters(
        remove_duplicate=False))))
    seen = examples.tokens[:, :-1][(examples.mask[:, 1:].flip(1).cumsum(1) > 0).flip(1)]
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and uses[id(module.weight)] > 1:
            _require(module.padding_idx is None or not (seen == module.padding_idx).any(),
                     f"{name}.tokens: {module.padding_idx} is the padding_idx of model.{path}, "
                     f"which shares its weight; set model.{path}.padding_idx = None")


def _check_tokens(model, tokens, name, length):
    """That the model has an embedding for each token and place; it would fail deep inside torch."""
    device = next(model.parameters()).device
    _require(tokens.device == device, f"{name} must be on the model's device, {device}")
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", max(sizes, default=math.inf))
    low, high = int(tokens.min()), int(tokens.max())
    _require(0 <= low and high < vocabulary,
             f"{name}: token ids must be 0 to {vocabulary - 1}, got {low} to {high}")
    places = getattr(config, "max_position_embeddings", math.inf)
    _require(length <= places,
             f"{name}: {length} tokens in a row exceed the model's {places} places")


def _check_rollouts(model, rollouts):
    if not isinstance(rollouts, Rollouts):
        raise TypeError(f"rollouts must be Rollouts, got {type(rollouts).__name__}")
    _check_prompts(rollouts[:2])
    for name in ("tokens", "mask"):
        _check_tensor(getattr(rollouts, name), f"rollouts.{name}")
    n, length = len(rollouts.prompt_tokens), rollouts.tokens.shape[-1]
    _require(length > 0 and rollouts.tokens.shape == rollouts.mask.shape == (n, length)
             and rollouts.tokens.dtype == torch.int64, "rollouts.tokens (int64) and rollouts.mask "
             f"must be (N, L_new) with N = {n} as their prompts")
    tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], 1)
    _check_mask(rollouts.mask, "rollouts.mask")
    _check_tokens(model, tokens, "rollouts", tokens.shape[1] - 1)


def _check_run(model, examples, steps, microbatch=None, group=None):
    _check_examples(examples, "examples", model)
    _check_microbatch(microbatch)
    shapes = set(_everywhere(tuple(examples.tokens.shape), group))
    _require(len(shapes) == 1,
             f"examples must have one shape on all processes, got {sorted(shapes)}")
    n = examples.tokens.shape[0]
    _require(_is_whole(steps) and steps >= 1 and n % steps == 0,
             f"steps must be a positive divisor of the number of examples, {n}; got {steps}")
    _require(any(p.requires_grad for p in model.parameters()),
             "model has no parameter with requires_grad=True")
    for name, p in model.named_parameters():
        _require(p.dtype in (torch.float32, torch.float64), f"model: {name} is {p.dtype}; second "
                 "derivatives need float32 or float64 (model.float())")
    _require(not torch.is_autocast_enabled(examples.tokens.device.type),
             "model: leave torch.autocast; second derivatives need float32 or float64")
    for name, module in model.named_modules():
        _require(not (module.training and getattr(module, "gradient_checkpointing", False)),
                 f"model: gradient checkpointing in {name}; call model.eval()")
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    _require(kernel in (None, "eager", "sdpa"), f"model: attn_implementation {kernel!r} has no "
             'second derivative; load it with from_pretrained(..., attn_implementation="sdpa")')


def _check_mode(model, name="model"):
    """Noise inside would make tau, and log pi, those of another function at every call; batch
    statistics would tie the rows together, and change the model."""
    for path, module in model.named_modules():
        rates = [v for k, v in vars(module).items() if "dropout" in k and isinstance(v, float)]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        found = "dropout" if any(rates) else "batch normalization"
        active = any(rates) or isinstance(module, nn.modules.batchnorm._BatchNorm)
        _require(not (module.training and active), f"{name}: active {found} in "
                 f"{path or type(module).__name__}; call {name}.eval()")


def _check_policy(model, name="model"):
    if not isinstance(model, nn.Module) or not hasattr(model, "generation_config"):
        raise TypeError(f"{name} must be a policy with transformers' generate, got "
                        f"{type(model).__name__}")
    _check_mode(model, name)


def _check_prompts(prompts):
    if isinstance(prompts, Mapping) and {"input_ids", "attention_mask"} <= prompts.keys():
        prompts = prompts["input_ids"], prompts["attention_mask"]
    if not isinstance(prompts, (tuple, list)) or len(prompts) != 2:
        raise TypeError("prompts must be token ids and their attention mask, as a pair or by the "
                        "tokenizer's names")
    tokens, mask = prompts
    _check_tensor(tokens, "prompts: token ids")
    _check_tensor(mask, "prompts: attention mask")
    _require(tokens.ndim == 2 and tokens.shape == mask.shape and tokens.dtype == torch.int64
             and tokens.numel() > 0, f"prompts must be token ids (int64) and their attention mask "
             f"of one shape (n, P), got {tuple(tokens.shape)} and {tuple(mask.shape)}")
    _require(bool(((mask == 0) | (mask == 1)).all() and (mask[:, -1] == 1).all()
                  and (mask.long().diff(dim=1) >= 0).all()),
             'prompts must be padded on the left (padding_side="left")')
    return tokens, mask.long()
