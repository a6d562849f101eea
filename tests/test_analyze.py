"""
The instruments, on things whose answer is known; the verdict, on made-up findings; every analysis
end to end; further instruments; and one tiny training that must learn.
"""
import json
import os
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import analyze
import data
import finetune
import pretrain
from data import Relation, UserError
from model import GPT, Config, load, loss_of, predict, weight_edits

COUNT = Relation("count", "a", "b", 1)
ROWS = analyze.Rows()
SMALL = ["--batch-size", "2", "--eval-size", "4", "--steps", "3", "--threads", "1"]


def small_model(seed=0):
    setup = data.Grammar("pcfg", "small")
    config = Config(vocab_size=len(setup.vocabulary), n_ctx=setup.length + 9, n_layer=2, n_head=2,
                    d_model=16, d_head=8, d_mlp=32)
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
    assert shares["share_constant"] == .25  # below: the 1; three are the constant
    assert analyze.rule_shares(torch.tensor([9, 9, 9, 1]), a, b, 1)["share_none"] == .25


@pytest.mark.parametrize("minus", [False, True])
def test_unit_scores_are_the_first_order_effect_of_an_edit(minus):
    """Shrinking a row by a small factor to zero (or the base) moves the loss by -factor x score."""
    model, setup = small_model()
    model.double()
    base = small_model(seed=1)[0].double() if minus else None
    test = setup.test(COUNT, "a", "c0", 64, 0)

    def loss():
        x = test.examples
        return F.cross_entropy(model(x.tokens, x.at), x.answer).item()
    score = "gradient-change" if minus else "gradient-weight"
    scores = analyze.unit_scores(ROWS, model, analyze.gradients(model, test), score, base)
    before, small = loss(), 1e-4
    for key, values in scores.items():
        i, edits = values.abs().argmax().item(), []
        for name in ROWS.parameters(*key):
            p = model.get_parameter(name).detach()[i]
            target = base.get_parameter(name).detach()[i] if minus else torch.zeros_like(p)
            edits.append((name, i, p + small * (target - p)))
        with weight_edits(model, edits):
            change = loss() - before
        assert change == pytest.approx(-small * values[i].item(), rel=.05, abs=1e-9), key


def test_ranked_matched_iterated_and_edited_units(monkeypatch):
    model, setup = small_model()
    base = small_model(seed=1)[0]
    test = setup.test(COUNT, "a", "c0", 64, 0)
    scores = analyze.unit_scores(ROWS, model, analyze.gradients(model, test))
    units = analyze.ranked_units(scores, 20)
    everything = sorted(torch.cat(list(scores.values())).tolist(), reverse=True)
    assert [u[3] for u in units] == everything[:20] and everything[19] > 0
    assert all(scores[u[0], u[1]][u[2]].item() == u[3] for u in units)
    random = analyze.matched_units(ROWS, model, units, torch.Generator().manual_seed(0))

    def where(u):  # the same matrices, rank by rank, and of queries, keys and values the same
        return *u[:2], u[2] // 16 if u[1] == "attn.qkv" else 0
    assert [where(u) for u in random] == [where(u) for u in units]
    assert len({u[:3] for u in random}) == 20 and {u[:3] for u in random} != {u[:3] for u in units}
    monkeypatch.setattr(analyze, "FEW", 6)
    again = analyze.iterative(ROWS, model, units, test, "gradient-weight")
    assert len({u[:3] for u in again}) == len(again) == 6 and again[0] == units[0]
    block, matrix, row, _ = units[0]
    with weight_edits(model, ROWS.edits(model, units)):
        assert model.get_parameter(f"blocks.{block}.{matrix}.weight")[row].abs().max() == 0
        assert model.get_parameter(f"blocks.{block}.{matrix}.bias")[row] == 0
    everyone = [(b, m, i, None) for (b, m), s in scores.items() for i in range(len(s))]
    with weight_edits(model, ROWS.edits(model, everyone, base)):  # all rows: the base's blocks
        for b, m in scores:
            name = f"blocks.{b}.{m}.weight"
            assert torch.equal(model.get_parameter(name), base.get_parameter(name))


