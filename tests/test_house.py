"""
The house keeps its shape, and the README its word: sizes, imports, commands, and the numbers of "What
we find", computed again from the committed evidence.
"""
import ast
import csv
import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import analyze
import data
import finetune
import plot
import pretrain

ROOT = Path(__file__).parent.parent
FILES = ["data.py", "model.py", "pretrain.py", "finetune.py", "analyze.py", "plot.py"]
OTHERS = sorted(str(p.relative_to(ROOT)) for f in ("setups", "instruments", "results") for p in ROOT.glob(f"{f}/*.py"))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
README = (ROOT / "README.md").read_text()

# ---------------------------------------------------------------- shape


def test_the_six_files_are_small():
    text = [(ROOT / name).read_text() for name in FILES]
    assert sum(len(t.splitlines()) for t in text) <= 4100
    assert sum(map(len, text)) <= 207500


@pytest.mark.parametrize("name", FILES + OTHERS)
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


def imports_of(name):
    roots = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    return roots


def test_imports_go_one_way():
    """data <- model <- pretrain <- finetune <- analyze; plot uses none of them, and no torch."""
    order = [name.removesuffix(".py") for name in FILES]
    packages = {"numpy", "torch", "tqdm", "matplotlib"}
    for i, name in enumerate(order):
        roots = imports_of(f"{name}.py")
        assert roots & set(order) <= (set() if name == "plot" else set(order[:i]))
        outside = roots - set(order) - sys.stdlib_module_names
        assert outside <= (packages - {"torch"} if name == "plot" else packages), name
        assert "setups" not in roots, name


def test_the_six_files_are_about_the_grammar():
    """Other setups are named in a few help texts and where a name is resolved, no more."""
    for name in FILES:
        lines = (ROOT / name).read_text().splitlines()
        found = [line for line in lines if re.search(r"\bstor(y|ies)|tracr|compiled", line, re.I)]
        assert len(found) <= 6, (name, found)


def test_nothing_committed_is_large():
    """results/: at most 100 files and 10 MB; no checkpoint anywhere."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    results = [path for path in files if path.is_relative_to(ROOT / "results")]
    assert len(results) <= 100 and sum(path.stat().st_size for path in results) <= 10e6
    assert not [path for path in files if path.suffix == ".pt"]


# ---------------------------------------------------------------- the README's numbers

CASES = {"low prior, C_Tr 1": ("count", "low-"), "high prior, C_Tr .5": ("count", "high-"),
         "low prior, C_Tr 0, lr 1e-3": ("count", "learner-")}
ROWS = {"`b` on shortcut strings": "ckpt_ft_c1", "`b` on no-shortcut strings": "ckpt_ft_c0",
        "`a` on no-shortcut strings": "ckpt_pt_c0", "... up to ten neurons zeroed": "prune_c0",
        "... the same search for what was never trained": "never_prune_c0"}


def verdicts(folder, start):
    """The verdicts of the committed runs of a folder whose names begin so."""
    with gzip.open(ROOT / f"results/{folder}/runs.jsonl.gz", "rt") as file:
        runs = list(map(json.loads, file))
    return [run["verdict"] for run in runs if run["name"].startswith(start) and run["verdict"]]


def spread(values):
    values = sorted(values)
    return f"{median(values):.0f} ({values[0]:.0f} to {values[-1]:.0f})"


def findings():
    """The lines of the table of "What we find"."""
    cells = [verdicts(*case) for case in CASES.values()]
    assert all(len(cell) == 5 for cell in cells)
    lines = [["", *CASES], ["---"] * (1 + len(CASES))]
    for words, key in ROWS.items():
        lines.append([words, *(spread([100 * v[key] for v in cell]) for cell in cells)])
    return ["| " + " | ".join(line) + " |" for line in lines]


WHAT_IT_DOES = {
    "behaviour": "asks for `a`", "pruning": "zeroes ten neurons, ranked again after each",
    "one pass": "zeroes ten neurons, ranked once", "grafting": "copies ten neurons from the base",
    "hybrids": "puts some parts of the base back", "patching": "goes on with the base's stream, or lets it go on",
    "relearning, equal lessons": "teaches half of the answers, asks for the others",
    "reviving, best rate": "teaches `a`, counts the steps", "depth of erasure": "lets the base read the stream (UDS)",
    "weights": "undoes two directions of the change", "lens": "reads the stream by the base's head",
    "probing apart": "fits a probe where the answer for `b` is constant"}


def instruments():
    """The lines of the table of instruments: those ten that tell hidden from absent best."""
    with open(ROOT / "results/league/league.csv", newline="") as file:
        rows = {(r["instrument"], r["truth"], r["against"]): r for r in csv.DictReader(file)}
    with open(ROOT / "results/league/models.csv", newline="") as file:
        audited = [r for r in csv.DictReader(file) if r["certified"] == "True"]
    hidden = {truth: sum(r["truth"].startswith(truth) for r in audited)
              for truth in ("wrapped", "planted", "rank-2", "locked")}
    absent = sum(r["kind"] == "absent" for r in audited)
    lines = [["instrument", "what it does", *(f"{x} ({n})" for x, n in hidden.items()), f"absent ({absent})",
              "AUROC (control alone)"]]
    lines.append(["---"] * len(lines[0]))
    percent = lambda x: f"{100 * float(x):.0f}"
    together = {name: r for (name, *pair), r in rows.items() if pair == ["all", "all"]}
    for name in sorted(together, key=lambda name: -float(together[name]["auroc"]))[:10]:
        both = together[name]
        found = [rows[name, x, "all"]["found"] for x in hidden]
        lines.append([name, WHAT_IT_DOES[name], *map(percent, found), percent(both["false_alarms"]),
                      f"{float(both['auroc']):.2f} ({float(both['control_alone']):.2f})"])
    return ["| " + " | ".join(line) + " |" for line in lines]


def test_findings_are_what_the_evidence_says():
    for line in findings() + instruments():
        assert line in README.splitlines(), line


def test_claims_are_counted_right():
    with open(ROOT / "results/claims.csv", newline="") as file:
        claims = list(csv.DictReader(file))
    words = [row["verdict"] for row in claims]
    text = " ".join(README.split())
    counts = [words.count(word) for word in ("holds", "undecided", "does not hold")]
    few = len([word for word in words if "seed" in word])
    assert sum(counts) + few == len(words)
    said = "Of {} claims, {} hold in every seed, {} are undecided, {} do not hold, {} have under five"
    assert said.format(len(words), *counts, few) in text


def test_the_verdict_is_right_as_often_as_is_said():
    """Of the league's models: two of three trusted instruments find a."""
    with open(ROOT / "results/league/verdicts.csv", newline="") as file:
        rows = {(r["seeds"], r["kind"]): r for r in csv.DictReader(file)}
    said = "{} of {} hidden models and {} of {} absent ones"
    for seeds in ("settled on", "fresh"):
        counts = [rows[seeds, kind][column] for kind in ("hidden", "absent") for column in ("found", "models")]
        assert said.format(*counts) in " ".join(README.split())


