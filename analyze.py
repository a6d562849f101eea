"""
Look inside a fine-tuned checkpoint: is the old capability deleted, or only wrapped?

    $ python analyze.py                                     # all of out/ft.pt, then the verdict
    $ python analyze.py prune probe --ckpt out/ft.pt        # some analyses
    $ python analyze.py ask --ckpt out/ft.pt --text abcab... --operand b
    $ python analyze.py generate --ckpt out/stories-ft.pt --features Twist,Dialogue

For out/ft.pt, rows go to out/ft.behavior.jsonl, out/ft.prune.jsonl, ... and the verdict to
out/ft.verdict.json. Each analysis has its control, run in the same way: an operand (or a model,
--control) that never had the capability, matched random rows, an untrained model, shuffled labels,
majority and cross floors. To add one, write a function of a Study under @analysis.

a stands for O_PT, the pretraining operand (of stories the feature in question), and b for O_FT, the
fine-tuning operand, whatever letters they are.
"""
import bisect
import collections
import copy
import glob
import itertools
import os
import textwrap
from argparse import Namespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import (SPLITS, Answers, UserError, check_stop, find_files, is_ours, read_rows,
                  replace_file, run_script, sha256, user_path, write_json, write_rows)
from finetune import finetune_rate
from model import GPT, Config, activations, generate, load, loss_of, weight_edits
from pretrain import (MACHINE, Flag, accuracy, add_noise, answer_row, check_above, constant,
                      eval_steps, evaluate, floors, optimizer_for, parse, percent, predict, show,
                      start_device, table, train_steps, update_of)

# ---------------------------------------------------------------- the study

ANALYSES = {}  # name: Analysis, in the order in which they run


class Analysis(NamedTuple):
    run: Callable       # a function of a Study that writes rows and returns them
    needs_base: bool    # only for fine-tuned checkpoints
    applies: Callable   # setup -> bool


def has_answers(setup):
    """Whether a setup asks questions, so that answers follow rules and operands can be taught."""
    return isinstance(setup, Answers)


def analysis(needs_base=False, applies=lambda setup: True):
    """Register a function under its name; flags, help and refusals follow."""
    def register(function):
        ANALYSES[function.__name__] = Analysis(function, needs_base, applies)
        return function
    return register


def find_parent(path, parent):
    """The file that `path` was made from: as recorded or beside it, verified by sha256."""
    files = list(filter(os.path.isfile, find_files(parent["path"], path)))
    for file in files:
        if sha256(file) == parent["sha256"]:
            return file
    why = "has changed since" if files else "is not there any more:"
    raise UserError(f"{parent['path']} {why} {path} was made from it; give it as --base")


