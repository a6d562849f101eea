"""The files of instruments/, on what is known: their strings, their choices, tiny runs."""
import json
from types import SimpleNamespace

import pytest

import analyze
import data
import finetune
import pretrain
from data import Relation
from instruments import probe_apart, relearn_rates

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
                learned=learned, cross_floor=.5)


def test_the_best_rate_counts_and_its_worst_half_and_only_what_was_learned():
    rows = [row("reft", 1., "even", .9), row("reft", 1., "odd", .8),
            row("reft", 3., "even", 1.), row("reft", 3., "odd", .2),
            row("reft", 9., "even", 1.), row("reft", 9., "odd", 1., learned=False),
            row("teach-c", 1., "even", .7), row("teach-c", 1., "odd", .6)]
    study = SimpleNamespace(relation=Relation("count", "a", "b", 1), never_trained=("ft", None, "c"))
    line = relearn_rates.evidence(study, rows)
    assert (line.measured, line.control_measured, line.holds) == (.8, .6, True)
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


def test_both_run_on_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, prior in (("pre", "low"), ("never", "0,.001,.999")):
        pretrain.main([*SMALL, "--prior", prior, "--out", f"out/{name}.pt"])
    finetune.main([*SMALL, "--ckpt", "out/pre.pt", "--out", "out/ft.pt"])
    analyze.main(["probe_apart", "relearn_rates", *SMALL, "--ckpt", "out/ft.pt", "--rates", "1,9",
                  "--also", "out/never.pt,scratch"])
    probes, lessons = ([json.loads(line) for line in open(f"out/ft.{name}.jsonl")]
                       for name in ("probe_apart", "relearn_rates"))
    assert {r["model"] for r in probes} == {"base", "ckpt", "untrained", "from 0/0.001/0.999",
                                            "scratch"}
    assert {r["target"] for r in probes} == {"a"} and {r["split"] for r in probes} == {"b fixed"}
    assert {(r["arm"], r["answers"], r["half"]) for r in lessons} == {
        (arm, answers, half) for arm in ("reft", "teach-c") for answers in ("even", "odd")
        for half in ("taught", "held-out")}
    assert len({r["lr"] for r in lessons}) == 2
    study = analyze.open_study([*SMALL, "--ckpt", "out/ft.pt"])
    lines = list(analyze.instrument_evidence(study, {}))
    assert [line.instrument for line in lines] == ["probing apart", "relearning, equal lessons"]
    assert all("--rates 1.0,9.0" in line.question for line in lines)
