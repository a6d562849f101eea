"""The figures of plot.py, from hand-written rows: what they select, and that each is drawn."""
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import matplotlib.text
import numpy as np
import pytest

import plot
from test_plot import history

ROOT = Path(plot.__file__).resolve().parent
ROW = {"scale": "small", "accuracy": None, "floor": None, "cross_floor": None, "n": 100,
       "loss": None, "seed": 0}
SHARES = {"randomise": ((.7, .5, .1), (.1, .4, .7)),  # at steps 0, 10, 30 of deletion, of reFT
          "filter": ((.7, .7, .5), (.5, .6, .7))}


def write(folder, name, files, parent="pre", **args):
    """A run as the scripts leave it: files {kind of rows: rows}, "" the history."""
    args = {"lr": 1e-4, "reverse": False, "seed": 0, "steps": 30, **args}
    record = {"stage": "finetune", "args": args, "seconds": 1.,
              "parent": {"path": f"{folder}/{parent}.pt", "sha256": parent}}
    (folder / f"{name}.json").write_text(json.dumps(record))
    for kind, rows in files.items():
        lines = [json.dumps({**ROW, **row}) + "\n" for row in rows]
        (folder / f"{name}{kind}.jsonl").write_text("".join(lines))


def drawn(folder, name):
    """What a figure makes of the runs in a folder."""
    runs = plot.find_runs(str(folder))
    figure = plot.FIGURES[name]
    made = figure.function(plot.about(runs, figure.stories))
    if made:
        made[0].canvas.draw()
    return made


def texts(fig):
    """Labels, titles and legend of a figure."""
    return [text.get_text() for text in fig.findobj(matplotlib.text.Text) if text.get_text()]


# ---------------------------------------------------------------- the registry


def test_every_caption_says_what_fools_it():
    assert len(plot.FIGURES) == 18
    for name, (function, _) in plot.FIGURES.items():
        assert "Fooled by: " in function.__doc__ and name in vars(plot), name


def test_a_figure_from_outside(tmp_path):
    """One function with its decorator: drawn, written, and in the report with its caption."""
    write(tmp_path, "ft", {"": history_rows()}, c_tr=1., pair=["a", "b"])
    (tmp_path / "mine.py").write_text('''
import sys

import plot


@plot.figure("history")
def first_step(group):
    """
    Accuracy (%) at the first step. High: it could do that before.
    Fooled by: nothing.
    """
    cells = {f"asked {operand}": {"operand": operand, "step": 0} for operand in group.pair}
    look = "base", plot.BLUE, "o", ""
    return [plot.dots([plot.marks(look, group, "history", cells, split="c0")], cells)]


plot.main()
''')
    done = subprocess.run([sys.executable, "mine.py", "."], cwd=tmp_path, capture_output=True,
                          text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "figures/first_step.png").stat().st_size > 1000
    assert "High: it could do that before." in (tmp_path / "report.html").read_text()


def test_no_rows_no_figure(tmp_path):
    write(tmp_path, "ft", {"": []}, c_tr=1., pair=["a", "b"])
    for name in plot.FIGURES:
        assert drawn(tmp_path, name) is None, name


# ---------------------------------------------------------------- the grammar, compiled models


def history_rows(setup="pcfg", **more):
    rows = []
    for step in (0, 10):
        for operand in "ab":
            for split in plot.SPLITS:
                rows.append({"setup": setup, "task": "count", "operand": operand, "split": split,
                             "accuracy": .5, "floor": .3, "cross_floor": .4, "step": step, **more})
    return rows


