"""Exercise 1: floors and the shortcut, on strings as they come, with it, and without it."""
import pytest
import torch

import data
from pretrain import floors

GRAMMAR = data.Grammar("pcfg")
RELATION = data.Relation("count", "a", "b", 1)


def strings(split, n=10000):
    """(letters (n, 32), answers for a (n,), answers for b (n,))."""
    text = GRAMMAR.text(n, RELATION, split, data.rng(7, "exercise", split))
    return text, *data.count(text, GRAMMAR)[:, :2].T


def test_the_shortcut_never_holds_on_c0_and_always_on_c1(mine):
    found = {split: mine.holds(strings(split)[0]) for split in data.SPLITS}
    assert not found["c0"].any()
    assert found["c1"].all()
    _, a, b = strings("natural")
    assert torch.equal(found["natural"], b - a == 1)  # sometimes it does


def test_only_the_window_counts(mine):
    """16 letters c; in front of them one b. Then one b at the end."""
    text = torch.full((2, 32), 2)
    text[0, 3] = text[1, -1] = 1
    assert mine.holds(text).tolist() == [False, True]


@pytest.mark.parametrize("split", data.SPLITS)
def test_floors_are_the_projects(mine, split):
    _, a, b = strings(split)
    for answer, other in ((a, b), (b, a)):
        right = floors(answer, other)
        assert mine.floor(answer) == pytest.approx(right["floor"])
        assert mine.cross_floor(answer, other) == pytest.approx(right["cross_floor"])


def test_a_guess_is_as_good_as_what_it_knows(mine):
    """From the answer itself all is guessed, from a constant what the floor is."""
    answer = torch.tensor([4, 4, 4, 5, 5, 9])
    assert mine.floor(answer) == pytest.approx(1 / 2)
    assert mine.cross_floor(answer, answer) == 1
    assert mine.cross_floor(answer, torch.zeros_like(answer)) == pytest.approx(1 / 2)
    assert mine.cross_floor(answer, torch.tensor([0, 0, 1, 1, 1, 1])) == pytest.approx(2 / 3)
