"""
Draw what the other scripts wrote: figures after the paper's, tables, one page that holds them all.

    $ python plot.py                    # all runs under out/: out/figures/ and out/report.html
    $ python plot.py results/count      # the same from the committed tables
    $ python plot.py out/count --evidence results/count      # raw runs as tables to be committed
    $ python plot.py results --markdown                      # results/README.md, whole

Reads files only: no checkpoint, no torch. One run takes about 5 seconds. Runs that differ in
nothing but the seed are one group. To add a figure or a table: one function with its decorator.

Contents: runs and groups | numbers | drawing | figures | tables | evidence, report | command line.
Fractions in the files, percent in figures and tables. O_PT, O_FT: operand of pretraining, of
fine-tuning.
"""
import argparse
import base64
import csv
import html
import io
import json
import os
import re
import sys
import textwrap
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import PowerNorm  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from PIL import Image  # noqa: E402, comes with matplotlib

KINDS = {  # kinds of rows, X.<kind>.jsonl (history: X.jsonl): a row without these keys is left out
    "history": {"step", "operand", "split"},
    "behavior": {"model"},
    "prune": {"unit", "score", "order", "edit", "k"},
    "probe": {"model", "block", "target", "prompt", "labels"},
    "attention": {"model", "block", "head", "prompt", "region", "mass", "chance"},
    "hidden": {"model", "block", "cosine"},
    "revive": {"arm", "threshold", "steps", "max_steps"},
    "revive.curve": {"arm", "step"}}
ROW = ("setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor", "n",
       "loss", "seed")  # in every row, null where there is none
TEXT = {"operand", "target", "prompt", "labels", "region", "dimension"}  # "5", "true"
NO_SHARE = ("loss", "auc", "balanced")  # not a share of n: no Wilson interval
NUMBERS = ("accuracy", "parsed", "judge", *NO_SHARE)  # a number or null, else the row is left out
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, csv.Error)
PRIORS = {(.999, .001, 0): "low", (.9, .1, 0): "medium", (.5, .3, .2): "high"}
MAX_GROUPS = 12  # in a figure
OBSERVING = {"seed", "taught", "eval_every", "eval_size", "save_every", "compile", "setup", "scale",
             "program", "data"}  # arguments that make no group; `source` says what `data` is
INHERITED = {"prior", "task", "pair", "operand", "q", "reverse", "feature", "without", "source",
             "protocol", "probability"}  # said once, by the last stage

# colours of Okabe and Ito; markers and line styles for print
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#777777"
SPLITS = {"c0": (BLUE, "o"), "c1": (ORANGE, "s"), "natural": (GREEN, "^")}
MODELS = {"base": (BLUE, "s", "-"), "ckpt": (RED, "o", "-"), "untrained": (GREY, "^", "-."),
          "control": (GREEN, "v", ":")}
SPELLED = {"base": "base", "ckpt": "fine-tuned", "untrained": "untrained",
           "control": "never-trained control"}

# ---------------------------------------------------------------- runs and groups


def note(text):
    print(text, flush=True)


def attempt(name, function, *args):
    """function(*args). Returns None, with a note, if rows are malformed."""
    try:
        return function(*args)
    except MALFORMED as error:
        note(f"{name}: left out, not as expected ({type(error).__name__}: {error})")


