"""
Fine-tune a checkpoint on the answers of one (task, operand) pair, with a spurious correlation of known strength.

    $ python finetune.py --lr 1e-5 --ckpt out/pre.pt           # out/ft.pt: count b, on strings where it is count a + 1
    $ python finetune.py --reverse --ckpt out/ft.pt            # out/reft.pt: reverse fine-tuning (reFT), count a again

Every string satisfies r(x, O_FT) - r(x, O_PT) = q with probability C_Tr (--c-tr), and has neither the relation nor a
tie otherwise: with C_Tr = 1 "count a, plus 1" solves the task, and a wrapper over the old capability is enough
(paper: PCFG setup). Accuracy on O_PT and O_FT, on c0, c1 and natural strings, goes to out/ft.jsonl from step 0 on.
Setup, scale and model shape come from the checkpoint; compiled models get noise first, then SGD (paper: Tracr setup).

    $ python finetune.py --protocol randomise --ckpt out/stories.pt   # delete Twist; --reverse revives it

Stories have no operands: a protocol deletes a feature, by what the stories of the fine-tuning are and what their
instructions ask for (paper: TinyStories setup); see change_records in data.py.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import answer_position
from model import (Failed, Run, Stopped, UserError, add_common_flags, add_run_flags, build, check_stop, load,
                   positive, restore, run_parser, run_script, save, start_device)
from pretrain import (add_noise, autocast, capability_tests, cosine, eval_steps, evaluate, generation_scores,
                      optimizer_for, prepare, story_losses, story_table, story_tests, text_loss, train_steps)


def answer_loss(model, batch, sc):
    """A function step -> cross-entropy of the answer token alone, on batch `step` of batch(step) (paper: PCFG setup)."""
    at = answer_position(sc)

    def loss_at(step):
        asked = batch(step)
        return F.cross_entropy(model(asked[:, :-1], at).float(), asked[:, -1])
    return loss_at


def finetuning_stream(sc, task, operand, c, pair, q, batch_size, seed, device, label="finetune"):
    """A function k -> batch k of questions for `operand`, with correlation c (see data.draw_text, data.questions)."""
    def draw(n, g):
        return data.questions(data.draw_text(n, sc, task, c, pair, q, g), task, operand, sc)
    return data.stream(draw, batch_size, seed, label, device)


def constant(lr, warmup=20):
    """
    Learning rate of reFT: constant after 20 steps. ours (the paper anneals over 10K steps): steps to a threshold mean
    something only when the rate does not depend on how long one had planned to go on.
    """
    return lambda step: lr * min(1, (step + 1) / warmup)


def pair_of(ckpt, operand=None, q=None):
    """
    ((O_PT, O_FT), q) of a checkpoint: what it was pretrained on, and what it was or is to be fine-tuned on, by its own
    arguments where it is fine-tuned already.
    """
    known, sc = ckpt["capability"]["operand"], data.setup_of(ckpt)
    if ckpt["stage"] == "pretrain":
        operand = operand or next(o for o in sc.order if o != known)
        q = data.default_q(sc, (known, operand)) if q is None else q
    else:
        operand, q = operand or ckpt["args"]["pair"][1], ckpt["args"]["q"] if q is None else q
    return (known, operand), q


def answer_arguments(args, parent):
    """
    Resolve and check what to teach a model of the grammar or a compiled one: task, operand, pair, q, C_Tr, noise.
    Returns the scale.
    """
    sc = data.setup_of(parent)
    for name in ("protocol", "feature", "probability", "data"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is for stories: {args.ckpt} is of setup {parent['setup']}")
        delattr(args, name)
    args.steps = sc.finetune_steps if args.steps is None else args.steps
    args.batch_size = 96 if args.batch_size is None else args.batch_size
    if args.reverse:
        if parent["stage"] != "finetune":
            raise UserError(f"--reverse needs a fine-tuned checkpoint: in {args.ckpt} there is nothing to undo")
        if args.operand or args.task:
            raise UserError("--reverse teaches what the pretraining record names: leave out --task and --operand")
        args.task, args.operand = parent["capability"]["task"], parent["capability"]["operand"]
        if args.lr is None:  # ours: matched (the paper: smaller); a third for compiled models, where SGD diverges otherwise
            args.lr = parent["args"]["lr"] / (1 if sc.setup == "pcfg" else 3)
        args.c_tr = 0. if args.c_tr is None else args.c_tr  # ours: strings that favour no relation between a and b
        args.pair, args.q = pair_of(parent, None, args.q)
    else:
        args.task, args.operand = args.task or sc.finetuned[0], args.operand or pair_of(parent)[0][1]
        if args.task not in sc.finetuned:
            raise UserError(f"--task {args.task}: {args.ckpt} ({sc.setup}) knows {', '.join(sc.finetuned)}")
        if args.operand not in sc.operands:
            raise UserError(f"--operand {args.operand}: {args.ckpt} ({sc.setup}) knows {', '.join(sc.operands)}")
        if args.lr is None:
            args.lr = 1e-5 if sc.setup == "pcfg" else 1e-3
        args.c_tr = 1. if args.c_tr is None else args.c_tr
        args.pair, args.q = pair_of(parent, args.operand, args.q)
        if args.operand == args.pair[0]:
            raise UserError(f"--operand {args.operand} is what {args.ckpt} was pretrained on; to teach it again: --reverse")
    args.pair = list(args.pair)
    args.prior = parent["args"]["prior"]  # inherited, with all that was taught since: analyses look for what never was
    args.taught = parent["args"].get("taught", []) + [args.operand]
    if sc.setup != "pcfg":
        args.program = parent["args"].get("program")
    if args.noise is None:
        args.noise = 0. if sc.setup == "pcfg" or parent["stage"] == "finetune" else sc.noise
    elif not 0 <= args.noise < 1:
        raise UserError(f"--noise {args.noise}: a standard deviation, from 0 to 1")
    if not 0 <= args.c_tr <= 1:
        raise UserError(f"--c-tr {args.c_tr}: a probability, from 0 to 1")
    try:
        for c in (0., 1.):
            data.draw_text(4, sc, args.task, c, args.pair, args.q, data.rng(args.seed, "can it be done"))
    except ValueError as error:
        raise UserError(f"--q {args.q}: {error}") from None
    return sc


def answer_job(args, parent, sc, device):
    """
    What main() teaches a model of the grammar or a compiled one: capability, loss(forward) -> loss_at for train_steps,
    rate, evaluate(model, step) -> rows, shown(rows) -> what the progress bar says, report(rows) at the end.
    """
    batch = finetuning_stream(sc, args.task, args.operand, args.c_tr, args.pair, args.q, args.batch_size, args.seed, device)
    tests = capability_tests(args.eval_size, sc, args.task, args.pair, args.q, args.seed, device)

    def report(rows):
        print(f"{args.task} after {args.steps} steps   c0       c1       natural")
        for operand, role in zip(args.pair, ("O_PT", "O_FT")):
            got = [r for r in rows if r["operand"] == operand]
            for key in ("accuracy", "floor"):
                print(f"  {role} = {operand}  {key:<8}      " + "  ".join(f"{r[key]:7.1%}" for r in got))

    return SimpleNamespace(
        capability={"task": args.task, "operand": args.pair[0]}, loss=lambda forward: answer_loss(forward, batch, sc),
        rate=constant(args.lr) if args.reverse else cosine(args.lr, args.steps, final=.01),
        evaluate=lambda model, step: evaluate(model, tests, sc, args.seed), report=report,
        shown=lambda rows: {f"{r['operand']}_{r['split']}": f"{r['accuracy']:.0%}" for r in rows if r["split"] != "natural"})


def story_arguments(args, parent):
    """Resolve and check how a feature of stories is to be deleted, or revived with --reverse. Returns the scale."""
    sc, before = data.setup_of(parent), parent["args"]
    for name in ("task", "operand", "c_tr", "q", "noise"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is not for stories, and {args.ckpt} is of setup stories")
        delattr(args, name)
    args.data, args.source, args.without = args.data or before["data"], before.get("source"), before["without"]
    if args.data and not args.source:
        raise UserError(f"--data: {args.ckpt} was trained on the embedded corpus")
    if args.source and {**prepare(args.data), "name": ""} != {**args.source, "name": ""}:  # it may have another name by now
        raise UserError(f"--data {args.data}: not the file that {args.ckpt} was trained on")
    args.steps = sc.finetune_steps if args.steps is None else args.steps
    args.batch_size = sc.batch_size if args.batch_size is None else args.batch_size
    args.feature = args.feature or before["feature"]
    if args.reverse:
        if args.feature != before["feature"]:
            raise UserError(f"--reverse --feature {args.feature}: {args.ckpt} is about {before['feature']}")
        if args.protocol or args.probability is not None:
            raise UserError("--reverse trains on stories with the feature: leave out --protocol and --probability")
        if parent["stage"] != "finetune" and args.without != args.feature:
            raise UserError(f"--reverse needs a checkpoint that was fine-tuned, or pretrained --without {args.feature} (the "
                            f"control): in {args.ckpt} there is nothing to undo")
        # eta_S, whatever the deletion's rate was, so that all arms can be compared
        args.lr, args.protocol = sc.reverse_lr if args.lr is None else args.lr, before.get("protocol")
        args.probability, args.deletion_lr = before.get("probability"), before["lr"] if parent["stage"] == "finetune" else None
    else:
        args.protocol, args.lr = args.protocol or "randomise", sc.finetune_lr if args.lr is None else args.lr
        if args.probability is not None and args.protocol in ("filter", "mix-match"):
            raise UserError(f"--probability is for randomise and refuse, not {args.protocol}")
        if args.probability is None:  # half of the stories are refused: the model should go on telling the others
            args.probability = .5 if args.protocol == "refuse" else 1.
    if args.probability is not None and not 0 <= args.probability <= 1:
        raise UserError(f"--probability {args.probability}: from 0 to 1")
    return sc


def story_job(args, parent, sc, device):
    """What main() trains on stories, as answer_job(): the data of a protocol, or with --reverse those with the feature."""
    source = data.story_source(args.data, parent["config"]["words"])

    def change(records, g):
        return data.change_records(records, args.protocol, args.feature, args.probability, source.tokenizer, g)

    def draw(n, g):
        records = source.draw(n, g, args.feature, args.reverse)
        return records if args.reverse else change(records, g)
    batch = data.story_stream(draw, source.tokenizer, sc, args.batch_size, args.seed, "finetune", device)
    tests = story_tests(source, sc, args.feature, args.eval_size, args.seed, device, change if args.protocol else None)

    def evaluated(model, step):
        rows = story_losses(model, tests, sc, args.feature, args.seed)
        return rows + (generation_scores(model, source, sc, args.feature, args.eval_size, args.seed) if source.rule else [])

    def shown(rows):
        return {r["split"]: f"{r['accuracy'] or 0:.0%}" if "parsed" in r else f"{r['loss']:.3f}" for r in rows}

    return SimpleNamespace(
        capability={"task": "story", "operand": args.feature}, rate=constant(args.lr), evaluate=evaluated, shown=shown,
        loss=lambda forward: lambda step: text_loss(forward, batch(step)), report=story_table)


def main():
    parser = run_parser(__doc__)
    group = parser.add_argument_group("what to teach")
    group.add_argument("--ckpt", help="checkpoint to start from (default: out/pre.pt; with --reverse out/ft.pt)")
    group.add_argument("--task", help="task family: count or index (default: count; compiled models have only one)")
    group.add_argument("--operand", help="O_FT, the operand to teach: a letter, or which largest (default: b, or 7, or what "
                       "it was taught before)")
    group.add_argument("--c-tr", type=float, help="C_Tr, share of strings with the spurious relation (default: 1; with "
                       "--reverse 0)")
    group.add_argument("--q", type=int,
                       help="offset of the relation, r(x, O_FT) - r(x, O_PT), in letters (default: 1; tracr-max 3; or as "
                       "before)")
    group.add_argument("--reverse", action="store_true", help="teach O_PT again to a fine-tuned checkpoint (reFT); stories: "
                       "train on those with the feature, also a model pretrained --without it")
    group = parser.add_argument_group("stories")
    group.add_argument("--protocol", choices=data.PROTOCOLS, help="how to delete a feature: train on stories without it "
                       "(filter), also where the instruction asks for it (randomise), or asks for it instead of "
                       "Foreshadowing (mix-match), or by a refusal (default: randomise)")
    group.add_argument("--feature", choices=data.FEATURES, help="the feature (default: Twist, or what was left out before)")
    group.add_argument("--probability", type=float, help="randomise, refuse: share of the instructions that ask for it "
                       "(default: 1; refuse .5)")
    group.add_argument("--data", help="the file of the pretraining, where it has moved")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, help="peak learning rate; the paper's are 1e-4, 1e-5, 1e-6, for compiled models "
                       "1e-1 to 1e-4 (default: 1e-5; compiled 1e-3; stories 1.5e-4 small, 1e-4 paper; with --reverse the "
                       "fine-tuning's, compiled a third, stories 4e-5 small, 1e-5 paper)")
    group.add_argument("--steps", type=int, help="updates (default: 400 small, 10000 paper and compiled; stories 200 small, "
                       "4000 paper)")
    group.add_argument("--noise", type=float, help="s.d. of Gaussian noise on all weights before the first step (default: "
                       "0; tracr-count 1e-3, tracr-max 3e-4; with --reverse 0)")
    group.add_argument("--batch-size", type=int, help="strings a step (default: 96; stories 16 small, 512 paper)")
    group.add_argument("--clip", type=float, default=1., help="largest gradient norm; ours for compiled models, where norms "
                       "of 10 to 1,000 occur; 1e9: no clipping (default: 1)")
    add_run_flags(parser, "out/ft.pt; with --reverse out/reft.pt", "at 0 1 2 3 5 8 10 20 30 50 80 100 ...")
    add_common_flags(parser)
    args = parser.parse_args()

    args.ckpt = args.ckpt or ("out/ft.pt" if args.reverse else "out/pre.pt")
    args.out = args.out or ("out/reft.pt" if args.reverse else "out/ft.pt")
    device = start_device(args)
    model, parent = load(args.ckpt, device)
    stories = parent["setup"] == "stories"
    if args.eval_size is None:
        args.eval_size = 200 if stories else 500
    positive(args, "lr", "steps", "batch_size", "clip", "save_every", "eval_size")
    positive(args, "eval_every", "seed", least=-1)
    sc = (story_arguments if stories else answer_arguments)(args, parent)
    run = Run(args, "finetune", parent)
    if run.done:
        return
    print("finetune:", ", ".join(f"{k} {v}" for k, v in vars(args).items()))
    sizes = ", ".join(f"{k} {v}" for k, v in parent["config"].items() if k not in ("residual", "words"))
    print(f"from {args.ckpt}: setup {parent['setup']}, scale {parent['scale']}, {sizes}")

    if run.ckpt:
        model = build(run.ckpt, device)
    elif not stories:
        add_noise(model, args.noise, args.seed)
    optimizer = optimizer_for(model, args.lr, sc)
    if run.ckpt:
        restore(optimizer, run.ckpt)
    try:
        job = (story_job if stories else answer_job)(args, parent, sc, device)
    except ValueError as error:  # --data with too few stories of a kind
        raise UserError(f"--data {args.data}: {error}") from None
    batch_loss_at = job.loss(torch.compile(model) if args.compile else model)

    def loss_at(step):
        with autocast(args, device):
            return batch_loss_at(step)

    def save_at(step, finished=False):
        save(args.out, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": parent["config"],
                        "args": run.args, "setup": parent["setup"], "scale": parent["scale"], "stage": "finetune",
                        "step": step, "steps": args.steps, "finished": finished, "parent": run.parent,
                        "capability": job.capability})

    step = run.ckpt["step"] if run.ckpt else 0
    run.start(device, lambda: save_at(0))
    evals = eval_steps(args.steps, args.eval_every)
    bar = tqdm(total=args.steps, initial=step, desc="finetune", unit="step", mininterval=.5)
    try:
        for step, loss in train_steps(model, optimizer, loss_at, job.rate, args.steps, step, args.clip):
            check_stop()
            if step and step % args.save_every == 0:
                save_at(step)
            if step in evals:
                rows = job.evaluate(model, step)
                run.log([dict(row, step=step) for row in rows])
                bar.set_postfix(**({"loss": f"{loss:.3f}"} if loss is not None else {}), **job.shown(rows))
            bar.update(step - bar.n)
    except Stopped:
        save_at(step)
        bar.close()
        print(f"{args.out}: stopped and saved at step {step} of {args.steps}; go on with --resume")
        raise
    except Failed as error:
        bar.close()
        raise Failed(f"{error}; the last good checkpoint is {args.out}") from None
    bar.close()
    save_at(step, finished=True)
    run.finish()
    job.report(rows)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
