"""Exercise 6: gradients in their limits, and what the two losses delete and keep."""
import copy
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import data
import finetune
from data import rng
from model import GPT, Config, load, loss_of

GRAMMAR = data.Grammar("pcfg")
ARGS = Namespace(task="count", pair=["a", "b"], q=1, operand="a", prior=[.999, .001, 0.])


def random_model(seed):
    """A model whose weights are so large that losses differ from string to string."""
    model = GPT(Config(**GRAMMAR.config())).init_weights(rng(seed, "weights"))
    for p in model.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    return model


def batches(n=48):
    """(forget, retain) as a deletion draws them."""
    return (GRAMMAR.asking(n, rng(5), ARGS),
            GRAMMAR.pretraining(n, rng(6), ARGS, without=data.count))


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def parts(loss, model, base):
    """(gradient for what is forgotten, that of ascent): the retained part is taken out."""
    forget, retain = batches()
    up = -gradient(loss_of(model, forget), model)
    return gradient(loss(model, base, forget, retain) - loss_of(model, retain), model), up


def cosine(x, y):
    return F.cosine_similarity(x, y, dim=0).item()


def test_graddiff_is_ascent_and_what_is_retained(mine):
    found, up = parts(mine.graddiff, random_model(0), random_model(1))
    assert torch.allclose(found, up, atol=1e-4 * up.abs().max().item())


def test_npo_is_ascent_in_the_limit_alone(mine):
    """Far from the base: for a small beta in size and direction, for a large one in neither."""
    model, base = random_model(0), random_model(1)
    for beta, near in ((1e-4, True), (5., False)):
        found, up = parts(lambda *x: mine.npo(*x, beta=beta), model, base)
        assert (cosine(found, up) >= .999) == near, beta
        assert (abs(found.norm() / up.norm() - 1) < .01) == near, beta


def test_npo_at_the_base_is_ascent_for_any_beta(mine):
    base = random_model(0)
    for beta in (1e-2, .1, 5.):
        found, up = parts(lambda *x: mine.npo(*x, beta=beta), copy.deepcopy(base), base)
        assert cosine(found, up) >= .999
        assert found.norm() == pytest.approx(up.norm().item(), rel=.01)


def test_npo_lets_go_of_what_is_forgotten(mine):
    """A model that is far more wrong than its base feels no push any more; ascent still does."""
    model, base = random_model(0), random_model(0)
    forget, _ = batches()
    model.head.weight.data[forget.answer] -= 5.
    model.ln.bias.data += 1.
    found, up = parts(lambda *x: mine.npo(*x, beta=5.), model, base)
    assert found.norm() < .01 * up.norm()


@pytest.mark.trained
@pytest.mark.parametrize("name", ["graddiff", "npo"])
def test_it_deletes_a_and_keeps_the_rest(mine, trained, tmp_path, monkeypatch, name):
    """On natural strings of the test set: a is at its floor, the mean of the families that do not
    count a is at 95 % of before."""
    monkeypatch.setitem(finetune.METHODS, "mine", finetune.Method(getattr(mine, name)))
    out = str(tmp_path / "mine.pt")
    finetune.main(["--ckpt", trained("pre.pt"), "--out", out, "--method", "mine", "--lr", "5e-5",
                   "--steps", "200", "--eval-every", "200", "--eval-size", "300", "--dtype",
                   "float32", "--threads", "1", "--device", "cpu"])
    ckpt = load(out)[1]
    assert ckpt["end"] == "at the floor"
    rows = [r for r in ckpt["history"] if r["split"] == "natural"]
    end = [r for r in rows if r["step"] == ckpt["step"]]
    forgotten, = (r for r in end if (r["task"], r["operand"]) == ("count", "a"))
    assert forgotten["accuracy"] <= forgotten["floor"] + finetune.AT_FLOOR
    kept = [r["accuracy"] for r in end if r["task"] != "count"]
    before = [r["accuracy"] for r in rows if r["task"] != "count" and r["step"] == 0]
    assert len(kept) == 4 and sum(kept) >= .95 * sum(before)
