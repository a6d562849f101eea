"""
Exercise 6: delete by gradients: GradDiff and NPO                    difficulty 3 of 5, 60 minutes

Both train a model to be wrong on what it shall forget, and right on all else. GradDiff climbs the
cross-entropy of the right answers without end, and adds the loss of what is retained. NPO (Zhang et
al. 2024) bounds the climb: with lost = the string's cross-entropy less the base's, its loss is

    -2 / beta * mean of log sigmoid(beta * lost)

plus the loss of what is retained. Beta to 0 gives the gradient of ascent; a large beta stops where
a string is forgotten.

Write the two losses, as entries of finetune.METHODS are written. Useful: model.loss_of; a model is
called as model(x.tokens, x.at) and gives logits (n, v); x.answer (n,) are the right outputs.
Check:  python -m pytest exercises/test_e6.py
The check compares gradients with those of ascent, near and far from the limit, then deletes "count
a" by your losses: a must end at its floor, other families must keep 95 % of what they were.
"""


def graddiff(model, base, forget, retain):
    """The loss of a step, a tensor with one number (nats).

    base: the frozen model of before. forget: Examples that ask for a. retain: whole sequences of
    other families, whose loss is that of pretraining."""
    raise NotImplementedError


def npo(model, base, forget, retain, beta=.1):
    """The same for NPO. The base needs no gradient."""
    raise NotImplementedError
