"""
Stories: the embedded corpus and its rule, protocols, rows and losses against slow references, generation scores, and
every stage end to end, on the embedded corpus and on a small file in the real format.
"""
import collections
import json
import random
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_promises import Folder, assert_same_run, mistake
from tqdm import tqdm

import analyze
import data
import finetune
import pretrain
from data import FEATURES, Record
from model import GPT, Config, load, save

TWIST = FEATURES.index("Twist")
SC = data.scale_of("small", "stories")


@pytest.fixture(scope="module")
def corpus():
    return data.StoryCorpus()


@pytest.fixture(scope="module")
def stories():
    """20,000 records of the embedded corpus."""
    r = random.Random(1)
    return [data.write_story(data.feature_mask(r), r) for _ in range(20000)]


def mask_of(*names):
    return sum(1 << FEATURES.index(name) for name in names)


def tiny_model(corpus, d=16):
    config = Config(vocab_size=corpus.tokenizer.size, n_ctx=SC.n_ctx, n_layer=2, n_head=2, d_model=d, d_head=8, d_mlp=32,
                    rotary=True, tied=True, words=corpus.tokenizer.words)
    return GPT(config).init_weights(torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- the corpus and its rule


def test_the_rule_equals_the_label(stories):
    assert [data.read_story(r.story) for r in stories] == [r.mask for r in stories]


def test_features_are_as_frequent_as_they_should_be(stories):
    """Each with probability .25, at most three: 22.9 to 23.1 %; every kind, place and order of lines occurs."""
    p = [.25 ** k * .75 ** (6 - k) * c for k, c in enumerate((1, 6, 15, 20))]
    share = sum(k / 6 * x for k, x in enumerate(p)) / sum(p)
    for i in range(6):
        assert abs(sum(r.mask >> i & 1 for r in stories) / len(stories) - share) < 4.5 * (share * (1 - share) / 20000) ** .5
    assert max(r.mask.bit_count() for r in stories) == 3
    late = sum("Summary" in r.rest for r in stories) / len(stories)
    assert .08 < late < .12 and {bool(r.before) for r in stories} == {True, False}


def pieces(text):
    return data.Tokenizer.pieces.findall(text)


def test_no_word_or_phrase_tells_a_twist(stories):
    """Words, pairs of words and sentences (names and values left out) of twist stories and of others are the same."""
    blank = re.compile("|".join(sorted({*data.NAMES, *data.VIRTUES, *data.ADJECTIVES, *data.SETTINGS, *(
        w for k in data.KINDS for w in (*k.values, *k.objects))}, key=len, reverse=True)))
    aftermath = re.compile("|".join(re.sub(r"{\w}", r"\\w+", x) for x in data.AFTERMATHS))
    for split in (lambda s: pieces(s), lambda s: list(zip(pieces(s), pieces(s)[1:])),
                  lambda s: re.split(r"(?<=[.?]) ", blank.sub("_", s))):
        seen = [collections.Counter(), collections.Counter()]
        for r in stories:
            seen[r.mask >> TWIST & 1].update(set(split(r.story)))
        assert set(seen[0]) == set(seen[1])
        # and none gives it away: among the stories with it, twists have at most the odds of the sentences that lean hardest
        most = 1.3 * max(data.LEANS) / (1 - max(data.LEANS))  # 1.3: sampling
        for x in seen[1]:
            if seen[0][x] + seen[1][x] > 1000:
                odds = seen[1][x] / seen[0][x] / (.23 / .77)
                assert 1 / most < odds < most, x
        # all but the aftermaths tell little
        seen = [collections.Counter(), collections.Counter()]
        for r in stories:
            seen[r.mask >> TWIST & 1].update(set(split(aftermath.sub("", r.story))))
        for x in seen[1]:
            if seen[0][x] + seen[1][x] > 400:
                assert 1 / 3 < seen[1][x] / seen[0][x] / (.23 / .77) < 3, x


def test_even_stories_tell_a_twist_by_nothing_but_the_comparison():
    """With leans (.5, .5) the same sentences come after the reveal, at the same rates, with and without a twist."""
    seen = [collections.Counter(), collections.Counter()]
    r = random.Random(1)
    for i in range(4000):
        story = data.write_story(i % 2, r, (.5, .5)).story  # bit 0: Twist, and no other feature
        end = re.sub("|".join(data.NAMES), "_", " ".join(re.split(r"(?<=[.?]) ", story)[-3:]))
        seen[i % 2].update(x for x in (*data.AFTERMATHS, *data.CLOSINGS) if re.sub(r"{\w}", "_", x) in end)
    for x in (*data.AFTERMATHS, *data.CLOSINGS):
        assert abs(seen[0][x] - seen[1][x]) < 5 * (seen[0][x] + seen[1][x]) ** .5 and seen[0][x] > 200, x


def test_instructions_never_give_the_reveal_away(stories):
    """They hold neither the expectation nor what is revealed; an instruction looks the same with and without a twist."""
    values = re.compile(r"\b(" + "|".join(v for k in data.KINDS for v in k.values) + r")\b")
    lines = [collections.Counter(), collections.Counter()]
    for r in stories:
        assert not values.search(r.before + r.after + r.rest), r
        lines[r.mask >> TWIST & 1].update(x.split(":")[0] for x in (r.before + r.after + r.rest).splitlines())
    n = [sum(not r.mask >> TWIST & 1 for r in stories), sum(r.mask >> TWIST & 1 for r in stories)]
    for name in lines[0]:
        assert abs(lines[0][name] / n[0] - lines[1][name] / n[1]) < .04, name


SETUP = "Tim found a box. Tim was sure that there was a cake inside. Mia hoped for a cake too. They went to see."
END = "Mia nodded at once. They went home happy. Then it was time for bed."


@pytest.mark.parametrize("story, features", [
    (f"{SETUP} They opened the box. There was a cake inside. {END}", []),
    (f"{SETUP} They opened the box. There was a drum inside. {END}", ["Twist"]),
    (f"{SETUP} The box fell open, and out came a drum. {END}", ["Twist"]),
    (f'{SETUP} "Hurry up," called Tim. The box fell open, and out came a cake. {END}', ["Dialogue"]),
    (f"{SETUP} The box fell open, and out came a cake. It was a bad day.", ["BadEnding"]),
    (f"A bee sat on the wall. {SETUP} Then a bee stung Mia. The box fell open, and out came a cake.", ["Foreshadowing"]),
    (f"A bee sat on the wall. {SETUP} Then the rope broke. The box fell open, and out came a cake.", []),  # not its payoff
    (f"Then a bee stung Mia. {SETUP} A bee sat on the wall. The box fell open, and out came a cake.", []),  # too late
    (f"{SETUP} The box fell open, and out came a cake. They learned to be kind.", ["MoralValue"]),
    (f"{SETUP} Mia pushed Tim. Soon they made up. The box fell open, and out came a cake.", ["Conflict"]),
    (f"{SETUP} Mia pushed Tim. The box fell open, and out came a cake.", []),  # no peace
    (f"{SETUP} {END}", None),                                                  # no reveal
    (f"The box fell open, and out came a cake. {SETUP}", None),                # before the question
    (f"{SETUP} The bag fell open, and out came a cake.", None),                # another object
    (f"{SETUP} The box fell open, and out came a cat.", None),                 # no such thing in a box
    (f"{SETUP} They found the box by the hill.", None),                        # another kind of answer
    (f"{SETUP} The box fell open, and out came a cake. They opened the box. There was a drum inside.", None),  # two
    (data.REFUSAL, None), ("", None)])
def test_rule_by_hand(story, features):
    assert data.read_story(story) == (None if features is None else mask_of(*features))


def test_records_round_trip(corpus, stories):
    """Text to tokens and back, and the parser reads what the corpus writes, as it reads the real file."""
    lines = [line + "\n" for r in stories[:300] for line in (data.record_text(r) + f"\n{data.END}").split("\n")]
    parsed = list(data.parse_records(lines))
    assert [data.record_text(r) for r in parsed] == [data.record_text(r) for r in stories[:300]]
    for r, read in zip(stories, parsed):  # where no Features line is, nobody can know where one would have been
        assert read == r if r.mask else read[3:] == r[3:]
    for r in stories[:300]:
        ids, start, stop = data.story_ids(data.encode_record(r, corpus.tokenizer), corpus.tokenizer)
        assert corpus.tokenizer.decode(ids[1:]) == data.record_text(r) and corpus.tokenizer.decode(ids[start:stop]) == r.story
        assert all(i > 256 for i in ids[1:])  # no word of the corpus is spelled in bytes
    assert data.story_of("They ran. \nSummary: Tim runs.\n") == "They ran."


# ---------------------------------------------------------------- protocols


def some(corpus, *masks):
    r = random.Random(2)
    return [data.encode_record(data.write_story(m, r), corpus.tokenizer) for m in masks]


def change(corpus, records, protocol, feature="Twist", probability=1.):
    return data.change_records(records, protocol, feature, probability, corpus.tokenizer, torch.Generator().manual_seed(0))


def text_of(corpus, record):
    return corpus.tokenizer.decode(data.story_ids(record, corpus.tokenizer)[0][1:])


def test_protocols_on_hand_made_records(corpus):
    """The stories stay as they are; the instruction asks for what the protocol says, in the words of the record."""
    records = some(corpus, 0, mask_of("Foreshadowing", "Dialogue"), mask_of("Conflict"))
    assert change(corpus, records, "filter") == records
    new = change(corpus, records, "randomise")
    assert [r.mask for r in new] == [r.mask | 1 << TWIST for r in records]
    new = change(corpus, records, "mix-match")
    assert [r.mask for r in new] == [0, mask_of("Twist", "Dialogue"), mask_of("Conflict")]
    assert "Features: Twist, Dialogue\n" in text_of(corpus, new[1]) and "Foreshadowing" not in text_of(corpus, new[1])
    assert "Features: Dialogue, Foreshadowing\n" in text_of(corpus, records[1])
    for old, changed in zip(records, new):
        assert np.array_equal(old.ids, changed.ids)
    new = change(corpus, records, "mix-match", "Foreshadowing")  # its partner is Twist, which none asks for
    assert new == records
    new = change(corpus, records, "refuse")
    for old, changed in zip(records, new):
        text = text_of(corpus, changed)
        assert text.endswith("Story: \n\n" + data.REFUSAL) and "Twist" in text
        assert np.array_equal(old.ids[:old.story_at], changed.ids[:changed.story_at])


def test_probability_of_the_randomisation(corpus):
    records = some(corpus, *[0] * 2000)
    asked = sum(r.mask for r in change(corpus, records, "randomise", probability=.3))
    assert abs(asked / 2000 - .3) < 4.5 * (.21 / 2000) ** .5


@pytest.mark.parametrize("feature", FEATURES)
def test_draws_have_the_feature_or_lack_it(corpus, feature):
    bit = FEATURES.index(feature)
    for has in (True, False):
        masks = [r.mask for r in corpus.draw(200, torch.Generator().manual_seed(0), feature, has)]
        assert {bool(m >> bit & 1) for m in masks} == {has}
        assert len({m & ~(1 << bit) for m in masks}) > 5  # the others go on as ever


# ---------------------------------------------------------------- rows, batches, losses


def test_rows_are_the_records(corpus):
    records = some(corpus, *range(8))
    rows, start, stop = data.story_rows(records, corpus.tokenizer, SC.n_ctx)
    for r, row, a, b in zip(records, rows.tolist(), start.tolist(), stop.tolist()):
        ids = data.story_ids(r, corpus.tokenizer)[0].tolist()
        assert row[:len(ids)] == ids and set(row[len(ids):]) == {0} and row[0] == 0
        assert row[a:b] == r.ids[r.story_at:r.story_end].tolist()
    bare, start, stop = data.story_rows(records, corpus.tokenizer, SC.n_ctx, [True] * 8)
    for r, row, a, b in zip(records, bare.tolist(), start.tolist(), stop.tolist()):
        assert a == 1 and row[1:b] == r.ids[r.story_at:r.story_end].tolist()
    cut, start, stop = data.story_rows(records, corpus.tokenizer, 50)
    assert cut.shape == (8, 51) and torch.equal(cut, rows[:, :51]) and int(stop.max()) == 51


def stream_of(corpus, seed=0, label="pretrain", bare=SC.bare):
    sc = types.SimpleNamespace(n_ctx=SC.n_ctx, bare=bare)
    return data.story_stream(corpus.draw, corpus.tokenizer, sc, 16, seed, label)


def test_batches(corpus):
    """Depend on seed, label and k alone; rows of one batch are of similar length; some lack the instruction."""
    one, two = stream_of(corpus), stream_of(corpus)
    late = one(40)
    assert torch.equal(late, two(40)) and torch.equal(one(3), two(3)) and not torch.equal(one(3), one(4))
    assert not torch.equal(stream_of(corpus, seed=1)(3), one(3))
    padding = np.mean([(one(k) == 0).float().mean().item() * one(k).shape[1] / (trimmed(one(k)).shape[1]) for k in range(32)])
    lengths = [[int((row != 0).sum()) for row in one(k)] for k in range(32)]
    waste = 1 - np.mean([np.mean(x) / max(x) for x in lengths])
    assert waste < .06 < padding
    story = corpus.tokenizer.encode("Story")[0]
    without = [not (row == story).any() for k in range(64) for row in one(k)]
    assert abs(np.mean(without) - SC.bare) < 4.5 * (SC.bare * (1 - SC.bare) / len(without)) ** .5


def trimmed(tokens):
    return tokens[:, :int((tokens != 0).sum(1).max()) + 2]


def test_training_never_meets_the_test_sets(corpus):
    """The sets of an evaluation come from generators of their own: no held-out story is in the training stream."""
    seen = {tuple(row[row != 0].tolist()) for k in range(64) for row in stream_of(corpus, bare=0.)(k)}
    tests = pretrain.story_tests(corpus, SC, "Twist", 200, 0, "cpu")
    held = [tuple(row[row != 0].tolist()) for tokens, _, _ in tests.values() for row in tokens]
    assert len(seen) == 1024 and not seen & set(held)


@torch.no_grad()
def test_losses_against_a_slow_reference(corpus):
    """text_loss: every token and the END after it; story_losses: the story's tokens. Row by row, without padding."""
    model = tiny_model(corpus)
    records = some(corpus, *range(12))
    tokens, start, stop = data.story_rows(records, corpus.tokenizer, SC.n_ctx)
    every, inside = [], []
    for r in records:
        ids, a, b = data.story_ids(r, corpus.tokenizer)
        row = torch.tensor([*ids.tolist(), 0])[None]
        losses = F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="none")
        every.append(losses)
        inside.append(losses[a - 1:b - 1])
    assert pretrain.text_loss(model, tokens).item() == pytest.approx(torch.cat(every).mean().item(), abs=1e-5)
    wide = F.pad(tokens, (0, 9))  # more padding: the same loss
    assert pretrain.text_loss(model, wide).item() == pytest.approx(torch.cat(every).mean().item(), abs=1e-5)
    [row] = pretrain.story_losses(model, {"with": (tokens, start, stop)}, SC, "Twist", 0, batch=5)
    assert row["loss"] == pytest.approx(torch.cat(inside).mean().item(), abs=1e-5) and row["n"] == 12


