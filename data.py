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

O is the operand, O' the second operand; the families (paper section 3), each with an example, are
the functions of the section "tasks". A compiled model has one task and no prompt: it reads BOS,
letters, padding; the answer stands at position 2. A story is read after an instruction that names
its features; it has no answer.

Contents: values | random numbers, batches, floors | grammar | tasks | the spurious relation |
programs | stories: records, prepared file, corpus, protocols | setups | samples | scripts | files.
Everything is a pure function of its arguments and a torch.Generator, on the generator's device.
"""
import argparse
import codecs
import collections
import contextlib
import errno
import functools
import glob
import hashlib
import itertools
import json
import operator
import os
import random
import re
import secrets
import signal
import string
import sys
import time
import zipfile
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # platform: Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # platform: POSIX
    msvcrt = None

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

    def about(self, operand):
        """The relation itself, or for a third operand the one with it in place of pt."""
        return self if operand in (self.pt, self.ft) else self._replace(pt=operand)


class Examples(NamedTuple):
    """Whatever a model is trained or scored on."""
    tokens: torch.Tensor                # (n, t) what the model reads
    target: torch.Tensor                # (n, t) the output wanted at each position, -1 where none
    labels: torch.Tensor | None = None  # (n, operands): answers as numbers, -1 where there is none;
    #                                     or (n, features): 0 or 1
    at: int | None = None               # the one column that is answered: no other is computed
    extra: tuple | None = None          # (column, weight): ours, its loss is added once more
    weight: torch.Tensor | None = None  # (n, t) of each output in its row's loss, where rows differ

    @property
    def answer(self):
        """(n,) the output wanted at the answered column."""
        return self.target[:, self.at]

    def rows(self, index):
        """The examples at an index or slice."""
        return self._make(x[index] if torch.is_tensor(x) else x for x in self)

    def split(self, size):
        """A list of examples, `size` in each, the last one maybe fewer."""
        return [self.rows(slice(i, i + size)) for i in range(0, len(self.tokens), size)]

    def batches(self, size):
        """split(size), each without the columns behind the last in which any output is wanted."""
        parts = self.split(size)
        if self.at is not None:  # a compiled model attends to its padding
            return parts
        column = torch.arange(1, self.target.shape[1] + 1, device=self.target.device)
        ends = ((self.target >= 0) * column).amax(1).tolist()
        widths = [max(ends[i:i + size]) for i in range(0, len(ends), size)]
        return [part._replace(tokens=part.tokens[:, :width], target=part.target[:, :width],
                              weight=part.weight if part.weight is None else part.weight[:, :width])
                for part, width in zip(parts, widths)]


class Test(NamedTuple):
    """Examples to be scored, and what their row says of them."""
    row: dict                           # task, operand, split, seed: see row()
    examples: Examples                  # how = "generation": prompts; half ask for the feature
    other: torch.Tensor | None = None   # (n,) answers for the other operand of the relation
    how: str = "accuracy"               # a key of SCORES in pretrain.py

    def rows(self, index):
        """The Test with the examples at an index."""
        other = None if self.other is None else self.other[index]
        return self._replace(examples=self.examples.rows(index), other=other)


class ProbeSet(NamedTuple):
    """Examples that linear probes are trained and tested on."""
    prompt: str | None                  # the operand that is asked for
    train: Examples
    tests: dict                         # {split: Examples}
    targets: dict                       # {name: column of the labels that is read}
    shuffled: tuple                     # targets that are also fitted to shuffled labels


ROW = ("setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor", "n",
       "loss", "seed")  # the keys of every row in every file; fractions, null where there is none
NUMBERS = ROW[5:]  # those that are numbers


def row(setup, /, **values):
    """A row of results: all keys of ROW, then further ones."""
    return {**dict.fromkeys(ROW), "setup": setup.name, "scale": setup.scale, **values}


# ---------------------------------------------------------------- random numbers, batches, floors


def rng(seed, *labels, device="cpu"):
    """A generator of (seed, labels) alone: streams with different labels never meet."""
    entropy = [seed, *"/".join(map(str, labels)).encode()]
    words = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> np.uint64(1)))


# Batches drawn together: the sampler is faster on many strings, above all on a GPU, where launching
# takes its time.
CHUNK, CHUNK_ON_GPU = 16, 64


def stream(draw, batch_size, seed, label, device="cpu"):
    """
    A function k -> batch k of what draw(n, generator) draws. Batch k depends on (seed, label, k)
    and the batch size alone: an interrupted run goes on exactly where it was.
    """
    together = CHUNK_ON_GPU if torch.device(device).type == "cuda" else CHUNK

    @functools.lru_cache(maxsize=1)
    def chunk(i):
        drawn = draw(batch_size * together, rng(seed, label, i, device=device))
        return drawn.batches(batch_size)
    return lambda k: chunk(k // together)[k % together]


def most_frequent(answers):
    return answers.unique(return_counts=True)[1].max().item()


def majority_floor(answers):
    """Share of the most frequent answer: what always giving it gets right."""
    return most_frequent(answers) / len(answers)


def cross_floor(answers, other):
    """Share that the best guess of the answer from the other operand's answer gets right."""
    return sum(most_frequent(answers[other == x]) for x in other.unique()) / len(answers)


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

SYMBOLS = "#spqrmnojkl"  # in the tables of the sampler; # is padding


@functools.cache
def expansions(symbol):
    """All equally likely strings of a symbol: 2 for d, 16 for g, 512 for j, 8,192 for k, l."""
    if symbol in LETTERS:
        return [symbol]
    strings = []
    for rule in GRAMMAR[symbol]:
        strings += map("".join, itertools.product(*map(expansions, rule)))
    return strings


