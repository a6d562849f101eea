"""plot.py: reader, groups, numbers, every figure from hand-written rows, the page, exit codes."""
import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest

import plot

plot.load_figures()
ROOT = Path(plot.__file__).resolve().parent
MODULES = "plot", "setups.tracr_figures", "setups.stories_figures"
FIGURES = [name for name, f in plot.FIGURES.items() if f.__module__ in MODULES]
ROW = {"scale": "small", "task": "count", "split": "c0", "accuracy": .5, "floor": .3,
       "cross_floor": .4, "n": 100, "loss": .2, "seed": 0}
PRE = {"prior": [.999, .001, 0], "pair": ["a", "b"], "lr": 2e-3, "seed": 0, "steps": 10}
FT = {**PRE, "task": "count", "c_tr": 1., "lr": 1e-5}
EVIDENCE = [dict(instrument="probing", question="is a <read>, block 2", measured=.91, unit="share",
                 control="untrained", control_measured=.5, margin=.1, holds=True),
            dict(instrument="reviving", question="steps", measured=50., unit="steps",
                 control="teach c", control_measured=None, margin=3, holds=None)]


def write(folder, name, args, rows=None, parent="pre", setup="pcfg", **record):
    """A raw run as the scripts leave it. rows: {kind: rows}; its sha256 is its name."""
    stage = "pretrain" if parent is None else "finetune"
    files, steps = dict(rows or {}), args["steps"]
    record = {"stage": stage, "setup": setup, "scale": "small", "args": args, "step": steps,
              "steps": steps, "finished": True, "sha256": name, "history": files.pop("history", []),
              "parent": parent and {"path": f"{parent}.pt", "sha256": parent},
              "starts": [{"command": f"python {stage}.py", "commit": "0123", "torch": "2",
                          "device": "cpu", "seconds": 1.}], **record}
    Path(folder, f"{name}.json").write_text(json.dumps(record))
    for kind, lines in files.items():
        lines = [{"setup": setup, "checkpoint": name, **ROW, **line} for line in lines]
        Path(folder, f"{name}.{kind}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_verdict(folder, name):
    verdict = {"verdict": "wrapped", "text": "wrapped: O_PT is there.", "evidence": EVIDENCE,
               "checkpoint": name}
    Path(folder, f"{name}.verdict.json").write_text(json.dumps(verdict))


def grid(**columns):
    """A row for each combination of the values of columns."""
    return [dict(zip(columns, values)) for values in itertools.product(*columns.values())]


def analysed(setup="pcfg"):
    """Rows of every kind of analysis, and a history."""
    order = ["one-shot", "exhaustive" if setup == "tracr-count" else "iterative"]
    own = {"unit": "row", "pool": "all", "predicted": {"1": 60, "2": 40}}
    sweeps = grid(score=["gradient-weight"], order=order, control=[None, "never-trained"],
                  draw=[None], edit=["zero", "graft"], k=[0, 1, 10])
    sweeps += grid(score=["random"], order=order[:1], control=[None], draw=[0, 1],
                   edit=["zero", "graft"], k=[0, 1, 10])
    answers = grid(operand=["a", "b"], split=["c0", "c1", "natural"])
    arms = grid(arm=["reft", "teach-c"], lr=[1e-5], operand=["a"], split=["natural", "c0"])
    shares = dict.fromkeys([*plot.RULES, "share_none"], .2)
    return {
        "history": [{**ROW, "setup": setup, **x, "step": k} for x in answers for k in (0, 3, 10)],
        "behavior": [{**x, **shares, "model": m} for x in answers for m in ("base", "ckpt")],
        "prune": [{**answers[i], **own, **row, "chosen": row["k"] == 1} for i in (0, 4)
                  for row in sweeps],
        "probe": [{**row, "operand": row["target"]} for row in grid(
            model=["base", "ckpt"], block=[0, 1], target=["a", "b", "c"], prompt=["b"],
            labels=["true", "shuffled"], split=["natural"])],
        "attention": [{"model": "base", "region": "window" if setup == "pcfg" else "kept"}],
        "hidden": [{"model": "base", "block": 0}] if setup == "tracr-count" else [],
        "revive": [{**arm, "threshold": t, "steps": 10 if arm["arm"] == "reft" else None,
                    "max_steps": 60} for arm in arms for t in (.9, .99)],
        "revive.curve": [{**arm, "step": step} for arm in arms for step in (0, 10)],
        "relearn": grid(arm=["reft", "teach-c"], half=["taught", "held-out"], step=[0, 10])}


def write_maps(folder, name, setup):
    """Maps of one string of four tokens, 2 blocks of 1 head."""
    z = np.random.default_rng(0).random((2, 1, 2, 1, 4, 4))  # (model, string, block, head, y, x)
    about = {"tokens": np.arange(4)[None], "vocabulary": np.array(["a", "b", "c", "#5"]),
             "checkpoint": np.array([name])}
    if setup == "pcfg":
        models = {f"{m}_{o}": z[i][..., 0] for i, m in enumerate(("base", "ckpt")) for o in "ab"}
    else:
        models = {"base": z[0], "ckpt": z[1]}
        hidden = {"base": z[0, :, :, 0], "ckpt": z[1, :, :, 0]}
        np.savez(Path(folder, f"{name}.hidden.npz"), **hidden, **about)
    np.savez(Path(folder, f"{name}.attention.npz"), **models, **about)


def story_rows(share):
    """History and probes of a run of stories."""
    about = {"task": "story", "operand": "Twist", "parsed": .8}
    scored = grid(step=[0, 10], split=["asked", "unasked", "with", "without", "deletion"])
    history = [{"setup": "stories", **ROW, **about, **row, "accuracy": share} for row in scored]
    probe = [{**about, **row, "prompt": None, "auc": .6} for row in grid(
        model=["base", "ckpt", "control"], block=[0, 1], target=["Twist"], labels=["true"],
        split=["natural"])]
    return {"history": history, "probe": probe}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of three setups, few of each: drawing is slow."""
    folder = tmp_path_factory.mktemp("runs")
    write(folder, "pre", PRE, parent=None)
    for seed in (0, 1):
        write(folder, f"ft-{seed}", {**FT, "seed": seed}, analysed())
        write_maps(folder, f"ft-{seed}", "pcfg")
    write(folder, "only", {**FT, "only": "blocks.0.attn and more weights", "c_tr": .5},
          {"prune": analysed()["prune"]})
    write_verdict(folder, "ft-0")
    back = {**FT, "reverse": True, "c_tr": 0.}
    write(folder, "reft", back, {"history": analysed()["history"]}, parent="ft-0")
    compiled = analysed("tracr-count")
    compiled = {kind: compiled[kind] for kind in ("prune", "attention", "hidden")}
    write(folder, "t", FT, compiled, "t-pre", "tracr-count")
    write(folder, "t-reft", back, {}, "t", "tracr-count")
    for name in ("t", "t-reft"):
        write_maps(folder, name, "tracr-count")
    story = {"feature": "Twist", "without": None, "lr": 1.5e-4, "seed": 0, "steps": 10}
    write(folder, "s", {**story, "protocol": "filter"}, story_rows(.2), "s-pre", "stories")
    write(folder, "s-reft", {**story, "reverse": True, "lr": 1.2e-4}, story_rows(.7), "s", "stories")
    return folder


@pytest.fixture(scope="module")
def drawn(folder):
    """(what draw_all() returns, {name: Figure}); each figure is drawn once."""
    figures, add_legend, names = {}, plot.add_legend, iter(FIGURES)

    def remember(fig):
        return figures.setdefault(next(names), add_legend(fig))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "add_legend", remember)
        patch.setattr(sys.modules["setups.stories_figures"], "add_legend", remember)
        return plot.draw_all(plot.find_runs(str(folder)), str(folder), FIGURES), figures


def group_of(folder, kind):
    return plot.having(plot.find_runs(str(folder)), kind)[0]


def test_raw_runs_and_committed_ones_read_alike(folder, tmp_path):
    raw, maps = plot.find_runs(str(folder)), {}
    with gzip.open(tmp_path / "runs.jsonl.gz", "wt") as file:
        for run in raw:
            rows = {k: v for k, v in run.rows.items() if k not in ("history", "evidence")}
            file.write(json.dumps({"name": run.name, "record": run.record, "rows": rows,
                                   "verdict": run.verdict}) + "\n")
            maps.update({f"{run.name}/{k}": array for k, array in run.maps("attention").items()})
    np.savez(tmp_path / "attention.npz", **maps)
    committed = plot.find_runs(str(tmp_path))
    assert len(raw) == len(committed) == 9 and len(raw[0].maps("attention")) == 7
    for one, other in zip(raw, committed):
        assert (one.name, one.record, one.rows, one.verdict, one.settings) == (
            other.name, other.record, other.rows, other.verdict, other.settings)
        ours, theirs = one.maps("attention"), other.maps("attention")
        assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)


def test_what_was_measured_on_another_checkpoint_is_left_out(tmp_path, capsys):
    rows = {"behavior": [{"model": "base"}, {"model": "ckpt", "checkpoint": "older"}]}
    write(tmp_path, "ft", FT, rows)
    write_verdict(tmp_path, "ft")
    write_maps(tmp_path, "ft", "pcfg")
    write(tmp_path, "ft", FT, rows, sha256="newer")
    run, = plot.find_runs(str(tmp_path))
    assert run.rows["behavior"] == run.rows["evidence"] == [] and run.verdict is None
    assert run.maps("attention") == {}
    assert "ft.behavior: 0 of 2 rows are of this checkpoint" in capsys.readouterr().out


def test_a_parent_is_found_by_its_hash(folder):
    """Whatever its path; its arguments are settings, but for what the run's own repeat."""
    runs = {run.name: run for run in plot.find_runs(str(folder))}
    run, reft = runs["ft-0"], runs["reft"]
    assert run.parent.name == "pre" and reft.parent.name == "ft-0" and run.reversed.name == "reft"
    assert run.settings["pretrain lr"] == 2e-3 and "pretrain prior" not in run.settings
    assert reft.settings["finetune lr"] == 1e-5 and reft.settings["finetune c_tr"] == 1
    assert (run.kind, reft.kind, run.parent.kind) == ("fine-tuning", "reFT", "pretrain")
    assert runs["s"].parent is None and "seed" not in run.settings


def test_a_kept_checkpoint_is_a_run_and_other_json_files_are_none(tmp_path):
    write(tmp_path, "ft", FT, {"behavior": [{"model": "base"}]})
    write(tmp_path, "ft.step5", FT, {"behavior": [{"model": "ckpt"}]}, step=5)
    write(tmp_path, "running", FT, finished=False)
    (tmp_path / "mine.json").write_text('["no record"]')
    last, kept = plot.find_runs(str(tmp_path))
    assert [row["model"] for row in last.rows["behavior"]] == ["base"]
    assert [row["model"] for row in kept.rows["behavior"]] == ["ckpt"]
    assert kept.settings["kept at step"] == 5 and "kept at step" not in last.settings


def test_groups_are_runs_that_differ_in_the_seed(folder):
    found = plot.having(plot.find_runs(str(folder)), "history", setup="pcfg")
    assert [re.sub(r"\s", " ", group.label) for group in found] == [
        "fine-tuning, task count, prior low, C_Tr 1, lr 1e-5 (2 seeds, 1 pretrained)",
        "reFT, task count, prior low, C_Tr 0, lr 1e-5 (seed 0)"]
    assert found[0].roles == {"O_PT": "O_PT = a", "O_FT": "O_FT = b"}
    assert plot.having(plot.find_runs(str(folder)), "history", operand="x") == []
    found = plot.having(plot.find_runs(str(folder)), "prune")
    assert [re.sub(r"\s", " ", group.label) for group in found] == [
        "pcfg, C_Tr 0.5, only blocks.0.attn and more weights (seed 0)",
        "pcfg, C_Tr 1 (2 seeds, 1 pretrained)",
        "tracr-count, task count, prior low, C_Tr 1, lr 1e-5 (seed 0)"]


def test_a_spread_is_over_seeds_or_the_interval_of_one(tmp_path):
    """(.2 + .6) / 2 = 40 %; Wilson's interval of 8 of 10 by hand: .4902 to .9433."""
    for seed, share in enumerate((.2, .6)):
        rows = [{**ROW, "step": step, "operand": "a", "accuracy": share, "loss": share}
                for step in (0, 5)[:seed + 1]]
        write(tmp_path, f"ft-{seed}", {**FT, "seed": seed}, {"history": rows})
    group = group_of(tmp_path, "history")
    point = plot.spread(group, "history", role="O_PT")
    assert point[:3] == pytest.approx((40, 20, 60)) and point.values == pytest.approx([20, 60])
    assert plot.spread(group, "history", role="O_FT") is None
    assert list(plot.bands(group, "history", "step")) == [0]  # of step 5 a seed has no row
    assert plot.wilson(.8, 10) == pytest.approx((.4902, .9433), abs=1e-4)
    write(tmp_path, "ft-1", {**FT, "seed": 1})  # has no rows any more
    group = group_of(tmp_path, "history")
    assert plot.spread(group, "history")[:3] == pytest.approx((20, 13.34, 28.88), abs=.01)
    assert plot.spread(group, "history", "loss", 1)[:3] == pytest.approx((.2, .2, .2))
    group.runs[0].rows["history"][0]["parsed"] = .5  # of 100 stories 50 count
    bounds = [100 * bound for bound in plot.wilson(.2, 50)]
    assert plot.spread(group, "history")[1:3] == pytest.approx(bounds)


def test_a_band_spans_the_draws_of_random_units(tmp_path):
    rows = [dict(score="random", draw=draw, k=1, accuracy=.1 * draw) for draw in (1, 4)]
    write(tmp_path, "ft", FT, {"prune": rows})
    points = plot.bands(group_of(tmp_path, "prune"), "prune", "k")
    assert points[1][:3] == pytest.approx((25, 10, 40))


def test_every_figure_is_drawn_with_what_fools_it(folder, drawn):
    assert len(FIGURES) == 15 and set(drawn[0]) == set(FIGURES)
    for name, (png, caption) in drawn[0].items():
        assert png[1:4] == b"PNG" and "Fooled by: " in caption, name
        assert (folder / "figures" / f"{name}.png").read_bytes() == png


@pytest.mark.parametrize("name", FIGURES)
def test_legends_neither_clip_nor_cover_the_panels(drawn, name):
    fig = drawn[1][name]
    if not fig.legends:
        return
    with matplotlib.style.context(["default", plot.STYLE]):
        legend = fig.legends[0].get_window_extent()
        boxes = [ax.get_tightbbox() for ax in fig.axes]
    assert 0 <= legend.x0 and legend.x1 <= fig.bbox.width and 0 <= legend.y0
    for box in boxes:
        assert box.y0 >= legend.y1 - 1 and -1 <= box.x0 and box.x1 <= fig.bbox.width + 1
    assert all(text.get_text() for text in fig.legends[0].get_texts())


def test_pruning_shows_rings_floors_and_exhaustive_search_alone(drawn):
    lines = drawn[1]["fig7_prune"].axes[8].get_lines()  # of the compiled model, the last group
    rings = [line for line in lines if line.get_markerfacecolor() == "none"]
    assert {tuple(line.get_xydata()[0]) for line in rings} == {(1, 50)}
    ticks = [tick.get_text() for tick in drawn[1]["fig7_prune"].axes[8].get_xticklabels()]
    assert ticks == ["none", "1", "10"]
    heights = {line.get_label(): line.get_ydata()[0] for line in lines if line not in rings}
    search = "gradient-weight, exhaustive"
    assert heights == pytest.approx({search: 50, f"{search} (never-trained)": 50,
                                     "majority floor": 30, "cross floor": 40})


def test_symbols_have_their_subscripts(drawn):
    assert plot.tex("O_PT at C_Tr, 5 $") == r"$O_{\mathrm{PT}}$ at $C_{\mathrm{Tr}}$, 5 \$"
    assert plot.rich("O_FT < η_M") == "O<sub>FT</sub> &lt; η<sub>M</sub>"
    assert drawn[1]["fig7_prune"].axes[1].get_title() == r"zeroed: $O_{\mathrm{FT}}$ = b on c1"


def test_a_figure_is_one_function(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "FIGURES", {})

    @plot.figure("history", operand="a", step=0)
    def first_step(group, part):
        """Accuracy (%) at the first step. Fooled by: nothing."""
        cells = [{"operand": "a", "split": "c0"}]
        look = "base", plot.BLUE, "o", ""
        plot.lines(plot.panels(part, ["asked a"]), group, "history", cells, [(look, {})])
    runs = plot.find_runs(str(folder))
    _, caption = plot.draw_all(runs, str(tmp_path), plot.FIGURES)["first_step"]
    assert caption == "Accuracy (%) at the first step. Fooled by: nothing."


def test_the_page_begins_with_the_verdict(folder, drawn):
    page = plot.report(plot.find_runs(str(folder)), drawn[0])
    places = [page.index(text) for text in (
        "wrapped: O<sub>PT</sub> is there.<td>1<td>ft-0", "<h2>Its evidence", 'alt="evidence"',
        "operand of pretraining", 'alt="fig5_behavior"', "What made these files")]
    assert places == sorted(places)
    assert "<td>is a &lt;read&gt;, block 2<td>91.0%<td>yes<td>untrained<td>50.0%<td>0.1" in page
    assert "<td>steps<td>50<td>cannot be said<td>teach c<td>-<td>3" in page
    assert page.count("Wilson") == 1 and "n = 100 to 100 strings a point" in page
    assert "<script" not in page and not re.search(r'(src|href)=(?!"data:)', page)
    assert "<td>python finetune.py<td>0123" in page


@pytest.mark.parametrize("form, start", [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_folder_becomes_a_page_and_figures_in_a_format(tmp_path, form, start):
    """Text stays text; the page has a PNG."""
    write(tmp_path, "ft", FT)
    write_verdict(tmp_path, "ft")
    plot.main([str(tmp_path), "--format", form])
    assert os.listdir(tmp_path / "figures") == [f"evidence.{form}"]
    content = (tmp_path / "figures" / f"evidence.{form}").read_bytes()
    assert content.startswith(start) and (form == "pdf" or b">its control</text>" in content)
    assert '<img alt="evidence" src="data:image/png' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name, text, said", [
    (None, None, "no finished run"), ("ft.behavior.jsonl", '{"a": 1}\n{', "ft.behavior.jsonl"),
    ("ft.json", "{", "ft.json"), ("runs.jsonl.gz", "no gzip", "runs.jsonl.gz"),
    ("ft.prune.jsonl", '{"checkpoint": "ft", "k": 1}', "fig7_prune")])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, name, text, said):
    if name:
        write(tmp_path, "ft", FT)
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path if name else tmp_path / "nowhere")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_ctrl_c_ends_with_130(monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "find_runs", lambda folder: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path)])
    assert stop.value.code == 130


def test_a_notebook_keeps_its_own_plotting(tmp_path):
    """Importing and drawing import no torch and no pyplot, and leave matplotlib's settings."""
    write(tmp_path, "ft", FT)
    write_verdict(tmp_path, "ft")
    code = ("import matplotlib, sys; matplotlib.rcParams['font.size'] = 21\n"
            "before = matplotlib.rcParams.copy()\nimport plot; plot.load_figures()\n"
            "assert plot.draw_all(plot.find_runs('.'), '.', ['evidence'])\n"
            "assert matplotlib.rcParams.copy() == before\n"
            "assert not {'torch', 'data', 'matplotlib.pyplot'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, timeout=60,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
