"""
The instruments, on things whose answer is known; every analysis end to end, at both scales; the
README's commands; and one tiny training that must learn.
"""
import copy
import json
import os
import re
import shlex
import tempfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import analyze
import data
import pretrain
from data import PROGRAMS, Relation
from model import GPT, Config, activations, balance, compile_program, load, loss_of, weight_edits
from test_promises import FORKS, run_forked

ROOT = Path(__file__).parent.parent
COUNT = Relation("count", "a", "b", 1)


def python(*words, cwd, code=0):
    """Run a script; returns what it printed, on stderr alone where it is to fail."""
    with tempfile.TemporaryDirectory() as folder:
        log, words = os.path.join(folder, "log"), [str(word) for word in words]
        process = FORKS.Process(target=run_forked, args=(words[0], words[1:], str(cwd), log))
        process.start()
        process.join()
        out, err = (Path(log + suffix).read_text() for suffix in (".out", ".err"))
    assert process.exitcode == code, out + err
    return err if code else out + err


# Pruning edits up to 10,000 units, which takes minutes at the paper's scale: there only up to 3.
FEW_UNITS = f"""
import sys
import tempfile
sys.path.insert(0, {str(ROOT)!r})
import analyze
from pretrain import run_script
analyze.KS, analyze.FEW, analyze.MAX_UNITS = (0, 1, 2, 3), 3, 3
run_script(analyze.main)
"""


def small_model(seed=0, n_layer=2):
    setup = data.Grammar("pcfg", "small")
    config = Config(vocab_size=len(setup.vocabulary), n_ctx=setup.length + 9, n_layer=n_layer,
                    n_head=2, d_model=16, d_head=8, d_mlp=32)
    model = GPT(config).init_weights(torch.Generator().manual_seed(seed))
    for p in model.parameters():  # large enough that every gradient is well above rounding
        p.data.mul_(5)
    return model, setup


# ---------------------------------------------------------------- parts with a known answer


def test_rule_shares_by_hand():
    a, b = torch.tensor([4, 4, 5, 6]), torch.tensor([7, 5, 8, 7])
    answer = torch.tensor([4, 5, 6, 1])  # a; a + 1 = b = blend; a + 1; nothing
    shares = analyze.rule_shares(answer, a, b, 1)
    assert shares["share_a"] == .25 and shares["share_b"] == .25 and shares["share_a_plus_q"] == .5
    assert shares["share_blend"] == .25  # (4 + 5 + 1) // 2 = 5; elsewhere 6, 7, 7
    assert shares["share_constant"] == .25
    # the 1; three are the constant
    assert analyze.rule_shares(torch.tensor([9, 9, 9, 1]), a, b, 1)["share_none"] == .25


@pytest.mark.parametrize("minus", [False, True])
def test_unit_scores_are_the_first_order_effect_of_an_edit(minus):
    """Shrinking a row by a small factor to zero (or the base) moves the loss by -factor x score."""
    model, setup = small_model()
    model.double()
    base = small_model(seed=1)[0].double() if minus else None
    test = setup.test(COUNT, "a", "c0", 64, 0)

    def loss():
        with torch.no_grad():
            x = test.examples
            return F.cross_entropy(model(x.tokens[:, :x.at + 1], x.at), x.answer).item()
    score = "gradient-change" if minus else "gradient-weight"
    scores = analyze.unit_scores(model, test, "row", score, base)
    parameters, before, small = dict(model.named_parameters()), loss(), 1e-4
    for key in scores:
        i = scores[key].abs().argmax().item()
        edits = []
        for kind in ("weight", "bias"):
            name = f"blocks.{key[0]}.{key[1]}.{kind}"
            p = parameters[name].detach()
            target = base.get_parameter(name).detach()[i] if minus else torch.zeros_like(p[i])
            edits.append((name, i, p[i] + small * (target - p[i])))
        with weight_edits(model, edits):
            change = loss() - before
        assert change == pytest.approx(-small * scores[key][i].item(), rel=.05, abs=1e-9), key
    rows = analyze.unit_scores(model, test, "row")
    for (block, matrix), by_weight in analyze.unit_scores(model, test, "weight").items():
        p = model.get_parameter(f"blocks.{block}.{matrix}")
        assert by_weight.shape == (p.numel(),)
        assert rows[block, matrix.removesuffix(".weight")].shape == (p.shape[0],)


