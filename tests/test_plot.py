"""plot.py: reading runs and tables, figures and report from hand-written rows, the evidence."""
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import plot

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
ROW = {"setup": "stories", "scale": "small", "task": "story", "operand": "Twist", "accuracy": None,
       "floor": None, "cross_floor": None, "n": 100, "loss": None}
SHARES = {"randomise": ((.7, .5, .1), (.1, .4, .7)),  # at steps 0, 10, 30 of deletion, of reFT
          "filter": ((.7, .7, .5), (.5, .6, .7))}
STORY_FIGURES = {f"{name}.png" for name, figure in plot.FIGURES.items()
                 if figure.stories is not False and name != "evidence"}  # which needs verdicts


def write(folder, name, parent, rows, files=(), **args):
    """A run as the scripts leave it."""
    args = {"lr": 1.5e-4, "feature": "Twist", "without": None, "protocol": None, "data": None,
            "reverse": False, "seed": 0, "steps": 30, **args}
    record = {"stage": "finetune", "args": args, "seconds": 1.,
              "parent": {"path": f"{folder}/{parent}.pt", "sha256": parent}}
    (folder / f"{name}.json").write_text(json.dumps(record))
    for kind, rows in {"": rows, **dict(files)}.items():
        lines = [json.dumps({**ROW, **row}) + "\n" for row in rows]
        (folder / f"{name}{kind}.jsonl").write_text("".join(lines))


def history(shares, deletion=True):
    rows = []
    for step, share in zip((0, 10, 30), shares):
        for split in ("with", "without", "deletion")[:2 + deletion]:
            rows.append({"step": step, "split": split, "loss": .5 - share / 10})
        for split, p in (("asked", share), ("unasked", .05)):
            rows.append({"step": step, "split": split, "accuracy": p, "parsed": .8})
    return rows


def analysed():
    behavior, probe = [], []
    for model in ("base", "ckpt", "control", "untrained"):
        for feature in ("Dialogue", "Twist"):
            for split, p in (("asked", .6), ("unasked", .1)):
                behavior.append({"model": model, "operand": feature, "split": split, "accuracy": p,
                                 "parsed": .8, "judge": 1.})
            for block in (0, 1):
                row = {"model": model, "block": block, "target": feature, "prompt": None,
                       "labels": "true", "split": "natural", "accuracy": .8, "floor": .75,
                       "balanced": .7, "auc": .6 + block / 10}
                probe.append(row)
                if (model, feature) == ("ckpt", "Twist"):
                    probe.append({**row, "labels": "shuffled", "auc": .5})
    relearn = [{"arm": arm, "answers": "kinds 1 and 2", "half": half, "step": step, "split": split,
                "accuracy": .5, "parsed": .9} for arm in ("reft", "teach-Twist")
               for half in ("taught", "held-out") for split in ("asked", "unasked") for step in (0, 100)]
    return {".behavior": [row for row in behavior if row["model"] != "untrained"], ".probe": probe,
            ".relearn": relearn}


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1):
        for protocol, (deletion, back) in SHARES.items():
            name, own = f"{protocol}-{seed}", {"protocol": protocol, "seed": seed}
            shares = [p + .1 * seed for p in deletion]
            write(tmp_path, name, f"pre-{seed}", history(shares), analysed(), **own)
            write(tmp_path, f"{name}-reft", name, history(back), lr=4e-5, reverse=True, **own)
        write(tmp_path, f"control-{seed}", f"without-{seed}", history((0, .1, .2), False), lr=4e-5,
              reverse=True, seed=seed, without="Twist")
    return tmp_path


def run(*words):
    return subprocess.run([sys.executable, str(ROOT / "plot.py"), *map(str, words)],
                          capture_output=True, text=True)


def of_stories(runs, kind):
    """{(kind of run, protocol): group}"""
    return {(g.kind, g.settings.get("protocol")): g for g in plot.having(runs, kind)}


# ---------------------------------------------------------------- reading, figures, report


def test_every_figure_of_stories_is_drawn(folder):
    done = run(folder)
    assert done.returncode == 0 and not done.stderr
    assert all("wrote" in line for line in done.stdout.splitlines()), done.stdout
    assert STORY_FIGURES == set(os.listdir(folder / "figures"))
    page = (folder / "report.html").read_text()
    assert "Generation score" in page and "area under the ROC curve" in page
    assert "operand of pretraining" not in page and "What made these files" in page


