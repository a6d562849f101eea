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

Contents: the study | behavior | prune | probe | attention, hidden | revive | verdict | ask,
generate | command line. a stands for O_PT, the pretraining operand (of stories the feature in
question), and b for O_FT, the fine-tuning operand, whatever letters they are.
"""
import collections
import copy
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
from data import (SPLITS, Answers, Relation, UserError, check_stop, read_rows, replace_file, sha256,
                  write_json, write_rows)
from finetune import finetune_rate
from model import GPT, Config, activations, generate, load, loss_of, weight_edits
from pretrain import (MACHINE, Flag, accuracy, add_noise, answer_row, check_above, constant,
                      evaluate, interval, optimizer_for, parse, percent, predict, run_script,
                      start_device, table, train_steps)

# ---------------------------------------------------------------- the study

ANALYSES = {}  # name: Analysis, in the order in which they run


class Analysis(NamedTuple):
    """A function of a Study that writes rows and returns them."""
    run: Callable
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
    """
    The file a checkpoint was made from: at its recorded path or beside it, verified by sha256.
    """
    beside = os.path.join(os.path.dirname(path), os.path.basename(parent["path"]))
    files = [p for p in (parent["path"], beside) if os.path.isfile(p)]
    for file in files:
        if sha256(file) == parent["sha256"]:
            return file
    why = "has changed since" if files else "is not there any more:"
    raise UserError(f"{parent['path']} {why} {path} was made from it; give it as --base")


class Study:
    """
    A checkpoint, what it came from, and its test sets: what an analysis needs and may not change.
    """

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.model, self.ckpt = load(args.ckpt, device)
        self.setup = data.setup_of(self.ckpt, device)
        self.answers, self.prefix = has_answers(self.setup), os.path.splitext(args.ckpt)[0]
        self.seed = self.ckpt["args"]["seed"] if args.seed is None else args.seed
        # the run's own arguments, for the setup's test sets
        more = {"eval_size": args.eval_size, "seed": self.seed}
        self.run = Namespace(**{**self.ckpt["args"], **more})
        self.setup.open(self.run, self.ckpt["config"]["words"])
        self.relation = self.setup.relation(self.run)
        if self.ckpt["stage"] == "pretrain":  # what it has, even where its arguments do not say so
            self.relation = self.relation._replace(pt=self.ckpt["capability"]["operand"])
        self.unit = args.unit or self.setup.unit
        self.base = self.base_ckpt = self.start = None
        self.find_base()
        self.models = {"base": self.base, "ckpt": self.model} if self.base else {"ckpt": self.model}
        self.control_operand = self.setup.control_operand(self.relation, self.ckpt["args"])
        self.never_trained, self.control_note = self.find_control()

    def find_base(self):
        """
        Load the model that fine-tuning began with: the parent; of stories the pretrained one,
        however often it was fine-tuned since.
        """
        path, ckpt, args = self.args.ckpt, self.ckpt, self.args
        if args.base and not ckpt["parent"]:
            raise UserError(f"--base: {path} was not fine-tuned from anything")
        while ckpt["parent"] and (self.base is None or not self.answers):
            path = args.base or find_parent(path, ckpt["parent"])
            self.base, self.base_ckpt = model, ckpt = load(path, self.device)
            if ckpt["config"] != self.ckpt["config"]:
                raise UserError(f"--base {path}: another shape or vocabulary than {args.ckpt}")
            if args.base:
                break
        if self.base:  # with the noise that was put on it: else "what has changed" were the noise
            self.start = copy.deepcopy(self.base)
            add_noise(self.start, self.ckpt["args"].get("noise", 0), self.ckpt["args"]["seed"])

    def find_control(self):
        """
        ((model, its start or None, operand) or None, note): an operand that was trained in no
        family, inside this very model where it has one, else in --control. Of stories: --control,
        which never had the feature.
        """
        operand, path = self.control_operand, self.args.control
        if operand and self.setup.never_trained(operand, self.ckpt):
            if path:
                raise UserError(f"--control is not needed: {self.args.ckpt} itself never had "
                                f"{operand}")
            return (self.model, self.start, operand), f"{operand}, never trained, in the same model"
        operand = operand or self.relation.pt
        if not path:
            return None, f"none: {operand} was trained; a checkpoint without it: --control"
        control, ckpt = load(path, self.device)
        if ckpt["config"] != self.ckpt["config"] or not self.setup.never_trained(operand, ckpt):
            raise UserError(f"--control {path}: must have the shape of {self.args.ckpt} and never "
                            f"have been trained on {operand} (prior 0, or --without)")
        return (control, None, operand), f"{operand}, never trained, in {path}"

    def test(self, operand, split, label="test", n=None):
        """A Test: `operand` asked on strings of its relation with b."""
        relation = self.relation
        if operand not in (relation.pt, relation.ft):
            relation = relation._replace(pt=operand)
        n = n or self.args.eval_size
        return self.setup.test(relation, operand, split, n, self.seed, label)

    def labels(self, test, operand):
        """The true answers (n,) for an operand on a test set, as numbers."""
        return test.examples.labels[:, self.setup.operands.index(operand)]

    def row(self, **values):
        """A row of this study that is about no test set."""
        return data.row(self.setup, **{"task": self.relation.task, "seed": self.seed, **values})

    def measure(self, model, test, **columns):
        """The row of a model on a test set, with further columns."""
        return {**answer_row(predict(model, test.examples), test), **columns}

    def write(self, name, rows):
        """Replace the file of an analysis, <checkpoint>.<name>.jsonl. Returns the rows."""
        write_rows(f"{self.prefix}.{name}.jsonl", rows)
        return rows

    def write_maps(self, name, maps, examples):
        """Replace <checkpoint>.<name>.npz: arrays, with the tokens that they are about."""
        maps = {**maps, "tokens": examples.tokens.cpu().numpy(),
                "vocabulary": np.array(self.setup.vocabulary)}
        replace_file(f"{self.prefix}.{name}.npz", lambda f: np.savez_compressed(f, **maps))


def bar(total, what):
    """A progress bar."""
    return tqdm(total=total, desc=what, mininterval=.5, leave=False)


def pivot(rows, keys, column, value):
    """
    Print rows as a table: a line for each combination of `keys`, a column for each column(row);
    value(rows of a cell) -> text.
    """
    cells = collections.defaultdict(list)
    for r in rows:
        cells[tuple("-" if r.get(k) is None else r[k] for k in keys), column(r)].append(r)
    lines, columns = (list(dict.fromkeys(part)) for part in zip(*cells))
    body = []
    for line in lines:
        own = [value(cells[line, c]) if (line, c) in cells else "" for c in columns]
        body.append([*line, *own])
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
    names = study.setup.output_names
    counts = collections.Counter(names[i].lstrip("#") for i in logits.argmax(1).tolist())
    return dict(counts.most_common())


def rule_columns(study, model, test):
    """Rules and predicted answers, of a Test that is about a or b."""
    relation = study.relation
    if test.row["task"] != relation.task or not study.answers:
        return {}
    logits = predict(model, test.examples)
    answer = logits.argmax(1) - study.setup.first_answer(relation.task)
    a, b = (study.labels(test, o) for o in (relation.pt, relation.ft))
    return {"predicted": predicted(study, logits), **rule_shares(answer, a, b, relation.q)}


def distance_moved(study):
    """
    A row: how far fine-tuning moved the weights after its noise, in all and per block; its rates.
    """
    parts = collections.defaultdict(float)
    for (name, new), old in zip(study.model.named_parameters(), study.start.parameters()):
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks") else "outside"
        parts[part] += (new - old).detach().double().square().sum().item()
    lr_at = finetune_rate(study.run, study.setup)
    base_norm = sum(p.double().square().sum().item() for p in study.base.parameters()) ** .5
    return study.row(model="ckpt", distance=sum(parts.values()) ** .5, base_norm=base_norm,
                     distance_blocks={name: square ** .5 for name, square in parts.items()},
                     sum_of_rates=sum(map(lr_at, range(study.run.steps))))


@analysis()
def behavior(study):
    """
    What does the model answer or write, and by which rule? (paper Tables 5-8; stories: Table 1)

    Answers: accuracy for a and b on c0, c1 and natural strings, the fine-tuned model beside its
    base; the share of answers that each simple rule explains; which answers are given; the other
    families (collateral damage); how far the weights moved. On c1 the rules a + q and b coincide:
    only c0 tells a wrapper from a learner. Stories: for each feature the share of stories that
    have it, by the corpus's rule (real text: by a classifier), written to held-out instructions
    that ask for it and to others; and losses. The five other features are the control: a deletion
    should leave them alone.
    Fooled by: a test set where ties or the relation occur by accident (natural ones do: hence c0);
    a majority class (hence the floors); damage that looks like a wrapper (hence the other
    families); stories that are broken rather than without a twist (hence the share that parses); a
    classifier's mistakes (`judge`: how often it is right); few generations (hence the intervals).
    """
    rows, right, models = [], classifier_of(study), dict(study.models)
    if study.never_trained and not study.answers:
        models["control"] = study.never_trained[0]
    subjects = list(itertools.product(models.items(), study.setup.tests(study.run)))
    for (name, model), test in tqdm(subjects, desc="behavior", leave=False):
        columns = rule_columns(study, model, test)
        if test.how == "generation":
            columns["judge"] = right.get(test.row["operand"], 1.)
        rows += [{**r, "model": name, **columns} for r in evaluate(model, study.setup, [test])]
    print(f"\nbehavior   n = {study.args.eval_size}; share_: answers that a rule explains")
    facts = list(dict.fromkeys(k for k in itertools.chain(*rows) if k.startswith("share_")))
    facts = ["accuracy", "floor", "cross_floor", "loss", *facts]
    head, body = ["task", "operand", "split", "model"], []
    for r in rows:
        body.append([r[k] or "-" for k in head] + [fact(r, k) for k in facts])
    table(head + facts, body)
    if study.base and study.answers:
        rows.append(distance_moved(study))
        print(f"  the weights moved by {rows[-1]['distance']:.3f} (norm; the base's is "
              f"{rows[-1]['base_norm']:.1f}); sum of learning rates {rows[-1]['sum_of_rates']:.2g}")
    return study.write("behavior", rows)


def fact(row, key):
    """A column of a row for people; of generations the accuracy with its interval."""
    if key == "loss":
        return "-" if row[key] is None else f"{row[key]:.3f}"
    if key == "accuracy" and "parsed" in row:
        return f"{interval(row[key], row['parsed'] * row['n'])}, {row['parsed']:.0%} parse"
    return percent(row.get(key))


# ---------------------------------------------------------------- prune

KS = (0, 1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 100)
FEW = 10         # the claim is about a few units: K is chosen among those up to this
MAX_UNITS = 10000  # never edit more at once
EXHAUSTIVE = 100   # single weights of a compiled model that are zeroed one by one
DRAWN = 200      # strings for a random draw: eight draws together get more than a ranking
MATRICES = ("attn.qkv", "attn.out", "up", "down")


def unit_parameters(model, unit):
    """
    {(block, matrix): [parameter names]} of what can be pruned: rows of the matrices in blocks with
    their bias entry, or single weights. Of a compiled model these are all its weights, embeddings
    and biases too (block None), for its program is written into them; the output map is not.
    """
    compiled, names = not model.config.train_head, {}
    for i, m in itertools.product(range(len(model.blocks)), MATRICES):
        if unit == "row":
            names[i, m] = [f"blocks.{i}.{m}.weight", f"blocks.{i}.{m}.bias"]
            continue
        for kind in ("weight", "bias") if compiled else ("weight",):
            names[i, f"{m}.{kind}"] = [f"blocks.{i}.{m}.{kind}"]
    if unit == "weight" and compiled:
        names.update({(None, name): [name] for name in ("tok.weight", "pos.weight")})
    return names


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
    First-order effect of editing each unit: a score of the cross-entropy's gradient on a test set,
    summed over a row and its bias entry, or weight by weight. start: the model before fine-tuning.
    Returns {(block, matrix): scores (rows,) or (weights,)}.
    """
    model.zero_grad()
    x, n = test.examples, len(test.examples.tokens)
    for part in x.split(256):
        check_stop()
        loss = F.cross_entropy(model(part.tokens, x.at), part.answer, reduction="sum")
        (loss / n).backward()
    before, scores = dict((start or model).named_parameters()), {}
    with torch.no_grad():
        for key, names in unit_parameters(model, unit).items():
            effects = []
            for name in names:
                p = model.get_parameter(name)
                effects.append(SCORES[score].effect(p.grad, p, before[name]))
            scores[key] = effects[0].sum(1) + effects[1] if unit == "row" else effects[0].flatten()
    model.zero_grad()
    return scores


