"""
Exercise 5: how thin is the wrapper?                                 difficulty 3 of 5, 45 minutes

Fine-tuning changed every weight matrix by D = after - before. How many directions of D does it take
to bring "count a" back? Two ranks answer different questions: the rank of D itself, and the least
number of its directions that must be taken out. One sealed model, rank.pt, was trained so that each
matrix of its blocks changes by the same small rank; an ordinary fine-tuning, ft.pt, was not.

Write the three functions. Useful: torch.linalg.svd, copy.deepcopy, named_parameters, model.predict,
model.accuracy. A matrix is a parameter with two dimensions.
Check:  python -m pytest exercises/test_e5.py
The check plants changes of known rank; opens the sealed rank by its hash; takes out all directions
and wants the base, to 1e-6; and takes out one direction less than you say, to see that a is gone.
"""


def rank(before, after):
    """The rank of after - before, an int; two matrices (m, n) in float32.

    What is below 1e-4 of the largest singular value is rounding. No change has rank 0."""
    raise NotImplementedError


def undo(base, model, r):
    """A copy of the model; from every matrix the r first singular directions of its change are
    taken out. Other parameters stay the model's. Neither model is changed."""
    raise NotImplementedError


def least_rank(base, model, examples, share=.9):
    """The least r from 0 on with which undo() brings the accuracy on the examples to this share of
    the base's, an int; None if no r does."""
    raise NotImplementedError
