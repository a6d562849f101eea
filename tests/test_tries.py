"""
Damaged or hostile anything: random changes to checkpoints, rows, records, indices, prepared shards,
tables and parameters, and nasty values of every flag. Whatever they are, a script ends with 0, 1 or
2, without a traceback, and loses no file.

    $ python -m pytest tests/test_tries.py --slow --tries 2000   # another number than 300
"""
import collections
import hashlib
import json
import os
import random
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import analyze
import data
import finetune
import pretrain
from test_promises import FORKS, TINY, Folder, run_forked
from test_tracr import PROGRAMS, arrays_of, compiled, values_of

MEMORY = 12 << 30  # bytes of addresses a try may have
FEW = ["--steps", "3", *TINY]
ANALYZE = ["analyze.py", "--eval-size", "8", "--draws", "1", "--ckpt", "ft.pt", *FEW[:2], *TINY[:2],
           *TINY[4:]]
VALUES = ["", " ", "0", "-1", "1", "3", "nan", "inf", "-inf", "1e400", "1e-400", "1e30", "0x10", "1,2", "1,,2",
          ",", "a", "a,b", "None", "99999999999999999999", "\u2603", "../x", "/dev/null", ".", "~", "*",
          "x" * 5000, "--", "-", "%s{}%", "x\ny", "pre.pt", "ft.json", "no/such/folder/x.pt", "tables",
          "x.pt", "s.txt", "params.npz", "[", "(?P<", "cuda:7", "true", "Twist", "scratch,pre.pt", "1e18"]
LEAVES = [None, True, -1, 0, 1e308, float("nan"), float("inf"), 10 ** 400, "", "x" * 999, [], {}, [[]], "a", 3.5,
          ["a", "b"], {"a": 1}, "count", "\ud800"]


def build(folder):
    """Files of every kind, of tiny runs."""
    tracr = arrays_of(compiled("tracr-count"), PROGRAMS["tracr-count"].alphabet, values_of("tracr-count"))
    np.savez(folder.path / "params.npz", **tracr)
    dice = random.Random(0)
    records = [data.write_story(data.random_features(dice), dice) for _ in range(1000)]
    text = "".join(f"{data.record_text(record)}\n{data.END}\n" for record in records)
    (folder.path / "s.txt").write_text(text)
    stories = ["pretrain.py", "--setup", "stories", "--data", "s.txt", "--out", "spre.pt"]
    for words in (["pretrain.py", *FEW], ["finetune.py", *FEW, "--ckpt", "pre.pt"],
                  ANALYZE, [*stories, *FEW], ["finetune.py", *FEW, "--ckpt", "spre.pt", "--out", "sft.pt"],
                  ["plot.py", ".", "--evidence", "tables", "--figures", "fig6_curves", "fig7_prune"]):
        name = {"pretrain.py": "pre.pt", "finetune.py": "ft.pt"}.get(words[0])
        out = ["--out", name] if name and "--out" not in words else []
        result = folder.run(*words, *out)
        assert result.code == 0 and not result.err, result.raw
    ckpt = torch.load(folder.path / "log/ft.pt")  # stopped on the way
    torch.save({**ckpt, "finished": False, "step": 2}, folder.path / "half.pt")
    for suffix in (".json", ".jsonl"):
        shutil.copy(folder.path / f"ft{suffix}", folder.path / f"half{suffix}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("made"))
    build(folder)
    return folder.path


# ---------------------------------------------------------------- what is changed


def change_bytes(dice, content):
    """A few bits, a piece lost, doubled, zeroed, or something between."""
    content, at = bytearray(content), dice.randrange(max(1, len(content)))
    size, kind = dice.choice((1, 4, 100, 5000)), dice.randrange(6)
    if kind == 0:
        for _ in range(dice.choice((1, 3, 50))):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at:at + size]
    elif kind == 3:
        content[at:at] = content[at:at + size]
    elif kind == 4:
        content[at:at + size] = bytes(len(content[at:at + size]))
    else:
        content[at:at] = bytes(dice.randrange(256) for _ in range(min(size, 100)))
    return bytes(content)


