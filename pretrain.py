"""
Pretrain a model whose capabilities are known. This file also has what other scripts share:
evaluate(), flags, and Run, a training run and its files.

    $ python pretrain.py                              # out/pre.pt: low prior, the small scale
    $ python pretrain.py --prior high --out out/high.pt
    $ python pretrain.py --help                       # with --setup: that setup's flags
    $ torchrun --nproc-per-node 2 pretrain.py         # two processes share every batch

Strings are drawn on the fly and never reused. The prior P_T(a, b, c) decides which operands a model
of the grammar learns: under the low prior a, hardly b, never c (paper section 3).
"""
import argparse
import contextlib
import functools
import itertools
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import (UserError, agreed, number_above, numbers, processes, run_script, user_path,
                  write_json)
from model import GPT, Config, accuracy, load, loss_of, merged, predict, read_checkpoint, save

# ---------------------------------------------------------------- training


def cosine(lr, steps, final=0., warmup=.2):
    """Rate as a function of the step: warm-up, then a cosine to lr x final (paper section 3)."""
    rise = max(1, round(warmup * steps))

    def lr_at(step):
        if step < rise:
            return lr * (step + 1) / rise
        part = (step - rise) / max(1, steps - rise)
        return lr * (final + (1 - final) * .5 * (1 + math.cos(math.pi * part)))
    return lr_at


def constant(lr, warmup=20):
    """reFT's rate as a function of the step. ours (the paper anneals over 10K steps): steps to a
    threshold mean something only if the rate does not depend on the planned number of steps."""
    return lambda step: lr * min(1, (step + 1) / warmup)


def update(model, optimizer, loss, lr, clip=1.):
    """One optimizer step at rate lr; processes average gradients; `clip`: largest norm."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(lr, dtype=torch.float32)  # as when results/ was made
    loss.backward()
    if processes()[1] > 1:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= processes()[1]
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def training_dtype(name, setup):
    """Name of the dtype of training's forward pass; auto: bfloat16 if the device has it."""
    if name == "auto" and setup.device.type == "cuda":
        fast = torch.cuda.get_device_capability(setup.device) >= (8, 0)
    else:
        can = torch.cpu.get_capabilities() if setup.device.type == "cpu" else {}
        fast = can.get("avx512_bf16") or can.get("amx_bf16")
    on = not setup.exact and (name == "bfloat16" or name == "auto" and bool(fast))
    return "bfloat16" if on else "float32"


def start_device(args):
    """The torch device of --device; sets --threads. Under torchrun this process joins the others
    and, with CUDA, takes the GPU of its local rank. Raises UserError."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # momentum near 1e-38 is slow
    torch.empty(31 << 20, dtype=torch.uint8)  # glibc then reuses such blocks: a fifth faster
    name, cuda = args.device, torch.cuda.is_available()
    name = ("cuda" if cuda else "cpu") if name == "auto" else name
    if dist.is_available() and dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
        name += f":{os.environ['LOCAL_RANK']}" * (name == "cuda")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


# ---------------------------------------------------------------- scoring


def eval_steps(steps, every):
    """Set of steps to evaluate at: 0, the last, each `every`-th (if 0: 1 2 3 5 8 10 20 ...)."""
    if every:
        return set(range(0, steps, every)) | {steps}
    dense = {m * 10 ** e for m in (1, 2, 3, 5, 8) for e in range(len(str(steps)))}
    return {0, steps} | {s for s in dense if s < steps}


def floors(answer, other=None):
    """{n, floor, cross_floor} of answers (n,) as fractions; other (n,): the other operand's."""
    return {"n": len(answer), "floor": data.majority_floor(answer),
            "cross_floor": None if other is None else data.cross_floor(answer, other)}


def answer_row(logits, test):
    """The row of a Test, from logits (n, v): accuracy, its floors, cross-entropy (nats)."""
    answer = test.examples.answer
    return {**test.row, "accuracy": accuracy(logits, answer), **floors(answer, test.other),
            "loss": F.cross_entropy(logits, answer).item()}


def evaluate(model, setup, tests):
    """Rows of Tests, in order, by setup.score(), else answer_row()."""
    score = setup.score or (lambda model, test: [answer_row(predict(model, test.examples), test)])
    return list(itertools.chain(*(score(model, test) for test in tests)))


def percent(x):
    """A fraction as text in percent."""
    return "-" if x is None else f"{x:.1%}"


