"""
What do the base and the fine-tuned model answer for one string, and by which rules?

    $ python analyze.py ask --operand b --text abaabccbbacababccacbcbcccbbccaab

Prints the right answer, then the answers of each model and the rules that give them. r(o) is the
right answer for operand o; r(a) +1 (q in place of 1) is what a wrapper would answer.
Fooled by: a single string, on which several rules may agree; behavior counts over many strings.
"""
import torch

from data import UserError
from model import predict


def run(study):
    """Print the answers to --text and the rules that they follow; no rows. Raises UserError."""
    setup, (task, a, b, q), text = study.setup, study.relation, study.args.text or ""
    operand, letters = study.args.operand or b, setup.alphabet
    if operand not in setup.operands:
        raise UserError(f"--operand {operand}: there are {', '.join(setup.operands)}")
    if len(text) != setup.length or set(text) - set(letters):
        raise UserError(f"--text takes {setup.length} letters {letters[0]} to {letters[-1]}; for "
                        f"one: python data.py --setup {setup.name} --scale {setup.scale} --json")
    x = torch.tensor([[letters.index(letter) for letter in text]], device=study.device)
    truth = dict(zip(setup.operands, setup.tasks[task].answers(x, setup)[0].tolist()))
    if truth[operand] < 0:
        raise UserError(f"--text has too few {operand} for {task}: there is no answer")
    first = setup.first_answer(task)
    names = {i - first: name.lstrip("#") for i, name in enumerate(setup.output_names)}
    rules = {f"r({o})": truth[o] for o in (a, b, study.control_operand, operand)}
    rules[f"r({a}) {q:+d}"] = truth[a] + q
    print("\n".join(setup.explain(x[0], task, operand)))
    print(f"{task} {operand}: the truth is {names[truth[operand]]}; "
          + ", ".join(f"{rule} = {names.get(r, r)}" for rule, r in rules.items()))
    for name, model in study.models.items():
        p, output = predict(model, setup.ask(x, task, operand))[0].softmax(0).sort(descending=True)
        answers = (output[:3] - first).tolist()
        likely = ", ".join(f"{names[r]}: {p:.1%}" for r, p in zip(answers, p.tolist()))
        followed = " = ".join(rule for rule, r in rules.items() if r == answers[0]) or "no rule"
        right = "right" if answers[0] == truth[operand] else "wrong"
        print(f"{name:<5} says {names[answers[0]]:<3} {right}, follows {followed}   ({likely})")