def test_ranked_matched_and_edited_units():
    model, setup = small_model()
    base = small_model(seed=1)[0]
    test = setup.test(COUNT, "a", "c0", 64, 0)
    scores = analyze.unit_scores(model, test, "row")
    units = analyze.ranked_units(scores, 20)
    everything = sorted(torch.cat(list(scores.values())).tolist(), reverse=True)
    assert [u[3] for u in units] == everything[:20] and everything[19] > 0
    assert all(scores[u[0], u[1]][u[2]].item() == u[3] for u in units)
    random = analyze.matched_units(units, scores, torch.Generator().manual_seed(0))

    def where(u):  # the same matrices, rank by rank, and of queries, keys and values the same
        return *u[:2], u[2] // 16 if u[1] == "attn.qkv" else 0
    assert [where(u) for u in random] == [where(u) for u in units]
    assert len({u[:3] for u in random}) == 20 and {u[:3] for u in random} != {u[:3] for u in units}

    weight = dict(model.named_parameters())
    block, matrix, row, _ = units[0]
    with weight_edits(model, analyze.unit_edits(model, units)):
        assert weight[f"blocks.{block}.{matrix}.weight"][row].abs().max() == 0
        assert weight[f"blocks.{block}.{matrix}.bias"][row] == 0
    everyone = [(b, m, i, None) for (b, m), s in scores.items() for i in range(len(s))]
    # grafting all rows is the base's blocks
    with weight_edits(model, analyze.unit_edits(model, everyone, base)):
        for (b, m) in scores:
            name = f"blocks.{b}.{m}.weight"
            assert torch.equal(weight[name], base.get_parameter(name))
    by_weight = analyze.unit_scores(model, test, "weight")
    block, matrix, i, score = analyze.ranked_units(by_weight, 1)[0]
    p = weight[f"blocks.{block}.{matrix}"]
    with weight_edits(model, analyze.unit_edits(model, [(block, matrix, i, score)])):
        assert p.flatten()[i] == 0 and (p == 0).sum() == 1


def counter(noise=0.):
    """The compiled Counter, and with noise a copy of it."""
    base = compile_program(PROGRAMS["tracr-count"].steps("a"), "abcdefghi", 25)
    model = copy.deepcopy(balance(base))
    pretrain.add_noise(model, noise, 0)
    return model, base, data.Compiled("tracr-count")


def test_single_weights_of_a_compiled_model():
    """
    All weights but the output map can be pruned; zeros of the program apart; random ones are
    matched in this as well.
    """
    model, base, setup = counter(1e-3)
    test = setup.test(COUNT, "b", "c0", 64, 0)
    scores = analyze.unit_scores(model, test, "weight")
    prunable = {n: p for n, p in model.named_parameters() if n != "head.weight"}
    assert sum(map(len, scores.values())) == sum(p.numel() for p in prunable.values())
    assert len(scores[None, "tok.weight"]) == model.tok.weight.numel()
    zeros = analyze.only_zero(scores, base)
    written = sum(int((x == -torch.inf).sum()) for x in zeros.values())
    old = dict(base.named_parameters())
    assert written == sum(int((old[n] != 0).sum()) for n in prunable) == 375
    units = analyze.ranked_units(scores, 60)

    def is_zero(u):
        name = u[1] if u[0] is None else f"blocks.{u[0]}.{u[1]}"
        return u[0], u[1], old[name].flatten()[u[2]].item() == 0
    random = analyze.matched_units(units, scores, torch.Generator().manual_seed(0), base)
    assert [is_zero(u) for u in random] == [is_zero(u) for u in units]
    assert {u[:3] for u in random} != {u[:3] for u in units}
    assert not any(is_zero(u)[2] is False for u in analyze.ranked_units(zeros, 60))
    name = "blocks.1.down.weight"
    row, column = model.config.residual.index("n_a:2"), 4
    u = (1, "down.weight", row * model.get_parameter(name).shape[1] + column, 0.)
    assert analyze.unit_name(model, u) == f"{name}[n_a:2, 4]"
    with weight_edits(model, analyze.unit_edits(model, [u])):
        p = model.get_parameter(name)
        assert p[row, column] == 0 and (p == 0).sum() == 1


def test_a_planted_wrapper_is_found_and_a_broken_model_is_not():
    """
    Positive control: one bias drowns every answer in a five; the weight that is tried best is that
    very bias, and with it zeroed the old answer is back. Negative control: with the letter's own
    weight gone, nothing brings it back.
    """
    model, base, setup = counter()
    test = setup.test(COUNT, "a", "natural", 300, 0)
    dim = model.config.residual.index("answer:5")

    def right():
        return pretrain.accuracy(pretrain.predict(model, test.examples), test.examples.answer)

    def best():
        units = analyze.ranked_units(analyze.unit_scores(model, test, "weight"), 100)
        first = analyze.exhaustive(model, units, test, "weight")[0]
        with weight_edits(model, analyze.unit_edits(model, [first])):
            return first[:3], right()
    assert right() == 1
    with torch.no_grad():
        model.blocks[1].down.bias[dim] = 2
    assert right() < .2
    unit, accuracy = best()
    assert unit == (1, "down.bias", dim) and accuracy == 1
    with torch.no_grad():
        model.blocks[1].down.bias[dim] = 0
        model.tok.weight[2, model.config.residual.index("tokens:a")] = 0
    assert right() < .35 and best()[1] < .5