def test_groups_are_runs_that_differ_in_the_seed(folder):
    groups = plot.having(plot.find_runs(str(folder)), "history")
    assert [(g.kind, g.settings["protocol"], len(g.runs)) for g in groups] == [
        ("fine-tuning", "filter", 2), ("fine-tuning", "randomise", 2), ("reFT", None, 2),
        ("reFT", "filter", 2), ("reFT", "randomise", 2)]
    # reFT knows the rate of the deletion, which its parent says; the control's parent is not here
    assert [g.settings.get("finetune lr") for g in groups[2:]] == [None, 1.5e-4, 1.5e-4]
    assert plot.having(plot.find_runs(str(folder)), "history", ("reFT",), 2)[0].kind == "reFT"


def test_numbers_are_those_of_the_rows(folder):
    group = of_stories(plot.find_runs(str(folder)), "history")["fine-tuning", "randomise"]
    found = plot.bands(group, "history", "step", split="asked")
    means = {0: (75, 70, 80), 10: (55, 50, 60), 30: (15, 10, 20)}  # mean, smallest, largest seed
    assert {x: tuple(map(round, f[:3])) for x, f in found.items()} == means
    losses = plot.bands(group, "history", "step", "loss", 1, split="with")
    assert losses[30][:3] == pytest.approx((.485, .48, .49))
    group.runs = group.runs[:1]  # one seed: of 100 stories the 80 that parse
    mean, low, high, _ = plot.bands(group, "history", "step", split="asked")[10]
    assert (mean, low, high) == pytest.approx((50, *(100 * p for p in plot.wilson(.5, 80))))
    one = plot.bands(group, "history", "step", "loss", 1, split="with")[0]
    assert one[:3] == pytest.approx((.43, .43, .43))


def test_broken_and_foreign_rows_are_a_line_each(folder):
    with open(folder / "randomise-0.jsonl", "a") as file:
        file.write('{"step": 3\n' + json.dumps({**ROW, "step": 30, "split": "with", "loss": "high"})
                   + "\n[1]\n")
    foreign = {"seed": 9, "protocol": "burn", "lr": None, "feature": None}
    write(folder, "foreign", "pre-9", [{"step": 0, "split": "asked"}], **foreign)
    (folder / "filter-1-reft.probe.jsonl").write_text("")
    (folder / "half.json").write_text('{"stage": "finetune", "args"')
    (folder / "running.json").write_text(json.dumps({"stage": "finetune", "args": {"seed": 3}}))
    (folder / "other.json").write_text('["no record"]')
    done = run(folder)
    assert done.returncode == 0 and not done.stderr
    lines = [line for line in done.stdout.splitlines() if "wrote" not in line]
    assert sorted(lines) == sorted([
        f"{folder}/filter-1-reft.probe.jsonl: empty",
        f"{folder}/randomise-0.jsonl: 3 broken lines left out",
        f"{folder}/half.json: left out, not readable (JSONDecodeError)",
        "running: left out, unfinished"])
    assert STORY_FIGURES == set(os.listdir(folder / "figures"))


def test_other_setups_keep_their_figures(folder):
    """A folder with both: each figure gets its own runs."""
    rows = []
    for step in (0, 10):
        for operand in "ab":
            rows += [{"setup": "pcfg", "task": "count", "step": step, "operand": operand,
                      "split": split, "accuracy": .5} for split in plot.SPLITS]
    write(folder, "pcfg", "pre", rows, pair=["a", "b"], c_tr=1.)
    runs = plot.find_runs(str(folder))
    assert [run.name for run in plot.about(runs, False)] == ["pcfg"]
    assert len(plot.about(runs, True)) == 10
    done = run(folder)
    assert done.returncode == 0 and not done.stderr
    assert {"fig6_curves.png", "fig11_stories.png"} <= set(os.listdir(folder / "figures"))
    page = (folder / "report.html").read_text()
    assert "operand of pretraining" in page and "Generation score" in page


