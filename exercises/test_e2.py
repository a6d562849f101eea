"""Exercise 2: a probe reads what is there, nothing in noise; its control is a hard one."""
import pytest
import torch

from analyze import READS
from data import rng


def made_up(n, signal, seed):
    """(x (n, 16), y (n,)): six classes, each a direction times `signal`; small and off centre, as
    activations are."""
    y = torch.randint(6, (n,), generator=rng(seed, "classes"))
    noise = torch.randn(n, 16, generator=rng(seed, "noise"))
    return 1e-3 * (signal * torch.eye(16)[y] + noise) + 5e-3, y


def test_it_reads_what_is_there_and_not_noise(mine):
    """The bound on noise also fails a probe that is scored on what it was trained on."""
    for signal, low, high in ((8., .95, 1.), (0., .05, .30)):
        probe, (new, answer) = mine.fit(*made_up(300, signal, 1)), made_up(2000, signal, 2)
        accuracy = (probe(new) == answer).float().mean().item()
        assert low <= accuracy <= high, (signal, accuracy)


@pytest.mark.trained
def test_a_is_read_by_a_margin_over_the_control(mine, study):
    a, control = mine.finding(study("ft.pt"))
    assert a >= .95
    assert a - control >= READS
    assert control >= .6, "an untrained model alone lets you read more: is it a fair control?"


@pytest.mark.trained
def test_the_same_code_finds_nothing_where_a_was_never_trained(mine, study):
    a, control = mine.finding(study("erased.pt"))
    assert a - control < READS
    assert a > .3, "even there the commonest answer can be read: was the probe trained?"


@pytest.mark.trained
def test_it_reads_this_model_and_this_operand(mine, study):
    """c follows from a and b. The model never needed it, and it is read worse."""
    ft = study("ft.pt")
    assert mine.read(ft, ft.base, "a") >= .95
    assert mine.read(ft, ft.model, "c") <= mine.read(ft, ft.model, "a") - READS
