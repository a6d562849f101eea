"""
What is claimed: a list of claims, each with its models (a condition), what is measured of them, the
control, the margin, and when its rule and its rows were written. results/evidence.py writes tables.
"""
import functools
import os
import sys
from math import comb
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import plot
from plot import (BLUE, DARK, GREY, ORANGE, PRIORS, RED, Spread, describe, rate_words,
                  rows_of)

# ---- conditions and numbers
# A number is a key of the verdict (of several, with spaces between, the largest) or a function of a
# run; None without it.


class AtLeast(float):
    """A number of steps that was cut off: it would have been more."""


def is_cut(value):
    return isinstance(value, AtLeast)


def number(run, what, of=max):
    if callable(what):
        return what(run)
    verdict = run.verdict or {}
    values = [verdict.get(key) for key in what.split()]
    if None in values:
        return None
    cut = what.endswith("_steps") and not verdict.get(what.replace("_steps", "_reached"), True)
    return AtLeast(of(values)) if cut else of(values)


def accuracy(kind, of=np.mean, last=False, **want):
    """run -> mean (or min, max) accuracy of the rows that fit; last: those of the last step."""
    def number_of(run):
        rows = rows_of(run, kind, "accuracy", **want)
        end = max((row["step"] for row in rows), default=None) if last else None
        values = [row["accuracy"] for row in rows if end in (None, row.get("step"))]
        return of(values) if values else None
    return number_of


def steps(arm, best):
    """run -> steps to 99 % on natural strings at the fine-tuning's rate, or the best of several."""
    def number_of(run):
        rows = [row for row in rows_of(run, "revive", split="natural", threshold=.99)
                if row["arm"].startswith(arm) and (best or row["lr"] == run.args["lr"])]
        taken = [AtLeast(row["max_steps"]) if row["steps"] is None else row["steps"]
                 for row in rows]
        return min(taken, key=lambda x: (x, is_cut(x))) if len(taken) > best else None
    return number_of


PROGRAMS = {"tracr-count": ("counter", 1e-3), "tracr-max": ("max-identifier", 3e-4)}  # usual noise


def variant(settings):
    """What differs from our usual models besides prior, C_Tr and rate, in words."""
    words = [f"{key} {settings[key]}" for key in ("mix", "only") if settings.get(key)]
    words += [key for key in ("relabel", "jailbreak") if settings.get(key)]
    if settings["setup"] in PROGRAMS:
        noise = settings.get("noise")
        words += ["outputs x 1"] * (settings.get("pretrain logit_scale") == 1)
        words += ["not balanced"] * (settings.get("pretrain balance") is False)
        words += [describe("noise", noise)] * (noise != PROGRAMS[settings["setup"]][1])
    return ", ".join(words)


@functools.cache
def condition(run):
    """What was done to a model, in words: CLAIMS and TRUTHS speak of conditions."""
    args, setup, prior = run.args, run.settings["setup"], tuple(run.args.get("prior") or ())
    words = [setup] * (setup != "pcfg") + ["paper"] * (run.settings["scale"] == "paper")
    rate, before = (x and rate_words(x) for x in (args.get("lr"), run.settings.get("finetune lr")))
    if setup == "stories":
        never = "never" * (args.get("without") == args.get("feature"))
        words += [args.get("protocol") or never, rate]
    elif run.kind != "pretrain":
        words += [args.get("task"), PRIORS.get(prior) or "/".join(map("{:g}".format, prior)),
                  f"{args.get('c_tr'):g}", rate, variant(run.settings)]
    words += [f"reFT after {before}" if before else "reFT"] * (run.kind == "reFT")
    return " ".join(filter(None, words))


