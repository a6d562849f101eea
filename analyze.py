"""
Look inside a fine-tuned checkpoint: is the old capability deleted, or only wrapped?

    $ python analyze.py                                            # every analysis of out/ft.pt, then the verdict
    $ python analyze.py prune probe --ckpt out/ft.pt               # some of them
    $ python analyze.py ask --ckpt out/ft.pt --text abcab... --operand b

For out/ft.pt, rows go to out/ft.behavior.jsonl, out/ft.prune.jsonl, ... and the verdict to out/ft.verdict.json.
Each analysis has its control, run in the same way: an operand (or a model, --control) that never had the capability,
matched random rows, an untrained model, shuffled labels, majority and cross floors. Add one: write a function of a
Study below, add a line to ANALYSES.

Contents: the study | behavior | prune | probe | attention | revive | verdict | ask | command line.
a stands for O_PT, the pretraining operand, and b for O_FT, the fine-tuning operand, whatever letters they are.
"""
import collections
import copy
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import LETTERS, NUMBER, SPLITS, TASKS, answer_position
from finetune import answer_loss, constant, finetuning_stream, pair_of
from model import (GPT, Config, Stopped, UserError, activations, add_common_flags, check_stop, load, positive, read_rows,
                   replace_file, run_parser, run_script, start_device, weight_edits, write_json, write_rows)
from pretrain import adamw, cosine, other_tests, predict, score, train_steps

# ---------------------------------------------------------------- the study


class Study:
    """A checkpoint, what it came from, and its test sets: everything an analysis needs, and nothing it may change."""

    def __init__(self, args):
        self.args, self.device = args, start_device(args)
        self.model, self.ckpt = load(args.ckpt, self.device)
        self.sc = sc = data.scale_of(self.ckpt["scale"])
        self.prefix = os.path.splitext(args.ckpt)[0]
        self.seed = self.ckpt["args"]["seed"] if args.seed is None else args.seed
        self.task = self.ckpt["capability"]["task"]
        self.pair, self.q = pair_of(self.ckpt)
        self.third = LETTERS[3 - sum(LETTERS.index(letter) for letter in self.pair)]
        self.base = self.base_ckpt = None
        parent = self.ckpt["parent"]
        if args.base or parent:
            path = args.base or parent["path"]
            beside = os.path.join(os.path.dirname(args.ckpt), os.path.basename(path))
            path = beside if not args.base and not os.path.exists(path) and os.path.exists(beside) else path
            self.base, self.base_ckpt = load(path, self.device)
            if not args.base and self.base_ckpt["sha256"] != parent["sha256"]:
                raise UserError(f"{path} has changed since {args.ckpt} was made from it: give the old one as --base")
            if self.base_ckpt["config"] != self.ckpt["config"]:
                raise UserError(f"--base {path}: another shape or vocabulary than {args.ckpt}")
        self.models = {"base": self.base, "ckpt": self.model} if self.base else {"ckpt": self.model}
        self.never = self.find_never()
        self._tests = {}

    def find_never(self):
        """
        The never-had-it control: (model, its base or None, operand), an operand that was trained in no family. Inside
        this very model where it has one, else from --control; None, with a note to print, without either.
        """
        prior = self.ckpt["args"]["prior"]
        if prior[LETTERS.index(self.third)] == 0:
            self.never_note = f"operand {self.third}, never trained, in the same model"
            return self.model, self.base, self.third
        if not self.args.control:
            self.never_note = (f"no never-had control: operand {self.third} was trained; give a checkpoint pretrained with prior 0 "
                               "for it as --control")
            return None
        control, ckpt = load(self.args.control, self.device)
        prior = ckpt["args"]["prior"]
        if ckpt["config"] != self.ckpt["config"] or prior[LETTERS.index(self.third)]:
            raise UserError(f"--control {self.args.control}: needs the shape of {self.args.ckpt} and prior 0 for {self.third}")
        self.never_note = f"operand {self.third}, never trained, in {self.args.control}"
        return control, None, self.third

    def test(self, operand, split, label="test", n=None):
        """A test set of this study (cached): `operand` asked on strings of its pair with b; see data.test_set."""
        pair = self.pair if operand in self.pair else (operand, self.pair[1])
        key = (operand, split, label, n)
        if key not in self._tests:
            self._tests[key] = data.test_set(n or self.args.eval_size, self.sc, self.task, operand, split, self.seed, pair,
                                             self.q, label, self.device)
        return self._tests[key]

    def row(self, logits, test, /, **more):
        """A row of results: score() and the analysis's own keys."""
        return {**score(logits, test, self.sc, self.seed), **more}

    def measure(self, model, test, /, **more):
        """The row of a model on a test set."""
        return self.row(predict(model, test.tokens, self.sc), test, **more)

    def blank(self, **more):
        """A row that is about no test set."""
        return {**dict.fromkeys(("operand", "split", "accuracy", "floor", "cross_floor", "n", "loss")), "setup": self.ckpt["setup"],
                "scale": self.sc.name, "task": self.task, "seed": self.seed, **more}

    def write(self, name, rows):
        """Replace the file of an analysis: <checkpoint>.<name>.jsonl."""
        write_rows(f"{self.prefix}.{name}.jsonl", rows)

    def bar(self, total, what):
        return tqdm(total=total, desc=what, mininterval=.5, leave=False)


