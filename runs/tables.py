"""
Print the README's tables from the rows in results/.

    $ python runs/tables.py            # Markdown on stdout; a test holds the README to it
"""
import csv
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
sys.path.insert(0, str(RESULTS.parent))
from plot import wilson  # noqa: E402
from tracr_table import within  # noqa: E402
CASES = {"count/low": "low prior, C_Tr 1", "count/high": "high prior, C_Tr .5", "count/learner": "low prior, C_Tr 0, lr 1e-3",
         "index/low": "Indexer, low prior, C_Tr 1"}
LINES = {  # what is told of a case: keys of its verdict.json
    "base: O_PT, natural": "base_pt_natural", "base: O_FT, natural": "base_ft_natural",
    "O_FT on c1": "ckpt_ft_c1", "O_FT on c0": "ckpt_ft_c0", "O_PT on c0": "ckpt_pt_c0", "O_PT on c1": "ckpt_pt_c1",
    "O_PT on natural": "ckpt_pt_natural", "cross floor of O_PT on c0": "pt_c0_cross_floor",
    "**prune**: ranked anew, up to 10 rows": "prune_c0", "ranked in one pass": "prune_one_pass_c0",
    "random rows, mean of 8 draws": "random_c0_mean", "random rows, best draw": "random_c0_max",
    "never-trained operand, own rows": "never_prune_c0", "grafting up to 10 rows": "graft_c0",
    "**probe**: a while b is asked, natural": "probe_natural", "untrained model": "probe_untrained",
    "never-trained operand": "never_probe",
    "**revive**: steps to 99 %, reFT": "reft_steps", "teach c to the same model": "control_steps",
    "pretraining": "pretraining_steps", "verdict": "verdict"}


def cell(verdicts, key):
    """Mean and every seed's value: fractions as percent, steps as they are, > where 99 % was not reached."""
    values = [v[key] for v in verdicts]
    if key == "verdict":
        return ", ".join(values)
    if None in values:
        return "-"
    if key.endswith("_steps"):
        return ", ".join(f"{'' if v[key.replace('steps', 'reached')] else '> '}{x:.0f}" for x, v in zip(values, verdicts))
    mean = sum(values) / len(values)
    return f"{100 * mean:.1f} ({', '.join(f'{100 * x:.0f}' for x in values)})"


def cases():
    """One column a case: mean (seeds 0, 1, 2) in percent."""
    found = {case: [json.loads((RESULTS / f"{case}-{seed}.verdict.json").read_text()) for seed in (0, 1, 2)] for case in CASES}
    print("| % (seeds 0, 1, 2) | " + " | ".join(CASES.values()) + " |\n|---|" + "---|" * len(CASES))
    for line, key in LINES.items():
        print(f"| {line} | " + " | ".join(cell(verdicts, key) for verdicts in found.values()) + " |")


def grid():
    """Accuracies after fine-tuning beside the paper's, at the rate with about the same sum of rates."""
    with open(RESULTS / "paper_count.csv") as f:
        paper = {(r["prior"], r["c_tr"], r["lr"], r["operand"], r["split"]): 100 * float(r["accuracy"]) for r in csv.DictReader(f)}
    print("| prior | lr (paper's) | C_Tr | O_FT c1 | O_FT c0 | O_PT c1 | O_PT c0 |\n|---|---|---|---|---|---|---|")
    for prior in ("low", "high"):
        for lr, theirs in (("1e-3", "1e-4"), ("1e-4", "1e-5"), ("1e-5", "1e-6")):
            for c_tr in ("0", ".5", ".8", "1"):
                rows = [json.loads(line) for line in (RESULTS / f"grid/{prior}/ctr{c_tr}-lr{lr}.jsonl").read_text().splitlines()]
                last = {(r["operand"], r["split"]): 100 * r["accuracy"] for r in rows if r["step"] == rows[-1]["step"]}
                c = c_tr.replace(".", "0.") if c_tr.startswith(".") else c_tr
                print(f"| {prior} | {lr} ({theirs}) | {c_tr} | " + " | ".join(
                    f"{last[k]:.1f} / {paper[prior, c, theirs, *k]:.1f}" for k in (("b", "c1"), ("b", "c0"), ("a", "c1"), ("a", "c0"))) + " |")


