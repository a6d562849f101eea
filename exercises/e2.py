"""
Exercise 2: a probe, and what it must be compared with              difficulty 2 of 5, 25 minutes

A linear probe maps an activation to an answer. If it works, the answer is linearly there. But how
much does it read where the answer cannot be known? An untrained network keeps traces of its input,
and a + b + c is always 16, so an answer can follow from others. A probe without its control proves
nothing.

Write the three functions, about 15 lines in all. Useful: model.residuals, study.setup.site,
study.test, study.labels, study.untrained, study.never_trained (see README.md, "In a notebook").
Standardise activations: those of an untrained model are tiny.
Check:  python -m pytest exercises/test_e2.py
The check fits your probe to data that can be read (95 % right or more) and to noise (30 % or less).
In ft.pt it wants 95 % for a, 10 points above your control, and c to be read 10 points worse than a;
a control below 60 % is refused. In erased.pt, which never counted a, the same code must read a on
more than 30 %, and less than 10 points above its control.
"""


def fit(x, y):
    """A linear probe: a function from (m, d) activations to (m,) predicted answers.

    x: (n, d) activations to train on. y: (n,) their answers, integers from 0. Train it as the paper
    does, with AdamW at 1e-3, but for 2,000 steps of 96 strings each. When the check is green, train
    it harder (all strings at 3e-2, 300 steps): which reading grows most, and what is left of the
    margin?"""
    raise NotImplementedError


def read(study, model, operand):
    """The fraction of strings on which the answer for `operand` is read while b is asked.

    Probes at the position of the answer, one after the embedding and one after every block, trained
    on natural strings and c0 strings: study.test("b", split, "probe", 1500). Choose the place on
    natural strings of the label "select", and return its accuracy on those of the label "test".
    500 strings of each are enough."""
    raise NotImplementedError


def finding(study):
    """(accuracy for a in study.model, accuracy of the control): two fractions.

    The control is the better of two readings: a from an untrained model; and, if this model has an
    operand that was never trained, that operand from this model."""
    raise NotImplementedError
