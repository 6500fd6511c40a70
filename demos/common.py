"""What the demos share: options, models, prompts, rewards, the training loop, the check by SFT.

A demo adds its question (a metric), its score, and its picture.
"""
import argparse
import copy
import functools
import json
import math
import os
import pathlib
import random
import re
import sys
import time

import huggingface_hub
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import dpg
from demos import corpus

TINY_LM = pathlib.Path(__file__).resolve().parent / "tiny-lm"
PROMPTS, SAMPLES, HELD_OUT = 64, 4, 64  # N = 256 rollouts a step; prompts kept for the scores
ANSWER = 40  # tokens: no demo writes more

# For metrics of the target's weights (sections 4.1 to 4.3). Their check is 96 steps of plain AdamW
# on fresh text, at the rate that moves the head by as much of its scale as the paper's steps do,
# and at 10 and 100 times this rate.
CHECK_STEPS, CHECK_BATCH, MULTIPLES = 96, 64, (1, 10, 100)
WEIGHTS = dict(lr=8e-3, discount=0.5, kl_coef=0.03, entropy_coef=0.05, max_new_tokens=24)


# ------------------------------------------------------------------------------ the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def parser(file, doc, *, steps, target):
    """The options of every demo; `file` and `doc` are the demo's __file__ and __doc__."""
    p = Parser(prog=pathlib.Path(file).name, description=doc,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=seed, default=0, help="of everything random (default 0)")
    p.add_argument("--steps", type=count, default=steps, help=f"generator steps (default {steps})")
    p.add_argument("--device", type=device, default=None, help="cpu, cuda, cuda:1 ... "
                   "(default: cuda where there is one)")
    p.add_argument("--out", default=None, help="folder for the results (default runs/<demo>)")
    p.add_argument("--generator", default=str(TINY_LM), help="folder or hub id (default tiny-lm)")
    p.add_argument("--target", default=target, help='folder, hub id, or "fresh" for random weights '
                   f'in the shape of the generator (default {pathlib.Path(target).name})')
    p.add_argument("--prompts", type=sentences, help="file with sentences to rephrase, one a line; "
                   "every fifth is held out (default: made by demos/corpus.py)")
    p.add_argument("--reward", choices=("dpg", "naive", "shuffled"), default="dpg",
                   help="dpg, or a control: naive is Phi itself, shuffled is dpg's tau permuted")
    p.add_argument("--inner", choices=("adam", "sgd"), default="adam", help="A's optimizer")
    p.add_argument("--credit", choices=("token", "example"), default="token",
                   help="what earns a reward of its own (the paper: example; default token)")
    p.add_argument("--baseline", choices=("batch", "group"), default="batch",
                   help="whose mean reward is subtracted: that of the minibatch, or that of the "
                   "samples of one prompt (the paper: group; default batch)")
    return p


def weights_parser(file, doc, *, steps, temperature):
    """The options of the demos whose metric reads the target's weights."""
    p = parser(file, doc, steps=steps, target=str(TINY_LM))
    p.add_argument("--inner-steps", type=positive, default=1, metavar="T",
                   help="training steps that the metagradient goes through (default 1)")
    p.add_argument("--temperature", type=above_zero, default=temperature,
                   help=f"of the generator's sampling (default {temperature:g})")
    return p