def only_zero(scores, program):
    """The scores of the weights that are zero in a compiled program; -inf for the others."""
    before, names, zeros = dict(program.named_parameters()), unit_parameters(program, "weight"), {}
    for key, x in scores.items():
        zeros[key] = torch.where(before[names[key][0]].flatten() == 0, x, -torch.inf)
    return zeros


def ranked_units(scores, max_units):
    """The units with the largest positive scores: a list of (block, matrix, index, score)."""
    keys = list(scores)
    flat = torch.cat([scores[k] for k in keys])
    sizes = torch.tensor([len(scores[k]) for k in keys])
    first = sizes.cumsum(0) - sizes
    values, places = flat.topk(min(max_units, int((flat > 0).sum())))
    which = torch.searchsorted(first, places.cpu(), right=True) - 1
    return [(*keys[w], int(p - first[w]), v)
            for w, p, v in zip(which.tolist(), places.tolist(), values.tolist())]


def one_shot(model, units, test, unit, score):
    """The ranking of one backward pass, as it is (paper section 3)."""
    return units


def iterative(model, units, test, unit, score="gradient-weight"):
    """
    ours: FEW units, ranked anew after every zeroed one. One pass takes many units that do the same
    thing; after the first is gone, the others no longer score.
    """
    chosen = []
    for _ in range(FEW):
        with weight_edits(model, unit_edits(model, chosen, unit)):
            ranked = ranked_units(unit_scores(model, test, unit, score), FEW + 1)
        taken = {u[:3] for u in chosen}
        chosen += [u for u in ranked if u[:3] not in taken][:1]
    return chosen


def exhaustive(model, units, test, unit, score=None):
    """
    ours: the first units in the order of what zeroing each alone does for the accuracy: a linear
    score says little about a compiled weight of 100.
    """
    def alone(u):
        with weight_edits(model, unit_edits(model, [u], unit)):
            return accuracy(predict(model, test.examples), test.examples.answer)
    return sorted(units[:EXHAUSTIVE], key=alone, reverse=True)


class Order(NamedTuple):
    """How units are put in order, from a one-shot ranking."""
    units: Callable       # model, ranked units, selection test, unit, score -> units
    max_k: int            # the largest K
    compiled: bool        # only for single weights of compiled models
    pools: tuple = ("all", "zero-in-program")


ORDERS = {"one-shot": Order(one_shot, KS[-1], False),
          "iterative": Order(iterative, FEW, False, ("all",)),
          "exhaustive": Order(exhaustive, FEW, True)}


def matched_units(units, scores, rng, program=None):
    """
    Random units, rank by rank from the same block and matrix as `units` (queries, keys and values
    apart; of a compiled program also what it is written in and its zeros): the control for which
    ones were chosen.
    """
    zeros = only_zero(scores, program) if program else scores

    def pool_of(block, matrix, index):
        part = matrix.startswith("attn.qkv") and index * 3 // len(scores[block, matrix])
        return block, matrix, part, bool(zeros[block, matrix][index] == -torch.inf)
    pools, matched = collections.defaultdict(list), []
    for block, matrix in scores:
        for index in torch.randperm(len(scores[block, matrix]), generator=rng).tolist():
            pools[pool_of(block, matrix, index)].append(index)
    for block, matrix, index, _ in units:
        matched.append((block, matrix, pools[pool_of(block, matrix, index)].pop(), None))
    return matched


def place_of(model, name, index, unit):
    """The index of a unit in its parameter: a row, or a place from the flat index of a weight."""
    if unit == "row":
        return index
    return tuple(map(int, np.unravel_index(index, model.get_parameter(name).shape)))