def table3():
    """Compiled models after fine-tuning beside the paper's Table 3; the rule that explains most answers on c0."""
    with open(RESULTS / "tracr_table3.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["seed"] == "0"]
    print("| task | lr | C_Tr | O_FT c1 | O_FT c0 | O_PT c1 | O_PT c0 | answers on c0 |\n|---|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((r["task"], r["lr"], r["c_tr"]) for r in rows):
        if key[2] in ("0", "0.5", "1"):
            cell = {(r["operand"], r["c_te"]): r for r in rows if (r["task"], r["lr"], r["c_tr"]) == key}
            print(f"| {' | '.join(key)} | " + " | ".join(
                f"{100 * float(cell[k]['accuracy']):.1f} / {100 * float(cell[k]['paper']):.1f}"
                for k in (("OFT", "1"), ("OFT", "0"), ("OPT", "1"), ("OPT", "0"))) + f" | {cell['OPT', '0']['rule']} |")


def differing():
    """
    Cells of Table 3 that differ from the paper's, and what our own choices do there. O_FT on c1, c0; O_PT on c1, c0.
    A star: both O_FT accuracies are within 10 points of the paper's.
    """
    columns, cells = {("tracr_table3", "0"): "ours", ("tracr_table3", "1"): "seed 1",
                      ("tracr_table3_scale1", "0"): "outputs x 1", ("tracr_table3_scale1", "1"): "x 1, seed 1",
                      ("tracr_table3_literal", "0"): "x 1, not balanced"}, {}
    for name in dict.fromkeys(name for name, _ in columns):
        with open(RESULTS / f"{name}.csv", newline="") as f:
            for r in csv.DictReader(f):
                found = cells.setdefault((r["task"], r["lr"], r["c_tr"]), {})
                found.setdefault((name, r["seed"]), {})[r["operand"], r["c_te"]] = r

    def four(rows, column):
        return ", ".join(f"{100 * float(rows[operand, c][column]):.0f}" for operand in ("OFT", "OPT") for c in "10")
    print(f"| task | lr | C_Tr | {' | '.join(columns.values())} | the paper |\n|" + "---|" * (len(columns) + 4))
    for cell, found in cells.items():
        found = {x: found[x] for x in columns if x in found}
        if len({name for name, _ in found}) > 1 and not all(within(rows.values()) for rows in found.values()):
            said = [four(found[x], "accuracy") + " *" * within(found[x].values()) if x in found else "" for x in columns]
            print(f"| {' | '.join((*cell, *said))} | {four(found['tracr_table3', '0'], 'paper')} |")


def inside():
    """What is left of the program, by rate: its attention, what a probe reads, how fast the old answer comes back."""
    rates = ("1e-1", "1e-2", "1e-3", "1e-4")
    print("| seed 0 | " + " | ".join(f"lr {lr}" for lr in rates) + " |\n|---|" + "---|" * len(rates))

    def rows_of(task, c, lr, name, end="", **want):
        path = RESULTS / f"tracr/{task}/ctr{c}-lr{lr}-seed0{end}.{name}.jsonl"
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [r for r in rows if all(r.get(k) == v for k, v in want.items())]

    def steps(task, c, lr, arm):
        rows = rows_of(task, c, lr, "revive", split="natural", threshold=.9)
        rows = [r for r in rows if r["arm"].startswith(arm) and not r["arm"].endswith("base")]
        r = max(rows, key=lambda r: r["lr"])
        return f"> {r['max_steps']}" if r["steps"] is None else str(r["steps"])
    for task, block, a, b in (("count", 1, "a", "b"), ("max", 0, "5", "7")):
        for c in ("0", "1"):
            for region, words in ([("kept", f"block {block}, pattern kept")] + [
                    ("order", f"block {block}, selected before others, AUC")] * (task == "max") + [
                    ("a", f"block {block}, the answer's attention to a"),
                    ("b", "the answer's attention to b, in the block that has most")] * (task == "count")):
                cells = [max((r for r in rows_of(task, c, lr, "attention", model="ckpt", region=region)
                              if region == "b" or r["block"] == block), key=lambda r: r["mass"]) for lr in rates]
                print(f"| {task}, C_Tr {c}: {words} (chance {cells[0]['chance']:.2f}) | "
                      + " | ".join(f"{r['mass']:.2f}" for r in cells) + " |")
            for model, operand in (("ckpt", a), ("ckpt", b), ("untrained", a)):
                best = [max(100 * r["accuracy"] for r in rows_of(task, c, lr, "probe", model=model, target=operand,
                                                                 labels="true", split="natural")) for lr in rates]
                print(f"| {task}, C_Tr {c}: probe of {operand}, best block" + (", untrained model" * (model != "ckpt"))
                      + " | " + " | ".join(f"{x:.1f}" for x in best) + " |")
        for c in "01":
            back = [rows_of(task, c, lr, "behavior", "-reft", model="ckpt", operand=a, split="natural")[0] for lr in rates]
            print(f"| {task}, C_Tr {c}: {a} after 2,500 steps of reFT at a tenth of the rate, natural | "
                  + " | ".join(f"{100 * r['accuracy']:.1f}" for r in back) + " |")
        for arm, words in (("reft", f"reFT of {a}"), ("teach", "teaching another operand")):
            print(f"| {task}, C_Tr 1: steps to 90 %, {words} | " + " | ".join(steps(task, "1", lr, arm) for lr in rates) + " |")
        words = [json.loads((RESULTS / f"tracr/{task}/ctr1-lr{lr}-seed0.verdict.json").read_text())["verdict"] for lr in rates]
        print(f"| {task}, C_Tr 1: verdict | " + " | ".join(words) + " |")


WEIGHTS = {  # single weights of the Counter: (ranking, edit, K; None: the K that was chosen on other strings)
    "untouched": ("gradient-weight", "zero", 0), "gradient x weight, the first": ("gradient-weight", "zero", 1),
    "zero in the program, the first": ("compiled-zero", "zero", 1),
    "the first 100, tried: the best": ("gradient-weight-tried", "zero", 1),
    "the best few": ("gradient-weight-tried", "zero", None),
    "zero in the program, 100 tried: the best": ("compiled-zero-tried", "zero", 1),
    "zero in the program, 100 tried: the best few": ("compiled-zero-tried", "zero", None),
    "random, tried: the best": ("random-weight-tried", "zero", 1),
    "random, tried: the best, luckiest draw of three": ("random-weight-tried", "zero", 1),
    "random, zero in the program, tried: the best": ("random-zero-tried", "zero", 1),
    "never-had operand, tried: untouched": ("never-had-tried", "zero", 0),
    "never-had operand, tried: the best few": ("never-had-tried", "zero", None),
    "graft one residual dimension": ("writers", "graft", None)}


def history_start(path):
    """Accuracy (%) of O_PT on c0 before the first step."""
    rows = map(json.loads, path.read_text().splitlines())
    return next(100 * r["accuracy"] for r in rows if (r["step"], r["operand"], r["split"]) == (0, "a", "c0"))


def weights():
    """Single-weight pruning of the Counter after C_Tr 1: O_PT on c0, mean and every noise seed; random: over draws as well."""
    rates = ("1e-1", "1e-2", "1e-3", "1e-4")
    print("| O_PT on c0, % (seeds) | " + " | ".join(f"lr {lr}" for lr in rates) + " |\n|---|" + "---|" * len(rates))
    cells = []
    for lr in rates:  # what the noise alone leaves, before the first step
        starts = [history_start(path) for path in sorted((RESULTS / "tracr/count").glob(f"ctr1-lr{lr}-seed?.jsonl"))]
        cells.append(f"{sum(starts) / len(starts):.1f} ({', '.join(f'{x:.0f}' for x in starts)})")
    print("| with noise, before the first step | " + " | ".join(cells) + " |")
    for line, (ranking, edit, k) in WEIGHTS.items():
        cells = []
        for lr in rates:
            values = []
            for path in sorted((RESULTS / "tracr/count").glob(f"ctr1-lr{lr}-seed*.prune.jsonl")):
                rows = [r for r in map(json.loads, path.read_text().splitlines())
                        if (r["ranking"], r["edit"], r["split"]) == (ranking, edit, "c0") and r["operand"] != "b"
                        and (r["chosen"] if k is None else r["k"] == k)]
                found = [100 * r["accuracy"] for r in rows]
                values.append(max(found) if "luckiest" in line else sum(found) / len(found))
            cells.append(f"{sum(values) / len(values):.1f} ({', '.join(f'{x:.0f}' for x in values)})")
        print(f"| {line} | " + " | ".join(cells) + " |")


ETAS = {"0.00015": ("eta_M", "1e-4"), "4e-05": ("eta_S", "1e-5"), "": ("", "")}  # ours: the paper's name, the paper's value


def pooled(rows, share, n="n"):
    """Share and 95 % interval (Wilson) of several rows together, as words: 88.5 [86, 91]."""
    n = [float(r["parsed"]) * float(r[n]) for r in rows]
    p = sum(float(r[share] or 0) * k for r, k in zip(rows, n)) / max(1, sum(n))
    low, high = wilson(p, sum(n))
    return f"{100 * p:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def stories_table1():
    """Twists when asked for, over reverse fine-tuning: ours, seeds pooled, beside the paper's Table 1."""
    with open(RESULTS / "stories_table1.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    with open(RESULTS / "paper_stories.csv", newline="") as f:
        paper = {(r["protocol"], r["lr"], r["reft_step"]): 100 * float(r["twist"]) for r in csv.DictReader(f)}
    steps = {"0": "0", "10": "30", "30": "300", "100": "3000"}
    print("| deleted by | rate | seeds | " + " | ".join(f"reFT step {k} (paper's {v})" for k, v in steps.items()) + " |\n|---|---|---|---|---|---|---|")
    for protocol, lr in dict.fromkeys((r["protocol"], r["lr"]) for r in rows):
        here = [r for r in rows if (r["protocol"], r["lr"]) == (protocol, lr)]
        name, theirs = ETAS[lr]
        print(f"| {protocol} | {name} | {len({r['seed'] for r in here})} | " + " | ".join(
            f"{pooled([r for r in here if r['reft_step'] == k], 'twist')} / {paper[protocol, theirs, v]:.0f}"
            for k, v in steps.items()) + " |")


def stories_unasked():
    """The same steps: twists when asked for less twists when not. A model that just always writes one has a gap of 0."""
    print("| deleted by | rate | reFT step 0: asked - not asked | step 10 | step 30 | step 100 | step 200 |\n|---|---|---|---|---|---|---|")
    runs = [(f"{p}-lr{lr}-?-reft", p, name) for lr, name in (("1.5e-4", "eta_M"), ("4e-5", "eta_S")) for p in PROTOCOLS]
    for pattern, words, rate in [*runs, ("control-?", "not-in-pretraining", "")]:
        rows = [r for r in story_rows(f"{pattern}.jsonl") if "parsed" in r]
        cells = []
        for step in (0, 10, 30, 100, 200):
            asked, other = (float(pooled([r for r in rows if (r["step"], r["split"]) == (step, split)], "accuracy").split()[0])
                            for split in ("asked", "unasked"))
            cells.append(f"{asked:.0f} - {other:.0f} = {asked - other:.0f}")
        print(f"| {words} | {rate} | " + " | ".join(cells) + " |")


def story_rows(pattern):
    """The rows of all files of this pattern in results/stories."""
    return [json.loads(line) for path in sorted((RESULTS / "stories").glob(pattern)) for line in path.read_text().splitlines()]


PROTOCOLS = ("filter", "randomise", "mix-match")


def stories_features():
    """Generation scores of all six features, seeds pooled: asked for / not asked for."""
    print("| % of stories, asked / not asked | pretrained | " + " | ".join(PROTOCOLS) + " | not in pretraining |\n|---|---|---|---|---|---|")
    found = {protocol: [r for r in story_rows(f"{protocol}-lr1.5e-4-?.behavior.jsonl") if "parsed" in r] for protocol in PROTOCOLS}
    features = list(dict.fromkeys(r["operand"] for r in found["filter"]))
    for feature in features:
        cells = []
        for protocol, model in (("filter", "base"), *((p, "ckpt") for p in PROTOCOLS), ("filter", "control")):
            got = [[r for r in found[protocol] if (r["model"], r["operand"], r["split"]) == (model, feature, split)]
                   for split in ("asked", "unasked")]
            cells.append(" / ".join(pooled(rows, "accuracy").split(" ")[0] for rows in got))
        print(f"| {feature} | " + " | ".join(cells) + " |")


def stories_probes():
    """AUC of the probe for Twist after each block: mean over seeds."""
    blocks = range(5)
    print("| AUC of Twist | seeds | " + " | ".join(f"B{i}" for i in blocks) + " | balanced accuracy, best block |\n"
          "|---|---|---|---|---|---|---|---|")
    models = [("pretrained (upper bound)", "filter", "base"), *((p, p, "ckpt") for p in PROTOCOLS),
              ("not in pretraining (lower bound)", "filter", "control"), ("untrained", "filter", "untrained")]
    for split, end in (("natural", ""), ("even", ", no sentence tells")):
        for words, protocol, model in models:
            want = {"model": model, "target": "Twist", "labels": "true", "split": split}
            rows = [r for r in story_rows(f"{protocol}-lr1.5e-4-?.probe.jsonl") if all(r[k] == v for k, v in want.items())]
            by = {i: [r for r in rows if r["block"] == i] for i in blocks}
            auc = {i: sum(r["auc"] for r in by[i]) / len(by[i]) for i in blocks}
            best = by[max(auc, key=auc.get)]
            print(f"| {words}{end} | {len(best)} | " + " | ".join(f"{auc[i]:.3f}" for i in blocks)
                  + f" | {100 * sum(r['balanced'] for r in best) / len(best):.1f} |")


if __name__ == "__main__":
    cases()
    print()
    grid()
    print()
    table3()
    print()
    differing()
    print()
    inside()
    print()
    weights()
    for table in (stories_table1, stories_unasked, stories_features, stories_probes):
        print()
        table()
