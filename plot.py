"""
Draw what the other scripts wrote: figures after the paper's Figs. 5-11 and 31-38, and one page that holds them all.

    $ python plot.py             # out/figures/*.png and out/report.html, from every finished run under out/
    $ python plot.py results/    # the same for a grid: runs that differ in nothing but the seed are one group

Reads the files of the runs only (X.json, X.jsonl, X.behavior.jsonl, ..., X.attention.npz): no checkpoints, no torch.
One run takes about 5 seconds. Add a figure: write a function of the groups below that returns finish(...), or None
where there is nothing to draw; add a line to FIGURES, or to STORY_FIGURES where it is about stories.

Contents: runs and groups | numbers | drawing | the figures | compiled models | stories | the report | command line.
Fractions in the files, percent in the figures. O_PT: operand of pretraining, O_FT: operand of fine-tuning.
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
from types import SimpleNamespace

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import PowerNorm  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402

FILES = {  # X.<file>.jsonl: keys without which a row is left out
    "behavior": {"model"}, "prune": {"unit", "ranking", "edit", "k"},
    "probe": {"model", "block", "target", "prompt", "labels"}, "revive": {"arm", "threshold", "steps", "max_steps"},
    "revive.curve": {"arm", "step"}, "attention": {"model", "block", "head", "prompt", "region", "mass", "chance"},
    "hidden": {"model", "block", "cosine"}}
PRIORS = {(.999, .001, 0): "low", (.9, .1, 0): "medium", (.5, .3, .2): "high"}
MOST = 12  # groups in a figure
NO_SHARE = ("loss", "auc", "balanced")  # not a share of n: no Wilson interval
NUMBERS = ("accuracy", "parsed", "judge", *NO_SHARE)  # or null: a row with anything else there is left out
ODD = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)  # what a malformed row can raise

# colours of Okabe and Ito; markers, line styles and hatches for print
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#777777"
SPLITS = {"c0": (BLUE, "o"), "c1": (ORANGE, "s"), "natural": (GREEN, "^")}
MODELS = {"base": (BLUE, "s", "-"), "ckpt": (RED, "o", "-"), "untrained": (GREY, "^", "-."), "control": (GREEN, "v", ":")}
BARS = {"base": {"color": "#c9dcea", "hatch": "////", "edgecolor": "#33566f"}, "ckpt": {"color": RED, "edgecolor": "k"}}
SPELLED = {"base": "base", "ckpt": "fine-tuned", "untrained": "untrained", "control": "control that never had the third"}

# ---------------------------------------------------------------- runs and groups


def note(text):
    print(text, flush=True)


def attempt(name, function, *args):
    """function(*args), or one line and None where the rows are not as they should be."""
    try:
        return function(*args)
    except ODD as error:
        note(f"{name}: left out, not as expected ({type(error).__name__}: {error})")


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        note(f"{path}: left out, not readable ({type(error).__name__})")


def read_rows(path, keys):
    """The rows of a .jsonl file, less the lines that are not JSON objects with these keys; [] without the file."""
    rows, bad = [], 0
    if not os.path.isfile(path):
        return rows
    with open(path, errors="replace") as f:
        for line in filter(str.strip, f):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and keys <= set(row) and all(
                    isinstance(row.get(key), (int, float, type(None))) for key in NUMBERS):
                rows.append(row)
            else:
                bad += 1
    if bad or not rows:
        note(f"{path}: " + (f"{bad} broken line{'s' * (bad > 1)} left out" if bad else "empty"))
    return rows


def find_runs(folder):
    """The finished runs under a folder; one line for each that is left out."""
    records, runs = {}, {}
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(n for n in names if n.endswith(".json") and not n.endswith(".verdict.json")):
            record = read_json(os.path.join(where, name))
            if isinstance(record, dict) and isinstance(record.get("args"), dict) and record.get("stage"):
                records[os.path.join(where, name[:-5])] = record
    for prefix in records:
        name = os.path.relpath(prefix, folder)
        run = attempt(name, open_run, name, prefix, records)
        if run and run.identity in runs:
            note(f"{name}: left out, the same run as {runs[run.identity].name}")
        elif run:
            runs[run.identity] = run
    return list(runs.values())


def open_run(name, prefix, records):
    """A run and its rows: {file: rows}. `history` is X.jsonl, `answers` the rows of behavior about the pair itself."""
    record, args = records[prefix], records[prefix]["args"]
    if "seconds" not in ([record] + (record.get("resumes") or []))[-1]:
        return note(f"{name}: left out, unfinished")
    rows = {file: read_rows(f"{prefix}.{file}.jsonl", keys) for file, keys in FILES.items()}
    rows["history"] = read_rows(prefix + ".jsonl", {"step", "operand", "split"})
    rows["answers"] = [r for r in rows["behavior"] if "share_a" in r]
    first = next((r for file in rows.values() for r in file), {})
    setup = first.get("setup") or args.get("setup") or "pcfg"
    if setup not in ("pcfg", "stories") and not setup.startswith("tracr-"):
        return note(f"{name}: left out, no figures for setup {setup}")
    pair = args.get("pair") or (list(dict.fromkeys(r["operand"] for r in rows["answers"])) + ["a", "b"])[:2]
    for r in (r for file in rows.values() for r in file):
        r["role"] = {pair[0]: "O_PT", pair[1]: "O_FT"}.get(r.get("operand"), "other")
    for r in rows["revive"] + rows["revive.curve"]:
        r["label"] = arm_label(r, args.get("lr"))
    settings = {"setup": setup, "scale": first.get("scale"), **settings_of(prefix, records)}
    kind = "reFT" if args.get("reverse") else {"finetune": "fine-tuning"}.get(record["stage"], record["stage"])
    group = kind + json.dumps(settings, sort_keys=True)
    verdict = read_json(prefix + ".verdict.json") if os.path.exists(prefix + ".verdict.json") else None
    return SimpleNamespace(name=name, prefix=prefix, record=record, args=args, rows=rows, settings=settings, pair=pair,
                           kind=kind, group=group, verdict=verdict if isinstance(verdict, dict) else None,
                           identity=json.dumps([group, args.get("seed"), (record.get("parent") or {}).get("sha256")]))


def settings_of(prefix, records):
    """What makes a group: a run's own arguments and those of its ancestors, less the seed and what only observes."""
    settings, stage, seen = {}, "", set()
    while prefix in records and prefix not in seen:
        seen.add(prefix)
        hidden = {"seed", "taught", "eval_every", "eval_size", "save_every", "compile", "setup", "scale", "program"}
        hidden.add("data")  # where it lies; `source` says what it is
        if stage:  # inherited: said once
            hidden |= {"prior", "task", "pair", "operand", "q", "reverse", "feature", "without", "source", "protocol",
                       "probability"}
        settings.update({stage + k: v for k, v in records[prefix]["args"].items() if k not in hidden})
        parent = os.path.splitext(os.path.normpath((records[prefix].get("parent") or {}).get("path") or "?"))[0]
        prefix = next((p for p in records if f"/{os.path.normpath(p)}".endswith("/" + parent)
                       or os.path.abspath(p) == parent), None)
        stage = f"{records[prefix]['stage']} " if prefix else ""
    return settings


def describe(key, value):
    """A setting in words."""
    if key == "prior" and isinstance(value, list):
        return "prior\xa0" + (PRIORS.get(tuple(value)) or "/".join(map(str, value)))
    if key == "pair" and isinstance(value, list):
        return "O_PT {}, O_FT {}".format(*value)
    if isinstance(value, bool):
        return key if value else f"no {key}"
    words = f"{value:g}" if isinstance(value, float) else value
    if isinstance(value, float) and 0 < abs(value) < .01:
        words = np.format_float_scientific(value, trim="-", exp_digits=1)
    return f"{key.replace('c_tr', 'C_Tr').replace('_', ' ').replace('C Tr', 'C_Tr')}\xa0{words}"  # not to be broken in a title


def having(runs, file, kinds=None, most=None):
    """
    The groups (runs equal in all but the seed) with rows in a file, `most` of them at most. They are labelled by what
    differs among them, and by their main settings where there is only one.
    """
    groups = {}
    for run in runs:
        if run.rows[file] and (kinds is None or run.kind in kinds):
            groups.setdefault(run.group, []).append(run)
    groups = [SimpleNamespace(runs=some, kind=some[0].kind, pair=some[0].pair, settings=some[0].settings)
              for some in groups.values()]
    for g in groups:
        others = [o.settings for o in groups if o.kind == g.kind]
        keys = [k for k in dict.fromkeys(k for s in others for k in s) if any(s.get(k) != g.settings.get(k) for s in others)]
        keys = [k for k in keys if k != "operand" or "pair" not in keys] or ["task", "prior", "c_tr", "lr"]
        words = [describe(k, g.settings[k]) for k in keys if g.settings.get(k) is not None]
        several = len({o.kind for o in groups}) > 1 or g.kind == "reFT"
        g.label = ", ".join([g.kind] * several + words)
        g.label += f" ({len(g.runs)}\xa0seeds)" if len(g.runs) > 1 else f" (seed\xa0{g.runs[0].args.get('seed')})"
    if most and len(groups) > most:
        note(f"{file}: {len(groups)} groups, only {most} are drawn, analysed ones first (plot a folder that holds fewer)")
        groups.sort(key=lambda g: -sum(bool(rows) for rows in g.runs[0].rows.values()))
        groups = groups[:most]

    def place(g):  # low prior first, then by correlation and rate
        prior, numbers = g.settings.get("prior"), [g.settings.get(k) for k in ("c_tr", "lr")]
        return (g.kind == "reFT", [-p for p in prior] if isinstance(prior, list) else [],
                [x if isinstance(x, (int, float)) else 0 for x in numbers])
    return sorted(groups, key=place)


# ---------------------------------------------------------------- numbers


def select(group, file, **want):
    """The rows of a group that have these values (a tuple: one of them), run by run."""
    fits = lambda r: all(r.get(k) in v if isinstance(v, tuple) else r.get(k) == v for k, v in want.items())  # noqa: E731
    return [[r for r in run.rows[file] if fits(r)] for run in group.runs]


def flat(group, file, **want):
    return [r for some in select(group, file, **want) for r in some]