def test_chance_is_said_right():
    """Of the claims, if each seed agreed by the toss of a coin; what a wrapped seed more or less does."""
    with open(ROOT / "results/claims.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    text = " ".join((ROOT / "results/about.md").read_text().split())
    seeds = [int(row["seeds"]) for row in rows]
    many = [n for n in seeds if n >= 5]
    by_chance, of_many = sum(.5 ** n for n in seeds), sum(.5 ** n for n in many)
    assert (f"Were all {len(rows)} margins the medians, {by_chance:.1f} claims would hold by chance: "
            f"{of_many:.1f} of the {len(many)}".replace("0.", ".")) in text


def test_the_first_sentence_is_what_the_evidence_says():
    cell = verdicts(*CASES["low prior, C_Tr 1"])
    before, after, pruned = (median(100 * v[key] for v in cell)
                             for key in ("base_pt_c0", "ckpt_pt_c0", "prune_c0"))
    text = " ".join(README.split())
    assert f"takes `a` from {before:.0f} % to {after:.0f} %" in text
    assert f"brings it back to {pruned:.0f} %" in text


# ---------------------------------------------------------------- the README's commands


def test_readme_is_short_and_its_pictures_are_there():
    """At most 200 lines; every file that it shows or links is committed."""
    assert len(README.splitlines()) <= 200
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


MAINS = {"data.py": data.main, "pretrain.py": pretrain.main, "finetune.py": finetune.main,
         "analyze.py": analyze.main, "plot.py": plot.main}
TRAIN = ["--steps", "2", "--batch-size", "4", "--eval-size", "4"]
TINY = {"data.py": ["-n", "1"], "pretrain.py": TRAIN, "finetune.py": TRAIN, "plot.py": [],
        "analyze.py": ["--steps", "4", "--eval-size", "8"]}


def readme_commands():
    """The commands of the README in their order; those in a loop for its first seed."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
    for line in "\n".join(blocks).replace("\\\n", " ").replace("$seed", "1").splitlines():
        for command in re.findall(r"python (\w+\.py)([^&;#]*)", line):
            yield command[0], shlex.split(command[1])


def test_the_readme_has_commands_of_every_script():
    commands = list(readme_commands())
    assert len(commands) > 17 and {name for name, _ in commands} == set(MAINS)


@pytest.mark.slow
def test_commands_of_the_readme(tmp_path, monkeypatch):
    """Each one runs, in order, with tiny sizes."""
    monkeypatch.chdir(tmp_path)
    commands = list(readme_commands())
    for name, words in commands:
        tiny = list(TINY[name])
        if name == "data.py" or "ask" in words:
            tiny = []
        elif name == "analyze.py":
            stories = any("stories" in word for word in words)
            tiny = ["--steps", "2", "--eval-size", "4"] if stories else [*tiny, "--draws", "1"]
        elif "tracr-count" in words:
            tiny = ["--eval-size", "8"]
        MAINS[name]([*words, *tiny])
        if name == "plot.py":  # all figures were drawn; once more in another format: one of them
            monkeypatch.setattr(plot, "FIGURES", {"evidence": plot.FIGURES["evidence"]})


def test_the_notebook_of_the_readme(tmp_path, monkeypatch, capsys):
    """Its lines run after the main job."""
    monkeypatch.chdir(tmp_path)
    pretrain.main(TRAIN)
    finetune.main(TRAIN)
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    exec(code, {})
    assert "'split': 'c0'" in capsys.readouterr().out
