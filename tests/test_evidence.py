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


def read(*path):
    with open(os.path.join(*path), "rb") as file:
        return file.read()


def test_readme_and_tables_come_out_as_committed(tmp_path, monkeypatch):
    """README.md, claims.csv and known_truth.csv are computed from the rows, byte for byte."""
    here = tmp_path / "results"
    shutil.copytree(RESULTS, here)
    for name in ("README.md", "claims.csv", "known_truth.csv"):
        os.remove(here / name)
    monkeypatch.setattr(evidence, "HERE", str(here))
    monkeypatch.setattr(plot, "draw_all", lambda runs, folder, names: dict.fromkeys(names))
    evidence.main([])
    for name in ("README.md", "claims.csv", "known_truth.csv"):
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
    assert claims.auroc([3, 2], [1, 2]) == (1 + 1 + 1 + .5) / 4
    assert claims.auroc([1, 1], [1]) == .5
    assert claims.auroc([0, 5], [1, 2, 3]) == .5


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
    claim = claims.Claim("", "", "count low 1 1e-5", "found", "the larger", "floor other", .25)
    assert claims.effects(claim, runs) == [(pytest.approx(.4), .5), (pytest.approx(.1), .5)]
    assert claims.outcome(claim, [.4, .1]) == "undecided"
    assert claims.outcome(claim, [.4, .25]) == "holds"
    assert claims.outcome(claim._replace(below=True), [.4, .3]) == "does not hold"
    ratio = claim._replace(measured="control", control="reft", margin=3.)
    assert claims.effects(ratio, runs) == [(4., 10), (30., 0)]
    paired = claim._replace(control=("count low 1 1e-3", "found"))
    assert claims.effects(paired, runs) == [(pytest.approx(.6), .3)]  # seed 2 has no partner


def commands(script, out):
    """The command lines that a script under results/ prints."""
    env = {**os.environ, "DRY": "1", "OUT": out, "FLAGS": ""}
    done = subprocess.run(["bash", os.path.join(RESULTS, script)], env=env, text=True,
                          capture_output=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


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
            assert set(args.analysis) <= {*analyze.ANALYSES, "hidden", "verdict"}
        for path in made:
            assert path not in setups  # no run is made twice
            setups[path] = setup
