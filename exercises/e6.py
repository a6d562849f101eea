"""
Exercise 6: delete by gradients: GradDiff and NPO                    difficulty 3 of 5, 60 minutes

Both train a model to be wrong on what it shall forget, and right on all else. GradDiff climbs the
cross-entropy of the right answers without end, and adds the loss of what is retained. NPO (Zhang et
al. 2024) bounds the climb: with lost = the string's cross-entropy less the base's, its loss is

    -2 / beta * mean of log sigmoid(beta * lost)

plus the loss of what is retained. As beta goes to 0 the gradient becomes that of ascent; with a
large beta a string that is forgotten gives no gradient any more.

Write the two losses, as entries of finetune.METHODS are written. Useful: model.loss_of; a model is
called as model(x.tokens, x.at) and gives logits (n, v); x.answer (n,) are the right outputs.
Check:  python -m pytest exercises/test_e6.py
The check compares gradients with those of ascent: at small beta the cosine is at least .999, at
beta 5 far from the base it is less. Then it deletes "count a" from pre.pt by each loss, in at most
200 steps at 5e-5: a must end at most 2 points above its floor, and the mean accuracy of the
families that do not count must keep 95 % of what it was.
"""


def graddiff(model, base, forget, retain):
    """The loss of a step, a tensor with one number (nats): the mean over strings of each part.

    base: the frozen model from before the deletion. forget: Examples that ask for a. retain: whole
    sequences of other families; their loss is that of pretraining."""
    raise NotImplementedError


def npo(model, base, forget, retain, beta=.1):
    """The same for NPO, with the formula above. The base needs no gradient."""
    raise NotImplementedError