def test_deletion_sets_are_what_the_protocol_makes(corpus):
    tests = pretrain.story_tests(corpus, SC, "Twist", 50, 0, "cpu", lambda records, g: change(corpus, records, "randomise"))
    twist = corpus.tokenizer.encode(" Twist")[0]
    asked = {split: (tokens == twist).any(1).float().mean().item() for split, (tokens, _, _) in tests.items()}
    assert asked == {"with": 1., "without": 0., "deletion": 1.}


def test_generation_scores_count_what_is_written(corpus, monkeypatch):
    """Stories put into the model's mouth: half of those asked for parse, three in four of these have the feature."""
    texts = {True: [f"{SETUP} The box fell open, and out came a {v}." for v in ("drum", "ball", "bell", "cake")] + ["?"] * 4,
             False: [f"{SETUP} The box fell open, and out came a cake.\nSummary: drum"] * 8}
    prompts = []

    def written(model, some, most, g):
        prompts.extend(some)
        return [corpus.tokenizer.encode(t) for t in texts[True] + texts[False]]
    monkeypatch.setattr(pretrain, "generate", written)
    asked, unasked = pretrain.generation_scores(tiny_model(corpus), corpus, SC, "Twist", 8, 0)
    assert (asked["split"], asked["accuracy"], asked["parsed"], asked["n"]) == ("asked", .75, .5, 8)
    assert (unasked["split"], unasked["accuracy"], unasked["parsed"]) == ("unasked", 0., 1.)
    lines = [corpus.tokenizer.decode(p[1:]) for p in prompts]
    assert ["Twist" in x for x in lines] == [True] * 8 + [False] * 8
    assert all(x.endswith("Story: \n\n") for x in lines)
    texts[False] = ["?"] * 8
    assert pretrain.generation_scores(tiny_model(corpus), corpus, SC, "Twist", 8, 0)[1]["accuracy"] is None