def unit_edits(model, units, unit, start=None):
    """
    The weight_edits() that zero these units, or graft them: set them back to the start's values.
    """
    source = dict(start.named_parameters()) if start else None
    names, edits = unit_parameters(model, unit), []
    for block, matrix, index, _ in units:
        for name in names[block, matrix]:
            at = place_of(model, name, index, unit)
            edits.append((name, at, source[name][at].detach() if start else 0.))
    return edits


def unit_name(model, u, unit):
    """blocks.1.up[3], or blocks.1.up.weight[3, n_a:share], residual dimensions by their names."""
    block, matrix, index, _ = u
    if unit == "row":
        return f"blocks.{block}.{matrix}[{index}]"
    [name] = unit_parameters(model, unit)[block, matrix]
    at = list(place_of(model, name, index, unit))
    writes = name.endswith(("out.weight", "out.bias", "down.weight", "down.bias"))
    residual = 0 if writes else None if name.endswith("bias") else 1  # its index in `at`
    if model.config.residual and residual is not None:
        at[residual] = model.config.residual[at[residual]]
    return f"{name}[{', '.join(map(str, at))}]"


class Sweep(NamedTuple):
    """What is pruned, one K after the other. Its columns describe it in every row."""
    model: GPT
    start: GPT | None           # the model before fine-tuning, for grafts
    operand: str                # that is asked for
    control: str | None = None  # never-trained
    score: str | None = None    # a key of SCORES, or random
    order: str = "one-shot"     # a key of ORDERS
    pool: str = "all"           # or zero-in-program
    edit: str = "zero"          # or graft
    units: list = []            # in order
    ks: list = []
    draw: int | None = None


def prune_rows(study, sweep):
    """The rows of a sweep: accuracies at each K, and the K that does best on other strings."""
    b, unit = study.relation.ft, study.unit
    n = None if sweep.draw is None else min(DRAWN, study.args.eval_size)
    tests = [study.test(sweep.operand, "c0", n=n), study.test(b, "c1", n=n)]
    if sweep.draw is None:
        tests.append(study.test(sweep.operand, "natural"))
    if (sweep.score, sweep.pool, sweep.control) == ("gradient-weight", "all", None):
        more = (study.relation.pt, "c1"), (b, "c0"), (b, "natural")
        tests += [study.test(*about) for about in more]
    rows, tried = [], []
    columns = {k: getattr(sweep, k) for k in ("score", "order", "pool", "control", "edit", "draw")}
    start = sweep.start if sweep.edit == "graft" else None
    for k in (0, *(k for k in sweep.ks if k <= len(sweep.units))):
        with weight_edits(sweep.model, unit_edits(sweep.model, sweep.units[:k], unit, start)):
            if k <= FEW:  # the fewest units that do best on the selection set
                select = study.test(sweep.operand, "c0", "select", n)
                tried.append((study.measure(sweep.model, select)["accuracy"], -k))
            for test in tests:
                logits = predict(sweep.model, test.examples)
                rows.append({**answer_row(logits, test), "unit": unit, **columns, "k": k})
                if study.setup.compiled and sweep.draw is None and test is tests[0]:
                    rows[-1]["predicted"] = predicted(study, logits)  # it still uses many classes
    return [dict(r, chosen=r["k"] == -max(tried)[1]) for r in rows]


def sweeps_of(study, blank, program):
    """The sweeps of one model and operand: every score, order and pool that apply, and grafts."""
    model, start, unit, sweeps = blank.model, blank.start, study.unit, []
    select = study.test(blank.operand, "c0", "select")
    few = [k for k in KS if 0 < k <= FEW]
    for score, (_, edit) in SCORES.items():
        if edit == "graft" and start is None:
            continue
        scores = unit_scores(model, select, unit, score, start)
        total = sum(map(len, scores.values()))
        # grafting needs many units
        many = [*KS[1:], *(200 * 2 ** i for i in range(30) if 400 * 2 ** i <= total)]
        many = [k for k in many if k <= MAX_UNITS]
        sparse = sorted({FEW, KS[-1], 400, many[-1]})
        if edit == "graft":
            ks = sparse if blank.control else many
            units = ranked_units(scores, many[-1])
            sweeps.append(blank._replace(score=score, edit=edit, units=units, ks=ks))
            continue
        pools = {"all": scores}
        if program and not blank.control:
            pools["zero-in-program"] = only_zero(scores, program)
        for (pool, x), (order, about) in itertools.product(pools.items(), ORDERS.items()):
            if pool in about.pools and (program or not about.compiled):
                ranked = ranked_units(x, KS[-1])
                units = about.units(model, ranked, select, unit, score)
                ks = few if pool != "all" else [k for k in KS if 0 < k <= about.max_k]
                sweeps.append(blank._replace(score=score, order=order, pool=pool, units=units,
                                             ks=ks))
        if not blank.control:
            units = ranked_units(scores, KS[-1])
            sweeps.append(blank._replace(score=score, edit="graft", units=units, ks=sparse))
    return sweeps


def random_sweeps(study, sweeps, program):
    """
    Matched random units: zeroed ones for the iterative and then the one-shot ranking, grafted ones
    for that by change; of compiled models also the best of as many as were tried one by one.
    """
    blank = Sweep(study.model, study.start, study.relation.pt, score="random")
    own = {(s.score, s.order, s.pool, s.edit): s for s in sweeps if not s.control}
    once = own["gradient-weight", "one-shot", "all", "zero"]
    again = own["gradient-weight", "iterative", "all", "zero"]
    change = own["gradient-change", "one-shot", "all", "graft"]
    taken = {u[:3] for u in again.units}
    rest = [u for u in once.units if u[:3] not in taken]
    zeroed = again.units + rest[:len(once.units) - len(again.units)]
    sparse = own["gradient-weight", "one-shot", "all", "graft"].ks
    select = study.test(study.relation.pt, "c0", "select")
    scores, draws = unit_scores(study.model, select, study.unit), []
    for draw in range(study.args.draws):
        rng = data.rng(study.seed, "prune", draw)
        units = matched_units(zeroed, scores, rng, program)
        draws.append(blank._replace(units=units, ks=once.ks, draw=draw))
        units = matched_units(change.units, scores, rng, program)
        draws.append(blank._replace(edit="graft", units=units, ks=sparse, draw=draw))
        for pool in ("all", "zero-in-program") if program else ():
            ranked = own["gradient-weight", "one-shot", pool, "zero"].units
            tried = exhaustive(study.model, matched_units(ranked, scores, rng, program), select,
                               study.unit)
            ks = own["gradient-weight", "exhaustive", pool, "zero"].ks
            draws.append(blank._replace(order="exhaustive", pool=pool, units=tried, ks=ks,
                                        draw=draw))
    return draws