def change_value(dice, value):
    """One leaf of nested dicts and lists is replaced, renamed, or left out."""
    if not isinstance(value, (dict, list)) or not value or dice.random() < .1:
        return dice.choice(LEAVES)
    value = value.copy()
    key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = dice.random()
    if kind < .15:
        del value[key]
    elif kind < .25 and isinstance(value, dict):
        value[f"{key}x"] = value.pop(key)
    else:
        value[key] = change_value(dice, value[key])
    return value


def change_file(dice, path):
    """A change to a file; of half of those that hold values, to a value."""
    content = path.read_bytes()
    if dice.random() < .5 and path.suffix == ".json":
        path.write_text(json.dumps(change_value(dice, json.loads(content))))
    elif dice.random() < .5 and path.suffix == ".jsonl":
        lines = content.splitlines()
        for i in dice.sample(range(len(lines)), min(len(lines), dice.choice((1, 5)))):
            lines[i] = json.dumps(change_value(dice, json.loads(lines[i]))).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif dice.random() < .5 and path.suffix == ".csv":
        lines = [line.split(b",") for line in content.splitlines()]
        line = dice.choice(lines)
        line[dice.randrange(len(line))] = str(dice.choice(LEAVES)).encode(errors="replace")
        path.write_bytes(b"\n".join(map(b",".join, lines)) + b"\n")
    elif dice.random() < .6 and path.suffix == ".npz":
        arrays = dict(np.load(path))
        name = dice.choice(list(arrays))
        array = arrays.pop(name)
        arrays[name] = dice.choice([array[:1], array[None], array.astype(str), np.array(3.), array[..., :0],
                                    np.array("text")]) if array.ndim else np.array("{}")
        np.savez(path, **arrays)
    elif dice.random() < .6 and path.suffix == ".pt":
        change_checkpoint(dice, path)
    else:
        path.write_bytes(change_bytes(dice, content))


def change_checkpoint(dice, path):
    """A checkpoint or a shard with another value inside, its checksums right."""
    ckpt = torch.load(path)
    if "index" in ckpt:
        if dice.random() < .5:
            index = ckpt["index"]
            row, column = dice.randrange(len(index)), dice.randrange(index.shape[1])
            index[row, column] = dice.choice((-1, 0, 1, 7, 2 ** 31 - 1, -2 ** 31))
        else:
            ckpt[dice.choice(("tokens", "index", "about"))] = dice.choice(
                (torch.zeros(3), torch.zeros(0, 11, dtype=torch.int32), "{}", None, ckpt["about"] + "x"))
    else:
        key = dice.choice([key for key in ckpt if key not in ("model", "optimizer")])
        ckpt[key] = change_value(dice, ckpt[key])
    try:
        torch.save(ckpt, path)
    except Exception:  # such a value cannot be saved at all
        path.write_bytes(b"")


