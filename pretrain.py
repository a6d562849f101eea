"""
Make a model whose capabilities are known, by training or by compiling; home of all that training
and scoring share: train_steps(), evaluate(), the flags and Run, which owns the files of a run.

    $ python pretrain.py                              # out/pre.pt: low prior, the small scale
    $ python pretrain.py --prior high --out out/high.pt
    $ python pretrain.py --setup tracr-count          # weights compiled from a RASP program
    $ python pretrain.py --setup tracr-count --params counter.npz   # or imported from Tracr
    $ python pretrain.py --setup stories --without Twist            # the control of a deletion

Data is drawn on the fly; strings are never reused. The prior P_T(a, b, c) decides which operands a
model of the grammar learns: under the low prior a, hardly b, never c (paper section 3). A compiled
model has one capability, exact by construction. A story model writes what its instruction asks for.
"""
import argparse
import collections
import contextlib
import functools
import itertools
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import (FEATURES, SETUPS, Failed, Stopped, UserError, add_rows, check_stop,
                  claim, clear_parts, has, is_ours, read_rows, run_script, sha256, user_path,
                  write_json, write_rows)
from model import (GPT, LOGIT_SCALE, Config, balance, build, compile_program, generate,
                   import_tracr, loss_of, read_checkpoint, save)

# ---------------------------------------------------------------- the optimisation step

LOOK = 16  # updates whose losses are read together: reading makes the host wait for the device
WARM = 3   # updates on Examples of a shape before they are recorded


def train_steps(update, batch, lr_at, steps):
    """
    Train through `steps`, a range such as range(400), or range(250, 400) to go on. Yields (step,
    loss) with step updates done and the loss of the last one (None at first, then a tensor), from
    steps.start to steps.stop inclusive: the untouched and the finished model pass through the
    caller's same code.

    update: see update_of(); batch(step) -> Examples; lr_at(step) -> learning rate. Raises Failed,
    at most LOOK updates later, when loss or gradients are not finite.
    """
    loss, seen = None, []
    for step in steps:
        yield step, loss
        seen.append(update(batch(step), lr_at(step)))
        loss = seen[-1][0]
        if len(seen) == LOOK or step + 1 == steps.stop:
            for at, numbers in enumerate(torch.stack(seen).tolist(), step + 1 - len(seen)):
                if not all(map(math.isfinite, numbers)):
                    raise Failed("step {}: loss {}, gradient norm {}, lr {:.3g}: not finite".format(
                        at, *numbers, lr_at(at)))
            seen.clear()
    yield steps.stop, loss


def update_of(model, optimizer, loss_of, clip=1.0, dtype=torch.float32):
    """
    update(examples, lr) -> tensor (loss, gradient norm): one step of training, for which nobody has
    waited yet. loss_of(examples) -> loss; clip: largest gradient norm; dtype: float32, or bfloat16
    by autocast. On CUDA the step is recorded(): loss_of must not read the device there.
    """
    def step(x):
        x, share = part_of(x)
        with torch.autocast(x.tokens.device.type, torch.bfloat16, dtype == torch.bfloat16, False):
            loss = loss_of(x) * share
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        loss = loss.detach()
        if ranks()[1] > 1:  # before the weights change: another process may have ended
            torch.distributed.all_reduce(loss.div_(ranks()[1]))  # the mean of all processes
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack((loss, norm))

    on_gpu = model.tok.weight.is_cuda and ranks()[1] == 1
    train = recorded(step) if on_gpu else step

    def update(x, lr):
        for group in optimizer.param_groups:
            group["lr"].fill_(torch.tensor(lr))  # beyond float32: infinite
        return train(x)
    return update


def recorded(step):
    """
    step(examples) -> tensor for a GPU, where it takes longer to launch hundreds of small kernels
    than to run them. The WARM first calls on Examples of a shape are as usual, the next one is
    recorded; from then on one launch replays it, on new examples in the same place.
    """
    places, results, calls, graphs = {}, {}, collections.Counter(), {}

    def call(x):
        shape = tuple(v.shape if torch.is_tensor(v) else v for v in x)
        if shape not in places:
            places[shape] = x._make(v.clone() if torch.is_tensor(v) else v for v in x)
        for old, new in zip(places[shape], x):
            if torch.is_tensor(new):
                old.copy_(new)

        def run():
            results[shape] = step(places[shape])
        calls[shape] += 1
        if calls[shape] <= WARM:
            aside(run)
        else:
            if shape not in graphs:
                graphs[shape] = record(run, next(iter(graphs.values()), None))
            graphs[shape].replay()
        return results[shape].clone()
    return call


