"""
The instruments on models of which it is known whether they have O_PT: a table and a figure, which
results/evidence.py writes.
"""
from itertools import product

import numpy as np

import plot
from claims import (BEHAVIOUR, GRAFTING, LEARNER, MAIN, ONE_PASS, PROBING, PRUNING, RELEARNING,
                    REVIVING, Claim, chance, effects, span)
from plot import BLUE, DARK, dots, panels

TRUTHS = {"wrapped": MAIN, "planted in block 0": "count low 1 1e-4 only blocks.0",
          "planted in the head": "count low 1 1e-2 only head", "overwritten": LEARNER,
          "erased": "count 0/0.001/0.999 1 1e-5"}
INSTRUMENTS = {"behaviour": BEHAVIOUR, "pruning": PRUNING, "one pass": ONE_PASS,
               "grafting": GRAFTING, "probing": PROBING, "reviving": REVIVING,
               "relearning": RELEARNING}


def scores(runs, truth, instrument, alone=False):
    """
    A row (seed, score) for each model of a truth (or of all that begin so): what an instrument
    finds less (or divided by) its control; alone: what its control says without a look at a.
    """
    rows = []
    for name in TRUTHS:
        claim = Claim("", "", "", TRUTHS[name], *INSTRUMENTS[instrument])
        for effect in effects(claim, runs) if name.startswith(truth) else ():
            control = effect.measured if instrument == "reviving" else -effect.control
            rows.append((effect.run.args["seed"], control if alone else effect.value))
    return np.reshape(rows, (-1, 2))


def auroc(positive, negative):
    """How often the first of two numbers is larger, of all pairs; ties count half."""
    return .5 + np.sign(np.subtract.outer(positive, negative)).mean() / 2


def seeds_right(found, lacking):
    """Whether all pairs of a seed are ordered right: seeds are independent, their models not."""
    return [found[found[:, 0] == seed, 1].min() > lacking[lacking[:, 0] == seed, 1].max()
            for seed in set(found[:, 0]) & set(lacking[:, 0])]


def exact_interval(k, n):
    """The 95 % interval of a share of which k of n were seen (Clopper and Pearson, 1934)."""
    bounds = []
    for least, tail in ((k, .025), (k + 1, .975)):
        low, high = 0., 1.
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if chance(least, n, middle) < tail else (low, middle)
        bounds.append(high)
    return bounds


def known_truth(runs):
    """Instruments on models whose truth is known."""
    rows = []
    for name, against, kind in product(INSTRUMENTS, ("erased", "overwritten"),
                                       ("wrapped", "planted")):
        found, lacking = scores(runs, kind, name), scores(runs, against, name)
        alone = auroc(scores(runs, kind, name, True)[:, 1], scores(runs, against, name, True)[:, 1])
        right, *sizes = seeds_right(found, lacking), len(found), len(lacking)
        shares = auroc(found[:, 1], lacking[:, 1]), alone, *exact_interval(sum(right), len(right))
        rows.append([name, kind, against, *map("{:.2f}".format, shares),
                     f"{sum(right)} of {len(right)}", "{}, {}".format(*sizes)])
    return ["instrument", "truth", "against", "auroc", "control_alone", "low", "high",
            "seeds_right", "seeds"], rows


@plot.figure()
def known_scores(runs):
    """
    How well each instrument finds O_PT, in models whose truth is known (see the table): what is
    found less what its controls reach, in points; reviving: how many times as fast as its control.
    It works where what is wrapped or planted lies right of what is overwritten or erased.
    Fooled by: few seeds; controls, which can tell the models apart by themselves (see the table);
    what is called overwritten is so by its training, not by proof.
    """
    if not len(scores(runs, "wrapped", "behaviour")):
        return None
    fig, parts = plot.grid(list(INSTRUMENTS), 3, 1.7)
    for part, name in zip(parts, INSTRUMENTS):
        ax, = panels(part, [""])
        times = name == "reviving"
        points = {truth: span(scores(runs, truth, name)[:, 1], times) for truth in TRUTHS}
        dots(ax, points, ("mean, smallest and largest seed", BLUE, "o", ""))
        ax.axvline(1 if times else 0, color=DARK, lw=1, ls="--", label="as its controls")
        ax.set_xlabel("times as fast" if times else "points")
    return plot.add_legend(fig)
