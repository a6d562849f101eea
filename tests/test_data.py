"""
What data.py promises: the grammar's distribution, right answers, strings with exactly the relation
asked for, streams that depend on their arguments alone, and its command line. The references are
slow and share nothing with the fast code but the table of rules. Statistical tests have fixed seeds
and bounds that chance passes less than once in ten thousand.
"""
import collections
import contextlib
import functools
import itertools
import json
import math
import random
import re
import shlex
import statistics
from argparse import Namespace

import numpy as np
import pytest
import torch

import data
from data import GRAMMAR, ID, LETTERS, SPLITS, TASKS, Relation, UserError, rng
from pretrain import answer_row

# The constants of both scales, written again, so that a slip in Grammar.sizes shows.
Shape = collections.namedtuple("Shape", "window k pair_k token_at length")
SHAPES = {"small": Shape(16, 3, 1, 16, 32), "paper": Shape(40, 6, 6, 40, 250)}
SETUPS = {scale: data.Grammar("pcfg", scale) for scale in SHAPES}
SMALL, FINETUNED, AB = SETUPS["small"], data.Grammar.finetuned, Relation("count", "a", "b", 1)
PRETRAINING = Namespace(prior=(1 / 3, 1 / 3, 1 / 3))
FINETUNING = Namespace(task="count", pair=["a", "b"], q=1, c_tr=1., operand="b", answers=None)
both_scales = pytest.mark.parametrize("scale", SHAPES)

# ---------------------------------------------------------------- references, statistics


def parse(s, start="s"):
    """The tree (symbol, rule, *children) by which a symbol derives the whole string, or None."""
    @functools.cache
    def trees(symbol, i):  # {where it ends: tree} of what begins at place i
        if symbol in LETTERS:
            return {i + 1: symbol} if s[i:i + 1] == symbol else {}
        found = {}
        for rule in GRAMMAR[symbol]:
            paths = {i: (symbol, rule)}
            for child in rule:
                paths = {end: path + (tree,) for place, path in paths.items()
                         for end, tree in trees(child, place).items()}
            found.update(paths)
        return found
    return trees(start, 0).get(len(s))


def choices(tree):
    """[(symbol, number of its rule)] of a tree, from the root down."""
    if isinstance(tree, str):
        return []
    symbol, rule, *children = tree
    below = itertools.chain.from_iterable(map(choices, children))
    return [(symbol, GRAMMAR[symbol].index(rule)), *below]


def slow_answer(s, task, o, scale):
    """The answer of one string for operand o, or None. Distances: 1 is the last letter."""
    shape = SHAPES[scale]
    last = s[-shape.window:]
    if task == "count":
        return last.count(o)
    if task == "count-composition":
        return sum(last[i:i + 2] == o + o for i in range(len(last)))
    if task == "token":
        return s[-shape.token_at]
    wanted, nth = (o, shape.k) if task == "index" else (o + o, shape.pair_k)
    found = (d for d in range(1, len(s) + 1) if s[:len(s) - d + 1].endswith(wanted))
    return next(itertools.islice(found, nth - 1, None), None)


def slow_sequence(s, task, operand, scale):
    """The names of the tokens of a question and its answer."""
    shape = SHAPES[scale]
    token, operand2 = {
        "count": ("T_NJ", shape.window), "count-composition": ("T_CC", shape.window),
        "index": ("T_I", shape.k), "index-composition": ("T_IC", shape.pair_k),
        "token": ("T_T", shape.token_at)}[task]
    asked = "O_null" if task == "token" else f"O_{operand}"
    answer = slow_answer(s, task, operand, scale)
    answer = answer if task == "token" else f"#{answer}"
    return ["SOS", token, asked, f"#{operand2}", "SOT", *s, "EOT", "ART", answer, "EOS"]


def slow_results(text, task, pair, scale):
    """(n, 2) answers for both letters of the pair."""
    asked = itertools.product(as_strings(text), pair)
    return np.array([slow_answer(s, task, o, scale) for s, o in asked]).reshape(-1, 2)


def as_strings(text):
    """Rows of letters 0, 1, 2 as Python strings."""
    return ["".join(map(LETTERS.__getitem__, row)) for row in text.tolist()]


