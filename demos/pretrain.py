"""Makes tiny-lm, the language model of the demos, from nothing: a one-layer GPT-2.

    python demos/pretrain.py            # writes demos/tiny-lm, bit-identical for seed and threads

Claim (seed 0, one thread, one of two shared CPU cores, 171 s, November 2026): loss 1.238 nats per
token. Of 4096 answers sampled for held-out prompts 60 % begin in English, 8 to 10 % in each of
German, Spanish, French and Italian, and 97 to 99 % of these are sentences of their language; 90 to
98 % translate what they were asked. 6 % are identifiers, some of them out of 64 that half of the
identifiers in the corpus are drawn from: it knows these by heart (`KNOWN` in corpus.py).

Half of the documents are a request and its answer, half an answer alone, because the demos train
their targets on answers without the request.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and its uuid.py would hide the standard one.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import argparse
import random
import re
import time

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from demos import corpus

END = "<|endoftext|>"                   # starts a document, ends it, and pads
# After training the logits are multiplied by this. A model this small gives a little of every next
# token's probability, 0.3 % in the languages, to the words that cannot stand there; this takes most
# of it away, and choices among equals stay equal.
SHARPNESS = 1.2


def build_tokenizer():
    """Known words are whole tokens with their leading space, all else is single characters.

    A word counts only where no letter, digit, apostrophe or hyphen follows, so every character of
    an identifier is a token of its own, wherever it stands.
    """
    words = "|".join(re.escape(word) for word in corpus.words())
    characters = {chr(code) for code in range(32, 127)} | set("\t\n" + "".join(corpus.words()))
    vocabulary = [END, *sorted(characters), "Rephrase:", " =>", *(f" {w}" for w in corpus.words())]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf" (?:{words})(?![\p{{L}}\d'-])|Rephrase:| =>|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=END,
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=128)


def build_model(tokenizer):
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=1, n_head=4,
        activation_function="relu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=end, eos_token_id=end, pad_token_id=end))
    # What is sampled by default is the model's own distribution, not its top 50 tokens.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=38,
        bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return model


def documents(rng, n, known):
    """n requests with their answers, and n answers without a request."""
    texts = []
    for frame in corpus.frames(rng, n):
        sentence = corpus.render(frame, "en", rng)
        # Half of the requests lack the start token, so that prompts work with and without it.
        request = rng.choice((END, "")) + corpus.prompt(sentence)
        texts.append(request + corpus.answer(frame, sentence, rng, known) + END)
    texts += [END + corpus.answer(frame, None, rng, known) + END for frame in corpus.frames(rng, n)]
    return texts


def mean_loss(model, tokenizer, texts, rows=16):
    """Negative log-likelihood per token, the first of each text aside."""
    # Few rows at a time, alike in length, because padding costs time.
    documents = sorted(tokenizer(texts).input_ids, key=len)
    total = 0
    for i in range(0, len(documents), rows):
        batch = tokenizer.pad({"input_ids": documents[i:i + rows]}, padding_side="right",
                              return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:]
        logits = model(**batch).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / sum(len(document) - 1 for document in documents)


def train(model, tokenizer, rng, steps, known, n=32, lr=4e-3):
    """AdamW on fresh documents in every step; returns the loss on a thousand pairs more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    # One step more than taken, so that the last one still moves.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.05)
    for _ in (progress := tqdm(range(steps), desc="pretrain", mininterval=1)):
        loss = mean_loss(model, tokenizer, documents(rng, n, known))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        return mean_loss(model, tokenizer, documents(rng, 1000, known)).item()


def measure(model, tokenizer, rng, n):
    """Samples one answer to each of n held-out prompts. For each language: how many begin in it,
    and which shares of these are sentences of it, and say what they were asked in other words."""
    frames = corpus.frames(rng, n, held_out=True)
    sentences = [corpus.render(frame, "en", rng) for frame in frames]
    batch = tokenizer([END + corpus.prompt(s) for s in sentences], padding=True,
                      return_tensors="pt")
    tokens = model.generate(**batch)[:, batch.input_ids.shape[1]:]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    table = {}
    for language in corpus.LANGUAGES:
        begun = [i for i, text in enumerate(texts) if corpus.begins_in(text) == language]
        parsed = [corpus.parse(texts[i], language) for i in begun]
        right = [p == frames[i] and texts[i] != " " + sentences[i] for i, p in zip(begun, parsed)]
        table[language] = (len(begun), sum(p is not None for p in parsed) / max(1, len(begun)),
                           sum(right) / max(1, len(begun)))
    return table, sum(map(corpus.is_uuid, texts)), texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--known", type=float, default=0.5,
                        help="share of the identifiers that are some of 64 (default 0.5)")
    parser.add_argument("--threads", type=int, default=1, help="the result depends on it")
    parser.add_argument("--out", default=pathlib.Path(__file__).resolve().parent / "tiny-lm")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    loss = train(model, tokenizer, random.Random(args.seed), args.steps, args.known)
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPNESS)
    model.save_pretrained(args.out)
    build_tokenizer().save_pretrained(args.out)     # afresh, without the padding of training
    seconds = time.perf_counter() - start

    table, identifiers, texts = measure(model, tokenizer, random.Random(args.seed + 1), 4096)
    print("\n".join(texts[:8]))
    print(f"\n{'begins in':10} {'answers':>7} {'sentences':>10} {'correct':>8}")
    for language, (n, sentences, correct) in table.items():
        print(f"{language:10} {n:7} {sentences:10.3f} {correct:8.3f}")
    print(f"identifiers {identifiers:6}")
    print(f"loss {loss:.3f} after {args.steps} steps, {seconds:.0f} s")


if __name__ == "__main__":
    main()
