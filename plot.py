"""
Draw what the other scripts wrote: figures after the paper's, tables, one page that holds them all.

    $ python plot.py                    # all runs under out/: out/figures/ and out/report.html
    $ python plot.py results/count      # the same from the committed tables
    $ python plot.py out/count --evidence results/count      # raw runs as tables to be committed
    $ python plot.py results --markdown                      # results/README.md, whole

Reads files only: no checkpoint, no torch. One run takes about 5 seconds. Runs that differ in
nothing but the seed are one group. To add a figure or a table: one function with its decorator.

Fractions in the files, percent in figures and tables. O_PT, O_FT: operand of pretraining, of
fine-tuning.
"""
import argparse
import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import os
import re
import secrets
import sys
import textwrap
from functools import partial
from itertools import product
from os.path import abspath, basename, dirname, isdir, isfile, join, normpath, relpath, splitext
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

FIRST = "matplotlib" not in sys.modules
BACKEND = os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
import matplotlib.figure  # noqa: E402
import matplotlib.image  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import PowerNorm  # noqa: E402

if BACKEND is not None:
    os.environ["MPLBACKEND"] = BACKEND
if BACKEND and FIRST:  # else who imported matplotlib has chosen
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = BACKEND

KINDS = {  # kinds of rows, X.<kind>.jsonl (history: X.jsonl): a row without these keys is left out
    "history": {"step", "operand", "split"},
    "behavior": {"model"},
    "prune": {"unit", "score", "order", "edit", "k"},
    "probe": {"model", "block", "target", "prompt", "labels"},
    "attention": {"model", "block", "head", "prompt", "region", "mass", "chance"},
    "hidden": {"model", "block", "cosine"},
    "revive": {"arm", "threshold", "steps", "max_steps"},
    "revive.curve": {"arm", "step"},
    "relearn": {"arm", "answers", "half", "step"}}
ROW = ("setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor", "n",
       "loss", "seed")  # in every row, null where there is none
TEXT = {"operand", "target", "prompt", "labels", "region"}  # "5", "true"
NO_SHARE = ("loss", "auc", "balanced")  # not a share of n: no Wilson interval
NUMBERS = ("accuracy", "parsed", "judge", *NO_SHARE)  # a number or null, else the row is left out
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, csv.Error)
PRIORS = {(.999, .001, 0): "low", (.9, .1, 0): "medium", (.5, .3, .2): "high"}
OBSERVING = {"seed", "taught", "eval_every", "eval_size", "save_every", "keep", "compile", "setup",
             "scale", "program", "data", "params"}  # arguments that make no group; of files,
#                                                   `source` and `program` say what they are
INHERITED = {"prior", "task", "pair", "operand", "q", "reverse", "feature", "without", "source",
             "protocol", "probability"}  # said once, by the last stage
DETAIL = re.compile("^(task|feature|text|.*checkpoint|base_.._c.|ft_c0_cross.*)$|follows|"
                    "_(draws|block|parsed|reached)$")  # of a verdict, not in its table
RULES = {"share_a": "a", "share_b": "b", "share_a_plus_q": "a+q", "share_blend": "blend",
         "share_constant": "constant"}

# a look: label, colour (of Okabe and Ito), marker, line style
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, DARK = "#CC79A7", "#56B4E9", "#777777", "#444444"
SPLITS = {"c0": ("c0", BLUE, "o", "-"), "c1": ("c1", ORANGE, "s", "-"),
          "natural": ("natural", GREEN, "^", "-")}
MODELS = {"base": ("base", BLUE, "s", "-"), "ckpt": ("fine-tuned", RED, "o", "-"),
          "untrained": ("untrained", GREY, "^", "-."),
          "control": ("never-trained control", GREEN, "v", ":")}
FLOORS = {"floor": ("majority floor", DARK, "|", "--"),
          "cross_floor": ("cross floor", DARK, "2", ":")}
CYCLE = [(BLUE, "o", "-"), (GREEN, "^", "--"), (RED, "s", "-."), (PURPLE, "D", ":"),
         (ORANGE, "P", "-"), (SKY, "X", "--"), (GREY, "v", "-.")]  # looks without their labels


def note(text):
    print(text, flush=True)


def attempt(name, function, *args):
    """function(*args). Returns None, with a note, if rows are malformed."""
    try:
        return function(*args)
    except MALFORMED as error:
        note(f"{name}: left out, not as expected ({type(error).__name__}: {error})")


def at_most(limit, items, what):
    """The first items, with a note if some are left out."""
    if len(items) > limit:
        note(f"{what}: only {limit} of {len(items)} are drawn (plot a folder that holds fewer)")
    return items[:limit]


# ---- runs


def value_of(text, column=None):
    """What a line or a cell says: null, text, or what JSON makes of it."""
    if not text or column in TEXT:
        return text or None
    try:
        return json.loads(text)
    except ValueError:
        return text


def row_of(cells, constants):
    """A row of a .csv table; None if a cell is missing or too many, or its run is unknown."""
    if cells.get("run") not in constants or None in cells or None in cells.values():
        return None
    row = {column: value_of(cell, column) for column, cell in cells.items()}
    return {**dict.fromkeys(ROW), **constants[cells["run"]], **row}


def read_rows(path, keys, constants=None):
    """
    The rows with these keys, and numbers where numbers belong, of a .jsonl file, or of a .csv table
    with constants {run: {column: its one value}}. A note says what is left out; [] without a file.
    """
    rows, broken = [], 0
    if not isfile(path):
        return rows
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        of_table = partial(row_of, constants=constants)
        for row in map(value_of, filter(str.strip, file)) if constants is None else map(
                of_table, csv.DictReader(file)):
            if isinstance(row, dict) and keys <= set(row) and all(
                    isinstance(row.get(key), (int, float, type(None))) for key in NUMBERS):
                rows.append(row)
            else:
                broken += 1
    if broken or not rows:
        words = f"{broken} broken line{'s' * (broken > 1)} left out" if broken else "empty"
        note(f"{path}: {words}")
    return rows


def read_file(path, read):
    """read(file); None without the file, or with a note if it is not readable."""
    try:
        with open(path, "rb") as file:
            return read(file)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever json, zipfile, zlib or numpy makes of a damaged file
        note(f"{path}: left out, not readable ({type(error).__name__})")


def read_maps(prefix, start, kind):
    """The arrays of an .npz file whose names begin so, by the rest of the name."""
    arrays = read_file(f"{prefix}{kind}.npz", lambda file: dict(np.load(file))) or {}
    return {name[len(start):]: z for name, z in arrays.items() if name.startswith(start)}


def paper_rows(name):
    """The rows of one of the paper's tables in results/; [] without it."""
    path = join(dirname(abspath(__file__)), "results", name)
    return read_file(path, lambda file: list(csv.DictReader(io.TextIOWrapper(file)))) or []


def digest(file):
    """sha256 of an open file."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def raw_run(prefix):
    """A run from X.json, X.verdict.json, X.jsonl, X.behavior.jsonl, X.attention.npz ... and X.pt"""
    rows = {}
    for kind, keys in KINDS.items():
        rows[kind] = read_rows(f"{prefix}.{kind}.jsonl".replace(".history", ""), keys)
    return SimpleNamespace(record=read_file(prefix + ".json", json.load), rows=rows,
                           verdict=read_file(prefix + ".verdict.json", json.load),
                           maps=partial(read_maps, prefix + ".", ""),
                           sha256=read_file(prefix + ".pt", digest))


def committed_runs(folder):
    """The same from runs.jsonl and the tables beside it: {folder/run: run}."""
    runs, lines = {}, read_rows(join(folder, "runs.jsonl"), {"run", "record"})
    for line in lines:
        runs[join(folder, line["run"])] = SimpleNamespace(
            record=line["record"], rows={kind: [] for kind in KINDS}, verdict=line.get("verdict"),
            maps=partial(read_maps, join(folder, ""), line["run"] + "/"), sha256=None)
    for kind, keys in KINDS.items():
        path = join(folder, f"{kind}.csv")
        constants = {line["run"]: line.get("constants", {}).get(kind, {}) for line in lines}
        for row in attempt(path, read_rows, path, keys, constants) or ():
            runs[join(folder, row.pop("run"))].rows[kind].append(row)
    return runs


def find_runs(folder):
    """The finished runs under a folder, raw or committed; one line for each that is left out."""
    entries, runs, seen = {}, {}, set()
    for where, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(where))
        folders[:] = [x for x in sorted(folders) if os.path.realpath(join(where, x)) not in seen]
        if "runs.jsonl" in names:
            entries.update(attempt(where, committed_runs, where) or {})
        for name in sorted(names):
            if name.endswith(".json") and not name.endswith(".verdict.json"):
                prefix = join(where, name[:-5])
                entries[prefix] = raw_run(prefix)
    entries = {prefix: run for prefix, run in entries.items() if isinstance(run.record, dict)
               and run.record.get("stage") and isinstance(run.record.get("args"), dict)}
    for prefix in entries:
        name = relpath(prefix, folder)
        run = attempt(name, open_run, name, prefix, entries)
        if run and run.identity in runs:
            same = runs[run.identity]
            if None not in (same.sha256, run.sha256) and same.sha256 != run.sha256:
                note(f"{name}: left out, as {same.name} but of another checkpoint")
                continue
            note(f"{name}: the same run as {same.name}, which gets what rows it has besides")
            same.rows, same.verdict = ({k: same.rows[k] or v for k, v in run.rows.items()},
                                       same.verdict or run.verdict)
        elif run:
            runs[run.identity] = run
    for run in runs.values():
        if run.kind == "reFT" and run.parent:
            entries[run.parent].reversed = run
    return list(runs.values())


def only_own(name, run):
    """
    Leaves out, and names, what is not of the record's checkpoint. Of an older record, which does
    not name it, the checkpoint file decides, and unmarked rows count as its own.
    """
    said = run.record.get("sha256")
    own = {said} if said else {run.sha256, None}

    def left_out(what):
        return note(f"{name}: {what} left out, of another checkpoint")
    for kind, rows in run.rows.items() if said or run.sha256 else ():
        if kind != "history" and not all(row.get("checkpoint") in own for row in rows):
            run.rows[kind] = [row for row in rows if row.get("checkpoint") in own]
            left_out(f"{len(rows) - len(run.rows[kind])} of {len(rows)} rows of {kind}")
    if isinstance(run.verdict, dict) and (said or run.sha256) \
            and run.verdict.get("checkpoint") not in own:
        run.verdict = left_out("verdict")
    read = run.maps

    def maps(kind):
        arrays = read(kind)
        of = str(arrays.get("checkpoint", [None])[0])
        return left_out(f"maps of {kind}") or {} if of not in map(str, own) and arrays else arrays
    run.maps = maps if said or run.sha256 else read


def open_run(name, prefix, entries):
    """
    Completes a run with what makes its group. answers: rows of behavior about the pair; role: whose
    operand a row is about; reversed: its reFT.
    """
    run = entries[prefix]
    record, args, rows = run.record, run.record["args"], run.rows
    if "seconds" not in ([record] + (record.get("resumes") or []))[-1]:
        return note(f"{name}: left out, unfinished")
    if run.sha256 and record.get("sha256", run.sha256) != run.sha256:
        return note(f"{name}: left out, its record is of another checkpoint than {name}.pt")
    only_own(name, run)
    run.sha256 = record.get("sha256") or run.sha256
    rows["answers"] = [row for row in rows["behavior"] if row.get("share_a") is not None]
    first = next((rows[kind][0] for kind in rows if rows[kind]), {})
    pair = args.get("pair") or ["a", "b"]
    for kind in KINDS:
        for row in rows[kind]:
            row["role"] = {pair[0]: "O_PT", pair[1]: "O_FT"}.get(row.get("operand"), "other")
            if "arm" in KINDS[kind]:
                lr = row.get("lr") if kind != "relearn" else None  # the same for all
                row["label"] = arm_label(str(row["arm"]), lr, args.get("lr"))
            if kind.startswith("revive"):
                limit = row.get("max_steps")
                row["value"] = f"> {limit}" if row.get("steps") is None else str(row["steps"])
    setup = first.get("setup") or args.get("setup") or "pcfg"
    settings = {"setup": setup, "scale": first.get("scale"), **settings_of(prefix, entries)}
    stage = "reFT" if args.get("reverse") else record["stage"].replace("finetune", "fine-tuning")
    group = stage + json.dumps(settings, sort_keys=True)
    verdict = run.verdict if isinstance(run.verdict, dict) else None
    rows["verdict"] = list(verdict_rows(verdict or {}))
    rows["evidence"] = attempt(name, evidence_rows, verdict or {}) or []
    sha256 = (record.get("parent") or {}).get("sha256")
    vars(run).update(
        name=name, args=args, pair=pair, settings=settings, kind=stage, group=group,
        last=max(values_of(rows["history"], "step"), default=None), verdict=verdict,
        parent=parent_of(prefix, entries), reversed=None,
        identity=json.dumps([group, args.get("seed"), sha256]))
    return run


def evidence_rows(verdict):
    """Its evidence but for steps; about: the question without what was chosen."""
    return [{"about": f"{line['instrument']}: {line['question'].split(',')[0]}", **line}
            for line in verdict.get("evidence") or () if line.get("unit") != "steps"]


def verdict_rows(verdict):
    """Its numbers; steps in words, > where the threshold was not reached."""
    for key, value in verdict.items():
        if key.endswith("_steps") and value is not None:
            value = "> " * (not verdict.get(key.replace("steps", "reached"))) + f"{value:g}"
        if isinstance(value, (int, float, str)) and not DETAIL.search(key):
            yield {"key": key.replace("_", " "), "value": value}


def settings_of(prefix, entries):
    """A run's arguments and those of its ancestors, less what only observes: equal in a group."""
    settings, stage, seen = {}, "", set()
    while prefix and prefix not in seen:
        seen.add(prefix)
        hidden, args = OBSERVING | INHERITED if stage else OBSERVING, entries[prefix].record["args"]
        settings.update({stage + k: v for k, v in args.items() if k not in hidden})
        if "step" in entries[prefix].record:  # kept on the way
            settings[f"{stage}kept at step"] = entries[prefix].record["step"]
        prefix = parent_of(prefix, entries)
        stage = f"{entries[prefix].record['stage']} " if prefix else ""
    return settings