def fast_strings(n, seed):
    """n whole strings of data.sample_strings."""
    letters, length = data.sample_strings(n, rng(seed))
    whole, ends = "".join(map(LETTERS.__getitem__, letters.tolist())), length.cumsum(0).tolist()
    return [whole[a:b] for a, b in zip([0, *ends], ends)]


def words_of(setup, rows):
    """Rows of tokens as lists of names."""
    names = setup.vocabulary
    return [list(map(names.__getitem__, row)) for row in rows.tolist()]


def chi_square_excess(x, y, level=3e-6):
    """
    Two-sample chi-square of whole numbers, in up to 50 bins, over its critical value at `level`
    (Wilson-Hilferty): above 1 they differ.
    """
    edges = np.quantile([*x, *y], np.linspace(0, 1, 50)[:-1], method="lower")
    table = np.array([np.histogram(z, [*np.unique(edges), np.inf])[0] for z in (x, y)])
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    df, z = table.shape[1] - 1, statistics.NormalDist().inv_cdf(1 - level)
    critical = df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3
    return ((table - expected) ** 2 / expected).sum() / critical


def assert_probability(occurred, p):
    """A sample of booleans is within 4 standard errors of a probability."""
    frequency = torch.as_tensor(occurred).double().mean()
    assert abs(frequency - p) <= 4 * math.sqrt(p * (1 - p) / len(occurred))


# ---------------------------------------------------------------- grammar


def test_rules_are_the_papers():
    """Both rules of every symbol, written again."""
    rules = """s: rq qp, p: mno nom, q: nmo nm, r: om mon, m: lj jlk, n: kjl ljk, o: lkj kj,
               j: hi ih, k: hgi ghi, l: ihg hig, g: dfe fed, h: edf def, i: efd fde, d: ca abc,
               e: cb cab, f: cba ba"""
    symbols = [rule.split(":") for rule in rules.split(",")]
    assert {symbol.strip(): tuple(both.split()) for symbol, both in symbols} == GRAMMAR


def test_every_rule_of_sampled_strings_is_drawn_by_a_fair_coin():
    """By their parses, of which the grammar allows one: each symbol's rules, and neighbours'."""
    strings = fast_strings(400, 3)
    drawn = [choices(parse(s)) for s in strings]
    for symbol in GRAMMAR:
        rules = [rule for string in drawn for x, rule in string if x == symbol]
        assert len(rules) > 150
        assert_probability(rules, .5)
    for lag in (1, 2, 3, 7):
        pairs = [x[1] == y[1] for string in drawn for x, y in zip(string, string[lag:])]
        assert_probability(pairs, .5)
    assert all(len(set(data.expansions(x))) == len(data.expansions(x)) for x in "gjkl")
    assert 138 <= min(map(len, strings)) and max(map(len, strings)) <= 432


def test_changed_strings_do_not_belong_to_the_grammar():
    """The parser itself: every string of 7 letters, against all expansions; changed samples."""
    words = map("".join, itertools.product(LETTERS, repeat=7))
    expansions = {w for w in data.expansions("g") if len(w) == 7}
    assert {w for w in words if parse(w, "g")} == expansions and len(expansions) > 4
    strings, g = fast_strings(100, 8), random.Random(7)
    changed = [s[:i] + g.choice(LETTERS.replace(s[i], "")) + s[i + 1:]
               for s in strings for i in [g.randrange(len(s))]]
    assert sum(parse(s) is not None for s in changed) <= 2


@both_scales
def test_texts_are_windows_that_lie_everywhere_in_a_string(scale):
    """
    The same generator draws the strings first: each text is a part of its string, too short strings
    are left out, and the place is uniform, from the first possible to the last.
    """
    n, length = 3000, SHAPES[scale].length
    strings = [s for s in fast_strings(n, 30) if len(s) >= length]
    pairs = list(zip(strings, as_strings(data.sample_text(n, SETUPS[scale], rng(30)))))
    assert all(len(w) == length and w in s for s, w in pairs)
    place = np.array([(s.index(w) + .5) / (len(s) - length + 1)
                      for s, w in pairs if s.count(w) == 1])
    assert len(place) > .95 * len(strings) and len(strings) > n / 2
    assert chi_square_excess((12 * place).astype(int), np.repeat(range(12), 10 ** 4)) < 1
    assert any(s.startswith(w) for s, w in pairs)  # 12 of either expected, or more
    assert any(s.endswith(w) for s, w in pairs)


