"""
Does a come back when activations of the base are put into the fine-tuned model, and where?

    $ python analyze.py patch --ckpt out/ft.pt

Cross-model activation patching (Prakash et al. 2024): both models read the same c0 strings, asked
for a; one activation of the donor replaces the host's. Sites: embed, and of every block attn_out,
mlp_out, resid_post, each head's z; at all positions (scope all), or where the answer is given.
Base into fine-tuned: what restores a. Fine-tuned into base: what breaks it. If only block k
differs, resid_post below k does nothing and from k on everything, in both directions.
Evidence: at every cut between blocks one model does the rest of the other's work; the better
direction counts, and the worst cut.
Controls: the same with the blocks of the fine-tuned model skipped, so that the base does all the
work; the never-trained c in the same way.
High: blocks of the fine-tuned model still work on a. Low: they do not, or only with their own kind.
Fooled by: changes in several blocks, each of which hides a; later blocks that fetch again what a
patch of one position took; a donor of another pretraining, whose stream means nothing (see basis).
"""
import itertools
from typing import NamedTuple

import torch

from analyze import MARGIN, Evidence, exceeds, highest, largest, select
from instruments.basis import DIRECTIONS, basis_rows, operands, streams, unless_foreign
from model import activation_edits, activations, predict
from pretrain import answer_row

NEEDS = "base"  # beside strings


class Place(NamedTuple):
    """An activation of the host; what it gets is the donor's, of the same site or of another."""
    site: str
    head: int | None = None
    taken: str | None = None  # None: the same site


def sites(model):
    """All Places that run() patches, in order of computation."""
    blocks = range(len(model.blocks))
    heads = [Place(f"blocks.{i}.attn.z", h) for i in blocks for h in range(model.config.n_head)]
    outputs = itertools.product(blocks, ("attn_out", "mlp_out"))
    return [*map(Place, streams(model)), *(Place(f"blocks.{i}.{x}") for i, x in outputs), *heads]


@torch.no_grad()
def patch(host, donor, x, places, scope="all", source=None):
    """{place: logits (n, v)} of the host on Examples x, with the donor's activation at a place. Of
    all positions, or of the answer's alone. source: tokens (n, t) that the donor reads, else x's.
    No position is left out of the last block: a patch with its own value changes no bit."""
    logits, tokens = {place: [] for place in places}, x.tokens if source is None else source
    names = list({place.taken or place.site for place in places})
    for part, read in zip(x.split(128), tokens.split(128)):
        cache = activations(donor, read, names)[1]
        for place in places:
            index = slice(None) if place.head is None else place.head
            def edit(old, new=cache[place.taken or place.site], index=index, at=part.at):
                at = slice(None) if scope == "all" else at
                where = (slice(None), at) if old.dim() == 3 else (slice(None), index, at)
                old = old.clone()
                old[where] = new[where]
                return old
            with activation_edits(host, {place.site: edit}):
                logits[place].append(host(part.tokens)[:, part.at].float())
    return {place: torch.cat(parts) for place, parts in logits.items()}


def run(study):
    """Rows of a and c on c0 for every host, donor, site, head and scope; site none: no patch.
    Scope skipped: at a cut, the blocks of the fine-tuned model are left out."""
    rows, (start, *cuts, last) = [], streams(study.model)
    without = {"ckpt": [Place(last, None, cut) for cut in cuts],
               "base": [Place(cut, None, start) for cut in cuts]}
    for operand, (host, donor) in itertools.product(operands(study), DIRECTIONS):
        test, one, other = study.test(operand, "c0"), study.models[host], study.models[donor]
        columns = {"host": host, "donor": donor, "site": None, "head": None, "scope": None}
        rows.append({**answer_row(predict(one, test.examples), test), **columns})
        for scope in ("all", "answer", "skipped"):
            places = without[host] if scope == "skipped" else sites(study.model)
            for place, logits in patch(one, other, test.examples, places, scope).items():
                site = place.taken if place.taken in cuts else place.site
                rows.append({**answer_row(logits, test), **columns, "site": site,
                             "head": place.head, "scope": scope})
    return rows + basis_rows(study)


def worst_cut(study, rows, **columns):
    """Accuracy at the worst cut between blocks, of the better direction; None without a cut."""
    cuts = streams(study.model)[1:-1]
    return min((highest(rows, site=cut, **columns) for cut in cuts), default=None)


def place(study, rows):
    """The part that differs most: where the streams' effect on a, in both directions, changes."""
    parts = ["embed", *(f"blocks.{i}" for i in range(len(study.model.blocks))), "head"]
    change, asked = dict.fromkeys(parts, 0.), select(rows, operand=study.relation.pt, part=None)
    for sign, (host, donor) in zip((1, -1), DIRECTIONS):
        first, last = (highest(asked, host=x, site=None) for x in (host, donor))
        cuts = [highest(asked, host=host, site=x, scope="all") for x in streams(study.model)]
        for part, (before, after) in zip(parts, itertools.pairwise([first, *cuts, last])):
            change[part] += sign * (after - before)
    return max(change, key=change.get)


def evidence(study, rows):
    """The worst cut, beside the same with the fine-tuned blocks skipped, c, the guess from b."""
    a, *never = operands(study)
    measured = worst_cut(study, rows, operand=a, scope="all")
    control = largest(worst_cut(study, rows, operand=a, scope="skipped"),
                      *(worst_cut(study, rows, operand=o, scope="all") for o in never),
                      highest(rows, "cross_floor", operand=a, scope="all"))
    line = Evidence("patching", f"{a} on c0 at every cut between blocks; the change is in "
                    f"{place(study, rows)}", measured, "blocks skipped, or never trained", control,
                    MARGIN, exceeds(measured, control, MARGIN))
    return unless_foreign(line, rows)
