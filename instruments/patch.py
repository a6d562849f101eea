"""
Does a come back when activations of the base are put into the fine-tuned model, and where?

    $ python analyze.py patch --ckpt out/ft.pt

Cross-model activation patching (Prakash et al. 2024): both models read the same c0 strings, asked
for a; one activation of the donor replaces the host's. Sites: embed; of every block attn_out,
mlp_out, resid_post and each head's z; at all positions (scope all), or where the answer is given.
With the base as donor it shows what restores a, with the base as host what breaks a. If only block
k differs, a patch of an earlier resid_post does nothing, of block k's or a later one everything.
Evidence: at a cut between two blocks one model computes the stream and the other goes on with it.
The accuracy of the better direction counts, at the worst cut.
Controls: the same with the blocks of the fine-tuned model skipped, so that the base does all the
work; the never-trained c in the same way; the best guess from b.
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
    """An activation of the host that is replaced, and the donor's that takes its place."""
    site: str
    head: int | None = None
    taken: str | None = None  # the donor's site; None: the same


def sites(model):
    """All Places that run() patches, in order of computation."""
    blocks = range(len(model.blocks))
    heads = [Place(f"blocks.{i}.attn.z", h) for i in blocks for h in range(model.config.n_head)]
    outputs = itertools.product(blocks, ("attn_out", "mlp_out"))
    return [*map(Place, streams(model)), *(Place(f"blocks.{i}.{x}") for i, x in outputs), *heads]


@torch.no_grad()
def patch(host, donor, x, places, scope="all", source=None):
    """{place: logits (n, v)} of the host on Examples x with the donor's activation at a place:
    at all positions (scope all) or the answer's alone. source: tokens (n, t) that the donor reads,
    else x's. The last block computes all positions: a patch with its own value changes no bit."""
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
    """Rows of a and c on c0 for every host, donor, site, head and scope; site None: no patch.
    Scope skipped: the fine-tuned model's blocks before or after a cut are left out."""
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
    """The part at which the effect of patched streams on a changes most, over both directions."""
    parts = ["embed", *(f"blocks.{i}" for i in range(len(study.model.blocks))), "head"]
    change, asked = dict.fromkeys(parts, 0.), select(rows, operand=study.relation.pt, part=None)
    for sign, (host, donor) in zip((1, -1), DIRECTIONS):
        first, last = (highest(asked, host=x, site=None) for x in (host, donor))
        cuts = [highest(asked, host=host, site=x, scope="all") for x in streams(study.model)]
        for part, (before, after) in zip(parts, itertools.pairwise([first, *cuts, last])):
            change[part] += sign * (after - before)
    return max(change, key=change.get)


def evidence(study, rows):
    """The worst cut, beside the best of: blocks skipped, c in the same way, the guess from b."""
    a, *never = operands(study)
    measured = worst_cut(study, rows, operand=a, scope="all")
    control = largest(worst_cut(study, rows, operand=a, scope="skipped"),
                      *(worst_cut(study, rows, operand=o, scope="all") for o in never),
                      highest(rows, "cross_floor", operand=a, scope="all"))
    line = Evidence("patching", f"{a} on c0 at every cut between blocks; the change is in "
                    f"{place(study, rows)}", measured, "blocks skipped, or never trained", control,
                    MARGIN, exceeds(measured, control, MARGIN))
    return unless_foreign(line, rows)