class Claim(NamedTuple):
    """
    A claim about the models of a condition. It is confirmatory where its rule (the fields above,
    and what they name) is older than its rows; `git show` gives the times of both commits.
    """
    setup: str
    text: str
    figure: str             # of the paper, or "ours"
    condition: str
    measured: object        # a number
    against: str            # what the control is
    control: object         # a number of the same run, or (condition, number) of its seed there
    margin: float           # of a difference of shares; from 1 on: how many times as many steps
    below: bool = False     # the claim is that the margin over each control is not reached
    learned: bool = False   # of the models alone that learned the shortcut
    rule: str = ""          # when it last changed in substance, and by which commit
    rows: str = ""          # when the first of its rows were committed, and by which commit


class Effect(NamedTuple):
    """What one seed says of a claim."""
    value: float            # what is measured less its control; of steps: divided by it
    measured: float
    control: float
    run: object


LEARNED = .9  # b on c1 at the end, from which on the shortcut was learned; chosen after the numbers


def effects(claim, runs):
    """The Effect of each seed."""
    by_seed, found = {(condition(run), run.args["seed"]): run for run in runs}, {}
    for run in runs:
        if condition(run) != claim.condition:
            continue
        partner, control = run, claim.control
        if isinstance(control, tuple):
            partner, control = by_seed.get((control[0], run.args["seed"])), control[1]
        first = number(run, claim.measured)
        second = partner and number(partner, control, min if claim.below else max)
        if first is None or second is None:
            continue
        if not claim.learned or number(run, "ckpt_ft_c1") >= LEARNED:
            value = first / max(1, second) if claim.margin >= 1 else first - second
            found[run.args["seed"]] = Effect(value, first, second, run)
    return list(found.values())


def span(values, times):
    """The Spread of effects as they are (times), or in points; None without one."""
    if not np.size(values):
        return None
    factor = 1 if times else 100
    return Spread(*(f(values) * factor for f in (np.mean, np.min, np.max)), [])


# what is measured of O_PT; what its control is, and reaches; the margin of a claim
BEHAVIOUR = "ckpt_pt_c0", "best guess from b", "pt_c0_cross_floor", .25
FEW_ROWS = ("random rows, c, or best guess from b",  # the three that the verdict compares with
            "random_c0_max never_prune_c0 pt_c0_cross_floor", .25)
PRUNING, ONE_PASS = ("prune_c0", *FEW_ROWS), ("prune_one_pass_c0", *FEW_ROWS)
GRAFTING = "graft_c0", "best guess from b", "pt_c0_cross_floor", .25
PROBING = "probe_natural", "untrained model, or c", "probe_untrained never_probe", .1
REVIVING = "control_steps", "reFT", "reft_steps", 3.
RELEARNING = ("relearn_held_out", "c, or best guess from b",
              "never_relearn_held_out relearn_cross_floor", .1)

# ---- claims

MAIN, LEARNER, INDEX = "count low 1 1e-5", "count low 0 1e-3", "index low 1 1e-5"
COUNTER, DELETED = "tracr-count count 1 1e-3", "stories randomise 1.5e-4"
REVIVED, NEVER = "stories randomise 1.2e-4 reFT after 1.5e-4", "stories never 1.2e-4 reFT"
HIGH, HALF_HIGH = "count high 1 1e-5", "count high 0.5 1e-5"
A_OVER_THE_RUN = accuracy("history", role="O_PT", split="c0", task="count")
A_ON_C0 = accuracy("behavior", model="ckpt", operand="a", split="c0", task="count")
B_ON_C1 = accuracy("history", last=True, role="O_FT", split="c1")
B_ON_C0 = accuracy("history", last=True, role="O_FT", split="c0")
ASKED = accuracy("history", step=100, split="asked")
UNASKED = accuracy("history", step=100, split="unasked")
taught = functools.partial(accuracy, "relearn", last=True, split=("c0", "asked"))
HELD_OUT = taught(min, arm="reft", half="held-out")
HELD_OUT_C = taught(max, arm="teach-c", half="held-out")
HELD_OUT_NEVER = taught(max, arm="teach-Twist", half="held-out")
RETAINED = taught(max, arm="reft", half="retained")
one_weight = functools.partial(accuracy, "prune", max, k=1, role="O_PT", split="c0", control=None,
                               order="exhaustive", pool="zero-in-program")