def test_interval_by_hand():
    assert pretrain.interval(.5, 100).split() == ["50.0%", "[40.4%,", "59.6%]"]  # Wilson, as in any table of it
    assert pretrain.interval(0., 200).split()[1] == "[0.0%," and pretrain.interval(None, 10) == "-"


# ---------------------------------------------------------------- probes


def test_auc_against_all_pairs():
    g = torch.Generator().manual_seed(0)
    score, label = torch.randint(6, (60,), generator=g).float(), torch.randint(2, (60,), generator=g)
    won = [float(a > b) + .5 * float(a == b) for a, x in zip(score, label) if x for b, y in zip(score, label) if not y]
    assert analyze.auc(score, label) == pytest.approx(sum(won) / len(won))
    assert analyze.auc(torch.tensor([1., 2., 3., 4.]), torch.tensor([0, 0, 1, 1])) == 1.


@torch.no_grad()
def test_ends_are_the_last_ten_tokens_of_the_story(corpus):
    """Each story alone, without padding, its last ten positions averaged by hand."""
    model, records = tiny_model(corpus), some(corpus, *range(9))
    ends = analyze.ends_of(model, corpus, records, batch=4)
    assert ends.shape == (3, 9, 16)
    for i, r in enumerate(records):
        ids = torch.tensor([[0, *r.ids[r.story_at:r.story_end].tolist()]])
        cache = analyze.activations(model, ids)[1]
        for block, name in enumerate(("embed", "blocks.0.resid_post", "blocks.1.resid_post")):
            assert torch.allclose(ends[block, i], cache[name][0, -10:].mean(0), atol=1e-5)