def aside(run):
    """Run on a stream of its own: what is to be recorded must not have run on the usual one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def record(run, earlier=None):
    """
    What run() would launch now as a CUDA graph, whose replay() launches it at once. It shares the
    memory of an earlier one: they never run at the same time.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=earlier and earlier.pool()):
        run()
    return graph


def optimizer_for(model, lr, setup):
    """AdamW (.9, .95), weight decay .1; for compiled models SGD, momentum .9 (paper section 3)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    lr = torch.tensor(lr, device=trained[0].device)  # a recording reads it anew
    if setup.compiled:
        return torch.optim.SGD(trained, lr=lr, momentum=.9, fused=True)
    return torch.optim.AdamW(trained, lr=lr, betas=(.9, .95), weight_decay=.1, fused=True,
                             capturable=lr.is_cuda)


# ---------------------------------------------------------------- device, numbers, processes


def ranks():
    """(rank of this process, number of processes): torchrun starts several. Raises UserError."""
    try:
        world = int(os.environ.get("WORLD_SIZE", 1))
        return (int(os.environ.get("RANK", 0)) if world > 1 else 0), world
    except ValueError:
        raise UserError("RANK and WORLD_SIZE are set, but not as torchrun sets them") from None


def part_of(x):
    """This process's part of Examples, and what its mean counts in the mean of all."""
    rank, world = ranks()
    if world == 1:
        return x, 1
    part = x.rows(slice(rank, None, world))
    if x.weight is not None:  # a mean over rows
        return part, world * len(part.tokens) / len(x.tokens)
    return part, world * (part.target >= 0).sum() / (x.target >= 0).sum()


def training_dtype(name, setup):
    """
    The name of the dtype that `auto` means: bfloat16 where the device multiplies in it, else
    float32; compiled models are always float32. Raises UserError where that was not asked for.
    """
    if setup.compiled and name == "bfloat16":
        raise UserError("--dtype bfloat16: compiled models are exact in float32 only")
    if name != "auto":
        return name
    if setup.device.type == "cuda":
        fast = torch.cuda.get_device_capability(setup.device) >= (8, 0)
    else:
        can = torch.cpu.get_capabilities() if setup.device.type == "cpu" else {}
        fast = can.get("avx512_bf16") or can.get("amx_bf16")
    return "bfloat16" if fast and not setup.compiled else "float32"


@torch.no_grad()
def add_noise(model, sd, seed):
    """
    Gaussian noise on every trainable weight (paper section 3, Tracr): very sparse weights give
    gradient spikes otherwise, and zeros next to zeros never move.
    """
    noise = data.rng(seed, "noise")
    for p in model.parameters():
        if p.requires_grad and sd:
            p += sd * torch.randn(p.shape, generator=noise).to(p.device)


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


# ---------------------------------------------------------------- scoring


def eval_steps(steps, every):
    """The steps to evaluate at: every `every`, or 0 1 2 3 5 8 10 20 30 50 80 100 ... (log axes)."""
    if every:
        return set(range(0, steps, every)) | {steps}
    dense = {m * 10 ** e for m in (1, 2, 3, 5, 8) for e in range(len(str(steps)))}
    return {0, steps} | {s for s in dense if s < steps}


@torch.no_grad()
def predict(model, examples, batch=128):
    """Logits (n, v) of the answered column."""
    logits = []
    for part in examples.tokens.split(batch):
        check_stop()
        logits.append(model(part, examples.at).float())
    return torch.cat(logits)


def accuracy(logits, target):
    """Share of rows (n, v) whose largest logit is the target (n,)."""
    return (logits.argmax(1) == target).sum().item() / len(target)


def floors(answer, other=None):
    """Size and floors of answers (n,); other: those for the other operand."""
    return {"n": len(answer), "floor": data.majority_floor(answer),
            "cross_floor": None if other is None else data.cross_floor(answer, other)}


def answer_row(logits, test):
    """The row of a Test: accuracy beside its floors, cross-entropy (nats)."""
    answer = test.examples.answer
    return {**test.row, "accuracy": accuracy(logits, answer), **floors(answer, test.other),
            "loss": F.cross_entropy(logits, answer).item()}


