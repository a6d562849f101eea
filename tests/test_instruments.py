"""The files of instruments/, on what is known: their strings, their choices, tiny runs."""
import json
from types import SimpleNamespace

import pytest

import analyze
import data
import finetune
import pretrain
from data import Relation
from instruments import probe_apart, relearn_rates, revive_rates

SMALL = ["--batch-size", "2", "--eval-size", "8", "--steps", "3", "--threads", "1"]


@pytest.mark.parametrize("task, pair", [("count", "ab"), ("index", "ab"), ("count", "ba")])
def test_strings_where_b_is_always_the_same(task, pair):
    """One answer for b, many for a, and the best guess of c from b tells no more than that."""
    study = SimpleNamespace(setup=data.Grammar("pcfg"), relation=Relation(task, *pair, 1))
    text = probe_apart.strings(study, 500, data.rng(0, "test"))
    answers = study.setup.tasks[task].answers(text, study.setup)
    a, b = (answers[:, "abc".index(letter)] for letter in pair)
    assert len(b.unique()) == 1 and len(a.unique()) >= 5
    assert data.majority_floor(a) < .5
    if task == "count":
        assert (answers.sum(1) == study.setup.window).all()


def row(arm, lr, answers, accuracy, learned=True):
    return dict(arm=arm, lr=lr, answers=answers, half="held-out", accuracy=accuracy,
                learned=learned, cross_floor=.9, floor=.5)


def test_the_best_rate_counts_and_the_mean_of_its_halves_and_only_what_was_learned():
    rows = [row("reft", 1., "even", .9), row("reft", 1., "odd", .8),
            row("reft", 3., "even", 1.), row("reft", 3., "odd", .2),
            row("reft", 9., "even", 1.), row("reft", 9., "odd", 1., learned=False),
            row("teach-c", 1., "even", .7), row("teach-c", 1., "odd", .6)]
    study = SimpleNamespace(relation=Relation("count", "a", "b", 1), never_trained=("ft", None, "c"))
    line = relearn_rates.evidence(study, rows)
    assert (line.measured, line.control_measured, line.holds) == pytest.approx((.85, .65, True))
    # what is held out is at least guessed by its commonest answer
    weak = [{**r, "accuracy": 0.} if r["arm"] == "teach-c" else r for r in rows]
    assert relearn_rates.evidence(study, weak).control_measured == .5
    # no lesson of the control was learned: nothing can be said
    rows = [r if r["arm"] == "reft" else {**r, "learned": False} for r in rows]
    assert relearn_rates.evidence(study, rows).holds is None


def test_a_lesson_goes_on_until_it_is_learned(monkeypatch):
    """The taught half is scored every ten steps; the other one when the lesson is learned."""
    seen = []
    monkeypatch.setattr(relearn_rates, "reteach", lambda *args: ((i, i) for i in range(args[-1] + 1)))
    monkeypatch.setattr(relearn_rates, "evaluate", lambda model, setup, tests: seen.append(model) or [
        {"accuracy": model / 40}])
    study = SimpleNamespace(args=SimpleNamespace(steps=None), setup=None)
    rows, learned = relearn_rates.lesson(study, None, None, {"taught": 0, "held-out": 1}, 1.)
    assert learned and {r["step"] for r in rows} == {40} and seen == [0, 10, 20, 30, 40, 40]
    study.args.steps = 25
    rows, learned = relearn_rates.lesson(study, None, None, {"taught": 0, "held-out": 1}, 1.)
    assert not learned and {r["step"] for r in rows} == {25}


def revived(arm, lr, step, done):
    return dict(arm=arm, lr=lr, step=step, done=done)


@pytest.mark.parametrize("reft, control, says", [
    ([(30, True), (10, True)], [(90, True), (60, True)], (10, 60, True)),
    ([(30, True)], [(89, True)], (30, 89, False)),
    ([(30, True)], [(400, False)], (30, 400, True)),    # three times as long at least
    ([(200, True)], [(400, False)], (200, 400, None)),  # perhaps, had one gone on
    ([(400, False)], [(300, True)], (400, 300, False)),
    ([(400, False)], [(400, False)], (400, 400, None))])
def test_what_was_cut_off_is_at_least_so_slow(reft, control, says):
    rows = [revived(arm, lr, *end) for arm, ends in (("reft", reft), ("teach-c", control))
            for lr, end in enumerate(ends)]
    study = SimpleNamespace(relation=Relation("count", "a", "b", 1))
    line = revive_rates.evidence(study, rows)
    assert (line.measured, line.control_measured, line.holds) == says


def test_a_rate_stops_where_a_better_one_was_done(monkeypatch):
    """The first is done in step 30; the second, slower, is not followed any further."""
    monkeypatch.setattr(revive_rates, "reteach", lambda study, start, draw, lr, steps: (
        (i, (lr, i)) for i in range(steps + 1)))
    monkeypatch.setattr(revive_rates, "evaluate", lambda model, setup, tests: [
        {"accuracy": float(model[1] >= (30 if model[0] > 1 else 50))}])
    monkeypatch.setattr(revive_rates, "relearn_arms", lambda study: (1., [("reft", None, "a")]))
    setup = SimpleNamespace(teaching=lambda relation, operand: None)
    study = SimpleNamespace(args=SimpleNamespace(steps=None, rates=[10., 1.], eval_size=9),
                            setup=setup, test=lambda *args, n: None, relation=None)
    assert [(r["lr"], r["step"], r["done"]) for r in revive_rates.run(study)] == [
        (10., 30, True), (1., 30, False)]


def test_they_run_on_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, prior in (("pre", "low"), ("never", "0,.001,.999")):
        pretrain.main([*SMALL, "--prior", prior, "--out", f"out/{name}.pt"])
    finetune.main([*SMALL, "--ckpt", "out/pre.pt", "--out", "out/ft.pt"])
    analyze.main(["probe_apart", "relearn_rates", "revive_rates", *SMALL, "--ckpt", "out/ft.pt",
                  "--rates", "1,9", "--also", "out/never.pt,scratch"])
    probes, lessons, revived = ([json.loads(line) for line in open(f"out/ft.{name}.jsonl")]
                       for name in ("probe_apart", "relearn_rates", "revive_rates"))
    assert {r["model"] for r in probes} == {"base", "ckpt", "untrained", "from 0/0.001/0.999",
                                            "scratch"}
    assert {r["target"] for r in probes} == {"a"} and {r["split"] for r in probes} == {"b fixed"}
    assert {(r["arm"], r["answers"], r["half"]) for r in lessons} == {
        (arm, "even", half) for arm in ("reft", "teach-c") for half in ("taught", "held-out")}
    assert not any(r["learned"] for r in lessons)  # hence no lesson of odd answers
    assert all(len({r["lr"] for r in rows}) == 2 for rows in (lessons, revived))
    study = analyze.open_study([*SMALL, "--ckpt", "out/ft.pt"])
    lines = list(analyze.instrument_evidence(study, {}))
    assert [line.instrument for line in lines] == ["probing apart", "relearning, equal lessons",
                                                   "reviving, best rate"]
    assert all("--rates 1.0,9.0" in line.question for line in lines)