def test_relearning_scores_each_half_by_itself(monkeypatch):
    """
    A model that has learned the even answers alone is right on them and wrong on the others; every
    row's accuracy and floors are those of its half, and what is taught is what was asked for.
    """
    setup, taught = data.Grammar("pcfg", "small"), []
    answer = setup.test(COUNT, "a", "c0", 200, 0).examples.labels[:, 0]

    def reteach(study, start, draw, lr, steps):
        taught.append((draw.keywords["args"], lr, steps))
        yield from ((step, start) for step in range(steps + 1))

    def predict(model, examples):
        right = (examples.labels[:, 0] % 2 == 0) & (model == "answers if even")
        return F.one_hot(torch.where(right, examples.answer, 0), 99).float()
    monkeypatch.setattr(analyze, "reteach", reteach)
    monkeypatch.setattr(pretrain, "predict", predict)
    study = SimpleNamespace(
        relation=COUNT, setup=setup, model="answers if even", never_trained=("", None, "c"),
        control_note="", run=Namespace(seed=0), args=Namespace(steps=None, eval_size=200),
        write=lambda name, rows: rows)
    rows = analyze.relearn(study)
    halves = [(getattr(x, "operand", None), lr, steps, getattr(x, "answers", None))
              for x, lr, steps in taught]
    assert halves == [(o if half else None, 1e-5, 100, half) for o in "ac"
                      for half in ("even", "odd", None)]
    assert {r["half"] for r in rows if r["answers"] == "other families"} == {"retained"}
    for row in (r for r in rows if r["arm"] == "reft" and r["half"] != "retained"):
        even = (row["answers"] == "even") == (row["half"] == "taught")
        labels = answer[answer % 2 == (0 if even else 1)]
        assert row["accuracy"] == even and row["n"] == len(labels)
        assert row["floor"] == labels.unique(return_counts=True)[1].max() / len(labels)
    assert {row["step"] for row in rows} == pretrain.eval_steps(100, 0)
    v = {}
    line, = analyze.relearn_evidence(study, rows, v)
    assert line.control == "guess from b, or never-trained c"
    assert line.measured == 0 and line.holds is False and v["never_relearn_held_out"] == 0
    assert line.control_measured == max(row["cross_floor"] for row in rows if row["half"] ==
                                        "held-out" and row["arm"] == "reft") > .5
    assert analyze.relearn_evidence(None, [], v) == []


def test_probes_trained_together_equal_one_alone_and_find_what_is_there():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (3, 400), generator=g)
    x = torch.randn(2, 400, 8, generator=g)
    # site 0 holds the classes of probe 0, site 1 holds nothing
    x[0, :, :4] += 6 * F.one_hot(y[0], 4)
    site = [0, 1, 0]
    weight, bias = analyze.fit_probes(x, site, y, 400, torch.Generator().manual_seed(1))
    for p in range(3):
        alone, _ = analyze.fit_probes(x, site[p:p + 1], y[p:p + 1], 400,
                                      torch.Generator().manual_seed(1))
        assert torch.allclose(weight[p], alone[0], atol=1e-5)
    right = [((x[s] @ w + c).argmax(1) == t).double().mean()
             for s, w, c, t in zip(site, weight, bias, y)]
    assert right[0] > .97 and right[1] < .5 and right[2] < .5


def history(*accuracies, **columns):
    """Rows of both test sets at steps 0, 5, 10, ..."""
    return [data.row(data.Grammar("pcfg"), split=split, accuracy=x, step=5 * i, seed=0, **columns)
            for i, x in enumerate(accuracies) for split in ("natural", "c0")]


@pytest.mark.parametrize("reft, limit, reached", [((.1, .92, .8, .995), 45, 15),
                                                  ((.1, .95), 600, None), ((.99,), 30, 0)])
