"""The run: what a command asks for, the training of the generator, its files, and resumption.

A demo makes a `Run` of its parser, has `train` call its metric, and ends with `finish`, which
writes result.json. `run.models` are the models, `run.folder` is where pictures go.
"""
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import pickle
import shutil
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

import dpg
from demos import check, records, rewards
from demos.models import SAMPLES, Models

CHECKPOINT_SECONDS = 60  # between two checkpoints, at least
IDLE = 3  # steps in a row in which no text earns more than another end a run: all are the same


def one_line(method):
    """What stops a run that is under way, a full disk or numbers that are not finite, is said in a
    line; the last checkpoint is on the disk."""
    @functools.wraps(method)
    def called(run, *how, **named):
        try:
            return method(run, *how, **named)
        except (OSError, dpg.NotFinite) as error:
            print(f"\n{run.demo}.py: error: {error} (the last checkpoint is kept: "
                  f"--resume {run.folder})", file=sys.stderr)
            sys.exit(1)
    return called


class Run:
    """One run and its folder. Under torchrun each process has one; all compute, the first one
    writes and reports."""

    def __init__(self, parser, argv=None, objection=lambda models: None):
        """`objection(models)` is a demo's own check: what is wrong with its options, or None."""
        # Arguments are checked to the last one before anything is written.
        self.began, self.parser = time.perf_counter(), parser
        self.demo = pathlib.Path(parser.prog).stem
        argv = list(sys.argv[1:] if argv is None else argv)
        args = self.args = parser.parse_args(argv)
        if args.resume is not None:
            if vars(args) != vars(parser.parse_args(["--resume", args.resume])):
                parser.error("--resume goes on with the options of its run; give it alone")
            begun, out = self.interrupted(args.resume), args.resume
            argv = begun["argv"]
            args = self.args = parser.parse_args(argv)
            args.out, args.resume, args.stop = out, out, None
            if begun.get("prompts") != self.fingerprint():
                parser.error(f"--resume {out!r}: the file of --prompts has changed since")
        self.argv, self.options = argv, records.options(parser, argv)
        if hasattr(sys.stdout, "reconfigure"):  # not every terminal knows every character
            sys.stdout.reconfigure(errors="replace")
        device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.group, self.rank = None, 0
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # set by torchrun
            if args.reward != "dpg":
                parser.error("--reward: the controls run in one process")
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.group, self.rank = dist.group.WORLD, dist.get_rank()
        self.models = Models(args, device, parser.error)
        self.shuffle = torch.Generator().manual_seed(args.seed)
        if message := objection(self.models):
            parser.error(message)
        self.stamp = (begun["hash"] if args.resume else
                      records.stamp(self.demo, args.generator, args.target))
        self.folder = self.prepared(args.out)

    def fingerprint(self):
        """Of the sentences of --prompts: a run that is resumed must go on with the same."""
        return hashlib.sha256("\n".join(self.args.prompts or ()).encode()).hexdigest()

    # ------------------------------------------------------------------------ the training loop

    @one_line
    def train(self, metric, inner, observe, *, show, lr, steps, discount, max_new_tokens, kl_coef,
              entropy_coef, prompts, temperature=1.0, reads=None, kl_left=1.0, rise=1.0):
        """--steps times dpg_step; observe(step, result) gives its numbers, kept in metrics.jsonl.

        The one called `show` stands beside the progress bar. The `prompts` of a step are rounded
        so that each of the `steps` inner minibatches has equally many, and two at least. The pull
        towards the untrained generator falls to `kl_left` of kl_coef at the end, and the rate of
        `inner` grows to `rise` times its own. `reads` is the one parameter of the target that the
        metric reads, if it is one: after a single inner step nothing depends on how the others
        moved, and they are frozen."""
        prompts = steps * max(2, round(prompts / steps))
        if self.group is not None and prompts // steps % dist.get_world_size():
            self.parser.error(f"the number of processes must divide {prompts // steps}, the "
                              "prompts of a minibatch")
        args, models = self.args, self.models
        with models.frozen_but(reads if steps == 1 else None):
            optimizer = torch.optim.AdamW(models.policy.parameters(), lr, weight_decay=0.0)
            # The rate falls to zero: advantages have unit spread however little is left to learn.
            total = max(1, args.steps)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
            naive = args.reward == "naive"
            rows = prompts * SAMPLES // steps if args.baseline == "batch" else SAMPLES
            history = self.history = self.restore(optimizer, decay)
            if self.rank == 0 and not history:
                check.self_check(models, metric, inner, steps, dict(
                    max_new_tokens=max_new_tokens, temperature=temperature), prompts,
                    self.parser.error)
            self.save("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
            end = min(args.steps, args.stop or args.steps)
            bar = tqdm(range(len(history), end), self.demo, file=sys.stderr,
                       initial=len(history), total=args.steps, disable=self.rank > 0)
            for step in bar:
                now = dataclasses.replace(inner, lr=inner.lr * rise ** (step / total))
                reward = rewards.reward(models, metric, now, steps, shuffle=self.shuffle,
                                        group=self.group)
                result = dpg.dpg_step(
                    models.policy, optimizer, models.training_prompts(prompts), models.encode,
                    reward, samples=SAMPLES, max_new_tokens=max_new_tokens, seed=models.seed(step),
                    temperature=temperature,
                    group_size=None if naive else rows,  # naive: Phi is one value for all of D_g
                    discount=discount if not naive and args.credit == "token" else None,
                    baseline="mean", scale=True, entropy_coef=entropy_coef,
                    kl_coef=kl_coef * (1 - (1 - kl_left) * step / total),
                    reference=models.reference if kl_coef else None, microbatch=args.microbatch,
                    group=self.group)
                decay.step()
                row = {"step": step, "phi": result.attribution.metric, **observe(step, result),
                       "entropy": result.entropy, "kl": result.kl if kl_coef else None,
                       "learns": bool(result.advantages.any())}
                history.append(row)
                if self.rank == 0:
                    with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                        log.write(json.dumps(row) + "\n")
                self.checkpoint(optimizer, decay, last=step == end - 1)
                shown = row[show][:40] if isinstance(row[show], str) else f"{row[show]:.3f}"
                bar.set_postfix_str(f"Phi {row['phi']:.3f}  {show.replace('_', ' ')} {shown}")
                if len(history) >= IDLE and not any(row["learns"] for row in history[-IDLE:]):
                    bar.close()
                    print(f"{self.demo}.py: no text earns more than another, so nothing is left "
                          "to learn", file=sys.stderr)
                    break
        if self.group is not None:
            dist.destroy_process_group()
        if self.rank > 0:
            sys.exit()  # what follows, the first process does alone
        if len(history) == end < args.steps:
            print(f"{self.demo}.py: stopped after {end} steps; --resume {self.folder} goes on",
                  file=sys.stderr)
            sys.exit()
        return history

    # ------------------------------------------------------------------------------- the files

    def prepared(self, out):
        """The folder of the run, to write in; for the default name the next one without a run."""
        error, names = self.parser.error, itertools.chain(
            [out or f"runs/{self.demo}"], (f"runs/{self.demo}-{n}" for n in itertools.count(2)))
        folder = next(path for path in map(pathlib.Path, names)
                      if out or not (path / "arguments.json").exists())
        if self.group is not None:  # as the first process sees it
            dist.broadcast_object_list(chosen := [folder])
            folder, = chosen
        if not (self.args.resume or self.args.overwrite) and (folder / "result.json").exists():
            error(f"--out {str(folder)!r} holds a complete run; --overwrite replaces it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            error(f"--out {str(folder)!r}: {problem.strerror}")
        if not os.access(folder, os.W_OK):
            error(f"--out {str(folder)!r} is not writable")
        if not self.args.resume and self.rank == 0:
            self.folder = folder
            try:
                for name in ("arguments.json", "checkpoint.pt", "result.json"):  # of an earlier run
                    (folder / name).unlink(missing_ok=True)
                self.save("arguments.json", json.dumps({
                    "demo": self.demo, "argv": self.argv, "prompts": self.fingerprint(),
                    "hash": self.stamp}) + "\n")
            except OSError as problem:
                error(f"--out {str(folder)!r}: {problem.strerror}")
        return folder

    def save(self, name, content):
        """Writes a file of the run: wholly, or not at all."""
        if self.rank == 0:
            new = self.folder / (name + ".new")
            new.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(new, self.folder / name)

    def checkpoint(self, optimizer, decay, last):
        """All that the next step depends on; not at every step, for it may take longer than one."""
        now = time.perf_counter()
        if self.rank > 0 or not last and now - self.kept < CHECKPOINT_SECONDS:
            return
        buffer = io.BytesIO()
        torch.save({"policy": self.models.trainable(), "optimizer": optimizer.state_dict(),
                    "decay": decay.state_dict(), "rng": self.models.rng.getstate(),
                    "shuffle": self.shuffle.get_state(), "history": self.history,
                    "seconds": now - self.began}, buffer)
        self.save("checkpoint.pt", buffer.getbuffer())
        self.kept = time.perf_counter()

    def restore(self, optimizer, decay):
        """Back to the last checkpoint of a run that is resumed; its history, or an empty one."""
        self.kept, path = time.perf_counter(), self.folder / "checkpoint.pt"
        if not self.args.resume or not path.exists():
            return []
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            self.parser.error(f"--resume: {path} is damaged; begin anew, without --resume")
        self.models.policy.load_state_dict(state["policy"], strict=False)  # the rest is frozen
        optimizer.load_state_dict(state["optimizer"])
        decay.load_state_dict(state["decay"])
        self.models.rng.setstate(state["rng"])
        self.shuffle.set_state(state["shuffle"])
        self.began -= state["seconds"]
        return state["history"]

    def interrupted(self, folder):
        """What was asked of the run in a folder."""
        path = pathlib.Path(folder) / "arguments.json"
        try:
            begun = json.loads(path.read_text())
        except (OSError, ValueError):
            self.parser.error(f"--resume {folder!r}: no run was begun there")
        if begun["demo"] != self.demo:
            self.parser.error(f"--resume {folder!r}: that is a run of {begun['demo']}.py")
        if (path.parent / "result.json").exists():
            self.parser.error(f"--resume {folder!r}: that run is complete")
        return begun

    @one_line
    def finish(self, **result):
        """generator/ and result.json, and on request a record; the run is complete."""
        args, models = self.args, self.models
        result = {"demo": self.demo, "seed": args.seed, "steps": len(self.history),
                  "seconds": round(time.perf_counter() - self.began, 1), "reward": args.reward,
                  "inner": args.inner, "credit": args.credit, "baseline": args.baseline,
                  "generator": args.generator, "target": args.target, **result}
        old, new = self.folder / "generator", self.folder / "generator.new"
        shutil.rmtree(new, ignore_errors=True)
        models.policy.save_pretrained(new)
        models.tokenizer.save_pretrained(new)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(new, old)
        self.save("result.json", json.dumps(result, indent=2) + "\n")
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        if args.record:
            records.add(result, self.options, self.stamp)
        return result
