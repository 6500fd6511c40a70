"""What does attribution cost, in time and memory, as a multiple of the training it attributes?

    python demos/benchmark.py                              # a 3.2 M parameter GPT-2, T = 1 and 16
    python demos/benchmark.py --compare --width 64 256     # two widths, also TorchOpt and higher

Plain SFT is an ordinary loop of torch.optim.AdamW with the model's own attention, then one look at
the metric. Every round runs each variant once; reported is the median. Memory that is freed stays
with the process, as on a GPU; elsewise Linux fetches it anew page by page, for large tensors at a
multiple of the arithmetic's time. MB is what one run adds to the peak of memory: on a GPU the
allocator's, on a CPU that of a process of its own. "tau off" is how far tau per example is from the
unroll's, relative to its norm.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import copy
import ctypes
import gc
import json
import math
import multiprocessing
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import matplotlib
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

import dpg
from demos import options

LR, BETAS, EPS_ROOT, METRIC_ROWS = 1e-3, (0.9, 0.95), 1e-8, 8
PLAIN, UNROLL = "plain SFT", "unroll"


def main(argv=None):
    args = parse(argv)
    keep_memory()
    on = (torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else
          platform.processor() or platform.machine())
    print(f"torch {torch.__version__} on {on}, {torch.get_num_threads()} threads")
    runs = [measure(args, width, T) for width in args.width for T in args.steps]
    most, width, sweep = max(args.steps), args.width[-1], []
    print(f"\nMB against T, at width {width} and {args.examples // most} rows a step; of these, "
          "the stored states")
    for T in sorted({most // d for d in (8, 4, 2, 1) if most % d == 0}):
        for name in spacings(args, T):
            size = states(spacings(args, T)[name], T) * runs[-1]["parameters"] * 4 / 1e6
            row = {"steps": T, "variant": name, "states_MB": size,
                   "MB": peak(args, width, args.examples // most * T, T, name)}
            print(f"  T = {T:<4} {name:20} {row['MB']:8.0f} {size:8.0f}")
            sweep.append(row)
    print()
    for run in runs:
        costs = (f"{row['time_ratio']:.2f} x with {row['variant']}" for row in run["variants"]
                 if row["variant"] in spacings(args, run["steps"]))
        print(f"width {run['width']}, T = {run['steps']}: attribution of a run takes its SFT's "
              f"time {', '.join(costs)}")
    report = vars(args) | {"torch": torch.__version__, "device": on,
                           "threads": torch.get_num_threads(), "runs": runs, "sweep": sweep}
    (args.out / "result.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    draw(runs, sweep, args.out / "figure.png")
    print(f"files       {args.out}/")


def parse(argv):
    p = options.Parser(__file__, __doc__)
    for name, default, what in (
            ("width", [256], "of the model: one or several, up to 64 or multiples of 64"),
            ("steps", [1, 16], "T: one or several, divisors of --examples"),
            ("checkpoint-every", [1, 4], "k: the replay stores every k-th state; one or several"),
            ("layers", 4, "of the model"), ("vocabulary", 80, "tokens that it knows"),
            ("length", 64, "tokens of an example"), ("examples", 128, "N"),
            ("repeats", 5, "measured rounds"),
            ("microbatch", None, "rows that attribution takes at a time")):
        many = isinstance(default, list)
        shown = " ".join(map(str, default)) if many else default or "that of metagradient"
        p.add_argument(f"--{name}", type=options.positive, nargs="+" if many else None,
                       default=default, help=f"{what} (default {shown})")
    p.add_argument("--device", type=options.device, help="(default: cuda where there is one)")
    p.add_argument("--compare", action="store_true", help="add the unrolls of TorchOpt and higher")
    p.add_argument("--out", type=pathlib.Path, default="runs/benchmark",
                   help="folder (default %(default)s)")
    p.add_argument("--seed", type=options.seed, default=0, help="(default 0)")
    args = p.parse_args(argv)
    for wrong, message in (
            (any(args.examples % T for T in args.steps), "--steps must divide --examples"),
            (any(w > 64 and w % 64 for w in args.width), "--width over 64 must be multiples of it"),
            (min(args.length, args.vocabulary) < 2, "--length and --vocabulary start at 2")):
        if wrong:
            p.error(message)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").touch()  # fail now, not after minutes of measuring
    except OSError as error:
        p.error(f"--out {str(args.out)!r}: {error.strerror}")
    return args


# ----------------------------------------------------------------- the problem, and ways through it

def problem(args, width, n, **changed):
    """A model, n examples and a metric."""
    o = vars(args) | changed
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=o["vocabulary"], n_positions=o["length"], n_embd=width, n_layer=o["layers"],
        n_head=max(1, width // 64), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0,
        eos_token_id=0)).eval().to(args.device)
    tokens = torch.randint(o["vocabulary"], (n + METRIC_ROWS, o["length"])).to(args.device)
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    wanted = dpg.Examples(tokens[n:], mask[n:])
    return model, dpg.Examples(tokens[:n], mask[:n]), dpg.lm_metric(model, wanted)


def spacings(args, T):
    """The names of the unroll (None) and of the replays, with their k; from T on these are one."""
    every = [k for k in args.checkpoint_every if k < T or k == min(args.checkpoint_every)]
    return {UNROLL: None} | {f"replay, k = {k}": k for k in every}


def states(k, T):
    """In parameters, what a replay stores: every k-th state, and one stretch of k; each holds the
    parameters, two moments and the gradient."""
    return 0 if k is None else 4 * (math.ceil(T / k) - 1 + min(k, T))


def variants(args, T):
    """Functions of a problem, by name; all but plain SFT return tau per example."""
    def attribution(*at, **options):
        optimizer = dpg.AdamW(LR, BETAS, eps_root=EPS_ROOT)
        tau = dpg.metagradient(*at, optimizer, steps=T, microbatch=args.microbatch, **options).tau
        return tau.sum(1) if tau.ndim == 2 else tau

    found = {PLAIN: partial(plain, T), UNROLL: attribution,
             f"{UNROLL}, per token": partial(attribution, per_token=True)}
    for name, k in spacings(args, T).items():
        if k is not None:
            found[name] = partial(attribution, method="replay", checkpoint_every=k)
    return found | ({"TorchOpt": partial(with_torchopt, T), "higher": partial(with_higher, T)}
                    if args.compare else {})


def plain(T, model, examples, metric):
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, weight_decay=0)
    for rows in examples.tokens.chunk(T):
        optimizer.zero_grad()
        logits = model(rows[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        metric(dict(model.named_parameters()))


def weighted_loss(call, rows, weights):
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels can be differentiated only once
        logits = call((rows[:, :-1],), {"use_cache": False}).logits
    nll = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return (weights[:, None] * nll.view(len(rows), -1)).sum() / rows.numel()


def with_torchopt(T, model, examples, metric):
    import torchopt
    weights = torch.ones(len(examples.tokens), device=examples.tokens.device, requires_grad=True)
    params = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    optimizer = torchopt.adam(LR, betas=BETAS, eps_root=EPS_ROOT)
    state = optimizer.init(params)
    for rows, w in zip(examples.tokens.chunk(T), weights.chunk(T)):
        loss = weighted_loss(partial(functional_call, model, params), rows, w)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        updates, state = optimizer.update(dict(zip(params, grads)), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return torch.autograd.grad(metric(params), weights)[0]


def with_higher(T, model, examples, metric):
    """Its Adam has no eps_root: the same work, to within a few operations, but another tau."""
    import higher
    weights = torch.ones(len(examples.tokens), device=examples.tokens.device, requires_grad=True)
    names, _ = zip(*model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters(), LR, BETAS)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=True) as (patched, inner):
        for rows, w in zip(examples.tokens.chunk(T), weights.chunk(T)):
            inner.step(weighted_loss(lambda x, options: patched(*x, **options), rows, w))
        return torch.autograd.grad(metric(dict(zip(names, patched.fast_params))), weights)[0]


# ------------------------------------------------------------------------------------- measurements

def measure(args, width, T):
    """The seconds, memory and tau of every variant, as a table."""
    at, ways, taus = problem(args, width, args.examples), variants(args, T), {}
    size = sum(p.numel() for p in at[0].parameters())
    print(f"\nwidth {width}, {size / 1e6:.2f} M parameters, T = {T}, {args.examples // T} rows of "
          f"{args.length} tokens a step\n"
          f"{'':24} {'seconds':>8} {'x plain':>8} {'MB':>8} {'x plain':>8} {'tau off':>8}")
    for name in list(ways):  # unmeasured: the first run of each is slower
        try:
            taus[name] = ways[name](*at)
        except Exception as error:
            if name not in ("TorchOpt", "higher"):
                raise
            print(f"  {name} is left out: {type(error).__name__} {str(error)[:60]!r}")
            del ways[name]
    times = [{name: seconds(run, at, args.device) for name, run in ways.items()}
             for _ in range(args.repeats)]
    rows = []
    for name in ways:
        row = {"variant": name, "times": [t[name] for t in times],
               "seconds": statistics.median(t[name] for t in times),
               "MB": peak(args, width, args.examples, T, name)}
        first = rows[0] if rows else row  # plain SFT
        row["time_ratio"] = row["seconds"] / first["seconds"]
        row["memory_ratio"] = row["MB"] / max(first["MB"], 1e-3)
        if name != PLAIN:
            row["tau_off"] = ((taus[name] - taus[UNROLL]).norm() / taus[UNROLL].norm()).item()
        print(f"  {name:22} {row['seconds']:8.3f} {row['time_ratio']:8.2f} {row['MB']:8.0f} "
              f"{row['memory_ratio']:8.2f} " + (f"{row['tau_off']:8.0e}" if name != PLAIN else ""))
        rows.append(row)
    return {"width": width, "steps": T, "parameters": size, "variants": rows}


def keep_memory():
    """Has the C library of Linux keep what is freed."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def seconds(run, at, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    gc.collect()  # higher leaves its graphs in reference cycles
    wait()
    began = time.perf_counter()
    run(*at)
    wait()
    return time.perf_counter() - began


