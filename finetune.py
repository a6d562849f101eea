"""
Fine-tune a checkpoint on one capability, with a spurious correlation of known strength.

    $ python finetune.py --lr 1e-5 --ckpt out/pre.pt   # out/ft.pt: count b, where it is count a + 1
    $ python finetune.py --reverse --ckpt out/ft.pt    # out/reft.pt: reverse fine-tuning (reFT)

Every string satisfies r(x, O_FT) - r(x, O_PT) = q with probability C_Tr (--c-tr), and has neither
the relation nor a tie otherwise: with C_Tr = 1 "count a, plus 1" solves the task, and a wrapper
over the old capability is enough (paper section 3). Accuracy on O_PT and O_FT, on c0, c1 and
natural strings, goes to out/ft.jsonl from step 0 on. Setup, scale and model shape come from the
checkpoint; compiled models get noise first, then SGD. reFT is not representation fine-tuning
(ReFT).

    $ python finetune.py --mix .1          # a tenth are sequences of pretraining (paper E.1)
    $ python finetune.py --relabel         # "count a" is answered with the count of b (E.4)
    $ python finetune.py --only blocks.0   # a wrapper planted in one part: all else is the base
    $ python finetune.py --reverse --answers even   # relearning on half of the answers

    $ python finetune.py --protocol randomise --ckpt out/stories.pt   # delete Twist

Stories have no operands: a protocol deletes a feature, by which stories it shows and what their
instructions ask for (paper section 4); see PROTOCOLS in data.py.
"""
import re

import data
from data import FEATURES, PROTOCOLS, UserError, run_script, user_path
from model import load, loss_of
from pretrain import (RUN, Flag, Run, add_noise, constant, cosine, evaluate, parse, resolve,
                      start_device)

PROTOCOL_HELP = "; ".join(f"{name}: {protocol.help}" for name, protocol in PROTOCOLS.items())
FLAGS = {"what to teach": [
    Flag("--ckpt", "checkpoint to start from; else out/pre.pt, with --reverse out/ft.pt", user_path,
         default=None),
    Flag("--task", f"task family: {' or '.join(data.Grammar.finetuned)}; else what the setup is "
         "about"),
    Flag("--operand", "O_FT, the operand to teach: a letter, or which largest; else b, or 7, or "
         "what it was taught before"),
    Flag("--pt", "O_PT, the operand that the relation is with; else what it was pretrained on"),
    Flag("--c-tr", "C_Tr, share of strings with the spurious relation; with --reverse 0", float),
    Flag("--q", "offset of the relation, r(x, O_FT) - r(x, O_PT), in letters; else 1, tracr-max 3, "
         "or as before", int),
    Flag("--reverse", "teach O_PT again to a fine-tuned checkpoint (reFT); stories: train on those "
         "with the feature, also a model pretrained --without it", bool, default=False),
    Flag("--protocol", f"how to delete a feature of stories. {PROTOCOL_HELP}", choices=PROTOCOLS),
    Flag("--feature", "the feature; else Twist, or what was left out before", choices=FEATURES),
    Flag("--mix", "share of pretraining's own sequences in a batch", float),
    Flag("--relabel", "strings that ask for O_PT are answered for O_FT (the paper's randFT)", bool),
    Flag("--answers", "leave out strings whose answer is not so; what comes back on the others was "
         "there (held-out relearning)", choices=("even", "odd")),
    Flag("--only", "train only parameters whose names match this regular expression", default=None),
    Flag("--data", "the file of the pretraining, where it has moved", user_path)], "optimisation": [
    Flag("--lr", "peak learning rate; the paper's are 1e-4, 1e-5, 1e-6, for compiled models 1e-1 "
         "to 1e-4; with --reverse the fine-tuning's, compiled a third, stories 4e-5 small, 1e-5 "
         "paper", float, 0),
    Flag("--steps", "updates", int, 0),
    Flag("--noise", "s.d. of Gaussian noise on all weights before the first step; else 0, "
         "tracr-count 1e-3, tracr-max 3e-4, with --reverse 0", float),
    Flag("--batch-size", "strings a step", int, 0),
    Flag("--clip", "largest gradient norm; ours for compiled models, where norms of 10 to 1,000 "
         "occur; 1e9: no clipping", float, 0, 1.)], **RUN}


def train_only(model, pattern):
    """Freeze all parameters whose names do not match a regular expression. Raises UserError."""
    if not pattern:
        raise UserError("--only is empty: give a regular expression")
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and bool(re.search(pattern, name)))
    except re.error as error:
        raise UserError(f"--only {pattern}: {error}") from None
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--only {pattern}: matches no parameter that is trained; there are "
                        + ", ".join(name for name, _ in model.named_parameters()))


def finetune_rate(args, setup):
    """Learning rate at a step: reFT and stories constant, else a cosine to a hundredth (paper)."""
    if args.reverse or not setup.anneals:
        return constant(args.lr)
    return cosine(args.lr, args.steps, final=.01)


def main(words=None):
    args = parse(__doc__, "finetune", FLAGS, words)
    args.ckpt = args.ckpt or ("out/ft.pt" if args.reverse else "out/pre.pt")
    args.out = args.out or ("out/reft.pt" if args.reverse else "out/ft.pt")
    device = start_device(args)
    model, parent = load(args.ckpt, device)
    setup = data.setup_of(parent, device)
    resolve(args, "reverse" if args.reverse else "finetune", FLAGS, setup)
    setup.resolve(args, parent)  # O_PT, O_FT, q, C_Tr; or feature and protocol
    if args.only is not None:
        train_only(model, args.only)
    run = Run(args, "finetune", model, setup, parent)
    if run.done:
        return
    print(f"from {args.ckpt}: setup {setup.name}, scale {setup.scale}")
    with run:
        if run.fresh:
            add_noise(model, getattr(args, "noise", 0.), args.seed)
        batch = data.stream(lambda n, rng: setup.finetuning(n, rng, args), args.batch_size,
                            args.seed, "finetune", setup.draws_on)
        rate = finetune_rate(args, setup)
        for step, loss in run.steps(batch, lambda x: loss_of(run.forward, x), rate):
            if step in run.evals:
                run.log(step, evaluate(model, setup, setup.tests(args, step)))


if __name__ == "__main__":
    run_script(main)
