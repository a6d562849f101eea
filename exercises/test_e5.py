"""Exercise 5: planted ranks are found; all directions undone are the base, one less is not."""
import copy
import json

import pytest
import torch

import data
import make
from data import rng
from model import GPT, Config, accuracy, predict

GRAMMAR = data.Grammar("pcfg")


def random_model(seed=0):
    return GPT(Config(**GRAMMAR.config())).init_weights(rng(seed, "weights"))


def thin(shape, r, seed):
    """A matrix of rank r."""
    left, right = (torch.randn(size, r, generator=rng(seed, size)) for size in shape)
    return left @ right.T


def changed(base, r):
    """A copy whose matrices, biases and gains differ from the base's; matrices by rank r."""
    model = copy.deepcopy(base)
    for i, p in enumerate(model.parameters()):
        p.data += .01 * (thin(p.shape, r, i) if p.dim() == 2 else torch.ones(p.shape))
    return model


@pytest.mark.parametrize("r", [0, 1, 3, 17])
def test_planted_ranks_are_found(mine, r):
    """Beside the rounding of a sum in float32, which has full rank."""
    before = torch.randn(64, 192, generator=rng(1))
    assert mine.rank(before, before + .05 * thin((64, 192), r, 2)) == r
    assert mine.rank(before.T, before.T + .05 * thin((192, 64), r, 2)) == r


def test_all_directions_undone_are_the_base(mine):
    base = random_model()
    model = changed(base, 4)
    kept = copy.deepcopy(model)
    for r, close in ((4, True), (64, True), (3, False), (0, False)):
        undone = mine.undo(base, model, r)
        for name, p in undone.named_parameters():
            old, new = base.get_parameter(name), model.get_parameter(name)
            if p.dim() == 1:
                assert torch.equal(p, new), name
            else:
                assert torch.allclose(p, old, atol=1e-6) == close, (name, r)
    assert all(map(torch.equal, model.parameters(), kept.parameters()))


def test_the_largest_directions_go_first(mine):
    """What is left of the change has the norm of its smaller singular values."""
    base = random_model()
    model = changed(base, 4)
    undone = mine.undo(base, model, 2)
    for name in ("tok.weight", "blocks.1.up.weight"):
        old, new, left = (m.get_parameter(name).detach() for m in (base, model, undone))
        size = torch.linalg.svdvals(new - old)
        assert (left - old).norm().item() == pytest.approx(size[2:].norm().item(), rel=1e-3)


def answered_by(base):
    """Examples whose right answers are the base's."""
    relation = data.Relation("count", "a", "b", 1)
    x = GRAMMAR.test(relation, "a", "c0", 80, 3, "exercise").examples
    target = x.target.clone()
    target[:, x.at] = predict(base, x).argmax(1)
    return x._replace(target=target)


def test_the_least_rank_of_what_was_planted(mine):
    """No direction where nothing changed; all of three that were planted; none helps if it is a
    bias that changed."""
    base = random_model()
    for p in base.parameters():
        p.data *= 10 if p.dim() == 2 else 1
    x, planted, biased = answered_by(base), copy.deepcopy(base), copy.deepcopy(base)
    planted.blocks[1].up.weight.data += thin((256, 64), 3, 5)
    biased.blocks[1].down.bias.data += 5 * torch.randn(64, generator=rng(6))
    for model in (planted, biased):
        assert accuracy(predict(model, x), x.answer) < .9
    assert mine.least_rank(base, base, x) == 0
    assert mine.least_rank(base, planted, x, share=1.) == 3
    assert mine.least_rank(base, biased, x) is None


@pytest.mark.trained
def test_the_sealed_rank_is_found_in_every_matrix(mine, study, trained):
    """In all matrices of the blocks; the embeddings and the head did not change."""
    with open(trained("seal.json")) as file:
        seal = json.load(file)
    thin, ranks = study("rank.pt"), {}
    for name, p in thin.model.named_parameters():
        if p.dim() == 2:
            ranks[name] = mine.rank(thin.base.get_parameter(name).detach(), p.detach())
    inside = {r for name, r in ranks.items() if name.startswith("blocks")}
    assert {r for name, r in ranks.items() if not name.startswith("blocks")} == {0}
    assert len(inside) == 1 and make.opens(seal["rank"], str(*inside)), ranks


@pytest.mark.trained
@pytest.mark.parametrize("name", ["rank.pt", "ft.pt"])
def test_one_direction_less_is_not_enough(mine, study, name):
    """Of an ordinary fine-tuning D has full rank, and still few directions hide a."""
    wrapped = study(name)
    base, model, x = wrapped.base, wrapped.model, wrapped.test("a", "c0").examples
    r = mine.least_rank(base, model, x)
    share = [accuracy(predict(mine.undo(base, model, k), x), x.answer) for k in (r - 1, r)]
    assert r >= 1 and share[0] < .9 <= share[1] / accuracy(predict(base, x), x.answer)
    w = "blocks.0.up.weight"
    full = mine.rank(base.get_parameter(w).detach(), model.get_parameter(w).detach())
    assert r <= full and (name == "rank.pt" or full > 2 * r)