class Study:
    """A checkpoint, what it came from, its control and its test sets."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.model, self.ckpt = load(args.ckpt, device)
        self.setup = data.setup_of(self.ckpt, device)
        self.answers, self.prefix = has_answers(self.setup), args.ckpt.removesuffix(".pt")
        trained = self.ckpt["args"]
        self.seed = trained["seed"] if args.seed is None else args.seed
        # the run's own arguments, for the setup's test sets
        self.run = Namespace(**{**trained, "eval_size": args.eval_size, "seed": self.seed})
        self.run.batch_size = args.batch_size or trained.get("batch_size")
        self.run.data, self.run.ckpt = args.data, args.ckpt
        self.setup.find_data(self.run, trained)
        self.setup.open(self.run, self.ckpt["config"]["words"])
        self.relation = self.setup.relation(self.run)
        if self.ckpt["stage"] == "pretrain":  # what it has, even where its arguments do not say so
            self.relation = self.relation._replace(pt=self.ckpt["capability"]["operand"])
        self.models, self.base, self.base_ckpt, self.start = {}, *self.find_base(), None
        if self.base:  # with the noise that was put on it: else "what has changed" were the noise
            self.models["base"], self.start = self.base, copy.deepcopy(self.base)
            add_noise(self.start, trained.get("noise", 0), trained["seed"])
        self.models["ckpt"] = self.model
        self.unit = args.unit or self.setup.unit  # of pruning; program: where it is known by weight
        self.program = self.base if self.setup.compiled and self.unit == "weight" else None
        self.control_operand = self.setup.control_operand(self.relation, trained)
        self.control_ckpt = None  # of --control
        self.never_trained, self.control_note = self.find_control()
        self.control = {"control": self.never_trained[0]} if args.control else {}
        # of whom its rows speak; and beside whom, where that is not its parent, or in itself
        base = self.base_ckpt["sha256"] if args.base else None
        usual = base and base == self.ckpt["parent"]["sha256"]
        self.about = {"checkpoint": self.ckpt["sha256"], "base_checkpoint": None if usual else base,
                      "control_checkpoint": self.control_ckpt and self.control_ckpt["sha256"]}

    def load(self, path, flag):
        """(model, checkpoint) of another file. Raises UserError unless its shape is the same."""
        model, ckpt = load(path, self.device)
        if ckpt["config"] != self.ckpt["config"]:
            raise UserError(f"{flag} {path}: another shape or vocabulary than {self.args.ckpt}")
        return model, ckpt

    def find_base(self):
        """
        (model, checkpoint) that fine-tuning began with: the parent; of stories the pretrained one,
        however often it was fine-tuned since. (None, None) of a pretraining.
        """
        model, ckpt, given = None, self.ckpt, self.args.base
        if given and not ckpt["parent"]:
            raise UserError(f"--base: {self.args.ckpt} was not fine-tuned from anything")
        while ckpt["parent"] and (model is None or not (self.answers or given)):
            path = given or find_parent(ckpt["path"], ckpt["parent"])
            model, ckpt = self.load(path, "--base")
        return model, model and ckpt

    def find_control(self):
        """
        ((model, its start or None, operand) or None, note): an operand that was trained in no
        family, in this very model where there is one, else in --control; a model without a feature.
        """
        operand, path, ckpt = self.control_operand, self.args.control, self.args.ckpt
        if operand and self.setup.never_trained(operand, self.ckpt):
            if path:
                raise UserError(f"--control is not needed: {ckpt} itself never had {operand}")
            return (self.model, self.start, operand), f"{operand}, never trained, in the same model"
        operand = operand or self.relation.pt
        if not path:
            return None, f"none: {operand} was trained; a checkpoint without it: --control"
        model, self.control_ckpt = self.stranger(path, "--control", operand)
        return (model, None, operand), f"{operand}, never trained, in {path}"

    def stranger(self, path, flag, operand):
        """load() of a file that was never trained on an operand. Raises UserError."""
        model, ckpt = self.load(path, flag)
        if not self.setup.never_trained(operand, ckpt):
            raise UserError(f"{flag} {path}: must never have been trained on {operand} (prior 0,"
                            " or --without)")
        return model, ckpt

    def untrained(self):
        """A model of the same shape with random weights."""
        model = GPT(Config(**self.ckpt["config"]))
        return model.init_weights(data.rng(self.seed, "untrained")).to(self.device)

    def test(self, operand, split, label="test", n=None):
        """A Test: `operand` asked on strings of its relation with b."""
        relation, n = self.relation.about(operand), n or self.args.eval_size
        return self.setup.test(relation, operand, split, n, self.seed, label)

    def labels(self, examples, operand):
        """The true answers (n,) for an operand, as numbers."""
        return examples.labels[:, self.setup.operands.index(operand)]

    def row(self, **values):
        """A row of this study that is about no test set."""
        return data.row(self.setup, **{"task": self.relation.task, "seed": self.seed, **values})

    def measure(self, model, test, **columns):
        """The row of a model on a test set, with further columns."""
        return {**answer_row(predict(model, test.examples), test), **columns}

    def write(self, name, rows):
        """Replace the file of an analysis, <checkpoint>.<name>.jsonl. Returns the rows."""
        about = {key: value for key, value in self.about.items() if value}
        write_rows(f"{self.prefix}.{name}.jsonl", [{**row, **about} for row in rows])
        return rows

    def read(self, name):
        """
        The rows that an analysis has written about this very checkpoint, base and control. Of a run
        that is older than such marks also those without.
        """
        older = "sha256" not in (data.read_record(f"{self.prefix}.json") or {"sha256": None})
        return read_rows(f"{self.prefix}.{name}.jsonl", older, **self.about)

    def check_files(self, names):
        """Raise UserError if the file of an analysis would replace one that is not ours."""
        for name, end in itertools.product(names, (".jsonl", ".*.jsonl", ".npz", ".json")):
            for path in glob.glob(glob.escape(f"{self.prefix}.{name}") + end):
                run = os.path.exists(f"{self.prefix}.{name}.pt")  # of that very name
                if run or not is_ours(path):
                    raise UserError(f"{path} is in the way: no analysis wrote it; move it")

    def write_maps(self, name, maps, tokens):
        """Replace <checkpoint>.<name>.npz: arrays, with the tokens that they are about."""
        maps = {**maps, "tokens": tokens.cpu().numpy(),
                "vocabulary": np.array(self.setup.vocabulary),
                "checkpoint": np.array([self.ckpt["sha256"]])}
        replace_file(f"{self.prefix}.{name}.npz", lambda f: np.savez_compressed(f, **maps))


def pivot(rows, keys, column, value):
    """Print a line for each combination of `keys`, a column for each column(row), and values."""
    lines, columns = {}, dict.fromkeys(map(column, rows))
    for r in rows:
        values = [r[k] for k in keys]
        line = tuple("-" if v is None else f"{v:.2g}" if isinstance(v, float) else v
                     for v in values)
        lines.setdefault(line, collections.defaultdict(list))[column(r)].append(r)
    body = []
    for line, cells in lines.items():
        body.append([*line, *(value(cells[c]) if c in cells else "" for c in columns)])
    table([*keys, *columns], body)


# ---------------------------------------------------------------- behavior


def rule_shares(answer, a, b, q):
    """
    Share of answers (n,) that each rule would give, from the right ones a and b (n,): a, b, a + q
    (the shortcut), the blend (a + b + q) / 2 rounded down (right whenever the relation holds), and
    the most frequent answer itself. They may overlap; none: no rule explains the answer.
    """
    rules = {"a": answer == a, "b": answer == b, "a_plus_q": answer == a + q,
             "blend": answer == (a + b + q) // 2, "constant": answer == answer.mode().values}
    rules["none"] = ~torch.stack(list(rules.values())).any(0)
    return {f"share_{k}": v.sum().item() / len(answer) for k, v in rules.items()}


def predicted(study, logits):
    """Which answers the model gives, and how often: {answer: count}."""
    counts = collections.Counter(logits.argmax(1).tolist()).most_common()
    return {study.setup.output_names[i].lstrip("#"): n for i, n in counts}


def rule_columns(study, model, test):
    """Rules and predicted answers, of a Test that is about a or b."""
    task, a, b, q = study.relation
    if test.row["task"] != task or not study.answers:
        return {}
    logits = predict(model, test.examples)
    answer = logits.argmax(1) - study.setup.first_answer(task)
    truths = (study.labels(test.examples, o) for o in (a, b))
    return {"predicted": predicted(study, logits), **rule_shares(answer, *truths, q)}


def distance_moved(study):
    """A row: how far fine-tuning moved the weights after its noise, in all and per block."""
    def square(x):
        return x.detach().cpu().double().square().sum().item()  # platform: mps has no float64
    parts = collections.defaultdict(float)
    for (name, new), old in zip(study.model.named_parameters(), study.start.parameters()):
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks") else "outside"
        parts[part] += square(new - old)
    lr_at = finetune_rate(study.run, study.setup)
    base_norm = sum(map(square, study.base.parameters())) ** .5
    return study.row(model="ckpt", distance=sum(parts.values()) ** .5, base_norm=base_norm,
                     distance_blocks={name: square ** .5 for name, square in parts.items()},
                     sum_of_rates=sum(map(lr_at, range(study.ckpt["step"]))))


@analysis()
def behavior(study):
    """
    What does the model answer or write, and by which rule? (paper Tables 5-8; stories: Table 1)

    Answers: accuracy for a and b on c0, c1 and natural strings, beside the base's; the share of
    answers that each simple rule explains; which answers are given; the other families (collateral
    damage); how far the weights moved. On c1 the rules a + q and b coincide: only c0 tells a
    wrapper from a learner. Stories: losses, and for each feature the share of stories that have
    it, by the corpus's rule (real text: by a classifier), asked for or not by held-out
    instructions. The five other features are the control: a deletion should leave them alone.
    Fooled by: a test set where ties or the relation occur by accident (natural ones do: hence c0);
    a majority class (hence the floors); damage that looks like a wrapper (hence the other
    families); stories that are broken rather than without a twist (hence the share that parses); a
    classifier's mistakes (`judge`: how often it is right); few generations (hence the intervals).
    """
    rows, right, models = [], classifier_of(study), dict(study.models)
    if not study.answers:
        models.update(study.control)
    subjects = list(itertools.product(models.items(), study.setup.tests(study.run)))
    for (name, model), test in tqdm(subjects, desc="behavior", leave=False, disable=None):
        columns = rule_columns(study, model, test)
        if test.how == "generation":
            columns["judge"] = right.get(test.row["operand"], 1.)
        rows += [{**r, "model": name, **columns} for r in evaluate(model, study.setup, [test])]
    print(f"\nbehavior   n = {study.args.eval_size}; share_: answers that a rule explains")
    shares = dict.fromkeys(k for k in itertools.chain(*rows) if k.startswith("share_"))
    show(rows, ("task", "operand", "split", "model", "accuracy", "floor", "cross_floor", "loss",
                *shares))
    if study.base and study.answers:
        rows.append(distance_moved(study))
        print(f"  the weights moved by {rows[-1]['distance']:.3f} (norm; the base's is "
              f"{rows[-1]['base_norm']:.1f}); sum of learning rates {rows[-1]['sum_of_rates']:.2g}")
    return study.write("behavior", rows)


# ---------------------------------------------------------------- prune

KS = (0, 1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 100)
FEW = 10         # the claim is about a few units: K is chosen among those up to this
MAX_UNITS = 10000  # never edit more at once
EXHAUSTIVE = 100   # single weights of a compiled model that are zeroed one by one
DRAWN = 200      # strings for a random draw: eight draws together get more than a ranking
MATRICES = ("attn.qkv", "attn.out", "up", "down")


def prunable(model, unit):
    """
    [(block, matrix)] that can be pruned, by rows with their bias or by single weights. A compiled
    program is written into biases and embeddings (block None) too.
    """
    blocks = range(len(model.blocks))
    if unit == "row":
        return list(itertools.product(blocks, MATRICES))
    if model.config.train_head:
        return [(i, f"{m}.weight") for i, m in itertools.product(blocks, MATRICES)]
    every = itertools.product(blocks, MATRICES, ("weight", "bias"))
    return [*((i, f"{m}.{kind}") for i, m, kind in every), (None, "tok.weight"),
            (None, "pos.weight")]


def parameter_names(block, matrix):
    """The parameters that units are of: of rows a weight and its bias, else one."""
    name = matrix if block is None else f"blocks.{block}.{matrix}"
    return [f"{name}.weight", f"{name}.bias"] if matrix in MATRICES else [name]


class Score(NamedTuple):
    """A first-order effect of editing a weight, and the edit that it is about."""
    effect: Callable  # gradient, weight, weight before fine-tuning -> effect
    edit: str         # zero or graft


SCORES = {
    "gradient-weight": Score(lambda g, w, old: g * w, "zero"),  # paper section 3
    "gradient-change": Score(lambda g, w, old: g * (w - old), "graft"),  # ours
}


def unit_scores(model, test, unit, score="gradient-weight", start=None):
    """
    {(block, matrix): (rows,) or (weights,)}: first-order effects of editing each unit on the
    cross-entropy of a test set, summed over a row. start: the model before fine-tuning.
    """
    x, start, scores = test.examples, start or model, {}
    model.zero_grad()
    for part in x.split(256):
        check_stop()
        loss = F.cross_entropy(model(part.tokens, x.at), part.answer, reduction="sum")
        (loss / len(x.tokens)).backward()
    for key in prunable(model, unit):
        effects = []
        for name in parameter_names(*key):
            p, old = model.get_parameter(name), start.get_parameter(name)
            effects.append(SCORES[score].effect(p.grad, p.detach(), old.detach()))
        scores[key] = effects[0].sum(1) + effects[1] if unit == "row" else effects[0].flatten()
    model.zero_grad()
    return scores


def only_zero(scores, program):
    """The scores of the weights that are zero in a compiled program; -inf for the others."""
    zeros = {}
    for key, x in scores.items():
        [name] = parameter_names(*key)
        zeros[key] = x.where(program.get_parameter(name).flatten() == 0, -torch.inf)
    return zeros


def ranked_units(scores, max_units):
    """The units with the largest positive scores: a list of (block, matrix, index, score)."""
    keys, flat = list(scores), torch.cat(list(scores.values()))
    starts = [0, *itertools.accumulate(map(len, scores.values()))]
    values, places = flat.topk(min(max_units, int((flat > 0).sum())))
    units = []
    for place, value in zip(places.tolist(), values.tolist()):
        i = bisect.bisect(starts, place) - 1
        units.append((*keys[i], place - starts[i], value))
    return units


def iterative(model, units, test, unit, score="gradient-weight"):
    """
    ours: FEW units, ranked anew after every zeroed one. One pass takes many units that do the same
    thing; after the first is gone, the others no longer score.
    """
    chosen = []
    for _ in range(FEW):
        with weight_edits(model, unit_edits(model, chosen)):
            ranked = ranked_units(unit_scores(model, test, unit, score), FEW + 1)
        taken = {u[:3] for u in chosen}
        chosen += [u for u in ranked if u[:3] not in taken][:1]
    return chosen


def exhaustive(model, units, test, unit, score=None):
    """
    ours: the first units by the accuracy with each alone zeroed: a linear score says little about a
    compiled weight of 100.
    """
    def alone(u):
        with weight_edits(model, unit_edits(model, [u])):
            return accuracy(predict(model, test.examples), test.examples.answer)
    return sorted(units[:EXHAUSTIVE], key=alone, reverse=True)


class Order(NamedTuple):
    """How units are put in order, from the ranking of one backward pass."""
    units: Callable       # model, ranked units, selection test, unit, score -> units
    max_k: int            # the largest K
    compiled: bool        # only for single weights of compiled models
    pools: tuple = ("all", "zero-in-program")


ORDERS = {"one-shot": Order(lambda model, units, *_: units, KS[-1], False),  # paper section 3
          "iterative": Order(iterative, FEW, False, ("all",)),
          "exhaustive": Order(exhaustive, FEW, True)}


def matched_units(units, scores, rng, program=None):
    """
    Random units, rank by rank from the same block and matrix as `units`: queries, keys and values
    apart, of a compiled program also its zeros.
    """
    written = only_zero(scores, program) if program else {}
    written = {key: (x == -torch.inf).tolist() for key, x in written.items()}

    def pool_of(block, matrix, index):
        part = matrix.startswith("attn.qkv") and index * 3 // len(scores[block, matrix])
        return block, matrix, part, bool(written) and written[block, matrix][index]
    pools, matched = collections.defaultdict(list), []
    for block, matrix in scores:
        for index in torch.randperm(len(scores[block, matrix]), generator=rng).tolist():
            pools[pool_of(block, matrix, index)].append(index)
    for block, matrix, index, _ in units:
        matched.append((block, matrix, pools[pool_of(block, matrix, index)].pop(), None))
    return matched


def unit_places(model, u):
    """[(parameter, index)] of a unit: of a row its weights and bias, else that of one weight."""
    block, matrix, index, _ = u
    names = parameter_names(block, matrix)
    if matrix in MATRICES:
        return [(name, index) for name in names]
    return [(name, np.unravel_index(index, model.get_parameter(name).shape)) for name in names]


def unit_edits(model, units, start=None):
    """The weight_edits() that zero units, or graft them: set them back to the start's values."""
    edits = []
    for name, at in itertools.chain(*(unit_places(model, u) for u in units)):
        edits.append((name, at, start.get_parameter(name)[at].detach() if start else 0.))
    return edits