FINETUNE = ["finetune.py", *FEW]
PLOT = ["plot.py", ".", "--figures", "fig6_curves", "fig7_prune", "fig9_revive"]
USES = {  # file: commands that read it, or find it in their way
    "pre.pt": [[*FINETUNE, "--ckpt", "pre.pt", "--out", "y.pt"], ["pretrain.py", *FEW, "--out", "pre.pt"],
               [*ANALYZE, "behavior"], PLOT],
    "ft.pt": [[*ANALYZE, "behavior"], [*ANALYZE, "attention"], ["analyze.py", "verdict", "--ckpt", "ft.pt"],
              ["finetune.py", "--reverse", *FEW, "--ckpt", "ft.pt", "--out", "y.pt"], PLOT,
              [*FINETUNE, "--ckpt", "pre.pt", "--out", "ft.pt", "--resume"]],
    "half.pt": [[*FINETUNE, "--ckpt", "pre.pt", "--out", "half.pt", "--resume"],
                [*FINETUNE, "--ckpt", "half.pt", "--out", "y.pt"]],
    "half.json": [[*FINETUNE, "--ckpt", "pre.pt", "--out", "half.pt", "--resume"], PLOT],
    "half.jsonl": [[*FINETUNE, "--ckpt", "pre.pt", "--out", "half.pt", "--resume"], PLOT],
    "ft.json": [PLOT, [*FINETUNE, "--ckpt", "pre.pt", "--out", "ft.pt"], [*ANALYZE, "behavior"]],
    "pre.json": [PLOT, [*ANALYZE, "revive"]],
    "pre.jsonl": [PLOT, [*ANALYZE, "revive"]],
    "ft.jsonl": [PLOT, [*PLOT, "--evidence", "new"]],
    **{f"ft.{kind}.jsonl": [PLOT, ["analyze.py", "verdict", "--ckpt", "ft.pt"],
                            [*PLOT, "--evidence", "new"]]
       for kind in ("behavior", "prune", "probe", "attention", "revive", "revive.curve", "relearn")},
    "ft.verdict.json": [PLOT, ["analyze.py", "verdict", "--ckpt", "ft.pt"]],
    "ft.attention.npz": [PLOT, [*PLOT, "--evidence", "new"], [*ANALYZE, "attention"]],
    "s.txt.unwrap/00000.pt": [
        ["pretrain.py", "--setup", "stories", *FEW, "--data", "s.txt", "--out", "y.pt"],
        ["analyze.py", "behavior", "--eval-size", "2", "--threads", "1", "--ckpt", "sft.pt"]],
    "s.txt": [["pretrain.py", "--setup", "stories", *FEW, "--data", "s.txt", "--out", "y.pt"]],
    "spre.pt": [["finetune.py", *FEW, "--ckpt", "spre.pt", "--out", "y.pt"],
                ["analyze.py", "generate", "--eval-size", "2", "-n", "1", "--ckpt", "spre.pt"]],
    "params.npz": [["pretrain.py", "--setup", "tracr-count", "--params", "params.npz", "--eval-size", "8",
                    "--out", "y.pt"]],
    "tables/runs.jsonl": [["plot.py", "tables"], ["plot.py", ".", "--markdown"]],
    "tables/prune.csv": [["plot.py", "tables"], ["plot.py", ".", "--markdown"]],
    "tables/history.csv": [["plot.py", "tables"], [*PLOT, "--evidence", "tables"]]}
SCRIPTS = {
    "pretrain.py": (pretrain.FLAGS, [["pretrain.py", *FEW, "--out", "y.pt"],
                                     ["pretrain.py", "--setup", "stories", *FEW, "--out", "y.pt"],
                                     ["pretrain.py", "--setup", "tracr-max", "--eval-size", "8", "--out", "y.pt"]]),
    "finetune.py": (finetune.FLAGS, [[*FINETUNE, "--ckpt", "pre.pt", "--out", "y.pt"],
                                     [*FINETUNE, "--ckpt", "spre.pt", "--out", "y.pt"],
                                     ["finetune.py", "--reverse", *FEW, "--ckpt", "ft.pt", "--out", "y.pt"]]),
    "analyze.py": (analyze.FLAGS, [[*ANALYZE, "behavior"], [*ANALYZE, "prune"], [*ANALYZE, "revive"],
                                   [*ANALYZE, "ask"], ["analyze.py", "generate", "--eval-size", "2", "-n", "1",
                                                       "--ckpt", "spre.pt"]])}
OTHERS = {"data.py": ["--setup", "--scale", "-n", "--task", "--operand", "--c", "--q", "--seed"],
          "plot.py": ["--figures", "--format", "--evidence", ""]}  # without a flag: another folder
# By hand: "--steps 1e18" and the like would be right, and never end.
ENDLESS = {"--steps", "--eval-size", "--draws", "-n"}


def nasty_flag(dice):
    """A command with one or two flags more, of nasty values."""
    script = dice.choice([*SCRIPTS] * 3 + [*OTHERS])
    if script in OTHERS:
        words = [script, "-n", "1"] if script == "data.py" else PLOT
        flag = dice.choice(OTHERS[script])
        return [*words, *([flag] if flag else []), dice.choice(VALUES)]
    groups, commands = SCRIPTS[script]
    words, flags = list(dice.choice(commands)), [flag for group in groups.values() for flag in group]
    for flag in dice.sample(flags, dice.choice((1, 1, 2))):
        words.append(flag.name)
        if flag.type is not bool and "Boolean" not in str(flag.type):
            few = [v for v in VALUES if len(v) < 4] if flag.name in ENDLESS else VALUES
            words.append(dice.choice([*few, *map(str, flag.choices or ())]))
    return words


