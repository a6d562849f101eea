"""Lenses, noise, directions, rounding: exact on models of any weights, then tiny runs of all."""
import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import analyze
import data
from instruments import direction, lens, noise, quantise
from model import GPT, Config, activation_edits, activations, predict, weight_edits

FILES = {"direction": direction, "lens": lens, "noise": noise, "quantise": quantise}
SETUP = data.Grammar("pcfg")
WORDS = ["--ckpt", "out/ft.pt", "--eval-size", "12", "--threads", "1"]


def random_gpt(seed):
    """A model of the small scale whose weights are so large that its answers differ."""
    model = GPT(Config(**SETUP.config())).init_weights(data.rng(seed, "model"))
    for p in model.parameters():
        p.data += .1 * torch.randn(p.shape, generator=data.rng(seed, *p.shape))
    return model


@pytest.fixture(scope="module")
def study():
    """What the instruments ask of a Study, with two models of random weights."""
    relation = data.Relation("count", "a", "b", 1)

    def test(operand, split, label="test", n=None):
        return SETUP.test(relation.for_operand(operand), operand, split, n or 20, 0, label)
    return SimpleNamespace(setup=SETUP, relation=relation, test=test, model=random_gpt(1), seed=0,
                           base=random_gpt(0), args=SimpleNamespace(eval_size=20))


def same(parameters, others):
    return all(map(torch.equal, parameters, others))


def test_the_last_lens_is_the_logits(study):
    x = study.test("a", "c0").examples
    logits = activations(study.model, x.tokens)[0][:, x.at]
    seen = lens.logit_lens(study.model, x, study.model)
    assert torch.equal(seen[-1], logits) and len(seen) == len(lens.sites(study.model)) == 13
    assert not torch.equal(seen[-2], logits)
    assert torch.equal(lens.logit_lens(study.model, x, study.base)[-1].argmax(1),
                       study.base.head(study.base.ln(lens.streams(study.model, x)[-1])).argmax(1))


def test_a_tuned_lens_finds_a_turned_stream(study):
    """The first site is the last one, turned: the lens turns it back, and leaves the last alone."""
    rng, model = data.rng(0, "test"), study.model
    x = torch.randn(800, 64, generator=rng)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=rng)).Q
    both, wanted = torch.stack([x @ turn, x]), model.head(model.ln(x)).argmax(1)
    zeros = torch.zeros(2, 64, 64), torch.zeros(2, 1, 64)
    assert torch.equal(lens.translate(both, zeros), both)

    def agreement(maps):
        read = model.head(model.ln(lens.translate(both, maps))).argmax(2)
        return (read == wanted).float().mean(1).tolist()
    before, after = agreement(zeros), agreement(lens.tuned_lens(model, both, 150, rng))
    assert before[0] < .1 and before[1] == 1. and after[0] > .2 and after[1] > .9
    assert all(p.grad is None for p in model.parameters())


def test_noise_has_the_size_of_its_matrix_and_none_of_it_changes_nothing(study):
    model, before = study.model, [p.clone() for p in study.model.parameters()]
    drawn = noise.noise(model, data.rng(0, "test"))
    assert set(drawn) == {name for name, p in model.named_parameters() if p.dim() == 2}
    for name, x in drawn.items():
        assert x.norm().item() == pytest.approx(model.get_parameter(name).norm().item(), rel=.1)
    with weight_edits(model, noise.noised(model, drawn, 0.)):
        assert same(model.parameters(), before)
    with weight_edits(model, noise.noised(model, drawn, .1)):
        assert not same(model.parameters(), before)
    assert same(model.parameters(), before)