BEST_WEIGHT, RANDOM_WEIGHT = one_weight(score="gradient-weight"), one_weight(score="random")
SHORTCUT = "ckpt_ft_c1", "b on c0", "ckpt_ft_c0", .25
FALLS = A_OVER_THE_RUN, "low prior, C_Tr 1", (MAIN, A_OVER_THE_RUN), .1


def faster(arm, words, best=False, randft=False):
    """That reFT is faster than an arm, at the fine-tuning's rate or each at its best of several."""
    text = "randFT: " * randft + f"reFT is faster than {words}" + ", best rates" * best
    return (text, "Fig. 28" if randft else "Fig. 9", MAIN + " relabel" * randft,
            steps(arm, best), "reFT", steps("reft", best), 3.)


def mixed(share):
    """That it keeps a to draw a share of a batch from pretraining's data."""
    return (f"mixing: {share:.1%} of pretraining's data keep a", "Figs. 18-23",
            f"{MAIN} mix {share}", A_ON_C0, "none of it", (MAIN, A_ON_C0), .25)


SCRATCH, GOOD = ("scratch", "from scratch"), ("from 0/0.001", "from a good initialisation")
B_ONLY = "from 0/1/0", "from a model of b (Scr. + FT)"
B_RIGHT = "b is right on c1 by the shortcut, not on c0", "Tables 5, 7"
TEN_ROWS, READ = ("ten rows bring a back", "Fig. 7"), ("a is read while b is asked", "Fig. 8")
FASTER, COME_BACK = ("reFT is faster than teaching c", "Fig. 9"), (
    "answers that were not taught come back", "ours")

# rules and rows: time and commit of the last change in substance, of the first row
FIRST, TENTH, PARTS, FLOORS = ("2026-11-26 16:47 f77b205", "2026-11-26 16:58 db89cf4",
                               "2026-11-26 17:28 4938852", "2026-11-30 15:20 d43233f")
FIVE_SEEDS, BEYOND, APPENDIX = ("2026-11-26 18:00 f0aa395", "2026-11-26 18:02 a19b868",
                                "2026-11-26 18:31 747b9bc")
