"""
What is computed: strings from a probabilistic context-free grammar and five task families that ask
about them, strings for compiled programs, and stories with known features.

    $ python data.py                                    # one sample of every task family
    $ python data.py --task count --operand b --c 1.0   # strings on which "count b" = "count a" + 1
    $ python data.py --setup tracr-max                  # what a compiled model sees
    $ python data.py --setup stories --operand Twist    # stories as in TinyStories-Instruct

What the model sees, at the small scale (32 letters, a window of 16, the 3rd occurrence), for
"how many b":

    SOS  T_NJ  O_b  #16  SOT  b a c ... c a b  EOT  ART  #6  EOS
         task  operand  O'    32 letters                 answer: the b among the last 16 letters

The families (paper section 3; O is the operand, O' the second operand), on the text
"... a c b a b", O' = 3 or 1:
    count               how many O among the last O' letters         O = b, O' = 3: "b a b" holds 2
    count-composition   how many overlapping pairs OO among them     O = b, O' = 3: 0
    index               distance from the end of the O'-th last O    O = b, O' = 1: the last, 1
    index-composition   the same for the pair OO, its later letter   "a a c", O = a, O' = 1: 2
    token               the letter at distance O' from the end       O' = 3: b

A compiled model has one task and no prompt: it reads BOS, letters, padding; the answer stands at
position 2. A story is read after an instruction that names its features; it has no answer.

Contents: values | random numbers, batches, floors | grammar | tasks | the spurious relation |
programs | stories: records, prepared file, corpus, protocols | setups | samples | errors and files.
Everything is a pure function of its arguments and a torch.Generator, on the generator's device.
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import operator
import os
import random
import re
import string
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

# ---------------------------------------------------------------- values


class Relation(NamedTuple):
    """
    What a study is about: fine-tuning strings x with r(x, ft) - r(x, pt) = q, where r is the answer
    of the task. Stories: pt is the feature in question; ft and q are None.
    """
    task: str
    pt: str
    ft: str | None = None
    q: int | None = None


class Examples(NamedTuple):
    """Whatever a model is trained or scored on."""
    tokens: torch.Tensor                # (n, t) what the model reads
    target: torch.Tensor                # (n, t) the output wanted at each position, -1 where none
    labels: torch.Tensor | None = None  # (n, operands): answers as numbers, -1 where there is none;
    #                                     or (n, features): 0 or 1
    at: int | None = None               # the one column that is answered: no other is computed
    extra: tuple | None = None          # (column, weight): ours, its loss is added once more

    @property
    def answer(self):
        """(n,) the output wanted at the answered column."""
        return self.target[:, self.at]

    def rows(self, index):
        """The examples at an index or slice."""
        labels = None if self.labels is None else self.labels[index]
        return self._replace(tokens=self.tokens[index], target=self.target[index], labels=labels)

    def split(self, size):
        """A list of examples, `size` in each, the last one maybe fewer."""
        return [self.rows(slice(i, i + size)) for i in range(0, self.tokens.shape[0], size)]

    def trimmed(self):
        """Without the columns behind the last one in which any output is wanted."""
        if self.at is not None:  # a compiled model attends to its padding
            return self
        width = int((self.target >= 0).any(0).nonzero().max()) + 1
        return self._replace(tokens=self.tokens[:, :width], target=self.target[:, :width])


class Test(NamedTuple):
    """Examples to be scored, and what their row says of them."""
    row: dict                           # task, operand, split, seed: see row()
    examples: Examples                  # how = "generation": prompts; half ask for the feature
    other: torch.Tensor | None = None   # (n,) answers for the other operand of the relation
    how: str = "accuracy"               # a key of SCORES in pretrain.py

    __test__ = False  # not a pytest class


class ProbeSet(NamedTuple):
    """Examples that linear probes are trained and tested on."""
    prompt: str | None                  # the operand that is asked for
    train: Examples
    tests: dict                         # {split: Examples}
    targets: dict                       # {name: column of the labels that is read}
    shuffled: tuple                     # targets that are also fitted to shuffled labels


ROW = ("setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor", "n",
       "loss", "seed")  # the keys of every row in every file; fractions, null where there is none


def row(setup, /, **values):
    """A row of results: all keys of ROW, then further ones."""
    return {**dict.fromkeys(ROW), "setup": setup.name, "scale": setup.scale, **values}


# ---------------------------------------------------------------- random numbers, batches, floors


def rng(seed, *labels, device="cpu"):
    """A generator of (seed, labels) alone: streams with different labels never meet."""
    entropy = [seed, *"/".join(map(str, labels)).encode()]
    words = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> np.uint64(1)))


CHUNK = 16  # batches drawn together: the sampler is faster on many strings


def stream(draw, batch_size, seed, label, device="cpu"):
    """
    A function k -> batch k, where draw(n, generator) makes n Examples. Batch k depends on (seed,
    label, k) and the batch size alone: an interrupted run goes on exactly where it was.
    """
    @functools.lru_cache(maxsize=1)
    def chunk(i):
        drawn = draw(batch_size * CHUNK, rng(seed, label, i, device=device))
        return [batch.trimmed() for batch in drawn.split(batch_size)]
    return lambda k: chunk(k // CHUNK)[k % CHUNK]


def majority_floor(answers):
    """Share of the most frequent answer: what always giving it gets right."""
    return answers.unique(return_counts=True)[1].max().item() / len(answers)


def cross_floor(answers, other):
    """Share that the best guess of the answer from the other operand's answer gets right."""
    joint = torch.stack([other, answers], 1).unique(dim=0, return_counts=True)
    best = {}
    for (given, _), n in zip(joint[0].tolist(), joint[1].tolist()):
        best[given] = max(best.get(given, 0), n)
    return sum(best.values()) / len(answers)


# ---------------------------------------------------------------- grammar

LETTERS = "abc"
GRAMMAR = {  # both rules of a symbol are equally likely (paper section 3)
    "s": ("rq", "qp"),
    "p": ("mno", "nom"), "q": ("nmo", "nm"), "r": ("om", "mon"),
    "m": ("lj", "jlk"), "n": ("kjl", "ljk"), "o": ("lkj", "kj"),
    "j": ("hi", "ih"), "k": ("hgi", "ghi"), "l": ("ihg", "hig"),
    "g": ("dfe", "fed"), "h": ("edf", "def"), "i": ("efd", "fde"),
    "d": ("ca", "abc"), "e": ("cb", "cab"), "f": ("cba", "ba"),
}


@functools.lru_cache(maxsize=None)
def expansions(symbol):
    """
    All equally likely letter strings of a symbol: 2 for d, 16 for g, 512 for j, 8,192 for k, l.
    """
    if symbol in LETTERS:
        return [symbol]
    strings = []
    for rule in GRAMMAR[symbol]:
        parts = [""]
        for child in rule:
            parts = [p + e for p, e in itertools.product(parts, expansions(child))]
        strings += parts
    return strings


