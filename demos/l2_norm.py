"""Can text that was only asked to be rephrasings shrink a model's weights? (section 4.3)

A generator that rephrases sentences is trained by DPG with Phi = -norm of the target's LM head.

Noisier text shrinks the head too, a little; the controls show how much.
The README has the results over seeds, with controls: a table that demos/tables.py makes.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import dpg
from demos import check, figures, options, records
from demos.run import Run

EPS_ROOT, SGD_LR, LENGTH = 1e-6, 20.0, options.WEIGHTS["max_new_tokens"]
# Closer to its start than for a picture: text that is merely noisier shrinks the head too, and with
# an entropy bonus the shuffled rewards came half as far as DPG.
SETTINGS = options.WEIGHTS | dict(prompts=64, kl_coef=0.1, entropy_coef=0.0)


def parser():
    return options.weights_parser(__file__, __doc__, steps=60, temperature=1.0)


def main(argv=None):
    run = Run(parser(), argv)
    args, models, T = run.args, run.models, run.args.inner_steps
    head = models.head()
    inner = (dpg.AdamW(100 * models.paper_lr(T), eps_root=EPS_ROOT) if args.inner == "adam"
             else dpg.SGD(SGD_LR / T))

    def metric(params):
        return -params[head].norm()

    def norm(params):
        return params[head].norm().item()

    def observe(step, result):
        return {"norm": round(-result.attribution.metric, 3)}

    run.train(metric, inner, observe, show="norm", steps=T, reads=head,
              temperature=args.temperature, **SETTINGS)
    control, after = (check.curves(models, policy, norm, max_new_tokens=LENGTH)
                      for policy in (models.reference, models.policy))
    run.save("validation.jsonl", records.text(check.rows(norm_control=control, norm=after)))
    result = run.finish(
        temperature=args.temperature, inner_steps=T,
        norm_before=norm(dict(models.target.named_parameters())),
        **check.ends("norm_control", control), **check.ends("norm_after", after))
    draw(run.folder, run.folder / "figure.png")
    example = models.rollouts(models.policy, models.held_out[:1], max_new_tokens=LENGTH,
                              temperature=args.temperature)
    print(f"asked       {models.held_out[0]!r}")
    print(f"writes      {models.texts(example)[0].strip()!r}")
    print(f"norm        {result['norm_before']:.4f} of the target's LM head; after "
          f"{check.CHECK_STEPS} steps of torch.optim.AdamW on fresh text:")
    for m in check.MULTIPLES:
        print(f"            {control[m][-1]:.4f} by the untrained generator, {after[m][-1]:.4f} by "
              f"the trained one   learning rate x {m}")
    print(f"files       {run.folder}/   {result['seconds']} s")


def draw(folder, path):
    result, _, validation = figures.read(folder)
    figure = figures.figure(3.4, "Training on the generator's text shrinks the target's LM head")
    axes = figure.subplots(1, len(check.MULTIPLES), sharey=True)
    for axis, m in zip(axes, check.MULTIPLES):
        for key, label, colour, edge, side in (
                (f"norm_control_{m}x", "control: untrained generator", figures.GREY, max,
                 "bottom"),
                (f"norm_{m}x", "trained generator", figures.BLUE, min, "top")):
            change = [0] + [100 * (row[key] / result["norm_before"] - 1) for row in validation]
            axis.plot(change, color=colour, label=label)
            axis.text(len(validation), edge(change[-30:]), f"{change[-1]:.2f} %", color=colour,
                      ha="right", va=side)  # beside the curve, that far back
        axis.set(title=f"learning rate x {m}", xlabel="step of plain AdamW")
    axes[0].set_ylabel("change of the norm, %")
    axes[0].margins(y=0.15)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=2)
    figure.savefig(path)


if __name__ == "__main__":
    main()
