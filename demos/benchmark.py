"""What does attribution cost, in time and memory, as multiples of the plain training it attributes?

    python demos/benchmark.py                              # a 3.2 M parameter GPT-2, T = 1 and 16
    python demos/benchmark.py --compare --width 64 256     # with TorchOpt and higher, two widths

Plain SFT is an ordinary loop with torch.optim.AdamW and the model's own attention, then one look at
the metric. All variants run in turn in every round, and the median is reported. "MB" is what the
peak of memory rose by during one run: on a GPU of the allocator, on a CPU of a process of its own
for each variant. "tau off" is the distance to the unroll's tau per example, relative to its norm.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import copy
import gc
import importlib.util
import json
import math
import multiprocessing
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import matplotlib
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

import dpg
from demos import common

LR, BETAS, EPS_ROOT, METRIC_ROWS = 1e-3, (0.9, 0.95), 1e-8, 8
PLAIN, UNROLL, OTHERS = "plain SFT", "unroll", ("torchopt", "higher")


def main(argv=None):
    args = parse(argv)
    runs, sweep = [], []
    for width in args.width:
        for T in args.steps:
            runs.append(measure(args, width, T))
    print(f"\nMemory against T, width {max(args.width)}, minibatches of the same size: MB of the run"
          " (of these, states)")
    most = max(args.steps)
    for T in sorted({most // d for d in (8, 4, 2, 1) if most % d == 0}):
        names = [name for name in variants(args, T) if name == UNROLL or name.startswith("replay")]
        sizes = {name: peak(args, max(args.width), args.examples // most * T, T, name)
                 for name in names}
        states = {name: stored(name, T) * 16 * runs[-1]["parameters"] / 1e6 for name in names}
        sweep.append({"steps": T, "MB": sizes, "states_MB": states})
        print(f"  T = {T:<3} " + "   ".join(f"{name} {sizes[name]:.0f} ({states[name]:.0f})"
                                            for name in names))
    print()
    for run in runs:
        costs = [f"{row['time_ratio']:.2f} times with {row['variant']}" for row in run["variants"]
                 if row["variant"] == UNROLL or row["variant"].startswith("replay")]
        print(f"Width {run['width']}, T = {run['steps']}: attribution of a run takes its SFT's time "
              + ", ".join(costs))
    report = {"torch": torch.__version__, "device": device_name(args.device),
              "threads": torch.get_num_threads(),
              **{k: v for k, v in vars(args).items() if k not in ("device", "out")},
              "runs": runs, "memory_against_T": sweep}
    (args.out / "result.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(runs, sweep, args.out / "figure.png")
    print(f"files       {args.out}/")


def parse(argv):
    p = common.Parser(description=__doc__)
    for name, default, what in (
            ("width", [256], "of the model, several at will; a head has 64"),
            ("steps", [1, 16], "T, several at will; each divides --examples"),
            ("checkpoint-every", [1, 4], "the replay's spacing of stored states, several at will")):
        p.add_argument(f"--{name}", type=common.positive, nargs="+", default=default,
                       help=f"{what} (default {' '.join(map(str, default))})")
    for name, default, what in (
            ("layers", 4, "of the model"), ("vocabulary", 80, "its number of tokens"),
            ("length", 64, "of an example, in tokens"), ("examples", 128, "N"),
            ("repeats", 5, "rounds to take the median of"),
            ("microbatch", None, "rows that a replay has in memory at once")):
        p.add_argument(f"--{name}", type=common.positive, default=default,
                       help=f"{what} (default {default or 'all'})")
    p.add_argument("--device", type=common.device, help="(default: cuda where there is one)")
    p.add_argument("--compare", action="store_true", help="add the unrolls of TorchOpt and higher")
    p.add_argument("--out", default="runs/benchmark", help="folder (default %(default)s)")
    p.add_argument("--seed", type=common.seed, default=0, help="(default 0)")
    args = p.parse_args(argv)
    for T in args.steps:
        if args.examples % T:
            p.error(f"--steps {T} does not divide --examples {args.examples}")
    for width in args.width:
        if width % heads(width):
            p.error(f"--width {width} does not divide into {heads(width)} heads")
    if min(args.length, args.vocabulary) < 2:
        p.error("--length and --vocabulary must be at least 2")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out = pathlib.Path(args.out)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").touch()  # now, not after minutes of measuring
    except OSError as error:
        p.error(f"--out {str(args.out)!r}: {error.strerror}")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    found = [name for name in OTHERS if importlib.util.find_spec(name)] if args.compare else []
    for name in OTHERS if args.compare else ():
        if name not in found:
            print(f"{name} is not installed, and left out (pip install {name})")
    args.compare = found
    return args


# ----------------------------------------------------------------- the problem, and ways through it

def heads(width):
    return max(1, width // 64)


def problem(args, width, n, **changed):
    """A model, n examples and a metric."""
    o = vars(args) | changed
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=o["vocabulary"], n_positions=o["length"], n_embd=width, n_layer=o["layers"],
        n_head=heads(width), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0,
        eos_token_id=0)).eval().to(args.device)
    tokens = torch.randint(o["vocabulary"], (n + METRIC_ROWS, o["length"])).to(args.device)
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    return (model, dpg.Examples(tokens[:n], mask[:n]),
            dpg.lm_metric(model, dpg.Examples(tokens[n:], mask[n:])))


def variants(args, T):
    """Functions of a problem by name; all but plain SFT return tau."""
    def attribution(**options):
        optimizer = dpg.AdamW(LR, BETAS, eps_root=EPS_ROOT)
        return lambda *at: dpg.metagradient(*at, optimizer, steps=T, **options).tau

    found = {PLAIN: lambda *at: plain(T, *at), UNROLL: attribution(),
             f"{UNROLL}, per token": attribution(per_token=True)}
    for every in sorted({min(every, T) for every in args.checkpoint_every}):
        found[f"replay, k = {every}"] = attribution(
            method="replay", checkpoint_every=every, microbatch=args.microbatch)
    others = {"torchopt": with_torchopt, "higher": with_higher}
    return found | {name: lambda *at, run=others[name]: run(T, *at) for name in args.compare}


def stored(name, T):
    """How many states a variant holds at most: one every k steps, and the k of one stretch."""
    every = int(name.rpartition("= ")[2]) if name.startswith("replay") else 0
    return every and math.ceil(T / every) - 1 + every


def plain(T, model, examples, metric):
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, weight_decay=0)
    for rows in examples.tokens.chunk(T):
        logits = model(rows[:, :-1], use_cache=False).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        metric(dict(model.named_parameters()))


def weighted_loss(logits, rows, weights):
    nll = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return (weights[:, None] * nll.view(len(rows), -1)).sum() / rows.numel()


def with_torchopt(T, model, examples, metric):
    import torchopt
    weights = torch.ones(len(examples.tokens), device=examples.tokens.device, requires_grad=True)
    params = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    optimizer = torchopt.adam(LR, betas=BETAS, eps_root=EPS_ROOT)
    state = optimizer.init(params)
    for rows, w in zip(examples.tokens.chunk(T), weights.chunk(T)):
        with sdpa_kernel(SDPBackend.MATH):  # fused kernels can be differentiated only once
            out = functional_call(model, params, (rows[:, :-1],), {"use_cache": False})
        grads = torch.autograd.grad(weighted_loss(out.logits, rows, w), list(params.values()),
                                    create_graph=True)
        updates, state = optimizer.update(dict(zip(params, grads)), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return torch.autograd.grad(metric(params), weights)[0]


def with_higher(T, model, examples, metric):
    """Its Adam has no eps_root: as much work, but another tau."""
    import higher
    weights = torch.ones(len(examples.tokens), device=examples.tokens.device, requires_grad=True)
    optimizer = torch.optim.Adam(model.parameters(), LR, BETAS)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=True) as (patched, inner):
        for rows, w in zip(examples.tokens.chunk(T), weights.chunk(T)):
            with sdpa_kernel(SDPBackend.MATH):
                out = patched(rows[:, :-1], use_cache=False)
            inner.step(weighted_loss(out.logits, rows, w))
        names = [name for name, _ in model.named_parameters()]
        return torch.autograd.grad(metric(dict(zip(names, patched.fast_params))), weights)[0]


# ------------------------------------------------------------------------------------- measurements

def measure(args, width, T):
    """One table: seconds, memory and tau of every variant."""
    at, ways = problem(args, width, args.examples), variants(args, T)
    parameters = sum(p.numel() for p in at[0].parameters())
    print(f"\nWidth {width}, {parameters / 1e6:.1f} M parameters; T = {T} steps of "
          f"{args.examples // T} rows of {args.length} tokens; {device_name(args.device)}")
    taus, times = {}, {}
    for name in list(ways):  # not measured: the first run of each is slower
        try:
            taus[name] = ways[name](*at)
        except Exception as error:
            if name not in OTHERS:
                raise
            print(f"{name} does not run with torch {torch.__version__}, and is left out: "
                  f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            del ways[name]
    for _ in range(args.repeats):
        for name, run in ways.items():
            times.setdefault(name, []).append(seconds(run, at, args.device))
    rows = []
    print(f"  {'':20} {'seconds':>9} {'x plain':>8} {'MB':>8} {'x plain':>8} {'tau off':>9}")
    for name in ways:
        row = {"variant": name, "seconds": statistics.median(times[name]), "times": times[name],
               "MB": peak(args, width, args.examples, T, name)}
        first = rows[0] if rows else row  # plain SFT
        row["time_ratio"] = row["seconds"] / first["seconds"]
        row["memory_ratio"] = row["MB"] / first["MB"] if first["MB"] else None
        off = ""
        if name != PLAIN:
            tau = taus[name].sum(1) if taus[name].ndim == 2 else taus[name]
            row["tau_off"] = ((tau - taus[UNROLL]).norm() / taus[UNROLL].norm()).item()
            off = f"{row['tau_off']:.1e}"
        print(f"  {name:20} {row['seconds']:9.3f} {row['time_ratio']:8.2f} {row['MB']:8.0f} "
              f"{row['memory_ratio'] or math.nan:8.2f} {off:>9}")
        rows.append(row)
    return {"width": width, "steps": T, "parameters": parameters, "variants": rows}


def seconds(run, at, device):
    gc.collect()  # higher leaves its graph in reference cycles
    if device.type == "cpu":
        began = time.perf_counter()
        run(*at)
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(*at)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak(args, width, n, T, name):
    """The MB by which one run of a variant raises the peak of memory."""
    if args.device.type == "cuda":
        at, run = problem(args, width, n), variants(args, T)[name]
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*at)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # A process that is spawned starts with its parent's peak (Linux, vfork); a fork server's has
    # its own. It finds the function by this name, however this file was started.
    from demos import benchmark
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "demos.benchmark"])  # imported once, not each time
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(benchmark.resident, args, width, n, T, name).result()


def resident(args, width, n, T, name):
    """`peak` of this process, which has done nothing else."""
    def highest():
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

    at, run = problem(args, width, n), variants(args, T)[name]
    run(*problem(args, 64, T, layers=1, length=2))  # loads what torch loads at the first use
    before = highest()
    run(*at)
    return highest() - before


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def draw(runs, sweep, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    names = list(dict.fromkeys(row["variant"] for run in runs for row in run["variants"]))
    for axis, key, title in zip(axes, ("time_ratio", "memory_ratio"), ("time", "extra memory")):
        for i, run in enumerate(runs):
            found = {row["variant"]: row[key] or math.nan for row in run["variants"]}
            axis.barh([names.index(name) + 0.8 * i / len(runs) for name in found],
                      list(found.values()), height=0.8 / len(runs), align="edge",
                      label=f"width {run['width']}, T = {run['steps']}")
        axis.set(title=f"{title}, as a multiple of plain SFT's")
        axis.set_yticks([i + 0.4 for i in range(len(names))], names)
        axis.invert_yaxis()
        axis.legend()
    for name in dict.fromkeys(name for row in sweep for name in row["MB"]):
        rows = [row for row in sweep if name in row["MB"]]
        T = [row["steps"] for row in rows]
        line, = axes[2].plot(T, [row["MB"][name] for row in rows], marker="o", label=name)
        if name != UNROLL:
            axes[2].plot(T, [row["states_MB"][name] for row in rows], ":", color=line.get_color(),
                         label=f"{name}: the states alone")
    axes[2].set(title="extra memory against T, in MB", xlabel="T, with N / T fixed", ylim=(0, None))
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
