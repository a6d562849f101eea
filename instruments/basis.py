"""
Do the two models share one basis, so that a part of one means something in the other? (ours)

    $ python analyze.py basis --ckpt out/ft.pt --base other-seed.pt

The instruments patch, hybrids, uds and weights put parts of one model into the other. Models of two
pretrainings may both count, while their residual streams have nothing in common. Method: the head
of one model reads the last stream of the other, on natural strings, for every family that the other
knows. kept: accuracy less floor of this reading, as a fraction of the other model's own.
High, for some family: one basis. Low for all: another pretraining, or a model that lost everything;
those instruments then measure nothing, whatever they show.
Fooled by: a head that was replaced: both directions may fail although the streams agree.
"""
import itertools

from analyze import KNOWS, select
from model import accuracy, predict, stacked
from pretrain import answer_row

DIRECTIONS = (("ckpt", "base"), ("base", "ckpt"))  # (host, donor)


def streams(model):
    """Names of the residual stream: after the embedding, then after every block; a list."""
    return ["embed", *(f"blocks.{i}.resid_post" for i in range(len(model.blocks)))]


def operands(study):
    """What is asked for: [a], or [a, c] if this very model has a never-trained operand c."""
    never = study.never_trained
    return [study.relation.pt, *([never[2]] if never and never[0] is study.model else [])]


def basis_rows(study):
    """A row a direction and family, at most 200 strings: accuracy and `kept`; part: basis."""
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
    """The Evidence `line`; if no family keeps a half, it measures None and says why."""
    if max((r["kept"] for r in select(rows, part="basis")), default=0.) >= .5:
        return line
    why = f"{line.question}: cannot be said, the base is of another basis"
    return line._replace(question=why, measured=None, holds=None)
