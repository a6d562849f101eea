"""
Make a model whose capabilities are known, by training or by writing its weights; home of what all
training and scoring share: evaluate(), the flags and Run, which owns the files of a run.

    $ python pretrain.py                              # out/pre.pt: low prior, the small scale
    $ python pretrain.py --prior high --out out/high.pt
    $ python pretrain.py --setup tracr-count --help   # what another setup has

Data is drawn on the fly; strings are never reused. The prior P_T(a, b, c) decides which operands a
model of the grammar learns: under the low prior a, hardly b, never c (paper section 3).
"""
import argparse
import functools
import itertools
import math
import os
import platform
import shlex
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import UserError, above, run_script, sha256, user_path, write_json
from model import GPT, Config, accuracy, load, loss_of, predict, save

# ---------------------------------------------------------------- training


def cosine(lr, steps, final=0., warmup=.2):
    """Learning rate at a step: linear warm-up, then a cosine to lr x final (paper section 3)."""
    rise = max(1, round(warmup * steps))

    def lr_at(step):
        if step < rise:
            return lr * (step + 1) / rise
        part = (step - rise) / max(1, steps - rise)
        return lr * (final + (1 - final) * .5 * (1 + math.cos(math.pi * part)))
    return lr_at


def constant(lr, warmup=20):
    """
    Learning rate of reFT. ours (the paper anneals over 10K steps): steps to a threshold mean
    something only if the rate does not depend on the planned number of steps.
    """
    return lambda step: lr * min(1, (step + 1) / warmup)


def update(model, optimizer, loss, lr, clip=1.):
    """One step of training."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(lr)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def autocast(name, setup):
    """Training's forward pass in bfloat16, for auto where the device multiplies in it."""
    if name == "auto" and setup.device.type == "cuda":
        fast = torch.cuda.get_device_capability(setup.device) >= (8, 0)
    else:
        can = torch.cpu.get_capabilities() if setup.device.type == "cpu" else {}
        fast = can.get("avx512_bf16") or can.get("amx_bf16")
    on = not setup.exact and (name == "bfloat16" or name == "auto" and bool(fast))
    return torch.autocast(setup.device.type, torch.bfloat16, on, cache_enabled=False)


