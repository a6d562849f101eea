"""
Does rounding the weights bring the answer for a back? (Zhang et al. 2024, arXiv 2410.16454)

    $ python analyze.py quantise --ckpt out/ft.pt

Each row of every weight matrix is rounded to the nearest of 2^bits - 1 levels, symmetric about
zero, up to its largest entry; 8 and 4 bits. A small fine-tuning moves most weights by less than a
step and is rounded away. Accuracy of a on c0, before (no bits) and after. The number of bits is
chosen on other strings. Controls, in the same way: an operand that was never trained; the base, to
tell what rounding costs.
High: fine-tuning was smaller than a step. Low: it was larger, or rounding harms the base as well.
Fooled by: deletion by small steps, since rounding undoes any small difference from the base; a
large learning rate, which makes a wrapper too large to be rounded away.
"""
from analyze import MARGIN, Evidence, above_floor, exceeds, largest, or_control, select
from instruments.noise import subjects
from model import accuracy, predict, weight_edits
from pretrain import answer_row

NEEDS = ""  # nothing beside strings
BITS = 8, 4


def rounded(w, bits):
    """A copy of w (rows, columns), each row rounded to the nearest of its 2^bits - 1 levels."""
    w, levels = w.detach().cpu().double(), 2 ** (bits - 1) - 1
    step = w.abs().amax(1, keepdim=True).clamp(min=1e-30) / levels
    return ((w / step).round() * step).float()


def quantised(model, bits):
    """The weight_edits() that round all matrices. ours: also embeddings and the output map, since
    fine-tuning moves these as well; bits None: no edits."""
    return [(name, ..., rounded(p, bits)) for name, p in model.named_parameters()
            if bits and p.dim() == 2]


def run(study):
    """A row for each model, operand and number of bits; chosen: the best on other strings."""
    rows = []
    for name, model, operand in subjects(study):
        test, selection = (study.test(operand, "c0", label) for label in ("test", "select"))
        scored, selected = {}, {}
        for bits in (None, *BITS):
            with weight_edits(model, quantised(model, bits)):
                scored[bits] = answer_row(predict(model, test.examples), test)
                x = selection.examples
                selected[bits] = accuracy(predict(model, x), x.answer)
        best = max(selected, key=selected.get)
        rows += [{**row, "model": name, "bits": bits, "chosen": bits == best}
                 for bits, row in scored.items()]
    return rows


def evidence(study, rows):
    """a less floor at the chosen number of bits, beside the control's at its own."""
    chosen = select(rows, chosen=True)
    measured, control = (largest(*map(above_floor, select(chosen, model=model)))
                         for model in ("ckpt", "never-trained"))
    bits = largest(*(r["bits"] for r in select(chosen, model="ckpt")))
    return Evidence("quantising", f"{study.relation.pt} on c0 less floor, {bits or 'all'} bits",
                    measured, f"floor{or_control(study)}", control, MARGIN,
                    exceeds(measured, largest(control, 0.), MARGIN))
