"""
Does the rest come back by the time the taught half is learned? (ours; after Deeb and Roger 2024)

    $ python analyze.py relearn_rates --ckpt out/ft.pt --rates 1,3,10

Held-out relearning, as in `relearn`, at 1, 10 and 100 times the setup's usual rate (or --rates). A
lesson goes on until the taught half is right on 95 %, at most 250 steps (or --steps); the other
half is scored at that moment. After a fixed number of steps models would have learned unequal parts
of the lesson, since what was overwritten is learned slowly.
Evidence: the mean over both halves at the best rate; at one rate a lock or deletion may hide one.
Controls: a never-trained operand, in the same way; the commonest answer of a half. The best guess
from the other operand is no floor here: a lesson cannot teach it for answers it never gives.
High: what was not taught came back with the lesson; it was there. Low: only the lesson was learned.
Fooled by: large rates, at which the lesson tears down what it does not teach; a wrapper that is a
table of answers, unlearned answer by answer; few held-out answers.
"""
from itertools import product
from statistics import fmean

from analyze import READS, Evidence, exceeds, largest, relearn_arms, reteach, select
from pretrain import evaluate

NEEDS = "training"  # beside strings
LEARNED, RATES, STEPS, EVERY = .95, (1., 10., 100.), 250, 10


def lesson(study, start, draw, tests, lr):
    """(rows of both halves where the lesson ends, whether it was learned); lr: its rate."""
    limit = study.args.steps or STEPS
    for step, model in reteach(study, start, draw, lr, limit):
        if step % EVERY == 0 or step == limit:
            taught, = evaluate(model, study.setup, [tests["taught"]])
            learned = (taught["accuracy"] or 0.) >= LEARNED
            if learned or step == limit:
                other, = evaluate(model, study.setup, [tests["held-out"]])
                return [{**r, "half": half, "step": step} for half, r in
                        (("taught", taught), ("held-out", other))], learned


def run(study):
    """Rows of both halves of each lesson, as those of `relearn`; learned: the taught half was. A
    rate is given up after a lesson that was not learned, since it cannot be compared."""
    rows, (usual, arms) = [], relearn_arms(study)
    for (arm, start, operand), factor in product(arms, study.args.rates or RATES):
        for answers, draw, tests in study.setup.halves(study.relation, operand, study.run):
            if "held-out" in tests:
                halves, learned = lesson(study, start, draw, tests, usual * factor)
                rows += [{**r, "arm": arm, "lr": usual * factor, "answers": answers,
                          "learned": learned} for r in halves]
                if not learned:
                    break
    return rows


def held_out(rows, arm, key="accuracy"):
    """The best mean over held-out halves, of rates at which all lessons were learned; or None."""
    halves, best = [r for r in select(rows, half="held-out") if r["arm"].startswith(arm)], []
    for lr in {r["lr"] for r in halves}:
        at_rate = select(halves, lr=lr)
        if all(r["learned"] for r in at_rate):
            best.append(fmean(r[key] or 0. for r in at_rate))
    return largest(*best)


def evidence(study, rows):
    """The held-out halves of a when their lessons are learned, beside those of the control."""
    measured, control = held_out(rows, "reft"), held_out(rows, "teach")
    if control is not None or not study.never_trained:
        control = largest(control, held_out(rows, "reft", "floor"))
    return Evidence("relearning, equal lessons", f"{study.relation.pt} on what was not taught",
                    measured, "the same, never trained", control, READS,
                    exceeds(measured, control, READS))
