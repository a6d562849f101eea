"""
Draw what the other scripts wrote: figures after the paper's Figs. 5-10, and one page that holds them all.

    $ python plot.py             # out/figures/*.png and out/report.html, from every finished run under out/
    $ python plot.py results/    # the same for a grid: runs that differ in nothing but the seed are one group

Reads the files of the runs only (X.json, X.jsonl, X.behavior.jsonl, ..., X.attention.npz), so figures can be drawn
anew on any machine, without the checkpoints. A run of the small scale takes about 8 seconds. Add a figure: write a
function of the groups below that returns (figure, caption), or None where there is nothing to draw; add a line to FIGURES.

Contents: runs and groups | numbers | drawing | the figures | the report | command line.
Fractions in the files, percent in the figures. O_PT: operand of pretraining, O_FT: operand of fine-tuning.
"""
import argparse
import base64
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
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: E402

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#777777"
SPLITS = {"c0": (BLUE, "o"), "c1": (ORANGE, "s"), "natural": (GREEN, "^")}  # Okabe and Ito's colours; markers for print
MODELS = {"base": (BLUE, "s"), "ckpt": (RED, "o"), "untrained": (GREY, "^")}
SPELLED = {"base": "base", "ckpt": "fine-tuned", "untrained": "untrained"}
SETUPS = ("pcfg", "tracr-count", "tracr-max")  # stories have other tests
FILES = ("behavior", "prune", "prune-weight", "probe", "attention", "revive", "revive.curve")
PRIORS = {(.999, .001, 0): "low", (.9, .1, 0): "medium", (.5, .3, .2): "high"}
MOST = 12  # groups in a figure

# ---------------------------------------------------------------- runs and groups


def note(text):
    print(text, flush=True)


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        note(f"{path}: left out, not readable ({type(error).__name__})")


def read_rows(path):
    """The rows of a .jsonl file, less the lines that are not JSON objects; [] without the file."""
    rows, bad = [], 0
    if not os.path.exists(path):
        return rows
    try:
        with open(path, errors="replace") as f:
            for line in filter(str.strip, f):
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                bad += not isinstance(row, dict)
                rows += [row] if isinstance(row, dict) else []
    except OSError as error:
        note(f"{path}: left out ({error.strerror})")
    if bad or not rows:
        note(f"{path}: " + (f"{bad} broken line{'s' * (bad > 1)} left out" if bad else "empty"))
    return rows


def finished(record):
    return "seconds" in ([record] + list(record.get("resumes") or []))[-1]


def find_runs(folder):
    """The finished runs under a folder; one line for each that is left out."""
    records = {}
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".json") and not name.endswith(".verdict.json"):
                record = read_json(os.path.join(where, name))
                if isinstance(record, dict) and isinstance(record.get("args"), dict) and record.get("stage"):
                    records[os.path.join(where, name[:-5])] = record
    runs = [open_run(folder, prefix, records) for prefix in records]
    return [run for run in runs if run]


def open_run(folder, prefix, records):
    """A run and its rows: {file: rows}. `history` is X.jsonl; `answers` the rows of behavior about the pair itself."""
    record, name = records[prefix], os.path.relpath(prefix, folder)
    if not finished(record):
        return note(f"{name}: left out, unfinished")
    rows = {"history": read_rows(prefix + ".jsonl"), **{file: read_rows(f"{prefix}.{file}.jsonl") for file in FILES}}
    rows["answers"] = [r for r in rows["behavior"] if "share_a" in r]
    first = next((r for file in rows.values() for r in file), {})
    args, setup = record["args"], first.get("setup", "pcfg")
    if setup not in SETUPS:
        return note(f"{name}: left out, no figures for setup {setup}")
    verdict = read_json(prefix + ".verdict.json") if os.path.exists(prefix + ".verdict.json") else None
    asked = list(dict.fromkeys(str(r.get("operand")) for r in rows["answers"])) + ["a", "b"]
    settings = {"setup": setup, "scale": first.get("scale"), **settings_of(prefix, records)}
    return SimpleNamespace(name=name, prefix=prefix, record=record, args=args, rows=rows, settings=settings,
                           pair=[str(x) for x in args.get("pair") or asked[:2]], verdict=verdict if isinstance(verdict, dict) else None,
                           kind="reFT" if args.get("reverse") else {"finetune": "fine-tuning"}.get(record["stage"], record["stage"]))


def settings_of(prefix, records):
    """What makes a group: a run's own arguments and those of its ancestors, less the seed and what only observes."""
    settings, stage, seen = {}, "", set()
    while prefix in records and prefix not in seen:
        seen.add(prefix)
        record = records[prefix]
        hidden = {"seed", "out", "ckpt", "eval_every", "eval_size", "save_every", "compile", "setup", "scale"}
        hidden |= {"prior", "task", "pair", "operand", "q", "reverse"} if stage else set()  # inherited, so they say it once
        settings.update({stage + k: v for k, v in record["args"].items() if k not in hidden})
        parent = os.path.splitext(os.path.basename(str((record.get("parent") or {}).get("path"))))[0]
        near = [p for p in records if os.path.basename(p) == parent]
        prefix = min(near, key=lambda p: os.path.dirname(p) != os.path.dirname(prefix), default=None)
        stage = f"{records[prefix]['stage']} " if prefix else ""
    return settings


def describe(key, value):
    """A setting in words."""
    if key == "prior":
        return "prior " + (PRIORS.get(tuple(value)) or "/".join(f"{x:g}" for x in value))
    if key == "pair":
        return f"O_PT {value[0]}, O_FT {value[1]}"
    if isinstance(value, bool):
        return key if value else f"no {key}"
    words = re.sub(r"e([+-])0*", r"e\1", f"{value:g}") if isinstance(value, float) else str(value)
    return f"{'C_Tr' if key == 'c_tr' else key.replace('_', ' ')} {words}"