# ---------------------------------------------------------------- one try


def limited(script, words, folder, log):
    """A script in a forked process, with a limit to its memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["HOME"] = str(folder)
    run_forked(script, words, folder, log)


def hashes(path):
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(path.rglob("*")) if p.is_file()}


def may_change(name, words, made_new):
    """Whether a command may write a file: its own outputs, by their names."""
    script, own = words[0], ()
    if script in ("pretrain.py", "finetune.py"):
        out = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--out", "--keep")]
        own = tuple(os.path.basename(path).removesuffix(".pt") for path in out)
        if "--force" not in words and not made_new:
            own = tuple(base for base in own if base in ("half", "y"))
        return name.startswith(own or ("\0",)) or ".unwrap/" in name
    if script == "analyze.py":
        return name.startswith(("ft.", "sft.", "spre.", "pre.")) and not name.endswith(
            (".pt", "ft.json", "pre.json", "ft.jsonl", "pre.jsonl")) or ".unwrap/" in name
    # an evidence folder's tables are written anew
    return name.startswith(("figures/", "report.html", "new", "tables/")) or name == "README.md"


def one_try(made, where, number, seed):
    """None, or what went wrong."""
    dice, path = random.Random(f"{seed}/{number}"), where / str(number)
    shutil.copytree(made, path)
    shutil.rmtree(path / "log")
    (path / "log").mkdir()
    if number % 3:
        name = dice.choice(list(USES))
        change_file(dice, path / name)
        words = dice.choice(USES[name])
    else:
        name, words = None, nasty_flag(dice)
    before, log = hashes(path), str(path / "log" / "try")
    process = FORKS.Process(target=limited, args=(words[0], words[1:], path, log))
    process.start()
    process.join(25)
    stopped = process.exitcode is None
    if stopped:  # right, but long: it has to stop when it is told to
        os.kill(process.pid, signal.SIGTERM)
        process.join(25)
    if process.exitcode is None:
        process.kill()
    with open(log + ".err", errors="replace") as err:
        text = err.read()
    shutil.rmtree(path / "log")
    after = hashes(path)
    lost = [file for file in before if after.get(file) != before[file]
            and (file not in after or not may_change(file, words, False))]
    odd = [file for file in after if file.endswith((".part", ".lock"))]
    fine = process.exitcode in (0, 1, 2) or stopped and process.exitcode == 143
    shutil.rmtree(path)
    if fine and "Traceback" not in text and not lost and not odd:
        return None
    return f"try {number} of seed {seed}: changed {name}, {words}: {process.exitcode}, {lost}, {odd}\n{text[-1500:]}"


@pytest.mark.slow
def test_tries(made, tmp_path, request):
    """Two of every three change a file, the third gives nasty values to flags."""
    number, seed = request.config.getoption("--tries"), request.config.getoption("--tries-seed")
    with ThreadPoolExecutor(2) as pool:
        wrong = list(filter(None, pool.map(lambda i: one_try(made, tmp_path, i, seed), range(number))))
    assert not wrong, f"{len(wrong)} of {number}\n" + "\n".join(wrong)


def test_a_few_tries(made, tmp_path):
    """Of those above, also in the usual run."""
    wrong = list(filter(None, (one_try(made, tmp_path, i, 0) for i in range(6))))
    assert not wrong, "\n".join(wrong)


def test_changes_are_changes(made):
    """Nearly every one makes another file: none is tried in vain."""
    kinds = collections.Counter()
    for i, name in enumerate(USES):
        path = made / f"log/{os.path.basename(name)}"
        for k in range(3):
            shutil.copy(made / name, path)
            change_file(random.Random(f"{i}{k}"), path)
            kinds[path.read_bytes() != (made / name).read_bytes()] += 1
    assert kinds[True] > 10 * kinds[False]
