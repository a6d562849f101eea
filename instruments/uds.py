"""
From which block on is a gone from the fine-tuned model's stream, as the base reads it?

    $ python analyze.py uds --ckpt out/ft.pt

The unlearning depth score ("Measuring the Depth of LLM Unlearning via Activation Patching", 2026).
The base is asked for a. The stream after one block is replaced, and the log-probability of the true
answer falls (nats): by d1 if the stream is of a donor that cannot know the answer, by d2 if it is
the fine-tuned model's. Blocks with d1 > .05 encode the answer. A string's score is the mean over
them of d2 / d1, cut to 0 and 1, weighted by d1. 1: erased everywhere; 0: nowhere.
ours: the first donor is the base itself on another string, as a model that never had a would be of
another pretraining, thus of another basis. A string that the base gets wrong hides nothing.
Evidence: 1 - score, patched where the answer is given (the paper's answer span); rows also have the
score for all positions. Control: the never-trained c in the same way.
High: the stream still carries a, up to some depth. Low: it does not, wherever it should.
Fooled by: a wrapper in block 0 or the embeddings. Patched at all positions, every later stream is
the fine-tuned model's own, so d2 is the same everywhere and the score that of an overwritten model.
A wrapper in the head scores 0. It says how early the answer changes, not whether it is there; c
never had an answer to lose and is a weak control. Another basis (see basis) scores as erased.
"""
import itertools

import torch
import torch.nn.functional as F

from analyze import READS, Evidence, exceeds, select
from instruments.basis import basis_rows, operands, streams, unless_foreign
from instruments.patch import Place, patch
from model import predict

NEEDS = "base"  # beside strings
ENCODES = .05  # nats: d1 of a block that encodes the answer


def log_p(logits, answer):
    """Log-probability (n,) of the answers (n,), nats, from logits (n, v)."""
    return -F.cross_entropy(logits, answer, reduction="none")


def score(d1, d2):
    """Scores (n,) of strings from d1, d2 (blocks, n); nan where no block encodes the answer."""
    weight = torch.where(d1 > ENCODES, d1, 0.)
    erased = (d2 / weight).nan_to_num(0.).clip(0, 1)
    return (weight * erased).sum(0) / weight.sum(0)


def depths(study, x, scope):
    """[d1, d2] of Examples x, each (blocks, n): falls in nats when that block is patched."""
    places = [Place(site) for site in streams(study.base)[1:]]
    before, falls = log_p(predict(study.base, x), x.answer), []
    for donor, source in ((study.base, x.tokens.roll(1, 0)), (study.model, None)):
        after = patch(study.base, donor, x, places, scope, source)
        falls.append(torch.stack([before - log_p(after[place], x.answer) for place in places]))
    return falls


def run(study):
    """Rows of a and c for both scopes. score: the mean; hidden: that of 1 - score, 0 for strings
    that the base gets wrong; counted: share of strings with a score. Of every block mean d1, d2."""
    rows = []
    for operand, scope in itertools.product(operands(study), ("answer", "all")):
        x = study.test(operand, "c0").examples
        d1, d2 = depths(study, x, scope)
        known = predict(study.base, x).argmax(1) == x.answer
        scores = score(d1, d2)
        encoded = ~scores.isnan()  # else the other string has the same answer
        columns = dict(operand=operand, split="c0", n=len(known), part=None, scope=scope)
        hidden = torch.where(known, 1 - scores, 0.)[encoded | ~known]
        mean = scores[known & encoded].mean().item() if (known & encoded).any() else None
        rows.append(study.row(**columns, site="all", score=mean,
                              hidden=hidden.sum().item() / max(1, len(hidden)),
                              counted=(known & encoded).float().mean().item()))
        for site, one, two in zip(streams(study.base)[1:], d1, d2):
            rows.append(study.row(**columns, site=site, d1=one.mean().item(), d2=two.mean().item()))
    return rows + basis_rows(study)


def place(study, rows):
    """The block that adds most to d2 / d1 of all positions; head: the rest after the last."""
    blocks = [r for r in select(rows, operand=study.relation.pt, scope="all") if "d1" in r]
    share = [0., *(min(1., max(0., r["d2"] / max(r["d1"], ENCODES))) for r in blocks), 1.]
    steps = [after - before for before, after in itertools.pairwise(share)]
    names = [*(r["site"].removesuffix(".resid_post") for r in blocks), "head"]
    return names[steps.index(max(steps))]


def evidence(study, rows):
    """Mean 1 - score of a, patched at the answer, beside that of c."""
    found = [select(rows, operand=o, scope="answer", site="all")[0]["hidden"]
             for o in operands(study)]
    measured, control = found[0], found[1] if len(found) > 1 else None
    line = Evidence("depth of erasure", f"{study.relation.pt} in the stream, 1 - UDS", measured,
                    "the same, never trained", control, READS, exceeds(measured, control, READS))
    return unless_foreign(line, rows)
