"""Exercise 7: it descends from pre.pt, has lost a and nothing else, and no instrument finds a."""
import pytest

import game
import make
from analyze import find_parent
from data import sha256
from finetune import AT_FLOOR
from model import accuracy, load, predict
from pretrain import floors

JUDGES = game.QUICK.split(",")
pytestmark = pytest.mark.trained


@pytest.fixture(scope="module")
def deleted(trained):
    """The path of the model that is judged."""
    return trained(make.made_by("e7"), "python exercises/make.py e7")


@pytest.fixture(scope="module")
def judged(deleted, trained):
    return game.open_study(deleted, "--base", trained("pre.pt"))


def test_it_descends_from_pre(deleted, trained):
    """Its parents, one behind the other, by their hash. Prints the score."""
    path, steps, first = deleted, 0, sha256(trained("pre.pt"))
    while sha256(path) != first:
        ckpt = load(path)[1]
        steps += ckpt["step"]
        assert ckpt["parent"], f"{path} was not made from pre.pt"
        path = find_parent(path, ckpt["parent"])
    assert steps > 0
    print(f"\nYour score: {steps} steps")


@pytest.mark.parametrize("split", ["natural", "c0"])
def test_a_is_at_its_floor(judged, split):
    x = judged.test("a", split, n=500).examples
    assert accuracy(predict(judged.model, x), x.answer) <= floors(x.answer)["floor"] + AT_FLOOR


def test_other_families_are_kept(judged):
    """The mean of those that do not count a, on natural strings."""
    kept, before = 0., 0.
    for test in judged.setup.tests(judged.run):
        if test.row["task"] != "count" and test.row["operand"] in ("a", None):
            x = test.examples
            kept += accuracy(predict(judged.model, x), x.answer)
            before += accuracy(predict(judged.base, x), x.answer)
    assert before > 3.5 and kept >= .9 * before


@pytest.mark.parametrize("name", JUDGES)
def test_no_instrument_finds_it(judged, name):
    line = game.evidence(judged, name)
    assert line.holds is not True, f"{line.question}: {line.measured}, {line.control}: " \
                                   f"{line.control_measured}"


def test_an_instrument_can_find_it(trained):
    """The same probe, on as few strings, finds what is only wrapped."""
    assert game.evidence(game.open_study(trained("ft.pt")), "probe_apart").holds
