"""
What is claimed and what is known: a list of claims, instruments on models of known truth.

Each claim is a line of CLAIMS: its models (a condition), what is measured of them, the control, the
margin. results/evidence.py writes the tables.
"""
import functools
import os
import sys
from itertools import product
from typing import NamedTuple

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import plot
from plot import (BLUE, DARK, ORANGE, PRIORS, RED, Spread, describe, dots, panels, rate_words,
                  rows_of)

# ---- conditions and numbers
# A number is a key of the verdict (of several, with spaces between, the largest) or a function of a
# run; None without it.


def number(run, what):
    if callable(what):
        return what(run)
    values = [(run.verdict or {}).get(key) for key in what.split()]
    return None if None in values else max(values)


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
        taken = [row["max_steps"] if row["steps"] is None else row["steps"] for row in rows]
        return min(taken) if len(taken) > best else None
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
    """A claim about the models of a condition."""
    text: str
    figure: str             # of the paper, or "ours"
    condition: str
    measured: object        # a number
    against: str            # what the control is
    control: object         # a number of the same run, or (condition, number) of its seed there
    margin: float           # of a difference of shares; from 1 on: how many times as many steps
    below: bool = False     # the claim is that the margin is not reached


def effects(claim, runs):
    """[(effect, its control's number)] of a claim, a seed each."""
    by_seed, pairs = {(condition(run), run.args["seed"]): run for run in runs}, {}
    for run in runs:
        if condition(run) != claim.condition:
            continue
        partner, control = run, claim.control
        if isinstance(control, tuple):
            partner, control = by_seed.get((control[0], run.args["seed"])), control[1]
        first, second = number(run, claim.measured), partner and number(partner, control)
        if first is not None and second is not None:
            effect = first / max(1, second) if claim.margin >= 1 else first - second
            pairs[run.args["seed"]] = effect, second
    return list(pairs.values())


def span(values, times):
    """The Spread of effects as they are (times), or in points; None without one."""
    if not np.size(values):
        return None
    factor = 1 if times else 100
    return Spread(*(f(values) * factor for f in (np.mean, np.min, np.max)), [])


# ---- instruments on models whose truth is known

MAIN, LEARNER, INDEX = "count low 1 1e-5", "count low 0 1e-3", "index low 1 1e-5"
TRUTHS = {"wrapped": MAIN, "planted in block 0": "count low 1 1e-4 only blocks.0",
          "planted in the head": "count low 1 1e-2 only head", "overwritten": LEARNER,
          "erased": "count 0/0.001/0.999 1 1e-5"}

# what is measured of O_PT; what its control is, and reaches; the margin of a claim
BEHAVIOUR = "ckpt_pt_c0", "best guess from b", "pt_c0_cross_floor", .25
PRUNING = "prune_c0", "random rows, or c", "random_c0_max never_prune_c0", .25
ONE_PASS = "prune_one_pass_c0", "random rows, or c", "random_c0_max never_prune_c0", .25
GRAFTING = "graft_c0", "best guess from b", "pt_c0_cross_floor", .25
PROBING = "probe_natural", "untrained model, or c", "probe_untrained never_probe", .1
REVIVING = "control_steps", "reFT", "reft_steps", 3.
RELEARNING = ("relearn_held_out", "c, or best guess from b",
              "never_relearn_held_out relearn_cross_floor", .1)
INSTRUMENTS = {"behaviour": BEHAVIOUR, "pruning": PRUNING, "one pass": ONE_PASS,
               "grafting": GRAFTING, "probing": PROBING, "reviving": REVIVING,
               "relearning": RELEARNING}


def scores(runs, truth, instrument):
    """What an instrument finds in each model of a truth, less (or divided by) its control."""
    claim = Claim("", "", TRUTHS[truth], *INSTRUMENTS[instrument])
    return [effect for effect, _ in effects(claim, runs)]


def auroc(positive, negative):
    """How often the first of two numbers is larger, of all pairs; ties count half."""
    return .5 + np.sign(np.subtract.outer(positive, negative)).mean() / 2


def known_truth(runs):
    """Instruments on models whose truth is known."""
    rows, draws = [], np.random.default_rng(0)
    for name, against, kind in product(INSTRUMENTS, ("erased", "overwritten"),
                                       ("wrapped", "planted")):
        found = sum((scores(runs, t, name) for t in TRUTHS if t.startswith(kind)), [])
        lacking = scores(runs, against, name)
        again = [auroc(draws.choice(found, len(found)), draws.choice(lacking, len(lacking)))
                 for _ in range(2000)]
        shares = auroc(found, lacking), *np.percentile(again, (2.5, 97.5))
        rows.append([name, kind, against, *map("{:.2f}".format, shares),
                     f"{len(found)}, {len(lacking)}"])
    return ["instrument", "truth", "against", "auroc", "low", "high", "seeds"], rows


