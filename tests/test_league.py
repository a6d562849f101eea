"""
The league: its jobs, certificates that can fail, tables; a truth is one entry, an instrument a file.
"""
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import analyze
import finetune
import pretrain

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(HERE, "results"))
import league  # noqa: E402
from league import Score, Truth  # noqa: E402

LEAST = ["--steps", "4", "--dtype", "float32"]
FEW = "--eval-size 16 --batch-size 8 --threads 1".split()


def made_in(lines):
    """The runs that lines of shell train."""
    return [line.split()[1] for line in lines if line.startswith("train")]


def test_every_truth_is_made_behind_what_it_needs():
    made = set()
    for stage in range(4):
        lines = list(league.jobs(stage, ["7"], ["7"]))
        needed = {word for line in lines for word in line.split() if word.startswith("$OUT")}
        kept = {x.replace(".step200", "") for x in needed}
        assert kept <= {f"$OUT/{x}.pt" for x in made}
        made |= set(made_in(lines))
    assert made == {f"league/{name}-7" for name in league.TRUTHS}
    audited = {line.split()[1] for line in league.jobs("audit", ["7"], ["7"])}
    assert made - audited == {f"league/{x}-7" for x in ("base", "never", "b-only",
                                                             "taught")}


def test_every_method_is_in_the_league():
    methods = {truth.words.split()[1] for truth in league.TRUTHS.values()
               if truth.words.startswith("--method")}
    assert methods == set(finetune.METHODS) - {"distill"}


