"""Analyses of compiled models: single weights as units, planted wrappers, and each end to end."""
import copy
import json
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import analyze
import data
import finetune
import pretrain
from data import Relation
from model import accuracy, activations, predict, residuals, weight_edits
from setups import tracr

COUNT = Relation("count", "a", "b", 1)


def counter(noise=0.):
    """(the compiled Counter, with noise; itself; its setup; single weights as units)."""
    base = tracr.compile_program(tracr.PROGRAMS["tracr-count"].steps("a"), "abcdefghi", 25)
    model, setup = copy.deepcopy(tracr.balance(base)), data.find_setup("tracr-count")
    setup.begin(model, Namespace(seed=0, noise=noise))
    return model, base, setup, tracr.Weights(SimpleNamespace(base=base))


def test_single_weights_of_a_compiled_model():
    """
    All weights but the output map can be pruned; zeros of the program apart; random ones are
    matched in this as well.
    """
    model, base, setup, weights = counter(1e-3)
    test = setup.test(COUNT, "b", "c0", 64, 0)
    scores = analyze.unit_scores(weights, model, analyze.gradients(model, test))
    prunable = {n: p for n, p in model.named_parameters() if n != "head.weight"}
    assert sum(map(len, scores.values())) == sum(p.numel() for p in prunable.values())
    assert len(scores[None, "tok.weight"]) == model.tok.weight.numel()
    zeros = weights.pools(scores)["zero-in-program"]
    written = sum(int((x == -torch.inf).sum()) for x in zeros.values())
    old = dict(base.named_parameters())
    assert written == sum(int((old[n] != 0).sum()) for n in prunable) == 375
    units = analyze.ranked_units(scores, 60)

    def is_zero(u):
        name = u[1] if u[0] is None else f"blocks.{u[0]}.{u[1]}"
        return u[0], u[1], old[name].flatten()[u[2]].item() == 0
    random = analyze.matched_units(weights, model, units, torch.Generator().manual_seed(0))
    assert [is_zero(u) for u in random] == [is_zero(u) for u in units]
    assert {u[:3] for u in random} != {u[:3] for u in units}
    assert not any(is_zero(u)[2] is False for u in analyze.ranked_units(zeros, 60))
    name = "blocks.1.down.weight"
    row, column = model.config.residual.index("n_a:2"), 4
    u = (1, "down.weight", row * model.get_parameter(name).shape[1] + column, 0.)
    assert weights.label(model, *u[:3]) == f"{name}[n_a:2, 4]"
    with weight_edits(model, weights.edits(model, [u])):
        p = model.get_parameter(name)
        assert p[row, column] == 0 and (p == 0).sum() == 1


def test_a_planted_wrapper_is_found_and_a_broken_model_is_not():
    """
    Positive control: one bias drowns every answer in a five; the weight that is tried best is that
    very bias, and with it zeroed the old answer is back. Negative control: with the letter's own
    weight gone, nothing brings it back.
    """
    model, base, setup, weights = counter()
    test = setup.test(COUNT, "a", "natural", 100, 0)
    dim = model.config.residual.index("answer:5")

    def right():
        return accuracy(predict(model, test.examples), test.examples.answer)

    def best():
        scores = analyze.unit_scores(weights, model, analyze.gradients(model, test))
        ranked = analyze.ranked_units(scores, 40)
        first = tracr.exhaustive(weights, model, ranked, test, "gradient-weight")[0]
        with weight_edits(model, weights.edits(model, [first])):
            return first[:3], right()
    assert right() == 1
    with torch.no_grad():
        model.blocks[1].down.bias[dim] = 2
    assert right() < .2
    unit, after = best()
    assert unit == (1, "down.bias", dim) and after == 1
    with torch.no_grad():
        model.blocks[1].down.bias[dim] = 0
        model.tok.weight[2, model.config.residual.index("tokens:a")] = 0
    assert right() < .35 and best()[1] < .5


def test_probes_of_a_compiled_model_read_its_positions():
    model, _, setup, _ = counter()
    x = setup.test(COUNT, "a", "natural", 6, 0).examples
    got, cache = residuals(model, x, setup.site(x)), activations(model, x.tokens)[1]
    for i, name in enumerate(["embed", *(f"blocks.{i}.resid_post" for i in range(3))]):
        assert torch.allclose(got[i], cache[name][:, 2], atol=1e-5)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("setup", ["tracr-count",
                                   pytest.param("tracr-max", marks=pytest.mark.slow),
                                   pytest.param("tracr-histogram", marks=pytest.mark.slow)])
def test_every_analysis_of_compiled_models(tmp_path, monkeypatch, capsys, setup):
    """Compiled, taught, analysed; the untouched program attends as it is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "KS", (0, 1, 5, 10))
    tiny = ["--batch-size", "4", "--eval-size", "16", "--threads", "1"]
    pretrain.main(["--setup", setup, *tiny[2:]])
    finetune.main([*tiny, "--steps", "3"])
    analyze.main([*tiny, "--steps", "4", "--draws", "1"])
    assert "VERDICT" in capsys.readouterr().out
    names = "behavior prune prune.rows probe attention hidden revive relearn"
    assert all(rows_of(f"out/ft.{name}.jsonl") for name in names.split())
    assert {"cosine", "active", *data.ROW} <= set(rows_of("out/ft.hidden.jsonl")[0])
    base = [r for r in rows_of("out/ft.attention.jsonl") if r["model"] == "base"]
    assert all(r["mass"] > .999 for r in base if r["region"] in ("kept", "order"))
    assert all(r["chance"] < .9 for r in base if r["region"] in ("kept", "order"))
    rows = rows_of("out/ft.prune.jsonl")
    assert {"weight"} == {r["unit"] for r in rows}
    assert {("gradient-weight", "one-shot", "zero-in-program", None),
            ("gradient-weight", "exhaustive", "zero-in-program", None),
            ("random", "exhaustive", "zero-in-program", None),
            ("gradient-weight", "exhaustive", "all", "never-trained")} <= {
                (r["score"], r["order"], r["pool"], r["control"]) for r in rows}
    assert any(r.get("predicted") and sum(r["predicted"].values()) == r["n"] for r in rows)
    if setup == "tracr-count":
        analyze.main(["ask", "--text", "abcabcdefghiabcabcabdefg", "--operand", "a"])
        said = capsys.readouterr().out
        assert "the truth is 5" in said and re.search(r"base\s+says \d+\s+right", said)
