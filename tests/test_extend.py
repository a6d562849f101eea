"""
One place each: a program, a task, a protocol, a prior, a pruning score, an order of pruning, an
analysis and a figure are text added at one place in one file, and everything else follows.
"""
import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ("data", "model", "pretrain", "finetune", "analyze", "plot")
TINY = ["--steps", "2", "--batch-size", "4", "--eval-size", "4", "--threads", "1"]

ADDED = {  # what: (script, the name after whose definition it stands, text)
    "a program": ("data", "PROGRAMS", '''
PROGRAMS["tracr-unique"] = Program(
    task="unique", answers=lambda text, setup: (histogram(text, setup) == 1).long(),
    marks=lambda text, o: text[:, o, None], reason="is the letter at place {O} there only once?",
    alphabet="abcdefghi", letters=(8, 8), max_seq_len=(9, 9), operands=("2", "3", "4"), noise=0.,
    steps=lambda place: [SelectorWidth("n", "tokens", "tokens", operator.eq),
                         Map("answer", "n", lambda n: n == 1)])
'''),
    "a task": ("data", "TASKS", '''
TASKS["absent"] = Task(
    lambda text, setup: setup.window - count(text, setup), "T_A", "window",
    "letters other than {O}, which is marked ^, among the last {O2}",
    spurious=Spurious(
        "window", "sd_count", lambda x, y, setup: x + y >= setup.window,
        lambda text, answers, places, setup, rng: edit_pair_counts(
            text, setup.window - answers, places, setup, rng)))
'''),
    "a protocol": ("data", "PROTOCOLS", '''
PROTOCOLS["alone"] = Protocol(
    lambda record, feature, tokenizer: record._replace(features=frozenset([feature])), .5,
    "half of the instructions ask for the feature alone, stories lack it")
'''),
    "a prior": ("data", "PRIORS", '''
PRIORS["even"] = (.4, .4, .2)
'''),
    "a score": ("analyze", "SCORES", '''
SCORES["magnitude"] = Score(lambda g, w, old: w * w, "zero")
'''),
    "an order": ("analyze", "ORDERS", '''
ORDERS["late-blocks"] = Order(
    lambda model, units, test, unit, score: sorted(units, key=lambda u: -(u[0] or 0)), FEW, False)
'''),
    "an analysis": ("analyze", "revive", '''

@analysis()
def norms(study):
    """
    How large are the weights of each block, beside those of the base?
    Fooled by: noise, which makes them all larger.
    """
    rows = []
    for name, model in study.models.items():
        for i, block in enumerate(model.blocks):
            norm = sum(p.square().sum().item() for p in block.parameters()) ** .5
            rows.append(study.row(model=name, block=i, norm=norm))
    return study.write("norms", rows)
'''),
    "a figure": ("plot", "fig6_curves", '''

@figure("history")
def losses(group):
    """
    Loss (nats) of the answers against the step. Fooled by: a few answers that are very wrong.
    """
    def draw(ax):
        for row in flat(group, "history", split="c0"):
            ax.plot(row["step"], row["loss"], "o", label=row["operand"])
        ax.set(xlabel="step (updates)", ylabel="loss (nats)")
    return [draw]
'''),
}


def insert(text, name, added):
    """The text of a script with lines added after the definition of a name."""
    for node in ast.parse(text).body:
        targets = [getattr(target, "id", None) for target in getattr(node, "targets", [])]
        if name in targets or name == getattr(node, "name", None):
            lines = text.splitlines(keepends=True)
            return "".join(lines[:node.end_lineno]) + added + "".join(lines[node.end_lineno:])
    raise AssertionError(f"no {name}")


class Copy:
    """A copy of the six files with everything added."""

    def __init__(self, path):
        self.path = path
        texts = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
        for what, (script, name, added) in ADDED.items():
            assert len(added.strip().splitlines()) <= 15, what
            assert max(map(len, added.splitlines())) <= 100, what
            texts[script] = insert(texts[script], name, added)
        for script, text in texts.items():
            (path / f"{script}.py").write_text(text)

    def run(self, *words):
        done = subprocess.run([sys.executable, *words], cwd=self.path, capture_output=True,
                              text=True)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def rows(self, name):
        lines = (self.path / "out" / name).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def args(self, name):
        return json.loads((self.path / "out" / name).read_text())["args"]