def graft_dimensions(study):
    """
    ours: set everything that writes one residual dimension, or everything that reads it, back to
    what fine-tuning began with. In a compiled model dimensions have names, so this tells in which
    variable of the program the change sits.
    """
    model, old, rows = study.model, dict(study.start.named_parameters()), []
    a, b = study.relation.pt, study.relation.ft
    tests = [study.test(a, "c0"), study.test(b, "c1")]
    columns = {"writers": ("tok.weight", "pos.weight"), "readers": ("attn.qkv.weight", "up.weight")}
    lines = ("attn.out.weight", "attn.out.bias", "down.weight", "down.bias")
    for side, (d, name) in itertools.product(columns, enumerate(model.config.residual)):
        everything = slice(None)
        places = [(p, (everything, d)) for p in old if p.endswith(columns[side])]
        places += [(p, d) for p in old if p.endswith(lines) and side == "writers"]
        edits = [(p, at, old[p][at].detach()) for p, at in places]
        with weight_edits(model, edits):
            selected = study.measure(model, study.test(a, "c0", "select"))["accuracy"]
            for test in tests:
                rows.append(study.measure(
                    model, test, unit="dimension", score=None, order="exhaustive", pool="all",
                    control=None, edit="graft", k=1, draw=None, side=side, dimension=name,
                    selected=selected))
    for side in columns:  # chosen: the best on the selection set
        own = [r for r in rows if r["side"] == side]
        best = max(own, key=lambda r: r["selected"], default={"dimension": None})["dimension"]
        for r in own:
            r["chosen"] = r["dimension"] == best
    return rows


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
    the program; ours: the first 100 of a ranking, tried one by one (exhaustive); and grafts of
    whole residual dimensions.
    High accuracy on a after few edits: the answer was there, and these units kept it from being
    read. It does not say that the change sits in these units: a zeroed unit is a lever, only
    grafts undo what fine-tuning did.
    Fooled by: any damage that happens to shift answers by q (hence random units from the same
    matrices, --draws of them, with K chosen in the same way); a method that finds units for
    anything (hence the control never-trained: the same procedure for an operand that was never
    trained).
    """
    program = study.base if study.setup.compiled and study.unit == "weight" else None
    sweeps = sweeps_of(study, Sweep(study.model, study.start, study.relation.pt), program)
    rows, units = [], []
    for s in sweeps:
        for rank, u in enumerate(s.units[:KS[-1]] if s.edit == SCORES[s.score].edit else (), 1):
            units.append({"score": s.score, "order": s.order, "pool": s.pool, "rank": rank,
                          "block": u[0], "matrix": u[1], "index": u[2], "value": u[3],
                          "name": unit_name(study.model, u, study.unit)})
    study.write("prune.rows", units)
    sweeps += random_sweeps(study, sweeps, program)
    if study.never_trained:
        sweeps += sweeps_of(study, Sweep(*study.never_trained, "never-trained"), program)
    else:
        rows.append(study.row(unit=study.unit, score="gradient-weight", order="one-shot",
                              pool="all", control="never-trained", edit="zero", k=None, draw=None,
                              note=study.control_note))
    for sweep in tqdm(sweeps, desc="prune", leave=False):
        rows += prune_rows(study, sweep)
    if study.setup.compiled and study.model.config.residual:
        rows += graft_dimensions(study)
    print(f"\nprune   {study.unit}s, ranked on one set of c0 strings, scored on others; *: K chosen "
          f"on the first; random: {study.args.draws} draws\n  control: {study.control_note}")
    shown = [r for r in rows if r["k"] in KS and r["unit"] != "dimension"
             and r["split"] == ("c1" if r["operand"] == study.relation.ft else "c0")]
    keys = ("score", "order", "pool", "control", "edit", "operand", "split")
    pivot(shown, keys, lambda r: r["k"], lambda cell: percent(np.mean([
        r["accuracy"] for r in cell])) + "*" * any(r["chosen"] for r in cell))
    for r in rows:
        if r.get("dimension") and r["chosen"]:
            print(f"  graft all {r['side']} of {r['dimension']}, the best residual dimension on "
                  f"the other set: {r['operand']} {percent(r['accuracy'])} on {r['split']}")
    return study.write("prune", rows)


# ---------------------------------------------------------------- probe


def fit_probes(x, site, y, steps, rng, batch_size=96):
    """
    Linear probes, all trained at once: probe p maps x[site[p]] to the classes y[p]; x (sites, n,
    d), y (probes, n). AdamW, lr 1e-3, divided by 10 at 1/2, 3/4 and 7/8 of the steps (paper: of
    4K, at 2K, 3K and 3.5K), the same batches for all. Returns weight (probes, d, classes), bias
    (probes, 1, classes).
    """
    classes = int(y.max()) + 1
    weight = torch.zeros(len(y), x.shape[2], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(len(y), 1, classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-3)
    milestones = [steps // 2, steps * 3 // 4, steps * 7 // 8]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, .1)
    for _ in tqdm(range(steps), desc="probe", mininterval=.5, leave=False):
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


def residuals(model, examples, site, batch=128):
    """
    Residual stream, summed with the weights `site` (n, t) of positions: (blocks + 1, n, d), 0 the
    embedding, i after block i.
    """
    names = ["embed", *(f"blocks.{i}.resid_post" for i in range(len(model.blocks)))]
    parts = []
    for tokens, weights in zip(examples.tokens.split(batch), site.split(batch)):
        check_stop()
        cache = activations(model, tokens, names)[1]
        read = [torch.einsum("ntd,nt->nd", cache[name], weights) for name in names]
        parts.append(torch.stack(read))
    return torch.cat(parts, 1)


def auc(score, label):
    """
    Area under the ROC curve: how often a positive's score (n,) is the higher one, ties count half.
    """
    values, place, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[place].double()  # 1-based, mean of ties
    yes = int(label.sum())
    return ((rank[label.bool()].sum() - yes * (yes + 1) / 2) / (yes * (len(label) - yes))).item()


class Probe(NamedTuple):
    """One linear probe: what its rows say of it, what it reads, what it should say."""
    columns: dict    # model, block, target, prompt, labels
    site: int        # place among the activations
    labels: torch.Tensor  # (n,) on training strings
    tests: dict      # {split: (activations (m, d), Examples)}


def probes_of(study, probe_set, name, model, shuffle):
    """
    (activations (blocks + 1, n, d) on the training examples, the Probes of one model and set).
    """
    s, setup, probes = probe_set, study.setup, []
    seen = residuals(model, s.train, setup.site(s.train))
    # ours: standardised; an untrained model's residual is so small that 4K steps learn nothing
    mean, sd = seen.mean(1, keepdim=True), seen.std(1, keepdim=True) + 1e-8
    unseen = {}
    for split, x in s.tests.items():
        unseen[split] = (residuals(model, x, setup.site(x)) - mean) / sd
    for block, (target, column) in itertools.product(range(len(seen)), s.targets.items()):
        tests = {split: (x[block], s.tests[split]) for split, x in unseen.items()}
        true = s.train.labels[:, column]
        for kind in ("true", "shuffled"):
            if kind == "true" or (name == "ckpt" and target in s.shuffled):
                columns = dict(model=name, block=block, target=target, prompt=s.prompt, labels=kind)
                labels = true if kind == "true" else true[shuffle]
                probes.append(Probe(columns, block, labels, tests))
    return (seen - mean) / sd, probes


def probe_row(study, split, logits, target, examples):
    """What a probe got right on a test set, beside its floors."""
    setup, relation = study.setup, study.relation
    truth = examples.labels[:, setup.operands.index(target)]
    known = truth.max() < logits.shape[1]  # else a class is new, and no loss is defined
    values = dict(operand=target, split=split, n=len(truth), accuracy=accuracy(logits, truth),
                  floor=data.majority_floor(truth),
                  loss=F.cross_entropy(logits, truth).item() if known else None)
    if study.answers:
        other = relation.ft if target != relation.ft else relation.pt
        guess = examples.labels[:, setup.operands.index(other)]
        values["cross_floor"] = data.cross_floor(truth, guess)
    else:
        answer = logits.argmax(1)
        recalls = [(answer[truth == k] == k).float().mean().item() for k in (0, 1)]
        values.update(balanced=sum(recalls) / 2, auc=auc(logits[:, 1] - logits[:, 0], truth))
    return study.row(**values)


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
    feature (--control) below. All probes are trained together, on activations computed once. What
    is read and where: probe_sets() and site() of the setup.
    High: the information is linearly there. Low at every block: not linearly there at this
    position.
    Fooled by: targets that follow from others (c1 strings are left out; a + b + c = window, so c
    can be read wherever a and b can); a probe strong enough to learn the task itself (hence the
    untrained model); leaks between strings (shuffled labels must fall to the floor); words that
    tell a feature (hence the lower bound and the split `even`); a majority of three in four
    (balanced accuracy, AUC).
    """
    setup, rng = study.setup, data.rng(study.seed, "probe")
    untrained = GPT(Config(**study.ckpt["config"]))
    untrained.init_weights(data.rng(study.seed, "untrained")).to(study.device)
    models = {**study.models, "untrained": untrained}
    if study.never_trained and study.never_trained[0] is not study.model:
        models["control"] = study.never_trained[0]
    probes, x = [], []
    about = study.relation, study.control_operand, study.args.eval_size, study.seed
    for s in setup.probe_sets(*about, rng):
        shuffle = torch.randperm(len(s.train.labels), generator=rng) if s.shuffled else None
        for name, model in models.items():
            seen, more = probes_of(study, s, name, model, shuffle)
            probes += [p._replace(site=p.site + len(x)) for p in more]
            x += list(seen)
    labels = torch.stack([p.labels for p in probes])
    weight, bias = fit_probes(torch.stack(x), [p.site for p in probes], labels,
                              study.args.steps or 4000, rng)
    rows = []
    for p, w, c in zip(probes, weight, bias):
        for split, (unseen, examples) in p.tests.items():
            measured = probe_row(study, split, unseen @ w + c, p.columns["target"], examples)
            rows.append({**measured, **p.columns})
    print(f"\nprobe   linear, after each block; {len(labels[0])} training examples")
    value = "accuracy" if study.answers else "auc"
    shown = [r for r in rows if r["split"] != "c0"]
    pivot(shown, ("target", "prompt", "split", "model", "labels"),
          lambda r: f"{value} B{r['block']}", lambda cell: percent(cell[0][value]))
    return study.write("probe", rows)


