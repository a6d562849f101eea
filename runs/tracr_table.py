"""
Write results/tracr_table3.csv from the rows in results/tracr/: each cell of the paper's Table 3, ours beside the paper's;
tracr_table3_scale1.csv with outputs that are not multiplied by 10 (seed 1; some cells of seed 0); tracr_table3_literal.csv
for some cells, with weights that are not balanced either.

    $ python runs/tracr_table.py           # needs nothing but the rows; cells that were not run are left out
"""
import csv
import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
RULES = {"share_a": "a", "share_b": "b", "share_a_plus_q": "a+q", "share_blend": "blend", "share_constant": "constant"}


def rule_of(rows):
    """The rule that explains most answers on c0, with its share; none where it is under half."""
    row = next(r for r in rows if (r.get("model"), r["split"]) == ("ckpt", "c0"))
    best = max(RULES, key=lambda k: row[k])
    return f"{RULES[best] if row[best] >= .5 else 'none'} {row[best]:.2f}"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def within(cell, points=.1):
    """Whether our O_FT accuracies on c1 and on c0 are both near the paper's. cell: rows of the table."""
    return all(abs(float(r["accuracy"]) - float(r["paper"])) <= points for r in cell if r["operand"] == "OFT")


def mean_cells(rows):
    """{(lr, C_Tr): rows of the table, one an operand and test set, with the mean accuracy of their seeds}."""
    cells = {}
    for r in rows:
        cells.setdefault((r["lr"], r["c_tr"]), {}).setdefault((r["operand"], r["c_te"]), []).append(r)
    return {cell: [{**some[0], "accuracy": sum(float(r["accuracy"]) for r in some) / len(some)} for some in found.values()]
            for cell, found in cells.items()}


def write_table(end, name):
    """Write results/<name>.csv from the runs in results/tracr/*<end>/, and print how near they are."""
    out = []
    for task, words in (("count", "counter"), ("max", "max-identifier")):
        for path in sorted((RESULTS / f"tracr/{task}{end}").glob("ctr*-seed?.behavior.jsonl")):
            record = json.loads(Path(str(path).replace(".behavior.jsonl", ".json")).read_text())
            args, rows = record["args"], rows_of(path)
            for code, operand in zip(("OPT", "OFT"), args["pair"]):
                for c_te in "10":
                    said = next(r for r in rows
                                if (r.get("model"), r["operand"], r["split"]) == ("ckpt", operand, "c" + c_te))
                    theirs = paper[words, args["lr"], args["c_tr"], code, c_te]
                    out.append({"task": words, "lr": theirs["lr"], "c_tr": theirs["c_tr"], "operand": code, "c_te": c_te,
                                "seed": args["seed"], "accuracy": said["accuracy"], "paper": float(theirs["accuracy"]),
                                "rule": rule_of(rows)})
    if not out:
        return
    out.sort(key=lambda r: (r["task"], -float(r["lr"]), float(r["c_tr"]), r["seed"], r["operand"], r["c_te"]))
    with open(RESULTS / f"{name}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, out[0])
        writer.writeheader()
        writer.writerows(out)
    for words in ("counter", "max-identifier"):
        some = sorted({r["seed"] for r in out if r["task"] == words})
        for seeds in [{s} for s in some if s < 2] + [set(some)] * (len(some) > 1):
            cells = mean_cells(r for r in out if r["task"] == words and r["seed"] in seeds)
            print(f"{name}, {words}, {'mean of seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, sorted(seeds)))}: "
                  f"{len(cells)} of 28 cells, O_FT on c1 and on c0 both within 10 points of the paper's in "
                  f"{sum(map(within, cells.values()))}")


if __name__ == "__main__":
    with open(RESULTS / "paper_tracr.csv", newline="") as f:
        paper = {(r["task"], float(r["lr"]), float(r["c_tr"]), r["operand"], r["c_te"]): r for r in csv.DictReader(f)}
    write_table("", "tracr_table3")
    for end in ("scale1", "literal"):
        write_table("-" + end, "tracr_table3_" + end)