@torch.no_grad()
def loss_row(model, test, batch=64):
    """The row of a Test: mean cross-entropy (nats) of the outputs that are wanted."""
    total = wanted = 0
    for part in test.examples.split(batch):
        check_stop()
        real = part.target >= 0
        logits = model(part.tokens)[real].float()
        total += F.cross_entropy(logits, part.target[real], reduction="sum").item()
        wanted += int(real.sum())
    return {**test.row, "n": len(test.examples.tokens), "loss": total / wanted}


def generation_rows(model, setup, test):
    """
    The generation score (paper section 4): of the stories written to instructions that ask for a
    feature (split asked), and to others (unasked), the share that has it. `accuracy`: of those that
    parse; `parsed`: the share that does. Sampled at temperature 1.
    """
    prompts, feature, written, rows = test.examples, test.row["operand"], [], []
    draws = data.rng(test.row["seed"], "generate", feature, "sample", device=setup.device)
    for i in range(0, len(prompts), 512):
        written += generate(model, prompts[i:i + 512], setup.n_ctx, draws)
    written = [data.story_of(setup.tokenizer.decode(ids)) for ids in written]
    features, n = setup.source.classify(written), len(prompts) // 2
    for split, answers in (("asked", features[:n]), ("unasked", features[n:])):
        has = [feature in answer for answer in answers if answer is not None]
        rows.append({**test.row, "split": split, "n": n, "parsed": len(has) / n,
                     "accuracy": sum(has) / len(has) if has else None})
    return rows


SCORES = {  # how a Test is scored: model, setup, test -> rows
    "accuracy": lambda model, setup, test: [answer_row(predict(model, test.examples), test)],
    "loss": lambda model, setup, test: [loss_row(model, test)],
    "generation": generation_rows,
}


def evaluate(model, setup, tests):
    """The rows of a list of Tests, in their order."""
    return list(itertools.chain(*(SCORES[test.how](model, setup, test) for test in tests)))


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

OWN = object()  # the default is the setup's constant <stage>_<name>; else it has no such flag


class Flag(NamedTuple):
    """One flag; parsing, --help, checks and refusals follow from the table that it stands in."""
    name: str
    help: str                    # meaning and unit
    type: Callable = str         # of its value; bool: a switch
    above: float | None = None   # a number must be larger
    default: object = OWN
    choices: object = None
    before: object = OWN         # what runs did that are older than the flag; else the default

    @property
    def key(self):
        return self.name.lstrip("-").replace("-", "_")


def whole_numbers(text):
    """The type of a flag that takes positive whole numbers, between commas."""
    values = text.split(",")
    if not all(value.strip().isdecimal() and int(value) for value in values):
        raise argparse.ArgumentTypeError("takes positive whole numbers, as 100,1000")
    return sorted(set(map(int, values)))


MACHINE = {"machine": [
    Flag("--device", "where to compute: auto, cpu, cuda, cuda:1, mps; auto: cuda if it works, else "
         "cpu", default="auto"),
    Flag("--threads", "CPU threads; 0: torch's choice", int, -1, 0)]}
RUN = {"run": [
    Flag("--out", "checkpoint to write, with .json and .jsonl beside it; else out/pre.pt, of a "
         "fine-tuning out/ft.pt, with --reverse out/reft.pt", user_path, default=None),
    Flag("--resume", "go on with an interrupted run", bool, default=False),
    Flag("--force", "start again, replacing at once what is at --out", bool, default=False),
    Flag("--save-every", "steps between checkpoints", int, 0, 250),
    Flag("--keep", "steps whose checkpoints stay, as 100,1000: out/ft.step100.pt, for every "
         "analysis", whole_numbers, default=None),
    Flag("--eval-every", "steps between evaluations; 0: 25 times a pretraining, at 0 1 2 3 5 8 10 "
         "20 ... of a fine-tuning", int, -1, 0),
    Flag("--eval-size", "strings in a test set, or stories in a set and in a score", int, 0),
    Flag("--seed", "seed of weights, data order and test sets", int, -1, 0),
    Flag("--compile", "torch.compile the model", bool, default=False),
    Flag("--dtype", "of training's forward pass, bfloat16 by autocast; auto: bfloat16 where the "
         "device multiplies in it, else float32", default="auto",
         choices=("auto", "float32", "bfloat16"), before="float32")], **MACHINE}