def test_the_verdict_is_a_table_with_one_sentence(folder):
    line = {"instrument": "probing", "question": "is it <read>?", "measured": .91,
            "control": "untrained", "control_measured": .5, "margin": .1, "holds": True}
    steps = {**line, "instrument": "reviving", "measured": 50, "control_measured": None,
             "holds": None, "unit": "steps"}
    verdict = {"verdict": "wrapped", "text": "wrapped: it is there.", "evidence": [line, steps],
               "probe_natural": .91}
    (folder / "filter-0.verdict.json").write_text(json.dumps(verdict))
    (folder / "filter-1.verdict.json").write_text('{"verdict": "lost", "evidence": [{"odd": 1}]}')
    assert run(folder, "--figures").returncode == 0
    page = (folder / "report.html").read_text()
    assert page.index("filter-0: wrapped") < page.index("Generation score after")
    assert "<td>is it &lt;read&gt;?</td><td>91.0%</td><td>untrained</td><td>50.0%</td>" in page
    assert "<td>50</td><td>untrained</td><td>-</td><td>0.1</td><td>cannot be said</td>" in page
    assert "wrapped: it is there." in page


def test_mistakes_are_one_line_and_exit_code_2(tmp_path):
    for words in (["nowhere"], [tmp_path], [tmp_path, "--markdown"],
                  [tmp_path, "--evidence", tmp_path / "to"], ["--figures", "fig0"]):
        done = run(*words)
        assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- tables of evidence


def test_tables_read_like_the_runs(folder, tmp_path_factory):
    """--evidence loses nothing: the same rows, groups and figures."""
    to = tmp_path_factory.mktemp("evidence") / "stories"
    done = run(folder, "--evidence", to)
    assert done.returncode == 0 and not done.stderr
    assert {"runs.jsonl", "history.csv", "behavior.csv", "probe.csv", "relearn.csv", "figures"} == set(
        os.listdir(to))
    assert STORY_FIGURES == set(os.listdir(to / "figures"))
    raw, committed = plot.find_runs(str(folder)), plot.find_runs(str(to))
    assert len(raw) == len(committed) == 10
    for one, other in zip(raw, committed):
        assert (one.name, one.record, one.verdict) == (other.name, other.record, other.verdict)
        assert (one.kind, one.settings) == (other.kind, other.settings)
        for kind in plot.KINDS:
            assert len(one.rows[kind]) == len(other.rows[kind])
            for row, back in zip(one.rows[kind], other.rows[kind]):
                for key, value in {**back, **row}.items():
                    value = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                    assert back.get(key) == value, (kind, key)
    columns = (to / "history.csv").read_text().splitlines()[0].split(",")
    assert "setup" not in columns and columns[0] == "run"  # said once, in runs.jsonl


def test_text_stays_text(tmp_path):
    """An operand "5", labels "true" and a missing value come back as they were."""
    row = {"setup": "tracr-max", "operand": "5", "model": "ckpt", "block": 0, "target": "5",
           "prompt": None, "labels": "true", "split": "c0", "accuracy": 1., "predicted": {"7": 2}}
    rows = [row, {**row, "operand": "7", "labels": "shuffled", "accuracy": None, "chosen": False}]
    write(tmp_path, "a", "b", [], {".probe": rows}, pair=["5", "7"])
    plot.write_evidence(plot.find_runs(str(tmp_path)), str(tmp_path / "to"))
    first, second = plot.find_runs(str(tmp_path / "to"))[0].rows["probe"]
    assert first["operand"] == first["target"] == "5" and first["labels"] == "true"
    assert first["predicted"] == {"7": 2} and first["role"] == "O_PT" and first["prompt"] is None
    assert second["accuracy"] is None and second["chosen"] is False and first["accuracy"] == 1


def test_broken_tables_are_a_line_each(folder):
    to = folder / "to"
    plot.write_evidence(plot.find_runs(str(folder)), str(to))
    lines = (to / "history.csv").read_text().splitlines()
    lines[3] = "nobody" + lines[3]
    lines[4] += ",1,2,3"
    lines[5] = lines[5].split(",")[0]
    (to / "history.csv").write_text("\n".join(lines) + "\n")
    (to / "probe.csv").write_text("run,block\nfilter-0,1\n")
    with open(to / "runs.jsonl", "a") as file:
        file.write("{\n")
    done = run(to, "--figures", "fig11_stories")
    assert done.returncode == 0 and not done.stderr
    noted = [line for line in done.stdout.splitlines() if "wrote" not in line]
    assert sorted(noted) == sorted([
        f"{to}/runs.jsonl: 1 broken line left out", f"{to}/history.csv: 3 broken lines left out",
        f"{to}/probe.csv: 1 broken line left out"])


