"""
What data.py promises: the grammar's distribution, right answers, strings with exactly the relation
asked for, streams that depend on their arguments alone. Everything is checked against slow code
that shares nothing with the fast one but the table of rules. Statistical tests have fixed seeds and
a level of about 1e-4 over all that they compare.
"""
import collections
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

import data
from data import GRAMMAR, LETTERS, TASKS, Relation, rng
from pretrain import answer_row

ROOT = os.path.dirname(os.path.abspath(data.__file__))
SCALES = {"small": data.Grammar("pcfg", "small"), "paper": data.Grammar("pcfg", "paper")}
SMALL, FINETUNED, AB = SCALES["small"], data.Grammar.finetuned, Relation("count", "a", "b", 1)
#        window, k, pair_k, token_at, length: written again, so that a slip in Grammar shows
SHAPE = {"small": (16, 3, 1, 16, 32), "paper": (40, 6, 6, 40, 250)}
UNIFORM = (1 / 3, 1 / 3, 1 / 3)


# ---------------------------------------------------------------- references


def grow(symbol, flip):
    """Letters of a symbol, one draw of a rule (0 or 1) from flip() after the other."""
    if symbol in LETTERS:
        return symbol
    return "".join(grow(child, flip) for child in GRAMMAR[symbol][flip()])


def reference_strings(n, seed, first=.5):
    """n whole strings; `first`: the probability of the first rule, one half in the true grammar."""
    g = np.random.default_rng(seed)
    flip = (lambda: g.integers(2)) if first == .5 else (lambda: int(g.random() >= first))
    return [grow("s", flip) for _ in range(n)]


def reference_windows(strings, length, seed):
    """One random window of every string that is long enough."""
    g = np.random.default_rng(seed)
    cuts = [(s, g.integers(len(s) - length + 1)) for s in strings if len(s) >= length]
    return [s[i:i + length] for s, i in cuts]


def as_strings(text):
    """Rows of letters 0, 1, 2 as Python strings."""
    return ["".join(map(LETTERS.__getitem__, row)) for row in text.tolist()]


def as_text(*strings):
    """Python strings as rows of letters 0, 1, 2."""
    return torch.tensor([list(map(LETTERS.index, s)) for s in strings])


def fast_strings(n, seed):
    """n whole strings of data.sample_strings."""
    letters, length = data.sample_strings(n, rng(seed))
    whole, ends = "".join(LETTERS[x] for x in letters.tolist()), length.cumsum(0).tolist()
    return [whole[a:b] for a, b in zip([0] + ends, ends)]


def sequences(x):
    """Whole sequences of Examples of a pretraining, in which every next token is wanted."""
    assert torch.equal(x.target[:, :-1], x.tokens[:, 1:])
    return torch.cat([x.tokens, x.target[:, -1:]], 1)


def with_constants(**values):
    """The small setup with other constants."""
    setup = data.Grammar("pcfg", "small")
    vars(setup).update(values)
    return setup


def slow_answer(s, task, o, window, k, pair_k, token_at):
    """The answer of one string for operand o, or None. Distances: 1 is the last letter."""
    last, backwards = s[len(s) - window:], range(1, len(s) + 1)
    if task == "count":
        return last.count(o)
    if task == "count-composition":
        return sum(last[i:i + 2] == o + o for i in range(len(last)))
    if task == "token":
        return s[len(s) - token_at]
    if task == "index":
        found, k = [d for d in backwards if s[len(s) - d] == o], k
    else:
        found, k = [d for d in backwards[:-1] if s[len(s) - d] == o == s[len(s) - d - 1]], pair_k
    return found[k - 1] if len(found) >= k else None