def unit_name(model, u):
    """blocks.1.up[3], or blocks.1.up.weight[3, n_a:share], residual dimensions by their names."""
    name, at = unit_places(model, u)[0]
    if u[1] in MATRICES:
        return f"{name.removesuffix('.weight')}[{at}]"
    at, writes = list(at), u[1].startswith(("attn.out", "down"))
    residual = 0 if writes else None if name.endswith("bias") else 1  # its index in `at`
    if model.config.residual and residual is not None:
        at[residual] = model.config.residual[at[residual]]
    return f"{name}[{', '.join(map(str, at))}]"


class Sweep(NamedTuple):
    """What is pruned, one K after the other."""
    model: GPT
    start: GPT | None           # the model before fine-tuning, for grafts
    operand: str                # that is asked for
    control: str | None = None  # never-trained
    score: str | None = None    # a key of SCORES, or random
    order: str = "one-shot"
    pool: str = "all"           # or zero-in-program
    edit: str = "zero"          # or graft
    units: list = []
    ks: list = []
    draw: int | None = None


def prune_rows(study, sweep):
    """The rows of a sweep: accuracies at each K, and the K that does best on other strings."""
    a, b, drawn = study.relation.pt, study.relation.ft, sweep.draw is not None
    n = min(DRAWN, study.args.eval_size) if drawn else None
    asked = [(sweep.operand, "c0"), (b, "c1")]
    if not drawn:
        asked.append((sweep.operand, "natural"))
    if (sweep.score, sweep.pool, sweep.control) == ("gradient-weight", "all", None):
        asked += [(a, "c1"), (b, "c0"), (b, "natural")]
    tests, rows, tried = [study.test(*about, n=n) for about in asked], [], []
    columns = {k: getattr(sweep, k) for k in ("score", "order", "pool", "control", "edit", "draw")}
    start = sweep.start if sweep.edit == "graft" else None
    for k in (0, *(k for k in sweep.ks if k <= len(sweep.units))):
        with weight_edits(sweep.model, unit_edits(sweep.model, sweep.units[:k], start)):
            if k <= FEW:  # the fewest units that do best on the selection set
                select = study.test(sweep.operand, "c0", "select", n)
                tried.append((study.measure(sweep.model, select)["accuracy"], -k))
            for test in tests:
                logits = predict(sweep.model, test.examples)
                rows.append({**answer_row(logits, test), "unit": study.unit, **columns, "k": k})
                if study.setup.compiled and not drawn and test is tests[0]:
                    rows[-1]["predicted"] = predicted(study, logits)  # it still uses many classes
    return [dict(r, chosen=r["k"] == -max(tried)[1]) for r in rows]


def graft_ks(scores):
    """(Ks up to half of all units, four of them): a graft needs many units."""
    total = sum(map(len, scores.values()))
    ks = [*KS[1:], *(200 * 2 ** i for i in range(30) if 400 * 2 ** i <= total)]
    ks = [k for k in ks if k <= MAX_UNITS]
    return ks, [k for k in ks if k in (FEW, KS[-1], 400, ks[-1])]


def sweeps_of(study, blank):
    """The sweeps of a blank one: every score, order and pool that apply, and grafts."""
    model, unit, program, sweeps = blank.model, study.unit, study.program, []
    select = study.test(blank.operand, "c0", "select")
    for score, (_, edit) in SCORES.items():
        if edit == "graft" and blank.start is None:
            continue
        scores = unit_scores(model, select, unit, score, blank.start)
        (ks, four), about = graft_ks(scores), blank._replace(score=score)
        if edit == "graft":
            ks, units = four if blank.control else ks, ranked_units(scores, ks[-1])
            sweeps.append(about._replace(edit=edit, units=units, ks=ks))
            continue
        pools = {"all": scores}
        if program and not blank.control:
            pools["zero-in-program"] = only_zero(scores, program)
        for (pool, x), (name, order) in itertools.product(pools.items(), ORDERS.items()):
            if pool in order.pools and (program or not order.compiled):
                units = order.units(model, ranked_units(x, KS[-1]), select, unit, score)
                ks = [k for k in KS[1:] if k <= (order.max_k if pool == "all" else FEW)]
                sweeps.append(about._replace(order=name, pool=pool, units=units, ks=ks))
        if not blank.control:
            units = ranked_units(scores, KS[-1])
            sweeps.append(about._replace(edit="graft", units=units, ks=four))
    return sweeps


def random_sweeps(study, sweeps):
    """
    Matched random units: zeroed, for the iterative and then the one-shot ranking; grafted, for that
    by change; of compiled models also the best of as many as were tried one by one.
    """
    own = {(s.score, s.order, s.pool, s.edit): s for s in sweeps}
    once, again = (own["gradient-weight", x, "all", "zero"] for x in ("one-shot", "iterative"))
    taken = {u[:3] for u in again.units}
    units = [*again.units, *(u for u in once.units if u[:3] not in taken)]
    change, few = (own[x, "one-shot", "all", "graft"] for x in ("gradient-change",
                                                                "gradient-weight"))
    like = [once._replace(units=units[:len(once.units)]), change._replace(ks=few.ks)]
    for pool in ORDERS["exhaustive"].pools if study.program else ():
        ranked = own["gradient-weight", "one-shot", pool, "zero"].units
        like.append(own["gradient-weight", "exhaustive", pool, "zero"]._replace(units=ranked))
    select, draws = study.test(study.relation.pt, "c0", "select"), []
    scores = unit_scores(study.model, select, study.unit)
    for draw in range(study.args.draws):
        rng = data.rng(study.seed, "prune", draw)
        for s in like:
            units = matched_units(s.units, scores, rng, study.program)
            if s.order == "exhaustive":
                units = exhaustive(study.model, units, select, study.unit)
            draws.append(s._replace(score="random", units=units, draw=draw))
    return draws


@analysis(needs_base=True, applies=has_answers)
def prune(study):
    """
    Do a few units hold the wrapper? (paper Figs. 7 and 55-59)

    One backward pass of the cross-entropy of "count a" on the fine-tuned model; score = gradient x
    weight, summed over a row (a neuron) and its bias, or --unit weight; the K largest positive
    scores are edited at once: set to zero, or grafted, set back to the values before fine-tuning.
    ours: also ranked anew after every zeroed unit (iterative), and for grafts by their own
    first-order score, gradient x change. Scores and K (up to 10) come from one set of c0 strings,
    accuracies from another. Compiled models: single weights, all of them or those that are zero in
    the program; ours: the first 100 of a ranking, tried one by one (exhaustive).
    High accuracy on a after few edits: the answer was there, and these units kept it from being
    read. It does not say that the change sits in these units: a zeroed unit is a lever, only
    grafts undo what fine-tuning did.
    Fooled by: any damage that happens to shift answers by q (hence random units from the same
    matrices, --draws of them, with K chosen in the same way); a method that finds units for
    anything (hence the control never-trained: the same procedure for an operand that was never
    trained).
    """
    sweeps = sweeps_of(study, Sweep(study.model, study.start, study.relation.pt))
    rows, ranks = [], []
    for s in sweeps:
        for rank, u in enumerate(s.units[:KS[-1]] if s.edit == SCORES[s.score].edit else (), 1):
            ranks.append({"score": s.score, "order": s.order, "pool": s.pool, "rank": rank,
                          **dict(zip(("block", "matrix", "index", "value"), u)),
                          "name": unit_name(study.model, u)})
    study.write("prune.rows", ranks)
    sweeps += random_sweeps(study, sweeps)
    if study.never_trained:
        sweeps += sweeps_of(study, Sweep(*study.never_trained, "never-trained"))
    else:
        rows.append(study.row(unit=study.unit, score="gradient-weight", order="one-shot",
                              pool="all", control="never-trained", edit="zero", k=None, draw=None,
                              note=study.control_note))
    for sweep in tqdm(sweeps, desc="prune", leave=False, disable=None):
        rows += prune_rows(study, sweep)
    print(f"\nprune   {study.unit}s, ranked on one set of c0 strings, scored on others; *: K "
          f"chosen on the first; random: {study.args.draws} draws\n  control: {study.control_note}")
    shown = [r for r in rows if r["k"] in KS
             and r["split"] == ("c1" if r["operand"] == study.relation.ft else "c0")]
    pivot(shown, ("score", "order", "pool", "control", "edit", "operand", "split"),
          lambda r: r["k"], lambda cell: percent(np.mean([r["accuracy"] for r in cell]))
          + "*" * any(r["chosen"] for r in cell))
    return study.write("prune", rows)