def test_foreign_tables_are_not_overwritten(folder, tmp_path_factory):
    to = tmp_path_factory.mktemp("mine")
    (to / "history.csv").write_text("my,own\n1,2\n")
    done = run(folder, "--evidence", to)
    assert done.returncode == 2 and "history.csv" in done.stderr
    assert (to / "history.csv").read_text() == "my,own\n1,2\n" and os.listdir(to) == ["history.csv"]


# ---------------------------------------------------------------- the evidence in results/


def rows_of(folder, kind, **want):
    """Rows of a table by plain csv, with the constants of runs.jsonl."""
    constants = {}
    for line in (RESULTS / folder / "runs.jsonl").read_text().splitlines():
        line = json.loads(line)
        constants[line["run"]] = line["constants"].get(kind)
    with open(RESULTS / folder / f"{kind}.csv", newline="") as file:
        for row in csv.DictReader(file):
            row = {**constants[row["run"]], **row}
            if all(str(row[key]) == value for key, value in want.items()):
                yield row


def verdicts(folder, prefix):
    lines = map(json.loads, (RESULTS / folder / "runs.jsonl").read_text().splitlines())
    return [line["verdict"] for line in lines if line["run"].startswith(prefix)]


def percents(values):
    values = [100 * float(value) for value in values]
    return f"{sum(values) / len(values):.1f} ({', '.join(f'{v:.0f}' for v in values)})"


@pytest.fixture(scope="module")
def readme():
    return (RESULTS / "README.md").read_text()


def section(readme, name):
    return readme.split(f"\n## {name}\n")[1].split("\n## ")[0]


def line(text, *starts):
    """The cells of the only line of a table that starts so."""
    lines = []
    for cells in (row.strip("| ").split(" | ") for row in text.splitlines() if row[:1] == "|"):
        if [cell.strip() for cell in cells[:len(starts)]] == list(starts):
            lines.append([cell.strip() for cell in cells])
    assert len(lines) == 1, (starts, lines)
    return lines[0][len(starts):]


def test_results_are_small():
    files = [path for path in RESULTS.rglob("*") if path.is_file() and path.name != "report.html"]
    files = [path for path in files if path.suffix != ".pt"]
    assert len(files) <= 100 and sum(path.stat().st_size for path in files) <= 10e6
    tables = [path for path in files if path.suffix != ".png"]
    assert sum(path.stat().st_size for path in tables) <= 7.5e6


def test_readme_of_results_is_what_the_tables_say(readme):
    """`python plot.py results --markdown` changes nothing."""
    assert plot.readme(str(RESULTS)) == readme
    assert not re.search(r"\| (nan|None) \|", readme)
    for name in re.findall(r"!\[\w+\]\((.*?)\)", readme):
        assert (RESULTS / name).is_file(), name


def test_verdicts_are_what_the_readme_says(readme):
    text = section(readme, "count")
    low, high = verdicts("count", "low-"), verdicts("count", "high-")
    assert line(text, "verdict")[0] == ", ".join(5 * ["new"]) and len(low) == len(high) == 5
    assert line(text, "verdict")[1:] == [", ".join(v["verdict"] for v in some) for some in (low, high)]
    for key in ("prune_c0", "prune_one_pass_c0", "probe_natural", "never_probe", "ckpt_ft_c1"):
        _, *cells = line(text, key.replace("_", " "))
        for cell, some in zip(cells, (low, high)):
            assert cell == percents(verdict[key] for verdict in some)
    limits = [f"> {v['control_steps']}" for v in low]  # nobody learned c so fast
    assert line(text, "control steps")[1] == ", ".join(limits)
    index = verdicts("index", "low-")
    assert line(section(readme, "index"), "verdict") == [", ".join(v["verdict"] for v in index)]


def test_accuracies_are_the_last_step_beside_the_papers(readme):
    with open(RESULTS / "paper_count.csv", newline="") as file:
        paper = {tuple(row.values())[1:6]: float(row["accuracy"]) for row in csv.DictReader(file)
                 if row["pretrain_steps"] == "200000"}
    cells = []
    for operand, split in (("b", "c1"), ("b", "c0"), ("a", "c1"), ("a", "c0")):
        rows = [row for row in rows_of("conditions", "history", run="low-ctr.5-101", operand=operand,
                                       split=split) if row["task"] == "count"]
        ours = float(max(rows, key=lambda row: int(row["step"]))["accuracy"])
        cells.append(f"{100 * ours:.1f} / {100 * paper['low', '0.5', '1e-6', operand, split]:.1f}")
    assert line(section(readme, "conditions"), "low", "1e-5", "0.5", "")[:4] == cells
    counter = line(section(readme, "tracr/count"), "counter", "1e-1", "1")
    pairs = [cell.split(" / ") for cell in counter[:4]]
    first = [f"{ours.split(', ')[0]} / {paper}" for ours, paper in pairs]  # seed 0
    assert first == ["100.0 / 100.0", "4.6 / 0.7", "0.0 / 0.0", "40.1 / 35.8"]
    assert counter[4] == "5 of 5" and counter[5].split(", ")[0] == "blend 0.64"