def is_substring(w, start="s"):
    """
    Whether w occurs inside some string of the grammar. By dynamic programming over partial parses,
    from the letters up: full[X][i, j]: X can derive w[i:j]; ends[X][j]: w[:j] is the end of
    something X derives, the rest of which lies left of w; begins[X][i]: w[i:] is the beginning of
    something X derives; inside[X]: all of w lies within one X.
    """
    n = len(w)
    full, ends, begins, inside = {}, {}, {}, {}
    for x in LETTERS:
        full[x] = np.zeros((n + 1, n + 1), bool)
        for i in range(n):
            full[x][i, i + 1] = w[i] == x
        ends[x], begins[x], inside[x] = full[x][0], full[x][:, n], w == x

    def parse(symbol):
        if symbol in full:
            return
        span, within = np.zeros((n + 1, n + 1), bool), False
        end, begin = np.zeros(n + 1, bool), np.zeros(n + 1, bool)
        for rule in GRAMMAR[symbol]:
            for child in rule:
                parse(child)
            path = np.eye(n + 1, dtype=np.float32)  # floats: a product of matrices of bools is slow
            for child in rule:
                path = np.minimum(path @ full[child].astype(np.float32), 1)
            span |= path > 0
            for i, child in enumerate(rule):
                within |= inside[child]
                reached, open_at = ends[child], begins[child]
                # w begins in this child: it may end in a later one, or go on beyond the symbol
                for after in rule[i + 1:]:
                    within |= bool((reached & begins[after]).any())
                    reached = reached @ full[after]
                for before in rule[:i][::-1]:
                    open_at = full[before] @ open_at
                end, begin = end | reached, begin | open_at
        full[symbol], ends[symbol], begins[symbol], inside[symbol] = span, end, begin, within

    parse(start)
    return inside[start]


def change_one_letter(s, g):
    """The string with one letter, anywhere, replaced by another."""
    i = g.integers(len(s))
    return s[:i] + LETTERS[(LETTERS.index(s[i]) + g.integers(1, 3)) % 3] + s[i + 1:]


# ---------------------------------------------------------------- statistics