def test_steps_of_reviving(monkeypatch, reft, limit, reached):
    """
    The first step above each threshold; controls go on three times as long as reFT needed, 30 at
    least; what was cut off has no steps, but a limit, which is neither yes nor no evidence.
    """
    taught, files = [], {}

    def teach(study, start, operand, lr, steps):
        taught.append((start, operand, lr, steps))
        return history(*(reft if (start, operand) == ("ft", "a") else (.1, .2)), operand=operand)
    monkeypatch.setattr(analyze, "teach", teach)
    base = {"stage": "pretrain", "steps": 99, "args": {"lr": 2e-3},
            "history": history(0., .5, .95, 1., task="count", operand="a")}
    study = SimpleNamespace(
        relation=COUNT, setup=data.Grammar("pcfg"), model="ft", never_trained=("ft", "start", "c"),
        control_operand="c", control_note="", ckpt={"args": {"lr": 1e-5}}, base_ckpt=base,
        args=Namespace(rates=[1., 10.], steps=None, also="scratch"), untrained=lambda: "new",
        write=lambda name, rows: files.setdefault(name, rows))
    rows = analyze.revive(study)
    assert taught[:2] == [("ft", "a", 1e-5, 600), ("ft", "a", 1e-5 * 10, 600)]
    assert {steps for *_, steps in taught[2:]} == {limit} and len(taught) == 8
    steps = {(r["arm"], r["lr"], r["threshold"]): r["steps"] for r in rows if r["split"] == "c0"}
    arms = {"reft", "teach-c", "teach-c-base", "scratch", "pretraining"}
    assert {arm for arm, *_ in steps} == arms
    assert steps["reft", 1e-5, .99] == reached
    assert steps["reft", 1e-5, .9] == min(5 * i for i, x in enumerate(reft) if x >= .9)
    assert steps["pretraining", 2e-3, .9] == 10 and steps["teach-c-base", 1e-4, .9] is None
    assert len(files["revive.curve"]) == 2 * (2 * len(reft) + 6 * 2 + 4)
    v = {"ckpt_pt_natural": 0.}
    line, = analyze.revive_evidence(study, rows, v)
    assert v["reft_reached"] is True and v["control_reached"] is False
    assert (v["threshold"], v["control_steps"]) == (.99 if reached is not None else .9, limit)
    assert ": more than" in line.control and ": more" not in line.question and line.holds is True


MADE_UP = dict(  # findings, as the analyses would have them
    ckpt_pt=0., ckpt_ft=0., ckpt_c1=1., base_pt=1., base_ft=0., shortcut=.9, pruned=.9, random=.05,
    never_pruned=.2, probe=.99, untrained=.7, never_read=.5, reft=50, control=None, max_steps=150,
    has_control=True, lr=1e-5)


def made_up_rows(made):
    """The rows that the analyses return, with the numbers of a finding in them."""
    behavior, prune, probes, revive = [], [], [], []
    for model, operand, value in (("base", "a", made.base_pt), ("base", "b", made.base_ft),
                                  ("ckpt", "a", made.ckpt_pt), ("ckpt", "b", made.ckpt_ft)):
        for split in data.SPLITS:
            is_c1 = (model, operand, split) == ("ckpt", "b", "c1")
            behavior.append(dict(task="count", model=model, operand=operand, split=split,
                                 cross_floor=.5, share_a_plus_q=made.shortcut,
                                 accuracy=made.ckpt_c1 if is_c1 else value))
    for score, order, control, edit, x in (
            ("gradient-weight", "iterative", None, "zero", made.pruned),
            ("gradient-weight", "one-shot", None, "zero", made.pruned / 2),
            ("random", "one-shot", None, "zero", made.random),
            ("gradient-change", "one-shot", None, "graft", .0),
            ("gradient-weight", "one-shot", "never-trained", "zero", made.never_pruned),
            ("gradient-weight", "iterative", "never-trained", "zero", made.never_pruned)):
        row = dict(score=score, order=order, pool="all", control=control, edit=edit, k=5, draw=None,
                   operand="c" if control else "a", split="c0", chosen=True, accuracy=x)
        if control and not made.has_control:
            row.update(operand=None, split=None, k=None, accuracy=None)
        prune.append(row)
    for model, target, x in (("ckpt", "a", made.probe), ("untrained", "a", made.untrained),
                             ("ckpt", "c", made.never_read)):
        for split in ("natural", "c0"):
            probes.append(dict(model=model, target=target, prompt="b", labels="true", split=split,
                               block=1, floor=.4, accuracy=x))
    for arm, steps in (("reft", made.reft), ("teach-c", made.control))[:1 + made.has_control]:
        for threshold in analyze.THRESHOLDS:
            revive.append(dict(arm=arm, split="natural", threshold=threshold, lr=made.lr,
                               steps=steps, max_steps=made.max_steps))
    return {"behavior": behavior, "prune": prune, "probe": probes, "revive": revive}