def test_cells_near_the_papers_are_counted_right():
    """The counts that about.md quotes: of Table 3, both accuracies of O_FT within 10 points."""
    rows = []
    for seed in (0, 1):
        for folder in ("count", "max", "variants"):
            runs = plot.find_runs(str(RESULTS / "tracr" / folder))
            one = plot.paper_table([run for run in runs if run.args["seed"] == seed])[1]
            rows += [[seed, *row] for row in one]

    def near(name, variant, seed):
        cells = [row[9] for row in rows if (row[0], row[1], row[4]) == (seed, name, variant)]
        return cells.count("1 of 1"), len(cells)
    assert near("counter", "", 0) == (20, 28) and near("max-identifier", "", 0) == (9, 28)
    assert near("counter", "outputs x 1", 1) == (25, 28)
    assert near("counter", "outputs x 1", 0) == (8, 15)


def test_sweeps_are_the_rows_of_pruning(readme):
    head = line(section(readme, "tracr/count"), "K")
    column = head[6:].index("lr 1e-3 (5 seeds)")
    want = {"score": "gradient-weight", "order": "exhaustive", "pool": "zero-in-program",
            "control": "", "edit": "zero", "operand": "a", "split": "c0"}
    best = {}
    for row in rows_of("tracr/count", "prune", **want):
        if row["run"].startswith("ctr1-lr1e-3-") and row["chosen"] == "true":
            best[row["run"]] = row["accuracy"]
    cells = line(section(readme, "tracr/count"), "chosen", "weight", "gradient-weight",
                 "exhaustive", "zero-in-program", "", "zero")
    assert len(best) == 5 and cells[column] == percents(best.values())
    assert cells[column] == "57.9 (60, 52, 70, 52, 56)"


def test_stories_are_counted_over_all_seeds(readme):
    text, shares, weights = section(readme, "stories"), [], []
    for seed in range(3):
        row, = rows_of("stories", "history", run=f"randomise-lr1.5e-4-{seed}-reft", step="100",
                       split="asked")
        shares.append(float(row["accuracy"]))
        weights.append(float(row["parsed"]) * float(row["n"]))
    mean = sum(s * w for s, w in zip(shares, weights)) / sum(weights)
    group = ("reFT, deletion lr 1.5e-4, probability 1, protocol randomise, finetune lr 1.5e-4 "
             "(3 seeds)")
    cell = line(text, group, "asked")[3]
    seeds = ", ".join(f"{100 * share:.0f}" for share in shares)
    assert cell == f"{100 * mean:.1f} ({seeds}) [56, 64]" and cell.startswith("59.7 (81, 71, 29)")
    assert line(text, "the paper: randomise 1e-4", "asked") == ["12", "56", "69", "75", "-"]
    areas = []
    for seed in range(3):
        rows = rows_of("stories", "probe", run=f"filter-lr1.5e-4-{seed}", model="ckpt", block="4",
                       target="Twist", labels="true", split="natural")
        areas += [float(row["auc"]) for row in rows]
    cells = line(text, "auc", "protocol filter (3 seeds)", "ckpt", "true", "natural")
    assert cells[4] == f"{sum(areas) / 3:.3f}" == "0.898"


# ---------------------------------------------------------------- claims and known truth


def made_run(seed, verdict, **args):
    usual = dict(task="count", prior=[.999, .001, 0], c_tr=1., lr=1e-5, seed=seed, pair=["a", "b"])
    args = {**usual, **args}
    return SimpleNamespace(args=args, settings={"setup": "pcfg", "scale": "small", **args},
                           kind="fine-tuning", verdict=verdict, rows={kind: [] for kind in plot.KINDS})