def test_a_further_truth_is_one_entry(monkeypatch):
    monkeypatch.setitem(league.TRUTHS, "rank-1", Truth("hidden", "--rank 1", league.at_most_rank))
    assert "league/rank-1-0" in made_in(league.jobs(1, ["0"], []))
    assert "audit league/rank-1-0" in league.jobs("audit", ["0"], [])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a base, a wrapper in block 0, and a model without a and its fine-tuned one."""
    folder = str(tmp_path_factory.mktemp("league"))
    priors = {"base": "low", "never": "0,.001,.999", "b-only": "0,1,0"}
    for name, prior in priors.items():
        pretrain.main([*FEW, *LEAST, "--prior", prior, "--out", f"{folder}/{name}-5.pt"])
    for name, parent, words in (("planted-blocks.0", "base", "--only blocks.0 --lr 1e-2"),
                                ("rank-2", "base", "--rank 2 --lr 1e-1"),
                                ("erased", "never", "--pt a")):
        finetune.main([*FEW, *LEAST, *words.split(), "--ckpt", f"{folder}/{parent}-5.pt",
                       "--out", f"{folder}/{name}-5.pt"])
    return folder


def study_of(path, *words):
    return analyze.open_study([*FEW, "--ckpt", path, *words])


@pytest.mark.parametrize("name, certify, spoil", [
    ("planted-blocks.0", league.one_part, "blocks.1.up.weight"),
    ("rank-2", league.at_most_rank, "blocks.2.attn.out.weight"),
    ("erased", league.never_met, None)])
def test_a_certificate_can_fail(runs, name, certify, spoil):
    study = study_of(f"{runs}/{name}-5.pt")
    assert certify(study)[1]
    if spoil:
        p = study.model.get_parameter(spoil)
        p.data += .1 * torch.randn_like(p)
    else:
        study.ckpt["args"]["prior"] = [.5, .3, .2]
    assert not certify(study)[1]


@pytest.mark.parametrize("right, without, holds", [(1., .1, True), (.98, .1, False),
                                                   (1., .2, False)])
def test_a_lock_needs_both_answers(right, without, holds):
    """A planted wrapper needs the second: who still answers hides nothing."""
    row = dict(operand="a", step=3, floor=.1)
    rows = [{**row, "task": task, "split": split, "accuracy": x} for split in ("natural", "c0")
            for task, x in (("count-j1", right), ("count", without))]
    study = SimpleNamespace(relation=SimpleNamespace(pt="a"), ckpt={"step": 3, "history": rows})
    assert league.both(league.opens, league.closed)(study)[1] == holds
    assert league.closed(study)[1] == (without == .1)


def test_an_audit_runs_a_further_instrument(runs, tmp_path, monkeypatch):
    """A file with evidence() is one more line of every audit; what is there is not run again."""
    shutil.copytree(runs, tmp_path / "x")
    line = analyze.Evidence("mine", "?", .7, "chance", .5, .1, True)
    calls, mine = [], SimpleNamespace(NEEDS="base", evidence=lambda study, rows: line)
    mine.run = lambda study: calls.append(1) or [study.row(x=1)]
    mine.place = lambda study, rows: "blocks.0"
    monkeypatch.setattr(league, "modules", lambda: {"mine": mine})
    path = str(tmp_path / "x/planted-blocks.0-5.pt")
    for _ in range(2):
        league.audit(path, [*FEW, "--steps", "2", "--draws", "1"])
    models, rows = league.collect(str(tmp_path))
    table = [dict(zip(league.SCORES, row, strict=True)) for row in rows]
    assert len(calls) == 1
    assert [r["instrument"] for r in table] == [*league.BUILT_IN, "mine"]
    assert models[0][:4] == ["planted-blocks.0", "hidden", 5, True]
    assert {r["seed"] for r in table} == {5}
    assert table[-1]["needs"] == "base" and table[-1]["place"] == "blocks.0"
    assert table[-1]["seconds"] is not None
    league.write_table(str(tmp_path / "scores.csv"), (league.SCORES, rows))
    scores = league.read_scores(tmp_path / "scores.csv")
    assert scores[-1].value == pytest.approx(.2) and scores[-1].found is True
    assert league.places(scores)[1][0][:2] == ["mine", 1.]


def test_no_instrument_is_asked_where_a_certificate_fails(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / "x")
    fails = Truth("hidden", "", lambda study: ("no", False))
    monkeypatch.setitem(league.TRUTHS, "rank-2", fails)
    monkeypatch.setattr(league, "examine", None)
    league.audit(str(tmp_path / "x/rank-2-5.pt"), FEW)
    models, scores = league.collect(str(tmp_path))
    assert models[0][:5] == ["rank-2", "hidden", 5, False, "no"] and not scores


def test_seeds_are_collected_one_by_one(tmp_path):
    """A model that was audited again takes the place of its rows; others stay as they were."""
    path, head = str(tmp_path / "models.csv"), ("truth", "kind", "seed", "x")
    league.add_rows(path, head, [["erased", "absent", 10, .5], ["wrapped", "hidden", 10, None]])
    league.add_rows(path, head, [["wrapped", "hidden", 9, 1 / 3], ["erased", "absent", 10, .25]])
    with open(path) as file:
        assert file.read().split() == ["truth,kind,seed,x", "wrapped,hidden,9,0.333333",
                                       "wrapped,hidden,10,", "erased,absent,10,0.25"]


def made_up(truth, kind, values, controls, found):
    return [Score(truth, kind, seed, "x", "base", value, control, say, "", 1.)
            for seed, (value, control, say) in enumerate(zip(values, controls, found))]


def test_the_league_counts_pairs_alarms_and_silence():
    scores = [*made_up("wrapped", "hidden", [.5, .2, None], [-.1, -.1, -.1], [True, True, None]),
              *made_up("erased", "absent", [.1, .3, .1], [-.2, -.2, -.2], [False, True, False])]
    head, rows = league.league(scores)
    row, = [dict(zip(head, r, strict=True)) for r in rows
            if (r[1], r[2]) == ("wrapped", "all")]
    assert row["auroc"] == pytest.approx(5 / 6) and row["control_alone"] == 1.
    assert row["seeds_right"] == "1 of 2"  # the third seed says nothing
    assert (row["found"], row["false_alarms"], row["unsaid"]) == (2 / 3, 1 / 3, 1 / 6)
    assert league.methods(scores)[1][0] == ["wrapped", "hidden", 2 / 3, 3]
    assert league.draw(scores).axes


def test_two_of_three_must_agree():
    names, scores = list(analyze.TRUSTED), []
    for seed, said in ((301, (True, True, None)), (303, (True, False, True)), (304, (True, False, False))):
        scores += [Score("wrapped", "hidden", seed, name, "", 1., 0., found, "", 1.)
                   for name, found in zip(names, said)]
    scores.append(scores[-1]._replace(instrument="pruning", found=True))
    found = {tuple(row[:2]): row[2:4] for row in league.verdicts(scores)[1]}
    assert found["settled on", "hidden"] == [1, 1] and found["fresh", "hidden"] == [1, 2]
    assert found["fresh", "absent"] == [0, 0]