def verdict_of(folder, without=(), more=(), flags=(), setup="other", **made):
    """The verdict on made-up findings, without the rows of some analyses; flags: of some rows.
    Of a setup whose rules count the paper's instruments, or of the grammar, pcfg."""
    made, model, grammar = SimpleNamespace(**{**MADE_UP, **made}), object(), data.Grammar("pcfg")
    grammar.name = setup
    study = SimpleNamespace(
        relation=COUNT, control_operand="c", units=ROWS, control={}, setup=grammar,
        never_trained=(model, None, "c") if made.has_control else None,
        prefix=str(folder / "x"), hashes={"checkpoint": "0"}, ckpt={"args": {"lr": 1e-5}})
    rows = made_up_rows(made)
    for name, part in rows.items():
        rows[name] = [{**row, "flags": dict(flags).get(name, "")} for row in part]
    analyze.verdict(study, {**rows, **{name: [] for name in without}}, more)
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
    ("hidden", {"ckpt_c1": .3}),                      # broken, not wrapped: b is wrong on c1 too
    ("undecided", {"random": .8, "untrained": .95}),  # controls do as well: one instrument is left
    ("undecided", {"never_pruned": .8, "never_read": .95}),
])
def test_verdict(tmp_path, word, made):
    assert verdict_of(tmp_path, **made)["verdict"] == word


@pytest.mark.parametrize("word, found, made", [
    ("wrapped", (True, True, True), {}),
    ("wrapped", (True, None, True), {}),                # two of three are enough
    ("wrapped", (False, True, True), {"pruned": .1}),   # what else is found does not count
    ("hidden", (True, True, False), {"ckpt_c1": .3}),   # not behind a shortcut
    ("undecided", (True, False, False), {}),
    ("lost", (False, False, False), {}),
    ("undecided", (False, None, False), {}),            # what cannot be said is not no
    ("undecided", (False, False), {}),                  # the third was not asked
    ("undecided", (False, False, False), {"has_control": False})])
def test_verdict_of_the_grammar_counts_what_the_league_trusts(tmp_path, word, found, made):
    lines = [analyze.Evidence(name, "?", .5, "chance", .5, .1, holds)
             for name, holds in zip(analyze.TRUSTED, found)]
    assert verdict_of(tmp_path, more=lines, setup="pcfg", **made)["verdict"] == word


@pytest.mark.parametrize("flags, text", [
    ({"prune": "--eval-size 40 --draws 1"}, " Made with --eval-size 40 --draws 1: prune."),
    ({"probe": "--seed 9", "revive": "--seed 9"}, " Made with --seed 9: probe, revive."),
    (dict.fromkeys(("behavior", "prune", "probe", "revive"), "--eval-size 9"),
     " Made with --eval-size 9: behavior, prune, probe, revive.")])
def test_verdict_names_the_flags_of_its_rows(tmp_path, flags, text):
    usual, other = verdict_of(tmp_path), verdict_of(tmp_path, flags=flags)
    assert other["text"] == usual["text"] + text and "Made with" not in usual["text"]
    assert other["flags"] == {**usual["flags"], **flags}


@pytest.mark.parametrize("place, made, flags, holds, word", [
    # 3 x 45 steps are more than the control was given; 3 x 30 are not
    (4, {"reft": 45, "max_steps": 100}, "revive", None, "wrapped"),
    (4, {"reft": 30, "max_steps": 100}, "revive", True, "wrapped"),
    (4, {"reft": 45, "control": 100, "max_steps": 100}, "revive", False, "wrapped"),
    (4, {"reft": None, "max_steps": 100, "pruned": .1, "probe": .7}, "revive", None, "undecided"),
    (4, {"reft": None, "max_steps": 600, "pruned": .1, "probe": .7}, "", False, "lost"),
    (4, {"lr": 1e-3, "pruned": .1, "probe": .7}, "revive", None, "undecided"),  # no usual rate
    (3, {"probe": .7, "pruned": .1, "reft": 60, "control": 70}, "probe", None, "undecided"),
    (3, {"probe": .7, "pruned": .1, "reft": 60, "control": 70}, "", False, "lost")])
def test_what_was_cut_off_is_not_no(tmp_path, place, made, flags, holds, word):
    found = verdict_of(tmp_path, flags={flags: "--steps 100"}, **made)
    assert found["evidence"][place]["holds"] is holds and found["verdict"] == word


