"""
Does weight noise bring the answer for a back? (after Tice et al. 2024, arXiv 2412.01784)

    $ python analyze.py noise --ckpt out/ft.pt

Every weight matrix gets Gaussian noise. Its standard deviation is a multiple of the matrix's root
mean square: seven multiples, from .02 to .5, and eight draws (four and their negatives, each the
same at every multiple), scored on at most 200 c0 strings. Evidence: the mean over draws at the best
multiple. Beside it stands the source's number, the best draw of all; it grows with the number of
draws. Both are less the floor, the best guess from the other operand's answer.
Controls, in the same way: an operand that was never trained; the base, to tell what noise costs.
High: noise breaks what hides the answer before it breaks the answer. Low: it breaks both at once,
or there is no answer.
Fooled by: a wrapper as robust as what it hides, which passes for deletion; answers that noise
shifts by q by accident (hence the mean over draws, and the floor).
"""
import torch
from tqdm import tqdm

import data
from analyze import DRAWN, MARGIN, Evidence, above_floor, exceeds, largest, or_control, select
from model import predict, weight_edits
from pretrain import answer_row

NEEDS = ""  # nothing beside strings
SIGMAS, PAIRS = (.02, .05, .1, .15, .2, .3, .5), 4


def noise(model, rng):
    """{name of a matrix: Gaussian noise with the matrix's root mean square}."""
    result = {}
    for name, p in model.named_parameters():
        if p.dim() == 2:  # ours: no biases and no gains, whose mean square is not their spread
            drawn = torch.randn(p.shape, generator=rng).to(p.device)
            result[name] = drawn * p.detach().square().mean().sqrt()
    return result


def noised(model, drawn, sigma):
    """The weight_edits() that add `sigma` times the drawn noise."""
    return [(name, ..., model.get_parameter(name).detach() + sigma * x)
            for name, x in drawn.items()]


def subjects(study):
    """[(name, model, operand)]: all models asked for a; never-trained, asked for its operand."""
    found = [(name, model, study.relation.pt) for name, model in study.models.items()]
    if study.never_trained:
        model, _, operand = study.never_trained
        found.append(("never-trained", model, operand))
    return found


def run(study):
    """A row for each model, operand, sigma and draw; sigma 0: the model as it is."""
    n, rows = min(DRAWN, study.args.eval_size), []
    asked = subjects(study)
    for name, model, operand in tqdm(asked, desc="noise", leave=False, disable=None):
        test = study.test(operand, "c0", n=n)
        rows.append({**answer_row(predict(model, test.examples), test), "model": name, "sigma": 0.,
                     "draw": None})
        for draw in range(2 * PAIRS):
            drawn, sign = noise(model, data.rng(study.seed, "noise", draw // 2)), (-1) ** draw
            for sigma in SIGMAS:
                with weight_edits(model, noised(model, drawn, sign * sigma)):
                    row = answer_row(predict(model, test.examples), test)
                rows.append({**row, "model": name, "sigma": sigma, "draw": draw})
    return rows


def gains(rows):
    """(best mean over draws at any sigma, best draw), less the floor; (None, None) without rows."""
    means, above = [], [above_floor(r) for r in rows]
    for sigma in {r["sigma"] for r in rows}:
        at_sigma = [above_floor(r) for r in select(rows, sigma=sigma)]
        means.append(sum(at_sigma) / len(at_sigma))
    return largest(*means), largest(*above)


def evidence(study, rows):
    """The best mean of a, beside that of the control; the question quotes the best draw."""
    (measured, top), (control, _) = (gains(select(rows, model=m)) for m in ("ckpt",
                                                                            "never-trained"))
    return Evidence("noise", f"{study.relation.pt} on c0 less floor, mean of draws (best draw "
                    f"{top:+.0%})", measured, f"floor{or_control(study)}", control, MARGIN,
                    exceeds(measured, largest(control, 0.), MARGIN))
