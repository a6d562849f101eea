"""
Does the stream still say the answer for a? (nostalgebraist 2020; Belrose et al., arXiv 2303.08112)

    $ python analyze.py lens --ckpt out/ft.pt --also out/never-ft.pt

The last layer norm and output map are applied, at the answer's position, to the embedding and to
every block's attn_out, resid_mid, mlp_out and resid_post; a is asked on c0 strings. Heads: own, the
model's; base, the base's (as in UDS, arXiv 2605.24614); tuned, the base's behind an affine map that
is trained to give the base's answers from the base's activations. The map sees no true answer and
nothing of the fine-tuned model, whose wrong answers it would learn. Site and head are chosen on
other strings. Controls: an untrained model; those of --also; an operand that was never trained.
High: the base's answer is there, where the base had it. Low: it is not, or is in another basis.
Fooled by: a tuned lens at an early site that counts by itself. As controls, models of another
pretraining have another basis (hence the never-trained operand).
"""
import itertools

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from analyze import MARGIN, Evidence, above_floor, exceeds, or_control, other_starts, select
from data import UserError
from model import accuracy, stacked
from pretrain import answer_row

NEEDS = "base, training"  # beside strings
STEPS, BATCH, RATE, PARTS = 1000, 96, 1e-3, ("attn_out", "resid_mid", "mlp_out", "resid_post")


def sites(model):
    """Names of the activations that are read, in order of computation."""
    return ["embed", *(f"blocks.{i}.{part}" for i in range(len(model.blocks)) for part in PARTS)]


def streams(model, examples):
    """Activations (sites, n, d) at the position of the answer."""
    return stacked(model, examples, sites(model), lambda x, _: x[:, examples.at]).transpose(0, 1)


@torch.no_grad()
def logit_lens(model, examples, reader):
    """Logits (sites, n, v) by layer norm and head of `reader`, on all positions as it does."""
    read = lambda x, _: reader.head(reader.ln(x))[:, examples.at]
    return stacked(model, examples, sites(model), read).transpose(0, 1)


def translate(x, lens):
    """x (sites, n, d) plus each site's affine map of it; lens: [(sites, d, d), (sites, 1, d)]."""
    return x + torch.baddbmm(lens[1], x, lens[0])


def tuned_lens(model, x, steps, rng):
    """The lens that translate() takes, fitted to x (sites, n, d): behind it each site gives the
    outputs of the last site, by least KL (nats). ours: Adam, which suits 64 dimensions."""
    lens = [x.new_zeros(len(x), rows, x.shape[2], requires_grad=True) for rows in (x.shape[2], 1)]
    optimizer = torch.optim.Adam(lens, RATE)
    with torch.no_grad():
        wanted = model.head(model.ln(x[-1])).log_softmax(-1)
    for _ in tqdm(range(steps), desc="lens", leave=False, disable=None):
        pick = torch.randint(x.shape[1], (BATCH,), generator=rng).to(x.device)
        seen = model.head(model.ln(translate(x[:, pick], lens))).log_softmax(-1)
        target = wanted[pick].expand_as(seen)
        loss = F.kl_div(seen, target, reduction="sum", log_target=True) / BATCH
        for p, grad in zip(lens, torch.autograd.grad(loss, lens)):  # none of the model's own
            p.grad = grad
        optimizer.step()
    return [p.detach() for p in lens]


@torch.no_grad()
def readings(study, model, examples, lens):
    """{head: logits (sites, n, v)} of a model on Examples."""
    base, x = study.base, streams(model, examples)
    return {"own": logit_lens(model, examples, model), "base": logit_lens(model, examples, base),
            "tuned": base.head(base.ln(translate(x, lens)))}


def model_rows(study, name, model, operand, lens):
    """A row a site and head; chosen: the one that is best on other strings."""
    rows, selected = [], []
    test, selection = (study.test(operand, "c0", label) for label in ("test", "select"))
    chosen = readings(study, model, selection.examples, lens)
    shifted = test.examples.answer + study.relation.q  # as a wrapper answers
    for head, logits in readings(study, model, test.examples, lens).items():
        for site, x, y in zip(sites(model), logits, chosen[head]):
            rows.append({**answer_row(x, test), "model": name, "site": site, "head": head,
                         "share_a_plus_q": accuracy(x, shifted)})
            selected.append(accuracy(y, selection.examples.answer))
    best = selected.index(max(selected))
    return [{**row, "chosen": i == best} for i, row in enumerate(rows)]


def run(study):
    """Rows of all models asked for a, of one asked for the control operand. Raises UserError."""
    a, n, base = study.relation.pt, study.args.eval_size, study.base
    if not base:
        raise UserError("lens: needs a base, to train a lens on")
    asked = itertools.product([a, *(study.never_trained or ())[2:]], ("natural", "c0"))
    x = torch.cat([streams(base, study.test(*pair, "lens", 5 * n).examples) for pair in asked], 1)
    lens = tuned_lens(base, x, study.args.steps or STEPS, data.rng(study.seed, "lens"))
    never = {arm: model for arm, (model, operand) in other_starts(study).items() if operand == a}
    subjects = {**study.models, "untrained": study.untrained(), **never}
    rows = [model_rows(study, name, model, a, lens) for name, model in subjects.items()]
    if study.never_trained:
        model, _, operand = study.never_trained
        rows.append(model_rows(study, "never-trained", model, operand, lens))
    return list(itertools.chain(*rows))


def evidence(study, rows):
    """a less floor by the reading and site chosen, beside the best of all controls at theirs."""
    chosen = select(rows, chosen=True)
    best, = select(chosen, model="ckpt")
    measured = above_floor(best)
    control = max(above_floor(r) for r in chosen if r["model"] not in study.models)
    return Evidence("lens", f"{study.relation.pt} on c0 less floor, {best['head']} head at "
                    f"{best['site']}", measured, f"floor, untrained{or_control(study)}", control,
                    MARGIN, exceeds(measured, max(control, 0.), MARGIN))