def peak(args, width, n, T, name):
    """The MB that one run of a variant adds to the peak of memory."""
    if args.device.type == "cuda":
        at, run = problem(args, width, n), variants(args, T)[name]
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*at)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # On Linux a process that is spawned starts with the peak of its parent, one that a fork server
    # makes does not. Torch is loaded once, in the server. The process finds its function by the
    # module's name, which for a file run as a script is another.
    from demos import benchmark
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.gpt2.modeling_gpt2"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(benchmark.resident, args, width, n, T, name).result()


def resident(args, width, n, T, name):
    """`peak` of resident memory, in a process that has run nothing else."""
    at, run = problem(args, width, n), variants(args, T)[name]
    run(*problem(args, 64, T, layers=1, length=2))  # what is loaded at the first use is no cost
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(*at)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return more / (1e6 if sys.platform == "darwin" else 1e6 / 1024)  # bytes on macOS, else KiB


def draw(runs, sweep, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    names = max(([row["variant"] for row in run["variants"]] for run in runs), key=len)
    for axis, key, what in zip(axes, ("time_ratio", "memory_ratio"), ("time", "extra memory")):
        for i, run in enumerate(runs):
            found, thick = {row["variant"]: row[key] for row in run["variants"]}, 0.8 / len(runs)
            axis.barh([names.index(name) + i * thick for name in found], list(found.values()),
                      thick, align="edge", label=f"width {run['width']}, T = {run['steps']}")
        axis.set_yticks([i + 0.4 for i in range(len(names))], names)
        axis.set(title=f"{what}, as a multiple of plain SFT's", ylim=(len(names), -0.2))
        axis.legend()
    for name in dict.fromkeys(row["variant"] for row in sweep):
        curve = [row for row in sweep if row["variant"] == name]
        T, own = [row["steps"] for row in curve], [row["states_MB"] for row in curve]
        line, = axes[2].plot(T, [row["MB"] for row in curve], marker="o", label=name)
        if any(own):
            axes[2].plot(T, own, ":", color=line.get_color(), label="its states alone")
    axes[2].set(title="extra memory against T, in MB", xlabel="T, at one N / T", ylim=(0, None))
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