def start_device(args):
    """The torch device of --device, with --threads set."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # momentum that fades to 1e-38 is slow
    torch.empty(31 << 20, dtype=torch.uint8)  # glibc keeps such blocks from now on: a fifth faster
    name = args.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


# ---------------------------------------------------------------- scoring


def eval_steps(steps, every):
    """The steps to evaluate at: every `every`, or 0 1 2 3 5 8 10 20 30 50 80 100 ... (log axes)."""
    if every:
        return set(range(0, steps, every)) | {steps}
    dense = {m * 10 ** e for m in (1, 2, 3, 5, 8) for e in range(len(str(steps)))}
    return {0, steps} | {s for s in dense if s < steps}


def floors(answer, other=None):
    """Size and floors of answers (n,); other: those for the other operand."""
    return {"n": len(answer), "floor": data.majority_floor(answer),
            "cross_floor": None if other is None else data.cross_floor(answer, other)}


def answer_row(logits, test):
    """The row of a Test: accuracy beside its floors, cross-entropy (nats)."""
    answer = test.examples.answer
    return {**test.row, "accuracy": accuracy(logits, answer), **floors(answer, test.other),
            "loss": F.cross_entropy(logits, answer).item()}


def evaluate(model, setup, tests):
    """The rows of a list of Tests, in their order."""
    score = setup.score or (lambda model, test: [answer_row(predict(model, test.examples), test)])
    return list(itertools.chain(*(score(model, test) for test in tests)))


def wilson(share, n):
    """95 % interval (Wilson) of a share of n."""
    z = 1.96
    middle, half = share + z * z / 2 / n, z * (share * (1 - share) / n + z * z / 4 / n / n) ** .5
    low, high = (x / (1 + z * z / n) for x in (middle - half, middle + half))
    return max(0, low), min(1, high)


def interval(share, n):
    """A share with its 95 % interval, for people."""
    if share is None or not round(n):
        return "-"
    low, high = wilson(share, round(n))
    return f"{share:6.1%} [{low:.1%}, {high:.1%}]"


def percent(x):
    """A fraction as people read it."""
    return "-" if x is None else f"{x:.1%}"


def table(head, rows):
    """Print rows of cells under a heading, in columns as wide as they need to be."""
    rows = [list(map(str, cells)) for cells in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        padded = [cell.rjust(w) if i > 1 else cell.ljust(w)
                  for i, (cell, w) in enumerate(zip(cells, widths))]
        print("  " + "  ".join(padded).rstrip())


def fact(row, key):
    """A column of a row, for people; of generations the accuracy with its interval."""
    value = row.get(key)
    if key == "accuracy" and "parsed" in row:
        return f"{interval(value, row['parsed'] * row['n'])}, {row['parsed']:.0%} parse"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if key in ("loss", "cosine") else percent(value)
    return "-" if value is None else value


def show(rows, keys=("task", "operand", "split", "accuracy", "floor", "cross_floor", "loss", "n")):
    """Print columns of rows."""
    table(keys, [map(functools.partial(fact, row), keys) for row in rows])


# ---------------------------------------------------------------- flags

def whole_numbers(text):
    """The type of a flag that takes positive whole numbers, between commas."""
    values = text.split(",")
    if not all(value.strip().isdecimal() and int(value) for value in values):
        raise argparse.ArgumentTypeError("takes positive whole numbers, as 100,1000")
    return sorted(set(map(int, values)))


def add_run_flags(parser):
    """The flags that pretrain.py and finetune.py share."""
    add = parser.add_argument
    add("--out", type=user_path, help="checkpoint to write, with .json and .jsonl beside it")
    add("--lr", type=above(0), help="peak learning rate")
    add("--steps", type=above(0, int), help="updates")
    add("--batch-size", type=above(0, int), help="strings a step")
    add("--clip", type=above(0), default=1., help="largest gradient norm")
    add("--seed", type=above(-1, int), default=0, help="of weights, data order and test sets")
    add("--eval-size", type=above(0, int), help="strings in a test set")
    add("--eval-every", type=above(-1, int), default=0, help="steps between evaluations; 0: 25 "
        "times a pretraining, at 0 1 2 3 5 8 10 20 ... of a fine-tuning")
    add("--save-every", type=above(0, int), default=250, help="steps between checkpoints")
    add("--keep", type=whole_numbers, help="steps whose checkpoints stay, as 100,1000: "
        "out/ft.step100.pt, for every analysis")
    add("--force", action="store_true", help="start again, replacing what is at --out")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of training's "
        "forward pass; auto: bfloat16 where the device multiplies in it")
    add_machine_flags(parser)


def add_machine_flags(parser):
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto: cuda if it works")
    add("--threads", type=above(-1, int, 1024), default=0, help="CPU threads; 0: torch's choice")


def new_parser(doc, first=False):
    """A parser; first: of the flags that say which others there are. All else is left to it."""
    return argparse.ArgumentParser(description=doc, add_help=not first, allow_abbrev=False,
                                   formatter_class=Help)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, the defaults of the setup beside each flag."""


def parse(parser, words, stage):
    """The arguments, and the command that gave them."""
    script = f"{stage}.py" if words is not None else os.path.basename(sys.argv[0])
    words = sys.argv[1:] if words is None else list(words)
    args = parser.parse_args(words)
    args.command = shlex.join(["python", script, *words])
    return args


# ---------------------------------------------------------------- a run and its files

NOT_COMPARED = ("out", "ckpt", "force", "save_every", "device", "threads", "command")