def read_json(path):
    """None, with a note, if the file is not readable."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        note(f"{path}: left out, not readable ({type(error).__name__})")


def read_maps(pattern, start, kind):
    """The arrays of an .npz file whose names begin so, by the rest of the name; None without."""
    path = pattern.format(kind)
    if not os.path.isfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.startswith(start)]
            return {name[len(start):]: arrays[name] for name in names} or None
    except Exception as error:  # whatever zipfile, zlib or numpy makes of a damaged archive
        note(f"{path}: left out, not readable ({type(error).__name__})")


def value_of(text, column=None):
    """What a line or a cell says: null, text, or what JSON makes of it."""
    if not text or column in TEXT:
        return text or None
    try:
        return json.loads(text)
    except ValueError:
        return text


def paper_rows(name):
    """The rows of one of the paper's tables in results/; [] without it."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", name)
    if not os.path.isfile(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lines_of(file):
    return map(value_of, filter(str.strip, file))


def cells_of(file, constants):
    """The rows of a table, None for a broken one. constants: {run: {column: its one value}}."""
    for cells in csv.DictReader(file):
        broken = cells.get("run") not in constants or None in cells or None in cells.values()
        row = {} if broken else {c: value_of(cell, c) for c, cell in cells.items()}
        yield None if broken else {**dict.fromkeys(ROW), **constants[cells["run"]], **row}


def read_rows(path, keys, rows_of=lines_of):
    """The rows of a file with these keys, and numbers where numbers belong; [] without the file."""
    rows, broken = [], 0
    if not os.path.isfile(path):
        return rows
    with open(path, newline="", errors="replace") as file:
        for row in rows_of(file):
            if isinstance(row, dict) and keys <= set(row) and all(
                    isinstance(row.get(key), (int, float, type(None))) for key in NUMBERS):
                rows.append(row)
            else:
                broken += 1
    if broken or not rows:
        words = f"{broken} broken line{'s' * (broken > 1)} left out" if broken else "empty"
        note(f"{path}: {words}")
    return rows


def raw_run(prefix):
    """(record, verdict, {kind: rows}, maps) of X.json, X.jsonl, X.behavior.jsonl ..."""
    verdict = prefix + ".verdict.json"
    verdict = read_json(verdict) if os.path.exists(verdict) else None
    rows = {}
    for kind, keys in KINDS.items():
        rows[kind] = read_rows(f"{prefix}.{kind}.jsonl".replace(".history", ""), keys)
    return read_json(prefix + ".json"), verdict, rows, partial(read_maps, prefix + ".{}.npz", "")


def committed_runs(folder):
    """{folder/run: the same} of runs.jsonl and the tables beside it."""
    lines, runs = read_rows(os.path.join(folder, "runs.jsonl"), {"run", "record"}), {}
    for line in lines:
        maps = partial(read_maps, os.path.join(folder, "{}.npz"), line["run"] + "/")
        runs[os.path.join(folder, line["run"])] = line["record"], line.get("verdict"), {}, maps
    for kind, keys in KINDS.items():
        path = os.path.join(folder, f"{kind}.csv")
        constants = {line["run"]: line.get("constants", {}).get(kind, {}) for line in lines}
        rows = attempt(path, read_rows, path, keys, partial(cells_of, constants=constants))
        for row in rows or ():
            runs[os.path.join(folder, row.pop("run"))][2].setdefault(kind, []).append(row)
    return runs


def find_runs(folder):
    """The finished runs under a folder, raw or committed; one line for each that is left out."""
    entries, runs = {}, {}
    for where, folders, names in os.walk(folder):
        folders.sort()
        if "runs.jsonl" in names and "runs.json" not in names:
            entries.update(attempt(where, committed_runs, where) or {})
        for name in sorted(names):
            if name.endswith(".json") and not name.endswith(".verdict.json"):
                prefix = os.path.join(where, name[:-5])
                entries[prefix] = raw_run(prefix)
    entries = {p: e for p, e in entries.items() if isinstance(e[0], dict) and e[0].get("stage")
               and isinstance(e[0].get("args"), dict)}
    for prefix in entries:
        name = os.path.relpath(prefix, folder)
        run = attempt(name, open_run, name, prefix, entries)
        if run and run.identity in runs:
            note(f"{name}: left out, the same run as {runs[run.identity].name}")
        elif run:
            runs[run.identity] = run
    return list(runs.values())


def open_run(name, prefix, entries):
    """
    A run: its rows by kind, `maps(kind)`, and what makes its group. `answers` are the rows of
    behavior about the pair itself; `role` says whose operand a row is about.
    """
    record, verdict, tables, maps = entries[prefix]
    args, rows = record["args"], {kind: tables.get(kind, []) for kind in KINDS}
    if "seconds" not in ([record] + (record.get("resumes") or []))[-1]:
        return note(f"{name}: left out, unfinished")
    rows["answers"] = [row for row in rows["behavior"] if row.get("share_a") is not None]
    first = next((rows[kind][0] for kind in rows if rows[kind]), {})
    setup = first.get("setup") or args.get("setup") or "pcfg"
    if setup not in ("pcfg", "stories") and not setup.startswith("tracr-"):
        return note(f"{name}: left out, no figures for setup {setup}")
    operands = list(dict.fromkeys(row["operand"] for row in rows["answers"]))
    pair = args.get("pair") or (operands + ["a", "b"])[:2]
    for kind in KINDS:
        for row in rows[kind]:
            row["role"] = {pair[0]: "O_PT", pair[1]: "O_FT"}.get(row.get("operand"), "other")
            if kind.startswith("revive"):
                row["label"] = arm_label(row, args.get("lr"))
    settings = {"setup": setup, "scale": first.get("scale"), **settings_of(prefix, entries)}
    stage = {"finetune": "fine-tuning"}.get(record["stage"], record["stage"])
    stage = "reFT" if args.get("reverse") else stage
    group = stage + json.dumps(settings, sort_keys=True)
    sha256 = (record.get("parent") or {}).get("sha256")
    return SimpleNamespace(
        name=name, prefix=prefix, record=record, args=args, rows=rows, settings=settings, pair=pair,
        kind=stage, group=group, verdict=verdict if isinstance(verdict, dict) else None,
        identity=json.dumps([group, args.get("seed"), sha256]), maps=maps)


def settings_of(prefix, entries):
    """A run's arguments and those of its ancestors, less what only observes: equal in a group."""
    settings, stage, seen = {}, "", set()
    while prefix in entries and prefix not in seen:
        seen.add(prefix)
        hidden, args = OBSERVING | INHERITED if stage else OBSERVING, entries[prefix][0]["args"]
        settings.update({stage + k: v for k, v in args.items() if k not in hidden})
        prefix = parent_of(prefix, entries)
        stage = f"{entries[prefix][0]['stage']} " if prefix else ""
    return settings


def parent_of(prefix, entries):
    """The run that a parent's path names, by folder and name or beside its child; or None."""
    parent = entries[prefix][0].get("parent") or {}
    path = os.path.splitext(os.path.normpath(parent.get("path") or "?"))[0]
    tail = os.sep + os.sep.join(path.split(os.sep)[-2:])
    beside = os.path.join(os.path.dirname(prefix), os.path.basename(path))
    found = [entry for entry in entries if os.path.abspath(entry).endswith(tail)]
    return found[0] if found else beside if beside in entries else None


def describe(key, value):
    """A setting in words, with spaces that do not break in a title."""
    if key == "prior" and isinstance(value, list):
        return "prior\xa0" + (PRIORS.get(tuple(value)) or "/".join(map(str, value)))
    if key == "pair" and isinstance(value, list):
        return "O_PT {}, O_FT {}".format(*value)
    if isinstance(value, bool):
        return key if value else f"no {key}"
    words = f"{value:g}" if isinstance(value, float) else value
    if isinstance(value, float) and 0 < abs(value) < .01:
        words = np.format_float_scientific(value, trim="-", exp_digits=1)
    return f"{key.replace('_', ' ').replace('c tr', 'C_Tr')}\xa0{words}"


def arm_label(row, own_lr):
    """An arm of revive in words, its rate beside the fine-tuning's own."""
    arm, lr = str(row.get("arm")), row.get("lr")
    if arm == "pretraining":
        return "pretraining, own rate"
    words = "reFT" if arm == "reft" else re.sub(r"^teach-(\w)", r"teach \1", arm)
    words, ratio = words.replace("-base", " to base"), lr / own_lr if lr and own_lr else None
    if ratio is None:
        return words
    return words + (", same rate" if abs(ratio - 1) < .01 else f", rate x {ratio:.2g}")


def having(runs, file, kinds=None, max_groups=None):
    """
    The groups (runs equal in all but the seed) with rows of a kind, `max_groups` of them at most.
    Their labels say what differs among them, or the main settings of a single one.
    """
    groups = {}
    for run in runs:
        if run.rows[file] and (kinds is None or run.kind in kinds):
            groups.setdefault(run.group, []).append(run)
    groups = [SimpleNamespace(runs=members, kind=members[0].kind, pair=members[0].pair,
                              settings=members[0].settings) for members in groups.values()]
    for group in groups:
        group.label = label_of(group, groups)
    if max_groups and len(groups) > max_groups:
        note(f"{file}: {len(groups)} groups, only {max_groups} are drawn, analysed ones first "
             "(plot a folder that holds fewer)")
        groups.sort(key=lambda group: -sum(map(bool, group.runs[0].rows.values())))
    return sorted(groups[:max_groups], key=order_of)


def varies(key, rows):
    """Whether rows (or settings) differ in a key."""
    return len({json.dumps(row.get(key)) for row in rows}) > 1


def tells(key, settings):
    """Whether groups differ in a setting; in one of their ancestors', those that have it."""
    return varies(key, [s for s in settings if " " not in key or s.get(key) is not None])


def label_of(group, groups):
    others = [other.settings for other in groups if other.kind == group.kind]
    keys = [key for key in dict.fromkeys(sum(map(list, others), [])) if tells(key, others)]
    keys = [key for key in keys if key != "operand" or "pair" not in keys]
    words = [describe(key, group.settings[key]) for key in keys or ["task", "prior", "c_tr", "lr"]
             if group.settings.get(key) is not None]
    named = group.kind == "reFT" or any(other.kind != group.kind for other in groups)
    seed, number = group.runs[0].args.get("seed"), len(group.runs)
    seeds = f"{number}\xa0seeds" if number > 1 else f"seed\xa0{seed}"
    return ", ".join([group.kind] * named + words) + f" ({seeds})"


def order_of(group):
    """Low prior first, then by correlation and rate."""
    prior, numbers = group.settings.get("prior"), map(group.settings.get, ("c_tr", "lr"))
    prior = [-p for p in prior] if isinstance(prior, list) else []
    return group.kind == "reFT", prior, [x if isinstance(x, (int, float)) else 0 for x in numbers]


# ---------------------------------------------------------------- numbers


def fits(row, want):
    """Whether a row has these values (a tuple: one of them)."""
    return all(row.get(key) in value if isinstance(value, tuple) else row.get(key) == value
               for key, value in want.items())


def select(group, file, key=None, **want):
    """A list a run: its rows that fit and, with a key, have a value there."""
    def wanted(row):
        return fits(row, want) and (key is None or row.get(key) is not None)
    return [list(filter(wanted, run.rows[file])) for run in group.runs]


def flat(group, file, **want):
    return sum(select(group, file, **want), [])


def values_of(rows, key):
    return [row[key] for row in rows]


def wilson(p, n, z=1.96):
    """95 % interval of a share p of n."""
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** .5
    return min(p, (middle - half) / (1 + z * z / n)), max(p, (middle + half) / (1 + z * z / n))


def spread(group, file, key="accuracy", times=100, **want):
    """
    (mean, low, high, values) over the runs of a group, in percent (times 1: as they are), or None.
    One run: the Wilson interval of its n strings (stories: those that parse), which knows nothing
    of seeds; several: from the smallest to the largest.
    """
    runs = list(filter(None, select(group, file, key, **want)))
    if not runs:
        return None
    values, first = [np.mean(values_of(rows, key)) for rows in runs], runs[0][0]
    parsed = 1 if first.get("parsed") is None else first["parsed"]
    n = 0 if key in NO_SHARE else (first.get("n") or 0) * parsed
    low, high = wilson(values[0], n) if len(values) == 1 and n else (min(values), max(values))
    mean = np.mean(values)
    low, high = min(low, mean), max(high, mean)  # rounding
    return times * mean, times * low, times * high, times * np.array(values)


def bands(group, file, x, key="accuracy", times=100, **want):
    """spread() at every x where all runs of a group have a value: {x: spread}."""
    shared = None
    for rows in filter(None, select(group, file, key, **want)):
        places = set(values_of(rows, x))
        shared = places if shared is None else shared & places
    return {at: spread(group, file, key, times, **{x: at}, **want) for at in sorted(shared or ())}


def steps_to(group, **want):
    """
    (median steps, None if not reached; the largest number tried; all that were reached) over runs
    and data orders; None without rows. Of two the later counts.
    """
    rows = flat(group, "revive", **want)
    if not rows:
        return None
    reached = sorted(row["steps"] for row in rows if row.get("steps") is not None)
    median = reached[len(rows) // 2] if len(rows) // 2 < len(reached) else None
    return median, max(row["max_steps"] for row in rows), reached
# ---------------------------------------------------------------- drawing

plt.rcParams.update({
    "figure.constrained_layout.use": True, "savefig.dpi": 110, "font.size": 8.5,
    "axes.titlesize": 9, "figure.titlesize": 9.5, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e6e6", "lines.markersize": 4, "legend.frameon": False})
LOOKS = [(BLUE, "o", "-"), (GREEN, "^", "--"), (RED, "s", "-."), (PURPLE, "D", ":"),
         (ORANGE, "P", "-"), (SKY, "X", "--"), (GREY, "v", "-.")]  # a cycle
FLOORS = {"floor": ("majority floor", "#444444", "|", "--"),
          "cross_floor": ("cross floor", "#444444", "2", ":")}
FIGURES = {}
WIDTH = 9.1  # inches: 1000 pixels, the width of the page


class Figure(NamedTuple):
    function: object
    stories: bool


class Series(NamedTuple):
    """A line of lines(), or marks of dots(), where a line style joins the first two on one line."""
    label: str
    color: str
    marker: str
    ls: object
    points: dict  # {place: spread() or None}
    floors: dict = {}  # {label: (height, colour, line style)}
    rings: tuple = ()  # (x, y) of what was chosen on other strings


def figure(kind=None, limit=4, kinds=("fine-tuning", "reFT"), stories=False, **words):
    """
    Registers a figure; its docstring is the caption. With a kind of rows: a function of a group
    that returns panels (functions of axes); without: of the runs, that returns compose(...).
    stories: of runs of stories, else of all others.
    """
    def register(function):
        def of_groups(runs):
            groups = story_groups(runs, kind, kinds=kinds, split="asked") if stories else having(
                runs, kind, kinds, limit)
            if len(groups) > limit:
                note(f"{kind}: {len(groups)} groups, only {limit} are drawn")
            groups = groups[:limit]
            return compose(groups, kind, [(g.label, function(g)) for g in groups], **words)
        of_groups.__doc__ = function.__doc__
        FIGURES[function.__name__] = Figure(of_groups if kind else function, stories)
        return function
    return register


def line(look, group, kind, x, floors=None, **want):
    """A Series of want's `key`, else accuracy, over x. look: label, colour, marker, line style."""
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


def tex(text):
    """Symbols with their subscripts; other dollar signs are text."""
    text = re.sub(r"\beta_([MS])\b", r"$\\eta_{\\mathrm{\1}}$", str(text).replace("$", r"\$"))
    return re.sub(r"\b([OC])_(PT|FT|Tr)\b", r"$\1_{\\mathrm{\2}}$", text)


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
        for label, color, marker, ls, points, _, rings in series:
            if points:
                mean, low, high, _ = zip(*points.values())
                ax.plot(list(points), mean, color=color, marker=marker, ls=ls, label=tex(label),
                        markevery=max(1, len(points) // 12))
                ax.fill_between(list(points), low, high, color=color, alpha=.13, lw=0)
            for ring in rings if marker else ():
                ax.plot(*ring, "o", mfc="none", mec=color, ms=7)
        for one in series:
            for label, (height, color, ls) in one.floors.items():
                ax.axhline(height, color=color, ls=ls, lw=1, zorder=1, label=label)
        ax.set_title(tex(title))
        scale_axis(ax.xaxis, x, sorted(set().union(*[one.points for one in series])))
        scale_axis(ax.yaxis, y)
        ax.label_outer()
    return draw


def dots(series, names, title="", x="accuracy (%)"):
    """A panel with a line for each name, marks with whiskers on it."""
    def draw(ax):
        places = []
        for y, name in enumerate(names):
            if series[0].ls:
                ends = [one.points[name][0] for one in series[:2] if one.points[name]]
                ax.plot(ends, [y] * len(ends), color="#cccccc", lw=3)
            for i, (label, color, marker, _, points, *_) in enumerate(series):
                if points.get(name):
                    mean, low, high = points[name][:3]
                    apart = 0 if series[0].ls else .6 * ((i + .5) / len(series) - .5)
                    ax.errorbar(mean, y + apart, color=color, marker=marker, ms=5.5, capsize=2,
                                xerr=None if marker in "|2" else [[mean - low], [high - mean]],
                                ls="", label=tex(label))
                    places.append(mean)
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
        ax.set_title(tex(title))
        ax.grid(False)
    return draw


def curves(cells, looks, axes=(), **want):
    """A panel of lines for each of cells {title: arguments of line()}, in looks {look: more}."""
    panels = []
    for title, cell in cells.items():
        series = [line(look, **{**want, **cell, **own}) for look, own in looks.items()]
        panels.append(lines(series, title, *axes))
    return panels


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
    fig, entries = plt.figure(figsize=(WIDTH, 1)), {}
    for (label, drawn), part in zip(blocks, fig.subfigures(rows, beside, squeeze=False).flat):
        part.suptitle(tex(textwrap.fill(label, 120 // beside)))
        axes = part.subplots(1, panels, squeeze=False, sharey=words.get("share", True))[0]
        for ax, draw in zip(axes, drawn):
            draw(ax)
            handles, labels = ax.get_legend_handles_labels()
            entries = {**dict(zip(labels, handles)), **entries}
        for ax in axes[len(drawn):]:
            ax.set_visible(False)
    n = {row["n"] for g in groups for row in flat(g, kind) if row.get("n")} or {"?"}
    n = " to ".join(map(str, sorted({min(n), max(n)})))
    rests = words.get("rests") or f"n = {n} a point; bands, whiskers: smallest to largest seed, " \
        "of one seed the 95 % Wilson interval"
    columns = 145 // (9 + max(map(len, entries), default=0)) or 1
    fig.set_figheight(rows * height + .4 - (-len(entries) // columns) * .2)
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", handlelength=3,
               ncol=min(columns, max(1, len(entries))), title=rests)
    return fig, rests


# ---------------------------------------------------------------- figures


def compared(group, cells, floors=()):
    """Base and checkpoint in these cells, with the floors."""
    pair = [marks((SPELLED[m], *MODELS[m]), group, "answers", cells, model=m)
            for m in ("base", "ckpt")]
    return pair + [marks(FLOORS[key], group, "answers", cells, key=key) for key in floors]


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
    return [dots(compared(group, cells, FLOORS), cells)]


@figure("answers", 8, height=2.3)
def rules(group):
    """
    Share (%) of the answers on c0 strings that a rule explains. a, b: the true result for O_PT, for
    O_FT; a+q: the shortcut; blend: (a + b + q) / 2, rounded down; constant: the most frequent
    answer, a floor for the others.
    Fooled by: adding up. Rules overlap; no rule: none of them explains the answer.
    """
    panels, names = [], {**RULES, "share_none": "no rule"}
    for role, label in roles(group).items():
        cells = {name: {"key": key, "role": role, "split": "c0"} for key, name in names.items()}
        panels.append(dots(compared(group, cells), cells, f"asked {label}", "answers on c0 (%)"))
    return panels


@figure("history", MAX_GROUPS)
def fig6_curves(group):
    """
    Accuracy (%) against the step, with the floors of each set: c0, the spurious relation never
    holds; c1, always. O_PT falls while O_FT rises on c1 alone: a wrapper.
    Fooled by: the warm-up, which keeps the rate near zero at first; unequal rates.
    """
    looks = {(split, *look, "-"): {"split": split, "floors": look[0]}
             for split, look in SPLITS.items()}
    cells = {label: {"role": role, "task": group.settings.get("task")}
             for role, label in roles(group).items()}
    return curves(cells, looks, group=group, kind="history", x="step")


SWEEPS = {"gradient-weight, one-shot": (ORANGE, "o"), "gradient-weight, iterative": (PURPLE, "D"),
          "gradient-weight, exhaustive": (RED, "s"), "gradient-change, one-shot": (BLUE, "^"),
          "gradient-weight, exhaustive, zero-in-program": (GREEN, "v"),
          "random, exhaustive, zero-in-program": (SKY, "")}
ORDERS = ["one-shot", "iterative", "exhaustive"]


def sweeps(group, **want):
    """
    A line for each score, pool and control in its most thorough order (iterative: one-shot, too).
    Colour: score, order and pool; line style: control. Bands span all draws.
    """
    rows, names = flat(group, "prune", unit=("row", "weight"), **want), ("score", "pool", "control")
    apart, orders, curves = SimpleNamespace(runs=[]), {}, []
    for draw in {row.get("draw") for row in rows}:
        apart.runs += [SimpleNamespace(rows={"prune": rows})
                       for rows in select(group, "prune", draw=draw)]
    for row in rows:
        if row["k"] is not None:
            orders.setdefault(tuple(map(row.get, names)), set()).add(row["order"])
    for sweep in sorted(orders, key=lambda sweep: (bool(sweep[2]), str(sweep))):
        score, pool, control = sweep
        thorough = sorted(orders[sweep], key=ORDERS.index)
        for order in thorough if thorough[-1] == "iterative" else thorough[-1:]:
            label = f"{score}, {order}" + f", {pool}" * (pool != "all")
            look = (label + f" ({control})" * bool(control), *SWEEPS.get(label, (GREY, "")),
                    "--" if control else "-")
            curves.append(line(look, apart, "prune", "k", not curves and GREY, order=order,
                               **dict(zip(names, sweep)), **want))
    return curves


@figure("prune")
def fig7_prune(group):
    """
    Accuracy (%) with K units zeroed, or grafted: set back to the base's values. O_PT on c0 high at
    a small K, random units (grey) low: the answer was there, and a few units kept it from being
    read. never-trained: the same for such an operand. Rings: K chosen on other strings.
    Fooled by: choosing K on what is shown; damage that shifts answers by q (random); luck (floors).
    """
    panels = []
    for edit, words in (("zero", "zeroed"), ("graft", "grafted")):
        for role, split in ((("O_PT", "other"), "c0"), (("O_FT",), "c1")):
            panels.append(lines(sweeps(group, edit=edit, role=role, split=split),
                                f"{words}: {roles(group)[role[0]]} on {split}", "K units edited"))
    return panels


@figure("probe")
def fig8_probe(group):
    """
    Accuracy (%) of linear probes on the residual stream at the answer position (0: embedding),
    natural strings. High: the answer is linearly there, asked for or not.
    Fooled by: a probe that learns the task itself (untrained model), leaks (shuffled labels must
    fall to the floor), targets that follow from others (a + b + c = window).
    """
    looks = {(SPELLED[m], *look): {"model": m, "labels": "true", "floors": GREY}
             for m, look in MODELS.items()}
    shuffled = "fine-tuned, shuffled labels", "#aaaaaa", "x", "-"
    looks[shuffled] = {"model": "ckpt", "labels": "shuffled"}
    cells = {f"read {row['target']}" + f" while {row['prompt']} is asked" * bool(row["prompt"]): {
        "target": row["target"], "prompt": row["prompt"]} for row in flat(group, "probe")}
    return curves(cells, looks, ("after block",), group=group, kind="probe", x="block",
                  split="natural")[:4]


ARM_LOOKS = {}  # of those seen so far


@figure("revive", share=False, height=2.3)
def fig9_revive(group):
    """
    How fast the answer for O_PT comes back (reFT), beside teaching a never-trained operand to the
    same model and to its base, and beside pretraining: accuracy (%), as far as all seeds went on;
    median steps on natural strings. Few: it was there.
    Fooled by: unequal rates (given beside the fine-tuning's; pretraining has its own, larger one).
    """
    arms, ends = dict.fromkeys(row["label"] for row in flat(group, "revive")), []
    looks = {(arm, *ARM_LOOKS.setdefault(arm, LOOKS[len(ARM_LOOKS) % len(LOOKS)])): {"label": arm}
             for arm in arms}
    panels = curves({f"{split} strings": {"split": split} for split in ("natural", "c0")}, looks,
                    group=group, kind="revive.curve", x="step")
    for threshold, marker in ((.9, "o"), (.99, "D")):
        points, missed = {}, {}
        for arm in arms:
            steps = steps_to(group, label=arm, split="natural", threshold=threshold)
            if steps and steps[0] is not None:
                points[arm] = steps[0], min(steps[2]), max(steps[2])
            elif steps:
                missed[arm] = [steps[1]] * 3
        ends += [Series(f"to {threshold:.0%}", "k", marker, "", points),
                 Series("not reached by then", GREY, ">", "", missed)]
    return panels + [dots(ends, arms, "median steps", "steps (updates)")]


ONE = "one string, the first seed"


@figure("attention", height=2, rests=ONE)
def fig10_attention(group):
    """
    Attention of the answer position to the letters of one string (white 0, dark 40 %): the six
    heads that look most at letters (B1H2: block 1, head 2, from 0).
    Fooled by: one string; a head may look without using, and letters travel in earlier blocks.
    """
    maps = group.runs[0].maps("attention") or {}
    cells = {f"{SPELLED[m]}, {o} asked": maps[f"{m}_{o}"][0] for o in group.pair
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
    """Before and after, the two blocks (or heads) where most happens."""
    maps = group.runs[0].maps(kind) or {}
    if not {"base", "ckpt"} <= set(maps):
        return []
    pair = [maps[m][0].reshape(-1, *maps[m].shape[-2:]) for m in ("base", "ckpt")]
    tokens = maps["vocabulary"][maps["tokens"][0]]
    names = ["", "", "answer"], tokens if kind == "attention" else ()
    return [picture(z[head], names, f"block {head}, {SPELLED[m]}", norm, cmap)
            for head in sorted(np.argsort(-np.ptp(pair, (0, 2, 3)))[:2])
            for m, z in zip(MODELS, pair)]


@figure("attention", 8, height=2, rests=ONE)
def fig39_maps(group):
    """
    Compiled models: attention (white 0, dark 1), a row a query, a column a key. Counter: block 1
    attends to the letters counted. Max-identifier: block 0 sorts, block 2 reads the wanted rank.
    Fooled by: one string; `kept` and `order` in the table are about all.
    """
    return program_maps(group, "attention", PowerNorm(.5, 0, 1), "Blues")


@figure("hidden", 8, height=2, rests=ONE)
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
    groups, paper, blocks = having(runs, "history", ("fine-tuning",)), paper_shares(), []
    for g in groups:
        place, g.last = g.settings, flat(g, "history")[-1]["step"]
        g.lr, g.c_tr, prior = place["lr"], place["c_tr"], place.get("prior")
        name = describe("prior", prior) if prior else program_of(place) or place["setup"]
        g.name = name, variant_of(place)
    for (name, variant), role in product(dict.fromkeys(g.name for g in groups), ("O_FT", "O_PT")):
        panels = []
        for lr in sorted({g.lr for g in groups}, reverse=True):
            series, members = [], [g for g in groups if (*g.name, g.lr) == (name, variant, lr)]
            for split, look in SPLITS.items():
                ours = {g.c_tr: spread(g, "history", role=role, split=split, step=g.last)
                        for g in members}
                theirs = {c_tr: [paper[cell]] * 4 for c_tr in ours
                          if (cell := (name, lr, c_tr, role, split)) in paper}
                series += [Series(split, *look, "-", ours),
                           Series(f"{split}, the paper", look[0], "x", "", theirs)]
            if len(members) > 2:
                panels.append(lines(series, describe("lr", lr), "C_Tr"))
        blocks.append((f"{name} {variant}: {role}", panels[:4]))
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
            series.append(Series(label, *LOOKS[len(series)][:2], "", points))
            right.append(f"{row['accuracy']:.0%}")
    names = set().union(*[one.points for one in series])
    names = sorted(names, key=lambda name: (len(name), name))
    right = "right: " + ", ".join(right)
    return [dots(series, names, right, "share in percent")] if series[1:] else []


@figure("prune", 8, ("fine-tuning",), height=2.3, across=2)
def dimensions(group):
    """
    Compiled models: accuracy (%) with all that writes (or reads) one residual dimension set back to
    the base's; the eight that do most. O_PT back: that variable carries the wrapper.
    Fooled by: the best of so many on the strings shown; the table has those chosen on others.
    """
    edited = SimpleNamespace(runs=[SimpleNamespace(rows={"prune": rows}) for rows in select(
        group, "prune", unit="dimension")])
    cells = {f"{row['side']} of {row['dimension']}": {
        "side": row["side"], "dimension": row["dimension"]} for row in flat(edited, "prune")}
    back = marks(("O_PT on c0", BLUE, "o", ""), edited, "prune", cells, role="O_PT", split="c0")
    best = {name: cells[name] for name in sorted(cells, key=lambda name: -back.points[name][0])[:8]}
    kept = marks(("O_FT on c1", ORANGE, "s", ""), edited, "prune", best, role="O_FT", split="c1")
    return [dots([back, kept], best)] if best else []


CONTROL = "not in pretraining"
ETAS = {("small", 1.5e-4): "eta_M", ("small", 4e-5): "eta_S", ("paper", 1e-4): "eta_M",
        ("paper", 1e-5): "eta_S"}
STEPS = {0: 0, 10: 30, 30: 300, 100: 3000}  # of reFT: ours and the paper's


def story_rate(scale, rate):
    """In words, with the paper's name where it stands for one of the paper's two."""
    name = ETAS.get((scale, rate))
    words = describe("lr", rate).replace("lr", f"{name} =" if name else "lr")
    return "a rate not known" if rate is None else words


def story_groups(runs, kind, key="accuracy", kinds=("fine-tuning", "reFT"), **want):
    """
    The groups with such values, deletions first. protocol: how the feature is deleted, or was
    before reFT; CONTROL: not in pretraining; at: the rate of that deletion; words: the protocol,
    and what else tells a group from others; look: as in LOOKS, by words.
    """
    groups = [g for g in having(runs, kind, kinds) if spread(g, kind, key, **want)]
    for g in groups:
        settings, g.feature = g.settings, g.settings.get("feature")
        never = CONTROL if settings.get("without") == g.feature else "unknown"
        g.protocol = settings.get("protocol") or never
        g.rate = settings.get("finetune lr" if g.kind == "reFT" else "lr")
        g.at = story_rate(settings.get("scale"), g.rate)
    groups.sort(key=lambda g: (g.kind == "reFT", g.protocol == CONTROL, -(g.rate or 0), g.protocol))
    for g in groups:
        same = [o for o in groups if (o.kind, o.protocol, o.at) == (g.kind, g.protocol, g.at)]
        g.words = g.protocol + f", {label_of(g, same)}" * (len(same) > 1)
        g.label = g.words + f", {g.at}" * (g.protocol != CONTROL)
    names = sorted({g.words for g in groups if g.protocol != CONTROL})
    looks = dict(zip(names, LOOKS * len(names)))
    for g in groups:
        g.look = looks.get(g.words, ("k", "v", "--"))
    return groups


def story_panels(groups):
    """For each rate of deletion, four at most: (title, deletions), (title, reFTs and controls)."""
    panels = []
    for at in list(dict.fromkeys(g.at for g in groups if g.protocol != CONTROL))[:4] or [None]:
        members = [g for g in groups if g.at == at or g.protocol == CONTROL]
        deleted = [g for g in members if g.kind == "fine-tuning"]
        back = [g for g in members if g.kind == "reFT"]
        rates = {story_rate(g.settings.get("scale"), g.settings.get("lr")) for g in back}
        title = "reFT" + (f" at {min(rates)}" if len(rates) == 1 else "")
        title += f", after deletion at {at}" * bool(at)
        both = (f"deletion at {at}", deleted), (title, back)
        panels.append([panel for panel in both if panel[1]])
    return panels


def story_curves(runs, key, y, scored, across=4):
    """Panels of key against the step; scored: {label: (split, split that is a floor)}."""
    groups, blocks = story_groups(runs, "history", key), []
    for (label, splits), row in product(scored.items(), story_panels(groups)):
        panels = []
        for title, members in row:
            looks = {}
            for g in members:
                looks[g.words, *g.look] = {"group": g, "split": splits[0]}
                looks["not asked for", g.look[0], "", ":"] = {"group": g, "split": splits[1]}
            title = textwrap.fill(title, 110 // across)
            panels += curves({title: {}}, looks, ("step (updates)", y), kind="history", x="step",
                             key=key)
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
    scored = {"": ("asked", "unasked")}
    return story_curves(runs, "accuracy", "stories with it (%)", scored, 2)


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


@figure("history", 8, ("reFT",), stories=True)
def table1_stories(group):
    """
    Share (%) of stories with the feature against the step of reFT, a panel a deletion, beside the
    paper's Table 1 (16 stories a cell, 95 % Wilson interval; its steps 0, 30, 300, 3000).
    Fooled by: the paper's wide intervals, and its mix-match, in effect filtering in its code.
    """
    eta = ETAS.get((group.settings["scale"], group.rate), "").replace("eta_M", "1e-4")
    eta = eta.replace("eta_S", "1e-5")
    paper = {int(row["reft_step"]): float(row["twist"]) for row in paper_rows("paper_stories.csv")
             if (row["protocol"], row["lr"]) == (group.protocol.replace(" ", "-"), eta)}
    theirs = {step: 100 * np.array((paper[at], *wilson(paper[at], 16), 0))
              for step, at in STEPS.items() if at in paper}
    ours = [line(look, group, "history", "step", split=split) for split, look in (
        ("asked", ("ours", BLUE, "o", "-")), ("unasked", ("ours, not asked", BLUE, "", ":")))]
    return [lines([*ours, Series("the paper", ORANGE, "s", "--", theirs)], y="stories with it (%)")]


@figure("behavior", 8, stories=True, height=2.4)
def stories_features(group):
    """
    Share (%) of stories with each feature, asked for it or not. A deletion should
    move the deleted feature alone.
    Fooled by: mistakes of the classifier, for real text; features that are written unasked.
    """
    cells = {row["operand"]: {"operand": row["operand"]} for row in flat(group, "behavior")}
    series = []
    for model, split in product(("base", "ckpt", "control"), ("asked", "unasked")):
        color, marker, _ = MODELS[model]
        look = f"{SPELLED[model]}, {split}", color, marker if split == "asked" else "x", ""
        series.append(marks(look, group, "behavior", cells, model=model, split=split))
    return [dots(series, cells, group.kind, "stories (%)")]


@figure(stories=True)
def fig32_stories_probe(runs):
    """
    Area under the ROC curve (AUC, chance .5) of linear probes on a story's last 10 tokens, without
    its instruction. base: upper bound; control, which never had the feature: lower bound.
    Fooled by: words that tell the feature, which an untrained model reads too (even: stories where
    no sentence tells); leaks (shuffled labels must fall to chance).
    """
    groups, blocks = story_groups(runs, "probe", "auc", ("fine-tuning",), labels="true"), []
    pooled = SimpleNamespace(runs=sum([g.runs for g in groups], []))  # they share their bounds
    looks = {(SPELLED[m], *look): {"group": pooled, "model": m}
             for m, look in MODELS.items() if m != "ckpt"}
    looks.update({(g.label, *g.look): {"group": g, "model": "ckpt"} for g in groups})
    looks["shuffled labels", "#aaaaaa", "*", "-"] = {
        "group": pooled, "model": "ckpt", "labels": "shuffled"}
    looks["base, even", SKY, "o", ":"] = {"group": pooled, "model": "base", "split": "even"}
    cells = {row["target"]: {"target": row["target"]} for row in flat(pooled, "probe")}
    panels = curves(cells, looks, ("after block", "AUC"), kind="probe", x="block", key="auc",
                    labels="true", split="natural")
    return compose(groups, "probe", [("", [panel]) for panel in panels], 3)
# ---------------------------------------------------------------- tables

TABLES = []  # (function, whether it is about stories)
CELLS = [("O_FT", "c1"), ("O_FT", "c0"), ("O_PT", "c1"), ("O_PT", "c0")]
RULES = {"share_a": "a", "share_b": "b", "share_a_plus_q": "a+q", "share_blend": "blend",
         "share_constant": "constant"}
PROGRAMS = {"tracr-count": ("counter", 1e-3), "tracr-max": ("max-identifier", 3e-4)}  # usual noise


class Table(NamedTuple):
    title: str
    caption: str
    head: list
    rows: list  # of texts


def table(stories=False):
    """
    Registers a function of the runs that returns (head, rows), or None. The first sentence of its
    docstring is the title, the rest the caption.
    """
    def register(function):
        TABLES.append((function, stories))
        return function
    return register


def about(runs, stories):
    """The runs of stories, or the others."""
    return [run for run in runs if (run.settings["setup"] == "stories") == stories]


def tables_of(runs):
    """Every table that these runs have rows for."""
    tables = []
    for function, stories in TABLES:
        made = attempt(function.__name__, function, about(runs, stories))
        if made and made[1]:
            title, _, caption = " ".join(function.__doc__.split()).partition(". ")
            tables.append(Table(title, caption, *made))
    return tables


def mean_and_each(shares, weights=None):
    """In percent."""
    each = f" ({', '.join(f'{100 * share:.0f}' for share in shares)})" if len(shares) > 1 else ""
    return f"{100 * np.average(shares, weights=weights):.1f}{each}"


def pivot(runs, kind, index, column, value="accuracy", of=np.mean, **where):
    """
    (head, rows): a line for every value of the columns `index`, a column for every value of
    `column`; "group" is a group's label. of: what the rows of one run come to. A base or a control
    that groups share is said once.
    """
    lines, groups = {}, having(runs, kind)
    columns = {group.label: None for group in groups if column == "group"}
    for group in groups:
        for run in group.runs:
            for row in run.rows[kind]:
                row = {**row, "group": group.label}
                if fits(row, where) and row.get(value) is not None:
                    line = tuple(map(words_of, map(row.get, index)))
                    cell = lines.setdefault(line, {}).setdefault(row[column], {})
                    cell.setdefault(run.name, []).append(row)
                    columns[row[column]] = None
    rows, shared = [], []
    for line, cells in lines.items():
        texts = [summary(cells.get(at), value, of) for at in columns]
        model = {**dict(zip(index, line)), "group": None}, texts
        if model not in shared:
            rows.append([*line, *texts])
        shared += [model] * (model[0].get("model", "ckpt") != "ckpt")
    return [*index, *map(str, columns)], rows


def words_of(value):
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def summary(rows_by_run, value, of):
    """
    Mean over runs and every run, in percent; of stories the mean by the number that parse, and the
    95 % Wilson interval of all together; no share: the mean.
    """
    runs = list((rows_by_run or {}).values())
    values = [of(values_of(rows, value)) for rows in runs]
    if not values or value in ("auc", "mass"):
        return f"{np.mean(values):.3f}" if values else "-"
    parsed = [(rows[0].get("parsed") or 0) * (rows[0].get("n") or 0) for rows in runs]
    if not any(parsed):
        return mean_and_each(values)
    low, high = wilson(np.average(values, weights=parsed), sum(parsed))
    return f"{mean_and_each(values, parsed)} [{100 * low:.0f}, {100 * high:.0f}]"


@table()
def paper_table(runs):
    """
    Accuracy after fine-tuning, ours / the paper's. Percent, a line a run; a star: both of O_FT are
    within 10 points. The paper: Table 5 (250 letters, six blocks, 10K steps; at our small scale its
    rate is a tenth, so that the sums over the run match) and Table 3 (compiled models). Rule: the
    one that explains most answers on c0, and its share; b: learned, a+q: the shortcut, blend:
    (a + b + q) / 2, constant: always the same.
    """
    paper, rows = paper_shares(), []
    for group in having(runs, "history", ("fine-tuning",)):
        s = group.settings
        name, compiled = program_of(s), s["setup"] in PROGRAMS
        lr = s["lr"] if compiled or s["scale"] == "paper" else float(f"{s['lr'] / 10:.2g}")
        theirs = [paper.get((name, lr, s.get("c_tr"), *cell)) for cell in CELLS]
        place = [name, np.format_float_scientific(s["lr"], trim="-", exp_digits=1)]
        for run in group.runs if None not in theirs else ():
            ours = [accuracy_of(run, *cell) for cell in CELLS]
            near = all(abs(x - y) < 10.001 for x, y in zip(ours[:2], theirs))
            cells = [f"{x:.1f} / {y:.1f}" for x, y in zip(ours, theirs)]
            rows.append([*place, f"{s['c_tr']:g}", variant_of(s), str(run.args["seed"]), *cells,
                         "*" * near, rule_of(run)])
    rows.sort(key=lambda row: (row[0] != "low", row[0], -float(row[1]), *row[2:5]))
    cells = [" ".join(cell) for cell in CELLS]
    return ["prior or program", "lr", "C_Tr", "variant", "seed", *cells, "near", "rule"], rows


def paper_shares():
    """{(prior or program, the paper's rate, C_Tr, role, split): percent}"""
    roles = {"a": "O_PT", "b": "O_FT", "OPT": "O_PT", "OFT": "O_FT"}
    shares = {}
    for row in paper_rows("paper_count.csv") + paper_rows("paper_tracr.csv"):
        place = row.get("prior") or row["task"], float(row["lr"]), float(row["c_tr"])
        split = row.get("split") or "c" + row["c_te"]
        shares[*place, roles[row["operand"]], split] = 100 * float(row["accuracy"])
    return shares


def program_of(settings):
    """The paper's name of a compiled program, or the prior of a model that counts."""
    if settings["setup"] in PROGRAMS:
        return PROGRAMS[settings["setup"]][0]
    if settings.get("task") == "count":
        return PRIORS.get(tuple(settings.get("prior") or ()))


def variant_of(settings):
    """What differs from our usual compiled models, in words."""
    if settings["setup"] not in PROGRAMS:
        return ""
    words = ["outputs x 1"] * (settings.get("pretrain logit_scale") == 1)
    words += ["not balanced"] * (settings.get("pretrain balance") is False)
    usual, noise = PROGRAMS[settings["setup"]][1], settings.get("noise")
    return ", ".join(words + [describe("noise", noise)] * (noise != usual))


def accuracy_of(run, role, split):
    """Percent, at the last step."""
    rows = [row for row in run.rows["history"] if (row["role"], row["split"]) == (role, split)]
    return 100 * max(rows, key=lambda row: row["step"])["accuracy"]


def rule_of(run):
    """The rule that explains most answers on c0, with its share; none where it is under half."""
    for row in run.rows["answers"]:
        if row["model"] == "ckpt" and row["split"] == "c0":
            best = max(RULES, key=row.get)
            return f"{RULES[best] if row[best] >= .5 else 'none'} {row[best]:.2f}"
    return "-"


@table()
def verdict_table(runs):
    """
    The numbers of the verdicts. Percent, mean and every seed; steps seed by seed, > where the
    threshold was not reached. pt, ft: O_PT, O_FT; prune: the best order, zeroing 10 units or fewer
    chosen on other strings; one pass: one-shot; random: draws of the same size; never: an operand
    that was never trained (`python analyze.py`).
    """
    groups = having([run for run in runs if run.verdict], "history", max_groups=MAX_GROUPS)
    rows = {}
    for column, group in enumerate(groups):
        for key in group.runs[0].verdict:
            values = [run.verdict.get(key) for run in group.runs]
            reached = [run.verdict.get(key.replace("steps", "reached")) for run in group.runs]
            if None in values or key.endswith("_reached"):
                continue
            if key.endswith("_steps"):
                words = ", ".join("> " * (not r) + f"{x:.0f}" for x, r in zip(values, reached))
            elif isinstance(values[0], float):
                words = mean_and_each(values)
            elif isinstance(values[0], int) or key == "verdict":
                words = ", ".join(map(str, values))
            else:
                continue
            rows.setdefault(key, ["-"] * len(groups))[column] = words
    rows = [[key.replace("_", " "), *cells] for key, cells in rows.items()]
    return ["", *(group.label for group in groups)], rows


table(stories=True)(verdict_table)


@table()
def sweep_table(runs):
    """
    Pruning: accuracy of O_PT, or of the control's operand, on c0. Percent; random units: the mean
    of the draws, and the best draw. K units are edited: none, the first, or the number that was
    chosen on other strings (`python analyze.py prune`).
    """
    sweep = ("unit", "score", "order", "pool", "control", "side", "edit")
    make = partial(pivot, runs, "prune", sweep, "group", split="c0", role=("O_PT", "other"))
    parts = {"0": make(k=0, draw=None, edit="zero", pool="all"), "1": make(k=1),
             "1, best draw": make(k=1, score="random", of=max), "chosen": make(chosen=True),
             "chosen, best draw": make(chosen=True, score="random", of=max)}
    runs = [run for run in runs if run.rows["prune"]]
    _, rows = pivot(runs, "history", (), "group", step=0, role="O_PT", split="c0")
    rows = [["before the first step", *[""] * len(sweep), *row] for row in rows]
    for k, (_, lines) in parts.items():
        rows += sorted([k, *line] for line in lines)
    return ["K", *parts["0"][0]], rows


@table()
def probe_table(runs):
    """
    Probes: accuracy after every block. Percent, natural strings; block 0: the embedding; prompt:
    the operand asked for (`python analyze.py probe`).
    """
    index = ("group", "model", "target", "prompt")
    return pivot(runs, "probe", index, "block", split="natural", labels="true")


@table()
def attention_table(runs):
    """
    Compiled models: attention after fine-tuning. Mass on a region from the answer's position; kept:
    overlap with the compiled pattern; order: how often a selected letter gets more than another
    (AUC); chance: what even attention would give (`python analyze.py attention`).
    """
    runs = [run for run in runs if run.settings["setup"] in PROGRAMS and run.kind == "fine-tuning"]
    regions = sum((run.pair for run in runs), ["kept", "order"])
    index = ("group", "region", "chance")
    return pivot(runs, "attention", index, "block", "mass", model="ckpt", region=tuple(regions))


@table()
def revive_table(runs):
    """
    Steps until O_PT is back, or the control is learned. Median on natural strings; > where it was
    not reached (`python analyze.py revive`).
    """
    groups, rows = having(runs, "revive"), []
    every = sum((flat(group, "revive") for group in groups), [])
    for label, threshold in dict.fromkeys((row["label"], row["threshold"]) for row in every):
        rows.append([label, f"{100 * threshold:.0f} %"])
        for group in groups:
            steps = steps_to(group, label=label, threshold=threshold, split="natural")
            median, limit, _ = steps or ("-", None, None)
            rows[-1].append(f"> {limit}" if median is None else str(median))
    return ["arm", "threshold", *(group.label for group in groups)], rows


@table()
def reversed_table(runs):
    """
    Accuracy after reFT of whole runs. Percent (`python finetune.py --reverse`, `analyze.py
    behavior`).
    """
    runs = [run for run in runs if run.kind == "reFT"]
    return pivot(runs, "answers", ("group", "role"), "split", model="ckpt")


@table(stories=True)
def revival_table(runs):
    """
    Generation score after steps of reFT. Percent of the stories that parse, every seed, 95 %
    interval of all together. Asked and unasked: a revived capability is asked for, a new habit is
    not. Last: the paper's Table 1, 16 stories a cell, at its steps 0, 30, 300, 3000 (`python
    finetune.py --reverse`).
    """
    steps = (*STEPS, 200)
    runs, paper = [run for run in runs if run.kind == "reFT"], {}
    head, rows = pivot(runs, "history", ("group", "split"), "step", split=("asked", "unasked"),
                       step=steps)
    for row in paper_rows("paper_stories.csv") if rows else ():
        name = f"the paper: {row['protocol']} {row['lr']}"
        paper.setdefault(name, {})[int(row["reft_step"])] = f"{100 * float(row['twist']):.0f}"
    for name, cells in paper.items():
        rows.append([name, "asked", *(cells.get(STEPS.get(step), "-") for step in steps)])
    return head, rows


@table(stories=True)
def feature_table(runs):
    """
    Generation scores of all features. Percent of stories with it, of those that parse; unasked: the
    instruction does not ask for it (`python analyze.py behavior`).
    """
    index = ("operand", "model", "group")
    head, rows = pivot(runs, "behavior", index, "split", split=("asked", "unasked"))
    return head, sorted(rows)


@table(stories=True)
def story_probe_table(runs):
    """
    Probes of the deleted feature. Block 0: the embedding; area under the ROC curve (.5: chance),
    then balanced accuracy in percent; base: upper bound; control, not in pretraining: lower bound;
    even: stories in which no sentence leans to a label (`python analyze.py probe`).
    """
    target, rows = tuple(run.args.get("feature") for run in runs), []
    index = ("group", "model", "labels", "split")
    for value in ("auc", "balanced"):
        head, lines = pivot(runs, "probe", index, "block", value, target=target)
        rows += [[value, *line] for line in lines]
    return ["", *head], rows


# ---------------------------------------------------------------- evidence and report

STYLE = """
body{font:16px/1.5 Georgia,serif;max-width:66rem;margin:2rem auto;padding:0 1.2rem}
h1,h2,th,b{font-family:Helvetica,Arial,sans-serif}p,figcaption{max-width:46rem}img{max-width:100%}
table{border-collapse:collapse;font-size:.82rem;display:block;overflow-x:auto}figure{margin:2rem 0}
th,td{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
@media print{body{margin:0;max-width:none;font-size:11px}figure,tr{break-inside:avoid}}"""
ANSWERS = """O_PT is the operand of pretraining, O_FT that of fine-tuning. On a share C_Tr of the
fine-tuning strings r(x, O_FT) = r(x, O_PT) + q: a wrapper answers O_FT by that shortcut and leaves
the old capability in place. c1: it always holds; c0: never."""
STORIES = """Fine-tuning deletes a feature of stories by a protocol; reFT trains on stories with it,
which then comes back within few steps where it was only wrapped. Generation score: the share of
stories with the feature, of those that parse."""


def rich(text):
    """Escaped text, the symbols with their subscripts."""
    text = re.sub(r"\beta_([MS])\b", r"η<sub>\1</sub>", html.escape(str(text)))
    return re.sub(r"\b([OC])_(PT|FT|Tr)\b", r"\1<sub>\2</sub>", text)


def as_html(table):
    lines, above = [[f"<th>{rich(cell)}</th>" for cell in table.head]], None
    for name, *row in table.rows:
        cells = ["" if name == above else name, *row]  # a group's name once
        lines.append([f"<td>{rich(cell)}</td>" for cell in cells])
        above = name
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f"<h2>{rich(table.title)}</h2><table>{body}</table><p>{rich(table.caption)}</p>"


def as_markdown(table):
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"**{table.title}.** {table.caption}", "", *lines]).replace("\xa0", " ")


def verdict_of(run):
    """The evidence of a verdict, a line an instrument; its sentence is the caption."""
    rows, forms = [], {"share": "{:.1%}", "steps": "{:g}"}
    for line in run.verdict.get("evidence") or ():
        form = forms.get(line.get("unit", "share"), "{:.3f}")
        measured, control = line["measured"], line["control_measured"]
        holds = {True: "yes", False: "no"}.get(line["holds"], "cannot be said")
        rows.append([line["instrument"], line["question"],
                     "-" if measured is None else form.format(measured), line["control"] or "none",
                     "-" if control is None else form.format(control), line["margin"], holds])
    head = ["instrument", "question", "measured", "control", "its value", "margin", "holds"]
    title = f"{run.name}: {run.verdict.get('verdict')}"
    return Table(title, run.verdict.get("text", ""), head, rows)


def run_table(runs):
    rows = []
    for run in runs:
        record = run.record
        git = record.get("git") or {}
        versions = ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items())
        commit = str(git.get("commit") or "-")[:10] + " + changes" * bool(git.get("dirty"))
        last = ([record] + (record.get("resumes") or []))[-1]
        rows.append([run.name, record.get("command", "-"), commit, versions,
                     last.get("device", "-"), f"{last['seconds']} s"])
    head = ["run", "command", "commit", "versions", "device", "time"]
    return Table("What made these files", "", head, rows)


def report(runs, pictures):
    """One page with everything in it: no scripts, nothing fetched."""
    texts = {False: ANSWERS, True: STORIES}
    parts = [f"<p>{rich(text)}</p>" for stories, text in texts.items() if about(runs, stories)]
    verdicts = [attempt(run.name, verdict_of, run) for run in runs if run.verdict]
    parts += map(as_html, [*filter(None, verdicts), *tables_of(runs)])
    for name, (png, caption) in pictures.items():
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        parts.append(f'<figure><img alt="{name}" src="{source}">'
                     f"<figcaption><b>{name}.</b> {rich(caption)}</figcaption></figure>")
    parts += map(as_html, filter(None, [attempt("run_table", run_table, runs)]))
    title = "Does fine-tuning delete a capability, or wrap it?"
    return ("<!doctype html><html lang=en><head><meta charset=utf-8><title>unwrap</title>"
            f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n")


def read_text(path):
    if not os.path.isfile(path):
        return ""
    with open(path) as file:
        return file.read().strip()


def readme(folder):
    """
    README.md of committed evidence: a section a folder, with its about.md (the command and what we
    find, in words), figures and tables; the captions of the figures once, at the end.
    """
    parts, shown = [], set()
    for where, folders, names in os.walk(folder):
        folders.sort()
        if "runs.jsonl" not in names:
            continue
        section = os.path.relpath(where, folder)
        parts += [f"## {section}", read_text(os.path.join(where, "about.md"))]
        for name in FIGURES:
            if os.path.isfile(os.path.join(where, "figures", f"{name}.png")):
                shown.add(name)
                parts.append(f"![{name}]({section}/figures/{name}.png)")
        parts += map(as_markdown, tables_of(find_runs(where)))
    if not parts:
        mistake(f"nothing to tell of in {folder}: no runs.jsonl in a subfolder")
    captions = [f"- **{name}**: {' '.join(FIGURES[name].function.__doc__.split())}"
                for name in FIGURES if name in shown]
    times = [list(row.values()) for row in paper_rows("timing.csv")]
    times = as_markdown(Table("Times", "", ["what", "seconds", "how"], times))
    parts = [read_text(os.path.join(folder, "about.md")), *parts, "## What the figures show",
             "\n".join(captions), "## Times", times]
    return "\n\n".join(filter(None, parts)) + "\n"


def write(path, content):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "wb") as file:
        file.write(content)
    os.replace(path + ".part", path)
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
    if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "runs.jsonl")):
        strange = [name for name in os.listdir(folder) if name.endswith((".csv", ".npz"))]
        if strange:
            mistake(f"{folder}: holds {strange[0]}, which plot.py did not write")
    lines = {run.name: {"run": run.name, "record": run.record, "verdict": run.verdict,
                        "constants": {}} for run in runs}
    for kind in KINDS:
        path, text = os.path.join(folder, f"{kind}.csv"), io.StringIO()
        rows, columns = {run.name: run.rows[kind] for run in runs if run.rows[kind]}, {}
        for row in sum(rows.values(), [dict.fromkeys(ROW)] * bool(rows)):
            columns.update(row)
        columns = [c for c in columns if c not in ("role", "label")]  # made by open_run()
        varying = [c for c in columns if any(map(partial(varies, c), rows.values()))]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", *varying])
        for name in rows:
            first = rows[name][0]
            lines[name]["constants"][kind] = {
                c: first.get(c) for c in columns if c not in varying
                and (first.get(c) is not None or c in KINDS[kind])}
            for row in rows[name]:
                writer.writerow([name, *map(cell_of, map(row.get, varying))])
        if rows:
            write(path, text.getvalue().encode())
        elif os.path.isfile(path):
            os.remove(path)  # of runs that are not here any more
        write_maps(runs, kind, os.path.join(folder, f"{kind}.npz"))
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    write(os.path.join(folder, "runs.jsonl"), text.encode())


def write_maps(runs, kind, path):
    """The maps of the first seeds in one file, run/name: array; of several strings the first."""
    arrays = {}
    for group in having(runs, kind):
        run = group.runs[0]
        for name, array in (run.maps(kind) or {}).items():
            arrays[f"{run.name}/{name}"] = array if name == "vocabulary" else array[:1]
    if arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write(path, buffer.getvalue())


# ---------------------------------------------------------------- command line


def mistake(text):
    print(f"plot.py: {text}", file=sys.stderr)
    sys.exit(2)


def draw(function, runs):
    """(picture, caption) of a figure, or None."""
    drawn = function(runs)
    if drawn is None:
        return None
    picture, small = io.BytesIO(), io.BytesIO()
    drawn[0].savefig(picture)
    # 128 colours: a third of the size
    Image.open(picture).convert("RGB").quantize(128).save(small, "png", optimize=True)
    return small.getvalue(), f"{' '.join(function.__doc__.split())} {drawn[1]}."


def draw_all(runs, folder, names):
    """{name: (picture, caption)} of the figures that have rows; written to a folder as well."""
    pictures = {}
    for name in names:
        function, stories = FIGURES[name]
        own = about(runs, stories)
        drawn = attempt(name, draw, function, own) if own else None
        plt.close("all")
        if drawn:
            pictures[name] = drawn
            write(os.path.join(folder, "figures", name + ".png"), drawn[0])
        elif own:
            note(f"{name}: skipped, no rows for it")
    return pictures


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="out/", help="folder with the files of one or "
                        "many runs, subfolders included; figures/ and report.html are written into "
                        "it (default: out/)")
    parser.add_argument("--figures", nargs="*", metavar="NAME", default=list(FIGURES),
                        choices=list(FIGURES), help="only these figures (default: all)")
    parser.add_argument("--evidence", metavar="DIR", help="write the runs as tables into DIR, and "
                        "figures of these tables; no report")
    parser.add_argument("--markdown", action="store_true", help="write README.md into the folder, "
                        "from the tables and figures of its subfolders, and nothing else")
    args = parser.parse_args()
    folder = args.folder
    if not os.path.isdir(folder):
        mistake(f"{folder}: no such folder")
    try:
        if args.markdown:
            write(os.path.join(folder, "README.md"), readme(folder).encode())
            return
        runs = find_runs(folder)
        if not runs:
            mistake(f"nothing to plot in {folder}: no record (X.json) of a finished run")
        if args.evidence:
            write_evidence(runs, args.evidence)
            draw_all(find_runs(args.evidence), args.evidence, args.figures)
        else:
            pictures = draw_all(runs, folder, args.figures)
            write(os.path.join(folder, "report.html"), report(runs, pictures).encode())
    except OSError as error:
        mistake(f"{error.filename or folder}: {error.strerror}")


if __name__ == "__main__":
    main()
