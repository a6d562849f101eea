"""
Print the README's tables from the rows in results/.

    $ python runs/tables.py            # Markdown on stdout; a test holds the README to it
"""
import csv
import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
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


if __name__ == "__main__":
    cases()
    print()
    grid()
