"""
What is computed: strings from a probabilistic context-free grammar, and five task families that ask about them.

    $ python data.py                                    # one sample of every task family, as pretraining sees them
    $ python data.py --task count --operand b --c 1.0   # fine-tuning strings on which "count b" = "count a" + 1
    $ python data.py --setup tracr-max                  # what a model compiled from a RASP program sees

What the model sees, at the small scale (32 letters, a window of 16, the 3rd occurrence), for "how many b":

    SOS  T_NJ  O_b  #16  SOT  b a c ... c a b  EOT  ART  #6  EOS
         task  operand  O'    32 letters                 answer: the b among the last 16 letters

The families (paper: PCFG setup; O is the operand, O' the second operand), on the text "... a c b a b", O' = 3 or 1:
    count               how many O among the last O' letters             O = b, O' = 3: "b a b" holds 2
    count-composition   how many overlapping pairs OO among them         O = b, O' = 3: 0
    index               distance from the end of the O'-th last O        O = b, O' = 1: 1 (the last letter is 1)
    index-composition   the same for the pair OO, at its later letter    "a a c", O = a, O' = 1: 2
    token               the letter at distance O' from the end           O' = 3: b

The compiled setups have one task each and no prompt: BOS, letters, padding; the answer stands at position 2.

Contents: scales and vocabulary | grammar | tasks and answers | compiled setups | edits and the spurious relation |
batches, test sets, floors | command line. Everything is a pure function of its arguments and a torch.Generator, on the
generator's device.
"""
import argparse
import functools
import json
import os
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

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
    parser.add_argument("--setup", default="pcfg", choices=["pcfg", *COMPILED], help="which kind of data (default: pcfg)")
    parser.add_argument("--scale", default="small", choices=["small", "paper"], help="string lengths (default: small)")
    parser.add_argument("-n", type=int, default=5, help="samples (default: 5)")
    parser.add_argument("--task", help=f"one task family: {', '.join(TASKS)} (default: all in turn)")
    parser.add_argument("--operand", help="what is asked for: a letter, for tracr-max which largest (default: a, or 5)")
    parser.add_argument("--c", default="natural", help="natural, or the probability 0..1 that the spurious relation holds")
    parser.add_argument("--q", type=int,
                        help="offset of the relation, r(O_FT) - r(O_PT), in letters (default: 1; tracr-max 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    args = parser.parse_args()
    sc = scale_of(args.scale, args.setup)
    known, operand = sc.order[0], args.operand or sc.order[0]
    pair = (known, sc.order[1] if operand == known else operand)
    q = default_q(sc, pair) if args.q is None else args.q
    if args.n < 1 or args.seed < 0:
        parser.error("-n takes 1 or more, --seed 0 or more")
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
    reason = REASON[task if pcfg else f"compiled {task}"].format(operand=operand, o2=sample["operand2"])
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