def group_runs(runs):
    """Runs equal in all but the seed are one group, labelled by what differs among groups of the same kind."""
    groups = {}
    for run in runs:
        groups.setdefault(run.kind + json.dumps(run.settings, sort_keys=True), []).append(run)
    groups = [SimpleNamespace(runs=runs, kind=runs[0].kind, pair=runs[0].pair, settings=runs[0].settings) for runs in groups.values()]
    for g in groups:
        same = [o.settings for o in groups if o.kind == g.kind]
        keys = [k for k in dict.fromkeys(k for s in same for k in s) if any(s.get(k) != g.settings.get(k) for s in same)]
        keys = [k for k in keys if not (k == "operand" and "pair" in keys)]
        words = [describe(k, g.settings[k]) for k in keys or ("task", "prior", "c_tr", "lr") if g.settings.get(k) is not None]
        g.label = ", ".join(([g.kind] if len({o.kind for o in groups}) > 1 else []) + words)
        g.seeds = f"{len(g.runs)} seeds" if len(g.runs) > 1 else f"seed {g.runs[0].args.get('seed')}"
    return sorted(groups, key=lambda g: (g.kind == "reFT", g.kind, [str(g.settings.get(k)) for k in ("prior", "c_tr", "lr")]))


def having(groups, file, kinds=None):
    """The groups with rows in a file, each with those of its runs that have some; at most MOST of them."""
    some = [SimpleNamespace(**{**vars(g), "runs": [r for r in g.runs if r.rows[file]]}) for g in groups]
    some = [g for g in some if g.runs and (kinds is None or g.kind in kinds)]
    if len(some) > MOST:
        note(f"{file}: {len(some)} groups, only the first {MOST} are drawn (plot a folder of fewer)")
    return some[:MOST]


# ---------------------------------------------------------------- numbers


def select(run, file, **want):
    """The rows of a run that have these values (a tuple: one of them)."""
    return [r for r in run.rows[file] if all(r.get(k) in v if isinstance(v, tuple) else r.get(k) == v for k, v in want.items())]


def mean_of(rows, key):
    values = [r[key] for r in rows if isinstance(r.get(key), (int, float))]
    return float(np.mean(values)) if values else None


def wilson(p, n, z=1.96):
    """95 % interval of a share p of n."""
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** .5
    return min(middle - half, p), max(middle + half, p)


def spread(group, file, key="accuracy", **want):
    """
    (mean, low, high, values) of the runs of a group, or None. One run: the Wilson interval of its n strings, which knows
    nothing of seeds; several: from the smallest to the largest.
    """
    rows = [select(run, file, **want) for run in group.runs]
    each = [m for m in (mean_of(r, key) for r in rows) if m is not None]
    if not each:
        return None
    n = next((x["n"] for r in rows for x in r if x.get("n")), None)
    low, high = wilson(each[0], n) if len(each) == 1 and n else (min(each), max(each))
    return float(np.mean(each)), low, high, each


def curves(group, file, x, key="accuracy", **want):
    """Mean curve over the runs of a group, where all of them have a value, and each run's own: ({x: y}, [{x: y}])."""
    each = []
    for run in group.runs:
        points = {}
        for r in select(run, file, **want):
            if isinstance(r.get(x), (int, float)) and isinstance(r.get(key), (int, float)):
                points.setdefault(r[x], []).append(r[key])
        each += [{k: float(np.mean(points[k])) for k in sorted(points)}] if points else []
    shared = [k for k in each[0] if all(k in e for e in each)] if each else []
    return {k: float(np.mean([e[k] for e in each])) for k in shared}, each


def sizes(groups, file, **want):
    """How much a figure rests on: strings a point and runs a group."""
    n = sorted({r["n"] for g in groups for run in g.runs for r in select(run, file, **want) if r.get("n")})
    strings = f"n = {n[0]}" + (f" to {n[-1]}" if len(n) > 1 else "") + " strings a point" if n else "n unknown"
    runs = sorted({len(g.runs) for g in groups})
    several = "thin lines and dots: single seeds; intervals: smallest to largest"
    return f"{strings}, " + ("one seed" if runs == [1] else f"{runs[0]}" + (f" to {runs[-1]}" if len(runs) > 1 else "")
                             + f" seeds a group ({several})")


# ---------------------------------------------------------------- drawing


def tex(text):
    """Symbols with their subscripts; other dollar signs are text."""
    return re.sub(r"\b([OC])_(PT|FT|Tr)\b", r"$\1_{\\mathrm{\2}}$", str(text).replace("$", r"\$"))


def sheet(rows, columns, width, height, **more):
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 1), squeeze=False, layout="constrained", **more)
    return fig, axes


