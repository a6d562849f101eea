"""results/: the committed evidence, what is computed from it, and the scripts that make it."""
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
import data
import finetune
import plot
import pretrain

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(HERE, "results")
sys.path.insert(0, RESULTS)
import claims  # noqa: E402
import evidence  # noqa: E402
import league  # noqa: E402


def read(*path):
    with open(os.path.join(*path), "rb") as file:
        return file.read()


def test_readme_and_tables_come_out_as_committed(tmp_path, monkeypatch):
    """README.md and claims.csv are computed from the rows, byte for byte."""
    here = tmp_path / "results"
    shutil.copytree(RESULTS, here)
    for name in ("README.md", "claims.csv"):
        os.remove(here / name)
    monkeypatch.setattr(evidence, "HERE", str(here))
    monkeypatch.setattr(plot, "draw_all", lambda runs, folder, names: dict.fromkeys(names))
    evidence.main([])
    for name in ("README.md", "claims.csv"):
        assert read(here, name) == read(RESULTS, name), name


def test_collected_runs_are_read_back_as_they_were(tmp_path):
    """Raw runs (X.json and the files beside it), and the same collected: the same rows and maps."""
    raw, folder = tmp_path / "raw", str(tmp_path / "set")
    with gzip.open(os.path.join(RESULTS, "count", "runs.jsonl.gz"), "rt") as file:
        lines = [json.loads(line) for line in file][:2]
    for line in lines:
        prefix = str(raw / "deep" / line["name"])
        os.makedirs(os.path.dirname(prefix), exist_ok=True)
        for kind, rows in line["rows"].items():
            plot.write(f"{prefix}.{kind}.jsonl", "\n".join(map(json.dumps, rows)).encode())
        plot.write(f"{prefix}.json", json.dumps(line["record"]).encode())
        plot.write(f"{prefix}.verdict.json", json.dumps(line["verdict"]).encode())
        np.savez(f"{prefix}.attention.npz", base_a=np.arange(6.).reshape(2, 3),
                 vocabulary=np.array(["a", "b"]), checkpoint=np.array([line["record"]["sha256"]]))
    evidence.collect(str(raw), folder)
    before, after = plot.find_runs(str(raw)), plot.find_runs(folder)
    assert [run.name for run in after] == [run.name for run in before]
    assert [run.name for run in after] == [f"deep/{line['name']}" for line in lines]
    for line, run in zip(lines, after):
        assert run.record == line["record"] and run.verdict == line["verdict"]
        for kind, rows in line["rows"].items():
            assert run.rows[kind] == rows, kind
    assert after[0].maps("attention")["base_a"].tolist() == [[0., 1., 2.]]  # of the first string
    assert after[1].maps("attention") == {}                                 # of the first seed
    once = read(folder, "runs.jsonl.gz")
    evidence.collect(folder, folder)
    assert read(folder, "runs.jsonl.gz") == once


def test_auroc_by_hand():
    assert league.auroc([3, 2], [1, 2]) == (1 + 1 + 1 + .5) / 4
    assert league.auroc([1, 1], [1]) == .5
    assert league.auroc([0, 5], [1, 2, 3]) == .5


def test_exact_numbers_by_hand():
    """Intervals from Clopper and Pearson's tables; a sign test is a binomial tail."""
    for seen, bounds in {(5, 5): (.4782, 1), (0, 5): (0, .5218), (4, 5): (.2836, .9949),
                         (3, 10): (.0667, .6525)}.items():
        assert league.exact_interval(*seen) == pytest.approx(bounds, abs=1e-4)
    assert [claims.chance(k, 5) for k in (5, 4, 0)] == [1 / 32, 6 / 32, 1]
    found, lacking = np.array([(1, .9), (1, .5), (2, .9), (3, 1)]), np.array([(1, .6), (2, .8)])
    assert league.seeds_right(found, lacking) == [False, True]  # of seed 3 nothing lacks a