def check_program(copy):
    """Is my letter the only one of its kind?"""
    run = copy.run
    assert "unique of 2" in run("data.py", "--setup", "tracr-unique")
    assert "100.0%" in run("pretrain.py", "--setup", "tracr-unique", "--eval-size", "50")
    run("finetune.py", "--c-tr", "0", "--steps", "2", "--eval-size", "50")
    run("analyze.py", "behavior", "--eval-size", "50")
    assert "right" in run("analyze.py", "ask", "--ckpt", "out/pre.pt", "--operand", "2", "--text",
                          "abaaaaaa")
    assert "fig5_behavior.png" in run("plot.py")


def check_task_and_prior(copy):
    """Sampled, pretrained on by the prior, and fine-tuned with its spurious relation."""
    for c, holds in (("1.0", {True}), ("0.0", {False}), ("natural", {True, False})):
        said = copy.run("data.py", "--task", "absent", "--operand", "b", "--c", c, "-n", "40",
                        "--json")
        samples = list(map(json.loads, said.splitlines()))
        for x in samples:
            assert x["answer"] == 16 - x["text"][-16:].count("b") and "T_A" in x["tokens"]
        assert {x["correlated"] for x in samples} == holds
    copy.run("pretrain.py", "--prior", "even", *TINY, "--out", "out/even.pt")
    assert copy.args("even.json")["prior"] == [.4, .4, .2]
    assert "absent" in {r["task"] for r in copy.rows("even.jsonl")}
    copy.run("finetune.py", "--task", "absent", *TINY, "--ckpt", "out/even.pt", "--out",
             "out/absent.pt")
    assert {r["task"] for r in copy.rows("absent.jsonl")} == {"absent"}


def check_analyses(copy):
    """The analysis, the score and the order: run with all others, and named in their rows."""
    out = copy.run("analyze.py", "--ckpt", "out/absent.pt", "--draws", "1", *TINY)
    assert "VERDICT" in out and "magnitude" in out and "late-blocks" in out
    swept = {(r["score"], r["order"], r["edit"]) for r in copy.rows("absent.prune.jsonl")}
    assert swept >= {(score, order, "zero") for score in ("gradient-weight", "magnitude")
                     for order in ("one-shot", "iterative", "late-blocks")}
    ranks = [r for r in copy.rows("absent.prune.rows.jsonl") if r["score"] == "magnitude"]
    assert {r["order"] for r in ranks} == {"one-shot", "iterative", "late-blocks"}
    sizes = {(r["model"], r["block"]): r["norm"] for r in copy.rows("absent.norms.jsonl")}
    assert len(sizes) == 6 and min(sizes.values()) > 0


def check_protocol(copy):
    """Stories are deleted by it, scored on it, and analysed."""
    copy.run("pretrain.py", "--setup", "stories", *TINY, "--out", "out/stories.pt")
    copy.run("finetune.py", "--ckpt", "out/stories.pt", "--protocol", "alone", *TINY, "--out",
             "out/alone.pt")
    assert copy.args("alone.json")["protocol"] == "alone"
    assert "deletion" in {r["split"] for r in copy.rows("alone.jsonl")}
    copy.run("analyze.py", "norms", "--ckpt", "out/alone.pt", "--eval-size", "4")
    assert {r["model"] for r in copy.rows("alone.norms.jsonl")} == {"base", "ckpt"}


def check_figure(copy):
    """It is drawn, and so are the others, which show what is new."""
    out = copy.run("plot.py")
    assert "losses.png" in out and "fig7_prune.png" in out and "not as expected" not in out
    page = (copy.path / "out/report.html").read_text()
    assert "Fooled by: a few answers that are very wrong" in page and "alone" in page


def check_help(copy):
    """Flags are made from the tables."""
    helps = {script: " ".join(copy.run(f"{script}.py", "--help").split())
             for script in ("data", "pretrain", "finetune", "analyze")}
    assert "even" in helps["pretrain"] and "tracr-unique" in helps["pretrain"]
    assert "absent" in helps["data"] and "tracr-unique" in helps["data"]
    assert "ask for the feature alone" in helps["finetune"]
    assert "count or index or absent" in helps["finetune"] and "norms" in helps["analyze"]


@pytest.mark.slow
def test_one_place_each(tmp_path):
    """In a copy of the six files, all at once; through every script, with tiny numbers."""
    copy = Copy(tmp_path)
    for check in (check_program, check_task_and_prior, check_analyses, check_protocol,
                  check_figure, check_help):
        check(copy)
