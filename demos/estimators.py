"""How far is each estimator from the true gradient, and when is tau blind? (bias and noise)

The generator is a policy over 7 texts, the target a tiny model, and every dataset of n texts is
trained on: truth, bias and noise are sums, nothing is sampled. What example i is credited with:

    naive           Phi itself
    leave one out   Phi(w = 1) - Phi(w_i = 0); per token, w_is = 0 for s >= t. Exact
    tau             the metagradient; baselines and discounts are those of `dpg.advantages`
    influence       -lr <grad Phi, grad l_i(theta_0)>, no Hessian and no optimizer
    midpoint        tau_i at w_i = 1/2: a fair coin gives each weight 1/2 or 3/2, a second run has
                    the other of the two, and i is credited in the run where its weight is 1/2
    path            the same with weights u or 2 - u, where u is a Gauss point of (0, 1), 0.211 or
                    0.789, by another coin: the mean of tau_i on the way from w_i = 0 to 1
    two halves      Phi(w = 1) - Phi(w_H = 0) for every i in a random half H, the same for the rest:
                    the second run does not see x_i, so it is exact
      less tau      and minus the tau_j of the others in H, at w_H = 0. Exact for the same reason

Measured (5 random problems, medians; one minute of one of two shared CPU cores, November 2026). tau
is the slope, at w_i = 1, of the curve whose rise from w_i = 0 to 1 is wanted.

    SGD     The bias is proportional to lr: 0.003 at 0.03, 0.04 at 0.3 (n = 3, T = 1; T = 3 has 4
            times as much at small lr).
    Adam    What eps_root must not be small against is share^2, share being the largest
            |d l_i / d parameter| / n: the part of a minibatch's gradient that is one example's. The
            bias at T = 1 is 0.01 with eps_root = 100 share^2 and 0.05 with 10, at any n; 0.17 to
            0.27 with 1; with share^2 / 100 it is above 0.7 for n <= 3 and 0.25 for n = 6.
    path    At two metagradients instead of one, n = T = 3: 0.012 where tau has 0.109 (SGD), 0.007
            for 0.096 (Adam, 10 share^2), 0.28 for 0.71 (Adam, share^2 / 1000: lowest cosine 0.98
            for 0.75, twice the noise).
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import itertools
import json
import math
import time
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.autograd import grad
from torch.func import functional_call, jacrev

import dpg
from demos import figures, options

TEXTS = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]])  # 0 ends the text
LABELS = torch.tensor([[1, 0]] + 6 * [[1, 1]])
START, WIDTH, CENTRED = 3, 4, "naive, less its expectation"
GAUSS = 0.5 - 12**-0.5, 0.5 + 12**-0.5  # the Gauss points of (0, 1)
MIDPOINT, PATH = (0.5, 1.5), (*GAUSS, *(2 - u for u in GAUSS[::-1]))  # rising, mirrored about 1
SETTINGS = {"SGD, lr 0.3": lambda problem: dpg.SGD(0.3),  # of the table, with n = T = 3
            "Adam, eps_root 10 share^2": lambda problem: problem.adam(10),
            "Adam, eps_root share^2 / 1000": lambda problem: problem.adam(1e-3)}
SIZES, STEPS = (1, 2, 3, 6), (1, 2, 3)  # n and T
DRAWN = 1, 3, 6  # of the sizes
RATES = (0.03, 0.1, 0.3, 1.0)  # of SGD
ROOTS = tuple(10.0**k for k in range(-5, 4))  # eps_root of Adam, see Problem.adam


class Bank(nn.Module):
    """Copies of a target that have nothing in common, each with as many rows of every batch."""

    def __init__(self, tensors, copies):
        super().__init__()
        self.embed, self.head, self.bias = (
            nn.Parameter(x.expand(copies, *x.shape).clone()) for x in tensors)

    def forward(self, tokens):
        rows = tokens.view(len(self.embed), -1, tokens.shape[1])
        each = self.embed[torch.arange(len(rows))[:, None, None], rows]
        return (each.cumsum(2).tanh() @ self.head[:, None] + self.bias[:, None, None]).flatten(0, 1)


class Problem:
    """A random target, policy and metric, and all datasets of n texts; T full-batch steps on each.

    One run trains a bank with a copy for each dataset. The loss is a mean over copies, so weights
    or optimizers are scaled until each copy sees its own; each has its own Phi, and the sum of all
    Phi has everybody's tau as its derivative.
    """

    def __init__(self, seed, n, T=1):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        self.seed, self.n, self.T = seed, n, T
        self.tensors = [0.7 * normal(*shape) for shape in ((4, WIDTH), (WIDTH, 4), (4,))]
        self.theta = normal(3, 3)  # the policy: logits of the next token, a row for each before
        self.wanted = torch.randint(1, 7, (2,), generator=draw)
        # The order in a full batch changes nothing: each multiset once, with its number of orders.
        self.sets = torch.tensor([*itertools.combinations_with_replacement(range(7), n)])  # (D, n)
        self.orders = torch.tensor([
            math.factorial(n) / math.prod(math.factorial(row.count(k)) for k in range(7))
            for row in self.sets.tolist()], dtype=torch.float64)

    # ----------------------------------------------------------------- the policy and the truth

    def log_pi(self, theta):
        """log pi of both tokens of every text, (7, 2)."""
        before = torch.stack([torch.zeros(7, dtype=int), TEXTS[:, 0]], 1)
        return theta.log_softmax(1)[before, TEXTS] * LABELS

    def probability(self, theta):
        return self.orders * self.log_pi(theta).sum(1).exp()[self.sets].prod(1)  # (D,)

    def judge(self, phi, credit):
        """Relative bias and cosine of the expectation; and noise, the variance over the square of
        the expectation's component along the truth: the length of a step is the user's choice.

        phi is (D,), credit (M, D, n) or (M, D, n, 2): M equally likely outcomes on each dataset.
        """
        truth = jacrev(lambda theta: self.probability(theta) @ phi)(self.theta).flatten()
        p, score = self.probability(self.theta), jacrev(self.log_pi)(self.theta).flatten(2)
        credit = credit.reshape(*credit.shape[:3], -1).expand(-1, -1, -1, 2)
        each = torch.einsum("mdit,ditp->mdp", credit, score[self.sets])
        mean = p @ each.mean(0)
        variance = (p @ ((each - mean) ** 2).mean(0)).sum()
        return {"bias": ((mean - truth).norm() / truth.norm()).item(),
                "cosine": torch.cosine_similarity(mean, truth, 0).item(),
                "noise": (variance * (truth @ truth) / (mean @ truth) ** 2).item()}

    # ----------------------------------------------------------------- training and tau

    def bank(self, copies):
        """The bank and its rows: [start] + text, T times the same full batch."""
        texts = self.sets.repeat(self.T * copies // len(self.sets), 1).flatten()
        return Bank(self.tensors, copies), dpg.Examples(
            nn.functional.pad(TEXTS[texts], (1, 0), value=START),
            nn.functional.pad(LABELS[texts], (1, 0)))

    def phi(self, params):
        """Of each copy: the mean log-likelihood per token of the wanted texts, (copies,)."""
        copies, texts = len(params["bias"]), TEXTS[self.wanted]
        rows = nn.functional.pad(texts[:, :1], (1, 0), value=START).repeat(copies, 1)
        logits = functional_call(Bank(self.tensors, copies), params, (rows,)).log_softmax(2)
        chosen = logits.gather(2, texts.repeat(copies, 1)[..., None]).view(copies, -1)
        return chosen @ LABELS[self.wanted].flatten().double() / LABELS[self.wanted].sum()

    def run(self, optimizer, weights=None):
        """Phi (M, D) and tau per token (M, D, n, 2) at M choices of the weights, (M, n) or
        (M, n, 2), with dpg.sft; and the parameters. None is all ones."""
        weights = torch.ones(1, self.n) if weights is None else weights
        M, D = len(weights), len(self.sets)
        bank, data = self.bank(M * D)
        w = weights.reshape(M, 1, self.n, -1).expand(M, D, self.n, 2).double().clone()
        rows = nn.functional.pad(M * D * w.requires_grad_(), (1, 0)).flatten(0, 2)
        params = dpg.sft(bank, data, optimizer, weights=rows.repeat(self.T, 1), steps=self.T,
                         microbatch=len(data.tokens))  # the bank takes no part of a batch
        phi = self.phi(params)
        return phi.detach().view(M, D), grad(phi.sum(), w)[0], params

    @cache
    def tau(self, optimizer, metric=None):
        """tau per token, (1, D, n, 2), from dpg.metagradient."""
        D = len(self.sets)
        bank, data = self.bank(D)
        scaled = {"lr": optimizer.lr * D} if isinstance(optimizer, dpg.SGD) else {
            "eps": optimizer.eps / D, "eps_root": optimizer.eps_root / D**2}
        result = dpg.metagradient(bank, data, lambda params: (metric or self.phi)(params).sum(),
                                  replace(optimizer, **scaled), steps=self.T, per_token=True,
                                  microbatch=len(data.tokens))
        return result.tau.view(self.T, 1, D, self.n, 3).sum(0)[..., 1:]

    def start(self):
        return dict(self.bank(len(self.sets))[0].named_parameters())

    def gradients(self):
        """Of the loss of each dataset at the start, (D, parameters)."""
        once = Problem(self.seed, self.n)
        start, after = once.start(), once.run(dpg.SGD(1.0))[2]
        return torch.cat([(p - after[k]).detach().flatten(1) for k, p in start.items()], 1)

    def adam(self, root):
        """Adam, its eps_root in units of share^2; share = max |d l_i / d parameter| / n."""
        share = Problem(self.seed, 1).gradients().abs().max().item() / self.n
        return dpg.AdamW(lr=0.1, eps_root=root * share**2)

    # ----------------------------------------------------------------- estimators

    def naive(self, optimizer):
        return self.run(optimizer)[0][..., None].expand(-1, -1, self.n)

    def left_out(self, optimizer, drop):
        """Phi(w = 1) - Phi without the tokens drop[k] of text i, (1, D, n, K); drop is (K, 2)."""
        keep = 1 - torch.einsum("ij,kt->ikjt", torch.eye(self.n), torch.tensor(drop)).flatten(0, 1)
        loss = self.run(optimizer)[0] - self.run(optimizer, keep)[0]  # (n K, D)
        return loss.T.view(1, -1, self.n, len(drop))

    def advantages(self, tau, **how):
        """`dpg.advantages`, each dataset a group of its own."""
        rows = LABELS[self.sets].repeat(len(tau), 1, 1).flatten(0, 1)
        return dpg.advantages(tau.flatten(0, 2), rows, group_size=self.n, **how).view(tau.shape)

    def influence(self, optimizer, params):
        """-T lr <grad Phi(params), grad l_i(theta_0)>: tau of one SGD step and a linear metric."""
        leaf = {k: p.detach().requires_grad_() for k, p in params.items()}
        slope = dict(zip(leaf, grad(self.phi(leaf).sum(), list(leaf.values()))))
        return Problem(self.seed, self.n).tau(dpg.SGD(self.T * optimizer.lr), lambda params: sum(
            (slope[k] * p).flatten(1).sum(1) for k, p in params.items())).sum(3)

    def mirrored(self, optimizer, values):
        """tau per token at w_i < 1: weights drawn from `values`, and a second run with 2 - w."""
        weights = torch.tensor([*itertools.product(values, repeat=self.n)])
        tau = self.run(optimizer, weights)[1]
        return torch.where(weights[:, None, :, None] < 1, tau, tau.flip(0))  # flip: w to 2 - w

    def halves(self, optimizer, less_tau):
        """Phi(w = 1) - Phi(w_H = 0) for a random half H and for the rest."""
        chosen = torch.tensor([*itertools.combinations(range(self.n), self.n // 2)])
        H = torch.zeros(len(chosen), self.n).scatter(1, chosen, 1.0)
        whole, credit = self.run(optimizer)[0], 0
        for out in (H, 1 - H):
            phi, tau, _ = self.run(optimizer, 1 - out)
            tau = tau.sum(3) * out[:, None]
            others = tau.sum(2, keepdim=True) - tau
            credit = credit + out[:, None] * ((whole - phi)[..., None] - less_tau * others)
        return credit


def dpg_credit(per_token, **how):
    def credit(problem, optimizer):
        tau = problem.tau(optimizer)
        return problem.advantages(tau if per_token else tau.sum(3), **how)
    return credit


ESTIMATORS = {  # name: cost in metagradients, a run without derivatives being 1/3; credit
    "naive": ("1/3", Problem.naive),
    CENTRED: ("1/3", lambda p, o: p.naive(o) - p.probability(p.theta) @ p.naive(o)[0, :, 0]),
    "leave one out": ("(n+1)/3", lambda p, o: p.left_out(o, [[1.0, 1]])),
    "leave one out, per token": ("(2n+1)/3", lambda p, o: p.left_out(o, [[1.0, 1], [0, 1]])),
    "tau": ("1", dpg_credit(False)),
    "tau, baseline mean": ("1", dpg_credit(False, baseline="mean")),
    "tau, baseline loo": ("1", dpg_credit(False, baseline="loo")),
    "tau per token, discount 1": ("1", dpg_credit(True, discount=1.0)),
    "tau per token, 1, mean": ("1", dpg_credit(True, discount=1.0, baseline="mean")),
    "tau per token, 1, loo": ("1", dpg_credit(True, discount=1.0, baseline="loo")),
    "tau per token, discount 0.5": ("1", dpg_credit(True, discount=0.5)),
    "tau per token, discount 0": ("1", dpg_credit(True, discount=0.0)),
    "influence at theta_0": ("1", lambda p, o: p.influence(o, p.start())),
    "influence at theta_T": ("1", lambda p, o: p.influence(o, p.run(o)[2])),
    "midpoint": ("2", lambda p, o: p.mirrored(o, MIDPOINT).sum(3)),
    "path": ("2", lambda p, o: p.mirrored(o, PATH).sum(3)),
    "path per token, discount 1": ("2", lambda p, o: p.advantages(p.mirrored(o, PATH),
                                                                  discount=1.0)),
    "two halves": ("1", lambda p, o: p.halves(o, 0.0)),
    "two halves, less tau": ("7/3", lambda p, o: p.halves(o, 1.0)),
}


# ------------------------------------------------------------------------------ table and figure

def seen(problem, optimizer):
    """Of a step of Adam at T = 1: the share of its length that answers to the weights, and the
    fraction of coordinates with |g| < sqrt(eps_root). Both are expectations over datasets."""
    square, root = problem.gradients().square(), optimizer.eps_root  # for T > 1: v_hat
    step, p = (square / (square + root)).sqrt(), problem.probability(problem.theta)
    answer = root / (square + root)  # d log(step) / d log(g): 1 as in SGD, 0 for a sign
    return {"seen": (p @ ((step * answer).sum(1) / step.sum(1))).item(),
            "fraction": (p @ (square < root).double().mean(1)).item()}


def distance(problem, optimizer):
    """Of tau from the leave-one-out difference that it stands in for, relative to the norm of that;
    both over all datasets. A few examples of one dataset tell it well enough (`check.left_out`)."""
    difference = problem.left_out(optimizer, [[1.0, 1]])[0, ..., 0]  # (D, n)
    tau, p = problem.tau(optimizer).sum(3)[0], problem.probability(problem.theta)
    return ((p @ (tau - difference) ** 2).sum() / (p @ difference**2).sum()).sqrt().item()


def judgements(seeds, ns, Ts, optimizers, names):
    """A judgement for each combination; optimizers is key -> function of the problem."""
    found = []
    for seed, n, T in itertools.product(range(seeds), ns, Ts):
        problem = Problem(seed, n, T)
        for key, make in optimizers.items():
            optimizer = make(problem)
            phi = problem.run(optimizer)[0][0]
            extra = {"distance": distance(problem, optimizer)}
            if T == 1 and isinstance(optimizer, dpg.AdamW):
                extra |= seen(problem, optimizer)
            found += [{"seed": seed, "n": n, "T": T, "optimizer": key, "estimator": name} | extra
                      | problem.judge(phi, ESTIMATORS[name][1](problem, optimizer))
                      for name in names]
    return found


def values(found, key, **which):
    return np.array([row[key] for row in found if all(row[k] == v for k, v in which.items())])


def noise(found, setting, name):
    """Over that of naive, less its expectation; the median seed."""
    return np.median(values(found, "noise", optimizer=setting, estimator=name)
                     / values(found, "noise", optimizer=setting, estimator=CENTRED))


def rank_correlation(x, y):
    return np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1]


def medians(title, found, xs, rows):
    print(f"\n{title}\n{'':20}" + "".join(f"{x:9.2g}" for x in xs))
    for name, which in rows.items():
        print(f"{name:20}" + "".join(
            f"{np.median(values(found, 'bias', optimizer=x, **which)):9.2g}" for x in xs))


def main(argv=None):
    parser = options.Parser(__file__, __doc__)
    parser.add_argument("--seeds", type=options.positive, default=5,
                        help="how many random targets, policies and metrics (default 5)")
    parser.add_argument("--out", default="runs/estimators", help="folder (default %(default)s)")
    args, began = parser.parse_args(argv), time.perf_counter()
    out = pathlib.Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out!r}: {error.strerror}")
    torch.set_num_threads(1)  # tensors this small only make threads wait for each other
    sgd = {lr: lambda problem, lr=lr: dpg.SGD(lr) for lr in RATES}
    adam = {root: lambda problem, root=root: problem.adam(root) for root in ROOTS}
    found = {"table": judgements(args.seeds, (3,), (3,), SETTINGS, ESTIMATORS),
             "sgd": judgements(args.seeds, (3,), STEPS, sgd, ("tau", "path")),
             "sizes": judgements(args.seeds, SIZES, (1,), adam, ("tau",)),
             "adam": judgements(args.seeds, (3,), (3,), adam,
                          ("tau", "midpoint", "path", "influence at theta_0"))}
    print(f"n = T = 3, {args.seeds} seeds. Cost in metagradients; relative bias, median and worst "
          "seed; worst cosine;\nnoise over that of naive, less its expectation, median seed.\n\n"
          + 35 * " " + "".join(f"{name:>30}" for name in SETTINGS))
    print(f"{'':27}{'cost':>8}" + len(SETTINGS) * f"{'bias':>9}{'worst':>7}{'cos':>6}{'noise':>8}")
    for name, (cost, _) in ESTIMATORS.items():
        print(f"{name:27}{cost:>8}", end="")
        for setting in SETTINGS:
            bias, cosine = (values(found["table"], key, optimizer=setting, estimator=name)
                            for key in ("bias", "cosine"))
            print(f"{np.median(bias):9.3f}{bias.max():7.3f}{cosine.min():6.2f}"
                  f"{noise(found['table'], setting, name):8.2f}", end="")
        print()
    sizes = found["sizes"]
    medians("SGD, n = 3, bias, median; lr", found["sgd"], RATES, {
        f"{name}, T = {T}": dict(T=T, estimator=name) for T in STEPS for name in ("tau", "path")})
    medians("Adam, bias, median; share = max |d l_i / d parameter| / n; eps_root / share^2",
            sizes + found["adam"], ROOTS, {
                **{f"tau, T = 1, n = {n}": dict(T=1, n=n) for n in SIZES},
                **{f"{name}, T = n = 3": dict(T=3, estimator=name)
                   for name in ("tau", "midpoint", "path")}})
    every = [row for name in ("sgd", "sizes", "adam") for row in found[name]
             if row["estimator"] == "tau"]
    correlation = {f"{key}, {which}": rank_correlation(values(rows, key), values(rows, "bias"))
                   for key, which, rows in (("distance", "all", every), *(
                       (key, "Adam, T = 1", sizes) for key in ("distance", "seen", "fraction")))}
    print("rank correlation with the bias of tau: its distance from leaving one out "
          f"{correlation['distance, all']:.2f} (all {len(every)} runs);\nAdam, T = 1: distance "
          f"{correlation['distance, Adam, T = 1']:.2f}, share of the step that answers to the "
          f"weights {correlation['seen, Adam, T = 1']:.2f}, fraction of\ncoordinates with |g| < "
          f"sqrt(eps_root) {correlation['fraction, Adam, T = 1']:.2f}")
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0), (1.0, math.inf)):
        band = [row for row in every if low <= row["distance"] < high]
        bias, cosine = ([row[key] for row in band] for key in ("bias", "cosine"))
        if band:
            print(f"distance {low} to {high}: bias {np.median(bias):.2f} (median), "
                  f"{max(bias):.2f} (worst), cosine {min(cosine):.2f} (worst), {len(band)} runs")
    print()
    result = {"demo": "estimators", "seeds": args.seeds,
              "seconds": round(time.perf_counter() - began, 1), "rank_correlation": correlation}
    kept = {name: [{key: float(f"{value:.4g}") if isinstance(value, float) else value
                    for key, value in row.items()} for row in rows] for name, rows in found.items()}
    (out / "result.json").write_text(json.dumps(result | kept) + "\n")
    draw(out, out / "figure.png")
    print(f"seconds     {result['seconds']}\nfiles       {out}/")


def draw(folder, path):
    found = figures.read(folder)[0]
    figure = figures.figure(3.9, "How far the expected update is from the true gradient")
    for axis, table, key, shown, what, label in zip(
            figure.subplots(1, 2, sharey=True), ("sgd", "sizes"), ("T", "n"), (STEPS, DRAWN),
            ("SGD inside, n = 3 texts a step", "Adam inside, T = 1 step"),
            ("learning rate", "eps_root / s²,  s: one text's share of the gradient")):
        for value in sorted({row[key] for row in found[table]} & {*shown}):
            rows = [row for row in found[table] if row["estimator"] == "tau" and row[key] == value]
            xs = sorted({row["optimizer"] for row in rows})
            each = np.array([values(rows, "bias", optimizer=x) for x in xs])  # (x, seed)
            axis.plot(xs, np.median(each, 1), ".-", label=f"{key} = {value}")
            axis.fill_between(xs, each.min(1), each.max(1), alpha=0.12, lw=0)
        axis.set(xscale="log", yscale="log", title=what, xlabel=label)
        if table == "sgd":  # too few for powers of ten
            axis.set(xticks=xs, xticklabels=xs)
        axis.legend()
    figure.axes[0].set_ylabel("relative bias of tau")
    figure.supxlabel(f"lines: median of {found['seeds']} random problems; bands: all of them",
                     fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main()