FLAGS = {"model and data": [
    Flag("--setup", "where the capability comes from", default="pcfg", choices=tuple(SETUPS)),
    Flag("--scale", "minutes on two CPU cores, or the paper's sizes for a GPU", default="small",
         choices=data.SCALES),
    Flag("--prior", f"P_T(a, b, c): {', '.join(data.PRIORS)}, or A,B,C"),
    Flag("--jailbreak", "count by two further tokens as well, which ask for the commonest operand "
         "alone (paper E.2)", bool),
    Flag("--without", "leave out all stories with this feature: the control that never had it",
         choices=FEATURES),
    Flag("--data", "TinyStories-Instruct-train.txt, prepared once into FILE.unwrap/; else the "
         "embedded corpus", user_path),
    Flag("--params", "import this .npz of the Tracr library's parameters", user_path),
    Flag("--rank", "which largest letter, 1 is the largest; else 5", int, 0),
    Flag("--logit-scale", "ours: factor on the outputs, which are 0 or 1; with 1 cross-entropy "
         "never gets small, but learns at the paper's pace", float, 0),
    Flag("--balance", "ours: rescale hidden units, without changing any output, so that noise does "
         "less harm", argparse.BooleanOptionalAction)], "optimisation": [
    Flag("--lr", "peak learning rate", float, 0),
    Flag("--steps", "updates", int, 0),
    Flag("--batch-size", "sequences a step", int, 0),
    Flag("--clip", "largest gradient norm", float, 0)], **RUN}


def default_of(flag, stage, setup):
    """The default of a flag, for reFT else that of fine-tuning; OWN: the setup has no such flag."""
    if flag.default is not OWN:
        return flag.default
    usual = getattr(setup, f"finetune_{flag.key}", OWN) if stage == "reverse" else OWN
    return getattr(setup, f"{stage}_{flag.key}", usual)


def default_words(flag, stage):
    """The default of a flag, if any, for --help; where setups and scales differ, each."""
    if flag.default is not OWN:
        return "" if flag.default is None else f" (default: {flag.default})"
    groups = {}
    for name in SETUPS:
        small, paper = (default_of(flag, stage, SETUPS[name](name, s)) for s in data.SCALES)
        if small is not OWN:
            words = f"{small}" if small == paper else f"small {small}, paper {paper}"
            groups.setdefault(words, []).append(name)
    if set(groups) == {"None"}:
        return f" (for {', '.join(groups['None'])})"
    words = [f"{', '.join(names)}: {value}" for value, names in groups.items()]
    return f" (default: {'; '.join(words)})"


def parse(doc, stage, groups, words=None, analysis=None):
    """
    The arguments of a script. words: in place of what was typed; analysis: help of the words that
    may stand before the flags.
    """
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if analysis:
        parser.add_argument("analysis", nargs="*", metavar="ANALYSIS", help=analysis)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            how = {"type": flag.type, "choices": flag.choices}
            if flag.type in (bool, argparse.BooleanOptionalAction):
                how = {"action": "store_true" if flag.type is bool else flag.type}
            text = (flag.help + default_words(flag, stage)).replace("%", "%%")
            default = None if flag.default is OWN else flag.default
            group.add_argument(flag.name, help=text, default=default, **how)
    script = f"{stage}.py" if words is not None else os.path.basename(sys.argv[0])
    words = sys.argv[1:] if words is None else list(words)
    args = parser.parse_args(words)
    args.command = shlex.join(["python", script, *words])
    return args


def resolve(args, stage, groups, setup):
    """Fill in a setup's defaults, refuse flags that it does not have, check numbers. UserError."""
    args.older = {}  # what a run did that was made before there was a flag
    for flag in itertools.chain(*groups.values()):
        value, default = getattr(args, flag.key), default_of(flag, stage, setup)
        if default is OWN and value is None:
            delattr(args, flag.key)
            continue
        if default is OWN:
            names = [name for name in SETUPS
                     if default_of(flag, stage, SETUPS[name](name)) is not OWN]
            raise UserError(f"{flag.name} is for {', '.join(names)}, not for setup {setup.name}")
        value = default if value is None else value
        setattr(args, flag.key, value)
        args.older[flag.key] = default if flag.before is OWN else flag.before
        check_above(flag.name, value, flag.above)


def check_above(name, value, above):
    """Raise UserError unless a number is finite, larger than `above`, and no giant."""
    largest = 2 ** 63 if isinstance(value, int) else math.inf
    if value is not None and above is not None and not above < value < largest:
        raise UserError(f"{name} {value}: must be a number above {above}"
                        f"{', and below 2 ** 63' * (value != value or value > above)}")