def test_probes_of_a_compiled_model_read_its_positions():
    model, _, setup = counter()
    x = setup.test(COUNT, "a", "natural", 6, 0).examples
    got, cache = analyze.residuals(model, x, setup.site(x)), activations(model, x.tokens)[1]
    for i, name in enumerate(["embed", *(f"blocks.{i}.resid_post" for i in range(3))]):
        assert torch.allclose(got[i], cache[name][:, 2], atol=1e-5)


def test_relearning_scores_each_half_by_itself(monkeypatch):
    """
    A model that has learned the even answers alone is right on them and wrong on the others; every
    row's accuracy and floors are those of its half, and what is taught is what was asked for.
    """
    setup, taught = data.Grammar("pcfg", "small"), []
    relation = Relation("count", "a", "b", 1)
    answer = setup.test(relation, "a", "c0", 200, 0).examples.labels[:, 0]

    def lesson(study, start, draw, lr, steps):
        taught.append((draw.keywords["args"], lr, steps))
        yield from ((step, start) for step in range(steps + 1))

    def predict(model, examples):
        known = (examples.labels[:, 0] % 2 == 0) & (model == "even is known")
        return F.one_hot(torch.where(known, examples.answer, 0), 99).float()
    monkeypatch.setattr(analyze, "lesson", lesson)
    monkeypatch.setattr(pretrain, "predict", predict)
    written = {}
    study = SimpleNamespace(
        relation=relation, setup=setup, model="even is known", never_trained=("", None, "c"),
        control_note="", answers=True, run=SimpleNamespace(seed=0), args=SimpleNamespace(
            steps=None, eval_size=200), write=lambda name, rows: written.setdefault(name, rows))
    rows = analyze.relearn(study)
    halves = [(getattr(x, "operand", None), lr, steps, getattr(x, "answers", None))
              for x, lr, steps in taught]
    assert halves == [(o if half else None, 1e-5, 100, half) for o in "ac"
                      for half in ("even", "odd", None)]
    assert {r["half"] for r in rows if r["answers"] == "other families"} == {"retained"}
    assert rows is written["relearn"]
    for row in (r for r in rows if r["arm"] == "reft" and r["half"] != "retained"):
        even = (row["answers"] == "even") == (row["half"] == "taught")
        labels = answer[answer % 2 == (0 if even else 1)]
        assert row["accuracy"] == even and row["n"] == len(labels)
        assert row["floor"] == labels.unique(return_counts=True)[1].max() / len(labels)
    assert {row["step"] for row in rows} == pretrain.eval_steps(100, 0)
    v = {}
    about = SimpleNamespace(relation=relation, control_operand="c", answers=True)
    line, = analyze.relearn_evidence(about, rows, v)
    assert line.measured == 0 and line.holds is False and v["never_relearn_held_out"] == 0
    assert line.control_measured == max(row["cross_floor"] for row in rows if row["half"] ==
                                        "held-out" and row["arm"] == "reft") > .5
    assert analyze.relearn_evidence(None, [], v) == []


def test_iterated_units_are_distinct_and_start_like_one_pass(monkeypatch):
    model, setup = small_model()
    test = setup.test(COUNT, "a", "c0", 64, 0)
    first = analyze.ranked_units(analyze.unit_scores(model, test, "row"), 1)
    monkeypatch.setattr(analyze, "FEW", 6)
    units = analyze.iterative(model, first, test, "row")
    assert len({u[:3] for u in units}) == len(units) == 6
    assert units[0][:3] == first[0][:3]


def test_probes_trained_together_equal_one_alone_and_find_what_is_there():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (3, 400), generator=g)
    x = torch.randn(2, 400, 8, generator=g)
    # site 0 holds the classes of probe 0, site 1 holds nothing
    x[0, :, :4] += 6 * F.one_hot(y[0], 4)
    site = [0, 1, 0]
    weight, bias = analyze.fit_probes(x, site, y, 600, torch.Generator().manual_seed(1))
    for p in range(3):
        alone, _ = analyze.fit_probes(x, site[p:p + 1], y[p:p + 1], 600,
                                      torch.Generator().manual_seed(1))
        assert torch.allclose(weight[p], alone[0], atol=1e-5)
    right = [((x[s] @ w + c).argmax(1) == t).double().mean()
             for s, w, c, t in zip(site, weight, bias, y)]
    assert right[0] > .97 and right[1] < .5 and right[2] < .5


def test_residuals_are_the_answer_positions():
    model, setup = small_model()
    x = setup.test(COUNT, "a", "natural", 5, 0).examples
    got = analyze.residuals(model, x, setup.site(x))
    _, cache = activations(model, x.tokens)
    for i, name in enumerate(["embed", "blocks.0.resid_post", "blocks.1.resid_post"]):
        assert torch.allclose(got[i], cache[name][:, x.at], atol=1e-5)


