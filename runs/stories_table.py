"""
Write results/stories_table1.csv from the histories in results/stories/: each cell of the paper's Table 1, ours.

    $ python runs/stories_table.py      # needs nothing but the histories; runs that are not there are left out
"""
import csv
import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
STEPS = (0, 10, 30, 100)  # of reverse fine-tuning; the paper's 0, 30, 300, 3000

out = []
for path in sorted((RESULTS / "stories").glob("*.json")):
    record = json.loads(path.read_text())
    args = record.get("args", {})
    if not args.get("reverse"):
        continue
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    for r in rows:
        if r["split"] == "asked" and r["step"] in STEPS:
            out.append({"protocol": args["protocol"] or "not-in-pretraining",
                        "lr": args["deletion_lr"] or "", "reft_step": r["step"],
                        "twist": r["accuracy"], "n": r["n"], "parsed": r["parsed"], "seed": args["seed"]})
order = ("filter", "randomise", "mix-match", "not-in-pretraining")
out.sort(key=lambda r: (-(r["lr"] or 0), order.index(r["protocol"]), r["seed"], r["reft_step"]))
with open(RESULTS / "stories_table1.csv", "w", newline="") as f:
    writer = csv.DictWriter(f, ("protocol", "lr", "reft_step", "twist", "n", "parsed", "seed"))
    writer.writeheader()
    writer.writerows(out)
print(f"results/stories_table1.csv: {len(out)} rows")