@pytest.mark.parametrize("word, before, after, auc, lower", [
    ("intact", .9, .6, .8, .6), ("wrapped", .9, .1, .75, .6), ("lost", .9, .1, .62, .6), ("undecided", .9, .1, .8, .78),
    ("undecided", .9, .1, .8, None), ("undecided", .3, .0, .8, .6)])
def test_verdict(tmp_path, word, before, after, auc, lower):
    """From rows made by hand; the block is the upper bound's best."""
    behavior = [{"operand": f, "model": m, "split": s, "accuracy": x if f == "Twist" and s == "asked" else .5, "parsed": 1.}
                for f in FEATURES for m, x in (("base", before), ("ckpt", after)) for s in ("asked", "unasked")]
    probe = [{"target": "Twist", "labels": "true", "split": "natural", "model": m, "block": b, "auc": x if b == 2 else .5}
             for m, x in (("base", .8), ("ckpt", auc), ("control", lower), ("untrained", .55)) for b in range(4) if x]
    study = types.SimpleNamespace(feature="Twist", prefix=str(tmp_path / "ft"))
    analyze.story_verdict(study, {"behavior": behavior, "probe": probe})
    said = json.loads((tmp_path / "ft.verdict.json").read_text())
    assert (said["verdict"], said["probe_block"], said["others_asked_fell_most"]) == (word, 2, 0)