def analysed_rows(setup="pcfg"):
    """A row of every kind that the analyses write."""
    base = {"setup": setup, "task": "count", "split": "c0", "accuracy": .5, "floor": .3,
            "cross_floor": .4}
    files = {kind: [] for kind in (".behavior", ".prune", ".probe", ".revive", ".revive.curve",
                                   ".attention", ".hidden", ".relearn")}
    for model in ("base", "ckpt"):
        for operand in "ab":
            for split in plot.SPLITS:
                shares = {key: .2 for key in (*plot.RULES, "share_none")}
                files[".behavior"].append({**base, "model": model, "operand": operand,
                                           "split": split, **shares})
        for block in (0, 1):
            for target in "abc":
                files[".probe"].append({**base, "model": model, "block": block, "operand": target,
                                        "target": target, "prompt": "b", "labels": "true",
                                        "split": "natural"})
        files[".attention"].append({**base, "model": model, "block": 0, "head": 0, "prompt": "a",
                                    "region": "window", "mass": .5, "chance": .4})
        files[".hidden"].append({**base, "model": model, "block": 0, "cosine": .9})
    for k in (0, 1, 10):
        for score, order, control, draw in (
                ("gradient-weight", "one-shot", None, None), ("random", "one-shot", None, 0),
                ("gradient-weight", "iterative", None, None), ("random", "one-shot", None, 1),
                ("gradient-weight", "exhaustive", None, None),
                ("gradient-weight", "iterative", "never-trained", None)):
            row = {**base, "unit": "row", "score": score, "order": order, "pool": "all",
                   "control": control, "edit": "zero", "k": k, "draw": draw, "chosen": k == 1,
                   "operand": "c" if control else "a", "predicted": {"1": 60, "2": 40}}
            files[".prune"] += [row, {**row, "operand": "b", "split": "c1"}]
    for arm, steps in (("reft", 10), ("teach-c", None)):
        for split in ("natural", "c0"):
            for threshold in (.9, .99):
                files[".revive"].append({**base, "arm": arm, "lr": 1e-4, "threshold": threshold,
                                         "steps": steps, "max_steps": 60, "split": split,
                                         "operand": "a"})
            for step in (0, 10):
                files[".revive.curve"].append({"arm": arm, "lr": 1e-4, "step": step,
                                               "split": split, "accuracy": .5})
        for half, answers in (("taught", "even"), ("held-out", "odd")):
            files[".relearn"] += [{**base, "arm": arm, "lr": 1e-5, "half": half, "step": step,
                                   "answers": answers, "operand": "a"} for step in (0, 100)]
    return files


def write_maps(folder, name, setup):
    """Maps of one string of four tokens, 2 blocks of 1 head."""
    tokens = {"tokens": np.arange(4)[None], "vocabulary": np.array(["a", "b", "c", "#5"])}
    maps = np.random.default_rng(0).random((2, 1, 2, 1, 4, 4))  # (model, string, block, head, y, x)
    if setup == "pcfg":
        keys = {f"{m}_{o}": maps[i][..., 0] for i, m in enumerate(("base", "ckpt")) for o in "ab"}
    else:
        keys = dict(zip(("base", "ckpt"), maps))
        np.savez(folder / f"{name}.hidden.npz", base=maps[0, :, :, 0], ckpt=maps[1, :, :, 0],
                 **tokens)
    np.savez(folder / f"{name}.attention.npz", **keys, **tokens)


@pytest.mark.parametrize("setup", ["pcfg", "tracr-count"])
def test_every_figure_of_answers_is_drawn(tmp_path, setup):
    """One seed, few strings, no control checkpoint."""
    for c_tr in (0., .5, 1.):
        write(tmp_path, f"ft{c_tr}", {"": history_rows(setup), **analysed_rows(setup)}, c_tr=c_tr,
              pair=["a", "b"], setup=setup)
        write_maps(tmp_path, f"ft{c_tr}", setup)
    compiled, claims = {"fig39_maps", "fig46_hidden"}, {"known_scores", "claim_effects", "evidence"}
    missing = claims | ({"fig10_attention"} if setup != "pcfg" else compiled)
    for name, (_, stories) in plot.FIGURES.items():
        if not stories:
            assert (drawn(tmp_path, name) is None) == (name in missing), name


def test_both_ends_of_c_tr_are_in_one_figure(tmp_path):
    for c_tr in (0., 1.):
        write(tmp_path, f"ft{c_tr}", analysed_rows("tracr-count"), c_tr=c_tr, pair=["a", "b"])
        write_maps(tmp_path, f"ft{c_tr}", "tracr-count")
    for name in ("fig39_maps", "fig46_hidden"):
        fig, rests = drawn(tmp_path, name)
        labels = " ".join(texts(fig))
        assert r"$C_{\mathrm{Tr}}$ 0" in labels.replace("\xa0", " ")
        assert r"$C_{\mathrm{Tr}}$ 1" in labels.replace("\xa0", " ")
        assert len(fig.axes) == 2 * 2 and "one string" in rests  # one block, before and after


