"""Can a generator that is only asked in English come to answer in German? (section 4.4)

Every request is in English and asks to rephrase an English sentence. Phi is the log-likelihood that
a target model, after training on the answers, gives to sentences of another language. The generator
comes to answer in that language, and goes on saying what it was asked to say.

The README has the results over seeds, with controls: a table that demos/tables.py makes.

The generator knows the language: it answers 8 to 10 % of the requests in it before any training.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import collections
import itertools
import math

import dpg
from demos import check, corpus, figures, options
from demos.models import SAMPLES
from demos.run import Run

NAMES = dict(de="German", es="Spanish", fr="French", it="Italian")
INNER, SGD_LR = dpg.AdamW(1e-3, eps_root=1e-4), 0.1  # SGD diverges at 1
# Trained at a temperature above 1 it is surer of its language at 1, where the scores are taken.
STEPS, SETTINGS = 16, dict(prompts=64, lr=2e-3, discount=0.9, kl_coef=0.2, entropy_coef=0.0,
                           temperature=1.25)
SCORED, WANTED = 128, 400  # held-out prompts of the scores, sentences in Phi
SFT_STEPS, SFT_BATCH = 16, 64  # of the ordinary training that the perplexities are measured after


def parser():
    p = options.parser(__file__, __doc__, steps=80)
    p.add_argument("--language", choices=corpus.LANGUAGES[1:], default="de",
                   help="of the sentences in Phi (default de)")
    options.presets(p, paper=120)
    return p


def scores(texts, sentences, language):
    """The share of texts in the language, and the share that says in it what its sentence says,
    or None where a sentence is not of the grammar."""
    said = [corpus.parse(text, language) for text in texts]
    asked = [corpus.parse(sentence, "en") for sentence in sentences]
    correct = sum(a is not None and a == b for a, b in zip(said, asked, strict=True))
    return {"fraction": sum(frame is not None for frame in said) / len(texts),
            "correct": None if None in asked else correct / len(texts)}


def bigram_entropy(texts):
    """Of the pairs of neighbouring words, all texts together, in nats."""
    words = [text.split() for text in texts]
    pairs = collections.Counter(pair for row in words for pair in zip(row, row[1:]))
    total = sum(pairs.values())
    return -sum(n / total * math.log(n / total) for n in pairs.values())


def main(argv=None):
    run = Run(parser(), argv, lambda models: "--prompts: one is in the language asked for" if any(
        corpus.in_language(s, models.args.language) for s in models.args.prompts or ()) else None)
    args, models, language = run.args, run.models, run.args.language

    def sentences(frames):
        return [" " + corpus.render(frame, language, models.rng) for frame in frames]

    # Of the meanings that no pretraining saw, those that a check asks for stay out of Phi, and out
    # of the test sentences; so the three have none in common.
    prompts = models.fresh_texts(SCORED)
    asked = {corpus.parse(text, "en")
             for text in prompts + models.fresh_texts(SFT_STEPS * SFT_BATCH // SAMPLES)}
    frames = [frame for frame in map(corpus.Frame._make, itertools.product(*map(
        range, corpus.SIZES))) if corpus.is_held_out(frame) and frame not in asked]
    models.rng.shuffle(frames)
    phi_texts, test = sentences(frames[:WANTED]), sentences(frames[WANTED:])
    # A rollout has room for the longest sentence and its end.
    T, adam, settings = STEPS, INNER, SETTINGS | {"max_new_tokens": models.length(phi_texts)}
    if args.preset == "paper":
        T, adam, settings = 1, options.PAPER_INNER, options.PAPER
    length, inner = settings["max_new_tokens"], adam if args.inner == "adam" else dpg.SGD(SGD_LR)
    metric = models.likelihood(models.examples(phi_texts))
    test_examples = models.examples(test)
    likelihood, words = models.likelihood(test_examples), sum(len(t.split()) for t in test)

    def perplexity(data):
        """Per word of the test sentences, after ordinary SFT of a fresh target on the data."""
        *_, params = [dict(models.target.named_parameters()),
                      *check.sft(models, data, lr=adam.lr)]
        nats = -likelihood(params).item() * int(test_examples.mask.sum())
        return math.exp(nats / words)

    def measure(policy):
        """Everything that is measured before and after, and the greedy answers."""
        greedy, sampled = (models.texts(models.rollouts(
            policy, prompts, max_new_tokens=length, temperature=t)) for t in (0, 1))
        found = scores(greedy, prompts, language)
        found |= {f"{name}_sampled": value
                  for name, value in scores(sampled, prompts, language).items()}
        found |= {"entropy": bigram_entropy(sampled),
                  "phi": check.phi(models, policy, metric, inner, T, max_new_tokens=length,
                                   prompts=settings["prompts"])}
        fresh = check.fresh_data(models, policy, batch=SFT_BATCH, steps=SFT_STEPS,
                                 max_new_tokens=length)
        return found, perplexity(fresh), greedy

    def observe(step, result):
        texts = models.texts(result.rollouts)
        return {"fraction": sum(corpus.in_language(text, language) for text in texts) / len(texts),
                "bigram_entropy": bigram_entropy(texts), "sample": texts[0]}

    right = [models.examples(sentences(corpus.frames(models.rng, SFT_BATCH)))
             for _ in range(SFT_STEPS)]
    run.train(metric, inner, observe, show="fraction", steps=T, **settings)
    before, control, said = measure(models.reference)
    after, generated, says = measure(models.policy)
    real = perplexity(right)
    result = run.finish(
        language=language, **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        perplexity={"none": perplexity([]), "control": control, "generated": generated,
                    "real": real},
        gap_closed=math.log(control / generated) / math.log(control / real))
    draw(run.folder, run.folder / "figure.png")
    report(result, prompts, said, says, run)


def report(result, prompts, said, says, run):
    def change(score):
        before, after = result[f"{score}_before"], result[f"{score}_after"]
        return "not known" if after is None else f"{before:.3f} -> {after:.3f}"

    for i in range(3):
        print(f"asked       {prompts[i]!r}\nbefore      {said[i].strip()!r}\n"
              f"after       {says[i].strip()!r}")
    print(f"{NAMES[result['language']]:11} {change('fraction')}   of the greedy answers to "
          f"{SCORED} held-out prompts; sampled {change('fraction_sampled')}")
    print(f"correct     {change('correct')}   say in it what they were asked; sampled "
          f"{change('correct_sampled')}")
    print(f"entropy     {change('entropy')}   nats per pair of words, sampled")
    print(f"Phi         {change('phi')}   after training on D")
    shown = "   ".join(f"{name} {value:.3f}" for name, value in result["perplexity"].items())
    print(f"perplexity  {shown}   per word of unseen text, after torch.optim.AdamW on nothing, the "
          "untrained generator's text, the trained one's, real text")
    print(f"gap closed  {result['gap_closed']:.3f}   of log-perplexity, from control to real")
    print(f"files       {run.folder}/   {result['seconds']} s")


def draw(folder, path):
    result, history, _ = figures.read(folder)
    language, steps = result["language"], [row["step"] for row in history]
    figure = figures.figure(5, f"Asked in English, the generator comes to answer in "
                            f"{NAMES[language]}")
    rows = [(f"step {row['step']}", (text := row["sample"].strip()[:64]), 0,
             len(text) * corpus.in_language(row["sample"], language))
            for row in figures.spread(history, 6)]
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 5))
    share, entropy = bottom.subplots(1, 2, width_ratios=(3, 2))
    figures.texts(top.subplots(), f"a sample of a step; in colour those in {NAMES[language]}", rows)
    share.plot(steps, [row["fraction"] for row in history], label="sampled in training")
    share.plot((0, result["steps"]), (result["fraction_before"], result["fraction_after"]), "o",
               clip_on=False, label="greedy, held-out prompts, before and after")
    figures.level(share, result["fraction_sampled_before"], "control: untrained, sampled")
    share.set(title=f"share of the answers in {NAMES[language]}", ylim=(-0.02, 1.02))
    share.legend(loc="center right")
    entropy.plot(steps, [row["bigram_entropy"] for row in history], color=figures.GREEN)
    entropy.set(title="bigram entropy of the samples, nats", ylim=(0, None))
    for axis in (share, entropy):
        axis.set_xlabel("generator step")
    figure.savefig(path)


if __name__ == "__main__":
    main()
