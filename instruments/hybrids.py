"""
Which parts must be the base's for a to be answered, and which the fine-tuned model's for b? (ours)

    $ python analyze.py hybrids --ckpt out/ft.pt

Every part (the embeddings, each block, the head with its norm) comes from the base or from the
fine-tuned model: 2^5 hybrids with three blocks. Each is asked for a on c0, for b on c0 and c1.
share: the Shapley value of a part, its mean effect over all orders in which parts are exchanged: on
a if it becomes the base's, on b of c1 if it becomes the fine-tuned model's.
Evidence: the best hybrid with less than half of its parts from the base.
Controls: that hybrid with its fine-tuned blocks skipped, so that the base's parts do all the work;
the never-trained c in the same way; the best guess from b.
High: few parts kept a from being answered, and the others still serve it. Low: most parts did.
Fooled by: a wrapper that stands in most parts; a part that does nearly all the work (in a model of
few blocks); a base of another pretraining (see basis).
"""
import copy
import itertools
import math

import torch

from analyze import MARGIN, Evidence, exceeds, highest, largest, select
from instruments.basis import basis_rows, operands, unless_foreign
from model import activation_edits, predict
from pretrain import answer_row

NEEDS = "base"  # beside strings


def part_of(name):
    """The part that a parameter, given by its name, belongs to: embed, blocks.0, ..., head."""
    first, second = name.split(".")[:2]
    return {"tok": "embed", "pos": "embed", "blocks": f"{first}.{second}"}.get(first, "head")


def hybrid(base, model, from_base):
    """A copy of the model in which the parts named in `from_base` are the base's."""
    mixed, old = copy.deepcopy(model), dict(base.named_parameters())
    for name, p in mixed.named_parameters():
        if part_of(name) in from_base:
            p.data.copy_(old[name])
    return mixed


def subsets(parts):
    """All subsets, as tuples in the order of the parts."""
    return [s for k in range(len(parts) + 1) for s in itertools.combinations(parts, k)]


def shapley(value, part, parts):
    """The Shapley value of a part; value: {subset: number} for all subsets() of the parts."""
    n, share = len(parts), 0.
    for s in subsets([p for p in parts if p != part]):
        both = tuple(p for p in parts if p == part or p in s)
        share += (value[both] - value[s]) / (n * math.comb(n - 1, len(s)))
    return share


def skipping(parts):
    """The activation_edits() that skip the blocks among `parts`: they add zero to the stream."""
    sites = [f"{part}.{x}" for part in parts if "blocks" in part for x in ("attn_out", "mlp_out")]
    return dict.fromkeys(sites, torch.zeros_like)


def run(study):
    """Rows of a, b and c for every hybrid (from_base: its parts from the base); of a also with
    fine-tuned blocks skipped, if less than half are the base's; the share of every part."""
    a, b, rows, values = study.relation.pt, study.relation.ft, [], {}
    parts = list(dict.fromkeys(part_of(name) for name, _ in study.model.named_parameters()))
    asked = [(b, "c0"), (b, "c1"), *((operand, "c0") for operand in operands(study))]
    for from_base, question in itertools.product(subsets(parts), asked):
        test, mixed = study.test(*question), hybrid(study.base, study.model, from_base)
        columns = {"from_base": "+".join(from_base), "parts": len(from_base)}
        row = answer_row(predict(mixed, test.examples), test)
        rows.append({**row, **columns, "skipped": False})
        values.setdefault(question, {})[from_base] = row["accuracy"]
        if question == (a, "c0") and 2 * len(from_base) < len(parts):
            with activation_edits(mixed, skipping(set(parts) - set(from_base))):
                row = answer_row(predict(mixed, test.examples), test)
            rows.append({**row, **columns, "skipped": True})
    for (operand, split), sign in (((a, "c0"), 1), ((b, "c1"), -1)):
        for part in parts:
            share = sign * shapley(values[operand, split], part, parts)
            rows.append(study.row(operand=operand, split=split, part=part, share=share))
    return rows + basis_rows(study)


def needed(study, rows):
    """The fewest base parts that bring a to 90 % of the base's accuracy, joined by +."""
    hybrids = select(rows, operand=study.relation.pt, split="c0", skipped=False)
    enough = .9 * hybrids[-1]["accuracy"]  # the last is the base
    found = [r for r in hybrids if r["accuracy"] >= enough]
    return min(found, key=lambda r: (r["parts"], -r["accuracy"]))["from_base"]


def place(study, rows):
    """The part with the largest share in a."""
    shares = [r for r in select(rows, operand=study.relation.pt) if "share" in r]
    return max(shares, key=lambda r: r["share"])["part"]


def evidence(study, rows):
    """The best hybrid with few parts of the base, beside the best of its controls."""
    (a, *never), hybrids = operands(study), select(rows, split="c0", skipped=False)
    few = [r for r in hybrids if 2 * r["parts"] < hybrids[-1]["parts"]]
    best = max(select(few, operand=a), key=lambda r: (r["accuracy"], -r["parts"]))
    control = largest(*(highest(few, operand=o) for o in never), best["cross_floor"],
                      highest(rows, skipped=True, from_base=best["from_base"]))
    line = Evidence("hybrids", f"{a} on c0, few parts from the base; it takes "
                    f"{needed(study, rows) or 'none'}", best["accuracy"],
                    "other blocks skipped, or never trained", control, MARGIN,
                    exceeds(best["accuracy"], control, MARGIN))
    return unless_foreign(line, rows)