def count(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def seed(text):
    if not text.isdecimal() or int(text) > 10**12:  # a million steps a seed still fit 64 bits
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 to 10^12, got {text!r}")
    return int(text)


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def above_zero(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, 0.01 or more, got {text!r}")
    return value


def text_file(path):
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise argparse.ArgumentTypeError(f"cannot read {path!r}: {reason}") from None


def device(text):
    kind, _, index = text.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (index or "0").isdecimal() or int(index or 0) >= here:
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here")
    return torch.device(text)


def sentences(path):
    lines = [line.strip() for line in text_file(path).splitlines()]
    lines = list(dict.fromkeys(filter(None, lines)))
    if len(lines) < 5:
        raise argparse.ArgumentTypeError(f"{path!r} has {len(lines)} sentences, 5 are the least")
    return lines


# --------------------------------------------------------------------------- models and prompts

class Lab:
    """The models, prompts and rewards of one run, and its folder."""

    def __init__(self, arguments, argv=None, objection=lambda lab: None):
        """`objection(lab)` is a demo's own check: what is wrong with its options, or None."""
        # Arguments are checked to the last one before anything is written.
        self.began = time.perf_counter()
        args = self.args = arguments.parse_args(argv)
        if hasattr(sys.stdout, "reconfigure"):  # not every terminal knows every character
            sys.stdout.reconfigure(errors="replace")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)  # its retries are no news
        self.demo = pathlib.Path(arguments.prog).stem
        self.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.policy, self.tokenizer = self.load(args.generator)
            if args.target == "fresh":
                config = AutoConfig.from_pretrained(args.generator)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(args.seed)
                    self.target = AutoModelForCausalLM.from_config(
                        config, dtype=torch.float32).eval().to(self.device)
            else:
                self.target, other = self.load(args.target)
                if other.get_vocab() != self.tokenizer.get_vocab():
                    arguments.error("--target must have the tokenizer of --generator")
        except (OSError, ValueError, SafetensorError) as error:
            arguments.error(" ".join(str(error).split()).split(". ")[0])
        self.reference = copy.deepcopy(self.policy)  # the generator before any training
        end = self.tokenizer.eos_token_id
        self.start = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        if self.start is None:
            arguments.error("--generator: its tokenizer has neither a start nor an end of text")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if sum(p.numel() for p in self.target.parameters()) < 1e6:
            torch.set_num_threads(1)  # more would mostly wait for each other; and one is repeatable
        self.rng = random.Random(args.seed)
        if args.prompts:
            longest = max(len(self.tokenizer(corpus.prompt(s)).input_ids) for s in args.prompts)
            room = getattr(self.policy.config, "max_position_embeddings", math.inf) - ANSWER
            if longest > room:
                arguments.error(f"--prompts: the longest takes {longest} tokens; the generator has "
                                f"room for {room} and an answer")
            self.held_out = args.prompts[::5][:HELD_OUT]
            self.sentences = [s for i, s in enumerate(args.prompts) if i % 5]
        else:
            self.held_out = [corpus.render(frame, "en", self.rng)
                             for frame in corpus.frames(self.rng, HELD_OUT, held_out=True)]
        if message := objection(self):
            arguments.error(message)
        self.folder = pathlib.Path(args.out or f"runs/{self.demo}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            arguments.error(f"--out {str(self.folder)!r}: {error.strerror}")
        if not os.access(self.folder, os.W_OK):
            arguments.error(f"--out {str(self.folder)!r} is not writable")

    def load(self, name):
        """A causal model and its tokenizer, from a folder or the hub."""
        if not pathlib.Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise OSError(f"there is no model folder {name!r} (a hub id is owner/name)")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model.eval().to(self.device), AutoTokenizer.from_pretrained(name)

    def prompts(self, texts):
        batch = self.tokenizer([corpus.prompt(t) for t in texts], padding=True, padding_side="left",
                               return_tensors="pt")
        return batch.input_ids.to(self.device), batch.attention_mask.to(self.device)

    def training_prompts(self, n):
        if self.args.prompts:
            return self.prompts(self.rng.choices(self.sentences, k=n))
        return self.prompts([corpus.render(frame, "en", self.rng)
                             for frame in corpus.frames(self.rng, n)])

    def encode(self, rollouts):
        """Rollouts as training rows of the target."""
        return rollouts.examples(self.start)

    def texts(self, rollouts):
        """What was written, without the end-of-text."""
        return [self.tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
                for row, mask in zip(rollouts.tokens, rollouts.mask)]

    def examples(self, texts):
        """Rows [start] + text as labels, to measure a likelihood on."""
        rows = [self.tokenizer(t, add_special_tokens=False).input_ids for t in texts]
        tokens = torch.tensor([[self.start] + r + [0] * (max(map(len, rows)) - len(r))
                               for r in rows])
        labels = torch.arange(tokens.shape[1]) <= torch.tensor([[len(r)] for r in rows])
        labels[:, 0] = False
        return dpg.Examples(tokens.to(self.device), labels.to(self.device))

    # -------------------------------------------------------------- the target's LM head

    def head(self):
        """The name of the LM head's weight; a head tied to the embedding is untied first."""
        head, embedding = self.target.get_output_embeddings(), self.target.get_input_embeddings()
        if head.weight is embedding.weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            self.target.config.tie_word_embeddings = False
            print("the target's LM head was tied to its embedding; it is a copy now",
                  file=sys.stderr)
        return next(name for name, p in self.target.named_parameters() if p is head.weight)

    def paper_lr(self, steps):
        """The rate at which `steps` Adam steps move the target's head by 0.34 % of its scale: as
        the paper's 96 steps of 5e-6 move GPT-2's, whose weights have standard deviation 0.14."""
        return 96 * 5e-6 / 0.14 * self.target.get_output_embeddings().weight.std().item() / steps

    # ------------------------------------------------------------------------------- rewards

    def reward(self, metric, optimizer, steps):
        """Examples to rewards, as --reward asks, and the form of credit that goes with it."""
        attribute = functools.partial(
            dpg.metagradient, self.target, metric=metric, optimizer=optimizer, steps=steps,
            per_token=self.args.credit == "token")

        def naive(examples):
            """D_g is the g-th sample of every prompt; all of D_g earn Phi(A(D_g))."""
            phi = []
            for g in range(SAMPLES):
                part = dpg.Examples(*(x[g::SAMPLES] for x in examples))
                with torch.no_grad():
                    phi.append(metric(dpg.sft(self.target, part, optimizer, steps=steps)))
            phi = torch.stack(phi)
            tau = phi.repeat(len(examples.tokens) // SAMPLES)
            return dpg.Attribution(tau, phi.mean().item(), {}, phi.new_zeros(0))

        def shuffled(examples):
            """DPG's tau, dealt out again at random among the labels, or the examples."""
            result = attribute(examples)
            tau = result.tau.clone()
            dealt = examples.mask.bool() if tau.ndim == 2 else torch.ones_like(tau).bool()
            order = torch.randperm(int(dealt.sum()), generator=self.shuffle).to(self.device)
            tau[dealt] = tau[dealt][order]
            return result._replace(tau=tau)

        self.shuffle = torch.Generator().manual_seed(self.args.seed)
        return {"dpg": attribute, "naive": naive, "shuffled": shuffled}[self.args.reward]

    # ------------------------------------------------------------------------ the training loop

    def train(self, reward, observe, *, show, lr, steps, discount, max_new_tokens, kl_coef,
              entropy_coef, temperature=1.0, prompts=PROMPTS):
        """--steps times dpg_step; observe(result) gives a step's numbers, kept in metrics.jsonl.

        The one called `show` stands beside the progress bar. The `prompts` of a step are rounded
        so that each of the `steps` inner minibatches has equally many, and two at least."""
        prompts = steps * max(2, round(prompts / steps))
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr, weight_decay=0.0)
        # The rate falls to zero: advantages have unit spread however little is left to learn.
        total = max(1, self.args.steps)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        history, naive = [], self.args.reward == "naive"
        rows = prompts * SAMPLES // steps if self.args.baseline == "batch" else SAMPLES
        with open(self.folder / "metrics.jsonl", "w", encoding="utf-8", buffering=1) as log:
            for step in (bar := tqdm(range(self.args.steps), self.demo, file=sys.stderr)):
                result = dpg.dpg_step(
                    self.policy, optimizer, self.training_prompts(prompts), self.encode, reward,
                    samples=SAMPLES, max_new_tokens=max_new_tokens, seed=self.seed(step),
                    temperature=temperature,
                    group_size=None if naive else rows,  # naive: Phi is one value for all of D_g
                    discount=None if naive or self.args.credit == "example" else discount,
                    baseline="mean", scale=True, kl_coef=kl_coef, reference=self.reference,
                    entropy_coef=entropy_coef)
                decay.step()
                history.append({"step": step, "phi": result.attribution.metric, **observe(result),
                                "entropy": result.entropy, "kl": result.kl})
                log.write(json.dumps(history[-1]) + "\n")
                shown = " ".join(str(history[-1][show]).split())
                bar.set_postfix_str(f"Phi {result.attribution.metric:.3f} {shown}")
        return history

    def seed(self, step):
        return self.args.seed * 1_000_003 + step

    # ------------------------------------------------------------------------------ the checks

    def rollouts(self, policy, texts, *, max_new_tokens, temperature=1.0, samples=1, step=-1):
        return dpg.generate(policy, self.prompts(texts), samples=samples, seed=self.seed(step),
                            max_new_tokens=max_new_tokens, temperature=temperature)

    def fresh_data(self, policy, *, batch, steps, max_new_tokens, temperature=1.0):
        """`steps` batches of what the policy writes for held-out prompts."""
        return [self.rollouts(policy, self.fresh_texts(batch // SAMPLES, step), samples=SAMPLES,
                              max_new_tokens=max_new_tokens, temperature=temperature,
                              step=-2 - step).examples(self.start) for step in range(steps)]

    def sft(self, batches, *, lr):
        """Ordinary SFT of a copy of the target: torch.optim.AdamW and the model's own loss.

        Yields the parameters after each batch, for a metric."""
        model = copy.deepcopy(self.target)
        optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
        for batch in batches:
            labels = batch.tokens.masked_fill(batch.mask == 0, -100)
            optimizer.zero_grad()
            model(batch.tokens, labels=labels).loss.backward()
            optimizer.step()
            yield dict(model.named_parameters())

    def check(self, policy, measure, *, max_new_tokens):
        """measure(params) after each step of ordinary SFT on fresh text, for each multiple of the
        paper's movement."""
        data = self.fresh_data(policy, batch=CHECK_BATCH, steps=CHECK_STEPS,
                               max_new_tokens=max_new_tokens, temperature=self.args.temperature)
        return {multiple: [measure(params) for params in
                           self.sft(data, lr=multiple * self.paper_lr(CHECK_STEPS))]
                for multiple in MULTIPLES}

    @staticmethod
    def ends(name, curves):
        """The last value of each curve of `check`, named for result.json."""
        return {name + (f"_{m}x" if m > 1 else ""): curve[-1] for m, curve in curves.items()}

    def fresh_texts(self, n, step):
        """Held-out sentences for the check, the same for every generator."""
        rng = random.Random(self.seed(step))
        if self.args.prompts:
            return rng.choices(self.held_out, k=n)
        return [corpus.render(f, "en", rng) for f in corpus.frames(rng, n, held_out=True)]

    def finish(self, **result):
        """result.json and generator/."""
        args = self.args
        result = {"demo": self.demo, "seed": args.seed, "steps": args.steps,
                  "seconds": round(time.perf_counter() - self.began, 1), "reward": args.reward,
                  "inner": args.inner, "generator": args.generator, "target": args.target, **result}
        self.policy.save_pretrained(self.folder / "generator")
        self.tokenizer.save_pretrained(self.folder / "generator")
        (self.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        return result


# ------------------------------------------------------------------------------- the pictures

def spread(history, n):
    """n of its rows, or fewer, evenly from the first to the last."""
    return [history[i * (len(history) - 1) // (n - 1)] for i in range(n)] if history else []


def write(axis, lines):
    """Lines of text instead of a plot, each cut to the width of the figure."""
    axis.axis("off")
    lines = [re.sub(r"\s", " ", line)[:96] for line in lines]
    axis.text(0, 1, "\n".join(lines), family="monospace", va="top", fontsize=9,
              parse_math=False)  # a sample may hold any character