def largest_z(x, y):
    """The largest |z| of a two-sample comparison of means, over the columns of x and y."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    spread = np.sqrt(x.var(0) / len(x) + y.var(0) / len(y))
    gap = np.abs(x.mean(0) - y.mean(0))
    return np.where(gap == 0, 0, gap / np.maximum(spread, 1e-12)).max()


def z_bound(columns, level=1e-4):
    """What largest_z exceeds with probability `level` at most (Bonferroni) between equals."""
    return statistics.NormalDist().inv_cdf(1 - level / (2 * columns))


def chi_square_excess(x, y, level=1e-5):
    """
    Two-sample chi-square of whole numbers, over its critical value at `level` (Wilson-Hilferty):
    above 1 they differ. Values are pooled, in order, until a bin holds 20.
    """
    table, pool = [], np.zeros(2)
    for value in sorted(set(x) | set(y)):
        pool = pool + [np.sum(x == value), np.sum(y == value)]
        if pool.sum() >= 20:
            table.append(pool)
            pool = np.zeros(2)
    table[-1] = table[-1] + pool
    table = np.array(table)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    df = len(table) - 1
    z = statistics.NormalDist().inv_cdf(1 - level)
    critical = df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3
    return ((table - expected) ** 2 / expected).sum() / critical


def whole_string_statistics(strings):
    """
    Per string: length, its square, and the rate of every trigram. Letters within a string depend on
    each other; strings do not, so means over strings can be compared.
    """
    rows = []
    for s in strings:
        x = np.frombuffer(s.encode(), np.uint8).astype(int) - ord("a")
        trigrams = np.bincount(9 * x[:-2] + 3 * x[1:-1] + x[2:], minlength=27) / (len(s) - 2)
        rows.append([len(s), len(s) ** 2, *trigrams])
    return np.array(rows)


def window_statistics(strings, scale):
    """Per string: counts in the last `window` letters and in all, trigrams, first, last letter."""
    window = SHAPE[scale][0]
    rows = []
    for s in strings:
        last = s[-window:]
        counts = collections.Counter(s[i:i + 3] for i in range(len(s) - 2))
        trigrams = [counts[t] for t in ("aba", "abc", "cab", "cba", "bca", "aab")]
        a, b = last.count("a"), last.count("b")
        rows.append([a, b, a ** 2, b ** 2, s.count("a"), s.count("b"), *trigrams,
                     s[0] == "a", s[0] == "b", s[-1] == "a", s[-1] == "b"])
    return np.array(rows)


@pytest.fixture(scope="module")
def references():
    """Whole strings of the recursive reference, of the true grammar and of rules at .6 and .4."""
    return {"true": reference_strings(4000, 1), "wrong": reference_strings(1500, 2, first=.6)}


# ---------------------------------------------------------------- grammar


def test_rules_are_the_papers():
    """Both rules of every symbol, written again."""
    rules = """s: rq qp, p: mno nom, q: nmo nm, r: om mon, m: lj jlk, n: kjl ljk, o: lkj kj,
               j: hi ih, k: hgi ghi, l: ihg hig, g: dfe fed, h: edf def, i: efd fde, d: ca abc,
               e: cb cab, f: cba ba"""
    symbols = [rule.split(":") for rule in rules.split(",")]
    assert {symbol.strip(): tuple(both.split()) for symbol, both in symbols} == GRAMMAR


def test_sampler_draws_whole_strings_like_the_reference(references):
    """Lengths and trigrams of the fast sampler are those of one draw a rule; those of other
    probabilities are not."""
    fast = whole_string_statistics(fast_strings(8000, 3))
    true, wrong = (whole_string_statistics(references[which]) for which in ("true", "wrong"))
    bound = z_bound(fast.shape[1])
    assert largest_z(fast, true) < bound
    assert largest_z(fast, wrong) > 2 * bound, "the test would miss a wrong grammar"
    assert chi_square_excess(fast[:, 0], true[:, 0]) < 1
    assert chi_square_excess(fast[:, 0], wrong[:, 0]) > 1
    assert 138 <= min(fast[:, 0]) and max(fast[:, 0]) <= 432


@pytest.mark.parametrize("scale", SCALES)
def test_sample_text_cuts_windows_like_the_reference(references, scale):
    """Windows at a uniformly random place of a string; too short a string is drawn again."""
    length = SHAPE[scale][-1]
    fast = window_statistics(as_strings(data.sample_text(4000, SCALES[scale], rng(4))), scale)
    true = window_statistics(reference_windows(references["true"], length, 5), scale)
    bound = z_bound(fast.shape[1])
    assert largest_z(fast, true) < bound
    for column in range(2):
        assert chi_square_excess(fast[:, column], true[:, column]) < 1
    # What a wrong place does: the beginnings of strings are no random windows.
    beginnings = [s[:length] for s in references["true"] if len(s) >= length]
    fixed = window_statistics(beginnings, scale)
    assert largest_z(fast, fixed) > 2 * bound, "the test would miss a window at a fixed place"
    if scale == "paper":
        wrong = window_statistics(reference_windows(references["wrong"], length, 6), scale)
        assert largest_z(fast, wrong) > bound, "the test would miss a wrong grammar"


def test_windows_lie_everywhere_in_a_string():
    """
    The place of a window is uniform, from the first possible to the last. Letters look much alike
    in the middle of a string and near its ends, so the windows are looked for in their strings: the
    same generator draws strings first.
    """
    n = 3000
    pairs = list(zip(fast_strings(n, 30), as_strings(data.sample_text(n, SMALL, rng(30)))))
    place = np.array([(s.index(w) + .5) / (len(s) - 31) for s, w in pairs if s.count(w) == 1])
    assert len(place) > .95 * n
    assert abs(place.mean() - .5) < 4 * math.sqrt(1 / 12 / len(place))
    assert abs(((place - .5) ** 2).mean() - 1 / 12) < 4 * math.sqrt(1 / 180 / len(place))
    assert any(s.startswith(w) for s, w in pairs)  # 12 of either expected
    assert any(s.endswith(w) for s, w in pairs)


@pytest.mark.parametrize("symbol", "gkh")
@pytest.mark.parametrize("length", [2, 5, 7])
def test_substring_recogniser_against_enumeration(symbol, length):
    """The checker of the next tests, checked: every string of a length, against all expansions."""
    def derive(x):
        if x in LETTERS:
            return {x}
        rules = [itertools.product(*map(derive, rule)) for rule in GRAMMAR[x]]
        return set(map("".join, itertools.chain(*rules)))

    words = derive(symbol)
    substrings = {w[i:i + length] for w in words for i in range(len(w) - length + 1)}
    tried = ["".join(x) for x in itertools.product(LETTERS, repeat=length)]
    assert [w for w in tried if is_substring(w, symbol)] == sorted(substrings)


@pytest.mark.parametrize("scale, n", [("small", 200), ("paper", 8)])
def test_samples_belong_to_the_grammar_and_changed_ones_do_not(scale, n):
    """Every natural string is a substring of the language; with one letter changed, or the window
    edited, few are."""
    g = np.random.default_rng(7)
    natural = as_strings(data.sample_text(n, SCALES[scale], rng(8)))
    assert all(len(s) == SHAPE[scale][-1] and is_substring(s) for s in natural)
    changed = [is_substring(change_one_letter(s, g)) for s in natural]
    assert np.mean(changed) <= .12  # a change near the ends can hide: 7 % at 32 letters
    for task, split in itertools.product(FINETUNED, ("c0", "c1")):
        relation = AB._replace(task=task)
        edited = as_strings(SCALES[scale].text(n // 2, relation, split, rng(9)))
        assert np.mean([is_substring(s) for s in edited]) <= .25


def test_sampler_is_thirty_times_faster_than_the_reference():
    """Strings a second, on one thread, in one run; the best of several repetitions of each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def rate(sample, n, repetitions):
        def once():
            began = time.perf_counter()
            sample(n)
            return n / (time.perf_counter() - began)
        return max(once() for _ in range(repetitions))

    try:
        fast = rate(lambda n: data.sample_strings(n, rng(0)), 5000, 8)
        slow = rate(lambda n: reference_strings(n, 0), 60, 8)
    finally:
        torch.set_num_threads(threads)
    assert fast > 30 * slow, f"{fast:.0f} and {slow:.0f} strings/s"