@plot.figure()
def known_scores(runs):
    """
    How well each instrument finds O_PT, in models whose truth is known (see the table): what is
    found less what its controls reach, in points; reviving: how many times as fast as its control.
    It works where what is wrapped or planted lies right of what is overwritten or erased.
    Fooled by: five seeds; what is called overwritten is so by its training, not by proof.
    """
    if not scores(runs, "wrapped", "behaviour"):
        return None
    fig, parts = plot.grid(list(INSTRUMENTS), 3, 1.7)
    for part, name in zip(parts, INSTRUMENTS):
        ax, = panels(part, [""])
        times = name == "reviving"
        points = {truth: span(scores(runs, truth, name), times) for truth in TRUTHS}
        dots(ax, points, ("mean, smallest and largest seed", BLUE, "o", ""))
        ax.axvline(1 if times else 0, color=DARK, lw=1, ls="--", label="as its controls")
        ax.set_xlabel("times as fast" if times else "points")
    basis = "c0 strings; probing: natural ones"
    return plot.add_legend(fig, basis), basis


# ---- claims

COUNTER, DELETED = "tracr-count count 1 1e-3", "stories randomise 1.5e-4"
REVIVED = "stories randomise 4e-5 reFT after 1.5e-4"
SHORTCUT = "ckpt_ft_c1", "b on c0", "ckpt_ft_c0", .25
A_OVER_THE_RUN = accuracy("history", role="O_PT", split="c0", task="count")
A_ON_C0 = accuracy("behavior", model="ckpt", operand="a", split="c0", task="count")
A_BY_JAILBREAK = accuracy("behavior", model="ckpt", operand="a", split="c0", task="count-j1")
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


def faster(arm, best=False):
    """That reFT is faster than an arm, at the fine-tuning's rate or each at its best of several."""
    return steps(arm, best), "reFT", steps("reft", best), 3.


SCRATCH, B_ONLY, GOOD_START = "scratch", "from 0/1/0", "from 0/0.001"  # arms of revive
CLAIMS = [Claim(*line) for line in (
    ("Counter: b is right on c1 by the shortcut, not on c0", "Tables 5, 7", MAIN, *SHORTCUT),
    ("Counter: ten rows bring a back", "Fig. 7", MAIN, *PRUNING),
    ("Counter: a is read while b is asked", "Fig. 8", MAIN, *PROBING),
    ("Counter: reFT is faster than teaching c", "Fig. 9", MAIN, *REVIVING),
    ("Counter: answers that were not taught come back", "ours", MAIN, *RELEARNING),
    ("Indexer: b is right on c1 by the shortcut, not on c0", "Tables 5, 7", INDEX, *SHORTCUT),
    ("Indexer: ten rows bring a back", "Fig. 7", INDEX, *PRUNING),
    ("Indexer: a is read while b is asked", "Fig. 8", INDEX, *PROBING),
    ("Indexer: reFT is faster than teaching c", "Fig. 9", INDEX, *REVIVING),
    ("Indexer: answers that were not taught come back", "ours", INDEX, *RELEARNING),
    ("Counter: reFT is faster than from scratch", "Fig. 9", MAIN, *faster(SCRATCH)),
    ("Counter: reFT is faster than from scratch, best rates", "Fig. 9", MAIN,
     *faster(SCRATCH, best=True)),
    ("Counter: reFT is faster than from a model of b (Scr. + FT)", "Fig. 9", MAIN, *faster(B_ONLY)),
    ("Counter: reFT is faster than from a model of b (Scr. + FT), best rates", "Fig. 9", MAIN,
     *faster(B_ONLY, best=True)),
    ("Counter: reFT is faster than from a good initialisation", "Fig. 9", MAIN,
     *faster(GOOD_START)),
    ("Counter: reFT is faster than from a good initialisation, best rates", "Fig. 9", MAIN,
     *faster(GOOD_START, best=True)),
    ("randFT: reFT is faster than from scratch", "Fig. 28", f"{MAIN} relabel", *faster(SCRATCH)),
    ("randFT: reFT is faster than from a model of b (Scr. + FT)", "Fig. 28", f"{MAIN} relabel",
     *faster(B_ONLY)),
    ("mixing: 50.0% of pretraining's data keep a", "Figs. 18-23", f"{MAIN} mix 0.5", A_ON_C0,
     "none of it", (MAIN, A_ON_C0), .25),
    ("mixing: 10.0% of pretraining's data keep a", "Figs. 18-23", f"{MAIN} mix 0.1", A_ON_C0,
     "none of it", (MAIN, A_ON_C0), .25),
    ("mixing: 0.1% of pretraining's data keep a", "Figs. 18-23", f"{MAIN} mix 0.001", A_ON_C0,
     "none of it", (MAIN, A_ON_C0), .25),
    ("large rate, no shortcut: ten rows do not bring a back", "Fig. 7", LEARNER, *PRUNING, True),
    ("large rate, no shortcut: answers that were not taught do not come back", "ours", LEARNER,
     *RELEARNING, True),
    ("high prior, C_Tr .5: b is right on c0", "Table 5", "count high 0.5 1e-5", "ckpt_ft_c0",
     "best guess from a", "ft_c0_cross_floor", .25),
    ("high prior: a falls more slowly", "Fig. 6", "count high 1 1e-5", A_OVER_THE_RUN, "low prior",
     (MAIN, A_OVER_THE_RUN), .1),
    ("C_Tr 0: a falls more slowly", "Fig. 6", "count low 0 1e-5", A_OVER_THE_RUN, "C_Tr 1",
     (MAIN, A_OVER_THE_RUN), .1),
    ("other families alone bring a back", "ours", MAIN, RETAINED, "best guess from b",
     "pt_c0_cross_floor", .1),
    ("high prior: jailbreaks still get a", "Fig. 24", "count high 1 1e-5 jailbreak",
     A_BY_JAILBREAK, "T_NJ", A_ON_C0, .25),
    ("low prior: jailbreaks still get a", "Fig. 25", f"{MAIN} jailbreak", A_BY_JAILBREAK, "T_NJ",
     A_ON_C0, .25),
    ("compiled Counter: b is right on c1, not on c0", "Table 3", COUNTER, B_ON_C1, "b on c0",
     B_ON_C0, .25),
    ("compiled Counter: one weight brings a back", "Fig. 55", COUNTER, BEST_WEIGHT,
     "random weights", RANDOM_WEIGHT, .6),
    ("compiled Counter: answers that were not taught come back", "ours", COUNTER, HELD_OUT, "c",
     HELD_OUT_C, .1),
    ("stories: 100 steps bring the twist back", "Fig. 11", REVIVED, ASKED, "never met one",
     ("stories never 4e-5 reFT", ASKED), .25),
    ("stories: where it is asked for", "ours", REVIVED, ASKED, "not asked", UNASKED, .25),
    ("stories: other kinds of twist come back", "ours", DELETED, HELD_OUT, "never met one",
     HELD_OUT_NEVER, .1))]


