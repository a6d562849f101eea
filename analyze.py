"""
Look inside a fine-tuned checkpoint: is the old capability deleted, or only wrapped?

    $ python analyze.py                                            # every analysis of out/ft.pt, then the verdict
    $ python analyze.py prune probe --ckpt out/ft.pt               # some of them
    $ python analyze.py ask --ckpt out/ft.pt --text abcab... --operand b

For out/ft.pt, rows go to out/ft.behavior.jsonl, out/ft.prune.jsonl, ... and the verdict to out/ft.verdict.json.
Each analysis has its control, run in the same way: an operand (or a model, --control) that never had the capability,
matched random rows, an untrained model, shuffled labels, majority and cross floors. Add one: write a function of a
Study below, add a line to ANALYSES.

Contents: the study | behavior | prune | probe | attention, hidden | revive | verdict | ask | stories | command line.
a stands for O_PT, the pretraining operand, and b for O_FT, the fine-tuning operand, whatever letters they are.
"""
import collections
import copy
import os
import textwrap
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import SPLITS, answer_position
from finetune import answer_loss, constant, finetuning_stream, pair_of
from model import (GPT, Config, UserError, activations, add_common_flags, check_stop, generate, load, positive,
                   read_rows, replace_file, run_parser, run_script, sha256, start_device, weight_edits,
                   write_json, write_rows)
from pretrain import (accuracy, add_noise, cosine, generation_scores, interval, optimizer_for, other_tests, predict, score,
                      story_losses, story_row, story_tests, test_set, train_steps)

# ---------------------------------------------------------------- the study


def find_parent(path, parent):
    """The file that the checkpoint at `path` was made from, where it was or beside it; its hash must agree."""
    beside = os.path.join(os.path.dirname(path), os.path.basename(parent["path"]))
    there = [p for p in (parent["path"], beside) if os.path.isfile(p)]
    for p in there:
        if sha256(p) == parent["sha256"]:
            return p
    raise UserError(f"{parent['path']} " + ("has changed since" if there else "is not there any more:")
                    + f" {path} was made from it; give it as --base")


class Study:
    """A checkpoint, what it came from, and its test sets: everything an analysis needs, and nothing it may change."""

    def __init__(self, args, device, model, ckpt):
        self.args, self.device, self.model, self.ckpt = args, device, model, ckpt
        self.sc = data.setup_of(self.ckpt)
        self.prefix = os.path.splitext(args.ckpt)[0]
        self.seed = self.ckpt["args"]["seed"] if args.seed is None else args.seed
        self.task, self.compiled = self.ckpt["capability"]["task"], self.ckpt["setup"] != "pcfg"
        self.pair, self.q = pair_of(self.ckpt)
        taken = {*self.pair, *self.ckpt["args"].get("taught", [])} if self.compiled else set(self.pair)
        self.third = next((o for o in self.sc.order if o not in taken), None)
        if self.third is None:
            raise UserError(f"{args.ckpt} was taught every operand: none is left as the control that it never had")
        self.base = self.base_ckpt = None
        parent = self.ckpt["parent"]
        if args.base and not parent:
            raise UserError(f"--base: {args.ckpt} was not fine-tuned from anything")
        if parent:
            self.base, self.base_ckpt = load(args.base or find_parent(args.ckpt, parent), self.device)
            if self.base_ckpt["config"] != self.ckpt["config"]:
                raise UserError(f"--base {args.base}: another shape or vocabulary than {args.ckpt}")
            # What fine-tuning began with: the base and its noise. Without the noise, "what has changed" would be the noise.
            self.start = self.noised(self.base)
        self.models = {"base": self.base, "ckpt": self.model} if self.base else {"ckpt": self.model}
        self.unit = args.unit or ("weight" if self.compiled else "row")
        self.never = self.find_never()
        self._tests = {}

    def noised(self, model):
        """A copy with the noise that this fine-tuning put on its base, none for most."""
        model = copy.deepcopy(model)
        add_noise(model, self.ckpt["args"].get("noise", 0), self.ckpt["args"]["seed"])
        return model

    def find_never(self):
        """
        The never-had-it control: (model, its base or None, operand), an operand that was trained in no family. Inside
        this very model where it has one, else from --control; None, with a note to print, without either.
        """
        def had(ckpt):
            if self.compiled:  # a program has one operand; self.third is one that was not taught since
                return False
            prior = ckpt["args"]["prior"][self.sc.operands.index(self.third)]
            return prior > 0 or self.third in ckpt["args"].get("taught", [])

        path = self.args.control
        if path and not had(self.ckpt):
            raise UserError(f"--control is not needed: {self.args.ckpt} itself never had operand {self.third}")
        if not had(self.ckpt):
            self.never_note = f"operand {self.third}, never trained, in the same model"
            return self.model, self.base and self.start, self.third
        if not path:
            self.never_note = f"none: operand {self.third} was trained; give a checkpoint with prior 0 for it as --control"
            return None
        control, ckpt = load(path, self.device)
        if ckpt["config"] != self.ckpt["config"] or had(ckpt):
            raise UserError(f"--control {path}: must have the shape of {self.args.ckpt} and prior 0 for {self.third}")
        self.never_note = f"operand {self.third}, never trained, in {path}"
        return control, None, self.third

    def test(self, operand, split, label="test", n=None):
        """A test set of this study (cached): `operand` asked on strings of its pair with b; see data.test_set."""
        pair = self.pair if operand in self.pair else (operand, self.pair[1])
        key = (operand, split, label, n)
        if key not in self._tests:
            self._tests[key] = test_set(n or self.args.eval_size, self.sc, self.task, operand, split, self.seed,
                                             pair, self.q, label, self.device)
        return self._tests[key]

    def result(self, test, operand):
        """The true answers (n,) for an operand on a test set, as numbers."""
        return test.results[:, self.sc.operands.index(operand)]

    def row(self, logits, test, /, **more):
        """A row of results: score() and the analysis's own keys."""
        return {**score(logits, test, self.sc, self.seed), **more}

    def measure(self, model, test, /, **more):
        """The row of a model on a test set."""
        return self.row(predict(model, test.tokens, self.sc), test, **more)

    def blank(self, **more):
        """A row that is about no test set."""
        empty = dict.fromkeys(("operand", "split", "accuracy", "floor", "cross_floor", "n", "loss"))
        return {"setup": self.ckpt["setup"], "scale": self.sc.name, "task": self.task, **empty, "seed": self.seed, **more}

    def write(self, name, rows):
        """Replace the file of an analysis: <checkpoint>.<name>.jsonl."""
        write_rows(f"{self.prefix}.{name}.jsonl", rows)

    def bar(self, total, what):
        """A progress bar."""
        return tqdm(total=total, desc=what, mininterval=.5, leave=False)


def percent(x):
    """A fraction as people read it."""
    return "-" if x is None else f"{x:.1%}"


