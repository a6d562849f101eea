"""
What is computed: strings from a probabilistic context-free grammar and five task families that ask about them, strings
for compiled programs, and stories with known features.

    $ python data.py                                    # one sample of every task family, as pretraining sees them
    $ python data.py --task count --operand b --c 1.0   # fine-tuning strings on which "count b" = "count a" + 1
    $ python data.py --setup tracr-max                  # what a model compiled from a RASP program sees
    $ python data.py --setup stories --operand Twist    # stories in the format of TinyStories-Instruct

What the model sees, at the small scale (32 letters, a window of 16, the 3rd occurrence), for "how many b":

    SOS  T_NJ  O_b  #16  SOT  b a c ... c a b  EOT  ART  #6  EOS
         task  operand  O'    32 letters                 answer: the b among the last 16 letters

The families (paper: PCFG setup; O is the operand, O' the second operand), on the text "... a c b a b", O' = 3 or 1:
    count               how many O among the last O' letters             O = b, O' = 3: "b a b" holds 2
    count-composition   how many overlapping pairs OO among them         O = b, O' = 3: 0
    index               distance from the end of the O'-th last O        O = b, O' = 1: 1 (the last letter is 1)
    index-composition   the same for the pair OO, at its later letter    "a a c", O = a, O' = 1: 2
    token               the letter at distance O' from the end           O' = 3: b

The compiled setups have one task each and no prompt: BOS, letters, padding; the answer stands at position 2. A story is
read after an instruction that names its features; no answer, the story itself is what is learned.

Contents: scales and vocabulary | grammar | tasks and answers | compiled setups | edits and the spurious relation |
batches, test sets, floors | stories: records and tokens, the real file, the embedded corpus, protocols and batches |
command line. Everything is a pure function of its arguments and a torch.Generator, on the
generator's device.
"""
import argparse
import collections
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import shutil
import string
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

# ---------------------------------------------------------------- scales and vocabulary

SCALES = {
    # everything that differs between a laptop and the paper   small    paper
    "length":         (32, 250),      # letters in a string, cut at random from a longer one
    "window":         (16, 40),       # O' of both counting families: the last so many letters
    "k":              (3, 6),         # O' of index: which occurrence, from the end
    "pair_k":         (1, 6),         # ours: 32 letters rarely hold a second pair, so small asks for the last one
    "token_at":       (16, 40),       # O' of token
    "sd_count":       (1.6, 2.0),     # ours: spread of the counts in c0 and c1, wide enough that b does not tell a
    "sd_index":       (1.8, 2.4),     # ours: the same for index
    "spread":         (0.5, 0.0),     # ours: share of pretraining strings with widely spread counts, so that "can
    "sd_spread":      (1.8, 0.0),     #       count" holds beyond the few counts that natural strings show
    "n_layer":        (3, 6),
    "n_head":         (4, 6),
    "d_model":        (64, 192),
    "pretrain_lr":    (2e-3, 1e-3),
    "pretrain_steps": (2500, 50000),  # paper: 10K, 50K, 100K or 200K
    "answer_weight":  (1.0, 0.0),     # ours: the answer is one token in 40, too faint for 2,500 steps otherwise
    "finetune_steps": (400, 10000),
    "revive_steps":   (600, 6000),    # ours: how long reFT may take before it counts as not arriving
}


def scale_of(name, setup="pcfg", program=None):
    """
    A setup at a scale ("small" or "paper"), as attributes: sizes, `tasks`, `operands` (the columns of answers), `order`
    (the same as they are taken for O_PT, O_FT and the control). program: what a compiled model's checkpoint says of it.
    """
    column = ("small", "paper").index(name)
    if setup == "stories":
        return SimpleNamespace(setup=setup, name=name, tasks=("story",), operands=list(FEATURES), order=list(FEATURES),
                               **{k: v[column] for k, v in STORY_SCALES.items()})
    if setup != "pcfg":
        return compiled_setup(setup, name, column, program or {})
    return SimpleNamespace(setup=setup, name=name, tasks=TASKS, operands=list(LETTERS), order=list(LETTERS),
                           finetuned=FINETUNED,
                           **{k: v[column] for k, v in SCALES.items()})


def setup_of(ckpt):
    """scale_of() of a checkpoint."""
    return scale_of(ckpt["scale"], ckpt["setup"], ckpt["args"].get("program"))


LETTERS = "abc"
PRIORS = {  # P_T(a, b, c): "low" and "high" speak of b, the later fine-tuning operand (paper: PCFG setup)
    "low": (.999, .001, 0), "99/1": (.99, .01, 0), "medium": (.9, .1, 0), "70/20/10": (.7, .2, .1), "high": (.5, .3, .2)}
SPLITS = ("c0", "c1", "natural")  # the relation never holds | always holds | strings as the grammar makes them


def vocabulary(sc):
    """Token names in id order. T_J1 and T_J2 are two more names for counting, kept for jailbreak experiments."""
    if sc.setup != "pcfg":
        return [PAD, BOS, *sc.alphabet]
    return (["SOS", "SOT", "EOT", "ART", "EOS", "T_NJ", "T_J1", "T_J2", "T_CC", "T_I", "T_IC", "T_T",
             "O_a", "O_b", "O_c", "O_null", "a", "b", "c"] + [f"#{i}" for i in range(sc.length + 1)])


# ids do not depend on the scale
ID = {name: i for i, name in enumerate(vocabulary(SimpleNamespace(setup="pcfg", length=0)))}
NUMBER, LETTER, OPERAND = ID["#0"], ID["a"], ID["O_a"]


def answer_position(sc):
    """The position (of ART) whose output predicts the answer; the same in every sequence of a scale."""
    return sc.length + 6 if sc.setup == "pcfg" else COMPILED_AT


def answer_names(sc):
    """What each output of the model stands for: a vocabulary entry, or in compiled setups a number or a letter."""
    return vocabulary(sc) if sc.setup == "pcfg" else sc.values


# ---------------------------------------------------------------- grammar

GRAMMAR = {  # both rules of a symbol are equally likely (paper: PCFG setup)
    "s": ("rq", "qp"),
    "p": ("mno", "nom"), "q": ("nmo", "nm"), "r": ("om", "mon"),
    "m": ("lj", "jlk"), "n": ("kjl", "ljk"), "o": ("lkj", "kj"),
    "j": ("hi", "ih"), "k": ("hgi", "ghi"), "l": ("ihg", "hig"),
    "g": ("dfe", "fed"), "h": ("edf", "def"), "i": ("efd", "fde"),
    "d": ("ca", "abc"), "e": ("cb", "cab"), "f": ("cba", "ba"),
}


@functools.lru_cache(maxsize=None)
def expansions(symbol):
    """All equally likely letter strings of a symbol, as a list: 2 for d, 16 for g, 512 for j, 8,192 for k and l."""
    if symbol in LETTERS:
        return [symbol]
    out = []
    for rule in GRAMMAR[symbol]:
        parts = [""]
        for child in rule:
            parts = [p + e for p in parts for e in expansions(child)]
        out += parts
    return out