def parent_of(prefix, entries):
    """
    The run that is a parent, by its checkpoint's sha256; of older records by folder and name, or
    name beside its child; None: not there.
    """
    parent = entries[prefix].record.get("parent") or {}
    said = {entry: run.record.get("sha256") or run.sha256 for entry, run in entries.items()}
    same = [entry for entry in entries if said[entry] and said[entry] == parent.get("sha256")]
    path = splitext(normpath(parent.get("path") or "?"))[0]
    tail = os.sep + os.sep.join(path.split(os.sep)[-2:])
    beside = abspath(join(dirname(prefix), basename(path)))
    named = [entry for entry in entries if not said[entry] and abspath(entry).endswith(tail)]
    named += [entry for entry in entries if not said[entry] and abspath(entry) == beside]
    return [*same, *named, None][0]


def arm_label(arm, lr, own_lr):
    """An arm of revive in words, its rate beside the fine-tuning's own."""
    if arm == "pretraining":
        return "pretraining, own rate"
    words = "reFT" if arm == "reft" else re.sub("^teach-(.)", r"teach \1", arm)
    words, ratio = words.replace("-base", " to base"), lr / own_lr if lr and own_lr else None
    if ratio is None:
        return words
    return words + (", same rate" if abs(ratio - 1) < .01 else f", rate x {ratio:.3g}")


# ---- groups


def describe(key, value):
    """A setting in words, with spaces that do not break in a title."""
    if key == "prior" and isinstance(value, list):
        value = PRIORS.get(tuple(value)) or "/".join(map(str, value))
    if key == "pair" and isinstance(value, list):
        return "O_PT {}, O_FT {}".format(*value)
    if isinstance(value, bool):
        return key if value else f"no {key}"
    if isinstance(value, float):
        small = 0 < abs(value) < .01 or key.endswith("lr")
        value = rate_words(value) if small else f"{value:g}"
    return f"{key.replace('_', ' ').replace('c tr', 'C_Tr')}\xa0{value}"


def rate_words(value):
    """1e-4, 1.5e-4"""
    return np.format_float_scientific(value, trim="-", exp_digits=1)


def having(runs, kind, stages=None, max_groups=None):
    """
    The groups (runs equal in all but the seed) with rows of a kind, `max_groups` of them at most.
    Their labels say what differs among them, or the main settings of a single one.
    """
    groups = {}
    for run in runs:
        if run.rows[kind] and (stages is None or run.kind in stages):
            groups.setdefault(run.group, []).append(run)
    groups = [SimpleNamespace(runs=members, kind=members[0].kind, pair=members[0].pair,
                              settings=members[0].settings) for members in groups.values()]
    for group in groups:
        group.label = label_of(group, groups)
    groups.sort(key=order_of)
    return at_most(max_groups, groups, f"{kind}: groups") if max_groups else groups


def varies(key, rows):
    """Whether rows (or settings) differ in a key."""
    return len({json.dumps(row.get(key)) for row in rows}) > 1


def label_of(group, groups):
    """What differs from the groups of its kind; a setting of an ancestor, among those with one."""
    setup, keys = group.settings["setup"], []
    others = [o.settings for o in groups if (o.kind, o.settings["setup"]) == (group.kind, setup)]
    for key in dict.fromkeys(sum(map(list, others), [])):
        if varies(key, [s for s in others if " " not in key or s.get(key) is not None]):
            keys.append(key)
    keys = [key for key in keys if key != "operand" or "pair" not in keys]
    words = [describe(key, group.settings[key]) for key in keys or ["task", "prior", "c_tr", "lr"]
             if group.settings.get(key) is not None]
    named = group.kind == "reFT" or any(other.kind != group.kind for other in groups)
    words = [setup] * varies("setup", [other.settings for other in groups]) + words
    seed, more = group.runs[0].args.get("seed"), len(group.runs)
    seeds = f"{more}\xa0seeds" if more > 1 else f"seed\xa0{seed}"
    return ", ".join([group.kind] * named + words) + f" ({seeds})"


def order_of(group):
    """Low prior first, then by correlation and rate."""
    prior, c_tr, lr = map(group.settings.get, ("prior", "c_tr", "lr"))
    return group.kind == "reFT", [-p for p in prior or ()], c_tr or 0, lr or 0


# ---- numbers


def fits(row, want):
    """Whether a row has these values (a tuple: one of them)."""
    return all(row.get(key) in value if isinstance(value, tuple) else row.get(key) == value
               for key, value in want.items())


def select(group, kind, key=None, **want):
    """A list a run: its rows that fit and, with a key, have a value there."""
    def wanted(row):
        return fits(row, want) and (key is None or row.get(key) is not None)
    return [list(filter(wanted, run.rows[kind])) for run in group.runs]


def flat(group, kind, **want):
    return sum(select(group, kind, **want), [])


def values_of(rows, key):
    return [row[key] for row in rows]


def wilson(p, n, z=1.96):
    """95 % interval of a share p of n."""
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** .5
    return min(p, (middle - half) / (1 + z * z / n)), max(p, (middle + half) / (1 + z * z / n))


def spread(group, kind, key="accuracy", times=100, **want):
    """
    (mean, low, high, values) over the runs of a group, in percent (times 1: as they are), or None.
    One run: the Wilson interval of its n strings (stories: those that parse); several: smallest and
    largest.
    """
    runs = list(filter(None, select(group, kind, key, **want)))
    if not runs:
        return None
    values, first = [np.mean(values_of(rows, key)) for rows in runs], runs[0][0]
    parsed = 1 if first.get("parsed") is None else first["parsed"]
    n = 0 if key in NO_SHARE else (first.get("n") or 0) * parsed
    low, high = wilson(values[0], n) if len(values) == 1 and n else (min(values), max(values))
    mean = np.mean(values)
    low, high = min(low, mean), max(high, mean)  # rounding
    return times * mean, times * low, times * high, times * np.array(values)


def bands(group, kind, x, key="accuracy", times=100, **want):
    """spread() at every x where all runs of a group have a value: {x: spread}."""
    places = [set(values_of(rows, x)) for rows in select(group, kind, key, **want) if rows]
    shared = sorted(set.intersection(*places)) if places else ()
    return {at: spread(group, kind, key, times, **want, **{x: at}) for at in shared}


# ---- drawing

RC = {  # all else as matplotlib comes, whatever is configured
    **{key: matplotlib.rcParamsDefault[key] for key in matplotlib.rcParamsDefault
       if not key.startswith("backend")},
    "figure.constrained_layout.use": True, "figure.dpi": 100, "font.size": 8.5,
    "axes.titlesize": 9, "figure.titlesize": 9.5, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e6e6", "lines.markersize": 4, "legend.frameon": False,
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "unwrap"}  # text stays text
FIGURES, LOOKS = {}, {}
WIDTH = 9.1  # inches: 910 pixels, the width of the page


def look_of(kind, label):
    """The colour, marker and line style of a label among those of its kind seen so far."""
    looks = LOOKS.setdefault(kind, {})
    return looks.setdefault(label, CYCLE[len(looks) % len(CYCLE)])


def caption_of(function):
    """The docstring of a figure or table; python -OO has none."""
    return " ".join((function.__doc__ or function.__name__).split())


class Figure(NamedTuple):
    function: object
    stories: object  # whether it is about stories; None: about all setups


class Series(NamedTuple):
    """A line of lines(), or marks of dots()."""
    label: str
    color: str
    marker: str
    ls: object
    points: dict  # {place: spread() or None}
    floors: dict = {}  # {label: (height, colour, line style)}
    rings: tuple = ()  # (x, y) of what was chosen on other strings


def figure(kind=None, limit=4, stages=("fine-tuning", "reFT"), stories=False, **words):
    """
    Registers a figure; its docstring is the caption. With a kind of rows: a function of a group
    that returns panels (functions of axes); without: of runs, that returns compose(...). stories:
    of runs of stories, else of all others; None: of all.
    """
    def register(function):
        def of_groups(runs):
            groups = having(runs, kind, stages, limit)
            return compose(groups, kind, [(g.label, function(g)) for g in groups], **words)
        of_groups.__doc__ = function.__doc__
        FIGURES[function.__name__] = Figure(of_groups if kind else function, stories)
        return function
    return register