def fit_classifier(source, setup, model, n):
    """A logistic regression a feature on pooled activations of n labelled records, half with it."""
    rng, fitted, held_out = data.rng(0, "judge"), [], []
    for sets, size, held in ((fitted, n, False), (held_out, max(2, n // 4), True)):
        for i, feature in enumerate(data.FEATURES):
            records = []
            for has in (True, False):
                records += source.draw(size // 2, rng, feature, has, held)
            x = pooled(model, setup, records)
            labels = torch.tensor([int(feature in r.features) for r in records], device=x.device)
            sets.append((x, labels))
    x, y = (torch.stack(parts) for parts in zip(*fitted))
    mean, sd = x.mean((0, 1)), x.std((0, 1)) + 1e-8
    weight, bias = fit_probes((x - mean) / sd, list(range(len(x))), y, 3000, rng)
    right = []
    for (x, y), w, b in zip(held_out, weight, bias):
        right.append(accuracy((x - mean) / sd @ w + b, y))
    return weight, bias, mean, sd, right


def pooled(model, setup, records):
    """(n, 2 d) mean activations of whole stories, of the middle and the last block."""
    examples = setup.examples(records, [False] * len(records))
    x = residuals(model, examples, setup.site(examples, width=setup.n_ctx))
    return x[[len(x) // 2, -1]].transpose(0, 1).flatten(1)


def classifier_of(study):
    """
    {feature: share of held-out records that the classifier gets right}; {} where a rule tells.
    Real text has no rule: a classifier is fitted on the pretrained model, on the same records with
    the same generator for every checkpoint that comes from it (the paper's judge: 92 %). Fooled
    by: texts unlike the corpus (a refusal gets features too); labels that do not describe the
    text.
    """
    setup, source = study.setup, getattr(study.setup, "source", None)
    if source is None or source.rule:
        return {}
    model = study.base or study.model
    if study.args.judge:
        model, _ = load(study.args.judge, study.device)
    weight, bias, mean, sd, right = fit_classifier(source, setup, model, 8 * study.args.eval_size)

    def classify(texts):
        records = []
        for text in texts:
            ids = np.array(setup.tokenizer.encode(text) or [0], np.uint16)
            records.append(data.Encoded(ids, 0, 0, len(ids), frozenset()))
        x = (pooled(model, setup, records) - mean) / sd
        yes = (x @ weight + bias).argmax(-1).T.tolist()  # (n, features)
        features = [frozenset(itertools.compress(data.FEATURES, line)) for line in yes]
        return [answer if text else None for answer, text in zip(features, texts)]
    source.classify = classify
    right = dict(zip(data.FEATURES, right))
    print("judge of real text: right on held-out records "
          + ", ".join(f"{k} {percent(x)}" for k, x in right.items()))
    return right


# ---------------------------------------------------------------- attention, hidden

EXAMPLES = 4  # strings whose whole maps are kept


def telling(study, test):
    """
    Places of the first strings that show something: answers for a and b differ, none is small.
    """
    a, b = (study.labels(test, o) for o in (study.relation.pt, study.relation.ft))
    return ((a > 1) & (b > 1) & (a != b)).nonzero()[:EXAMPLES, 0]


def stacked(model, examples, names, pick=lambda x: x):
    """Named activations of all examples: (n, names, ...); pick: what is kept of each."""
    parts = []
    for tokens in examples.tokens.split(128):
        check_stop()
        cache = activations(model, tokens, names)[1]
        parts.append(torch.stack([pick(cache[name]) for name in names], 1))
    return torch.cat(parts)


def program_overlap(pattern, program, letters):
    """
    {region: (mass, chance)} of a head's pattern (n, query, key) beside the compiled program's.
    kept: the overlap over all letters as queries, the sum over keys of the smaller of the two;
    chance: that of a uniform pattern. order: the probability that a letter which the program
    selects gets more attention than one that it does not (AUC). {} where the program does not use
    the head.
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
    that make each operand's answer, BOS, padding); chance: the share of positions that the region
    takes, what uniform attention would give. Compiled models also: how much of the program's
    pattern is kept, and whether letters keep their order (see program_overlap). Maps of the first
    strings go to <checkpoint>.attention.npz, of compiled models whole ones.
    Fooled by: reading too much into it. A head may look without using, and letters travel between
    positions in earlier blocks, so that attention to a position is not attention to its letter.
    """
    setup, relation, rows, maps = study.setup, study.relation, [], {}
    pair = (relation.pt, relation.ft)
    names = [f"blocks.{i}.attn.pattern" for i in range(len(study.model.blocks))]
    for prompt in pair if setup.prompted else pair[:1]:
        test = study.test(prompt, "natural")
        x, patterns = test.examples, {}
        regions = setup.regions(x, (*pair, study.control_operand))
        for name, model in study.models.items():
            rest = (lambda p: p[:, :, x.at:x.at + 1]) if setup.prompted else (lambda p: p)
            # (n, block, head, query, key)
            pattern = patterns[name] = stacked(model, x, names, rest)
            about = dict(operand=prompt, split="natural", n=len(pattern), model=name,
                         prompt=prompt if setup.prompted else None)
            if setup.prompted:
                maps[f"{name}_{prompt}"] = pattern[:8, :, :, 0].cpu().numpy()
            else:
                maps[name] = pattern[telling(study, test)].cpu().numpy()
            for block, head in np.ndindex(*pattern.shape[1:3]):
                here = pattern[:, block, head]
                at = here[:, 0 if setup.prompted else x.at]
                masses = {k: ((at * where).sum(1).mean().item(), where.float().mean().item())
                          for k, where in regions.items()}
                if setup.compiled:
                    program = patterns.get("base", pattern)[:, block, head]
                    masses.update(program_overlap(here, program, slice(1, setup.length + 1)))
                for region, (mass, chance) in masses.items():
                    rows.append(study.row(**about, block=block, head=head, region=region, mass=mass,
                                          chance=chance))
    shown = slice(8) if setup.prompted else telling(study, test)
    study.write_maps("attention", maps, study.test(pair[0], "natural").examples.rows(shown))
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
    test, rows, maps, seen = study.test(study.relation.pt, "natural"), [], {}, {}
    names = [f"blocks.{i}.mlp_post" for i in range(len(study.model.blocks))]
    few = telling(study, test)
    for name, model in study.models.items():
        seen[name] = stacked(model, test.examples, names)  # (n, block, position, unit)
        maps[name] = seen[name][few].cpu().numpy()
        for i in range(len(names)):
            x, program = seen[name][:, i], seen.get("base", seen[name])[:, i]
            cosine = None
            if program.any():
                cosine = F.cosine_similarity(x.flatten(), program.flatten(), 0).item()
            rows.append(study.row(operand=study.relation.pt, split="natural", n=len(x), model=name,
                                  block=i, cosine=cosine, active=(x > .1).float().mean().item()))
    study.write_maps("hidden", maps, test.examples.rows(few))
    print("\nhidden   units of the MLPs: cosine with the compiled model's, share that is on")
    table(["model", "block", "cosine", "on"],
          [[r["model"], r["block"], percent(r["cosine"]), percent(r["active"])] for r in rows])
    return study.write("hidden", rows)


# ---------------------------------------------------------------- revive

THRESHOLDS = (.9, .99)
FASTER = 3  # reFT must be so many times as fast as its control, which goes on that much longer


def steps_to(curve, threshold):
    """
    First evaluated step at which accuracy reaches the threshold, from [(step, accuracy)], or None.
    """
    return next((step for step, accuracy in curve if accuracy >= threshold), None)


def teach(study, start, operand, lr, max_steps):
    """
    Fine-tune a copy of `start` to answer for `operand` on its c0 strings, at a constant rate;
    evaluated on natural and c0 strings until both are at the largest threshold. Returns
    {split: [(step, accuracy)]}.
    """
    model, setup, relation = copy.deepcopy(start), study.setup, study.relation
    pair = [relation.pt if operand == relation.ft else operand, relation.ft]
    args = Namespace(task=relation.task, pair=pair, q=relation.q, operand=operand, c_tr=0.)
    batch = data.stream(lambda n, rng: setup.finetuning(n, rng, args), study.args.batch_size,
                        study.seed, "revive", study.device)
    n = min(400, study.args.eval_size)
    tests = {split: study.test(operand, split, n=n).examples for split in ("natural", "c0")}
    curves = {split: [] for split in tests}
    for step, _ in train_steps(model, optimizer_for(model, lr, setup),
                               lambda step: loss_of(model, batch(step)), constant(lr),
                               range(max_steps)):
        check_stop()
        if step % setup.teach_every == 0 or step == max_steps:
            for split, x in tests.items():
                curves[split].append((step, accuracy(predict(model, x), x.answer)))
            if all(curve[-1][1] >= THRESHOLDS[-1] for curve in curves.values()):
                break
    return curves


class Arm(NamedTuple):
    """What was taught at which rate, and how it went."""
    arm: str
    lr: float
    operand: str
    curves: dict     # {split: [(step, accuracy)]}
    max_steps: int
    seed: int


def pretraining_arm(study):
    """
    Pretraining itself, from its history: the Arm, or None where it was only scored at its ends.
    """
    ckpt, relation, curves = study.base_ckpt, study.relation, {}
    history = read_rows(os.path.splitext(ckpt["path"])[0] + ".jsonl")
    for split in ("natural", "c0"):
        about = (relation.task, relation.pt, split)
        rows = [r for r in history if (r["task"], r["operand"], r["split"]) == about]
        if len(rows) > 3 and ckpt["stage"] == "pretrain":
            curves[split] = [(r["step"], r["accuracy"]) for r in rows]
    args = ckpt["args"]
    return Arm("pretraining", args["lr"], relation.pt, curves, ckpt["steps"], args["seed"])


@analysis(needs_base=True, applies=has_answers)
def revive(study):
    """
    How fast does the capability come back, against a model that never had it? (paper Fig. 9)

    Reverse fine-tuning (reFT) on a with c0 strings, at the fine-tuning's rate (ours: matched
    rates) and a third of it (compiled models: a third and a tenth), constant after 20 steps.
    Controls, in the same way: teaching the never-trained operand to this very model (teach-c) and
    to its base (teach-c-base, with the noise that fine-tuning put on it), and pretraining itself,
    from its history. Steps to 90 % and 99 % on natural and on c0 strings. The controls go on three
    times as long as reFT needed: what has not come by then is shown as >=.
    Few steps compared with teach-c: it was there. teach-c much faster than pretraining is how much
    any good initialisation helps, which a comparison with training from scratch would have called
    a revival.
    Fooled by: steps at different rates; an easy target (hence c0, where another operand helps up
    to the cross floor at most); the control's token, which was never an input: part of what
    teach-c has to learn is what O_c means.
    """
    rates = [study.ckpt["args"]["lr"] / divisor for divisor in study.setup.reft_divisors]
    a, seed, limit = study.relation.pt, study.seed, study.args.steps or study.setup.revive_steps
    arms = []
    for lr in rates:
        arms.append(Arm("reft", lr, a, teach(study, study.model, a, lr, limit), limit, seed))
    step, reached = arms[0].curves["natural"][-1]
    longest = limit
    if reached >= THRESHOLDS[-1] and not study.args.steps:
        longest = max(30, FASTER * step)
    if study.never_trained:
        model, base, operand = study.never_trained
        for end, start in (("", model), ("-base", base)):
            if start:
                curves = teach(study, start, operand, rates[0], longest)
                arms.append(Arm(f"teach-{operand}{end}", rates[0], operand, curves, longest, seed))
    arms.append(pretraining_arm(study))
    rows, curve_rows, n = [], [], min(400, study.args.eval_size)
    for arm in arms:
        about = {"arm": arm.arm, "lr": arm.lr}
        for split, curve in arm.curves.items():
            floors = answer_floors(study.test(arm.operand, split, n=n))
            for threshold in THRESHOLDS:
                rows.append({**study.row(operand=arm.operand, split=split, **floors,
                                         accuracy=curve[-1][1]), "seed": arm.seed, **about,
                             "threshold": threshold, "steps": steps_to(curve, threshold),
                             "max_steps": arm.max_steps})
            for step, share in curve:
                curve_rows.append({**about, "step": step, "split": split, "accuracy": share,
                                   "seed": arm.seed})
    study.write("revive.curve", curve_rows)
    print(f"\nrevive   steps to 90 % and 99 %\n  control: {study.control_note}")
    pivot(rows, ("arm", "lr", "operand"), lambda r: f"{r['split']} {r['threshold']:.0%}",
          lambda cell: shown_steps(cell[0]["steps"], cell[0]["max_steps"]))
    return study.write("revive", rows)


def answer_floors(test):
    """Size and floors of a Test."""
    answer, other = test.examples.answer, test.other
    return {"n": len(answer), "floor": data.majority_floor(answer),
            "cross_floor": None if other is None else data.cross_floor(answer, other)}


def shown_steps(steps, max_steps):
    return f">= {max_steps}" if steps is None else steps


# ---------------------------------------------------------------- verdict

KNOWS = .9     # accuracy on natural strings from which on a model has a capability
MARGIN = .25   # by so much an accuracy must exceed what is possible without it
READS = .1     # by so much a probe must exceed those of its controls
APART = .05    # the bounds of a probe of stories must be so far apart, in AUC
INSTRUMENTS = ("pruning", "probing", "reviving")


class Evidence(NamedTuple):
    """
    One line of the verdict's table. Accuracies and AUC are fractions; holds None: cannot be said.
    """
    instrument: str
    question: str
    measured: float | None
    control: str
    control_measured: float | None
    margin: float             # by which it must win; of steps, a factor
    holds: bool | None
    unit: str = "share"       # or steps


def wins(measured, control, margin):
    """Whether a measurement is above its control by a margin; None where either is missing."""
    if measured is None or control is None:
        return None
    return measured - control >= margin


def select(rows, **values):
    """The rows that have these values."""
    def fits(r):
        return all(r.get(k) == v for k, v in values.items())
    return list(filter(fits, rows))


def picked(rows, column="accuracy", **values):
    """The largest value of a column among the rows that have these values; None without one."""
    return largest(*(r[column] for r in select(rows, **values)))


def largest(*values):
    """The largest of the values that are not None; None without one."""
    return max((v for v in values if v is not None), default=None)


def behavior_facts(study, rows):
    """Accuracies of a and b before and after, and what explains them on c0."""
    (task, a, b, _), v = study.relation, {}
    for role, o in (("pt", a), ("ft", b)):
        for model, split in itertools.product(("base", "ckpt"), SPLITS):
            where = dict(model=model, operand=o, split=split, task=task)
            v[f"{model}_{role}_{split}"] = picked(rows, **where)
        where = dict(model="ckpt", operand=o, split="c0", task=task)
        v[f"{role}_c0_cross_floor"] = picked(rows, "cross_floor", **where)
        v[f"{role}_c0_follows_a_plus_q"] = picked(rows, "share_a_plus_q", **where)
    return v


def prune_facts(study, rows):
    """
    Accuracy of a on c0 after the edits whose K was chosen on other strings, and of the controls.
    """
    order = "exhaustive" if study.setup.compiled and study.unit == "weight" else "iterative"
    rows = [r for r in rows if (r.get("chosen"), r["split"], r["pool"]) == (True, "c0", "all")
            and r["operand"] != study.relation.ft]
    v, own = {"prune_order": order}, dict(edit="zero", control=None)
    for name, where in (("prune", dict(own, score="gradient-weight", order=order)),
                        ("prune_one_pass", dict(own, score="gradient-weight", order="one-shot")),
                        ("graft", dict(own, score="gradient-change", edit="graft"))):
        v[f"{name}_c0"], v[f"{name}_k"] = picked(rows, **where), picked(rows, "k", **where)
    random = dict(own, score="random", order="one-shot" if order == "iterative" else order)
    draws = [r["accuracy"] for r in select(rows, **random)]
    v["random_draws"], v["random_c0_max"] = len(draws), largest(*draws)
    v["random_c0_mean"] = float(np.mean(draws)) if draws else None
    v["never_prune_c0"] = picked(rows, edit="zero", control="never-trained")
    return v


def probe_facts(study, rows):
    """
    What probes read while b is asked: the block is chosen on c0, the accuracy is of natural
    strings.
    """
    a, b, control = study.relation.pt, study.relation.ft, study.control_operand
    inside = study.never_trained and study.never_trained[0] is study.model
    v = {}
    for key, model, target in (("probe_natural", "ckpt", a), ("probe_untrained", "untrained", a),
                               ("never_probe", "ckpt" if inside else "control", control)):
        where = dict(model=model, target=target, prompt=b, labels="true")
        on_c0 = select(rows, split="c0", **where)
        best = max(on_c0, key=lambda r: r["accuracy"], default=None)
        where.update(split="natural", block=best and best["block"])
        v[key] = picked(rows, **where)
        if key == "probe_natural":
            v["probe_block"], v["probe_floor"] = where["block"], picked(rows, "floor", **where)
    if not study.never_trained:
        v["never_probe"] = None
    return v


def revive_facts(study, rows):
    """
    Steps to 99 % on natural strings, or to 90 % where neither reFT nor its control gets to 99.
    """
    v, lr = {}, study.ckpt["args"]["lr"] / study.setup.reft_divisors[0]
    for v["threshold"] in reversed(THRESHOLDS):
        control = f"teach-{study.control_operand}"
        for name, where in (("reft", dict(arm="reft", lr=lr)), ("control", dict(arm=control)),
                            ("pretraining", dict(arm="pretraining"))):
            where.update(split="natural", threshold=v["threshold"])
            reached, limit = (picked(rows, k, **where) for k in ("steps", "max_steps"))
            v[f"{name}_reached"] = None if limit is None else reached is not None
            v[f"{name}_steps"] = limit if reached is None else reached
        if v["reft_reached"] or v["control_reached"]:
            break
    return v


def answer_evidence(study, rows):
    """(numbers, Evidence lines) for a setup with answers."""
    (task, a, b, _), other = study.relation, study.control_operand
    v = {"task": task, "operands": [a, b], **behavior_facts(study, rows["behavior"]),
         **prune_facts(study, rows["prune"]), **probe_facts(study, rows["probe"]),
         **revive_facts(study, rows["revive"])}
    drawn = largest(v["random_c0_max"], v["never_prune_c0"])
    pruned = wins(v["prune_c0"], v["pt_c0_cross_floor"], MARGIN)
    pruned = pruned and wins(v["prune_c0"], drawn, MARGIN)
    blind = largest(v["probe_untrained"], v["never_probe"])
    read = wins(v["probe_natural"], blind, READS) and v["probe_natural"] >= KNOWS
    back = None
    if None not in (v["reft_steps"], v["control_steps"], v["ckpt_pt_natural"]):
        back = bool(v["ckpt_pt_natural"] < KNOWS and v["reft_reached"]
                    and FASTER * v["reft_steps"] <= v["control_steps"])
    lines = []
    for role, o, guess in (("pt", a, b), ("ft", b, a)):
        measured, floor = v[f"ckpt_{role}_c0"], v[f"{role}_c0_cross_floor"]
        lines.append(Evidence("behaviour", f"{o} is answered on c0, where the relation never holds",
                              measured, f"best guess from {guess}", floor, MARGIN,
                              wins(measured, floor, MARGIN)))
    return v, [
        *lines,
        Evidence("pruning", f"{a} on c0, {v['prune_k']} {study.unit}s zeroed ({v['prune_order']})",
                 v["prune_c0"], "best random draw or never-trained operand", drawn, MARGIN, pruned),
        Evidence("probing", f"{a} is read while {b} is asked, natural strings", v["probe_natural"],
                 "untrained model or never-trained operand", blind, READS, read),
        Evidence("reviving", f"steps of reFT until {a} is right on {v['threshold']:.0%}",
                 v["reft_steps"], f"teaching {other}" if study.never_trained else "none",
                 v["control_steps"], FASTER, back, "steps")]


def answer_rules(study, v, evidence):
    """
    The rules of the verdict, the first that holds: (word, whether, meaning).

        new        b is answered on c0 where the base could not: fine-tuning built it
        intact     a is still answered on c0 when it is asked for
        wrapped    a is not answered, b only where the shortcut serves, and at least two of the
                   three instruments find a
        lost       a is not answered, and none of the three finds it, each beside a control
        undecided  anything else

    Answered: above the cross floor by MARGIN. Found, by pruning (ours: ranked anew after each row):
    answered again, and above every random draw and the never-trained operand by MARGIN; by probing:
    90 % on natural strings, and READS above the untrained model and the never-trained operand; by
    reviving: in a third of the control's steps or less.
    """
    (_, a, b, q), answered, can = study.relation, evidence[0].holds, evidence[1].holds
    could = wins(v["base_ft_c0"], v["ft_c0_cross_floor"], MARGIN)
    by = ", ".join(v["found_by"]) or "no instrument"
    gone, shortcut = f"{a} is not answered any more", (v["ft_c0_follows_a_plus_q"] or 0) >= .5
    how = "and so is " + b + ": strongly relevant, no wrapper was needed" if can else (
        f"and {b} as {a}{q:+d}: a wrapper that only opens when {b} is asked" if shortcut else
        f"and {b} was not learned")
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
    feature, v = study.relation.pt, {"feature": study.relation.pt}
    scored = [r for r in rows["behavior"] if "parsed" in r]
    for r in select(scored, operand=feature):
        key = f"{r['model']}_{r['split']}"
        v[key], v[f"{key}_parsed"] = r["accuracy"], r["parsed"]
    fell = []
    for o in set(data.FEATURES) - {feature}:
        asked = [picked(scored, model=m, operand=o, split="asked") or 0. for m in ("base", "ckpt")]
        fell.append(asked[0] - asked[1])
    v["others_asked_fell_most"] = max(fell) if scored else None
    probes = select(rows["probe"], target=feature, labels="true", split="natural")
    bound = select(probes, model="base")
    v["probe_block"] = max(bound, key=lambda r: r["auc"], default={"block": None})["block"]
    for model in ("base", "ckpt", "control", "untrained"):
        v[f"{model}_auc"] = picked(probes, "auc", model=model, block=v["probe_block"])
    low, high = v["control_auc"], v["base_auc"]
    apart = None not in (low, high) and high - low >= APART
    v["between"] = (v["ckpt_auc"] - low) / (high - low) if apart else None
    before, after = v.get("base_asked"), v.get("ckpt_asked")
    half, middle = before and before / 2, (low + high) / 2 if apart else None
    bounds = "middle between never trained and pretrained" if apart else "none: bounds too near"
    return v, [
        Evidence("behaviour", f"{feature} is written when it is asked for", after,
                 "half of the pretrained model's share", half, 0., wins(after or 0., half, 0.)),
        Evidence("probing", f"AUC of {feature} at the story's end, block {v['probe_block']}",
                 v["ckpt_auc"], bounds, middle, 0., v["between"] > .5 if apart else None)]


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
    gone, (written, read) = f"{study.relation.pt} is not written any more", [
        e.holds for e in evidence]
    why = "for the bounds of its probe give --control" if v["control_auc"] is None else (
        "the bounds of its probe are too near each other")
    return [("undecided", (v.get("base_asked") or 0) < .5,
             f"the base hardly wrote {study.relation.pt} when asked"),
            ("intact", written, f"{study.relation.pt} is still written when it is asked for"),
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
    text = f"{word}: {meaning}."
    write_json(f"{study.prefix}.verdict.json", {
        "verdict": word, "text": text, "evidence": [e._asdict() for e in evidence], **v})
    print("\nEVIDENCE")
    table(["instrument", "question", "measured", "control", "control's", "holds"],
          [[e.instrument, e.question, shown(e.measured, e.unit), e.control,
            shown(e.control_measured, e.unit), {True: "yes", False: "no", None: "?"}[e.holds]]
           for e in evidence])
    print(textwrap.fill(f"VERDICT  {text}", 100, subsequent_indent="  "))


def shown(value, unit):
    """A measurement for people."""
    return value if unit == "steps" and value is not None else percent(value)


# ---------------------------------------------------------------- ask, generate


def ask(study):
    """
    One string: the answer, the truth and the rule it followed, base and fine-tuned side by side.
    """
    setup, (task, a, b, q) = study.setup, study.relation
    text, operand, alphabet = study.args.text or "", study.args.operand or b, setup.alphabet
    if operand not in setup.operands:
        raise UserError(f"--operand {operand}: there are {', '.join(setup.operands)}")
    if len(text) != setup.length or set(text) - set(alphabet):
        raise UserError(f"--text takes {setup.length} letters {alphabet[0]} to {alphabet[-1]}, as "
                        f"this model was trained on; for one: python data.py --setup {setup.name} "
                        f"--scale {setup.scale} --json")
    if setup.compiled and not setup.program.repeat and len(set(text)) < len(text):
        raise UserError(f"--text {text}: no letter may occur twice")
    letters = torch.tensor([[alphabet.index(x) for x in text]], device=study.device)
    r = dict(zip(setup.operands, setup.tasks[task].answers(letters, setup)[0].tolist()))
    if r[operand] < 0:
        raise UserError(f"--text has too few {operand} for {task}: there is no answer")
    first, names = setup.first_answer(task), [name.lstrip("#") for name in setup.output_names]

    def say(value):
        return names[value + first] if 0 <= value + first < len(names) else str(value)
    rules = {f"r({o})": r[o] for o in dict.fromkeys((a, b, study.control_operand, operand))}
    rules[f"r({a}) {q:+d}"] = r[a] + q
    print("\n".join(setup.explain(letters[0], task, operand)))
    print(f"{task} {operand}: the truth is {say(r[operand])}; "
          + ", ".join(f"{k} = {say(x)}" for k, x in rules.items()))
    for name, model in study.models.items():
        logits = predict(model, setup.ask(letters, task, operand))[0]
        share, top = logits.softmax(0).sort(descending=True)
        answer = top[0].item() - first
        followed = " = ".join(rule for rule, value in rules.items() if value == answer) or "no rule"
        likely = ", ".join(f"{names[i]}: {x:.1%}" for i, x in zip(top[:3].tolist(), share.tolist()))
        print(f"{name:<5} says {names[top[0]]:<3} {'right' if answer == r[operand] else 'wrong'}, "
              f"follows {followed}   ({likely})")


def generate_stories(study):
    """
    Stories to read: written to held-out instructions that ask for --features, and what they have.
    """
    setup, args = study.setup, study.args
    wanted = frozenset(f.strip() for f in (args.features or "").split(",") if f.strip())
    for unknown in sorted(wanted - set(data.FEATURES)):
        raise UserError(f"--features {unknown}: there are {', '.join(data.FEATURES)}")
    classifier_of(study)
    prompts = []
    for record in setup.source.draw(args.n, data.rng(study.seed, "look"), held_out=True):
        ids, start, _ = data.story_ids(record._replace(features=wanted), setup.tokenizer)
        prompts.append(ids[:start].tolist())
    draws = data.rng(study.seed, "look", "sample", device=study.device)
    written = generate(study.model, prompts, setup.n_ctx, draws)
    stories = [data.story_of(setup.tokenizer.decode(ids)) for ids in written]
    for prompt, story, features in zip(prompts, stories, setup.source.classify(stories)):
        print(setup.tokenizer.decode(prompt[1:]).strip())
        print(textwrap.fill(story, 100))
        names = [", ".join(data.ordered(x or ())) or "nothing" for x in (wanted, features)]
        has = "does not parse" if features is None else f"has: {names[1]}"
        print(f"  asked for: {names[0]}; {has}\n")


# ---------------------------------------------------------------- command line

COMMANDS = {"verdict": lambda setup: True, "ask": has_answers,
            "generate": lambda setup: not has_answers(setup)}
FLAGS = {"what to look at": [
    Flag("--ckpt", "checkpoint to look into", default="out/ft.pt"),
    Flag("--base", "what it was fine-tuned from; else the parent it names, its hash checked",
         default=None),
    Flag("--control", "a checkpoint that never had an operand, where this one has had them all; of "
         "stories, one pretrained --without the feature", default=None),
    Flag("--seed", "seed of test sets and draws; else the checkpoint's", int, -1, None),
    Flag("--eval-size", "strings in a test set", int, 0, 500)], "one analysis": [
    Flag("--unit", "prune: whole rows (neurons) or single weights; else rows, of compiled models "
         "weights", default=None, choices=("row", "weight")),
    Flag("--draws", "prune: matched random draws; else 8", int, 0, None),
    Flag("--steps", "most training steps; else probe 4000, revive 600 small, 6000 paper", int, 0,
         None),
    Flag("--batch-size", "revive: strings a step", int, 0, 96),
    Flag("--text", "ask: the string", default=None),
    Flag("--operand", "ask: what is asked for; else the fine-tuning's", default=None),
    Flag("--features", "generate: what to ask for, as Twist,Dialogue", default=None),
    Flag("-n", "generate: stories", int, 0, 3),
    Flag("--judge", "real stories: the pretrained checkpoint whose classifier marks them; else the "
         "one that --ckpt comes from", default=None)], **MACHINE}


def chosen_names(args, study):
    """The analyses to run. Raises UserError for analyses and flags that do not apply."""
    setup = study.setup
    for flag in ("draws", "unit", "text", "operand") if not study.answers else ():
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} is not for setup {setup.name}, which {args.ckpt} is of")
    applying = [name for name, about in ANALYSES.items() if about.applies(setup)]
    commands = [name for name, applies in COMMANDS.items() if applies(setup)]
    for name in args.analysis:
        if name not in applying + commands:
            raise UserError(f"{name} is not for setup {setup.name}, which {args.ckpt} is of; there "
                            f"are {', '.join(applying + commands)}")
        if not study.base and (name == "verdict" or name in ANALYSES and ANALYSES[name].needs_base):
            raise UserError(f"{name} needs a fine-tuned checkpoint: {args.ckpt} has no base")
    return [name for name in applying if name in args.analysis or (
        not args.analysis and (study.base or not ANALYSES[name].needs_base))]


def main():
    names = (*ANALYSES, *COMMANDS)
    args = parse(__doc__, "analyze", FLAGS, f"{', '.join(names)} (default: all that apply)")
    for name in args.analysis:
        if name not in names:
            raise UserError(f"no analysis {name!r}; there are {', '.join(names)}")
    for flag in itertools.chain(*FLAGS.values()):
        check_above(flag.name, getattr(args, flag.key), flag.above)
    try:
        study = Study(args, start_device(args))
        look(args, study)
    except ValueError as error:  # a file of stories that is gone, or has too few of a kind
        raise UserError(f"--ckpt {args.ckpt}: {error}") from None


def look(args, study):
    """Run what was asked for, then the verdict where all that it rests on is there."""
    names = chosen_names(args, study)
    args.draws = args.draws or 8
    for name, command in (("ask", ask), ("generate", generate_stories)):
        if name in args.analysis:
            return command(study)
    _, a, b, q = study.relation
    print(f"analyze {args.ckpt}: {study.ckpt['stage']}, O_PT {a}, O_FT {b}, q {q}"
          + (f", against {study.base_ckpt['path']}" if study.base else ""))
    rows = {name: ANALYSES[name].run(study) for name in names}
    needed = [name for name in ("behavior", "prune", "probe", "revive")
              if ANALYSES[name].applies(study.setup)]
    if "verdict" in args.analysis:  # from rows that are there already
        rows = {name: rows.get(name) or read_rows(f"{study.prefix}.{name}.jsonl")
                for name in needed}
        if not any(rows.values()):
            raise UserError(f"verdict needs the rows of {', '.join(needed)}: run them first")
    if study.base and all(name in rows for name in needed):
        verdict(study, {name: rows[name] for name in needed})


if __name__ == "__main__":
    run_script(main)
