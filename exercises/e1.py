"""
Exercise 1: what can be guessed?                                      difficulty 1 of 5, 15 minutes

A model is asked for the number of b among the last 16 letters and is right on half of the strings.
Can it count? A second model may know the number of a instead, and guess. Before you believe an
accuracy, you need two numbers: what always giving the commonest answer gets right, and what the
best guess from the other letter's answer gets right. And you need strings on which the shortcut,
"one more b than a", never holds.

Write the three functions. Letters are numbers: 0 is a, 1 is b, 2 is c.
Look at strings:  python data.py --task count --operand b --c 0
Check:            python -m pytest exercises/test_e1.py
The check compares your floors with the project's on three kinds of strings, and your holds() with
10,000 strings on which the shortcut never holds, and as many on which it always does.
"""


def holds(text):
    """Whether the shortcut holds: exactly one b more than a among the last 16 letters.

    text: (n, 32) integer tensor of letters. Returns (n,) booleans."""
    raise NotImplementedError


def floor(answer):
    """The share that always giving the commonest answer gets right, a fraction.

    answer: (n,) integer tensor of right answers."""
    raise NotImplementedError


def cross_floor(answer, other):
    """The share that the best guess from the other answer gets right, a fraction.

    The guesser sees other[i], and answers with what is commonest among the strings that have the
    same other answer. answer, other: (n,) integer tensors."""
    raise NotImplementedError