# ---------------------------------------------------------------- probe


def fit_probes(x, site, y, steps, rng, batch_size=96):
    """
    Linear probes, all trained at once: probe p maps x[site[p]] to the classes y[p]; x (sites, n,
    d), y (probes, n). AdamW, lr 1e-3, divided by 10 at 1/2, 3/4 and 7/8 of the steps (paper: of
    4K, at 2K, 3K and 3.5K). Returns weight (probes, d, classes), bias (probes, 1, classes).
    """
    shape = len(y), x.shape[2], int(y.max()) + 1
    weight = torch.zeros(shape, device=x.device, requires_grad=True)
    bias = torch.zeros(shape[0], 1, shape[2], device=x.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-3)
    milestones = [steps // 2, steps * 3 // 4, steps * 7 // 8]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, .1)
    for _ in tqdm(range(steps), desc="probe", mininterval=.5, leave=False, disable=None):
        check_stop()
        pick = torch.randint(x.shape[1], (batch_size,), generator=rng).to(x.device)
        logits = torch.baddbmm(bias, x[:, pick][site], weight)
        loss = F.cross_entropy(logits.flatten(0, 1), y[:, pick].flatten(), reduction="sum")
        optimizer.zero_grad()
        # a sum over probes: each gets the gradient it would have alone; AdamW acts entry by entry
        (loss / batch_size).backward()
        optimizer.step()
        schedule.step()
    return weight.detach(), bias.detach()


def stacked(model, examples, names, pick, batch=128):
    """Named activations of all examples (n, names, ...); pick(activation, rows): what is kept."""
    parts = []
    for rows in torch.arange(len(examples.tokens)).split(batch):
        check_stop()
        cache = activations(model, examples.tokens[rows], names)[1]
        parts.append(torch.stack([pick(cache[name], rows) for name in names], 1))
    return torch.cat(parts)


def residuals(model, examples, site, batch=128):
    """
    Residual stream, summed with the weights `site` (n, t) of positions: (blocks + 1, n, d), 0 the
    embedding, i after block i.
    """
    names = ["embed", *(f"blocks.{i}.resid_post" for i in range(len(model.blocks)))]
    x = stacked(model, examples, names,
                lambda x, rows: torch.einsum("ntd,nt->nd", x, site[rows]), batch)
    return x.transpose(0, 1).contiguous()


def auc(score, label):
    """Area under the ROC curve: how often a positive's score (n,) is higher; ties count half."""
    low, high = score[label == 0].sort().values, score[label == 1]
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return below.sum().item() / (2 * len(low) * len(high))


class Probe(NamedTuple):
    """One linear probe: what its rows say of it, what it reads, what it should say."""
    columns: dict         # model, block, target, prompt, labels
    site: int             # place among the activations
    labels: torch.Tensor  # (n,) on training strings
    tests: dict           # {split: (activations (m, d), Examples)}


def probes_of(setup, s, name, model, shuffle):
    """(activations (blocks + 1, n, d) on the training examples, Probes) of a model and ProbeSet."""
    seen, tests, probes = residuals(model, s.train, setup.site(s.train)), {}, []
    # ours: standardised; an untrained model's residual is so small that 4K steps learn nothing
    mean, sd = seen.mean(1, keepdim=True), seen.std(1, keepdim=True) + 1e-8
    for split, x in s.tests.items():
        tests[split] = (residuals(model, x, setup.site(x)) - mean) / sd, x
    for block, (target, column) in itertools.product(range(len(seen)), s.targets.items()):
        at_block = {split: (x[block], examples) for split, (x, examples) in tests.items()}
        columns = dict(model=name, block=block, target=target, prompt=s.prompt)
        labels = s.train.labels[:, column]
        probes.append(Probe({**columns, "labels": "true"}, block, labels, at_block))
        if name == "ckpt" and target in s.shuffled:
            columns["labels"] = "shuffled"
            probes.append(Probe(columns, block, labels[shuffle], at_block))
    return (seen - mean) / sd, probes


def probe_row(study, split, logits, target, examples):
    """What a probe got right on a test set, beside its floors."""
    (_, a, b, _), truth, other = study.relation, study.labels(examples, target), None
    if study.answers:
        other = study.labels(examples, b if target != b else a)
    known = truth.max() < logits.shape[1]  # else a class is new, and no loss is defined
    row = study.row(operand=target, split=split, accuracy=accuracy(logits, truth),
                    **floors(truth, other),
                    loss=F.cross_entropy(logits, truth).item() if known else None)
    if not study.answers:
        right = (logits.argmax(1) == truth).float()
        recalls = [right[truth == k].mean().item() for k in (0, 1)]
        row.update(balanced=sum(recalls) / 2, auc=auc(logits[:, 1] - logits[:, 0], truth))
    return row


@analysis()
def probe(study):
    """
    Can the answer for a, or a story's feature, still be read off the residual stream? (paper Figs.
    8 and 31-38)

    A linear probe after every block (0: the embedding). Answers: at the position that gives the
    answer, trained on half natural, half c0 strings and tested on new ones; targets a, b, c, asked
    for the target itself and for b, for the question is whether r(a) is there while b is asked.
    Stories: on the mean of the last ten tokens of held-out stories, read without their
    instruction, between two bounds: the pretrained model above, a model pretrained without the
    feature (--control) below. See probe_sets() and site() of the setup.
    High: the information is linearly there. Low at every block: not linearly there at this
    position.
    Fooled by: targets that follow from others (c1 strings are left out; a + b + c = window, so c
    can be read wherever a and b can); a probe strong enough to learn the task itself (hence the
    untrained model); leaks between strings (shuffled labels must fall to the floor); words that
    tell a feature (hence the lower bound and the split `even`); a majority of three in four
    (balanced accuracy, AUC).
    """
    rng, probes, x, rows = data.rng(study.seed, "probe"), [], [], []
    models = {**study.models, "untrained": study.untrained(), **study.control}
    about = study.relation, study.control_operand, study.args.eval_size, study.seed
    for s in study.setup.probe_sets(*about, rng):
        shuffle = torch.randperm(len(s.train.labels), generator=rng) if s.shuffled else None
        for name, model in models.items():
            seen, more = probes_of(study.setup, s, name, model, shuffle)
            probes += [p._replace(site=p.site + len(x)) for p in more]
            x += list(seen)
    labels = torch.stack([p.labels for p in probes])
    weight, bias = fit_probes(torch.stack(x), [p.site for p in probes], labels,
                              study.args.steps or 4000, rng)
    for p, w, c in zip(probes, weight, bias):
        for split, (unseen, examples) in p.tests.items():
            measured = probe_row(study, split, unseen @ w + c, p.columns["target"], examples)
            rows.append({**measured, **p.columns})
    print(f"\nprobe   linear, after each block; {len(labels[0])} training examples")
    value = "accuracy" if study.answers else "auc"
    pivot([r for r in rows if r["split"] != "c0"], ("target", "prompt", "split", "model", "labels"),
          lambda r: f"{value} B{r['block']}", lambda cell: percent(cell[0][value]))
    return study.write("probe", rows)


def pooled(model, setup, records):
    """Mean activations (n, 2 d) of whole stories, of the middle and the last block; labels."""
    examples = setup.examples(records, [False] * len(records))
    x = residuals(model, examples, setup.site(examples, width=setup.n_ctx))
    return x[[len(x) // 2, -1]].transpose(0, 1).flatten(1), examples.labels


def labelled(model, setup, n, held_out, rng):
    """pooled() records (features, n, 2 d), half with each feature, and whether (features, n)."""
    x, y = [], []
    for i, feature in enumerate(data.FEATURES):
        records = []
        for has in (True, False):
            records += setup.source.draw(n // 2, rng, feature, has, held_out)
        seen, labels = pooled(model, setup, records)
        x.append(seen)
        y.append(labels[:, i])
    return torch.stack(x), torch.stack(y)


def classifier_of(study):
    """
    {feature: share of held-out records that the classifier gets right}; {} where a rule tells.
    Real text has no rule: a logistic regression a feature is fitted on the pretrained model, in
    the same way for every checkpoint that comes from it (the paper's judge: 92 %).
    Fooled by: texts unlike the corpus (a refusal gets features too); labels that are wrong.
    """
    setup, source = study.setup, getattr(study.setup, "source", None)
    if source is None or source.rule:
        return {}
    model, n, rng = study.base or study.model, 8 * study.args.eval_size, data.rng(0, "judge")
    if study.args.judge:
        model, ckpt = load(study.args.judge, study.device)
        if ckpt["config"]["words"] != study.ckpt["config"]["words"]:
            raise UserError(f"--judge {study.args.judge}: other words than {study.args.ckpt}")
    x, y = labelled(model, setup, n, False, rng)
    unseen, truth = labelled(model, setup, max(2, n // 4), True, rng)
    mean, sd = x.mean((0, 1)), x.std((0, 1)) + 1e-8
    weight, bias = fit_probes((x - mean) / sd, list(range(len(x))), y, 3000, rng)

    def answers(x):
        return ((x - mean) / sd @ weight + bias).argmax(-1)  # (features, n)

    def classify(texts):
        records = []
        for text in texts:
            ids = np.array(setup.tokenizer.encode(text) or [0], np.uint16)
            records.append(data.Encoded(ids, 0, 0, len(ids), frozenset()))
        yes = answers(pooled(model, setup, records)[0]).T.tolist()
        return [frozenset(itertools.compress(data.FEATURES, line)) if text else None
                for text, line in zip(texts, yes)]
    source.classify = classify
    right = (answers(unseen) == truth).float().mean(1).tolist()
    right = dict(zip(data.FEATURES, right))
    print("judge of real text: right on held-out records "
          + ", ".join(f"{k} {percent(x)}" for k, x in right.items()))
    return right


# ---------------------------------------------------------------- attention, hidden

EXAMPLES = 4  # strings whose whole maps are kept


def telling(study, examples):
    """Places of the first strings whose answers for a and b differ and are not small."""
    a, b = (study.labels(examples, o) for o in (study.relation.pt, study.relation.ft))
    return ((a > 1) & (b > 1) & (a != b)).nonzero()[:EXAMPLES, 0]


def program_overlap(pattern, program, letters):
    """
    {region: (mass, chance)} of a head's pattern (n, query, key) beside the compiled program's; {}
    where that does not use the head. kept: the sum over keys of the smaller of the two, mean over
    letters. order: the probability that a letter which the program selects gets more attention
    than one that it does not (AUC).
    """
    uniform = torch.full_like(program, 1 / program.shape[-1])
    if (program - uniform).abs().max() < 1e-3:
        return {}
    kept = [torch.minimum(p, program)[:, letters].sum(-1).mean().item() for p in (pattern, uniform)]
    overlap, mass = {"kept": kept}, pattern[:, letters, letters]
    selected = program[:, letters, letters] > 1 / program.shape[-1]
    both = selected[..., :, None] & ~selected[..., None, :]  # (n, query, selected key, other key)
    if both.any():
        ahead = (mass[..., :, None] - mass[..., None, :]).sign()
        overlap["order"] = ((ahead[both] + 1) / 2).mean().item(), .5
    return overlap


@analysis(applies=has_answers)
def attention(study):
    """
    Where does the answer position look? (paper Figs. 10, 39-45)

    The attention pattern of the position that gives the answer, per block and head, on natural
    strings, asked for a and for b, base and fine-tuned side by side. mass: mean attention on a
    region (grammar: the window, the letters outside it, a, b and c within; programs: the letters
    that make each operand's answer, BOS, padding); chance: what uniform attention would give.
    Compiled models also: how much of the program's pattern is kept (see program_overlap). Maps of
    the first strings go to <checkpoint>.attention.npz, of compiled models whole ones.
    Fooled by: reading too much into it. A head may look without using, and letters travel between
    positions in earlier blocks, so that attention to a position is not attention to its letter.
    """
    setup, (_, a, b, _), rows, maps = study.setup, study.relation, [], {}
    names = [f"blocks.{i}.attn.pattern" for i in range(len(study.model.blocks))]
    for prompt in (a, b) if setup.prompted else (None,):
        x, patterns = study.test(prompt or a, "natural").examples, []
        regions = setup.regions(x, (a, b, study.control_operand))
        few, queries, at = telling(study, x), slice(None), x.at
        if prompt:
            few, queries, at = slice(8), slice(x.at, x.at + 1), 0
        for name, model in study.models.items():
            patterns.append(stacked(model, x, names, lambda p, _: p[:, :, queries]))
            pattern = patterns[-1]  # (n, block, head, query, key)
            maps[f"{name}_{prompt}" if prompt else name] = pattern[few].squeeze(3).cpu().numpy()
            for block, head in np.ndindex(*pattern.shape[1:3]):
                one_head, masses = pattern[:, block, head], {}
                for region, where in regions.items():
                    mass = (one_head[:, at] * where).sum(1).mean().item()
                    masses[region] = mass, where.float().mean().item()
                if setup.compiled:
                    program, letters = patterns[0][:, block, head], slice(1, setup.length + 1)
                    masses.update(program_overlap(one_head, program, letters))
                about = dict(operand=prompt or a, split="natural", n=len(x.tokens), model=name,
                             prompt=prompt, block=block, head=head)
                for region, (mass, chance) in masses.items():
                    rows.append(study.row(**about, region=region, mass=mass, chance=chance))
    study.write_maps("attention", maps, study.test(a, "natural").examples.tokens[few])
    print("\nattention   of the answer position: mass (chance)")
    pivot(rows, ("prompt", "model", "region"), lambda r: f"B{r['block']}H{r['head']}",
          lambda cell: f"{cell[0]['mass']:.2f} ({cell[0]['chance']:.2f})")
    return study.write("attention", rows)


@analysis(applies=lambda setup: setup.compiled)
def hidden(study):
    """
    What do the MLPs' hidden units do, token by token? (paper Figs. 46-47, 53-54) Compiled models
    only.

    Activations after the ReLU on the same few strings as attention, in <checkpoint>.hidden.npz,
    and as numbers per block: the cosine of all activations on natural strings with the compiled
    model's, and the share of units that are on (above .1, well above the noise). A cosine near 1:
    the mechanism is in place, whatever is made of it afterwards.
    Fooled by: units that are on for every string, which dominate the cosine; a small shift of a
    threshold, which a cosine does not show and which may change every answer.
    """
    a, rows, maps, seen = study.relation.pt, [], {}, []
    examples = study.test(a, "natural").examples
    names = [f"blocks.{i}.mlp_post" for i in range(len(study.model.blocks))]
    few = telling(study, examples)
    for name, model in study.models.items():
        seen.append(stacked(model, examples, names, lambda x, _: x))  # (n, block, position, unit)
        maps[name] = seen[-1][few].cpu().numpy()
        for i in range(len(names)):
            x, program, cosine = seen[-1][:, i], seen[0][:, i], None
            if program.any():
                cosine = F.cosine_similarity(x.flatten(), program.flatten(), 0).item()
            rows.append(study.row(operand=a, split="natural", n=len(x), model=name, block=i,
                                  cosine=cosine, active=(x > .1).float().mean().item()))
    study.write_maps("hidden", maps, examples.tokens[few])
    print("\nhidden   units of the MLPs: cosine with the compiled model's, share that is on")
    show(rows, ("model", "block", "cosine", "active"))
    return study.write("hidden", rows)


# ---------------------------------------------------------------- revive

THRESHOLDS = (.9, .99)
FASTER = 3     # reFT must be so many times as fast as its control, which goes on that much longer
REVIVED = 200  # strings in a test set, at most: they are asked every few steps


def steps_to(curve, threshold):
    """First step at which accuracy reaches the threshold, from [(step, accuracy)], or None."""
    return next((step for step, accuracy in curve if accuracy >= threshold), None)


class Arm(NamedTuple):
    """What was taught at which rate, and how it went."""
    arm: str
    lr: float
    operand: str
    curves: dict     # {split: [(step, accuracy)]}, on natural and c0 strings
    known: dict      # {split: size and floors of its test set}
    max_steps: int
    seed: int


def lesson(study, start, draw, lr, steps):
    """
    Yields (step, model): a copy of `start` that is fine-tuned on what draw(n, rng) gives, at a
    constant rate.
    """
    model, setup = copy.deepcopy(start), study.setup
    batch = data.stream(draw, study.run.batch_size, study.seed, "revive", setup.draws_on)
    update = update_of(model, optimizer_for(model, lr, setup), lambda x: loss_of(model, x))
    for step, _ in train_steps(update, batch, constant(lr), range(steps)):
        check_stop()
        yield step, model


def teach(study, name, start, operand, lr, max_steps):
    """The Arm of a lesson that ends when its accuracies are at the largest threshold."""
    n, curves, tests, known = min(REVIVED, study.args.eval_size), {}, {}, {}
    for split in ("natural", "c0"):
        test = study.test(operand, split, n=n)
        tests[split], curves[split] = test.examples, []
        known[split] = floors(test.examples.answer, test.other)
    draw = study.setup.teaching(study.relation, operand)
    for step, model in lesson(study, start, draw, lr, max_steps):
        if step % study.setup.teach_every == 0 or step == max_steps:
            for split, x in tests.items():
                curves[split].append((step, accuracy(predict(model, x), x.answer)))
            if all(curve[-1][1] >= THRESHOLDS[-1] for curve in curves.values()):
                break
    return Arm(name, lr, operand, curves, known, max_steps, study.seed)


def read_history(ckpt):
    """The history of a loaded checkpoint; [] where the record is of another one."""
    prefix = ckpt["path"].removesuffix(".pt")
    record = data.read_record(prefix + ".json") or {}
    same = record.get("sha256", ckpt["sha256"]) == ckpt["sha256"]  # older ones do not say
    return read_rows(prefix + ".jsonl") if same else []


def pretraining_arm(study):
    """Pretraining itself, from its history; no curves where it was only scored at its ends."""
    ckpt, (task, a, *_), curves, known = study.base_ckpt, study.relation, {}, {}
    history = read_history(ckpt)
    for split in ("natural", "c0"):
        rows = select(history, task=task, operand=a, split=split)
        if len(rows) > 3 and ckpt["stage"] == "pretrain":
            curves[split] = [(r["step"], r["accuracy"]) for r in rows]
            known[split] = {k: rows[-1][k] for k in ("n", "floor", "cross_floor")}
    args = ckpt["args"]
    return Arm("pretraining", args["lr"], a, curves, known, ckpt["steps"], args["seed"])


def starts(study):
    """{arm: (model, operand)}: what revive() teaches beside reFT, in the same way."""
    arms, a = {}, study.relation.pt
    if study.never_trained:
        model, start, c = study.never_trained
        arms[f"teach-{c}"] = model, c
        if start:
            arms[f"teach-{c}-base"] = start, c
    for path in map(os.path.expanduser, filter(None, (study.args.also or "").split(","))):
        if path == "scratch":
            arms[path] = study.untrained(), a
            continue
        model, ckpt = study.stranger(path, "--also", a)
        words = "from " + "/".join(f"{p:g}" for p in ckpt["args"].get("prior") or ())
        words += ", fine-tuned" * bool(ckpt["parent"])
        if study.setup.compiled or words in arms:
            raise UserError(f"--also {path}: a compiled model, or prior and stage of another one")
        arms[words] = model, a
    return arms


@analysis(needs_base=True, applies=has_answers)
def revive(study):
    """
    How fast does the capability come back, against models that never had it? (paper Fig. 9)

    Reverse fine-tuning (reFT) on a with c0 strings, at the fine-tuning's rate (ours: matched rates;
    compiled models: a third and a tenth of it) or --rates times it, constant after 20 steps.
    Controls, in the same way: teaching the never-trained operand to this very model (teach-c) and
    to its base (teach-c-base, with the noise that fine-tuning put on it); a to those of
    --also: an untrained model (scratch; the paper's Scr.), one that was pretrained on b alone (Scr.
    + FT), a good initialisation, which was pretrained and fine-tuned alike, but never met a. And
    pretraining itself, from its history. Steps to 90 % and 99 % on natural and on c0 strings. The
    controls go on three times as long as reFT needed at its first rate: what has not come by then
    is shown as >=.
    Few steps compared with teach-c: it was there. teach-c much faster than pretraining is how much
    any good initialisation helps, which a comparison with training from scratch would have called
    a revival.
    Fooled by: steps at different rates; an easy target (hence c0, where another operand helps up
    to the cross floor at most); the control's token, which was never an input: part of what
    teach-c has to learn is what O_c means.
    """
    factors, first = study.args.rates or study.setup.reft_rates, study.ckpt["args"]["lr"]
    rates = [first * factor for factor in factors]
    limit, rows, curve_rows = study.args.steps or study.setup.revive_steps, [], []
    others = starts(study)
    arms = [teach(study, "reft", study.model, study.relation.pt, lr, limit) for lr in rates]
    step, reached = arms[0].curves["natural"][-1]
    if reached >= THRESHOLDS[-1] and not study.args.steps:
        limit = max(30, FASTER * step)
    for lr, (name, about) in itertools.product(rates, others.items()):
        arms.append(teach(study, name, *about, lr, limit))
    arms.append(pretraining_arm(study))
    for arm in arms:
        about = {"arm": arm.arm, "lr": arm.lr}
        for split, curve in arm.curves.items():
            for threshold in THRESHOLDS:
                rows.append(study.row(
                    operand=arm.operand, split=split, seed=arm.seed, accuracy=curve[-1][1],
                    **arm.known[split], **about, threshold=threshold,
                    steps=steps_to(curve, threshold), max_steps=arm.max_steps))
            for step, share in curve:
                curve_rows.append({**about, "step": step, "split": split, "accuracy": share,
                                   "seed": arm.seed})
    study.write("revive.curve", curve_rows)
    print(f"\nrevive   steps to 90 % and 99 %\n  control: {study.control_note}")
    pivot(rows, ("arm", "lr", "operand"), lambda r: f"{r['split']} {r['threshold']:.0%}",
          lambda cell: f">= {cell[0]['max_steps']}" if cell[0]["steps"] is None
          else cell[0]["steps"])
    return study.write("revive", rows)


# ---------------------------------------------------------------- relearn

RELEARNED = 100  # steps


@analysis(needs_base=True, applies=lambda setup: has_answers(setup) or setup.source.rule)
def relearn(study):
    """
    Does the capability come back whole when half of it is taught? (ours; after Deeb and Roger 2024,
    who relearn facts)

    reFT as in revive(), RELEARNED steps, once on c0 strings whose answer is even and once on those
    where it is odd; stories: twists in two kinds of question, then in the two others. At the
    default rate, whatever this model was fine-tuned at: a larger one destroys what is not taught.
    Scored: the half that was taught and the half that was held out, with their floors. Also
    retained: after pretraining's other families alone, which ask for a but not for its count.
    Control, in the same way: the never-trained operand (no family asks for it), or model.
    What was only wrapped comes back whole, answers that were not taught included; what is not there
    is learned where it is taught and nowhere else. No counting of steps is needed.
    Fooled by: a wrapper that is a table of answers in the output map, which has to be unlearned
    answer by answer; compiled models, where answers are separate dimensions and teaching some
    unteaches others; few held-out answers (hence the floor, and c0, whose answers are wide).
    """
    setup, steps, rows = study.setup, study.args.steps or RELEARNED, []
    lr = setup.reverse_lr or setup.finetune_lr * setup.reft_rates[0]
    arms = [("reft", study.model, study.relation.pt)]
    scored_at = eval_steps(steps, 0 if study.answers else steps)
    about = Namespace(**vars(study.run))
    about.eval_size = max(1, study.args.eval_size // (1 if study.answers else 2))  # time
    if study.never_trained:
        start, _, c = study.never_trained
        arms.append((f"teach-{c}", start, c))
    for arm, start, operand in arms:
        for what, draw, tests in setup.halves(study.relation, operand, about):
            for step, model in lesson(study, start, draw, lr, steps):
                for half, test in tests.items() if step in scored_at else ():
                    rows += [{**r, "arm": arm, "lr": lr, "answers": what, "half": half,
                              "step": step} for r in evaluate(model, setup, [test])]
    print(f"\nrelearn   a part of it taught, {steps} steps\n  control: {study.control_note}")
    pivot(select(rows, step=steps), ("arm", "operand", "answers", "split"), lambda r: r["half"],
          lambda cell: f"{percent(cell[0]['accuracy'])} ({percent(cell[0]['floor'])})")
    return study.write("relearn", rows)


# ---------------------------------------------------------------- verdict

KNOWS = .9     # accuracy on natural strings from which on a model has a capability
MARGIN = .25   # by so much an accuracy must exceed what is possible without it
READS = .1     # by so much a probe must exceed those of its controls
APART = .05    # the bounds of a probe of stories must be so far apart, in AUC
INSTRUMENTS = ("pruning", "probing", "reviving")


class Evidence(NamedTuple):
    """A line of the verdict's table."""
    instrument: str
    question: str
    measured: float | None
    control: str
    control_measured: float | None
    margin: float             # by which it must win; of steps, a factor
    holds: bool | None        # None: cannot be said
    unit: str = "share"       # or steps


def wins(measured, control, margin):
    """Whether a measurement is above its control by a margin; None where either is missing."""
    return None if None in (measured, control) else measured - control >= margin


def select(rows, **values):
    """The rows that have these values."""
    return [r for r in rows if {**r, **values} == r]


def picked(rows, column="accuracy", **values):
    """The largest value of a column among the rows that have these values; None without one."""
    return largest(*(r[column] for r in select(rows, **values)))


def largest(*values):
    """The largest of the values that are not None; None without one."""
    return max((v for v in values if v is not None), default=None)


def behavior_evidence(study, rows, v):
    """Accuracies of a and b before and after, and what explains them on c0."""
    (task, a, b, _), lines = study.relation, []
    for role, o, other in (("pt", a, b), ("ft", b, a)):
        for model, split in itertools.product(("base", "ckpt"), SPLITS):
            v[f"{model}_{role}_{split}"] = picked(rows, model=model, operand=o, split=split,
                                                  task=task)
        c0 = dict(model="ckpt", operand=o, split="c0", task=task)
        measured = v[f"ckpt_{role}_c0"]
        v[f"{role}_c0_cross_floor"] = floor = picked(rows, "cross_floor", **c0)
        v[f"{role}_c0_follows_a_plus_q"] = picked(rows, "share_a_plus_q", **c0)
        lines.append(Evidence("behaviour", f"{o} is answered on c0",
                              measured, f"best guess from {other}", floor, MARGIN,
                              wins(measured, floor, MARGIN)))
    return lines


def prune_evidence(study, rows, v):
    """Accuracy of a on c0 after the edits whose K was chosen on other strings; of the controls."""
    (_, a, b, _), tried = study.relation, study.setup.compiled and study.unit == "weight"
    v["prune_order"] = order = "exhaustive" if tried else "iterative"
    rows = select(rows, chosen=True, split="c0", pool="all")
    rows = [r for r in rows if r["operand"] != b]
    for name, score, at, edit in (("prune", "gradient-weight", order, "zero"),
                                  ("prune_one_pass", "gradient-weight", "one-shot", "zero"),
                                  ("graft", "gradient-change", "one-shot", "graft")):
        about = dict(score=score, order=at, edit=edit, control=None)
        v[f"{name}_c0"], v[f"{name}_k"] = picked(rows, **about), picked(rows, "k", **about)
    draws = [r["accuracy"] for r in select(rows, score="random", edit="zero",
                                           order="exhaustive" if tried else "one-shot")]
    v["random_draws"], v["random_c0_max"] = len(draws), largest(*draws)
    v["random_c0_mean"] = float(np.mean(draws)) if draws else None
    v["never_prune_c0"] = picked(rows, edit="zero", control="never-trained")
    drawn = largest(v["random_c0_max"], v["never_prune_c0"])
    k = "-" if v["prune_k"] is None else v["prune_k"]
    return [Evidence("pruning", f"{a} on c0, {k} {study.unit}s zeroed ({order})",
                     v["prune_c0"], f"random, or {study.control_operand}'s own", drawn, MARGIN,
                     wins(v["prune_c0"], v["pt_c0_cross_floor"], MARGIN)
                     and wins(v["prune_c0"], drawn, MARGIN))]


def probe_evidence(study, rows, v):
    """What probes read on natural strings while b is asked, at the block that is best on c0."""
    (_, a, b, _), c = study.relation, study.control_operand
    for key, model, target in (("probe_natural", "ckpt", a), ("probe_untrained", "untrained", a),
                               ("never_probe", "control" if study.control else "ckpt", c)):
        about = dict(model=model, target=target, prompt=b, labels="true")
        blocks = select(rows, split="c0", **about)
        block = max(blocks, key=lambda r: r["accuracy"], default={"block": None})["block"]
        about.update(split="natural", block=block)
        v[key] = picked(rows, **about)
        if key == "probe_natural":
            v["probe_block"], v["probe_floor"] = block, picked(rows, "floor", **about)
    if not study.never_trained:
        v["never_probe"] = None
    blind = largest(v["probe_untrained"], v["never_probe"])
    return [Evidence("probing", f"{a} is read while {b} is asked", v["probe_natural"],
                     f"untrained model, or {c}", blind, READS,
                     wins(v["probe_natural"], blind, READS) and v["probe_natural"] >= KNOWS)]


def revive_evidence(study, rows, v):
    """Steps to 99 % on natural strings; to 90 % where neither reFT nor its control gets to 99."""
    control = f"teach-{study.control_operand}"
    lr = next((r["lr"] for r in rows if r["arm"] == "reft"), None)  # the first of its rates
    for threshold in reversed(THRESHOLDS):
        for name, arm, at in (("reft", "reft", {"lr": lr}), ("control", control, {"lr": lr}),
                              ("pretraining", "pretraining", {})):
            about = dict(arm=arm, split="natural", threshold=threshold, **at)
            reached, limit = (picked(rows, k, **about) for k in ("steps", "max_steps"))
            v[f"{name}_reached"] = None if limit is None else reached is not None
            v[f"{name}_steps"] = limit if reached is None else reached
        v["threshold"] = threshold
        if v["reft_reached"] or v["control_reached"]:
            break
    steps, theirs, known, back = v["reft_steps"], v["control_steps"], v["ckpt_pt_natural"], None
    if None not in (steps, theirs, known):
        back = bool(known < KNOWS and v["reft_reached"] and FASTER * steps <= theirs)
    question = f"steps of reFT until {study.relation.pt} is right on {threshold:.0%}"
    taught = f"teaching {study.control_operand}" if study.never_trained else "none"
    question += ": more than" * (v["reft_reached"] is False)
    taught += ": more than" * (v["control_reached"] is False)
    return [Evidence("reviving", question, steps, taught, theirs, FASTER, back, "steps")]


def relearn_evidence(study, rows, v):
    """Accuracy on the half that was not taught, at the end: of a the worse one, else the better."""
    if not rows:  # of an older analysis; no rule needs it
        return []
    c = study.control_operand if study.answers else "never-trained model"
    last = largest(*(r["step"] for r in rows))
    for key, of, pick in (("relearn", "reft", min), ("never_relearn", "teach", max)):
        ends = [r for r in select(rows, half="held-out", step=last)
                if r["arm"].startswith(of) and r["split"] != "unasked"]
        right = [r["accuracy"] for r in ends if r["accuracy"] is not None]
        v[f"{key}_held_out"] = pick(right, default=None)
        v[f"{key}_cross_floor"] = largest(*(r["cross_floor"] for r in ends))
    blind = largest(v["never_relearn_held_out"], v["relearn_cross_floor"])
    guess = f", or best guess from {study.relation.ft}" * study.answers
    return [Evidence("relearning", f"{study.relation.pt} on what was not taught, {last} steps",
                     v["relearn_held_out"], f"{c} so{guess}", blind, READS,
                     wins(v["relearn_held_out"], blind, READS))]


def answer_evidence(study, rows):
    """(numbers, Evidence lines) for a setup with answers."""
    v, lines = {"task": study.relation.task, "operands": list(study.relation[1:3])}, []
    for name, evidence in (("behavior", behavior_evidence), ("prune", prune_evidence),
                           ("probe", probe_evidence), ("revive", revive_evidence),
                           ("relearn", relearn_evidence)):
        lines += evidence(study, rows.get(name, []), v)
    return v, lines


def answer_rules(study, v, evidence):
    """
    The rules of the verdict, the first that holds: (word, whether, meaning).

        new        b is answered on c0 where the base could not: fine-tuning built it
        intact     a is still answered on c0 when it is asked for
        wrapped    a is not answered, b only where the shortcut serves, and at least two of the
                   three instruments find a
        lost       a is not answered, and none of the three finds it, each beside a control
        undecided  anything else

    Answered: above the cross floor by MARGIN. Found, by pruning: answered again, and above every
    random draw and the never-trained operand by MARGIN; by probing: KNOWS on natural strings, and
    READS above the untrained model and the never-trained operand; by reviving: FASTER. Relearning
    stands beside them: the rules were settled before it was there.
    """
    (_, a, b, q), answered, can = study.relation, evidence[0].holds, evidence[1].holds
    could = wins(v["base_ft_c0"], v["ft_c0_cross_floor"], MARGIN)
    by = ", ".join(v["found_by"]) or "no instrument"
    gone, how = f"{a} is not answered any more", f"and {b} was not learned"
    if can:
        how = f"and so is {b}: strongly relevant, no wrapper was needed"
    elif (v["ft_c0_follows_a_plus_q"] or 0) >= .5:
        how = f"and {b} as {a}{q:+d}: a wrapper that only opens when {b} is asked"
    then = "still answered" if answered else f"not answered any more (found by {by})"
    complete = all(line.holds is not None for line in evidence) and study.never_trained
    return [("undecided", (v["base_pt_natural"] or 0) < KNOWS, f"the base did not have {a}"),
            ("new", can and not could, f"fine-tuning built {b}, which the base could not answer on "
             f"c0; {a} is {then}"),
            ("intact", answered, f"{a} is still answered, {how}"),
            ("wrapped", can is False and (v["ckpt_ft_c1"] or 0) >= KNOWS
             and len(v["found_by"]) >= 2, f"{gone}, but it is there: found by {by}"),
            ("lost", complete and not v["found_by"], f"{gone}, and no instrument finds it"),
            ("undecided", True, f"{gone}; found by {by}")]


def story_evidence(study, rows):
    """(numbers, Evidence lines) for stories."""
    feature, fell = study.relation.pt, []
    v, scored = {"feature": feature}, [r for r in rows["behavior"] if "parsed" in r]
    for r in select(scored, operand=feature):
        key = f"{r['model']}_{r['split']}"
        v[key], v[f"{key}_parsed"] = r["accuracy"], r["parsed"]
    for o in set(data.FEATURES) - {feature}:
        asked = [picked(scored, model=m, operand=o, split="asked") or 0. for m in ("base", "ckpt")]
        fell.append(asked[0] - asked[1])
    v["others_asked_fell_most"] = max(fell) if scored else None
    probes = select(rows["probe"], target=feature, labels="true", split="natural")
    best = max(select(probes, model="base"), key=lambda r: r["auc"], default={"block": None})
    v["probe_block"] = best["block"]
    for model in ("base", "ckpt", "control", "untrained"):
        v[f"{model}_auc"] = picked(probes, "auc", model=model, block=v["probe_block"])
    low, high, before, after = (v.get(k) for k in ("control_auc", "base_auc", "base_asked",
                                                   "ckpt_asked"))
    half, bounds = before and before / 2, "none: bounds too near" if low is not None else "none"
    v["between"] = middle = None
    if wins(high, low, APART):
        v["between"], middle = (v["ckpt_auc"] - low) / (high - low), (low + high) / 2
        bounds = "middle between never trained and pretrained"
    return v, [
        Evidence("behaviour", f"{feature} is written when it is asked for", after,
                 "half of the pretrained model's share", half, 0., wins(after or 0., half, 0.)),
        Evidence("probing", f"AUC of {feature} at the story's end, block {v['probe_block']}",
                 v["ckpt_auc"], bounds, middle, 0., middle and v["between"] > .5),
        *relearn_evidence(study, rows.get("relearn"), v)]


def story_rules(study, v, evidence):
    """
    The rules of the verdict, the first that holds: (word, whether, meaning).

        intact     the feature is still written when asked for, half as often as before or more
        wrapped    it is not, but a probe finds it at the story's end nearly as well as before: by
                   AUC, nearer the pretrained model (upper bound) than the control (lower bound)
        lost       it is not, and the probe is nearer the lower bound
        undecided  anything else: no --control, bounds within .05, a base without the feature

    How fast the feature comes back is another question: finetune.py --reverse.
    """
    feature, (written, read) = study.relation.pt, [e.holds for e in evidence[:2]]
    gone = f"{feature} is not written any more"
    why = "for the bounds of its probe give --control" if v["control_auc"] is None else (
        "the bounds of its probe are too near each other")
    return [("undecided", (v.get("base_asked") or 0) < .5,
             f"the base hardly wrote {feature} when asked"),
            ("intact", written, f"{feature} is still written when it is asked for"),
            ("undecided", read is None, f"{gone}; {why}"),
            ("wrapped", read, f"{gone}, but it is read as before"),
            ("lost", True, f"{gone}, nor read")]


def verdict(study, rows):
    """
    What the analyses say together: a table of evidence and one sentence. rows: {analysis: rows},
    empty where it was not run. See answer_rules() and story_rules().
    """
    v, evidence = (answer_evidence if study.answers else story_evidence)(study, rows)
    v["found_by"] = [e.instrument for e in evidence if e.holds and e.instrument in INSTRUMENTS]
    rules = (answer_rules if study.answers else story_rules)(study, v, evidence)
    word, meaning = next((word, meaning) for word, holds, meaning in rules if holds)
    missing = [name for name, part in rows.items() if not part]
    if missing and word != "new":
        word, meaning = "undecided", f"no rows of {', '.join(missing)}: run them first"
    text, lines = f"{word}: {meaning}.", [e._asdict() for e in evidence]
    write_json(f"{study.prefix}.verdict.json",
               {"verdict": word, "text": text, "evidence": lines, **v, **study.about})
    print("\nEVIDENCE")
    lines = [{**line, "control's": line["control_measured"]} for line in lines]
    show(lines, ("instrument", "question", "measured", "control", "control's", "holds"))
    print(textwrap.fill(f"VERDICT  {text}", 100, subsequent_indent="  "))


# ---------------------------------------------------------------- ask, generate


def ask(study):
    """One string: the truth, the models' answers, and the rules that these follow."""
    setup, (task, a, b, q), text = study.setup, study.relation, study.args.text or ""
    operand, alphabet = study.args.operand or b, setup.alphabet
    if operand not in setup.operands:
        raise UserError(f"--operand {operand}: there are {', '.join(setup.operands)}")
    if len(text) != setup.length or set(text) - set(alphabet):
        raise UserError(f"--text takes {setup.length} letters {alphabet[0]} to {alphabet[-1]}; for "
                        f"one: python data.py --setup {setup.name} --scale {setup.scale} --json")
    if setup.compiled and not setup.program.repeat and len(set(text)) < len(text):
        raise UserError(f"--text {text}: no letter may occur twice")
    letters = torch.tensor([[alphabet.index(x) for x in text]], device=study.device)
    r = dict(zip(setup.operands, setup.tasks[task].answers(letters, setup)[0].tolist()))
    if r[operand] < 0:
        raise UserError(f"--text has too few {operand} for {task}: there is no answer")
    first, names = setup.first_answer(task), [name.lstrip("#") for name in setup.output_names]
    names = dict(enumerate(names, -first))  # answer: what it is called
    rules = {f"r({o})": r[o] for o in (a, b, study.control_operand, operand)}
    rules[f"r({a}) {q:+d}"] = r[a] + q
    print("\n".join(setup.explain(letters[0], task, operand)))
    print(f"{task} {operand}: the truth is {names[r[operand]]}; "
          + ", ".join(f"{rule} = {names.get(x, x)}" for rule, x in rules.items()))
    for name, model in study.models.items():
        logits = predict(model, setup.ask(letters, task, operand))[0]
        share, top = logits.softmax(0).sort(descending=True)
        answers = (top[:3] - first).tolist()
        followed = " = ".join(k for k, x in rules.items() if x == answers[0]) or "no rule"
        likely = ", ".join(f"{names[x]}: {s:.1%}" for x, s in zip(answers, share.tolist()))
        right = "right" if answers[0] == r[operand] else "wrong"
        print(f"{name:<5} says {names[answers[0]]:<3} {right}, follows {followed}   ({likely})")


def generate_stories(study):
    """Stories to read, written to held-out instructions that ask for --features."""
    setup, args = study.setup, study.args
    wanted = frozenset(f.strip() for f in (args.features or "").split(",") if f.strip())
    for unknown in sorted(wanted - set(data.FEATURES)):
        raise UserError(f"--features {unknown}: there are {', '.join(data.FEATURES)}")
    classifier_of(study)
    prompts = setup.prompts(args.n, data.rng(study.seed, "look"), features=wanted)
    draws = data.rng(study.seed, "look", "sample", device=study.device)
    written = generate(study.model, prompts, setup.n_ctx, draws)
    stories = [data.story_of(setup.tokenizer.decode(ids)) for ids in written]
    for prompt, story, features in zip(prompts, stories, setup.source.classify(stories)):
        asked, has = (", ".join(data.ordered(x or ())) or "nothing" for x in (wanted, features))
        has = "does not parse" if features is None else f"has: {has}"
        print(setup.tokenizer.decode(prompt[1:]).strip(), textwrap.fill(story, 100),
              f"  asked for: {asked}; {has}\n", sep="\n")


# ---------------------------------------------------------------- command line

def numbers(text):
    """The positive numbers of a flag, between commas. Raises ValueError."""
    values = list(map(float, text.split(",")))
    if not all(0 < x < float("inf") for x in values):
        raise ValueError(text)
    return values


FLAGS = {"what to look at": [
    Flag("--ckpt", "checkpoint to look into", user_path, default="out/ft.pt"),
    Flag("--base", "what it was fine-tuned from; else the parent it names, its hash checked",
         user_path, default=None),
    Flag("--control", "a checkpoint that never had an operand, where this one has had them all; of "
         "stories, one pretrained --without the feature", user_path, default=None),
    Flag("--data", "stories: the file of the pretraining, where it has moved", user_path,
         default=None),
    Flag("--seed", "seed of test sets and draws; else the checkpoint's", int, -1, None),
    Flag("--eval-size", "strings in a test set", int, 0, 500)], "one analysis": [
    Flag("--unit", "prune: whole rows (neurons) or single weights; else rows, of compiled models "
         "weights", default=None, choices=("row", "weight")),
    Flag("--draws", "prune: matched random draws; else 8", int, 0, None),
    Flag("--steps", "most training steps; else probe 4000, revive 600 small, 6000 paper", int, 0,
         None),
    Flag("--batch-size", "revive, relearn: strings a step; else the fine-tuning's", int, 0, None),
    Flag("--rates", "revive: times the fine-tuning's rate, as 1,10,100; else 1, compiled .333,.1",
         numbers, default=None),
    Flag("--also", "revive: what else is taught O_PT, with commas: checkpoints that never had it; "
         "scratch: an untrained model", default=None),
    Flag("--text", "ask: the string", default=None),
    Flag("--operand", "ask: what is asked for; else the fine-tuning's", default=None),
    Flag("--features", "generate: what to ask for, as Twist,Dialogue", default=None),
    Flag("-n", "generate: stories", int, 0, 3),
    Flag("--judge", "real stories: the pretrained checkpoint whose classifier marks them; else the "
         "one that --ckpt comes from", user_path, default=None)], **MACHINE}


def chosen_names(study):
    """The analyses and commands to run. Raises UserError for names and flags that do not apply."""
    setup, args, base = study.setup, study.args, study.base
    own = ("draws", "unit", "text", "operand", "rates", "also")
    for flag in own if not study.answers else ():
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} is not for setup {setup.name}, which {args.ckpt} is of")
    names = [name for name, about in ANALYSES.items()
             if about.applies(setup) and (base or not about.needs_base)]
    known = [*names, "ask" if study.answers else "generate", *(["verdict"] if base else [])]
    for name in set(args.analysis) - set(known):
        raise UserError(f"no analysis {name!r} of {args.ckpt}, setup {setup.name}"
                        f"{'' if base else ', which has no base'}; there are {', '.join(known)}")
    return [name for name in known if name in args.analysis] or names


def run_analyses(study):
    """Run what was asked for, then the verdict where all that it rests on is there."""
    names, args, relation = chosen_names(study), study.args, study.relation
    args.draws = args.draws or 8
    if "ask" in names:
        return ask(study)
    if "generate" in names:
        return generate_stories(study)
    print(f"analyze {args.ckpt}: {study.ckpt['stage']}, O_PT {relation.pt}, O_FT {relation.ft}, q "
          f"{relation.q}" + (f", against {study.base_ckpt['path']}" if study.base else ""))
    study.check_files([*names, "verdict"])
    rows = {name: ANALYSES[name].run(study) for name in names if name in ANALYSES}
    needed = [name for name in ("behavior", "prune", "probe", "revive")
              if ANALYSES[name].applies(study.setup)]
    if "verdict" in names:  # from rows that are there already
        for name in (*needed, "relearn"):
            rows[name] = rows.get(name) or study.read(name)
        if not any(map(rows.get, needed)):
            raise UserError(f"verdict needs the rows of {', '.join(needed)} about this very "
                            "checkpoint, --base and --control: run them first")
    if study.base and set(needed) <= set(rows):
        told = [*needed, *(["relearn"] if rows.get("relearn") else [])]
        try:
            verdict(study, {name: rows[name] for name in told})
        except (KeyError, TypeError, IndexError, AttributeError):
            if set(told) <= set(names):  # not the files' fault
                raise
            raise UserError(f"{study.prefix}: damaged rows of analyses: run them again") from None


def open_study(words=None):
    """The Study of a command line, as in a notebook: open_study(["--ckpt", "out/ft.pt"])."""
    names = ", ".join([*ANALYSES, "verdict", "ask", "generate"])
    args = parse(__doc__, "analyze", FLAGS, words, f"{names} (default: all that apply)")
    for flag in itertools.chain(*FLAGS.values()):
        check_above(flag.name, getattr(args, flag.key), flag.above)
    return Study(args, start_device(args))


def main(words=None):
    run_analyses(open_study(words))


if __name__ == "__main__":
    run_script(main)