def model(seed, lr, **verdict):
    """A run as plot.py reads it, with the numbers of its verdict."""
    args = dict(seed=seed, lr=lr, task="count", prior=[.999, .001, 0], c_tr=1.)
    record = {"stage": "finetune", "args": args, "setup": "pcfg", "scale": "small", "history": [],
              "sha256": "x", "step": 400, "steps": 400}
    return plot.Run(".", "./x", {"name": "x", "record": record, "rows": {},
                                 "verdict": {**verdict, "checkpoint": "x"}})


def test_effects_by_hand():
    """A difference, a ratio of steps, the same seed under another condition."""
    runs = [model(1, 1e-5, found=.9, floor=.2, other=.5, reft=10, control=40),
            model(2, 1e-5, found=.6, floor=.5, other=.1, reft=0, control=30),
            model(1, 1e-3, found=.3)]
    claim = claims.Claim("", "", "", "count low 1 1e-5", "found", "both", "floor other", .25)

    def effects(**changes):
        return [(round(effect.value, 9), effect.control)
                for effect in claims.effects(claim._replace(**changes), runs)]
    assert effects() == [(.4, .5), (.1, .5)]
    assert effects(below=True) == [(.7, .2), (.5, .1)]  # each control: the lowest
    assert effects(measured="control", control="reft", margin=3.) == [(4., 10), (30., 0)]
    assert effects(control=("count low 1 1e-3", "found")) == [(.6, .3)]  # seed 2 has no partner
    runs[0].verdict["ckpt_ft_c1"], runs[1].verdict["ckpt_ft_c1"] = .89, .9
    assert effects(learned=True) == [(.1, .5)]  # seed 1 did not learn the shortcut


def test_outcomes_by_hand():
    """Few seeds never refute a claim; what was cut off decides no further than it got."""
    claim = claims.Claim("", "", "", "", "", "", "", .25)

    def outcome(*values, **changes):
        found = [claims.Effect(value, value, .5, None) for value in values]
        return claims.outcome(claim._replace(**changes), found)
    assert outcome(.4, .25, .3, .3, .9) == "holds"
    assert outcome(.4, .25, .3, .3, .1) == "undecided"
    assert outcome(.1, .1, .1, .1, .2) == "does not hold"
    assert outcome(.1, .1, .1, .1, .2, below=True) == "holds"
    assert outcome(.3, .3, .3, .3, .4, below=True) == "does not hold"
    assert outcome(.4, .3) == "holds (2 seeds)" and outcome(.4, .1) == "undecided (2 seeds)"
    assert outcome(.1, .1) == "too few seeds"
    cut = claims.AtLeast
    assert outcome(cut(4.), cut(3.), 3., 3., 5., margin=3.) == "holds"
    assert outcome(cut(2.), 3., 3., 3., 5., margin=3.) == "cannot be said"
    assert outcome(cut(2.), 3., 1., 3., 5., margin=3.) == "undecided"
    assert outcome(*[cut(2.)] * 5, margin=3.) == "cannot be said"


def test_steps_that_were_cut_off_are_known_as_such():
    """From verdicts and from rows; of several rates the best, a lower bound where that was cut."""
    run = model(1, 1e-5, control_steps=90, control_reached=False, reft_steps=30, reft_reached=True)
    assert claims.is_cut(claims.number(run, "control_steps"))
    assert not claims.is_cut(claims.number(run, "reft_steps"))
    run.rows["revive"] = [dict(arm="scratch", lr=lr, split="natural", threshold=.99, steps=steps,
                               max_steps=90) for lr, steps in ((1e-5, None), (1e-4, 90))]
    own, best = (claims.number(run, claims.steps("scratch", best)) for best in (False, True))
    assert (own, claims.is_cut(own), best, claims.is_cut(best)) == (90, True, 90, False)
    run.rows["revive"][1]["steps"] = 120
    assert claims.is_cut(claims.number(run, claims.steps("scratch", True)))