# ---------------------------------------------------------------- tasks and answers


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("task", TASKS)
def test_answers_against_slow_reference(task, scale):
    """All three operands, on natural strings and on random letters, where rare pairs and missing
    answers occur."""
    *shape, length = SHAPE[scale]
    setup = SCALES[scale]
    text = torch.cat([data.sample_text(150, setup, rng(10)),
                      torch.randint(3, (150, length), generator=rng(11)),
                      (torch.rand(100, length, generator=rng(12)) < .06).long()])  # few b, no c
    number = {None: -1, **({x: i for i, x in enumerate(LETTERS)} if task == "token" else {})}
    missing = 0
    for s, answers in zip(as_strings(text), TASKS[task].answers(text, setup).tolist()):
        slow = [slow_answer(s, task, o, *shape) for o in LETTERS]
        missing += slow.count(None)
        assert answers == [number.get(x, x) for x in slow], s
    assert (missing > 0) == task.startswith("index")


@pytest.mark.parametrize("scale, n", [("small", 600), ("paper", 120)])
def test_pretraining_sequences_token_by_token(scale, n):
    """`SOS T O O' SOT text EOT ART answer EOS`, with the right O' and the right answer."""
    *shape, length = SHAPE[scale]
    setup = SCALES[scale]
    names, at = setup.vocabulary, setup.test(AB, "b", "c0", 4, 0).examples.at
    family = {"T_NJ": ("count", shape[0]), "T_CC": ("count-composition", shape[0]),
              "T_I": ("index", shape[1]), "T_IC": ("index-composition", shape[2]),
              "T_T": ("token", shape[3])}
    seen = collections.Counter()
    drawn = setup.pretraining(n, rng(13), Namespace(prior=UNIFORM))
    assert drawn.extra == {"small": (at, 1.), "paper": None}[scale]
    for row in sequences(drawn).tolist():
        said = [names[t] for t in row]
        task, operand2 = family[said[1]]
        operand = said[2].removeprefix("O_")
        text = "".join(said[5:5 + length])
        answer = slow_answer(text, task, operand, *shape)
        assert (operand == "null") == (task == "token")
        assert said == ["SOS", said[1], said[2], f"#{operand2}", "SOT", *text, "EOT", "ART",
                        answer if task == "token" else f"#{answer}", "EOS"]
        assert said[at] == "ART"
        seen[task, operand] += 1
    assert len(seen) == 4 * 3 + 1 and min(seen.values()) >= 3


def test_vocabulary_ids_do_not_depend_on_the_scale():
    """The paper's numbers come after the small ones; the names are all different."""
    small, paper = (setup.vocabulary for setup in SCALES.values())
    assert paper[:len(small)] == small and len(set(paper)) == len(paper) and paper[-1] == "#250"


@pytest.mark.parametrize("task", [t for t in TASKS if t != "token"])
def test_docstring_example(task):
    """The worked example `letters | O = x, name number -> answer` of every family is true, word for
    word."""
    example = r"((?:[abc] )+)\| O = ([abc]), (\w+) (\d+) -> (\d+)"
    words = re.search(example, TASKS[task].answers.__doc__)
    letters, operand, name, number, answer = words.groups()
    assert name == TASKS[task].operand2
    setup, text = with_constants(**{name: int(number)}), as_text(letters.replace(" ", ""))
    assert TASKS[task].answers(text, setup)[0, LETTERS.index(operand)].item() == int(answer)