# ---------------------------------------------------------------- tasks and answers


@both_scales
@pytest.mark.parametrize("task", TASKS)
def test_answers_against_slow_reference(task, scale):
    """All operands, on natural strings, on random letters, and where pairs and answers lack."""
    setup, length = SETUPS[scale], SHAPES[scale].length
    text = torch.cat([data.sample_text(150, setup, rng(10)),
                      torch.randint(3, (150, length), generator=rng(11)),
                      (torch.rand(100, length, generator=rng(12)) < .06).long()])
    number = {None: -1, **({x: i for i, x in enumerate(LETTERS)} if task == "token" else {})}
    missing = False
    for s, answers in zip(as_strings(text), TASKS[task].answers(text, setup)):
        expected = [slow_answer(s, task, o, scale) for o in LETTERS]
        assert answers.tolist() == [number.get(x, x) for x in expected], s
        missing |= None in expected
    assert missing == task.startswith("index")


@pytest.mark.parametrize("task, example", [
    *((task, TASKS[task].answers.__doc__) for task in TASKS if task != "token"),
    ("count", "a c b a b | O = b, window 3 -> 2"), ("index", "a c b a b | O = b, k 1 -> 1"),
    ("index", "a b c | O = a, k 2 -> -1"), ("index", "a b c | O = a, k 1 -> 3"),
    ("index-composition", "c a a a | O = a, pair_k 2 -> 2"),
    ("count-composition", "a c b a b | O = b, window 3 -> 0"),
    # A pair that straddles the beginning of the window does not count; overlapping ones do.
    ("count-composition", "a a b c | O = a, window 3 -> 0"),
    ("count-composition", "b a a a | O = a, window 3 -> 2"),
    ("token", "a c b a b | O = a, token_at 3 -> 1")])
def test_worked_examples(task, example):
    """Those of the docstrings, and the corners, computed by hand."""
    pattern = r"((?:[abc] )+)\| O = ([abc]), (\w+) (\d+) -> (-?\d+)"
    letters, operand, name, number, answer = re.search(pattern, example).groups()
    text = torch.tensor([[*map(LETTERS.index, letters.split())]])
    setup = Namespace(operands=LETTERS, **{name: int(number)})
    answers = TASKS[task].answers(text, setup)
    assert answers[0, LETTERS.index(operand)] == int(answer) and name == TASKS[task].operand2


@pytest.mark.parametrize("scale, n", [("small", 600), ("paper", 120)])
def test_pretraining_sequences_token_by_token(scale, n):
    """All families and operands, each sequence as it is written out."""
    setup, at, asked = SETUPS[scale], SHAPES[scale].length + 6, collections.Counter()
    assert setup.vocabulary == [*SMALL.vocabulary, *(f"#{i}" for i in range(33, at - 5))]
    drawn = setup.pretraining(n, rng(13), PRETRAINING)
    assert drawn.extra == {"small": (at, 1.), "paper": None}[scale]
    assert torch.equal(drawn.target[:, :-1], drawn.tokens[:, 1:])  # every next token is wanted
    for words in words_of(setup, torch.cat([drawn.tokens, drawn.target[:, -1:]], 1)):
        task, = (name for name, family in TASKS.items() if family.token == words[1])
        operand = words[2].removeprefix("O_")
        assert words == slow_sequence("".join(words[5:-4]), task, operand, scale)
        assert words[at] == "ART"
        asked[task, operand] += 1
    assert len(asked) == 4 * 3 + 1 and min(asked.values()) >= 3


# ---------------------------------------------------------------- edits and the spurious relation


@both_scales
@pytest.mark.parametrize("task", FINETUNED)
@pytest.mark.parametrize("q, pair", [(1, "ab"), (1, "cb"), (2, "ac"), (-1, "ab"), (-1, "ac")])
def test_relation_holds_always_or_never(scale, task, q, pair):
    """
    c1: r(O_FT) - r(O_PT) = q on every string. c0: on none, no tie either, and the same marginals as
    c1, so that neither answer alone tells the two apart; nor does one answer tell the other on c0.
    """
    r = {}
    for split in ("c0", "c1"):
        text = SETUPS[scale].text(1000, Relation(task, *pair, q), split, rng(14, split))
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


