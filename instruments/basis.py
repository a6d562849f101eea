"""
Are the two models of one basis, so that parts of one mean anything in the other?

    $ python analyze.py basis --ckpt out/ft.pt --base other-seed.pt

Instruments that put parts of the base into the fine-tuned model (patch, hybrids, uds, weights) need
this: two pretrainings may both count, in streams that have nothing in common (ours). The head of
one model reads the last stream of the other, for every family that the other knows, on natural
strings. kept: what is left of its accuracy above the floor.
High, for some family: one basis. Low for all: another pretraining, or nothing in common any more;
then those instruments measure nothing, whatever they show.
Fooled by: a head that was replaced, if both directions fail.
"""
import itertools

from analyze import KNOWS, select
from model import accuracy, predict, stacked
from pretrain import answer_row

DIRECTIONS = (("ckpt", "base"), ("base", "ckpt"))  # (host, donor)


def streams(model):
    """Names of the residual stream: embed, then after every block."""
    return ["embed", *(f"blocks.{i}.resid_post" for i in range(len(model.blocks)))]


def operands(study):
    """What is asked for: a, and the never-trained operand if this very model has one."""
    never = study.never_trained
    return [study.relation.pt, *([never[2]] if never and never[0] is study.model else [])]


def basis_rows(study):
    """Rows of what one model's head makes of the other's last stream; part: basis."""
    rows, last = [], streams(study.model)[-1:]
    tests = [test.rows(slice(200)) for test in study.setup.tests(study.run)
             if test.row["split"] == "natural"]
    for (host, donor), test in itertools.product(DIRECTIONS, tests):
        x, model = test.examples, study.models[host]
        alone = accuracy(predict(study.models[donor], x), x.answer)
        if alone >= KNOWS:
            stream = stacked(study.models[donor], x, last, lambda s, _: s[:, x.at])[:, 0]
            row = answer_row(model.head(model.ln(stream)).detach(), test)
            kept = (row["accuracy"] - row["floor"]) / (alone - row["floor"] + 1e-9)
            rows.append({**row, "part": "basis", "host": host, "donor": donor, "kept": kept})
    return rows


def run(study):
    """Rows of both directions and all families that the donor knows."""
    return basis_rows(study)


def unless_foreign(line, rows):
    """The Evidence; without a measurement, and with the reason, if no family keeps a half."""
    if max((r["kept"] for r in select(rows, part="basis")), default=0.) >= .5:
        return line
    why = f"{line.question}: cannot be said, the base is of another basis"
    return line._replace(question=why, measured=None, holds=None)
