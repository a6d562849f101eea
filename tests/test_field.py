"""
What happens to such programs in other people's hands: evidence that outlives its checkpoint, files
of their own, their plotting environment, two runs at once, paths as people write them, text as it
comes, other platforms, a session that lives on, older checkpoints, logs. Each test is of one kind
of situation, with several inputs.
"""
import collections
import errno
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import data
import finetune
import model as model_py
import plot
import pretrain
from data import UserError, sha256
from model import load, read_checkpoint
from test_promises import (FORKS, ROOT, TINY, Folder, assert_same_run, copy, done, equal,  # noqa: F401
                           folder, mistake, run_forked)

PRETRAIN = ["pretrain.py", "--steps", "30", "--eval-every", "10", *TINY]
FINETUNE = ["finetune.py", "--steps", "20", "--eval-every", "5", *TINY]
ANALYZE = ["analyze.py", "--eval-size", "16", "--steps", "10", "--draws", "1", "--batch-size", "8",
           "--threads", "1"]


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory, done):  # noqa: F811
    """A folder with pre.pt, ft.pt, and what all analyses say of it. Not to be written to."""
    folder = Folder(tmp_path_factory.mktemp("looked"))  # noqa: F811
    for name in ("pre", "ft"):
        folder.put(name, *(done / (name + suffix) for suffix in (".pt", ".json", ".jsonl")))
    result = folder.run(*ANALYZE, "--ckpt", "ft.pt")
    assert result.code == 0 and not result.err, result.raw
    return folder.path


def put_all(source, folder):  # noqa: F811
    """Copy the files of a folder, of the same age. Returns the one that now has them."""
    for file in filter(Path.is_file, source.iterdir()):
        shutil.copy2(file, folder.path)
    return folder


@pytest.fixture
def looked(looked_at, folder):  # noqa: F811
    """A folder with copies of the same."""
    return put_all(looked_at, folder)


def script(*words, cwd, **variables):
    """A script in a process of its own, with other variables of the environment."""
    env = {**os.environ, **variables}
    return subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *map(str, words[1:])],
                          cwd=cwd, env=env, capture_output=True)


# ---------------------------------------------------------------- 1 evidence and its checkpoint


def report_of(folder):  # noqa: F811
    result = folder.run("plot.py", ".")
    assert result.code == 0 and not result.err, result.raw
    return result.out, (folder.path / "report.html").read_text()


def test_everything_says_of_which_checkpoint_it_speaks(looked):
    ours = sha256(looked.path / "ft.pt")
    assert json.loads((looked.path / "ft.json").read_text())["sha256"] == ours
    assert json.loads((looked.path / "ft.verdict.json").read_text())["checkpoint"] == ours
    files = sorted(looked.path.glob("ft.*.jsonl"))
    assert len(files) == 8
    for file in files:
        assert {json.loads(line)["checkpoint"] for line in file.read_text().splitlines()} == {ours}
    assert np.load(looked.path / "ft.attention.npz")["checkpoint"].tolist() == [ours]
    out, page = report_of(looked)
    assert "left out" not in out and "Verdicts and their evidence" in page


def test_rows_of_a_run_that_was_made_again_are_left_out_and_named(looked):
    """The very same command with --force at another rate: rows, verdict and maps are of the old."""
    words = [*FINETUNE, "--ckpt", "pre.pt", "--out", "ft.pt", "--lr", "1e-3", "--force"]
    assert looked.run(*words).code == 0
    out, page = report_of(looked)
    for kind in ("behavior", "prune", "probe", "attention", "revive", "revive.curve", "relearn"):
        assert re.search(rf"ft: (\d+) of \1 rows of {kind} left out, of another checkpoint", out), kind
    assert "ft: verdict left out" in out and "Verdicts and their evidence" not in page
    assert "fig7_prune: skipped" in out and "fig6_curves.png" in out
    mistake(looked.run("analyze.py", "verdict", "--ckpt", "ft.pt"), "run them first")
    # what was made anew counts, beside what is old
    assert looked.run(*ANALYZE, "prune", "attention", "--ckpt", "ft.pt").code == 0
    out, page = report_of(looked)
    assert "of prune left out" not in out and "of probe left out" in out and "maps of" not in out
    said = looked.run("analyze.py", "verdict", "--ckpt", "ft.pt")
    assert said.code == 2 or "no rows of behavior, probe, revive" in said.out