def test_a_reversed_model_is_the_third_map(tmp_path):
    """Its parent is a run that is drawn."""
    write(tmp_path, "ft", analysed_rows("tracr-count"), c_tr=1., pair=["a", "b"])
    write(tmp_path, "back", analysed_rows("tracr-count"), "ft", reverse=True, pair=["a", "b"])
    for name in ("ft", "back"):
        write_maps(tmp_path, name, "tracr-count")
    for name in ("fig39_maps", "fig46_hidden"):
        fig, _ = drawn(tmp_path, name)
        titles = [ax.get_title().split(", ")[1] for ax in fig.axes]
        assert titles == ["base", "fine-tuned", "reversed"]


def test_what_is_left_out_is_said(tmp_path, capsys):
    for seed in range(6):  # rates
        for c_tr in (0., .5, 1.):
            write(tmp_path, f"ft{seed}{c_tr}", {"": history_rows("tracr-count")}, c_tr=c_tr,
                  lr=10. ** -seed, pair=["a", "b"])
    assert drawn(tmp_path, "table3") and drawn(tmp_path, "fig6_curves")
    notes = capsys.readouterr().out
    assert "table3: rates: only 4 of 6" in notes and "history: groups: only 16 of 18" in notes


def test_sweeps_are_selected_by_columns(tmp_path):
    """The most thorough order of each score, pool and control; random draws span a band."""
    files = analysed_rows()
    for row in files[".prune"]:
        if row["score"] == "random":
            row["accuracy"] = .2 + .4 * row["draw"]
    write(tmp_path, "ft", files, c_tr=1., pair=["a", "b"])
    group, = plot.having(plot.find_runs(str(tmp_path)), "prune")
    found = plot.sweeps(group, edit="zero", role=("O_PT", "other"), split="c0")
    assert [series.label for series in found] == [
        "gradient-weight, exhaustive", "random, one-shot",
        "gradient-weight, iterative (never-trained)"]
    assert [series.ls for series in found] == ["-", "-", "--"]
    assert [len(series.points) for series in found] == [3, 3, 3]
    assert found[1].points[1][:3] == pytest.approx((40, 20, 60))
    assert found[0].rings == [(1, 50.)] and found[0].floors["majority floor"][0] == 30
    files[".prune"] = [row for row in files[".prune"] if row["order"] != "exhaustive"]
    write(tmp_path, "ft", files, c_tr=1., pair=["a", "b"])
    group, = plot.having(plot.find_runs(str(tmp_path)), "prune")
    orders = [series.label for series in plot.sweeps(group, edit="zero", split="c0")]
    assert orders[:2] == ["gradient-weight, one-shot", "gradient-weight, iterative"]


def test_arms_keep_their_looks_and_what_was_not_reached_is_said(tmp_path):
    """Two groups with other arms: a look stands for one arm."""
    files = analysed_rows()
    write(tmp_path, "one", files, c_tr=1., pair=["a", "b"])
    for kind in files:
        files[kind] = [row for row in files[kind] if row.get("arm") != "reft"]
    write(tmp_path, "two", files, c_tr=0., pair=["a", "b"])
    fig, _ = drawn(tmp_path, "fig9_revive")
    colors = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            if hasattr(handle, "get_color"):
                colors.setdefault(label, set()).add(handle.get_color())
    assert len(colors["reFT, same rate"]) == len(colors["teach c, same rate"]) == 1
    assert colors["reFT, same rate"] != colors["teach c, same rate"]
    assert "not reached by then" in texts(fig)


def test_malformed_rows_cost_a_figure_and_no_more(tmp_path, capsys):
    files = analysed_rows()
    files[".prune"][8]["k"] = "a few"  # exhaustive
    write(tmp_path, "ft", {"": history_rows(), **files}, c_tr=1., pair=["a", "b"])
    runs = plot.find_runs(str(tmp_path))
    assert plot.attempt("fig7_prune", plot.FIGURES["fig7_prune"].function, runs) is None
    assert "fig7_prune: left out, not as expected" in capsys.readouterr().out
    assert drawn(tmp_path, "fig5_behavior") and drawn(tmp_path, "fig6_curves")