NOISE_SEEDS = "2026-11-23 07:45 6713994"
TWIST_RATE, TWISTS = "2026-11-30 18:20 f61c319", "2026-11-30 20:17 1934237"
SETS = (
    ("Counter", FIRST, FIVE_SEEDS, (
        (*B_RIGHT, MAIN, *SHORTCUT), (*FASTER, MAIN, *REVIVING))),
    ("Counter", PARTS, FIVE_SEEDS, (
        (*READ, MAIN, *PROBING), (*COME_BACK, MAIN, *RELEARNING), faster(*SCRATCH),
        faster(*SCRATCH, best=True), faster(*B_ONLY), faster(*B_ONLY, best=True), faster(*GOOD),
        faster(*GOOD, best=True), ("other families alone bring a back", "ours", MAIN, RETAINED,
                                   "best guess from b", "pt_c0_cross_floor", .1))),
    ("Counter", FLOORS, FIVE_SEEDS, (  # True: the claim is that it does not happen
        (*TEN_ROWS, MAIN, *PRUNING),
        ("large rate, no shortcut: ten rows do not bring a back", "Fig. 7", LEARNER, *PRUNING,
         True),
        ("large rate, no shortcut: answers that were not taught do not come back", "ours", LEARNER,
         *RELEARNING, True))),
    ("Indexer", FIRST, FIVE_SEEDS, ((*B_RIGHT, INDEX, *SHORTCUT),)),
    ("Indexer", FLOORS, FIVE_SEEDS, (  # True: of the seeds that learned the shortcut
        (*TEN_ROWS, INDEX, *PRUNING, False, True), (*READ, INDEX, *PROBING, False, True),
        (*COME_BACK, INDEX, *RELEARNING, False, True), (*FASTER, INDEX, *REVIVING, False, True))),
    ("conditions", FIRST, FIVE_SEEDS, (
        ("high prior, C_Tr .5: b is right on c0", "Table 5", HALF_HIGH, "ckpt_ft_c0",
         "best guess from a", "ft_c0_cross_floor", .25),
        ("high prior: a falls more slowly", "Fig. 6", HIGH, *FALLS),
        ("C_Tr 0: a falls more slowly", "Fig. 6", "count low 0 1e-5", *FALLS),
        mixed(.5), mixed(.001))),
    ("conditions", TENTH, FIVE_SEEDS, (mixed(.1),)),
    ("conditions", PARTS, APPENDIX, (
        faster(*SCRATCH, randft=True), faster(*B_ONLY, randft=True))),
    ("compiled Counter", FIRST, NOISE_SEEDS, (
        ("b is right on c1, not on c0", "Table 3", COUNTER, B_ON_C1, "b on c0", B_ON_C0, .25),)),
    ("compiled Counter", PARTS, NOISE_SEEDS, (
        ("one weight brings a back", "Fig. 55", COUNTER, BEST_WEIGHT, "random weights",
         RANDOM_WEIGHT, .6),)),
    ("compiled Counter", PARTS, BEYOND, (
        (*COME_BACK, COUNTER, HELD_OUT, "c", HELD_OUT_C, .1),)),
    ("stories", TWIST_RATE, TWISTS, (
        ("100 steps bring the twist back", "Fig. 11", REVIVED, ASKED, "never met one",
         (NEVER, ASKED), .25),
        ("where it is asked for", "ours", REVIVED, ASKED, "not asked", UNASKED, .25),
        ("other kinds of twist come back", "ours", DELETED, HELD_OUT, "never met one",
         HELD_OUT_NEVER, .1),)))
CLAIMS = [Claim(setup, *line)._replace(rule=rule, rows=rows)
          for setup, rule, rows, lines in SETS for line in lines]


def chance(k, n, p=.5):
    """Of k or more heads in n throws."""
    return sum(comb(n, i) * p ** i * (1 - p) ** (n - i) for i in range(k, n + 1))


def reached(claim, effect):
    """Whether a seed agrees with a claim; None where a number was cut off too early to say."""
    over, cut = effect.value >= claim.margin, is_cut(effect.measured)
    if is_cut(effect.control) or cut and not over:
        return None
    return over != claim.below


def outcome(claim, found):
    """A claim holds where every seed agrees, and does not hold where none of five or more does."""
    agree = [reached(claim, effect) for effect in found]
    words = {"holds" if k == len(agree) else "undecided" if k else "does not hold"
             for k in (agree.count(True), len(agree) - agree.count(False))}
    word = words.pop() if len(words) == 1 else "cannot be said"
    if len(agree) >= 5:
        return word
    return "too few seeds" if word == "does not hold" else f"{word} ({len(agree)} seeds)"


def kind_of(claim):
    return "confirmatory" if claim.rule < claim.rows else "exploratory"


def claims(runs):
    """Claims of the paper, and ours."""
    rows = []
    for claim in CLAIMS:
        found, everyone = effects(claim, runs), effects(claim._replace(learned=False), runs)
        values, measured, control, _ = zip(*found)
        form, unit = ("{:.1f} x", "{:.0f} steps") if claim.margin >= 1 else ("{:.1%}",) * 2
        cut = any(map(is_cut, measured))  # then the largest effect is a lower bound, too
        least = is_cut(found[int(np.argmin(values))].measured)
        texts = [unit.format(np.mean(measured)), *map(form.format, span(values, True)[:3])]
        texts = [">= " * bound + text for bound, text in zip((cut, cut, least, cut), texts)]
        agree = [reached(claim, effect) for effect in found].count(True)
        rows.append([
            f"{claim.setup}: {claim.text}".removeprefix("conditions: "), claim.figure, texts[0],
            "least of " * claim.below + f"{claim.against}: {unit.format(np.mean(control))}",
            *texts[1:], str(len(found)), str(len({effect.run.root for effect in found})),
            str(len(everyone) - len(found)), f"{chance(agree, len(found)):.4f}", kind_of(claim),
            claim.rule[-7:], claim.rows[-7:], outcome(claim, found)])
    return ["claim", "figure", "measured", "control", "effect", "low", "high", "seeds", "bases",
            "left_out", "sign_p", "kind", "rule", "rows", "verdict"], rows


