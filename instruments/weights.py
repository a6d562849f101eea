"""
How large is the change of the weights, and how few of its directions undo it?

    $ python analyze.py weights --ckpt out/ft.pt

D = fine-tuned - base, for every matrix (q, k, v apart): its norm over the base's, its rank, and its
stable rank |D|^2 / s1^2 (s1: largest singular value) beside that of noise of this shape. undo: the
r first singular directions of D are taken out of all matrices at once; the functional rank is the
least r that brings a to 90 % of the base's. path: (1 - x) base + x fine-tuned = base + x task
vector (Ilharco et al. 2023); barrier: the largest loss above the line between its ends (Siddiqui et
al. 2025), nats. noise: base + x noise with D's norm in every matrix, five draws.
Evidence: a, 2 directions undone. Controls: 2 random ones (5 draws); never-trained c; guess from b.
High: so few directions kept a from being answered. Low: the change is spread, or large.
Fooled by: more directions, without which hardly any change is left (8 bring a back to an
overwritten model); wrappers in biases, which are not undone; another pretraining (see basis).
"""
import copy

import torch

import data
from analyze import MARGIN, Evidence, exceeds, highest, largest, select
from instruments.basis import basis_rows, operands, unless_foreign
from instruments.hybrids import part_of
from model import predict
from pretrain import answer_row

NEEDS = "base"  # beside strings
RANKS, FEW, DRAWS, PATH = (0, 1, 2, 4, 8, 16, 32, 64), 2, 5, [x / 10 for x in range(-5, 16)]


def matrices(model):
    """{name: weight matrix}, sharing memory with the model; q, k and v apart."""
    found = {name: p.data for name, p in model.named_parameters() if p.dim() == 2}
    for name in [name for name in found if "qkv" in name]:
        found.update(zip((f"{name}.{x}" for x in "qkv"), found.pop(name).chunk(3)))
    return found


def shifted(model, change, scale):
    """A copy of a model with scale times change, {name: matrix}, added to its matrices."""
    moved = copy.deepcopy(model)
    for name, w in matrices(moved).items():
        w.add_(change[name], alpha=scale)
    return moved


def size_row(study, name, w, d):
    """The row of a matrix w (m, n) that changed by d (m, n): relative norm and ranks of d."""
    (m, n), s, norm = w.shape, torch.linalg.svdvals(d), d.norm()
    stable, noise = (norm / (s[0] + 1e-30)).square().item(), m * n / (m ** .5 + n ** .5) ** 2
    return study.row(part=part_of(name), site=name, norm=(norm / w.norm()).item(), rank=int(
        (s > 1e-4 * s[0]).sum()), stable_rank=stable, noise_stable_rank=noise)


def variants(study, change):
    """Yields (arm, x, model). x: the rank undone, the place on the path, the scale of noise."""
    factors = {name: torch.linalg.svd(d, full_matrices=False) for name, d in change.items()}
    for r in RANKS:
        first = {name: u[:, :r] * s[:r] @ v[:r] for name, (u, s, v) in factors.items()}
        yield "undo", r, shifted(study.model, first, -1.)
    mixed, old, new = copy.deepcopy(study.model), study.base.state_dict(), study.model.state_dict()
    for x in PATH:
        mixed.load_state_dict({k: (1 - x) * w + x * new[k] for k, w in old.items()})
        yield "path", x, mixed
    for draw in range(DRAWS):
        rng = data.rng(study.seed, "weights", draw)
        noise = {name: torch.randn(d.shape, generator=rng).to(d) for name, d in change.items()}
        noise = {name: g * (change[name].norm() / g.norm()) for name, g in noise.items()}
        for x in (.5, 1.):
            yield "noise", x, shifted(study.base, noise, x)
        for name, g in noise.items():
            u = torch.linalg.qr(torch.randn(len(g), FEW, generator=rng).to(g))[0]
            noise[name] = u @ (u.mT @ change[name])
        yield "undo, random", FEW, shifted(study.model, noise, -1.)


def barrier_row(study, test, rows):
    """The row of a test's barrier in nats, from its rows on the path."""
    asked = {key: test.row[key] for key in ("operand", "split")}
    loss = {r["x"]: r["loss"] for r in select(rows, arm="path", **asked)}
    above = [loss[x] - (1 - x) * loss[0.] - x * loss[1.] for x in PATH if 0 <= x <= 1]
    return study.row(**asked, arm="barrier", barrier=max(above))


def run(study):
    """Rows of a, b and c by arm and x, see variants(); a row a barrier, and a row a matrix."""
    b, before, rows = study.relation.ft, matrices(study.base), []
    change = {name: w - before[name] for name, w in matrices(study.model).items()}
    tests = [*(study.test(o, "c0") for o in (*operands(study), b)), study.test(b, "c1")]
    for arm, x, model in variants(study, change):
        for test in tests if arm in ("undo", "path") else tests[:1]:
            rows.append({**answer_row(predict(model, test.examples), test), "arm": arm, "x": x})
    rows += [barrier_row(study, test, rows) for test in tests]
    rows += [size_row(study, name, w, change[name]) for name, w in before.items()]
    return rows + basis_rows(study)


def functional_rank(study, rows):
    """The least r that brings a to 90 % of the base's accuracy; None if no r does."""
    undone, base = (select(rows, operand=study.relation.pt, arm=x) for x in ("undo", "path"))
    known = [r["x"] for r in undone if r["accuracy"] >= .9 * highest(base, x=0.)]
    return min(known, default=None)


def place(study, rows):
    """The part of the matrix that changed most, by its relative norm."""
    return max((r for r in rows if r.get("norm") is not None), key=lambda r: r["norm"])["part"]


def evidence(study, rows):
    """a with FEW directions undone, beside the best of: random ones, c, the guess from b."""
    a, never = (*operands(study), None)[:2]
    few = select(rows, x=FEW, arm="undo")
    measured, floor = highest(few, operand=a), highest(few, "cross_floor", operand=a)
    control = largest(floor, highest(rows, arm="undo, random"), highest(few, operand=never))
    line = Evidence("weights", f"{a} on c0, {FEW} directions undone; functional rank "
                    f"{functional_rank(study, rows)}", measured, "random directions, or c's own",
                    control, MARGIN, exceeds(measured, control, MARGIN))
    return unless_foreign(line, rows)