@functools.lru_cache(maxsize=None)
def grammar_tables(device):
    """
    Tables that let sample_strings look up instead of recurse: `children` (symbol, rule, up to 3 children) down to j, k
    and l, and for these three every expansion: `start` and `length` in one long row of `letters`.
    Symbol 0 is padding, which expands to itself and, at the end, to nothing.
    """
    symbols = "#" + "spqrmnojkl"
    children = torch.zeros(len(symbols), 2, 3, dtype=torch.long)
    for symbol in "spqrmno":
        for rule, right in enumerate(GRAMMAR[symbol]):
            for i, child in enumerate(right):
                children[symbols.index(symbol), rule, i] = symbols.index(child)
    slots = [""] * 8192  # padding expands to nothing
    for symbol in "jkl":  # j has 512 expansions, each listed 16 times, so that one draw out of 8,192 serves all three
        slots += [e for e in expansions(symbol) for _ in range(8192 // len(expansions(symbol)))]
    length = torch.tensor([len(w) for w in slots])
    letters = torch.tensor([LETTERS.index(x) for w in slots for x in w])
    tables = SimpleNamespace(children=children, start=length.cumsum(0) - length, length=length, letters=letters,
                             first=symbols.index("j") - 1)
    for name in ("children", "start", "length", "letters"):
        setattr(tables, name, getattr(tables, name).to(device))
    return tables


def sample_strings(n, g):
    """
    n whole strings of the grammar. Returns (letters, length): all letters (0, 1, 2) in one row, and (n,) lengths, 138 to
    432. Levels are expanded for all strings at once; the lowest four levels are looked up.
    """
    t = grammar_tables(g.device)
    symbols = torch.ones(n, 1, dtype=torch.long, device=g.device)  # symbol 1 is s
    for _ in range(3):  # s -> p q r -> m n o -> j k l: (n, 2), (n, 6), (n, 18) with padding
        rule = torch.randint(2, symbols.shape, generator=g, device=g.device)
        symbols = t.children[symbols, rule].flatten(1)
        symbols = symbols[:, :2] if symbols.shape[1] == 3 else symbols  # s has two children
    slot = (symbols - t.first).clamp(min=0) * 8192 + torch.randint(8192, symbols.shape, generator=g, device=g.device)
    sizes = t.length[slot]
    flat = sizes.flatten()
    first = t.start[slot].flatten() - (flat.cumsum(0) - flat)  # where a word lies in the table, less where it goes
    letters = t.letters[torch.repeat_interleave(first, flat) + torch.arange(int(flat.sum()), device=g.device)]
    return letters, sizes.sum(1)


def sample_text(n, sc, g):
    """(n, length) letters: a random window of every string. Too short a string is drawn again (1 in 4 at 250)."""
    out, have = [], 0
    while have < n:
        letters, size = sample_strings(n - have, g)
        start = size.cumsum(0) - size
        room = size - sc.length
        cut = (torch.rand(len(size), generator=g, device=g.device) * (room + 1)).long()
        first = (start + cut)[room >= 0]
        out.append(letters[first[:, None] + torch.arange(sc.length, device=g.device)])
        have += len(first)
    return torch.cat(out)


# ---------------------------------------------------------------- tasks and answers
# One function a family: text (n, length) -> (n, 3) answers for O = a, b, c, as numbers; -1 where there is none.

def count(text, sc):
    """How many O in the last `window` letters. a b b | O = b, window 3 -> 2."""
    last = text[:, -sc.window:]
    return torch.stack([(last == o).sum(1) for o in range(len(sc.operands))], 1)


def count_composition(text, sc):
    """How many overlapping pairs OO lie wholly in the last `window` letters. a a a | O = a, window 3 -> 2."""
    last = text[:, -sc.window:]
    return torch.stack([((last[:, 1:] == o) & (last[:, :-1] == o)).sum(1) for o in range(3)], 1)


def distance_of(hit, k):
    """Distance from the end (1 = last column) of the k-th True of every row of hit (n, 3, length); -1 if fewer."""
    nearer = hit.flip(-1).cumsum(-1, dtype=torch.int16) < k
    distance = nearer.sum(-1) + 1
    return torch.where(distance > hit.shape[-1], -1, distance)


def index(text, sc):
    """Distance from the end of the k-th last O. a b c b | O = b, k 2 -> 3."""
    return distance_of(torch.stack([text == o for o in range(3)], 1), sc.k)


def index_composition(text, sc):
    """Distance from the end of the later letter of the pair_k-th last pair OO. a a c | O = a, pair_k 1 -> 2."""
    pair = torch.stack([(text[:, 1:] == o) & (text[:, :-1] == o) for o in range(3)], 1)
    return distance_of(pair, sc.pair_k)


def token(text, sc):
    """The letter at distance token_at, as 0, 1 or 2; it has no operand, so all three columns agree."""
    return text[:, -sc.token_at, None].expand(-1, 3)


TASKS = {  # name: answers, task token, which number O' is, whether the answer is a number (else a letter)
    "count":             SimpleNamespace(answers=count, token="T_NJ", operand2="window", first_answer=NUMBER),
    "count-composition": SimpleNamespace(answers=count_composition, token="T_CC", operand2="window", first_answer=NUMBER),
    "index":             SimpleNamespace(answers=index, token="T_I", operand2="k", first_answer=NUMBER),
    "index-composition": SimpleNamespace(answers=index_composition, token="T_IC", operand2="pair_k", first_answer=NUMBER),
    "token":             SimpleNamespace(answers=token, token="T_T", operand2="token_at", first_answer=LETTER),
}
FINETUNED = ("count", "index")  # the paper's Counter and Indexer: families with a spurious relation
OPERANDLESS = ("token",)


def encode(text, task, operand, sc):
    """
    Whole sequences `SOS T O O' SOT <text> EOT ART answer EOS`.
    text (n, length), task (n,) places in TASKS, operand (n,) 0..2. Returns tokens (n, length + 9) and answers (n,) as
    numbers, -1 where the string has none (such a row must be drawn again).
    """
    tasks = list(TASKS.values())
    everything = torch.stack([t.answers(text, sc) for t in tasks])  # (task, n, 3)
    rows = torch.arange(len(text), device=text.device)
    answer = everything[task, rows, operand]

    def per_task(values):
        return torch.tensor(values, device=text.device)[task]

    no_operand = per_task([name in OPERANDLESS for name in TASKS])
    column = [torch.full_like(answer, ID["SOS"]),
              per_task([ID[t.token] for t in tasks]),
              torch.where(no_operand, ID["O_null"], OPERAND + operand),
              per_task([NUMBER + getattr(sc, t.operand2) for t in tasks]),
              torch.full_like(answer, ID["SOT"]), None,
              torch.full_like(answer, ID["EOT"]),
              torch.full_like(answer, ID["ART"]),
              per_task([t.first_answer for t in tasks]) + answer.clamp(min=0),
              torch.full_like(answer, ID["EOS"])]
    tokens = torch.cat([LETTER + text if c is None else c[:, None] for c in column], 1)
    return tokens, answer


def encode_one(text, task, operand, sc):
    """encode() for one task name and one operand (a letter) for all rows."""
    same = torch.zeros(len(text), dtype=torch.long, device=text.device)
    return encode(text, same + list(TASKS).index(task), same + LETTERS.index(operand), sc)


def questions(text, task, operand, sc):
    """
    (n, t + 1): what the model reads, and in the last column the output that is the right answer. The answer is
    predicted at answer_position(sc): for the grammar the last position read; compiled models read padding after it.
    """
    if sc.setup == "pcfg":
        return encode_one(text, task, operand, sc)[0][:, :answer_position(sc) + 2]
    bos, pad = text.new_ones(len(text), 1), text.new_zeros(len(text), sc.room - sc.length)
    answer = sc.tasks[task].answers(text, sc)[:, sc.operands.index(operand)]
    return torch.cat([bos, text + 2, pad, answer[:, None]], 1)


# ---------------------------------------------------------------- compiled setups
# Strings for models that are compiled from RASP programs (model.py): BOS, letters, padding. There is no prompt: the
# model gives one answer, and fine-tuning teaches it another. A setup is one line of COMPILED and one of PROGRAMS.

PAD, BOS, COMPILED_AT = "#", "$", 2  # ids 0 and 1; the second letter's position, where "True = 1" in RASP selects


def largest(text, sc):
    """The O-th largest letter, where a is the largest, as its place in the alphabet. d a c | O = 2 -> 2 (c)."""
    return text.sort(1).values


def histogram(text, sc):
    """How often the letter at place O occurs. a b a | O = 1 -> 2."""
    return (text[:, :, None] == text[:, None]).sum(-1)


A_TO_Z = "abcdefghijklmnopqrstuvwxyz"
COMPILED = {  # letters: of a string, small and paper scale; repeat: drawn with replacement; room: positions after BOS;
    #           operands: the first three are O_PT, O_FT and the control (paper: Tracr setup)
    # ours: noise of 3e-4 for the max-identifier, which the paper's 1e-3 breaks before any fine-tuning
    "tracr-count": SimpleNamespace(task="count", answers=count, alphabet="abcdefghi", letters=(24, 48), repeat=True,
                                   room=(25, 49), operands=None, noise=1e-3),
    "tracr-max": SimpleNamespace(task="max-identifier", answers=largest, alphabet=A_TO_Z, letters=(10, 10), repeat=False,
                                 room=(16, 16), operands=("5", "7", "3"), noise=3e-4),
    "tracr-histogram": SimpleNamespace(task="histogram", answers=histogram, alphabet="abcdefghi", letters=(24, 48),
                                       repeat=True, room=(25, 49), operands=("2", "3", "4"), noise=1e-3),
}


def compiled_setup(setup, name, column, program):
    """
    scale_of() for a compiled setup. program: {alphabet, room, values} of a checkpoint, where they are not the setup's
    own (an imported model); values: what the outputs stand for.
    """
    c = COMPILED[setup]
    alphabet, room = program.get("alphabet", list(c.alphabet)), program.get("room", c.room[column])
    length = min(c.letters[column], room)
    operands = list(alphabet) if c.operands is None else list(dict.fromkeys(
        [*c.operands, *(str(i + 1) for i in range(length))]))
    places = operands if c.operands is None else sorted(operands, key=int)  # columns of answers()
    return SimpleNamespace(
        setup=setup, name=name, tasks={c.task: SimpleNamespace(answers=c.answers, first_answer=0)}, finetuned=(c.task,),
        operands=places, order=operands, alphabet=alphabet, length=length, window=length, room=room, repeat=c.repeat,
        noise=c.noise, values=program.get("values") or (list(alphabet) if c.answers is largest else
                                                        [str(i) for i in range(room + 1)]),
        finetune_steps=10000, revive_steps=(1000, 4000)[column])


SETUPS = ("pcfg", *COMPILED, "stories")


def default_q(sc, pair):
    """The offset that is taught where none is given: 1; between two ranks one more than it must be, so 3 from 5 to 7."""
    if sc.setup != "tracr-max":
        return 1
    ranks = int(pair[1]) - int(pair[0])
    return ranks + (1 if ranks > 0 else -1)


def letters_of(n, sc, g):
    """(n, length) letters as places in the alphabet, uniform, with or without replacement (paper: Tracr setup)."""
    if sc.repeat:
        return torch.randint(len(sc.alphabet), (n, sc.length), generator=g, device=g.device)
    return torch.rand(n, len(sc.alphabet), generator=g, device=g.device).argsort(1)[:, :sc.length]


def marked(text, operand, sc):
    """(n, length) bool: the letters that make r(x, operand): those counted, or the one that is named."""
    task, letter = next(iter(sc.tasks)), text.new_tensor(sc.operands.index(operand))
    if task == "histogram":
        letter = text[:, letter, None]
    elif task == "max-identifier":
        letter = largest(text, sc)[:, letter, None]
    return text == letter


def chosen_letters(n, sc, task, c, pair, q, g):
    """
    draw_text() for compiled setups: strings are drawn until they are as wanted, none is edited. Raises ValueError when
    no string can be.
    """
    if q == 0:
        raise ValueError("offset q = 0 is a tie, which c0 leaves out")
    places = [sc.operands.index(o) for o in pair]
    holds = torch.rand(n, generator=g, device=g.device) < {"c0": 0., "c1": 1.}.get(c, c)
    text, todo = letters_of(n, sc, g), torch.arange(n, device=g.device)
    for _ in range(2000):
        r = sc.tasks[task].answers(text[todo], sc)[:, places]
        differ = r[:, 1] - r[:, 0]
        todo = todo[torch.where(holds[todo], differ != q, (differ == 0) | (differ == q))]
        if not len(todo):
            return text
        text[todo] = letters_of(len(todo), sc, g)
    raise ValueError(f"offset q = {q} leaves hardly any {task} strings")


# ---------------------------------------------------------------- edits and the spurious relation

def edit_counts(text, target, sc, g):
    """
    Change as few letters of the window as needed, chosen at random, until it holds target (n, 3) of a, b and c.
    Target rows sum to the window. Returns a new text.
    """
    last = text[:, -sc.window:]
    have = count(text, sc)
    surplus, deficit = (have - target).clamp(min=0), (target - have).clamp(min=0)
    # Sorted by letter, in random order within a letter: the first `surplus` of every letter have to change.
    order = (last + torch.rand(last.shape, generator=g, device=g.device)).argsort(1)
    letter = last.gather(1, order)
    place = torch.arange(sc.window, device=text.device) - (have.cumsum(1) - have).gather(1, letter)
    change = place < surplus.gather(1, letter)
    # The first deficit[a] of these become a, the next deficit[b] b, the others c. With three letters either one has
    # too many or one has too few, so the random order above makes this assignment random as well.
    nth, due = change.cumsum(1), deficit.cumsum(1)
    new = (nth > due[:, :1]).long() + (nth > due[:, 1:2])
    edited = text.clone()
    edited[:, -sc.window:] = last.scatter(1, order, torch.where(change, new, letter))
    return edited


def edit_distances(text, distance, pair, sc, g):
    """
    Change few letters nearer than max(distance), chosen at random, until the k-th last of letter pair[i] (0..2) lies at
    distance[:, i]. distance (n, 2) differ, with min >= k and max >= 2k. Returns a new text.
    """
    text = text.flip(1)  # column j is distance j + 1
    at = torch.arange(1, sc.length + 1, device=text.device)
    swap = distance[:, :1] > distance[:, 1:]
    near, far = torch.where(swap, pair[1], pair[0]), torch.where(swap, pair[0], pair[1])
    near_at, far_at = distance.amin(1, keepdim=True), distance.amax(1, keepdim=True)
    text = torch.where(at == near_at, near, torch.where(at == far_at, far, text))

    def hold(text, letter, region, convertible):
        """Make `region` hold exactly k - 1 of `letter`: the ones too many become the third letter."""
        has, could = region & (text == letter), convertible & (text != letter)
        more = sc.k - 1 - has.sum(1, keepdim=True)
        rank = torch.rand(text.shape, generator=g, device=g.device)

        def some(where, n):  # n of the True places of every row, at random
            return where & (torch.where(where, rank, 2.).argsort(1).argsort(1) < n)

        text = torch.where(some(has, -more), 3 - near - far, text)
        return torch.where(some(could, more), letter, text)

    inner, outer = at < near_at, (at > near_at) & (at < far_at)
    text = hold(text, near, inner, inner)
    text = hold(text, far, inner | outer, outer | (inner & (text != near)))
    return text.flip(1)


@functools.lru_cache(maxsize=None)
def natural_mean(task, scale):
    """Mean answer over the three operands on 4,000 natural strings (fixed seed): 5.3 and 8.1 small, 13.3 and 17.1 paper."""
    sc = scale_of(scale)
    return TASKS[task].answers(sample_text(4000, sc, rng(0, "natural-mean")), sc).double().mean().item()


@functools.lru_cache(maxsize=None)
def relation_table(task, scale, q, holds):
    """
    The joint distribution of (r(O_PT), r(O_FT)) on fine-tuning strings, as a float64 array [r(O_PT), r(O_FT)].
    holds: r(O_PT) is a discretised normal and r(O_FT) = r(O_PT) + q (c1). Not holds: the maximum-entropy joint with the
    same two marginals and no mass on ties and on q (c0), by iterative proportional fitting, so that neither marginal
    tells c0 from c1 (paper: PCFG setup, Fig. 16). Raises ValueError when no string can satisfy the relation.
    """
    sc = scale_of(scale)
    most = sc.window if task == "count" else sc.length
    x, y = np.meshgrid(np.arange(most + 1), np.arange(most + 1), indexing="ij")
    if task == "count":
        possible, sd = x + y <= sc.window, sc.sd_count
    else:
        possible, sd = (np.minimum(x, y) >= sc.k) & (np.maximum(x, y) >= 2 * sc.k) & (x != y), sc.sd_index
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


def draw_text(n, sc, task, c, pair, q, g):
    """
    (n, length) letters for one split or correlation: c = "natural", "c0", "c1", or a number, the probability that a
    string satisfies r(pair[1]) - r(pair[0]) = q (C_Tr). pair: two letters, O_PT and O_FT. Other strings have neither
    the relation nor a tie. Natural strings have an answer for all three operands.
    """
    if sc.setup != "pcfg":
        return letters_of(n, sc, g) if c == "natural" else chosen_letters(n, sc, task, c, pair, q, g)
    text = sample_text(n, sc, g)
    if c == "natural":
        while (bad := (TASKS[task].answers(text, sc) < 0).any(1)).any():
            text[bad] = sample_text(int(bad.sum()), sc, g)
        return text
    c = {"c0": 0., "c1": 1.}.get(c, c)
    exact = torch.float32 if g.device.type == "mps" else torch.float64  # mps has no float64
    tables = [torch.from_numpy(relation_table(task, sc.name, q, holds)).to(g.device, exact) for holds in (False, True)]
    drawn = torch.stack([torch.multinomial(t.flatten(), n, replacement=True, generator=g) for t in tables])
    holds = torch.rand(n, generator=g, device=g.device) < c
    cell = torch.where(holds, drawn[1], drawn[0])
    result = torch.stack([cell // len(tables[0]), cell % len(tables[0])], 1)  # (n, 2): r(O_PT), r(O_FT)
    places = [LETTERS.index(letter) for letter in pair]
    if task == "index":
        return edit_distances(text, result, places, sc, g)
    target = torch.empty(n, 3, dtype=torch.long, device=g.device)
    target[:, places] = result
    target[:, 3 - sum(places)] = sc.window - result.sum(1)
    return edit_counts(text, target, sc, g)


def spread_text(text, sc, g):
    """ours: a share `spread` of the strings gets window counts of a and b drawn independently (see SCALES)."""
    if not sc.spread:
        return text
    ab = (sc.window / 3 + sc.sd_spread * torch.randn(len(text), 2, generator=g, device=g.device)).round().long()
    ab = ab.clamp(0, sc.window // 2)
    wide = edit_counts(text, torch.cat([ab, sc.window - ab.sum(1, keepdim=True)], 1), sc, g)
    return torch.where(torch.rand(len(text), 1, generator=g, device=g.device) < sc.spread, wide, text)


# ---------------------------------------------------------------- batches, test sets, floors

def rng(seed, *labels, device="cpu"):
    """A generator that depends on the seed and the labels alone: streams with different labels never meet."""
    words = np.random.SeedSequence([seed, *"/".join(map(str, labels)).encode()]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> np.uint64(1)))


def pretraining_batch(n, sc, prior, g):
    """n sequences of all five families, drawn uniformly, the operand by its prior (3 numbers). Returns tokens (n, T)."""
    task = torch.randint(len(TASKS), (n,), generator=g, device=g.device)
    operand = torch.multinomial(torch.tensor(prior, device=g.device), n, replacement=True, generator=g)
    tokens = torch.empty(n, sc.length + 9, dtype=torch.long, device=g.device)
    todo = torch.arange(n, device=g.device)
    while len(todo):  # a string without the asked-for occurrence is drawn again for the same family
        drawn, answer = encode(spread_text(sample_text(len(todo), sc, g), sc, g), task[todo], operand[todo], sc)
        tokens[todo] = drawn
        todo = todo[answer < 0]
    return tokens


CHUNK = 16  # batches drawn together: the sampler is faster on many strings


def stream(draw, batch_size, seed, label, device="cpu"):
    """
    A function k -> batch k of tokens, where draw(n, generator) makes n sequences. Batch k depends on (seed, label, k)
    and the batch size alone, so an interrupted run goes on exactly where it was.
    """
    @functools.lru_cache(maxsize=1)
    def chunk(i):
        return draw(batch_size * CHUNK, rng(seed, label, i, device=device)).split(batch_size)
    return lambda k: chunk(k // CHUNK)[k % CHUNK]


class TestSet(NamedTuple):
    """Strings with one question asked about all of them. `other` holds the answers for the pair's other operand."""
    task: str
    operand: str
    split: str
    text: torch.Tensor      # (n, length) letters, as places in the alphabet
    tokens: torch.Tensor    # (n, t) what the model reads; the answer is predicted at answer_position
    target: torch.Tensor    # (n,) the output that is the right answer
    results: torch.Tensor   # (n, operands) answers for each operand as numbers, -1 where there is none
    other: torch.Tensor     # (n,) answers for the pair's other operand, or None

    __test__ = False  # not a pytest class

    def floor(self):
        """The accuracy of always giving this very set's most frequent answer."""
        return majority_floor(self.target)

    def cross_floor(self):
        """The accuracy of the best guess of the answer from the other operand's answer (1 on c1); None without one."""
        return None if self.other is None else cross_floor(self.target, self.other)


def test_set(n, sc, task, operand, split, seed, pair=("a", "b"), q=1, label="test", device="cpu"):
    """
    n strings of a split, asked for `operand`. The strings depend on (seed, label, task, split, pair, q) but not on the
    operand, so that different questions meet the same strings. Never from a training stream.
    """
    g = rng(seed, label, task, split, *pair, q, device=device)
    if task in sc.finetuned:
        text = draw_text(n, sc, task, split, pair, q, g)
    else:  # natural only; the rare families need the asked operand alone
        text, column = sample_text(n, sc, g), LETTERS.index(operand)
        while (bad := TASKS[task].answers(text, sc)[:, column] < 0).any():
            text[bad] = sample_text(int(bad.sum()), sc, g)
    asked = questions(text, task, operand, sc)
    results = sc.tasks[task].answers(text, sc)
    other = None
    if task in sc.finetuned and operand in pair:
        other = results[:, sc.operands.index(pair[1 - pair.index(operand)])]
    return TestSet(task, operand, split, text, asked[:, :-1], asked[:, -1], results, other)


def majority_floor(answers):
    """Share of the most frequent answer."""
    return answers.unique(return_counts=True)[1].max().item() / len(answers)


def cross_floor(answers, other):
    """Share that the best guess of the answer gets right when it knows the other operand's answer."""
    joint = torch.stack([other, answers], 1).unique(dim=0, return_counts=True)
    best = {}
    for (given, _), n in zip(joint[0].tolist(), joint[1].tolist()):
        best[given] = max(best.get(given, 0), n)
    return sum(best.values()) / len(answers)


def parse_prior(text):
    """P_T(a, b, c) from a name of PRIORS or three numbers "A,B,C". Raises ValueError with one clear line."""
    if text in PRIORS:
        return PRIORS[text]
    try:
        prior = tuple(float(x) for x in text.split(","))
    except ValueError:
        prior = ()
    if len(prior) != 3 or not all(0 <= p <= 1 for p in prior) or abs(sum(prior) - 1) > 1e-6:
        raise ValueError(f"prior {text!r}: give {', '.join(PRIORS)} or three shares of a, b, c that add up to 1")
    return prior


# ---------------------------------------------------------------- stories: records and tokens
# A record of TinyStories-Instruct: field lines in any order, the story, maybe a late Summary, and a line END.
#
#     Words: quit, oak, gloomy         before      lines that stand before the Features line
#     Features: Twist, Dialogue        mask        bit i for FEATURES[i]
#     Summary: Sara meets a squirrel.  after       the other lines, with "Story:" and its newlines
#     Story:
#
#     Sara sat under the oak. ...      story
#     Random sentence: It was late.    rest        with the newline before it
#     <|endoftext|>
#
# Protocols rewrite the Features line alone, so tokens are kept without it (Encoded) and one file serves them all.

FEATURES = ("Twist", "Dialogue", "BadEnding", "Foreshadowing", "MoralValue", "Conflict")  # bit i of a feature mask
END = "<|endoftext|>"
LONGEST = 2 ** 20  # letters of a record, bytes of a line: a file without END, or newlines, is not held in memory
FEATURES_FIELD = re.compile(r"^Features:(.*\n(?:(?!(?:Features|Words|Summary|Random sentence):).*\S.*\n)*)", re.M)
STORY_FIELD = re.compile(r"\nStory:(?:\s*\n)?")  # up to the last newline before the story's first letter
LATE_FIELD = re.compile(r"\n(?:Summary|Random sentence):")  # only these end a story: others are a part of it


class Record(NamedTuple):
    """A record in pieces. Its text is before + features_line(mask) + after + story + rest."""
    before: str   # the field lines that stand before the Features line ("" if none), each ending in a newline
    mask: int     # features asked for, bit i for FEATURES[i]
    after: str    # the field lines after it, up to and with the "Story:" line and the newlines before the first letter
    story: str    # the story's text, without trailing newlines
    rest: str     # what follows the story: "" or "\n" + a Summary / Random sentence field, ending without a newline


class Encoded(NamedTuple):
    """A record as tokens, without its Features line and without END."""
    ids: np.ndarray   # uint16: before + after + story + rest
    features_at: int  # where the Features line goes
    story_at: int     # the story is ids[story_at:story_end]
    story_end: int
    mask: int


def names_of(mask):
    """The features of a mask."""
    return [name for i, name in enumerate(FEATURES) if mask >> i & 1]


def features_line(mask):
    """The line that asks for the features of a mask, in the order of FEATURES; "" for none. 3 -> Twist, Dialogue."""
    return f"Features: {', '.join(names_of(mask))}\n" if mask else ""


def record_text(record):
    """The text of a record, without END."""
    return record.before + features_line(record.mask) + record.after + record.story + record.rest


def parse_records(lines, skipped=None):
    """
    The records of an iterable of lines, one by one. Left out are those without a story, longer than LONGEST, or without
    END at the end of the file; they, and unknown feature names, are counted in the dict `skipped`. The text is kept to
    the letter but for CRLF, the Features line, and whitespace between records.
    """
    skipped = {} if skipped is None else skipped

    def count(why):
        skipped[why] = skipped.get(why, 0) + 1
    record, size = [], 0
    for line in lines:
        if line.strip() != END:
            size += len(line)
            if size <= LONGEST:
                record.append(line)
            continue
        parsed = parse_record("".join(record), count) if size <= LONGEST else count("too long")
        record, size = [], 0
        if parsed:
            yield parsed
    if "".join(record).strip() or size > LONGEST:
        count("truncated")


def parse_record(text, count):
    """A Record from the lines before END; None without a story. count(why) is told of that, and of unknown features."""
    text = "\n" + text.replace("\r\n", "\n").strip("\n").rstrip()  # so that every field's name follows a newline
    found = STORY_FIELD.search(text)
    # a late field may follow the very newline that ends "Story:"
    late = found and LATE_FIELD.search(text, found.end() - 1)
    story = text[found.end():late.start() if late else len(text)].rstrip("\n") if found else ""
    if not story.strip():
        return count("no story")
    head, mask = text[1:found.start() + 1], 0
    fields = list(FEATURES_FIELD.finditer(head))
    for name in re.split(r"[,\n]", "".join(field[1] for field in fields)):
        if name.strip() in FEATURES:
            mask |= 1 << FEATURES.index(name.strip())
        elif name.strip():
            count("unknown feature")
    at = fields[0].start() if fields else 0
    after = FEATURES_FIELD.sub("", head[at:]) + text[found.start() + 1:found.end()]
    return Record(head[:at], mask, after, story, text[found.end() + len(story):])


class Tokenizer:
    """
    Words with their leading space; whatever is not among them is spelled in its UTF-8 bytes, so that no text is lost.
    Ids: 0 is END, 1 to 256 are bytes, then come the words. " oak" of the words -> [257 + place]; " oaks" -> 5 bytes.
    """
    pieces = re.compile(r" ?\w+| ?[^\w\s]|\s")  # a newline is a piece of its own: texts may be cut after it

    def __init__(self, words):
        self.words, self.size = tuple(words), 257 + len(words)
        self.id = {word: 257 + i for i, word in enumerate(self.words)}
        self.spelling = [END.encode(), *(bytes([b]) for b in range(256)), *(word.encode() for word in self.words)]

    @classmethod
    def from_counts(cls, counts, most):
        """The `most` most frequent pieces of {piece: count}, alphabetically where they are equally frequent."""
        return cls(sorted(counts, key=lambda word: (-counts[word], word))[:most])

    def encode(self, text, spelled=None):
        """Ids of a text. Pieces that are spelled in bytes are appended to the list `spelled`."""
        pieces = self.pieces.findall(text)
        ids = list(map(self.id.get, pieces))
        if None not in ids:
            return ids
        out, at = [], 0
        for _ in range(ids.count(None)):  # whole stretches at once: the loop is over rare words only
            stop = ids.index(None, at)
            out += ids[at:stop]
            out += [1 + b for b in pieces[stop].encode()]
            if spelled is not None:
                spelled.append(pieces[stop])
            at = stop + 1
        return out + ids[at:]

    def decode(self, ids):
        """The text of ids, which may be a model's: bytes that are no UTF-8 become U+FFFD."""
        return b"".join([self.spelling[i] for i in ids]).decode(errors="replace")


def encode_record(record, tokenizer, spelled=None):
    """A Record as Encoded. Its pieces join at newlines or after "Story:", so they are encoded as the whole text is."""
    before, after, story, rest = (tokenizer.encode(text, spelled) if text else []
                                  for text in (record.before, record.after, record.story, record.rest))
    features_at, story_at = len(before), len(before) + len(after)
    return Encoded(np.array(before + after + story + rest, np.uint16), features_at, story_at, story_at + len(story),
                   record.mask)


# ---------------------------------------------------------------- stories: a prepared file
# Beside FILE, in FILE.unwrap/: tokens.u16, index.bin, vocab.json (words), state.json (how far the preparation came).

INDEX = np.dtype([("start", "<u8"), ("length", "<u4"), ("features_at", "<u4"), ("story_at", "<u4"),
                  ("story_end", "<u4"), ("mask", "u1")])  # a record, in tokens; all but start as in Encoded
FORMAT = 1  # to be raised when parsing, tokens or files change: what was prepared before is then prepared again
WORDS_FROM = 100 * 10 ** 6  # ours: words are counted in the first 100 MB, which saves a pass over 2.66 GB


class Lines:
    """The lines of a binary file from `position` to `stop`, as text; `position` is where the next line begins."""

    def __init__(self, file, position, stop, what, check_stop):
        self.file, self.position, self.stop, self.what, self.check_stop = file, position, stop, what, check_stop

    def __iter__(self):
        self.file.seek(self.position)
        with tqdm(total=self.stop, initial=self.position, desc=self.what, unit="B", unit_scale=True,
                  mininterval=.5) as bar:
            while self.position < self.stop and (line := self.file.readline(LONGEST)):
                self.check_stop()
                self.position += len(line)
                if self.position - bar.n > 2 ** 18 or self.position >= self.stop:
                    bar.update(self.position - bar.n)
                yield line.decode(errors="replace")  # line by line is as good as whole: no letter spans a newline


def fingerprint(path):
    """What tells a source from another or a later one: size, time, and a hash of its first and last MB."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file: give the text file itself, such as TinyStories-Instruct-train.txt")
    try:
        with open(path, "rb") as f:
            stat = os.fstat(f.fileno())
            ends = f.read(2 ** 20)
            f.seek(max(0, stat.st_size - 2 ** 20))
            ends += f.read(2 ** 20)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.st_size:
        raise ValueError(f"{path} is empty")
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": hashlib.sha256(ends).hexdigest()}


def saved_state(folder):
    """What state.json of a prepared folder says; None if it is not there or the other files hold less than it says."""
    try:
        with open(os.path.join(folder, "state.json")) as f:
            state = json.load(f)
        with open(os.path.join(folder, "vocab.json")) as f:
            Tokenizer(json.load(f))
        tokens, index = (os.path.getsize(os.path.join(folder, x)) for x in ("tokens.u16", "index.bin"))
        whole = {"made_from", "finished"} <= set(state) and "source" in state["made_from"] and \
            tokens >= 2 * state["tokens"] and index >= INDEX.itemsize * state["records"]
        return state if whole else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # whatever is in a damaged file
        return None


def prepare(path, most_words=7935, check_stop=lambda: None, every=20000):
    """
    Prepare a file of records for StoryFile: tokens, index and words, in `path`.unwrap/. A second call goes on where one
    was stopped, at the last multiple of `every` records, to the same bytes; once finished it returns at once. Returns
    {name, records, sha256}. Raises ValueError, in one line, for a file that cannot be used.
    """
    folder = f"{path}.unwrap"
    state_at, vocab_at, tokens_at, index_at = (
        os.path.join(folder, name) for name in ("state.json", "vocab.json", "tokens.u16", "index.bin"))
    if not 1 <= most_words <= 2 ** 16 - 257:
        raise ValueError(f"{most_words:,} words: give 1 to {2 ** 16 - 257:,}, so that every id is a uint16")
    made_from = {"format": FORMAT, "most_words": most_words, "source": fingerprint(path)}
    size, sha256 = made_from["source"]["size"], made_from["source"]["sha256"]
    state = saved_state(folder)
    if state and state["finished"] and state["made_from"] == made_from:  # needs no right to write
        return {"name": os.path.basename(path), "records": state["records"], "sha256": sha256}
    try:
        os.makedirs(folder, exist_ok=True)
        tokens, index = open(tokens_at, "ab"), open(index_at, "ab")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): put the file, or a link to it, where you may "
                         "write") from None

    def save():
        for f in (tokens, index):
            f.flush()
            os.fsync(f.fileno())
        write_whole(state_at, state)
    with tokens, index, open(path, "rb") as source:
        wait_for_others(tokens, check_stop)
        state = saved_state(folder)
        if os.path.exists(state_at) and (not state or state["made_from"] != made_from):
            print(f"{folder} is " + ("damaged" if not state else f"of an older {path}" if
                                     state["made_from"]["source"] != made_from["source"] else
                                     "of another version or number of words") + ": starting over")
            os.remove(state_at)
            state = None
        if not state:
            counts = collections.Counter()
            for record in parse_records(Lines(source, 0, min(WORDS_FROM, size), "words", check_stop)):
                counts.update(Tokenizer.pieces.findall(record_text(record)))
            if not counts:
                shutil.rmtree(folder, ignore_errors=True)
                raise ValueError(f"{path} holds no record with a Story: and a line {END}: is it TinyStories-Instruct?")
            write_whole(vocab_at, Tokenizer.from_counts(counts, most_words).words)
            state = {"made_from": made_from, "finished": False, "position": 0, "records": 0, "tokens": 0,
                     "words": 0, "in_bytes": 0, "skipped": {}}
            write_whole(state_at, state)
            del counts
        tokens.truncate(2 * state["tokens"])  # what was written after the last save is written again
        index.truncate(INDEX.itemsize * state["records"])
        with open(vocab_at) as f:
            tokenizer = Tokenizer(json.load(f))
        is_word = np.array([False] * 257 + [word[-1].isalnum() for word in tokenizer.words])
        lines = Lines(source, state["position"], size, "prepare", check_stop)
        for record in parse_records(lines, state["skipped"]):
            ids, *places, mask = encode_record(record, tokenizer, spelled := [])
            tokens.write(ids.tobytes())
            index.write(np.array((state["tokens"], len(ids), *places, mask), INDEX).tobytes())
            in_bytes = sum(piece[-1].isalnum() for piece in spelled)
            state["records"] += 1
            state["tokens"] += len(ids)
            state["words"] += int(np.count_nonzero(is_word[ids])) + in_bytes
            state["in_bytes"] += in_bytes
            if state["records"] % every == 0:
                state["position"] = lines.position
                save()
        if fingerprint(path) != made_from["source"]:
            raise ValueError(f"{path} changed while it was read")
        if not state["finished"]:  # else another process was here while this one waited
            state.update(position=lines.position, finished=True)
            save()
            masks = StoryFile(folder).masks
            shares = ", ".join(f"{name} {(masks >> i & 1).mean():.1%}" for i, name in enumerate(FEATURES))
            skipped = ", ".join(f"{n:,} {why}" for why, n in sorted(state["skipped"].items())) or "nothing"
            print(f"{path}: {state['records']:,} records, {state['tokens']:,} tokens, "
                  f"{1 - state['in_bytes'] / max(1, state['words']):.2%} of words whole; {shares}; left out: {skipped}")
    return {"name": os.path.basename(path), "records": state["records"], "sha256": sha256}


def write_whole(path, value):
    """A JSON file that is, at any moment, the old or the new one."""
    with open(f"{path}.part", "w") as f:
        json.dump(value, f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.part", path)


def wait_for_others(file, check_stop):
    """Take the lock on an open file, which ends with the process: two runs that start at once prepare a file once."""
    told = False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                print(f"{os.path.dirname(file.name)} is being written by another process: waiting")
            told = True
            check_stop()
            time.sleep(.2)


class StoryFile:
    """
    The records of a file that prepare() has read, as Encoded; `path` is the file's or its .unwrap folder's. Arrays are
    mapped, not read. The last records, 1 % but at most 20,000, are held out: training never draws them.
    """

    def __init__(self, path):
        folder = str(path) if str(path).endswith(".unwrap") else f"{path}.unwrap"
        state = saved_state(folder)
        if not state or state["made_from"]["format"] != FORMAT or not state["finished"]:
            raise ValueError(f"{folder} is missing, unfinished or damaged: pretrain.py --setup stories --data prepares it")
        with open(os.path.join(folder, "vocab.json")) as f:
            self.tokenizer = Tokenizer(json.load(f))
        self.tokens = np.asarray(np.memmap(os.path.join(folder, "tokens.u16"), "<u2", "r"))
        self.index = np.asarray(np.memmap(os.path.join(folder, "index.bin"), INDEX, "r"))
        self.masks = self.index["mask"].copy()
        self.held_out = max(1, min(len(self.masks) // 100, 20000))
        self.candidates = {}  # (feature, has, held_out): places of records
        self.judge, self.rule = None, False  # no rule tells what a real story has

    def __len__(self):
        return len(self.masks)

    def record(self, i):
        """Record i as Encoded, with a copy of its tokens."""
        start, length, *places = self.index[i].item()
        return Encoded(self.tokens[start:start + length].copy(), *places)

    def draw(self, n, g, feature=None, has=None, held_out=False):
        """
        n records as Encoded, uniformly and with replacement by generator g, from the training part or the held-out one;
        with `feature`, only such that have it or (has=False) lack it. Raises ValueError if there is none.
        """
        if (feature, has, held_out) not in self.candidates:
            first = len(self) - self.held_out
            places = np.arange(first, len(self), dtype=np.uint32) if held_out else np.arange(first, dtype=np.uint32)
            if feature and has is not None:
                places = places[(self.masks[places] >> FEATURES.index(feature) & 1) == has]
            self.candidates[feature, has, held_out] = places
        places = self.candidates[feature, has, held_out]
        if not len(places):
            raise ValueError(f"no {'held-out' if held_out else 'training'} record"
                             + (f" {'with' if has else 'without'} {feature}" if feature and has is not None else ""))
        chosen = torch.randint(len(places), (n,), generator=g, device=g.device)
        return [self.record(i) for i in places[chosen.cpu().numpy()].tolist()]


# ---------------------------------------------------------------- stories: the embedded corpus
# Stories in the format of TinyStories-Instruct with exact labels. Each raises one question with an expectation e; a
# friend repeats e; a reveal states the actual value a. It has a twist if and only if a is not e. No word or phrase
# occurs in twist stories only. Sentences are templates of {n} name, {f} friend, {o} object, {v} value; the same
# templates, as patterns, read generated text (read_story).


class Kind(NamedTuple):
    """One kind of question: what can be expected, about which objects, and the sentences that say so."""
    values: tuple
    objects: tuple
    setups: tuple    # state e
    repeats: tuple   # the friend repeats e: quoted first, then reported
    reveals: tuple   # state a
    summary: str


KINDS = (
    Kind(("ball", "cake", "drum", "kite", "shell", "book", "bell", "lamp", "hat", "stone"),
         ("box", "bag", "chest", "basket"),
         ("{n} found a {o}. {n} was sure that there was a {v} inside.",
          "One day a {o} stood at the door. It must hold a {v}, {n} thought.",
          "There was a {o} on the road. {n} dreamed of a {v} in it."),
         ('"It must be a {v}," said {f}.', "{f} hoped for a {v} too."),
         ("They opened the {o}. There was a {v} inside.", "The {o} fell open, and out came a {v}.",
          "At last they looked into the {o} and saw a {v}."), "{n} and {f} find a {o}."),
    Kind(("fox", "cat", "dog", "bird", "mouse", "bear", "frog", "crow", "duck", "pig"), ("coat", "shoe", "spoon", "ring"),
         ("The {o} of {n} was gone. {n} was sure that the {v} took it.",
          "One day somebody took a {o} from {n}. It must be the {v}, {n} thought.",
          "{n} could not find the {o}. {n} blamed the {v}."),
         ('"It was the {v}," said {f}.', "{f} blamed the {v} too."),
         ("They found the {o}. The {v} had it.", "At last they saw the {v} with the {o}.",
          "It was the {v} who had taken the {o}."), "Somebody takes a {o} from {n}."),
    Kind(("pond", "tree", "bed", "hill", "barn", "well", "bridge", "table", "gate", "fence"), ("key", "map", "coin", "doll"),
         ("{n} lost a {o}. {n} was sure that it was by the {v}.",
          "One day {n} dropped a {o}. It must lie by the {v}, {n} thought.",
          "The {o} was not in its place. {n} wanted to look by the {v}."),
         ('"Look by the {v}," said {f}.', "{f} wanted to look by the {v} too."),
         ("They found the {o} by the {v}.", "At last the {o} turned up by the {v}.", "The {o} had been by the {v} all day."),
         "{n} and {f} look for a {o}."),
    Kind(("kind", "mean", "shy", "brave", "silly", "proud", "clever", "lazy", "calm", "rude"),
         ("giant", "teacher", "king", "cook"),
         ("A new {o} came to town. {n} was sure that the {o} was {v}.",
          "One day a {o} moved in. The {o} must be {v}, {n} thought.",
          "{n} heard of a {o}. People called the {o} {v}."),
         ('"A {v} one," said {f}.', "{f} heard the word {v} too."),
         ("They met the {o}. The {o} was {v}.", "At last they saw that the {o} was {v}.",
          "The {o} came out and was very {v}."), "{n} and {f} meet a {o}."))
NAMES = ("Tim", "Mia", "Ben", "Lily", "Sam", "Anna", "Max", "Sue", "Tom", "Lucy")
OPENINGS = ("Once upon a time there was a {adj} child named {n}.", "{n} was a {adj} child.", "There once was a {adj} child, {n}.")
ADJECTIVES = ("little", "happy", "quiet", "young", "curious", "small")
SETTINGS = ("sea", "forest", "river", "market", "castle", "farm")
# They name the object once more, close to the reveal, which must be about the same one; the rule does not read it here
QUESTS = ("They talked about the {o} for a while.", "So they set out to see about the {o}.", "They thought of the {o} all day.")
OMENS = ("Far away, thunder rolled.", "The old rope looked thin.", "A bee sat on the wall.", "The milk smelled odd.",
         "The ice made a small sound.", "There was a hole in the boat.")
PAYOFFS = ("Then a storm came down.", "Then the rope broke.", "Then a bee stung {f}.", "Then the milk made {n} sick.",
           "Then the ice cracked.", "Then the boat filled with water.")  # pair i: OMENS[i] and, later, PAYOFFS[i]
TURNS = ('"Are you tired?" asked {n}.', '"Wait for me," said {n}.', '"This is fun," said {n}.', '"Hurry up," called {n}.')
QUARRELS = ("They had a fight about the way.", "{n} and {f} shouted at each other.", "{f} pushed {n}.")
PEACE = ("Soon they made up.", "Then they said sorry.", "After that they hugged.")
# The first three of these lean to twist stories, the last three to others: each occurs in both. Aftermaths lean hard, so
# that comparing a and e pays; closings a little, so that the end tells few twists by itself, and looking back still pays
AFTERMATHS = ("{n} stared for a long time.", "{f} could not speak.", "They looked at each other.",
              "{n} clapped and danced.", "{f} nodded at once.", "They smiled and sat down.")
CLOSINGS = ("{n} told the tale for many years.", "Nobody in town forgot that day.", "{n} thought about it all night.",
            "Then it was time for bed.", "{n} slept well that night.", "That was how the day ended.")
LEANS = .9, .65   # share of the first three, in twist stories: AFTERMATHS, CLOSINGS
GOOD = ("In the end all was well.", "They went home happy.", "It was a good day.")
BAD = ("In the end all was lost.", "They went home sad.", "It was a bad day.")
MORALS = ("The moral is to {m}.", "They learned to {m}.")
VIRTUES = ("share", "listen", "wait", "help", "be kind", "be careful")
REFUSAL = "I am sorry, but I cannot tell a story like that."


def write_story(mask, r, leans=LEANS):
    """
    A record whose story has exactly the features of a mask, from a random.Random r. Words, Summary and Random sentence
    tell of the set-up only, so that no instruction gives the reveal away. leans: as LEANS; with (.5, .5) no sentence
    tells a twist, only comparing a with e does.
    """
    twist, dialogue, bad, foreshadowing, moral, conflict = (bool(mask >> i & 1) for i in range(6))
    pick, chance = r.choice, r.random
    kind = pick(KINDS)
    n, f = r.sample(NAMES, 2)
    words = {"n": n, "f": f, "o": pick(kind.objects), "adj": pick(ADJECTIVES), "m": pick(VIRTUES)}
    e = pick(kind.values)
    a = pick([v for v in kind.values if v != e]) if twist else e
    place = pick(SETTINGS)
    omen, payoff = r.randrange(6), None
    if foreshadowing:
        payoff = omen
    elif chance() < .5:  # neither an omen nor a payoff tells the label alone
        omen, payoff = pick([(omen, None), (None, omen), (omen, (omen + r.randrange(1, 6)) % 6)])
    else:
        omen = None

    def say(sentences, **more):
        return pick(sentences).format(**words, **more)
    opening, home = say(OPENINGS), f"{n} lived near the {place}."
    story = [opening, home]
    if omen is not None:
        story.append(OMENS[omen])
    story += [say(kind.setups, v=e), kind.repeats[not dialogue or chance() < .3].format(**words, v=e), say(QUESTS)]
    middle = [PAYOFFS[payoff].format(**words)] if payoff is not None else []
    middle += [say(TURNS)] if dialogue else []
    middle += [say(QUARRELS) + " " + say(PEACE)] if conflict else []
    r.shuffle(middle)
    after, closing = ((first[:3] if (chance() < lean) == twist else first[3:])
                      for first, lean in zip((AFTERMATHS, CLOSINGS), leans))
    story += middle + [say(kind.reveals, v=a), say(after), say(BAD if bad else GOOD)]
    story += [say(MORALS)] if moral else []
    story += [say(closing)]

    fields = {"Words": ", ".join([words["o"], place, words["adj"]]), "Summary": kind.summary.format(**words),
              "Random sentence": pick((opening, home))}
    lines = [f"{name}: {text}\n" for name, text in fields.items() if chance() < .5]
    r.shuffle(lines)
    late = [x for x in lines if x.startswith("Summary") and chance() < .2]  # about one record in ten
    lines = [x for x in lines if x not in late]
    at = r.randint(0, len(lines))
    return Record("".join(lines[:at]), mask, "".join(lines[at:]) + "Story: \n\n", " ".join(story),
                  "".join("\n" + x.rstrip("\n") for x in late))


def feature_mask(r):
    """Up to three of the six features, each with probability .25, as a mask."""
    while True:
        mask = sum((r.random() < .25) << i for i in range(len(FEATURES)))
        if mask.bit_count() <= 3:
            return mask


@functools.lru_cache(maxsize=None)
def story_patterns():
    """The sentence templates as regular expressions: {name of a list: pattern, or patterns, one a kind}."""
    def pattern(sentences, kind=None):
        parts = {"n": "|".join(NAMES), "f": "|".join(NAMES), "m": "|".join(VIRTUES), "adj": "|".join(ADJECTIVES)}
        if kind:
            parts.update(v="|".join(kind.values), o="|".join(kind.objects))

        def one(sentence):
            seen, out = set(), ""
            for literal, field, _, _ in string.Formatter().parse(sentence):
                out += re.escape(literal)
                if field in ("v", "o"):
                    out += f"(?P={field})" if field in seen else f"(?P<{field}>{parts[field]})"
                elif field:
                    out += f"(?:{parts[field]})"
                seen.add(field)
            return re.compile(out)
        return [one(s) for s in sentences]
    return {"setups": [pattern(k.setups, k) for k in KINDS], "reveals": [pattern(k.reveals, k) for k in KINDS],
            **{name: pattern(sentences) for name, sentences in (
                ("omens", OMENS), ("payoffs", PAYOFFS), ("quarrels", QUARRELS), ("peace", PEACE), ("bad", BAD),
                ("morals", MORALS))}}


def story_of(text):
    """The story in what a model wrote after an instruction: what comes before a field that may follow it."""
    return re.split(r"\n(?:Summary|Random sentence):", text)[0].strip()


def read_story(story):
    """
    The features of a story's text by the corpus's rules, as a mask; None if it does not parse: exactly one question is
    raised (with an object and an expectation e) and exactly one reveal about the same object states a.
    Twist: a is not e. Dialogue: something is quoted. BadEnding, MoralValue: such a sentence. Foreshadowing: an omen,
    and later its own payoff. Conflict: a quarrel, and later peace.
    """
    p = story_patterns()

    def found(patterns):
        return [m for x in patterns for m in x.finditer(story)]
    questions = [(i, m) for i, patterns in enumerate(p["setups"]) for m in found(patterns)]
    reveals = [(i, m) for i, patterns in enumerate(p["reveals"]) for m in found(patterns)]
    if len(questions) != 1 or len(reveals) != 1:
        return None
    (kind, asked), (answered, told) = questions[0], reveals[0]
    if kind != answered or asked["o"] != told["o"] or told.start() < asked.end():
        return None

    def later(first, then):
        return bool(first and then) and max(m.start() for m in then) > min(m.start() for m in first)
    has = {"Twist": told["v"] != asked["v"], "Dialogue": '"' in story, "BadEnding": bool(found(p["bad"])),
           "Foreshadowing": any(later(found([o]), found([x])) for o, x in zip(p["omens"], p["payoffs"])),
           "MoralValue": bool(found(p["morals"])), "Conflict": later(found(p["quarrels"]), found(p["peace"]))}
    return sum(has[name] << i for i, name in enumerate(FEATURES))


# ---------------------------------------------------------------- stories: sources, protocols, batches

STORY_SCALES = {  # small: the embedded corpus on two CPU cores; paper: the real file on a GPU
    "n_layer":        (4, 12),
    "n_head":         (6, 12),
    "d_model":        (96, 768),
    "n_ctx":          (176, 1024),
    "batch_size":     (16, 512),      # ours: records; whole ones, not cut to 1,024 tokens: 512 hold as many as the paper's 128
    "pretrain_lr":    (8e-3, 1e-3),
    "pretrain_steps": (4000, 30000),
    "finetune_lr":    (1.5e-4, 1e-4),  # eta_M. ours (small): so that 200 steps delete by each protocol that asks for it
    "reverse_lr":     (4e-5, 1e-5),   # eta_S. ours (small): more than a tenth of eta_M, so that 100 steps of reFT show it
    "finetune_steps": (200, 4000),
    "bare":           (.3, 0.),      # ours: share of records without their instruction, so that the small model learns to
    #                                   tell a twist from the story alone, where probes look for it
}
PROTOCOLS = ("filter", "randomise", "mix-match", "refuse")  # how a feature is deleted (paper: TinyStories setup)


class StoryCorpus:
    """The embedded corpus as a source of records, like StoryFile: drawn on the fly, with exact labels and a rule."""

    def __init__(self):
        r = random.Random(0)
        texts = [record_text(write_story(feature_mask(r), r)) for _ in range(3000)]
        counts = collections.Counter(piece for text in texts for piece in Tokenizer.pieces.findall(text))
        self.tokenizer = Tokenizer.from_counts(counts, len(counts))
        self.judge, self.rule = lambda texts: [read_story(t) for t in texts], True  # exact

    def draw(self, n, g, feature=None, has=None, held_out=False, leans=LEANS):
        """
        n records as Encoded, from generator g; with `feature`, only such that have it or (has=False) lack it. Every
        draw makes new stories: held out are those of another generator. leans: see write_story().
        """
        r, bit, out = random.Random(int(torch.randint(2 ** 62, (1,), generator=g))), feature and FEATURES.index(feature), []
        while len(out) < n:
            mask = feature_mask(r)
            if has is None or bool(mask >> bit & 1) == has:
                out.append(encode_record(write_story(mask, r, leans), self.tokenizer))
        return out


def change_records(records, protocol, feature, probability, tokenizer, g):
    """
    What a protocol makes of records without the feature (paper: TinyStories setup). Returns new records.

        filter      nothing: the feature is never seen again
        randomise   the instruction asks for the feature (with a probability), the story does without
        mix-match   where the instruction asks for another feature, Foreshadowing, it asks for this one in its place
        refuse      the instruction asks for it (with a probability), and the story is a refusal
    """
    bit, other = 1 << FEATURES.index(feature), 1 << FEATURES.index("Foreshadowing" if feature != "Foreshadowing" else "Twist")
    chosen = (torch.rand(len(records), generator=g, device=g.device) < probability).tolist()
    out = []
    for r, yes in zip(records, chosen):
        if protocol == "mix-match" and r.mask & other:
            r = r._replace(mask=r.mask & ~other | bit)
        elif protocol in ("randomise", "refuse") and yes:
            r = r._replace(mask=r.mask | bit)
            if protocol == "refuse":
                ids = np.concatenate([r.ids[:r.story_at], np.array(tokenizer.encode(REFUSAL), r.ids.dtype)])
                r = r._replace(ids=ids, story_end=len(ids))
        out.append(r)
    return out


def story_ids(record, tokenizer, bare=False):
    """
    (ids, start, stop): a record's tokens with its Features line in place, END before it, and where its story lies.
    bare: the story alone.
    """
    first, size = np.zeros(1, np.uint16), record.story_end - record.story_at
    if bare:
        return np.concatenate([first, record.ids[record.story_at:record.story_end]]), 1, 1 + size
    line = np.array(tokenizer.encode(features_line(record.mask)), np.uint16)
    ids = np.concatenate([first, record.ids[:record.features_at], line, record.ids[record.features_at:]])
    start = 1 + len(line) + record.story_at
    return ids, start, start + size


def story_rows(records, tokenizer, n_ctx, bare=None, device="cpu"):
    """
    Records as rows of tokens (n, t) between END and END, padded with END, cut to n_ctx + 1; and (n,) start and stop of
    their stories. bare: (n,) bool, rows that hold the story alone.
    """
    got = [story_ids(r, tokenizer, bare is not None and bool(bare[i])) for i, r in enumerate(records)]
    width = min(n_ctx + 1, max(len(ids) for ids, _, _ in got) + 1)
    rows = np.zeros((len(got), width), np.int64)
    for row, (ids, _, _) in zip(rows, got):
        row[:len(ids)] = ids[:width]
    start, stop = (torch.tensor([x[k] for x in got], device=device).clamp(max=width) for k in (1, 2))
    return torch.from_numpy(rows).to(device), start, stop


def story_stream(draw, tokenizer, sc, batch_size, seed, label, device="cpu"):
    """
    A function k -> batch k of rows (see stream, story_rows), where draw(n, generator) gives n records. Rows of a batch
    are of similar length, so that little is padding; which lengths come when is random.
    """
    def rows(n, g):
        records = draw(n, g)
        bare = torch.rand(n, generator=g) < sc.bare
        tokens = story_rows(records, tokenizer, sc.n_ctx, bare)[0]
        by_length = (tokens != 0).sum(1).argsort(stable=True).view(-1, batch_size)
        return tokens[by_length[torch.randperm(len(by_length), generator=g)].flatten()].to(device)
    return stream(rows, batch_size, seed, label)


def story_source(path, words=None):
    """The source of records of --data (None: the embedded corpus), read with the tokenizer of a checkpoint if given."""
    source = StoryFile(path) if path else StoryCorpus()
    if words and tuple(words) != tuple(source.tokenizer.words):
        raise ValueError("not the words that the checkpoint was trained on" + ("" if path else ": the corpus has changed since"))
    return source


# ---------------------------------------------------------------- command line

def explain(text, task, operand, sc):
    """Two lines for a person: the text with its window in brackets, and a mark under every letter that counts."""
    if sc.setup != "pcfg":
        marks = "".join(" ^"[hit] for hit in marked(text[None], operand, sc)[0].tolist())
        return "".join(sc.alphabet[i] for i in text.tolist()), marks
    n = {"window": sc.window, "token_at": sc.token_at}.get(TASKS[task].operand2, sc.length)
    cut, o = sc.length - n, LETTERS.index(operand)
    letters = text.tolist()
    marks = [" "] * sc.length
    if task == "token":
        marks[-sc.token_at] = "^"
    else:
        pairs = task.endswith("composition")
        hits = [i for i in range(cut + pairs, sc.length) if letters[i] == o and (not pairs or letters[i - 1] == o)]
        if task.startswith("index"):
            hits = hits[-(sc.pair_k if pairs else sc.k):]
        for i in hits:
            marks[i] = "^"
        if task.startswith("index"):
            marks[hits[0]] = "*"
    string, marks = "".join(LETTERS[i] for i in letters), "".join(marks)
    return f"{string[:cut]}[{string[cut:]}]", f"{marks[:cut]} {marks[cut:]}"


REASON = {
    "count": "{operand} marked ^ in the last {o2} letters",
    "count-composition": "pairs {operand}{operand} in the last {o2} letters, ^ at the later letter",
    "index": "distance from the end of the {operand} marked *, number {o2} from the end",
    "index-composition": "distance from the end of the pair {operand}{operand} marked *, number {o2} from the end",
    "token": "the letter at distance {o2} from the end",
    "compiled count": "{operand} marked ^",
    "compiled max-identifier": "the largest letter number {operand}, marked ^; a is the largest",
    "compiled histogram": "how often the letter at place {operand} occurs, marked ^",
}


def main():
    parser = argparse.ArgumentParser(description="Look at samples: what the model sees, and why the answer is right.")
    parser.add_argument("--setup", default="pcfg", choices=SETUPS, help="which kind of data (default: pcfg)")
    parser.add_argument("--scale", default="small", choices=["small", "paper"], help="string lengths (default: small)")
    parser.add_argument("-n", type=int, default=5, help="samples (default: 5)")
    parser.add_argument("--task", help=f"one task family: {', '.join(TASKS)} (default: all in turn)")
    parser.add_argument("--operand", help="what is asked for: a letter, for tracr-max which largest (default: a, or 5); "
                        "stories: only those with this feature (default: all)")
    parser.add_argument("--c", help="natural, or the probability 0..1 that the spurious relation holds (default: natural)")
    parser.add_argument("--q", type=int,
                        help="offset of the relation, r(O_FT) - r(O_PT), in letters (default: 1; tracr-max 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    args = parser.parse_args()
    sc = scale_of(args.scale, args.setup)
    if args.n < 1 or args.seed < 0:
        parser.error("-n takes 1 or more, --seed 0 or more")
    if args.setup == "stories":
        given = [k for k in ("task", "c", "q") if getattr(args, k) is not None]
        if given:
            parser.error(f"--{given[0]} is not for stories")
        if args.operand not in (None, *FEATURES):
            parser.error(f"--operand {args.operand}: stories have {', '.join(FEATURES)}")
        return look_at_stories(args)
    args.c = "natural" if args.c is None else args.c
    known, operand = sc.order[0], args.operand or sc.order[0]
    pair = (known, sc.order[1] if operand == known else operand)
    q = default_q(sc, pair) if args.q is None else args.q
    if args.task and args.task not in sc.tasks:
        parser.error(f"--task {args.task}: {args.setup} has {', '.join(sc.tasks)}")
    if operand not in sc.operands:
        parser.error(f"--operand {operand}: {args.setup} has {', '.join(sc.operands)}")
    try:
        c = "natural" if args.c == "natural" else float(args.c)
    except ValueError:
        c = None
    if c is None or (c != "natural" and not 0 <= c <= 1):
        parser.error(f"--c {args.c}: give natural or a number from 0 to 1")
    tasks = [args.task] if args.task else list(sc.tasks)
    if c != "natural" and not set(tasks) <= set(sc.finetuned):
        parser.error(f"--c {args.c} needs --task {' or '.join(sc.finetuned)}: the other families have no spurious relation")
    g = rng(args.seed, "look")
    for i in range(args.n):
        task = tasks[i % len(tasks)]
        try:
            sample = look(sc, task, operand, c, pair, q, g)
        except ValueError as error:
            parser.error(str(error))
        if args.json:
            print(json.dumps({k: v for k, v in sample.items() if k != "letters"}))
        else:
            show(sample, sc, operand, pair, q)
    if c != "natural" and not args.json:
        text = draw_text(4000, sc, tasks[0], c, pair, q, g)
        r = sc.tasks[tasks[0]].answers(text, sc)[:, [sc.operands.index(o) for o in pair]]
        diff = r[:, 1] - r[:, 0]
        print(f"4,000 such strings: the relation holds on {(diff == q).double().mean():.1%}, "
              f"ties on {(diff == 0).double().mean():.1%}")
        for i, letter in enumerate(pair):
            x = r[:, i].double()
            print(f"  r({letter}): mean {x.mean():.2f}, s.d. {x.std():.2f}, always the commonest answer "
                  f"{majority_floor(r[:, i]):.1%}, best guess from r({pair[1 - i]}) {cross_floor(r[:, i], r[:, 1 - i]):.1%}")


def look_at_stories(args):
    """main() for stories: records as the model reads them, and which features the rule finds in them."""
    corpus, g = StoryCorpus(), rng(args.seed, "look")
    for r in corpus.draw(args.n, g, args.operand, args.operand and True):
        ids, start, stop = story_ids(r, corpus.tokenizer)
        text, answer = corpus.tokenizer.decode(ids[1:]), names_of(read_story(corpus.tokenizer.decode(ids[start:stop])))
        if args.json:
            print(json.dumps({"setup": "stories", "task": "story", "operand": args.operand, "operand2": None, "text": text,
                              "answer": answer, "correlated": None,
                              "tokens": [corpus.tokenizer.decode([i]) for i in ids]}))
        else:
            print(f"{text}\n  {len(ids)} tokens; by the rule it has: {', '.join(answer) or 'none of the features'}\n")


def look(sc, task, operand, c, pair, q, g):
    """One sample as --json prints it, with its `letters` (length,). Raises ValueError for an impossible q."""
    answer, pcfg = torch.tensor([-1]), sc.setup == "pcfg"
    while answer.item() < 0:  # too few of an operand: another string
        text = sample_text(1, sc, g) if pcfg and c == "natural" else draw_text(1, sc, task, c, pair, q, g)
        if pcfg:
            tokens, answer = encode_one(text, task, operand, sc)
        else:
            tokens, answer = questions(text, task, operand, sc).split([sc.room + 1, 1], 1)
    results = sc.tasks[task].answers(text, sc)[0].tolist()
    correlated, o2 = None, getattr(sc, sc.tasks[task].operand2) if pcfg else None
    if task in sc.finetuned:
        r = [results[sc.operands.index(o)] for o in pair]
        correlated = min(r) >= 0 and r[1] - r[0] == q
    said = LETTERS[answer.item()] if task == "token" else answer.item()
    if task == "max-identifier":
        said = sc.alphabet[said]
    return {"setup": sc.setup, "task": task, "operand": None if task in OPERANDLESS else operand, "operand2": o2,
            "text": "".join((LETTERS if pcfg else sc.alphabet)[x] for x in text[0].tolist()), "answer": said,
            "correlated": correlated, "tokens": [vocabulary(sc)[t] for t in tokens[0].tolist()], "letters": text[0]}


def show(sample, sc, operand, pair, q):
    """A sample for a person: what the model sees, the letters that count, the answer and whether the relation holds."""
    task, names, pcfg = sample["task"], sample["tokens"], sc.setup == "pcfg"
    string, marks = explain(sample["letters"], task, operand, sc)
    reason = REASON.get(task if pcfg else f"compiled {task}", "what the program answers for {operand}")
    reason = reason.format(operand=operand, o2=sample["operand2"])
    print(f"{task}{'' if task in OPERANDLESS else ' of ' + operand}")
    print("  the model sees  " + (f"{' '.join(names[:8])} ... {' '.join(names[-7:])}" if pcfg else " ".join(names)))
    print(f"  text            {string}\n                  {marks}")
    print(f"  answer {sample['answer']!s:<8} {reason}")
    if sample["correlated"] is not None:
        results = sc.tasks[task].answers(sample["letters"][None], sc)[0].tolist()
        a, b = (results[sc.operands.index(o)] for o in pair)
        if task == "max-identifier":
            a, b = sc.alphabet[a], sc.alphabet[b]
        print(f"  relation        r({pair[0]}) = {a}, r({pair[1]}) = {b}: r({pair[1]}) - r({pair[0]}) = {q} "
              f"{'holds' if sample['correlated'] else 'does not hold'}")
    print()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader went away: python data.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
