"""
Exercise 5: how thin is the wrapper?                                 difficulty 3 of 5, 45 minutes

Fine-tuning changed every weight matrix by D = after - before. How many directions of D does it take
to bring "count a" back? Two ranks answer different questions: the rank of D itself, and the least
number of its directions that must be taken out. One sealed model, rank.pt, was trained so that each
matrix of its blocks changes by the same small rank; an ordinary fine-tuning, ft.pt, was not.

Write the three functions. Useful: torch.linalg.svd, copy.deepcopy, named_parameters, model.predict,
model.accuracy. A matrix is a parameter with two dimensions.
Check:  python -m pytest exercises/test_e5.py
The check plants changes of rank 0, 1, 3 and 17 and wants your rank() to be exact, also in rank.pt,
whose sealed rank it compares by its hash. With all directions out, matrices must be the base's to
1e-6. In rank.pt and ft.pt a must be back with least_rank() directions out, and not with one less.
"""


def rank(before, after):
    """The rank of after - before, an int; two matrices (m, n) in float32.

    Count singular values above 1e-4 of the largest: the others are rounding. Equal matrices have
    rank 0."""
    raise NotImplementedError


def undo(base, model, r):
    """A copy of the model, with the r first singular directions of its change subtracted from every
    matrix. Other parameters stay the model's. Neither `base` nor `model` is changed."""
    raise NotImplementedError


def least_rank(base, model, examples, share=.9):
    """The least r, an int from 0 on, with which undo() brings the accuracy on the examples to at
    least `share` (a fraction) of the base's; None if no r does."""
    raise NotImplementedError