def test_steps_to():
    assert analyze.steps_to([(0, .1), (5, .92), (10, .8), (15, .99)], .9) == 5
    assert analyze.steps_to([(0, .1), (5, .92)], .99) is None


MADE_UP = dict(  # findings, as the analyses would have them
    ckpt_pt=0., ckpt_ft=0., ckpt_c1=1., base_pt=1., base_ft=0., shortcut=.9, pruned=.9, random=.05,
    never_pruned=.2, probe=.99, untrained=.7, never_read=.5, reft=50, control=None, max_steps=150,
    has_control=True)


def made_up_rows(made):
    """The rows that the analyses return, with the numbers of a finding in them."""
    value = {("base", "a"): made.base_pt, ("base", "b"): made.base_ft,
             ("ckpt", "a"): made.ckpt_pt, ("ckpt", "b"): made.ckpt_ft}
    behavior = []
    for model, operand in value:
        for split in data.SPLITS:
            is_c1 = (model, operand, split) == ("ckpt", "b", "c1")
            behavior.append({"task": "count", "model": model, "operand": operand, "split": split,
                             "cross_floor": .5, "share_a_plus_q": made.shortcut,
                             "accuracy": made.ckpt_c1 if is_c1 else value[model, operand]})
    prune = []
    for score, order, control, edit, accuracy in (
            ("gradient-weight", "iterative", None, "zero", made.pruned),
            ("gradient-weight", "one-shot", None, "zero", made.pruned / 2),
            ("random", "one-shot", None, "zero", made.random),
            ("gradient-change", "one-shot", None, "graft", .0),
            ("gradient-weight", "one-shot", "never-trained", "zero", made.never_pruned),
            ("gradient-weight", "iterative", "never-trained", "zero", made.never_pruned)):
        if not made.has_control and control:
            prune.append({"score": score, "order": "one-shot", "pool": "all", "control": control,
                          "edit": "zero", "operand": None, "split": None, "k": None, "draw": None,
                          "accuracy": None, "unit": "row", "note": "none: made up"})
            continue
        prune.append({"score": score, "order": order, "pool": "all", "control": control,
                      "edit": edit, "operand": "c" if control else "a", "split": "c0", "k": 5,
                      "draw": 0 if score == "random" else None, "chosen": True, "unit": "row",
                      "accuracy": accuracy})
    probes = []
    for model, target, accuracy in (("ckpt", "a", made.probe), ("untrained", "a", made.untrained),
                                    ("ckpt", "c", made.never_read)):
        for split in ("natural", "c0"):
            probes.append({"model": model, "target": target, "prompt": "b", "labels": "true",
                           "split": split, "block": 1, "floor": .4, "accuracy": accuracy})
    revive = [{"arm": arm, "split": "natural", "threshold": .99, "lr": 1e-5, "steps": steps,
               "max_steps": made.max_steps}
              for arm, steps in (("reft", made.reft), ("teach-c", made.control))
              if made.has_control or arm == "reft"]
    return {"behavior": behavior, "prune": prune, "probe": probes, "revive": revive}


def verdict_of(folder, without=(), **made):
    """The verdict on made-up findings, without the rows of some analyses."""
    made, model = SimpleNamespace(**{**MADE_UP, **made}), object()
    study = SimpleNamespace(
        relation=COUNT, control_operand="c", answers=True, unit="row", model=model, control={},
        never_trained=(model, None, "c") if made.has_control else None, control_note="made up",
        args=None, setup=SimpleNamespace(compiled=False, reft_rates=[1.]),
        ckpt={"args": {"lr": 1e-5}}, prefix=str(folder / "x"), about={"checkpoint": "0"})
    rows = made_up_rows(made)
    analyze.verdict(study, {**rows, **{name: [] for name in without}})
    return json.loads((folder / "x.verdict.json").read_text())


@pytest.mark.parametrize("word, made", [
    ("wrapped", {}),
    ("wrapped", {"probe": .75}),                      # two of three are enough
    ("wrapped", {"control": 150}),                    # exactly a third of the steps
    ("intact", {"ckpt_pt": .9, "ckpt_ft": 1., "base_ft": 1., "shortcut": 0.}),
    ("new", {"ckpt_ft": 1., "pruned": .1, "reft": 35, "control": 65}),
    ("lost", {"pruned": .1, "probe": .7, "reft": 60, "control": 70}),
    # .6 is what knowing b gives; c was there
    ("lost", {"pruned": .6, "probe": .7, "reft": 60, "control": 0}),
    # not for want of a control
    ("undecided", {"pruned": .1, "probe": .7, "reft": 60, "control": 70, "has_control": False}),
    ("undecided", {"pruned": .1, "probe": .7}),       # only one instrument
    ("undecided", {"base_pt": .3}),                   # it was never there
    ("undecided", {"ckpt_c1": .3}),                   # broken, not wrapped: b is wrong on c1 too
    ("undecided", {"random": .8, "untrained": .95}),  # controls do as well: one instrument is left
    ("undecided", {"never_pruned": .8, "never_read": .95}),
])
def test_verdict(tmp_path, word, made):
    assert verdict_of(tmp_path, **made)["verdict"] == word