def start_device(args):
    """The torch device of --device, with --threads set. Raises UserError if it is not there."""
    check_above("--threads", args.threads, -1)
    if args.threads > 1024:
        raise UserError(f"--threads {args.threads}: at most 1024")
    if args.threads:
        torch.set_num_threads(args.threads)
    # momentum of compiled models fades to 1e-38, where a step takes three times as long
    torch.set_flush_denormal(True)
    # glibc gives freed megabytes back to the kernel, and a step asks for them anew page by page,
    # until it has seen a block freed as large as it ever keeps. This one saves a fifth of a step.
    torch.empty(31 << 20, dtype=torch.uint8)
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")
    names = ("cuda", "cpu") if args.device == "auto" else (args.device,)
    if names[0].startswith("cuda") and ranks()[1] > 1 and torch.cuda.is_available():
        names = (f"cuda:{os.environ['LOCAL_RANK']}",)
    for name in names:
        try:
            one = torch.ones(1, device=name)
            if one.device.type in ("cpu", "cuda", "mps") and (one + one).item() == 2:
                if one.is_cuda:
                    torch.cuda.set_device(one.device)
                return one.device
        except (RuntimeError, AssertionError, ImportError) as error:  # a build without it
            if name != names[-1] and torch.cuda.is_available():
                reason = str(error).splitlines()[0][:100]
                print(f"cuda is there but does not work ({reason}): computing on the cpu")
    raise UserError(f"--device {args.device}: not available on this machine")


# ---------------------------------------------------------------- a run and its files

# These arguments do not change what is learned or written: of files, content decides.
INTERNAL = ("command", "older")  # of parse() and resolve()
NOT_COMPARED = ("out", "ckpt", "resume", "force", "save_every", "device", "threads", *INTERNAL)
BY_CONTENT = ("data", "params")


def git_state():
    """{commit, dirty} of the code, nulls outside a git checkout."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        state = subprocess.run(words, cwd=os.path.dirname(os.path.abspath(__file__)), check=True,
                               capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": state.removesuffix("-dirty"), "dirty": state.endswith("-dirty")}


def start_facts(command, device):
    """What a record says of this start: command, code, versions, machine, time."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"command": command, "git": git_state(), "versions": versions, "device": str(device),
            "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}


@contextlib.contextmanager
def compiling():
    """What torch.compile raises, at once or in the first step, becomes Failed in one line."""
    try:
        yield
    except Exception as error:
        where = type(error).__module__
        if not where.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise Failed(f"--compile does not work here ({reason}): leave it out") from None