def facets(groups, parts, width=3.3, height=2.5):
    """Groups as columns, four at most in a row, and `parts` panels under each other for each: (figure, panels of each)."""
    columns = min(4, len(groups))
    fig, axes = sheet(-(-len(groups) // columns) * parts, columns, max(width, 6.5 / columns), height)
    panels = [[axes[i // columns * parts + p, i % columns] for p in range(parts)] for i in range(len(groups))]
    used = {id(ax) for group in panels for ax in group}
    for ax in axes.flat:
        ax.set_visible(id(ax) in used)
    for g, axs in zip(groups, panels):
        axs[0].set_title(tex(textwrap.fill(f"{g.label} ({g.seeds})", 42)), fontsize=9)
    return fig, panels


def percent_axis(ax, label="accuracy (%)"):
    ax.set_ylim(-3, 107)
    ax.set_yticks(range(0, 101, 25))
    ax.set_ylabel(tex(label), fontsize=8)
    ax.grid(axis="y", color="#e6e6e6", lw=.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def log_axis(ax, values, label, ticks=None):
    """Logarithmic with a zero: step 0 is the untouched model and must be seen."""
    least, most = min((v for v in values if v > 0), default=1), max(values, default=1)
    ax.set_xscale("symlog", linthresh=least, linscale=.4)
    ticks = ticks or [0] + [m * 10 ** e for e in range(7) for m in ((1, 3) if most < 3e3 else (1,))]
    ax.set_xticks([t for t in ticks if t == 0 or least <= t <= most])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e4 else f"{x / 1e3:g}k"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(-.15 * least, most * 1.2)
    ax.set_xlabel(label, fontsize=8)


def line(ax, mean, each, color, marker, label, ls="-", **more):
    """A mean curve, and the seeds behind it as thin lines. Returns the x values."""
    for e in each if len(each) > 1 else ():
        ax.plot(list(e), [100 * y for y in e.values()], color=color, ls=ls, lw=.6, alpha=.5)
    if mean:
        ax.plot(list(mean), [100 * y for y in mean.values()], color=color, marker=marker, ls=ls, ms=4, lw=1.5,
                label=tex(label), **more)
    return [x for e in each for x in e]


def floor_line(ax, group, file, key="floor", color=GREY, **want):
    """Majority floor dashed, cross floor dotted; the latter is 1 on c1, by construction, and left out there."""
    got = spread(group, file, key, **want)
    if got and not (key == "cross_floor" and got[0] > .999):
        ax.axhline(100 * got[0], color=color, ls="--" if key == "floor" else ":", lw=1, zorder=1)


def legend(fig, title, columns=4, floors=True, extra=()):
    """One legend below the figure, each entry once, with what the numbers rest on as its title."""
    entries = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if floors:
        entries["majority floor"] = Line2D([], [], color=GREY, ls="--", lw=1)
        entries["cross floor"] = Line2D([], [], color=GREY, ls=":", lw=1.2)
    entries.update(extra)
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncol=columns, fontsize=8, frameon=False,
               title=tex(title), title_fontsize=8, handlelength=3)


def roles(groups):
    """(O_PT, O_FT) with their letters where all groups share them."""
    shared = len({tuple(g.pair) for g in groups}) == 1
    return [f"{role} = {letter}" if shared else role for role, letter in zip(("O_PT", "O_FT"), groups[0].pair)]


# ---------------------------------------------------------------- the figures

FLOORS = ("Dashed: majority floor, always giving the most frequent answer of that set. Dotted: cross floor, the best guess of the "
          "answer from the other operand's answer (100 % on c1, by construction). ")
SETS = "c0: strings on which the spurious relation never holds; c1: it always holds; natural: as the grammar makes them. "


def fig5_behavior(groups):
    """
    Accuracy on both operands and all three sets, base beside fine-tuned, with both floors.
    Fooled by: c1 alone, where the shortcut r(O_PT) + q is the right answer for O_FT; low bars without their floors.
    """
    groups = having(groups, "answers")
    if not groups:
        return None
    fig, panels = facets(groups, 1, 3.6, 2.9)
    for g, (ax,) in zip(groups, panels):
        percent_axis(ax)
        for i, operand in enumerate(g.pair):
            for j, split in enumerate(SPLITS):
                x = i * 3.6 + j
                for m, (model, color, hatch) in enumerate((("base", "#c9dcea", "////"), ("ckpt", RED, None))):
                    got = spread(g, "answers", model=model, operand=operand, split=split)
                    if got:
                        mean, low, high, each = (100 * np.array(v) for v in got)
                        at = x + .4 * m - .2
                        ax.bar(at, mean, .38, color=color, hatch=hatch, edgecolor="#33566f" if hatch else "k", lw=.5,
                               label={"ckpt": "reFT" if g.kind == "reFT" else "fine-tuned" if g.kind != "pretrain" else "pretrained"}.get(model, "base"))
                        ax.errorbar(at, mean, [[mean - low], [high - mean]], color="k", lw=.9, capsize=2)
                        ax.plot([at] * len(each), each, "k.", ms=4 if len(each) > 1 else 0)
                        ax.text(at, min(high + 2, 101.5), f"{mean:.0f}", ha="center", va="bottom", fontsize=6.5)
                for key, ls in (("floor", "--"), ("cross_floor", ":")):
                    got = spread(g, "answers", key, operand=operand, split=split)
                    if got:
                        ax.hlines(100 * got[0], x - .46, x + .46, color="#444444", ls=ls, lw=1.3, zorder=4)
        ax.set_ylim(0, 112)
        ax.set_xticks([0, 1, 2, 3.6, 4.6, 5.6], [s for _ in range(2) for s in SPLITS], fontsize=8)
        for i, role in enumerate(roles(groups)):
            ax.text(i * 3.6 + 1, -.17, tex(f"asked {role}"), transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=8.5)
    legend(fig, sizes(groups, "answers"))
    return fig, ("Accuracy (%) when asked for O_PT (the operand of pretraining) and for O_FT (the operand of fine-tuning), before and after "
                 f"fine-tuning. {SETS}A wrapper: O_FT high on c1 and low on c0, O_PT low on c0. {FLOORS}Whiskers: 95 % Wilson interval "
                 f"of one seed, smallest to largest of several (dots). {sizes(groups, 'answers')}.")


def rules(groups):
    """
    Which simple rule the answers on c0 follow, asked for either operand.
    Fooled by: adding shares up; rules overlap (a blend can equal the right answer), none means that no rule explains it.
    """
    groups = having(groups, "answers")
    if not groups:
        return None
    names = {"share_a": "r(O_PT)", "share_b": "r(O_FT)", "share_a_plus_q": "r(O_PT) + q", "share_blend": "blend",
             "share_constant": "constant", "share_none": "no rule"}
    fig, panels = facets(groups, 2, 3.6, 2.4)
    for g, axs in zip(groups, panels):
        for ax, operand, role in zip(axs, g.pair, roles(groups)):
            percent_axis(ax, f"asked {role}: answers (%)")
            for i, key in enumerate(names):
                for m, (model, color, hatch) in enumerate((("base", "#c9dcea", "////"), ("ckpt", RED, None))):
                    got = spread(g, "answers", key, model=model, operand=operand, split="c0")
                    if got:
                        mean, low, high, each = (100 * np.array(v) for v in got)
                        ax.bar(i + .4 * m - .2, mean, .38, color=color, hatch=hatch, edgecolor="#33566f" if hatch else "k", lw=.5,
                               label="base" if m == 0 else "the checkpoint")
                        ax.errorbar(i + .4 * m - .2, mean, [[mean - low], [high - mean]], color="k", lw=.9, capsize=2)
                        ax.plot([i + .4 * m - .2] * len(each), each, "k.", ms=4 if len(each) > 1 else 0)
            ax.set_ylim(0, 108)
            ax.set_xticks(range(len(names)), [tex(n) for n in names.values()], fontsize=7.5, rotation=25)
    legend(fig, sizes(groups, "answers"), floors=False)
    return fig, ("Share of the answers on c0 strings that a simple rule explains. r(O): the true result for operand O; r(O_PT) + q: the "
                 "shortcut; blend: (r(O_PT) + r(O_FT) + q) / 2, rounded down; constant: the most frequent answer. High: the rule gives these "
                 f"answers. Shares overlap and do not add up to 100 %; the share 'constant' is the floor of a rule. {sizes(groups, 'answers')}.")


def fig6_curves(groups):
    """
    The history of fine-tuning (and of reFT): accuracy on both operands against the step.
    Fooled by: the first steps, when a warm-up keeps the rate near zero: compare at equal sums of learning rates.
    """
    groups = having(groups, "history", ("fine-tuning", "reFT"))
    if not groups:
        return None
    fig, panels = facets(groups, 2)
    for g, axs in zip(groups, panels):
        for ax, operand, role in zip(axs, g.pair, roles(groups)):
            percent_axis(ax, f"{role}: accuracy (%)")
            xs = []
            for split, (color, marker) in SPLITS.items():
                want = {"operand": operand, "split": split, "task": g.settings.get("task")}
                xs += line(ax, *curves(g, "history", "step", **want), color, marker, split)
                for key in ("floor", "cross_floor"):
                    floor_line(ax, g, "history", key, color, **want)
            log_axis(ax, xs, "fine-tuning step (updates)")
    legend(fig, sizes(groups, "history"), columns=5)
    return fig, (f"Accuracy (%) against the fine-tuning step (logarithmic, step 0 = the untouched base). {SETS}Floors in the colour of "
                 f"their set. {FLOORS}{sizes(groups, 'history')}.")


def fig7_prune(groups):
    """
    Accuracy after editing the K units with the largest score: O_PT on c0 (does it come back?), O_FT on c1 (does it go?).
    Fooled by: K chosen on what is shown (it is not: black rings were chosen on other strings); damage that shifts answers.
    """
    groups = having(groups, "prune") + [SimpleNamespace(**{**vars(g), "label": g.label + ", single weights", "weights": True})
                                        for g in having(groups, "prune-weight")]
    if not groups:
        return None
    styles = {"gradient-weight": (RED, "o", "-", "gradient x weight"), "gradient-weight-iterated": (PURPLE, "D", "-", "the same, iterated"),
              "gradient-change": (BLUE, "s", "-", "gradient x change"), "random": (GREY, "", "-", "random units (band: all draws)"),
              "never-had": (GREEN, "^", "--", "never-had operand, its own units"), "compiled-zero": (SKY, "v", "-", "zero when compiled")}
    fig, axes = sheet(len(groups), 4, 3.1, 2.7)
    for g, axs in zip(groups, axes):
        file, (a, b) = "prune-weight" if hasattr(g, "weights") else "prune", g.pair
        for ax, (edit, operand, split, role) in zip(axs, [(e, o, s, r) for e in ("zero", "graft") for o, s, r in (
                (a, "c0", roles(groups)[0]), (b, "c1", roles(groups)[1]))]):
            percent_axis(ax)
            ax.set_title(tex(f"{'zeroed' if edit == 'zero' else 'grafted'}: {role} on {split}"), fontsize=9)
            xs = []
            for ranking, (color, marker, ls, label) in styles.items():
                of = {r["operand"] for run in g.runs for r in select(run, file, ranking=ranking, edit=edit) if r.get("operand") not in (None, b)}
                want = dict(ranking=ranking, edit=edit, split=split, operand=tuple(of) if operand == a else operand)
                mean, each = curves(g, file, "k", **want)
                xs += line(ax, mean, each if ranking != "random" else [], color, marker, label, ls) + list(mean)
                if ranking == "random" and mean:
                    draws = {k: [r["accuracy"] for run in g.runs for r in select(run, file, **want, k=k)] for k in mean}
                    ax.fill_between(list(mean), *([100 * f(v) for v in draws.values()] for f in (min, max)), color=GREY, alpha=.25, lw=0)
                else:
                    chosen = [r for run in g.runs for r in select(run, file, **want, chosen=True)]
                    ax.plot([r["k"] for r in chosen], [100 * r["accuracy"] for r in chosen], "o", mfc="none", mec="k", ms=8)
            for key in ("floor", "cross_floor"):
                floor_line(ax, g, file, key, ranking="gradient-weight", operand=operand, split=split)
            log_axis(ax, xs, "K, units edited", (0, 1, 3, 10, 30, 100, 300, 800, 3000, 10000))
        if len(groups) > 1:
            axs[0].set_ylabel(tex(f"{textwrap.fill(f'{g.label} ({g.seeds})', 32)}\naccuracy (%)"), fontsize=8)
    rows = [g for g in groups if not hasattr(g, "weights")]
    rests = sizes(rows, "prune") if rows else sizes(groups, "prune-weight")
    legend(fig, rests, columns=4, extra={"K chosen on other strings": Line2D([], [], marker="o", mfc="none", mec="k", ls="")})
    return fig, ("Accuracy (%) of the fine-tuned model with K units edited: zeroed (left), or grafted, set back to the base's values (right). "
                 "O_PT on c0 high at a small K while random units of the same matrices stay low: the answer was there and a few units kept it "
                 "from being read. O_FT on c1 falls when the wrapper is gone. Grafting a few does little when the change is spread over many. "
                 "The never-had control asks for an operand that was never trained, with units ranked for it. "
                 f"{FLOORS}{rests}.")


def fig8_probe(groups):
    """
    Accuracy of linear probes by block: each target, asked for itself and while O_FT is asked.
    Fooled by: targets that follow from others (a + b + c = window): compare untrained model, floors, shuffled labels.
    """
    groups = having(groups, "probe")
    if not groups:
        return None
    splits = ("natural", "c0") if len(groups) <= 4 else ("natural",)
    cells = list(dict.fromkeys((r.get("target"), "itself" if r.get("target") == r.get("prompt") else "O_FT")
                               for g in groups for run in g.runs for r in run.rows["probe"]))
    fig, axes = sheet(len(groups) * len(splits), len(cells), 2.6, 2.3)
    for i, (g, split) in enumerate((g, split) for g in groups for split in splits):
        for ax, (target, prompt) in zip(axes[i], cells):
            operand, role = target if prompt == "itself" else g.pair[1], dict(zip(g.pair, ("O_PT", "O_FT"))).get(target, "third operand")
            percent_axis(ax)
            ax.set_title(tex(f"read {target} ({role})\nwhile {operand} is asked"), fontsize=9) if i == 0 else None
            want = dict(target=target, prompt=operand, split=split)
            for model, (color, marker) in MODELS.items():
                line(ax, *curves(g, "probe", "block", model=model, labels="true", **want), color, marker, SPELLED[model],
                     "-" if model != "untrained" else "-.")
            line(ax, *curves(g, "probe", "block", model="ckpt", labels="shuffled", **want), "#bbbbbb", "x", "fine-tuned, shuffled labels")
            for key in ("floor", "cross_floor"):
                floor_line(ax, g, "probe", key, labels="true", **want)
            blocks = sorted({r["block"] for run in g.runs for r in run.rows["probe"] if isinstance(r.get("block"), int)})
            ax.set_xticks(blocks, ["E" if b == 0 else str(b) for b in blocks])
            ax.set_xlabel("block (E: embedding)", fontsize=8)
        head = f"{textwrap.fill(f'{g.label} ({g.seeds})', 30)}\n" if len(groups) > 1 else ""
        axes[i, 0].set_ylabel(tex(f"{head}{split} strings\naccuracy (%)"), fontsize=8)
    legend(fig, sizes(groups, "probe"), columns=6)
    return fig, ("Accuracy (%) of a linear probe on the residual stream at the position that predicts the answer, after every block. High: the "
                 "answer is linearly there, asked for or not. Low at every block: not linearly there at this position. The untrained model "
                 f"and shuffled labels show what the probe itself can do. {FLOORS}{sizes(groups, 'probe')}.")


def arms_of(groups):
    """{(arm, rate relative to the run's own): (label, colour, marker, line style)} in order of appearance."""
    found = dict.fromkeys(arm_of(run, r) for g in groups for run in g.runs for r in run.rows["revive.curve"] + run.rows["revive"])
    looks = zip([RED, RED, BLUE, GREEN, "#000000", PURPLE, SKY, ORANGE] * 3, "o^sDvPX*" * 3, ["-", "--", "-", "-", "-.", "-", "-", "-"] * 3)
    words = {"reft": "reFT, {}", "pretraining": "pretraining, own rate"}
    label = lambda arm, rate: words.get(arm, re.sub(r"^teach-(\w+?)(-base)?$", lambda m: f"teach {m[1]} {'to base' if m[2] else ''}".strip(),
                                                    arm) + ", {}").format("same rate" if rate == 1 else f"rate x {rate:g}")  # noqa: E731
    return {key: (label(*key), *look) for key, look in zip(found, looks)}


def arm_of(run, row):
    rate, own = row.get("lr"), run.args.get("lr")
    return str(row.get("arm")), round(rate / own, 2) if rate and own and row.get("arm") != "pretraining" else 1


def fig9_revive(groups):
    """
    How fast O_PT comes back by reFT, beside controls that never had it: curves, and steps to 90 % and 99 %.
    Fooled by: unequal rates (pretraining has its own); arms that were stopped early, which are open marks with an arrow.
    """
    groups = having(groups, "revive")
    if not groups:
        return None
    for run in (run for g in groups for run in g.runs):
        for row in run.rows["revive"] + run.rows["revive.curve"]:
            row["key"] = arm_of(run, row)
    arms = arms_of(groups)
    fig, axes = sheet(len(groups), 3, 4, 2.9, gridspec_kw={"width_ratios": (1, 1, 1.15)})
    for g, axs in zip(groups, axes):
        for ax, split in zip(axs, ("natural", "c0")):
            percent_axis(ax)
            ax.set_title(f"asked for the target, {split} strings", fontsize=9)
            xs = []
            for key, (label, color, marker, ls) in arms.items():
                mean, each = curves(g, "revive.curve", "step", key=key, split=split)
                xs += line(ax, mean, each, color, marker, label, ls, markevery=max(1, len(mean) // 8))
            for key in ("floor", "cross_floor"):
                floor_line(ax, g, "revive", key, arm="reft", split=split)
            for threshold in (90, 99):
                ax.axhline(threshold, color="#bbbbbb", lw=.8, zorder=0)
            log_axis(ax, xs, "step (updates)")
        steps_panel(axs[2], g, arms)
        if len(groups) > 1:
            axs[0].set_ylabel(tex(f"{textwrap.fill(f'{g.label} ({g.seeds})', 34)}\naccuracy (%)"), fontsize=8)
    marks = {f"{t} % on {s}": Line2D([], [], marker=m, color=SPLITS[s][0], ls="") for s in ("natural", "c0") for t, m in ((90, "o"), (99, "D"))}
    marks["not reached (>=)"] = Line2D([], [], marker="o", mfc="w", mec="k", ls="")
    legend(fig, sizes(groups, "revive"), columns=5, extra=marks)
    return fig, ("Steps that bring the answer for O_PT back (reFT), against teaching a never-trained operand in the same way to the same "
                 "model and to its base, and against pretraining itself (at its own, larger rate). Left: accuracy (%), grey lines at 90 and 99. "
                 "Right: steps to these thresholds; large marks are medians over seeds (dots), an open mark with an arrow means not reached by "
                 f"then. Few steps beside the controls: it was there. {FLOORS}{sizes(groups, 'revive')}.")


def steps_to(group, **want):
    """(median steps, None if not reached; the most that was tried; all) over runs and data orders, or None."""
    rows = [r for run in group.runs for r in select(run, "revive", **want)]
    if not rows:
        return None
    each = sorted(r["steps"] if r.get("steps") is not None else float("inf") for r in rows)
    middle = each[len(each) // 2]  # of an even number the later one: not reached counts against
    return middle if middle < float("inf") else None, max(r.get("max_steps") or 0 for r in rows), each


def steps_panel(ax, group, arms):
    shown = [key for key in arms if steps_to(group, key=key)]
    for y, key in enumerate(shown):
        for i, (split, threshold, marker) in enumerate((s, t, m) for s in ("natural", "c0") for t, m in ((.9, "o"), (.99, "D"))):
            got, at, color = steps_to(group, key=key, split=split, threshold=threshold), y - .27 + .18 * i, SPLITS[split][0]
            if got is None:
                continue
            middle, most, each = got
            ax.plot(most if middle is None else max(middle, 1), at, marker, color=color, ms=6, mfc="w" if middle is None else color)
            if middle is None:
                ax.annotate("", (most * 1.55, at), (most * 1.08, at), arrowprops={"arrowstyle": "->", "color": color, "lw": 1})
            reached = [max(s, 1) for s in each if s < float("inf")] if len(each) > 1 else []
            ax.plot(reached, [at] * len(reached), "k.", ms=3)
    ax.set_yticks(range(len(shown)), [arms[key][0] for key in shown], fontsize=8)
    ax.set_ylim(len(shown) - .45, -.55)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * 1.3)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel("steps to the threshold (updates)", fontsize=8)
    ax.set_title("steps to 90 % and 99 %", fontsize=9)
    ax.grid(axis="x", color="#e6e6e6", lw=.6)
    ax.tick_params(labelsize=8)


def fig10_attention(groups):
    """
    Where the answer position looks: one string, letter by letter, and the mass by region over many strings.
    Fooled by: reading too much into it; a head may look without using, and letters travel in earlier blocks.
    """
    groups = having(groups, "attention")
    maps = [(g, prompt, read_maps(g.runs[0].prefix)) for g in groups[:4] for prompt in g.pair]
    maps = [(g, prompt, z) for g, prompt, z in maps if z and f"ckpt_{prompt}" in z]
    if not maps:
        return None
    if len(groups) > 4:
        note("fig10_attention: the first 4 groups only")
    units = max(z[f"ckpt_{prompt}"][0].shape[0] * z[f"ckpt_{prompt}"][0].shape[1] for _, prompt, z in maps)
    fig, axes = sheet(len(maps), 4, 4, max(2.6, .21 * units), gridspec_kw={"width_ratios": (3, 3, 1.3, 1.3)})
    for axs, (g, prompt, z) in zip(axes, maps):
        role = dict(zip(g.pair, ("O_PT", "O_FT")))[prompt]
        for model, left, right in (("base", axs[0], axs[2]), ("ckpt", axs[1], axs[3])):
            if f"{model}_{prompt}" in z:
                head = f"{g.label}\n" if len(groups) > 1 else ""
                left.set_title(tex(f"{head}{SPELLED[model]}, asked {prompt} ({role})"), fontsize=9)
                picture = letter_map(left, z, z[f"{model}_{prompt}"][0])
                regions = region_map(right, g, model, prompt)
                right.set_title(tex(f"{head}{SPELLED[model]}, asked {prompt}"), fontsize=9)
            else:
                left.set_visible(False), right.set_visible(False)
    fig.colorbar(picture, ax=axes[:, :2], location="bottom", label="attention of the answer position (%), one string", shrink=.4, aspect=40)
    fig.colorbar(regions, ax=axes[:, 2:], location="bottom", label="mass / chance, all strings", shrink=.8, aspect=20)
    return fig, ("Attention of the position that predicts the answer. Left: the first natural test string, one row per block and head (B1H2: "
                 "block 1, head 2, counted from 0), one column per letter, 'rest' for all other tokens together; the white line opens the "
                 "window. Right: mean mass on a region as a multiple of chance, what uniform attention would give it (1): the window, the "
                 f"letters outside it, and a, b, c within it. {sizes(groups[:4], 'attention')}; the string is of the first run of a group.")


def read_maps(prefix):
    try:
        with np.load(prefix + ".attention.npz", allow_pickle=False) as z:
            return {k: z[k] for k in z}
    except (OSError, ValueError, EOFError, KeyError) as error:
        note(f"{prefix}.attention.npz: left out, not readable ({type(error).__name__})")
    except Exception as error:  # a damaged archive raises zipfile's and zlib's own
        note(f"{prefix}.attention.npz: left out, damaged ({type(error).__name__})")


def letter_map(ax, z, pattern):
    """The last 64 letters at most: longer strings have their window there."""
    names = [str(z["vocabulary"][t]) for t in z["tokens"][0]]
    letters = [i for i, name in enumerate(names) if name in ("a", "b", "c")][-64:]
    flat = 100 * pattern.reshape(-1, pattern.shape[-1])
    rest = flat.sum(1) - flat[:, letters].sum(1)
    picture = ax.imshow(np.column_stack([flat[:, letters], np.full(len(flat), np.nan), rest]), cmap="viridis", vmin=0, vmax=50, aspect="auto")
    ax.set_xticks([*range(len(letters)), len(letters) + 1], [names[i] for i in letters] + ["rest"], fontsize=7.5)
    block_ticks(ax, pattern.shape)
    width = next((int(n[1:]) for n in names if re.fullmatch(r"#\d+", n)), 0)
    if 0 < width < len(letters):
        ax.axvline(len(letters) - width - .5, color="w", lw=1.5)
    ax.set_xlabel("letters of the string", fontsize=8)
    return picture


def region_map(ax, group, model, prompt):
    rows = [r for run in group.runs for r in select(run, "attention", model=model, prompt=prompt)]
    names = list(dict.fromkeys(r["region"] for r in rows))
    shape = [max(r[k] for r in rows) + 1 for k in ("block", "head")]
    cells = np.full((shape[0] * shape[1], len(names)), np.nan)
    for i in range(len(cells)):
        for j, name in enumerate(names):
            got = [r["mass"] / r["chance"] for r in rows if (r["block"] * shape[1] + r["head"], r["region"]) == (i, name) and r["chance"]]
            cells[i, j] = np.mean(got) if got else np.nan
            ax.text(j, i, f"{cells[i, j]:.1f}" if got else "", ha="center", va="center", fontsize=6.5, color="k" if cells[i, j] < 4 else "w")
    picture = ax.imshow(cells, cmap="Greys", vmin=0, vmax=6, aspect="auto")
    ax.set_xticks(range(len(names)), names, fontsize=7.5, rotation=40)
    block_ticks(ax, shape)
    return picture


def block_ticks(ax, shape):
    ax.set_yticks(range(shape[0] * shape[1]), [f"B{i // shape[1]}H{i % shape[1]}" for i in range(shape[0] * shape[1])], fontsize=7)
    for b in range(1, shape[0]):
        ax.axhline(b * shape[1] - .5, color="#999999", lw=.8)


FIGURES = {"fig5_behavior": fig5_behavior, "rules": rules, "fig6_curves": fig6_curves, "fig7_prune": fig7_prune, "fig8_probe": fig8_probe,
           "fig9_revive": fig9_revive, "fig10_attention": fig10_attention}

# ---------------------------------------------------------------- the report

STYLE = """body{font:16px/1.5 Georgia,serif;color:#222;max-width:70rem;margin:2rem auto;padding:0 1.2rem}
h1,h2,th,figcaption b{font-family:Helvetica,Arial,sans-serif}h1{font-size:1.7rem}h2{font-size:1.15rem;margin-top:2.2rem}
p,figcaption{max-width:46rem}table{border-collapse:collapse;font-size:.82rem;margin:.6rem 0 1.2rem;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}th{border-bottom:2px solid #888}
td:first-child,th:first-child,td.text{text-align:left}td.text{white-space:normal}td small{color:#666}code{font-size:.8rem;overflow-wrap:anywhere}
figure{margin:1.2rem 0 2.4rem}img{max-width:100%;border:1px solid #eee}figcaption{font-size:.88rem;color:#333}
.verdict{border-left:4px solid #0072B2;padding:.2rem 1rem;margin:.8rem 0;background:#f6f8fa;max-width:46rem}
@media print{body{margin:0;max-width:none;font-size:11px}figure,table,.verdict{break-inside:avoid}table{display:table}}"""


def rich(text):
    """Escaped text with the symbols' subscripts."""
    return re.sub(r"\b([OC])_(PT|FT|Tr)\b", r"\1<sub>\2</sub>", html.escape(str(text)))


def table(head, rows):
    cells = lambda tag, row: "".join(f"<{tag}>{rich(c)}</{tag}>" for c in row)  # noqa: E731
    return (f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>" + "".join(f"<tr>{cells('td', r)}</tr>" for r in rows)
            + "</tbody></table>") if rows else ""


def shown(got):
    """Percent: mean (smallest to largest)."""
    if got is None:
        return "-"
    many = len(got[3]) > 1 and got[2] > got[1]
    return f"{100 * got[0]:.1f}" + (f" ({100 * got[1]:.1f} to {100 * got[2]:.1f})" if many else "")


def behavior_table(groups):
    rows = []
    for g in having(groups, "answers"):
        for role, operand in zip(("O_PT", "O_FT"), g.pair):
            row = [f"{g.label} ({g.seeds})", f"{role} = {operand}"]
            for split in SPLITS:
                want = dict(operand=operand, split=split)
                row += [shown(spread(g, "answers", model=m, **want)) for m in ("base", "ckpt")]
                row += [" / ".join("-" if f is None else f"{100 * f[0]:.0f}" for f in (spread(g, "answers", k, **want) for k in ("floor", "cross_floor")))]
            rows.append(row)
    return "Accuracy (%) before and after", table(["", "asked"] + [h for s in SPLITS for h in (f"{s}: base", "after", "floor / cross")], rows)


def prune_table(groups):
    rows = []
    for g, file in [(g, file) for file in ("prune", "prune-weight") for g in having(groups, file)]:
        for ranking, edit in dict.fromkeys((r.get("ranking"), r.get("edit")) for run in g.runs for r in run.rows[file]):
            got = [r for run in g.runs for r in select(run, file, ranking=ranking, edit=edit, chosen=True)
                   if r.get("operand") != g.pair[1] and r.get("accuracy") is not None]
            c0, natural = ([r["accuracy"] for r in got if r["split"] == s] for s in ("c0", "natural"))
            if c0:
                words = [f"{100 * np.mean(v):.1f}" + (f" ({100 * min(v):.1f} to {100 * max(v):.1f})" if len(v) > 1 else "") if v else "-" for v in (c0, natural)]
                rows.append([f"{g.label} ({g.seeds})", f"{ranking}, {edit}", got[0]["operand"], ", ".join(map(str, sorted({r["k"] for r in got}))), *words, len(c0)])
    return ("Pruning: accuracy (%) at the best K, chosen on other strings",
            table(["", "units", "asked", "K", "c0", "natural", "runs or draws"], rows))


def probe_table(groups):
    rows = []
    for g in having(groups, "probe"):
        for target, prompt in dict.fromkeys((r.get("target"), r.get("prompt")) for run in g.runs for r in run.rows["probe"]):
            def best(model, labels="true", key="accuracy"):
                blocks = {r["block"] for run in g.runs for r in select(run, "probe", model=model, target=target, prompt=prompt)}
                got = [spread(g, "probe", key, model=model, target=target, prompt=prompt, labels=labels, split="natural", block=b) for b in blocks]
                return shown(max((x for x in got if x), key=lambda x: x[0], default=None))
            rows.append([f"{g.label} ({g.seeds})", target, prompt, best("base"), best("ckpt"), best("untrained"), best("ckpt", "shuffled"),
                         best("ckpt", key="floor")])
    return ("Probing: largest accuracy (%) over the blocks, natural strings",
            table(["", "read", "asked", "base", "fine-tuned", "untrained", "shuffled labels", "floor"], rows))


def revive_table(groups):
    rows = []
    for g in having(groups, "revive"):
        for key, (label, *_) in arms_of([g]).items():
            cells = []
            for split, threshold in ((s, t) for s in ("natural", "c0") for t in (.9, .99)):
                got = steps_to(g, key=key, split=split, threshold=threshold)
                cells.append("-" if got is None else f">= {got[1]}" if got[0] is None else f"{got[0]:.0f}")
            rows.append([f"{g.label} ({g.seeds})", label, *cells])
    return "Reviving: steps to a threshold (median)", table(["", "arm", "natural 90 %", "99 %", "c0 90 %", "99 %"], rows)


def run_table(runs):
    rows = []
    for run in runs:
        r, git = run.record, run.record.get("git") or {}
        here = ([r] + list(r.get("resumes") or []))[-1]
        commit = f"{str(git['commit'])[:10]}{' + changes' if git.get('dirty') else ''}" if git.get("commit") else "-"
        rows.append([run.name, r.get("command", "-"), commit, ", ".join(f"{k} {v}" for k, v in (r.get("versions") or {}).items()),
                     here.get("device", "-"), f"{here.get('seconds', 0):.0f} s"])
    return "What made these files", table(["run", "command", "commit", "versions", "device", "time"], rows)


def report(folder, runs, groups, pictures):
    """One page with everything in it: no scripts, nothing fetched."""
    verdicts = "".join(f"<div class=verdict><p><b>{rich(run.name)}: {rich(run.verdict.get('verdict'))}</b> ({rich(g.label)}, seed "
                       f"{rich(run.args.get('seed'))})<br>{rich(run.verdict.get('text', ''))}</p></div>"
                       for g in groups for run in g.runs if run.verdict)
    tables = "".join(f"<h2>{rich(title)}</h2>{body}" for title, body in (make(groups) for make in (
        behavior_table, prune_table, probe_table, revive_table)) if body)
    figures = "".join(f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                      f"<figcaption><b>{rich(name)}.</b> {rich(caption)}</figcaption></figure>" for name, (png, caption) in pictures.items())
    title, body = run_table(runs)
    return (f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width"><title>unwrap: '
            f"{html.escape(os.path.basename(os.path.abspath(folder)))}</title><style>{STYLE}</style></head><body><h1>Does fine-tuning delete a "
            "capability, or wrap it?</h1><p>O_PT is the operand of pretraining, O_FT that of fine-tuning; in fine-tuning r(x, O_FT) - r(x, O_PT) "
            "= q holds with probability C_Tr. A wrapper answers O_FT by r(x, O_PT) + q and leaves the old capability in place.</p>".replace(
                "O_PT", "O<sub>PT</sub>").replace("O_FT", "O<sub>FT</sub>").replace("C_Tr", "C<sub>Tr</sub>")
            + (f"<h2>Verdicts</h2>{verdicts}" if verdicts else "") + tables + f"<h2>Figures</h2>{figures}<h2>{title}</h2>{body}</body></html>\n")


# ---------------------------------------------------------------- command line


def replace_file(path, content):
    with open(path + ".part", "wb") as f:
        f.write(content)
    os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="out/", help="folder with the files of one or many runs, read with its subfolders (default: out/)")
    folder = parser.parse_args().folder
    if not os.path.isdir(folder):
        sys.exit(mistake(f"{folder}: no such folder"))
    runs = find_runs(folder)
    groups, pictures = group_runs(runs), {}
    if not runs:
        sys.exit(mistake(f"nothing to plot in {folder}: no record (X.json) of a finished run"))
    try:
        os.makedirs(os.path.join(folder, "figures"), exist_ok=True)
        for name, figure in FIGURES.items():
            try:
                drawn = figure(groups)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                note(f"{name}: skipped, rows that are not as expected ({type(error).__name__}: {error})")
                continue
            if drawn is None:
                note(f"{name}: skipped, no files for it")
                continue
            buffer = io.BytesIO()
            drawn[0].savefig(buffer, dpi=120)
            plt.close(drawn[0])
            pictures[name] = buffer.getvalue(), drawn[1]
            replace_file(os.path.join(folder, "figures", name + ".png"), buffer.getvalue())
            note(f"wrote {os.path.join(folder, 'figures', name + '.png')}")
        replace_file(os.path.join(folder, "report.html"), report(folder, runs, groups, pictures).encode())
    except OSError as error:
        sys.exit(mistake(f"cannot write under {folder}: {error.strerror}"))
    note(f"wrote {os.path.join(folder, 'report.html')}: {len(runs)} runs in {len(groups)} groups, {len(pictures)} figures")


def mistake(text):
    print(f"plot.py: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