def test_verdict_tells_the_ways_of_being_intact_apart(tmp_path):
    def text(**made):
        return verdict_of(tmp_path, ckpt_pt=.9, **made)["text"]
    assert "no wrapper was needed" in text(ckpt_ft=1., base_ft=1., shortcut=0.)
    assert "only opens when b is asked" in text()
    assert "b was not learned" in text(shortcut=.1)


EVIDENCE = {"instrument", "question", "measured", "control", "control_measured", "margin", "holds"}


def check_evidence(evidence, instruments):
    """One line an instrument, two of behaviour where two operands are asked, all columns filled."""
    assert [line["instrument"] for line in evidence] == instruments
    assert len({line["question"] for line in evidence}) == len(evidence)
    for line in evidence:
        assert EVIDENCE <= set(line) <= EVIDENCE | {"unit"}, line
        assert all(line[key] and isinstance(line[key], str) for key in ("question", "control"))
        assert line["holds"] in (True, False, None) and line["margin"] >= 0
        assert line.get("unit", "share") in ("share", "steps")


def test_evidence_is_complete(tmp_path, capsys):
    """What was measured, against which control, the margin by which it had to win, did it."""
    found = verdict_of(tmp_path)
    check_evidence(found["evidence"], ["behaviour", "behaviour", "pruning", "probing", "reviving"])
    assert [line["measured"] for line in found["evidence"]] == [0., 0., .9, .99, 50]
    assert [line["control_measured"] for line in found["evidence"]] == [.5, .5, .2, .7, 150]
    assert [line["holds"] for line in found["evidence"]] == [False, False, True, True, True]
    assert [line["margin"] for line in found["evidence"]] == [.25, .25, .25, .1, 3]
    assert [line["unit"] for line in found["evidence"]] == ["share"] * 4 + ["steps"]
    assert found["found_by"] == ["pruning", "probing", "reviving"]
    printed = capsys.readouterr().out
    assert "EVIDENCE" in printed and "VERDICT  wrapped" in printed
    for line in found["evidence"]:
        assert line["question"] in printed and line["control"] in printed
    # every number that it quotes stands beside the table as well
    assert {found["prune_c0"], found["probe_natural"], found["reft_steps"]} == {.9, .99, 50}
    # without a control, what it would have measured is null, and so is nothing else
    found = verdict_of(tmp_path, has_control=False)
    check_evidence(found["evidence"], ["behaviour", "behaviour", "pruning", "probing", "reviving"])
    assert found["evidence"][4]["control_measured"] is None
    assert not found["evidence"][4]["holds"] and found["evidence"][2]["holds"]


@pytest.mark.parametrize("without", [["behavior"], ["prune"], ["probe"], ["revive"],
                                     ["prune", "revive"], ["behavior", "prune", "probe", "revive"]])
@pytest.mark.parametrize("made", [{}, {"has_control": False}, {"reft": None, "control": None},
                                  {"ckpt_pt": .9}])
def test_verdict_says_which_rows_are_missing(tmp_path, capsys, without, made):
    """It is undecided, names them, and says null and ? of what rests on them."""
    found = verdict_of(tmp_path, without, **made)
    assert found["verdict"] == "undecided"
    assert f"no rows of {', '.join(without)}" in found["text"]
    check_evidence(found["evidence"], ["behaviour", "behaviour", "pruning", "probing", "reviving"])
    places = {"behavior": (0, 1), "prune": (2,), "probe": (3,), "revive": (4,)}
    for name in without:
        for place in places[name]:
            assert found["evidence"][place]["measured"] is None
            assert found["evidence"][place]["holds"] is None
    assert "no rows of" in capsys.readouterr().out


@pytest.mark.parametrize("without", [[], ["behavior"], ["probe"], ["behavior", "probe"]])
def test_evidence_of_stories(tmp_path, without):
    """A line of behaviour and one of probing; what rests on missing rows is null."""
    study = SimpleNamespace(answers=False, relation=Relation("story", "Twist"),
                            never_trained=None, prefix=str(tmp_path / "x"), about={})
    behavior = [{"operand": "Twist", "split": "asked", "model": model, "accuracy": x, "parsed": 1.}
                for model, x in (("base", .9), ("ckpt", .1))]
    probes = [{"model": model, "target": "Twist", "labels": "true", "split": "natural", "block": 2,
               "auc": x} for model, x in (("base", .9), ("ckpt", .85), ("control", .6))]
    rows = {"behavior": behavior, "probe": probes, **{name: [] for name in without}}
    analyze.verdict(study, rows)
    found = json.loads((tmp_path / "x.verdict.json").read_text())
    check_evidence(found["evidence"], ["behaviour", "probing"])
    asked, read = found["evidence"]
    assert (asked["measured"], asked["control_measured"], asked["holds"]) == (
        (None, None, None) if "behavior" in without else (.1, .45, False))
    assert (read["measured"], read["control_measured"], read["holds"]) == (
        (None, None, None) if "probe" in without else (.85, .75, True))
    assert found["verdict"] == ("undecided" if without else "wrapped")
    assert not without or f"no rows of {', '.join(without)}" in found["text"]