def test_kinds_of_claims_are_what_git_says():
    """Rules and rows: the times and commits that claims name exist, in this order."""
    words = {word for claim in claims.CLAIMS for word in (claim.rule, claim.rows)}
    for word in words:
        when, commit = word.rsplit(" ", 1)
        done = subprocess.run(["git", "show", "-s", "--date=format-local:%Y-%m-%d %H:%M",
                               "--format=%ad", commit], cwd=HERE, text=True, capture_output=True,
                              env={**os.environ, "TZ": "UTC"})
        if done.returncode == 0:  # a copy without history has no such commit
            assert done.stdout.strip() == when, word
    kinds = [claims.kind_of(claim) for claim in claims.CLAIMS]
    assert set(kinds) == {"confirmatory", "exploratory"}
    changed = [claim for claim in claims.CLAIMS if claim.below or claim.learned]
    assert changed and {claims.kind_of(claim) for claim in changed} == {"exploratory"}


def commands(script, out):
    """The command lines that a script under results/ prints."""
    env = {**os.environ, "DRY": "1", "OUT": out, "FLAGS": ""}
    done = subprocess.run(["bash", os.path.join(RESULTS, script)], env=env, text=True,
                          capture_output=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_evidence_is_made_from_a_clean_commit(tmp_path):
    """A script stops before its first command, unless the results go elsewhere."""
    shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.gz"))
    (tmp_path / "model.py").write_text("1\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    env = {**os.environ, "PYTHON": "true", "OUT": "raw"}

    def run(**more):
        return subprocess.run(["bash", "results/relearn.sh"], cwd=tmp_path, env={**env, **more},
                              capture_output=True, text=True)
    assert run().returncode == 0
    (tmp_path / "model.py").write_text("2\n")
    assert run().returncode == 2 and "not committed" in run().stderr
    assert run(RESULTS="elsewhere").returncode == 0


@pytest.mark.parametrize("script", ["pcfg.sh", "tracr.sh", "stories.sh", "relearn.sh", "paper.sh"])
def test_scripts_print_commands_that_parse(script, tmp_path, monkeypatch, capsys):
    """Their flags are known to the scripts they start, and each line needs only earlier ones."""
    out, setups, current = str(tmp_path), {}, SimpleNamespace(setup=None)
    monkeypatch.setattr(data, "setup_of", lambda ckpt: current.setup)
    monkeypatch.setattr(finetune, "load", lambda path: (torch.nn.Identity(), None))
    monkeypatch.setattr(analyze, "read_checkpoint", lambda path: None)

    def parse(script, words, setup):
        """The arguments by the script's own parser; nothing is built or resolved."""
        for key in ("resolve", "write_model"):
            monkeypatch.setattr(type(setup), key, lambda *args: torch.nn.Identity())
        current.setup = setup
        parsed = {"pretrain.py": pretrain, "finetune.py": finetune, "analyze.py": analyze}[
            script].arguments(words)
        return parsed if script == "analyze.py" else parsed[0]
    lines = commands(script, out)
    assert len(lines) > 15
    for python, name, *words in lines:
        assert python == "python"
        if name == "results/evidence.py":
            raw = [word for word in words if word.startswith(out)]
            assert not raw or any(path.startswith(raw[0]) for path in setups)
            assert set(words[3:]) <= set(plot.FIGURES)
            continue
        needed = [path for word in words for path in re.findall(rf"{out}[^,]*\.pt", word)]
        made = [words[words.index("--out") + 1]] if "--out" in words else []
        assert set(needed) - set(made) <= set(setups), words
        if name == "pretrain.py":
            which = dict(zip(words[::2], words[1::2])).get("--setup", "pcfg")
            setup = data.find_setup(which, "small")
        else:
            setup = setups[words[words.index("--ckpt") + 1]]
        args = parse(name, words, setup)
        if name == "analyze.py":
            assert set(args.analysis) <= {*analyze.ANALYSES, *analyze.find_instruments(), "hidden", "verdict"}
        for path in made:
            assert path not in setups  # no run is made twice
            setups[path] = setup