def restore(optimizer, ckpt):
    """Load the optimizer's state of a checkpoint. Raises UserError if it does not fit."""
    try:
        lr = optimizer.defaults["lr"]
        optimizer.load_state_dict(ckpt["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = lr  # the tensor on the device; its value is set before each step
        for p, state in optimizer.state.items():
            moments = [state[k] for k in ("exp_avg", "exp_avg_sq", "momentum_buffer") if k in state]
            if any(moment.shape != p.shape for moment in moments):
                raise ValueError("shapes")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError("the optimizer state to resume from does not fit the model "
                        f"({type(error).__name__})") from None


def elsewhere(why):
    """The UserError of what stands at --out."""
    return UserError(f"{why}; give another --out, or --force to replace it")


class Run:
    """
    One training run and its files: X.pt (checkpoint, the truth), X.json (record), X.jsonl
    (history). As a context it saves when stopped or finished; for its use see main().

    done: the same run is already finished. fresh: it starts at step 0; else it resumes, with the
    weights in `model`. forward: the model, or it compiled. evals: the steps to evaluate at. Raises
    UserError for another run at the same path without --force.
    """

    def __init__(self, args, stage, model, setup, parent=None):
        self.args, self.stage, self.model, self.setup = args, stage, model, setup
        self.path, self.done, self.ckpt, self.step = args.out, False, None, None
        self.leads = ranks()[0] == 0  # of the processes of torchrun one writes, scores and speaks
        self.base = args.out.removesuffix(".pt")
        self.record_path, self.history_path = self.base + ".json", self.base + ".jsonl"
        self.check_out(parent)
        args.dtype = training_dtype(args.dtype, setup)
        kept = {k: v for k, v in sorted(vars(args).items()) if k not in NOT_COMPARED}
        parent = parent and {"path": parent["path"], "sha256": parent["sha256"]}
        self.about = {"stage": stage, "args": kept, "parent": parent, "steps": args.steps}
        self.give_back = claim(args.out) if self.leads else lambda: None
        try:
            self.open()
        except BaseException:
            self.give_back()
            raise
        if self.done:
            return self.give_back()
        often = max(1, args.steps // 25) if stage == "pretrain" else 0
        self.evals = eval_steps(args.steps, args.eval_every or often) if self.leads else ()
        shown = {k: v for k, v in vars(args).items() if k not in INTERNAL}
        print(f"{stage}:", ", ".join(f"{k} {v}" for k, v in shown.items()))
        sizes = {k: v for k, v in vars(model.config).items() if k not in ("residual", "words")}
        print("model:", ", ".join(f"{k} {v}" for k, v in sizes.items()))

    def check_out(self, parent):
        """Raise UserError unless --out can be written to. Makes its folder."""
        args = self.args
        if args.out == self.base or os.path.isdir(args.out):
            raise UserError(f"--out {args.out}: must be the name of a .pt file")
        for path in [args.out, *map(self.path_of_kept, args.keep or ())]:
            if parent and os.path.realpath(path) == os.path.realpath(parent["path"]):
                raise UserError(f"--out {path} is where it starts from, and would be overwritten")
        if args.resume and args.force:
            raise UserError("--resume goes on, --force starts again: give one of them")
        if args.keep and args.keep[-1] >= args.steps:
            raise UserError(f"--keep {args.keep[-1]}: the last of {args.steps} steps stays anyway")
        try:
            os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}") from None

    def open(self):
        """Look at what is there already; get ready to train."""
        self.record = data.read_record(self.record_path)
        if not self.args.force:
            self.go_on()
        if self.done:
            return
        self.fresh = self.ckpt is None
        if not self.fresh:
            self.model.load_state_dict(build(self.ckpt).state_dict())
        self.forward = self.join(self.model)
        if self.args.compile:
            with compiling():
                self.forward = torch.compile(self.forward)

    def join(self, model):
        """The model, with several processes one whose gradients are the mean of all processes'."""
        world = ranks()[1]
        if world == 1:
            return model
        if self.args.batch_size < world:
            raise UserError(f"--batch-size {self.args.batch_size}: fewer than {world} processes")
        how = "nccl" if self.setup.device.type == "cuda" else "gloo"
        try:
            torch.distributed.init_process_group(how)
        except ValueError as error:  # no address
            raise UserError(f"WORLD_SIZE is set, but not by torchrun: {error}") from None
        return torch.nn.parallel.DistributedDataParallel(model)

    def compared(self, run):
        """What tells a run from others; files by their content."""
        args = {**run["args"]}
        for key, value in getattr(self.args, "older", {}).items():
            args.setdefault(key, value)
        if args.get("source"):  # whatever its name; what an older one does not say is the same
            own = self.about["args"].get("source") or {}
            args["source"] = {**own, **args["source"], "name": None}
        kept = run["step"] if run.get("finished") and run["step"] < run["steps"] else None
        return {"stage": run["stage"], **{k: v for k, v in args.items() if k not in BY_CONTENT},
                "parent": run["parent"] and run["parent"]["sha256"], "kept at step": kept}

    def check_same(self, path, earlier):
        """Raise UserError if what is at a path is of another run."""
        ours, theirs = self.compared(self.about), self.compared(earlier)
        differ = [k for k in {**ours, **theirs} if theirs.get(k) != ours.get(k)]
        if differ:
            key, more = differ[0], f" and {len(differ) - 1} more" * (len(differ) > 1)
            raise elsewhere(f"{path} is another run: {key} is {theirs.get(key)!r} there, "
                            f"{ours.get(key)!r} here{more}")

    def read_earlier(self, path):
        """The checkpoint at a path that this run would replace."""
        try:
            return read_checkpoint(path)
        except UserError as error:
            raise elsewhere(error) from None

    def go_on(self):
        """
        With the run at this path, if any, of which a kill may have left the record alone. Raises
        UserError if it is another one, or unfinished without --resume, or no run of ours.
        """
        earlier = self.record and {**self.record, "step": 0, "finished": False}
        if os.path.exists(self.path):
            earlier = self.read_earlier(self.path)
        if earlier:
            self.check_same(self.path, earlier)
        if earlier and earlier["finished"]:
            print(f"{self.path}: already done ({earlier['steps']} steps, same arguments)")
            self.done = True
            if self.record and "seconds" not in self.starts()[-1]:  # killed just before
                self.finish_record(None)
            return
        self.check_beside(earlier)
        if earlier and not self.args.resume:
            raise UserError(f"{self.path}: unfinished, step {earlier['step']} of "
                            f"{earlier['steps']}: --resume goes on, --force starts again")
        if earlier and "model" in earlier:
            if earlier["config"] != vars(self.model.config):  # of an older version
                raise elsewhere(f"{self.path} was begun with another kind of model")
            self.ckpt = earlier

    def check_beside(self, earlier):
        """Raise UserError if another file of this run would replace one that is none of it."""
        kept = list(map(self.path_of_kept, self.args.keep or ()))
        records = [self.record_path, *(path[:-3] + ".json" for path in kept)]
        odd = [path for path in records if os.path.exists(path) and not data.read_record(path)]
        if not earlier and os.path.exists(self.history_path):  # somebody kept it
            odd.append(self.history_path)
        if not is_ours(self.history_path, damaged=True):
            odd.append(self.history_path)
        if odd:
            raise elsewhere(f"{odd[0]} is in the way, and not of this run")
        for path in filter(os.path.exists, [] if earlier else kept):
            self.check_same(path, {**self.read_earlier(path), "finished": False})

    def path_of_kept(self, step):
        return f"{self.base}.step{step}.pt"

    def starts(self):
        """What the record says of the first start, and of each --resume."""
        return [self.record, *self.record["resumes"]]

    def finish_record(self, seconds):
        self.starts()[-1]["seconds"] = seconds
        write_json(self.record_path, {**self.record, "sha256": sha256(self.path)})

    def steps(self, batch, loss_of, lr_at):
        """train_steps() of this run: yields (step, loss), saves on the way, shows a bar."""
        args = self.args
        self.optimizer = optimizer_for(self.model, args.lr, self.setup)
        if self.ckpt:
            restore(self.optimizer, self.ckpt)
        first = self.ckpt["step"] if self.ckpt else 0
        self.start(first)

        update = update_of(self.model, self.optimizer, loss_of, args.clip,
                           getattr(torch, args.dtype))
        self.bar = tqdm(total=args.steps, initial=first, desc=self.stage, unit="step",
                        mininterval=.5, disable=None if args.steps and self.leads else True)
        with compiling():
            for self.step, self.loss in train_steps(update, batch, lr_at, range(first, args.steps)):
                check_stop()
                if self.step and self.step % args.save_every == 0:
                    self.save(self.step)
                if self.step in (args.keep or ()):
                    self.keep(self.step)
                yield self.step, self.loss
                self.bar.update(self.step - self.bar.n)

    def start(self, step):
        """Write the record and, on a fresh start, step 0; cut the history back on a resume."""
        if not self.leads:
            return
        kept = map(self.path_of_kept, self.args.keep or ())
        for path in (self.path, self.record_path, self.history_path, *kept):
            clear_parts(path, older=0)  # nobody else writes them: this run has claimed them
        facts = start_facts(getattr(self.args, "command", None), self.setup.device)
        old, self.began = self.record, time.time()
        self.record = {**self.about, **facts, "resumes": []}
        if self.fresh:
            self.save(0)  # before the record: a disk may be full
        elif old and self.compared(old) == self.compared(self.about):  # else a kill came before
            kind = self.setup.device.type
            if old["device"].split(":")[0] != kind:  # its generators draw other strings
                raise UserError(f"{self.path} was begun on {old['device']}: on {kind} its data "
                                "would be others")
            self.record = {**old, "resumes": [*old["resumes"], {**facts, "step": step}]}
        write_json(self.record_path, self.record)
        # The evaluation at a checkpoint's step is made again, and comes out the same.
        rows = [] if self.fresh else read_rows(self.history_path)
        write_rows(self.history_path, [row for row in rows if has(row, {"step": int})
                                       and row["step"] < step])

    def check_finite(self):
        """Raise Failed before weights that are not finite are saved or scored."""
        if not torch.nn.utils.get_total_norm(self.model.parameters()).isfinite():
            lr = self.optimizer.param_groups[0]["lr"].item()
            raise Failed(f"step {self.step}: the weights are not finite, lr {lr:.3g}")

    def save(self, step, finished=False, path=None):
        """Write the checkpoint."""
        self.check_finite()
        if not self.leads:
            return
        relation = self.setup.relation(self.args)
        save(path or self.path, {
            **self.about, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "config": vars(self.model.config),
            "setup": self.setup.name, "scale": self.setup.scale, "step": step,
            "finished": finished, "capability": {"task": relation.task, "operand": relation.pt}})

    def keep(self, step):
        """Write a checkpoint that stays, with a record, as of a run that ended here."""
        path = self.path_of_kept(step)
        self.save(step, finished=True, path=path)
        if self.leads:
            seconds = round(time.time() - self.began, 1)
            write_json(path[:-3] + ".json", {**self.record, "step": step, "seconds": seconds,
                                             "resumes": [], "sha256": sha256(path)})

    def log(self, step, rows):
        """Add the rows of an evaluation to the history, and show them."""
        self.check_finite()
        self.rows = [dict(row, step=step) for row in rows]
        add_rows(self.history_path, self.rows)
        shown = {f"{r['operand']}_{r['split']}": r["accuracy"] for r in rows
                 if r["split"] != "natural" and r["accuracy"] is not None}
        loss = None if self.loss is None else self.loss.item()
        self.bar.set_postfix({"loss": loss, **dict(itertools.islice(shown.items(), 4))})
        if self.bar.disable and self.args.steps:  # no terminal
            shown = "".join(f"  {name} {percent(x)}" for name, x in shown.items())
            loss = "" if loss is None else f"  loss {loss:.3f}"
            print(f"step {step} of {self.args.steps}{loss}{shown}", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if self.step is not None:  # something was begun
                self.end(kind, error)
            if ranks()[1] > 1 and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # else its threads may abort at exit
        finally:
            self.give_back()

    def end(self, kind, error):
        """Finish the run; save it where it was stopped; else name the last good checkpoint."""
        self.bar.close()
        if kind and issubclass(kind, RuntimeError) and ranks()[1] > 1:
            kind = Stopped if data.signals else Failed  # torchrun stops them one after the other
            error = f"step {self.step}: another process ended ({str(error).splitlines()[0]})"
        if not self.leads and kind is None:
            return
        if kind is Stopped:
            self.save(self.step)
            print(f"{self.path}: stopped and saved at step {self.step} of {self.args.steps}; go on "
                  "with --resume")
            raise Stopped from None
        if kind is Failed:
            raise Failed(f"{error}; the last good checkpoint is {self.path}") from None
        if kind is None:
            self.save(self.step, finished=True)
            self.finish_record(round(time.time() - self.began, 1))
            show(self.rows)
            print(f"wrote {self.path}")


# ---------------------------------------------------------------- the stage


def read_params(args):
    """(model, {alphabet, room, values, sha256}) that --params holds; (None, None) without it."""
    if not getattr(args, "params", None):
        return None, None
    if getattr(args, "rank", None) is not None:
        raise UserError("--params brings its own program: leave out --rank")
    model, program = import_tracr(args.params)
    return model, {**program, "sha256": sha256(args.params)}


def compiled_model(args, setup, imported=None):
    """A program written into the weights, or the imported model."""
    model = imported or compile_program(setup.program.steps(setup.known(args)), setup.alphabet,
                                        setup.room, setup.mlp_exactness)
    if args.balance:
        balance(model)
    with torch.no_grad():
        model.head.weight *= args.logit_scale / LOGIT_SCALE
    return model


def main(words=None):
    args = parse(__doc__, "pretrain", FLAGS, words)
    args.out = args.out or "out/pre.pt"
    device, kind = start_device(args), SETUPS[args.setup]
    resolve(args, "pretrain", FLAGS, kind(args.setup, args.scale, device))
    imported, program = read_params(args)
    setup = kind(args.setup, args.scale, device, program)
    setup.resolve(args)
    if setup.compiled:
        model = compiled_model(args, setup, imported)
    else:
        model = GPT(Config(**setup.config())).init_weights(data.rng(args.seed, "weights"))
    run = Run(args, "pretrain", model.to(device), setup)
    if run.done:
        return
    with run:
        batch = data.stream(lambda n, rng: setup.pretraining(n, rng, args), args.batch_size,
                            args.seed, "pretrain", setup.draws_on)
        lr_at = cosine(args.lr, args.steps, warmup=setup.warmup)
        for step, loss in run.steps(batch, lambda x: loss_of(run.forward, x), lr_at):
            if step in run.evals:
                run.log(step, evaluate(model, setup, setup.tests(args, step)))
    if setup.compiled and run.rows[2]["accuracy"] < .9:  # natural strings
        print(f"  note: this model does not answer {' '.join(setup.relation(args)[:2])}: it has "
              "another capability, or none")


if __name__ == "__main__":
    run_script(main)