def test_a_tiny_model_learns_to_count_what_it_is_taught_and_nothing_else():
    """
    180 steps of the real optimisation step on the real data: count a well above its floor, count c
    not.
    """
    setup = data.Grammar("pcfg", "small")
    config = Config(vocab_size=len(setup.vocabulary), n_ctx=setup.length + 9, n_layer=2, n_head=2,
                    d_model=32, d_head=16, d_mlp=128)
    model = GPT(config).init_weights(data.rng(0, "weights"))
    args = Namespace(task="count", operand="a", c_tr=0., pair=["a", "b"], q=1)
    batch = data.stream(lambda n, rng: setup.finetuning(n, rng, args), 64, 0, "finetune")
    tests = [setup.test(COUNT, "a", "natural", 300, 0),
             setup.test(COUNT._replace(pt="c"), "c", "c0", 300, 0)]
    optimizer = pretrain.optimizer_for(model, 3e-3, setup)
    update = pretrain.update_of(model, optimizer, lambda x: loss_of(model, x))
    for _ in pretrain.train_steps(update, batch, pretrain.cosine(3e-3, 180), range(180)):
        pass
    a, c = pretrain.evaluate(model, setup, tests)
    assert a["accuracy"] > .9 > a["floor"] + .2
    assert c["accuracy"] < c["cross_floor"]


# ---------------------------------------------------------------- end to end

ROW = {"setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor", "n",
       "loss", "seed"}
SWEEP = {"score", "order", "pool"}  # what describes a ranking; in the rows of a sweep also:
FILES = {"behavior": {"model"},
         "prune": SWEEP | {"unit", "control", "edit", "k", "draw"}, "prune.rows": None,
         "probe": {"model", "block", "target", "prompt", "labels"},
         "attention": {"model", "block", "head", "prompt", "region", "mass", "chance"},
         "revive": {"arm", "lr", "threshold", "steps", "max_steps"}, "revive.curve": None,
         "relearn": {"arm", "lr", "answers", "half", "step"}}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("scale, task", [
    ("small", "count"), ("small", "index"),
    pytest.param("paper", "count", marks=pytest.mark.slow)])
def test_every_stage_and_analysis(tmp_path, scale, task):
    """
    A few steps of each, down to the report; files and rows as promised; reFT of a fine-tuned model
    as well.
    """
    tiny = ["--batch-size", "2", "--eval-size", "4" if scale == "small" else "2", "--steps", "3",
            "--threads", "1"]
    python("pretrain.py", "--scale", scale, *tiny, cwd=tmp_path)
    python("finetune.py", "--task", task, *tiny, cwd=tmp_path)
    python("finetune.py", "--reverse", *tiny, cwd=tmp_path)
    if scale == "paper":
        (tmp_path / "few_units.py").write_text(FEW_UNITS)
    script = "analyze.py" if scale == "small" else tmp_path / "few_units.py"
    out = python(script, *tiny, "--draws", "1", cwd=tmp_path)
    assert "VERDICT" in out
    for name, keys in FILES.items():
        rows = rows_of(tmp_path / f"out/ft.{name}.jsonl")
        assert rows, name
        for row in rows:
            if keys is not None:
                assert ROW | keys <= set(row), name
            for share in ("accuracy", "floor", "cross_floor", "mass", "chance"):
                assert row.get(share) is None or 0 <= row[share] <= 1.0001, (name, share)
    for stage in ("pre", "ft", "reft"):
        assert {r["step"] for r in rows_of(tmp_path / f"out/{stage}.jsonl")} >= {0, 3}
        record = json.loads((tmp_path / f"out/{stage}.json").read_text())
        assert {"command", "args", "git", "versions", "device", "seconds"} <= set(record)
    verdict = json.loads((tmp_path / "out/ft.verdict.json").read_text())
    assert verdict["verdict"] in ("wrapped", "intact", "lost", "new", "undecided")
    assert verdict["text"]
    check_evidence(verdict["evidence"],
                   ["behaviour", "behaviour", "pruning", "probing", "reviving", "relearning"])
    check_sweeps(rows_of(tmp_path / "out/ft.prune.jsonl"),
                 rows_of(tmp_path / "out/ft.prune.rows.jsonl"))
    if scale == "small":
        python("analyze.py", "prune", *tiny, "--draws", "1", "--unit", "weight", cwd=tmp_path)
        assert {r["unit"] for r in rows_of(tmp_path / "out/ft.prune.jsonl")} == {"weight"}
        python("analyze.py", *tiny, "--ckpt", "out/pre.pt", cwd=tmp_path)  # only what applies
        assert not (tmp_path / "out/pre.prune.jsonl").exists()
        assert (tmp_path / "out/pre.probe.jsonl").exists()
        (tmp_path / "out/ft.probe.jsonl").unlink()
        assert "no rows of probe" in python("analyze.py", "verdict", cwd=tmp_path)
        python("plot.py", cwd=tmp_path)
        assert (tmp_path / "out/report.html").stat().st_size > 10000
    _, ckpt = load(tmp_path / "out/ft.pt")
    assert ckpt["capability"] == {"task": task, "operand": "a"}