def line(look, group, kind, x, floors=None, **want):
    """A Series of want's `key`, else accuracy, over x, with floors in a colour."""
    key, heights = want.pop("key", "accuracy"), {}
    times = 100 if key == "accuracy" else 1
    for column, (label, *_, ls) in FLOORS.items() if floors else ():
        floor = spread(group, kind, column, **want)
        if floor and floor[0] < 99.9:  # the cross floor of c1 is 100 % by construction
            heights[label] = floor[0], floors, ls
    rings = [(row[x], times * row[key]) for row in flat(group, kind, chosen=True, **want)]
    return Series(*look, bands(group, kind, x, key, times, **want), heights, rings)


def marks(look, group, kind, cells, **want):
    """A Series of spread() for cells {place: its arguments}."""
    points = {place: spread(group, kind, **{**want, **cell}) for place, cell in cells.items()}
    return Series(*look, points)


def symbols(text, form):
    return re.sub(r"\b(O|C|eta)_(PT|FT|Tr|M|S)\b", form, text)


def tex(text):
    """Symbols with their subscripts; other dollar signs are text."""
    text = symbols(str(text).replace("$", r"\$"), r"$\1_{\\mathrm{\2}}$")
    return text.replace("$eta", r"$\eta")


def scale_axis(axis, label, places=()):
    """Percent, AUC, blocks; steps and K: logarithmic with a zero, the untouched model."""
    axis.set_label_text(tex(label))
    if "%" in label:
        axis.axes.set(**{f"{axis.axis_name}lim": (-4, 106)})
        axis.set_ticks(range(0, 101, 25))
    elif label == "AUC":
        axis.axes.set_ylim(.4, 1.03)
    elif "block" in label:
        axis.set_ticks(places)
    elif "step" in label or "K" in label:
        least, largest = min((x for x in places if x > 0), default=1), max(places, default=1)
        axis.axes.set_xscale("symlog", linthresh=least, linscale=.4)
        digits = (1, 3) if largest < 200 * least else (1,)
        ticks = [digit * 10 ** e for e in range(7) for digit in digits]
        axis.set_ticks([0] + [tick for tick in ticks if least <= tick <= largest])
        axis.set_major_formatter("{x:g}")
        axis.axes.set_xlim(-.15 * least, largest * 1.3)