# ---------------------------------------------------------------- stories


def story_history(shares, deletion=True):
    about = {"setup": "stories", "task": "story", "operand": "Twist"}
    return [{**about, **row} for row in history(shares, deletion)]


@pytest.fixture
def folder(tmp_path):
    common = {"feature": "Twist", "without": None, "protocol": None, "data": None, "lr": 1.5e-4}
    for seed in (0, 1):
        for protocol, (deletion, back) in SHARES.items():
            name, own = f"{protocol}-{seed}", {**common, "protocol": protocol, "seed": seed}
            shares = [p + .1 * seed for p in deletion]
            write(tmp_path, name, {"": story_history(shares)}, f"pre-{seed}", **own)
            write(tmp_path, f"{name}-reft", {"": story_history(back)}, name,
                  **{**own, "lr": 4e-5, "reverse": True})
        write(tmp_path, f"control-{seed}", {"": story_history((0, .1, .2), False)},
              f"without-{seed}", **{**common, "lr": 4e-5, "reverse": True, "seed": seed,
                                    "without": "Twist"})
    return tmp_path


def test_a_control_is_told_from_a_reft(folder):
    groups = plot.story_groups(plot.find_runs(str(folder)), "history")
    assert [(g.kind, g.protocol, g.at, len(g.runs)) for g in groups] == [
        ("fine-tuning", "filter", "eta_M =\xa01.5e-4", 2),
        ("fine-tuning", "randomise", "eta_M =\xa01.5e-4", 2),
        ("reFT", "filter", "eta_M =\xa01.5e-4", 2), ("reFT", "randomise", "eta_M =\xa01.5e-4", 2),
        ("reFT", plot.CONTROL, "a rate not known", 2)]
    (deletion, back), = plot.story_panels(groups)
    assert [g.protocol for g in deletion[1]] == ["filter", "randomise"]
    assert [g.protocol for g in back[1]] == ["filter", "randomise", plot.CONTROL]
    assert back[0] == "reFT at eta_S =\xa04e-5, after deletion at eta_M =\xa01.5e-4"
    assert len({g.look[:3] for g in groups}) == 3  # a deletion and its reFT look alike


def test_a_new_protocol_has_a_look_of_its_own(folder):
    """No list of protocols: whatever the runs say is drawn and named."""
    for name, protocol in (("a", "burn"), ("b", "sell")):
        write(folder, name, {"": story_history((.7, .6, .5))}, "pre", protocol=protocol, lr=1.5e-4,
              feature="Twist", without=None, seed=0, data=None)
    groups = plot.story_groups(plot.find_runs(str(folder)), "history")
    looks = {g.protocol: g.look for g in groups}
    assert {"burn", "sell", "filter", "randomise"} < set(looks)
    assert len(set(looks.values())) == len(looks)
    fig, _ = drawn(folder, "fig11_stories")
    assert {"burn", "sell", "filter", "randomise", plot.CONTROL} <= set(texts(fig))


def test_the_papers_scores_are_beside_ours(folder, monkeypatch):
    """Table 1: at our steps 0 and 10 what the paper has at 0 and 30; the control has no rate."""
    rows = [{"protocol": "filter", "lr": "1e-4", "reft_step": "30", "twist": ".81"},
            {"protocol": "not-in-pretraining", "lr": "", "reft_step": "0", "twist": ".12"}]
    monkeypatch.setattr(plot, "paper_rows", lambda name: rows)
    head, lines = plot.revival_table(plot.find_runs(str(folder)))
    assert head == ["group", "split", "0", "10", "30"]
    assert lines[-2:] == [["the paper: filter 1e-4", "asked", "-", "81", "-"],
                          ["the paper: not-in-pretraining ", "asked", "12", "-", "-"]]
    ours = {line[1]: line[2:] for line in lines if "protocol\xa0filter" in line[0]}
    assert [cell.split()[0] for cell in ours["asked"]] == ["50.0", "60.0", "70.0"]
    assert [cell.split()[0] for cell in ours["unasked"]] == 3 * ["5.0"]
