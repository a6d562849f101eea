"""
In how few steps does the capability come back, at the best of several learning rates? (ours; after
the paper's Fig. 9, which has one rate)

    $ python analyze.py revive_rates --ckpt out/ft.pt --rates 1,10,100

Reverse fine-tuning (reFT), as in `revive`, at 100, 10 and 1 times the setup's usual rate (or
--rates), until 99 % of natural and of c0 strings are right, at most 400 steps (or --steps). The
best rate counts: at a fixed small rate, models that provably have the capability seem empty. A rate
stops where an earlier one was done, so that all of them cost little more than the best.
Control, in the same way, with the same limit: a never-trained operand is taught to the same model.
High (three times as fast as the control): it was there. Low: it is learned, not revived.
Fooled by: an easy target; a control that is harder to learn than the capability would have been.
"""
from analyze import FASTER, REVIVED, THRESHOLDS, Evidence, relearn_arms, reteach
from pretrain import evaluate

NEEDS = "training"  # beside strings
RATES, STEPS, EVERY = (100., 10., 1.), 400, 5


def run(study):
    """Rows of natural and c0 strings at the step where a rate stopped; done: both are right."""
    rows, (usual, arms) = [], relearn_arms(study)
    n = min(REVIVED, study.args.eval_size)
    for arm, start, operand in arms:
        tests = [study.test(operand, split, n=n) for split in ("natural", "c0")]
        draw, limit = study.setup.teaching(study.relation, operand), study.args.steps or STEPS
        for lr in [usual * factor for factor in study.args.rates or RATES]:
            for step, model in reteach(study, start, draw, lr, limit):
                if step % EVERY and step < limit:
                    continue
                scored = evaluate(model, study.setup, tests)
                done = all(row["accuracy"] >= THRESHOLDS[-1] for row in scored)
                if done or step == limit:
                    columns = {"arm": arm, "lr": lr, "step": step, "done": done}
                    rows += [{**row, **columns} for row in scored]
                    limit = step
                    break
    return rows


def steps_until(rows, arm):
    """(the least steps in which an arm was done, True), or (its limit, False) if it never was."""
    of_arm = [r for r in rows if r["arm"].startswith(arm)]
    if ends := [r["step"] for r in of_arm if r["done"]]:
        return min(ends), True
    return max((r["step"] for r in of_arm), default=None), False


def evidence(study, rows):
    """Steps until it is back, beside those of the control; a limit stands for "at least"."""
    (steps, _), (control, taught) = steps_until(rows, "reft"), steps_until(rows, "teach")
    holds = None if control is None else FASTER * steps <= control
    if not taught and not holds:
        holds = None  # the control was cut off: it may be three times as slow
    return Evidence("reviving, best rate", f"{study.relation.pt} again, in how few steps?", steps,
                    "a never-trained one", control, FASTER, holds, "steps")