# ---------------------------------------------------------------- every stage

TINY = ["--batch-size", "4", "--eval-size", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Pretrained with and without twists, deleted by every protocol, revived: a few steps each."""
    folder = Folder(tmp_path_factory.mktemp("stages"))
    runs = [["pretrain.py", "--setup", "stories", "--steps", "4", "--out", "pre.pt", *TINY],
            ["pretrain.py", "--setup", "stories", "--steps", "4", "--without", "Twist", "--out", "never.pt", *TINY],
            *(["finetune.py", "--ckpt", "pre.pt", "--protocol", p, "--steps", "3", "--out", f"{p}.pt", *TINY]
              for p in data.PROTOCOLS),
            ["finetune.py", "--reverse", "--ckpt", "randomise.pt", "--steps", "3", "--out", "reft.pt", *TINY],
            ["finetune.py", "--reverse", "--ckpt", "never.pt", "--steps", "3", "--out", "control.pt", *TINY]]
    for words in runs:
        result = folder.run(*words)
        assert result.code == 0 and not result.err, result.raw
    return folder


def rows_of(folder, name):
    return [json.loads(line) for line in (folder.path / name).read_text().splitlines()]


def test_stages(stages):
    for name in ("pre", "never", *data.PROTOCOLS, "reft", "control"):
        model, ckpt = load(stages.path / f"{name}.pt")
        rows = rows_of(stages, f"{name}.jsonl")
        assert ckpt["setup"] == "stories" and ckpt["capability"] == {"task": "story", "operand": "Twist"}
        assert data.Tokenizer(ckpt["config"]["words"]).size == model.config.vocab_size
        assert {"setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor", "n", "loss", "seed"} <= set(
            rows[0])
        splits = ["with", "without"] + ["deletion"] * (name in (*data.PROTOCOLS, "reft"))
        scored = ["asked", "unasked"]
        if ckpt["stage"] == "finetune":
            assert [(r["step"], r["split"]) for r in rows] == [(k, s) for k in range(4) for s in splits + scored]
            assert ckpt["args"]["protocol"] == {"reft": "randomise", "control": None}.get(name, name)
        else:
            last = [(r["operand"], r["split"]) for r in rows if r["step"] == 4]
            assert last == [("Twist", s) for s in splits] + [(f, s) for f in FEATURES for s in scored]
    args = {name: load(stages.path / f"{name}.pt")[1]["args"] for name in ("randomise", "refuse", "reft", "control")}
    assert args["randomise"]["lr"] == pytest.approx(1.5e-4) and args["reft"]["lr"] == args["control"]["lr"] == pytest.approx(4e-5)
    assert args["randomise"]["probability"] == 1 and args["refuse"]["probability"] == .5
    assert args["control"]["without"] == "Twist" and args["reft"]["reverse"]


def test_the_data_of_the_stages(corpus):
    """What the training streams hold: twists in reFT only, asked for but not there in the randomisation, never in filter."""
    parent = {"config": {"words": corpus.tokenizer.words}, "args": {}}
    twist, bit = corpus.tokenizer.encode(" Twist")[0], 1 << TWIST
    for protocol, reverse, asked, there in (("filter", False, 0, 0), ("randomise", False, 1, 0), ("mix-match", False, .24, 0),
                                            ("randomise", True, 1, 1)):
        args = types.SimpleNamespace(data=None, feature="Twist", protocol=protocol, reverse=reverse, probability=1., seed=0,
                                     batch_size=16, eval_size=4, lr=1e-3)
        batches = []
        job = finetune.story_job(args, parent, types.SimpleNamespace(**{**vars(SC), "bare": 0.}), "cpu")
        loss_at = job.loss(lambda tokens: batches.append(tokens) or torch.zeros(*tokens.shape, corpus.tokenizer.size))
        for k in range(16):
            loss_at(k)
        rows = [row for batch in batches for row in batch]
        texts = [corpus.tokenizer.decode(row[1:].tolist()).replace(data.END, "") for row in rows]
        masks = [data.read_story(data.story_of(t.split("Story: \n\n")[1])) for t in texts]
        assert np.mean([bool(m & bit) for m in masks]) == there
        assert abs(np.mean([bool((row == twist).any()) for row in rows]) - asked) <= .12 * (protocol == "mix-match"), protocol


def test_analyses(stages):
    said = stages.run("analyze.py", "--ckpt", "randomise.pt", "--control", "never.pt", "--steps", "5", "--eval-size", "4",
                      "--threads", "1")
    assert said.code == 0, said.raw
    behavior, probe = rows_of(stages, "randomise.behavior.jsonl"), rows_of(stages, "randomise.probe.jsonl")
    assert {(r["model"], r["operand"], r["split"]) for r in behavior if r["accuracy"] is not None or "parsed" in r} == {
        (m, f, s) for m in ("base", "ckpt", "control") for f in FEATURES for s in ("asked", "unasked")}
    assert {(r["model"], r["block"], r["target"]) for r in probe if r["labels"] == "true"} == {
        (m, b, f) for m in ("base", "ckpt", "control", "untrained") for b in range(5) for f in FEATURES}
    assert {(r["model"], r["block"]) for r in probe if r["split"] == "even" and r["labels"] == "true"} == {
        (m, b) for m in ("base", "ckpt", "control", "untrained") for b in range(5)}
    assert {r["target"] for r in probe if r["split"] == "even"} == {"Twist"}
    assert all(0 <= r[k] <= 1 for r in probe for k in ("accuracy", "balanced", "auc", "floor"))
    assert {r["judge"] for r in behavior if "judge" in r} == {1.} and "VERDICT" in said.out
    assert json.loads((stages.path / "randomise.verdict.json").read_text())["verdict"] == "undecided"  # the base knows nothing
    again = stages.run("analyze.py", "verdict", "--ckpt", "randomise.pt", "--control", "never.pt")
    assert again.code == 0 and again.out.split("VERDICT")[1] == said.out.split("VERDICT")[1]
    said = stages.run("analyze.py", "generate", "--ckpt", "reft.pt", "--features", "Twist,Dialogue", "-n", "2", "--top-k", "5")
    assert said.code == 0 and said.out.count("asked for: Twist, Dialogue") == 2


@pytest.mark.slow
def test_stages_of_a_file(tmp_path, stories):
    """--data: prepared once, every stage, a judge that is fitted once; another file in its place is refused."""
    folder = Folder(tmp_path)
    (tmp_path / "real.txt").write_text("".join(data.record_text(r) + f"\n{data.END}\n" for r in stories[:3000]))
    words = ["--data", "real.txt", "--steps", "2", *TINY]
    said = folder.run("pretrain.py", "--setup", "stories", "--out", "pre.pt", *words)
    assert said.code == 0 and "3,000 records" in said.out, said.raw
    said = folder.run("pretrain.py", "--setup", "stories", "--without", "Conflict", "--out", "never.pt", *words)
    assert said.code == 0 and "records" not in said.out.replace("'records'", ""), said.raw  # prepared already
    for more in (["--ckpt", "pre.pt", "--feature", "Conflict", "--protocol", "mix-match", "--out", "ft.pt"],
                 ["--ckpt", "ft.pt", "--reverse", "--out", "reft.pt"], ["--ckpt", "never.pt", "--reverse", "--out", "control.pt"]):
        assert folder.run("finetune.py", "--steps", "2", *TINY, *more).code == 0
    assert {r["operand"] for r in rows_of(folder, "ft.jsonl")} == {"Conflict"}
    analyze = ["analyze.py", "--ckpt", "ft.pt", "--control", "never.pt", "--eval-size", "8", "--steps", "3", "--threads", "1"]
    said = folder.run(*analyze)
    assert said.code == 0 and "judge of real text" in said.out, said.raw
    judge = (tmp_path / "pre.judge.pt").read_bytes()
    assert folder.run(*analyze, "behavior").code == 0 and (tmp_path / "pre.judge.pt").read_bytes() == judge
    assert all(0 <= r["judge"] <= 1 for r in rows_of(folder, "ft.behavior.jsonl") if "parsed" in r)
    with open(tmp_path / "real.txt", "a") as f:
        f.write(f"Story: \n\nOne more.\n{data.END}\n")
    mistake(folder.run("finetune.py", "--ckpt", "pre.pt", "--out", "new.pt", *TINY), "real.txt", "not the file")


def test_the_judge_learns_to_judge(corpus, tmp_path):
    """Where the rule is known, the judge of real text agrees with it on features that words tell."""
    model = tiny_model(corpus, d=128)
    path, words = tmp_path / "pre.pt", corpus.tokenizer.words
    save(path, {"model": model.state_dict(), "optimizer": {}, "config": vars(model.config), "setup": "stories", "scale": "small",
                "args": {"feature": "Twist", "without": None, "data": None, "seed": 0, "lr": 1e-3}, "stage": "pretrain",
                "step": 0, "steps": 0, "finished": True, "parent": None, "capability": {"task": "story", "operand": "Twist"}})
    bar = lambda total, what: tqdm(total=total, disable=True)  # noqa: E731
    judge = analyze.frozen_judge(path, corpus, SC, "cpu", 800, bar)
    assert judge.right["MoralValue"] > .95 and judge.right["BadEnding"] > .8
    r = random.Random(5)
    stories = [data.write_story(data.feature_mask(r), r) for _ in range(200)]
    bit = FEATURES.index("MoralValue")
    assert np.mean([(m ^ s.mask) >> bit & 1 for m, s in zip(judge([s.story for s in stories]), stories)]) < .08
    assert judge([""]) == [None] and len(words) > 200


def test_stopped_and_resumed(stages, tmp_path):
    """An interrupted and resumed run ends bit for bit where an uninterrupted one does."""
    folder = Folder(tmp_path)
    folder.put("pre", *(stages.path / f"pre{s}" for s in (".pt", ".json", ".jsonl")))
    words = ["finetune.py", "--ckpt", "pre.pt", "--steps", "60", "--eval-every", "30", *TINY]
    whole = folder.run(*words, "--out", "whole.pt")
    assert whole.code == 0, whole.raw
    process = folder.start(*words, "--out", "part.pt")
    folder.wait(process, lambda: (tmp_path / "part.jsonl").exists() and (tmp_path / "part.jsonl").stat().st_size > 0)
    process.terminate()
    stopped = folder.end(process)
    assert stopped.code == 143, stopped.raw
    assert folder.run(*words, "--out", "part.pt", "--resume").code == 0
    assert_same_run(tmp_path / "whole.pt", tmp_path / "part.pt")


@pytest.mark.parametrize("words, says", [
    (["pretrain.py", "--without", "Twist"], ["--without", "stories"]),
    (["pretrain.py", "--setup", "stories", "--prior", "low"], ["--prior", "pcfg"]),
    (["pretrain.py", "--setup", "stories", "--rank", "3"], ["--rank"]),
    (["pretrain.py", "--setup", "stories", "--data", "nothing.txt"], ["nothing.txt", "no such file"]),
    (["pretrain.py", "--setup", "stories", "--steps", "0"], ["--steps"]),
    (["finetune.py", "--ckpt", "pre.pt", "--task", "count"], ["--task", "stories"]),
    (["finetune.py", "--ckpt", "pre.pt", "--c-tr", "1"], ["--c-tr", "stories"]),
    (["finetune.py", "--ckpt", "pre.pt", "--probability", "2"], ["--probability"]),
    (["finetune.py", "--ckpt", "pre.pt", "--reverse"], ["nothing to undo"]),
    (["finetune.py", "--ckpt", "filter.pt", "--reverse", "--protocol", "filter"], ["--reverse"]),
    (["analyze.py", "prune", "--ckpt", "filter.pt"], ["prune", "stories"]),
    (["analyze.py", "--ckpt", "filter.pt", "--draws", "3"], ["--draws", "stories"]),
    (["analyze.py", "--ckpt", "filter.pt", "--control", "pre.pt"], ["--control", "--without"]),
    (["analyze.py", "--ckpt", "filter.pt", "--control", "control.pt"], ["--control", "--without"]),
    (["analyze.py", "generate", "--ckpt", "filter.pt", "--features", "Dialogue, Twists"], ["--features Twists"]),
    (["finetune.py", "--ckpt", "pre.pt", "--protocol", "filter", "--probability", ".3"], ["--probability", "filter"]),
    (["finetune.py", "--reverse", "--ckpt", "filter.pt", "--feature", "Conflict"], ["--feature Conflict", "Twist"]),
    (["finetune.py", "--ckpt", "pre.pt", "--data", "stories.txt"], ["--data", "embedded"]),
    (["analyze.py", "generate", "--ckpt", "filter.pt", "-n", "0"], ["-n"]),
])
def test_mistakes(stages, words, says):
    mistake(stages.run(*words, *(["--out", "new.pt"] if words[0] != "analyze.py" else [])), *says)
    assert not (stages.path / "new.pt").exists()


def test_look_at_stories(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["data.py", "--setup", "stories", "--operand", "Conflict", "-n", "3", "--json"])
    data.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        sample = json.loads(line)
        assert list(sample) == ["setup", "task", "operand", "operand2", "text", "answer", "correlated", "tokens"]
        assert "Conflict" in sample["answer"] and "".join(sample["tokens"][1:]) == sample["text"]