def table(head, rows):
    """Print rows of cells under a heading, in columns as wide as they need to be."""
    rows = [list(map(str, cells)) for cells in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        padded = [cell.rjust(w) if i > 1 else cell.ljust(w)
                  for i, (cell, w) in enumerate(zip(cells, widths))]
        print("  " + "  ".join(padded).rstrip())


SHARES = "accuracy", "floor", "cross_floor", "measured", "control's", "parsed"  # shown in percent


def fact(row, key):
    """A column of a row as printed."""
    value = row.get(key)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        style = ".1%" if key in SHARES else ".3f" if key in ("loss", "cosine") else ".3g"
        return f"{value:{style}}"
    return "-" if value is None else value


def show(rows, keys=("task", "operand", "split", "accuracy", "floor", "cross_floor", "loss", "n")):
    """Print columns of rows."""
    table(keys, [map(functools.partial(fact, row), keys) for row in rows])


# ---------------------------------------------------------------- flags


def add_run_flags(parser):
    """The flags that pretrain.py and finetune.py share. A setup sets further defaults."""
    add = parser.add_argument
    add("--out", type=user_path, help="checkpoint to write; a .json of it stands beside it")
    add("--lr", type=number_above(0), help="peak learning rate")
    add("--steps", type=number_above(0, int), help="updates")
    add("--batch-size", type=number_above(0, int), help="strings a step")
    add("--clip", type=number_above(0), default=1., help="largest gradient norm")
    add("--seed", type=number_above(-1, int), default=0, help="of weights, data and test sets")
    add("--eval-size", type=number_above(0, int), help="strings in a test set")
    add("--eval-every", type=number_above(-1, int), default=0, help="steps between evaluations; "
        "0: 25 times a pretraining, at 0 1 2 3 5 8 10 20 ... of a fine-tuning")
    add("--save-every", type=number_above(0, int), default=250, help="steps between checkpoints")
    add("--keep", type=numbers(int), help="steps whose checkpoints stay, as 100,1000: "
        "out/ft.step100.pt, for every analysis")
    add("--force", action="store_true", help="start again, replacing the run at --out")
    add("--compile", action="store_true", help="torch.compile the model; on a GPU it records one "
        "CUDA graph a step")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of training's "
        "forward pass; auto: bfloat16 where the device multiplies in it")
    add_machine_flags(parser)


def add_machine_flags(parser):
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto: cuda if there is one")
    add("--threads", type=number_above(-1, int), default=0, help="CPU threads; 0: torch's choice")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, and the setup's default beside each flag."""


def new_parsers(doc):
    """(first, full): the first reads only the flags that name a setup, and leaves the others; the
    full one has them all, once the setup has added its own."""
    return (argparse.ArgumentParser(add_help=False, allow_abbrev=False),
            argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=Help))


def parse(parser, words, script):
    """The arguments of a command line (None: this process's), and `command`, the line itself."""
    args = parser.parse_args(words)
    line = sys.argv if words is None else [script, *words]
    args.command = shlex.join(["python", os.path.basename(line[0]), *line[1:]])
    return args


# ---------------------------------------------------------------- a run and its files

ADVICE = "give another --out, or --force to replace it"
FREE = ("out", "ckpt", "force", "save_every", "device", "threads", "command")  # may differ later