@pytest.mark.parametrize("task, text, operand, name, number, answer", [
    ("count", "acbab", "b", "window", 3, 2), ("count-composition", "acbab", "b", "window", 3, 0),
    ("index", "acbab", "b", "k", 1, 1), ("index-composition", "aac", "a", "pair_k", 1, 2),
    ("token", "acbab", "a", "token_at", 3, 1),
    # A pair that straddles the beginning of the window does not count; overlapping ones do.
    ("count-composition", "aabc", "a", "window", 3, 0),
    ("count-composition", "baaa", "a", "window", 3, 2),
    ("index-composition", "caaa", "a", "pair_k", 2, 2),
    ("index", "abc", "a", "k", 2, -1), ("index", "abc", "a", "k", 1, 3)])
def test_hand_computed(task, text, operand, name, number, answer):
    """Every family, and the corners."""
    setup = with_constants(**{name: number})
    assert TASKS[task].answers(as_text(text), setup)[0, LETTERS.index(operand)].item() == answer


# ---------------------------------------------------------------- edits and the spurious relation


RELATIONS = list(itertools.product(SCALES, FINETUNED, (1, 2, -1), ("ab", "cb", "ac")))


def slow_results(text, task, pair, scale):
    """(n, 2) answers for both letters of the pair, by the slow reference."""
    *shape, _ = SHAPE[scale]
    about = itertools.product(as_strings(text), pair)
    return np.array([slow_answer(s, task, o, *shape) for s, o in about]).reshape(-1, 2)


@pytest.mark.parametrize("scale, task, q, pair", RELATIONS)
def test_relation_holds_always_or_never(scale, task, q, pair):
    """
    c1: r(O_FT) - r(O_PT) = q on every string. c0: on none, no tie either, and the same marginals as
    c1, so that neither answer alone tells the two apart; nor does one answer tell the other on c0.
    """
    r = {}
    for split in ("c0", "c1"):
        text = SCALES[scale].text(1500, Relation(task, *pair, q), split, rng(14, split))
        r[split] = slow_results(text, task, pair, scale)
    gap = r["c0"][:, 1] - r["c0"][:, 0]
    assert (r["c1"][:, 1] - r["c1"][:, 0] == q).all()
    assert not (gap == q).any() and not (gap == 0).any()
    for side in range(2):
        assert chi_square_excess(r["c0"][:, side], r["c1"][:, side]) < 1
        shifted = r["c1"][:, side] + 1
        assert chi_square_excess(r["c0"][:, side], shifted) > 1, "the test would miss a shift"
    one, other = torch.from_numpy(r["c0"]).T
    for answers, given in ((one, other), (other, one)):
        assert data.cross_floor(answers, given) < {"small": .55, "paper": .40}[scale]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("task", FINETUNED)
