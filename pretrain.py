"""
Make a model whose capabilities are known: train a GPT from nothing on the five task families of the grammar.

    $ python pretrain.py                              # out/pre.pt: low prior, the small scale
    $ python pretrain.py --prior high --out out/high.pt
    $ python pretrain.py --setup tracr-count          # no training: the weights are compiled from a RASP program
    $ python pretrain.py --setup tracr-count --params counter.npz     # or imported from the Tracr library

Data is drawn on the fly, no string is seen twice on purpose. The sampling prior P_T(a, b, c) decides which operands the
model learns: under the low prior it learns a, hardly meets b, and never meets c (paper: PCFG setup). A compiled
model has one capability, exact by construction (paper: Tracr setup).
"""
import argparse
import contextlib
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import FINETUNED, LETTERS, SPLITS, TASKS, answer_position
from model import (GPT, LOGIT_SCALE, PROGRAMS, Config, Failed, Run, Stopped, UserError, add_common_flags, add_run_flags,
                   assemble, balance, build, check_stop, generate, import_tracr, positive, restore, run_parser, run_script,
                   save, sha256, start_device)

# ---------------------------------------------------------------- the optimisation step


def train_steps(model, optimizer, loss_at, lr_at, steps, step=0, clip=1.0):
    """
    Train from `step` to `steps`. Yields (step, loss) with step updates done and the loss of the last one (None at
    first): steps 0..N inclusive, so that the untouched and the finished model pass through the same code of the caller.

    loss_at(step) -> loss tensor of batch `step`; lr_at(step) -> learning rate; clip: largest gradient norm.
    Raises Failed when the loss or its gradient is not finite, before the weights are touched, and when the weights are
    not, before anybody could save them.
    """
    loss = None
    while True:
        yield step, loss
        if step == steps:
            return
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        loss = loss_at(step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        loss = loss.item()
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise Failed(f"step {step}: loss {loss}, gradient norm {norm.item()}, lr {lr_at(step):.3g}: not finite")
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
            raise Failed(f"step {step}: the weights are not finite, lr {lr_at(step - 1):.3g}")


def adamw(model, lr):
    """AdamW as in all PCFG stages: betas .9 and .95, weight decay .1."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .95), weight_decay=.1,
                             fused=next(model.parameters()).device.type in ("cpu", "cuda"))


def optimizer_for(model, lr, sc):
    """AdamW for the grammar and stories; SGD with momentum .9 for compiled models (paper: Tracr setup)."""
    if sc.setup in ("pcfg", "stories"):
        return adamw(model, lr)
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=.9, foreach=True)


@torch.no_grad()
def add_noise(model, sd, seed):
    """
    Gaussian noise on every trainable weight (paper: Tracr setup): the very sparse compiled weights give gradient spikes
    otherwise, and zeros next to zeros never move.
    """
    g = data.rng(seed, "noise")
    for p in model.parameters():
        if p.requires_grad and sd:
            p += sd * torch.randn(p.shape, generator=g).to(p.device)


def cosine(lr, steps, final=0., warmup=.2):
    """Learning rate at a step: linear warm-up over the first 20 %, then a cosine down to lr x final (paper: both setups)."""
    rise = max(1, round(warmup * steps))

    def at(step):
        if step < rise:
            return lr * (step + 1) / rise
        return lr * (final + (1 - final) * .5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))
    return at


def autocast(args, device):
    """--dtype for a forward pass."""
    if args.dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- evaluation


def eval_steps(steps, every):
    """The steps at which to evaluate: every `every`, or 0 1 2 3 5 8 10 20 30 50 80 100 ... (the axes are logarithmic)."""
    if every:
        return set(range(0, steps, every)) | {steps}
    dense = {m * 10 ** e for m in (1, 2, 3, 5, 8) for e in range(len(str(steps)))}
    return {0, steps} | {s for s in dense if s < steps}


@torch.no_grad()
def predict(model, tokens, sc, batch=128):
    """Logits (n, v) of the answer position. Looks for a stop signal before every batch."""
    at, out = answer_position(sc), []
    for part in tokens.split(batch):
        check_stop()
        out.append(model(part, at).float())
    return torch.cat(out)


def accuracy(logits, target):
    """Share of rows (n, v) whose largest logit is the target (n,)."""
    return (logits.argmax(1) == target).sum().item() / len(target)


def score(logits, test, sc, seed):
    """The row of one test set: accuracy beside its floors, with its size and cross-entropy (nats)."""
    return {"setup": sc.setup, "scale": sc.name, "task": test.task,
            "operand": None if test.task in data.OPERANDLESS else test.operand, "split": test.split,
            "accuracy": accuracy(logits, test.target),
            "floor": test.floor(), "cross_floor": test.cross_floor(), "n": len(test.target),
            "loss": F.cross_entropy(logits, test.target).item(), "seed": seed}


def evaluate(model, tests, sc, seed):
    """One row a test set (see score). Costs one forward pass of the answer position a string."""
    return [score(predict(model, test.tokens, sc), test, sc, seed) for test in tests]


def test_set(*args, **more):
    """data.test_set(), after a look for a stop signal: large sets take a while."""
    check_stop()
    return data.test_set(*args, **more)


test_set.__test__ = False  # not a pytest function


def capability_tests(n, sc, task, pair, q, seed, device):
    """The sets of every history: both operands of the pair on c0, c1 and natural."""
    return [test_set(n, sc, task, operand, split, seed, pair, q, device=device)
            for operand in pair for split in SPLITS]


def other_tests(n, sc, operands, seed, device, but=None):
    """Natural sets of every family but one, for every operand given."""
    return [test_set(n, sc, task, operand, "natural", seed, device=device)
            for task in sc.tasks if task != but for operand in (operands if task not in data.OPERANDLESS else "a")]


# ---------------------------------------------------------------- stories: loss and generation


def text_loss(model, tokens):
    """
    Mean cross-entropy (nats) of every next token of rows (see data.story_rows) up to the END that closes them. Columns
    that are padding in all rows cost nothing.
    """
    last = (tokens != 0).int().mul(torch.arange(tokens.shape[1], device=tokens.device)).amax(1)  # (n,) last token but END
    tokens = tokens[:, :int(last.max()) + 2]
    logits, target = model(tokens[:, :-1]), tokens[:, 1:]
    real = torch.arange(target.shape[1], device=tokens.device) <= last[:, None]
    return F.cross_entropy(logits[real].float(), target[real])


def story_tests(source, sc, feature, n, seed, device, change=None):
    """
    {split: (tokens, start, stop)} of n held-out records: `with` and `without` the feature, and, where change(records, g)
    makes the data of a deletion from the latter, `deletion`.
    """
    tests = {}
    for split, has in (("with", True), ("without", False), ("deletion", False)):
        if split == "deletion" and not change:
            continue
        check_stop()
        g = data.rng(seed, "test", "stories", feature, has)
        records = source.draw(n, g, feature, has, held_out=True)
        records = change(records, g) if split == "deletion" else records
        tests[split] = data.story_rows(records, source.tokenizer, sc.n_ctx, device=device)
    return tests


@torch.no_grad()
def story_losses(model, tests, sc, feature, seed, batch=64):
    """One row a set: mean cross-entropy (nats) of the tokens of the stories, their instructions given."""
    rows = []
    for split, (tokens, start, stop) in tests.items():
        total = count = 0
        for part, first, end in zip(tokens.split(batch), start.split(batch), stop.split(batch)):
            check_stop()
            at = torch.arange(1, part.shape[1], device=part.device)
            story = (at >= first[:, None]) & (at < end[:, None])
            total += F.cross_entropy(model(part[:, :-1])[story].float(), part[:, 1:][story], reduction="sum").item()
            count += int(story.sum())
        rows.append(story_row(sc, feature, split, seed, n=len(tokens), loss=total / count))
    return rows


def story_row(sc, feature, split, seed, **more):
    """A row about stories: the keys that every row has, null where there is none."""
    empty = dict.fromkeys(("accuracy", "floor", "cross_floor", "n", "loss"))
    return {"setup": "stories", "scale": sc.name, "task": "story", "operand": feature, "split": split, **empty,
            "seed": seed, **more}


def story_prompts(source, feature, asked, n, seed):
    """n instructions of held-out records that ask for the feature, or do not, up to the story's first letter."""
    records = source.draw(n, data.rng(seed, "generate", feature, asked), feature, asked, held_out=True)
    return [ids[:start] for ids, start, _ in (data.story_ids(r, source.tokenizer) for r in records)]


def generation_scores(model, source, sc, feature, n, seed):
    """
    The generation score (paper: TinyStories setup): of n stories written to instructions that ask for a feature (split
    asked), and of n to others (unasked), the share that has it: `accuracy` of those that parse, `parsed` the share that
    does. Two rows. Sampled at temperature 1.
    """
    splits = {"asked": True, "unasked": False}
    prompts = [ids for asked in splits.values() for ids in story_prompts(source, feature, asked, n, seed)]
    g, found = data.rng(seed, "generate", feature, "sample", device=model.tok.weight.device), []
    for i in range(0, len(prompts), 512):
        written = generate(model, prompts[i:i + 512], sc.n_ctx, g)
        found += source.judge([data.story_of(source.tokenizer.decode(ids)) for ids in written])
    rows = []
    for split in splits:
        got, found = found[:n], found[n:]
        read = [mask for mask in got if mask is not None]
        has = sum(mask >> data.FEATURES.index(feature) & 1 for mask in read)
        rows.append(story_row(sc, feature, split, seed, n=n, parsed=len(read) / n, accuracy=has / len(read) if read else None))
    return rows


def story_table(rows):
    """Print the rows of an evaluation of stories: losses, and generation scores with 95 % intervals."""
    for r in rows:
        if r["loss"] is not None:
            print(f"loss on stories of split {r['split']:<9} ({r['operand']})  {r['loss']:.3f} nats a token, n {r['n']}")
    scored = {(r["operand"], r["split"]): r for r in rows if r.get("parsed") is not None}
    for feature in dict.fromkeys(k[0] for k in scored):
        print(f"{feature:<14}" + "".join(
            f"  {split} {interval(r['accuracy'], r['parsed'] * r['n'])} of {r['n']}, {r['parsed']:.1%} parse"
            for split in ("asked", "unasked") if (r := scored.get((feature, split)))))


def interval(share, n):
    """A share with its 95 % interval (Wilson), for people."""
    if share is None or not n:
        return "-"
    z, n = 1.96, round(n)
    middle, half = (share + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * (share * (1 - share) / n + z * z / 4 / n / n) ** .5
    return f"{share:6.1%} [{max(0, middle - half):.1%}, {min(1, middle + half):.1%}]"


def prepare(path):
    """data.prepare(), with the house's errors. Returns what tells a source from another: name, records, hash."""
    try:
        return data.prepare(path, check_stop=check_stop)
    except ValueError as error:
        raise UserError(f"--data {error}") from None


# ---------------------------------------------------------------- the stage


def setup_flags(args):
    """Refuse flags that are another setup's, and leave them out of the run's arguments. Raises UserError."""
    compiled, stories = args.setup in data.COMPILED, args.setup == "stories"
    given = [k for k in ("prior", "lr", "steps") if getattr(args, k) is not None] + ["compile"] * args.compile
    if compiled and given:
        raise UserError(f"--{given[0]}: a compiled model is not trained")
    given = [k for k in ("params", "rank", "sharpness", "logit_scale") if getattr(args, k) is not None]
    given += ["balance"] * (not args.balance)
    if given and not compiled:
        raise UserError(f"--{given[0].replace('_', '-')} is for compiled models: --setup {', '.join(data.COMPILED)}")
    given = [k for k in ("without", "data") if getattr(args, k) is not None]
    if given and not stories:
        raise UserError(f"--{given[0]} is for --setup stories")
    if stories and args.prior is not None:
        raise UserError("--prior is for --setup pcfg")
    if args.eval_size is None:
        args.eval_size = 200 if stories else 500
    for name in () if compiled else ("params", "rank", "sharpness", "logit_scale", "balance"):
        delattr(args, name)
    for name in ("prior",) if stories else ("without", "data"):
        delattr(args, name)



def compile_main(args, device):
    """--setup tracr-...: write a compiled or imported model as an ordinary, finished checkpoint of 0 steps."""
    setup = data.COMPILED[args.setup]
    if args.rank is not None and args.setup != "tracr-max":
        raise UserError(f"--rank is for --setup tracr-max, not {args.setup}")
    operand = str(args.rank) if args.rank is not None else (setup.operands or setup.alphabet)[0]
    if args.params:
        if args.sharpness is not None or args.rank is not None:
            raise UserError("--params brings its own program: leave out --sharpness and --rank")
        model, args.program = import_tracr(args.params)
        args.program["sha256"] = sha256(args.params)
        sc = data.scale_of(args.scale, args.setup, args.program)
        if len(sc.alphabet) < (3 if sc.repeat else sc.length) or \
                sc.length < max(map(int, setup.operands or [data.COMPILED_AT])):
            raise UserError(f"--params {args.params}: too few for {args.setup}: {len(sc.alphabet)} letters, {sc.room} positions")
        named = sc.alphabet if setup.answers is data.largest else [str(i) for i in range(sc.length + 1)]
        if sc.values[:len(named)] != named:
            raise UserError(f"--params {args.params}: {args.setup} needs the outputs {named[0]} to {named[-1]}")
    else:
        args.program = None
        sc = data.scale_of(args.scale, args.setup)
        if operand not in sc.operands:
            raise UserError(f"--rank {operand}: strings have {sc.length} letters, so 1 to {sc.length}")
        need = sc.length * (sc.length + 1)  # see SHARPNESS
        args.sharpness = max(300., (sc.length + 1) * (sc.length + 2)) if args.sharpness is None else args.sharpness
        if not need < args.sharpness <= 1e6:  # float32 has no more digits
            raise UserError(f"--sharpness {args.sharpness:g}: {sc.length} letters need more than {need}, at most 1e6")
        model = assemble(PROGRAMS[args.setup](operand), sc.alphabet, sc.room, args.sharpness)
    if args.balance:
        balance(model)
    with torch.no_grad():
        model.head.weight *= args.logit_scale / LOGIT_SCALE
    run = Run(args, "pretrain")
    if run.done:
        return
    pair = [operand, next(o for o in sc.order if o != operand)]
    try:
        tests = capability_tests(args.eval_size, sc, setup.task, pair, data.default_q(sc, pair), args.seed, device)
    except ValueError as error:  # hardly ever with our own sizes: few letters of an imported model
        raise UserError(f"--params {args.params}: {error}") from None

    def save_now(finished=False):
        save(args.out, {"model": model.state_dict(), "optimizer": {}, "config": vars(model.config), "args": run.args,
                        "setup": args.setup, "scale": args.scale, "stage": "pretrain", "step": 0, "steps": 0,
                        "finished": finished, "parent": None, "capability": {"task": setup.task, "operand": operand}})

    run.start(device, save_now)
    rows = evaluate(model.to(device), tests, sc, args.seed)
    run.log([dict(row, step=0) for row in rows])
    save_now(finished=True)
    run.finish()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    nonzero = sum(int((p != 0).sum()) for p in model.parameters() if p.requires_grad)
    print(f"{args.setup}: {model.config.n_layer} blocks, d {model.config.d_model}, {parameters} weights, {nonzero} not zero")
    for r in rows:
        print(f"  {r['task']} {r['operand']:<3} {r['split']:<8} {r['accuracy']:7.1%}   floor {r['floor']:6.1%}   n {r['n']}")
    if rows[2]["accuracy"] < .9:
        print(f"  note: this model does not answer {setup.task} {operand}: it has another capability, or none")
    print(f"wrote {args.out}")


def pcfg_arguments(args):
    """Resolve and check the arguments of --setup pcfg. Returns the scale."""
    sc, args.prior = data.scale_of(args.scale), args.prior or "low"
    args.batch_size = 96 if args.batch_size is None else args.batch_size
    try:
        args.prior = list(data.parse_prior(args.prior))
    except ValueError as error:
        raise UserError(f"--{error}") from None
    return sc


def pcfg_job(args, sc, device):
    """
    What main() trains on the grammar: config, capability, loss(forward) -> loss_at for train_steps, evaluate(model,
    step) -> rows, shown(rows) -> what the progress bar says, report(rows) at the end.
    """
    operand = LETTERS[max(range(3), key=lambda i: args.prior[i])]
    pair = (operand, "b" if operand == "a" else "a")  # the capability, and what will be taught later
    batch = data.stream(lambda n, g: data.pretraining_batch(n, sc, args.prior, g), args.batch_size, args.seed,
                        "pretrain", device)
    at = answer_position(sc)
    tests = capability_tests(args.eval_size, sc, "count", pair, 1, args.seed, device)
    tests += other_tests(args.eval_size, sc, operand, args.seed, device, but="count")

    def loss(forward):
        def loss_at(step):
            tokens = batch(step)
            with autocast(args, device):
                logits = forward(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            if sc.answer_weight:  # ours: see SCALES
                loss = loss + sc.answer_weight * F.cross_entropy(logits[:, at].float(), tokens[:, at + 1])
            return loss
        return loss_at

    def evaluated(model, step):
        rows = evaluate(model, tests, sc, args.seed)
        if step in (0, args.steps):  # the rest: index on c0 and c1, and operands that are hardly or never trained
            rest = [test_set(args.eval_size, sc, task, o, split, args.seed, pair, device=device)
                    for task in TASKS for o in LETTERS for split in SPLITS
                    if (task in FINETUNED or split == "natural") and (task not in data.OPERANDLESS)]
            done = {(r["task"], r["operand"], r["split"]) for r in rows}
            rest = [t for t in rest if (t.task, t.operand, t.split) not in done]
            rows += evaluate(model, rest, sc, args.seed)
        return rows

    def shown(rows):
        row = next(r for r in rows if r["operand"] == operand and r["split"] == "natural")
        return {f"count_{operand}": f"{row['accuracy']:.1%}"}

    def report(rows):
        print(f"{'task':<18} {'operand':<8} {'split':<8} accuracy   floor   n")
        for r in sorted(rows, key=lambda r: (list(TASKS).index(r["task"]), r["operand"] or "", r["split"])):
            trained = "" if r["operand"] is None or args.prior[LETTERS.index(r["operand"])] else "   never trained"
            print(f"{r['task']:<18} {r['operand'] or '-':<8} {r['split']:<8} "
                  f"{r['accuracy']:8.1%} {r['floor']:7.1%}   {r['n']}{trained}")

    config = Config(vocab_size=len(data.vocabulary(sc)), n_ctx=sc.length + 9, n_layer=sc.n_layer, n_head=sc.n_head,
                    d_model=sc.d_model, d_head=sc.d_model // sc.n_head, d_mlp=4 * sc.d_model)
    return SimpleNamespace(config=config, capability={"task": "count", "operand": operand}, warmup=.2, loss=loss,
                           evaluate=evaluated, shown=shown, report=report)


def story_arguments(args):
    """Resolve and check the arguments of --setup stories; prepares the file of --data. Returns the scale."""
    sc = data.scale_of(args.scale, "stories")
    args.batch_size = sc.batch_size if args.batch_size is None else args.batch_size
    args.feature = args.without or "Twist"
    if args.data:
        args.source = prepare(args.data)
    return sc


def story_job(args, sc, device):
    """What main() trains on stories, as pcfg_job(): all records, or those --without a feature."""
    source = data.story_source(args.data)

    def draw(n, g):
        return source.draw(n, g, args.without, False if args.without else None)
    batch = data.story_stream(draw, source.tokenizer, sc, args.batch_size, args.seed, "pretrain", device)
    tests = story_tests(source, sc, args.feature, args.eval_size, args.seed, device)

    def loss(forward):
        def loss_at(step):
            with autocast(args, device):
                return text_loss(forward, batch(step))
        return loss_at

    def evaluated(model, step):
        rows = story_losses(model, tests, sc, args.feature, args.seed)
        if step == args.steps and source.rule:
            rows += [row for feature in data.FEATURES
                     for row in generation_scores(model, source, sc, feature, args.eval_size, args.seed)]
        return rows

    config = Config(vocab_size=source.tokenizer.size, n_ctx=sc.n_ctx, n_layer=sc.n_layer, n_head=sc.n_head,
                    d_model=sc.d_model, d_head=sc.d_model // sc.n_head, d_mlp=4 * sc.d_model, rotary=True, tied=True,
                    words=tuple(source.tokenizer.words))
    return SimpleNamespace(config=config, capability={"task": "story", "operand": args.feature}, warmup=.02, loss=loss,
                           evaluate=evaluated, shown=lambda rows: {r["split"]: f"{r['loss']:.3f}" for r in rows[:2]},
                           report=story_table)


def main():
    parser = run_parser(__doc__)
    group = parser.add_argument_group("model and data")
    group.add_argument("--setup", default="pcfg", choices=data.SETUPS, help="where the capability comes from: strings of "
                       "a grammar, a compiled RASP program, or stories (default: pcfg)")
    group.add_argument("--scale", default="small", choices=["small", "paper"], help="small: minutes on two CPU cores; "
                       "paper: the paper's sizes, for a GPU (default: small)")
    group.add_argument("--prior",
                       help="pcfg: P_T(a, b, c): " + ", ".join(data.PRIORS) + ", or A,B,C (default: low)")
    group = parser.add_argument_group("stories")
    group.add_argument("--without", choices=data.FEATURES, help="leave out all stories with this feature: the control that "
                       "never had it (default: none is left out)")
    group.add_argument("--data", help="TinyStories-Instruct-train.txt; it is prepared once, into FILE.unwrap/ (default: the "
                       "embedded corpus)")
    group = parser.add_argument_group("compiled models")
    group.add_argument("--params", help="tracr-...: import this .npz of the Tracr library's parameters; see the README")
    group.add_argument("--rank", type=int, help="tracr-max: which largest letter, 1 is the largest (default: 5)")
    group.add_argument("--sharpness", type=float, help="slope of the steps that turn a width into a number (default: "
                       "(letters + 1) x (letters + 2), where every count is right, at least 300)")
    group.add_argument("--logit-scale", type=float, help="ours: factor on the outputs, which are 0 or 1; with 1 cross-entropy "
                       "never gets small, but learns at the paper's pace (default: 10)")
    group.add_argument("--balance", action=argparse.BooleanOptionalAction, default=True,
                       help="ours: rescale hidden units, without changing any output, so that noise does less harm")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, help="peak learning rate (default: 2e-3 small, stories 8e-3; 1e-3 paper)")
    group.add_argument("--steps", type=int, help="updates (default: 2500 small, stories 4000; 50000 paper, stories 30000)")
    group.add_argument("--batch-size", type=int, help="sequences a step (default: 96; stories 16 small, 512 paper)")
    group.add_argument("--clip", type=float, default=1., help="largest gradient norm (default: 1)")
    add_run_flags(parser, "out/pre.pt", "25 times a run")
    add_common_flags(parser)
    args = parser.parse_args()
    args.out = args.out or "out/pre.pt"
    setup_flags(args)
    if args.setup in data.COMPILED:
        args.steps, args.batch_size = 0, args.batch_size or 96
        args.logit_scale = LOGIT_SCALE if args.logit_scale is None else args.logit_scale
        positive(args, "rank", "sharpness", "logit_scale", "eval_size")
        positive(args, "seed", least=-1)
        return compile_main(args, start_device(args))
    positive(args, "lr", "steps", "batch_size", "clip", "save_every", "eval_size")
    positive(args, "eval_every", "seed", least=-1)
    sc = story_arguments(args) if args.setup == "stories" else pcfg_arguments(args)
    args.lr = sc.pretrain_lr if args.lr is None else args.lr
    args.steps = sc.pretrain_steps if args.steps is None else args.steps
    device = start_device(args)
    run = Run(args, "pretrain")
    if run.done:
        return
    print("pretrain:", ", ".join(f"{k} {v}" for k, v in vars(args).items()))

    try:
        job = (story_job if args.setup == "stories" else pcfg_job)(args, sc, device)
    except ValueError as error:  # --data with too few stories of a kind
        raise UserError(f"--data {args.data}: {error}") from None
    model = build(run.ckpt, device) if run.ckpt else GPT(job.config).init_weights(data.rng(args.seed, "weights")).to(device)
    optimizer = adamw(model, args.lr)
    if run.ckpt:
        restore(optimizer, run.ckpt)
    loss_at = job.loss(torch.compile(model) if args.compile else model)

    def save_at(step, finished=False):
        save(args.out, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": vars(job.config),
                        "args": run.args, "setup": args.setup, "scale": args.scale, "stage": "pretrain", "step": step,
                        "steps": args.steps, "finished": finished, "parent": None, "capability": job.capability})

    step = run.ckpt["step"] if run.ckpt else 0
    run.start(device, lambda: save_at(0))
    evals = eval_steps(args.steps, args.eval_every or max(1, args.steps // 25))
    rate_at = cosine(args.lr, args.steps, warmup=job.warmup)
    bar = tqdm(total=args.steps, initial=step, desc="pretrain", unit="step", mininterval=.5)
    try:
        for step, loss in train_steps(model, optimizer, loss_at, rate_at, args.steps, step, args.clip):
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