def sweep_of(row):
    return tuple(row[k] for k in ("score", "order", "control", "edit"))


def check_sweeps(rows, ranks):
    """
    Rows of a pruning of a grammar's model: the columns of every sweep that there should be, each
    with one K chosen; as many units edited at once as MAX_UNITS allows; ranks with their values.
    """
    sweeps = set(map(sweep_of, rows))
    assert sweeps == {
        ("gradient-weight", "one-shot", None, "zero"),
        ("gradient-weight", "iterative", None, "zero"),
        ("gradient-weight", "one-shot", None, "graft"),
        ("gradient-change", "one-shot", None, "graft"),
        ("random", "one-shot", None, "zero"), ("random", "one-shot", None, "graft"),
        ("gradient-weight", "one-shot", "never-trained", "zero"),
        ("gradient-weight", "iterative", "never-trained", "zero"),
        ("gradient-change", "one-shot", "never-trained", "graft")}
    assert {r["pool"] for r in rows} == {"all"} and {r["unit"] for r in rows} == {"row"}
    assert {r["operand"] for r in rows if r["control"]} == {"c", "b"}
    many = {200 * 2 ** i for i in range(30)}
    assert {r["k"] for r in rows} <= {0, *analyze.KS, *many}
    assert max(r["k"] for r in rows) <= analyze.MAX_UNITS
    assert {r["draw"] for r in rows if r["score"] == "random"} == {0}
    for sweep in sweeps:
        chosen = [r["k"] for r in rows if sweep_of(r) == sweep and r["chosen"]]
        assert len(set(chosen)) == 1 and 0 <= chosen[0] <= analyze.FEW, sweep
    for r in ranks:
        assert SWEEP <= set(r) and isinstance(r["value"], float) and isinstance(r["score"], str)


@pytest.mark.parametrize("setup", ["tracr-count",
                                   pytest.param("tracr-max", marks=pytest.mark.slow),
                                   pytest.param("tracr-histogram", marks=pytest.mark.slow)])
def test_every_stage_and_analysis_of_compiled_models(tmp_path, setup):
    """
    Compiled, taught, reversed, analysed, drawn; the untouched program attends as it is written.
    """
    tiny = ["--batch-size", "4", "--eval-size", "24", "--threads", "1"]
    python("pretrain.py", "--setup", setup, "--eval-size", "24", "--threads", "1", cwd=tmp_path)
    python("finetune.py", *tiny, "--steps", "3", cwd=tmp_path)
    python("finetune.py", "--reverse", *tiny, "--steps", "3", cwd=tmp_path)
    out = python("analyze.py", *tiny, "--steps", "4", "--draws", "1", cwd=tmp_path)
    assert "VERDICT" in out
    for name, keys in {**FILES, "hidden": {"model", "block", "cosine", "active"}}.items():
        rows = rows_of(tmp_path / f"out/ft.{name}.jsonl")
        assert rows and (keys is None or all(ROW | keys <= set(row) for row in rows)), name
    rows = rows_of(tmp_path / "out/ft.attention.jsonl")
    base = [r for r in rows if r["model"] == "base"]
    assert all(r["mass"] > .999 for r in base if r["region"] in ("kept", "order"))
    assert all(r["chance"] < .9 for r in base if r["region"] in ("kept", "order"))
    rows = rows_of(tmp_path / "out/ft.prune.jsonl")
    assert {"weight"} == {r["unit"] for r in rows}
    assert {("gradient-weight", "one-shot", "zero-in-program", None),
            ("gradient-weight", "exhaustive", "zero-in-program", None),
            ("random", "exhaustive", "zero-in-program", None),
            ("gradient-weight", "exhaustive", "all", "never-trained")} <= {
                (r["score"], r["order"], r["pool"], r["control"]) for r in rows}
    assert any(r.get("predicted") and sum(r["predicted"].values()) == r["n"] for r in rows)
    python("analyze.py", "attention", "hidden", "--ckpt", "out/reft.pt", "--eval-size", "24",
           "--threads", "1", cwd=tmp_path)
    if setup == "tracr-count":
        python("plot.py", cwd=tmp_path)
        for figure in ("fig5_behavior", "fig7_prune", "fig39_maps", "fig46_hidden", "fig55_classes"):
            assert (tmp_path / f"out/figures/{figure}.png").stat().st_size > 5000
        text = python("data.py", "--setup", setup, "--json", "-n", "1", cwd=tmp_path)
        text = json.loads(text)["text"]
        out = python("analyze.py", "ask", "--text", text, "--operand", "a", "--threads", "1",
                     cwd=tmp_path)
        assert f"the truth is {text.count('a')}" in out
        assert re.search(r"base\s+says \d+\s+right", out)
        for words in (["ask", "--text", "xyz"], ["ask", "--text", text, "--operand", "z"],
                      ["hidden", "--ckpt", "no.pt"]):
            assert len(python("analyze.py", *words, cwd=tmp_path, code=2).splitlines()) == 1


