"""What the demos share: options, models, prompts, rewards, the training loop, the check by SFT.

A demo adds its question (a metric), its score, and its picture.
"""
import argparse
import copy
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import shutil
import sys
import time

import huggingface_hub
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import dpg
from demos import corpus

TINY_LM = pathlib.Path(__file__).resolve().parent / "tiny-lm"
PROMPTS, SAMPLES, HELD_OUT = 64, 4, 64  # N = 256 rollouts a step; prompts kept for the scores
ANSWER = 40  # tokens: no demo writes more
ROWS = 512  # are written at a time in a check

# For metrics of the target's weights (sections 4.1 to 4.3). Their check is 96 steps of plain AdamW
# on fresh text, at the rate that moves the head by as much of its scale as the paper's steps do,
# and at 10 and 100 times this rate.
CHECK_STEPS, CHECK_BATCH, MULTIPLES = 96, 64, (1, 10, 100)
WEIGHTS = dict(lr=8e-3, discount=0.5, kl_coef=0.03, entropy_coef=0.05, max_new_tokens=24)


# ------------------------------------------------------------------------------ the command line

class Parser(argparse.ArgumentParser):
    paper = {}  # what --preset paper makes the defaults

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage

    def parse_args(self, *how):
        args = super().parse_args(*how)
        if getattr(args, "preset", None) == "paper":
            self.set_defaults(**self.paper)
            args = super().parse_args(*how)
        return args


def parser(file, doc, *, steps, target):
    """The options of every demo; `file` and `doc` are the demo's __file__ and __doc__."""
    p = Parser(prog=pathlib.Path(file).name, description=doc,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=seed, default=0, help="of everything random (default 0)")
    p.add_argument("--steps", type=count, default=steps, help=f"generator steps (default {steps})")
    p.add_argument("--device", type=device, default=None, help="cpu, cuda, cuda:1 ... "
                   "(default: cuda where there is one)")
    p.add_argument("--out", default=None, help="folder for the results (default runs/<demo>)")
    p.add_argument("--resume", metavar="DIR", help="continue the run that was interrupted in this "
                   "folder, from its last complete step and with its options")
    p.add_argument("--microbatch", type=positive, metavar="M", help="rows that are computed at a "
                   "time, to bound the memory (default: all)")
    p.add_argument("--generator", default=str(TINY_LM), help="folder or hub id (default tiny-lm)")
    p.add_argument("--target", default=target, help='folder, hub id, or "fresh" for random weights '
                   f'in the shape of the generator (default {pathlib.Path(target).name})')
    p.add_argument("--prompts", type=sentences, help="file with sentences to rephrase, one a line; "
                   "every fifth is held out (default: made by demos/corpus.py)")
    p.add_argument("--reward", choices=("dpg", "naive", "shuffled"), default="dpg",
                   help="dpg, or a control: naive is Phi itself, shuffled is dpg's tau permuted")
    p.add_argument("--inner", choices=("adam", "sgd"), default="adam", help="A's optimizer")
    p.add_argument("--credit", choices=("token", "example"),
                   help="what earns a reward of its own (the paper: example; default token, but "
                   "example where generator and target have different tokenizers)")
    p.add_argument("--baseline", choices=("batch", "group"), default="batch",
                   help="whose mean reward is subtracted: that of the minibatch, or that of the "
                   "samples of one prompt (the paper: group; default batch)")
    return p


def preset(p, *, steps):
    """--preset paper: the models and numbers of section 4 and appendix E, for text as the target.

    The paper's code sums 128 micro-batch means; here a step's gradient is the mean, 128 times
    smaller, and eps and the root of eps_root with it. One generator update a step, not eight."""
    p.paper = dict(generator=LLAMA, target=LLAMA, steps=steps, credit="example", baseline="group",
                   microbatch=16)
    p.add_argument("--preset", choices=("laptop", "paper"), default="laptop",
                   help="paper: its models, prompts a step, steps and learning rates, where no "
                   "other option says otherwise; wants a GPU of 100 GB (default laptop)")


LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
PAPER = dict(prompts=256, lr=1e-6, discount=1.0, kl_coef=0.0, entropy_coef=0.0, max_new_tokens=128)
PAPER_INNER = dpg.AdamW(1e-6, eps=1e-8 / 128, eps_root=1e-9 / 128**2, weight_decay=1e-4)


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

