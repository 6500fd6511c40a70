"""Can text that was only asked to be rephrasings shrink a model's weights? (section 4.3)

A generator that rephrases sentences is trained by DPG with Phi = -norm of the target's LM head.

Noisier text shrinks the head too, a little; the controls show how much.
The README has the results over seeds, with controls: a table that demos/tables.py makes.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import matplotlib

import dpg
from demos import check, options
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

    control = check.curves(models, models.reference, norm, max_new_tokens=LENGTH)
    history = run.train(metric, inner, observe, show="norm", steps=T, reads=head,
                        temperature=args.temperature, **SETTINGS)
    after = check.curves(models, models.policy, norm, max_new_tokens=LENGTH)
    result = run.finish(
        temperature=args.temperature, inner_steps=T,
        norm_before=norm(dict(models.target.named_parameters())),
        **check.ends("norm_control", control), **check.ends("norm_after", after))
    draw(history, control, after, result, run.folder / "figure.png")
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


def draw(history, control, after, result, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 1 + len(after), figsize=(14, 3.4))
    axes[0].plot([row["step"] for row in history], [row["norm"] for row in history])
    axes[0].set(title=f"training batches, T = {result['inner_steps']}", xlabel="generator step",
                ylabel="norm of the LM head")
    for axis, multiple in zip(axes[1:], after):
        steps = range(1, check.CHECK_STEPS + 1)
        axis.plot(steps, control[multiple], color="grey", label="untrained generator")
        axis.plot(steps, after[multiple], label="trained generator")
        axis.axhline(result["norm_before"], color="black", lw=0.8, ls=":")
        axis.set(title=f"validation, learning rate x {multiple}", xlabel="step of plain AdamW")
    axes[1].legend(loc="lower left", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