@plot.figure()
def claim_effects(runs):
    """
    Every claim beside its control: the square is the control (its mean), the dot lies the mean
    effect away from it, the broad line spans the effects of all seeds. A claim holds where the
    broad line lies right of the short one, the margin (of claims that something does not happen:
    left of the cross). Hollow: exploratory; arrow: controls were cut off, so the effect is larger.
    Fooled by: margins, which are chosen; a mean of controls: a claim compares a seed with its own.
    """
    if not all(effects(claim, runs) for claim in CLAIMS):
        return None
    panels_of = {claim.setup: [] for claim in CLAIMS} | {"steps": []}
    for claim in CLAIMS:
        panels_of["steps" if claim.margin >= 1 else claim.setup].append(claim)
    sizes = [len(members) + 1.2 for members in panels_of.values()]
    fig = Figure((plot.WIDTH, .19 * sum(sizes) + .8), layout="constrained")
    axes = fig.subplots(len(sizes), 1, height_ratios=sizes)
    for ax, (title, members) in zip(axes, panels_of.items()):
        ax.set_title(title, loc="left", weight="bold")
        names = []
        for y, claim in enumerate(members):
            found = effects(claim, runs)
            draw_claim(ax, y, claim, found)
            few = f"; seeds: {len(found)}" * (len(found) < 5)
            setup = f"{claim.setup}: ".replace("conditions: ", "") * (title == "steps")
            names.append(plot.tex(f"{setup}{claim.text} [{claim.figure}{few}]"))
        ax.set_yticks(range(len(names)), names)
        ax.set(ylim=(len(names) - .5, -.5), xlim=(-8, 108))
        ax.tick_params(labelbottom=ax in axes[-2:])
    axes[-2].set_xlabel("%")
    axes[-1].set(xscale="log", xlim=(8, 900), xlabel="steps")
    axes[-1].set_xticks([10, 30, 100, 300], [10, 30, 100, 300])
    return plot.add_legend(fig)


def draw_claim(ax, y, claim, found):
    """Control, margin, mean effect and the span of effects at a height."""
    times, word = claim.margin >= 1, outcome(claim, found).split(" (")[0]
    color = {"holds": BLUE, "undecided": ORANGE, "does not hold": RED}.get(word, GREY)
    control = np.mean([effect.control for effect in found])
    mean, low, high, _ = span([effect.value for effect in found], True)
    start, mean, low, high, margin = (
        control * x if times else 100 * (control + x)
        for x in (times, mean, low, high, claim.margin))
    ax.plot([start, mean], [y, y], color=color, lw=1)
    ax.plot([low, high], [y, y], color=color, lw=5, alpha=.3, solid_capstyle="butt")
    ax.plot(start, y, "s", color=DARK, label="control")
    ax.plot(margin, y, "x" if claim.below else "|", color="k", ms=9, mew=1.4,
            label="margin not to be reached" if claim.below else "margin")
    face = color if kind_of(claim) == "confirmatory" else "w"
    ax.plot(mean, y, "o", color=color, mfc=face, ms=6, label=word if face == color else "")
    if any(is_cut(effect.measured) for effect in found):
        ax.plot(high * 1.06, y, ">", color=color, ms=5, label="at least")
    ax.plot([], [], "o", color=GREY, mfc="w", ms=6, label="exploratory (any colour)")