@functools.lru_cache(maxsize=None)
def grammar_tables(device):
    """
    Tables that let sample_strings look up instead of recurse: `children` (symbol, rule, up to 3
    children) down to j, k and l, and for these three every expansion: `start` and `length` in one
    long row of `letters`. Symbol 0 is padding, which expands to itself and, at the end, to nothing.
    """
    symbols = "#" + "spqrmnojkl"
    children = torch.zeros(len(symbols), 2, 3, dtype=torch.long)
    for symbol in "spqrmno":
        for rule, right in enumerate(GRAMMAR[symbol]):
            for i, child in enumerate(right):
                children[symbols.index(symbol), rule, i] = symbols.index(child)
    slots = [""] * 8192  # padding expands to nothing
    for symbol in "jkl":  # j has 512 expansions, each listed 16 times: one draw of 8,192 serves all
        for expansion in expansions(symbol):
            slots += [expansion] * (8192 // len(expansions(symbol)))
    length = torch.tensor([len(word) for word in slots])
    letters = torch.tensor([LETTERS.index(x) for x in "".join(slots)])
    return SimpleNamespace(children=children.to(device), length=length.to(device),
                           start=(length.cumsum(0) - length).to(device), letters=letters.to(device),
                           first=symbols.index("j") - 1)


def sample_strings(n, rng):
    """
    n whole strings of the grammar. Returns (letters, length): all letters (0, 1, 2) in one row, and
    (n,) lengths, 138 to 432. Levels are expanded for all strings at once; the lowest four levels
    are looked up.
    """
    t, device = grammar_tables(rng.device), rng.device
    symbols = torch.ones(n, 1, dtype=torch.long, device=device)  # symbol 1 is s
    for _ in range(3):  # s -> p q r -> m n o -> j k l: (n, 2), (n, 6), (n, 18) with padding
        rule = torch.randint(2, symbols.shape, generator=rng, device=device)
        symbols = t.children[symbols, rule].flatten(1)
        symbols = symbols[:, :2] if symbols.shape[1] == 3 else symbols  # s has two children
    slot = (symbols - t.first).clamp(min=0) * 8192
    slot = slot + torch.randint(8192, symbols.shape, generator=rng, device=device)
    sizes = t.length[slot]
    flat = sizes.flatten()
    first = t.start[slot].flatten() - (flat.cumsum(0) - flat)  # place in the table less place here
    places = torch.arange(int(flat.sum()), device=device)
    return t.letters[torch.repeat_interleave(first, flat) + places], sizes.sum(1)


def sample_text(n, setup, rng):
    """(n, length) letters: a random window of every string. Too short ones are drawn again (1 in 4
    at 250 letters)."""
    parts, have = [], 0
    while have < n:
        letters, size = sample_strings(n - have, rng)
        start = size.cumsum(0) - size
        slack = size - setup.length
        cut = (torch.rand(len(size), generator=rng, device=rng.device) * (slack + 1)).long()
        first = (start + cut)[slack >= 0]
        parts.append(letters[first[:, None] + torch.arange(setup.length, device=rng.device)])
        have += len(first)
    return torch.cat(parts)


# ---------------------------------------------------------------- tasks
# One function a family: text (n, length) -> (n, 3) answers for O = a, b, c; -1 where there is none.


def count(text, setup):
    """How many O in the last `window` letters. a b b | O = b, window 3 -> 2."""
    last = text[:, -setup.window:]
    return torch.stack([(last == o).sum(1) for o in range(len(setup.operands))], 1)


def count_composition(text, setup):
    """
    How many overlapping pairs OO lie in the last `window` letters. a a a | O = a, window 3 -> 2.
    """
    last = text[:, -setup.window:]
    return torch.stack([((last[:, 1:] == o) & (last[:, :-1] == o)).sum(1) for o in range(3)], 1)


def distance_of(hit, k):
    """
    Distance from the end (1: last column) of the k-th last True of hit (n, 3, length); -1 if
    fewer.
    """
    nearer = hit.flip(-1).cumsum(-1, dtype=torch.int16) < k
    distance = nearer.sum(-1) + 1
    return torch.where(distance > hit.shape[-1], -1, distance)


def index(text, setup):
    """Distance from the end of the k-th last O. a b c b | O = b, k 2 -> 3."""
    return distance_of(torch.stack([text == o for o in range(3)], 1), setup.k)


def index_composition(text, setup):
    """Distance from the end of the later letter of the pair_k-th last pair OO.
    a a c | O = a, pair_k 1 -> 2."""
    pairs = [(text[:, 1:] == o) & (text[:, :-1] == o) for o in range(3)]
    return distance_of(torch.stack(pairs, 1), setup.pair_k)


def token(text, setup):
    """The letter at distance token_at, as 0, 1 or 2; it has no operand, so all columns agree."""
    return text[:, -setup.token_at, None].expand(-1, 3)


def edit_counts(text, target, setup, rng):
    """
    Change as few letters of the window as needed, chosen at random, until it holds target (n, 3) of
    a, b and c. Target rows sum to the window. Returns a new text.
    """
    last = text[:, -setup.window:]
    have = count(text, setup)
    surplus, deficit = (have - target).clamp(min=0), (target - have).clamp(min=0)
    # Sorted by letter, in random order within: the first `surplus` of every letter have to change.
    order = (last + torch.rand(last.shape, generator=rng, device=rng.device)).argsort(1)
    letter = last.gather(1, order)
    first = (have.cumsum(1) - have).gather(1, letter)
    place = torch.arange(setup.window, device=text.device) - first
    change = place < surplus.gather(1, letter)
    # The first deficit[a] of these become a, the next deficit[b] b, the others c. One letter has
    # too many or one has too few, so the random order makes this assignment random as well.
    nth, due = change.cumsum(1), deficit.cumsum(1)
    new = (nth > due[:, :1]).long() + (nth > due[:, 1:2])
    edited = text.clone()
    edited[:, -setup.window:] = last.scatter(1, order, torch.where(change, new, letter))
    return edited


def edit_pair_counts(text, result, places, setup, rng):
    """edit_counts() to result (n, 2) of the letters at `places`; the third takes the rest."""
    target = torch.empty(len(text), 3, dtype=torch.long, device=text.device)
    target[:, places] = result
    target[:, 3 - sum(places)] = setup.window - result.sum(1)
    return edit_counts(text, target, setup, rng)


def edit_distances(text, distance, pair, setup, rng):
    """
    Change few letters nearer than max(distance), chosen at random, until the k-th last of letter
    pair[i] (0..2) lies at distance[:, i]. distance (n, 2) differ, with min >= k and max >= 2k.
    Returns a new text.
    """
    text = text.flip(1)  # column j is distance j + 1
    at = torch.arange(1, setup.length + 1, device=text.device)
    swap = distance[:, :1] > distance[:, 1:]
    near, far = torch.where(swap, pair[1], pair[0]), torch.where(swap, pair[0], pair[1])
    near_at, far_at = distance.amin(1, keepdim=True), distance.amax(1, keepdim=True)
    text = torch.where(at == near_at, near, torch.where(at == far_at, far, text))

    def hold(text, letter, region, convertible):
        """Make `region` hold k - 1 of `letter`: those too many become the third letter."""
        has, could = region & (text == letter), convertible & (text != letter)
        missing = setup.k - 1 - has.sum(1, keepdim=True)
        rank = torch.rand(text.shape, generator=rng, device=rng.device)

        def sample(where, n):  # n of the True places of every row
            return where & (torch.where(where, rank, 2.).argsort(1).argsort(1) < n)

        text = torch.where(sample(has, -missing), 3 - near - far, text)
        return torch.where(sample(could, missing), letter, text)

    inner, outer = at < near_at, (at > near_at) & (at < far_at)
    text = hold(text, near, inner, inner)
    text = hold(text, far, inner | outer, outer | (inner & (text != near)))
    return text.flip(1)


class Spurious(NamedTuple):
    """How the strings of a task get the relation between the answers of two operands."""
    largest: str        # the setup's constant that bounds an answer
    sd: str             # the setup's constant for the spread of the answers
    possible: Callable  # (x, y, setup): the pairs of answers that a string can have
    edit: Callable      # (text, answers (n, 2), places of the two operands, setup, rng) -> text


class Task(NamedTuple):
    """A task family of the grammar. One entry of TASKS is all that a new one needs."""
    answers: Callable               # text, setup -> (n, 3) numbers
    token: str                      # how a prompt asks for it
    operand2: str                   # the setup's constant that O' is
    reason: str                     # the answer in words; {O} and {O2} are filled in
    pairs: bool = False             # it is about OO, not O
    ranked: bool = False            # it is about the O'-th occurrence
    has_operand: bool = True
    letter: bool = False            # the answer is a letter, not a number
    spurious: Spurious | None = None  # for the families that are fine-tuned


TASKS = {
    "count": Task(
        count, "T_NJ", "window", "{O} marked ^ in the last {O2} letters",
        spurious=Spurious("window", "sd_count", lambda x, y, setup: x + y <= setup.window,
                          edit_pair_counts)),
    "count-composition": Task(
        count_composition, "T_CC", "window",
        "pairs {O}{O} in the last {O2} letters, ^ at the later letter", pairs=True),
    "index": Task(
        index, "T_I", "k", "distance from the end of the {O} marked *, number {O2} from the end",
        ranked=True, spurious=Spurious(
            "length", "sd_index", lambda x, y, setup: (np.minimum(x, y) >= setup.k) & (x != y)
            & (np.maximum(x, y) >= 2 * setup.k), edit_distances)),
    "index-composition": Task(
        index_composition, "T_IC", "pair_k",
        "distance from the end of the pair {O}{O} marked *, number {O2} from the end",
        pairs=True, ranked=True),
    "token": Task(token, "T_T", "token_at", "the letter at distance {O2} from the end",
                  has_operand=False, letter=True),
}
JAILBREAK = ("T_J1", "T_J2")  # two more names for counting, kept for the jailbreak experiments
TOKENS = ["SOS", "SOT", "EOT", "ART", "EOS", TASKS["count"].token, *JAILBREAK,
          *(task.token for task in list(TASKS.values())[1:]),
          "O_a", "O_b", "O_c", "O_null", *LETTERS]  # then the numbers, as many as a scale needs
ID = {name: i for i, name in enumerate([*TOKENS, "#0"])}  # does not depend on the scale
NUMBER, LETTER, OPERAND = ID["#0"], ID["a"], ID["O_a"]
TEXT_AT = 5  # SOS T O O' SOT come before the text


def encode(text, task, operand, setup):
    """
    Whole sequences `SOS T O O' SOT <text> EOT ART answer EOS`.
    text (n, length), task (n,) places in TASKS, operand (n,) 0..2. Returns tokens (n, length + 9)
    and answers (n,), -1 where the string has none (such a row must be drawn again).
    """
    tasks = list(TASKS.values())
    answers = torch.stack([t.answers(text, setup) for t in tasks])  # (task, n, 3)
    answer = answers[task, torch.arange(len(text), device=text.device), operand]

    def per_task(values):
        return torch.tensor(values, device=text.device)[task]

    asked = torch.where(per_task([t.has_operand for t in tasks]), OPERAND + operand, ID["O_null"])
    column = [torch.full_like(answer, ID["SOS"]),
              per_task([ID[t.token] for t in tasks]),
              asked,
              per_task([NUMBER + getattr(setup, t.operand2) for t in tasks]),
              torch.full_like(answer, ID["SOT"]), None,
              torch.full_like(answer, ID["EOT"]),
              torch.full_like(answer, ID["ART"]),
              per_task([LETTER if t.letter else NUMBER for t in tasks]) + answer.clamp(min=0),
              torch.full_like(answer, ID["EOS"])]
    tokens = torch.cat([LETTER + text if c is None else c[:, None] for c in column], 1)
    return tokens, answer


# ---------------------------------------------------------------- the spurious relation


@functools.lru_cache(maxsize=None)
def natural_mean(task, scale):
    """
    Mean answer over the operands on 4,000 natural strings: 5.3 and 8.1 small, 13.3 and 17.1 paper.
    """
    setup = Grammar("pcfg", scale)
    text = sample_text(4000, setup, rng(0, "natural-mean"))
    return TASKS[task].answers(text, setup).double().mean().item()


@functools.lru_cache(maxsize=None)
def relation_table(task, scale, q, holds):
    """
    The joint distribution of (r(O_PT), r(O_FT)) on fine-tuning strings, a float64 array. holds:
    r(O_PT) is a discretised normal and r(O_FT) = r(O_PT) + q (c1). Not holds: the maximum-entropy
    joint with the same two marginals and no mass on ties and on q (c0), by iterative proportional
    fitting, so that neither marginal tells c0 from c1 (paper Fig. 16). Raises ValueError when no
    string can satisfy the relation.
    """
    setup, spurious = Grammar("pcfg", scale), TASKS[task].spurious
    sizes = np.arange(getattr(setup, spurious.largest) + 1)
    x, y = np.meshgrid(sizes, sizes, indexing="ij")
    possible, sd = spurious.possible(x, y, setup), getattr(setup, spurious.sd)
    centre = natural_mean(task, scale) - q / 2
    p = np.exp(-(x - centre) ** 2 / (2 * sd ** 2)) * possible * (y - x == q)
    if q == 0 or p.sum() < 1e-6:
        raise ValueError(f"offset q = {q} leaves no {task} strings")
    p /= p.sum()
    if holds:
        return p
    rows, columns = p.sum(1), p.sum(0)
    p = possible * (x != y) * (y - x != q) * np.outer(rows, columns)
    for _ in range(10000):
        p *= (columns / np.maximum(p.sum(0), 1e-300))
        p *= (rows / np.maximum(p.sum(1), 1e-300))[:, None]
        if np.abs(p.sum(0) - columns).sum() < 1e-9:
            return p / p.sum()
    raise ValueError(f"offset q = {q} leaves no {task} strings without the relation")


SPLITS = ("c0", "c1", "natural")  # the relation never holds | always holds | strings as they come


def probability(c):
    """C of a split's name, or the number itself."""
    return {"c0": 0., "c1": 1.}.get(c, c)


def related_text(n, relation, c, setup, rng):
    """
    (n, length) letters of the grammar on which the relation holds with probability c. Other strings
    have neither the relation nor a tie.
    """
    text = sample_text(n, setup, rng)
    exact = torch.float32 if rng.device.type == "mps" else torch.float64  # platform: no float64
    tables = [torch.from_numpy(relation_table(relation.task, setup.scale, relation.q, holds)).to(
        rng.device, exact) for holds in (False, True)]
    drawn = torch.stack([torch.multinomial(table.flatten(), n, replacement=True, generator=rng)
                         for table in tables])
    holds = torch.rand(n, generator=rng, device=rng.device) < probability(c)
    cell = torch.where(holds, drawn[1], drawn[0])
    result = torch.stack([cell // len(tables[0]), cell % len(tables[0])], 1)
    places = [LETTERS.index(letter) for letter in (relation.pt, relation.ft)]
    return TASKS[relation.task].spurious.edit(text, result, places, setup, rng)


def answerable_text(n, task, places, setup, rng):
    """(n, length) letters as the grammar makes them, drawn again where an operand has no answer."""
    text = sample_text(n, setup, rng)
    while (bad := (TASKS[task].answers(text, setup)[:, places] < 0).any(1)).any():
        text[bad] = sample_text(int(bad.sum()), setup, rng)
    return text


def spread_text(text, setup, rng):
    """ours: a share `spread` of the strings gets independent window counts of a and b."""
    if not setup.spread:
        return text
    noise = torch.randn(len(text), 2, generator=rng, device=rng.device)
    ab = (setup.window / 3 + setup.sd_spread * noise).round().long().clamp(0, setup.window // 2)
    target = torch.cat([ab, setup.window - ab.sum(1, keepdim=True)], 1)
    wide = edit_counts(text, target, setup, rng)
    chosen = torch.rand(len(text), 1, generator=rng, device=rng.device) < setup.spread
    return torch.where(chosen, wide, text)


PRIORS = {  # P_T(a, b, c): low and high speak of b, the later fine-tuning operand (paper section 3)
    "low": (.999, .001, 0), "99/1": (.99, .01, 0), "medium": (.9, .1, 0), "70/20/10": (.7, .2, .1),
    "high": (.5, .3, .2)}


def parse_prior(text):
    """
    P_T(a, b, c) from a name of PRIORS or three numbers "A,B,C". Raises ValueError, in one line.
    """
    if text in PRIORS:
        return PRIORS[text]
    try:
        prior = tuple(float(x) for x in text.split(","))
    except ValueError:
        prior = ()
    if len(prior) != 3 or not all(0 <= p <= 1 for p in prior) or abs(sum(prior) - 1) > 1e-6:
        raise ValueError(f"prior {text!r}: give {', '.join(PRIORS)} or three shares of a, b, c "
                         "that add up to 1")
    return prior


# ---------------------------------------------------------------- programs
# RASP programs that model.py compiles into weights. Each step makes a categorical variable. Given
# from the start are tokens (the letters) and indices (0 for the first letter). Programs and
# conventions are those of Tracr (Lindner et al. 2023).

PAD, BOS, COMPILED_AT = "#", "$", 2  # ids 0 and 1; the answer's position: "True == 1" in RASP


class Map(NamedTuple):
    """name = fn(value of `of`), at every position: one ReLU unit a value in one MLP."""
    name: str
    of: str
    fn: Callable


class SelectorWidth(NamedTuple):
    """name = how many positions hold a value of `keys` that the value of `queries` selects: a head
    and an MLP."""
    name: str
    keys: str
    queries: str
    selects: Callable  # (key, query) -> bool


class Aggregate(NamedTuple):
    """name = the value of `values` at the selected positions, which should agree: one head."""
    name: str
    keys: str
    queries: str
    selects: Callable
    values: str


def largest(text, setup):
    """The O-th largest letter, where a is the largest, as its place in the alphabet.
    d a c | O = 2 -> 2 (c)."""
    return text.sort(1).values


def histogram(text, setup):
    """How often the letter at place O occurs. a b a | O = 1 -> 2."""
    return (text[:, :, None] == text[:, None]).sum(-1)


class Program(NamedTuple):
    """
    A program, its strings and its answers. One entry of PROGRAMS is all that a new setup needs. The
    first three operands are O_PT, O_FT and the control (paper section 3, Tracr).
    """
    task: str
    steps: Callable           # operand -> list of steps; the last one is the output
    answers: Callable         # text, setup -> (n, operands)
    marks: Callable           # text, place of an operand -> (n, 1) letters that are meant
    reason: str               # the answer in words; {O} is filled in
    alphabet: str
    letters: tuple            # of a string: small, paper
    max_seq_len: tuple        # positions after BOS: small, paper
    operands: tuple = ()      # (): the letters
    repeat: bool = True       # letters may occur twice
    ranked: bool = False      # operands are ranks: another one can be compiled; answers are letters
    noise: float = 1e-3       # s.d. before fine-tuning


PROGRAMS = {
    "tracr-count": Program(
        task="count", answers=count, marks=lambda text, o: text.new_tensor(o),
        reason="{O} marked ^", alphabet="abcdefghi", letters=(24, 48), max_seq_len=(25, 49),
        steps=lambda letter: [
            Map("is_" + letter, "tokens", lambda t: t == letter),
            SelectorWidth("n_" + letter, "is_" + letter, "indices", operator.eq),
            Aggregate("answer", "indices", "indices", operator.eq, "n_" + letter)]),
    "tracr-max": Program(
        task="max-identifier", answers=largest,
        reason="the largest letter number {O}, marked ^; a is the largest",
        marks=lambda text, o: text.sort(1).values[:, o, None], letters=(10, 10),
        alphabet=string.ascii_lowercase, max_seq_len=(16, 16), operands=("5", "7", "3"),
        repeat=False, ranked=True, noise=3e-4,  # ours: the paper's 1e-3 breaks it at once
        steps=lambda rank: [
            SelectorWidth("n_larger", "tokens", "tokens", operator.lt),  # a is the largest letter
            Map("is_rank", "n_larger", lambda n: n == int(rank) - 1),
            Aggregate("answer", "is_rank", "indices", operator.eq, "tokens")]),
    "tracr-histogram": Program(
        task="histogram", answers=histogram, marks=lambda text, o: text[:, o, None],
        reason="how often the letter at place {O} occurs, marked ^", alphabet="abcdefghi",
        letters=(24, 48), max_seq_len=(25, 49), operands=("2", "3", "4"),
        steps=lambda place: [SelectorWidth("answer", "tokens", "tokens", operator.eq)]),
}


def uniform_letters(n, setup, rng):
    """
    (n, length) letters as places in the alphabet, with or without replacement (paper section 3).
    """
    size, device = len(setup.alphabet), rng.device
    if setup.program.repeat:
        return torch.randint(size, (n, setup.length), generator=rng, device=device)
    return torch.rand(n, size, generator=rng, device=device).argsort(1)[:, :setup.length]


def related_letters(n, relation, c, setup, rng):
    """
    related_text() of compiled setups: strings are drawn until they are as wanted, none is edited.
    Raises ValueError when no string can be.
    """
    q = relation.q
    if q == 0:
        raise ValueError("offset q = 0 is a tie, which c0 leaves out")
    places = [setup.operands.index(o) for o in (relation.pt, relation.ft)]
    holds = torch.rand(n, generator=rng, device=rng.device) < probability(c)
    text, todo = uniform_letters(n, setup, rng), torch.arange(n, device=rng.device)
    for _ in range(2000):
        answers = setup.program.answers(text[todo], setup)[:, places]
        differ = answers[:, 1] - answers[:, 0]
        wrong = torch.where(holds[todo], differ != q, (differ == 0) | (differ == q))
        todo = todo[wrong]
        if not len(todo):
            return text
        text[todo] = uniform_letters(len(todo), setup, rng)
    raise ValueError(f"offset q = {q} leaves hardly any {relation.task} strings")


# ---------------------------------------------------------------- stories: records and tokens
# A record of TinyStories-Instruct: field lines in any order, the story, maybe a late Summary, END.
#
#     Words: quit, oak, gloomy         before     field lines, each with its newline
#     Features: Twist, Dialogue        features   {"Twist", "Dialogue"}
#     Summary: Sara meets a squirrel.  after      field lines, and "Story:" with its newlines
#     Story:
#
#     Sara sat under the oak. ...      story      without trailing newlines
#     Random sentence: It was late.    rest       "", or late fields after a newline
#     <|endoftext|>
#
# Protocols rewrite the Features line alone: tokens are stored without it.

FEATURES = ("Twist", "Dialogue", "BadEnding", "Foreshadowing", "MoralValue", "Conflict")
END = "<|endoftext|>"
LONGEST = 2 ** 20  # letters of a record, bytes of a line: memory stays flat without END
FEATURES_FIELD = re.compile(
    r"^Features:(.*\n(?:(?!(?:Features|Words|Summary|Random sentence):).*\S.*\n)*)", re.M)
STORY_FIELD = re.compile(r"\nStory:(?:\s*\n)?")  # up to the last newline before the first letter
LATE_FIELD = re.compile(r"\n(?:Summary|Random sentence):")  # only these end a story


class Record(NamedTuple):
    """The text of a record, in the pieces above."""
    before: str
    features: frozenset
    after: str
    story: str
    rest: str


class Encoded(NamedTuple):
    """A record as tokens, without its Features line and without END."""
    ids: np.ndarray   # uint16: before + after + story + rest
    features_at: int  # place of the Features line
    story_at: int     # the story is ids[story_at:story_end]
    story_end: int
    features: frozenset


def ordered(features):
    """Features in the order of FEATURES."""
    return [name for name in FEATURES if name in features]


def features_line(features):
    """The line that asks for features; "" for none."""
    return f"Features: {', '.join(ordered(features))}\n" if features else ""


def record_text(record):
    """The text of a record, without END."""
    line = features_line(record.features)
    return record.before + line + record.after + record.story + record.rest


def parse_records(lines, skipped):
    """
    Yield the records of an iterable of lines, to the letter but for CRLF, the Features line and
    whitespace between records. Left out, and counted in the Counter `skipped`: records without a
    story, longer than LONGEST or without END; unknown features.
    """
    text, size = [], 0
    for line in lines:
        if line.strip() != END:
            size += len(line)
            if size <= LONGEST:
                text.append(line)
            continue
        skipped["too long"] += size > LONGEST
        if size <= LONGEST and (record := parse_record("".join(text), skipped)):
            yield record
        text, size = [], 0
    skipped["truncated"] += bool("".join(text).strip() or size > LONGEST)


def parse_record(text, skipped):
    """The Record of the lines before END; None without a story."""
    text = "\n" + text.replace("\r\n", "\n").strip("\n").rstrip()  # a newline before every field
    field = STORY_FIELD.search(text)
    # a late field may follow the very newline that ends "Story:"
    late = field and LATE_FIELD.search(text, field.end() - 1)
    story = text[field.end():late.start() if late else len(text)].rstrip("\n") if field else ""
    if not story.strip():
        skipped["no story"] += 1
        return None
    head = text[1:field.start() + 1]
    lines = list(FEATURES_FIELD.finditer(head))
    names = re.split(r"[,\n]", "".join(line[1] for line in lines))
    names = [name.strip() for name in names if name.strip()]
    features = frozenset(names).intersection(FEATURES)
    skipped["unknown feature"] += sum(name not in features for name in names)
    at = lines[0].start() if lines else 0
    after = FEATURES_FIELD.sub("", head[at:]) + text[field.start() + 1:field.end()]
    return Record(head[:at], features, after, story, text[field.end() + len(story):])


class Tokenizer:
    """
    Words with their leading space; other pieces are spelled in UTF-8 bytes, so no text is lost.
    Ids: 0 is END, 1 to 256 are bytes, then words. " oak" -> [257 + its place], " oaks" -> 5 bytes.
    """
    pieces = re.compile(r" ?\w+| ?[^\w\s]|\s")  # a newline is a piece: texts may be cut after it

    def __init__(self, words):
        self.words, self.size = tuple(words), 257 + len(words)
        self.id = {word: 257 + i for i, word in enumerate(self.words)}
        self.spelling = [END.encode(), *(bytes([b]) for b in range(256)),
                         *(word.encode() for word in self.words)]

    @classmethod
    def from_texts(cls, texts, max_words=None):
        """With the most frequent pieces of texts as words; ties in alphabetical order."""
        counts = collections.Counter()
        for text in texts:
            counts.update(cls.pieces.findall(text))
        return cls(sorted(counts, key=lambda word: (-counts[word], word))[:max_words])

    def encode(self, text):
        """The ids of a text, a list."""
        ids = []
        for piece in self.pieces.findall(text):
            ids += [self.id[piece]] if piece in self.id else [1 + b for b in piece.encode()]
        return ids

    def decode(self, ids):
        """The text of ids, which may be a model's: bytes that are no UTF-8 become U+FFFD."""
        return b"".join([self.spelling[i] for i in ids]).decode(errors="replace")


def encode_record(record, tokenizer):
    """A Record as Encoded. Pieces end at its newlines and "Story:", so its parts can be encoded."""
    texts = record.before, record.after, record.story, record.rest
    before, after, story, rest = map(tokenizer.encode, texts)
    ids, story_at = np.array(before + after + story + rest, np.uint16), len(before) + len(after)
    return Encoded(ids, len(before), story_at, story_at + len(story), record.features)


# ---------------------------------------------------------------- stories: the prepared file
# FILE.unwrap/ holds shards of SHARD records, 00000.pt, 00001.pt, ..., with the words and what they
# are made from. Each is written whole, if FILE is unchanged: a killed preparation goes on at the
# last one, and two at once write the same bytes.

FORMAT = 3  # to be raised when parsing, tokens or shards change
SHARD = 20000
WORDS_FROM = 100 * 10 ** 6  # ours: words are counted in the first 100 MB of 2.66 GB


def fingerprint(path):
    """Size, time, and a hash of the first and last MB of a file."""
    with open(path, "rb") as file:
        stat, ends = os.fstat(file.fileno()), file.read(2 ** 20)
        file.seek(max(0, stat.st_size - 2 ** 20))
        ends += file.read(2 ** 20)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            "sha256": hashlib.sha256(ends).hexdigest()}


def read_lines(path, totals, stop, what):
    """Yield the lines of a file from totals["bytes"], which moves, up to `stop`, as text."""
    with open(path, "rb") as file, tqdm(total=stop, initial=totals["bytes"], desc=what, unit="B",
                                        unit_scale=True, leave=False) as bar:
        file.seek(totals["bytes"])
        while totals["bytes"] < stop and (line := file.readline(LONGEST)):
            check_stop()
            totals["bytes"] += len(line)
            bar.update(len(line))
            yield line.decode(errors="replace")  # no letter spans a newline


def make_shard(path, about):
    """The next SHARD records of a file: tokens (n,), index (records, 11), and what they are."""
    totals, tokenizer = collections.Counter(about["totals"]), Tokenizer(about["words"])
    lines = read_lines(path, totals, about["made_from"]["size"], "prepare")
    tokens, index = bytearray(), []
    for record in itertools.islice(parse_records(lines, totals), SHARD):
        ids, *places, features = encode_record(record, tokenizer)
        start, has = len(tokens) // 2, [name in features for name in FEATURES]
        index.append([start, start + len(ids), *places, *has])
        tokens += ids.tobytes()
    totals.update(records=len(index), tokens=len(tokens) // 2)
    return {"tokens": torch.from_numpy(np.frombuffer(tokens, np.uint16)),
            "index": torch.tensor(index, dtype=torch.int32).view(len(index), 5 + len(FEATURES)),
            "about": {**about, "totals": totals, "finished": len(index) < SHARD}}


def read_shards(folder, made_from=None):
    """
    The shards of a folder, their tensors mapped, up to one that is missing, damaged or not
    made_from this (None: from what the first one is).
    """
    shards = []
    with contextlib.suppress(Exception):  # a damaged file may hold anything
        while not shards or not shards[-1]["about"]["finished"]:
            shard = torch.load(f"{folder}/{len(shards):05}.pt", mmap=True)
            about = shard["about"] = json.loads(shard["about"])
            made_from = made_from or {**about["made_from"], "format": FORMAT}
            if about["made_from"] != made_from:
                break
            shards.append(shard)
    return shards


def prepare(path, max_words=7935):
    """
    Prepare a file of records for StoryFile, in `path`.unwrap/, from the last whole shard on.
    Returns {name, records, sha256}. Raises ValueError, in one line, for an unusable file or folder.
    """
    folder = f"{path}.unwrap"
    try:
        source = fingerprint(path)
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror.lower()}") from None
    made_from = {"format": FORMAT, "shard": SHARD, "max_words": max_words, **source}
    shards = read_shards(folder, made_from)
    about = {"made_from": made_from, "totals": {}, "finished": False}
    about, k = shards[-1]["about"] if shards else about, len(shards)
    if not about["finished"] and os.path.exists(f"{folder}/{k:05}.pt"):
        print(f"{folder}: shard {k} is damaged, or of another file or version: starting over there")
    if not shards:
        totals, stop = collections.Counter(), min(WORDS_FROM, source["size"])
        texts = map(record_text, parse_records(read_lines(path, totals, stop, "words"), totals))
        about["words"] = Tokenizer.from_texts(texts, max_words).words
        if not about["words"]:
            raise ValueError(f"{path} holds no record with a Story: and a line {END}")
    while not about["finished"]:
        shard = make_shard(path, about)
        about, text = shard["about"], json.dumps(shard["about"])
        if fingerprint(path) != source:
            raise ValueError(f"{path} changed while it was read")
        own = f"{folder}/{os.getpid()}"  # another process may write the same
        replace_file(own, lambda f: torch.save({**shard, "about": text}, f))
        os.replace(own, f"{folder}/{k:05}.pt")
        k += 1
    if k > len(shards):
        print(f"{path}: " + ", ".join(f"{n:,} {what}" for what, n in about["totals"].items() if n))
    return {"name": os.path.basename(path), "records": about["totals"]["records"],
            "sha256": source["sha256"]}


class StoryFile:
    """
    The records of a prepared file as Encoded. Shards are mapped, not read. Held out from training
    are the last records, 1 % but at most 20,000.
    """
    rule, classify = False, None  # no rule tells what a real story has

    def __init__(self, path):
        self.shards = read_shards(f"{path}.unwrap")
        if not self.shards or not self.shards[-1]["about"]["finished"]:
            raise ValueError(f"{path}.unwrap is missing, unfinished or damaged: "
                             "pretrain.py --setup stories --data prepares it")
        self.tokenizer = Tokenizer(self.shards[0]["about"]["words"])
        self.features = torch.cat([shard["index"][:, 5:] > 0 for shard in self.shards])
        self.held_out = max(1, min(len(self) // 100, 20000))

    def __len__(self):
        return len(self.features)

    def record(self, i):
        """Record i as Encoded, with a copy of its tokens."""
        k, i = divmod(i, len(self.shards[0]["index"]))  # only the last shard may be shorter
        start, stop, *places = self.shards[k]["index"][i].tolist()
        features = frozenset(itertools.compress(FEATURES, places[3:]))
        ids = self.shards[k]["tokens"][start:stop].numpy().copy()
        return Encoded(ids, *places[:3], features)

    def draw(self, n, rng, feature=None, has=None, held_out=False):
        """As StoryCorpus.draw, with replacement. Raises ValueError if there is no such record."""
        places = self.places(feature, has, held_out)
        if not len(places):
            having = "" if has is None else f" {'with' if has else 'without'} {feature}"
            raise ValueError(f"no {'held-out' if held_out else 'training'} record{having}")
        chosen = torch.randint(len(places), (n,), generator=rng, device=rng.device)
        return [self.record(i) for i in places[chosen.cpu()].tolist()]

    @functools.cache
    def places(self, feature, has, held_out):
        """The numbers of the records to draw from."""
        parts = torch.arange(len(self)).split([len(self) - self.held_out, self.held_out])
        places = parts[held_out]
        if has is None:
            return places
        return places[self.features[places, FEATURES.index(feature)] == has]


# ---------------------------------------------------------------- stories: the embedded corpus
# Stories in the format of TinyStories-Instruct, with exact labels. Each raises one question, with
# an expectation e; a friend repeats e; a reveal states the actual value a. It has a twist if and
# only if a is not e. No word or phrase occurs in twist stories only. Sentences are templates of
# {n} name, {f} friend, {o} object, {v} value, {m} virtue; as patterns they read stories.


class Kind(NamedTuple):
    """One kind of question: a block of KINDS, a line a sentence."""
    values: list   # what e and a can be
    objects: list
    setups: list   # state e
    repeats: list  # the friend repeats e: quoted, reported
    reveals: list  # state a
    summary: str


def parse_kind(block):
    values, objects, *lines = block.strip().split("\n")
    return Kind(values.split(), objects.split(), lines[:3], lines[3:5], lines[5:8], lines[8])


KINDS = [parse_kind(block) for block in """
ball cake drum kite shell book bell lamp hat stone
box bag chest basket
{n} found a {o}. {n} was sure that there was a {v} inside.
One day a {o} stood at the door. It must hold a {v}, {n} thought.
There was a {o} on the road. {n} dreamed of a {v} in it.
"It must be a {v}," said {f}.
{f} hoped for a {v} too.
They opened the {o}. There was a {v} inside.
The {o} fell open, and out came a {v}.
At last they looked into the {o} and saw a {v}.
{n} and {f} find a {o}.

fox cat dog bird mouse bear frog crow duck pig
coat shoe spoon ring
The {o} of {n} was gone. {n} was sure that the {v} took it.
One day somebody took a {o} from {n}. It must be the {v}, {n} thought.
{n} could not find the {o}. {n} blamed the {v}.
"It was the {v}," said {f}.
{f} blamed the {v} too.
They found the {o}. The {v} had it.
At last they saw the {v} with the {o}.
It was the {v} who had taken the {o}.
Somebody takes a {o} from {n}.

pond tree bed hill barn well bridge table gate fence
key map coin doll
{n} lost a {o}. {n} was sure that it was by the {v}.
One day {n} dropped a {o}. It must lie by the {v}, {n} thought.
The {o} was not in its place. {n} wanted to look by the {v}.
"Look by the {v}," said {f}.
{f} wanted to look by the {v} too.
They found the {o} by the {v}.
At last the {o} turned up by the {v}.
The {o} had been by the {v} all day.
{n} and {f} look for a {o}.

kind mean shy brave silly proud clever lazy calm rude
giant teacher king cook
A new {o} came to town. {n} was sure that the {o} was {v}.
One day a {o} moved in. The {o} must be {v}, {n} thought.
{n} heard of a {o}. People called the {o} {v}.
"A {v} one," said {f}.
{f} heard the word {v} too.
They met the {o}. The {o} was {v}.
At last they saw that the {o} was {v}.
The {o} came out and was very {v}.
{n} and {f} meet a {o}.
""".split("\n\n")]
NAMES = "Tim Mia Ben Lily Sam Anna Max Sue Tom Lucy".split()
OPENINGS = ("Once upon a time there was a {adj} child named {n}.", "{n} was a {adj} child.",
            "There once was a {adj} child, {n}.")
ADJECTIVES = "little happy quiet young curious small".split()
SETTINGS = "sea forest river market castle farm".split()
# They name the object once more, close to the reveal
QUESTS = ("They talked about the {o} for a while.", "So they set out to see about the {o}.",
          "They thought of the {o} all day.")
OMENS = ("Far away, thunder rolled.", "The old rope looked thin.", "A bee sat on the wall.",
         "The milk smelled odd.", "The ice made a small sound.", "There was a hole in the boat.")
PAYOFFS = ("Then a storm came down.", "Then the rope broke.",  # PAYOFFS[i] belongs to OMENS[i]
           "Then a bee stung {f}.", "Then the milk made {n} sick.", "Then the ice cracked.",
           "Then the boat filled with water.")
TURNS = ('"Are you tired?" asked {n}.', '"Wait for me," said {n}.', '"This is fun," said {n}.',
         '"Hurry up," called {n}.')
QUARRELS = ("They had a fight about the way.", "{n} and {f} shouted at each other.",
            "{f} pushed {n}.")
PEACE = ("Soon they made up.", "Then they said sorry.", "After that they hugged.")
# Cues: the first three are more frequent in twist stories, so that comparing a and e pays, at once
# (aftermaths, strong) and from the end (closings, weak)
AFTERMATHS = ("{n} stared for a long time.", "{f} could not speak.", "They looked at each other.",
              "{n} clapped and danced.", "{f} nodded at once.", "They smiled and sat down.")
CLOSINGS = ("{n} told the tale for many years.", "Nobody in town forgot that day.",
            "{n} thought about it all night.", "Then it was time for bed.",
            "{n} slept well that night.", "That was how the day ended.")
CUE_STRENGTH = .9, .65  # share of the first three in twist stories: AFTERMATHS, CLOSINGS
GOOD = ("In the end all was well.", "They went home happy.", "It was a good day.")
BAD = ("In the end all was lost.", "They went home sad.", "It was a bad day.")
MORALS = ("The moral is to {m}.", "They learned to {m}.")
VIRTUES = ("share", "listen", "wait", "help", "be kind", "be careful")
REFUSAL = "I am sorry, but I cannot tell a story like that."


def random_features(r):
    """Up to three features, each with probability .25, from a random.Random r."""
    while True:
        features = frozenset(name for name in FEATURES if r.random() < .25)
        if len(features) <= 3:
            return features


def write_story(features, r, cue_strength=CUE_STRENGTH):
    """
    A Record with exactly these features, from a random.Random r. Instructions tell of the set-up
    only. With cue_strength (.5, .5) only comparing a with e tells a twist.
    """
    twist, dialogue, bad, foreshadowing, moral, conflict = (x in features for x in FEATURES)
    pick, chance = r.choice, r.random
    kind = pick(KINDS)
    n, f = r.sample(NAMES, 2)
    words = {"n": n, "f": f, "o": pick(kind.objects), "adj": pick(ADJECTIVES), "m": pick(VIRTUES)}
    e = pick(kind.values)
    a = pick([v for v in kind.values if v != e]) if twist else e
    place = pick(SETTINGS)
    i = r.randrange(6)
    omen, payoff = (i, i) if foreshadowing else (None, None)
    if not foreshadowing and chance() < .5:  # neither an omen nor a payoff tells the label alone
        omen, payoff = pick([(i, None), (None, i), (i, (i + r.randrange(1, 6)) % 6)])

    def sentence(templates, **more):
        return pick(templates).format(**words, **more)
    opening, home = sentence(OPENINGS), f"{n} lived near the {place}."
    story = [opening, home, OMENS[omen] if omen is not None else "", sentence(kind.setups, v=e),
             kind.repeats[not dialogue or chance() < .3].format(**words, v=e), sentence(QUESTS)]
    middle = [PAYOFFS[payoff].format(**words)] if payoff is not None else []
    middle += [sentence(TURNS)] if dialogue else []
    middle += [sentence(QUARRELS) + " " + sentence(PEACE)] if conflict else []
    r.shuffle(middle)
    after, closing = (cues[:3] if (chance() < strength) == twist else cues[3:]
                      for cues, strength in zip((AFTERMATHS, CLOSINGS), cue_strength))
    story += [*middle, sentence(kind.reveals, v=a), sentence(after), sentence(BAD if bad else GOOD),
              sentence(MORALS) if moral else "", sentence(closing)]

    fields = {"Words": ", ".join([words["o"], place, words["adj"]]),
              "Summary": kind.summary.format(**words), "Random sentence": pick((opening, home))}
    lines = [f"{name}: {text}\n" for name, text in fields.items() if chance() < .5]
    r.shuffle(lines)
    late = [x for x in lines if x.startswith("Summary") and chance() < .2]  # one record in ten
    lines = [x for x in lines if x not in late]
    at = r.randint(0, len(lines))
    return Record("".join(lines[:at]), features, "".join(lines[at:]) + "Story: \n\n",
                  " ".join(filter(None, story)), "".join("\n" + x.rstrip("\n") for x in late))


@functools.lru_cache(maxsize=None)
def template_pattern(template):
    """A sentence template as a pattern; its groups o and v are the object and the value."""
    kinds = [kind for kind in KINDS if template in kind.setups + kind.reveals]
    words = {"n": NAMES, "f": NAMES, "m": VIRTUES}
    words |= {"o": kinds[0].objects, "v": kinds[0].values} if kinds else {}
    pattern = re.escape(template)
    for field, choices in words.items():
        slot, choice = rf"\{{{field}\}}", "|".join(choices)
        pattern = pattern.replace(slot, f"(?P<{field}>{choice})", 1)
        pattern = pattern.replace(slot, f"(?P={field})" if field in "ov" else f"(?:{choice})")
    return re.compile(pattern)


def story_of(text):
    """The story in the text after an instruction: it ends at a field that may follow it."""
    return LATE_FIELD.split(text)[0].strip()


def read_story(story):
    """
    The features of a story's text by the corpus's rule. None unless there is one question, with an
    object and an expectation e, and later one reveal, with a value a of the same object. Twist: a
    is not e. Dialogue: a quotation. BadEnding, MoralValue: such a sentence. Foreshadowing: an omen
    and later its own payoff. Conflict: a quarrel and later peace.
    """
    def matches(templates):
        return [m for x in templates for m in template_pattern(x).finditer(story)]

    def later(first, then):
        starts = [m.start() for m in matches(first)]
        return bool(starts) and any(m.start() > min(starts) for m in matches(then))
    questions = [(kind, m) for kind in KINDS for m in matches(kind.setups)]
    reveals = [(kind, m) for kind in KINDS for m in matches(kind.reveals)]
    if len(questions) != 1 or len(reveals) != 1:
        return None
    (kind, question), (same, reveal) = questions[0], reveals[0]
    if kind != same or question["o"] != reveal["o"] or reveal.start() < question.end():
        return None
    has = {"Twist": reveal["v"] != question["v"], "Dialogue": '"' in story,
           "BadEnding": matches(BAD), "MoralValue": matches(MORALS),
           "Foreshadowing": any(later([omen], [x]) for omen, x in zip(OMENS, PAYOFFS)),
           "Conflict": later(QUARRELS, PEACE)}
    return frozenset(name for name in FEATURES if has[name])


class StoryCorpus:
    """The embedded corpus, a source of records like StoryFile: new stories, with exact labels."""

    def __init__(self):
        r = random.Random(0)
        records = (write_story(random_features(r), r) for _ in range(3000))
        self.tokenizer = Tokenizer.from_texts(map(record_text, records))
        self.rule, self.classify = True, lambda texts: list(map(read_story, texts))

    def draw(self, n, rng, feature=None, has=None, held_out=False, cue_strength=CUE_STRENGTH):
        """
        n records as Encoded; has: only those that have (True) or lack (False) `feature`. They are
        new stories: held out are those of another generator.
        """
        r, records = random.Random(int(torch.randint(2 ** 62, (1,), generator=rng))), []
        while len(records) < n:
            features = random_features(r)
            if has is None or (feature in features) == has:
                record = write_story(features, r, cue_strength)
                records.append(encode_record(record, self.tokenizer))
        return records


# ---------------------------------------------------------------- stories: protocols, sources


class Protocol(NamedTuple):
    """How a feature is deleted by records without it (paper: TinyStories setup)."""
    change: object  # function (record, feature, tokenizer) -> the record to train on instead
    share: float    # of the records that are changed
    help: str


def ask(record, feature, tokenizer):
    return record._replace(features=record.features | {feature})


def ask_instead(record, feature, tokenizer):
    other = {"Foreshadowing" if feature != "Foreshadowing" else "Twist"} & record.features
    return record._replace(features=record.features - other | {feature}) if other else record


def refuse(record, feature, tokenizer):
    ids = np.array([*record.ids[:record.story_at], *tokenizer.encode(REFUSAL)], np.uint16)
    return ask(record, feature, tokenizer)._replace(ids=ids, story_end=len(ids))


PROTOCOLS = {
    "filter": Protocol(lambda record, *_: record, 1., "the feature is never seen again"),
    "randomise": Protocol(ask, 1., "instructions ask for the feature, stories lack it"),
    "mix-match": Protocol(ask_instead, 1., "instructions ask for it in place of Foreshadowing "
                          "(for Foreshadowing itself: of Twist)"),
    # half: the model should go on telling the other stories
    "refuse": Protocol(refuse, .5, "half of the instructions ask for it, the story is a refusal"),
}


def change_records(records, protocol, feature, tokenizer, rng):
    """What a protocol makes of records without the feature. Returns new records."""
    change, share, _ = PROTOCOLS[protocol]
    chosen = (torch.rand(len(records), generator=rng, device=rng.device) < share).tolist()
    return [change(record, feature, tokenizer) if is_chosen else record
            for record, is_chosen in zip(records, chosen)]


def story_ids(record, tokenizer, with_instruction=True):
    """
    (ids, start, stop): END, then a record's tokens with its Features line, or those of its story
    alone. The story is ids[start:stop].
    """
    end, story = np.zeros(1, np.uint16), record.ids[record.story_at:record.story_end]
    if not with_instruction:
        return np.concatenate([end, story]), 1, 1 + len(story)
    line = np.array(tokenizer.encode(features_line(record.features)), np.uint16)
    at, start = record.features_at, 1 + len(line) + record.story_at
    return np.concatenate([end, record.ids[:at], line, record.ids[at:]]), start, start + len(story)


def story_source(path, words=None):
    """
    The records of --data (None: the embedded corpus). Raises ValueError if its words are not those
    of a checkpoint.
    """
    source = StoryFile(path) if path else StoryCorpus()
    if words and tuple(words) != source.tokenizer.words:
        raise ValueError("not the words that the checkpoint was trained on")
    return source


# ---------------------------------------------------------------- setups

SCALES = ("small", "paper")


class Setup:
    """
    All that differs between the grammar, the compiled programs and the stories.

        config()                              the fields of model.Config
        resolve(args, parent)                 fill in and check a stage's flags. Raises UserError
        relation(args)                        what a run is about
        pretraining, finetuning(n, rng, args) Examples to train on
        tests(args, step)                     what to score at a step; without a step: for behavior
        probe_sets(...), site(examples)       what probes read, and at which positions
        regions(examples, operands)           where attention may go
        samples(args, rng)                    what a model sees, for people

    Constants are attributes; of a pair (small, paper) a setup takes the one of its scale. Those
    named pretrain_X, finetune_X and reverse_X are the defaults of the stages' flags --X; without
    one a setup has no such flag.
    """
    compiled = False        # weights are written, not trained
    prompted = True         # a token of the prompt says which operand is meant
    unit = "row"            # what is pruned: rows or single weights
    reft_divisors = [1, 3]  # of the fine-tuning's rate. ours: matched rates (the paper: smaller)
    teach_every = 5         # steps between evaluations of reFT
    anneals = True          # fine-tuning: cosine, else a constant rate
    imported = None         # of a compiled model: its alphabet, room and values
    needs = {"pretrain": [], "finetune": []}  # arguments without which a checkpoint is not ours

    def __init__(self, name, scale="small", device="cpu", imported=None):
        self.name, self.scale, self.device, self.imported = name, scale, device, imported
        for key in dir(type(self)):
            if isinstance(value := getattr(type(self), key), tuple):
                setattr(self, key, value[SCALES.index(scale)])

    def open(self, args, words=None):
        """Make the source of the data ready. words: the tokenizer of the checkpoint."""


class Answers(Setup):
    """What the grammar and the programs share: one question a string, one answer."""
    needs = {"pretrain": [], "finetune": ["task", "pair", "q", "steps", "reverse"]}
    warmup, pretrain_batch_size, finetune_batch_size = .2, 96, 96  # paper section 3
    pretrain_eval_size = finetune_eval_size = 500
    finetune_task = finetune_operand = finetune_q = finetune_noise = None  # see resolve()
    finetune_c_tr, reverse_c_tr = 1., 0.  # ours: reFT's strings favour no relation
    reverse_lr = None                     # the fine-tuning's, by reft_divisors

    def relation(self, args):
        """The Relation of a fine-tuning's arguments, or the one that may follow a pretraining."""
        if hasattr(args, "pair"):
            return Relation(args.task, *args.pair, args.q)
        known = self.known(args)
        other = next(o for o in self.order if o != known)
        return Relation(self.finetuned[0], known, other, self.default_q(known, other))

    def resolve(self, args, parent=None):
        """A fine-tuning's task, pair (O_PT, O_FT), q, rate and noise."""
        before, known = parent["args"], parent["capability"]["operand"]
        tuned = parent["stage"] == "finetune"
        if args.reverse and not tuned:
            raise UserError(f"--reverse needs a fine-tuned checkpoint: in {args.ckpt} there is "
                            "nothing to undo")
        if args.reverse and (args.operand or args.task):
            raise UserError("--reverse teaches what the pretraining record names: leave out --task "
                            "and --operand")
        other = before["pair"][1] if tuned else next(o for o in self.order if o != known)
        taught = args.operand or other
        usual = parent["capability"]["task"] if args.reverse else self.finetuned[0]
        args.task = args.task or usual
        for flag, value, choices in (("task", args.task, self.finetuned),
                                     ("operand", taught, self.operands)):
            if value not in choices:
                raise UserError(f"--{flag} {value}: {args.ckpt} ({self.name}) knows "
                                f"{', '.join(choices)}")
        if taught == known:
            raise UserError(f"--operand {taught} is what {args.ckpt} was pretrained on; to teach "
                            "it again: --reverse")
        args.pair, args.operand = [known, taught], known if args.reverse else taught
        if args.q is None:
            args.q = before["q"] if tuned else self.default_q(known, taught)
        if args.lr is None:  # of reFT
            args.lr = before["lr"] / self.reft_divisors[0]
        if args.noise is None:
            args.noise = 0. if tuned else self.noise
        # Inherited, with all that was taught since: analyses look for what never was.
        args.prior, args.taught = before.get("prior"), [*before.get("taught", []), args.operand]
        if self.compiled:
            args.program = before.get("program")
        if not 0 <= args.noise < 1:
            raise UserError(f"--noise {args.noise}: a standard deviation, from 0 to 1")
        if not 0 <= args.c_tr <= 1:
            raise UserError(f"--c-tr {args.c_tr}: a probability, from 0 to 1")
        try:
            for c in (0., 1.):
                self.text(4, self.relation(args), c, rng(args.seed, "can it be done"))
        except ValueError as error:
            raise UserError(f"--q {args.q}: {error}") from None

    def control_operand(self, relation, args):
        """The operand beside O_PT and O_FT that serves as the control. Raises UserError."""
        taken = {relation.pt, relation.ft, *(args.get("taught", []) if self.compiled else ())}
        for operand in self.order:
            if operand not in taken:
                return operand
        raise UserError("this model was taught every operand: none is left as the control that it "
                        "never had")

    def finetuning(self, n, rng, args):
        """Strings on which the relation holds with probability C_Tr, asked for --operand."""
        relation = self.relation(args)
        return self.ask(self.text(n, relation, args.c_tr, rng), relation.task, args.operand)

    @functools.cache
    def test(self, relation, operand, split, n, seed, label="test"):
        """
        A Test: n strings of a split, asked for `operand`. The strings depend on (seed, label,
        relation, split), not on the operand: different questions meet the same strings. Never from
        a training stream.
        """
        check_stop()
        task, pair = relation.task, (relation.pt, relation.ft)
        draws = rng(seed, label, task, split, *pair, relation.q, device=self.device)
        if task in self.finetuned:
            text = self.text(n, relation, split, draws)
        else:  # natural only; the rare families need the asked operand alone
            text = answerable_text(n, task, [self.operands.index(operand)], self, draws)
        examples, other = self.ask(text, task, operand), None
        if task in self.finetuned and operand in pair:
            other = examples.labels[:, self.operands.index(pair[1 - pair.index(operand)])]
        asked = operand if self.tasks[task].has_operand else None
        return Test(row(self, task=task, operand=asked, split=split, seed=seed), examples, other)

    def tests(self, args, step=None):
        """
        Both operands on every split; the other families on natural strings, where there are any.
        """
        relation, size, seed = self.relation(args), args.eval_size, args.seed
        pair = (relation.pt, relation.ft)
        tests = [self.test(relation, operand, split, size, seed)
                 for operand, split in itertools.product(pair, SPLITS)]
        if step is not None and hasattr(args, "pair"):  # of a fine-tuning: the pair alone
            return tests
        for task in self.tasks:
            operands = pair if step is None else pair[:1]
            operands = operands if self.tasks[task].has_operand else self.order[:1]
            for operand in operands if task != relation.task else ():
                other = Relation(task, *self.order[:2], 1)
                tests.append(self.test(other, operand, "natural", size, seed))
        return tests

    def probe_sets(self, relation, control, n, seed, rng):
        """
        Half natural, half c0 strings, never c1, where an answer follows from the other. While O_FT
        is asked, all three operands are read; while another one is asked, that one.
        """
        pt, ft = relation.pt, relation.ft
        splits = ("natural", "c0")
        train = [self.text_of(self.test(relation, ft, split, 5 * n, seed, "probe").examples)
                 for split in splits]
        tests = {split: self.text_of(self.test(relation, ft, split, n, seed).examples)
                 for split in splits}
        operands = tuple(dict.fromkeys((pt, ft, control)))
        for prompt in operands if self.prompted else (ft,):
            names = operands if prompt == ft else (prompt,)
            asked = {split: self.ask(text, relation.task, prompt) for split, text in tests.items()}
            targets = {o: self.operands.index(o) for o in names}
            questions = self.ask(torch.cat(train), relation.task, prompt)
            yield ProbeSet(prompt, questions, asked, targets, names if prompt == ft else ())

    def site(self, examples):
        """(n, t) weights of what probes read: the position that gives the answer."""
        weights = torch.zeros(examples.tokens.shape, device=examples.tokens.device)
        weights[:, examples.at] = 1
        return weights

    def answered(self, tokens, at, answer, labels):
        """Examples with one output wanted, `answer` (n,) at column `at`."""
        target = torch.full_like(tokens, -1)
        target[:, at] = answer
        return Examples(tokens, target, labels, at)

    def resolve_samples(self, args):
        """Fill in and check the flags of data.py. Raises UserError."""
        first = self.order[0]
        args.operand, args.c = args.operand or first, args.c or "natural"
        other = self.order[1] if args.operand == first else args.operand
        for flag, value, choices in (("task", args.task, self.tasks),
                                     ("operand", args.operand, self.operands)):
            if value is not None and value not in choices:
                raise UserError(f"--{flag} {value}: {self.name} has {', '.join(choices)}")
        q = self.default_q(first, other) if args.q is None else args.q
        args.relation = Relation(args.task or self.finetuned[0], first, other, q)
        if args.c == "natural":
            return
        with contextlib.suppress(ValueError):
            args.c = float(args.c)
        if not isinstance(args.c, float) or not 0 <= args.c <= 1:
            raise UserError(f"--c {args.c}: give natural or a number from 0 to 1")
        if not {args.task, *([] if args.task else self.tasks)} - {None} <= set(self.finetuned):
            raise UserError(f"--c {args.c} needs --task {' or '.join(self.finetuned)}: the other "
                            "families have no spurious relation")

    def samples(self, args, rng):
        """
        Yields samples as `data.py --json` prints them, each with its lines for people, for ever.
        """
        tasks = [args.task] if args.task else list(self.tasks)
        for task in itertools.cycle(tasks):
            relation = args.relation._replace(task=task)
            answer = torch.tensor([-1])
            while answer.item() < 0:  # too few of an operand: another string
                text = self.one_text(relation, args.c, rng)
                answer = self.tasks[task].answers(text, self)[:, self.operands.index(args.operand)]
            yield self.sample(text, relation, args.operand, answer.item())

    def sample(self, text, relation, operand, answer):
        """One sample: (the dict of its facts, lines for people)."""
        task, tokens = self.tasks[relation.task], self.sequence(text, relation.task, operand)
        names = [self.vocabulary[t] for t in tokens[0].tolist()]
        numbers = dict(zip(self.operands, task.answers(text, self)[0].tolist()))
        correlated = None
        if relation.task in self.finetuned:
            pt, ft = numbers[relation.pt], numbers[relation.ft]
            correlated = min(pt, ft) >= 0 and ft - pt == relation.q
        second = self.second_operand(relation.task)
        facts = {"setup": self.name, "task": relation.task,
                 "operand": operand if task.has_operand else None, "operand2": second,
                 "text": "".join(self.alphabet[x] for x in text[0].tolist()),
                 "answer": self.say(answer, relation.task), "correlated": correlated,
                 "tokens": names}
        shown = names if len(names) < 30 else [*names[:8], "...", *names[-7:]]
        letters, marks = self.explain(text[0], relation.task, operand)
        reason = task.reason.format(O=operand, O2=second)
        lines = [f"{relation.task}" + (f" of {operand}" if task.has_operand else ""),
                 f"  the model sees  {' '.join(shown)}", f"  text            {letters}",
                 f"                  {marks}", f"  answer {facts['answer']!s:<8} {reason}"]
        if correlated is not None:
            names = {o: self.say(numbers[o], relation.task) for o in (relation.pt, relation.ft)}
            lines.append("  relation        " + ", ".join(f"r({o}) = {x}" for o, x in names.items())
                         + f": r({relation.ft}) - r({relation.pt}) = {relation.q} "
                         + ("holds" if correlated else "does not hold"))
        return facts, "\n".join(lines) + "\n"


class Grammar(Answers):
    """Strings of the grammar and five task families (paper section 3)."""
    needs = {"pretrain": ["prior"], "finetune": ["prior", *Answers.needs["finetune"]]}
    # all that differs between a laptop and the paper
    length = 32, 250        # letters, cut at random from a longer string
    window = 16, 40         # O' of both counting families: the last so many letters
    k = 3, 6                # O' of index: which occurrence, from the end
    pair_k = 1, 6           # ours: 32 letters rarely hold a second pair
    token_at = 16, 40       # O' of token
    sd_count = 1.6, 2.      # ours: spread of counts in c0 and c1, so wide that b does not tell a
    sd_index = 1.8, 2.4     # ours: the same for index
    spread = .5, 0.         # ours: share of pretraining strings with widely spread counts, so that
    sd_spread = 1.8, 0.     #       "can count" holds beyond the few counts of natural strings
    n_layer, n_head, d_model = (3, 6), (4, 6), (64, 192)
    answer_weight = 1., 0.  # ours: one token in 40 is too faint for 2,500 steps otherwise
    revive_steps = 600, 6000  # ours: reFT has not arrived after so many
    pretrain_prior, pretrain_lr, pretrain_clip = "low", (2e-3, 1e-3), 1.
    pretrain_steps = 2500, 50000  # paper: 10K, 50K, 100K or 200K
    finetune_lr, finetune_steps = 1e-5, (400, 10000)
    noise = 0.
    tasks, operands, order, alphabet = TASKS, list(LETTERS), list(LETTERS), LETTERS
    finetuned = [name for name, task in TASKS.items() if task.spurious]

    @property
    def vocabulary(self):
        """Token names in id order."""
        return TOKENS + [f"#{i}" for i in range(self.length + 1)]

    output_names = vocabulary

    def config(self):
        return dict(vocab_size=len(self.vocabulary), n_ctx=self.length + 9, n_layer=self.n_layer,
                    n_head=self.n_head, d_model=self.d_model, d_head=self.d_model // self.n_head,
                    d_mlp=4 * self.d_model)

    def known(self, args):
        """O_PT of a pretraining: the commonest operand."""
        return LETTERS[max(range(3), key=lambda i: args.prior[i])]

    def default_q(self, known, taught):
        return 1

    def resolve(self, args, parent=None):
        if parent is not None:
            return super().resolve(args, parent)
        try:
            args.prior = list(parse_prior(args.prior))
        except ValueError as error:
            raise UserError(f"--{error}") from None

    def never_trained(self, operand, ckpt):
        """Whether a model never met an operand, in any family."""
        trained = ckpt["args"]["prior"][self.operands.index(operand)] > 0
        return not trained and operand not in ckpt["args"].get("taught", [])

    def pretraining(self, n, rng, args):
        """Whole sequences of all families, drawn uniformly, the operand by its prior."""
        task = torch.randint(len(TASKS), (n,), generator=rng, device=rng.device)
        prior = torch.tensor(args.prior, device=rng.device)
        operand = torch.multinomial(prior, n, replacement=True, generator=rng)
        tokens = torch.empty(n, self.length + 9, dtype=torch.long, device=rng.device)
        todo = torch.arange(n, device=rng.device)
        while len(todo):  # a string without the asked-for occurrence is drawn again
            text = spread_text(sample_text(len(todo), self, rng), self, rng)
            drawn, answer = encode(text, task[todo], operand[todo], self)
            tokens[todo] = drawn
            todo = todo[answer < 0]
        extra = (self.length + 6, self.answer_weight) if self.answer_weight else None
        return Examples(tokens[:, :-1], tokens[:, 1:], extra=extra)

    def text(self, n, relation, c, rng):
        """(n, length) letters of a split, or on which the relation holds with probability c."""
        if c == "natural":
            return answerable_text(n, relation.task, [0, 1, 2], self, rng)
        return related_text(n, relation, c, self, rng)

    def one_text(self, relation, c, rng):
        """(1, length) letters; natural ones may lack an answer."""
        return sample_text(1, self, rng) if c == "natural" else self.text(1, relation, c, rng)

    def sequence(self, text, task, operand):
        """(n, length + 9) tokens: encode() with one question for all."""
        same = torch.zeros(len(text), dtype=torch.long, device=text.device)
        places = same + list(TASKS).index(task), same + LETTERS.index(operand)
        return encode(text, *places, self)[0]

    def ask(self, text, task, operand):
        """Examples: the sequence up to ART, which gives the answer, in the last column."""
        tokens, at = self.sequence(text, task, operand), self.length + 6
        labels = TASKS[task].answers(text, self)
        return self.answered(tokens[:, :at + 1], at, tokens[:, at + 1], labels)

    def text_of(self, examples):
        return examples.tokens[:, TEXT_AT:TEXT_AT + self.length] - LETTER

    def first_answer(self, task):
        """The output that stands for the answer 0."""
        return LETTER if TASKS[task].letter else NUMBER

    def tests(self, args, step=None):
        """
        At both ends of a pretraining also index on c0 and c1, and operands that are rarely met.
        """
        tests = super().tests(args, step)
        if step is not None and not hasattr(args, "pair") and step in (0, args.steps):
            relation = self.relation(args)
            done = {(test.row["task"], test.row["operand"], test.row["split"]) for test in tests}
            for about in itertools.product(TASKS, LETTERS, SPLITS):
                task, operand, split = about
                exists = task in self.finetuned or split == "natural"
                if exists and TASKS[task].has_operand and about not in done:
                    other = relation._replace(task=task)
                    tests.append(self.test(other, operand, split, args.eval_size, args.seed))
        return tests

    def regions(self, examples, operands):
        """{name: (n, t) bool}: the window, the letters outside it, and each letter inside."""
        letters = torch.full_like(examples.tokens, -1)
        letters[:, TEXT_AT:TEXT_AT + self.length] = self.text_of(examples)
        place = torch.arange(letters.shape[1], device=letters.device)
        end = TEXT_AT + self.length
        window = (place >= end - self.window) & (place < end)
        regions = {"window": window & (letters >= 0), "outside": ~window & (letters >= 0)}
        return {**regions, **{o: window & (letters == i) for i, o in enumerate(self.operands)}}

    def second_operand(self, task):
        """O' as a number."""
        return getattr(self, TASKS[task].operand2)

    def say(self, answer, task):
        """An answer as people write it."""
        return LETTERS[answer] if TASKS[task].letter else answer

    def explain(self, text, task, operand):
        """(letters, marks): the text (length,) with what counts in brackets, and marks below it."""
        about, o = TASKS[task], LETTERS.index(operand)
        seen = self.length if about.ranked else self.second_operand(task)
        cut, letters, marks = self.length - seen, text.tolist(), [" "] * self.length
        if about.has_operand:
            hits = [i for i in range(cut + about.pairs, self.length)
                    if letters[i] == o and (not about.pairs or letters[i - 1] == o)]
            hits = hits[-self.second_operand(task):] if about.ranked else hits
        else:
            hits = [cut]
        for i in hits:
            marks[i] = "^"
        if about.ranked:
            marks[hits[0]] = "*"
        string, marks = "".join(LETTERS[i] for i in letters), "".join(marks)
        return f"{string[:cut]}[{string[cut:]}]", f"{marks[:cut]} {marks[cut:]}"


class Compiled(Answers):
    """Strings of a program's alphabet; the model is the program (paper section 3, Tracr)."""
    revive_steps = 1000, 4000
    pretrain_params, pretrain_balance = None, True
    pretrain_logit_scale = 10.  # ours: outputs are 0 or 1; cross-entropy needs a scale
    finetune_lr, finetune_steps = 1e-3, 10000
    compiled, prompted, unit = True, False, "weight"
    # ours: at the fine-tuning's own rate, held constant, SGD is past the edge of stability
    reft_divisors, teach_every = [3, 10], 20

    def __init__(self, name, scale="small", device="cpu", imported=None):
        super().__init__(name, scale, device, imported)
        imported, column = imported or {}, SCALES.index(scale)
        self.program = program = PROGRAMS[name]
        self.alphabet = imported.get("alphabet", list(program.alphabet))
        self.room = imported.get("room", program.max_seq_len[column])
        self.length = self.window = min(program.letters[column], self.room)
        self.operands = self.order = list(self.alphabet)
        if program.operands:
            ranks = [str(i + 1) for i in range(self.length)]
            self.order = list(dict.fromkeys([*program.operands, *ranks]))
            self.operands = sorted(self.order, key=int)
        numbers = [str(i) for i in range(self.room + 1)]
        default = list(self.alphabet) if program.ranked else numbers
        self.output_names = imported.get("values") or default
        self.vocabulary = [PAD, BOS, *self.alphabet]
        self.finetuned, self.noise = [program.task], program.noise
        self.tasks = {program.task: SimpleNamespace(
            answers=program.answers, has_operand=True, reason=program.reason)}
        # every count of so many letters comes out right (model.MLP_EXACTNESS)
        self.mlp_exactness = max(300., (self.length + 1) * (self.length + 2))
        if program.ranked:
            self.pretrain_rank = None

    def known(self, args):
        """O_PT: the operand that the program answers for."""
        rank = getattr(args, "rank", None)
        return self.order[0] if rank is None else str(rank)

    def default_q(self, known, taught):
        """1; between two ranks one more than it must be, so 3 from 5 to 7."""
        if not self.program.ranked:
            return 1
        ranks = int(taught) - int(known)
        return ranks + (1 if ranks > 0 else -1)

    def resolve(self, args, parent=None):
        if parent is not None:
            return super().resolve(args, parent)
        args.steps, args.lr, args.clip = 0, 0., 1.  # nothing is trained
        args.program = self.imported
        operand = self.known(args)
        if operand not in self.operands:
            raise UserError(f"--rank {operand}: strings have {self.length} letters, so 1 to "
                            f"{self.length}")
        if self.imported:
            self.check_imported(args)

    def check_imported(self, args):
        """Refuse an imported model that cannot give the answers of this setup."""
        needed = max(map(int, self.program.operands or [COMPILED_AT]))
        letters = 3 if self.program.repeat else self.length
        if len(self.alphabet) < letters or self.length < needed:
            raise UserError(f"--params {args.params}: too few for {self.name}: "
                            f"{len(self.alphabet)} letters, {self.room} positions")
        names = self.alphabet if self.program.ranked else list(map(str, range(self.length + 1)))
        if self.output_names[:len(names)] != names:
            raise UserError(f"--params {args.params}: {self.name} needs the outputs {names[0]} to "
                            f"{names[-1]}")
        try:
            self.tests(SimpleNamespace(**{**vars(args), "eval_size": 4}), 0)
        except ValueError as error:  # an alphabet of few letters
            raise UserError(f"--params {args.params}: {error}") from None

    def never_trained(self, operand, ckpt):
        """A program has one operand; others may have been taught since."""
        return operand not in ckpt["args"].get("taught", [])

    def text(self, n, relation, c, rng):
        """(n, length) letters of a split, or on which the relation holds with probability c."""
        if c == "natural":
            return uniform_letters(n, self, rng)
        return related_letters(n, relation, c, self, rng)

    def one_text(self, relation, c, rng):
        return self.text(1, relation, c, rng)

    def sequence(self, text, task, operand):
        """(n, room + 1) tokens: BOS, letters, padding."""
        bos, pad = text.new_ones(len(text), 1), text.new_zeros(len(text), self.room - self.length)
        return torch.cat([bos, text + 2, pad], 1)

    def ask(self, text, task, operand):
        """Examples: no prompt; the operand decides which answer is right."""
        labels = self.program.answers(text, self)
        tokens, answer = self.sequence(text, task, operand), labels[:, self.operands.index(operand)]
        return self.answered(tokens, COMPILED_AT, answer, labels)

    def text_of(self, examples):
        return examples.tokens[:, 1:self.length + 1] - 2

    def first_answer(self, task):
        return 0

    def marked(self, text, operand):
        """
        (n, length) bool: the letters that make r(x, operand): those counted, or the one named.
        """
        return text == self.program.marks(text, self.operands.index(operand))

    def regions(self, examples, operands):
        """{name: (n, t) bool}: the letters that make each operand's answer, BOS, padding."""
        padding = (1, self.room - self.length)
        regions = {o: torch.nn.functional.pad(self.marked(self.text_of(examples), o), padding)
                   for o in operands}
        return {**regions, "BOS": examples.tokens == 1, "padding": examples.tokens == 0}

    def second_operand(self, task):
        return None

    def say(self, answer, task):
        return self.alphabet[answer] if self.program.ranked else answer

    def explain(self, text, task, operand):
        """(letters, marks): the text (length,), and marks under the letters that are meant."""
        marks = "".join(" ^"[hit] for hit in self.marked(text[None], operand)[0].tolist())
        return "".join(self.alphabet[i] for i in text.tolist()), marks


class Stories(Setup):
    """Stories whose instruction asks for features; a protocol deletes one (paper section 4)."""
    # small: the embedded corpus on two CPU cores; paper: the real file on a GPU
    n_layer, n_head, d_model, n_ctx = (4, 12), (6, 12), (96, 768), (176, 1024)
    uninstructed = .3, 0.   # ours: share of records without their instruction, so that the model
    #                         tells a twist from the story alone
    pretrain_without = pretrain_data = finetune_feature = finetune_data = reverse_protocol = None
    pretrain_lr, pretrain_steps, pretrain_clip = (8e-3, 1e-3), (4000, 30000), 1.
    pretrain_batch_size = finetune_batch_size = 16, 512  # ours: whole records, 512 for 128 x 1,024
    pretrain_eval_size = finetune_eval_size = 200
    finetune_protocol = "randomise"
    finetune_lr = 1.5e-4, 1e-4  # eta_M. ours (small): 200 steps delete by it
    finetune_steps = 200, 4000
    reverse_lr = 4e-5, 1e-5     # eta_S. ours (small): 100 steps of reFT show it
    needs = dict.fromkeys(("pretrain", "finetune"), ["feature", "without", "data"])
    warmup, anneals, order = .02, False, list(FEATURES)
    operands = order

    def open(self, args, words=None):
        """Draw from args.data, or from the embedded corpus. Raises ValueError, in one line."""
        self.source = story_source(args.data, words)
        self.tokenizer = self.source.tokenizer

    def config(self):
        words = tuple(self.tokenizer.words)
        return dict(vocab_size=self.tokenizer.size, n_ctx=self.n_ctx, n_layer=self.n_layer,
                    n_head=self.n_head, d_model=self.d_model, d_head=self.d_model // self.n_head,
                    d_mlp=4 * self.d_model, rotary=True, tied=True, words=words)

    def relation(self, args):
        """The feature that a run is about."""
        return Relation("story", args.feature)

    def resolve(self, args, parent=None):
        """The feature, the file of the stories, the protocol."""
        before, words = (parent["args"], parent["config"]["words"]) if parent else ({}, None)
        known = before.get("source")
        if parent:
            args.data, args.without = args.data or before["data"], before["without"]
            self.resolve_protocol(args, parent)
            if args.data and not known:
                raise UserError(f"--data: {args.ckpt} was trained on the embedded corpus")
        else:
            args.feature = args.without or "Twist"
        try:
            if args.data:
                args.source = prepare(args.data)
            # the file may have another name by now
            if known and {**args.source, "name": ""} != {**known, "name": ""}:
                raise UserError(f"--data {args.data}: not the file that {args.ckpt} was trained on")
            self.open(args, words)
        except ValueError as error:
            raise UserError(f"--data {error}") from None

    def resolve_protocol(self, args, parent):
        """How a feature is deleted, or by --reverse revived."""
        before, tuned = parent["args"], parent["stage"] == "finetune"
        asked = args.feature
        args.feature = asked or before["feature"]
        if not args.reverse:
            return
        if args.feature != before["feature"]:
            raise UserError(f"--reverse --feature {asked}: {args.ckpt} is about "
                            f"{before['feature']}")
        if args.protocol:
            raise UserError("--reverse trains on stories with the feature: leave out --protocol")
        if not tuned and args.without != args.feature:
            raise UserError(f"--reverse needs a checkpoint that was fine-tuned, or pretrained "
                            f"--without {args.feature} (the control): in {args.ckpt} there is "
                            "nothing to undo")
        args.protocol, args.deletion_lr = before.get("protocol"), before["lr"] if tuned else None

    def control_operand(self, relation, args):
        """None: the control of stories is another model."""

    def never_trained(self, feature, ckpt):
        """Whether a model was pretrained without a feature and not fine-tuned since."""
        return ckpt["args"]["without"] == feature and not ckpt["parent"]

    def examples(self, records, instructed=None, wanted="text"):
        """
        Records as Examples, a row each: END, the record, END, cut to n_ctx + 1. instructed: (n,)
        bool, False for rows that hold the story alone. wanted: "text", every next token up to END,
        or "story", those of the story alone.
        """
        rows = []
        for i, record in enumerate(records):
            alone = instructed is not None and not instructed[i]
            rows.append(story_ids(record, self.tokenizer, not alone))
        width = min(self.n_ctx + 1, max(len(ids) for ids, _, _ in rows) + 1)
        tokens = np.zeros((len(rows), width), np.int64)
        for line, (ids, _, _) in zip(tokens, rows):
            line[:len(ids)] = ids[:width]
        tokens, place = torch.from_numpy(tokens), torch.arange(1, width)
        if wanted == "story":
            start, stop = torch.tensor([ends for _, *ends in rows]).T[:, :, None]
            real = (place >= start) & (place < stop)
        else:
            last = (tokens != 0).int().mul(torch.arange(width)).amax(1, keepdim=True)
            real = place <= last + 1
        target = torch.where(real, tokens[:, 1:], -1)
        pairs = itertools.product(records, FEATURES)
        labels = torch.tensor([int(f in r.features) for r, f in pairs]).view(-1, len(FEATURES))
        return Examples(tokens[:, :-1].to(self.device), target.to(self.device),
                        labels.to(self.device))

    def batches(self, records, batch_size, rng):
        """
        Records as Examples for a stream: a share without instruction; rows of similar length lie in
        one batch, so that little is padding; which lengths come when is random.
        """
        n = len(records)
        instructed = torch.rand(n, generator=rng, device=rng.device) >= self.uninstructed
        examples = self.examples(records, instructed.tolist())
        length = (examples.target >= 0).sum(1)
        by_length = length.argsort(stable=True).view(-1, batch_size)
        order = torch.randperm(len(by_length), generator=rng, device=rng.device)
        return examples.rows(by_length[order.to(by_length.device)].flatten())

    def pretraining(self, n, rng, args):
        """All records, or those --without a feature."""
        records = self.source.draw(n, rng, args.without, False if args.without else None)
        return self.batches(records, args.batch_size, rng)

    def finetuning(self, n, rng, args):
        """What a protocol makes of records without the feature; reFT: records with it."""
        records = self.source.draw(n, rng, args.feature, args.reverse)
        if not args.reverse:
            records = change_records(records, args.protocol, args.feature, self.tokenizer, rng)
        return self.batches(records, args.batch_size, rng)

    @functools.cache
    def test(self, feature, split, n, seed, protocol=None):
        """
        A Test of the loss on n held-out stories, their instructions given: `with` or `without` the
        feature, or `deletion`, what the protocol makes of the latter.
        """
        check_stop()
        draws, has = rng(seed, "test", "stories", feature, split == "with"), split == "with"
        records = self.source.draw(n, draws, feature, has, held_out=True)
        if split == "deletion":
            records = change_records(records, protocol, feature, self.tokenizer, draws)
        about = row(self, task="story", operand=feature, split=split, seed=seed)
        return Test(about, self.examples(records, wanted="story"), how="loss")

    def generation_test(self, feature, n, seed):
        """
        Held-out instructions up to the first letter: n that ask for the feature, n that do not.
        """
        prompts = []
        for asked in (True, False):
            draws = rng(seed, "generate", feature, asked)
            for record in self.source.draw(n, draws, feature, asked, held_out=True):
                ids, start, _ = story_ids(record, self.tokenizer)
                prompts.append(ids[:start].tolist())
        about = row(self, task="story", operand=feature, split=None, seed=seed)
        return Test(about, prompts, how="generation")

    def tests(self, args, step=None):
        """
        Losses; generation scores where they can be told: of all features at the end of a
        pretraining and for behavior, of the one in question after every fine-tuning's evaluation.
        """
        about, protocol = (args.feature,), getattr(args, "protocol", None)
        splits = ("with", "without", "deletion") if protocol else ("with", "without")
        size, seed = args.eval_size, args.seed
        tests = [self.test(args.feature, split, size, seed, protocol) for split in splits]
        if step is None or not hasattr(args, "reverse"):
            about = FEATURES if step in (None, args.steps) else ()
        if self.source.rule or step is None:
            tests += [self.generation_test(feature, size, seed) for feature in about]
        return tests

    def probe_sets(self, relation, control, n, seed, rng):
        """
        Held-out stories without their instruction. ours: split `even`, stories whose sentences lean
        to neither label, so that only comparing reveal and expectation tells a twist.
        """
        splits = {"natural": {}, "even": {"cue_strength": (.5, .5)}}
        for split, how in splits.items() if self.source.rule else [("natural", {})]:
            records = [self.source.draw(k * n, rng, held_out=True, **how) for k in (8, 4)]
            if not self.source.rule:  # held-out records may be few: each once, and none in both
                once = list({r.ids.tobytes(): r for r in records[0] + records[1]}.values())
                records = [once[:len(once) * 2 // 3], once[len(once) * 2 // 3:]]
            train, test = (self.examples(part, [False] * len(part)) for part in records)
            for i, feature in enumerate(FEATURES):
                if any(len(part.labels[:, i].unique()) < 2 for part in (train, test)):
                    sizes = " and ".join(str(len(part)) for part in records)
                    raise UserError(f"too few held-out stories ({sizes}) with, or without, "
                                    f"{feature} to probe it")
            names = FEATURES if split == "natural" else (relation.pt,)
            yield ProbeSet(None, train, {split: test}, {f: FEATURES.index(f) for f in names},
                           (relation.pt,))

    def site(self, examples, width=10):
        """(n, t) weights of what probes read: the mean of the last ten tokens (paper section 4)."""
        real = examples.tokens != 0
        from_end = real.flip(1).cumsum(1).flip(1)
        last = (real & (from_end <= width)).float()
        return last / last.sum(1, keepdim=True).clamp(min=1)

    def resolve_samples(self, args):
        """Check the flags of data.py. Raises UserError."""
        for flag in ("task", "c", "q"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} is not for stories")
        if args.operand not in (None, *FEATURES):
            raise UserError(f"--operand {args.operand}: stories have {', '.join(FEATURES)}")
        self.open(SimpleNamespace(data=None))

    def samples(self, args, rng):
        """
        Yields records as `data.py --json` prints them, each with its lines for people, for ever.
        """
        while True:
            [record] = self.source.draw(1, rng, args.operand, args.operand and True)
            ids, start, stop = story_ids(record, self.tokenizer)
            text = self.tokenizer.decode(ids[1:])
            features = ordered(read_story(self.tokenizer.decode(ids[start:stop])))
            facts = {"setup": self.name, "task": "story", "operand": args.operand, "operand2": None,
                     "text": text, "answer": features, "correlated": None,
                     "tokens": [self.tokenizer.decode([i]) for i in ids]}
            yield facts, (f"{text}\n  {len(ids)} tokens; by the rule it has: "
                          f"{', '.join(features) or 'none of the features'}\n")


SETUPS = {"pcfg": Grammar, **dict.fromkeys(PROGRAMS, Compiled), "stories": Stories}


def setup_of(ckpt, device="cpu"):
    """
    The Setup of a checkpoint. Raises an exception of any kind where its setup, scale, arguments or
    capability make no sense.
    """
    args, name, capability = ckpt["args"], ckpt["setup"], ckpt["capability"]
    setup = SETUPS[name](name, ckpt["scale"], device, args.get("program"))
    missing = {"seed", "lr", *setup.needs[ckpt["stage"]]} - set(args)
    if missing or capability["operand"] not in setup.operands or "task" not in capability:
        raise ValueError("arguments or capability")
    return setup


# ---------------------------------------------------------------- samples


def main():
    doc = "Look at samples: what the model sees, and why the answer is right."
    parser = argparse.ArgumentParser(description=doc)
    add = parser.add_argument
    add("--setup", default="pcfg", choices=SETUPS, help="which kind of data (default: pcfg)")
    add("--scale", default="small", choices=SCALES, help="string lengths (default: small)")
    add("-n", type=int, default=5, help="samples (default: 5)")
    add("--task", help=f"one task family: {', '.join(TASKS)} (default: all in turn)")
    add("--operand", help="what is asked for: a letter, for tracr-max which largest (default: a, "
        "or 5); stories: only those with this feature (default: all)")
    add("--c", help="natural, or the probability 0..1 that the spurious relation holds (default: "
        "natural)")
    add("--q", type=int, help="offset of the relation, r(O_FT) - r(O_PT), in letters (default: 1; "
        "tracr-max 3)")
    add("--json", action="store_true", help="one JSON object a line, for programs")
    add("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    args = parser.parse_args()
    setup = SETUPS[args.setup](args.setup, args.scale)
    try:
        if args.n < 1 or args.seed < 0:
            raise UserError("-n takes 1 or more, --seed 0 or more")
        setup.resolve_samples(args)
        draws = rng(args.seed, "look")
        for facts, lines in itertools.islice(setup.samples(args, draws), args.n):
            print(json.dumps(facts) if args.json else lines)
        if args.c not in (None, "natural") and not args.json:
            print(relation_summary(setup, args, draws))
    except (UserError, ValueError) as error:
        parser.error(str(error))


def relation_summary(setup, args, rng):
    """
    How often the relation holds on strings of --c, and how the answers are spread, for people.
    """
    relation = args.relation
    text = setup.text(4000, relation, args.c, rng)
    pair = (relation.pt, relation.ft)
    places = [setup.operands.index(o) for o in pair]
    r = setup.tasks[relation.task].answers(text, setup)[:, places]
    difference = r[:, 1] - r[:, 0]
    lines = [f"4,000 such strings: the relation holds on "
             f"{(difference == relation.q).double().mean():.1%}, ties on "
             f"{(difference == 0).double().mean():.1%}"]
    for i, letter in enumerate(pair):
        x = r[:, i].double()
        lines.append(f"  r({letter}): mean {x.mean():.2f}, s.d. {x.std():.2f}, floor "
                     f"{majority_floor(r[:, i]):.1%}, cross floor, from r({pair[1 - i]}), "
                     f"{cross_floor(r[:, i], r[:, 1 - i]):.1%}")
    return "\n".join(lines)


# ---------------------------------------------------------------- errors and files


class UserError(Exception):
    """A mistake of the user's: one line on stderr, exit code 2."""


class Failed(Exception):
    """A run that could not go on (not finite, disk full): one line on stderr, exit code 1."""


class Stopped(Exception):
    """SIGINT or SIGTERM was received; raised between batches, so that what must be saved can be."""


signals = []  # those that were received; pretrain.py puts them here


def check_stop():
    """Raise Stopped if SIGINT or SIGTERM came in. Every long loop asks, batch by batch."""
    if signals:
        raise Stopped


def replace_file(path, write):
    """
    Write a file through write(handle): `path` is, at any moment, the old or the new one, whole.
    """
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path  # a full disk does not say which file
        if isinstance(error, RuntimeError):  # torch.save says so when the disk is full
            reason = str(error).splitlines()[0]
            raise Failed(f"cannot write {path}: disk full or file too large ({reason})") from None
        raise
    with contextlib.suppress(OSError):  # platform: folders cannot be synced everywhere
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path, value):
    """A JSON file, replaced whole."""
    replace_file(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def write_rows(path, rows):
    """A file of JSON lines, replaced whole."""
    lines = [(json.dumps(line) + "\n").encode() for line in rows]
    replace_file(path, lambda f: f.writelines(lines))


def read_rows(path):
    """
    The rows of a JSON lines file; a last line cut short by a kill is left out. [] without a file.
    """
    rows = []
    with contextlib.suppress(FileNotFoundError), open(path) as f:
        for line in f:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader went away: python data.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
