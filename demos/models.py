"""The models of a run and their text: prompts, what is written for them, rows to train on.

A demo has these as `run.models`. Its metric is made of `examples` and `likelihood`, or of the
target's `head`; its scores are of `texts(rollouts(policy, held_out, ...))`, where the policy is
the trained one (`policy`) or the same before any training (`reference`).
"""
import contextlib
import copy
import math
import pathlib
import random
import re
import sys

import huggingface_hub
import jinja2
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import dpg
from demos import corpus, options

SAMPLES, HELD_OUT = 4, 64  # rollouts of a prompt; prompts kept for the scores
ANSWER = 40  # tokens: no demo writes more
ROWS = 512  # are written at a time in a check


def twin(model):
    """A copy; what is frozen is shared."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


class Models:
    """Generator and target, their tokenizers, the prompts of a run, and its random numbers."""

    def __init__(self, args, device, error):
        """`error(message)` ends the program where an option does not fit."""
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)  # its retries are no news
        self.args, self.device, self.policy = args, device, None
        try:
            self.policy, self.tokenizer = self.load(args.generator)
            self.target_tokenizer = self.tokenizer
            if args.target == "fresh":
                self.target = self.fresh(self.policy.config, args.seed)
            elif args.target == args.generator:
                self.target = twin(self.policy)
            else:
                self.target, self.target_tokenizer = self.load(args.target)
        except (ImportError, OSError, ValueError, SafetensorError) as problem:
            name = args.generator if self.policy is None else args.target
            ways = options.WAYS if options.SMOLLM2 == name or name.endswith(".gguf") else ""
            error(" ".join(str(problem).split()).split(". ")[0] + ways)
        self.same_tokens = self.target_tokenizer.get_vocab() == self.tokenizer.get_vocab()
        if args.credit is None:
            args.credit = "token" if self.same_tokens else "example"
        if args.credit == "token" and not self.same_tokens:
            error("--credit token needs a target with the tokenizer of the generator")
        end = self.target_tokenizer.eos_token_id
        start = self.target_tokenizer.bos_token_id
        self.start, self.end = end if start is None else start, end
        if self.start is None:
            error("--target: its tokenizer has neither a start nor an end of text")
        self.finish_tokenizer(error)
        self.reference = twin(self.policy)
        if sum(p.numel() for p in self.target.parameters()) < 1e6:
            torch.set_num_threads(1)  # more would mostly wait for each other; and one is repeatable
        self.rng = random.Random(args.seed)
        if args.prompts:
            asked = self.requests(args.prompts).input_ids
            unknown = self.end_ids | {self.tokenizer.unk_token_id}
            for sentence, row in zip(args.prompts, asked):
                if unknown & set(row[1:]):
                    error("--prompts: the generator's tokenizer does not know a character of "
                          f"{sentence!r}")
            longest = max(map(len, asked))
            room = getattr(self.policy.config, "max_position_embeddings", math.inf) - ANSWER
            if longest > room:
                error(f"--prompts: the longest takes {longest} tokens; the generator has room for "
                      f"{room} and an answer")
            self.held_out = args.prompts[::5][:HELD_OUT]
            self.sentences = [s for i, s in enumerate(args.prompts) if i % 5]
        else:
            self.held_out = [corpus.render(frame, "en", self.rng)
                             for frame in corpus.frames(self.rng, HELD_OUT, held_out=True)]

    def load(self, name):
        """A causal model and its tokenizer, from a folder, a GGUF file or the hub."""
        path, how = pathlib.Path(name), {}
        files = sorted(path.glob("*.gguf")) if path.is_dir() else [path] * path.is_file()
        if path.suffix == ".gguf" and not files:
            raise OSError(f"there is no file {name!r}")
        if files and not (path / "config.json").exists():
            name, how = str(files[0].parent), {"gguf_file": files[0].name}
        elif not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise OSError(f"there is no model folder {name!r} (a hub id is owner/name)")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **how)
        if how:  # its numbers are float32 now; a saved model must not ask for their old form
            model.hf_quantizer, model.is_quantized = None, False
            del model.config.quantization_config
        model.get_input_embeddings().padding_idx = None  # its gradient would be dropped
        self.freeze(model)
        return model.eval().to(self.device), AutoTokenizer.from_pretrained(name, **how)

    def freeze(self, model):
        """With --layers, only the last blocks of a model and what follows them are trained."""
        if n := self.args.layers:
            lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
            blocks = max(lists, key=len)
            if n > len(blocks):
                raise ValueError(f"--layers {n}: the model has {len(blocks)} blocks")
            first, trained = next(blocks[-n].parameters()), False
            for p in model.parameters():  # in the order of the forward pass
                trained = trained or p is first
                p.requires_grad_(trained)

    def fresh(self, config, seed):
        """A model of this shape with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.freeze(model)
        return model.eval().to(self.device)

    def finish_tokenizer(self, error):
        """Texts end with the tokenizer's end, and with those of the generation config."""
        end, own = self.tokenizer.eos_token_id, self.policy.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        ends = self.end_ids = {end, *ends} - {None}
        if not ends:
            error("--generator: its tokenizer has no end of text, nor its model")
        own.eos_token_id = sorted(ends)
        pad, size = self.tokenizer.pad_token_id, self.policy.get_input_embeddings().weight.shape[0]
        if pad is None or pad >= size:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(min(ends))
        if self.requests(["the cat"]).input_ids[0][-1] in ends:
            error("--generator: its tokenizer puts an end of text after a prompt")

    # ------------------------------------------------------------------ what the generator is asked

    def requests(self, texts, **how):
        """What the generator is asked, in its chat's words where it has a chat template."""
        if not self.tokenizer.chat_template:
            return self.tokenizer([corpus.prompt(text) for text in texts], **how)

        def chats(*first):
            return self.tokenizer.apply_chat_template(
                [[*first, {"role": "user", "content": corpus.chat_prompt(text)}] for text in texts],
                add_generation_prompt=True, tokenize=False)

        asked = chats()
        with contextlib.suppress(jinja2.TemplateError):  # not every chat has a system
            # A template's own system text can be longer than the request: then an empty one.
            asked = min(asked, chats({"role": "system", "content": ""}), key=lambda x: len(x[0]))
        return self.tokenizer(asked, add_special_tokens=False, **how)

    def prompts(self, texts):
        batch = self.requests(texts, padding=True, padding_side="left", return_tensors="pt")
        return batch.input_ids.to(self.device), batch.attention_mask.to(self.device)

    def training_prompts(self, n):
        if self.args.prompts:
            return self.prompts(self.rng.choices(self.sentences, k=n))
        return self.prompts([corpus.render(frame, "en", self.rng)
                             for frame in corpus.frames(self.rng, n)])

    def fresh_texts(self, n):
        """Held-out sentences for a check, the same for every generator."""
        rng = random.Random(self.seed(0))
        if self.args.prompts:
            return rng.choices(self.held_out, k=n)
        return [corpus.render(f, "en", rng) for f in corpus.frames(rng, n, held_out=True)]

    def seed(self, step):
        return self.args.seed * 1_000_003 + step

    def trainable(self):
        """What a checkpoint keeps of the policy."""
        return {name: p.detach() for name, p in self.policy.named_parameters() if p.requires_grad}

    # ----------------------------------------------------------------------- what it writes

    def rollouts(self, policy, texts, *, max_new_tokens, temperature=1.0, samples=1, step=-1):
        return dpg.generate(policy, self.prompts(texts), samples=samples, seed=self.seed(step),
                            max_new_tokens=max_new_tokens, temperature=temperature,
                            microbatch=self.args.microbatch or ROWS)

    def texts(self, rollouts):
        """What was written, without the end-of-text."""
        return [self.tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
                for row, mask in zip(rollouts.tokens, rollouts.mask)]

    def length(self, texts):
        """Tokens that the generator needs for the longest of these texts and its end."""
        return 1 + max(len(row) for row in
                       self.tokenizer(texts, add_special_tokens=False).input_ids)

    # ----------------------------------------------------------------------- what the target reads

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
        ends = rollouts.tokens.new_tensor(self.policy.generation_config.eos_token_id)
        ended = torch.isin(rollouts.tokens[:, -1], ends) | ~rollouts.mask.all(1)
        return self.rows([(row + [self.end] * (not row or whole))[:length - 1]
                          for row, whole in zip(rows, ended.tolist())], length)

    def examples(self, texts):
        """Rows [start] + text as labels, to measure a likelihood on."""
        rows = self.target_tokenizer(texts, add_special_tokens=False).input_ids
        return self.rows(rows, 1 + max(map(len, rows)))

    def rows(self, rows, length):
        tokens = torch.tensor([[self.start] + r + [0] * (length - 1 - len(r)) for r in rows])
        labels = torch.arange(length) <= torch.tensor([[len(r)] for r in rows])
        labels[:, 0] = False
        return dpg.Examples(tokens.to(self.device), labels.to(self.device))

    def likelihood(self, examples):
        return dpg.lm_metric(self.target, examples)

    def trained(self, examples, optimizer, steps):
        """The target's parameters after the inner run on these examples."""
        return dpg.sft(self.target, examples, optimizer, steps=steps,
                       microbatch=self.args.microbatch)

    # ----------------------------------------------------------------------- the target's LM head

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

    @contextlib.contextmanager
    def frozen_but(self, name):
        """Only this parameter of the target moves; None: all of them do."""
        others = [p for k, p in self.target.named_parameters()
                  if p.requires_grad and name not in (None, k)]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)
