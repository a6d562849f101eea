"""
Does one direction hide the answer for a? (after Arditi et al. 2024, arXiv 2406.11717; Lucki et al.
2024, arXiv 2409.18025)

    $ python analyze.py direction --ckpt out/ft.pt

Two mean differences of the residual stream at the position of the answer, on c0 strings, without
labels: fine-tuned less base, both asked for a; fine-tuned asked for b less asked for a. Each is
subtracted, .25 to 4 times, and projected out, at the embedding or after one block. Direction, block
and edit are chosen on other strings. Controls: 64 random directions of the same norms, with the same
choice of block and edit; and all of it for an operand that was never trained.
High: what hides the answer is one vector, the same for all strings. Low: it is none, or is elsewhere.
Fooled by: a wrapper whose shift depends on the string, as "count a, plus 1" may (it passes for
deletion); an edit at another position than the answer's; a shift by q that any push brings about
(hence the random directions).
"""
import itertools

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from analyze import MARGIN, Evidence, above_floor, exceeds, largest, or_control, select
from data import UserError
from model import accuracy, activations, residuals
from pretrain import answer_row

STRENGTHS, DRAWS = (.25, .5, 1., 2., 4., None), 64  # None: projected out
CHOSEN_ON = 100  # strings: each draw tries all settings


class AtAnswer:
    """A model asked a Test: its residual stream at the answer (blocks + 1, n, d), and the keys and
    values of the positions before, which no edit of that stream changes."""

    def __init__(self, study, model, test):
        x, names = test.examples, [f"blocks.{i}.attn" for i in range(len(model.blocks))]
        cache = activations(model, x.tokens, [f"{name}.{kv}" for name in names for kv in "kv"])[1]
        self.before = {model.get_submodule(name): [cache[f"{name}.{kv}"][:, :, :x.at]
                                                   for kv in "kv"] for name in names}
        self.model, self.test = model, test
        self.streams = residuals(model, x, study.setup.site(x))

    def put(self, attention, *keys_values):
        """What a block asks of a cache: keys, values of all positions, and a mask."""
        k, v = (torch.cat(pair, 2) for pair in zip(self.before[attention], keys_values))
        return k, v, k.new_zeros(1, 1, 1, k.shape[2])

    @torch.no_grad()
    def logits(self, place, v, strength):
        """(n, v) with the stream at a place edited; place i is behind i blocks."""
        x = edited(self.streams[place], v, strength)[:, None]
        for block in self.model.blocks[place:]:
            x = block(x, slice(None), None, self)
        return self.model.head(self.model.ln(x))[:, 0]

    def accuracy(self, setting):
        return accuracy(self.logits(*setting), self.test.examples.answer)


def edited(x, v, strength):
    """x (n, d) less strength times v (d,); strength None: less its component along v."""
    if strength is not None:
        return x - strength * v
    unit = F.normalize(v, dim=0)
    return x - (x @ unit)[:, None] * unit


def mean_differences(study, model, start, operand):
    """{kind: (blocks + 1, d)}, asked for an operand; start: the model before fine-tuning, if any."""
    relation, n, setup = study.relation.for_operand(operand), study.args.eval_size, study.setup

    def mean(model, asked):
        x = setup.test(relation, asked, "c0", n, study.seed, "direction").examples
        return residuals(model, x, setup.site(x)).mean(1)
    here = mean(model, operand)
    result = {"b - a": mean(model, relation.ft) - here}
    return result if start is None else {**result, "ft - base": here - mean(start, operand)}


def settings(directions):
    """All (kind, (place, v, strength)) of {kind: (blocks + 1, d)}."""
    for (kind, places), strength in itertools.product(directions.items(), STRENGTHS):
        for place, v in enumerate(places):
            yield kind, (place, v, strength)


def random_like(directions, rng):
    """One random direction in place of all, with their norms."""
    v = next(iter(directions.values()))
    unit = F.normalize(torch.randn(v.shape[1], generator=rng), dim=0).to(v.device)
    return {kind: places.norm(dim=1, keepdim=True) * unit for kind, places in directions.items()}


def run(study):
    """Rows of each setting of the two directions, and of each random one's best on other strings."""
    config, rows = study.model.config, []
    if not study.base or not config.causal or config.rotary:
        raise UserError("direction: needs a base, a causal model and learned positions")
    subjects = [("ckpt", study.model, study.start, study.relation.pt)]
    if study.never_trained:
        subjects.append(("never-trained", *study.never_trained))
    few = min(CHOSEN_ON, study.args.eval_size)
    for name, model, start, operand in subjects:
        selection, asked = (AtAnswer(study, model, study.test(operand, "c0", label, n))
                            for label, n in (("select", few), ("test", None)))
        true = mean_differences(study, model, start, operand)
        for draw in tqdm([None, *range(DRAWS)], desc="direction", leave=False, disable=None):
            found = true if draw is None else random_like(true, data.rng(study.seed, "random", draw))
            tried = list(settings(found))
            best = max(range(len(tried)), key=lambda i: selection.accuracy(tried[i][1]))
            for i, (kind, (place, v, strength)) in enumerate(tried):
                if draw is None or i == best:
                    row = answer_row(asked.logits(place, v, strength), asked.test)
                    rows.append({**row, "model": name, "place": place, "strength": strength,
                                 "kind": kind if draw is None else "random", "norm": v.norm().item(),
                                 "draw": draw, "chosen": i == best})
    return rows


def evidence(study, rows):
    """a less floor at the setting chosen, beside the best random direction and the control's."""
    chosen = select(rows, chosen=True)
    best = select(chosen, model="ckpt", draw=None)[0]
    control = largest(*(above_floor(r) for r in chosen if r is not best))
    edit = "projected out" if best["strength"] is None else f"{best['strength']:g} times"
    question = f"{study.relation.pt} on c0 less floor, {best['kind']} {edit}, place {best['place']}"
    return Evidence("direction", question, above_floor(best), f"floor, random{or_control(study)}",
                    control, MARGIN, exceeds(above_floor(best), largest(control, 0.), MARGIN))