def test_gains_of_noise_are_the_best_mean_and_the_best_draw():
    rows = [dict(sigma=sigma, accuracy=accuracy, floor=.2, cross_floor=.5)
            for sigma, accuracy in ((.1, .9), (.1, .1), (.3, .7), (.3, .6))]
    assert noise.gains(rows) == pytest.approx((.15, .4)) and noise.gains([]) == (None, None)
    assert analyze.above_floor({**rows[0], "cross_floor": None}) == pytest.approx(.7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_rounded_row_has_few_values_near_its_own(bits):
    w = torch.randn(30, 600, generator=data.rng(0, "test"))
    w[3] = 0
    close, step = quantise.rounded(w, bits), w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert max(len(row.unique()) for row in close) <= 2 ** bits
    assert ((close - w).abs() <= .5001 * step).all() and torch.equal(close[3], w[3])
    assert torch.equal(quantise.rounded(w, 50), w)  # so many bits change nothing
    assert len(quantise.quantised(GPT(Config(**SETUP.config())), bits)) == 15


def test_edits_of_a_direction():
    x, v = (torch.randn(n, 64, generator=data.rng(n, "test")) for n in (50, 1))
    assert torch.equal(direction.edited(x, v[0], 0.), x)
    assert torch.equal(direction.edited(x, v[0], 2.), x - 2 * v[0])
    out = direction.edited(x, v[0], None)
    assert (out @ v[0]).abs().max() < 1e-4 * v.norm() and (x @ v[0]).abs().max() > 1
    across = torch.linalg.qr(v.T, mode="complete").Q[:, 1:]  # what is not along v stays
    assert torch.allclose(out @ across, x @ across, atol=1e-5)


def test_editing_the_answer_alone_is_an_edit_of_the_whole_model(study):
    model, test = study.model, study.test("a", "c0")
    x, v = test.examples, torch.randn(64, generator=data.rng(0, "test"))
    asked = direction.AtAnswer(study, model, test)
    names = ["embed", *(f"blocks.{i}.resid_post" for i in range(3))]
    for place, name in enumerate(names):
        assert torch.allclose(asked.logits(place, v, 0.), predict(model, x), atol=1e-4)
        for strength in (1., None):
            def edit(stream):
                at = direction.edited(stream[:, x.at], v, strength)
                return torch.cat([stream[:, :x.at], at[:, None], stream[:, x.at + 1:]], 1)
            with activation_edits(model, {name: edit}):
                assert torch.allclose(asked.logits(place, v, strength), model(x.tokens, x.at),
                                      atol=1e-4)


def test_a_wrapper_that_is_one_vector_is_undone(study):
    """Its mean difference is that vector; less it, the answers are the base's."""
    wrapped = copy.deepcopy(study.base)
    v = 5 * torch.randn(64, generator=data.rng(0, "test"))
    wrapped.blocks[2].down.bias.data += v
    found = direction.mean_differences(study, wrapped, study.base, "a")
    assert torch.allclose(found["ft - base"][3], v, atol=1e-4)
    test = study.test("a", "c0")
    asked = direction.AtAnswer(study, wrapped, test)
    assert torch.allclose(asked.logits(3, found["ft - base"][3], 1.),
                          predict(study.base, test.examples), atol=1e-3)
    like = direction.random_like(found, data.rng(0, "test"))
    for kind, places in found.items():
        assert torch.allclose(like[kind].norm(dim=1), places.norm(dim=1), atol=1e-5)


def test_all_four_run_and_leave_the_models_alone(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(direction, "DRAWS", 2)
    monkeypatch.setattr(noise, "SIGMAS", (.1, .5))
    opened = analyze.open_study([*WORDS, "--also", "scratch", "--steps", "3", "lens", "noise",
                                 "direction", "quantise"])
    before = copy.deepcopy(opened.models)
    analyze.run_analyses(opened)
    for name, model in opened.models.items():
        assert same(model.parameters(), before[name].parameters())
    rows = {name: [json.loads(line) for line in open(f"out/ft.{name}.jsonl")]
            for name in opened.args.analysis}
    models = {name: {r["model"] for r in part} for name, part in rows.items()}
    assert models["lens"] == {"base", "ckpt", "untrained", "scratch", "never-trained"}
    assert models["noise"] == models["quantise"] == {"base", "ckpt", "never-trained"}
    assert len(rows["lens"]) == 5 * 3 * 13 and len(rows["noise"]) == 3 * (1 + 2 * 8)
    assert len(rows["direction"]) == 2 * (2 * 4 * 5 + 2) and len(rows["quantise"]) == 3 * 3
    for name, part in rows.items():
        line = FILES[name].evidence(opened, part)
        assert {r["operand"] for r in part} == {"a", "c"}
        assert -1 <= line.measured <= 1 and -1 <= line.control_measured <= 1
        assert line.holds == (line.measured - max(0., line.control_measured) >= .25)