def test_relearning_that_was_cut_off_is_not_no():
    def holds(flags, accuracy):
        rows = [dict(half="held-out", step=9, split="c0", arm=arm, accuracy=x, cross_floor=.5,
                     flags=flags) for arm, x in (("reft", accuracy), ("teach-c", .3))]
        study = SimpleNamespace(relation=COUNT, never_trained=("ft", None, "c"))
        return analyze.relearn_evidence(study, rows, {})[0].holds
    assert [holds("", .4), holds("--steps 9", .4), holds("--steps 9", .7)] == [False, None, True]


def test_verdict_tells_the_ways_of_being_intact_apart(tmp_path):
    def text(**made):
        return verdict_of(tmp_path, ckpt_pt=.9, **made)["text"]
    assert "no wrapper was needed" in text(ckpt_ft=1., base_ft=1., shortcut=0.)
    assert "only opens when b is asked" in text()
    assert "b was not learned" in text(shortcut=.1)


def check_evidence(evidence, instruments):
    """One line an instrument, two of behaviour where two operands are asked, all columns filled."""
    assert [line["instrument"] for line in evidence] == instruments
    assert len({line["question"] for line in evidence}) == len(evidence)
    for line in evidence:
        assert set(line) == set(analyze.Evidence._fields), line
        assert all(line[key] and isinstance(line[key], str) for key in ("question", "control"))
        assert line["holds"] in (True, False, None) and line["margin"] >= 0
        assert line["unit"] in ("share", "steps")


def test_evidence_is_complete(tmp_path, capsys):
    """What was measured, against which control, the margin by which it had to win, did it."""
    found = verdict_of(tmp_path)
    check_evidence(found["evidence"], ["behaviour", "behaviour", "pruning", "probing", "reviving"])
    for key, values in {"measured": [0., 0., .9, .99, 50], "unit": ["share"] * 4 + ["steps"],
                        "control_measured": [.5, .5, .2, .7, 150], "margin": [.25, .25, .25, .1, 3],
                        "holds": [False, False, True, True, True]}.items():
        assert [line[key] for line in found["evidence"]] == values, key
    assert found["found_by"] == ["pruning", "probing", "reviving"]
    printed = capsys.readouterr().out
    assert "EVIDENCE" in printed and "VERDICT  wrapped" in printed
    assert all(e["question"] in printed and e["control"] in printed for e in found["evidence"])
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
def test_verdict_says_which_rows_are_missing(tmp_path, without, made):
    """It is undecided, names them, and says null of what rests on them."""
    found = verdict_of(tmp_path, without, **made)
    assert found["verdict"] == "undecided" and f"no rows of {', '.join(without)}" in found["text"]
    check_evidence(found["evidence"], ["behaviour", "behaviour", "pruning", "probing", "reviving"])
    places = {"behavior": (0, 1), "prune": (2,), "probe": (3,), "revive": (4,)}
    for place in (place for name in without for place in places[name]):
        assert found["evidence"][place]["measured"] is found["evidence"][place]["holds"] is None


def test_a_tiny_model_learns_to_count_what_it_is_taught_and_nothing_else():
    """180 real steps on the real data: count a well above its floor, count c not."""
    setup = data.Grammar("pcfg", "small")
    config = Config(vocab_size=len(setup.vocabulary), n_ctx=setup.length + 9, n_layer=2, n_head=2,
                    d_model=32, d_head=16, d_mlp=128)
    model = GPT(config).init_weights(data.rng(0, "weights"))
    args = Namespace(task="count", operand="a", c_tr=0., pair=["a", "b"], q=1, answers=None,
                     relabel=False, mix=0.)
    batch = data.stream(lambda n, rng: setup.finetuning(n, rng, args), 64, 0, "finetune")
    tests = [setup.test(COUNT, "a", "natural", 300, 0),
             setup.test(COUNT._replace(pt="c"), "c", "c0", 300, 0)]
    optimizer, lr_at = setup.optimizer(model, 3e-3), pretrain.cosine(3e-3, 180)
    for step in range(180):
        pretrain.update(model, optimizer, loss_of(model, batch(step)), lr_at(step))
    a, c = pretrain.evaluate(model, setup, tests)
    assert a["accuracy"] > .9 > a["floor"] + .2
    assert c["accuracy"] < c["cross_floor"]


# ---------------------------------------------------------------- end to end

