"""Exercise 4: patches change what they should alone; planted wrappers are located."""
import copy
import json

import pytest
import torch

import data
import make
from data import rng
from model import GPT, Config, accuracy, activation_names, predict

GRAMMAR = data.Grammar("pcfg")
PARTS = {"embed": ("tok", "pos"), **{f"blocks.{i}": (f"blocks.{i}.",) for i in range(3)},
         "head": ("ln.", "head")}


def random_model(seed):
    """A model whose weights are so large that its answers vary."""
    model = GPT(Config(**GRAMMAR.config())).init_weights(rng(seed, "weights"))
    for name, p in model.named_parameters():
        p.data *= 10 if p.dim() == 2 else 1
    return model


def questions(n=80):
    relation = data.Relation("count", "a", "b", 1)
    return GRAMMAR.test(relation, "a", "c0", n, 3, "exercise").examples


def planted(base, part, seed=5):
    """A copy of the base that differs in one part, by as much as that part is large."""
    model = copy.deepcopy(base)
    for name, p in model.named_parameters():
        if name.startswith(PARTS[part]):
            p.data += p.data.std() * torch.randn(p.shape, generator=rng(seed, name))
    return model


def disguised(model):
    """A copy with other weights in all parts, and the same answers: hidden units change places,
    tokens that no question has get other embeddings, all outputs grow by the same."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        order = torch.randperm(block.up.out_features, generator=rng(6))
        block.up.weight.data, block.up.bias.data = (p.data[order] for p in (block.up.weight,
                                                                           block.up.bias))
        block.down.weight.data = block.down.weight.data[:, order]
    model.tok.weight.data[-5:] += 1.
    model.head.weight.data += .1 * torch.randn(model.config.d_model, generator=rng(7))
    return model


def answered_by(base, examples):
    """The examples, with the base's answers as the right ones."""
    target = examples.target.clone()
    target[:, examples.at] = base(examples.tokens)[:, examples.at].argmax(1)
    return examples._replace(target=target)


def test_a_patch_with_itself_changes_no_bit(mine):
    model, x = random_model(0), questions(20)
    plain = model(x.tokens)[:, x.at]
    for site in activation_names(model):
        assert torch.equal(mine.patch(model, model, x, site), plain), site


def test_a_patch_brings_all_that_comes_before(mine):
    """The donor's last stream is all of its work but the head; and nothing stays behind."""
    host, donor, x = random_model(0), random_model(1), questions(20)
    before, mixed = host(x.tokens), copy.deepcopy(donor)
    mixed.ln, mixed.head = host.ln, host.head
    patched = mine.patch(host, donor, x, "blocks.2.resid_post")
    assert torch.equal(patched, mixed(x.tokens)[:, x.at])
    assert not torch.allclose(mine.patch(host, donor, x, "embed"), before[:, x.at], atol=1e-2)
    assert torch.equal(host(x.tokens), before)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_planted_is_located(mine, part):
    base = random_model(0)
    x = answered_by(base, questions())
    assert accuracy(predict(planted(base, part), x), x.answer) < .7
    assert accuracy(predict(disguised(base), x), x.answer) > .9
    assert mine.locate(base, planted(base, part), x) == part
    assert mine.locate(base, disguised(planted(base, part)), x) == part


@pytest.mark.trained
def test_the_sealed_models_are_located(mine, study, trained):
    with open(trained("seal.json")) as file:
        seal = json.load(file)
    found = []
    for i in range(4):
        sealed = study(f"sealed-{i + 1}.pt", 300)
        found.append(mine.locate(sealed.base, sealed.model, sealed.test("a", "c0").examples))
    assert make.opens(seal["parts"], " ".join(found)), f"not all four are right: {found}"
