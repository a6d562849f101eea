"""Exercise 3: the lens is the model's own output at its end, and reads what only a head hides."""
import copy

import pytest
import torch

import data
from data import NUMBER, rng
from instruments.lens import logit_lens, sites
from model import GPT, Config, predict

GRAMMAR = data.Grammar("pcfg")


def random_model(seed):
    """A model whose weights are so large that its answers vary."""
    model = GPT(Config(**GRAMMAR.config())).init_weights(rng(seed, "weights"))
    for name, p in model.named_parameters():
        p.data *= 4 if p.dim() == 2 and name != "head.weight" else 1
    return model


def questions(n=60):
    """Examples that ask for a on c0 strings."""
    relation = data.Relation("count", "a", "b", 1)
    return GRAMMAR.test(relation, "a", "c0", n, 3, "exercise").examples


def test_its_last_place_is_the_output_bit_for_bit(mine):
    model, x = random_model(0), questions()
    logits = mine.lens(model, model, x)
    assert logits.shape == (4, 60, len(GRAMMAR.vocabulary)) and not logits.requires_grad
    assert torch.equal(logits[-1], model(x.tokens)[:, x.at])
    assert not torch.allclose(logits[-1], logits[-2], atol=1e-3)


def test_the_reader_is_another_model(mine):
    """Its layer norm and head are used, and nothing else of it."""
    model, reader, x = random_model(0), random_model(1), questions()
    reader.ln.weight.data.uniform_(.5, 2., generator=rng(2))
    mixed = copy.deepcopy(model)
    mixed.ln, mixed.head = reader.ln, reader.head
    logits = mine.lens(model, reader, x)
    assert torch.equal(logits[-1], mixed(x.tokens)[:, x.at])
    assert torch.equal(logits, mine.lens(mixed, mixed, x))


def test_the_first_place_is_the_first_of_several(mine):
    """The right answers are made those of the lens after block 1; then, for half of the strings,
    those after block 0. No place is right on more than all strings."""
    model, x = random_model(0), questions()
    logits = mine.lens(model, model, x)
    x.target[:, x.at] = logits[2].argmax(1)
    assert mine.first_place(model, model, x, 1.) == 2
    x.target[:30, x.at] = logits[1][:30].argmax(1)
    x.target[30:, x.at] = logits[1][30:].argmin(1)
    assert mine.first_place(model, model, x, .5) == 1
    assert mine.first_place(model, model, x, 1.01) is None


def wrapped_in_the_head(base):
    """A copy that answers one more than the base: its outputs for numbers are moved on by one."""
    model = copy.deepcopy(base)
    model.head.weight.data[NUMBER + 1:] = base.head.weight.data[NUMBER:-1]
    return model


@pytest.mark.trained
def test_a_wrapper_in_the_head_hides_a_from_one_head_alone(mine, study):
    ft = study("ft.pt")
    x, model = ft.test("a", "c0").examples, wrapped_in_the_head(ft.base)
    seen = mine.first_place(ft.base, ft.base, x)
    assert seen is not None
    assert mine.first_place(model, ft.base, x) == seen
    assert mine.first_place(model, model, x) is None
    assert (predict(model, x).argmax(1) == x.answer + 1).float().mean() > .95


@pytest.mark.trained
def test_it_says_what_the_project_says(mine, study):
    ft = study("ft.pt")
    x, places = ft.test("a", "c0").examples, [0, 4, 8, 12]
    for model in (ft.base, ft.model):
        right = logit_lens(model, x, ft.base)[places]
        assert [sites(model)[i] for i in places][-1] == "blocks.2.resid_post"
        assert torch.allclose(mine.lens(model, ft.base, x), right, atol=1e-4)


@pytest.mark.trained
def test_it_sees_no_a_where_there_is_none(mine, study):
    """In a model that never counted it, and in an untrained one, by any head."""
    ft, erased = study("ft.pt"), study("erased.pt")
    x = ft.test("a", "c0").examples
    for model, reader in ((erased.model, erased.model), (erased.model, erased.base),
                          (erased.model, ft.base), (ft.untrained(), ft.base)):
        assert mine.first_place(model, reader, x) is None