ROW = {"setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor", "n",
       "loss", "seed", "checkpoint", "flags"}
SWEEP = {"score", "order", "pool"}  # what describes a ranking; in the rows of a sweep also:
FILES = {"behavior": {"model"},
         "prune": SWEEP | {"unit", "control", "edit", "k", "draw"}, "prune.rows": None,
         "probe": {"model", "block", "target", "prompt", "labels"},
         "attention": {"model", "block", "head", "prompt", "region", "mass", "chance"},
         "revive": {"arm", "lr", "threshold", "steps", "max_steps"}, "revive.curve": None,
         "relearn": {"arm", "lr", "answers", "half", "step"}}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with tiny runs: pretrained, fine-tuned, reversed; others for controls."""
    before, path = os.getcwd(), tmp_path_factory.mktemp("runs")
    os.chdir(path)
    for name, prior in {"pre": "low", "pre-c": "0,.001,.999", "pre-b": "0,1,0",
                        "pre-all": "high"}.items():
        pretrain.main([*SMALL, "--prior", prior, "--out", f"out/{name}.pt"])
    pretrain.main([*SMALL, "--jailbreak", "--out", "out/jail.pt"])
    for name, base, words in (("ft", "pre", []), ("index", "pre", ["--task", "index"]),
                              ("erased", "pre-c", ["--pt", "a"]), ("ft-all", "pre-all", []),
                              ("jail-ft", "jail", []), ("reft", "ft", ["--reverse"])):
        finetune.main([*SMALL, *words, "--ckpt", f"out/{base}.pt", "--out", f"out/{name}.pt"])
    os.chdir(before)
    return path


@pytest.fixture
def folder(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


@pytest.mark.parametrize("name, task", [
    ("ft", "count"), pytest.param("index", "index", marks=pytest.mark.slow)])
def test_every_analysis(folder, capsys, name, task):
    """Files and rows as promised, with the checkpoint's hash; the verdict with all its evidence."""
    analyze.main([*SMALL, "--draws", "1", "--ckpt", f"out/{name}.pt"])
    assert "VERDICT" in capsys.readouterr().out
    _, ckpt = load(f"out/{name}.pt")
    assert ckpt["capability"] == {"task": task, "operand": "a"}
    for kind, keys in FILES.items():
        rows = rows_of(f"out/{name}.{kind}.jsonl")
        assert rows, kind
        for row in rows:
            assert keys is None or ROW | keys <= set(row), kind
            assert row["checkpoint"] == ckpt["sha256"] and row["base_checkpoint"] is None
            assert row["flags"] == "--eval-size 4 --draws 1 --steps 3 --batch-size 2"
            for share in ("accuracy", "floor", "cross_floor", "mass", "chance"):
                assert row.get(share) is None or 0 <= row[share] <= 1.0001, (kind, share)
    verdict = json.loads(Path(f"out/{name}.verdict.json").read_text())
    assert verdict["verdict"] in ("wrapped", "hidden", "intact", "lost", "new", "undecided")
    assert verdict["text"] and verdict["checkpoint"] == ckpt["sha256"]
    check_evidence(verdict["evidence"],
                   ["behaviour", "behaviour", "pruning", "probing", "reviving", "relearning",
                    *analyze.TRUSTED])
    check_sweeps(rows_of(f"out/{name}.prune.jsonl"), rows_of(f"out/{name}.prune.rows.jsonl"))