def outcome(claim, values):
    """A claim holds where every seed reaches its margin (below: where none does)."""
    reached = [(value >= claim.margin) != claim.below for value in values]
    return "holds" if all(reached) else "undecided" if any(reached) else "does not hold"


def claims(runs):
    """Claims of the paper, and ours."""
    rows = []
    for claim in CLAIMS:
        values, control = np.array(effects(claim, runs)).T
        form, theirs = ("{:.1f} x", "{:.0f} steps") if claim.margin >= 1 else ("{:.1%}",) * 2
        rows.append([claim.text, claim.figure, *map(form.format, span(values, True)[:3]),
                     f"{claim.against}: {theirs.format(control.mean())}", str(len(values)),
                     outcome(claim, values)])
    return ["claim", "figure", "effect", "low", "high", "control", "seeds", "verdict"], rows


@plot.figure()
def claim_effects(runs):
    """
    Every claim beside its control: the effect (mean, smallest and largest seed) and the margin that
    it has to reach in every seed (of claims that something does not happen: in none).
    Fooled by: margins, which are chosen; controls that were stopped at three times reFT's steps.
    """
    if not all(effects(claim, runs) for claim in CLAIMS):
        return None
    colors = {"holds": BLUE, "undecided": ORANGE, "does not hold": RED}
    fig, parts = plot.grid(["", ""], 1, 4.2)
    for part, times in zip(parts, (False, True)):
        ax, = panels(part, [""])
        drawn, needed = {word: {} for word in colors}, {True: {}, False: {}}
        for claim in CLAIMS:
            if times == (claim.margin >= 1):
                name = f"{claim.text} [{claim.figure}]"
                values = [effect for effect, _ in effects(claim, runs)]
                for word in colors:
                    hit = word == outcome(claim, values)
                    drawn[word][name] = span(values, times) if hit else None
                needed[claim.below][name] = span(claim.margin, times)
                needed[not claim.below][name] = None
        for word, points in drawn.items():
            dots(ax, points, (word, colors[word], "o", ""))
        dots(ax, needed[False], ("margin to be reached", DARK, "|", ""))
        dots(ax, needed[True], ("margin not to be reached", DARK, "x", ""))
        ax.set_xlabel("times as fast as its control" if times else "effect (points)")
    basis = "dots and whiskers: mean, smallest and largest seed"
    return plot.add_legend(fig, basis), basis