def lines(series, title="", x="step (updates)", y="accuracy (%)"):
    """A panel of curves with bands, floors and rings."""
    def draw(ax):
        for label, color, marker, ls, points, floors, rings in series:
            if points:
                mean, low, high = list(zip(*points.values()))[:3]
                ax.plot(list(points), mean, color=color, marker=marker, ls=ls, label=tex(label),
                        markevery=max(1, len(points) // 12))
                ax.fill_between(list(points), low, high, color=color, alpha=.13, lw=0)
            for ring in rings if marker else ():
                ax.plot(*ring, "o", mfc="none", mec=color, ms=7)
            for name, (height, color, ls) in floors.items():
                ax.axhline(height, color=color, ls=ls, lw=1, zorder=1, label=name)
        ax.set_title(tex(title))
        scale_axis(ax.xaxis, x, sorted(set().union(*[one.points for one in series])))
        scale_axis(ax.yaxis, y)
        ax.label_outer()
    return draw


def curves(cells, looks, axes=(), **want):
    """A panel of lines for each of cells {title: arguments of line()}, in looks {look: more}."""
    panels = []
    for title, cell in cells.items():
        series = [line(look, **{**want, **cell, **own}) for look, own in looks.items()]
        panels.append(lines(series, title, *axes))
    return panels


def dots(series, names, title="", x="accuracy (%)"):
    """A panel with a line for each name, marks with whiskers on it; a style joins two of them."""
    def draw(ax):
        joined, places = series[0].ls, []
        for i, (label, color, marker, _, points, *_) in enumerate(series):
            apart = 0 if joined else .6 * ((i + .5) / len(series) - .5)
            for y, name in enumerate(names):
                if points.get(name):
                    mean, low, high = points[name][:3]
                    whiskers = None if marker in "|2" else [[mean - low], [high - mean]]
                    ax.errorbar(mean, y + apart, xerr=whiskers, color=color, marker=marker, ms=5.5,
                                capsize=2, ls="", label=tex(label))
                    places.append(mean)
        for y, name in enumerate(names if joined else ()):
            ends = [one.points[name][0] for one in series[:2] if one.points[name]]
            ax.plot(ends, [y] * len(ends), color="#cccccc", lw=3, zorder=1)
        ax.set(ylim=(len(names) - .5, -.5), title=tex(title))
        ax.set_yticks(range(len(names)), map(tex, names))
        scale_axis(ax.xaxis, x, places)
    return draw


def picture(values, names, title, norm, cmap="Blues"):
    """A panel with a map; names: of the rows, of the columns."""
    def draw(ax):
        ax.imshow(values, cmap=cmap, norm=norm, aspect="auto")
        ax.set_yticks(range(len(names[0])), names[0])
        ax.set_xticks(range(len(names[1])), names[1])
        ax.tick_params(length=0, labelsize=5.5 if len(names[1]) > 20 else 7)
        ax.set_title(tex(title))
        ax.grid(False)
    return draw


def compose(groups, kind, blocks, across=4, **words):
    """
    (figure, what its numbers rest on), None without panels. blocks: [(label, panels)], panels side
    by side below their label, `across` in a row at most. words: height of a row (inches); share:
    one y axis in a block; rests.
    """
    blocks = [block for block in blocks if block[1]]
    if not blocks:
        return None
    panels = max(len(drawn) for _, drawn in blocks)
    rows = -(-len(blocks) // max(1, across // panels))
    beside = -(-len(blocks) // rows)
    height = words.get("height") or 1 + .45 * WIDTH / max(2, beside * panels)
    fig, entries = matplotlib.figure.Figure(figsize=(WIDTH, 1)), {}
    for (label, drawn), part in zip(blocks, fig.subfigures(rows, beside, squeeze=False).flat):
        part.suptitle(tex(textwrap.fill(label, 120 // beside)))
        axes = part.subplots(1, panels, squeeze=False, sharey=words.get("share", True))[0]
        for ax, draw in zip(axes, drawn):
            draw(ax)
            handles, labels = ax.get_legend_handles_labels()
            entries = {**dict(zip(labels, handles)), **entries}
        for ax in axes[len(drawn):]:
            ax.set_visible(False)
    n = sorted({row["n"] for g in groups for row in flat(g, kind) if row.get("n")}) or ["?"]
    rests = words.get("rests") or f"n = {' to '.join(map(str, n[:1] + n[1:][-1:]))} a point; " \
        "bands, whiskers: smallest to largest seed, of one seed the 95 % Wilson interval"
    columns = 165 // (9 + max(map(len, entries), default=0)) or 1
    fig.set_figheight(rows * height + .4 - (-len(entries) // columns) * .2)
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", handlelength=3,
               ncol=min(columns, max(1, len(entries))), title=rests)
    return fig, rests


# ---- figures


@figure("evidence", 8, stories=None, across=2, height=2.6,
        rests="whiskers: smallest to largest seed")
def evidence(group):
    """
    What the verdict rests on (%): each measurement beside its control. Behaviour says what is left
    outside; pruning, probing and relearning whether the old capability is inside all the same.
    Fooled by: a control that cannot be lower (see its name in the table); reviving is counted in
    steps, and stands in the table alone.
    """
    names = dict.fromkeys(row["about"] for row in flat(group, "evidence"))
    cells = {name: {"about": name} for name in names}
    looks = {"measured": ("measured", RED, "o", "-"),
             "control_measured": ("its control", GREY, "s", "-")}
    series = [marks(look, group, "evidence", cells, key=key) for key, look in looks.items()]
    return [dots(series, names, x="share (%)")]


def behaviour(group, cells, floors=()):
    """Base and checkpoint in these cells, with the floors."""
    return [marks(MODELS[m], group, "answers", cells, model=m) for m in ("base", "ckpt")] + [
        marks(FLOORS[key], group, "answers", cells, key=key) for key in floors]


def roles(group):
    """With their letters."""
    return {"O_PT": f"O_PT = {group.pair[0]}", "O_FT": f"O_FT = {group.pair[1]}"}


@figure("answers", 8, height=2.3)
def fig5_behavior(group):
    """
    Accuracy (%) before and after. c0: the spurious relation never holds; c1: always. A wrapper:
    O_FT high on c1 and low on c0, O_PT low.
    Fooled by: c1 alone, where the shortcut r(O_PT) + q is the right answer for O_FT.
    """
    cells = {f"{label} on {split}": {"role": role, "split": split}
             for role, label in roles(group).items() for split in SPLITS}
    return [dots(behaviour(group, cells, FLOORS), cells)]


@figure("answers", 8, height=2.3)
def rules(group):
    """
    Share (%) of the answers on c0 strings that a rule explains. a, b: the true result for O_PT, for
    O_FT; a+q: the shortcut; blend: (a + b + q) / 2, rounded down; constant: the most frequent
    answer, a floor for the others.
    Fooled by: adding up. Rules overlap; no rule: none of them explains the answer.
    """
    panels = []
    for role, label in roles(group).items():
        cells = {name: {"key": key, "role": role, "split": "c0"}
                 for key, name in {**RULES, "share_none": "no rule"}.items()}
        panels.append(dots(behaviour(group, cells), cells, f"asked {label}", "answers on c0 (%)"))
    return panels


@figure("history", 16)
def fig6_curves(group):
    """
    Accuracy (%) against the step, with the floors of each set: c0, the spurious relation never
    holds; c1, always. O_PT falls while O_FT rises on c1 alone: a wrapper. count-j1, -j2: asked by
    tokens that fine-tuning does not see (jailbreaks).
    Fooled by: the warm-up, which keeps the rate near zero at first; unequal rates.
    """
    looks = {look: {"split": split, "floors": look[1]} for split, look in SPLITS.items()}
    own = group.settings.get("task")
    cells = {label: {"role": role, "task": own} for role, label in roles(group).items()}
    tasks = sorted({row["task"] for row in flat(group, "history", role="O_PT")} - {own})
    for task, color in zip(tasks, (PURPLE, SKY)):
        looks[f"c0, {task}", color, "x", ":"] = {"split": "c0", "task": task}
    return curves(cells, looks, group=group, kind="history", x="step")


def sweeps(group, **want):
    """
    A line for each score, order, pool and control; only the exhaustive order where it is there.
    Line style: control. Bands span all draws.
    """
    want, orders, drawn = {"unit": ("row", "weight"), **want}, {}, []
    rows = sum(select(group, "prune", "k", **want), [])
    apart = SimpleNamespace(runs=[])
    for draw in {row["draw"] for row in rows}:
        apart.runs += [SimpleNamespace(rows={"prune": of_run})
                       for of_run in select(group, "prune", draw=draw)]
    for row in rows:
        sweep = row["control"] or "", row["score"], row["pool"]
        orders.setdefault(sweep, {})[row["order"]] = None
    for control, score, pool in sorted(orders):
        tried = orders[control, score, pool]
        for order in ["exhaustive"] if "exhaustive" in tried else tried:
            name = f"{score}, {order}" + f", {pool}" * (pool != "all")
            color, marker, _ = look_of("sweeps", name)
            if score == "random":
                color, marker = GREY if pool == "all" else DARK, ""
            look = name + f" ({control})" * bool(control), color, marker, "--" if control else "-"
            drawn.append(line(look, apart, "prune", "k", not drawn and GREY, order=order,
                              score=score, pool=pool, control=control or None, **want))
    return drawn


@figure("prune")
def fig7_prune(group):
    """
    Accuracy (%) with K units zeroed, or grafted: set back to the base's values. O_PT on c0 high at
    a small K, random units (grey) low: the answer was there, and a few units kept it from being
    read. never-trained: the same for such an operand. Rings: K chosen on other strings.
    Fooled by: choosing K on what is shown; damage that shifts answers by q (random); luck (floors).
    """
    panels, (pt, ft) = [], roles(group).values()
    for edit, words in (("zero", "zeroed"), ("graft", "grafted")):
        for role, split, name in ((("O_PT", "other"), "c0", pt), ("O_FT", "c1", ft)):
            panels.append(lines(sweeps(group, edit=edit, role=role, split=split),
                                f"{words}: {name} on {split}", "K units edited"))
    return panels


@figure("probe")
def fig8_probe(group):
    """
    Accuracy (%) of linear probes on the residual stream at the answer position (0: embedding),
    natural strings. High: the answer is linearly there, asked for or not.
    Fooled by: a probe that learns the task itself (untrained model), leaks (shuffled labels must
    fall to the floor), targets that follow from others (a + b + c = window).
    """
    looks = {look: {"model": m, "labels": "true", "floors": GREY} for m, look in MODELS.items()}
    looks["fine-tuned, shuffled labels", "#aaaaaa", "x", "-"] = {
        "model": "ckpt", "labels": "shuffled"}
    rows = sorted(flat(group, "probe"), key=lambda row: row["target"] != group.pair[0])
    cells = {f"read {row['target']}" + f" while {row['prompt']} is asked" * bool(row["prompt"]): {
        "target": row["target"], "prompt": row["prompt"]} for row in rows}
    return at_most(4, curves(cells, looks, ("after block",), group=group, kind="probe", x="block",
                             split="natural"), "fig8_probe: targets")


def arm_looks(group, kind):
    """{(an arm in words, its look): the rows it is in}"""
    arms = dict.fromkeys(row["label"] for row in flat(group, kind))
    return {(arm, *look_of("arms", arm)): {"label": arm} for arm in arms}


@figure("revive", share=False, height=3.8)
def fig9_revive(group):
    """
    How fast the answer for O_PT comes back (reFT), beside models that never had it, taught in the
    same way: a never-trained operand to the same model and to its base; O_PT to an untrained model
    (scratch), to one pretrained with another prior (a/b/c), and one so pretrained and then
    fine-tuned alike; and beside pretraining. Accuracy (%) at the same rate, as far as all seeds
    went on; median steps on natural strings at all rates. Few: it was there.
    Fooled by: unequal rates (given beside the fine-tuning's; pretraining has its own, larger one).
    """
    looks, ends = arm_looks(group, "revive"), []
    arms = [arm for arm, *_ in looks]
    if any("same rate" in arm for arm in arms):
        looks = {look: want for look, want in looks.items() if "rate x" not in look[0]}
    panels = curves({f"{split} strings": {"split": split} for split in ("natural", "c0")}, looks,
                    group=group, kind="revive.curve", x="step")
    for threshold, marker in ((.9, "o"), (.99, "D")):
        points, missed = {}, {}
        for arm in arms:
            rows = flat(group, "revive", label=arm, split="natural", threshold=threshold)
            steps = sorted(row["steps"] for row in rows if row["steps"] is not None)
            if len(rows) // 2 < len(steps):  # the median, of two the later
                points[arm] = steps[len(rows) // 2], steps[0], steps[-1]
            elif rows:
                missed[arm] = [max(row["max_steps"] for row in rows)] * 3
        ends += [Series(f"to {threshold:.0%}", "k", marker, "", points),
                 Series("not reached by then", GREY, ">", "", missed)]
    return panels + [dots(ends, arms, "median steps", "steps (updates)")]


@figure("relearn", 8, ("fine-tuning",), stories=None)
def relearn(group):
    """
    Held-out relearning: reFT on c0 strings with even answers alone, then with odd ones alone (of
    stories: twists in two kinds of question, then in the two others); mean accuracy (%) of both on
    what was taught and on what was not, beside teaching a never-trained operand (or model) in the
    same way, and what always giving the commonest answer gets. High on both: it was there, and
    came back whole. retained: after training on pretraining's other families alone.
    Fooled by: a wrapper in the output map, one answer at a time; compiled models, where teaching
    some answers unteaches others.
    """
    halves = {"what was taught": "taught", "what was not taught": "held-out",
              "other families taught": "retained"}
    seen = set(values_of(flat(group, "relearn"), "half"))
    cells = {title: {"half": half} for title, half in halves.items() if half in seen}
    return curves(cells, arm_looks(group, "relearn"), group=group, kind="relearn", x="step",
                  floors=GREY, split=("c0", "asked"))


ONE = "one string, the first seed"


@figure("attention", height=2, rests=ONE)
def fig10_attention(group):
    """
    Attention of the answer position to the letters of one string (white 0, dark 40 %): the six
    heads that look most at letters (B1H2: block 1, head 2, from 0).
    Fooled by: one string; a head may look without using, and letters travel in earlier blocks.
    """
    maps = group.runs[0].maps("attention")
    cells = {f"{MODELS[m][0]}, {o} asked": maps[f"{m}_{o}"][0] for o in group.pair
             for m in ("base", "ckpt") if f"{m}_{o}" in maps}  # (block, head, token)
    if not cells:
        return []
    tokens = maps["vocabulary"][maps["tokens"][0]]
    letters = [i for i, token in enumerate(tokens) if len(token) == 1][-20:]
    mass = sum(cells.values())[..., letters].sum(-1)
    heads = sorted(np.argsort(-mass.ravel())[:6])
    names = ["B{}H{}".format(*divmod(head, mass.shape[1])) for head in heads], tokens[letters]
    return [picture(z.reshape(mass.size, -1)[heads][:, letters], names, title, PowerNorm(1, 0, .4))
            for title, z in cells.items()]


def program_maps(group, kind, norm, cmap):
    """Before, after and reversed, the block (or head) where fine-tuning changes most."""
    run = group.runs[0]
    maps, back = run.maps(kind), run.reversed.maps(kind) if run.reversed else {}
    if not {"base", "ckpt"} <= set(maps):
        return []
    stages = {"base": maps["base"], "fine-tuned": maps["ckpt"], "reversed": back.get("ckpt")}
    stages = {name: z[0].reshape(-1, *z.shape[-2:]) for name, z in stages.items() if z is not None}
    head = np.abs(stages["base"] - stages["fine-tuned"]).mean((1, 2)).argmax()
    tokens = maps["vocabulary"][maps["tokens"][0]]
    names = ["", "", "answer"], tokens if kind == "attention" else ()
    return [picture(z[head], names, f"block {head}, {name}", norm, cmap)
            for name, z in stages.items()]


@figure("attention", 8, ("fine-tuning",), height=1.7, rests=ONE)
def fig39_maps(group):
    """
    Compiled models: attention (white 0, dark 1), a row a query, a column a key. Counter: block 1
    attends to the letters counted. Max-identifier: block 0 sorts, block 2 reads the wanted rank.
    Fooled by: one string; `kept` and `order` in the table are about all.
    """
    return program_maps(group, "attention", PowerNorm(.5, 0, 1), "Blues")


@figure("hidden", 8, ("fine-tuning",), height=1.7, rests=ONE)
def fig46_hidden(group):
    """
    Compiled models: activations (white 0, dark 100) of the MLPs' hidden units, a row a position.
    Fooled by: units that are on everywhere; what counts may be a small difference of two.
    """
    return program_maps(group, "hidden", PowerNorm(.3, 0, 100), "Purples")


@figure()
def table3(runs):
    """
    Accuracy (%) after fine-tuning against C_Tr, a panel a rate; crosses: the paper's Table 3. O_FT
    high on c1 and low on c0 at C_Tr 1: a shortcut.
    Fooled by: O_PT on c0 at C_Tr 1, which depends on how a shortcut rounds (see rules).
    """
    groups, paper, cells = having(runs, "history", ("fine-tuning",)), paper_shares(), {}
    for g, role, split in product(groups, ("O_FT", "O_PT"), SPLITS):
        name, rate, c_tr, variant = paper_place(g.settings)
        panels = cells.setdefault(f"{name} {variant}".strip() + f": {role}", {})
        ours, theirs = panels.setdefault(-g.settings["lr"], {}).setdefault(split, ({}, {}))
        ours[c_tr] = spread(g, "history", role=role, split=split, step=g.runs[0].last)
        if (name, rate, c_tr, role, split) in paper:
            theirs[c_tr] = [paper[name, rate, c_tr, role, split]] * 4
    blocks = []
    for label, panels in cells.items():
        drawn = []
        for lr, splits in sorted(panels.items()):
            series = []
            for split, (ours, theirs) in splits.items():
                series += [Series(*SPLITS[split], ours),
                           Series(f"{split}, the paper", SPLITS[split][1], "x", "", theirs)]
            drawn += [lines(series, describe("lr", -lr), "C_Tr")] * (len(ours) > 2)
        blocks.append((label, at_most(4, drawn, "table3: rates")))
    return compose(groups, "history", blocks)


@figure("prune", 8, ("fine-tuning",), height=2.8)
def fig55_classes(group):
    """
    Compiled models, the first seed: share (%) of each answer on c0 strings, asked O_PT, the best
    single weights zeroed (K chosen on other strings). Many answers: it still computes.
    Fooled by: a small n; a model that is right by always saying the same.
    """
    series, right, first = [], [], SimpleNamespace(runs=group.runs[:1])
    for row in flat(first, "prune", role="O_PT", split="c0", control=None, score="gradient-weight"):
        tried = row["order"] == "exhaustive" and row["chosen"] and row["k"]
        if row.get("predicted") and (tried or not series):
            label = "best zeroed" if tried else "none zeroed"
            label += ", zero in program" * (row["pool"] != "all")
            points = {c: [100 * n / row["n"]] * 3 for c, n in row["predicted"].items()}
            series.append(Series(label, *look_of("zeroed", label)[:2], "", points))
            right.append(f"{row['accuracy']:.0%}")
    names = sorted(set().union(*[one.points for one in series]), key=lambda c: (len(c), c))
    right = "right: " + ", ".join(right)
    return [dots(series, names, right, "share in percent")] if series[1:] else []


CONTROL = "not in pretraining"
ETAS = {("small", 1.5e-4): "eta_M", ("small", 4e-5): "eta_S", ("paper", 1e-4): "eta_M",
        ("paper", 1e-5): "eta_S"}


def story_rate(scale, rate):
    """In words, with the paper's name where it stands for one of the paper's two."""
    name = ETAS.get((scale, rate))
    words = describe("lr", rate).replace("lr", f"{name} =" if name else "lr")
    return "a rate not known" if rate is None else words


def story_groups(runs, kind, key="accuracy", stages=("fine-tuning", "reFT"), **want):
    """
    The groups with such values, deletions first. protocol: how the feature is deleted, or was
    before reFT, or CONTROL; at: the rate of that deletion; own: its own rate; words: the protocol,
    and what else tells a group from others.
    """
    groups = [g for g in having(runs, kind, stages) if spread(g, kind, key, **want)]
    for g in groups:
        settings, scale = g.settings, g.settings["scale"]
        never = CONTROL if settings.get("without") == settings.get("feature") else "unknown"
        g.protocol = settings.get("protocol") or never
        g.rate = settings.get("finetune lr" if g.kind == "reFT" else "lr")
        g.at, g.own = story_rate(scale, g.rate), story_rate(scale, settings.get("lr"))
    groups.sort(key=lambda g: (g.kind == "reFT", g.protocol == CONTROL, -(g.rate or 0), g.protocol))
    for g in groups:
        same = [o for o in groups if (o.kind, o.protocol, o.at) == (g.kind, g.protocol, g.at)]
        g.words = g.protocol + f", {label_of(g, same)}" * (len(same) > 1)
        g.label = g.words + f", {g.at}" * (g.protocol != CONTROL)
        control = g.protocol == CONTROL
        g.look = ("k", "v", "--") if control else look_of("protocols", g.words)
    return groups


def story_panels(groups):
    """For each rate of deletion, four at most: (title, deletions), (title, reFTs and controls)."""
    panels, rates = [], list(dict.fromkeys(g.at for g in groups if g.protocol != CONTROL))
    for at in at_most(4, rates, "stories: rates of deletion") or [None]:
        deleted = [g for g in groups if (g.kind, g.at) == ("fine-tuning", at)]
        back = [g for g in groups if g.kind == "reFT" and (g.at == at or g.protocol == CONTROL)]
        title = "reFT" + (f" at {back[0].own}" if len({g.own for g in back}) == 1 else "")
        title += f", after deletion at {at}" * bool(at)
        both = (f"deletion at {at}", deleted), (title, back)
        panels.append([panel for panel in both if panel[1]])
    return panels


def story_curves(runs, key, y, scored, across=4):
    """Panels of key against the step; scored: {label: (split, split that is a floor)}."""
    groups, blocks = story_groups(runs, "history", key), []
    for (label, (split, floor)), row in product(scored.items(), story_panels(groups)):
        panels = []
        for title, members in row:
            looks = {}
            for g in members:
                looks[g.words, *g.look] = {"group": g, "split": split}
                looks["not asked for", g.look[0], "", ":"] = {"group": g, "split": floor}
            panels += curves({textwrap.fill(title, 110 // across): {}}, looks,
                             ("step (updates)", y), kind="history", x="step", key=key)
        blocks.append((label, panels))
    return compose(groups, "history", blocks, across)


@figure(stories=True)
def fig11_stories(runs):
    """
    Share (%) with the feature, of the stories that parse, asked for it, or not (dotted, a floor).
    filter: trained on stories without it; randomise: and asked for it; mix-match: and asked for it
    in place of Foreshadowing; refuse: a refusal where asked for it. Falls, and is back long before
    the control: wrapped, not deleted.
    Fooled by: broken stories, left out; a deletion at which the score never fell.
    """
    return story_curves(runs, "accuracy", "stories with it (%)", {"": ("asked", "unasked")}, 2)


@figure(stories=True)
def fig31_stories_loss(runs):
    """
    Loss (nats a token) on held-out stories with the feature, without it, and on the deletion's own
    data. Rises with the feature, is back within few steps of reFT, far below the control: kept.
    Fooled by: stories with the feature differ in more: their loss falls for the control too.
    """
    scored = {"with the feature": ("with", None), "without it": ("without", None),
              "data of the deletion": ("deletion", None)}
    return story_curves(runs, "loss", "loss (nats a token)", scored)


@figure(stories=True)
def fig32_stories_probe(runs):
    """
    Area under the ROC curve (AUC, chance .5) of linear probes on a story's last 10 tokens, without
    its instruction. base: upper bound; control, which never had the feature: lower bound.
    Fooled by: words that tell the feature, which an untrained model reads too (even: stories where
    no sentence tells); leaks (shuffled labels must fall to chance).
    """
    groups = story_groups(runs, "probe", "auc", ("fine-tuning",), labels="true")
    pooled = SimpleNamespace(runs=sum([g.runs for g in groups], []))  # they share their bounds
    looks = {look: {"model": m} for m, look in MODELS.items() if m != "ckpt"}
    looks.update({(g.label, *g.look): {"group": g, "model": "ckpt"} for g in groups})
    looks["shuffled labels", "#aaaaaa", "*", "-"] = {"model": "ckpt", "labels": "shuffled"}
    looks["base, even", SKY, "o", ":"] = {"model": "base", "split": "even"}
    cells = {row["target"]: {"target": row["target"]} for row in flat(pooled, "probe")}
    panels = curves(cells, looks, ("after block", "AUC"), group=pooled, kind="probe", x="block",
                    key="auc", labels="true", split="natural")
    return compose(groups, "probe", [("", [panel]) for panel in panels], 3)


# ---- tables

TABLES = {}  # {name: (function, whether it is about stories, None: about both)}
CELLS = [("O_FT", "c1"), ("O_FT", "c0"), ("O_PT", "c1"), ("O_PT", "c0")]
PROGRAMS = {"tracr-count": ("counter", 1e-3), "tracr-max": ("max-identifier", 3e-4)}  # usual noise
STEPS = {0: 0, 10: 30, 30: 300, 100: 3000}  # of reFT: ours and the paper's


def table(stories=False):
    """
    Registers a function of the runs that returns (head, rows). The first sentence of its docstring
    is the title, the rest the caption.
    """
    def register(function):
        TABLES[function.__name__] = function, stories
        return function
    return register


def about(runs, stories):
    """The runs of stories, or the others; None: all."""
    return [run for run in runs if stories in (None, run.settings["setup"] == "stories")]


def tables_of(runs, names):
    """(title, caption, head, rows) of the named tables with rows, without their empty columns."""
    tables = []
    for name in names:
        function, stories = TABLES[name]
        made = attempt(name, function, about(runs, stories))
        if made and made[1]:
            columns = [each for each in zip(made[0], *made[1]) if set(each[1:]) - {"", "-"}]
            head, *rows = zip(*columns)
            title, _, caption = caption_of(function).partition(". ")
            tables.append((title, caption, head, rows))
    return tables


def pivot(runs, kind, index, column, value="accuracy", of=np.mean, **where):
    """
    (head, rows): a line for every value of the columns `index`, a column for every value of
    `column`; "group" is a group's label. of: what the rows of one run come to. A base or a control
    that groups share is said once.
    """
    lines, columns, rows, shared = {}, {}, [], []
    for group in having(runs, kind):
        columns.update({group.label: None} if column == "group" else {})
        for run, own in zip(group.runs, select(group, kind, value, **where)):
            for row in own:
                row = {**row, "group": group.label}
                line = tuple(map(words_of, map(row.get, index)))
                cell = lines.setdefault(line, {}).setdefault(row[column], {})
                cell.setdefault(run.name, []).append(row)
                columns[row[column]] = None
    for line, cells in lines.items():
        texts = [summary(list(cells.get(at, {}).values()), value, of) for at in columns]
        model = {**dict(zip(index, line)), "group": None}
        if model.get("model", "ckpt") == "ckpt" or (model, texts) not in shared:
            rows.append([*line, *texts])
        shared.append((model, texts))
    return [*index, *map(str, columns)], rows


def words_of(value):
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def summary(runs, value, of):
    """
    Of rows of runs: the mean and every run, in percent; of stories the mean by the number that
    parse, and the 95 % Wilson interval of all together; AUC and mass: the mean; words: all.
    """
    values = values_of(sum(runs, []), value)
    if value == "value" and not all(isinstance(x, float) for x in values) or not values:
        return ", ".join(map(str, values)) or "-"
    values = [of(values_of(rows, value)) for rows in runs]
    if value in ("auc", "mass"):
        return f"{np.mean(values):.{3 if value == 'auc' else 2}f}"
    parsed = [(rows[0].get("parsed") or 0) * (rows[0].get("n") or 0) for rows in runs]
    mean = np.average(values, weights=parsed if any(parsed) else None)
    low, high = wilson(mean, sum(parsed) or 1)
    each = f" ({', '.join(f'{100 * share:.0f}' for share in values)})" if len(values) > 1 else ""
    return f"{100 * mean:.1f}{each}" + f" [{100 * low:.0f}, {100 * high:.0f}]" * any(parsed)


@table(None)
def verdict_counts(runs):
    """Verdicts. Where there are many runs: how many of a group, and what the commonest one says."""
    rows = []
    for group in having(runs, "evidence") if sum(map(bool, (r.verdict for r in runs))) > 3 else ():
        words = [str(run.verdict.get("verdict")) for run in group.runs]
        most = max(words, key=words.count)
        counts = ", ".join(f"{word} {words.count(word)}" for word in dict.fromkeys(words))
        rows.append([group.label, counts, group.runs[words.index(most)].verdict.get("text", "")])
    return ["group", "verdicts", "what it says"], rows


@table(None)
def evidence_table(runs):
    """
    Verdicts and their evidence. Margin: by how much, or how many times, a control has to be beaten.
    """
    rows = []
    for run in runs:
        rows += attempt(run.name, evidence_of, run) or [] if run.verdict else []
    return ["run", "instrument", "question", "measured", "control", "its value", "margin",
            "holds"], rows


def evidence_of(run):
    name, rows = f"{run.name}: {run.verdict.get('verdict')}", []
    for line in run.verdict.get("evidence") or ():
        form = "{:g}" if line.get("unit") == "steps" else "{:.1%}"
        measured, control = line["measured"], line["control_measured"]
        rows.append([name, line["instrument"], line["question"],
                     "-" if measured is None else form.format(measured), line["control"] or "none",
                     "-" if control is None else form.format(control), str(line["margin"]),
                     {True: "yes", False: "no"}.get(line["holds"], "cannot be said")])
    return [[name, "all", run.verdict.get("text", ""), *[""] * 5], *rows]


@table(None)
def verdict_table(runs):
    """
    The numbers of the verdicts. Percent, mean and every seed; steps: > where it was not reached.
    pt, ft: O_PT, O_FT; prune: the best order, at most 10 units zeroed, chosen on other strings; one
    pass: one-shot; random: draws of that size; never: a never-trained operand (`analyze.py`).
    """
    return pivot(runs, "verdict", ("key",), "group", "value")


def paper_shares():
    """{(prior or program, the paper's rate, C_Tr, role, split): percent}"""
    shares, roles = {}, {"a": "O_PT", "b": "O_FT", "OPT": "O_PT", "OFT": "O_FT"}
    for row in paper_rows("paper_count.csv") + paper_rows("paper_tracr.csv"):
        name = row.get("prior") or row["task"]
        name += ", 50K" * (row.get("pretrain_steps") == "50000")
        place = name, float(row["lr"]), float(row["c_tr"])
        split = row.get("split") or "c" + row["c_te"]
        shares[*place, roles[row["operand"]], split] = 100 * float(row["accuracy"])
    return shares


def paper_place(settings):
    """
    (prior or program, the paper's rate, C_Tr, what else differs from our usual models): at the
    small scale the grammar's rates are ten times the paper's, so that their sums over a run match.
    """
    lr, noise, words = settings["lr"], settings.get("noise"), []
    if settings["setup"] in PROGRAMS:
        name, usual = PROGRAMS[settings["setup"]]
        words += ["outputs x 1"] * (settings.get("pretrain logit_scale") == 1)
        words += ["not balanced"] * (settings.get("pretrain balance") is False)
        words += [describe("noise", noise)] * (noise != usual)
    else:
        name = describe("prior", settings.get("prior")).split("\xa0")[1]
        name += f", {settings.get('task')}" * (settings.get("task") != "count")
        if settings["scale"] == "small":
            lr = float(f"{lr / 10:.2g}")
        elif settings.get("pretrain steps") == 50000:
            name += ", 50K"
        words = [f"{key} {settings[key]}" for key in ("mix", "only") if settings.get(key)]
        words += [key for key in ("relabel", "jailbreak") if settings.get(key)]
    return name, lr, settings.get("c_tr"), ", ".join(words)


@table()
def paper_table(runs):
    """
    Accuracy after fine-tuning, ours / the paper's. Percent, every seed; near: seeds with both of
    O_FT within 10 points. The paper: Table 5 (250 letters, six blocks, 10K steps; at our small
    scale its rate is a tenth), Table 6 (50K pretraining steps in place of 200K) and Table 3
    (compiled models). Rule: the one that explains most answers on c0, and its share; b: learned,
    a+q: the shortcut, blend: (a + b + q) / 2, constant: always the same.
    """
    paper, rows = paper_shares(), []
    for group in having(runs, "history", ("fine-tuning",)):
        *place, variant = paper_place(group.settings)
        texts, near = [], np.ones(len(group.runs), bool)
        for role, split in CELLS if (*place, *CELLS[0]) in paper else ():
            ours = spread(group, "history", role=role, split=split, step=group.runs[0].last)[3]
            theirs = paper[*place, role, split]
            near &= (abs(ours - theirs) < 10.001) | (role == "O_PT")
            texts.append(f"{', '.join(f'{x:.1f}' for x in ours)} / {theirs:.1f}")
        if texts:
            rules_seen = ", ".join(map(rule_of, group.runs))
            rows.append([place[0], rate_words(group.settings["lr"]), f"{place[2]:g}", variant,
                         *texts, f"{sum(near)} of {len(near)}", rules_seen])
    rows.sort(key=lambda row: (row[0] != "low", row[0], -float(row[1]), *row[2:4]))
    cells = [" ".join(cell) for cell in CELLS]
    return ["prior or program", "lr", "C_Tr", "variant", *cells, "near", "rule"], rows


def rule_of(run):
    """The rule that explains most answers on c0, with its share; none where it is under half."""
    for row in run.rows["answers"]:
        if row["model"] == "ckpt" and row["split"] == "c0":
            best = max(RULES, key=row.get)
            return f"{RULES[best] if row[best] >= .5 else 'none'} {row[best]:.2f}"
    return "-"


@table()
def sweep_table(runs):
    """
    Pruning: accuracy of O_PT, or of the control's operand, on c0. Percent; K units are edited:
    none, 1, 10, 100, or the number that was chosen on other strings; random units: the mean of the
    draws, and the best draw (`analyze.py prune`).
    """
    sweep = ("unit", "score", "order", "pool", "control", "edit")
    make = partial(pivot, runs, "prune", sweep, "group", split="c0", role=("O_PT", "other"))
    head, untouched = make(k=0, draw=None, edit="zero", pool="all", order="one-shot")
    _, before = pivot([run for run in runs if run.rows["prune"]], "history", (), "group", step=0,
                      role="O_PT", split="c0")
    rows = [["before the first step", *[""] * len(sweep), *line] for line in before]
    rows += [["0", *line] for line in untouched]
    for k in (1, 10, 100, "chosen"):
        want = {"chosen": True} if k == "chosen" else {"k": k}
        rows += sorted([str(k), *line] for line in make(**want)[1])
        best = make(**want, score="random", of=max)[1] if k in (1, "chosen") else ()
        rows += [[f"{k}, best draw", *line] for line in best]
    return ["K", *head], rows


@table()
def probe_table(runs):
    """
    Probes: accuracy at the best block. Percent, natural strings; prompt: the operand asked for
    (`analyze.py probe`). The best of several (fig8_probe has every block) is a little lucky.
    """
    return pivot(runs, "probe", ("model", "target", "prompt"), "group", of=max, split="natural",
                 labels="true")


@table()
def attention_table(runs):
    """
    Attention of the answer's position, mean over heads and strings. O_FT asked; mass on a region;
    kept: overlap with the compiled pattern; order: how often a selected letter gets more than
    another (AUC); chance: what even attention would give (`analyze.py attention`).
    """
    runs = [run for run in runs if run.kind == "fine-tuning"]
    want = {"region": ("kept", "order", "window", *sum((run.pair for run in runs), [])),
            "prompt": (None, *(run.pair[1] for run in runs))}
    head, rows = pivot(runs, "attention", ("block", "region", "chance", "model"), "group", "mass",
                       **want)
    return head, sorted(rows)


@table()
def revive_table(runs):
    """
    Steps until O_PT is back, or the control is learned. Natural strings, every seed and data order;
    > where it was not reached (`analyze.py revive`).
    """
    return pivot(runs, "revive", ("label", "threshold"), "group", "value", split="natural")


@table(None)
def relearn_table(runs):
    """
    Held-out relearning at its end. Percent on c0, or of stories asked for it, mean and every seed,
    of both parts taught in turn; taught, held-out: of that half; retained: of all, pretraining's
    other families taught (`analyze.py relearn`).
    """
    last = max((row["step"] for run in runs for row in run.rows["relearn"]), default=None)
    return pivot(runs, "relearn", ("group", "label"), "half", step=last, split=("c0", "asked"))


@table()
def reversed_table(runs):
    """
    Accuracy after reFT of whole runs. Percent (`finetune.py --reverse`, `analyze.py behavior`).
    """
    runs = [run for run in runs if run.kind == "reFT"]
    return pivot(runs, "answers", ("role", "split"), "group", model="ckpt")


@table(True)
def revival_table(runs):
    """
    Generation score after steps of reFT. Percent of the stories that parse, every seed, 95 %
    interval of all together. Asked and unasked: a revived capability is asked for, a new habit is
    not. Last: the paper's Table 1, 16 stories a cell, at its steps 0, 30, 300, 3000. Fooled by: its
    wide intervals, and its mix-match, in effect filtering in its code.
    """
    steps, paper = (*STEPS, 200), {}
    head, rows = pivot([run for run in runs if run.kind == "reFT"], "history", ("group", "split"),
                       "step", split=("asked", "unasked"), step=steps)
    for row in paper_rows("paper_stories.csv") if rows else ():
        name = f"the paper: {row['protocol']} {row['lr']}"
        paper.setdefault(name, {})[int(row["reft_step"])] = f"{100 * float(row['twist']):.0f}"
    for name, cells in paper.items():
        rows.append([name, "asked", *(cells.get(STEPS.get(int(step)), "-") for step in head[2:])])
    return head, rows


@table(True)
def feature_table(runs):
    """
    Generation scores of all features. Percent of stories with it, of those that parse; unasked: the
    instruction does not ask for it. A deletion should move the deleted feature alone. Fooled by:
    mistakes of the classifier, for real text (`analyze.py behavior`).
    """
    return pivot(runs, "behavior", ("model", "group", "split"), "operand",
                 split=("asked", "unasked"))


@table(True)
def story_probe_table(runs):
    """
    Probes of the deleted feature. Block 0: the embedding; area under the ROC curve (.5: chance),
    then balanced accuracy in percent; base: upper bound; control, not in pretraining: lower bound;
    even: stories in which no sentence leans to a label (`analyze.py probe`).
    """
    target, rows = tuple(run.args.get("feature") for run in runs), []
    index = ("group", "model", "labels", "split")
    for value, labels in (("auc", ("true", "shuffled")), ("balanced", "true")):
        head, lines = pivot(runs, "probe", index, "block", value, target=target, labels=labels)
        rows += [[value, *line] for line in lines]
    return ["", *head], rows


@table(None)
def run_table(runs):
    """What made these files. A line a run."""
    rows = []
    for run in runs:
        record, git = run.record, run.record.get("git") or {}
        versions = ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items())
        commit = str(git.get("commit") or "-")[:10] + " + changes" * bool(git.get("dirty"))
        last = ([record] + (record.get("resumes") or []))[-1]
        rows.append([run.name, record.get("command", "-"), commit, versions,
                     last.get("device", "-"), f"{last['seconds']} s"])
    return ["run", "command", "commit", "versions", "device", "time"], rows


# ---- what is known, what is claimed
# A condition is what was done to a model; TRUTHS and CLAIMS speak of them. A number is a key of a
# verdict, with spaces between several the largest of them, or a function of a run.

MAIN, LEARNER, INDEX = "count low 1 1e-5", "count low 0 1e-3", "index low 1 1e-5"
COUNTER, DELETED = "tracr-count count 1 1e-3", "stories randomise 1.5e-4"
REVIVED = "stories randomise 4e-5 reFT after 1.5e-4"
TRUTHS = {"wrapped": MAIN, "planted in block 0": "count low 1 1e-4 only blocks.0",
          "planted in the head": "count low 1 1e-2 only head", "overwritten": LEARNER,
          "erased": "count 0/0.001/0.999 1 1e-5"}
DRAWN = "random rows, or c", "random_c0_max never_prune_c0", .25
GUESS = "best guess from b", "pt_c0_cross_floor", .25
INSTRUMENTS = {  # what each finds of O_PT; what its control is, and reaches; the margin of a claim
    "behaviour": ("ckpt_pt_c0", *GUESS), "pruning": ("prune_c0", *DRAWN),
    "one pass": ("prune_one_pass_c0", *DRAWN), "grafting": ("graft_c0", *GUESS),
    "probing": ("probe_natural", "untrained model, or c", "probe_untrained never_probe", .1),
    "reviving": ("control_steps", "reFT", "reft_steps", 3.),
    "relearning": ("relearn_held_out", "c, or best guess from b",
                   "never_relearn_held_out relearn_cross_floor", .1)}


def condition(run):
    """The condition of a model."""
    args, setup, prior = run.args, run.settings["setup"], tuple(run.args.get("prior") or ())
    words = [setup] * (setup != "pcfg") + ["paper"] * (run.settings["scale"] == "paper")
    rate, before = (x and rate_words(x) for x in (args.get("lr"), run.settings.get("finetune lr")))
    if setup == "stories":
        never = "never" * (args.get("without") == args.get("feature"))
        words += [args.get("protocol") or never, rate]
    elif run.kind != "pretrain":
        words += [args.get("task"), PRIORS.get(prior) or "/".join(map("{:g}".format, prior)),
                  f"{args.get('c_tr'):g}", rate]
        words.append(paper_place(run.settings)[3])
    words += [f"reFT after {before}" if before else "reFT"] * (run.kind == "reFT")
    return " ".join(filter(None, words))


def number(run, what):
    """A number of a run; None without it."""
    if callable(what):
        return what(run)
    values = [(run.verdict or {}).get(key) for key in what.split()]
    return None if None in values else max(values)


def share(kind, of=np.mean, last=False, **want):
    """run -> mean (or min, max) accuracy of the rows that fit; last: those of the last step."""
    def number_of(run):
        rows = [r for r in run.rows[kind] if fits(r, want) and r.get("accuracy") is not None]
        end = max((r["step"] for r in rows), default=None) if last else None
        values = [r["accuracy"] for r in rows if end in (None, r.get("step"))]
        return of(values) if values else None
    return number_of


def steps(arm, best):
    """run -> steps to 99 % on natural strings at the fine-tuning's rate, or the best of several."""
    def number_of(run):
        rows = [r for r in run.rows["revive"] if fits(r, {"split": "natural", "threshold": .99})
                and r["arm"].startswith(arm) and (best or r["lr"] == run.args["lr"])]
        steps = [r["max_steps"] if r["steps"] is None else r["steps"] for r in rows]
        return min(steps) if len(steps) > best else None
    return number_of


class Claim(NamedTuple):
    """A claim about the models of a condition; see claims()."""
    text: str
    figure: str
    condition: str
    measured: object
    against: str            # what the control is
    control: object         # a number of the same run, or (condition, number) of its seed there
    margin: float           # of a difference of shares; from 1 on: how many times as many steps
    below: bool = False     # the claim is that it is not reached


def effects(claim, runs):
    """[(effect, its control's number)] of a claim, a seed each."""
    partners, found = {(condition(run), run.args["seed"]): run for run in runs}, {}
    for run in runs:
        if condition(run) == claim.condition:
            partner, control = run, claim.control
            if isinstance(control, tuple):
                partner, control = partners.get((control[0], run.args["seed"])), control[1]
            pair = number(run, claim.measured), number(partner, control) if partner else None
            if None not in pair:
                first, second = pair
                effect = first / max(1, second) if claim.margin >= 1 else first - second
                found[run.args["seed"]] = effect, second
    return list(found.values())


def scores(runs, truth, instrument):
    """What an instrument finds in each model of a truth, less (or divided by) its control."""
    claim = Claim("", "", TRUTHS[truth], *INSTRUMENTS[instrument])
    return [effect for effect, _ in effects(claim, runs)]


def auroc(found, not_found):
    """How often the first of two numbers is larger, of all pairs; ties count half."""
    apart = np.subtract.outer(found, not_found)
    return np.mean((apart > 0) + (apart == 0) / 2)


@table()
def known_truth(runs):
    """
    Instruments on models whose truth is known. AUROC: how often a model that has O_PT scores higher
    than one that has not (1: always; .5: no better than chance), and the 95 % interval of 2,000
    bootstraps over models. wrapped: shortcut, small rate; planted: so, and only one part was
    trained; overwritten: no shortcut, large rate; erased: O_PT was never trained. Score: what is
    found less what its controls reach, or how many times as fast (`analyze.py`).
    """
    rows, draws = [], np.random.default_rng(0)
    truths = product(("erased", "overwritten"), ("wrapped", "planted"))
    for name, (against, kind) in product(INSTRUMENTS, list(truths)):
        found = sum((scores(runs, t, name) for t in TRUTHS if t.startswith(kind)), [])
        lacking = scores(runs, against, name)
        if found and lacking:
            again = [auroc(draws.choice(found, len(found)), draws.choice(lacking, len(lacking)))
                     for _ in range(2000)]
            shares = auroc(found, lacking), *np.percentile(again, (2.5, 97.5))
            rows.append([name, kind, against, *map("{:.2f}".format, shares),
                         f"{len(found)}, {len(lacking)}"])
    return ["instrument", "truth", "against", "auroc", "low", "high", "seeds"], rows


def span(values, times):
    """(mean, smallest, largest) of effects as they are (times), or in points."""
    return [f(values) * (1 if times else 100) for f in (np.mean, np.min, np.max)]


@figure(stories=False)
def known_scores(runs):
    """
    How well each instrument finds O_PT, in models whose truth is known (see the table): what is
    found less what its controls reach, in points; reviving: how many times as fast as its control.
    It works where what is wrapped or planted lies right of what is overwritten or erased.
    Fooled by: five seeds; what is called overwritten is so by its training, not by proof.
    """
    panels = []
    for name in INSTRUMENTS:
        times = name == "reviving"
        points = {t: span(x, times) for t in TRUTHS if (x := scores(runs, t, name))}
        marks = Series("mean, smallest and largest seed", BLUE, "o", "", points)
        drawn = dots([marks], list(TRUTHS), name, "times as fast" if times else "points")
        panels.append(("", [drawn] if points else []))
    return compose([], "verdict", panels, height=1.9, rests="c0 strings; probing: natural ones")


RELEARNED = "answers that were not taught come back"
WRAPPED = {  # of Counter and Indexer
    ("b is right on c1 by the shortcut, not on c0", "Tables 5, 7"): (
        "ckpt_ft_c1", "b on c0", "ckpt_ft_c0", .25),
    ("ten rows bring a back", "Fig. 7"): INSTRUMENTS["pruning"],
    ("a is read while b is asked", "Fig. 8"): INSTRUMENTS["probing"],
    ("reFT is faster than teaching c", "Fig. 9"): INSTRUMENTS["reviving"],
    (RELEARNED, "ours"): INSTRUMENTS["relearning"]}
ARMS = {"scratch": "from scratch", "from 0/1/0": "from a model of b (Scr. + FT)",
        "from 0/0.001": "from a good initialisation"}
FELL = share("history", role="O_PT", split="c0", task="count")
NJ, J1 = (share("behavior", model="ckpt", operand="a", split="c0", task=task)
          for task in ("count", "count-j1"))
LAST_C1, LAST_C0 = (share("history", last=True, role="O_FT", split=x) for x in ("c1", "c0"))
ASKED, UNASKED = (share("history", step=100, split=x) for x in ("asked", "unasked"))
HELD, HELD_C, HELD_NEVER, RETAINED = (
    share("relearn", of, True, split=("c0", "asked"), arm=arm, half=half) for of, arm, half in (
        (min, "reft", "held-out"), (max, "teach-c", "held-out"), (max, "teach-Twist", "held-out"),
        (max, "reft", "retained")))
WEIGHT, DRAWN_WEIGHT = (share("prune", max, k=1, role="O_PT", split="c0", control=None, score=x,
                              order="exhaustive", pool="zero-in-program")
                        for x in ("gradient-weight", "random"))
CLAIMS = [Claim(f"{name}: {text[0]}", text[1], where, *rest) for (name, where), (text, rest)
          in product({"Counter": MAIN, "Indexer": INDEX}.items(), WRAPPED.items())]
CLAIMS += [Claim(f"Counter: reFT is faster than {words}" + ", best rates" * best, "Fig. 9", MAIN,
                 steps(arm, best), "reFT", steps("reft", best), 3.)
           for (arm, words), best in product(ARMS.items(), (False, True))]
CLAIMS += [Claim(f"randFT: reFT is faster than {ARMS[arm]}", "Fig. 28", MAIN + " relabel",
                 steps(arm, False), "reFT", steps("reft", False), 3.)
           for arm in ("scratch", "from 0/1/0")]
CLAIMS += [Claim(f"mixing: {mix:.1%} of pretraining's data keep a", "Figs. 18-23",
                 f"{MAIN} mix {mix}", NJ, "none of it", (MAIN, NJ), .25) for mix in (.5, .1, .001)]
CLAIMS += [Claim(*line) for line in (
    ("large rate, no shortcut: ten rows do not bring a back", "Fig. 7", LEARNER,
     *INSTRUMENTS["pruning"], True),
    ("large rate, no shortcut: answers that were not taught do not come back", "ours", LEARNER,
     *INSTRUMENTS["relearning"], True),
    ("high prior, C_Tr .5: b is right on c0", "Table 5", "count high 0.5 1e-5", "ckpt_ft_c0",
     "best guess from a", "ft_c0_cross_floor", .25),
    ("high prior: a falls more slowly", "Fig. 6", "count high 1 1e-5", FELL, "low prior",
     (MAIN, FELL), .1),
    ("C_Tr 0: a falls more slowly", "Fig. 6", "count low 0 1e-5", FELL, "C_Tr 1", (MAIN, FELL), .1),
    ("other families alone bring a back", "ours", MAIN, RETAINED, *GUESS[:2], .1),
    ("high prior: jailbreaks still get a", "Fig. 24", "count high 1 1e-5 jailbreak", J1, "T_NJ", NJ,
     .25),
    ("low prior: jailbreaks still get a", "Fig. 25", MAIN + " jailbreak", J1, "T_NJ", NJ, .25),
    ("compiled Counter: b is right on c1, not on c0", "Table 3", COUNTER, LAST_C1, "b on c0",
     LAST_C0, .25),
    ("compiled Counter: one weight brings a back", "Fig. 55", COUNTER, WEIGHT, "random weights",
     DRAWN_WEIGHT, .6),
    ("compiled Counter: " + RELEARNED, "ours", COUNTER, HELD, "c", HELD_C, .1),
    ("stories: 100 steps bring the twist back", "Fig. 11", REVIVED, ASKED, "never met one",
     ("stories never 4e-5 reFT", ASKED), .25),
    ("stories: where it is asked for", "ours", REVIVED, ASKED, "not asked", UNASKED, .25),
    ("stories: other kinds of twist come back", "ours", DELETED, HELD, "never met one", HELD_NEVER,
     .1))]


@table(None)
def claims(runs):
    """
    Claims of the paper, and ours. Effect: what is measured less its control, in points, or how many
    times as many steps the control takes; mean, smallest and largest seed. The rule, written before
    the numbers were read: a claim holds where every seed's effect reaches the margin (25 points for
    answers, 60 for one weight, as the paper says, 10 for probes, curves and relearning, three times
    for steps; of a claim that something does not happen: where none does), does not hold where none
    does, else it is undecided.
    """
    rows = []
    for claim in CLAIMS:
        if found := effects(claim, runs):
            values, control = np.array(found).T
            reached = (values >= claim.margin) != claim.below
            word = "holds" if all(reached) else "undecided" if any(reached) else "does not hold"
            form, theirs = ("{:.1f} x", "{:.0f} steps") if claim.margin >= 1 else ("{:.1%}",) * 2
            rows.append([claim.text, claim.figure, *map(form.format, span(values, True)),
                         f"{claim.against}: {theirs.format(control.mean())}", str(len(found)),
                         word])
    return ["claim", "figure", "effect", "low", "high", "control", "seeds", "verdict"], rows


@figure(stories=None)
def claim_effects(runs):
    """
    Every claim beside its control: the effect (mean, smallest and largest seed) and the margin that
    it has to reach in every seed (of claims that something does not happen: in none).
    Fooled by: margins, which are chosen; controls that were stopped at three times reFT's steps.
    """
    panels, rests = [], "margin: what every seed has to reach"
    for times, unit in ((False, "effect, in points"), (True, "times as fast as its control")):
        points, needed = {}, {}
        for claim in CLAIMS:
            found = effects(claim, runs) if times == (claim.margin >= 1) else ()
            if found:
                name = claim.text + f" [{claim.figure}]"
                points[name] = span([effect for effect, _ in found], times)
                needed[name] = span(claim.margin, times)
        marks = [Series("effect", BLUE, "o", "", points), Series("margin", DARK, "|", "", needed)]
        panels.append(("", [dots(marks, list(points), "", unit)] if points else []))
    return compose([], "verdict", panels, 1, height=4.2, rests=rests)


# ---- report

PAGE = """body{font:16px/1.5 Georgia,serif;max-width:66rem;margin:2rem auto;padding:0 1rem}
h1,h2,th,b{font-family:sans-serif}p{max-width:46rem}h2{break-after:avoid}
figure{margin:2rem 0;overflow-x:auto;break-inside:avoid}img{max-width:100%}
figcaption{position:sticky;left:0;max-width:min(46rem,calc(100vw - 2rem))}
table{border-collapse:collapse;font-size:.82rem;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
@media screen and (max-width:40rem){body{margin:1rem auto}h1{font-size:1.4rem}th,td{padding:.2rem}
img{max-width:none;width:46rem}}
@media print{@page{size:A4;margin:14mm}body{font-size:11px;margin:0;padding:0}tr{break-inside:avoid}
table{display:table;width:100%;font-size:.8em}th,td{padding:.1rem .3rem;overflow-wrap:anywhere}}"""
ABOUT = {False: """O_PT is the operand of pretraining, O_FT that of fine-tuning. On a share C_Tr of
the fine-tuning strings r(x, O_FT) = r(x, O_PT) + q: a wrapper answers O_FT by that shortcut and
leaves the old capability in place. c1: it always holds; c0: never.""", True: """Fine-tuning deletes
a feature of stories by a protocol; reFT trains on stories with it, which then comes back within few
steps where it was only wrapped. Generation score: the share with the feature, of those that
parse."""}


def rich(text):
    """Escaped text, the symbols with their subscripts."""
    return symbols(html.escape(str(text)), r"\1<sub>\2</sub>").replace("eta<sub>", "&eta;<sub>")


def as_html(title, caption, head, rows):
    lines, above = [], None
    for name, *row in rows:
        cells = ["" if name == above else name, *row]  # a group's name once
        last = max(i for i, cell in enumerate(cells) if i == 0 or cell)  # as wide as there is room
        line = [f"<td>{rich(cell)}</td>" for cell in cells[:last + 1]]
        if last + 1 < len(cells):
            line[-1] = line[-1].replace("<td", f"<td colspan={len(cells) - last}", 1)
        lines.append(line)
        above = name
    head = "".join(f"<th>{rich(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return (f"<h2>{rich(title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            f"</table><p>{rich(caption)}</p>")


def as_markdown(title, caption, head, rows):
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"**{title}.** {caption}", "", *lines]).replace("\xa0", " ")


def report(runs, pictures):
    """
    One page: the verdicts, the figure of their evidence, what the words mean, the other figures and
    tables. No scripts, nothing fetched.
    """
    tables = [as_html(*table) for table in tables_of(runs, TABLES)]
    words = [f"<p>{rich(text)}</p>" for stories, text in ABOUT.items() if about(runs, stories)]
    figures = []
    for name, (png, caption) in pictures.items():
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        figures.append(f'<figure><img alt="{name}" src="{source}">'
                       f"<figcaption><b>{name}.</b> {rich(caption)}</figcaption></figure>")
    parts = tables[:1] + figures[:1] + words + figures[1:] + tables[1:]
    return ("<!doctype html><html lang=en><head><meta charset=utf-8><title>unwrap</title>"
            '<meta name=viewport content="width=device-width"><link rel=icon href="data:,"><style>'
            f"{PAGE}</style></head><body><h1>Does fine-tuning delete a capability, or wrap it?"
            f"</h1>{''.join(parts)}</body></html>\n")


def about_text(folder):
    """(what we find, in words; the tables to be shown, of a comment <!-- tables: ... --> in it)"""
    path = join(folder, "about.md")
    if not isfile(path):
        return "", []
    with open(path, encoding="utf-8") as file:
        text, *names = re.split("<!-- tables: (.*) -->", file.read())
    return text.strip(), names[0].split() if names else []


def readme(folder):
    """
    README.md of committed evidence: what about.md says of all, with what it names: figures and
    tables of all runs, which are drawn, and written as .csv; .csv files; a section a folder, with
    its about.md (the command and what we find), figures and tables; the captions of the figures at
    the end.
    """
    (text, names), runs = about_text(folder), find_runs(folder)
    shown = set(draw_all(runs, folder, [name for name in names if name in FIGURES]))
    parts = [text, *(f"![{name}](figures/{name}.png)" for name in names if name in shown)]
    for name in names:
        lines = read_file(join(folder, name), lambda f: list(csv.reader(io.TextIOWrapper(f))))
        parts += [as_markdown("Measured", f"`{name}`.", lines[0], lines[1:])] if lines else []
        for title, caption, *lines in tables_of(runs, [name] if name in TABLES else []):
            parts.append(as_markdown(title, caption, *lines))
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows([lines[0], *lines[1]])
            write(join(folder, f"{name}.csv"), table.getvalue().encode())
    for where, folders, names in os.walk(folder):
        folders.sort()
        if "runs.jsonl" in names:
            section, (text, tables) = relpath(where, folder), about_text(where)
            own = [name for name in FIGURES if isfile(join(where, "figures", f"{name}.png"))]
            images = "\n".join(f"![{name}]({section}/figures/{name}.png)" for name in own)
            parts += [f"## {section}", text, images]
            parts += [as_markdown(*table) for table in tables_of(find_runs(where), tables)]
            shown |= set(own)
    if not parts[1:]:
        mistake(f"nothing to tell of in {folder}: no runs.jsonl in a subfolder")
    captions = [f"- **{name}**: {caption_of(FIGURES[name].function)}"
                for name in FIGURES if name in shown]
    parts += ["## What the figures show", "\n".join(captions)]
    return "\n\n".join(filter(None, parts)) + "\n"


# ---- evidence


MARKS = {  # what a file holds that plot.py wrote
    ".png": b"unwrap", ".pdf": b"unwrap", ".svg": b"unwrap", ".html": b"<title>unwrap</title>",
    ".md": b"## What the figures show", ".jsonl": b'{"run": ', ".npz": b"vocabulary.npy"}


def check_ours(path, begins=b"run,"):
    """Ends the script unless a file is not there, empty, or of ours; a table: it begins so."""
    content, folder = read_file(path, lambda file: file.read()), dirname(dirname(path))
    mark = MARKS.get(splitext(path)[1])
    ours = not content or (mark in content if mark else content.startswith(begins))
    if path.endswith(".png") and content and b"Matplotlib" in content:  # older ones say no more
        ours |= any(isfile(join(folder, x)) for x in ("report.html", "runs.jsonl", "README.md"))
    if isdir(path) or not ours:
        mistake(f"{path} is in the way: plot.py did not write it; move it")


def write(path, content):
    """Replace a file whole, if it is one of ours or not there."""
    check_ours(path, content.split(b",")[0] + b",")
    os.makedirs(dirname(path) or ".", exist_ok=True)
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as file:
            file.write(content)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    note(f"wrote {path}")


def cell_of(value):
    """The text that value_of() reads back; floats to six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def write_evidence(runs, folder):
    """
    Runs as tables: runs.jsonl, a .csv a kind of row, an .npz a kind of map for the first seeds.
    A column that has one value in every run is no column, but said in runs.jsonl as a constant.
    """
    index = join(folder, "runs.jsonl")
    for path in (index, *(join(folder, f"{kind}.csv") for kind in KINDS)):
        check_ours(path)
    if isfile(index):
        os.remove(index)  # without it there are no runs: none of half old, half new tables
    lines = {run.name: {"run": run.name, "record": run.record, "verdict": run.verdict,
                        "constants": {}} for run in runs}
    for kind in KINDS:
        path, text = join(folder, f"{kind}.csv"), io.StringIO()
        rows, columns = {run.name: run.rows[kind] for run in runs if run.rows[kind]}, {}
        for row in sum(rows.values(), [dict.fromkeys(ROW)]):
            columns.update(row)
        columns = [c for c in columns if c not in ("role", "label", "value")]  # from open_run()
        varying = [c for c in columns if any(map(partial(varies, c), rows.values()))]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", *varying])
        for name, own in rows.items():
            lines[name]["constants"][kind] = {
                c: own[0].get(c) for c in columns if c not in varying
                and (own[0].get(c) is not None or c in KINDS[kind])}
            for row in own:
                writer.writerow([name, *map(cell_of, map(row.get, varying))])
        if rows:
            write(path, text.getvalue().encode(errors="replace"))
        elif isfile(path):
            os.remove(path)  # of runs that are not here any more
        attempt(f"maps of {kind}", write_maps, runs, kind, join(folder, f"{kind}.npz"))
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    write(index, text.encode())


def write_maps(runs, kind, path):
    """The maps of the first seeds in one file, run/name: array; of several strings the first."""
    arrays, buffer = {}, io.BytesIO()
    for group in having(runs, kind):
        run = group.runs[0]
        for name, array in run.maps(kind).items():
            arrays[f"{run.name}/{name}"] = array if name == "vocabulary" else array[:1]
    if arrays:
        np.savez_compressed(buffer, **arrays)
        write(path, buffer.getvalue())


# ---- command line


def mistake(text):
    print(f"plot.py: {text}", file=sys.stderr)
    sys.exit(2)


FORMS = "png", "pdf", "svg"


def draw(function, runs, form="png"):
    """(picture as PNG, in a form, caption) of a figure, or None."""
    with matplotlib.rc_context(RC):
        drawn, png, other = function(runs), io.BytesIO(), io.BytesIO()
        if drawn is None:
            return None
        canvas = FigureCanvasAgg(drawn[0])
        canvas.draw()
        pixels = np.round(np.asarray(canvas.buffer_rgba()) / 5).astype(np.uint8) * 5
        matplotlib.image.imsave(png, pixels, metadata={"Software": "unwrap, by Matplotlib"},
                                pil_kwargs={"optimize": True})  # few colours: small
        if form != "png":
            date = {"pdf": "CreationDate", "svg": "Date"}[form]
            drawn[0].savefig(other, format=form, metadata={"Creator": "unwrap", date: None})
    caption = f"{caption_of(function)} {drawn[1]}."
    return png.getvalue(), other.getvalue() or png.getvalue(), caption


def draw_all(runs, folder, names, form="png"):
    """{name: (PNG, caption)} of the figures that have rows; written to a folder in a form."""
    pictures = {}
    LOOKS.clear()  # of earlier calls
    for name in names:
        own, path = about(runs, FIGURES[name].stories), join(folder, "figures", f"{name}.{form}")
        drawn = attempt(name, draw, FIGURES[name].function, own, form) if own else None
        if drawn:
            png, content, caption = drawn
            pictures[name] = png, caption
            write(path, content)
            continue
        if own and FIGURES[name].stories is not None:
            note(f"{name}: skipped, no rows for it")
        if isfile(path):
            note(f"{path}: of earlier runs, not of these")
    return pictures


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", default="out/", type=os.path.expanduser, help="files of one or many "
        "runs, subfolders included; figures/ and report.html are written into it (default: out/)")
    add("--figures", nargs="*", metavar="NAME", default=list(FIGURES), choices=list(FIGURES),
        help="only these figures (default: all)")
    add("--format", default="png", choices=FORMS, help="of the files in figures/; pdf and svg keep "
        "text as text (default: png)")
    add("--evidence", metavar="DIR", type=os.path.expanduser, help="write the runs as tables into "
        "DIR, and figures of them; no report")
    add("--markdown", action="store_true", help="write only README.md into the folder, from the "
        "tables and figures of its subfolders")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # platform: a console that lacks a letter gets a mark
            stream.reconfigure(errors="replace", line_buffering=True)
    folder = args.folder
    if not isdir(folder):
        mistake(f"{folder}: no such folder")
    try:
        if args.markdown:
            return write(join(folder, "README.md"), readme(folder).encode(errors="replace"))
        runs = find_runs(folder)
        if not runs:
            mistake(f"nothing to plot in {folder}: no record (X.json) of a finished run")
        if args.evidence:
            write_evidence(runs, args.evidence)
            draw_all(find_runs(args.evidence), args.evidence, args.figures, args.format)
        else:
            pictures = draw_all(runs, folder, args.figures, args.format)
            write(join(folder, "report.html"), report(runs, pictures).encode(errors="replace"))
    except BrokenPipeError:  # the reader of our output went away: python ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        mistake(f"{error.filename or folder}: {error.strerror}")


if __name__ == "__main__":
    main()
