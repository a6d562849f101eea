"""
Does one direction hide the answer for a? (after Arditi et al. 2024, Lucki et al. 2024)

    $ python analyze.py direction --ckpt out/ft.pt

Two mean differences of the residual stream at the answer, on c0 strings: fine-tuned less base, both
asked for a; fine-tuned asked for b less asked for a. Each is subtracted, .5 to 4 times, or
projected out, at place 0 (the embedding) or i (after i blocks). Direction, place and edit are
chosen on other strings, also for controls: 64 random directions of equal norms; c, never trained.
High: one vector hides the answer on all strings. Low: no such vector does, or it acts elsewhere.
Fooled by: a wrapper that shifts differently on each string, or at other positions (it passes for
deletion); one so thin that any push opens it (random directions then do as well).
"""
import itertools

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from analyze import MARGIN, Evidence, above_floor, exceeds, or_control, select
from data import UserError
from model import accuracy, activations, residuals
from pretrain import answer_row

NEEDS = "base"  # beside strings
STRENGTHS, DRAWS, CHOSEN_ON = (.5, 1., 2., 4., None), 64, 100  # None: projected out; strings


class AtAnswer:
    """One model on one Test: its residual stream at the answer (blocks + 1, n, d), and keys and
    values of the positions before. No edit of that stream changes these: attention is causal."""

    def __init__(self, study, model, test):
        self.model, self.test, x, self.before = model, test, test.examples, {}
        self.streams = residuals(model, x, study.setup.site(x))
        for i, block in enumerate(model.blocks):
            cache = activations(model, x.tokens, [f"blocks.{i}.attn.{kv}" for kv in "kv"])[1]
            self.before[block.attn] = [y[:, :, :x.at] for y in cache.values()]

    def put(self, attention, *new):
        """What attention asks of a cache: keys, values (n, h, t, e) of all positions, a mask."""
        k, v = (torch.cat(pair, 2) for pair in zip(self.before[attention], new))
        return k, v, k.new_zeros(1, 1, 1, k.shape[2])

    @torch.no_grad()
    def logits(self, place, v, strength):
        """Logits (n, outputs) after edited() at a place; later blocks are computed anew."""
        x = edited(self.streams[place], v, strength)[:, None]
        for block in self.model.blocks[place:]:
            x = block(x, slice(None), None, self)
        return self.model.head(self.model.ln(x))[:, 0]


def edited(x, v, strength):
    """x (n, d) less strength times v (d,); less its component along v if strength is None."""
    unit = F.normalize(v, dim=0)
    return x - ((x @ unit)[:, None] * unit if strength is None else strength * v)


def mean_differences(study, model, start, operand):
    """{kind: (blocks + 1, d)} for an operand; start: the model before fine-tuning, or None."""
    relation, n, setup = study.relation.for_operand(operand), study.args.eval_size, study.setup

    def mean(model, asked):
        x = setup.test(relation, asked, "c0", n, study.seed, "direction").examples
        return residuals(model, x, setup.site(x)).mean(1)
    here = mean(model, operand)
    result = {"b - a": mean(model, relation.ft) - here}
    return result if start is None else {**result, "ft - base": here - mean(start, operand)}


def random_like(directions, rng):
    """One random direction for all kinds and places, with the norms of those it replaces."""
    unit = F.normalize(torch.randn(directions["b - a"].shape[1], generator=rng), dim=0)
    return {kind: v.norm(dim=1, keepdim=True) * unit.to(v.device) for kind, v in directions.items()}


def direction_rows(selection, asked, directions, draw=None):
    """A row a setting (kind, place, strength); for a random draw the chosen setting alone."""
    rows, tried, answer = [], [], selection.test.examples.answer
    for (kind, places), strength in itertools.product(directions.items(), STRENGTHS):
        tried += [(kind, place, v, strength) for place, v in enumerate(places)]
    best = max(tried, key=lambda setting: accuracy(selection.logits(*setting[1:]), answer))
    for setting in tried if draw is None else [best]:
        kind, place, _, strength = setting
        rows.append({**answer_row(asked.logits(*setting[1:]), asked.test), "place": place,
                     "kind": kind if draw is None else "random", "strength": strength,
                     "draw": draw, "chosen": setting is best})
    return rows


def run(study):
    """Rows of true and random directions, for a and the control operand. Raises UserError."""
    rows, n, config = [], study.args.eval_size, study.model.config
    if not study.base or not config.causal or config.rotary:
        raise UserError("direction: needs a base, a causal model and learned positions")
    subjects = {"ckpt": (study.model, study.start, study.relation.pt)}
    subjects |= {"never-trained": study.never_trained} if study.never_trained else {}
    for name, (model, start, operand) in subjects.items():
        selection = AtAnswer(study, model, study.test(operand, "c0", "select", min(CHOSEN_ON, n)))
        asked = AtAnswer(study, model, study.test(operand, "c0"))
        true = mean_differences(study, model, start, operand)
        found = direction_rows(selection, asked, true)
        for draw in tqdm(range(DRAWS), desc="direction", leave=False, disable=None):
            random = random_like(true, data.rng(study.seed, "direction", draw))
            found += direction_rows(selection, asked, random, draw)
        rows += [{**row, "model": name} for row in found]
    return rows


def evidence(study, rows):
    """Accuracy of a less floor, beside the best random direction and the control operand."""
    chosen = select(rows, chosen=True)
    best, = select(chosen, model="ckpt", draw=None)
    measured, control = above_floor(best), max(above_floor(r) for r in chosen if r is not best)
    edit = "projected out" if best["strength"] is None else f"{best['strength']:g} times"
    question = f"{study.relation.pt} on c0 less floor, {best['kind']} {edit}, place {best['place']}"
    return Evidence("direction", question, measured, f"floor, random{or_control(study)}", control,
                    MARGIN, exceeds(measured, max(control, 0.), MARGIN))