def test_ask_and_mistakes(tmp_path):
    tiny = ["--batch-size", "2", "--eval-size", "4", "--steps", "3", "--threads", "1"]
    python("pretrain.py", *tiny, "--prior", "high", cwd=tmp_path)
    python("finetune.py", *tiny, cwd=tmp_path)
    text = "abcabcabcabcabcabcabcabcabcabcab"
    said = python("analyze.py", "ask", "--text", text, "--operand", "b", cwd=tmp_path)
    assert "the truth is 6" in said and said.count("says") == 2
    for words, hint in ((["ask", "--text", "abc"], "32 letters"),
                        (["ask", "--text", "x" * 32], "32 letters"),
                        (["ask"], "32 letters"), (["nonsense"], "no analysis"),
                        (["prune", "--ckpt", "out/pre.pt"], "no base"),
                        (["--draws", "0"], "--draws"), (["--base", "out/nothing.pt"], "no such"),
                        (["--control", "out/pre.pt"], "prior 0"),
                        (["--ckpt", "out/pre.pt", "--base", "out/pre.pt"], "--base")):
        said = python("analyze.py", *words, cwd=tmp_path, code=2)
        assert hint in said and "Traceback" not in said, said
        assert len(said.strip().splitlines()) == 1, said
    # a parent that went along is found; one that was made again is not the parent any more
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    python("analyze.py", "attention", *tiny[2:4], "--ckpt", "elsewhere/ft.pt", cwd=tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    python("pretrain.py", *tiny, "--seed", "1", "--force", cwd=tmp_path)
    said = python("analyze.py", "behavior", cwd=tmp_path, code=2)
    assert "has changed" in said


def test_readme_commands(tmp_path):
    """Every python command of the README's code blocks runs, with tiny numbers for the defaults."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    parts = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        parts += [part.split("#")[0].strip() for part in line.split("&&")]
    commands = [shlex.split(part) for part in parts if part.startswith("python ")]
    commands = [command for command in commands if "-m" not in command]
    assert {"data.py", "pretrain.py", "finetune.py", "analyze.py", "plot.py"} <= {
        c[1] for c in commands}
    few = ["--steps", "3", "--batch-size", "2", "--eval-size", "4"]
    tiny = {"pretrain.py": few, "finetune.py": few, "analyze.py": [*few, "--draws", "1"]}
    done = set()
    for command in commands:
        few = tiny.get(command[1], [])
        if any("stories" in word for word in command):  # they have no draws of random rows
            few = few[:6] + (["--batch-size", "4"] if few else [])
        if command[1] == "pretrain.py" and "tracr" in " ".join(command[2:4]):
            few = few[4:]  # a compiled model has no steps
        words = command[1:] + few + (["--keep", "1,2"] if "--keep" in command else [])
        if tuple(words) not in done:
            python(*words, cwd=tmp_path)
            done.add(tuple(words))


def test_registries_and_flags_agree():
    """
    Every task, split and analysis of the registries can be asked for, and has a docstring that says
    how it works.
    """
    for name, about in analyze.ANALYSES.items():
        doc = about.run.__doc__
        assert len(doc) > 200 and "Fooled by" in doc, name
    for name, task in data.TASKS.items():
        assert "->" in task.answers.__doc__ or name == "token"
    assert set(data.Grammar.finetuned) <= set(data.TASKS)
    assert pretrain.constant(1., 10)(0) == .1 and pretrain.constant(1., 10)(99) == 1.
    rate = pretrain.cosine(1., 100, final=.01)
    assert rate(0) == 1 / 20 and rate(19) == 1. and rate(100) == pytest.approx(.01)
    assert sorted(pretrain.eval_steps(400, 0)) == [
        0, 1, 2, 3, 5, 8, 10, 20, 30, 50, 80, 100, 200, 300, 400]