def test_rows_from_before_they_were_marked(looked):
    """Record and rows of last month: shown and judged as ever; beside a newer record they are not."""
    record = json.loads((looked.path / "ft.json").read_text())
    for file in looked.path.glob("ft.*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        data.write_rows(str(file), [{k: v for k, v in row.items() if k != "checkpoint"} for row in rows])
    mistake(looked.run("analyze.py", "verdict", "--ckpt", "ft.pt"), "run them first")
    (looked.path / "ft.json").write_text(json.dumps({k: v for k, v in record.items() if k != "sha256"}))
    said = looked.run("analyze.py", "verdict", "--ckpt", "ft.pt")
    assert said.code == 0 and "left out" not in said.out
    out, page = report_of(looked)
    assert "left out" not in out and "Verdicts and their evidence" in page


def test_another_checkpoint_under_the_same_name(looked):
    """Copied over the old one: neither its record nor any rows are about it."""
    assert looked.run(*FINETUNE, "--ckpt", "pre.pt", "--out", "other.pt", "--seed", "1").code == 0
    shutil.copy(looked.path / "other.pt", looked.path / "ft.pt")
    out, page = report_of(looked)
    assert "ft: left out, its record is of another checkpoint than ft.pt" in out
    assert "Verdicts and their evidence" not in page
    mistake(looked.run("analyze.py", "verdict", "--ckpt", "ft.pt"), "run them first")


def test_a_parent_that_was_made_again_lends_no_settings(looked):
    """The child says what it came from; what lies there now has another prior."""
    (run,) = [r for r in plot.find_runs(str(looked.path)) if r.name == "ft"]
    assert run.settings["pretrain steps"] == 30 and run.parent
    words = [*PRETRAIN, "--steps", "29", "--out", "pre.pt", "--force"]
    assert looked.run(*words).code == 0
    (run,) = [r for r in plot.find_runs(str(looked.path)) if r.name == "ft"]
    assert "pretrain steps" not in run.settings and run.parent is None
    mistake(looked.run(*ANALYZE, "behavior", "--ckpt", "ft.pt"), "has changed since")


def test_another_control_is_another_evidence(looked):
    """A verdict takes rows only if they stood beside the control that is given now."""
    for name, prior in (("one", ".5,0,.5"), ("two", ".4,0,.6"), ("high", "high")):
        assert looked.run(*PRETRAIN, "--prior", prior, "--out", f"{name}.pt").code == 0
    assert looked.run(*FINETUNE, "--ckpt", "high.pt", "--out", "x.pt", "--operand", "c").code == 0
    words = ["--ckpt", "x.pt", "--control"]
    result = looked.run(*ANALYZE, "prune", *words, "one.pt")
    if result.code:
        raise AssertionError(result.raw)
    assert looked.run("analyze.py", "verdict", *words, "one.pt").code == 0
    mistake(looked.run("analyze.py", "verdict", *words, "two.pt"), "--control")
    mistake(looked.run("analyze.py", "verdict", *words[:2]), "--control")


def test_another_base_is_another_evidence(looked):
    """--base as what it came from is the usual one; any other is not."""
    ckpt = read_checkpoint(looked.path / "pre.pt")
    torch.save({**ckpt, "model": {k: 0 * x for k, x in ckpt["model"].items()}}, looked.path / "zero.pt")
    assert looked.run("analyze.py", "verdict", "--ckpt", "ft.pt", "--base", "pre.pt").code == 0
    mistake(looked.run("analyze.py", "verdict", "--ckpt", "ft.pt", "--base", "zero.pt"), "--base")
    assert looked.run(*ANALYZE, "behavior", "--ckpt", "ft.pt", "--base", "zero.pt").code == 0
    assert "no rows of behavior" in looked.run("analyze.py", "verdict", "--ckpt", "ft.pt").out


def test_rows_of_two_checkpoints_of_the_same_arguments_are_not_merged(looked):
    """Tables of the old one beside the new one; two runs that differ in what is not recorded."""
    assert looked.run("plot.py", ".", "--evidence", "tables").code == 0
    ckpt = read_checkpoint(looked.path / "ft.pt")
    ckpt["model"]["ln.bias"] += 1e-3  # as another machine might
    torch.save(ckpt, looked.path / "ft.pt")
    record = json.loads((looked.path / "ft.json").read_text())
    record["sha256"] = sha256(looked.path / "ft.pt")
    (looked.path / "ft.json").write_text(json.dumps(record))
    out, page = report_of(looked)
    assert "tables/ft: left out, as ft but of another checkpoint" in out and "Verdicts and their" not in page


def test_half_written_tables_are_no_runs(looked):
    """Evidence is whole or not there: the index goes first, and comes last."""
    assert looked.run("plot.py", ".", "--evidence", "tables").code == 0
    code = ("import plot, sys; write = plot.write\n"
            "def stop(path, content):\n    write(path, content)\n    if 'prune' in path: raise KeyboardInterrupt\n"
            "plot.write = stop; sys.argv = ['plot.py', '.', '--evidence', 'tables']; plot.main()")
    done = subprocess.run([sys.executable, "-c", code], cwd=looked.path,  # noqa: F811
                          env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.returncode == 130 and not done.stderr
    assert not plot.find_runs(str(looked.path / "tables"))
    assert looked.run("plot.py", ".", "--evidence", "tables").code == 0
    assert len(plot.find_runs(str(looked.path / "tables"))) == 2


def test_a_checkpoint_by_another_suffix_has_rows_of_its_own(looked):
    """f.bak beside f.pt: its rows do not take the place of those of f.pt."""
    shutil.copy(looked.path / "pre.pt", looked.path / "ft.bak")
    before = looked.hashes()
    assert looked.run(*ANALYZE, "behavior", "--ckpt", "ft.bak").code == 0
    assert looked.hashes().items() >= before.items() and (looked.path / "ft.bak.behavior.jsonl").exists()


def test_evidence_as_tables_keeps_the_checkpoint(looked, tmp_path):
    """--evidence takes what is of the checkpoint, and says of which it is."""
    result = looked.run("plot.py", ".", "--evidence", "tables")
    assert result.code == 0, result.raw
    lines = (looked.path / "tables/runs.jsonl").read_text().splitlines()
    (run,) = [run for run in map(json.loads, lines) if run["run"] == "ft"]
    ours = sha256(looked.path / "ft.pt")
    assert run["constants"]["prune"]["checkpoint"] == run["record"]["sha256"] == ours
    (read,) = [r for r in plot.find_runs(str(looked.path / "tables")) if r.name == "ft"]
    assert len(read.rows["prune"]) > 50 and read.verdict and "tokens" in read.maps("attention")


def test_the_page_begins_with_the_verdict(looked):
    """Its table, the figure that shows it, then the rest; nothing in it is fetched or run."""
    _, page = report_of(looked)
    places = [page.index(x) for x in ("Verdicts and their evidence", 'alt="evidence"', "of pretraining, O<sub>FT",
                                      'alt="fig5_behavior"', "The numbers of the verdicts")]
    assert sha256(looked.path / "ft.pt") not in page
    assert places == sorted(places) and page.index("<table") < page.index("<img")
    assert "<script" not in page and set(re.findall('(?:src|href)="(.{5})', page)) == {"data:"} and "url(" not in page


# ---------------------------------------------------------------- 2 files of the user's own


@pytest.mark.parametrize("name, content", [
    ("notes.json", '{"mine": 1}'), ("notes.json", "a list of things"), ("notes.jsonl", '{"k": 1}\n'),
    ("notes.jsonl", "first line\nsecond line\n"), ("notes.jsonl", "[1, 2]"),
    ("notes.step10.json", '{"mine": 1}'), ("notes.step10.pt", "mine")])
def test_a_run_replaces_no_file_of_others(folder, name, content):  # noqa: F811
    """Exit 2, one line, untouched, with --resume as without; --force replaces."""
    (folder.path / name).write_text(content)
    before, words = folder.hashes(), [*PRETRAIN, "--out", "notes.pt", "--keep", "10"]
    for more in ([], ["--resume"]):
        mistake(folder.run(*words, *more), name, "--out", "--force")
        assert folder.hashes() == before
    assert folder.run(*words, "--force").code == 0
    assert folder.hashes()[name] != before[name]


def test_a_history_without_its_run_is_not_replaced(copy):  # noqa: F811
    """Its checkpoint and record were deleted: somebody kept it."""
    for suffix in (".pt", ".json"):
        (copy.path / f"pre{suffix}").unlink()
    before = copy.hashes()
    mistake(copy.run(*PRETRAIN, "--out", "pre.pt"), "pre.jsonl", "--force")
    assert copy.hashes() == before


@pytest.mark.parametrize("name", ["ft.behavior.jsonl", "ft.verdict.json", "ft.attention.npz"])
@pytest.mark.parametrize("content", ['{"k": 1}\n', '{"split": "test", "accuracy": 0.9, "seed": 3}\n', "\n\n", "[]"])
def test_an_analysis_replaces_no_file_of_others(copy, name, content):  # noqa: F811
    (copy.path / name).write_text(content)
    if not content.strip():  # nothing in it
        assert data.is_ours(str(copy.path / name)) == name.endswith(".jsonl")
        return
    before = copy.hashes()
    mistake(copy.run(*ANALYZE, "behavior", "attention", "--ckpt", "ft.pt"), name, "move it")
    assert copy.hashes() == before


@pytest.mark.parametrize("name, words", [
    ("report.html", []), ("figures/fig6_curves.png", []), ("figures/fig6_curves.svg", ["--format", "svg"]),
    ("README.md", ["--markdown"]), ("tables/runs.jsonl", ["--evidence", "tables"]),
    ("tables/history.csv", ["--evidence", "tables"])])
def test_a_plot_replaces_no_file_of_others(copy, name, words):  # noqa: F811
    """Its own it does, again and again."""
    if name == "README.md":  # of a folder of evidence
        assert copy.run("plot.py", ".", "--evidence", "count").code == 0
    for _ in range(2):
        assert copy.run("plot.py", ".", *words).code == 0
    assert (copy.path / name).exists()
    (copy.path / name).write_text("mine\n")
    before = copy.hashes()
    mistake(copy.run("plot.py", ".", *words), name, "move it")
    assert copy.hashes()[name] == before[name]


def test_a_run_by_the_name_of_an_analysis_keeps_its_files(copy):  # noqa: F811
    """--out ft.revive.pt is a natural name for reFT; ft.verdict.json a verdict, or a record."""
    words = ["finetune.py", "--reverse", "--steps", "3", *TINY, "--ckpt", "ft.pt", "--out"]
    assert copy.run(*words, "ft.revive.pt").code == 0
    before = copy.hashes()
    mistake(copy.run(*ANALYZE, "revive", "--ckpt", "ft.pt"), "ft.revive.jsonl", "move it")
    assert copy.hashes() == before
    (copy.path / "ft.verdict.json").write_text('{"verdict": "wrapped", "evidence": []}')
    mistake(copy.run(*words, "ft.verdict.pt"), "ft.verdict.json", "--out")
    (copy.path / "ft.behavior.notes.json").write_text("mine")  # in nobody's way
    assert copy.run(*ANALYZE, "behavior", "--ckpt", "ft.pt").code == 0


def test_tables_that_are_not_ours_stay_where_there_are_no_rows(copy):  # noqa: F811
    """A table of a kind of which the runs have nothing: ours goes, another's is named."""
    words = ["plot.py", ".", "--evidence", "tables"]
    for content, code in (("my runs,k\n1,2\n", 2), ("run,k\n", 0)):
        shutil.rmtree(copy.path / "tables", ignore_errors=True)
        (copy.path / "tables").mkdir()
        (copy.path / "tables/prune.csv").write_text(content)
        assert copy.run(*words).code == code
        assert (copy.path / "tables/prune.csv").exists() == bool(code)


def test_a_figure_of_others_that_matplotlib_drew(copy):  # noqa: F811
    (copy.path / "figures").mkdir()
    path = copy.path / "figures/fig6_curves.png"
    plot.matplotlib.image.imsave(path, np.zeros((3, 3)))
    before = path.read_bytes()
    assert b"Matplotlib" in before
    mistake(copy.run("plot.py", "."), "fig6_curves.png", "move it")
    assert path.read_bytes() == before
    (copy.path / "report.html").write_text("<title>unwrap</title>")  # beside it, it was ours, an older one
    assert copy.run("plot.py", ".").code == 0 and path.read_bytes() != before


def test_names_that_we_use_on_the_way_stay_too(copy):  # noqa: F811
    """x.pt.part and x.pt.lock may be somebody's; our own leavings after a kill go."""
    for name in ("x.pt.part", "x.pt.lock", "x.json.part"):
        (copy.path / name).write_text("mine")
    leavings, other = (copy.path / name for name in ("x.pt.0123abcd.part", "ft.pt.0123abcd.part"))
    for file in (leavings, other):  # another process may be writing the other one
        file.write_text("half")
    before = copy.hashes()
    assert copy.run(*FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt").code == 0
    after = copy.hashes()
    assert not leavings.exists() and all(
        after[name] == digest for name, digest in before.items() if name != leavings.name)


# ---------------------------------------------------------------- 3 the plotting environment


def test_figures_are_the_same_whatever_is_configured(copy):  # noqa: F811
    """matplotlibrc and MPLBACKEND of people who also use matplotlib for other things."""
    words = ["plot.py", ".", "--figures", "fig6_curves", "fig5_behavior"]
    plain = script(*words, cwd=copy.path, MPLBACKEND="agg")
    assert plain.returncode == 0, plain.stderr
    names = [*sorted((copy.path / "figures").iterdir()), copy.path / "report.html"]
    images = [name.read_bytes() for name in names]
    assert images[0].startswith(b"\x89PNG")
    for line in ("savefig.format: pdf", "text.usetex: True", "font.size: 22\nfigure.figsize: 1, 1",
                 "axes.formatter.use_locale: True\naxes.prop_cycle: cycler('color', ['k'])",
                 "backend: TkAgg\nsavefig.dpi: 20\nfigure.autolayout: True"):
        (copy.path / "matplotlibrc").write_text(line + "\n")
        again = script(*words, cwd=copy.path)
        assert again.returncode == 0 and not again.stderr, again.stderr
        assert [name.read_bytes() for name in names] == images, line
    (copy.path / "matplotlibrc").unlink()
    for backend in ("module://matplotlib_inline.backend_inline", "module://no.such", "nonsense", ""):
        again = script(*words, cwd=copy.path, MPLBACKEND=backend)
        assert again.returncode == 0 and not again.stderr, again.stderr
        assert [name.read_bytes() for name in names] == images, backend


def test_a_notebook_keeps_its_own_plotting(tmp_path):
    """Importing plot and drawing leave backend and settings as they were, and import no pyplot."""
    code = ("import matplotlib, os, sys; matplotlib.rcParams['font.size'] = 21\n"
            "before = dict(matplotlib.rcParams)\n"
            "import plot\n"
            "def fig(runs):\n    'A figure.'\n    return matplotlib.figure.Figure(), 'all'\n"
            "assert plot.draw(fig, [])[0][1:4] == b'PNG'\n"
            "assert dict(matplotlib.rcParams) == before and 'matplotlib.pyplot' not in sys.modules\n"
            "assert os.environ['MPLBACKEND'] == 'svg'\n")
    first = "import plot, matplotlib.pyplot as plt; assert plt.get_backend() == 'svg', plt.get_backend()"
    for lines in (code, first):
        subprocess.run([sys.executable, "-c", lines], cwd=ROOT, check=True,
                       env={**os.environ, "MPLBACKEND": "svg"})


@pytest.mark.parametrize("form, begins, text", [("pdf", b"%PDF", b"/FontFile2"), ("svg", b"<?xml", b">c0</text>")])
def test_figures_for_a_paper(copy, form, begins, text):  # noqa: F811
    """--format: the same figures, text as text; the page has its pictures as ever; twice the same."""
    words = ["plot.py", ".", "--figures", "fig6_curves", "--format", form]
    for _ in range(2):
        assert copy.run(*words).code == 0
        file = copy.path / f"figures/fig6_curves.{form}"
        content = file.read_bytes()
        assert content.startswith(begins) and text in content and b"unwrap" in content
    assert copy.run(*words).code == 0 and file.read_bytes() == content
    assert (copy.path / "report.html").read_text().count("data:image/png") == 1


# ---------------------------------------------------------------- 4 two at once


LONG = ["--steps", "4000", "--save-every", "1", "--eval-every", "4000", *TINY]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_two_at_once(copy, stage):  # noqa: F811
    """
    The second is told in one line that there is a run, with --resume and --force as without; the
    first goes on; killed, it leaves nothing in the way of the next.
    """
    words = [f"{stage}.py", *LONG, "--out", "x.pt"] + ["--ckpt", "pre.pt"] * (stage == "finetune")
    first = copy.start(*words)
    copy.wait(first, lambda: (copy.path / "x.jsonl").exists())
    for more in ([], ["--resume"], ["--force"], ["--lr", "1e-4"]):
        mistake(copy.run(*words, *more), "x.pt", "a run is under way")
    os.symlink("x.pt", copy.path / "link.pt")
    mistake(copy.run(*[word.replace("x.pt", "link.pt") for word in words]), "a run is under way")
    other = copy.start(*[word.replace("x.pt", "y.pt") for word in words])  # elsewhere it may run
    copy.wait(other, lambda: (copy.path / "y.jsonl").exists())
    other.terminate()
    assert copy.end(other).code == 143 and not (copy.path / "y.pt.lock").exists()
    first.kill()
    copy.end(first)
    step = read_checkpoint(copy.path / "x.pt")["step"]
    mistake(copy.run(*words), "unfinished", "--resume")
    second = copy.start(*words, "--resume")
    copy.wait(second, lambda: read_checkpoint(copy.path / "x.pt")["step"] > step)
    second.terminate()
    assert copy.end(second).code == 143
    rows = [json.loads(line) for line in (copy.path / "x.jsonl").read_text().splitlines()]
    about = [(row["step"], row["task"], row["operand"], row["split"]) for row in rows]
    assert len(set(about)) == len(about) and not (copy.path / "x.pt.lock").exists()


def test_started_in_the_same_moment(folder):  # noqa: F811
    """Of four, one trains; the others end with 2 in one line, or find it done."""
    words = [*PRETRAIN, "--out", "x.pt"]
    results = [folder.end(process) for process in [folder.start(*words) for _ in range(4)]]
    assert sum("wrote x.pt" in result.out for result in results) == 1
    for result in results:
        assert result.code == 0 or result.code == 2 and len(result.err) == 1, result.raw
    assert sorted(folder.hashes()) == ["x.json", "x.jsonl", "x.pt"]
    rows = (folder.path / "x.jsonl").read_text().splitlines()
    assert len(set(rows)) == len(rows)


def test_analyses_and_plots_at_once(looked):
    """They replace whole files: the last one wins, all end well, nothing is left behind."""
    words = [[*ANALYZE, "behavior", "--ckpt", "ft.pt"]] * 2 + [["plot.py", "."]] * 2
    names = set(looked.hashes())
    for process in [looked.start(*some) for some in words]:
        assert looked.end(process).code == 0
    assert not [name for name in set(looked.hashes()) - names
                if not name.startswith(("figures/", "report"))]


def test_a_killed_run_by_force_is_resumed_over_what_it_was_to_replace(copy):  # noqa: F811
    """Checkpoints on the way of the older run, and a history that the power loss has eaten."""
    assert copy.run(*FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt", "--keep", "5").code == 0
    words = ["finetune.py", *LONG, "--ckpt", "pre.pt", "--out", "x.pt", "--keep", "5,3999"]
    process = copy.start(*words, "--lr", "1e-4", "--force")
    copy.wait(process, lambda: read_checkpoint(copy.path / "x.pt")["steps"] == 4000)
    process.kill()
    copy.end(process)
    (copy.path / "x.jsonl").write_bytes(bytes(4096))
    process = copy.start(*words, "--lr", "1e-4", "--resume")
    copy.wait(process, lambda: read_checkpoint(copy.path / "x.pt")["step"] > 6)
    process.terminate()
    assert copy.end(process).code == 143
    assert read_checkpoint(copy.path / "x.step5.pt")["args"]["lr"] == 1e-4


def test_a_disk_without_locks(copy, monkeypatch):  # noqa: F811
    """A network disk may know none, and a folder may not be writable: no lock, no error."""
    for number in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
        with monkeypatch.context() as patch:
            patch.setattr(data.fcntl, "lockf", raising(OSError(number, "no locks")))
            data.claim(str(copy.path / "x.pt"))()
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", raising(PermissionError(errno.EACCES, "read-only")))
        data.claim(str(copy.path / "x.pt"))()
    assert not list(copy.path.glob("*.lock"))


def raising(error):
    """A function that raises an error, whatever it is given."""
    def function(*args, **kw):
        raise error
    return function


# ---------------------------------------------------------------- 5 paths


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 600 stories, and models of it: pre.pt, ft.pt. Not to be written to."""
    folder, dice = Folder(tmp_path_factory.mktemp("text")), random.Random(0)  # noqa: F811
    records = [data.write_story(data.random_features(dice), dice) for _ in range(600)]
    lines = "".join(f"{data.record_text(record)}\n{data.END}\n" for record in records)
    (folder.path / "s.txt").write_text(lines)
    for words in (["pretrain.py", "--setup", "stories", "--data", "s.txt", "--out", "pre.pt"],
                  ["finetune.py", "--ckpt", "pre.pt", "--out", "ft.pt"]):
        result = folder.run(*words, "--steps", "2", *TINY)
        assert result.code == 0 and not result.err, result.raw
    return folder.path


@pytest.fixture
def stories(text, folder):  # noqa: F811
    shutil.copytree(text / "s.txt.unwrap", folder.path / "s.txt.unwrap")
    return put_all(text, folder)


def test_the_same_file_by_another_path_is_the_same_run(stories):
    """Absolute, through .. and a link, renamed: content decides. Another content is another run."""
    os.symlink("s.txt", stories.path / "link.txt")
    shutil.copy2(stories.path / "s.txt", stories.path / "renamed.txt")
    words = ["pretrain.py", "--setup", "stories", "--steps", "2", *TINY, "--out", "pre.pt", "--data"]
    for path in (stories.path / "s.txt", f"../{stories.path.name}/s.txt", "link.txt", "renamed.txt"):
        result = stories.run(*words, path)
        assert result.code == 0 and "already done" in result.out, result.raw
    content = (stories.path / "s.txt").read_text()
    half = len(content) // 2
    for other in (content.replace("Once", "Twice"), content[:half] + content[half:].replace("a", "o", 1)):
        (stories.path / "other.txt").write_text(other)
        mistake(stories.run(*words, "other.txt"), "pre.pt is another run", "source")


def test_a_large_file_is_another_if_its_middle_is(stories):
    """Equal in size, and in their first and last MB; a checkpoint of last month knows these alone."""
    content = (stories.path / "s.txt").read_text() * 10
    half = len(content) // 2
    assert half > 1.2e6
    for name, text in (("big", content), ("odd", content[:half] + content[half:].replace("a", "o", 1))):
        (stories.path / f"{name}.txt").write_text(text)
    words = ["pretrain.py", "--setup", "stories", "--steps", "1", *TINY, "--out", "big.pt", "--data"]
    assert stories.run(*words, "big.txt").code == 0
    mistake(stories.run(*words, "odd.txt"), "big.pt is another run", "source")
    more = ["finetune.py", "--ckpt", "big.pt", "--steps", "1", *TINY, "--out", "y.pt", "--data", "odd.txt"]
    mistake(stories.run(*more), "odd.txt", "not the file")
    ckpt = read_checkpoint(stories.path / "big.pt")
    del ckpt["args"]["source"]["whole"]
    torch.save(ckpt, stories.path / "big.pt")
    assert "already done" in stories.run(*words, "big.txt").out


def test_a_file_that_has_moved(stories):
    """From another folder it is found beside the checkpoint; elsewhere --data names it."""
    elsewhere = stories.path / "else where"
    words = ["analyze.py", "behavior", "--eval-size", "4", "--threads", "1", "--ckpt", "../ft.pt"]
    elsewhere.mkdir()
    other = Folder(elsewhere)
    (elsewhere / "s.txt").write_text("another file of this name")
    result = other.run(*words)
    assert result.code == 0 and not (elsewhere / "s.txt.unwrap").exists(), result.raw
    (elsewhere / "s.txt").unlink()
    (stories.path / "s.txt").rename(elsewhere / "moved.txt")
    shutil.rmtree(stories.path / "s.txt.unwrap")
    mistake(other.run(*words), "s.txt", "--data")
    for stage in (words, ["finetune.py", "--ckpt", "../pre.pt", "--out", "again.pt", "--steps", "2", *TINY]):
        result = other.run(*stage, "--data", "moved.txt")
        assert result.code == 0 and not result.err, result.raw
    (elsewhere / "wrong.txt").write_text((elsewhere / "moved.txt").read_text() * 2)
    mistake(other.run(*words, "--data", "wrong.txt"), "wrong.txt", "not the")
    mistake(other.run("finetune.py", "--ckpt", "../pre.pt", "--out", "b.pt", "--data", "wrong.txt"), "not the")


def test_a_folder_that_was_copied_with_its_data(stories):
    """From anywhere, by the recorded relative path seen from the checkpoint; or the shards alone."""
    (stories.path / "data").mkdir()
    (stories.path / "s.txt").rename(stories.path / "data/s.txt")
    shutil.rmtree(stories.path / "s.txt.unwrap")
    words = ["pretrain.py", "--setup", "stories", "--data", "data/s.txt", "--out", "rel.pt", "--steps", "2", *TINY]
    assert stories.run(*words).code == 0
    other, words = stories.path / "other", ["analyze.py", "generate", "--eval-size", "4", "-n", "1", "--ckpt", "../rel.pt"]
    other.mkdir()
    assert Folder(other).run(*words).code == 0
    (stories.path / "data/s.txt").unlink()
    shutil.rmtree(other / "log")
    assert Folder(other).run(*words).code == 0
    shutil.rmtree(stories.path / "data")
    shutil.rmtree(other / "log")
    mistake(Folder(other).run(*words), "data/s.txt", "--data")


def test_out_through_a_link(folder):  # noqa: F811
    """The file behind it is written, the link stays."""
    (folder.path / "big").mkdir()
    os.symlink("big/x.pt", folder.path / "x.pt")
    assert folder.run(*PRETRAIN, "--out", "x.pt").code == 0
    assert (folder.path / "x.pt").is_symlink() and load(folder.path / "big/x.pt")[1]["finished"]


def test_data_is_for_stories(copy):  # noqa: F811
    mistake(copy.run("analyze.py", "behavior", "--ckpt", "ft.pt", "--data", "x.txt"), "--data", "stories")


def test_a_recorded_command_can_be_pasted(folder):  # noqa: F811
    """With spaces and quotes in it: what the record says, run by a shell, is the same run."""
    odd = "it's a \"run\" & more.pt"
    assert folder.run(*PRETRAIN, "--out", odd).code == 0
    command = json.loads((folder.path / odd.replace(".pt", ".json")).read_text())["command"]
    assert shlex.split(command) == ["python", *PRETRAIN, "--out", odd]
    name, rest = shlex.split(command)[1], command.split(" ", 2)[2]
    line = f"{sys.executable} {ROOT}/{name} {rest}"
    again = subprocess.run(line, shell=True, cwd=folder.path, capture_output=True, text=True)
    assert again.returncode == 0 and "already done" in again.stdout, again.stderr


def test_home_and_empty_paths(folder):  # noqa: F811
    """--out=~/x.pt, which no shell expands; --out "$UNSET"."""
    words = [*PRETRAIN[:-6], "--steps", "2", *TINY]
    (folder.path / "home/log").mkdir(parents=True)
    result = folder.run(*words, "--out=~/x.pt", variables={"HOME": str(folder.path / "home")})
    assert result.code == 0 and (folder.path / "home/x.pt").exists(), result.raw
    assert not (folder.path / "~").exists()
    for words in (["pretrain.py", "--out", ""], ["finetune.py", "--ckpt", ""], ["analyze.py", "--ckpt", ""],
                  ["pretrain.py", "--setup", "stories", "--data", ""]):
        result = folder.run(*words)
        assert result.code == 2 and "is empty" in result.err[-1] and not (folder.path / "out").exists()


# ---------------------------------------------------------------- 6 text


RECORD = "Features: Twist\nWords: oak, run\nStory: \n\nTim saw an oak. It was a cake.\n" + data.END + "\n"


@pytest.mark.parametrize("change", [
    lambda text: b"\xef\xbb\xbf" + text,                       # a byte order mark
    lambda text: text.replace(b"\n", b"\r\n"),                 # from Windows
    lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"),
    lambda text: b"\n\n" + text.rstrip(b"\n")])                # blank lines, no newline at the end
def test_text_as_editors_write_it(tmp_path, change):
    path = tmp_path / "s.txt"
    path.write_bytes(change((RECORD * 3).encode()))
    assert data.prepare(str(path))["records"] == 3
    source = data.StoryFile(str(path))
    record = next(data.parse_records(RECORD.splitlines(True), collections.Counter()))
    plain = data.encode_record(record, source.tokenizer)
    for i in range(3):
        record = source.record(i)
        assert record.ids.tolist() == plain.ids.tolist() and record[1:] == plain[1:]
        assert record.features == {"Twist"}


def test_an_instruction_that_does_not_fit(stories):
    """
    Left out and counted where a story is to be written, cut elsewhere; all stages and analyses end
    well.
    """
    long = " ".join(["extraordinarily"] * 60) + "\n"
    lines = (stories.path / "s.txt").read_text().split(data.END + "\n")
    lines = [f"Words: {long}{line.strip()}\n" if i % 3 == 0 else line for i, line in enumerate(lines[:-1])]
    (stories.path / "long.txt").write_text("".join(line + data.END + "\n" for line in lines))
    for words in (["pretrain.py", "--setup", "stories", "--data", "long.txt", "--out", "a.pt"],
                  ["finetune.py", "--ckpt", "a.pt", "--out", "b.pt"]):
        result = stories.run(*words, "--steps", "2", *TINY)
        assert result.code == 0 and not result.err, result.raw
    words = ["--eval-size", "4", "--steps", "2", "--threads", "1", "--ckpt", "b.pt"]
    for names in (["behavior"], ["generate", "-n", "5"]):
        result = stories.run("analyze.py", *names, *words)
        assert result.code == 0 and not result.err, result.raw
        assert "instructions of more than 88 tokens left out" in result.out


def test_a_console_of_another_encoding(stories):
    """Letters that it lacks are printed as marks."""
    content = (stories.path / "s.txt").read_text().replace(" found", " fo\xfcnd \u2603")
    (stories.path / "odd.txt").write_text(content)
    words = ["--setup", "stories", "--data", "odd.txt", "--steps", "2", *TINY, "--out", "\xf6.pt"]
    for encoding, line in (
            ("ascii", ["pretrain.py", *words]), ("cp1252", ["plot.py", "."]), ("ascii", ["plot.py", "."]),
            ("cp1252", ["analyze.py", "generate", "--eval-size", "4", "-n", "9", "--ckpt", "\xf6.pt"]),
            ("ascii", ["finetune.py", "--ckpt", "n\xf6.pt"])):
        result = script(*line, cwd=stories.path, PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C",
                        PYTHONCOERCECLOCALE="0")
        code = 2 if line[-1] == "n\xf6.pt" else 0
        assert result.returncode == code and len(result.stderr.splitlines()) == code // 2, result.stderr


# ---------------------------------------------------------------- 7 platforms


def elsewhere(words, folder, log, error, closed):  # noqa: F811
    """A script in a process without fcntl, and so on: see test_the_main_job_elsewhere()."""
    for name in ("data", "model", "pretrain", "finetune", "analyze", "plot"):
        sys.modules.pop(name, None)
    sys.modules["fcntl"] = sys.modules["resource"] = None
    for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGCHLD", "SIGPIPE"):
        delattr(signal, name)
    sync, opened = os.fsync, os.open

    def fsync(handle):
        if closed == "files" or os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(error, "refused")
        sync(handle)

    def open_folder(path, *args, **kw):
        if closed == "folders" and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "refused", path)
        return opened(path, *args, **kw)
    os.fsync, os.open = fsync, open_folder
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252")
    run_forked(words[0], words[1:], folder, log)


@pytest.mark.parametrize("error, closed", [(errno.EINVAL, ""), (errno.EPERM, "folders"),
                                           (errno.EINVAL, "files")])
def test_the_main_job_elsewhere(folder, error, closed):  # noqa: F811
    """
    Simulated: no fcntl, no signals but two, folders that are not synced or not opened, a console of
    another encoding. All scripts, a run that is done, and checkpoints on the way.
    """
    few = ["--steps", "4", *TINY]
    for words in (["data.py"], ["pretrain.py", *few], ["pretrain.py", *few],
                  ["finetune.py", *few, "--keep", "2", "--save-every", "1"],
                  [*ANALYZE, "behavior", "attention"], ["plot.py"],
                  ["pretrain.py", "--setup", "tracr-count", "--out", "out/t.pt", "--eval-size", "8"],
                  ["pretrain.py", "--setup", "stories", "--out", "out/s.pt", *few]):
        folder.number += 1
        log = str(folder.path / "log" / str(folder.number))
        process = FORKS.Process(target=elsewhere, args=(words, folder.path, log, error, closed))
        process.start()
        process.log = log
        result = folder.end(process)
        assert result.code == 0 and not result.err, result.raw
    assert not list(folder.path.rglob("*.lock")) + list(folder.path.rglob("*.part"))
    assert load(folder.path / "out/ft.step2.pt")[1]["step"] == 2


def test_no_float64_on_a_device():
    """mps has none: numbers go to the CPU first."""
    for name in ("model", "pretrain", "finetune", "analyze"):
        code = Path(ROOT, f"{name}.py").read_text()
        assert code.count(".double()") == code.count(".cpu().double()") and "torch.float64" not in code


def test_a_gpu_that_does_not_work(monkeypatch, capsys):
    """cuda is there, but the first kernel fails: auto takes the CPU and says so, cuda is refused."""
    def ones(*args, device, **kw):
        if "cuda" in str(device):
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
        return one(*args, device=device, **kw)
    one = torch.ones
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", raising(AssertionError))
    device = pretrain.start_device(Namespace(device="auto", threads=0))
    assert device.type == "cpu" and "no kernel image" in capsys.readouterr().out
    for name in ("cuda", "cuda:1", "cuda:99", "tpu", "meta", "", "cpu:x"):
        with pytest.raises(UserError, match="not available"):
            pretrain.start_device(Namespace(device=name, threads=0))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_compile_without_a_compiler(copy, stage):  # noqa: F811
    """One line that names the flag; what was saved stays."""
    words = [f"{stage}.py", "--compile", "--steps", "3", *TINY, "--out", "x.pt"]
    words += ["--ckpt", "pre.pt"] * (stage == "finetune")
    result = script(*words, cwd=copy.path, CXX="/no/such/compiler", PATH="/no/such",
                    TORCHINDUCTOR_CACHE_DIR=str(copy.path / "cache"))
    lines = [line for line in result.stderr.decode().splitlines() if "%|" not in line and line]
    assert result.returncode == 1 and len(lines) == 1 and "--compile does not work here" in lines[0], lines


@pytest.mark.parametrize("words", [
    [*PRETRAIN, "--batch-size", "4000000000"], [*PRETRAIN, "--eval-size", "4000000000000"],
    [*FINETUNE, "--ckpt", "pre.pt", "--batch-size", "2000000000000"]])
def test_out_of_memory(copy, words):  # noqa: F811
    """One line that names the flags to change; exit code 1; nothing else is lost."""
    before = copy.hashes()
    limited = (f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
               f"sys.path.insert(0, {ROOT!r}); sys.argv = sys.argv[1:]; "
               f"runpy.run_path({ROOT!r} + '/' + sys.argv[0], run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", limited, *words, "--out", "x.pt"], cwd=copy.path,
                            capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert "out of memory" in line and "--batch-size" in line and "--eval-size" in line
    assert copy.hashes().items() >= before.items()


@pytest.mark.parametrize("variables, says", [({"RANK": "1"}, None), ({"RANK": "x"}, None),
                                             ({"WORLD_SIZE": "", "RANK": "0"}, "torchrun"),
                                             ({"WORLD_SIZE": "2", "RANK": "0"}, "torchrun"),
                                             ({"WORLD_SIZE": "2", "RANK": "x"}, "torchrun")])
def test_variables_that_torchrun_did_not_set(folder, variables, says):  # noqa: F811
    """As a cluster's scheduler leaves them: one process, or one line."""
    result = folder.run("pretrain.py", "--steps", "2", *TINY, "--out", "x.pt", variables=variables)
    if says:
        mistake(result, says)
    assert says or result.code == 0 and (folder.path / "x.pt").exists(), result.raw


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(copy, closed):  # noqa: F811
    """As a daemon is started."""
    words = shlex.join([sys.executable, os.path.join(ROOT, "finetune.py"), *FINETUNE[1:], "--ckpt", "pre.pt"])
    done = subprocess.run(f"{words} --out x.pt {closed}", shell=True, cwd=copy.path)  # noqa: F811
    assert done.returncode == 0 and load(copy.path / "x.pt")


def test_threads_and_devices_that_nobody_has(copy):  # noqa: F811
    for words in (["--threads", "99999999999"], ["--threads", "100000"], ["--device", "hpu"],
                  ["--device", "privateuseone"], ["--device", "xla:0"]):
        result = copy.run("finetune.py", "--ckpt", "pre.pt", "--out", "x.pt", *words)
        mistake(result, *words)


def test_a_mistake_of_the_code_is_not_called_out_of_memory():
    """Messages that speak of memory otherwise keep their traceback; so do errors of no file."""
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"),
                  RuntimeError("more than one element of the written-to tensor refers to a single memory location"),
                  ConnectionRefusedError(errno.ECONNREFUSED, "refused")):
        with pytest.raises(type(error)):
            data.outcome(raising(error))
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried")):
        assert data.outcome(raising(error))[0] == 1


# ---------------------------------------------------------------- 8 a session that lives on


def in_session(script, *words):  # noqa: F811
    """What %run of a notebook does: the script in this very process. Returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as error:
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    return error.value.code


def test_a_session_after_an_interrupt(tmp_path, monkeypatch, capsys):
    """The next run goes on as if nothing had been, Ctrl-C is the session's own again."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    words = [*PRETRAIN[1:], "--steps", "2000", "--out", "x.pt"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
        timer.start()
        assert in_session("pretrain.py", *words, "--resume") == code
        timer.join()
        assert {n: signal.getsignal(n) for n in before} == before and not data.signals
        assert not list(tmp_path.glob("*.lock"))
    assert in_session("pretrain.py", *PRETRAIN[1:], "--out", "y.pt") == 0
    assert in_session("finetune.py", *FINETUNE[1:], "--ckpt", "x.pt") == 2  # unfinished
    assert in_session("finetune.py", *FINETUNE[1:], "--ckpt", "y.pt") == 0
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_second_interrupt_leaves_the_session():
    """It ends the script at once, and nothing else."""
    def deaf():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as error:
        data.run_script(deaf)
    assert error.value.code == 130 and signal.getsignal(signal.SIGINT) == before and not data.signals


def test_a_signal_that_is_ignored_stays_so():
    """By nohup, or a shell's &."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as error:
            data.run_script(lambda: os.kill(os.getpid(), signal.SIGINT))
        assert error.value.code == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_may_run_a_script():
    """Where no handler can be installed, none is."""
    codes = []

    def run():
        try:
            data.run_script(lambda: None)
        except SystemExit as end:
            codes.append(end.code)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0]


def test_pieces_work_twice_in_one_process(tmp_path, monkeypatch):
    """Stages by main(words), analyses by open_study(words): no handlers, the same numbers."""
    monkeypatch.chdir(tmp_path)
    before, few = signal.getsignal(signal.SIGINT), ["--steps", "4", *TINY]
    for name in ("one", "two"):
        pretrain.main([*few, "--out", f"{name}.pt"])
        finetune.main([*few, "--ckpt", f"{name}.pt", "--out", f"{name}-ft.pt"])
        study = analyze.open_study([*ANALYZE[1:], "--ckpt", f"{name}-ft.pt"])
        rows = [analyze.behavior(study), analyze.probe(study)]
        if name == "one":
            first = rows
        command = json.loads((tmp_path / f"{name}-ft.json").read_text())["command"]
        assert command == shlex.join(["python", "finetune.py", *few, "--ckpt", f"{name}.pt", "--out",
                                      f"{name}-ft.pt"])
    assert str(rows) == str(first) and signal.getsignal(signal.SIGINT) == before
    with pytest.raises(UserError, match="under way|already|another run"):
        pretrain.main([*few, "--out", "one.pt", "--lr", "1"])


def test_the_notebook_of_the_readme(looked, monkeypatch, capsys):
    """Its very lines, twice in this process; at most ten."""
    blocks = re.findall(r"```python\n(.*?)```", Path(ROOT, "README.md").read_text(), re.S)
    notebook, lens = blocks
    assert len(notebook.splitlines()) <= 10 and len(lens.splitlines()) == 3
    monkeypatch.chdir(looked.path)
    os.mkdir("out")
    for name in ("pre", "ft"):
        shutil.copy(f"{name}.pt", "out")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(2):
        names = {}
        exec(notebook, names)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[0] == out[2] and "accuracy" in out[0]
    assert all(.2 < float(line[7:-1]) <= 1 for line in out[1::2])  # of a solver, of hardly trained weights
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    made = []

    class HookedTransformer:
        def __init__(self, config):
            made.append(config)

        def load_state_dict(self, state, strict):
            made.append(state)
    exec(lens, {**names, "HookedTransformer": HookedTransformer})
    assert made[0]["n_layers"] == 3 and "blocks.2.mlp.W_out" in made[1]


# ---------------------------------------------------------------- 9 other people's checkpoints


@pytest.mark.parametrize("value", [np.float64(.1), np.int64(3), {1, 2}, Namespace(a=1), 1j, b"bytes",
                                   [np.float32(1)], {"a": {"b": np.bool_(True)}}, torch.float32,
                                   data.Relation("count", "a", "b", 1), collections.defaultdict(int)])
def test_what_cannot_be_loaded_is_not_saved(done, tmp_path, value):  # noqa: F811
    """The key is named, and the file that is there stays."""
    ckpt = read_checkpoint(done / "pre.pt")
    path = tmp_path / "x.pt"
    model_py.save(path, ckpt)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"\['args'\]\['mine'\]"):
        model_py.save(path, {**ckpt, "args": {**ckpt["args"], "mine": value}})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.pt"]


def test_what_load_gives_is_not_saved_without_a_word(done, tmp_path):  # noqa: F811
    """It has two keys more; the message names them."""
    _, ckpt = load(done / "pre.pt")
    with pytest.raises(UserError, match="sha256"):
        model_py.save(tmp_path / "x.pt", ckpt)
    with pytest.raises(UserError, match=r"\['args'\]\['mine'\]"):
        ckpt = read_checkpoint(done / "pre.pt")
        model_py.save(tmp_path / "x.pt", {**ckpt, "args": {"mine": torch.ones(2)}})


def test_a_copied_script_with_numpy_in_its_arguments(copy):  # noqa: F811
    """Ends in one line at its first save, before any training."""
    code = Path(ROOT, "finetune.py").read_text().replace(
        "    setup.resolve(args, parent)", "    args.lr = __import__('numpy').float64(1e-5)\n    setup.resolve(args, parent)")
    (copy.path / "mine.py").write_text(code)
    result = subprocess.run([sys.executable, "mine.py", *FINETUNE[1:], "--ckpt", "pre.pt", "--out", "x.pt"],
                            cwd=copy.path, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert result.returncode == 2 and "['args']['lr']" in result.stderr and "Traceback" not in result.stderr
    assert not (copy.path / "x.pt").exists()


def test_a_copied_script_says_its_own_name(copy):  # noqa: F811
    shutil.copy(os.path.join(ROOT, "finetune.py"), copy.path / "mine.py")
    words = [*FINETUNE[1:], "--ckpt", "pre.pt", "--out", "x.pt"]
    subprocess.run([sys.executable, "mine.py", *words], cwd=copy.path, env={**os.environ, "PYTHONPATH": ROOT},
                   check=True, capture_output=True)
    assert json.loads((copy.path / "x.json").read_text())["command"] == shlex.join(["python", "mine.py", *words])


@pytest.mark.parametrize("name, gone", [("pre", ["keep"]), ("pre", ["compile", "jailbreak", "keep"]),
                                        ("ft", ["mix", "relabel", "answers", "only"]), ("ft", ["keep", "clip"])])
def test_a_checkpoint_from_before_there_was_a_flag(copy, name, gone):  # noqa: F811
    """The same command is the same run: done if it was finished, resumed if not; analyses take it."""
    words = {"pre": PRETRAIN, "ft": [*FINETUNE, "--ckpt", "pre.pt"]}[name]
    path, record = copy.path / f"{name}.pt", copy.path / f"{name}.json"
    ckpt, about = read_checkpoint(path), json.loads(record.read_text())
    for key in gone:
        ckpt["args"].pop(key, None)
        about["args"].pop(key, None)
    about.pop("sha256")
    torch.save(ckpt, path)
    record.write_text(json.dumps(about))
    result = copy.run(*words, "--out", path.name)
    assert result.code == 0 and "already done" in result.out, result.raw
    if name == "ft":
        assert copy.run(*ANALYZE, "behavior", "--ckpt", "ft.pt").code == 0
        other = {"mix": ["--mix", ".5"], "clip": ["--clip", "2"]}
        for key in set(gone) & set(other):
            mistake(copy.run(*words, *other[key], "--out", path.name), key)
    old = read_checkpoint(copy.path / "log" / path.name)
    torch.save({**old, "args": ckpt["args"], "step": 0 if name == "ft" else 30}, path)
    (copy.path / f"{name}.jsonl").unlink()
    record.write_text(json.dumps({**about, "device": "cuda:0", "command": "the first one"}))
    mistake(copy.run(*words, "--out", path.name, "--resume"), "begun on cuda:0")
    record.write_text(json.dumps({**about, "command": "the first one"}))
    assert copy.run(*words, "--out", path.name, "--resume").code == 0
    now = json.loads(record.read_text())
    assert now["command"] == "the first one" and len(now["resumes"]) == 1


def test_older_runs_trained_in_float32(copy):  # noqa: F811
    """There was no --dtype: what it means by itself today may be another number."""
    ckpt = read_checkpoint(copy.path / "pre.pt")
    del ckpt["args"]["dtype"]
    torch.save(ckpt, copy.path / "pre.pt")
    assert copy.run(*PRETRAIN, "--dtype", "float32", "--out", "pre.pt").code == 0
    mistake(copy.run(*PRETRAIN, "--dtype", "bfloat16", "--out", "pre.pt"), "dtype", "float32")


# ---------------------------------------------------------------- 10 logs


@pytest.mark.parametrize("words", [[*PRETRAIN, "--out", "x.pt"], [*FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt"]])
def test_a_log_has_a_line_an_evaluation_and_no_bar(copy, words):  # noqa: F811
    result = copy.run(*words)
    assert result.code == 0 and result.raw == "" and "\r" not in result.out
    steps = re.findall(r"^step (\d+) of \d+(?:  loss [\d.]+)?(?:  \w+ [\d.]+%)+$", result.out, re.M)
    rows = [json.loads(line)["step"] for line in (copy.path / "x.jsonl").read_text().splitlines()]
    assert list(map(int, steps)) == sorted(set(rows)) and len(steps) >= 4


def test_a_log_grows_while_the_run_goes_on(copy):  # noqa: F811
    """Lines do not wait in a buffer."""
    process = copy.start("finetune.py", *LONG, "--ckpt", "pre.pt", "--out", "x.pt")
    log = Path(process.log + ".out")
    copy.wait(process, lambda: log.exists() and "step 0 of" in log.read_text())
    process.terminate()
    assert copy.end(process).code == 143


def test_other_logs_have_no_bars_either(stories):
    shutil.copy(stories.path / "s.txt", stories.path / "again.txt")  # to be prepared
    for words in (["analyze.py", "behavior", "--eval-size", "4", "--threads", "1", "--ckpt", "ft.pt"],
                  ["pretrain.py", "--setup", "stories", "--data", "again.txt", "--steps", "2", *TINY,
                   "--out", "new.pt"]):
        result = stories.run(*words)
        assert result.code == 0 and result.raw == "", result.raw


# ---------------------------------------------------------------- kept on the way


def test_kept_checkpoints(copy):  # noqa: F811
    """
    --keep 5,10: as runs that ended there, for every analysis and figure; the run itself is the same
    bit for bit, also if it is killed between.
    """
    words = [*FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt", "--keep", "10,5"]
    assert copy.run(*words).code == 0
    assert equal(read_checkpoint(copy.path / "x.pt")["model"], read_checkpoint(copy.path / "ft.pt")["model"])
    kept = {step: load(copy.path / f"x.step{step}.pt")[1] for step in (5, 10)}
    assert [ckpt["step"] for ckpt in kept.values()] == [5, 10] and not kept[5]["optimizer"]
    assert not equal(kept[5]["model"], kept[10]["model"])
    for step in (5, 10):
        assert copy.run(*ANALYZE, "--ckpt", f"x.step{step}.pt").code == 0
        record = json.loads((copy.path / f"x.step{step}.json").read_text())
        assert record["step"] == step and record["sha256"] == sha256(copy.path / f"x.step{step}.pt")
        rows = (copy.path / f"x.step{step}.behavior.jsonl").read_text().splitlines()
        sums = [json.loads(row)["sum_of_rates"] for row in rows if "sum_of_rates" in row]
        rate = pretrain.cosine(1e-5, 20, final=.01)
        assert sums == [pytest.approx(sum(map(rate, range(step))))]
    assert copy.run("finetune.py", "--reverse", *FINETUNE[1:], "--ckpt", "x.step5.pt", "--out", "r.pt").code == 0
    groups = plot.having(plot.find_runs(str(copy.path)), "behavior")
    assert sorted(re.findall(r"kept at step\xa0\d+", g.label)[0] for g in groups) == [
        "kept at step\xa010", "kept at step\xa05"]
    (back,) = [run for run in plot.find_runs(str(copy.path)) if run.kind == "reFT"]
    assert back.parent.endswith("x.step5") and back.settings["finetune kept at step"] == 5


def test_kept_and_resumed(copy):  # noqa: F811
    words = [*FINETUNE, "--ckpt", "pre.pt", "--keep", "3,7,12", "--save-every", "4"]
    assert copy.run(*words, "--out", "whole.pt").code == 0
    process = copy.start(*words, "--out", "x.pt")
    copy.wait(process, lambda: (copy.path / "x.step7.pt").exists())
    process.kill()
    copy.end(process)
    assert copy.run(*words, "--out", "x.pt", "--resume").code == 0
    assert_same_run(copy.path / "x.pt", copy.path / "whole.pt")
    for step in (3, 7, 12):
        assert equal(read_checkpoint(copy.path / f"x.step{step}.pt"), read_checkpoint(copy.path / f"whole.step{step}.pt"))


@pytest.mark.parametrize("words, says", [
    (["--keep", "20"], ["--keep 20", "20 steps"]), (["--keep", "0"], ["--keep"]), (["--keep", "1,x"], ["--keep"]),
    (["--keep", ""], ["--keep"]), (["--keep", "5", "--out", "ft.pt"], ["ft.pt", "keep"]),
    (["--keep", "5", "--out", "x.pt", "--ckpt", "x.step5.pt"], ["x.step5.pt", "overwritten"])])
def test_mistakes_in_keeping(copy, words, says):  # noqa: F811
    shutil.copy(copy.path / "pre.pt", copy.path / "x.step5.pt")
    before = copy.hashes()
    result = copy.run(*FINETUNE, "--ckpt", "pre.pt", "--out", "y.pt", *words)
    assert result.code == 2 and all(word in result.err[-1] for word in says), result.raw
    assert copy.hashes() == before