@both_scales
@pytest.mark.parametrize("task", FINETUNED)
def test_relation_table_is_what_is_drawn(scale, task):
    """
    The tables of c0 and c1 have equal marginals, and strings follow them; with C_Tr .3 the relation
    holds on .3 of the strings, the others have neither it nor a tie.
    """
    never, always = data.relation_tables(task, scale, 1)
    for axis in range(2):
        assert np.abs(never.sum(axis) - always.sum(axis)).max() < 1e-8
    assert abs(never.sum() - 1) < 1e-12
    assert abs(np.diagonal(never, 1).sum()) == 0 and np.trace(never) == 0
    assert abs(np.diagonal(always, 1).sum() - 1) < 1e-12
    setup, relation = SETUPS[scale], AB._replace(task=task)
    drawn = slow_results(setup.text(1500, relation, "c0", rng(15)), task, "ab", scale)
    cells = np.random.default_rng(16).choice(never.size, 1500, p=never.flatten())
    expected = np.stack([cells // len(never), cells % len(never)], 1)
    assert chi_square_excess(drawn[:, 1] - drawn[:, 0], expected[:, 1] - expected[:, 0]) < 1
    r = TASKS[task].answers(setup.text(4000, relation, .3, rng(17)), setup)
    assert_probability(r[:, 1] - r[:, 0] == 1, .3)
    assert (r[:, 1] != r[:, 0]).all()


@both_scales
def test_count_edits_change_the_window_alone_and_as_little_as_possible(scale):
    """Every surplus letter changes, and nothing else does; the places are random."""
    setup, window = SETUPS[scale], SHAPES[scale].window
    text = data.sample_text(500, setup, rng(18))
    target = data.count(setup.text(500, Relation("count", "c", "b", 2), .5, rng(19)), setup)
    edited = data.edit_counts(text, target, setup, rng(20))
    for before, after, wanted in zip(as_strings(text), as_strings(edited), target.tolist()):
        assert [after[-window:].count(o) for o in LETTERS] == wanted
        assert after[:-window] == before[:-window]
        surplus = sum(max(0, before[-window:].count(o) - w) for o, w in zip(LETTERS, wanted))
        assert sum(x != y for x, y in zip(before, after)) == surplus
    n, all_a = 4000, torch.zeros(4000, setup.length, dtype=torch.long)
    target = torch.tensor([window // 2, window // 4, window // 4])
    edited = data.edit_counts(all_a, target.expand(n, 3), setup, rng(21))
    for letter, p in enumerate((.5, .25, .25)):
        frequency = (edited[:, -window:] == letter).double().mean(0)
        assert (frequency - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)  # of 168: 1e-4


@both_scales
@pytest.mark.parametrize("letters", ["ab", "cb", "ca"])
def test_index_edits_reach_the_distances_and_nothing_beyond(scale, letters):
    """Letters farther than both distances stay, and few of the nearer ones change."""
    setup = SETUPS[scale]
    text = data.sample_text(500, setup, rng(22))
    related = setup.text(500, AB._replace(task="index"), .5, rng(23))
    distance = torch.from_numpy(slow_results(related, "index", "ab", scale))
    places = [LETTERS.index(x) for x in letters]
    edited = data.edit_distances(text, distance, places, setup, rng(24))
    edits = 0
    for before, after, wanted in zip(as_strings(text), as_strings(edited), distance.tolist()):
        assert [slow_answer(after, "index", o, scale) for o in letters] == wanted
        assert after[:-max(wanted)] == before[:-max(wanted)]
        edits += sum(x != y for x, y in zip(before, after))
    assert edits / len(text) < 4


@both_scales
def test_spread_widens_the_counts_and_touches_the_window_alone(scale):
    """Half of the strings get counts of a and b that do not depend on each other."""
    setup, every = SETUPS[scale], data.Grammar("pcfg", scale)
    text = data.sample_text(4000, setup, rng(25))
    wide = data.spread_text(text, setup, rng(26))
    assert torch.equal(wide[:, :-setup.window], text[:, :-setup.window])
    every.spread = 1.
    always = data.spread_text(text, every, rng(26))
    counts, natural = (data.count(x, setup).double() for x in (always, text))
    for letter in range(2):
        assert .83 < counts[:, letter].std() / setup.sd_spread < 1.11
        assert natural[:, letter].std() < 1.3
    assert abs(torch.corrcoef(counts[:, :2].T)[0, 1]) < .07  # independent: 4 standard errors
    same, always_same = ((x == text).all(1).double().mean() for x in (wide, always))
    assert abs(same - always_same * .5 - .5) < 4 * math.sqrt(.25 / 4000)


@both_scales
def test_pretraining_covers_the_counts_of_c0(scale):
    """Each count that c0 has in one string of a thousand is in one of 500 of pretraining."""
    setup = SETUPS[scale]
    text = data.spread_text(data.sample_text(20000, setup, rng(27)), setup, rng(28))
    shown = data.count(text, setup)[:, 0].bincount(minlength=41) / len(text)
    c0, _ = data.relation_tables("count", scale, 1)
    needed = torch.from_numpy(c0.sum(1)) > 1e-3
    assert needed.sum() > 6 and shown[:len(needed)][needed].min() > 1 / 500


def test_counts_of_c0_are_so_wide_that_b_does_not_tell_a(monkeypatch):
    """At the paper's scale, natural counts (s.d. 1.1) would be guessed from b in 83 %, not 33 %."""
    def best_guess_from_b():
        c0, _ = data.relation_tables.__wrapped__("count", "paper", 1)
        return c0.max(0).sum()
    wide = best_guess_from_b()
    monkeypatch.setitem(data.Grammar.sizes, "sd_count", (1.6, 1.1))
    assert round(wide, 2) == .33 and round(best_guess_from_b(), 2) == .83


# ---------------------------------------------------------------- priors, batches


@pytest.mark.parametrize("prior", [(.5, .3, .2), data.PRIORS["low"], data.PRIORS["medium"]])
def test_operands_follow_the_prior(prior):
    """Families uniform; a string that is drawn again keeps its operand, also in rare families."""
    tokens = SMALL.pretraining(6000, rng(29), Namespace(prior=prior)).tokens
    for family in ("T_NJ", "T_CC", "T_I", "T_IC"):
        assert_probability(tokens[:, 1] == ID[family], .2)
        for letter, p in zip(LETTERS, prior):
            assert_probability(tokens[tokens[:, 1] == ID[family], 2] == ID[f"O_{letter}"], p)
    assert (tokens[tokens[:, 1] == ID["T_T"], 2] == ID["O_null"]).all()


def test_parse_prior():
    """Names, or three shares that add up to one; else one line that quotes the text."""
    assert data.parse_prior("low") == (.999, .001, 0)
    assert data.parse_prior(".2,.3,.5") == (.2, .3, .5)
    assert all(abs(sum(p) - 1) < 1e-9 for p in data.PRIORS.values())
    for wrong in ("", "none", "1,0", "1,0,0,0", ".5,.5,.5", "2,-1,0", "nan,0,1", "a,b,c"):
        with pytest.raises(UserError, match=re.escape(repr(wrong))):
            data.parse_prior(wrong)


def new_stream(seed=0, label="pretrain"):
    """Tokens of the pretraining stream at the small scale, 4 sequences a batch."""
    batch = data.stream(lambda n, g: SMALL.pretraining(n, g, PRETRAINING), 4, seed, label)
    return lambda k: batch(k).tokens


def test_batch_k_depends_on_seed_label_and_k_alone():
    """In whatever order batches are asked for, and however often."""
    forwards, batch = [new_stream()(k) for k in range(33)], new_stream()
    for k in [32, 0, 17, 16, 15, 17, 0, 31]:
        assert torch.equal(batch(k), forwards[k])
    assert len({tuple(b.flatten().tolist()) for b in forwards}) == 33
    assert not torch.equal(new_stream(seed=1)(0), forwards[0])
    assert not torch.equal(new_stream(label="finetune")(0), forwards[0])


# ---------------------------------------------------------------- test sets, floors


def test_floors():
    """majority: the commonest answer. cross: the commonest answer given the other one's."""
    assert data.majority_floor(torch.tensor([4, 4, 4, 5])) == .75
    assert data.majority_floor(torch.tensor([1, 2, 3, 4])) == .25
    #                     given 0: 5 5 6 -> 2 right; given 1: 7 -> 1; given 2: 5 8 -> 1
    answers, other = torch.tensor([5, 5, 6, 7, 5, 8]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert data.cross_floor(answers, other) == pytest.approx(4 / 6)
    assert data.cross_floor(other, answers) == pytest.approx((2 + 1 + 1 + 1) / 6)
    assert data.cross_floor(other + 1, other) == 1

    def scored(task, operand, split):
        test = SMALL.test(AB._replace(task=task), operand, split, 500, 0)
        constant = torch.zeros(500, len(SMALL.vocabulary))
        return answer_row(constant, test), test.examples.answer.tolist()

    # On c1 the other answer tells all, on c0 little; without a pair there is no other answer.
    (c0, answers), (c1, _) = (scored("count", "b", split) for split in ("c0", "c1"))
    assert c1["cross_floor"] == 1 and c0["cross_floor"] < .55
    assert c0["floor"] == collections.Counter(answers).most_common(1)[0][1] / 500
    assert list(c0) == list(data.ROW) and c0["setup"] == "pcfg" and c0["n"] == 500
    assert scored("count", "c", "c0")[0]["cross_floor"] is None
    assert scored("token", "a", "natural")[0]["cross_floor"] is None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("operand", LETTERS)
def test_test_sets_ask_the_right_question(task, operand):
    """The model reads the sequence up to ART, and the slow answer is wanted there alone."""
    x = SMALL.test(AB._replace(task=task), operand, "natural", 60, 5).examples
    strings, column = as_strings(SMALL.text_of(x)), LETTERS.index(operand)
    assert (x.target >= 0).nonzero()[:, 1].unique().tolist() == [x.at]
    read = words_of(SMALL, torch.cat([x.tokens, x.answer[:, None]], 1))
    assert read == [slow_sequence(s, task, operand, "small")[:-1] for s in strings]
    first = data.LETTER if task == "token" else data.NUMBER
    assert torch.equal(x.labels[:, column], x.answer - first)


@pytest.mark.parametrize("task", FINETUNED)
@pytest.mark.parametrize("split", SPLITS)
def test_test_sets_do_not_depend_on_the_question(task, split):
    """The same strings for every operand and in every call; other strings for another seed."""
    def tokens(operand, seed=0):
        setup = data.Grammar("pcfg", "small")  # a new one: nothing is remembered
        return setup.test(AB._replace(task=task), operand, split, 40, seed).examples.tokens

    a, other = tokens("a"), tokens("a", seed=1)
    assert torch.equal(a, tokens("a")) and not torch.equal(a[:, 3:], other[:, 3:])
    for operand in "bc":
        x = tokens(operand)
        assert torch.equal(a[:, 3:], x[:, 3:]) and (x[:, 2] == ID[f"O_{operand}"]).all()


def test_training_never_meets_the_test_sets():
    """For equal seeds the strings of both streams and of every split differ."""
    draws = {"pretrain": lambda n, g: SMALL.pretraining(n, g, PRETRAINING),
             "finetune": lambda n, g: SMALL.finetuning(n, g, FINETUNING)}
    streams = [data.stream(draw, 16, 0, label)(k) for label, draw in draws.items()
               for k in range(0, 64, 16)]
    tests = [SMALL.test(AB, "b", split, 200, 0).examples for split in SPLITS]
    texts = [as_strings(SMALL.text_of(x)) for x in (*streams, *tests)]
    assert len(set().union(*texts)) == sum(map(len, texts)) == 8 * 16 + 3 * 200


# ---------------------------------------------------------------- command line, files


@both_scales
@pytest.mark.parametrize("c, operand", [("natural", "a"), ("natural", "c"), ("0", "b"), ("1", "b")])
def test_json(scale, c, operand, capsys):
    """One object a line, against the slow answers; the relation is as asked for."""
    words = ["--json", "--scale", scale, "--c", c, "--operand", operand]
    for task in TASKS if c == "natural" else FINETUNED:
        data.main([*words, "--task", task, "-n", "2"])
        for line in capsys.readouterr().out.splitlines():
            sample = json.loads(line)
            s, (a, b) = sample["text"], ("ab" if operand == "a" else "a" + operand)
            one, other = (slow_answer(s, task, o, scale) for o in (a, b))
            related = task in FINETUNED and None not in (one, other) and other - one == 1
            tokens = slow_sequence(s, task, operand, scale)
            assert sample == {
                "setup": "pcfg", "task": task, "operand": None if task == "token" else operand,
                "operand2": int(tokens[3][1:]), "text": s,
                "answer": slow_answer(s, task, operand, scale),
                "correlated": related if task in FINETUNED else None, "tokens": tokens}
            assert len(s) == SHAPES[scale].length and (c == "natural" or related == (c == "1"))


def test_commands_of_the_docstring(capsys):
    """Both run; the sequence that the docstring shows is printed, here with other letters."""
    printed = []
    for words in re.findall(r"\$ python data.py(.*?)#.*\n", data.__doc__):
        data.main(shlex.split(words))
        printed.append(capsys.readouterr().out)
    families, related = printed
    assert re.findall(r"^(\S+)(?: of a)?$", families, re.M) == list(TASKS)
    form = r"SOS +T_NJ +O_b +#16 +SOT( +[abc]){3} +\.\.\.( +[abc]){3} +EOT +ART +#\d+ +EOS"
    assert re.search(form, data.__doc__) and len(re.findall(form, related)) == 5
    assert related.count("r(b) - r(a) = 1 holds") == 5
    assert "the relation holds on 100.0%, ties on 0.0%" in related


@both_scales
@pytest.mark.parametrize("task", TASKS)
def test_marks_show_why_the_answer_is_right(task, scale):
    """What is read stands in brackets; hits are marked ^, the one whose distance counts *."""
    setup, shape = SETUPS[scale], SHAPES[scale]
    text = setup.text(20, AB._replace(task=task), "natural", rng(31))
    for s, row in zip(as_strings(text), text):
        answer, (letters, marks) = slow_answer(s, task, "b", scale), setup.explain(row, task, "b")
        outside, inside = letters.removesuffix("]").split("[")
        assert outside + inside == s and not marks[:len(outside) + 1].strip()
        marked = [letters[i] for i, mark in enumerate(marks) if mark in "^*"]
        if task == "token":
            assert marked == [answer] == [inside[0]] and len(inside) == shape.token_at
        elif task.startswith("count"):
            assert marked == ["b"] * answer and "*" not in marks and len(inside) == shape.window
        else:
            assert marked == ["b"] * (shape.k if task == "index" else shape.pair_k)
            assert len(letters) - 1 - marks.index("*") == answer and "^" not in marks.split("*")[0]


@pytest.mark.parametrize("words, message", [
    ("--setup none", "--setup none: there are pcfg, "), ("--task none", "there are count, "),
    ("--setup tracr-none", "there are tracr-count, "), ("--operand d", "--operand d: there are"),
    ("--c 1 --task token", "--task token: there are count, index"),
    ("--c 1 --q 0", "q = 0 leaves no count strings"),
    ("--c 0 --task count --q -1000", "q = -1000 leaves no count strings"),
    ("--c 0 --task index --q 17", "q = 17 leaves no index strings")])
def test_mistakes(words, message):
    """One line that names the flag."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        data.main(words.split())
    assert "\n" not in str(error.value)


def test_a_mistake_ends_the_script_with_code_2(capsys):
    """One line on stderr, whether argparse or the setup finds it."""
    with pytest.raises(SystemExit, match="2"):
        data.run_script(lambda: data.main(["--task", "none"]))
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(r".*: --task none: there are .*\n", err)
    for words in ("-n 0", "-n 1.5", "--seed -1", "--scale big", "--c 2", "--c x"):
        with pytest.raises(SystemExit, match="2"):
            data.main(words.split())


def test_files(tmp_path, capsys):
    """Replaced whole or not at all; rows of another checkpoint are left out, and counted."""
    path, rows = tmp_path / "x.jsonl", [{"checkpoint": x, "n": i} for i, x in enumerate("aab")]
    assert data.read_rows(path) == []
    data.write_rows(path, rows)
    with contextlib.suppress(ZeroDivisionError):
        data.replace_file(path, lambda file: file.write(b"half of it") / 0)
    assert data.read_rows(path) == rows and not capsys.readouterr().out
    assert data.read_rows(path, checkpoint="a") == rows[:2]
    assert f"{path}: 1 of 3 rows are of another checkpoint" in capsys.readouterr().out
    moved = tmp_path / "moved" / "x.jsonl"  # found where it was recorded, or beside another file
    data.write_json(moved, rows)
    for recorded, places in ((path, [path, moved]), (tmp_path / "no" / "x.jsonl", [moved])):
        found = data.find_files(str(recorded), str(tmp_path / "moved" / "y"))
        assert found == list(map(str, places))
