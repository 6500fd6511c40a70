"""What the demos share in which the generator comes to write one string, a UUID or a code.

Phi is the log-likelihood that the target gives to the string after training on the generator's
text. The scores look for it in what is written; the reward never does.
"""
import dpg
from demos import check, figures
from demos.models import SAMPLES

# Of a real model that a CPU can train, on few prompts a step.
SMOLLM2 = dict(prompts=8, lr=2e-4, discount=0.5, kl_coef=0.0, entropy_coef=0.02)
SMOLLM2_INNER = dpg.AdamW(1e-5, eps_root=1e-8)


def longest(text, wanted):
    """Length of the longest substring of the wanted string that the text contains."""
    best = 0
    for i in range(len(wanted)):
        while i + best < len(wanted) and wanted[i:i + best + 1] in text:
            best += 1
    return best


def scores(texts, wanted):
    """Exact: the share of texts that contain the string. Soft: mean longest substring / length.
    In place: the mean share of its characters that a text has where it has them."""
    n = len(texts)
    return {"exact": sum(wanted in text for text in texts) / n,
            "soft": sum(longest(text, wanted) for text in texts) / n / len(wanted),
            "in_place": sum(a == b for text in texts for a, b in zip(text, wanted))
            / n / len(wanted)}


def main(run, name, wanted, T, inner, settings, *, sft_lr, show="exact", every=5,
         samples=SAMPLES, transfer=False):
    """Trains the generator of a run to write `wanted`, which result.json calls `name`.

    `every` so many steps the held-out prompts are answered; `samples` answers to each are drawn for
    the score at temperature 1; `transfer` asks whether the text teaches another target, of this
    shape and other random weights, too."""
    settings, models, prompts = dict(settings), run.models, settings["prompts"]
    # Where the settings do not say otherwise, there is room for the string and no more.
    length = settings.setdefault("max_new_tokens", models.length([wanted]) - 1)
    metric = models.likelihood(models.examples([wanted]))

    def answers(policy, **how):
        return models.texts(models.rollouts(policy, models.held_out, max_new_tokens=length, **how))

    def observe(step, result):
        texts = models.texts(result.rollouts)
        best = " ".join(max(texts, key=lambda text: longest(text, wanted)).split())
        found = scores(texts, wanted) | {"best": best}
        if step % every == 0:
            held_out = scores(answers(models.policy, temperature=0), wanted)
            found |= {f"{score}_held_out": value for score, value in held_out.items()}
        return found

    def measure(policy, when, taught):
        """The first greedy answer, and everything that is measured before and after."""
        greedy = answers(policy, temperature=0)
        found = {f"{score}_{when}": value for score, value in scores(greedy, wanted).items()}
        found[f"exact_sampled_{when}"] = scores(answers(policy, samples=samples), wanted)["exact"]
        found[f"phi_{when}"] = check.phi(models, policy, metric, inner, T, prompts=prompts,
                                         max_new_tokens=length)
        fresh = check.fresh_data(models, policy, batch=prompts * SAMPLES // T, steps=10 * T,
                                 max_new_tokens=length)
        targets = {"sft_loglik": models.target}
        if transfer:
            targets["sft_loglik_transfer"] = models.fresh(models.target.config, run.args.seed + 1)
        for key, target in targets.items():
            loglik = [metric(params).item()
                      for params in check.sft(models, fresh, lr=sft_lr, target=target)]
            found |= {f"{key}_{taught}": loglik[T - 1], f"{key}_{taught}_10T": loglik[-1]}
        return greedy[0], found

    run.train(metric, inner, observe, show=show, steps=T, **settings)
    said, before = measure(models.reference, "before", "control")
    says, after = measure(models.policy, "after", "after")
    result = run.finish(
        **{name: wanted}, **before, **after,
        loglik_untrained=metric(dict(models.target.named_parameters())).item())
    draw(run.folder, run.folder / "figure.png")
    report(result, said, says, wanted, T, run)


def report(result, said, says, wanted, T, run):
    def change(score, before="before", after="after"):
        return f"{result[f'{score}_{before}']:.3f} -> {result[f'{score}_{after}']:.3f}"

    print(f"asked       {run.models.held_out[0]!r}")
    print(f"before      {said.strip()!r}")
    print(f"after       {says.strip()!r}")
    print(f"wanted      {wanted!r}")
    print(f"Exact       {change('exact')}   Soft {change('soft')}   "
          f"greedy, on {len(run.models.held_out)} held-out prompts")
    print(f"sampled     {change('exact_sampled')}   Exact, at temperature 1")
    print(f"Phi         {change('phi')}   after training on D")
    print(f"plain SFT   {change('sft_loglik', 'control')} at {T} step(s), "
          f"{change('sft_loglik', 'control_10T', 'after_10T')} at {10 * T}: its log-likelihood "
          "per token, torch.optim.AdamW on fresh text")
    if "sft_loglik_transfer_after" in result:
        print(f"transfer    {change('sft_loglik_transfer', 'control_10T', 'after_10T')} at "
              f"{10 * T}: of a target with other random weights")
    print(f"files       {run.folder}/   {result['seconds']} s")


def place(text, wanted):
    """Where the text has its longest part of the wanted string."""
    n = longest(text, wanted)
    return next((at, at + n) for i in range(len(wanted)) if (at := text.find(wanted[i:i + n])) >= 0)


def draw(folder, path):
    result, history, _ = figures.read(folder)
    name = "uuid" if "uuid" in result else "code"
    wanted, rows = result[name], [("wanted", result[name], 0, len(result[name]))]
    whole = next((i for i, row in enumerate(history) if wanted in row["best"]), len(history))
    for row in figures.spread(history[:whole + 1], 7):
        start, end = place(row["best"], wanted)
        cut = max(0, min(start - 12, len(row["best"]) - 64))
        rows.append((f"step {row['step']}", row["best"][cut:cut + 64], start - cut, end - cut))
    figure = figures.figure(6, f"Asked to rephrase sentences, the generator comes to write a "
                            f"{name.replace('uuid', 'UUID')}")
    top, axis = figure.subplots(2, 1, height_ratios=(len(rows), 9))
    figures.texts(top, "the best of a step's samples; in colour its longest part of what is wanted",
                  rows)
    for score in ("soft", "exact"):
        at = [row for row in history if f"{score}_held_out" in row]  # measured after the step
        axis.plot([0, *(row["step"] + 1 for row in at), result["steps"]],
                  [result[f"{score}_before"], *(row[f"{score}_held_out"] for row in at),
                   result[f"{score}_after"]], label=f"{score.capitalize()}, greedy")
    axis.plot([row["step"] for row in history], [row["exact"] for row in history], lw=1.2,
              label="Exact, sampled in training")
    figures.level(axis, result["soft_before"], "chance: Soft of the untrained generator")
    axis.set(xlabel="generator step", ylabel="score", ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncol=4)
    figure.savefig(path)
