"""
The house keeps its shape, and the README its word: sizes, imports, and the numbers of "What we find",
recomputed from the committed evidence.
"""
import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import plot

ROOT = Path(__file__).parent.parent
FILES = ["data.py", "model.py", "pretrain.py", "finetune.py", "analyze.py", "plot.py"]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_read(name):
    """No line over 100 columns, function over 60 lines or 6 parameters, or nested comprehension."""
    text = (ROOT / name).read_text()
    assert not [line for line in text.splitlines() if len(line) > 100]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            args = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg != "self"]
            assert len(args) <= 6, node.name
        if isinstance(node, COMPREHENSIONS):
            assert sum(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node)) == 1, name


def test_imports_go_one_way():
    """data <- model <- pretrain <- finetune <- analyze; plot uses none of them, and no torch."""
    order = ["data", "model", "pretrain", "finetune", "analyze", "plot"]
    outside = {"numpy", "torch", "tqdm", "matplotlib"}
    for i, name in enumerate(order):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        roots = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add(node.module.split(".")[0])
        allowed = set() if name == "plot" else set(order[:i])
        assert roots & set(order) <= allowed
        packages = roots - set(order) - sys.stdlib_module_names
        assert packages <= (outside - {"torch"} if name == "plot" else outside), name


def test_setups_are_told_apart_in_their_registries_alone():
    """At most five comparisons with the name of a setup in all six files."""
    names = {"pcfg", "stories", "tracr-count", "tracr-max", "tracr-histogram"}
    count = 0
    for name in FILES:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Compare):
                constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
                count += any(c in names for c in constants)
    assert count <= 5


def test_readme_is_short_and_its_pictures_are_there():
    """At most 200 lines; every file that it shows or links is committed."""
    assert len(README.splitlines()) <= 200
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


CASES = {"low prior, C_Tr 1": ("count", "low-"), "high prior, C_Tr .5": ("count", "high-"),
         "low prior, C_Tr 0, lr 1e-3": ("count", "learner-"),
         "Indexer, low prior, C_Tr 1": ("index", "low-")}


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_findings_are_what_the_evidence_says():
    """Every number of the table "What we find", from the verdicts in results/."""
    lines = README.split("## What we find")[1].split("![")[0].splitlines()
    head, _, *rows = [line for line in lines if line.startswith("|")]
    assert cells_of(head)[1:] == list(CASES) and len(rows) == 5
    for i, (folder, start) in enumerate(CASES.values(), 1):
        runs = map(json.loads, (ROOT / f"results/{folder}/runs.jsonl").read_text().splitlines())
        verdicts = [run["verdict"] for run in runs if run["run"].startswith(start) and run["verdict"]]
        assert len(verdicts) == 5

        def mean(key, each=False):
            values = [100 * v[key] for v in verdicts]
            text = f"{sum(values) / 5:.0f}"
            return text + f" ({', '.join(f'{x:.0f}' for x in values)})" * each

        def steps(who):
            reached = ["" if v[f"{who}_reached"] else "> " for v in verdicts]
            return ", ".join(f"{r}{v[f'{who}_steps']:.0f}" for r, v in zip(reached, verdicts))
        expected = [
            f"{mean('ckpt_ft_c1', True)}; {mean('ckpt_ft_c0', True)}",
            f"{mean('ckpt_pt_c0')}; {mean('prune_c0', True)}; {mean('random_c0_max')}; "
            f"{mean('never_prune_c0')}",
            f"{mean('probe_natural', True)}; {mean('probe_untrained')}; {mean('never_probe')}",
            f"{steps('reft')}; {steps('control')}", ", ".join(v["verdict"] for v in verdicts)]
        assert [cells_of(row)[i] for row in rows] == expected


def test_claims_are_what_the_evidence_says():
    """
    results/claims.csv and known_truth.csv, computed again; every claim has its seeds; the README counts
    them, and the fresh seeds' verdicts, right.
    """
    runs = plot.find_runs(str(ROOT / "results"))
    for name in ("claims", "known_truth"):
        head, rows = plot.TABLES[name][0](runs)
        with open(ROOT / f"results/{name}.csv", newline="") as file:
            assert [head, *rows] == list(csv.reader(file))
    found = {claim: plot.effects(claim, runs) for claim in plot.CLAIMS}
    assert all(found.values())
    few = [claim.text for claim, seeds in found.items() if len(seeds) < 5]
    assert all(text.startswith("stories") or "jailbreaks" in text for text in few)
    words, said = [row[-1] for row in plot.claims(runs)[1]], " ".join(README.split())
    counts = [words.count(word) for word in ("holds", "undecided", "does not hold")]
    assert f"of {len(words)}, each" in said
    assert "{} hold in every seed, {} are undecided, {} do not".format(*counts) in said
    fresh = {run.name: run.verdict["verdict"] for run in runs if run.name.startswith("known/fresh")}
    right = sum(word == ("wrapped" if "-low-" in name else "new") for name, word in fresh.items())
    assert f"right on {right} of {len(fresh)} models" in said


def test_speed_is_what_was_measured():
    """The ratios and times of the README, from results/bench.csv."""
    with open(ROOT / "results/bench.csv", newline="") as file:
        rows = {(r["what"], r["variant"], r["device"]): r for r in csv.DictReader(file)}

    def of(what, variant, device, key="ratio"):
        return rows[what, variant, device][key]
    laptop, card = "AMD EPYC, 2 threads", "NVIDIA H100 80GB HBM3"
    step = "pretraining step, small scale", "ours bfloat16", laptop
    said = " ".join(README.split("**Speed**")[1].split("##")[0].split())
    for words, value in {
            "a pretraining step {:.1f} times": of(*step),
            "a fine-tuning step {:.1f};": of("finetuning step, small scale", *step[1:]),
            "drawn {:.0f} times": of("whole strings", "ours", laptop),
            "takes {:.1f} ms": of("pretraining step, paper scale", step[1], card, "median"),
            "{:.1f} with `--compile`": of("pretraining step, paper scale", "ours bfloat16 compiled",
                                          card, "median"),
            "(textbook: {:.0f})": of("pretraining step, paper scale", "textbook float32", card,
                                     "median")}.items():
        assert words.format(float(value)) in said
    assert float(of(step[0], "ours float32", laptop)) < 1.1


def test_nothing_committed_is_large():
    """results/: at most 100 files and 10 MB; no checkpoint anywhere."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    results = [path for path in files if path.is_relative_to(ROOT / "results")]
    assert len(results) <= 100 and sum(path.stat().st_size for path in results) <= 10e6
    assert not [path for path in files if path.suffix == ".pt"]