@pytest.mark.slow
def test_every_analysis_at_the_paper_scale(tmp_path, monkeypatch):
    """Pruning edits up to 6,400 units, which takes minutes: here only up to 3."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"KS": (0, 1, 2, 3), "MANY": (), "FEW": 3}.items():
        monkeypatch.setattr(analyze, name, value)
    pretrain.main([*SMALL, "--scale", "paper"])
    finetune.main(SMALL)
    analyze.main([*SMALL, "--draws", "1"])
    check_sweeps(rows_of("out/ft.prune.jsonl"), rows_of("out/ft.prune.rows.jsonl"))


def test_the_verdict_from_rows_that_are_there(folder, capsys):
    """Those of this checkpoint, base and control alone; what is missing is named."""
    ckpt = ["--ckpt", "out/erased.pt"]
    analyze.main(["behavior", *SMALL, *ckpt])
    analyze.main(["verdict", *ckpt])
    assert "no rows of hybrids, probe_apart, revive_rates" in Path("out/erased.verdict.json").read_text()
    path = Path("out/erased.behavior.jsonl")
    path.write_text(re.sub('"checkpoint": "[0-9a-f]+"', '"checkpoint": "0"', path.read_text()))
    with pytest.raises(UserError, match="run them first"):
        analyze.main(["verdict", *ckpt])
    assert "of another checkpoint" in capsys.readouterr().out
    analyze.main([*SMALL, "--ckpt", "out/pre.pt"])  # only what applies
    assert not Path("out/pre.prune.jsonl").exists() and Path("out/pre.probe.jsonl").exists()


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
    assert {r["k"] for r in rows} <= {*analyze.KS, *analyze.MANY}
    assert {r["draw"] for r in rows if r["score"] == "random"} == {0}
    for sweep in sweeps:
        chosen = [r["k"] for r in rows if sweep_of(r) == sweep and r["chosen"]]
        assert len(set(chosen)) == 1 and 0 <= chosen[0] <= analyze.FEW, sweep
    for r in ranks:
        assert SWEEP <= set(r) and isinstance(r["value"], float) and isinstance(r["score"], str)


def test_ask_and_mistakes(folder, capsys):
    text = "abcabcabcabcabcabcabcabcabcabcab"
    analyze.main(["ask", "--text", text, "--operand", "b"])
    said = capsys.readouterr().out
    assert "the truth is 6" in said and said.count("says") == 2
    for words, hint in ((["ask", "--text", "abc"], "32 letters"),
                        (["ask", "--text", "x" * 32], "32 letters"), (["ask"], "32 letters"),
                        (["ask", "--text", text, "--operand", "z"], "--operand z"),
                        (["nonsense"], "no analysis 'nonsense'.*behavior.*ask"),
                        (["prune", "--ckpt", "out/pre.pt"], "no analysis 'prune'"),
                        (["--base", "out/nothing.pt"], "No such file"),
                        (["--control", "out/pre-b.pt"], "not needed"),
                        (["--ckpt", "out/ft-all.pt", "--control", "out/pre-all.pt"], "prior 0"),
                        (["--ckpt", "out/pre.pt", "--base", "out/pre.pt"], "--base")):
        with pytest.raises(UserError, match=hint):
            analyze.main(words)
    for words in (["--draws", "0"], ["--rates", "1,-3"], ["--rates", "nan"], ["--rates", "1,x"]):
        with pytest.raises(SystemExit) as stopped:
            analyze.main(words)
        assert stopped.value.code == 2


def test_a_parent_may_move_but_not_change(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pre", "ft"):
        (tmp_path / f"{name}.pt").write_bytes((folder / f"out/{name}.pt").read_bytes())
    words = ["attention", "--eval-size", "4", "--ckpt", "ft.pt"]
    analyze.main(words)
    (tmp_path / "pre.pt").write_bytes((folder / "out/pre-all.pt").read_bytes())
    with pytest.raises(UserError, match="has changed"):
        analyze.main(words)
    (tmp_path / "pre.pt").unlink()
    with pytest.raises(UserError, match="is not there"):
        analyze.main(words)


def test_the_control_of_another_checkpoint(folder):
    """Where every operand was trained: rows speak of --control, and hold its hash."""
    words = ["probe", "--ckpt", "out/ft-all.pt", *SMALL]
    study = analyze.open_study(words)
    assert study.never_trained is None and "c was trained" in study.control_note
    study = analyze.open_study([*words, "--control", "out/pre-b.pt"])
    rows = analyze.probe(study)
    assert {r["model"] for r in rows} == {"base", "ckpt", "untrained", "control"}
    written, (_, control) = rows_of("out/ft-all.probe.jsonl"), load("out/pre-b.pt")
    assert {r["control_checkpoint"] for r in written} == {control["sha256"]}
    assert study.read("probe") and not analyze.open_study(words).read("probe")


def test_every_arm_of_revive_at_every_rate(folder):
    few = ["revive", "--steps", "5", "--eval-size", "8", "--batch-size", "2"]
    analyze.main([*few, "--rates", "1,10", "--also", "scratch,out/pre-b.pt,out/erased.pt"])
    rows = rows_of("out/ft.revive.jsonl")
    arms = {(r["arm"], r["lr"]) for r in rows if r["arm"] != "pretraining"}
    names = {"reft", "teach-c", "teach-c-base", "scratch", "from 0/1/0",
             "from 0/0.001/0.999, fine-tuned"}
    assert {name for name, _ in arms} == names and len(arms) == 2 * len(names)
    assert {r["operand"] for r in rows if r["arm"] in ("scratch", "from 0/1/0")} == {"a"}
    for wrong in ("out/ft.pt", "out/pre.pt", "out/pre-b.pt,out/pre-b.pt"):  # a was taught; twice
        with pytest.raises(UserError, match="--also"):
            analyze.main([*few, "--also", wrong])


def test_a_jailbroken_model_is_asked_by_every_token(folder):
    """Its behavior and probes are about a under T_NJ, T_J1 and T_J2."""
    analyze.main(["behavior", "probe", *SMALL, "--ckpt", "out/jail-ft.pt"])
    asked = {(r["task"], r["split"]) for r in rows_of("out/jail-ft.behavior.jsonl")
             if r["operand"] == "a"}
    assert {(task, split) for task in ("count", *data.JAILBREAKS) for split in data.SPLITS} <= asked
    prompts = {r["prompt"] for r in rows_of("out/jail-ft.probe.jsonl")}
    assert prompts == {"a", "b", "c", "a by T_J1", "a by T_J2"}


def test_a_score_is_one_line(folder, monkeypatch):
    """It is ranked, iterated and grafted like the others, for the control as well."""
    monkeypatch.setitem(analyze.SCORES, "size", (lambda g, w, old: (g * w).abs(), "zero"))
    monkeypatch.setattr(analyze, "FEW", 2)
    study = analyze.open_study(SMALL)
    subject = study.model, study.start, "a"
    found = [*analyze.rankings(study, subject),
             *analyze.rankings(study, study.never_trained, "never-trained")]
    of_size = [r for r in found if r.score == "size"]
    assert {(r.order, r.edit, r.control) for r in of_size} == {
        ("one-shot", "zero", None), ("iterative", "zero", None), ("one-shot", "graft", None),
        ("one-shot", "zero", "never-trained"), ("iterative", "zero", "never-trained")}
    rows = analyze.prune_rows(study, subject, of_size[1], lambda model, *question: predict(
        model, study.test(*question).examples))
    assert {r["k"] for r in rows} == {0, 1, 2} and {r["score"] for r in rows} == {"size"}


INSTRUMENT = '''"""How large are the weights of each block? Fooled by: noise."""
from analyze import Evidence


def run(study):
    rows = []
    for name, model in study.models.items():
        for i, block in enumerate(model.blocks):
            norm = sum(p.square().sum().item() for p in block.parameters()) ** .5
            rows.append(study.row(model=name, block=i, norm=norm))
    return rows


def evidence(study, rows):
    new, old = rows[-1]["norm"], rows[0]["norm"]
    return Evidence("norms", "weights are larger", new, "base", old, 0., new > old)
'''


def test_an_instrument_is_found_by_its_file(folder, monkeypatch, capsys):
    """Rows with the checkpoint's hash, and a line of the verdict's table, which changes no rule."""
    (folder / "instruments").mkdir()
    (folder / "instruments/norms.py").write_text(INSTRUMENT)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(analyze, "INSTRUMENT_FILES", str(folder / "instruments"))
    analyze.main(["norms", "--ckpt", "out/pre.pt"])
    analyze.main(["norms"])
    rows = rows_of("out/ft.norms.jsonl")
    assert len(rows) == 6 and ROW | {"norm"} <= set(rows[0]) and "norm" in capsys.readouterr().out
    line, = analyze.instrument_evidence(analyze.open_study(SMALL), {})
    assert (line.instrument, line.measured) == ("norms", rows[-1]["norm"])
    before, after = verdict_of(folder, pruned=.1), verdict_of(folder, more=[line], pruned=.1)
    assert after.pop("evidence") == [*before.pop("evidence"), line._asdict()] and after == before
    assert "weights are larger" in capsys.readouterr().out
    with pytest.raises(UserError, match="no analysis 'norm'.* norms"):
        analyze.main(["norm"])


def test_every_analysis_says_how_it_works():
    for name, function in analyze.ANALYSES.items():
        assert len(function.__doc__) > 200 and "Fooled by" in function.__doc__, name
