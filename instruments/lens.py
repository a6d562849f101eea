"""
Does the residual stream say the answer for a before it is overwritten? (nostalgebraist 2020; Belrose
et al. 2023, arXiv 2303.08112)

    $ python analyze.py lens --ckpt out/ft.pt --also out/never-ft.pt

The last layer norm and output map, applied to the embedding and to every block's attn_out,
resid_mid, mlp_out and resid_post at the position of the answer, while a is asked on c0 strings.
Three readings: by the model's own output map; by the base's (the logit lens of UDS, arXiv
2605.24614); and by a tuned lens, an affine map before the base's output map, trained to give the
base's own answers from the base's activations. It sees no true answer, and nothing of the fine-tuned
model: a lens trained on that would learn its wrong answers. Site and reading are chosen on other
strings. Controls, in the same way: an untrained model; those of --also, which never had a; an
operand that was never trained.
High: the base's answer is there, where the base had it. Low: it is not, or it is in another place.
Fooled by: another basis, where every reading fails (never-models of another pretraining: hence the
never-trained operand); last blocks that still work, since they read a and say so; at early blocks
a tuned lens that counts by itself.
"""
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from analyze import (MARGIN, Evidence, above_floor, exceeds, largest, or_control, other_starts,
                     rule_shares, select)
from data import UserError
from model import accuracy, stacked
from pretrain import answer_row

STEPS, BATCH, RATE = 1000, 96, 1e-3
PARTS = "attn_out", "resid_mid", "mlp_out", "resid_post"


def sites(model):
    """Names of the activations that are read, in order of computation."""
    return ["embed", *(f"blocks.{i}.{part}" for i in range(len(model.blocks)) for part in PARTS)]


def streams(model, examples):
    """(sites, n, d): activations at the position of the answer."""
    x = stacked(model, examples, sites(model), lambda x, _: x[:, examples.at])
    return x.transpose(0, 1).contiguous()


@torch.no_grad()
def logit_lens(model, examples, reader):
    """(sites, n, v): the layer norm and output map of `reader`, on all positions as it does."""
    logits = stacked(model, examples, sites(model), lambda x, _: reader.head(reader.ln(x))[
        :, examples.at])
    return logits.transpose(0, 1)


def translate(x, lens):
    """x (sites, n, d), each site by its affine map: lens = matrices, biases; zeros change nothing."""
    matrix, bias = lens
    return x + torch.baddbmm(bias, x, matrix)


def tuned_lens(model, x, steps, rng):
    """An affine map a site, after which the output map gives what it gives of the last site: least
    KL from its distribution. x (sites, n, d). Returns (sites, d, d), (sites, 1, d)."""
    # ours: Adam; the source's SGD is made for many thousand dimensions
    lens = [x.new_zeros(len(x), rows, x.shape[2], requires_grad=True) for rows in (x.shape[2], 1)]
    optimizer = torch.optim.Adam(lens, RATE)
    with torch.no_grad():
        wanted = model.head(model.ln(x[-1])).log_softmax(-1)
    for _ in tqdm(range(steps), desc="lens", leave=False, disable=None):
        pick = torch.randint(x.shape[1], (BATCH,), generator=rng).to(x.device)
        logits = model.head(model.ln(translate(x.index_select(1, pick), lens)))
        loss = F.kl_div(logits.log_softmax(-1), wanted[pick].expand_as(logits),
                        reduction="sum", log_target=True) / BATCH
        for p, grad in zip(lens, torch.autograd.grad(loss, lens)):  # none of the model's own
            p.grad = grad
        optimizer.step()
    return [p.detach() for p in lens]


@torch.no_grad()
def readings(study, model, examples, lens):
    """{head: logits (sites, n, v)}: own, base and tuned."""
    base = study.base
    return {"own": logit_lens(model, examples, model), "base": logit_lens(model, examples, base),
            "tuned": base.head(base.ln(translate(streams(model, examples), lens)))}


def model_rows(study, name, model, operand, lens):
    """A row a site and head; chosen: the best of the model on other strings."""
    (task, a, b, q), rows, selected = study.relation.for_operand(operand), [], []
    test, selection = (study.test(operand, "c0", label) for label in ("test", "select"))
    chosen = readings(study, model, selection.examples, lens)
    for head, logits in readings(study, model, test.examples, lens).items():
        for site, x, y in zip(sites(model), logits, chosen[head]):
            truths = (study.labels(test.examples, o) for o in (a, b))
            shares = rule_shares(x.argmax(1) - study.setup.first_answer(task), *truths, q)
            rows.append({**answer_row(x, test), "model": name, "site": site, "head": head,
                         "share_a_plus_q": shares["share_a_plus_q"]})
            selected.append(accuracy(y, selection.examples.answer))
    best = selected.index(max(selected))
    return [{**row, "chosen": i == best} for i, row in enumerate(rows)]


def run(study):
    """Rows of all models asked for a, and of the fine-tuned one asked for the control operand."""
    a, n, base = study.relation.pt, study.args.eval_size, study.base
    if not base:
        raise UserError("lens: needs a base, to train a lens on")
    asked = [a, *(study.never_trained or ())[2:]]
    seen = [study.test(operand, split, "lens", 5 * n).examples
            for operand in asked for split in ("natural", "c0")]
    x = torch.cat([streams(base, examples) for examples in seen], 1)
    lens = tuned_lens(base, x, study.args.steps or STEPS, data.rng(study.seed, "lens"))
    others = {arm: model for arm, (model, operand) in other_starts(study).items() if operand == a}
    subjects = {**study.models, "untrained": study.untrained(), **others}
    subjects = [(name, model, a) for name, model in subjects.items()]
    if study.never_trained:
        model, _, operand = study.never_trained
        subjects.append(("never-trained", model, operand))
    return [row for subject in subjects for row in model_rows(study, *subject, lens)]


def evidence(study, rows):
    """a less floor by the reading and site chosen, beside the best of all controls at theirs."""
    chosen = select(rows, chosen=True)
    best = select(chosen, model="ckpt")[0]
    control = largest(*(above_floor(r) for r in chosen if r["model"] not in study.models))
    measured = above_floor(best)
    return Evidence("lens", f"{study.relation.pt} on c0 less floor, {best['head']} head at "
                    f"{best['site']}", measured, f"floor, untrained{or_control(study)}", control,
                    MARGIN, exceeds(measured, largest(control, 0.), MARGIN))