def percent(x):
    return "-" if x is None else f"{x:.1%}"


def table(head, rows):
    """Print rows of cells under a heading, in columns as wide as they need to be."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip())


# ---------------------------------------------------------------- behavior


def rule_shares(answer, a, b, q):
    """
    Share of answers (n,) that each rule would give, from the true results a and b (n,): the right answers for a and b,
    a + q (the shortcut), the blend (a + b + q) / 2 rounded down (right whenever the relation holds), and the most
    frequent answer itself. They may overlap; none: no rule explains the answer.
    """
    rules = {"a": answer == a, "b": answer == b, "a_plus_q": answer == a + q, "blend": answer == (a + b + q) // 2,
             "constant": answer == answer.mode().values}
    shares = {f"share_{k}": v.double().mean().item() for k, v in rules.items()}
    shares["share_none"] = (~torch.stack(list(rules.values())).any(0)).double().mean().item()
    return shares


def behavior(study):
    """
    What does the model answer, and by which rule? (PAPER section 2, Tables 5-8, and the rule behind the accuracy)

    Accuracy for both operands on c0, c1 and natural strings, the fine-tuned model beside its base; the share of answers
    that each simple rule explains; the histogram of answers; accuracy on the other families (collateral damage); and
    how far the weights moved. On c1 the rules a + q and b coincide: only c0 tells a wrapper from a learner.
    Fooled by: a test set where ties or the relation occur by accident (natural ones do: hence c0); a majority class
    (hence the floors); damage that looks like a wrapper (hence the other families).
    """
    rows, names = [], data.vocabulary(study.sc)
    for name, model in study.models.items():
        for operand in study.pair:
            for split in SPLITS:
                test = study.test(operand, split)
                logits = predict(model, test.tokens, study.sc)
                a, b = (test.results[:, LETTERS.index(letter)] for letter in study.pair)
                counts = collections.Counter(names[i].lstrip("#") for i in logits.argmax(1).tolist())
                rows.append(study.row(logits, test, model=name, predicted=dict(counts.most_common()),
                                      **rule_shares(logits.argmax(1) - NUMBER, a, b, study.q)))
        for test in other_tests(study.args.eval_size, study.sc, study.pair, study.seed, study.device, but=study.task):
            rows.append(study.measure(model, test, model=name))
    if study.base:
        moved = {k: (p - q).detach().double() for (k, p), q in zip(study.model.named_parameters(), study.base.parameters())}
        parts = collections.defaultdict(float)
        for k, d in moved.items():
            parts[".".join(k.split(".")[:2]) if k.startswith("blocks") else "outside"] += d.square().sum().item()
        args = study.ckpt["args"]
        rate_at = constant(args["lr"]) if args["reverse"] else cosine(args["lr"], args["steps"], final=.01)
        rows.append(study.blank(model="ckpt", distance=sum(parts.values()) ** .5, distance_blocks={k: v ** .5 for k, v in parts.items()},
                                base_norm=sum(p.double().square().sum().item() for p in study.base.parameters()) ** .5,
                                sum_of_rates=sum(map(rate_at, range(args["steps"])))))
    study.write("behavior", rows)

    a, b = study.pair
    print(f"\nbehavior   O_PT = {a}, O_FT = {b}, n = {study.args.eval_size}; last: share of the answers that each rule explains (they overlap)")
    table(["asked", "split", "model", "accuracy", "floor", "cross", "|", a, b, f"{a}{study.q:+d}", "blend", "constant", "none"],
          [[r["operand"], r["split"], r["model"], *(percent(r[k]) for k in ("accuracy", "floor", "cross_floor")), "|",
            *(percent(r[f"share_{k}"]) for k in ("a", "b", "a_plus_q", "blend", "constant", "none"))] for r in rows if "share_a" in r])
    others = {(r["task"], r["operand"] or "-", r["model"]): r for r in rows if r["task"] != study.task}
    print("  other families, natural strings (collateral)")
    table(["family", "asked", *study.models, "floor"], [[task, operand, *(percent(others[task, operand, m]["accuracy"]) for m in study.models),
          percent(others[task, operand, "ckpt"]["floor"])] for task, operand in dict.fromkeys(k[:2] for k in others)])
    if study.base:
        print(f"  the weights moved by {rows[-1]['distance']:.3f} (norm; the base's is {rows[-1]['base_norm']:.1f}); "
              f"sum of learning rates {rows[-1]['sum_of_rates']:.2g}")
    return rows


# ---------------------------------------------------------------- prune

KS = (0, 1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 100)
FEW = 10  # the claim is about a few units: K is chosen among those up to this
MATRICES = ("attn.qkv", "attn.out", "up", "down")


def unit_scores(model, test, sc, unit, minus=None):
    """
    First-order effect of removing each unit (PAPER section 5): gradient x weight of the cross-entropy on a test set,
    summed over a row and its bias entry, or weight by weight. With `minus`, gradient x (weight - that model's weight),
    the effect of grafting. Returns {(block, matrix): scores (rows,) or (rows * columns,)}.
    """
    model.zero_grad()
    for part, target in zip(test.tokens[:, :answer_position(sc) + 1].split(256), test.target.split(256)):
        check_stop()
        (F.cross_entropy(model(part, answer_position(sc)), target, reduction="sum") / len(test.target)).backward()
    theirs = dict(minus.named_parameters()) if minus else {}
    scores = {}
    with torch.no_grad():
        for i in range(len(model.blocks)):
            for matrix in MATRICES:
                effect = {}
                for kind in ("weight", "bias"):
                    name = f"blocks.{i}.{matrix}.{kind}"
                    p = model.get_parameter(name)
                    effect[kind] = p.grad * (p - theirs[name] if minus else p)
                scores[i, matrix] = effect["weight"].sum(1) + effect["bias"] if unit == "row" else effect["weight"].flatten()
    model.zero_grad()
    return scores


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


def matched_units(units, scores, g):
    """Random units, rank by rank from the same block and matrix as `units`: the control for which ones were chosen."""
    order = {k: torch.randperm(len(s), generator=g).tolist() for k, s in scores.items()}
    return [(block, matrix, order[block, matrix].pop(), None) for block, matrix, _, _ in units]


def unit_edits(model, units, unit, base=None):
    """The weight_edits() that zero these units, or graft them: set them back to the base model's values."""
    source = dict(base.named_parameters()) if base else None
    edits = []
    for block, matrix, index, _ in units:
        name = f"blocks.{block}.{matrix}"
        if unit == "row":
            places = [(f"{name}.weight", index), (f"{name}.bias", index)]
        else:
            places = [(f"{name}.weight", divmod(index, model.get_parameter(f"{name}.weight").shape[1]))]
        edits += [(p, at, source[p][at].detach() if base else 0.) for p, at in places]
    return edits


def prune(study):
    """
    Do a few units hold the wrapper? (PAPER section 5, Figs. 7 and 55-59)

    One backward pass of the cross-entropy of "count a" on the fine-tuned model; score = gradient x weight, summed over
    a row (a neuron) and its bias, or --unit weight; the K largest positive scores are edited at once: set to zero, or
    grafted, set back to the base model's values. ours: also ranked anew after every zeroed unit (iterated), and for
    grafting by its own first-order score, gradient x change. Scores and K (up to 10) come from one set of c0 strings,
    accuracies from another.
    High accuracy on a after few edits: the answer was there, and these units kept it from being read. It does not say
    that the change sits in these units: a zeroed unit is a lever, only grafting undoes what fine-tuning did.
    Fooled by: any damage that happens to shift answers by q (hence random units from the same matrices, --draws of
    them, with K chosen in the same way); a method that finds units for anything (hence never-had: the same procedure
    for an operand that was never trained).
    """
    if not study.base:
        raise UserError(f"prune needs a fine-tuned checkpoint: {study.args.ckpt} has no base")
    sc, unit, draws, (a, b) = study.sc, study.args.unit, study.args.draws, study.pair
    few_strings = min(200, study.args.eval_size)  # for one draw of eight: together they are more than a ranked one gets
    upto = {"few": [k for k in KS if 0 < k <= FEW], "all": KS[1:], "some": (FEW, KS[-1]),
            "far": KS[1:] + ((200, 400, 800) if unit == "row" else (1000, 10000))}
    found = study.test(a, "c0", "select")
    scores = unit_scores(study.model, found, sc, unit)
    one_pass, iterated = ranked_units(scores, KS[-1]), iterated_units(study.model, found, sc, unit, FEW)
    change = ranked_units(unit_scores(study.model, found, sc, unit, minus=study.base), upto["far"][-1])
    here = (study.model, study.base, a)
    sweeps = [(*here, "gradient-weight", "zero", one_pass, "all", None), (*here, "gradient-weight-iterated", "zero", iterated, "few", None),
              (*here, "gradient-weight", "graft", one_pass, "some", None), (*here, "gradient-change", "graft", change, "far", None)]
    for draw in range(draws):
        random = matched_units(iterated + one_pass[FEW:], scores, data.rng(study.seed, "prune", draw))
        sweeps += [(*here, "random", "zero", random, "all", draw), (*here, "random", "graft", random, "some", draw)]
    rows, choices = [], []
    if study.never:
        model, base, never = study.never
        select = study.test(never, "c0", "select")
        one, anew = ranked_units(unit_scores(model, select, sc, unit), KS[-1]), iterated_units(model, select, sc, unit, FEW)
        sweeps += [(*study.never, "never-had", "zero", one, "all", None), (*study.never, "never-had-iterated", "zero", anew, "few", None)]
        sweeps += [(*study.never, "never-had", "graft", one, "some", None)] if base else []
    else:
        rows.append(study.blank(unit=unit, ranking="never-had", edit="zero", k=None, draw=None, chosen=False, note=study.never_note))

    bar = study.bar(len(sweeps), "prune")
    for model, base, operand, ranking, edit, units, ks, draw in sweeps:
        n = None if draw is None else few_strings
        cells = [study.test(operand, "c0", n=n), study.test(b, "c1", n=n)]
        if draw is None:
            cells += [study.test(operand, "natural")]
        if ranking.startswith("gradient-weight"):
            cells += [study.test(a, "c1"), study.test(b, "c0"), study.test(b, "natural")]
        swept, tried = [], []
        for k in (0, *(k for k in upto[ks] if k <= len(units))):
            with weight_edits(model, unit_edits(model, units[:k], unit, base if edit == "graft" else None)):
                if k <= FEW:
                    tried.append((study.measure(model, study.test(operand, "c0", "select", n))["accuracy"], -k))
                swept += [study.measure(model, cell, unit=unit, ranking=ranking, edit=edit, k=k, draw=draw) for cell in cells]
        best = -max(tried)[1]
        rows += [dict(r, chosen=r["k"] == best) for r in swept]
        choices += [r for r in swept if r["k"] == best and r["operand"] == operand]
        bar.update()
    bar.close()
    name = "prune" if unit == "row" else "prune-weight"
    study.write(name, rows)
    study.write(f"{name}.rows", [{"ranking": ranking, "rank": i + 1, "block": u[0], "matrix": u[1], "index": u[2], "score": u[3]}
                                 for ranking, units in (("gradient-weight", one_pass), ("gradient-weight-iterated", iterated),
                                                        ("gradient-change", change[:KS[-1]])) for i, u in enumerate(units)])

    print(f"\nprune   {unit}s ranked on one set of c0 strings, scored on another (accuracy on c0; {b} on c1); mean of {draws} matched "
          f"random draws\n  never-had control: {study.never_note}")
    cells = collections.defaultdict(list)
    for r in rows:
        if r["k"] in KS and r["split"] == ("c1" if r["operand"] == b else "c0"):
            cells[r["ranking"], r["edit"], r["operand"], r["k"]].append(r["accuracy"])
    table(["ranking", "edit", "asked", *KS, "best K <= 10"], [
        [*key, *(percent(np.mean(cells[*key, k])) if (*key, k) in cells else "" for k in KS),
         " ".join(dict.fromkeys(str(c["k"]) for c in choices if (c["ranking"], c["edit"], c["operand"]) == key))]
        for key in dict.fromkeys(k[:3] for k in cells)])
    return choices


# ---------------------------------------------------------------- probe


def fit_probes(x, site, y, steps, g, bar, batch_size=96):
    """
    Linear probes, all trained at once: probe p maps x[site[p]] to the classes y[p]; x (sites, n, d), y (probes, n).
    AdamW, lr 1e-3, divided by 10 at 1/2, 3/4 and 7/8 of the steps (PAPER section 5: of 4K, at 2K, 3K and 3.5K), the
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
    for part in tokens[:, :at + 1].split(batch):
        check_stop()
        cache = activations(model, part, names, at)[1]  # the answer position is the last of `part`
        parts.append(torch.stack([cache[name][:, -1] for name in names]))
    return torch.cat(parts, 1)


def probe(study):
    """
    Can the answer for a still be read off the residual stream? (PAPER section 5, Fig. 8)

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
    train = [data.test_set(5 * n, sc, study.task, b, split, study.seed, study.pair, study.q, "probe", study.device)
             for split in ("natural", "c0")]
    tests = [study.test(b, split) for split in ("natural", "c0")]
    results = torch.cat([s.results for s in train])
    shuffle = torch.randperm(len(results), generator=g).to(study.device)
    asked = {prompt: [prompt] if prompt != b else [a, b, study.third] for prompt in dict.fromkeys([a, b, study.third])}

    x, held, keys, site, y = [], [], [], [], []
    for name, model in {**study.models, "untrained": untrained}.items():
        for prompt, targets in asked.items():
            seen, new = ([residuals(model, data.encode_one(s.text, study.task, prompt, sc)[0], sc) for s in sets] for sets in (train, tests))
            seen, new = torch.cat(seen, 1), torch.stack(new, 1)  # (blocks + 1, n, d), (blocks + 1, split, n, d)
            # ours: standardised, since an untrained model's residual is so small that 4K steps at 1e-3 learn nothing
            mean, sd = seen.mean(1, keepdim=True), seen.std(1, keepdim=True) + 1e-8
            for block in range(len(seen)):
                for target in targets:
                    for labels in ("true", "shuffled") if (name, prompt) == ("ckpt", b) else ("true",):
                        truth = results[:, LETTERS.index(target)]
                        keys.append({"model": name, "block": block, "target": target, "prompt": prompt, "labels": labels})
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
            logits, truth = new @ w + c, test.results[:, LETTERS.index(key["target"])]
            other = test.results[:, LETTERS.index(b if key["target"] != b else a)]
            rows.append(study.blank(operand=key["target"], split=test.split, accuracy=(logits.argmax(1) == truth).double().mean().item(),
                                    floor=data.majority_floor(truth), cross_floor=data.cross_floor(truth, other), n=len(truth),
                                    loss=F.cross_entropy(logits, truth.clamp(max=logits.shape[1] - 1)).item(), **key))
    study.write("probe", rows)

    print(f"\nprobe   linear, at the answer position, {len(results)} training strings; accuracy on {n} natural strings after each block")
    shown = [r for r in rows if r["split"] == "natural" and (r["labels"] == "true" or (r["target"], r["prompt"]) == (a, b))]
    groups = collections.defaultdict(list)
    for r in shown:
        groups[r["target"], r["prompt"], r["model"], r["labels"]].append(r)
    table(["target", "asked", "model", "labels", *(f"B{i}" for i in range(len(study.model.blocks) + 1)), "floor"],
          [[*key, *(percent(r["accuracy"]) for r in got), percent(got[0]["floor"])] for key, got in groups.items()])
    return rows


# ---------------------------------------------------------------- attention


def attention(study):
    """
    Where does the answer position look? (PAPER section 5; Figs. 10, 39-45 for the compiled models)

    The attention pattern of the position that predicts the answer, per block and head, on natural strings, asked for a
    and for b, base and fine-tuned side by side. mass: mean attention on a region (the window, the letters outside
    it, and a, b, c within the window); chance: the share of positions that the region takes, what uniform attention
    would give. Maps of the first strings go to <checkpoint>.attention.npz.
    Fooled by: reading too much into it. A head may look without using, and letters travel between positions in
    earlier blocks, so that attention to a position is not attention to its letter.
    """
    sc, rows, maps = study.sc, [], {}
    at, width = answer_position(sc), answer_position(sc) + 1
    names = [f"blocks.{i}.attn.pattern" for i in range(len(study.model.blocks))]
    first = 5  # SOS T O O' SOT come before the text
    for model_name, model in study.models.items():
        for prompt in study.pair:
            test = study.test(prompt, "natural")
            parts = []
            for part in test.tokens[:, :width].split(128):
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
            regions.update({letter: window & (letters == i) for i, letter in enumerate(LETTERS)})
            for region, where in regions.items():
                mass = (pattern * where[:, None, None]).sum(-1).mean(0)
                for block in range(mass.shape[0]):
                    for head in range(mass.shape[1]):
                        rows.append(study.blank(operand=prompt, split="natural", n=len(test.text), model=model_name, block=block, head=head,
                                                prompt=prompt, region=region, mass=mass[block, head].item(),
                                                chance=where.double().mean().item()))
    maps["tokens"] = study.test(study.pair[0], "natural").tokens[:8, :width].cpu().numpy()
    maps["vocabulary"] = np.array(data.vocabulary(sc))
    study.write("attention", rows)
    replace_file(f"{study.prefix}.attention.npz", lambda f: np.savez_compressed(f, **maps))

    print("\nattention   of the answer position: mass as a multiple of chance, on the window and on its letters")
    heads = [(block, head) for block in range(len(names)) for head in range(study.model.config.n_head)]
    mass = {(r["prompt"], r["model"], r["region"], r["block"], r["head"]): f"{r['mass'] / max(r['chance'], 1e-9):.1f}" for r in rows}
    table(["asked", "model", "region", *(f"B{i}H{h}" for i, h in heads)],
          [[*key, *(mass[*key, *h] for h in heads)] for key in dict.fromkeys(k[:3] for k in mass) if key[2] != "outside"])
    return rows


# ---------------------------------------------------------------- revive

THRESHOLDS = (.9, .99)


def steps_to(curve, threshold):
    """First evaluated step at which accuracy reaches the threshold, from [(step, accuracy)]; None if never."""
    return next((step for step, accuracy in curve if accuracy >= threshold), None)


def teach(study, start, operand, lr, most, seed, bar):
    """
    Fine-tune a copy of `start` to answer for `operand` on its c0 strings, at a constant rate; evaluated every 5 steps on
    natural and c0, until both are at the largest threshold or `most` steps are over. Returns {split: [(step, accuracy)]}.
    """
    model, sc = copy.deepcopy(start), study.sc
    pair = study.pair if operand in study.pair else (operand, study.pair[1])
    batch = finetuning_stream(sc, study.task, operand, 0., pair, study.q, study.args.batch_size, seed, study.device, "revive")
    tests = {split: study.test(operand, split, n=min(400, study.args.eval_size)) for split in ("natural", "c0")}
    curves = {split: [] for split in tests}
    for step, _ in train_steps(model, adamw(model, lr), answer_loss(model, batch, sc), constant(lr), most):
        check_stop()
        if step % 5 == 0 or step == most:
            for split, test in tests.items():
                logits = predict(model, test.tokens, sc)
                curves[split].append((step, (logits.argmax(1) == test.target).double().mean().item()))
            if all(curve[-1][1] >= THRESHOLDS[-1] for curve in curves.values()):
                break
        bar.update()
    return curves


def revive(study):
    """
    How fast does the capability come back, against a model that never had it? (PAPER section 5, Fig. 9)

    Reverse fine-tuning (reFT) on a with c0 strings, at the fine-tuning's rate (ours: matched rates) and a third of it,
    constant after 20 steps. Controls, in the same way: teaching the never-trained operand to this very model
    (teach-c) and to its base (teach-c-base), and pretraining itself, from its history. Steps to 90 % and 99 % on natural
    and on c0 strings. The controls go on three times as long as reFT needed: what has not come by then is shown as >=.
    Few steps compared with teach-c: it was there. teach-c much faster than pretraining is how much any good
    initialisation helps, which a comparison with training from scratch would have called a revival.
    Fooled by: steps at different rates; an easy target (hence c0, where no other operand helps).
    """
    if not study.base:
        raise UserError(f"revive needs a fine-tuned checkpoint: {study.args.ckpt} has no base")
    lr, a = study.ckpt["args"]["lr"], study.pair[0]
    limit = study.args.steps or 600
    rows, curves_out = [], []

    def add(arm, lr, operand, curves, most, seed):
        for split, curve in curves.items():
            test = study.test(operand, split, n=min(400, study.args.eval_size))
            for threshold in THRESHOLDS:
                rows.append(study.blank(operand=operand, split=split, accuracy=curve[-1][1], floor=test.floor(), cross_floor=test.cross_floor(),
                                        n=len(test.target), seed=seed, arm=arm, lr=lr, threshold=threshold,
                                        steps=steps_to(curve, threshold), max_steps=most))
            curves_out.extend({"arm": arm, "lr": lr, "step": step, "split": split, "accuracy": accuracy, "seed": seed}
                              for step, accuracy in curve)

    for i in range(study.args.seeds):
        seed = study.seed + i
        bar = study.bar(None, f"revive {i + 1} of {study.args.seeds}" if study.args.seeds > 1 else "revive")
        curves = teach(study, study.model, a, lr, limit, seed, bar)
        add("reft", lr, a, curves, limit, seed)
        most = min(limit, max(30, 3 * curves["natural"][-1][0]))
        add("reft", lr / 3, a, teach(study, study.model, a, lr / 3, most, seed, bar), most, seed)
        if study.never:
            model, base, operand = study.never
            add(f"teach-{operand}", lr, operand, teach(study, model, operand, lr, most, seed, bar), most, seed)
            if base:
                add(f"teach-{operand}-base", lr, operand, teach(study, base, operand, lr, most, seed, bar), most, seed)
        bar.close()
    history = read_rows(os.path.splitext(study.base_ckpt["path"])[0] + ".jsonl") if study.base_ckpt["stage"] == "pretrain" else []
    for split in ("natural", "c0"):
        curve = [(r["step"], r["accuracy"]) for r in history if (r["task"], r["operand"], r["split"]) == (study.task, a, split)]
        if curve:
            add("pretraining", study.base_ckpt["args"]["lr"], a, {split: curve}, study.base_ckpt["steps"], study.base_ckpt["args"]["seed"])
    study.write("revive", rows)
    study.write("revive.curve", curves_out)

    print(f"\nrevive   steps to 90 % and 99 % on natural and c0 strings ({study.args.seeds} data orders); control: {study.never_note}")
    cells = {(r["arm"], r["lr"], r["seed"], r["operand"], r["split"], r["threshold"]): r for r in rows}

    def shown(r):
        return "-" if r is None else r["steps"] if r["steps"] is not None else f">= {r['max_steps']}"
    table(["arm", "lr", "seed", "asked", *(f"{s} {t:.0%}" for s in ("natural", "c0") for t in THRESHOLDS), "reached on natural"],
          [[key[0], f"{key[1]:.2g}", *key[2:], *(shown(cells.get((*key, s, t))) for s in ("natural", "c0") for t in THRESHOLDS),
            percent(cells[(*key, "natural", .9)]["accuracy"])] for key in dict.fromkeys(k[:4] for k in cells)])
    return rows


# ---------------------------------------------------------------- verdict


def verdict(study, found):
    """
    What the analyses say together, in words with numbers. found: {name: what the analysis returned}.

        intact    a is still answered on c0: nothing hides it (a wrapper was not needed)
        new       b is answered on c0 where the base could not: fine-tuning built it
        wrapped   a is not answered, b is answered only where the shortcut serves, and at least two of three
                  instruments find a, each against its control: pruning, probing, reviving
        lost      a is not answered, and none of the three finds it
        undecided anything else
    """
    a, b = study.pair
    acc = {(r["model"], r["operand"], r["split"]): r for r in found["behavior"] if "share_a" in r}
    get = lambda model, operand, split: acc[model, operand, split]["accuracy"]  # noqa: E731
    v = {"operands": list(study.pair), "task": study.task}
    for model in ("base", "ckpt"):
        for role, operand in (("pt", a), ("ft", b)):
            v.update({f"{model}_{role}_{s}": get(model, operand, s) for s in SPLITS})
    v["pt_c0_cross_floor"], v["ft_c0_cross_floor"] = (acc["ckpt", o, "c0"]["cross_floor"] for o in (a, b))
    v["share_a_plus_q_c0"] = acc["ckpt", b, "c0"]["share_a_plus_q"]

    def chosen(ranking, edit):
        return [r for r in found["prune"] if (r["ranking"], r["edit"], r["split"]) == (ranking, edit, "c0")]
    best, random, never = chosen("gradient-weight-iterated", "zero")[0], chosen("random", "zero"), chosen("never-had-iterated", "zero")
    v.update(prune_k=best["k"], prune_c0=best["accuracy"], prune_one_pass_c0=chosen("gradient-weight", "zero")[0]["accuracy"], prune_random_mean=float(np.mean([r["accuracy"] for r in random])),
             prune_random_max=max(r["accuracy"] for r in random), prune_draws=len(random),
             prune_never=never[0]["accuracy"] if never else None, graft_c0=chosen("gradient-change", "graft")[0]["accuracy"])

    def read(model, target, prompt):
        got = [r for r in found["probe"] if (r["model"], r["target"], r["prompt"], r["labels"], r["split"]) == (model, target, prompt, "true", "natural")]
        return max(got, key=lambda r: r["accuracy"])
    site = read("ckpt", a, b)
    v.update(probe_natural=site["accuracy"], probe_block=site["block"], probe_floor=site["floor"],
             probe_untrained=read("untrained", a, b)["accuracy"], probe_base=read("base", a, b)["accuracy"],
             probe_never=read("ckpt", study.never[2], b)["accuracy"] if study.never else None)

    def steps(arm, lr=None):
        got = [r for r in found["revive"] if r["arm"] == arm and r["split"] == "natural" and r["threshold"] == .99 and (lr is None or r["lr"] == lr)]
        return [(r["steps"], r["max_steps"]) for r in got]
    reft, control = steps("reft", study.ckpt["args"]["lr"]), steps(f"teach-{study.third}")
    reached = [s for s, _ in reft if s is not None]
    v["reft_steps"] = float(np.mean(reached)) if len(reached) == len(reft) else None
    v["control_steps"] = float(np.mean([s or m for s, m in control])) if control else None
    v["control_reached"] = bool(control) and all(s is not None for s, _ in control)
    pre = steps("pretraining")
    v["pretraining_steps"] = pre[0][0] if pre else None

    had = v["base_pt_natural"] >= .9
    answered = had and v["ckpt_pt_c0"] >= max(v["pt_c0_cross_floor"] + .25, .75 * v["base_pt_c0"])
    learned = v["ckpt_ft_c0"] >= v["ft_c0_cross_floor"] + .25
    v["found_by"] = [name for name, yes in (
        ("prune", v["prune_c0"] >= .5 and v["prune_c0"] - max(v["prune_random_max"], v["prune_never"] or 0) >= .25),
        ("probe", v["probe_natural"] >= .9 and v["probe_natural"] - max(v["probe_untrained"], v["probe_never"] or 0) >= .1),
        ("revive", v["reft_steps"] is not None and bool(control) and 3 * v["reft_steps"] <= v["control_steps"])) if yes]
    if learned and v["base_ft_c0"] < v["ft_c0_cross_floor"] + .25:
        word = "new"
    elif answered:
        word = "intact"
    elif had and not learned and len(v["found_by"]) >= 2:
        word = "wrapped"
    elif had and not v["found_by"]:
        word = "lost"
    else:
        word = "undecided"
    p = lambda x: "-" if x is None else f"{x:.0%}" if x in (0, 1) else f"{x:.1%}"  # noqa: E731
    was = "before fine-tuning"
    changed = (f"{study.task} {b} is right on {p(v['ckpt_ft_c1'])} of the strings with the relation (c1) and {p(v['ckpt_ft_c0'])} of those without it "
               f"(c0; {was} {p(v['base_ft_c0'])}; {a}{study.q:+d} explains {p(v['share_a_plus_q_c0'])} of the answers there). {study.task} {a} is right on "
               f"{p(v['ckpt_pt_c0'])} of c0, {p(v['ckpt_pt_natural'])} of natural strings ({was} {p(v['base_pt_c0'])} and {p(v['base_pt_natural'])})")
    there = (f"zeroing {v['prune_k']} {study.args.unit}s brings {a} to {p(v['prune_c0'])} on c0 (ranked in one pass {p(v['prune_one_pass_c0'])}; random ones of the same matrices {p(v['prune_random_mean'])}, "
             f"at most {p(v['prune_random_max'])} in {v['prune_draws']} draws; the same for a never-trained operand {p(v['prune_never'])}); "
             f"grafting up to {FEW} back gives {p(v['graft_c0'])}; "
             f"a probe reads {a} while {b} is asked at {p(v['probe_natural'])} after block {v['probe_block']} (untrained model {p(v['probe_untrained'])}, "
             f"floor {p(v['probe_floor'])})")
    back = ("reFT did not reach 99 % on natural strings" if v["reft_steps"] is None else
            f"reFT reaches 99 % on natural strings after {v['reft_steps']:.0f} steps")
    against = (f"; teaching the never-trained {study.third} to the same model takes {'' if v['control_reached'] else 'more than '}{v['control_steps']:.0f}"
               if control else f"; {study.never_note}")
    meaning = {
        "intact": f"{a} is still answered, and nothing hides it: strongly relevant, no wrapper was needed",
        "new": f"fine-tuning built {b}, which the base could not answer on c0: not a wrapper over {a}"
               + ("; {} is still answered".format(a) if answered else "; {} is not answered, but found by {}".format(a, ", ".join(v["found_by"])) if v["found_by"] else ""),
        "wrapped": f"{a} is not answered any more, but it is there: found by {', '.join(v['found_by'])}",
        "lost": f"{a} is not answered, and no instrument finds it",
        "undecided": f"the instruments do not agree (found by {', '.join(v['found_by']) or 'none'})"
                     + ("" if had else f"; the base did not have {a} to begin with")}[word]
    v = {"verdict": word, "text": f"{word}: {meaning}. What changed: {changed}. Is it still there: {there}. How fast it comes back: {back}{against}.", **v}
    write_json(f"{study.prefix}.verdict.json", v)
    print(f"\nVERDICT  {word}: {meaning}.")
    for head, text in (("What changed", changed), ("Is it still there", there), ("How fast it comes back", back + against)):
        print(f"  {head}: {text}.")


# ---------------------------------------------------------------- ask


def ask(study):
    """One string, typed in: the answer, the truth and the rule it followed, base and fine-tuned side by side."""
    text, sc, operand = study.args.text, study.sc, study.args.operand or study.pair[1]
    if not text or set(text) - set(LETTERS) or len(text) != sc.length:
        raise UserError(f"--text takes {sc.length} letters a, b, c, the length this model was trained on; "
                        f"{'none was given' if not text else f'this has {len(text)}'}: try `python data.py --scale {sc.name} --json`")
    letters = torch.tensor([[LETTERS.index(x) for x in text]], device=study.device)
    tokens, answer = data.encode_one(letters, study.task, operand, sc)
    if answer.item() < 0:
        raise UserError(f"--text has too few {operand} for {study.task}: there is no answer")
    results = TASKS[study.task].answers(letters, sc)[0].tolist()
    string, marks = data.explain(letters[0], study.task, operand, sc)
    a, b = (results[LETTERS.index(letter)] for letter in study.pair)
    print(f"{string}\n{marks}\n{study.task} {operand}: the truth is {answer.item()}; "
          + ", ".join(f"r({letter}) = {r}" for letter, r in zip(LETTERS, results)))
    for name, model in study.models.items():
        share, top = predict(model, tokens, sc)[0].softmax(0).topk(3)
        said = top[0].item() - NUMBER
        rules = {f"r({study.pair[0]})": a, f"r({study.pair[1]})": b, f"r({study.pair[0]}) {study.q:+d}": a + study.q, f"r({study.third})": results[LETTERS.index(study.third)]}
        follows = [rule for rule, value in rules.items() if value == said]
        names = [data.vocabulary(sc)[i].lstrip("#") for i in top.tolist()]
        print(f"{name:<5} says {names[0]:<4} {'right' if said == answer.item() else 'wrong':<6} follows {' = '.join(follows) or 'no rule'}"
              f"   ({', '.join(f'{n}: {s:.1%}' for n, s in zip(names, share.tolist()))})")


# ---------------------------------------------------------------- command line

ANALYSES = {"behavior": behavior, "prune": prune, "probe": probe, "attention": attention, "revive": revive}
NEEDS_BASE = ("prune", "revive")
VERDICT_OF = ("behavior", "prune", "probe", "revive")


def main():
    parser = run_parser(__doc__)
    parser.add_argument("analysis", nargs="*", metavar="ANALYSIS", help=f"{', '.join(ANALYSES)}, or ask (default: all that apply)")
    parser.add_argument("--ckpt", default="out/ft.pt", help="checkpoint to look into (default: out/ft.pt)")
    parser.add_argument("--base", help="what it was fine-tuned from (default: the parent it names, its hash checked)")
    parser.add_argument("--control", help="a checkpoint that never had an operand, where this one has had them all")
    parser.add_argument("--unit", default="row", choices=["row", "weight"], help="prune: whole rows (neurons) or single weights "
                        "(default: row)")
    parser.add_argument("--draws", type=int, default=8, help="prune: matched random draws (default: 8)")
    parser.add_argument("--seeds", type=int, default=1, help="revive: data orders (default: 1)")
    parser.add_argument("--steps", type=int, help="largest number of training steps (default: probe 4000, revive 600)")
    parser.add_argument("--batch-size", type=int, default=96, help="revive: strings a step (default: 96)")
    parser.add_argument("--eval-size", type=int, default=500, help="strings in a test set (default: 500)")
    parser.add_argument("--seed", type=int, help="seed of test sets and draws (default: the checkpoint's)")
    parser.add_argument("--text", help="ask: the string, letters a, b, c")
    parser.add_argument("--operand", choices=list(LETTERS), help="ask: the letter asked for (default: the fine-tuning's)")
    add_common_flags(parser)
    args = parser.parse_args()
    unknown = [name for name in args.analysis if name not in (*ANALYSES, "ask")]
    if unknown:
        raise UserError(f"no analysis {unknown[0]!r}; there are {', '.join(ANALYSES)}, ask")
    positive(args, "draws", "seeds", "steps", "batch_size", "eval_size")
    positive(args, "seed", least=-1)
    study = Study(args)
    if "ask" in args.analysis:
        return ask(study)
    names = args.analysis or [name for name in ANALYSES if study.base or name not in NEEDS_BASE]
    print(f"analyze {args.ckpt} ({study.ckpt['stage']}, {study.task}, O_PT {study.pair[0]}, O_FT {study.pair[1]}, q {study.q})"
          + (f" against {study.base_ckpt['path']}" if study.base else ""))
    found = {name: ANALYSES[name](study) for name in ANALYSES if name in names}
    if all(name in found for name in VERDICT_OF):
        verdict(study, found)


if __name__ == "__main__":
    run_script(main)