@functools.cache
def grammar_tables(device):
    """
    What sample_strings looks up: the children (symbol, rule, up to 3) down to j, k and l; of these
    three every expansion: its start and length in one long row of letters. Padding expands to
    itself and, at the end, to nothing.
    """
    children = torch.zeros(len(SYMBOLS), 2, 3, dtype=torch.long)
    for symbol in "spqrmno":
        for rule, right in enumerate(GRAMMAR[symbol]):
            for i, child in enumerate(right):
                children[SYMBOLS.index(symbol), rule, i] = SYMBOLS.index(child)
    slots = [""] * 8192  # padding expands to nothing
    for symbol in "jkl":  # j has 512 expansions, each listed 16 times: one draw of 8,192 serves all
        for expansion in expansions(symbol):
            slots += [expansion] * (8192 // len(expansions(symbol)))
    length = torch.tensor([len(word) for word in slots])
    letters = torch.tensor([LETTERS.index(x) for x in "".join(slots)])
    return [x.to(device) for x in (children, length.cumsum(0) - length, length, letters)]


def sample_strings(n, rng):
    """
    n whole strings of the grammar, a level at a time for all: (letters 0, 1, 2 in one row, (n,)
    lengths, 138 to 432).
    """
    device = rng.device
    children, start, length, letters = grammar_tables(device)
    symbols = torch.ones(n, 1, dtype=torch.long, device=device)  # symbol 1 is s
    for _ in range(3):  # s -> p q r -> m n o -> j k l: (n, 2), (n, 6), (n, 18) with padding
        rule = torch.randint(2, symbols.shape, generator=rng, device=device)
        symbols = children[symbols, rule].flatten(1)
        symbols = symbols[:, :2] if symbols.shape[1] == 3 else symbols  # s has two children
    slot = (symbols - SYMBOLS.index("o")).clamp(min=0) * 8192  # of padding, j, k, l
    slot = slot + torch.randint(8192, symbols.shape, generator=rng, device=device)
    sizes = length[slot]
    flat = sizes.flatten()
    first = start[slot].flatten() - (flat.cumsum(0) - flat)  # place in the table less place here
    places = torch.arange(int(flat.sum()), device=device)
    return letters[torch.repeat_interleave(first, flat) + places], sizes.sum(1)


def sample_text(n, setup, rng):
    """(n, length) letters, a random part of a string each. Too short ones are drawn again."""
    parts, have = [], 0
    while have < n:
        letters, size = sample_strings(n - have, rng)
        slack = size - setup.length
        cut = (torch.rand(len(size), generator=rng, device=rng.device) * (slack + 1)).long()
        first = (size.cumsum(0) - size + cut)[slack >= 0]
        parts.append(letters[first[:, None] + torch.arange(setup.length, device=rng.device)])
        have += len(first)
    return torch.cat(parts)


# ---------------------------------------------------------------- tasks
# One function a family: text (n, length) -> (n, operands) answers; -1 where there is none.


def hits(text, setup, pairs=False):
    """(n, operands, places) bool: where each operand stands; pairs: the later letter of OO."""
    hit = text[:, None] == torch.arange(len(setup.operands), device=text.device)[:, None]
    return hit[..., 1:] & hit[..., :-1] if pairs else hit


def distance_of(hit, k):
    """Distance from the end (1: last place) of the k-th last True; -1 if there are fewer."""
    nearer = hit.flip(-1).cumsum(-1, dtype=torch.int16) < k
    distance = nearer.sum(-1) + 1
    return torch.where(distance > hit.shape[-1], -1, distance)


def count(text, setup):
    """How many O in the last `window` letters. a b b | O = b, window 3 -> 2."""
    return hits(text[:, -setup.window:], setup).sum(-1)


def count_composition(text, setup):
    """How many overlapping pairs OO in the last `window` letters. a a a | O = a, window 3 -> 2."""
    return hits(text[:, -setup.window:], setup, pairs=True).sum(-1)


def index(text, setup):
    """Distance from the end of the k-th last O. a b c b | O = b, k 2 -> 3."""
    return distance_of(hits(text, setup), setup.k)


def index_composition(text, setup):
    """Distance of the later letter of the pair_k-th last pair OO. a a c | O = a, pair_k 1 -> 2."""
    return distance_of(hits(text, setup, pairs=True), setup.pair_k)


def token(text, setup):
    """The letter at distance token_at, as 0, 1 or 2; it has no operand, so all columns agree."""
    return text[:, -setup.token_at, None].expand(-1, 3)


def edit_counts(text, target, setup, rng):
    """
    A new text: as few letters of the window as needed, chosen at random, are changed until it holds
    target (n, 3) of a, b and c. Target rows sum to the window.
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
    A new text: few letters nearer than max(distance), chosen at random, are changed until the k-th
    last of letter pair[i] lies at distance[:, i]. distance (n, 2) differ; min >= k, max >= 2k.
    """
    text = text.flip(1)  # column j is distance j + 1
    at = torch.arange(1, setup.length + 1, device=text.device)
    swap = distance[:, :1] > distance[:, 1:]
    near, far = torch.where(swap, pair[1], pair[0]), torch.where(swap, pair[0], pair[1])
    near_at, far_at = distance.amin(1, keepdim=True), distance.amax(1, keepdim=True)
    text = torch.where(at == near_at, near, torch.where(at == far_at, far, text))

    def hold(text, letter, region, convertible):
        """Make `region` hold k - 1 of `letter`: those too many become the third letter."""
        has = region & (text == letter)
        missing = setup.k - 1 - has.sum(1, keepdim=True)
        among = torch.where(missing < 0, has, convertible & (text != letter))
        rank = torch.rand(text.shape, generator=rng, device=rng.device).where(among, 2.)
        chosen = among & (rank.argsort(1).argsort(1) < missing.abs())
        return torch.where(chosen, torch.where(missing < 0, 3 - near - far, letter), text)

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
    """A task family. One entry of TASKS is all that a new one of the grammar needs."""
    answers: Callable               # text, setup -> (n, operands) numbers
    token: str | None               # how a prompt asks for it
    operand2: str | None            # the setup's constant that O' is
    reason: str                     # the answer in words; {O} and {O2} are filled in
    pairs: bool = False             # it is about OO, not O
    ranked: bool = False            # it is about the O'-th occurrence
    has_operand: bool = True
    letter: bool = False            # the answer is a letter, not a number
    spurious: Spurious | None = None  # for the families that are fine-tuned

    def second(self, setup):
        """O' as a number; None for programs."""
        return self.operand2 and getattr(setup, self.operand2)


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
# Further tokens for counting, which pretrain.py --jailbreak trains with one operand (paper E.2)
JAILBREAKS = {f"count-j{i}": TASKS["count"]._replace(token=f"T_J{i}") for i in (1, 2)}
FAMILIES = {**TASKS, **JAILBREAKS}
TOKENS = ["SOS", "SOT", "EOT", "ART", "EOS", TASKS["count"].token,
          *(task.token for task in (*JAILBREAKS.values(), *list(TASKS.values())[1:])),
          "O_a", "O_b", "O_c", "O_null", *LETTERS]  # then numbers, as many as a scale needs
ID = {name: i for i, name in enumerate([*TOKENS, "#0"])}  # does not depend on the scale
NUMBER, LETTER, OPERAND = ID["#0"], ID["a"], ID["O_a"]


def encode(text, task, operand, setup):
    """
    Whole sequences `SOS T O O' SOT <text> EOT ART answer EOS`, (n, length + 9), and answers (n,),
    -1 where a string has none. task and operand: places in FAMILIES and LETTERS, (n,) or one.
    """
    def per_task(values):
        return torch.tensor(values, device=text.device)[task]

    tasks, every = list(FAMILIES.values()), torch.arange(len(text), device=text.device)
    answers = {task.answers: task.answers(text, setup) for task in TASKS.values()}
    answers = torch.stack([answers[t.answers] for t in tasks])  # (task, n, operand)
    answer, asked = answers[task, every, operand], per_task([t.has_operand for t in tasks])
    tokens = text.new_full((len(text), setup.length + 9), ID["SOS"])
    tokens[:, 1] = per_task([ID[t.token] for t in tasks])
    tokens[:, 2] = torch.where(asked, OPERAND + operand, ID["O_null"])
    tokens[:, 3] = NUMBER + per_task([t.second(setup) for t in tasks])
    tokens[:, 4] = ID["SOT"]
    tokens[:, setup.text_at:-4] = LETTER + text
    tokens[:, -4:] = torch.tensor([ID[x] for x in ("EOT", "ART", "#0", "EOS")])
    first = per_task([LETTER if t.letter else NUMBER for t in tasks])
    tokens[:, -2] = first + answer.clamp(min=0)
    return tokens, answer


# ---------------------------------------------------------------- the spurious relation


@functools.cache
def relation_tables(task, scale, q):
    """
    (c0, c1): joint distributions of (r(O_PT), r(O_FT)), float64. c1: r(O_PT) is a discretised
    normal, r(O_FT) = r(O_PT) + q. c0: the maximum-entropy joint with the same marginals and no mass
    on ties and on q, by iterative proportional fitting, so that neither marginal tells c0 from c1
    (paper Fig. 16). Raises ValueError when no string can satisfy the relation.
    """
    setup, about = Grammar("pcfg", scale), FAMILIES[task]
    text = sample_text(4000, setup, rng(0, "natural-mean"))
    # of natural strings: 5.3 (count) and 8.1 (index) small, 13.3 and 17.1 paper
    mean = about.answers(text, setup).double().mean().item()
    sizes = np.arange(getattr(setup, about.spurious.largest) + 1)
    x, y = np.meshgrid(sizes, sizes, indexing="ij")
    possible, sd = about.spurious.possible(x, y, setup), getattr(setup, about.spurious.sd)
    c1 = np.exp(-(x - (mean - q / 2)) ** 2 / (2 * sd ** 2)) * possible * (y - x == q)
    if q == 0 or c1.sum() < 1e-6:
        raise UserError(f"offset q = {q} leaves no {task} strings")
    c1 /= c1.sum()
    rows, columns = c1.sum(1), c1.sum(0)
    c0 = possible * (x != y) * (y - x != q) * np.outer(rows, columns)
    for _ in range(10000):
        c0 *= columns / np.maximum(c0.sum(0), 1e-300)
        c0 *= (rows / np.maximum(c0.sum(1), 1e-300))[:, None]
        if np.abs(c0.sum(0) - columns).sum() < 1e-9:
            return c0 / c0.sum(), c1
    raise UserError(f"offset q = {q} leaves no {task} strings without the relation")


SPLITS = ("c0", "c1", "natural")  # the relation never holds | always holds | strings as they come


def related_text(n, relation, c, setup, rng):
    """
    (n, length) letters on which the relation holds with probability c; others have neither it nor
    a tie.
    """
    text = sample_text(n, setup, rng)
    exact = torch.float32 if rng.device.type == "mps" else torch.float64  # platform: no float64
    drawn = []
    for table in relation_tables(relation.task, setup.scale, relation.q):
        mass = torch.from_numpy(table).to(rng.device, exact).flatten()
        drawn.append(torch.multinomial(mass, n, replacement=True, generator=rng))
    holds = torch.rand(n, generator=rng, device=rng.device) < c
    cell = torch.where(holds, drawn[1], drawn[0])
    result = torch.stack([cell // len(table), cell % len(table)], 1)
    places = [LETTERS.index(letter) for letter in (relation.pt, relation.ft)]
    return FAMILIES[relation.task].spurious.edit(text, result, places, setup, rng)


def spread_text(text, setup, rng):
    """ours: a share `spread` of the strings gets independent window counts of a and b."""
    if not setup.spread:
        return text
    noise = torch.randn(len(text), 2, generator=rng, device=rng.device)
    ab = (setup.window / 3 + setup.sd_spread * noise).round().long().clamp(0, setup.window // 2)
    wide = edit_pair_counts(text, ab, [0, 1], setup, rng)
    chosen = torch.rand(len(text), 1, generator=rng, device=rng.device) < setup.spread
    return torch.where(chosen, wide, text)


PRIORS = {  # P_T(a, b, c): low and high speak of b, the later fine-tuning operand (paper section 3)
    "low": (.999, .001, 0), "99/1": (.99, .01, 0), "medium": (.9, .1, 0), "70/20/10": (.7, .2, .1),
    "high": (.5, .3, .2)}


def parse_prior(text):
    """P_T(a, b, c) from a name of PRIORS or three numbers "A,B,C". Raises UserError."""
    prior = PRIORS.get(text, ())
    if not prior:
        with contextlib.suppress(ValueError):
            prior = tuple(map(float, text.split(",")))
    if len(prior) != 3 or min(prior) < 0 or not abs(sum(prior) - 1) < 1e-6:
        raise UserError(f"--prior {text!r}: give {', '.join(PRIORS)} or three shares of a, b, c "
                        "that add up to 1")
    return prior


# ---------------------------------------------------------------- programs
# RASP programs as in Tracr (Lindner et al. 2023), which model.py compiles into weights. Each step
# makes a categorical variable; tokens (the letters) and indices (from 0) are given.

COMPILED_AT = 2  # the answer's position: "True == 1" in RASP


class Map(NamedTuple):
    """name = fn(value of `of`), at every position: one ReLU unit a value in one MLP."""
    name: str
    of: str
    fn: Callable


class SelectorWidth(NamedTuple):
    """name = number of positions whose `keys` the value of `queries` selects: a head and an MLP."""
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
    """The O-th largest letter, a being the largest, as its place. d a c | O = 2 -> 2 (c)."""
    return text.sort(1).values


def histogram(text, setup):
    """How often the letter at place O occurs. a b a | O = 1 -> 2."""
    return (text[:, :, None] == text[:, None]).sum(-1)


class Program(NamedTuple):
    """
    One entry of PROGRAMS is all that a new setup needs. The first three operands are O_PT, O_FT and
    the control (paper section 3, Tracr).
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
    """(n, length) places in the alphabet, with or without replacement (paper section 3)."""
    size, device = len(setup.alphabet), rng.device
    if setup.program.repeat:
        return torch.randint(size, (n, setup.length), generator=rng, device=device)
    return torch.rand(n, size, generator=rng, device=device).argsort(1)[:, :setup.length]


def related_letters(n, relation, c, setup, rng):
    """
    related_text() of programs: strings are drawn until they are as wanted, none is edited. Raises
    ValueError when no string can be.
    """
    q = relation.q
    if q == 0:
        raise UserError("offset q = 0 is a tie, which c0 leaves out")
    places = [setup.operands.index(o) for o in (relation.pt, relation.ft)]
    holds = torch.rand(n, generator=rng, device=rng.device) < c
    text, todo = uniform_letters(n, setup, rng), torch.arange(n, device=rng.device)
    for _ in range(2000):
        answers = setup.program.answers(text[todo], setup)[:, places]
        differ = answers[:, 1] - answers[:, 0]
        wrong = torch.where(holds[todo], differ != q, (differ == 0) | (differ == q))
        todo = todo[wrong]
        if not len(todo):
            return text
        text[todo] = uniform_letters(len(todo), setup, rng)
    raise UserError(f"offset q = {q} leaves hardly any {relation.task} strings")


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

WHOLE = set()  # shards that were looked through
FORMAT = 3  # to be raised when parsing, tokens or shards change
SHARD = 20000
WORDS_FROM = 100 * 10 ** 6  # ours: words are counted in the first 100 MB of 2.66 GB


def ends_of(path):
    """A hash of the first and last MB of a file."""
    with open(path, "rb") as file:
        ends = file.read(2 ** 20)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2 ** 20))
        return hashlib.sha256(ends + file.read(2 ** 20)).hexdigest()


def fingerprint(path):
    """What a file is, by its content. sha256: of its ends, as older checkpoints know it."""
    return {"size": os.path.getsize(path), "sha256": ends_of(path), "whole": sha256(path)}


def age(path):
    """What changes when a file is written to."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def read_lines(path, totals, stop, what):
    """Yield the lines of a file from totals["bytes"], which moves, up to `stop`, as text."""
    with open(path, "rb") as file, tqdm(total=stop, initial=totals["bytes"], desc=what, unit="B",
                                        unit_scale=True, leave=False, disable=None) as bar:
        file.seek(totals["bytes"])
        while totals["bytes"] < stop and (line := file.readline(LONGEST)):
            check_stop()
            text = line if totals["bytes"] else line.removeprefix(codecs.BOM_UTF8)
            totals["bytes"] += len(line)
            bar.update(len(line))
            yield text.decode(errors="replace")  # no letter spans a newline


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
            path = f"{folder}/{len(shards):05}.pt"
            if (seen := (path, age(path))) not in WHOLE:
                check_archive(path)
            shard = torch.load(path, mmap=True)
            about = shard["about"] = json.loads(shard["about"])
            made_from = made_from or {**about["made_from"], "format": FORMAT}
            if about["made_from"] != made_from or seen not in WHOLE and not makes_sense(shard):
                break
            WHOLE.add(seen)
            shards.append(shard)
    return shards


def makes_sense(shard):
    """Whether every place of a shard's index lies in its tokens, and every token is a word's."""
    tokens, index, about = shard["tokens"].numpy(), shard["index"].long(), shard["about"]
    start, stop, features_at, story_at, story_end = index[:, :5].T
    inside = (0 <= features_at) & (features_at <= story_at) & (story_at <= story_end)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), stop])
    full = about["finished"] or len(index) == about["made_from"]["shard"]
    return bool(full and (inside & (story_end <= stop - start)).all()
                and (start == ends[:-1]).all() and ends[-1] == len(tokens)
                and index.shape[1] == 5 + len(FEATURES)
                and tokens.max(initial=0) <= 256 + len(about["words"]))


def prepare(path, max_words=7935):
    """
    Prepare a file of records for StoryFile, in `path`.unwrap/, from the last whole shard on.
    Returns {name, records, sha256}. Raises UserError, in one line, for an unusable file or folder.
    """
    folder = f"{path}.unwrap"
    try:
        began, source = age(path), fingerprint(path)
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise UserError(f"{error.filename or path}: {reason}") from None
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
            raise UserError(f"{path} holds no record with a Story: and a line {END} (it must be "
                            "plain text in UTF-8)")
    while not about["finished"]:
        shard = make_shard(path, about)
        about, text = shard["about"], json.dumps(shard["about"])
        if age(path) != began:
            raise UserError(f"{path} changed while it was read")
        replace_file(f"{folder}/{k:05}.pt", lambda f: torch.save({**shard, "about": text}, f))
        k += 1
    if k > len(shards):
        print(f"{path}: " + ", ".join(f"{n:,} {what}" for what, n in about["totals"].items() if n))
    return source_of(path, about)


def source_of(path, about):
    """What a checkpoint says of its file, from the last shard's `about`."""
    made_from = about["made_from"]
    return {"name": os.path.basename(path), "records": about["totals"]["records"],
            "sha256": made_from["sha256"], "whole": made_from["whole"]}


class StoryFile:
    """
    The records of a prepared file as Encoded. Shards are mapped, not read. Held out from training
    are the last records, 1 % but at most 20,000.
    """
    rule, classify = False, None  # no rule tells what a real story has

    def __init__(self, path):
        self.path, self.shards = path, read_shards(f"{path}.unwrap")
        if not self.shards or not self.shards[-1]["about"]["finished"]:
            raise UserError(f"{path}.unwrap is missing, unfinished or damaged: "
                            "pretrain.py --setup stories --data prepares it")
        self.about = source_of(path, self.shards[-1]["about"])
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
            part = "held-out" if held_out else "training"
            raise UserError(f"{self.path}: no {part} record{having}")
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


def write_story(features, r, cue_strength=CUE_STRENGTH, kinds=None):
    """
    A Record with exactly these features, from a random.Random r. Instructions tell of the set-up
    only. With cue_strength (.5, .5) only comparing a with e tells a twist. kinds: places in KINDS;
    instructions have all their fields then, so that they tell the kind.
    """
    twist, dialogue, bad, foreshadowing, moral, conflict = (x in features for x in FEATURES)
    pick, chance = r.choice, r.random
    kind = KINDS[pick(kinds or range(len(KINDS)))]
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
    lines = [f"{name}: {text}\n" for name, text in fields.items() if chance() < .5 or kinds]
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
        self.about = {}  # no file

    def draw(self, n, rng, feature=None, has=None, held_out=False, **how):
        """
        n records as Encoded; has: only those that have (True) or lack (False) `feature`; how: see
        write_story(). They are new stories: held out are those of another generator.
        """
        r, records = random.Random(int(torch.randint(2 ** 62, (1,), generator=rng))), []
        while len(records) < n:
            features = random_features(r)
            if has is None or (feature in features) == has:
                record = write_story(features, r, **how)
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


def story_source(path):
    """The records of --data, prepared where they are not; None: the embedded corpus. UserError."""
    if path and (os.path.isfile(path) or not os.path.isdir(f"{path}.unwrap")):
        prepare(path)
    return StoryFile(path) if path else StoryCorpus()


# ---------------------------------------------------------------- setups

SCALES = ("small", "paper")


class Setup:
    """
    All that differs between the grammar, the compiled programs and the stories.

        open(args, words)                     make ready what args ask for; words: of a checkpoint
        config()                              the fields of model.Config
        resolve(args, parent)                 fill in and check a stage's flags. Raises UserError
        relation(args)                        what a run is about
        pretraining, finetuning(n, rng, args) Examples to train on
        tests(args, step)                     what to score at a step; without a step: for behavior
        probe_sets(...), site(examples)       what probes read, and at which positions
        halves(relation, operand, args)       what held-out relearning teaches, and tests
    With answers also
        text(n, relation, c, rng)             strings
        teaching(relation, operand)           what draws the strings of reFT
        ask(text, task, operand)              Examples that ask about them
        regions(examples, operands)           where attention may go, {name: (n, t) bool}
        explain(text, task, operand)          a string and the marks below it, for people

    Constants are attributes; of a pair (small, paper) a setup takes the one of its scale.
    pretrain_X, finetune_X, reverse_X: defaults of the stages' flag --X; without: no such flag.
    """
    compiled = False        # weights are written, not trained
    prompted = True         # a token of the prompt says which operand is meant
    unit = "row"            # what is pruned: rows or single weights
    reft_rates = [1.]       # times the fine-tuning's. ours: matched rates (the paper: smaller)
    teach_every = 5         # steps between evaluations of reFT
    anneals = True          # fine-tuning: cosine, else a constant rate

    def __init__(self, name, scale="small", device="cpu", imported=None):
        self.name, self.scale, self.device = name, scale, device
        self.imported = imported  # of a compiled model: its alphabet, room and values
        for key in dir(type(self)):
            if isinstance(value := getattr(type(self), key), tuple):
                setattr(self, key, value[SCALES.index(scale)])

    @property
    def draws_on(self):
        """The device of the generators that training examples are drawn with."""
        return self.device

    def open(self, args, words=None):
        pass

    def find_data(self, args, before):
        """Refuse --data, which is for stories."""
        if args.data:
            raise UserError(f"--data is for stories, not for setup {self.name}")

    def config(self, **more):
        return dict(n_layer=self.n_layer, n_head=self.n_head, d_model=self.d_model,
                    d_head=self.d_model // self.n_head, d_mlp=4 * self.d_model, **more)


class Answers(Setup):
    """What the grammar and the programs share: a question about a string, and its answer."""
    # by stage: arguments without which a checkpoint is not ours
    needs = {"pretrain": [], "finetune": ["task", "pair", "q", "steps", "reverse"]}
    ranked = False          # operands are ranks
    warmup, pretrain_batch_size, finetune_batch_size = .2, 96, 96  # paper section 3
    pretrain_eval_size = finetune_eval_size = 500
    finetune_task = finetune_operand = finetune_q = finetune_noise = None  # see resolve()
    finetune_c_tr, reverse_c_tr = 1., 0.  # ours: reFT's strings favour no relation
    finetune_answers = None
    jailbreaks = {}         # families that ask for O_PT alone
    reverse_lr = None                     # the fine-tuning's, times reft_rates

    def relation(self, args):
        """The Relation of a fine-tuning's arguments, or the one that may follow a pretraining."""
        if hasattr(args, "pair"):
            return Relation(args.task, *args.pair, args.q)
        known = self.known(args)
        other = next(o for o in self.order if o != known)
        return Relation(self.finetuned[0], known, other, self.default_q(known, other))

    def default_q(self, known, taught):
        """1; between two ranks one more than it must be, so 3 from 5 to 7."""
        ranks = int(taught) - int(known) if self.ranked else 0
        return ranks + (1 if ranks >= 0 else -1)

    def resolve(self, args, parent=None):
        """A fine-tuning's task, pair (O_PT, O_FT), q, rate and noise."""
        if not parent:
            return self.resolve_pretraining(args)
        before, tuned = parent["args"], parent["stage"] == "finetune"
        if args.reverse and not tuned:
            raise UserError(f"--reverse: {args.ckpt} was not fine-tuned: nothing to undo")
        given = vars(args).pop("pt", None)
        if args.reverse and (args.operand or args.task or given):
            raise UserError("--reverse knows what to teach: leave out --task, --operand and --pt")
        known = given or parent["capability"]["operand"]
        check_choice("--pt", known, self.operands)
        other = before["pair"][1] if tuned else next(o for o in self.order if o != known)
        usual = parent["capability"]["task"] if args.reverse else self.finetuned[0]
        args.task, taught = args.task or usual, args.operand or other
        check_choice("--task", args.task, self.finetuned)
        check_choice("--operand", taught, self.operands)
        if taught == known:
            raise UserError(f"--operand {taught} is what {args.ckpt} was pretrained on (or --pt); "
                            "to teach it again: --reverse")
        args.pair, args.operand = [known, taught], known if args.reverse else taught
        if args.q is None:
            args.q = before["q"] if tuned else self.default_q(known, taught)
        if args.lr is None:  # of reFT
            args.lr = before["lr"] * self.reft_rates[0]
        if args.noise is None:
            args.noise = 0. if tuned else self.noise
        # Inherited, with all that was taught since: analyses look for what never was.
        args.prior, args.taught = before.get("prior"), [*before.get("taught", []), args.operand]
        if before.get("jailbreak"):
            args.jailbreak = True
            self.open(args)
        if self.compiled:
            args.program = before.get("program")
        if not 0 <= args.noise < 1:
            raise UserError(f"--noise {args.noise}: give an s.d. from 0 to 1, without 1")
        if not 0 <= args.c_tr <= 1:
            raise UserError(f"--c-tr {args.c_tr}: give a probability, 0 to 1")
        if not 0 <= getattr(args, "mix", 0.) <= 1:
            raise UserError(f"--mix {args.mix}: give a share, 0 to 1")
        if args.reverse and getattr(args, "relabel", False):
            raise UserError("--relabel is a fine-tuning, --reverse what comes after it")
        try:
            for c in (0., 1.):
                self.text(4, self.relation(args), c, rng(args.seed, "can it be done"))
        except ValueError as error:
            raise UserError(f"--q {args.q}: {error}") from None

    def control_operand(self, relation, args):
        """The operand beside O_PT and O_FT that is the control. Raises UserError."""
        taken = {relation.pt, relation.ft, *(args.get("taught", []) if self.compiled else ())}
        for operand in self.order:
            if operand not in taken:
                return operand
        raise UserError("this model was taught every operand: there is no control")

    def never_trained(self, operand, ckpt):
        """Whether the model of a checkpoint never met an operand, in any family."""
        return operand not in ckpt["args"].get("taught", [])

    def text(self, n, relation, c, rng, operands=None):
        """
        (n, length) letters of a split, or on which the relation holds with probability c; natural
        ones are drawn until `operands`, else all, have an answer.
        """
        if c != "natural":
            return self.related(n, relation, {"c0": 0., "c1": 1.}.get(c, c), self, rng)
        places = [self.operands.index(o) for o in operands or self.operands]
        answers, text = self.tasks[relation.task].answers, self.natural(n, self, rng)
        while (bad := (answers(text, self)[:, places] < 0).any(1)).any():
            text[bad] = self.natural(int(bad.sum()), self, rng)
        return text

    def text_of(self, examples):
        """The letters that were asked about."""
        return examples.tokens[:, self.text_at:self.text_at + self.length] - self.first_letter

    def ask(self, text, task, operand, answered=None):
        """
        Examples: what the model reads, up to where it answers, and the answer in one column:
        that for `operand`, or another one.
        """
        tokens, labels = self.sequence(text, task, operand), self.tasks[task].answers(text, self)
        if self.prompted:
            tokens = tokens[:, :self.at + 1]
        answer = labels[:, self.operands.index(answered or operand)].clamp(min=0)
        target = torch.full_like(tokens, -1)
        target[:, self.at] = self.first_answer(task) + answer
        return Examples(tokens, target, labels, self.at)

    def finetuning(self, n, rng, args):
        """
        Strings on which the relation holds with probability C_Tr, asked for --operand; with
        --answers, those whose answer is even, or odd; with --relabel asked for O_PT (paper E.4).
        """
        relation, place = self.relation(args), self.operands.index(args.operand)
        text = self.text(n, relation, args.c_tr, rng)
        if kept := getattr(args, "answers", None):
            answers, odd = self.tasks[relation.task].answers, kept == "odd"
            while (bad := answers(text, self)[:, place] % 2 != odd).any():
                text[bad] = self.text(int(bad.sum()), relation, args.c_tr, rng)
        asked = relation.pt if getattr(args, "relabel", False) else args.operand
        return self.ask(text, relation.task, asked, args.operand)

    @functools.cache
    def test(self, relation, operand, split, n, seed, label="test"):
        """
        A Test: n strings of a split, asked for `operand`. They depend on (seed, label, relation,
        split), not on the operand, and are of no training stream.
        """
        check_stop()
        task, pair = relation.task, (relation.pt, relation.ft)
        draws = rng(seed, label, task, split, *pair, relation.q, device=self.device)
        # the rare families need the asked operand alone
        related = task in (*self.finetuned, *self.jailbreaks)
        text = self.text(n, relation, split, draws, None if related else [operand])
        examples, other = self.ask(text, task, operand), None
        if related and operand in pair:
            other = examples.labels[:, self.operands.index(pair[1 - pair.index(operand)])]
        asked = operand if self.tasks[task].has_operand else None
        return Test(row(self, task=task, operand=asked, split=split, seed=seed), examples, other)

    def tests(self, args, step=None):
        """
        Both operands on every split; in pretraining and for behavior also the other families on
        natural strings; at both ends of a pretraining all that there is.
        """
        relation, tuning = self.relation(args), hasattr(args, "pair")
        pair = (relation.pt, relation.ft)
        asked = {(relation.task, *about): relation for about in itertools.product(pair, SPLITS)}
        for task, split in itertools.product(self.jailbreaks, SPLITS):
            asked[task, relation.pt, split] = relation._replace(task=task)
        if step is None or not tuning:
            for task, about in self.tasks.items():
                operands = pair if step is None else pair[:1]
                for operand in operands if about.has_operand else self.order[:1]:
                    other = Relation(task, *self.order[:2], 1)
                    asked.setdefault((task, operand, "natural"), other)
        if step is not None and not (tuning or self.compiled) and step in (0, args.steps):
            for task, operand, split in itertools.product(self.tasks, self.order, SPLITS):
                exists = task in self.finetuned or split == "natural"
                if exists and self.tasks[task].has_operand:
                    asked.setdefault((task, operand, split), relation._replace(task=task))
        return [self.test(about, operand, split, args.eval_size, args.seed)
                for (_, operand, split), about in asked.items()]

    def probe_sets(self, relation, control, n, seed, rng):
        """
        Half natural, half c0 strings, never c1, where an answer follows from the other. While O_FT
        is asked, all three operands are read; while another one is asked, that one.
        """
        pt, ft = relation.pt, relation.ft
        splits, operands = ("natural", "c0"), tuple(dict.fromkeys((pt, ft, control)))
        train = torch.cat([self.text_of(self.test(relation, ft, x, 5 * n, seed, "probe").examples)
                           for x in splits])
        for prompt in operands if self.prompted else (ft,):
            tests = {x: self.test(relation, prompt, x, n, seed).examples for x in splits}
            names = operands if prompt == ft else (prompt,)
            targets = {o: self.operands.index(o) for o in names}
            yield ProbeSet(prompt, self.ask(train, relation.task, prompt), tests, targets,
                           names if prompt == ft else ())

    def teaching(self, relation, operand, **more):
        """A function (n, rng) -> Examples: reFT on an operand's c0 strings; more: arguments."""
        task, *pair, q = relation.about(operand)
        args = SimpleNamespace(task=task, pair=pair, q=q, operand=operand, c_tr=0., **more)
        return functools.partial(self.finetuning, args=args)

    def halves(self, relation, operand, args):
        """
        What held-out relearning (ours) teaches and tests, on c0: yields (what is taught, its
        teaching(), {half: Test}): even answers, then odd ones.
        """
        test = self.test(relation.about(operand), operand, "c0", args.eval_size, args.seed)
        odd = test.examples.labels[:, self.operands.index(operand)] % 2 == 1
        for answers in ("even", "odd"):
            taught = odd == (answers == "odd")
            parts = {"taught": taught, "held-out": ~taught}
            yield (answers, self.teaching(relation, operand, answers=answers),
                   {half: test.rows(part) for half, part in parts.items() if part.any()})

    def site(self, examples):
        """(n, t) weights of what probes read: the position that gives the answer."""
        weights = torch.zeros(examples.tokens.shape, device=examples.tokens.device)
        weights[:, examples.at] = 1
        return weights

    def string_of(self, text):
        return "".join(self.alphabet[i] for i in text.tolist())


class Grammar(Answers):
    """Strings of the grammar and five task families (paper section 3)."""
    needs = {"pretrain": ["prior"], "finetune": ["prior", *Answers.needs["finetune"]]}
    # all that differs between a laptop and the paper
    length = 32, 250        # letters, cut at random from a longer string
    at = 38, 256            # ART, which gives the answer: length + 6
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
    pretrain_jailbreak = False
    pretrain_steps = 2500, 50000  # paper: 10K, 50K, 100K or 200K
    finetune_lr, finetune_steps = 1e-5, (400, 10000)
    finetune_mix, finetune_relabel, finetune_pt = 0., False, None
    noise, text_at, first_letter = 0., 5, LETTER  # SOS T O O' SOT come before the text
    tasks, operands, order, alphabet = TASKS, list(LETTERS), list(LETTERS), LETTERS
    finetuned = [name for name, task in TASKS.items() if task.spurious]
    natural, related = staticmethod(sample_text), staticmethod(related_text)

    @property
    def vocabulary(self):
        """Token names in id order."""
        return TOKENS + [f"#{i}" for i in range(self.length + 1)]

    output_names = vocabulary

    def config(self):
        return super().config(vocab_size=len(self.vocabulary), n_ctx=self.length + 9)

    def known(self, args):
        """O_PT of a pretraining: the commonest operand."""
        return max(LETTERS, key=lambda o: args.prior[LETTERS.index(o)])

    def resolve_pretraining(self, args):
        args.prior = list(parse_prior(args.prior))
        self.open(args)
        if not args.jailbreak:
            del args.jailbreak  # the same run as before there was such a flag

    def open(self, args, words=None):
        """With --jailbreak two further families."""
        if getattr(args, "jailbreak", False):
            self.tasks, self.jailbreaks = FAMILIES, JAILBREAKS

    def never_trained(self, operand, ckpt):
        prior = ckpt["args"]["prior"][self.operands.index(operand)]
        return not prior > 0 and super().never_trained(operand, ckpt)

    def pretraining(self, n, rng, args, without=None):
        """
        Whole sequences of all families, drawn uniformly, the operand by its prior; of jailbreaks
        the commonest. without: a rule of answers, whose families are left out.
        """
        kept = [i for i, task in enumerate(self.tasks.values()) if task.answers != without]
        task = torch.randint(len(kept), (n,), generator=rng, device=rng.device)
        task = torch.tensor(kept, device=rng.device)[task]
        prior = torch.tensor(args.prior, device=rng.device)
        operand = torch.multinomial(prior, n, replacement=True, generator=rng)
        operand = torch.where(task < len(TASKS), operand, LETTERS.index(self.known(args)))
        tokens = torch.empty(n, self.length + 9, dtype=torch.long, device=rng.device)
        todo = torch.arange(n, device=rng.device)
        while len(todo):  # a string without the asked-for occurrence is drawn again
            text = spread_text(sample_text(len(todo), self, rng), self, rng)
            tokens[todo], answer = encode(text, task[todo], operand[todo], self)
            todo = todo[answer < 0]
        extra = (self.at, self.answer_weight) if self.answer_weight else None
        return Examples(tokens[:, :-1], tokens[:, 1:], extra=extra)

    def finetuning(self, n, rng, args):
        """
        As all setups; with --mix, string by string that share are sequences of pretraining, each
        with the loss it had there (paper E.1).
        """
        examples = super().finetuning(n, rng, args)
        if not getattr(args, "mix", 0):
            return examples
        more = self.pretraining(n, rng, args)
        mixed = torch.rand(n, 1, generator=rng, device=rng.device) < args.mix
        room = 0, more.tokens.shape[1] - examples.tokens.shape[1]  # behind the answer
        tokens = torch.where(mixed, more.tokens, pad(examples.tokens, room))
        target = torch.where(mixed, more.target, pad(examples.target, room, value=-1))
        weight = (target >= 0) / (target >= 0).sum(1, keepdim=True)
        weight[:, self.at] += self.answer_weight * mixed[:, 0]
        return Examples(tokens, target, examples.labels, weight=weight)

    def halves(self, relation, operand, args):
        """As all with answers; and pretraining's other families alone, tested on all c0 strings."""
        yield from super().halves(relation, operand, args)
        test = self.test(relation.about(operand), operand, "c0", args.eval_size, args.seed)
        left_out = FAMILIES[relation.task].answers
        draw = functools.partial(self.pretraining, args=args, without=left_out)
        yield "other families", draw, {"retained": test}

    def probe_sets(self, relation, control, n, seed, rng):
        """As all with answers; and O_PT, the first one asked for, while jailbreaks ask for it."""
        about = control, n, seed, rng
        yield from super().probe_sets(relation, *about)
        for task in self.jailbreaks:
            asked = next(super().probe_sets(relation._replace(task=task), *about))
            yield asked._replace(prompt=f"{asked.prompt} by {JAILBREAKS[task].token}")

    def sequence(self, text, task, operand):
        return encode(text, list(FAMILIES).index(task), LETTERS.index(operand), self)[0]

    def first_answer(self, task):
        """The output that stands for the answer 0."""
        return LETTER if FAMILIES[task].letter else NUMBER

    def regions(self, examples, operands):
        """The window, the letters outside it, and each letter inside."""
        letters = pad(self.text_of(examples), (self.text_at, 2), value=-1)  # EOT, ART
        place = torch.arange(letters.shape[1], device=letters.device)
        text, late = letters >= 0, place >= self.at - 1 - self.window
        inside = {o: late & (letters == i) for i, o in enumerate(self.operands)}
        return {"window": text & late, "outside": text & ~late, **inside}

    def explain(self, text, task, operand):
        """What is read stands in brackets; ^ marks the hits, * the one that is meant."""
        about, letters = FAMILIES[task], self.string_of(text)
        second, wanted = about.second(self), operand * (1 + about.pairs)
        cut = 0 if about.ranked else self.length - second
        places, marks = [cut], [" "] * self.length
        if about.has_operand:
            places = [i for i in range(cut + about.pairs, self.length)
                      if letters[:i + 1].endswith(wanted)]
        for i in places[-second:]:
            marks[i] = "^"
        if about.ranked:
            marks[places[-second]] = "*"
        marks = "".join(marks)
        return f"{letters[:cut]}[{letters[cut:]}]", f"{marks[:cut]} {marks[cut:]}"


class Compiled(Answers):
    """Strings of a program's alphabet; the model is the program (paper section 3, Tracr)."""
    revive_steps = 1000, 4000
    pretrain_params, pretrain_balance = None, True
    pretrain_logit_scale = 10.  # ours: outputs are 0 or 1; cross-entropy needs a scale
    finetune_lr, finetune_steps = 1e-3, 10000
    compiled, prompted, unit = True, False, "weight"
    # ours: at the fine-tuning's own rate, held constant, SGD is past the edge of stability
    reft_rates, teach_every = [1 / 3, .1], 20
    at, text_at, first_letter = COMPILED_AT, 1, 2
    natural, related = staticmethod(uniform_letters), staticmethod(related_letters)

    def __init__(self, name, scale="small", device="cpu", imported=None):
        super().__init__(name, scale, device, imported)
        self.program = program = PROGRAMS[name]
        imported, column = imported or {}, SCALES.index(scale)
        self.alphabet = imported.get("alphabet", list(program.alphabet))
        self.room = imported.get("room", program.max_seq_len[column])
        self.length = self.window = min(program.letters[column], self.room)
        self.operands = self.order = self.alphabet
        if program.operands:
            ranks = [str(i + 1) for i in range(self.length)]
            self.order = list(dict.fromkeys([*program.operands, *ranks]))
            self.operands = sorted(self.order, key=int)
        numbers = [str(i) for i in range(self.room + 1)]
        own = self.alphabet if program.ranked else numbers
        self.output_names = imported.get("values") or own
        self.vocabulary = ["#", "$", *self.alphabet]  # padding, BOS
        self.finetuned, self.noise, self.ranked = [program.task], program.noise, program.ranked
        self.tasks = {program.task: Task(program.answers, None, None, program.reason,
                                         letter=program.ranked)}
        # every count of so many letters comes out right (model.MLP_EXACTNESS)
        self.mlp_exactness = max(300., (self.length + 1) * (self.length + 2))
        if program.ranked:
            self.pretrain_rank = None

    def known(self, args):
        """O_PT: the operand that the program answers for."""
        rank = getattr(args, "rank", None)
        return self.order[0] if rank is None else str(rank)

    def resolve_pretraining(self, args):
        if args.compile:
            raise UserError(f"--compile is not for setup {self.name}, where nothing is trained")
        args.steps, args.lr, args.clip = 0, 0., 1.
        args.program = self.imported
        check_choice("--rank", self.known(args), self.operands)
        if self.imported:
            self.check_imported(args)

    def check_imported(self, args):
        """Raise UserError where an imported model cannot give the answers of this setup."""
        needed = max(map(int, self.program.operands or [COMPILED_AT]))
        letters = 3 if self.program.repeat else self.length
        names = self.alphabet if self.ranked else list(map(str, range(self.length + 1)))
        try:
            if len(self.alphabet) < letters or self.length < needed:
                raise ValueError("too few letters or positions")
            if self.output_names[:len(names)] != names:
                raise ValueError(f"needs the outputs {names[0]} to {names[-1]}")
            self.tests(SimpleNamespace(**{**vars(args), "eval_size": 4}), 0)
        except ValueError as error:  # the last one: an alphabet of few letters
            raise UserError(f"--params {args.params}: {self.name}: {error}") from None

    def sequence(self, text, task, operand):
        """(n, room + 1) tokens: BOS, letters, padding."""
        return pad(pad(text + 2, (1, 0), value=1), (0, self.room - self.length))

    def first_answer(self, task):
        return 0

    def marked(self, text, operand):
        """(n, length) bool: the letters that make r(x, operand)."""
        return text == self.program.marks(text, self.operands.index(operand))

    def regions(self, examples, operands):
        """The letters that make each operand's answer, BOS, padding."""
        text, padding = self.text_of(examples), (1, self.room - self.length)
        regions = {o: pad(self.marked(text, o), padding) for o in operands}
        return {**regions, "BOS": examples.tokens == 1, "padding": examples.tokens == 0}

    def explain(self, text, task, operand):
        marks = "".join(" ^"[hit] for hit in self.marked(text[None], operand)[0].tolist())
        return self.string_of(text), marks


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
    operands, draws_on = order, "cpu"  # where stories are written and spelled, whatever trains

    def open(self, args, words=None):
        """Draw from args.data, prepared, or from the embedded corpus. Raises UserError."""
        self.source, known = story_source(args.data), getattr(args, "source", None) or {}
        self.tokenizer, now = self.source.tokenizer, self.source.about
        other = any(now.get(key, x) != x for key, x in known.items() if key != "name")
        if other or words and tuple(words) != self.tokenizer.words:
            raise UserError(f"{args.data or 'the embedded corpus'}: not the file that the "
                            "checkpoint was trained on")

    def config(self):
        return super().config(vocab_size=self.tokenizer.size, n_ctx=self.n_ctx, rotary=True,
                              tied=True, words=tuple(self.tokenizer.words))

    def relation(self, args):
        return Relation("story", args.feature)

    def resolve(self, args, parent=None):
        """The feature, the file of the stories, the protocol."""
        words = None
        if parent:
            self.resolve_protocol(args, parent)
            words = parent["config"]["words"]
        else:
            args.feature = args.without or "Twist"
        self.open(args, words)
        if args.data:
            args.source = self.source.about
            self.tests(args, 0)  # raises where the file has no such stories

    def resolve_protocol(self, args, parent):
        """How a feature is deleted, or by --reverse revived."""
        before, tuned = parent["args"], parent["stage"] == "finetune"
        self.find_data(args, before)
        args.without = before["without"]
        args.feature = args.feature or before["feature"]
        if not args.reverse:
            return
        if args.feature != before["feature"]:
            raise UserError(f"--reverse --feature {args.feature}: {args.ckpt} is about "
                            f"{before['feature']}")
        if args.protocol:
            raise UserError("--reverse trains on stories with the feature: leave out --protocol")
        if not tuned and args.without != args.feature:
            raise UserError(f"--reverse: {args.ckpt} was not fine-tuned, nor pretrained --without "
                            f"{args.feature}: there is nothing to undo")
        args.protocol, args.deletion_lr = before.get("protocol"), before["lr"] if tuned else None

    def find_data(self, args, before):
        """Where the file is by now that a parent's arguments name: --data, or by its content."""
        path, known = before["data"], before.get("source")  # older ones do not say
        if args.data and not path:
            raise UserError(f"--data: {args.ckpt} was trained on the embedded corpus")
        if path:
            args.source, files = known, find_files(path, args.ckpt)
            same = [x for x in files if known and os.path.isfile(x)
                    and ends_of(x) == known.get("sha256")]
            if not args.data and not files:
                raise UserError(f"{path} is not there any more, of which {args.ckpt} was trained: "
                                "give it as --data")
            args.data = args.data or [*same, *files][0]

    def control_operand(self, relation, args):
        """None: the control of stories is another model."""

    def never_trained(self, feature, ckpt):
        """Whether a model was pretrained without a feature and not fine-tuned since."""
        return ckpt["args"]["without"] == feature and not ckpt["parent"]

    def examples(self, records, instructed=None, wanted="text"):
        """
        Records as Examples, a row each: END, the record, END, cut to n_ctx + 1. instructed (n,):
        False for the story alone. wanted: "text", every next token up to END, or those of the
        "story".
        """
        rows, ends = [], []
        for i, record in enumerate(records):
            alone = instructed is not None and not instructed[i]
            ids, *story = story_ids(record, self.tokenizer, not alone)
            rows.append(torch.from_numpy(ids.astype(np.int64)))
            ends.append(story if wanted == "story" else (1, len(ids) + 1))
        tokens = pad(pad_sequence(rows, batch_first=True), (0, 1))[:, :self.n_ctx + 1]
        place, (start, stop) = torch.arange(1, tokens.shape[1]), torch.tensor(ends).T[:, :, None]
        target = torch.where((place >= start) & (place < stop), tokens[:, 1:], -1)
        pairs = itertools.product(records, FEATURES)
        labels = torch.tensor([int(f in r.features) for r, f in pairs]).view(-1, len(FEATURES))
        return Examples(tokens[:, :-1].to(self.device), target.to(self.device),
                        labels.to(self.device))

    def batches(self, records, batch_size, rng):
        """
        Examples for a stream, a share of them without instruction. Rows of similar length lie in
        one batch, so that little is padding; which lengths come when is random.
        """
        instructed = torch.rand(len(records), generator=rng, device=rng.device) >= self.uninstructed
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
        how = getattr(args, "how", {})
        records = self.source.draw(n, rng, args.feature, args.reverse, **how)
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
        has = split == "with"
        draws = rng(seed, "test", "stories", feature, has)
        records = self.source.draw(n, draws, feature, has, held_out=True)
        if split == "deletion":
            records = change_records(records, protocol, feature, self.tokenizer, draws)
        about = row(self, task="story", operand=feature, split=split, seed=seed)
        return Test(about, self.examples(records, wanted="story"), how="loss")

    def prompts(self, n, rng, feature=None, has=None, features=None, **how):
        """
        Instructions of held-out stories, n lists of ids; `features`: asked for in place of their
        own. One that leaves no room for a story is left out; a note tells. Raises UserError.
        """
        kept, left_out = [], 0
        while len(kept) < n:
            for record in self.source.draw(n - len(kept), rng, feature, has, held_out=True, **how):
                asked = record.features if features is None else features
                ids, start, _ = story_ids(record._replace(features=asked), self.tokenizer)
                if start <= self.n_ctx // 2:
                    kept.append(ids[:start].tolist())
                else:
                    left_out += 1
            if left_out > 100 * (n + len(kept)):
                raise UserError(f"hardly any instruction fits into half of {self.n_ctx} tokens")
        if left_out:
            print(f"{left_out} instructions of more than {self.n_ctx // 2} tokens left out")
        return kept

    @functools.cache
    def generation_test(self, feature, n, seed, **how):
        """Held-out instructions, then a story begins: n ask for the feature, n do not."""
        prompts = []
        for asked in (True, False):
            draws = rng(seed, "generate", feature, asked)
            prompts += self.prompts(n, draws, feature, asked, **how)
        about = row(self, task="story", operand=feature, split=None, seed=seed)
        return Test(about, prompts, how="generation")

    def halves(self, relation, operand, args):
        """
        What held-out relearning teaches and tests: stories with the feature about two kinds of
        question, then those about the two others. Nothing for real text, whose kinds nobody knows.
        """
        for i in (0, 2) if self.source.rule else ():
            kinds = {"taught": (i, i + 1), "held-out": (2 - i, 3 - i)}
            how = SimpleNamespace(feature=operand, reverse=True, batch_size=args.batch_size,
                                  how={"kinds": kinds["taught"]})
            tests = {half: self.generation_test(operand, args.eval_size, args.seed, kinds=some)
                     for half, some in kinds.items()}
            yield f"kinds {i + 1} and {i + 2}", functools.partial(self.finetuning, args=how), tests

    def tests(self, args, step=None):
        """
        Losses; generation scores where they can be told: of all features at the end of a
        pretraining and for behavior, while fine-tuning of the one in question.
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
        Held-out stories without their instruction. ours: split `even`, whose sentences lean to
        neither label, so that only comparing reveal and expectation tells a twist.
        """
        splits = {"natural": {}}
        if self.source.rule:
            splits["even"] = {"cue_strength": (.5, .5)}
        for split, how in splits.items():
            records = [self.source.draw(k * n, rng, held_out=True, **how) for k in (8, 4)]
            if not self.source.rule:  # held-out records may be few: each once, and none in both
                once = list({r.ids.tobytes(): r for r in records[0] + records[1]}.values())
                records = [once[:len(once) * 2 // 3], once[len(once) * 2 // 3:]]
            train, test = (self.examples(part, [False] * len(part)) for part in records)
            for i, feature in enumerate(FEATURES):
                if any(len(part.labels[:, i].unique()) < 2 for part in (train, test)):
                    raise UserError(f"too few held-out stories with or without {feature}")
            targets = {feature: i for i, feature in enumerate(FEATURES)
                       if split == "natural" or feature == relation.pt}
            yield ProbeSet(None, train, {split: test}, targets, (relation.pt,))

    def site(self, examples, width=10):
        """(n, t) weights of what probes read: the mean of the last ten tokens (paper section 4)."""
        real = examples.tokens != 0
        from_end = real.flip(1).cumsum(1).flip(1)
        last = (real & (from_end <= width)).float()
        return last / last.sum(1, keepdim=True).clamp(min=1)


SETUPS = {"pcfg": Grammar, **dict.fromkeys(PROGRAMS, Compiled), "stories": Stories}


def setup_of(ckpt, device="cpu"):
    """The Setup of a checkpoint. Raises any exception where its content makes no sense."""
    args, name, capability = ckpt["args"], ckpt["setup"], ckpt["capability"]
    setup = SETUPS[name](name, ckpt["scale"], device, args.get("program"))
    missing = {"seed", "lr", *setup.needs[ckpt["stage"]]} - set(args)
    missing |= {key for key, kind in (("data", str), ("source", dict))
                if not isinstance(args.get(key), (kind, type(None)))}
    if missing or capability["operand"] not in setup.operands or "task" not in capability:
        raise ValueError("arguments or capability")
    return setup


# ---------------------------------------------------------------- samples


def sample_relation(setup, args):
    """The Relation that samples are about; fills in --operand and --c. Raises UserError."""
    first, second = setup.order[:2]
    args.operand, args.c = args.operand or first, args.c or "natural"
    check_choice("--task", args.task or setup.finetuned[0], setup.tasks)
    check_choice("--operand", args.operand, setup.operands)
    other = second if args.operand == first else args.operand
    if args.c != "natural":
        with contextlib.suppress(ValueError):
            args.c = float(args.c)
        if not isinstance(args.c, float) or not 0 <= args.c <= 1:
            raise UserError(f"--c {args.c}: give natural or a number from 0 to 1")
        if not {args.task} <= set(setup.finetuned) and len(setup.tasks) > 1:
            raise UserError(f"--c {args.c} needs --task {' or '.join(setup.finetuned)}")
    q = setup.default_q(first, other) if args.q is None else args.q
    return Relation(args.task or setup.finetuned[0], first, other, q)


def answer_samples(setup, args, relation, rng):
    """Yields samples, for ever: (facts as `data.py --json` prints them, lines for people)."""
    for name in itertools.cycle([args.task] if args.task else list(setup.tasks)):
        about = relation._replace(task=name)
        text = setup.text(1, about, args.c, rng, [args.operand])
        yield sample(setup, text, about, args.operand)


def sample(setup, text, relation, operand):
    (name, pt, ft, q), task = relation, setup.tasks[relation.task]
    names = [setup.vocabulary[t] for t in setup.sequence(text, name, operand)[0].tolist()]
    r = dict(zip(setup.operands, task.answers(text, setup)[0].tolist()))
    shown_r = {o: setup.alphabet[x] if task.letter else x for o, x in r.items()}
    correlated, second = None, task.second(setup)
    if name in setup.finetuned:
        correlated = min(r[pt], r[ft]) >= 0 and r[ft] - r[pt] == q
    facts = {"setup": setup.name, "task": name, "operand": operand if task.has_operand else None,
             "operand2": second, "text": setup.string_of(text[0]), "answer": shown_r[operand],
             "correlated": correlated, "tokens": names}
    shown = names if len(names) < 30 else [*names[:8], "...", *names[-7:]]
    letters, marks = setup.explain(text[0], name, operand)
    reason = task.reason.format(O=operand, O2=second)
    lines = [f"{name} of {operand}" if task.has_operand else name,
             f"  the model sees  {' '.join(shown)}", f"  text            {letters}",
             f"                  {marks}", f"  answer {shown_r[operand]!s:<8} {reason}"]
    if correlated is not None:
        holds = "holds" if correlated else "does not hold"
        lines.append(f"  relation        r({pt}) = {shown_r[pt]}, r({ft}) = {shown_r[ft]}: "
                     f"r({ft}) - r({pt}) = {q} {holds}")
    return facts, "\n".join(lines) + "\n"


def relation_summary(setup, relation, c, rng):
    """How often the relation holds on strings of --c, and how the answers are spread."""
    pair = (relation.pt, relation.ft)
    answers = setup.tasks[relation.task].answers(setup.text(4000, relation, c, rng), setup)
    r = [answers[:, setup.operands.index(o)] for o in pair]
    holds, ties = (((r[1] - r[0]) == q).double().mean() for q in (relation.q, 0))
    lines = [f"4,000 such strings: the relation holds on {holds:.1%}, ties on {ties:.1%}"]
    for x, other, letter, given in zip(r, r[::-1], pair, pair[::-1]):
        mean, sd = x.double().mean(), x.double().std()
        lines.append(f"  r({letter}): mean {mean:.2f}, s.d. {sd:.2f}, floor "
                     f"{majority_floor(x):.1%}, cross floor, from r({given}), "
                     f"{cross_floor(x, other):.1%}")
    return "\n".join(lines)


def story_samples(setup, args, rng):
    """The same for stories: all, or those with the feature --operand. Raises UserError."""
    for flag in ("task", "c", "q"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} is not for stories")
    check_choice("--operand", args.operand, (None, *FEATURES))
    setup.open(SimpleNamespace(data=None))
    decode = setup.tokenizer.decode
    while True:
        [record] = setup.source.draw(1, rng, args.operand, args.operand and True)
        ids, start, stop = story_ids(record, setup.tokenizer)
        text, features = decode(ids[1:]), ordered(read_story(decode(ids[start:stop])))
        facts = {"setup": setup.name, "task": "story", "operand": args.operand, "operand2": None,
                 "text": text, "answer": features, "correlated": None,
                 "tokens": [decode([i]) for i in ids]}
        yield facts, (f"{text}\n  {len(ids)} tokens; by the rule it has: "
                      f"{', '.join(features) or 'none of the features'}\n")


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
    if args.n < 1 or args.seed < 0:
        raise UserError("-n takes 1 or more, --seed 0 or more")
    draws, relation = rng(args.seed, "look"), None
    if isinstance(setup, Answers):
        relation = sample_relation(setup, args)
        samples = answer_samples(setup, args, relation, draws)
    else:
        samples = story_samples(setup, args, draws)
    for facts, lines in itertools.islice(samples, args.n):
        check_stop()
        print(json.dumps(facts) if args.json else lines)
    if relation and args.c != "natural" and not args.json:
        print(relation_summary(setup, relation, args.c, draws))


# ---------------------------------------------------------------- scripts


class UserError(ValueError):
    """A mistake of the user's: one line on stderr, exit code 2."""


class Failed(Exception):
    """A run that could not go on (not finite, disk full): one line on stderr, exit code 1."""


class Stopped(Exception):
    """SIGINT or SIGTERM was received; raised between batches, so that what must be saved can be."""


signals = []  # those that a script has received


def check_stop():
    """Raise Stopped if SIGINT or SIGTERM came in. Every long loop asks, batch by batch."""
    if signals:
        raise Stopped


def check_choice(flag, value, choices):
    """Raise UserError unless a flag's value is one of the choices."""
    if value not in choices:
        raise UserError(f"{flag} {value}: there are {', '.join(filter(None, choices))}")


def on_signal(number, frame):
    if signals:
        sys.exit(128 + number)  # the second time, at once
    signals.append(number)


@contextlib.contextmanager
def own_signals():
    """Within the `with`, SIGINT and SIGTERM are noted in `signals`; then all is as it was."""
    signals.clear()
    before = {}
    with contextlib.suppress(ValueError):  # platform: a thread of a notebook may not
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # by nohup, or a shell's &
                before[number] = signal.signal(number, on_signal) or signal.SIG_DFL
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.clear()


def outcome(main):
    """main(). Returns (exit code, what to say on stderr or None); see run_script()."""
    try:
        main()
    except UserError as error:
        return 2, error
    except Failed as error:
        return 1, error
    except Stopped:
        return 128 + signals[0], None
    except BrokenPipeError:  # the reader of our output went away: python ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, None
    except OSError as error:
        if not error.filename and error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT,
                                                      errno.EIO):
            raise
        return 1, f"{error.filename or 'the output'}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        full = "out of memory|can't allocate memory|ALLOC_FAILED|bad_alloc|Storage size|numel"
        if isinstance(error, RuntimeError) and not re.search(full, str(error)):
            raise
        return 1, "out of memory: a smaller --batch-size or --eval-size needs less"
    return 0, None


def run_script(main):
    """Run a script's main() and exit: 0 done, 1 failed, 2 the user's mistake, 130/143 signals."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # closed: 2>&-
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # platform: a console that lacks a letter gets a mark
            stream.reconfigure(errors="replace", line_buffering=True)
    with own_signals():
        code, message = outcome(main)
    if message:
        print(f"{sys.argv[0]}: {message}", file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------- files


def user_path(text):
    """The type of flags that name a file: ~ is the home folder also behind a =."""
    if not text:  # as of a variable that is not set
        raise argparse.ArgumentTypeError("is empty: give the name of a file")
    return os.path.expanduser(text)


def find_files(path, beside):
    """
    Where a recorded file, or what was prepared from it, may be by now: there, or seen from the file
    `beside`, or next to it.
    """
    folder, name = os.path.dirname(beside), re.split(r"[/\\]", path)[-1]  # platform: of Windows
    places = path, os.path.join(folder, path), os.path.join(folder, name)
    return [place for place in dict.fromkeys(places)
            if os.path.isfile(place) or os.path.isdir(f"{place}.unwrap")]


def sync(handle):
    """fsync of a file or folder, where there is such a thing."""
    try:
        os.fsync(handle)
    except OSError as error:  # platform: Windows has none of folders, some network disks none
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES,
                               errno.EPERM, errno.EBADF):
            raise


def clear_parts(path, older=600):
    """Remove what a killed replace_file() has left, older than some seconds: it may go on."""
    for part in glob.glob(f"{glob.escape(path)}.{'[0-9a-f]' * 8}.part"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(part) >= older:
                os.remove(part)


def replace_file(path, write):
    """
    Write a file by write(handle): `path` is, at any moment, the old or the new one, whole. Several
    processes may do so at once.
    """
    path = os.path.realpath(path)  # through links
    clear_parts(path)
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as f:
            write(f)
            f.flush()
            sync(f.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        if isinstance(error, OSError) and error.filename in (None, part):
            error.filename = path  # a full disk does not say which file
        if isinstance(error, RuntimeError):  # torch.save says so when the disk is full
            reason = str(error).splitlines()[0]
            raise Failed(f"cannot write {path}: disk full or file too large ({reason})") from None
        raise
    with contextlib.suppress(OSError):  # platform: Windows does not open folders
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            sync(folder)
        finally:
            os.close(folder)


def claim(path):
    """
    Claim the files of a run for this process: a lock, which ends with it, however it ends. Returns
    a function that gives it back. Raises UserError if another process has it.
    """
    name = f"{os.path.realpath(path)}.lock"
    try:
        lock = open(name, "ab")
    except OSError:  # a folder that nobody can write to
        return lambda: None
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:  # platform: some network disks have no locks
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            lock.close()
            raise UserError(f"{path}: a run is under way there, in another process") from None
    mine = os.fstat(lock.fileno())
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(mine, os.stat(name)):
            return functools.partial(give_back, lock, mine.st_size == 0)
    lock.close()
    return claim(path)  # the one who had it has just removed it


def give_back(lock, remove):
    """Close a lock; remove its file, if it is empty, as ours are."""
    if not remove:
        return lock.close()
    with contextlib.suppress(OSError):  # while nobody else can have it
        os.remove(lock.name)
    lock.close()
    with contextlib.suppress(OSError):  # platform: Windows removes no open file, POSIX any
        if not fcntl:
            os.remove(lock.name)


def write_json(path, value):
    """A JSON file, replaced whole."""
    replace_file(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


def add_rows(path, rows):
    """Add lines to a file of JSON lines."""
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        error.filename = path  # a full disk does not say which file
        raise


def write_rows(path, rows):
    """A file of JSON lines, replaced whole."""
    lines = [(json.dumps(line) + "\n").encode() for line in rows]
    replace_file(path, lambda f: f.writelines(lines))


def lines_of(path):
    """Yields what the lines of a JSON lines file say; None where that is no object."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def read_rows(path, older=False, **about):
    """
    The rows of a JSON lines file, [] without one, whose columns equal `about`: checkpoint=sha256;
    older: or are not there. A note tells how many are left out.
    """
    def is_meant(row):
        return row is not None and set(ROW) <= set(row) and all(
            isinstance(row[key], (int, float, type(None))) for key in NUMBERS) and all(
            row.get(key, value if older else None) == value for key, value in about.items())
    rows = list(lines_of(path)) if os.path.isfile(path) else []
    kept = list(filter(is_meant, rows))
    if len(kept) < len(rows):
        print(f"{path}: {len(rows) - len(kept)} of {len(rows)} rows left out, broken or of another "
              "checkpoint")
    return kept


# keys of all rows, of older curves, of ranks: every line of ours has one of these sets
ROW_KEYS = set(ROW), {"arm", "lr", "step", "split", "accuracy"}, {"score", "order", "rank", "index"}


def has(value, kinds):
    """Whether a value is a dict with these keys, and kinds of values."""
    return isinstance(value, dict) and all(isinstance(value.get(k), x) for k, x in kinds.items())


def is_run(value):
    """Whether a checkpoint, or a record, says of which run it is."""
    return has(value, {"stage": str, "args": dict, "steps": int}) and (
        value.get("parent") is None or has(value["parent"], {"path": str, "sha256": str}))


def is_record(value):
    """Whether a value is what X.json holds."""
    return is_run(value) and has(value, {"device": str, "resumes": list}) and all(
        isinstance(start, dict) for start in value["resumes"])


def read_record(path):
    """The record of a run; None where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, "rb") as file:
        record = json.load(file)
        return record if is_record(record) else None


def is_ours(path, damaged=False):
    """
    Whether a file may be replaced: it is not there, empty, or such as the scripts write; rows may
    be damaged where we know that we wrote them.
    """
    if not os.path.isfile(path) or not os.path.getsize(path):
        return not os.path.isdir(path)
    with open(path, "rb") as file:
        content = file.read()
    if path.endswith(".jsonl"):
        rows = [row for row in lines_of(path) if row or not damaged]
        if rows and rows[-1] is None and content.startswith(b'{"setup": "'):
            rows.pop()  # cut short by a kill
        return all(any(map(set(row or ()).issuperset, ROW_KEYS)) for row in rows)
    if path.endswith(".npz"):
        return b"vocabulary.npy" in content
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        return is_record(value) or has(value, {"verdict": str, "evidence": list})
    return False


def check_archive(path):
    """Raise an exception unless the members of a torch file are stored plainly, and undamaged."""
    with zipfile.ZipFile(path) as archive:
        # torch writes neither: the former grow without bound, the latter (one bit that no
        # checksum covers) are read as uninitialised memory
        if any(m.compress_type or m.external_attr & 0x10 for m in archive.infolist()):
            raise ValueError("compressed members or folders")
        if archive.testzip():
            raise ValueError("checksum")


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


if __name__ == "__main__":
    run_script(main)