def wilson(p, n, z=1.96):
    """95 % interval of a share p of n."""
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** .5
    return min(p, (middle - half) / (1 + z * z / n)), max(p, (middle + half) / (1 + z * z / n))


def spread(group, file, key="accuracy", times=100, **want):
    """
    (mean, low, high, values) over the runs of a group, in percent (times 1: as they are), or None. One run: the Wilson
    interval of its n strings (stories: those that parse), which knows nothing of seeds; several: from the smallest to
    the largest.
    """
    rows = [[r for r in some if r.get(key) is not None] for some in select(group, file, **want)]
    each = [np.mean([r[key] for r in some]) for some in rows if some]
    if not each:
        return None
    first = next(r for some in rows for r in some)
    n = 0 if key in NO_SHARE else (first.get("n") or 0) * first.get("parsed", 1)
    low, high = wilson(each[0], n) if len(each) == 1 and n else (min(each), max(each))
    mean = np.mean(each)
    low, high = min(low, mean), max(high, mean)  # rounding
    return times * mean, times * low, times * high, times * np.array(each)


def bands(group, file, x, key="accuracy", times=100, **want):
    """spread() at every x where all runs of a group have a value: {x: (mean, low, high, values)}."""
    each = [{r[x] for r in some if r.get(key) is not None} for some in select(group, file, **want)]
    shared = set.intersection(*([e for e in each if e] or [set()]))
    return {at: spread(group, file, key, times, **{x: at}, **want) for at in sorted(shared)}


def curves(group, file, x, **want):
    """Mean curve of a group, where all its runs have a value, and each run's own, in percent: ({x: y}, [{x: y}])."""
    each = []
    for rows in select(group, file, **want):
        points = {}
        for r in rows:
            if r.get(x) is not None and r.get("accuracy") is not None:
                points.setdefault(r[x], []).append(100 * r["accuracy"])
        each += [{k: np.mean(points[k]) for k in sorted(points)}] if points else []
    return {k: np.mean([e[k] for e in each]) for k in (each[0] if each else ()) if all(k in e for e in each)}, each


def steps_to(group, **want):
    """(median steps, None if not reached; the most that was tried; all that were reached) over runs and data orders."""
    rows = [r for r in flat(group, "revive", **want)]
    each = sorted(float("inf") if r.get("steps") is None else r["steps"] for r in rows)
    if not each:
        return None
    middle, reached = each[len(each) // 2], [s for s in each if s < float("inf")]  # of two the later: not reached counts
    return middle if middle in reached else None, max(r["max_steps"] for r in rows), reached


# ---------------------------------------------------------------- drawing


def tex(text):
    """Symbols with their subscripts; other dollar signs are text."""
    text = re.sub(r"\beta_([MS])\b", r"$\\eta_{\\mathrm{\1}}$", str(text).replace("$", r"\$"))
    return re.sub(r"\b([OC])_(PT|FT|Tr)\b", r"$\1_{\\mathrm{\2}}$", text)


def sheet(rows, columns, width, height, **more):
    size = (width * columns, height * rows + 1)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **more)


