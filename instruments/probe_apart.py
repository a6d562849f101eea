"""
Is the answer for a read where no other answer tells it? (ours)

    $ python analyze.py probe_apart --ckpt out/ft.pt --also out/without-a-ft.pt

Linear probes after every block, as in `probe`, while b is asked, on strings that all have the same
answer for b. The counts of a, b and c add up to the window. The usual control of `probe`, the
never-trained c, is therefore read wherever a and b are: it tells that b was learned, not that a is
gone. The controls here are an untrained model and those of --also: checkpoints that never had a,
best made in the same way.
High: a is linearly there, and not by way of b. Low: it is not, at this position.
Fooled by: a probe that learns the task itself (hence the controls); what any model of strings
carries, such as how often a letter occurs; strings that are rarer than those of training.
"""
import torch

import data
from analyze import KNOWS, READS, Evidence, exceeds, largest, other_starts, probe_rows, select
from data import ProbeSet

NEEDS = "training"  # beside strings


def strings(study, n, rng):
    """Letters (n, length) whose answer for b is the commonest of c0; that for a varies as there."""
    setup, (task, a, b, q) = study.setup, study.relation
    spurious = setup.tasks[task].spurious
    c0 = torch.from_numpy(data.relation_tables(task, setup.scale, q)[0])
    fixed, size = int(c0.sum(0).argmax()), torch.arange(len(c0))
    mass = c0.sum(1) * torch.as_tensor(spurious.possible(size.numpy(), fixed, setup))
    drawn = torch.multinomial(mass, n, replacement=True, generator=rng)
    result = torch.stack([drawn, torch.full_like(drawn, fixed)], 1)
    places = [data.LETTERS.index(letter) for letter in (a, b)]
    return spurious.edit(data.sample_text(n, setup, rng), result, places, setup, rng)


def run(study):
    """Rows as those of `probe`, of a alone; model: base, ckpt, untrained or one of --also."""
    setup, (task, a, b, _), n = study.setup, study.relation, study.args.eval_size
    rng = data.rng(study.seed, "probe_apart")
    train, test = (setup.ask(strings(study, k * n, rng), task, b) for k in (10, 1))
    never = {arm: model for arm, (model, operand) in other_starts(study).items() if operand == a}
    targets = {a: setup.operands.index(a)}
    apart = ProbeSet(b, train, {f"{b} fixed": test}, targets, (a,))
    models = {**study.models, "untrained": study.untrained(), **never}
    return probe_rows(study, models, [apart], rng)


def evidence(study, rows):
    """The best block of the fine-tuned model, beside the best of any control."""
    rows = select(rows, labels="true")
    controls = [r["accuracy"] for r in rows if r["model"] not in study.models]
    measured, control = largest(*(r["accuracy"] for r in select(rows, model="ckpt"))), max(controls)
    _, a, b, _ = study.relation
    return Evidence("probing apart", f"{a} is read where {b} is always the same", measured,
                    "models that never had it", control, READS,
                    exceeds(measured, control, READS) and measured >= KNOWS)