def start_facts(args, device):
    """What a run says of this start: command, code, versions, machine, time."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(words, cwd=here, capture_output=True, text=True)
    return {"command": args.command, "commit": done.stdout.strip() or None,
            "python": platform.python_version(), "torch": str(torch.__version__), "device": str(device),
            "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}


class Run:
    """
    A training run and its files: X.pt, and X.json with all of it but the tensors: arguments,
    history, how it was started. The same command again goes on where it was, or says that it is
    done (self.done); another one at the same --out is refused without --force.
    """

    def __init__(self, args, stage, model, optimizer, setup, parent=None):
        self.args, self.model, self.optimizer, self.setup = args, model, optimizer, setup
        relation, self.first, self.done = setup.relation(args), 0, False
        self.ckpt = {
            "stage": stage, "setup": setup.name, "scale": setup.scale, "config": vars(model.config),
            "args": {k: v for k, v in vars(args).items() if k not in NOT_COMPARED},
            "parent": parent and {k: parent[k] for k in ("path", "sha256")}, "steps": args.steps,
            "capability": {"task": relation.task, "operand": relation.pt}}
        compared, self.log_rows, self.starts = dict(self.ckpt), [], []
        if os.path.exists(args.out) and not args.force:
            _, earlier = load(args.out, setup.device, unfinished=True)
            for key, value in compared.items():
                if key != "parent" and earlier[key] != value:
                    raise UserError(f"{args.out} is another run: its {key} differ; give another "
                                    "--out, or --force to replace it")
            if parent and earlier["parent"]["sha256"] != parent["sha256"]:
                raise UserError(f"{args.out} was made from another {args.ckpt}")
            self.log_rows, self.starts = earlier["history"], earlier["starts"]
            self.first, self.done = earlier["step"], earlier["finished"]
            model.load_state_dict(earlier["model"])
            if self.done:
                print(f"{args.out}: already done ({args.steps} steps, same arguments)")
                return
            optimizer.load_state_dict(earlier["optimizer"])
        self.fresh, self.began = self.first == 0, time.time()
        self.starts = [*self.starts, {**start_facts(args, setup.device), "step": self.first}]
        self.forward = torch.compile(model) if args.compile else model
        self.autocast = autocast(args.dtype, setup)
        often = args.eval_every or (max(1, args.steps // 25) if stage == "pretrain" else 0)
        self.evals = eval_steps(args.steps, often)
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        print(f"{stage}:", ", ".join(f"{k} {v}" for k, v in vars(args).items() if k != "command"))

    def save(self, step, path=None):
        """Write the checkpoint, and what people and plot.py read beside it."""
        path, finished = path or self.args.out, bool(path) or step == self.args.steps
        about = {**self.ckpt, "step": step, "finished": finished, "history": self.log_rows,
                 "starts": self.starts}
        self.starts[-1]["seconds"] = round(time.time() - self.began, 1)
        optimizer = {} if finished else self.optimizer.state_dict()
        save(path, {**about, "model": self.model.state_dict(), "optimizer": optimizer})
        about["config"] = {k: v for k, v in about["config"].items() if k not in ("words", "residual")}
        write_json(f"{path[:-3]}.json", {**about, "sha256": sha256(path)})

    def steps(self):
        """Yield the steps to train; score and save in between, the untouched model and the last."""
        args, kept = self.args, self.args.keep or ()
        bar = tqdm(total=args.steps, initial=self.first, desc=self.ckpt["stage"], disable=None)
        for step in range(self.first, args.steps + 1):
            if step in self.evals and (step > self.first or self.fresh):
                rows = evaluate(self.model, self.setup, self.setup.tests(args, step))
                self.log_rows = [*self.log_rows, *(dict(row, step=step) for row in rows)]
                shown = {f"{r['operand']}_{r['split']}": percent(r["accuracy"]) for r in rows[:6]}
                bar.set_postfix(shown) if not bar.disable else print(f"step {step}", shown)
                if not all(p.isfinite().all() for p in self.model.parameters()):
                    sys.exit(f"step {step}: the weights are not finite; --lr {args.lr} is too large")
            if step in kept:
                self.save(step, f"{args.out[:-3]}.step{step}.pt")
            if step == args.steps or step % args.save_every == 0 and step > self.first:
                self.save(step)
            if step < args.steps:
                yield step
                bar.update()
        bar.close()
        show([r for r in self.log_rows if r["step"] == args.steps])
        print(f"wrote {args.out}")


# ---------------------------------------------------------------- the stage


def arguments(words=None):
    """(args, setup): --setup and --scale say which flags there are, and their defaults."""
    parsers = new_parser(None, first=True), new_parser(__doc__)
    for parser in parsers:
        parser.add_argument("--setup", default="pcfg", help="pcfg, or of setups/: tracr-count, "
                            "stories, ...")
        parser.add_argument("--scale", default="small", choices=data.SCALES, help="minutes on two "
                            "CPU cores, or the paper's sizes for a GPU")
    known, _ = parsers[0].parse_known_args(words)
    setup = data.find_setup(known.setup, known.scale)
    add_run_flags(parsers[1])
    parsers[1].set_defaults(out="out/pre.pt")
    setup.flags(parsers[1], "pretrain")
    return parse(parsers[1], words, "pretrain"), setup


def main(words=None):
    args, setup = arguments(words)
    setup.device = start_device(args)
    setup.resolve(args)
    model = setup.write_model(args)
    if model is None:
        model = GPT(Config(**setup.config())).init_weights(data.rng(args.seed, "weights"))
    model = model.to(setup.device)
    optimizer = setup.optimizer(model, args.lr)
    batch = data.stream(lambda n, rng: setup.pretraining(n, rng, args), args.batch_size,
                        args.seed, "pretrain", setup.draws_on)
    lr_at = cosine(args.lr, args.steps, warmup=setup.warmup)
    run = Run(args, "pretrain", model, optimizer, setup)
    for step in run.steps() if not run.done else ():
        with run.autocast:
            loss = loss_of(run.forward, batch(step))
        update(model, optimizer, loss, lr_at(step), args.clip)


if __name__ == "__main__":
    import pretrain  # the very module that files in setups/ import
    run_script(pretrain.main)