def test_auroc_is_the_share_of_pairs_in_order():
    first, second = [3, 1, 2], [2, 0, 2, 5]
    slow = [(x > y) + (x == y) / 2 for x in first for y in second]
    assert plot.auroc(first, second) == sum(slow) / len(slow)
    assert plot.auroc([1, 2], [0]) == 1 and plot.auroc([0], [1, 2]) == 0


def test_a_condition_tells_what_was_done():
    """Whatever changes the models that are made changes the words; the seed does not."""
    words = {plot.condition(made_run(seed, None, **more)) for seed in (0, 1) for more in (
        {}, {"lr": 1e-3}, {"c_tr": 0.}, {"prior": [0., .001, .999]}, {"prior": [.5, .3, .2]},
        {"task": "index"}, {"mix": .5}, {"relabel": True}, {"only": "head"}, {"jailbreak": True})}
    assert len(words) == 10 and plot.MAIN in words and plot.TRUTHS["erased"] in words and plot.INDEX in words


@pytest.mark.parametrize("pruned, word", [([.9, .8, .6], "holds"), ([.9, .8, .3], "undecided"),
                                          ([.4, .3, .3], "does not hold")])
def test_a_claim_holds_where_every_seed_says_so(pruned, word):
    """The margin is 25 points above the better control, seed by seed; not: the other way round."""
    def verdict(share):
        return {"prune_c0": share, "random_c0_max": .1, "never_prune_c0": .2}
    runs = [made_run(seed, verdict(share), **more) for seed, share in enumerate(pruned)
            for more in ({}, {"c_tr": 0., "lr": 1e-3})]
    _, rows = plot.claims(runs)
    lines = {row[0]: row for row in rows}
    row, other = lines["Counter: ten rows bring a back"], lines["large rate, no shortcut: ten rows do not bring a back"]
    assert row[-1] == word and row[-2] == "3" and row[3] == f"{min(pruned) - .2:.1%}"
    assert other[-1] == {"holds": "does not hold", "does not hold": "holds"}.get(word, word)
    assert "20.0%" in row[5] and len(rows) == 2  # what no run is about is left out


def test_a_control_may_be_another_model_of_the_same_seed():
    runs = []
    for seed, (low, high) in enumerate([(.2, .9), (.5, .7)]):
        for share, prior in ((low, [.999, .001, 0]), (high, [.5, .3, .2])):
            run = made_run(seed, None, prior=prior)
            run.rows["history"] = [{"role": "O_PT", "split": "c0", "task": "count", "accuracy": x}
                                   for x in (share - .1, share + .1)]
            runs.append(run)
    (claim,) = [claim for claim in plot.CLAIMS if claim.text.startswith("high prior: a falls")]
    assert np.allclose(plot.effects(claim, runs), [(.7, .2), (.2, .5)])
    assert np.allclose(plot.effects(claim, runs[1:]), [(.2, .5)])  # without its partner none


def test_known_truth_ranks_models():
    runs = [made_run(seed, {"control_steps": 300, "reft_steps": steps, "prune_c0": .9 - .1 * seed,
                            "random_c0_max": .2, "never_prune_c0": .1}, **more) for seed in range(4)
            for steps, more in ((100, {}), (150 - seed, {"prior": [0, .001, .999]}))]
    head, rows = plot.known_truth(runs)
    found = {(row[0], row[2]): dict(zip(head, row)) for row in rows if row[1] == "wrapped"}
    assert found["reviving", "erased"]["auroc"] == "1.00" and found["pruning", "erased"]["auroc"] == "0.50"
    for name in ("known_scores", "claim_effects"):
        picture, _, caption = plot.draw(plot.FIGURES[name].function, runs)
        assert len(picture) > 5000 and "Fooled by" in caption
    low, high = (float(found["pruning", "erased"][key]) for key in ("low", "high"))
    assert low < .3 and high > .7 and found["pruning", "erased"]["seeds"] == "4, 4"
    assert ("probing", "erased") not in found and ("pruning", "overwritten") not in found


def test_the_same_run_in_two_folders_is_one_with_the_rows_of_both(tmp_path):
    for name, rows, files in (("a", history((.7, .5, .1)), {}), ("b", [], analysed())):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "randomise-0", "pre-0", rows, files, protocol="randomise")
    (run,) = plot.find_runs(str(tmp_path))
    assert run.name == "a/randomise-0" and len(run.rows["history"]) == 15
    assert {kind for kind, rows in run.rows.items() if rows} == {"history", "behavior", "probe", "relearn"}