def commit():
    """The git commit of these files, -dirty if changed; None without git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
    here = os.path.dirname(os.path.abspath(__file__))
    with contextlib.suppress(OSError):  # no git here
        files = (f"HEAD:./{name}.py" for name in ("data", "model", "pretrain"))
        found = git("rev-parse", "HEAD", *files)  # fails in a repository without them
        if not found.returncode:
            changed = git("diff", "--quiet", "HEAD", "--", ":(glob)*.py", "setups").returncode
            return found.stdout.split()[0] + "-dirty" * bool(changed)


def start_facts(args, device):
    """What a checkpoint records of a start: command, code, versions, machine, time."""
    return {"command": args.command, "commit": commit(),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "device": str(device), "threads": torch.get_num_threads(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S")}


@contextlib.contextmanager
def noted_signals():
    """Within the `with`, SIGINT and SIGTERM only go on a list. A second one interrupts, but not
    under torchrun, which repeats signals to all processes and kills those that stay."""
    noted = []

    def note(number, frame):
        noted.append(number)
        if processes()[1] == 1:
            signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """A training run and its files: X.pt, and X.json, which is X.pt without its tensors. The same
    command again resumes the run, or says that it is done. Other arguments, or another
    parent, at the same --out are refused without --force. Raises UserError."""
    ends = staticmethod(lambda step: False)  # step -> whether to end there, before --steps

    def __init__(self, args, stage, model, optimizer, setup, parent=None):
        self.args, self.model, self.optimizer, self.setup = args, model, optimizer, setup
        self.first, self.finished, self.history, self.starts = 0, False, [], []
        if parent and os.path.realpath(args.out) == os.path.realpath(parent["path"]):
            raise UserError(f"--out {args.out} is what this run starts from")
        if os.path.isdir(args.out):
            raise UserError(f"--out {args.out} is a folder")
        earlier = None if args.force else self.earlier()
        if earlier and args.dtype == "auto":  # the same dtype on any device
            args.dtype = earlier["args"].get("dtype", "auto")
        args.dtype, relation = training_dtype(args.dtype, setup), setup.relation(args)
        self.facts = {
            "stage": stage, "setup": setup.name, "scale": setup.scale, "config": vars(model.config),
            "args": {k: v for k, v in vars(args).items() if k not in FREE},
            "parent": parent and {k: parent[k] for k in ("path", "sha256")}, "steps": args.steps,
            "capability": {"task": relation.task, "operand": relation.pt}}
        if earlier:
            self.resume(earlier)
        self.leads = processes()[0] == 0  # this process scores, saves and prints
        self.began = time.time()
        self.starts = [*self.starts, {**start_facts(args, setup.device), "step": self.first}]
        mode = "reduce-overhead" if setup.device.type == "cuda" else None
        self.forward = torch.compile(model, mode=mode) if args.compile else model
        self.autocast = torch.autocast(setup.device.type, torch.bfloat16,
                                       args.dtype == "bfloat16", cache_enabled=False)
        often = args.eval_every or (max(1, args.steps // 25) if stage == "pretrain" else 0)
        self.evals = eval_steps(args.steps, often)

    def earlier(self):
        """The checkpoint at --out, None without one. Raises UserError."""
        out, record = self.args.out, json_path(self.args.out)
        if os.path.exists(out):
            return load(out, self.setup.device, unfinished=True)[1]
        if os.path.exists(record):
            raise UserError(f"{record} is not of this program: there is no {out}; {ADVICE}")

    def resume(self, earlier):
        """Go on from the checkpoint at --out. Raises UserError if it is another run's."""
        if differences := self.differences(earlier):
            raise UserError(f"{self.args.out} is another run, of {', '.join(differences)}: give "
                            f"these to go on with it; {ADVICE}")
        self.finished, self.first = earlier["finished"], earlier["step"]
        self.history, self.starts = earlier["history"], earlier["starts"]
        if not self.finished:
            self.model.load_state_dict(earlier["optimizer"].pop("weights", earlier["model"]))
            self.optimizer.load_state_dict(earlier["optimizer"])

    def differences(self, earlier):
        """List of flags and facts in which an earlier checkpoint differs."""
        args, before = self.facts["args"], earlier["args"]
        words = [f"--{key.replace('_', '-')} {before.get(key)}" for key in {**before, **args}
                 if before.get(key) != args.get(key)]
        words += [f"another {key}" for key in ("stage", "setup", "scale", "config")
                  if earlier[key] != self.facts[key]]
        parents = {(x["parent"] or {}).get("sha256") for x in (earlier, self.facts)}
        return words + ["another parent"] * (len(parents) - 1)

    def steps(self):
        """Yields each step to train; between steps scores (first the untouched model, last the
        finished one), saves, shows a bar. SIGINT, SIGTERM: saves, exits with 128 + signal."""
        args = self.args
        if self.finished:
            if self.leads:
                write_record(args.out)  # a kill may have come between the two files
            return self.print(f"{args.out}: already done ({self.first} steps, same arguments)")
        fresh = not self.history
        given = {k: v for k, v in vars(args).items() if k != "command"}
        self.print(f"{self.facts['stage']}:", ", ".join(f"{k} {v}" for k, v in given.items()))
        bar = tqdm(total=args.steps, initial=self.first, desc=self.facts["stage"],
                   disable=None if self.leads else True)
        with noted_signals() as signals, bar:
            for step in range(self.first, args.steps + 1):
                last = self.ends(step) or step == args.steps
                if (step in self.evals or last) and (step > self.first or fresh):
                    self.evaluate(step, bar)
                if step in (args.keep or ()):
                    self.save(step, f"{args.out.removesuffix('.pt')}.step{step}.pt")
                due = step % args.save_every == 0 and step > self.first
                stop = agreed(signals[0] if signals else 0)  # all at the same step
                if last or due or stop:
                    self.save(step, last=last)
                if last:
                    break
                if stop:
                    sys.exit(128 + agreed(stop))  # once it is saved
                yield step
                bar.update()
        if self.leads:
            show([r for r in self.history if r["step"] == step])
        self.print(f"wrote {args.out}")

    def print(self, *words):
        if self.leads:
            print(*words, flush=True)

    def evaluate(self, step, bar):
        """Add the rows of this step to the history."""
        if not self.leads:
            return
        self.check_finite(step)
        rows = evaluate(self.model, self.setup, self.setup.tests(self.args, step))
        self.history = [*self.history, *(dict(row, step=step) for row in rows)]
        shown = {f"{r['operand']}_{r['split']}": percent(r["accuracy"]) for r in rows[:6]}
        bar.set_postfix({**shown, "loss": rows[0]["loss"]})
        if bar.disable:
            self.print(f"step {step}", shown)

    def check_finite(self, step):
        """Exit if a weight is not finite: such weights are neither scored nor saved."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            sys.exit(f"step {step}: the weights are not finite any more; --lr {self.args.lr} is "
                     f"too large. The last good checkpoint, if any, is {self.args.out}")

    def save(self, step, path=None, last=False):
        """Write the checkpoint and its record; to `path` (--keep) as a finished run."""
        if not self.leads:
            return
        self.check_finite(step)
        finished, path = bool(path) or last, path or self.args.out
        self.starts[-1]["seconds"] = round(time.time() - self.began, 1)
        moments = {} if finished else self.optimizer.state_dict()
        if moments and hasattr(self.args, "rank"):
            moments["weights"] = self.model.state_dict()  # LowRanks not merged
        save(path, {**self.facts, "step": step, "finished": finished, "history": self.history,
                    "starts": self.starts, "model": merged(self.model), "optimizer": moments})
        write_record(path)


def json_path(path):
    """X.json of X.pt."""
    return f"{path.removesuffix('.pt')}.json"


def write_record(path):
    """Write X.json of X.pt: all of it but tensors and vocabularies, and its sha256."""
    ckpt = read_checkpoint(path)
    shape = {k: v for k, v in vars(ckpt["config"]).items() if not isinstance(v, tuple)}
    record = {k: v for k, v in ckpt.items() if k not in ("model", "optimizer", "path")}
    write_json(json_path(path), {**record, "config": shape})


# ---------------------------------------------------------------- the stage


def arguments(words=None):
    """(args, model, setup): --setup and --scale say which flags there are, and their defaults."""
    first, parser = new_parsers(__doc__)
    for p in (first, parser):
        p.add_argument("--setup", default="pcfg", help="pcfg, or one of setups/: tracr-count, "
                       "stories, ...")
        p.add_argument("--scale", default="small", choices=data.SCALES, help="minutes on two CPU "
                       "cores, or the paper's sizes for a GPU")
    given, _ = first.parse_known_args(words)
    setup = data.find_setup(given.setup, given.scale)
    add_run_flags(parser)
    parser.set_defaults(out="out/pre.pt")
    setup.flags(parser, "pretrain")
    args = parse(parser, words, "pretrain.py")
    setup.device = start_device(args)
    setup.resolve(args)
    model = setup.write_model(args)
    if model is None:
        model = GPT(Config(**setup.config())).init_weights(data.rng(args.seed, "weights"))
    return args, model.to(setup.device), setup


def main(words=None):
    args, model, setup = arguments(words)
    optimizer = setup.optimizer(model, args.lr)
    batch = data.stream(lambda n, rng: setup.pretraining(n, rng, args), args.batch_size,
                        args.seed, "pretrain", setup.draws_on)
    lr_at = cosine(args.lr, args.steps, warmup=setup.warmup)
    run = Run(args, "pretrain", model, optimizer, setup)
    for step in run.steps():
        with run.autocast:
            loss = loss_of(run.forward, batch(step))
        update(model, optimizer, loss, lr_at(step), args.clip)


if __name__ == "__main__":
    run_script(main)