def table(head, rows):
    """Print rows of cells under a heading, in columns as wide as they need to be."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  " + "  ".join(cells).rstrip())


# ---------------------------------------------------------------- behavior


def rule_shares(answer, a, b, q):
    """
    Share of answers (n,) that each rule would give, from the true results a and b (n,): the right answers for a and b,
    a + q (the shortcut), the blend (a + b + q) / 2 rounded down (right whenever the relation holds), and the most
    frequent answer itself. They may overlap; none: no rule explains the answer.
    """
    rules = {"a": answer == a, "b": answer == b, "a_plus_q": answer == a + q, "blend": answer == (a + b + q) // 2,
             "constant": answer == answer.mode().values}
    rules["none"] = ~torch.stack(list(rules.values())).any(0)
    return {f"share_{k}": v.sum().item() / len(answer) for k, v in rules.items()}


def distance_moved(study):
    """How far fine-tuning moved the weights after its noise, in all and per block: norms, and its sum of rates."""
    parts = collections.defaultdict(float)
    for (name, new), old in zip(study.model.named_parameters(), study.start.parameters()):
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks") else "outside"
        parts[part] += (new - old).detach().double().square().sum().item()
    args = study.ckpt["args"]
    rate_at = constant(args["lr"]) if args["reverse"] else cosine(args["lr"], args["steps"], final=.01)
    return study.blank(model="ckpt", distance=sum(parts.values()) ** .5,
                       distance_blocks={name: square ** .5 for name, square in parts.items()},
                       base_norm=sum(p.double().square().sum().item() for p in study.base.parameters()) ** .5,
                       sum_of_rates=sum(map(rate_at, range(args["steps"]))))


def behavior(study):
    """
    What does the model answer, and by which rule? (paper: PCFG setup, Tables 5-8, and the rule behind the accuracy)

    Accuracy for both operands on c0, c1 and natural strings, the fine-tuned model beside its base; the share of answers
    that each simple rule explains; the histogram of answers; accuracy on the other families (collateral damage); and
    how far the weights moved. On c1 the rules a + q and b coincide: only c0 tells a wrapper from a learner.
    Fooled by: a test set where ties or the relation occur by accident (natural ones do: hence c0); a majority class
    (hence the floors); damage that looks like a wrapper (hence the other families).
    """
    rows = []
    for name, model in study.models.items():
        for operand in study.pair:
            for split in SPLITS:
                test = study.test(operand, split)
                logits = predict(model, test.tokens, study.sc)
                a, b = (study.result(test, o) for o in study.pair)
                said = logits.argmax(1) - study.sc.tasks[study.task].first_answer
                rows.append(study.row(logits, test, model=name, predicted=histogram_of(logits, study),
                                      **rule_shares(said, a, b, study.q)))
        for test in other_tests(study.args.eval_size, study.sc, study.pair, study.seed, study.device, but=study.task):
            rows.append(study.measure(model, test, model=name))
    if study.base:
        rows.append(distance_moved(study))
    study.write("behavior", rows)

    a, b = study.pair
    print(f"\nbehavior   O_PT = {a}, O_FT = {b}, n = {study.args.eval_size}; on the right the share of answers that "
          "each rule explains (they overlap)")
    rules = ("a", "b", "a_plus_q", "blend", "constant", "none")
    table(["asked", "split", "model", "accuracy", "floor", "cross", "|", a, b, f"{a}{study.q:+d}", *rules[3:]],
          [[r["operand"], r["split"], r["model"], *(percent(r[k]) for k in ("accuracy", "floor", "cross_floor")), "|",
            *(percent(r[f"share_{rule}"]) for rule in rules)] for r in rows if "share_a" in r])
    others = {(r["task"], r["operand"] or "-", r["model"]): r for r in rows if r["task"] != study.task}
    if others:
        print("  other families, natural strings (collateral)")
        table(["family", "asked", *study.models, "floor"],
              [[*key, *(percent(others[*key, m]["accuracy"]) for m in study.models), percent(others[*key, "ckpt"]["floor"])]
               for key in dict.fromkeys(k[:2] for k in others)])
    if study.base:
        print(f"  the weights moved by {rows[-1]['distance']:.3f} (norm; the base's is {rows[-1]['base_norm']:.1f}); "
              f"sum of learning rates {rows[-1]['sum_of_rates']:.2g}")
    return rows


# ---------------------------------------------------------------- prune

KS = (0, 1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 100)
FEW = 10  # the claim is about a few units: K is chosen among those up to this
MATRICES = ("attn.qkv", "attn.out", "up", "down")
TRIED = 100  # single weights of a compiled model that are zeroed one by one


def unit_parameters(model, unit):
    """
    {(block, matrix): [parameter names]} of what can be pruned: rows of the matrices in blocks with their bias entry, or
    single weights. Of a compiled model these are all its weights, embeddings and biases too (block None), for its
    program is written into them; the output map is not a weight of either.
    """
    blocks = range(len(model.blocks))
    if unit == "row":
        return {(i, m): [f"blocks.{i}.{m}.{kind}" for kind in ("weight", "bias")] for i in blocks for m in MATRICES}
    compiled = not model.config.train_head
    found = {(i, f"{m}.{kind}"): [f"blocks.{i}.{m}.{kind}"] for i in blocks for m in MATRICES
             for kind in (("weight", "bias") if compiled else ("weight",))}
    return {**found, **{(None, name): [name] for name in ("tok.weight", "pos.weight") if compiled}}


def unit_scores(model, test, sc, unit, minus=None):
    """
    First-order effect of removing each unit (paper: protocols): gradient x weight of the cross-entropy on a test set,
    summed over a row and its bias entry, or weight by weight. With `minus`, gradient x (weight - that model's weight),
    the effect of grafting. Returns {(block, matrix): scores (rows,) or (weights,)}.
    """
    model.zero_grad()
    for part, target in zip(test.tokens.split(256), test.target.split(256)):
        check_stop()
        (F.cross_entropy(model(part, answer_position(sc)), target, reduction="sum") / len(test.target)).backward()
    theirs = dict(minus.named_parameters()) if minus else {}
    scores = {}
    with torch.no_grad():
        for key, names in unit_parameters(model, unit).items():
            effects = []
            for name in names:
                p = model.get_parameter(name)
                effects.append(p.grad * (p - theirs[name] if minus else p))
            scores[key] = effects[0].sum(1) + effects[1] if unit == "row" else effects[0].flatten()
    model.zero_grad()
    return scores


def only_zero(scores, program):
    """The scores of the weights that are zero in a compiled program; -inf for those that it is written in."""
    zero = dict(program.named_parameters())
    names = unit_parameters(program, "weight")
    return {key: torch.where(zero[names[key][0]].flatten() == 0, x, -torch.inf) for key, x in scores.items()}


def ranked_units(scores, most):
    """The `most` units with the largest positive scores: a list of (block, matrix, index, score)."""
    keys = list(scores)
    flat = torch.cat([scores[k] for k in keys])
    sizes = torch.tensor([len(scores[k]) for k in keys])
    first = sizes.cumsum(0) - sizes
    values, places = flat.topk(min(most, int((flat > 0).sum())))
    which = torch.searchsorted(first, places.cpu(), right=True) - 1
    return [(*keys[w], int(p - first[w]), v) for w, p, v in zip(which.tolist(), places.tolist(), values.tolist())]


def iterated_units(model, test, sc, unit, most):
    """
    ours: the same ranking, made anew after every zeroed unit. One pass takes many units that do the same thing, each of
    which would do; after the first is gone, the others no longer score.
    """
    units = []
    for _ in range(most):
        with weight_edits(model, unit_edits(model, units, unit)):
            ranked = ranked_units(unit_scores(model, test, sc, unit), most + 1)
        taken = {u[:3] for u in units}
        units += [u for u in ranked if u[:3] not in taken][:1]
    return units


def tried_units(model, units, test, sc, unit):
    """
    ours: the first TRIED of these units in the order of what zeroing each alone does for the accuracy on a test set:
    a linear score says little about a compiled weight of 100.
    """
    def alone(u):
        with weight_edits(model, unit_edits(model, [u], unit)):
            return accuracy(predict(model, test.tokens, sc), test.target)
    return sorted(units[:TRIED], key=alone, reverse=True)


def matched_units(units, scores, g, program=None):
    """
    Random units, rank by rank from the same block and matrix as `units` (queries, keys and values apart): the control
    for which ones were chosen. With a compiled program, weights that it is written in and its zeros apart as well.
    """
    written = {k: x == -torch.inf for k, x in only_zero(scores, program).items()} if program else None

    def pool_of(block, matrix, index):
        part = index * 3 // len(scores[block, matrix]) if matrix.startswith("attn.qkv") else 0
        return block, matrix, part, bool(written[block, matrix][index]) if program else False
    pools = collections.defaultdict(list)
    for block, matrix in scores:
        for index in torch.randperm(len(scores[block, matrix]), generator=g).tolist():
            pools[pool_of(block, matrix, index)].append(index)
    return [(block, matrix, pools[pool_of(block, matrix, index)].pop(), None) for block, matrix, index, _ in units]


def unit_edits(model, units, unit, base=None):
    """The weight_edits() that zero these units, or graft them: set them back to the base model's values."""
    source = dict(base.named_parameters()) if base else None
    names, edits = unit_parameters(model, unit), []
    for block, matrix, index, _ in units:
        for name in names[block, matrix]:
            at = index if unit == "row" else tuple(int(i) for i in np.unravel_index(index, model.get_parameter(name).shape))
            edits.append((name, at, source[name][at].detach() if base else 0.))
    return edits


def unit_name(model, u, unit):
    """A unit for people: blocks.1.up[3], or blocks.1.up.weight[3, n_a:share], residual dimensions by their names."""
    names = model.config.residual
    if unit == "row":
        return f"blocks.{u[0]}.{u[1]}[{u[2]}]"
    [name] = unit_parameters(model, unit)[u[0], u[1]]
    at = [int(i) for i in np.unravel_index(u[2], model.get_parameter(name).shape)]
    writes = name.endswith(("out.weight", "out.bias", "down.weight", "down.bias"))  # else the last index is the residual's
    which = 0 if writes else None if name.endswith("bias") else 1
    return f"{name}[{', '.join(names[i] if names and k == which else str(i) for k, i in enumerate(at))}]"


def prune(study):
    """
    Do a few units hold the wrapper? (paper: protocols, Figs. 7 and 55-59)

    One backward pass of the cross-entropy of "count a" on the fine-tuned model; score = gradient x weight, summed over
    a row (a neuron) and its bias, or --unit weight; the K largest positive scores are edited at once: set to zero, or
    grafted, set back to the base model's values. ours: also ranked anew after every zeroed unit (iterated), and for
    grafting by its own first-order score, gradient x change. Scores and K (up to 10) come from one set of c0 strings,
    accuracies from another. Compiled models: single weights, all of them or (compiled-zero) those that are zero in the
    program; ours: the first 100 of a ranking, tried one by one; and grafting of whole residual dimensions (dimension).
    High accuracy on a after few edits: the answer was there, and these units kept it from being read. It does not say
    that the change sits in these units: a zeroed unit is a lever, only grafting undoes what fine-tuning did.
    Fooled by: any damage that happens to shift answers by q (hence random units from the same matrices, --draws of
    them, with K chosen in the same way: zeroed ones matched to the iterated ranking and then to the one in one pass,
    grafted ones to that by change); a method that finds units for anything (hence never-had: the same procedure for an
    operand that was never trained).
    """
    if not study.base:
        raise UserError(f"prune needs a fine-tuned checkpoint: {study.args.ckpt} has no base")
    unit, (a, b) = study.unit, study.pair
    sweeps, ranked = prune_sweeps(study)
    rows, choices = [], []
    if not study.never:
        rows.append(study.blank(unit=unit, ranking="never-had", edit="zero", k=None, draw=None, note=study.never_note))
    bar = study.bar(len(sweeps), "prune")
    for s in sweeps:
        n = None if s.draw is None else min(200, study.args.eval_size)  # eight draws together get more than a ranking
        tests = [study.test(s.operand, "c0", n=n), study.test(b, "c1", n=n)]
        if s.draw is None:
            tests += [study.test(s.operand, "natural")]
        if s.ranking.startswith("gradient-weight"):
            tests += [study.test(a, "c1"), study.test(b, "c0"), study.test(b, "natural")]
        swept, tried = [], []
        for k in (0, *(k for k in s.ks if k <= len(s.units))):
            with weight_edits(s.model, unit_edits(s.model, s.units[:k], unit, s.base if s.edit == "graft" else None)):
                if k <= FEW:  # the fewest units that do best on the selection set
                    tried.append((study.measure(s.model, study.test(s.operand, "c0", "select", n))["accuracy"], -k))
                for test in tests:
                    logits = predict(s.model, test.tokens, study.sc)
                    swept.append(study.row(logits, test, unit=unit, ranking=s.ranking, edit=s.edit, k=k, draw=s.draw))
                    if study.compiled and s.draw is None and test is tests[0]:  # it still predicts many classes
                        swept[-1]["predicted"] = histogram_of(logits, study)
        rows += [dict(r, chosen=r["k"] == -max(tried)[1]) for r in swept]
        choices += [r for r in rows[-len(swept):] if r["chosen"] and r["operand"] == s.operand]
        bar.update()
    bar.close()
    study.write("prune.rows", [dict(zip(("ranking", "rank", "block", "matrix", "index", "score", "name"),
                                        (ranking, i + 1, *u, unit_name(study.model, u, unit))))
                               for ranking, units in ranked.items() for i, u in enumerate(units[:KS[-1]])])

    rows += graft_dimensions(study) if study.compiled and study.model.config.residual else []
    study.write("prune", rows)

    print(f"\nprune   {unit}s ranked on one set of c0 strings, scored on another (accuracy on c0; for {b} on c1); "
          f"random: mean of {study.args.draws} draws\n  never-had control: {study.never_note}")
    cells = collections.defaultdict(list)
    for r in rows:
        if r["k"] in KS and r.get("dimension") is None and r["split"] == ("c1" if r["operand"] == b else "c0"):
            cells[r["ranking"], r["edit"], r["operand"], r["k"]].append(r["accuracy"])
    best = {key: " ".join(dict.fromkeys(str(c["k"]) for c in choices if (c["ranking"], c["edit"], c["operand"]) == key))
            for key in dict.fromkeys(k[:3] for k in cells)}
    table(["ranking", "edit", "asked", *KS, f"best K <= {FEW}"],
          [[*key, *(percent(np.mean(cells[*key, k])) if (*key, k) in cells else "" for k in KS), best[key]] for key in best])
    dims = [r for r in rows if r.get("dimension") and r["chosen"]]
    for on_a, on_b in zip(dims[::2], dims[1::2]):
        print(f"  graft all {on_a['ranking']} of one residual dimension, {on_a['dimension']} (the best on the other set): "
              f"{a} {percent(on_a['accuracy'])} on c0, {b} {percent(on_b['accuracy'])} on c1")
    return choices


def prune_sweeps(study):
    """
    What prune() goes through: a list of sweeps (model, base, operand, ranking, edit, units in order, Ks, draw), and
    {ranking: units} of the three rankings of the fine-tuned model.
    """
    a, unit, most, sweeps = study.pair[0], study.unit, study.args.most, []
    program = study.base if study.compiled and unit == "weight" else None

    def add(model, base, operand, ranking, edit, units, ks, draw=None):
        sweeps.append(SimpleNamespace(model=model, base=base, operand=operand, ranking=ranking, edit=edit, units=units,
                                      ks=[k for k in ks if k <= most], draw=draw))

    def rank(model, operand, minus=None, upto=KS[-1]):
        scores = unit_scores(model, study.test(operand, "c0", "select"), study.sc, unit, minus)
        return ranked_units(scores, upto), scores

    def anew(model, operand):
        return iterated_units(model, study.test(operand, "c0", "select"), study.sc, unit, min(FEW, most))

    def tried(model, units, operand):
        return tried_units(model, units, study.test(operand, "c0", "select"), study.sc, unit)

    here = study.model, study.start, a
    one_pass, scores = rank(study.model, a)
    total, few, every = sum(map(len, scores.values())), [k for k in KS if 0 < k <= FEW], KS[1:]
    far = (*every, *(200 * 2 ** i for i in range(30) if 400 * 2 ** i <= total))  # grafting needs many
    far = [k for k in far if k <= most]
    some = sorted({FEW, KS[-1], 400, far[-1]})
    iterated = anew(study.model, a)
    change, _ = rank(study.model, a, minus=study.start, upto=far[-1])
    add(*here, "gradient-weight", "zero", one_pass, every)
    add(*here, "gradient-weight-iterated", "zero", iterated, few)
    add(*here, "gradient-weight", "graft", one_pass, some)
    add(*here, "gradient-change", "graft", change, far)
    rankings = {"gradient-weight": one_pass, "gradient-weight-iterated": iterated, "gradient-change": change}
    if program:
        zeros = ranked_units(only_zero(scores, program), KS[-1])
        rankings.update({"gradient-weight-tried": tried(study.model, one_pass, a), "compiled-zero": zeros,
                         "compiled-zero-tried": tried(study.model, zeros, a)})
        for name in ("gradient-weight-tried", "compiled-zero", "compiled-zero-tried"):
            add(*here, name, "zero", rankings[name], few)
    taken = {u[:3] for u in iterated}
    zeroed = iterated + [u for u in one_pass if u[:3] not in taken][:len(one_pass) - len(iterated)]
    for draw in range(study.args.draws):
        g = data.rng(study.seed, "prune", draw)
        add(*here, "random", "zero", matched_units(zeroed, scores, g, program), every, draw)
        add(*here, "random", "graft", matched_units(change, scores, g, program), some, draw)
        for name in ("gradient-weight", "compiled-zero") if program else ():
            units = matched_units(rankings[name], scores, g, program)
            add(*here, f"random-{name.split('-')[1]}-tried", "zero", tried(study.model, units, a), few, draw)
    if study.never:
        model, base, operand = study.never
        one = rank(model, operand)[0]
        add(*study.never, "never-had", "zero", one, every)
        if program:
            add(*study.never, "never-had-tried", "zero", tried(model, one, operand), few)
        add(*study.never, "never-had-iterated", "zero", anew(model, operand), few)
        if base:
            add(*study.never, "never-had-change", "graft", rank(model, operand, minus=base, upto=far[-1])[0], some)
    return sweeps, rankings


def histogram_of(logits, study):
    """Which answers the model gives, and how often: {answer: count}."""
    names = data.answer_names(study.sc)
    counts = collections.Counter(names[i].lstrip("#") for i in logits.argmax(1).tolist())
    return dict(counts.most_common())


def graft_dimensions(study):
    """
    ours: set everything that writes one residual dimension, or everything that reads it, back to what fine-tuning began
    with. In a compiled model dimensions have names, so this tells in which variable of the program the change sits.
    """
    model, old, rows = study.model, dict(study.start.named_parameters()), []
    sets = [study.test(study.pair[0], "c0", "select"), study.test(study.pair[0], "c0"), study.test(study.pair[1], "c1")]
    columns = {"writers": ("tok.weight", "pos.weight"), "readers": ("attn.qkv.weight", "up.weight")}
    rowwise = {"writers": ("attn.out.weight", "attn.out.bias", "down.weight", "down.bias"), "readers": ()}
    for side in columns:
        for d, name in enumerate(model.config.residual):
            edits = [(p, (slice(None), d), old[p][:, d].detach()) for p in old if p.endswith(columns[side])]
            edits += [(p, d, old[p][d].detach()) for p in old if p.endswith(rowwise[side])] if rowwise[side] else []
            with weight_edits(model, edits):
                tried = study.measure(model, sets[0])["accuracy"]
                rows += [study.measure(model, test, unit="dimension", ranking=side, edit="graft", k=1, draw=None,
                                       dimension=name, selected=tried) for test in sets[1:]]
    for side in columns:  # chosen: the best on the selection set
        here = [r for r in rows if r["ranking"] == side]
        best = max(here, key=lambda r: r["selected"])["dimension"] if here else None
        for r in here:
            r["chosen"] = r["dimension"] == best
    return rows


# ---------------------------------------------------------------- probe


def fit_probes(x, site, y, steps, g, bar, batch_size=96):
    """
    Linear probes, all trained at once: probe p maps x[site[p]] to the classes y[p]; x (sites, n, d), y (probes, n).
    AdamW, lr 1e-3, divided by 10 at 1/2, 3/4 and 7/8 of the steps (paper: protocols: of 4K, at 2K, 3K and 3.5K), the
    same batches of 96 for all. Returns weight (probes, d, classes) and bias (probes, 1, classes).
    """
    classes = int(y.max()) + 1
    weight = torch.zeros(len(y), x.shape[2], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(len(y), 1, classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4, steps * 7 // 8], .1)
    for _ in range(steps):
        check_stop()
        pick = torch.randint(x.shape[1], (batch_size,), generator=g).to(x.device)
        logits = torch.baddbmm(bias, x[:, pick][site], weight)
        loss = F.cross_entropy(logits.flatten(0, 1), y[:, pick].flatten(), reduction="sum") / batch_size
        optimizer.zero_grad()
        loss.backward()  # a sum over probes: each gets the gradient it would have alone, and AdamW acts entry by entry
        optimizer.step()
        schedule.step()
        bar.update()
    return weight.detach(), bias.detach()


def residuals(model, tokens, sc, batch=256):
    """Residual stream at the position that predicts the answer: (blocks + 1, n, d), 0 the embedding, i after block i."""
    names = ["embed"] + [f"blocks.{i}.resid_post" for i in range(len(model.blocks))]
    at, parts = answer_position(sc), []
    for part in tokens.split(batch):
        check_stop()
        cache = activations(model, part, names, at)[1]  # of the last block there is the answer position alone
        parts.append(torch.stack([x[:, at] if x.shape[1] > 1 else x[:, 0] for x in map(cache.get, names)]))
    return torch.cat(parts, 1)


def probe(study):
    """
    Can the answer for a still be read off the residual stream? (paper: protocols, Fig. 8)

    A linear probe after every block (0: the embedding), at the position that predicts the answer, trained on half
    natural, half c0 strings and tested on new ones of both; targets a, b, c; asked for the target itself and for b, for
    the question is whether r(a) is there while b is asked. All sites and targets are trained together, on
    activations computed once.
    High: the information is linearly there. Low at every block: not linearly there at this position.
    Fooled by: targets that follow from others (c1 strings are left out; a + b + c = window, so c can be read wherever
    a and b can: compare with the untrained model and with floors); a probe strong enough to learn the task itself
    (untrained model); leaks between strings (shuffled labels must fall to the floor).
    """
    sc, n, (a, b) = study.sc, study.args.eval_size, study.pair
    untrained = GPT(Config(**study.ckpt["config"])).init_weights(data.rng(study.seed, "untrained")).to(study.device)
    g = data.rng(study.seed, "probe")
    train = [test_set(5 * n, sc, study.task, b, split, study.seed, study.pair, study.q, "probe", study.device)
             for split in ("natural", "c0")]
    tests = [study.test(b, split) for split in ("natural", "c0")]
    results = torch.cat([s.results for s in train])
    shuffle = torch.randperm(len(results), generator=g).to(study.device)
    asked = {prompt: [prompt] if prompt != b else [a, b, study.third] for prompt in dict.fromkeys([a, b, study.third])
             if prompt == b or not study.compiled}  # compiled models have no prompt

    models = {**study.models, "untrained": untrained}
    if study.never and study.never[0] is not study.model:
        models["control"] = study.never[0]

    x, held, keys, site, y = [], [], [], [], []  # held: the sites' activations on test strings; site: place in x
    for name, model in models.items():
        for prompt, targets in asked.items():
            seen, new = ([residuals(model, data.questions(s.text, study.task, prompt, sc)[:, :-1], sc) for s in sets]
                         for sets in (train, tests))
            seen, new = torch.cat(seen, 1), torch.stack(new, 1)  # (blocks + 1, n, d), (blocks + 1, split, n, d)
            # ours: standardised, since an untrained model's residual is so small that 4K steps at 1e-3 learn nothing
            mean, sd = seen.mean(1, keepdim=True), seen.std(1, keepdim=True) + 1e-8
            for block in range(len(seen)):
                for target in targets:
                    for labels in ("true", "shuffled") if (name, prompt) == ("ckpt", b) else ("true",):
                        truth = results[:, sc.operands.index(target)]
                        keys.append(dict(model=name, block=block, target=target, prompt=prompt, labels=labels))
                        site.append(len(x))
                        y.append(truth if labels == "true" else truth[shuffle])
                x.append(((seen - mean) / sd)[block])
                held.append(((new - mean[:, None]) / sd[:, None])[block])
    bar = study.bar(study.args.steps or 4000, "probe")
    weight, bias = fit_probes(torch.stack(x), site, torch.stack(y), bar.total, g, bar)
    bar.close()
    rows = []
    for key, i, w, c in zip(keys, site, weight, bias):
        for test, new in zip(tests, held[i]):
            logits, truth = new @ w + c, study.result(test, key["target"])
            seen = truth.max() < logits.shape[1]  # else a class is new, and no loss is defined
            other = study.result(test, b if key["target"] != b else a)
            rows.append(study.blank(operand=key["target"], split=test.split, n=len(truth), **key,
                                    accuracy=accuracy(logits, truth),
                                    floor=data.majority_floor(truth), cross_floor=data.cross_floor(truth, other),
                                    loss=F.cross_entropy(logits, truth).item() if seen else None))
    study.write("probe", rows)

    print(f"\nprobe   linear, at the answer position, {len(results)} training strings; accuracy on {n} natural strings "
          "after each block")
    groups = collections.defaultdict(list)
    for r in rows:
        if r["split"] == "natural":
            groups[r["target"], r["prompt"], r["model"], r["labels"]].append(r)
    table(["target", "asked", "model", "labels", *(f"B{i}" for i in range(len(study.model.blocks) + 1)), "floor"],
          [[*key, *(percent(r["accuracy"]) for r in got), percent(got[0]["floor"])] for key, got in groups.items()])
    return rows


# ---------------------------------------------------------------- attention


def attention(study):
    """
    Where does the answer position look? (paper: protocols; Figs. 10, 39-45 for the compiled models)

    The attention pattern of the position that predicts the answer, per block and head, on natural strings, asked for a
    and for b, base and fine-tuned side by side. mass: mean attention on a region (the window, the letters outside
    it, and a, b, c within the window); chance: the share of positions that the region takes, what uniform attention
    would give. Maps of the first strings go to <checkpoint>.attention.npz.
    Fooled by: reading too much into it. A head may look without using, and letters travel between positions in
    earlier blocks, so that attention to a position is not attention to its letter.
    """
    if study.compiled:
        return program_attention(study)
    sc, rows, maps = study.sc, [], {}
    at, width = answer_position(sc), answer_position(sc) + 1
    names = [f"blocks.{i}.attn.pattern" for i in range(len(study.model.blocks))]
    first = 5  # SOS T O O' SOT come before the text
    for model_name, model in study.models.items():
        for prompt in study.pair:
            test = study.test(prompt, "natural")
            parts = []
            for part in test.tokens.split(128):
                check_stop()
                cache = activations(model, part, names)[1]
                parts.append(torch.stack([cache[name][:, :, at] for name in names], 1))
            pattern = torch.cat(parts)  # (n, block, head, position)
            maps[f"{model_name}_{prompt}"] = pattern[:8].cpu().numpy()
            letters = torch.full((len(test.text), width), -1, device=study.device)
            letters[:, first:first + sc.length] = test.text
            window = torch.zeros(width, dtype=torch.bool, device=study.device)
            window[first + sc.length - sc.window:first + sc.length] = True
            regions = {"window": window & (letters >= 0), "outside": ~window & (letters >= 0)}
            regions.update({letter: window & (letters == i) for i, letter in enumerate(sc.operands)})
            for region, where in regions.items():
                mass = (pattern * where[:, None, None]).sum(-1).mean(0)
                for block in range(mass.shape[0]):
                    for head in range(mass.shape[1]):
                        rows.append(study.blank(operand=prompt, split="natural", n=len(test.text), model=model_name,
                                                block=block, head=head, prompt=prompt, region=region,
                                                mass=mass[block, head].item(), chance=where.float().mean().item()))
    maps["tokens"] = study.test(study.pair[0], "natural").tokens[:8].cpu().numpy()
    maps["vocabulary"] = np.array(data.vocabulary(sc))
    study.write("attention", rows)
    replace_file(f"{study.prefix}.attention.npz", lambda f: np.savez_compressed(f, **maps))

    print("\nattention   of the answer position: mass as a multiple of chance, on the window and on its letters")
    heads = [(block, head) for block in range(len(names)) for head in range(study.model.config.n_head)]
    mass = {tuple(r[k] for k in ("prompt", "model", "region", "block", "head")): f"{r['mass'] / max(r['chance'], 1e-9):.1f}"
            for r in rows}
    table(["asked", "model", "region", *(f"B{i}H{h}" for i, h in heads)],
          [[*key, *(mass[*key, *h] for h in heads)] for key in dict.fromkeys(k[:3] for k in mass) if key[2] != "outside"])
    return rows


EXAMPLES = 4  # strings whose whole maps are kept


def examples(study, test):
    """The first strings on which there is something to see: answers for a and b that differ and are not 0."""
    a, b = (study.result(test, o) for o in study.pair)
    return ((a > 1) & (b > 1) & (a != b)).nonzero()[:EXAMPLES, 0]


def program_attention(study):
    """
    attention() of compiled models, whose every position matters: whole maps of a few strings, and as numbers
        mass of the answer position on the letters that make r(a), r(b) and a third answer, on BOS and on padding
        `kept`: over all letters as queries, the overlap of the pattern with the compiled model's, the sum over keys of
            the smaller of the two (1: the same), where the program uses the head; chance: a uniform pattern's overlap
        `order`: the probability that a letter which the program selects gets more attention than one that it does not
            (AUC; chance .5): in block 0 of the max-identifier, whether larger letters still come before smaller ones.
    """
    sc, rows, maps = study.sc, [], {}
    test, letters = study.test(study.pair[0], "natural"), slice(1, sc.length + 1)
    names = [f"blocks.{i}.attn.pattern" for i in range(len(study.model.blocks))]
    regions = {o: data.marked(test.text, o, sc) for o in (*study.pair, study.third)}
    regions = {o: F.pad(where, (1, sc.room - sc.length)) for o, where in regions.items()}
    regions.update({"BOS": test.tokens == 1, "padding": test.tokens == 0})

    def note(model, block, head, region, mass, chance):
        rows.append(study.blank(operand=study.pair[0], split="natural", n=len(test.text), model=model, block=block,
                                head=head, prompt=None, region=region, mass=mass, chance=chance))
    patterns = {}
    for name, model in study.models.items():
        check_stop()
        cache = activations(model, test.tokens, names)[1]
        patterns[name] = torch.stack([cache[n] for n in names])  # (block, n, head, query, key)
        maps[name] = patterns[name][:, examples(study, test)].transpose(0, 1).cpu().numpy()
    for name, all_blocks in patterns.items():
        for block, head in np.ndindex(len(names), all_blocks.shape[2]):
            pattern, program = all_blocks[block, :, head], patterns.get("base", all_blocks)[block, :, head]
            at = pattern[:, answer_position(sc)]
            for region, where in regions.items():
                note(name, block, head, region, (at * where).sum(1).mean().item(), where.float().mean().item())
            uniform = torch.full_like(program, 1 / program.shape[-1])
            if (program - uniform).abs().max() < 1e-3:
                continue  # the program does not use this head
            kept = [torch.minimum(p, program)[:, letters].sum(-1).mean().item() for p in (pattern, uniform)]
            note(name, block, head, "kept", *kept)
            chosen = program[:, letters, letters] > 1 / program.shape[-1]
            got = pattern[:, letters, letters]
            both = chosen[..., :, None] & ~chosen[..., None, :]  # (n, query, selected key, other key)
            if both.any():
                more = (got[..., :, None] > got[..., None, :]).float() + .5 * (got[..., :, None] == got[..., None, :])
                note(name, block, head, "order", more[both].mean().item(), .5)
    maps["tokens"], maps["vocabulary"] = test.tokens[examples(study, test)].cpu().numpy(), np.array(data.vocabulary(sc))
    study.write("attention", rows)
    replace_file(f"{study.prefix}.attention.npz", lambda f: np.savez_compressed(f, **maps))

    print("\nattention   kept: overlap with the compiled pattern; order: a selected letter gets more than another (AUC); "
          "the rest: mass of the answer position")
    cells = {(r["model"], f"B{r['block']}H{r['head']}", r["region"]): f"{r['mass']:.2f} ({r['chance']:.2f})" for r in rows}
    heads, regions = list(dict.fromkeys(k[:2] for k in cells)), list(dict.fromkeys(k[2] for k in cells))
    table(["model", "head", *(f"{r} (chance)" for r in regions)],
          [[*head, *(cells.get((*head, r), "-") for r in regions)] for head in heads])
    return rows


def hidden(study):
    """
    What do the MLPs' hidden units do, token by token? (paper: Tracr setup, Figs. 46-47, 53-54) Compiled models only.

    Activations after the ReLU on the same few strings as attention, in <checkpoint>.hidden.npz, and as numbers per
    block: the cosine of all activations on natural strings with the compiled model's, and the share of units that are
    on (above .1, well above the noise). A cosine near 1: the mechanism is in place, whatever is made of it afterwards.
    Fooled by: units that are on for every string, which dominate the cosine; a small shift of a threshold, which a cosine
    does not show and which may change every answer.
    """
    if not study.compiled:
        raise UserError(f"hidden is for compiled models: {study.args.ckpt} is {study.ckpt['setup']}")
    test, rows, maps, seen = study.test(study.pair[0], "natural"), [], {}, {}
    names = [f"blocks.{i}.mlp_post" for i in range(len(study.model.blocks))]
    for name, model in study.models.items():
        check_stop()
        cache = activations(model, test.tokens, names)[1]
        seen[name] = [cache[n] for n in names]
        few = [x[examples(study, test)] for x in seen[name]]
        maps[name] = torch.stack(few, 1).cpu().numpy()  # (string, block, position, unit)
    for name, blocks in seen.items():
        for i, (x, program) in enumerate(zip(blocks, seen.get("base", blocks))):
            alike = F.cosine_similarity(x.flatten(), program.flatten(), 0).item() if program.any() else None
            rows.append(study.blank(operand=study.pair[0], split="natural", n=len(test.text), model=name, block=i,
                                    cosine=alike, active=(x > .1).float().mean().item()))
    maps["tokens"] = test.tokens[examples(study, test)].cpu().numpy()
    maps["vocabulary"] = np.array(data.vocabulary(study.sc))
    study.write("hidden", rows)
    replace_file(f"{study.prefix}.hidden.npz", lambda f: np.savez_compressed(f, **maps))
    print("\nhidden   activations of the MLPs' units: cosine with the compiled model's, share of units that are on")
    table(["model", "block", "cosine", "on"],
          [[r["model"], r["block"], "-" if r["cosine"] is None else f"{r['cosine']:.3f}", percent(r["active"])]
           for r in rows])
    return rows


# ---------------------------------------------------------------- revive

THRESHOLDS = (.9, .99)
FASTER = 3  # reFT must be so many times as fast as its control; the control goes on for so many times as many steps


def steps_to(curve, threshold):
    """First evaluated step at which accuracy reaches the threshold, from [(step, accuracy)]; None if never."""
    return next((step for step, accuracy in curve if accuracy >= threshold), None)


def teach(study, start, operand, lr, most, seed, bar):
    """
    Fine-tune a copy of `start` to answer for `operand` on its c0 strings, at a constant rate; evaluated every 5 steps
    (compiled models: 20) on natural and c0, until both are at the largest threshold or after `most` steps. Returns
    {split: [(step, accuracy)]}.
    """
    model, sc = copy.deepcopy(start), study.sc
    pair = study.pair if operand in study.pair else (operand, study.pair[1])
    batch = finetuning_stream(sc, study.task, operand, 0., pair, study.q, study.args.batch_size, seed, study.device,
                              "revive")
    tests = {split: study.test(operand, split, n=min(400, study.args.eval_size)) for split in ("natural", "c0")}
    curves = {split: [] for split in tests}
    every = 20 if study.compiled else 5  # an evaluation costs as much as three steps of a compiled model
    for step, _ in train_steps(model, optimizer_for(model, lr, sc), answer_loss(model, batch, sc), constant(lr), most):
        check_stop()
        if step % every == 0 or step == most:
            for split, test in tests.items():
                curves[split].append((step, accuracy(predict(model, test.tokens, sc), test.target)))
            if all(curve[-1][1] >= THRESHOLDS[-1] for curve in curves.values()):
                break
        bar.update()
    return curves


def reft_rates(study):
    """
    The two rates of reFT, and the first that of its controls: the fine-tuning's own and a third of it. Of compiled models
    a third and a tenth: at their own rate, constant, SGD is past the edge of stability (paper: reFT takes a smaller one).
    """
    lr = study.ckpt["args"]["lr"]
    return (lr / 3, lr / 10) if study.compiled else (lr, lr / 3)


def revive(study):
    """
    How fast does the capability come back, against a model that never had it? (paper: protocols, Fig. 9)

    Reverse fine-tuning (reFT) on a with c0 strings, at the fine-tuning's rate (ours: matched rates) and a third of it
    (compiled models: a third and a tenth), constant after 20 steps. Controls, in the same way: teaching the never-trained
    operand to this very model (teach-c) and to its base (teach-c-base, with the noise that fine-tuning put on it), and
    pretraining itself, from its history. Steps to 90 % and 99 % on natural
    and on c0 strings. The controls go on three times as long as reFT needed: what has not come by then is shown as >=.
    Few steps compared with teach-c: it was there. teach-c much faster than pretraining is how much any good
    initialisation helps, which a comparison with training from scratch would have called a revival.
    Fooled by: steps at different rates; an easy target (hence c0, where another operand helps up to the cross floor at
    most); the control's token, which was never an input: part of what teach-c has to learn is what O_c means.
    """
    if not study.base:
        raise UserError(f"revive needs a fine-tuned checkpoint: {study.args.ckpt} has no base")
    (lr, slower), a = reft_rates(study), study.pair[0]
    rows, curve_rows = [], []

    def note(arm, rate, operand, curves, most, seed, test=None):
        for split, curve in curves.items():
            about = test or score_of(study.test(operand, split, n=min(400, study.args.eval_size)))
            rows.extend({**study.blank(), **about, "operand": operand, "split": split, "accuracy": curve[-1][1],
                         "seed": seed, "arm": arm, "lr": rate, "threshold": threshold, "steps": steps_to(curve, threshold),
                         "max_steps": most} for threshold in THRESHOLDS)
            curve_rows.extend({"arm": arm, "lr": rate, "step": step, "split": split, "accuracy": accuracy, "seed": seed}
                              for step, accuracy in curve)

    def score_of(test):
        return {"floor": test.floor(), "cross_floor": test.cross_floor(), "n": len(test.target)}

    limit = study.args.steps or study.sc.revive_steps
    for seed in range(study.seed, study.seed + study.args.seeds):
        bar = study.bar(None, "revive")
        curves = teach(study, study.model, a, lr, limit, seed, bar)
        note("reft", lr, a, curves, limit, seed)
        note("reft", slower, a, teach(study, study.model, a, slower, limit, seed, bar), limit, seed)
        step, reached = curves["natural"][-1]
        most = max(30, FASTER * step) if reached >= THRESHOLDS[-1] and not study.args.steps else limit
        arms = []
        if study.never:
            model, base, operand = study.never
            arms = [(f"teach-{operand}", model), (f"teach-{operand}-base", base)][:2 if base else 1]
        for arm, model in arms:
            note(arm, lr, operand, teach(study, model, operand, lr, most, seed, bar), most, seed)
        bar.close()
    if study.base_ckpt["stage"] == "pretrain":
        args = study.base_ckpt["args"]
        for split in ("natural", "c0"):
            history = [r for r in read_rows(os.path.splitext(study.base_ckpt["path"])[0] + ".jsonl")
                       if (r["task"], r["operand"], r["split"]) == (study.task, a, split)]
            if len(history) > 3:  # what is only looked at before and after has no steps to a threshold
                about = {k: history[-1][k] for k in ("floor", "cross_floor", "n")}
                note("pretraining", args["lr"], a, {split: [(r["step"], r["accuracy"]) for r in history]},
                     study.base_ckpt["steps"], args["seed"], about)
    study.write("revive", rows)
    study.write("revive.curve", curve_rows)

    print(f"\nrevive   steps to 90 % and 99 % on natural and c0 strings ({study.args.seeds} data orders)\n"
          f"  never-had control: {study.never_note}")
    cells = {(r["arm"], r["lr"], r["seed"], r["operand"], r["split"], r["threshold"]): r for r in rows}

    def shown(r):
        return "-" if r is None else r["steps"] if r["steps"] is not None else f">= {r['max_steps']}"
    ends = {key[:4]: percent(r["accuracy"]) for key, r in cells.items() if key[4] == "natural"}
    columns = [(split, threshold) for split in ("natural", "c0") for threshold in THRESHOLDS]
    table(["arm", "lr", "seed", "asked", *(f"{split} {t:.0%}" for split, t in columns), "natural at the end"],
          [[key[0], f"{key[1]:.2g}", *key[2:], *(shown(cells.get((*key, *c))) for c in columns),
            ends.get(key, "-")] for key in dict.fromkeys(k[:4] for k in cells)])
    return rows


# ---------------------------------------------------------------- verdict

KNOWS = .9    # accuracy on natural strings from which on a model has a capability
MARGIN = .25  # by so much an accuracy must exceed what is possible without it: the cross floor, or a control


def evidence(study, found):
    """Every number the verdict quotes, and `found_by`: which instruments find O_PT, each against its control."""
    (a, b), v = study.pair, {"task": study.task, "operands": list(study.pair)}

    def pick(name, **wanted):
        return [r for r in found[name] if all(r.get(k) == x for k, x in wanted.items())]

    for model in ("base", "ckpt"):
        for role, operand in (("pt", a), ("ft", b)):
            for split in SPLITS:
                row = pick("behavior", model=model, operand=operand, split=split, task=study.task)[0]
                v[f"{model}_{role}_{split}"] = row["accuracy"]
                if (model, split) == ("ckpt", "c0"):
                    v[f"{role}_c0_cross_floor"], v[f"{role}_c0_follows_a_plus_q"] = row["cross_floor"], row["share_a_plus_q"]

    def edited(ranking, edit="zero"):  # at the K chosen on the selection set
        return [(r["accuracy"], r["k"]) for r in pick("prune", ranking=ranking, edit=edit, split="c0")] or [(None, None)]
    how = ("tried" if study.compiled and study.unit == "weight" else "iterated")
    v["prune_how"] = {"tried": "the best of 100, tried one by one", "iterated": "ranked anew after each"}[how]
    v["prune_c0"], v["prune_k"] = edited(f"gradient-weight-{how}")[0]
    v["prune_one_pass_c0"], v["prune_one_pass_k"] = edited("gradient-weight")[0]
    v["graft_c0"], v["graft_k"] = edited("gradient-change", "graft")[0]
    draws = [accuracy for accuracy, _ in edited("random" if how == "iterated" else "random-weight-tried")]
    v["random_draws"], v["random_c0_mean"], v["random_c0_max"] = len(draws), float(np.mean(draws)), max(draws)
    never = [accuracy for ranking in ("never-had", "never-had-iterated", "never-had-tried")
             for accuracy, _ in edited(ranking) if accuracy is not None]
    v["never_prune_c0"] = max(never) if study.never else None

    def read(model, target):  # the block is chosen on c0 strings, the accuracy quoted on natural ones
        rows = pick("probe", model=model, target=target, prompt=b, labels="true", split="c0")
        block = max(rows, key=lambda r: r["accuracy"])["block"]
        return pick("probe", model=model, target=target, prompt=b, labels="true", split="natural", block=block)[0]
    site = read("ckpt", a)
    v["probe_natural"], v["probe_block"], v["probe_floor"] = site["accuracy"], site["block"], site["floor"]
    v["probe_untrained"] = read("untrained", a)["accuracy"]
    where = "ckpt" if study.never and study.never[0] is study.model else "control"
    v["never_probe"] = read(where, study.third)["accuracy"] if study.never else None

    def steps(arm, threshold):  # mean over data orders; one that did not arrive counts with all the steps it was given
        rows = pick("revive", arm=arm, split="natural", threshold=threshold)
        rows = [r for r in rows if arm != "reft" or r["lr"] == reft_rates(study)[0]]
        bounds = [r["max_steps"] if r["steps"] is None else r["steps"] for r in rows]
        return (float(np.mean(bounds)), all(r["steps"] is not None for r in rows)) if rows else (None, None)
    arms = {"reft": "reft", "control": f"teach-{study.third}", "pretraining": "pretraining"}
    for threshold in reversed(THRESHOLDS):  # 99 %, or 90 where neither gets there: two that do not cannot be compared
        v["threshold"] = threshold
        for who, arm in arms.items():
            v[f"{who}_steps"], v[f"{who}_reached"] = steps(arm, threshold)
        if v["reft_reached"] or v["control_reached"]:
            break

    never_prune, never_probe = v["never_prune_c0"] or 0, v["never_probe"] or 0
    finds = {"pruning": v["prune_c0"] >= v["pt_c0_cross_floor"] + MARGIN
             and v["prune_c0"] - max(v["random_c0_max"], never_prune) >= MARGIN,
             "probing": v["probe_natural"] >= KNOWS and v["probe_natural"] - max(v["probe_untrained"], never_probe) >= .1,
             "reviving": v["ckpt_pt_natural"] < KNOWS and v["reft_reached"] and v["control_steps"] is not None
             and FASTER * v["reft_steps"] <= v["control_steps"]}
    v["found_by"] = [name for name, yes in finds.items() if yes]
    return v


def announce(study, word, meaning, text, numbers):
    """Print a verdict, a paragraph for each {heading: line} of text, and write it with the numbers that it quotes."""
    write_json(f"{study.prefix}.verdict.json", {
        "verdict": word, "text": f"{word}: {meaning}. " + " ".join(f"{head}: {line}." for head, line in text.items()), **numbers})
    print(f"\nVERDICT  {word}: {meaning}")
    for head, line in text.items():
        print(textwrap.fill(f"{head}: {line}.", 118, initial_indent="  ", subsequent_indent="    "))


def verdict(study, found):
    """
    What the analyses say together, in words with numbers. found: {name: what the analysis returned}.

        new        b is answered on c0 where the base could not: fine-tuning built it
        intact     a is still answered on c0 when it is asked for
        wrapped    a is not answered, b only where the shortcut serves, and at least two of the three instruments find a
        lost       a is not answered, and none of the three finds it, though all had their never-had control
        undecided  anything else

    Answered: above the cross floor by MARGIN. Found, by pruning (ours: ranked anew after each row; the paper's one pass
    is quoted beside it): answered again, and above every random draw and the never-had operand by MARGIN; by probing:
    90 % on natural strings, and 10 points above the untrained model and the never-had operand; by reviving: in a third
    of the control's steps or less.
    """
    v, (a, b), task, unit = evidence(study, found), study.pair, study.task, study.unit
    had, by = v["base_pt_natural"] >= KNOWS, ", ".join(v["found_by"]) or "no instrument"
    answered = v["ckpt_pt_c0"] >= v["pt_c0_cross_floor"] + MARGIN
    could, can = (v[f"{model}_ft_c0"] >= v["ft_c0_cross_floor"] + MARGIN for model in ("base", "ckpt"))
    if not had:
        word, meaning = "undecided", f"the base did not have {a}"
    elif can and not could:
        word, meaning = "new", (f"fine-tuning built {b}, which the base could not answer on c0; {a} is "
                                + ("still answered" if answered else f"not answered any more (found by {by})"))
    elif answered:
        word, meaning = "intact", f"{a} is still answered, " + (
            f"and so is {b}: strongly relevant, no wrapper was needed" if can else
            f"and {b} as {a}{study.q:+d}: a wrapper that only opens when {b} is asked"
            if v["ft_c0_follows_a_plus_q"] >= .5 else f"and {b} was not learned")
    elif not can and v["ckpt_ft_c1"] >= KNOWS and len(v["found_by"]) >= 2:
        word, meaning = "wrapped", f"{a} is not answered any more, but it is there: found by {by}"
    elif not v["found_by"] and study.never:
        word, meaning = "lost", f"{a} is not answered any more, and no instrument finds it"
    else:
        word, meaning = "undecided", f"{a} is not answered any more; found by {by}"

    p = {k: percent(x) for k, x in v.items() if isinstance(x, float) or x is None}

    def steps(who):
        return f"{'after' if v[f'{who}_reached'] else 'not within'} {v[f'{who}_steps']:.0f} steps"
    text = {
        "What changed":
            f"{task} {b} is right on {p['ckpt_ft_c1']} of the strings with the relation (c1) and on {p['ckpt_ft_c0']} of "
            f"those without it (c0; before fine-tuning {p['base_ft_c0']}); {a}{study.q:+d} explains "
            f"{p['ft_c0_follows_a_plus_q']} of the answers there. {task} {a} is right on {p['ckpt_pt_c0']} of c0 and "
            f"{p['ckpt_pt_natural']} of natural strings (before {p['base_pt_c0']} and {p['base_pt_natural']})",
        "Is it still there":
            f"zeroing {v['prune_k']} {unit}s, {v['prune_how']}, brings {a} to {p['prune_c0']} on c0 "
            f"({v['prune_one_pass_k']} ranked in one pass: {p['prune_one_pass_c0']}; random ones of the same matrices: "
            f"{p['random_c0_mean']}, at most {p['random_c0_max']} in {v['random_draws']} draws; the same for a "
            f"never-trained operand: {p['never_prune_c0']}); grafting {v['graft_k']} back: {p['graft_c0']}. A probe reads "
            f"{a} while {b} is asked at {p['probe_natural']} after block {v['probe_block']} (untrained model "
            f"{p['probe_untrained']}, never-trained operand {p['never_probe']}, floor {p['probe_floor']})",
        "How fast it comes back": f"reFT reaches {100 * v['threshold']:.0f} % on natural strings {steps('reft')}",
        "Against which control": f"never-had: {study.never_note}" + (
            "" if v["control_steps"] is None else f"; teaching it reaches {100 * v['threshold']:.0f} % {steps('control')}")}
    announce(study, word, meaning, text, v)


# ---------------------------------------------------------------- ask


def ask(study):
    """One string, typed in: the answer, the truth and the rule it followed, base and fine-tuned side by side."""
    text, sc, operand = study.args.text or "", study.sc, study.args.operand or study.pair[1]
    alphabet = sc.alphabet if study.compiled else data.LETTERS
    if operand not in sc.operands:
        raise UserError(f"--operand {operand}: there are {', '.join(sc.operands)}")
    other = "".join(sorted(set(text) - set(alphabet)))
    if other or len(text) != sc.length:
        raise UserError(f"--text takes {sc.length} letters {alphabet[0]} to {alphabet[-1]}, as this model was trained on, "
                        f"and got {len(text)}{', with ' + repr(other) if other else ''}; for one: python data.py --setup "
                        f"{sc.setup} --scale {sc.name} --json")
    letters = torch.tensor([[alphabet.index(x) for x in text]], device=study.device)
    if study.compiled and not sc.repeat and len(set(text)) < len(text):
        raise UserError(f"--text {text}: no letter may occur twice")
    r = dict(zip(sc.operands, sc.tasks[study.task].answers(letters, sc)[0].tolist()))
    if r[operand] < 0:
        raise UserError(f"--text has too few {operand} for {study.task}: there is no answer")
    a, first = study.pair[0], sc.tasks[study.task].first_answer
    names = [name.lstrip("#") for name in data.answer_names(sc)]

    def say(value):
        return names[value + first] if 0 <= value + first < len(names) else str(value)
    told = {*study.pair, study.third, operand}
    rules = {**{f"r({o})": value for o, value in r.items() if o in told}, f"r({a}) {study.q:+d}": r[a] + study.q}
    print("\n".join(data.explain(letters[0], study.task, operand, sc)))
    print(f"{study.task} {operand}: the truth is {say(r[operand])}; "
          + ", ".join(f"{k} = {say(x)}" for k, x in rules.items()))
    tokens = data.questions(letters, study.task, operand, sc)[:, :-1]
    for name, model in study.models.items():
        share, top = predict(model, tokens, sc)[0].softmax(0).sort(descending=True)
        said = top[0].item() - first
        print(f"{name:<5} says {names[top[0]]:<3} {'right' if said == r[operand] else 'wrong'}, follows "
              + (" = ".join(rule for rule, value in rules.items() if value == said) or "no rule")
              + "   (" + ", ".join(f"{names[i]}: {x:.1%}" for i, x in zip(top[:3].tolist(), share.tolist())) + ")")


# ---------------------------------------------------------------- stories


class StoryStudy:
    """A checkpoint of setup stories, the pretrained model it comes from, and where its stories come from."""

    def __init__(self, args, device, model, ckpt):
        self.args, self.device, self.model, self.ckpt = args, device, model, ckpt
        for name in ("draws", "most", "seeds", "unit", "text", "operand"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} is not for stories, and {args.ckpt} is of setup stories")
        self.sc, self.prefix = data.setup_of(self.ckpt), os.path.splitext(args.ckpt)[0]
        self.seed = self.ckpt["args"]["seed"] if args.seed is None else args.seed
        self.feature = self.ckpt["args"]["feature"]
        path, ckpt = args.ckpt, self.ckpt  # the base is the pretrained model, however often it was fine-tuned since
        if args.base and not ckpt["parent"]:
            raise UserError(f"--base: {args.ckpt} was not fine-tuned from anything")
        while ckpt["parent"]:
            path = args.base if args.base else find_parent(path, ckpt["parent"])
            base, ckpt = load(path, self.device)
            self.base, self.base_path = base, path
            if ckpt["config"] != self.ckpt["config"]:
                raise UserError(f"--base {path}: another shape or vocabulary than {args.ckpt}")
            if args.base:
                break
        self.models = {"base": self.base, "ckpt": self.model} if self.ckpt["parent"] else {"ckpt": self.model}
        if args.control:
            control, theirs = load(args.control, self.device)
            if theirs["config"] != self.ckpt["config"] or theirs["args"].get("without") != self.feature or theirs["parent"]:
                raise UserError(f"--control {args.control}: must be of the shape of {args.ckpt} and pretrained --without "
                                f"{self.feature}")
            self.models["control"] = control
        self.source = data.story_source(self.ckpt["args"]["data"], self.ckpt["config"]["words"])
        if not self.source.rule:
            root = args.judge or (self.base_path if self.ckpt["parent"] else args.ckpt)
            self.source.judge = frozen_judge(root, self.source, self.sc, self.device, 8 * args.eval_size, self.bar)

    bar, write = Study.bar, Study.write


def ends_of(model, source, records, width=10, batch=128):
    """
    Mean residual of the last `width` tokens of stories that are read without their instruction, after every block:
    (blocks + 1, n, d), 0 the embedding (paper: TinyStories setup).
    """
    names = ["embed"] + [f"blocks.{i}.resid_post" for i in range(len(model.blocks))]
    device, parts = model.tok.weight.device, []
    for i in range(0, len(records), batch):
        check_stop()
        some = records[i:i + batch]
        tokens, _, stop = data.story_rows(some, source.tokenizer, model.config.n_ctx, np.ones(len(some)), device)
        tokens, stop = tokens[:, :-1], stop.clamp(max=tokens.shape[1] - 1)
        at = torch.arange(tokens.shape[1], device=device)
        last = ((at < stop[:, None]) & (at >= stop[:, None] - width)).float()
        cache = activations(model, tokens, names)[1]
        parts.append(torch.stack([torch.einsum("ntd,nt->nd", cache[name], last) / last.sum(1, keepdim=True) for name in names]))
    return torch.cat(parts, 1)


def auc(score, label):
    """Area under the ROC curve: how often a positive has a higher score (n,) than a negative, ties count half."""
    values, place, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[place].double()  # 1-based, mean of ties
    yes = int(label.sum())
    return ((rank[label.bool()].sum() - yes * (yes + 1) / 2) / (yes * (len(label) - yes))).item()


def masks_of(records, device):
    """(features, n) 0 or 1."""
    masks = torch.tensor([r.mask for r in records], device=device)
    return torch.stack([masks >> i & 1 for i in range(len(data.FEATURES))])


def frozen_judge(root, source, sc, device, n, bar):
    """
    Judges real text, for which there is no rule: a logistic regression a feature on the mean activations of the whole
    story (of the middle and the last block of the pretrained model at `root`), fitted once on n labelled training
    records, half of them with the feature, and kept beside it as <root>.judge.pt, so that all later checkpoints meet the
    same judge. Returns a function texts -> feature masks; its `right` is the share of held-out records, half of them
    with the feature, that it judges as they are labelled (the paper's judge: 92 %).
    Fooled by: texts unlike the corpus (a refusal gets a mask too); labels that do not describe the text.
    """
    path = os.path.splitext(root)[0] + ".judge.pt"
    model, ckpt = load(root, device)

    def pooled(records):
        x = ends_of(model, source, records, model.config.n_ctx)
        return x[[len(x) // 2, -1]].transpose(0, 1).flatten(1)

    def labelled(feature, n, held_out):
        records = [r for has in (True, False) for r in source.draw(n // 2, g, feature, has, held_out)]
        return pooled(records), masks_of(records, device)[data.FEATURES.index(feature)]
    kept = None
    if os.path.exists(path):
        try:
            kept = torch.load(path, map_location=device, weights_only=True)
            kept = kept if kept["root"] == ckpt["sha256"] and kept["n"] >= n else None
        except Exception:  # whatever a foreign or broken file leads to: it is made again
            kept = None
    if not kept:
        g = data.rng(0, "judge")
        fitted, held = ([labelled(f, k, part) for f in data.FEATURES] for k, part in ((n, False), (max(2, n // 4), True)))
        x, y = (torch.stack(parts) for parts in zip(*fitted))
        mean, sd = x.mean((0, 1)), x.std((0, 1)) + 1e-8
        progress = bar(3000, "fitting the judge, once")
        weight, bias = fit_probes((x - mean) / sd, list(range(len(x))), y, progress.total, g, progress)
        progress.close()
        right = [accuracy((x - mean) / sd @ w + b, y) for (x, y), w, b in zip(held, weight, bias)]
        kept = {"root": ckpt["sha256"], "n": n, "mean": mean, "sd": sd, "weight": weight, "bias": bias, "right": right}
        replace_file(path, lambda f: torch.save(kept, f))

    def judge(texts):
        ids = [np.array(source.tokenizer.encode(text) or [0], np.uint16) for text in texts]
        x = (pooled([data.Encoded(i, 0, 0, len(i), 0) for i in ids]) - kept["mean"]) / kept["sd"]
        says = (x @ kept["weight"] + kept["bias"]).argmax(-1).T.tolist()  # (n, features)
        return [sum(b << i for i, b in enumerate(row)) if text else None for row, text in zip(says, texts)]
    judge.right = dict(zip(data.FEATURES, kept["right"]))
    print("judge of real text: right on held-out records " + ", ".join(f"{k} {x:.1%}" for k, x in judge.right.items()))
    return judge


def story_behavior(study):
    """
    What does the model write when it is asked for a feature, and when not? (paper: TinyStories setup, Table 1)

    For each of the six features: the share of its stories that have it, by the corpus's rule (real text: by a frozen
    judge), written to held-out instructions that ask for it and to others that do not, fine-tuned model beside its
    base; and the loss on held-out stories with the feature in question and without. The five other features are the
    control: a deletion should leave them alone.
    Fooled by: stories that are broken rather than without a twist (hence the share that parses); a judge's mistakes
    (how often it is right on held-out records is printed and written to the rows); few generations (hence the intervals).
    """
    rows, n = [], study.args.eval_size
    args = study.ckpt["args"]

    def change(records, g):
        return data.change_records(records, args["protocol"], study.feature, args["probability"], study.source.tokenizer, g)
    tests = story_tests(study.source, study.sc, study.feature, n, study.seed, study.device,
                        change if args.get("protocol") else None)
    bar = study.bar(len(study.models) * 7, "behavior")
    right = getattr(study.source.judge, "right", {})
    for name, model in study.models.items():
        rows += [dict(r, model=name) for r in story_losses(model, tests, study.sc, study.feature, study.seed)]
        bar.update()
        for feature in data.FEATURES:
            rows += [dict(r, model=name, judge=right.get(feature, 1.))
                     for r in generation_scores(model, study.source, study.sc, feature, n, study.seed)]
            bar.update()
    bar.close()
    study.write("behavior", rows)
    print(f"\nbehavior   share of stories with the feature, of those that parse, 95 % interval; n = {n} a cell")
    table(["feature", "model", "asked for", "not asked for", "parse", "judge right"],
          [[feature, name, *(interval(r["accuracy"], r["parsed"] * r["n"]) for r in got),
            percent(sum(r["parsed"] for r in got) / 2), percent(got[0]["judge"])]
           for feature in data.FEATURES for name in study.models
           if (got := [r for r in rows if (r["operand"], r["model"]) == (feature, name) and "parsed" in r])])
    table(["loss on stories", "model", "nats a token"], [[f"{r['split']} {r['operand']}", r["model"], f"{r['loss']:.3f}"]
                                                         for r in rows if r["loss"] is not None])
    return rows


def story_probe(study):
    """
    Can a feature be read off the story's end? (paper: TinyStories setup, Figs. 31-38)

    One linear probe a feature and block on the mean residual of the last 10 tokens of held-out stories, read without
    their instruction. Between two bounds: the pretrained model (base) above, a model pretrained without the feature
    (--control) below; and an untrained one. Accuracy, balanced accuracy and AUC beside the majority rate.
    ours: split "even" probes the feature once more, in stories whose sentences lean to neither label. There no word
    tells a twist, and who reads it has compared what was revealed with what was expected. (Embedded corpus only.)
    High: the text's feature is linearly there at its end. A deletion that leaves the upper bound's AUC in place has not
    touched what the model knows of the feature.
    Fooled by: words that tell the feature (dialogue has quotes: any model reads it; hence the lower bound, the
    untrained model and the even split); a majority of three in four (hence balanced accuracy and AUC).
    """
    n, g = study.args.eval_size, data.rng(study.seed, "probe")
    untrained = GPT(Config(**study.ckpt["config"])).init_weights(data.rng(study.seed, "untrained")).to(study.device)
    models, splits = {**study.models, "untrained": untrained}, {"natural": {}}
    if study.source.rule:
        splits["even"] = {"leans": (.5, .5)}
    keys, x, held, site, labels, right = [], [], [], [], [], []
    for split, how in splits.items():
        train, test = (study.source.draw(k * n, g, held_out=True, **how) for k in (8, 4))
        if not study.source.rule:  # held-out records may be few: each once, and none in both
            once = list({r.ids.tobytes(): r for r in train + test}.values())
            train, test = once[:len(once) * 2 // 3], once[len(once) * 2 // 3:]
        y, truth = masks_of(train, study.device), masks_of(test, study.device)
        for feature, *parts in zip(data.FEATURES, y, truth):
            if any(len(set(part.tolist())) < 2 for part in parts):
                raise UserError(f"too few held-out stories ({len(train)} and {len(test)}) with, or without, {feature} to probe it")
        shuffle = torch.randperm(len(train), generator=g).to(study.device)
        for name, model in models.items():
            seen, new = ends_of(model, study.source, train), ends_of(model, study.source, test)
            mean, sd = seen.mean(1, keepdim=True), seen.std(1, keepdim=True) + 1e-8  # ours: standardised, see probe()
            for block in range(len(seen)):
                for i, feature in enumerate(data.FEATURES):
                    if split == "even" and feature != study.feature:
                        continue
                    for kind in ("true", "shuffled") if (name, feature) == ("ckpt", study.feature) else ("true",):
                        keys.append(dict(split=split, model=name, block=block, target=feature, prompt=None, labels=kind))
                        site.append(len(x))
                        labels.append(y[i] if kind == "true" else y[i][shuffle])
                        right.append(truth[i])
                x.append(((seen - mean) / sd)[block])
                held.append(((new - mean) / sd)[block])
    bar = study.bar(study.args.steps or 4000, "probe")
    weight, bias = fit_probes(torch.stack(x), site, torch.stack(labels), bar.total, g, bar)
    bar.close()
    rows = []
    for key, i, w, c, truth in zip(keys, site, weight, bias, right):
        logits = held[i] @ w + c
        said = logits.argmax(1)
        recalls = [(said[truth == k] == k).float().mean().item() for k in (0, 1)]
        rows.append(story_row(study.sc, key["target"], seed=study.seed, **key, n=len(truth), balanced=sum(recalls) / 2,
                              auc=auc(logits[:, 1] - logits[:, 0], truth)))
        rows[-1].update(accuracy=accuracy(logits, truth), floor=data.majority_floor(truth),
                        loss=F.cross_entropy(logits, truth).item())
    study.write("probe", rows)
    print("\nprobe   linear, last 10 tokens of stories without instruction; AUC after each block on held-out stories "
          f"({4 * n} or fewer); on the right the best block's accuracies; even: no sentence leans to a label")
    groups = collections.defaultdict(list)
    for r in rows:
        groups[r["target"], r["split"], r["model"], r["labels"]].append(r)
    table(["feature", "stories", "model", "labels", *(f"B{i}" for i in range(len(study.model.blocks) + 1)), "accuracy",
           "balanced", "majority"],
          [[*key, *(f"{r['auc']:.3f}" for r in got), percent(best["accuracy"]), percent(best["balanced"]),
            percent(best["floor"])] for key, got in groups.items() if (best := max(got, key=lambda r: r["auc"]))])
    return rows


def story_verdict(study, found):
    """
    What behavior and probe say together, in words with numbers. found: {name: rows}.

        intact     the feature is still written when it is asked for, half as often as before or more
        wrapped    it is not, but a probe finds it at the story's end nearly as well as before: by AUC, nearer the pretrained
                   model (upper bound) than the model that never had it (lower bound), at the upper bound's best block
        lost       it is not, and the probe is nearer the lower bound
        undecided  anything else: no --control, bounds within .05, or a base that did not have the feature

    The bounds say what reading is possible; how fast the feature comes back is another question: finetune.py --reverse.
    """
    f, v = study.feature, {"feature": study.feature}
    for r in found["behavior"]:
        if "parsed" in r and r["operand"] == f:
            v[f"{r['model']}_{r['split']}"], v[f"{r['model']}_{r['split']}_parsed"] = r["accuracy"], r["parsed"]
    asked = {(r["model"], r["operand"]): r["accuracy"] or 0. for r in found["behavior"] if r["split"] == "asked"}
    v["others_asked_fell_most"] = max((x - asked["ckpt", o] for (model, o), x in asked.items() if model == "base" and o != f),
                                      default=None)
    auc_of = {(r["model"], r["block"]): r["auc"] for r in found["probe"]
              if (r["target"], r["labels"], r["split"]) == (f, "true", "natural")}
    v["probe_block"] = max((b for m, b in auc_of if m == "base"), key=lambda b: auc_of["base", b])
    for model in ("base", "ckpt", "control", "untrained"):
        v[f"{model}_auc"] = auc_of.get((model, v["probe_block"]))
    before, after = v["base_asked"] or 0, v["ckpt_asked"] or 0
    span = None if v["control_auc"] is None else v["base_auc"] - v["control_auc"]
    v["between"] = (v["ckpt_auc"] - v["control_auc"]) / span if span and span >= .05 else None  # 0 lower, 1 upper bound
    if before < .5:
        word, meaning = "undecided", f"the base hardly wrote {f} when asked"
    elif after >= before / 2:
        word, meaning = "intact", f"{f} is still written when it is asked for"
    elif v["between"] is None:
        word, meaning = "undecided", f"{f} is not written any more; " + (
            "for the bounds of its probe give --control" if span is None else "the bounds of its probe are too near each other")
    else:
        word = "wrapped" if v["between"] > .5 else "lost"
        meaning = f"{f} is not written any more, " + ("but it is read as before" if word == "wrapped" else "nor read")
    p = {k: percent(x) for k, x in v.items() if isinstance(x, float) or x is None}
    near = "" if v["between"] is None else f", {v['between']:.0%} of the way up"
    text = {
        "What changed": f"{f} when asked for in {p['base_asked']} of stories before and {p['ckpt_asked']} after (not asked for: "
                        f"{p['base_unasked']} and {p['ckpt_unasked']}; {p['ckpt_asked_parsed']} parse); of the other features, "
                        f"asked for, the one that fell most fell by {p['others_asked_fell_most']}",
        "Is it still there": f"AUC of a probe after block {v['probe_block']}: {v['ckpt_auc']:.3f}, between "
                             + ("-" if span is None else f"{v['control_auc']:.3f}") + " (never had it) and "
                             f"{v['base_auc']:.3f} (pretrained){near}; untrained {v['untrained_auc']:.3f}"}
    announce(study, word, meaning, text, v)


def generate_stories(study):
    """Stories to read: written to held-out instructions that ask for --features, with what each has marked."""
    args, tokenizer = study.args, study.source.tokenizer
    wanted = [f.strip() for f in (args.features or "").split(",") if f.strip()]
    unknown = [f for f in wanted if f not in data.FEATURES]
    if unknown:
        raise UserError(f"--features {unknown[0]}: there are {', '.join(data.FEATURES)}")
    mask = sum(1 << data.FEATURES.index(f) for f in wanted)
    records = [r._replace(mask=mask) for r in study.source.draw(args.n, data.rng(study.seed, "look"), held_out=True)]
    prompts = [ids[:start] for ids, start, _ in (data.story_ids(r, tokenizer) for r in records)]
    g = data.rng(study.seed, "look", "sample", device=study.device)
    written = generate(study.model, prompts, study.sc.n_ctx, g, args.temperature, args.top_k, end=0)
    stories = [data.story_of(tokenizer.decode(ids)) for ids in written]
    for prompt, story, found in zip(prompts, stories, study.source.judge(stories)):
        print(tokenizer.decode(prompt[1:].tolist()).strip())
        print("\n".join(textwrap.wrap(story, 118)))
        print(f"  asked for: {', '.join(wanted) or 'nothing'}; "
              + ("does not parse" if found is None else f"has: {', '.join(data.names_of(found)) or 'none of the features'}")
              + "\n")


# ---------------------------------------------------------------- command line

ANALYSES = {"behavior": behavior, "prune": prune, "probe": probe, "attention": attention, "hidden": hidden,
            "revive": revive}
STORY_ANALYSES = {"behavior": story_behavior, "probe": story_probe}
NEEDS_BASE = ("prune", "revive")
VERDICT_OF = ("behavior", "prune", "probe", "revive")


def with_rows(study, found, names):
    """found, and from files the rows of those of `names` that were not run now. Raises UserError if there are none."""
    found = {**{name: read_rows(f"{study.prefix}.{name}.jsonl") for name in names}, **found}
    missing = [name for name in names if not found[name]]
    if missing:
        raise UserError(f"verdict needs the rows of {', '.join(missing)}: run them first")
    return found


def story_main(args, study):
    """main() for checkpoints of stories."""
    names = args.analysis or list(STORY_ANALYSES)
    for name in names:
        if name not in (*STORY_ANALYSES, "verdict", "generate"):
            raise UserError(f"{name} is not for stories, and {args.ckpt} is of setup stories; there are "
                            f"{', '.join(STORY_ANALYSES)}, verdict, generate")
    if "generate" in names:
        return generate_stories(study)
    print(f"analyze {args.ckpt} ({study.ckpt['stage']}, {study.feature}" + "".join(
        f", {k} {v}" for k, v in study.ckpt["args"].items() if k in ("protocol", "without") and v) + ")")
    found = {name: analysis(study) for name, analysis in STORY_ANALYSES.items() if name in names}
    if "verdict" in names:
        found = with_rows(study, found, STORY_ANALYSES)
    if "base" in study.models and len(found) == len(STORY_ANALYSES):
        story_verdict(study, found)
    elif "verdict" in names:
        raise UserError(f"verdict needs a fine-tuned checkpoint: {args.ckpt} has no base")


def main():
    parser = run_parser(__doc__)
    parser.add_argument("analysis", nargs="*", metavar="ANALYSIS",
                        help=f"{', '.join(ANALYSES)}; verdict, from rows that are there; ask; of stories "
                             f"{', '.join(STORY_ANALYSES)}, generate (default: all that apply)")
    parser.add_argument("--ckpt", default="out/ft.pt", help="checkpoint to look into (default: out/ft.pt)")
    parser.add_argument("--base", help="what it was fine-tuned from (default: the parent it names, its hash checked)")
    parser.add_argument("--control", help="a checkpoint that never had an operand, where this one has had them all")
    parser.add_argument("--unit", choices=["row", "weight"],
                        help="prune: whole rows (neurons) or single weights (default: row; of compiled models weight)")
    parser.add_argument("--draws", type=int, help="prune: matched random draws (default: 8)")
    parser.add_argument("--most", type=int, help="prune: most units to edit at once (default: 10000)")
    parser.add_argument("--seeds", type=int, help="revive: data orders (default: 1)")
    parser.add_argument("--steps", type=int, help="most training steps (default: probe 4000, revive 600 small, 6000 paper)")
    parser.add_argument("--batch-size", type=int, default=96, help="revive: strings a step (default: 96)")
    parser.add_argument("--eval-size", type=int, default=500, help="strings in a test set (default: 500)")
    parser.add_argument("--seed", type=int, help="seed of test sets and draws (default: the checkpoint's)")
    parser.add_argument("--text", help="ask: the string, letters a, b, c")
    parser.add_argument("--operand", help="ask: the letter asked for (default: the fine-tuning's)")
    parser.add_argument("--features", help="generate: what to ask for, as Twist,Dialogue (default: nothing)")
    parser.add_argument("-n", type=int, default=3, help="generate: stories (default: 3)")
    parser.add_argument("--temperature", type=float, default=1., help="generate: 0 is greedy (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="generate: sample from so many tokens; 0: all (default: 0)")
    parser.add_argument("--judge", help="real stories: the pretrained checkpoint whose frozen judge marks them (default: the "
                        "one that --ckpt comes from)")
    add_common_flags(parser)
    args = parser.parse_args()
    unknown = [name for name in args.analysis if name not in (*ANALYSES, "ask", "verdict", "generate")]
    if unknown:
        raise UserError(f"no analysis {unknown[0]!r}; there are {', '.join(ANALYSES)}, verdict, ask, generate")
    positive(args, "draws", "most", "seeds", "steps", "batch_size", "eval_size", "n")
    positive(args, "seed", "temperature", "top_k", least=-1e-9)
    device = start_device(args)
    model, ckpt = load(args.ckpt, device)
    if ckpt["setup"] == "stories":
        try:
            return story_main(args, StoryStudy(args, device, model, ckpt))
        except ValueError as error:  # a file that is not there any more, or has too few stories
            raise UserError(f"--ckpt {args.ckpt}: {error}") from None
    if "generate" in args.analysis:
        raise UserError(f"generate is for stories: {args.ckpt} is of another setup")
    args.draws, args.most, args.seeds = args.draws or 8, args.most or 10000, args.seeds or 1
    study = Study(args, device, model, ckpt)
    if "ask" in args.analysis:
        return ask(study)
    names = args.analysis or [name for name in ANALYSES if (study.base or name not in NEEDS_BASE)
                              and (study.compiled or name != "hidden")]
    (a, b), stage = study.pair, study.ckpt["stage"]
    print(f"analyze {args.ckpt} ({stage}, {study.task}, O_PT {a}, O_FT {b}, q {study.q})"
          + (f" against {study.base_ckpt['path']}" if study.base else ""))
    found = {name: ANALYSES[name](study) for name in ANALYSES if name in names}
    if "verdict" in names:  # from rows that are there already
        found = with_rows(study, found, VERDICT_OF)
        found["prune"] = [r for r in found["prune"] if r.get("chosen") and r["operand"] != study.pair[1]]
    if all(name in found for name in VERDICT_OF):
        verdict(study, found)


if __name__ == "__main__":
    run_script(main)
