"""
Exercise 1: what can be guessed?                                      difficulty 1 of 5, 15 minutes

A model is asked for the number of b among the last 16 letters and is right on half of the strings.
Can it count? A second model may know the number of a instead, and guess. Before you believe an
accuracy, you need two numbers: what always giving the commonest answer gets right, and what the
best guess from the other letter's answer gets right. And you need strings on which the shortcut,
"one more b than a", never holds.

Write the three functions, a few lines each. Letters are numbers: 0 is a, 1 is b, 2 is c.
Look at strings:  python data.py --task count --operand b --c 0
Check:            python -m pytest exercises/test_e1.py
The check wants your floors to be the project's on 10,000 strings of each of three kinds (natural,
shortcut, no-shortcut) and on small cases. holds() must be right on all of these strings, and must
ignore letters before the last 16. It needs no trained model.
"""


def holds(text):
    """Whether the shortcut holds: exactly one b more than a among the last 16 letters.

    text: (n, 32) integer tensor of letters. Returns an (n,) tensor of booleans."""
    raise NotImplementedError


def floor(answer):
    """The fraction of strings that always giving the commonest answer gets right, a float.

    answer: (n,) integer tensor of right answers, 0 or more."""
    raise NotImplementedError


def cross_floor(answer, other):
    """The fraction of strings that the best guess from the other answer gets right, a float.

    The guesser sees other[i] and gives the commonest answer of the strings that have the same
    other answer. answer, other: (n,) integer tensors, 0 or more."""
    raise NotImplementedError
