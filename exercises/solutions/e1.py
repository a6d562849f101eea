"""Exercise 1: what can be guessed?"""
import torch


def holds(text):
    """Whether there is exactly one b (1) more than a (0) among the last 16 letters; (n,) bool."""
    window = text[:, -16:]
    return (window == 1).sum(1) - (window == 0).sum(1) == 1


def floor(answer):
    """The fraction of strings with the commonest answer."""
    return torch.bincount(answer).max().item() / len(answer)


def cross_floor(answer, other):
    """The commonest answer of every group of one other answer, as a fraction of all strings."""
    right = sum(torch.bincount(answer[other == x]).max().item() for x in other.unique())
    return right / len(answer)