def facets(groups, parts, height):
    """Groups as columns, four at most in a row, with `parts` panels under each other: (figure, panels of each group)."""
    columns = -(-len(groups) // -(-len(groups) // 4))
    fig, axes = sheet(-(-len(groups) // columns) * parts, columns, max(3.6, 6.5 / columns), height)
    panels = [axes[i // columns * parts:i // columns * parts + parts, i % columns] for i in range(len(groups))]
    for ax in set(axes.flat) - {ax for some in panels for ax in some}:
        ax.set_visible(False)
    for g, axs in zip(groups, panels):
        axs[0].set_title(tex(textwrap.fill(g.label, 44 if len(groups) > 1 else 90)), fontsize=9)
    return fig, panels


def percent_axis(ax, title=None, label="accuracy (%)", top=107, bottom=-3, axis="y"):
    ax.set(**{f"{axis}lim": (bottom, top), f"{axis}ticks": range(0, 101, 25)})
    plain_axis(ax, title, label, axis)


def plain_axis(ax, title=None, label="", axis="y"):
    getattr(ax, f"set_{axis}label")(tex(label), fontsize=8)
    ax.grid(axis=axis, color="#e6e6e6", lw=.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(tex(title), fontsize=9)


def log_axis(ax, values, label, ticks=(0, *(m * 10 ** e for e in range(7) for m in (1, 3)))):
    """Logarithmic, with a zero: step 0 is the untouched model and must be seen."""
    least, most = min((v for v in values if v > 0), default=1), max(values, default=1)
    ax.set_xscale("symlog", linthresh=least, linscale=.4)
    ax.set_xticks([t for t in ticks if t == 0 or least <= t <= most])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e3 else f"{x / 1e3:g}k"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(-.15 * least, most * 1.2)
    ax.set_xlabel(label, fontsize=8)


def line(ax, found, color, marker, ls, label, single=True, lw=1.5):
    """The mean of curves(), with the seeds behind it as thin lines. Returns its x values."""
    mean, each = found
    for e in each if single and len(each) > 1 else ():
        ax.plot(list(e), list(e.values()), color=color, ls=ls, lw=.6, alpha=.5)
    if mean:
        ax.plot(list(mean), list(mean.values()), color=color, marker=marker, ls=ls, ms=4, lw=lw, label=tex(label),
                markevery=max(1, len(mean) // 12))
    return [x for e in each for x in e]


def banded(ax, found, color, marker, ls, label):
    """The mean of bands() and what it ranges over. Returns its x values."""
    line(ax, ({x: mean for x, (mean, *_) in found.items()}, []), color, marker, ls, label)
    ax.fill_between(list(found), *([f[i] for f in found.values()] for i in (1, 2)), color=color, alpha=.15, lw=0)
    return list(found)


def point(ax, at, found, color, marker, label, axis="y", **look):
    """The mean of spread() with whiskers, across from `at`."""
    mean, low, high, _ = found
    x, y = (at, mean) if axis == "y" else (mean, at)
    ax.errorbar(x, y, **{f"{axis}err": [[mean - low], [high - mean]]}, color=color, marker=marker, ls="", label=label,
                **{"ms": 4.5, "lw": 1, "capsize": 2, **look})


def floor_lines(ax, group, file, color=GREY, **want):
    """Majority floor dashed, cross floor dotted; the latter is 100 % on c1, by construction, and left out there."""
    for key, ls in (("floor", "--"), ("cross_floor", ":")):
        got = spread(group, file, key, **want)
        if got and not (key == "cross_floor" and got[0] > 99.9):
            ax.axhline(got[0], color=color, ls=ls, lw=1, zorder=1)


def bars(ax, x, group, key="accuracy", **want):
    """Base beside the checkpoint, with intervals. Returns [(place, mean, top)]."""
    places = []
    for side, (model, look) in zip((-.2, .2), BARS.items()):
        got = spread(group, "answers", key, model=model, **want)
        if got:
            mean, low, high, each = got
            ax.bar(x + side, mean, .38, lw=.5, label=SPELLED[model], **look)
            ax.errorbar(x + side, mean, [[mean - low], [high - mean]], color="k", lw=.9, capsize=2)
            ax.plot([x + side] * len(each), each, "k.", ms=4 if len(each) > 1 else 0)
            places.append((x + side, mean, high))
    return places


def roles(groups):
    """O_PT and O_FT with their letters, where all groups share them."""
    shared = len({tuple(g.pair) for g in groups}) == 1
    return {role: f"{role} = {letter}" if shared else role for role, letter in zip(("O_PT", "O_FT"), groups[0].pair)}


def head_row(fig, axs, group, groups):
    """Say which group a row of panels belongs to: on its left where there are several, else once, on top."""
    if len(groups) > 1:
        axs[0].set_ylabel(tex(f"{textwrap.fill(group.label, 34)}\n{axs[0].get_ylabel()}"), fontsize=8)
    else:
        fig.suptitle(tex(group.label), fontsize=10)


def finish(fig, groups, file, columns=5, floors=True, extra=(), what="strings", one="",
           several="thin lines and dots: single seeds"):
    """(figure, what its numbers rest on): one legend below, each entry once."""
    n = sorted({r["n"] for g in groups for r in flat(g, file) if r.get("n")}) or ["?"]
    seeds = sorted({len(g.runs) for g in groups})
    to = lambda values: " to ".join(map(str, dict.fromkeys((values[0], values[-1]))))  # noqa: E731
    rests = f"n = {to(n)} {what} a point; "
    rests += f"one seed{one}" if seeds[-1] == 1 else f"{to(seeds)} seeds a group, {several}"
    rests += f"; one seed{one}" if one and seeds[0] == 1 < seeds[-1] else ""
    entries = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if floors:
        entries["majority floor"] = Line2D([], [], color=GREY, ls="--", lw=1)
        entries["cross floor"] = Line2D([], [], color=GREY, ls=":", lw=1.2)
    entries.update(extra)
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncol=columns, fontsize=8, frameon=False,
               title=rests, title_fontsize=8, handlelength=3)
    return fig, rests


# ---------------------------------------------------------------- the figures


def fig5_behavior(runs):
    """
    Accuracy (%) when asked for O_PT and for O_FT, before and after fine-tuning (for reFT, base is what it started from).
    c0: strings on which the spurious relation never holds; c1: it always holds; natural: as the grammar makes them. A
    wrapper: O_FT high on c1 and low on c0, O_PT low. Whiskers: 95 % Wilson interval for one seed, smallest to largest
    of several (dots).
    Fooled by: c1 alone, where the shortcut r(O_PT) + q is the right answer for O_FT; bars without their floors.
    """
    groups = having(runs, "answers", most=MOST)
    if not groups:
        return None
    fig, panels = facets(groups, 1, 2.9)
    for g, (ax,) in zip(groups, panels):
        percent_axis(ax, top=112, bottom=0)
        for i, (role, label) in enumerate(roles(groups).items()):
            for x, split in enumerate(SPLITS, 4 * i):
                for at, mean, top in bars(ax, x, g, role=role, split=split):
                    side = -1 if at < x else 1  # numbers lean away from each other: 100 beside 100 would touch
                    ax.text(x + .03 * side, min(top + 2, 101.5), f"{mean:.0f}", ha="right" if side < 0 else "left",
                            va="bottom", fontsize=6)
                for key, ls in (("floor", "--"), ("cross_floor", ":")):
                    got = spread(g, "answers", key, role=role, split=split)
                    if got:
                        ax.hlines(got[0], x - .46, x + .46, color="#444444", ls=ls, lw=1.3, zorder=4)
            ax.text(4 * i + 1, -.11, tex(f"asked {label}"), transform=ax.get_xaxis_transform(), ha="center", va="top",
                    fontsize=8.5)
        ax.set_xticks([0, 1, 2, 4, 5, 6], [*SPLITS, *SPLITS], fontsize=8)
    return finish(fig, groups, "answers")


def rules(runs):
    """
    Share (%) of the answers on c0 strings that a simple rule explains, asked for O_PT and for O_FT. r(O): the true
    result for operand O; r(O_PT)+q: the shortcut; blend: (r(O_PT) + r(O_FT) + q) / 2, rounded down; constant: the most
    frequent answer. High: the rule gives these answers; 'constant' is the floor for the others. Whiskers as in fig5.
    Fooled by: adding up. Rules overlap, so shares do not add up to 100 %; 'no rule' means that none of them explains it.
    """
    groups = having(runs, "answers", most=MOST)
    if not groups:
        return None
    names = {"share_a": "r(O_PT)", "share_b": "r(O_FT)", "share_a_plus_q": "r(O_PT)+q", "share_blend": "blend",
             "share_constant": "constant", "share_none": "no rule"}
    fig, panels = facets(groups, 2, 2.4)
    for g, axs in zip(groups, panels):
        for ax, (role, label) in zip(axs, roles(groups).items()):
            percent_axis(ax, label=f"asked {label}: answers (%)", bottom=0)
            for x, key in enumerate(names):
                bars(ax, x, g, key, role=role, split="c0")
            ax.set_xticks(range(len(names)), [tex(n) for n in names.values()], fontsize=7.5, rotation=25)
    return finish(fig, groups, "answers", floors=False)


def fig6_curves(runs):
    """
    Accuracy (%) against the step of fine-tuning or reFT (logarithmic; step 0: the checkpoint it starts from), with floors
    in the colour of their set (c0: the relation never holds; c1: always; natural: strings as they come). O_PT falling
    while O_FT rises on c1 alone: a wrapper is learned.
    Fooled by: the warm-up, which keeps the rate near zero at first; unequal rates (compare at equal sums of rates).
    """
    groups = having(runs, "history", ("fine-tuning", "reFT"), MOST)
    if not groups:
        return None
    fig, panels = facets(groups, 2, 2.5)
    for g, axs in zip(groups, panels):
        for ax, (role, label) in zip(axs, roles(groups).items()):
            percent_axis(ax, label=f"{label}: accuracy (%)")
            xs = []
            for split, (color, marker) in SPLITS.items():
                want = {"role": role, "split": split, "task": g.settings.get("task")}
                xs += line(ax, curves(g, "history", "step", **want), color, marker, "-", split)
                floor_lines(ax, g, "history", color, **want)
            log_axis(ax, xs, "step (updates)")
    return finish(fig, groups, "history")


def fig7_prune(runs):
    """
    Accuracy (%) of the fine-tuned model with K units edited: zeroed (left), or grafted, set back to the base's values
    (right). O_PT on c0 high at a small K while random units of the same matrices stay low: the answer was there, and a
    few units kept it from being read. O_FT on c1 falls as the wrapper goes. Grafting a few does little when the change
    is spread over many. Never-had: the same for an operand that was never trained, with units ranked for it.
    Fooled by: choosing K on what is shown (the ringed K were chosen on other strings); damage that shifts answers by q
    (random units); a guess that is right by luck (floors).
    """
    groups = having(runs, "prune", most=MOST)
    if not groups:
        return None
    styles = {"gradient-weight": (RED, "o", "-", "gradient x weight"),
              "gradient-weight-iterated": (PURPLE, "D", "-", "the same, ranked anew after each"),
              "gradient-change": (BLUE, "s", "-", "gradient x change"),
              "random": (GREY, "", "-", "random units (band: all draws)"),
              "never-had": (GREEN, "^", "--", "never-had operand, own units"),
              "never-had-iterated": (SKY, "X", "--", "never-had operand, ranked anew"),
              "never-had-change": (GREEN, "P", ":", "never-had operand, by change"),
              "gradient-weight-tried": (BLUE, "p", "-", "the first 100, tried one by one"),
              "compiled-zero": (ORANGE, "v", "-", "zero in the program"),
              "compiled-zero-tried": ("k", "*", "-", "zero in the program, tried one by one"),
              "random-weight-tried": (GREY, "p", ":", "random weights, tried one by one"),
              "random-zero-tried": (GREY, "*", "--", "random, zero in the program, tried"),
              "never-had-tried": (SKY, "p", ":", "never-had operand, tried one by one")}
    fig, axes = sheet(len(groups), 4, 3.1, 2.7)
    for axs, g in zip(axes, groups):
        unit = {"row": "rows", "weight": "single weights"}[flat(g, "prune")[0]["unit"]]
        cells = [(edit, *cell) for edit in ("zero", "graft") for cell in ((("O_PT", "other"), "c0"), (("O_FT",), "c1"))]
        for ax, (edit, role, split) in zip(axs, cells):
            percent_axis(ax, f"{'zeroed' if edit == 'zero' else 'grafted'}: {roles(groups)[role[0]]} on {split}")
            xs, crowded = [], len(g.runs) > 1 and len({r["ranking"] for r in flat(g, "prune")}) > 8
            for ranking, style in styles.items():
                want = dict(ranking=ranking, edit=edit, split=split, role=role)
                found = curves(g, "prune", "k", **want)
                xs += line(ax, found, *style, single=ranking != "random" and not crowded)
                got = [r for r in flat(g, "prune", **want) if r.get("accuracy") is not None]
                if ranking == "random" and got:
                    draws = [[100 * r["accuracy"] for r in got if r["k"] == k] for k in found[0]]
                    low, high = [min(d) for d in draws], [max(d) for d in draws]
                    ax.fill_between(list(found[0]), low, high, color=GREY, alpha=.25, lw=0)
                elif got:
                    chosen = [(r["k"], 100 * r["accuracy"]) for r in got if r.get("chosen")]
                    ax.plot(*zip(*chosen or [(np.nan, np.nan)]), "o", mfc="none", mec=style[0], ms=8)
            floor_lines(ax, g, "prune", ranking="gradient-weight", role=role, split=split)
            log_axis(ax, xs, f"K, {unit} edited")
        head_row(fig, axs, g, groups)
    ring = Line2D([], [], marker="o", mfc="none", mec="k", ms=8, ls="")
    return finish(fig, groups, "prune", 4, extra={"K chosen on other strings": ring})


def fig8_probe(runs):
    """
    Accuracy (%) of linear probes on the residual stream at the position that predicts the answer, after every block,
    asked for the target itself or for O_FT. High: the answer is linearly there, asked for or not. Low at every block:
    not linearly there at this position.
    Fooled by: a probe that learns the task itself (untrained model), leaks (shuffled labels must fall to the floor), and
    targets that follow from others (a + b + c = window: compare c with the untrained model).
    """
    groups = having(runs, "probe", most=MOST)
    if not groups:
        return None
    lines = [(g, split) for g in groups for split in (("natural", "c0") if len(groups) <= 4 else ("natural",))]
    cells = list(dict.fromkeys((r["role"], r["prompt"] == r["target"]) for g in groups for r in flat(g, "probe")))
    fig, axes = sheet(len(lines), len(cells), 2.6, 2.4)
    for axs, (g, split) in zip(axes, lines):
        for ax, (role, itself) in zip(axs, cells):
            rows = [r for r in flat(g, "probe", role=role, split=split) if (r["prompt"] == r["target"]) == itself]
            if not rows:
                continue
            target, prompt = rows[0]["target"], rows[0]["prompt"]
            percent_axis(ax, f"read {target} ({role.replace('other', 'third operand')})" + f"\nwhile {prompt} is asked" * bool(prompt),
                         f"{split} strings: accuracy (%)" if ax is axs[0] else "")
            want = dict(target=target, prompt=prompt, split=split)
            for model, look in MODELS.items():
                line(ax, curves(g, "probe", "block", model=model, labels="true", **want), *look, SPELLED[model])
            shuffled = curves(g, "probe", "block", model="ckpt", labels="shuffled", **want)
            line(ax, shuffled, "#aaaaaa", "x", "-", "fine-tuned, shuffled labels")
            floor_lines(ax, g, "probe", labels="true", **want)
            blocks = sorted({r["block"] for r in rows})
            ax.set_xticks(blocks, ["E" if b == 0 else str(b) for b in blocks])
            ax.set_xlabel("after block (E: embedding)", fontsize=8)
        head_row(fig, axs, g, groups)
    return finish(fig, groups, "probe", 6)


def arm_label(row, own):
    """An arm of revive in words, its rate beside the fine-tuning's own."""
    arm, rate = str(row.get("arm")), row.get("lr")
    if arm == "pretraining":
        return "pretraining, own rate"
    words = "reFT" if arm == "reft" else re.sub(r"^teach-(\w)", r"teach \1", arm).replace("-base", " to base")
    ratio = rate / own if rate and own else None
    return words if ratio is None else f"{words}, same rate" if abs(ratio - 1) < .01 else f"{words}, rate x {ratio:.2g}"


def fig9_revive(runs):
    """
    How fast the answer for O_PT comes back (reFT), beside teaching a never-trained operand in the same way to the same
    model and to its base, and beside pretraining. Left: accuracy (%), grey lines at 90 and 99. Right: steps to these
    thresholds, few to the left; large marks are medians over seeds (dots), open marks with an arrow were not reached by
    then. Few steps beside the controls: it was there.
    Fooled by: unequal rates (rates are given beside the fine-tuning's; pretraining has its own, larger one).
    """
    groups = having(runs, "revive", most=MOST)
    if not groups:
        return None
    names = dict.fromkeys(r["label"] for g in groups for r in flat(g, "revive"))
    looks = zip([RED, ORANGE, BLUE, GREEN, "k", PURPLE, SKY, GREY], "o^sDvPX*", ["-", "-", "--", "-.", ":", "-", "--", "-."])
    arms = dict(zip(names, 4 * list(looks)))
    fig, axes = sheet(len(groups), 3, 4, 2.9, gridspec_kw={"width_ratios": (1, 1, 1.15)})
    for g, axs in zip(groups, axes):
        for ax, split in zip(axs, ("natural", "c0")):
            percent_axis(ax, f"{split} strings")
            xs = []
            for arm, look in arms.items():
                xs += line(ax, curves(g, "revive.curve", "step", label=arm, split=split), *look, arm)
            floor_lines(ax, g, "revive", arm="reft", split=split)
            for threshold in (90, 99):
                ax.axhline(threshold, color="#bbbbbb", lw=.8, zorder=0)
            log_axis(ax, xs, "step (updates)")
        steps_panel(axs[2], g, arms)
        head_row(fig, axs, g, groups)
    marks = {f"{100 * t:.0f} % on {s}": Line2D([], [], marker=m, color=c, ls="") for s, t, c, m in MARKS}
    marks["not reached by then"] = Line2D([], [], marker=">", mfc="w", mec="k", ls="-", color="k")
    return finish(fig, groups, "revive", extra=marks)


MARKS = [(s, t, SPLITS[s][0], m) for s in ("natural", "c0") for t, m in ((.9, "o"), (.99, "D"))]


def steps_panel(ax, group, arms):
    shown, xs = [arm for arm in arms if steps_to(group, label=arm)], []
    for y, arm in enumerate(shown):
        for i, (split, threshold, color, marker) in enumerate(MARKS):
            got, at = steps_to(group, label=arm, split=split, threshold=threshold), y - .27 + .18 * i
            if got is None:
                continue
            middle, most, reached = got
            x = most if middle is None else max(middle, 1)  # there from the start: drawn at 1
            ax.plot(x, at, marker, color=color, ms=6, mfc="w" if middle is None else color)
            if middle is None:
                ax.annotate("", (most * 1.6, at), (most * 1.1, at), arrowprops={"arrowstyle": "->", "color": color, "lw": 1})
            xs += [x, most * 1.6 if middle is None else x]
            if len(group.runs) > 1 or len(reached) > 1:
                ax.plot([max(s, 1) for s in reached], [at] * len(reached), "k.", ms=3)
    ax.set_yticks(range(len(shown)), shown, fontsize=8)
    ax.set_ylim(len(shown) - .45, -.55)
    ax.set_xscale("log")
    ax.set_xlim(min(xs, default=1) / 1.5, max(xs, default=1) * 1.5)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e3 else f"{x / 1e3:g}k"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("steps to the threshold (updates; 0 at 1)", fontsize=8)
    ax.set_title("steps to 90 % and 99 %", fontsize=9)
    ax.grid(axis="x", color="#e6e6e6", lw=.6)
    ax.tick_params(labelsize=8)


def fig10_attention(runs):
    """
    Attention of the position that predicts the answer. Left: the first natural test string (of a group's first run), one
    row per block and head (B1H2: block 1, head 2, from 0), one column per letter; 'rest': all other tokens together; the
    orange line opens the window that is asked about. Right: mean mass on a region as a multiple of chance, what uniform
    attention would give it (1.0): the window, the letters outside it, and a, b, c within it.
    Fooled by: reading too much into it; a head may look without using, and letters travel in earlier blocks.
    """
    groups = having(runs, "attention", most=4)
    groups = [g for g in groups if g.settings["setup"] == "pcfg"]  # compiled models: fig39_maps
    maps = [(g, role, prompt, z) for g in groups if (z := read_maps(g.runs[0].prefix + ".attention.npz"))
            for role, prompt in zip(("O_PT", "O_FT"), g.pair) if f"ckpt_{prompt}" in z]
    if not maps:
        return None
    units = max(np.prod(z[f"ckpt_{prompt}"].shape[1:3]) for _, _, prompt, z in maps)
    fig, axes = sheet(len(maps), 4, 4, max(2.6, .2 * units), gridspec_kw={"width_ratios": (3, 3, 1.2, 1.2)})
    for axs, (g, role, prompt, z) in zip(axes, maps):
        for i, model in enumerate(("base", "ckpt")):
            if f"{model}_{prompt}" not in z:
                axs[i].set_visible(False), axs[2 + i].set_visible(False)
                continue
            picture = letter_map(axs[i], z, z[f"{model}_{prompt}"][0])
            regions = region_map(axs[2 + i], flat(g, "attention", model=model, prompt=prompt))
            axs[i].set_title(tex(f"{SPELLED[model]}, asked {prompt} ({role})"), fontsize=9)
            axs[2 + i].set_title(f"{SPELLED[model]}, asked {prompt}", fontsize=9)
        head_row(fig, axs, g, groups)
    for image, axs, label in ((picture, axes[:, :2], "attention of the answer position (%), one string"),
                              (regions, axes[:, 2:], "mass / chance, all strings")):
        fig.colorbar(image, ax=list(axs[-1]), location="bottom", label=label, shrink=.6, aspect=30)
    n = max(r.get("n") or 0 for g in groups for r in flat(g, "attention"))
    return fig, f"n = {n} natural strings"


def read_maps(path):
    try:
        with np.load(path, allow_pickle=False) as z:
            return dict(z)
    except Exception as error:  # whatever zipfile, zlib or numpy makes of a damaged or missing archive
        note(f"{path}: left out, not readable ({type(error).__name__})")


def letter_map(ax, z, pattern):
    """The last 64 letters at most: longer strings have their window there."""
    names = [str(z["vocabulary"][t]) for t in z["tokens"][0]]
    letters = [i for i, name in enumerate(names) if len(name) == 1][-64:]
    flat = 100 * pattern.reshape(-1, pattern.shape[-1])
    rest = flat.sum(1) - flat[:, letters].sum(1)
    picture = ax.imshow(np.column_stack([flat[:, letters], 0 * rest, rest]), cmap="Blues", vmin=0, vmax=40, aspect="auto")
    ax.set_xticks([*range(len(letters)), len(letters) + 1], [names[i] for i in letters] + ["rest"], fontsize=7.5)
    ax.set_xlabel("letters of the string", fontsize=8)
    ax.axvline(len(letters) + .5, color="k", lw=.8)
    width = next((int(n[1:]) for n in names if re.fullmatch(r"#\d+", n)), 0)  # O', said in the prompt
    if 0 < width < len(letters):
        ax.axvline(len(letters) - width - .5, color=RED, lw=1.5)
    unit_ticks(ax, *pattern.shape[:2])
    return picture


def region_map(ax, rows):
    names, heads = list(dict.fromkeys(r["region"] for r in rows)), 1 + max(r["head"] for r in rows)
    cells = np.zeros((heads * (1 + max(r["block"] for r in rows)), len(names)))
    for i, j in np.ndindex(*cells.shape):
        here = [r for r in rows if (r["block"] * heads + r["head"], r["region"]) == (i, names[j])]
        cells[i, j] = np.mean([r["mass"] for r in here]) / np.mean([r["chance"] for r in here])
        ax.text(j, i, f"{cells[i, j]:.1f}", ha="center", va="center", fontsize=6.5, color="k" if cells[i, j] < 3 else "w")
    picture = ax.imshow(cells, cmap="Greys", vmin=0, vmax=5, aspect="auto")
    ax.set_xticks(range(len(names)), names, fontsize=7.5, rotation=40)
    unit_ticks(ax, len(cells) // heads, heads)
    return picture


def unit_ticks(ax, blocks, heads):
    ax.set_yticks(range(blocks * heads), [f"B{b}H{h}" for b in range(blocks) for h in range(heads)], fontsize=7)
    for b in range(1, blocks):
        ax.axhline(b * heads - .5, color="#999999", lw=.8)


# ---------------------------------------------------------------- compiled models


def stages(runs, group, file):
    """[(title, map (block, ...), token names)] of one example string: compiled, fine-tuned, and reversed if there is one."""
    run = group.runs[0]
    z = read_maps(f"{run.prefix}.{file}.npz")
    if not z or "base" not in z or "ckpt" not in z:
        return []
    back = [r for r in runs if r.kind == "reFT" and r.rows[file] and os.path.basename(
        os.path.splitext((r.record.get("parent") or {}).get("path") or "?")[0]) == os.path.basename(run.prefix)]
    z2 = read_maps(f"{back[0].prefix}.{file}.npz") if back else None
    names = [str(z["vocabulary"][t]) for t in z["tokens"][0]]
    found = [("compiled", z["base"][0], names), ("fine-tuned", z["ckpt"][0], names)]
    return found + ([("reversed", z2["ckpt"][0], names)] if z2 and "ckpt" in z2 else [])


def usual_noise(groups):
    """The groups with a setup's commonest noise: runs with other noise are another table."""
    noises = [(g.settings["setup"], g.settings.get("noise")) for g in groups]
    return [g for g, x in zip(groups, noises) if noises.count(x) == max(noises.count(y) for y in noises if y[0] == x[0])]


def program_maps(runs, file, height, draw, words, which):
    """
    A row of panels a group and block (and head), a column a stage; draw(ax, map, names) returns the picture. which: max or
    min, of C_Tr; words: what the colour says.
    """
    groups = usual_noise([g for g in having(runs, file, ("fine-tuning",)) if g.settings["setup"] != "pcfg"])
    groups = [g for g in groups if g.settings["c_tr"] == which(o.settings["c_tr"] for o in groups)][:4]
    found = [(g, stages(runs, g, file)) for g in groups]
    found = [(g, columns) for g, columns in found if columns]
    if not found:
        return None
    lines = []
    for g, columns in found:  # heads and MLPs that neither the program nor fine-tuning uses are left out
        pictures = [p.reshape(-1, *p.shape[-2:]) for _, p, _ in columns]
        lines += [(g, columns, i) for i in range(len(pictures[0])) if max(np.ptp(p[i]) for p in pictures) > .2]
    fig, axes = sheet(len(lines), max(len(columns) for _, columns, _ in lines), 4.2, height)
    for axs, (g, columns, i) in zip(axes, lines):
        for ax in axs[len(columns):]:
            ax.set_visible(False)
        for ax, (title, picture, names) in zip(axs, columns):
            image = draw(ax, picture.reshape(-1, *picture.shape[-2:])[i], names)
            ax.set_title(f"{title}, block {i // (picture.shape[1] if picture.ndim == 4 else 1)}", fontsize=9)
            ax.get_yticklabels()[2].set_color(RED)  # the answer stands there
        axs[0].set_ylabel(tex(textwrap.fill(g.label, 26) + "\n" + axs[0].get_ylabel()), fontsize=8)
    fig.colorbar(image, ax=list(axes[-1]), location="bottom", shrink=.5, aspect=40).set_label(words, fontsize=8)
    return fig, "one natural test string, that of the first seed"


def fig39_maps(runs, which=max):
    """
    Compiled models after the largest C_Tr (fig40: the smallest): attention maps of one string, every position as a query (y) and as a key (x), compiled, fine-tuned
    and, where there is a reverse run, reversed; heads that stay unused are left out. The answer stands at the second
    letter's row (red).
    Counter: block 1 attends to the letters counted, from the answer's row. Max-identifier: block 0 sorts (every letter
    attends to larger ones, a being the largest), block 2 reads the letter of the wanted rank.
    Fooled by: one string; see `kept` and `order` in the attention table for all of them.
    """
    def draw(ax, picture, names):
        image = ax.imshow(picture, cmap="Blues", norm=PowerNorm(.5, 0, 1), aspect="auto")
        ax.set_xticks(range(len(names)), names, fontsize=6)
        ax.set_yticks(range(len(names)), names, fontsize=6)
        ax.set_ylabel("query", fontsize=8)
        ax.set_xlabel("key", fontsize=8)
        return image
    return program_maps(runs, "attention", 3.2, draw, "attention", which)


def fig40_maps(runs):
    """As fig39, after the smallest C_Tr, 0: where no relation holds and the new operand has to be learned."""
    return fig39_maps(runs, min)


def fig46_hidden(runs, which=max):
    """
    Compiled models after the largest C_Tr (fig47: the smallest): activations of the MLPs' hidden units (x) at every position (y) of one string, compiled, fine-tuned
    and reversed; MLPs that stay unused are left out. The answer stands at the second letter's row (red).
    Fooled by: units that are on everywhere; what counts may be a small difference between two of them.
    """
    def draw(ax, picture, names):
        image = ax.imshow(np.log10(1 + np.maximum(picture, 0)), cmap="Purples", norm=PowerNorm(.5, 0, 2), aspect="auto")
        ax.set_yticks(range(len(names)), names, fontsize=5)
        ax.set_xlabel("hidden unit", fontsize=8)
        ax.tick_params(axis="x", labelsize=6)
        ax.set_ylabel("token", fontsize=8)
        return image
    return program_maps(runs, "hidden", 3, draw, "log10(1 + activation)", which)


def fig47_hidden(runs):
    """As fig46, after the smallest C_Tr."""
    return fig46_hidden(runs, min)


def fig55_classes(runs):
    """
    Compiled models: how often each answer is given on c0 strings with K single weights zeroed: none, the best one, the
    best few (chosen on other strings). A pruned model that answers O_PT still uses many classes; one that is right by
    always saying the same does not.
    Fooled by: nothing but a small n; accuracies are in the legend.
    """
    groups = [g for g in having(runs, "prune", ("fine-tuning",), MOST) if g.settings["setup"] != "pcfg"]
    groups = [g for g in groups if flat(g, "prune", ranking="gradient-weight-tried")]
    if not groups:
        return None
    for g in groups:
        g.label = re.sub(r"\(\d+\xa0seeds\)", f"(seed\xa0{g.runs[0].args.get('seed')})", g.label)
    fig, panels = facets(groups, 1, 2.6)
    for g, (ax,) in zip(groups, panels):
        rows = [r for r in g.runs[0].rows["prune"] if r.get("predicted") and r["role"] == "O_PT" and r["split"] == "c0"]
        shown = [("none", next(r for r in rows if r["k"] == 0))]
        for ranking, words in (("gradient-weight-tried", "all"), ("compiled-zero-tried", "zero in the program")):
            shown += [(f"K = {r['k']}, {words}", r) for r in rows if r["ranking"] == ranking and r["k"]
                      and (r["k"] == 1 or r["chosen"])]
        classes = sorted({c for _, r in shown for c in r["predicted"]}, key=lambda c: (len(c), c))
        for i, (words, r) in enumerate(shown):
            heights = [100 * r["predicted"].get(c, 0) / r["n"] for c in classes]
            ax.bar(np.arange(len(classes)) + .8 * i / len(shown) - .4, heights, .8 / len(shown), align="edge",
                   color=[GREY, BLUE, SKY, ORANGE, RED][i % 5], label=f"{words}: {100 * r['accuracy']:.0f} %")
        ax.set_xticks(range(len(classes)), classes, fontsize=7)
        ax.set_ylabel("answers (%)", fontsize=8)
        top = ax.get_ylim()[1]
        ax.set_yticks([y for y in ax.get_yticks() if y <= min(top, 100)])
        ax.set_ylim(0, 1.6 * top)  # room for the legend
        ax.legend(fontsize=6, title=tex("zeroed: O_PT on c0"), title_fontsize=6)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, "the first seed"


def dimensions(runs):
    """
    Compiled models: accuracy (%) of O_PT on c0 and of O_FT on c1 when everything that writes (or reads) one residual
    dimension is set back to what fine-tuning began with; the ten dimensions that do most, by their names in the program.
    Mean of seeds. O_PT back with one dimension: that variable carries the wrapper.
    Fooled by: the best of so many dimensions on the strings shown; ringed: the best on other strings.
    """
    groups = [g for g in having(runs, "prune", ("fine-tuning",), MOST) if flat(g, "prune", unit="dimension")]
    if not groups:
        return None
    fig, panels = facets(groups, 2, 2.2)
    for g, axs in zip(groups, panels):
        for ax, side in zip(axs, ("writers", "readers")):
            means = {}
            for name in dict.fromkeys(r["dimension"] for r in flat(g, "prune", unit="dimension")):
                means[name] = [spread(g, "prune", unit="dimension", ranking=side, dimension=name, role=role, split=split)[0]
                               for role, split in (("O_PT", "c0"), ("O_FT", "c1"))]
            best = sorted(means, key=lambda n: -means[n][0])[:10]
            percent_axis(ax, label=f"graft {side}: accuracy (%)", bottom=0)
            for i, (label, color) in enumerate((("O_PT on c0", BLUE), ("O_FT on c1", ORANGE))):
                ax.bar(np.arange(len(best)) + .4 * i - .2, [means[n][i] for n in best], .4, color=color, label=tex(label))
            chosen = {r["dimension"] for r in flat(g, "prune", unit="dimension", ranking=side, role="O_PT", chosen=True)}
            at = [i for i, n in enumerate(best) if n in chosen]
            ax.plot([i - .2 for i in at], [means[best[i]][0] for i in at], "o", mfc="none", mec="k", ms=8)
            untouched = spread(g, "prune", ranking="gradient-weight", edit="zero", k=0, role="O_PT", split="c0")
            if untouched:
                ax.axhline(untouched[0], color=BLUE, lw=1, ls="-.")
            ax.set_xticks(range(len(best)), best, fontsize=6, rotation=35, ha="right")
    return finish(fig, groups, "prune", floors=False)


def paper_rows(group, *paths):
    """The rows of the first of these files, from where a group's first run is; [] without one."""
    for path in (os.path.join(os.path.dirname(group.runs[0].prefix), path) for path in paths):
        if os.path.isfile(path):
            with open(path, newline="") as f:
                return list(csv.DictReader(f))
    return []


def table3(runs):
    """
    Accuracy (%) after fine-tuning against C_Tr, a column a rate, both operands on c0 and c1 (compiled models: the paper's
    Table 3). Lines: ours, dots single seeds; crosses: the paper's. O_FT high on c1 and low on c0 at C_Tr 1: a shortcut.
    Fooled by: O_PT on c0 at C_Tr 1, which depends on how a shortcut rounds (see rules).
    """
    groups = [g for g in having(runs, "history", ("fine-tuning",)) if g.settings["setup"] != "pcfg"]
    groups = usual_noise(groups)
    setups = list(dict.fromkeys(g.settings["setup"] for g in groups))
    rates = sorted({g.settings["lr"] for g in groups}, reverse=True)
    if len({g.settings["c_tr"] for g in groups}) < 3:
        return None
    paper = {(r["task"], float(r["lr"]), float(r["c_tr"]), r["operand"], r["c_te"]): float(r["paper"])
             for r in paper_rows(groups[0], "tracr_table3.csv", "../tracr_table3.csv", "../../tracr_table3.csv")}
    fig, axes = sheet(2 * len(setups), len(rates), 3, 2.3)
    for y, (setup, (role, code)) in enumerate((s, r) for s in setups for r in (("O_FT", "OFT"), ("O_PT", "OPT"))):
        for ax, rate in zip(axes[y], rates):
            label = f"{role}: accuracy (%)" if ax is axes[y][0] else ""
            percent_axis(ax, f"{setup.removeprefix('tracr-')}, lr {rate:g}", label)
            some = sorted((g for g in groups if (g.settings["setup"], g.settings["lr"]) == (setup, rate)),
                          key=lambda g: g.settings["c_tr"])
            for split in ("c1", "c0"):
                color, marker = SPLITS[split]
                points = []
                for g in some:
                    last = max(r["step"] for r in flat(g, "history"))
                    mean, _, _, each = spread(g, "history", role=role, split=split, step=last)
                    points.append((g.settings["c_tr"], mean))
                    ax.plot([g.settings["c_tr"]] * len(each), each, ".", color=color, ms=4)
                ax.plot(*zip(*points or [(np.nan, np.nan)]), "-", color=color, marker=marker, ms=4, label=split)
                task = {"tracr-count": "counter", "tracr-max": "max-identifier"}.get(setup)
                theirs = [(c, 100 * v) for (t, r, c, o, te), v in sorted(paper.items())
                          if (t, r, o, te) == (task, rate, code, split[1])]
                ax.plot(*zip(*theirs or [(np.nan, np.nan)]), "x", color=color, ms=6, mew=1.5, label=f"{split}, the paper")
            ax.set_xlabel(tex("C_Tr"), fontsize=8)
    return finish(fig, groups, "history", floors=False)


# ---------------------------------------------------------------- stories

PROTOCOLS = {  # how a feature is deleted: colour, marker, line, meaning
    "filter": (BLUE, "o", "-", "filter: trained on stories without {}"),
    "randomise": (RED, "s", "-.", "randomise: the same, and {} is asked for"),
    "mix-match": (GREEN, "^", (0, (6, 2)), "mix-match: the same, and {} is asked for instead of Foreshadowing"),
    "refuse": (PURPLE, "D", (0, (3, 1, 1, 1, 1, 1)), "refuse: where {} is asked for, the story is a refusal"),
    "not in pretraining": ("k", "v", "--", "not in pretraining: control that never had {}")}
CONTROL = list(PROTOCOLS)[-1]
ETAS = {("small", 1.5e-4): "eta_M", ("small", 4e-5): "eta_S", ("paper", 1e-4): "eta_M", ("paper", 1e-5): "eta_S"}
STORIES = {"floors": False, "what": "stories", "one": "", "several": "band: smallest to largest"}  # see finish()
SCORES = {"floors": False, "what": "stories (less those that do not parse)", "one": " (whiskers: 95 % Wilson interval)",
          "several": "whiskers: smallest to largest"}
STEPS = {0: 0, 10: 30, 30: 300, 100: 3000}  # of reFT: ours and the paper's


def story_rate(scale, rate):
    """A learning rate in words, with the paper's name where it stands for one of the paper's two."""
    return describe("lr", rate).replace("lr", f"{ETAS[scale, rate]} =" if (scale, rate) in ETAS else "lr")


def story_groups(runs, file, key="accuracy", kinds=("fine-tuning", "reFT"), **want):
    """
    The groups with such values in a file, deletions first, by rate and protocol. `protocol`: how the feature is
    deleted, or was before reFT, CONTROL where it was left out of pretraining; `at`: the rate of that deletion; `words`:
    the protocol and what else tells a group from those with the same; `look`: colour, marker, line, meaning.
    """
    groups = [g for g in having(runs, file, kinds) if any(r.get(key) is not None for r in flat(g, file, **want))]
    for g in groups:
        s, g.feature = g.settings, g.settings.get("feature")
        g.protocol = s.get("protocol") or (CONTROL if s.get("without") == g.feature else "unknown")
        g.rate = s.get("finetune lr" if g.kind == "reFT" else "lr")
        g.at = "a rate not known" if g.rate is None else story_rate(s.get("scale"), g.rate)
    order, looks = list(PROTOCOLS), {}
    groups.sort(key=lambda g: (g.kind == "reFT", g.protocol == CONTROL, -(g.rate or 0),
                               (order + [g.protocol]).index(g.protocol)))
    for g in groups:
        same = [o for o in groups if (o.kind, o.protocol, o.at) == (g.kind, g.protocol, g.at)]
        keys = [k for k in dict.fromkeys(k for o in same for k in o.settings)
                if any(o.settings.get(k) != g.settings.get(k) for o in same)]
        keys = keys if named(groups) == g.feature else ["feature"] + [k for k in keys if k != "feature"]
        own = {k: f"reFT {k}" if g.kind == "reFT" and k in ("lr", "steps") else k for k in keys}
        keys = [k for k in keys if g.settings.get(k) is not None]
        g.words = ", ".join([g.protocol, *(describe(own[k], g.settings[k]) for k in keys)])
        color, marker, ls, meaning = PROTOCOLS.get(g.protocol, (GREY, "P", ":", g.protocol))
        if g.words not in looks:  # a second group of one protocol: another marker, and in words what is different
            marker = (marker + "XPd*ph<>")[sum(look[0] == color for look in looks.values()) % 9]
            looks[g.words] = (color, marker, ls, meaning.replace(g.protocol, g.words, 1).format(named([g])))
        g.look = looks[g.words]
        after = "not in pretraining" if g.protocol == CONTROL else f"after {g.words} at {g.at}"
        g.label = f"reFT: {after}" if g.kind == "reFT" else f"deletion: {g.words} at {g.at}"
        g.label += f" ({len(g.runs)}\xa0seeds)" if len(g.runs) > 1 else f" (seed\xa0{g.runs[0].args.get('seed')})"
    return groups


def deletion_rates(groups):
    """The rates of their deletions in words, the largest first, four at most."""
    rates = list(dict.fromkeys(g.at for g in groups if g.protocol != CONTROL))
    if len(rates) > 4:
        note(f"{len(rates)} rates of deletion, only the largest four are drawn (plot a folder that holds fewer)")
    return rates[:4]


def story_panels(groups):
    """Panels of curves: (title, groups deleted at a rate) and (title, their reFTs and the controls), for each rate."""
    panels = []
    for at in deletion_rates(groups) or [None]:
        here = [g for g in groups if g.at == at or g.protocol == CONTROL]
        deleted, back = ([g for g in here if g.kind == kind] for kind in ("fine-tuning", "reFT"))
        rates = {story_rate(g.settings.get("scale"), g.settings.get("lr")) for g in back}
        title = "reFT" + (f" at {min(rates)}" if len(rates) == 1 else "") + (f", after deletion at {at}" if at else "")
        panels.append([(f"deletion at {at}", deleted), (title, back)])
    kept = [i for i in (0, 1) if any(row[i][1] for row in panels)]
    return [[row[i] for i in kept] for row in panels]


def named(groups):
    """The feature that all of them are about."""
    features = {g.feature for g in groups}
    return features.pop() or "the feature" if len(features) == 1 else "the feature"


HALF = {"50 %": Line2D([], [], color="#bbbbbb", lw=.8)}
ONE = " (band: 95 % Wilson interval)"


def fig11_stories(runs):
    """
    Generation score (%) against the step of deletion (left) and of reFT (right; logarithmic, step 0: the checkpoint it
    starts from): the share that has the feature, by the corpus's rule, of the stories that parse, written to
    instructions that ask for it; thin dotted: to instructions that do not, a floor. High, falls, comes back within few
    steps while the control does not: the capability was wrapped, not deleted. eta_M and eta_S: the larger and the
    smaller of the paper's two rates; reFT trains on stories with the feature. Bands: 95 % Wilson interval for one seed,
    smallest to largest of several.
    Fooled by: stories that are broken rather than without the feature (they are left out: see how many parse); a
    deletion at which the score never fell.
    """
    groups = story_groups(runs, "history", split="asked")
    if not groups:
        return None
    panels = story_panels(groups)
    columns = len(panels[0])
    fig, axes = sheet(len(panels), columns, 4.6 if columns > 1 else 6.5, 2.9)
    for ax, (title, some) in zip(axes.flat, (p for row in panels for p in row)):
        ax.set_visible(bool(some))
        percent_axis(ax, title, f"stories with {named(groups)} (%)")
        ax.axhline(50, color="#bbbbbb", lw=.8, zorder=0)
        xs = []
        for g in some:
            xs += banded(ax, bands(g, "history", "step", split="asked"), *g.look)
            line(ax, curves(g, "history", "step", split="unasked"), g.look[0], "", ":", "", single=False, lw=.9)
        log_axis(ax, xs, "step (updates)")
    thin = Line2D([], [], color="k", ls=":", lw=.9)
    extra = {f"thin, in each colour: {named(groups)} is not asked for": thin, **HALF}
    parsed = [100 * r.get("parsed", 1) for g in groups for r in flat(g, "history", split="asked")]
    what = f"stories (of which {min(parsed):.0f} to {max(parsed):.0f} % parse)"
    return finish(fig, groups, "history", columns, extra=extra, **{**STORIES, "what": what, "one": ONE})


def fig31_stories_loss(runs):
    """
    Loss (nats a token of the story, its instruction given; logarithmic) against the step of deletion and of reFT, on
    held-out stories with the feature, on those without, and on the data of the deletion itself. Falls on the deletion's
    data while it rises little with the feature: the model has learned when not to show it. Back within few steps of
    reFT, far below the control: it was kept.
    Fooled by: stories with the feature differ in more than the feature, so that their loss falls for the control too.
    """
    groups = story_groups(runs, "history", "loss", split="with")
    if not groups:
        return None
    splits = {"with": f"stories with {named(groups)}", "without": f"stories without {named(groups)}",
              "deletion": "data of the deletion"}
    columns = [p for row in story_panels(groups) for p in row if p[1]]
    fig, axes = sheet(len(splits), len(columns), max(3.1, 9 / len(columns)), 2.3, sharey="row")
    for y, (split, words) in enumerate(splits.items()):
        for ax, (title, some) in zip(axes[y], columns):
            label = f"{words}:\nloss (nats a token)" if ax is axes[y][0] else ""
            plain_axis(ax, None if y else textwrap.fill(title, 36), label)
            xs = [x for g in some for x in banded(ax, bands(g, "history", "step", "loss", 1, split=split), *g.look)]
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
            log_axis(ax, xs, "step (updates)")
    return finish(fig, groups, "history", 2, **STORIES)


def table1_stories(runs):
    """
    Generation score (%) at four steps of reFT, beside the paper's Table 1 at ten to thirty times as many steps of a
    larger model: filled, ours; open, the paper's. A row a protocol and rate of the deletion (eta_M, eta_S: the larger
    and the smaller of the paper's two rates). Small bars: ours when the feature is not asked for, a floor. Whiskers:
    95 % Wilson interval for one seed, smallest to largest of several.
    Fooled by: the paper's 16 stories a cell (wide whiskers), and its mix-match, which in the published code is in
    effect filtering.
    """
    groups = [g for g in story_groups(runs, "history", kinds=("reFT",), split="asked") if any(
        r["step"] in STEPS for r in flat(g, "history", split="asked"))]
    if not groups:
        return None
    near = [up + "paper_stories.csv" for up in ("", "../", "../../")]
    paper = paper_rows(groups[0], *near, os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", near[0]))
    paper = {(r["protocol"], r["lr"], int(r["reft_step"])): float(r["twist"]) for r in paper}
    codes = {"eta_M": "1e-4", "eta_S": "1e-5"}
    theirs = {}  # {(row, step): share}
    for y, g in enumerate(groups):
        cell = (g.protocol.replace(" ", "-"), codes.get(ETAS.get((g.settings.get("scale"), g.rate)), ""))
        theirs.update({(y, t): p for (*c, t), p in paper.items() if tuple(c) == cell and g.feature == "Twist"})
    there = {r["step"] for g in groups for r in flat(g, "history", split="asked")}
    steps = {ours: step for ours, step in STEPS.items() if ours in there}
    fig, axes = sheet(1, len(steps), max(2.6, 7.5 / len(steps)), .45 * len(groups) + .8, sharey=True)
    for ax, (ours, step) in zip(axes.flat, steps.items()):
        percent_axis(ax, f"step {ours} of reFT" + f"\n(the paper: {step})" * bool(theirs),
                     f"stories with {named(groups)} (%)", axis="x")
        ax.axvline(50, color="#bbbbbb", lw=.8, zorder=0)
        for y, g in enumerate(groups):
            color, marker, *_ = g.look
            got, floor = (spread(g, "history", step=ours, split=split) for split in ("asked", "unasked"))
            if got:
                point(ax, y - .17 * bool(theirs), got, color, marker, "", "x")
            if floor:
                ax.plot(floor[0], y - .17 * bool(theirs), "|", color=color, ms=9, mew=1.5)
            if (y, step) in theirs:
                found = [100 * x for x in (theirs[y, step], *wilson(theirs[y, step], 16))]
                point(ax, y + .17, (*found, None), color, marker, "", "x", mfc="w", lw=.6)
        names = [f"{g.words}\n" + ("(control)" if g.protocol == CONTROL else g.at) for g in groups]
        ax.set_yticks(range(len(groups)), [tex(name) for name in names])
        ax.set_ylim(len(groups) - .5, -.5)
    mark = lambda **look: Line2D([], [], color="k", **{"marker": "o", **look})  # noqa: E731
    extra = {"ours": mark(), f"ours, {named(groups)} not asked for": mark(marker="|", ls="", ms=9, mew=1.5), **HALF}
    if theirs:
        extra["the paper (16 stories, 95 % Wilson interval)"] = mark(mfc="w", lw=.6)
    return finish(fig, groups, "history", len(steps), extra=extra, **SCORES)


def stories_features(runs):
    """
    Generation score (%) of all six features before and after: the share of stories with the feature, written to
    instructions that ask for it (filled) and to others that do not (open). A deletion should move the deleted feature
    (bold) alone. Whiskers: 95 % Wilson interval for one seed, smallest to largest of several.
    Fooled by: mistakes of the judge, for real text (the table gives how often it is right; rules always are); features
    that are written unasked.
    """
    groups = story_groups(runs, "behavior", split="asked")
    if len(groups) > 16:
        note(f"behavior: {len(groups)} groups, only 16 are drawn, deletions first (plot a folder that holds fewer)")
    groups = groups[:16]
    if not groups:
        return None
    looks = {"base": (BLUE, "s", "pretrained"), "ckpt": (RED, "o", "after deletion, or reFT"),
             "control": ("k", "v", "pretrained without the bold one")}
    fig, panels = facets(groups, 1, 2.6)
    for g, (ax,) in zip(groups, panels):
        percent_axis(ax, label="stories with it (%)")
        features = sorted(dict.fromkeys(r["operand"] for r in flat(g, "behavior")), key=lambda f: f != g.feature)
        for x, feature in enumerate(features):
            ax.axvspan(x - .5, x + .5, color="#f5f5f5" if x % 2 else "w", lw=0, zorder=0)
            for side, (model, (color, marker, words)) in zip((-.27, 0, .27), looks.items()):
                for split, shift, more in (("asked", -.04, {}), ("unasked", .04, {"mfc": "w"})):
                    got = spread(g, "behavior", model=model, operand=feature, split=split)
                    if got:
                        label = f"{words}: {'not ' * bool(more)}asked"
                        point(ax, x + side + shift, got, color, marker, label, ms=3.5, **more)
        ax.set_xticks(range(len(features)), features, fontsize=7, rotation=25, ha="right", rotation_mode="anchor")
        ax.get_xticklabels()[0].set_fontweight("bold")
    return finish(fig, groups, "behavior", 3, **SCORES)


def fig32_stories_probe(runs):
    """
    Probes: area under the ROC curve (AUC) against the block, of a linear probe a feature on the mean residual of a
    story's last 10 tokens, read without its instruction. 0.5 is chance. Pretrained: upper bound; a model that never had
    the deleted feature: lower bound. A deletion that stays at the upper bound left what the model knows in place.
    Fooled by: words that tell the feature, which an untrained model reads too, and no model where no sentence leans to
    a label and only comparing reveal and expectation helps; labels that are shuffled must fall to chance.
    """
    groups = story_groups(runs, "probe", "auc", ("fine-tuning",), labels="true")
    if not groups:
        return None
    bounds = {"base": (SKY, "D", "-", "pretrained (upper bound)"), "untrained": (GREY, "x", ":", "untrained"),
              "control": (*PROTOCOLS[CONTROL][:3], "not in pretraining: control (lower bound)")}

    def auc_of(group, **want):
        return bands(group, "probe", "block", "auc", 1, **{"labels": "true", "split": "natural", **want})
    rates = deletion_rates(groups)
    features = list(dict.fromkeys(r["target"] for g in groups for r in flat(g, "probe")))
    rows = -(-len(features) // 3)
    fig, axes = sheet(rows * len(rates), 3, 3.3, 2.3, sharey=True)
    for at, axs in zip(rates, np.split(axes, len(rates))):
        some = [g for g in groups if g.at == at]
        pooled = SimpleNamespace(runs=[run for g in some for run in g.runs])  # they share base and bounds
        for ax in axs.flat[len(features):]:
            ax.set_visible(False)
        for i, (ax, feature) in enumerate(zip(axs.flat, features)):
            deleted = any(g.feature == feature for g in some)
            plain_axis(ax, feature + " (deleted)" * deleted, f"deletion at {at}\nAUC" if i % 3 == 0 else "")
            ax.title.set_fontweight("bold" if deleted else "normal")
            ax.axhline(.5, color=GREY, ls="--", lw=1, zorder=1)
            for model, look in bounds.items():
                banded(ax, auc_of(pooled, model=model, target=feature), *look)
            for g in some:
                banded(ax, auc_of(g, model="ckpt", target=feature), *g.look)
            banded(ax, auc_of(pooled, model="ckpt", target=feature, labels="shuffled"),
                   "#aaaaaa", "*", "-", "after deletion, shuffled labels (all protocols)")
            banded(ax, auc_of(pooled, model="base", target=feature, split="even"),
                   SKY, "o", ":", "pretrained, stories where no sentence tells a twist")
            blocks = sorted({r["block"] for r in flat(pooled, "probe", target=feature)})
            ax.set_xticks(blocks, ["E" if b == 0 else str(b) for b in blocks])
            ax.set_xlabel("after block (E: embedding)", fontsize=8)
    chance = Line2D([], [], color=GREY, ls="--", lw=1)
    return finish(fig, groups, "probe", 2, extra={"chance": chance}, **STORIES)


FIGURES = {"fig5_behavior": fig5_behavior, "rules": rules, "fig6_curves": fig6_curves, "fig7_prune": fig7_prune,
           "fig8_probe": fig8_probe, "fig9_revive": fig9_revive, "fig10_attention": fig10_attention, "table3": table3,
           "fig39_maps": fig39_maps, "fig40_maps": fig40_maps, "fig46_hidden": fig46_hidden, "fig47_hidden": fig47_hidden,
           "fig55_classes": fig55_classes,
           "dimensions": dimensions}
STORY_FIGURES = {"fig11_stories": fig11_stories, "fig31_stories_loss": fig31_stories_loss,
                 "table1_stories": table1_stories, "stories_features": stories_features,
                 "fig32_stories_probe": fig32_stories_probe}

# ---------------------------------------------------------------- the report

STYLE = """body{font:16px/1.5 Georgia,serif;color:#222;max-width:66rem;margin:2rem auto;padding:0 1.2rem}
h1,h2,th,figcaption b{font-family:Helvetica,Arial,sans-serif}h1{font-size:1.7rem}h2{font-size:1.15rem;margin-top:2.2rem}
p,figcaption{max-width:46rem}
table{border-collapse:collapse;font-size:.82rem;margin:.6rem 0 1.2rem;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd;vertical-align:top}th{border-bottom:2px solid #888}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}figure{margin:1.2rem 0 2.4rem}img{max-width:100%;border:1px solid #eee}
figcaption{font-size:.88rem;color:#333}
.verdict{border-left:4px solid #0072B2;padding:.1rem 1rem;margin:.8rem 0;background:#f4f7fa}
@media print{body{margin:0;max-width:none;font-size:11px}figure,tr,.verdict{break-inside:avoid}table{display:table}}"""


def rich(text):
    """Escaped text, the symbols with their subscripts."""
    text = re.sub(r"\beta_([MS])\b", r"η<sub>\1</sub>", html.escape(str(text)))
    return re.sub(r"\b([OC])_(PT|FT|Tr)\b", r"\1<sub>\2</sub>", text)


def table(title, head, rows):
    row = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{rich(c)}</{tag}>" for c in cells) + "</tr>"  # noqa: E731
    above = [None] + [r[0] for r in rows]
    body = "".join(row("td", ["" if r[0] == a else r[0], *r[1:]]) for r, a in zip(rows, above))  # a group's name once
    return f"<h2>{rich(title)}</h2><table><thead>{row('th', head)}</thead><tbody>{body}</tbody></table>" if rows else ""


def percents(values):
    """Mean (smallest to largest), of values in percent."""
    if values is None or not len(values):
        return "-"
    several = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{several}"


def behavior_table(runs):
    rows = []
    each = lambda *args, **want: percents((spread(*args, **want) or [None])[-1])  # noqa: E731
    for g in having(runs, "answers"):
        for role, operand in zip(("O_PT", "O_FT"), g.pair):
            rows.append([g.label, f"{role} = {operand}"])
            for split in SPLITS:
                rows[-1] += [each(g, "answers", model=model, role=role, split=split) for model in BARS]
                floors = [each(g, "answers", key, role=role, split=split).split(" ")[0] for key in ("floor", "cross_floor")]
                rows[-1].append(" / ".join(floors))
    head = ["", "asked"] + [h for s in SPLITS for h in (f"{s}: base", "after", "floor / cross floor")]
    return table("Accuracy before and after (%)", head, rows)


def instrument_table(runs):
    """Pruning at its chosen K, the best block of the probes, steps of revival: each beside its controls."""
    rows, splits = [], ("c0", "natural")
    for g in having(runs, "prune"):
        for ranking, edit in dict.fromkeys((r["ranking"], r["edit"]) for r in flat(g, "prune")):
            got = flat(g, "prune", ranking=ranking, edit=edit, chosen=True, role=("O_PT", "other"))
            ks = sorted({r["k"] for r in got})
            if got:
                at = f"K = {ks[0]}" + (f" to {ks[-1]}" if ks[1:] else "")
                rows.append([g.label, f"prune: {ranking}, {edit}, {at}", got[0]["operand"],
                             *(percents([100 * r["accuracy"] for r in got if r["split"] == s]) for s in splits)])
    for g in having(runs, "probe"):
        for model, labels in [(model, "true") for model in MODELS] + [("ckpt", "shuffled")]:
            want = dict(model=model, labels=labels, target=g.pair[0], prompt=g.pair[1])
            blocks = sorted({r["block"] for r in flat(g, "probe", **want)})
            best = max(blocks, key=lambda b: spread(g, "probe", block=b, split="natural", **want)[0], default=None)
            got = [spread(g, "probe", block=best, split=s, **want) for s in splits]
            rows += [[g.label, f"probe: {SPELLED[model]}, {labels} labels, block {best}, {g.pair[1]} asked", g.pair[0],
                      *(percents(x and x[3]) for x in got)]] if blocks else []
    for g in having(runs, "revive"):
        for arm, operand in dict.fromkeys((r["label"], r["operand"]) for r in flat(g, "revive")):
            got = [[steps_to(g, label=arm, split=s, threshold=t) for t in (.9, .99)] for s in splits]
            words = [["-" if x is None else f">= {x[1]}" if x[0] is None else str(x[0]) for x in pair] for pair in got]
            words = [" / ".join(w) + " steps" for w in words]
            rows.append([g.label, f"revive: {arm}, median steps to 90 / 99 %", operand, *words])
    head = ["", "instrument", "operand", *(f"{s} (% or steps)" for s in splits)]
    return table("Is it still there, and how fast does it come back?", head, rows)


def run_table(runs):
    rows = []
    for run in runs:
        git, here = run.record.get("git") or {}, ([run.record] + (run.record.get("resumes") or []))[-1]
        versions = ", ".join(f"{k} {v}" for k, v in (run.record.get("versions") or {}).items())
        commit = str(git.get("commit") or "-")[:10] + " + changes" * bool(git.get("dirty"))
        rows.append([run.name, run.record.get("command", "-"), commit, versions, here.get("device", "-"),
                     f"{here['seconds']} s"])
    return table("What made these files", ["run", "command", "commit", "versions", "device", "time"], rows)


def ranged(found):
    """The mean of spread() and its interval."""
    return "-" if found is None else "{:.1f} ({:.1f} to {:.1f})".format(*found[:3])


def features_table(runs):
    """Generation scores of all features, before and after, beside the control where it was asked too."""
    rows, models = [], {"base": "pretrained", "ckpt": "after", "control": "not in pretraining"}
    for g in story_groups(runs, "behavior", split="asked"):
        for feature in dict.fromkeys(r["operand"] for r in flat(g, "behavior", split="asked")):
            want = {"operand": feature, "split": ("asked", "unasked")}
            scores = [ranged(spread(g, "behavior", model=model, operand=feature, split=split))
                      for model in models for split in ("asked", "unasked")]
            parsed, judge = (spread(g, "behavior", key, model="ckpt", **want) for key in ("parsed", "judge"))
            rows.append([g.label, feature, *scores, "-" if parsed is None else f"{parsed[0]:.1f}",
                         "-" if judge is None else f"{judge[0]:.1f}"])
    head = ["", "feature"] + [f"{m}: {a}" for m in models.values() for a in ("asked", "not asked")]
    return table("Generation scores (%)", head + ["parse, after", "judge is right"], rows)


def story_probe_table(runs):
    """Each feature's best block by AUC, with its balanced accuracy."""
    models = {"base": "pretrained", "ckpt": "after", "control": "not in pretraining", "untrained": "untrained"}
    rows = []
    for g in story_groups(runs, "probe", "auc", labels="true"):
        for feature in dict.fromkeys(r["target"] for r in flat(g, "probe")):
            cells = []
            for model, labels, split in ([(model, "true", "natural") for model in models]
                                         + [("ckpt", "shuffled", "natural"), ("base", "true", "even")]):
                want = {"model": model, "target": feature, "labels": labels, "split": split}
                found = bands(g, "probe", "block", "auc", 1, **want)
                best = max(found, key=lambda b: found[b][0], default=None)
                balanced = spread(g, "probe", "balanced", block=best, **want)
                cells.append(f"{found[best][0]:.3f} (B{best}), {balanced[0]:.1f}" if balanced else "-")
            floor = spread(g, "probe", "floor", target=feature, split="natural")
            rows.append([g.label, feature, *cells, ranged(floor).split(" ")[0]])
    head = ["", "feature", *models.values(), "after, shuffled labels",
            "pretrained, no sentence tells", "majority"]
    return table("Probes: AUC of the best block (B0: embedding), balanced accuracy (%) there", head, rows)


ANSWERS = ("O_PT is the operand of pretraining, O_FT that of fine-tuning. On a share C_Tr of the fine-tuning strings "
           "r(x, O_FT) = r(x, O_PT) + q holds: a wrapper answers O_FT by that shortcut and leaves the old capability "
           "in place. Majority floor (dashed): always giving the most frequent answer of that very set. Cross floor "
           "(dotted): the best guess from the other operand's answer, 100 % on c1 by construction. "
           "Values are means over seeds, in brackets the smallest to the largest (of random units: over draws).")
TOLD = ("Stories are written to an instruction that may ask for features such as a twist. Fine-tuning deletes one of "
        "them by a protocol: filter trains on stories without it; randomise asks for it in their instructions "
        "nevertheless; mix-match asks for it instead of Foreshadowing; refuse answers with a refusal. reFT then "
        "trains on stories with the feature: it comes back within few steps where it was only wrapped, slowly in the "
        "control, which was pretrained without it. Generation score: the share of stories with the feature, of those "
        "that parse. AUC: how often a probe ranks a story with the feature above one without, .5 by chance. eta_M and "
        "eta_S: the larger and the smaller of the paper's two rates, or what stands for them at the small scale. "
        "Values are means over seeds, in brackets the smallest to the largest; of one seed the 95 % Wilson interval.")


def by_setup(runs):
    """(those of the grammar and compiled models, those of stories)"""
    return [[run for run in runs if (run.settings["setup"] == "stories") == told] for told in (False, True)]


def report(runs, pictures):
    """One page with everything in it: no scripts, nothing fetched."""
    verdicts = "".join(f"<div class=verdict><p><b>{rich(run.name)}: {rich(run.verdict.get('verdict'))}</b><br>"
                       f"{rich(str(run.verdict.get('text', '')).split(': ', 1)[-1])}</p></div>"
                       for run in runs if run.verdict)
    intro, tables = "", ""
    for some, text, makes in zip(by_setup(runs), (ANSWERS, TOLD), ((behavior_table, instrument_table),
                                                                   (features_table, story_probe_table))):
        if some:
            intro += f"<p>{rich(text)}</p>"
            tables += "".join(attempt(make.__name__, make, some) or "" for make in makes)
    figures = "".join(f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                      f"<figcaption><b>{name}.</b> {rich(caption)}</figcaption></figure>"
                      for name, (png, caption) in pictures.items())
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><title>unwrap</title><style>{STYLE}</style></head>"
            f"<body><h1>Does fine-tuning delete a capability, or wrap it?</h1>{intro}"
            + (f"<h2>Verdicts</h2>{verdicts}" if verdicts else "") + tables
            + (f"<h2>Figures</h2>{figures}" if figures else "") + (attempt("run_table", run_table, runs) or "")
            + "</body></html>\n")


# ---------------------------------------------------------------- command line


def mistake(text):
    print(f"plot.py: {text}", file=sys.stderr)
    sys.exit(2)


def write(path, content):
    with open(path + ".part", "wb") as f:
        f.write(content)
    os.replace(path + ".part", path)
    note(f"wrote {path}")


def draw(name, figure, runs):
    """(picture, caption) of a figure, or None."""
    drawn = figure(runs)
    if drawn is None:
        return note(f"{name}: skipped, no rows for it")
    buffer = io.BytesIO()
    drawn[0].savefig(buffer, dpi=120)
    return buffer.getvalue(), f"{' '.join(figure.__doc__.split())} {drawn[1]}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="out/", help="folder with the files of one or many runs, subfolders "
                        "included; figures/ and report.html are written into it (default: out/)")
    folder = parser.parse_args().folder
    if not os.path.isdir(folder):
        mistake(f"{folder}: no such folder")
    try:
        runs, pictures = find_runs(folder), {}
        if not runs:
            mistake(f"nothing to plot in {folder}: no record (X.json) of a finished run")
        os.makedirs(os.path.join(folder, "figures"), exist_ok=True)
        for figures, some in zip((FIGURES, STORY_FIGURES), by_setup(runs)):
            for name, figure in figures.items() if some else ():
                got = attempt(name, draw, name, figure, some)
                plt.close("all")
                if got:
                    pictures[name] = got
                    write(os.path.join(folder, "figures", name + ".png"), got[0])
        write(os.path.join(folder, "report.html"), report(runs, pictures).encode())
    except OSError as error:
        mistake(f"{error.filename or folder}: {error.strerror}")


if __name__ == "__main__":
    main()
