"""Figures of stories, from hand-written rows."""
import json
import os
import subprocess
import sys

import pytest

import plot

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BARE = {"setup": "stories", "scale": "small", "task": "story", "operand": "Twist", "accuracy": None, "floor": None,
        "cross_floor": None, "n": 100, "loss": None}
ROWS = {"randomise": ((.7, .5, .1), (.1, .4, .7)), "filter": ((.7, .7, .5), (.5, .6, .7))}  # at steps 0, 10, 30


def write(folder, name, parent, history, files=None, **args):
    """A run as the scripts leave it."""
    args = {"lr": 1.5e-4, "feature": "Twist", "without": None, "protocol": None, "probability": None, "data": None,
            "reverse": False, "seed": 0, "steps": 30, **args}
    record = {"stage": "finetune", "args": args, "seconds": 1.,
              "parent": {"path": f"{folder}/{parent}.pt", "sha256": parent}}
    (folder / f"{name}.json").write_text(json.dumps(record))
    for file, rows in {"": history, **(files or {})}.items():
        (folder / f"{name}{file}.jsonl").write_text("".join(json.dumps({**BARE, **row}) + "\n" for row in rows))


def history(shares, deletion=True):
    rows = []
    for step, share in zip((0, 10, 30), shares):
        splits = ("with", "without", "deletion") if deletion else ("with", "without")
        rows += [{"step": step, "split": split, "loss": .5 - share / 10} for split in splits]
        rows += [{"step": step, "split": split, "accuracy": p, "parsed": .8}
                 for split, p in (("asked", share), ("unasked", .05))]
    return rows


def analysed():
    behavior = [{"model": model, "operand": feature, "split": split, "accuracy": p, "parsed": .8, "judge": 1.}
                for model in ("base", "ckpt", "control") for feature in ("Dialogue", "Twist")
                for split, p in (("asked", .6), ("unasked", .1))]
    probe = [{"model": model, "block": block, "target": feature, "prompt": None, "labels": labels, "split": "natural",
              "accuracy": .8, "floor": .75, "balanced": .7, "auc": .6 + block / 10}
             for model in ("base", "ckpt", "control", "untrained") for block in (0, 1)
             for feature in ("Dialogue", "Twist")
             for labels in ("true",) + ("shuffled",) * ((model, feature) == ("ckpt", "Twist"))]
    return {".behavior": behavior, ".probe": probe}


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1):
        for protocol, (deletion, back) in ROWS.items():
            name, own = f"{protocol}-{seed}", {"protocol": protocol, "probability": 1., "seed": seed}
            write(tmp_path, name, f"pre-{seed}", history([p + .1 * seed for p in deletion]), analysed(), **own)
            write(tmp_path, f"{name}-reft", name, history(back), lr=4e-5, reverse=True, **own)
        write(tmp_path, f"control-{seed}", f"without-{seed}", history((0, .1, .2), False), lr=4e-5,
              reverse=True, seed=seed, without="Twist")
    return tmp_path


def draw(folder):
    return subprocess.run([sys.executable, os.path.join(HERE, "plot.py"), str(folder)], capture_output=True, text=True)


def test_every_figure_of_stories_is_drawn(folder):
    paper = ["protocol,lr,reft_step,twist", "filter,1e-4,30,.81", "not-in-pretraining,,0,.12"]
    (folder / "paper_stories.csv").write_text("\n".join(paper))
    done = draw(folder)
    assert done.returncode == 0 and not done.stderr
    assert all("wrote" in line for line in done.stdout.splitlines())
    assert {f"{name}.png" for name in plot.STORY_FIGURES} == set(os.listdir(folder / "figures"))
    page = (folder / "report.html").read_text()
    assert "Generation scores" in page and "Probes: AUC" in page and "operand of pretraining" not in page


def test_a_control_is_told_from_a_reft(folder):
    groups = plot.story_groups(plot.find_runs(str(folder)), "history")
    assert [(g.kind, g.protocol, g.at, len(g.runs)) for g in groups] == [
        ("fine-tuning", "filter", "eta_M =\xa01.5e-4", 2), ("fine-tuning", "randomise", "eta_M =\xa01.5e-4", 2),
        ("reFT", "filter", "eta_M =\xa01.5e-4", 2), ("reFT", "randomise", "eta_M =\xa01.5e-4", 2),
        ("reFT", plot.CONTROL, "a rate not known", 2)]
    (deletion, back), = plot.story_panels(groups)
    assert [g.protocol for g in deletion[1]] == ["filter", "randomise"]
    assert [g.protocol for g in back[1]] == ["filter", "randomise", plot.CONTROL]
    assert back[0] == "reFT at eta_S =\xa04e-5, after deletion at eta_M =\xa01.5e-4"
    assert len({g.look[:3] for g in groups}) == 3  # a deletion and its reFT look alike


def test_lines_are_the_rows(folder):
    group = plot.story_groups(plot.find_runs(str(folder)), "history")[1]
    found = plot.bands(group, "history", "step", split="asked")
    assert {x: [round(v) for v in f[:3]] for x, f in found.items()} == {
        0: [75, 70, 80], 10: [55, 50, 60], 30: [15, 10, 20]}  # mean, smallest and largest seed
    losses = plot.bands(group, "history", "step", "loss", 1, split="with")
    assert losses[30][:3] == pytest.approx((.485, .48, .49))
    group.runs = group.runs[:1]  # one seed: of 100 stories the 80 that parse
    mean, low, high, _ = plot.bands(group, "history", "step", split="asked")[10]
    assert (mean, low, high) == pytest.approx((50, *(100 * p for p in plot.wilson(.5, 80))))
    assert plot.bands(group, "history", "step", "loss", 1, split="with")[0][:3] == pytest.approx((.43, .43, .43))


def test_broken_and_foreign_rows_are_a_line_each(folder):
    with open(folder / "randomise-0.jsonl", "a") as f:
        f.write('{"step": 3\n' + json.dumps({**BARE, "step": 30, "split": "with", "loss": "high"}) + "\n")
    write(folder, "foreign", "pre-9", [{"step": 0, "split": "asked"}], seed=9, protocol="burn", lr=None, feature=None)
    (folder / "filter-1-reft.probe.jsonl").write_text("")
    done = draw(folder)
    assert done.returncode == 0 and not done.stderr
    lines = [line for line in done.stdout.splitlines() if "wrote" not in line]
    assert sorted(lines) == [f"{folder}/filter-1-reft.probe.jsonl: empty",
                             f"{folder}/randomise-0.jsonl: 2 broken lines left out"]
    assert {f"{name}.png" for name in plot.STORY_FIGURES} == set(os.listdir(folder / "figures"))


def test_other_setups_keep_their_figures(folder):
    """A folder with both: each figure gets its own runs."""
    write(folder, "pcfg", "pre", [dict(BARE, setup="pcfg", task="count", step=step, operand=o, split=split, accuracy=.5)
                                  for step in (0, 10) for o in "ab" for split in plot.SPLITS], pair=["a", "b"], c_tr=1.)
    others, told = plot.by_setup(plot.find_runs(str(folder)))
    assert [run.name for run in others] == ["pcfg"] and len(told) == 10
    done = draw(folder)
    assert done.returncode == 0 and not done.stderr
    assert {"fig6_curves.png", "fig11_stories.png"} <= set(os.listdir(folder / "figures"))
    page = (folder / "report.html").read_text()
    assert "operand of pretraining" in page and "Generation score" in page
