"""
How large is the change of the weights, and how few of its directions undo it?

    $ python analyze.py weights --ckpt out/ft.pt

D = fine-tuned - base, of every matrix (q, k, v apart). Without strings: its norm over the base's,
its rank, its stable rank |D|^2 / s1^2 beside that of noise of this shape. By strings:
undo: D's r first singular directions are taken out of every matrix at once (biases stay); the
functional rank is the least r that brings a to 90 % of the base's.
path: (1 - x) base + x fine-tuned, thus base + x task vector (Ilharco et al. 2023), x from -.5 to
1.5; barrier: the largest loss on the way above the line between the ends (Siddiqui et al. 2025).
noise: base + x noise with D's norm in every matrix, five draws: what so large a change does alone.
Evidence is a with at most 8 directions undone, their number chosen on other strings.
Controls, in the same way: as many random directions of D, five draws; the never-trained c.
High: few directions kept a from being answered. Low: the change is spread, or large.
Fooled by: AdamW, whose steps are equally large in all directions, so that noise raises every rank;
wrappers in biases; a base of another pretraining (see basis). Nothing here works without the base.
"""
import copy
import itertools

import torch

import data
from analyze import MARGIN, Evidence, exceeds, highest, largest, select
from instruments.basis import basis_rows, operands, unless_foreign
from instruments.hybrids import part_of
from model import predict
from pretrain import answer_row

RANKS, FEW, DRAWS = (0, 1, 2, 4, 8, 16, 32, 64), 8, 5
PATH = [x / 10 for x in range(-5, 16)]


def matrices(model):
    """{name: a weight matrix itself}; q, k and v apart."""
    found = {name: p.data for name, p in model.named_parameters() if p.dim() == 2}
    for name in [name for name in found if "qkv" in name]:
        found.update(zip((f"{name}.{x}" for x in "qkv"), found.pop(name).chunk(3)))
    return found


def shifted(model, change, scale):
    """A copy of a model, scale x {name: matrix} added to its matrices."""
    moved = copy.deepcopy(model)
    for name, w in matrices(moved).items():
        w.add_(change[name], alpha=scale)
    return moved


def size_row(study, name, w, d):
    """The row of a matrix w that changed by d: how large, of which rank."""
    (m, n), s = w.shape, torch.linalg.svdvals(d)
    stable = (d.norm() / s[0]).square().item() if s[0] else 0.
    return study.row(part=part_of(name), site=name, norm=(d.norm() / w.norm()).item(),
                     rank=int((s > 1e-4 * s[0]).sum()), stable_rank=stable,
                     noise_stable_rank=m * n / (m ** .5 + n ** .5) ** 2)


def undo_models(study, change):
    """Yields (columns, model): the fine-tuned one without r directions of its change."""
    factors = {name: torch.linalg.svd(d, full_matrices=False) for name, d in change.items()}
    for r in RANKS:
        first = {name: u[:, :r] * s[:r] @ v[:r] for name, (u, s, v) in factors.items()}
        yield {"arm": "undo", "x": r}, shifted(study.model, first, -1.)
    rng = data.rng(study.seed, "weights", "undo")
    for draw, r in itertools.product(range(DRAWS), [r for r in RANKS if 0 < r <= FEW]):
        drawn = {}
        for name, d in change.items():
            u = torch.linalg.qr(torch.randn(len(d), r, generator=rng).to(d))[0]
            drawn[name] = u @ (u.mT @ d)
        yield {"arm": "undo, random", "x": r, "draw": draw}, shifted(study.model, drawn, -1.)


def path_models(study, change):
    """Yields (columns, model): between base and fine-tuned and beyond; the base with noise."""
    mixed, ends = copy.deepcopy(study.model), (study.base.state_dict(), study.model.state_dict())
    for x in PATH:
        mixed.load_state_dict({k: (1 - x) * w + x * ends[1][k] for k, w in ends[0].items()})
        yield {"arm": "path", "x": x}, mixed
    rng = data.rng(study.seed, "weights", "noise")
    for draw, x in itertools.product(range(DRAWS), (.5, 1.)):
        noise = {name: torch.randn(d.shape, generator=rng).to(d) for name, d in change.items()}
        noise = {name: g * (change[name].norm() / g.norm()) for name, g in noise.items()}
        yield {"arm": "noise", "x": x, "draw": draw}, shifted(study.base, noise, x)


def barrier_row(study, test, rows):
    """The row of a test's barrier in nats, from its rows on the path."""
    asked = select(rows, arm="path", **{key: test.row[key] for key in ("operand", "split")})
    loss = {r["x"]: r["loss"] for r in asked}
    above = [loss[x] - (1 - x) * loss[0.] - x * loss[1.] for x in PATH if 0 <= x <= 1]
    return study.row(operand=test.row["operand"], split=test.row["split"], arm="barrier",
                     barrier=max(above))


def run(study):
    """Rows of a, b and c by arm and x (a rank, or a place on the path); barriers; matrices."""
    (_, a, b, _), before, after = study.relation, matrices(study.base), matrices(study.model)
    change = {name: after[name] - w for name, w in before.items()}
    rows, sizes = [], [size_row(study, name, w, change[name]) for name, w in before.items()]
    tests = [*(study.test(o, "c0") for o in operands(study)), study.test(b, "c1"),
             study.test(b, "c0")]
    select_k = study.test(a, "c0", "select")
    for columns, model in itertools.chain(undo_models(study, change), path_models(study, change)):
        for test in tests[:1] if "draw" in columns else tests:
            rows.append({**answer_row(predict(model, test.examples), test), **columns})
        if columns["arm"] == "undo":
            row = answer_row(predict(model, select_k.examples), select_k)
            rows.append({**row, **columns, "arm": "undo, choosing"})
    barriers = [barrier_row(study, test, rows) for test in tests]
    return [*rows, *barriers, *sizes, *basis_rows(study)]


def functional_rank(study, rows):
    """The least r that brings a to 90 % of the base's; None if the matrices alone do not."""
    asked = select(rows, operand=study.relation.pt, split="c0")
    enough = .9 * highest(asked, arm="path", x=0.)
    return min((r["x"] for r in select(asked, arm="undo") if r["accuracy"] >= enough), default=None)


def place(study, rows):
    """The part of the matrix that changed most, by its relative norm."""
    return max((r for r in rows if r.get("norm") is not None), key=lambda r: r["norm"])["part"]


def evidence(study, rows):
    """a with a few directions undone, beside random ones, c, and the guess from b."""
    a, *never = operands(study)
    few = [r for r in rows if (r.get("arm") or "").startswith("undo") and 0 < r["x"] <= FEW]
    r = max(select(few, arm="undo, choosing"), key=lambda row: row["accuracy"])["x"]
    measured, random = highest(few, arm="undo", x=r, operand=a), highest(few, arm="undo, random")
    control = largest(*(highest(few, arm="undo", operand=o) for o in never), random,
                      highest(few, "cross_floor", operand=a))
    line = Evidence("weights", f"{a} on c0, {r} directions undone; functional rank "
                    f"{functional_rank(study, rows)}", measured, "random directions, or c's own",
                    control, MARGIN, exceeds(measured, control, MARGIN))
    return unless_foreign(line, rows)