def one_line(method):
    """What stops a run that is under way, a full disk or numbers that are not finite, is said in a
    line; the last complete step is on the disk."""
    @functools.wraps(method)
    def run(lab, *how, **named):
        try:
            return method(lab, *how, **named)
        except (OSError, dpg.NotFinite) as error:
            print(f"\n{lab.demo}.py: error: {error} (the last complete step is kept: "
                  f"--resume {lab.folder})", file=sys.stderr)
            sys.exit(1)
    return run


class Lab:
    """The models, prompts and rewards of one run, and its folder.

    Under torchrun each process has one; all compute, the first one writes and reports."""

    def __init__(self, arguments, argv=None, objection=lambda lab: None):
        """`objection(lab)` is a demo's own check: what is wrong with its options, or None."""
        # Arguments are checked to the last one before anything is written.
        self.began = time.perf_counter()
        self.demo = pathlib.Path(arguments.prog).stem
        argv = list(sys.argv[1:] if argv is None else argv)
        args = self.args = arguments.parse_args(argv)
        if args.resume is not None:
            if vars(args) != vars(arguments.parse_args(["--resume", args.resume])):
                arguments.error("--resume goes on with the options of its run; give it alone")
            argv = self.interrupted(arguments, args.resume)
            args, out = arguments.parse_args(argv), args.resume
            self.args, args.out, args.resume = args, out, out
            if self.began_with != self.fingerprint():
                arguments.error(f"--resume {out!r}: the file of --prompts has changed since")
        if hasattr(sys.stdout, "reconfigure"):  # not every terminal knows every character
            sys.stdout.reconfigure(errors="replace")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)  # its retries are no news
        self.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.group, self.rank, self.error = None, 0, arguments.error
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # set by torchrun
            if args.reward != "dpg":
                arguments.error("--reward: the controls run in one process")
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.group, self.rank = dist.group.WORLD, dist.get_rank()
        try:
            self.policy, self.tokenizer = self.load(args.generator)
            self.target_tokenizer = self.tokenizer
            if args.target == "fresh":
                config = AutoConfig.from_pretrained(args.generator)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(args.seed)
                    self.target = AutoModelForCausalLM.from_config(
                        config, dtype=torch.float32).eval().to(self.device)
            else:
                self.target, self.target_tokenizer = self.load(args.target)
        except (OSError, ValueError, SafetensorError) as error:
            arguments.error(" ".join(str(error).split()).split(". ")[0])
        self.same_tokens = self.target_tokenizer.get_vocab() == self.tokenizer.get_vocab()
        if args.credit is None:
            args.credit = "token" if self.same_tokens else "example"
        if args.credit == "token" and not self.same_tokens:
            arguments.error("--credit token needs a target with the tokenizer of the generator")
        end = self.target_tokenizer.eos_token_id
        start = self.target_tokenizer.bos_token_id
        self.start, self.end = end if start is None else start, end
        if self.start is None:
            arguments.error("--target: its tokenizer has neither a start nor an end of text")
        self.finish_tokenizer(arguments)
        self.reference = copy.deepcopy(self.policy)  # the generator before any training
        if sum(p.numel() for p in self.target.parameters()) < 1e6:
            torch.set_num_threads(1)  # more would mostly wait for each other; and one is repeatable
        self.rng = random.Random(args.seed)
        if args.prompts:
            asked = self.requests(args.prompts).input_ids
            unknown = self.end_ids | {self.tokenizer.unk_token_id}
            for sentence, row in zip(args.prompts, asked):
                if unknown & set(row[1:]):
                    arguments.error("--prompts: the generator's tokenizer does not know a "
                                    f"character of {sentence!r}")
            longest = max(map(len, asked))
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
        if not args.resume and self.rank == 0:
            try:
                for name in ("arguments.json", "checkpoint.pt", "result.json"):  # of an earlier run
                    (self.folder / name).unlink(missing_ok=True)
                self.save("arguments.json", json.dumps({
                    "demo": self.demo, "argv": argv, "prompts": self.fingerprint()}) + "\n")
            except OSError as error:
                arguments.error(f"--out {str(self.folder)!r}: {error.strerror}")

    def fingerprint(self):
        """Of the sentences of --prompts: a run that is resumed must go on with the same."""
        return hashlib.sha256("\n".join(self.args.prompts or ()).encode()).hexdigest()

    def finish_tokenizer(self, arguments):
        """Texts end with the tokenizer's end, and with those of the generation config."""
        end, own = self.tokenizer.eos_token_id, self.policy.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        ends = self.end_ids = {end, *ends} - {None}
        if not ends:
            arguments.error("--generator: its tokenizer has no end of text, nor its model")
        own.eos_token_id = sorted(ends)
        pad, size = self.tokenizer.pad_token_id, self.policy.get_input_embeddings().weight.shape[0]
        if pad is None or pad >= size:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(min(ends))
        if self.requests(["the cat"]).input_ids[0][-1] in ends:
            arguments.error("--generator: its tokenizer puts an end of text after a prompt")

    def load(self, name):
        """A causal model and its tokenizer, from a folder or the hub."""
        if not pathlib.Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise OSError(f"there is no model folder {name!r} (a hub id is owner/name)")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model.get_input_embeddings().padding_idx = None  # its gradient would be dropped
        return model.eval().to(self.device), AutoTokenizer.from_pretrained(name)

    # ------------------------------------------------------------------------ text and tokens

    def requests(self, texts, **how):
        """What the generator is asked, in its chat's words where it has a chat template."""
        if not self.tokenizer.chat_template:
            return self.tokenizer([corpus.prompt(text) for text in texts], **how)
        chats = [[{"role": "user", "content": corpus.chat_prompt(text)}] for text in texts]
        return self.tokenizer(self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=False), add_special_tokens=False, **how)

    def prompts(self, texts):
        batch = self.requests(texts, padding=True, padding_side="left", return_tensors="pt")
        return batch.input_ids.to(self.device), batch.attention_mask.to(self.device)

    def training_prompts(self, n):
        if self.args.prompts:
            return self.prompts(self.rng.choices(self.sentences, k=n))
        return self.prompts([corpus.render(frame, "en", self.rng)
                             for frame in corpus.frames(self.rng, n)])

    def texts(self, rollouts):
        """What was written, without the end-of-text."""
        return [self.tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
                for row, mask in zip(rollouts.tokens, rollouts.mask)]

    def length(self, texts):
        """Tokens that the generator needs for the longest of these texts and its end."""
        return 1 + max(len(row) for row in
                       self.tokenizer(texts, add_special_tokens=False).input_ids)

    def encode(self, rollouts):
        """Rollouts as training rows of the target: their tokens, or their text encoded anew."""
        if self.same_tokens:
            return rollouts.examples(self.start)
        # Rows of a constant length, or it would depend on the samples (departure 2 in dpg.py):
        # half as much again as the prompts' sentences need.
        ours, theirs = (sum(map(len, tokenizer(self.held_out, add_special_tokens=False).input_ids))
                        for tokenizer in (self.tokenizer, self.target_tokenizer))
        length = math.ceil(1.5 * theirs / ours * rollouts.tokens.shape[1]) + 1
        rows = self.target_tokenizer(self.texts(rollouts), add_special_tokens=False).input_ids
        full = rollouts.mask.all(1).tolist()  # cut off: the end of the text is not known
        return self.rows([(row + [self.end] * (not row or not cut))[:length - 1]
                          for row, cut in zip(rows, full)], length)

    def examples(self, texts):
        """Rows [start] + text as labels, to measure a likelihood on."""
        rows = self.target_tokenizer(texts, add_special_tokens=False).input_ids
        return self.rows(rows, 1 + max(map(len, rows)))

    def rows(self, rows, length):
        tokens = torch.tensor([[self.start] + r + [0] * (length - 1 - len(r)) for r in rows])
        labels = torch.arange(length) <= torch.tensor([[len(r)] for r in rows])
        labels[:, 0] = False
        return dpg.Examples(tokens.to(self.device), labels.to(self.device))

    def trained(self, examples, optimizer, steps):
        """The target's parameters after the inner run on these examples."""
        return dpg.sft(self.target, examples, optimizer, steps=steps,
                       microbatch=self.args.microbatch)

    def likelihood(self, examples):
        return dpg.lm_metric(self.target, examples, microbatch=self.args.microbatch)

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
            per_token=self.args.credit == "token", microbatch=self.args.microbatch,
            method="replay" if self.args.microbatch or self.group else "unroll", group=self.group)

        def naive(examples):
            """D_g is the g-th sample of every prompt; all of D_g earn Phi(A(D_g))."""
            phi = []
            for g in range(SAMPLES):
                part = dpg.Examples(*(x[g::SAMPLES] for x in examples))
                with torch.no_grad():
                    phi.append(metric(self.trained(part, optimizer, steps)))
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

    def self_check(self, metric, inner, steps, how, prompts):
        """Holds tau and log pi of the models of this run against the truth, and says so in a line.

        In float64: in float32 a small learning rate leaves nothing to see."""
        target = copy.deepcopy(self.target).double()
        texts = self.fresh_texts(max(prompts, steps))
        written = self.encode(self.rollouts(self.policy, texts, samples=SAMPLES, step=-3, **how))
        few = dpg.Examples(*(x[:2 * steps] for x in written))
        try:
            off = dpg.check_target(target, few, metric, inner, steps=steps,
                                   per_token=self.args.credit == "token")
            drawn = dpg.check_policy(self.policy, self.prompts(texts[:4]), **how)
        except ValueError as error:
            self.error(f"self-check: {error}")
        left = self.left_out(target, written, metric, inner, steps)
        print(f"self-check  tau against differences {off:.0e}, log pi against the draw "
              f"{drawn:.0e}, tau against leaving an example out {left:.0%}")

    def left_out(self, target, examples, metric, inner, steps, n=4):
        """How far tau_i is from Phi(w = 1) - Phi(w_i = 0), which it stands in for: of n examples
        evenly spread over the run, relative to the norm of the differences."""
        how = dict(steps=steps, microbatch=self.args.microbatch)
        result = dpg.metagradient(target, examples, metric, inner, method="replay", **how)
        where, phi = range(0, len(result.tau) // n * n, len(result.tau) // n), []
        for i in where:
            weights = torch.ones_like(result.tau)
            weights[i] = 0
            with torch.no_grad():
                phi.append(metric(dpg.sft(target, examples, inner, weights=weights, **how)))
        difference = result.metric - torch.stack(phi)
        return ((result.tau[list(where)] - difference).norm() / difference.norm()).item()

    @one_line
    def train(self, metric, inner, observe, *, show, lr, steps, discount, max_new_tokens, kl_coef,
              entropy_coef, temperature=1.0, prompts=PROMPTS):
        """--steps times dpg_step; observe(step, result) gives its numbers, kept in metrics.jsonl.

        The one called `show` stands beside the progress bar. The `prompts` of a step are rounded
        so that each of the `steps` inner minibatches has equally many, and two at least."""
        prompts = steps * max(2, round(prompts / steps))
        if self.group is not None and prompts // steps % dist.get_world_size():
            self.error(f"the number of processes must divide {prompts // steps}, the prompts of a "
                       "minibatch")
        reward = self.reward(metric, inner, steps)
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr, weight_decay=0.0)
        # The rate falls to zero: advantages have unit spread however little is left to learn.
        total = max(1, self.args.steps)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        naive = self.args.reward == "naive"
        rows = prompts * SAMPLES // steps if self.args.baseline == "batch" else SAMPLES
        history = self.restore(optimizer, decay)
        if self.rank == 0 and not history:
            self.self_check(metric, inner, steps, dict(
                max_new_tokens=max_new_tokens, temperature=temperature), prompts)
        self.save("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
        bar = tqdm(range(len(history), self.args.steps), self.demo, file=sys.stderr,
                   initial=len(history), total=self.args.steps, disable=self.rank > 0)
        for step in bar:
            result = dpg.dpg_step(
                self.policy, optimizer, self.training_prompts(prompts), self.encode, reward,
                samples=SAMPLES, max_new_tokens=max_new_tokens, seed=self.seed(step),
                temperature=temperature,
                group_size=None if naive else rows,  # naive: Phi is one value for all of D_g
                discount=discount if not naive and self.args.credit == "token" else None,
                baseline="mean", scale=True, kl_coef=kl_coef, entropy_coef=entropy_coef,
                reference=self.reference if kl_coef else None, microbatch=self.args.microbatch,
                group=self.group)
            decay.step()
            history.append({"step": step, "phi": result.attribution.metric, **observe(step, result),
                            "entropy": result.entropy, "kl": result.kl if kl_coef else None})
            if self.rank == 0:
                with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(history[-1]) + "\n")
            self.checkpoint(optimizer, decay, history)
            shown = " ".join(str(history[-1][show]).split())
            bar.set_postfix_str(f"Phi {result.attribution.metric:.3f} {shown}")
        if self.group is not None:
            dist.destroy_process_group()
        if self.rank > 0:
            sys.exit()  # what follows, the first process does alone
        return history

    # ------------------------------------------------------------- interruption and resumption

    def save(self, name, content):
        """Writes a file of the run: wholly, or not at all."""
        if self.rank == 0:
            new = self.folder / (name + ".new")
            new.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(new, self.folder / name)

    def checkpoint(self, optimizer, decay, history):
        """All that the next step depends on."""
        if self.rank > 0:
            return
        buffer = io.BytesIO()
        torch.save({"policy": self.policy.state_dict(), "optimizer": optimizer.state_dict(),
                    "decay": decay.state_dict(), "rng": self.rng.getstate(),
                    "shuffle": self.shuffle.get_state(), "history": history,
                    "seconds": time.perf_counter() - self.began}, buffer)
        self.save("checkpoint.pt", buffer.getbuffer())

    def restore(self, optimizer, decay):
        """Back to the last checkpoint of a run that is resumed; its history, or an empty one."""
        if not self.args.resume or not (self.folder / "checkpoint.pt").exists():
            return []
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            self.error(f"--resume: {path} is damaged; begin anew, without --resume")
        self.policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        decay.load_state_dict(state["decay"])
        self.rng.setstate(state["rng"])
        self.shuffle.set_state(state["shuffle"])
        self.began -= state["seconds"]
        return state["history"]

    def interrupted(self, arguments, folder):
        """The options of the run in a folder."""
        path = pathlib.Path(folder) / "arguments.json"
        try:
            run = json.loads(path.read_text())
        except (OSError, ValueError):
            arguments.error(f"--resume {folder!r}: no run was begun there")
        if run["demo"] != self.demo:
            arguments.error(f"--resume {folder!r}: that is a run of {run['demo']}.py")
        if (path.parent / "result.json").exists():
            arguments.error(f"--resume {folder!r}: that run is complete")
        self.began_with = run.get("prompts")
        return run["argv"]

    def seed(self, step):
        return self.args.seed * 1_000_003 + step

    # ------------------------------------------------------------------------------ the checks

    def rollouts(self, policy, texts, *, max_new_tokens, temperature=1.0, samples=1, step=-1):
        return dpg.generate(policy, self.prompts(texts), samples=samples, seed=self.seed(step),
                            max_new_tokens=max_new_tokens, temperature=temperature,
                            microbatch=self.args.microbatch or ROWS)

    def fresh_data(self, policy, *, batch, steps, max_new_tokens, temperature=1.0):
        """`steps` batches of what the policy writes for held-out prompts."""
        written = self.encode(self.rollouts(
            policy, self.fresh_texts(steps * batch // SAMPLES), samples=SAMPLES, step=-2,
            max_new_tokens=max_new_tokens, temperature=temperature))
        return [dpg.Examples(*part) for part in zip(*(x.chunk(steps) for x in written))]

    def sft(self, batches, *, lr):
        """Ordinary SFT of a copy of the target: torch.optim.AdamW and the model's own loss.

        Yields the parameters after each batch, for a metric."""
        model = copy.deepcopy(self.target)
        optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
        for batch in batches:
            optimizer.zero_grad()
            for tokens, mask in zip(*(x.split(self.args.microbatch or len(x)) for x in batch)):
                labels = tokens.masked_fill(mask == 0, -100)
                share = mask.sum() / batch.mask.sum()  # the model's loss is a mean over labels
                (share * model(tokens, labels=labels, use_cache=False).loss).backward()
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

    def fresh_texts(self, n):
        """Held-out sentences for the check, the same for every generator."""
        rng = random.Random(self.seed(0))
        if self.args.prompts:
            return rng.choices(self.held_out, k=n)
        return [corpus.render(f, "en", rng) for f in corpus.frames(rng, n, held_out=True)]

    @one_line
    def finish(self, **result):
        """generator/ and result.json; the run is complete."""
        args = self.args
        result = {"demo": self.demo, "seed": args.seed, "steps": args.steps,
                  "seconds": round(time.perf_counter() - self.began, 1), "reward": args.reward,
                  "inner": args.inner, "credit": args.credit, "baseline": args.baseline,
                  "generator": args.generator, "target": args.target, **result}
        old, new = self.folder / "generator", self.folder / "generator.new"
        shutil.rmtree(new, ignore_errors=True)
        self.policy.save_pretrained(new)
        self.tokenizer.save_pretrained(new)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(new, old)
        self.save("result.json", json.dumps(result, indent=2) + "\n")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
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