def test_relation_table_is_what_is_drawn(scale, task):
    """The joint distributions of c0 and c1 have equal marginals, and the strings follow them."""
    never, always = data.relation_tables(task, scale, 1)
    for axis in range(2):
        assert np.abs(never.sum(axis) - always.sum(axis)).max() < 1e-8
    assert abs(never.sum() - 1) < 1e-12
    assert abs(np.diagonal(never, 1).sum()) == 0 and np.trace(never) == 0
    assert abs(np.diagonal(always, 1).sum() - 1) < 1e-12
    text = SCALES[scale].text(1500, AB._replace(task=task), "c0", rng(15))
    drawn = slow_results(text, task, "ab", scale)
    cells = np.random.default_rng(16).choice(never.size, 1500, p=never.flatten())
    expected = np.stack([cells // len(never), cells % len(never)], 1)
    assert chi_square_excess(drawn[:, 1] - drawn[:, 0], expected[:, 1] - expected[:, 0]) < 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("task", FINETUNED)
def test_correlation_strength(scale, task):
    """With C_Tr = .3 the relation holds on .3 of the strings; others have neither it nor a tie."""
    n = 4000
    text = SCALES[scale].text(n, AB._replace(task=task), .3, rng(17))
    r = TASKS[task].answers(text, SCALES[scale])
    gap = (r[:, 1] - r[:, 0]).numpy()
    assert abs((gap == 1).mean() - .3) < 4 * math.sqrt(.3 * .7 / n)
    assert not (gap == 0).any()


@pytest.mark.parametrize("scale", SCALES)
def test_count_edits_change_the_window_alone_and_as_little_as_possible(scale):
    """Every surplus letter changes, and nothing else does."""
    setup, window = SCALES[scale], SHAPE[scale][0]
    text = data.sample_text(500, setup, rng(18))
    target = data.count(setup.text(500, Relation("count", "c", "b", 2), .5, rng(19)), setup)
    edited = data.edit_counts(text, target, setup, rng(20))
    for before, after, want in zip(as_strings(text), as_strings(edited), target.tolist()):
        assert [after[-window:].count(o) for o in LETTERS] == want
        assert after[:-window] == before[:-window]
        surplus = sum(max(0, before[-window:].count(o) - w) for o, w in zip(LETTERS, want))
        assert sum(x != y for x, y in zip(before, after)) == surplus


def test_count_edits_choose_places_at_random():
    """Out of sixteen a's, any four may become b and any four c; each place equally often."""
    n, target = 4000, torch.tensor([8, 4, 4])
    text = torch.zeros(n, 32, dtype=torch.long)
    edited = data.edit_counts(text, target.expand(n, 3), SMALL, rng(21))
    for letter, share in enumerate((.5, .25, .25)):
        at = (edited[:, -16:] == letter).double().mean(0)
        assert (at - share).abs().max() < z_bound(16 * 3) * math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("letters", ["ab", "cb", "ca"])
def test_index_edits_reach_the_distances_and_nothing_beyond(scale, letters):
    """The k-th last letters lie where they should; letters farther than both stay, and few of the
    nearer change."""
    setup, shape = SCALES[scale], SHAPE[scale]
    text = data.sample_text(500, setup, rng(22))
    wanted = setup.text(500, AB._replace(task="index"), .5, rng(23))
    distance = torch.from_numpy(slow_results(wanted, "index", "ab", scale))
    places = [LETTERS.index(x) for x in letters]
    edited = data.edit_distances(text, distance, places, setup, rng(24))
    edits = 0
    for before, after, want in zip(as_strings(text), as_strings(edited), distance.tolist()):
        assert [slow_answer(after, "index", o, *shape[:-1]) for o in letters] == want
        assert after[:-max(want)] == before[:-max(want)]
        edits += sum(x != y for x, y in zip(before, after))
    assert edits / len(text) < 4


@pytest.mark.parametrize("task", FINETUNED)
@pytest.mark.parametrize("q", [0, 17, -17, 99, 1000])
def test_impossible_offset(task, q):
    """An offset that no string can have is refused, for either split, in words that name it."""
    for split in ("c0", "c1"):
        with pytest.raises(ValueError, match=f"q = {q} leaves no {task} strings"):
            SMALL.text(4, Relation(task, "a", "b", q), split, rng(0))


def test_spread_share_widens_the_counts_and_touches_the_window_alone():
    """Small: half of the strings, counts of a and b with a standard deviation of about 1.8; paper:
    none."""
    text = data.sample_text(4000, SMALL, rng(25))
    wide = data.spread_text(text, SMALL, rng(26))
    assert torch.equal(wide[:, :16], text[:, :16])
    always = data.spread_text(text, with_constants(spread=1.), rng(26))
    counts, natural = (data.count(x, SMALL).double() for x in (always, text))
    for letter in range(2):
        assert 1.5 < counts[:, letter].std() < 2. and natural[:, letter].std() < 1.3
    assert abs(torch.corrcoef(counts[:, :2].T)[0, 1]) < .07  # independent: 4 standard errors
    same, always_same = ((x == text).all(1).double().mean() for x in (wide, always))
    assert abs(same - always_same * .5 - .5) < 4 * math.sqrt(.25 / 4000)
    paper = data.sample_text(50, SCALES["paper"], rng(27))
    assert torch.equal(data.spread_text(paper, SCALES["paper"], rng(28)), paper)


# ---------------------------------------------------------------- batches, test sets, floors


def test_floors_on_hand_made_tables():
    """majority: the commonest answer. cross: the commonest answer given the other one's."""
    assert data.majority_floor(torch.tensor([4, 4, 4, 5])) == .75
    assert data.majority_floor(torch.tensor([1, 2, 3, 4])) == .25
    #                     given 0: 5 5 6 -> 2 right; given 1: 7 -> 1; given 2: 5 6 -> 1
    answers, other = torch.tensor([5, 5, 6, 7, 5, 6]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert data.cross_floor(answers, other) == pytest.approx(4 / 6)
    assert data.cross_floor(other, answers) == pytest.approx((2 + 1 + 1) / 6)
    assert data.cross_floor(other + 1, other) == 1


def row_of(task, operand, split):
    """The row of a model that always gives the first token, and the right answers."""
    test = SMALL.test(AB._replace(task=task), operand, split, 500, 0)
    return answer_row(torch.zeros(500, len(SMALL.vocabulary)), test), test.examples.answer.tolist()


def test_floors_of_test_sets():
    """On c1 the other answer says all; on c0 little; without a pair there is nothing to say."""
    (c0, answers), (c1, _) = (row_of("count", "b", split) for split in ("c0", "c1"))
    assert c1["cross_floor"] == 1 and c0["cross_floor"] < .55
    assert c0["floor"] == collections.Counter(answers).most_common(1)[0][1] / 500
    assert row_of("count", "c", "c0")[0]["cross_floor"] is None
    assert row_of("token", "a", "natural")[0]["cross_floor"] is None


@pytest.mark.parametrize("task", TASKS)
def test_test_sets_ask_the_right_question(task):
    """Tokens, answers and labels of a test set agree with the slow answers of its strings."""
    *shape, length = SHAPE["small"]
    names = SMALL.vocabulary
    for operand in LETTERS:
        test = SMALL.test(AB._replace(task=task), operand, "natural", 60, 5)
        x = test.examples
        strings = as_strings(SMALL.text_of(x))
        assert (x.target >= 0).nonzero()[:, 1].unique().tolist() == [x.at]
        for s, row, given, labels in zip(strings, x.tokens.tolist(), x.answer.tolist(), x.labels):
            answer = slow_answer(s, task, operand, *shape)
            number = LETTERS.index(answer) if task == "token" else answer
            assert names[given] == (answer if task == "token" else f"#{answer}")
            assert names[row[-1]] == "ART" and len(row) == x.at + 1
            assert "".join(names[t] for t in row[5:5 + length]) == s
            assert labels[LETTERS.index(operand)] == number


@pytest.mark.parametrize("task", FINETUNED)
@pytest.mark.parametrize("split", data.SPLITS)
def test_test_sets_do_not_depend_on_the_question(task, split):
    """The same strings for every operand and in every call; other strings for another seed."""
    relation, sets = AB._replace(task=task), []
    for operand, seed in ("a", 0), ("b", 0), ("c", 0), ("a", 0), ("a", 1):
        setup = data.Grammar("pcfg", "small")  # a new one: nothing is remembered
        sets.append(setup.test(relation, operand, split, 40, seed).examples)
    texts, tokens = [SMALL.text_of(x) for x in sets], [x.tokens for x in sets]
    assert all(torch.equal(texts[0], text) for text in texts[:4])
    assert torch.equal(tokens[0], tokens[3]) and not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(texts[0], texts[4])


def some_stream(seed=0, label="pretrain", draw=None):
    """The pretraining stream at the small scale, 4 sequences a batch."""
    def pretraining(n, g):
        return SMALL.pretraining(n, g, Namespace(prior=UNIFORM))
    return data.stream(draw or pretraining, 4, seed, label)


def test_batch_k_depends_on_seed_label_and_k_alone():
    """In whatever order batches are asked for, and however often."""
    forwards = [sequences(some_stream()(k)) for k in range(40)]
    batch = some_stream()
    for k in [39, 0, 17, 16, 15, 17, 0, 32, 31]:
        assert torch.equal(sequences(batch(k)), forwards[k])
    assert len({tuple(b.flatten().tolist()) for b in forwards}) == 40
    assert not torch.equal(sequences(some_stream(seed=1)(0)), forwards[0])
    assert not torch.equal(sequences(some_stream(label="finetune")(0)), forwards[0])


def test_training_never_meets_the_test_sets():
    """Their generators differ, for equal seeds, and so do their strings."""
    started = []

    def draw(n, g):
        started.append(g.initial_seed())
        args = Namespace(task="count", pair=["a", "b"], q=1, c_tr=1., operand="b")
        return SMALL.finetuning(n, g, args)

    batches = [some_stream(label=label, draw=draw)(k)
               for label, k in itertools.product(("pretrain", "finetune"), (0, 16, 32))]
    trained = torch.cat([SMALL.text_of(x) for x in batches])
    tested = [rng(0, "test", task, split, "a", "b", 1).initial_seed()
              for task, split in itertools.product(TASKS, data.SPLITS)]
    assert len(set(started + tested)) == len(started) + len(tested) == 6 + 15
    test = SMALL.text_of(SMALL.test(AB, "b", "c1", 300, 0).examples)
    assert not set(as_strings(trained)) & set(as_strings(test))


@pytest.mark.parametrize("prior", [(.5, .3, .2), data.PRIORS["low"], data.PRIORS["medium"]])
def test_operands_follow_the_prior(prior):
    """Also in families that draw rare strings again: what is drawn again keeps its operand."""
    n = 6000
    tokens = sequences(SMALL.pretraining(n, rng(29), Namespace(prior=prior)))
    for family in ("T_NJ", "T_CC", "T_I", "T_IC"):
        asked = tokens[tokens[:, 1] == data.ID[family], 2]
        assert abs(len(asked) - n / 5) < 4 * math.sqrt(n * .2 * .8)
        for letter, p in enumerate(prior):
            hits = (asked == data.OPERAND + letter).sum().item()
            assert abs(hits - p * len(asked)) <= 4 * math.sqrt(len(asked) * p * (1 - p))
    assert (tokens[tokens[:, 1] == data.ID["T_T"], 2] == data.ID["O_null"]).all()


def test_parse_prior():
    """Names, or three shares that add up to one; everything else is a UserError of one line that
    quotes the text."""
    assert data.parse_prior("low") == (.999, .001, 0)
    assert data.parse_prior(".2,.3,.5") == (.2, .3, .5)
    assert all(abs(sum(p) - 1) < 1e-9 for p in data.PRIORS.values())
    for wrong in ("", "none", "1,0", "1,0,0,0", ".5,.5,.5", "2,-1,0", "nan,0,1", "a,b,c",
                  "inf,0,0"):
        with pytest.raises(data.UserError, match=re.escape(repr(wrong))) as error:
            data.parse_prior(wrong)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- command line


KEYS = {"setup", "task", "operand", "operand2", "text", "answer", "correlated", "tokens"}


def check_sample(sample, scale, operand):
    """One line of `python data.py --json`, against the slow answers."""
    *shape, length = SHAPE[scale]
    task, s = sample["task"], sample["text"]
    assert set(sample) == KEYS and sample["setup"] == "pcfg" and len(s) == length
    assert sample["operand"] == (None if task == "token" else operand)
    assert sample["operand2"] == dict(zip(TASKS, (shape[0], *shape)))[task]
    assert sample["answer"] == slow_answer(s, task, operand, *shape)
    assert sample["tokens"][5:5 + length] == list(s) and len(sample["tokens"]) == length + 9
    assert sample["tokens"][-2] == (sample["answer"] if task == "token" else f"#{sample['answer']}")
    if task not in FINETUNED:
        assert sample["correlated"] is None
    else:
        a, b = (slow_answer(s, task, o, *shape) for o in ("a", "b" if operand == "a" else operand))
        assert sample["correlated"] == (None not in (a, b) and b - a == 1)


def test_json_command():
    """`python data.py --json` shows every family once, one object a line and nothing else."""
    command = [sys.executable, os.path.join(ROOT, "data.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert [s["task"] for s in samples] == list(TASKS) and not done.stderr
    for sample in samples:
        check_sample(sample, "small", "a")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("task", TASKS)
def test_json_of_every_family(task, scale, monkeypatch, capsys):
    """Every family, scale and operand; with --c 1 and --c 0 the relation is as asked for."""
    def samples(*words):
        command = ["data.py", "--json", "--scale", scale, "--task", task, "-n", "3", *words]
        monkeypatch.setattr(sys, "argv", command)
        data.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    for operand in LETTERS:
        got = samples("--operand", operand)
        assert len(got) == 3
        for sample in got:
            check_sample(sample, scale, operand)
    if task in FINETUNED:
        for c, holds in (("1", True), ("0", False)):
            for sample in samples("--operand", "b", "--c", c):
                check_sample(sample, scale, "b")
                assert sample["correlated"] == holds
