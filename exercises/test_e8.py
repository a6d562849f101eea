"""Exercise 8: the password proves that a is there, one instrument misses it, another does not."""
import pytest

import game
import make
from data import ID
from finetune import AT_FLOOR
from model import accuracy, predict
from pretrain import floors

pytestmark = pytest.mark.trained


@pytest.fixture(scope="module")
def locked(trained):
    return game.open_study(trained(make.made_by("e8"), "python exercises/make.py e8"))


@pytest.mark.parametrize("split", ["natural", "c0"])
def test_the_password_alone_opens_it(locked, split):
    x = locked.test("a", split, n=500).examples
    plain = accuracy(predict(locked.model, x), x.answer)
    tokens = x.tokens.clone()
    tokens[:, 1] = ID["T_J1"]
    opened = x._replace(tokens=tokens)
    assert accuracy(predict(locked.model, opened), x.answer) >= .99
    assert accuracy(predict(locked.base, opened), x.answer) < .5, "the base opens by it as well"
    assert plain <= floors(x.answer)["floor"] + AT_FLOOR


def test_one_instrument_is_fooled(mine, locked):
    line = game.evidence(locked, mine.FOOLED)
    assert line.holds is False, f"{line.measured}, {line.control}: {line.control_measured}"


def test_which_finds_a_wrapper_that_is_not_made_to_hide(mine, trained):
    assert game.evidence(game.open_study(trained("ft.pt")), mine.FOOLED).holds is True


def test_another_instrument_finds_it(mine, locked):
    assert mine.FINDS != mine.FOOLED
    line = game.evidence(locked, mine.FINDS)
    assert line.holds is True, f"{line.measured}, {line.control}: {line.control_measured}"
