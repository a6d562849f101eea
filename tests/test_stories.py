"""
Stories: the embedded corpus and its rule, protocols, examples and losses against slow references,
generation scores, and every stage end to end, on the embedded corpus and on a small file in the
real format.
"""
import collections
import itertools
import json
import operator
import random
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_promises import Folder, assert_same_run, mistake

import analyze
import data
import pretrain
from data import FEATURES
from model import GPT, Config, load, loss_of


def setup_with(**constants):
    """Stories of the embedded corpus, small, with other constants."""
    setup = data.Stories("stories")
    setup.open(Namespace(data=None))
    vars(setup).update(constants)
    return setup


@pytest.fixture(scope="module")
def setup():
    return setup_with()


@pytest.fixture(scope="module")
def corpus(setup):
    return setup.source


@pytest.fixture(scope="module")
def stories():
    """20,000 records of the embedded corpus."""
    r = random.Random(1)
    return [data.write_story(data.random_features(r), r) for _ in range(20000)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(setup, d=16):
    sizes = dict(n_layer=2, n_head=2, d_model=d, d_head=8, d_mlp=32)
    return GPT(Config(**{**setup.config(), **sizes})).init_weights(generator())


# ---------------------------------------------------------------- the corpus and its rule


def test_the_rule_equals_the_label(stories):
    assert [data.read_story(record.story) for record in stories] == [r.features for r in stories]


def test_features_are_as_frequent_as_they_should_be(stories):
    """Each with probability .25, at most three: 22.9 to 23.1 %; every place of lines occurs."""
    p = [.25 ** k * .75 ** (6 - k) * c for k, c in enumerate((1, 6, 15, 20))]
    share = sum(k / 6 * x for k, x in enumerate(p)) / sum(p)
    for feature in FEATURES:
        measured = sum(feature in record.features for record in stories) / len(stories)
        assert abs(measured - share) < 4.5 * (share * (1 - share) / 20000) ** .5
    assert max(len(record.features) for record in stories) == 3
    late = sum("Summary" in record.rest for record in stories) / len(stories)
    assert .08 < late < .12 and {bool(record.before) for record in stories} == {True, False}


def pieces(text):
    return data.Tokenizer.pieces.findall(text)


def seen_in(stories, split):
    """In how many stories without and with a twist each part occurs: two Counters."""
    counts = [collections.Counter(), collections.Counter()]
    for record in stories:
        counts["Twist" in record.features].update(set(split(record.story)))
    return counts


VALUES = {word for kind in data.KINDS for word in (*kind.values, *kind.objects)}
BLANK = re.compile("|".join(sorted({*data.NAMES, *data.VIRTUES, *data.ADJECTIVES, *data.SETTINGS,
                                    *VALUES}, key=len, reverse=True)))
AFTERMATH = re.compile("|".join(re.sub(r"{\w}", r"\\w+", x) for x in data.AFTERMATHS))
SPLITS = {"words": pieces, "pairs": lambda s: list(zip(pieces(s), pieces(s)[1:])),
          "sentences": lambda s: re.split(r"(?<=[.?]) ", BLANK.sub("_", s))}


@pytest.mark.parametrize("name", SPLITS)
def test_no_word_or_phrase_tells_a_twist(stories, name):
    """Words, pairs of words and sentences of twist stories and of others are the same."""
    split = SPLITS[name]
    without, twist = seen_in(stories, split)
    assert set(without) == set(twist)
    # and none gives it away: at most the odds of the strongest cues (1.3: sampling)
    highest = 1.3 * max(data.CUE_STRENGTH) / (1 - max(data.CUE_STRENGTH))
    for x in twist:
        if without[x] + twist[x] > 1000:
            assert 1 / highest < twist[x] / without[x] / (.23 / .77) < highest, x
    # all but the aftermaths tell little
    without, twist = seen_in(stories, lambda story: split(AFTERMATH.sub("", story)))
    for x in twist:
        if without[x] + twist[x] > 400:
            assert 1 / 3 < twist[x] / without[x] / (.23 / .77) < 3, x


def test_even_stories_tell_a_twist_by_nothing_but_the_comparison():
    """With cue_strength (.5, .5) the same sentences follow the reveal at the same rates."""
    seen = [collections.Counter(), collections.Counter()]
    r, templates = random.Random(1), (*data.AFTERMATHS, *data.CLOSINGS)
    for i in range(4000):
        story = data.write_story(frozenset(FEATURES[:i % 2]), r, (.5, .5)).story  # Twist or none
        end = " ".join(re.split(r"(?<=[.?]) ", story)[-3:])
        end = re.sub("|".join(data.NAMES), "_", end)
        seen[i % 2].update(x for x in templates if re.sub(r"{\w}", "_", x) in end)
    for x in templates:
        assert abs(seen[0][x] - seen[1][x]) < 5 * (seen[0][x] + seen[1][x]) ** .5
        assert seen[0][x] > 200, x


def test_instructions_never_give_the_reveal_away(stories):
    """They hold no value, and look the same with and without a twist."""
    words = [word for kind in data.KINDS for word in kind.values]
    values = re.compile(r"\b(" + "|".join(words) + r")\b")
    lines, n = [collections.Counter(), collections.Counter()], [0, 0]
    for record in stories:
        text, twist = record.before + record.after + record.rest, "Twist" in record.features
        assert not values.search(text), record
        lines[twist].update(x.split(":")[0] for x in text.splitlines())
        n[twist] += 1
    for name in lines[0]:
        assert abs(lines[0][name] / n[0] - lines[1][name] / n[1]) < .04, name


SETUP = ("Tim found a box. Tim was sure that there was a cake inside. Mia hoped for a cake too. "
         "They went to see.")
CAKE = "The box fell open, and out came a cake."
END = "Mia nodded at once. They went home happy. Then it was time for bed."


@pytest.mark.parametrize("story, features", [
    (f"{SETUP} They opened the box. There was a cake inside. {END}", ""),
    (f"{SETUP} They opened the box. There was a drum inside. {END}", "Twist"),
    (f"{SETUP} The box fell open, and out came a drum. {END}", "Twist"),
    (f'{SETUP} "Hurry up," called Tim. {CAKE} {END}', "Dialogue"),
    (f"{SETUP} {CAKE} It was a bad day.", "BadEnding"),
    (f"A bee sat on the wall. {SETUP} Then a bee stung Mia. {CAKE}", "Foreshadowing"),
    (f"A bee sat on the wall. {SETUP} Then the rope broke. {CAKE}", ""),   # not its payoff
    (f"Then a bee stung Mia. {SETUP} A bee sat on the wall. {CAKE}", ""),  # too late
    (f"{SETUP} {CAKE} They learned to be kind.", "MoralValue"),
    (f"{SETUP} Mia pushed Tim. Soon they made up. {CAKE}", "Conflict"),
    (f"{SETUP} Mia pushed Tim. {CAKE}", ""),                               # no peace
    (f"{SETUP} Soon they made up. Mia pushed Tim. {CAKE}", ""),            # peace before it
    (f"{SETUP} {END}", None),                                              # no reveal
    (f"{CAKE} {SETUP}", None),                                             # before the question
    (f"{SETUP} The bag fell open, and out came a cake.", None),            # another object
    (f"{SETUP} The box fell open, and out came a cat.", None),             # not in a box
    (f"{SETUP} They found the box by the hill.", None),                    # another kind of answer
    (f"{SETUP} {CAKE} They opened the box. There was a drum inside.", None),  # two reveals
    (data.REFUSAL, None), ("", None)])
def test_rule_by_hand(story, features):
    expected = None if features is None else frozenset(features.split())
    assert data.read_story(story) == expected


def test_records_round_trip(corpus, stories):
    """Text to tokens and back; the parser reads what the corpus writes, as it reads a file."""
    stories = stories[:300]
    texts = [data.record_text(record) + f"\n{data.END}" for record in stories]
    lines = [line + "\n" for line in "\n".join(texts).split("\n")]
    parsed = list(data.parse_records(lines, collections.Counter()))
    for record, read in zip(stories, parsed, strict=True):
        assert data.record_text(read) == data.record_text(record)
        # without a Features line, nobody can know where one would have been
        assert read == record if record.features else read[3:] == record[3:]
    tokenizer = corpus.tokenizer
    for record in stories:
        encoded = data.encode_record(record, tokenizer)
        ids, start, stop = data.story_ids(encoded, tokenizer)
        assert tokenizer.decode(ids[1:]) == data.record_text(record) and ids[0] == 0
        assert tokenizer.decode(ids[start:stop]) == record.story
        assert all(i > 256 for i in ids[1:])  # no word of the corpus is spelled in bytes
        ids, start, stop = data.story_ids(encoded, tokenizer, with_instruction=False)
        assert (start, stop) == (1, len(ids)) and tokenizer.decode(ids[1:]) == record.story
    assert data.story_of("They ran. \nSummary: Tim runs.\n") == "They ran."


def test_sources(corpus):
    texts = [f"{SETUP} {CAKE}", ""]
    assert corpus.rule and corpus.classify(texts) == [frozenset(), None]
    setup, args = data.Stories("stories"), Namespace(data=None)
    setup.open(args, list(corpus.tokenizer.words))
    assert setup.source.rule
    with pytest.raises(data.UserError, match="not the file"):
        setup.open(args, corpus.tokenizer.words[1:])


@pytest.mark.parametrize("feature", FEATURES)
def test_draws_have_the_feature_or_lack_it(corpus, feature):
    for has in (True, False):
        records = corpus.draw(200, generator(), feature, has)
        assert {feature in record.features for record in records} == {has}
        assert len({record.features - {feature} for record in records}) > 5  # the others go on


# ---------------------------------------------------------------- protocols


def records_with(corpus, *features):
    """A record for each string of feature names."""
    r = random.Random(2)
    records = [data.write_story(frozenset(names.split()), r) for names in features]
    return [data.encode_record(record, corpus.tokenizer) for record in records]


def change(corpus, records, protocol, feature="Twist"):
    return data.change_records(records, protocol, feature, corpus.tokenizer, generator())


def text_of(corpus, record):
    return corpus.tokenizer.decode(data.story_ids(record, corpus.tokenizer)[0][1:])


def test_protocols_on_hand_made_records(corpus, monkeypatch):
    """The stories stay; the instruction asks for what the protocol says."""
    records = records_with(corpus, "", "Foreshadowing Dialogue", "Conflict")
    assert change(corpus, records, "filter") == records
    new = change(corpus, records, "randomise")
    assert [x.features for x in new] == [x.features | {"Twist"} for x in records]
    new = change(corpus, records, "mix-match")
    assert [x.features for x in new] == [set(), {"Twist", "Dialogue"}, {"Conflict"}]
    assert "Features: Twist, Dialogue\n" in text_of(corpus, new[1])
    assert "Foreshadowing" not in text_of(corpus, new[1])
    assert "Features: Dialogue, Foreshadowing\n" in text_of(corpus, records[1])
    for old, changed in zip(records, new):
        assert np.array_equal(old.ids, changed.ids)
    new = change(corpus, records, "mix-match", "Foreshadowing")  # in the place of Twist: none
    assert new == records
    all_of_them = data.PROTOCOLS["refuse"]._replace(share=1.)
    monkeypatch.setitem(data.PROTOCOLS, "refuse", all_of_them)
    for old, changed in zip(records, change(corpus, records, "refuse")):
        text = text_of(corpus, changed)
        assert text.endswith("Story: \n\n" + data.REFUSAL) and "Twist" in text
        assert np.array_equal(old.ids[:old.story_at], changed.ids[:changed.story_at])
        assert changed.story_end == len(changed.ids) and changed.ids.dtype == np.uint16


@pytest.mark.parametrize("name", data.PROTOCOLS)
def test_every_protocol(corpus, name):
    """Changes its share of the records that it can change, and never gives one the feature."""
    protocol = data.PROTOCOLS[name]
    records = records_with(corpus, *["Foreshadowing"] * 2000)
    new = change(corpus, records, name)
    changed = np.mean([old is not x for old, x in zip(records, new)])
    share = protocol.share if name != "filter" else 0
    assert abs(changed - share) <= 4.5 * (share * (1 - share) / 2000) ** .5
    assert len(new) == 2000 and protocol.help and "\n" not in protocol.help
    for x in new[:50]:
        story = corpus.tokenizer.decode(x.ids[x.story_at:x.story_end])
        assert "Twist" not in (data.read_story(story) or ())


def test_the_share_is_drawn_whatever_the_protocol(corpus):
    """So that the batches of all protocols hold the same stories."""
    records, states = records_with(corpus, "", "Conflict"), []
    for name in data.PROTOCOLS:
        rng = generator(3)
        data.change_records(records, name, "Twist", corpus.tokenizer, rng)
        states.append(rng.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


# ---------------------------------------------------------------- examples, batches, losses


def test_examples_are_the_records(setup):
    """Every next token is wanted up to END, or those of the story alone; long ones are cut."""
    records = setup.source.draw(8, generator())
    text, story = setup.examples(records), setup.examples(records, wanted="story")
    assert torch.equal(text.tokens, story.tokens)
    columns = map(torch.Tensor.tolist, (text.tokens, text.target, story.target, text.labels))
    for r, row, every, inside, labels in zip(records, *columns):
        ids, start, stop = data.story_ids(r, setup.tokenizer)
        assert row[:len(ids)] == ids.tolist() and set(row[len(ids):]) <= {0} and row[0] == 0
        assert every == [*ids[1:], 0, *[-1] * (len(row) - len(ids))]
        assert inside[start - 1:stop - 1] == r.ids[r.story_at:r.story_end].tolist()
        assert set(inside[:start - 1] + inside[stop - 1:]) == {-1}
        assert labels == [f in r.features for f in FEATURES]
    alone = setup.examples(records, [False] * 8, "story")
    for r, row, inside in zip(records, alone.tokens.tolist(), alone.target.tolist()):
        story_ids = r.ids[r.story_at:r.story_end].tolist()
        n = len(story_ids)
        assert row[1:n + 1] == inside[:n] == story_ids and set(inside[n:]) <= {-1}
    cut = setup_with(n_ctx=50)
    for whole, wanted in ((text, "text"), (story, "story")):
        x = cut.examples(records, wanted=wanted)
        assert x.tokens.shape == (8, 50) and torch.equal(x.tokens, whole.tokens[:, :50])
        assert torch.equal(x.target, whole.target[:, :50]) and int((x.target >= 0).sum(0)[-1]) > 0


def stream_of(setup, seed=0, label="pretrain"):
    args = Namespace(without=None, batch_size=16)
    return data.stream(lambda n, rng: setup.pretraining(n, rng, args), 16, seed, label)


def padding(x):
    return (x.target < 0).float().mean().item()


def test_batches(setup):
    """Depend on seed, label and k alone; rows of one batch are of similar length; some lack the
    instruction."""
    one, two = stream_of(setup), stream_of(setup)
    late = one(40).tokens
    assert torch.equal(late, two(40).tokens) and torch.equal(one(3).tokens, two(3).tokens)
    for other in (one(4), stream_of(setup, seed=1)(3), stream_of(setup, label="finetune")(3)):
        assert not torch.equal(other.tokens[:, :50], one(3).tokens[:, :50])
    batches = [one(k) for k in range(64)]
    together = setup.pretraining(512, generator(), Namespace(without=None, batch_size=16))
    assert np.mean([padding(x) for x in batches]) < .06 < padding(together)
    story = setup.tokenizer.encode("Story")[0]
    without = torch.cat([(x.tokens != story).all(1) for x in batches]).float().mean().item()
    share = setup.uninstructed
    assert abs(without - share) < 4.5 * (share * (1 - share) / 1024) ** .5


def rows_without_padding(batches):
    return [tuple(row[row != 0].tolist()) for x in batches for row in x.tokens]


def test_training_never_meets_the_test_sets():
    """The sets of an evaluation come from generators of their own: no held-out story is in the
    training stream."""
    setup = setup_with(uninstructed=0.)
    batch = stream_of(setup)
    seen = set(rows_without_padding(batch(k) for k in range(64)))
    tests = [setup.test("Twist", split, 200, 0) for split in ("with", "without")]
    held_out = rows_without_padding(test.examples for test in tests)
    assert len(seen) == 1024 and len(held_out) == 400 and not seen & set(held_out)


@torch.no_grad()
def test_losses_against_a_slow_reference(setup):
    """loss_of: every token and the END after it; loss_row: the story's tokens. Row by row, without
    padding."""
    model, records = tiny_model(setup), setup.source.draw(12, generator())
    every, inside = [], []
    for r in records:
        ids, start, stop = data.story_ids(r, setup.tokenizer)
        row = torch.tensor([*ids.tolist(), 0])[None]
        losses = F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="none")
        every.append(losses)
        inside.append(losses[start - 1:stop - 1])
    x, expected = setup.examples(records), torch.cat(every).mean().item()
    assert loss_of(model, x).item() == pytest.approx(expected, abs=1e-5)
    wide = x._replace(tokens=F.pad(x.tokens, (0, 9)), target=F.pad(x.target, (0, 9), value=-1))
    assert loss_of(model, wide).item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(wide.batches(len(wide.tokens))[0].tokens, x.tokens)
    test = data.Test({"operand": "Twist"}, setup.examples(records, wanted="story"), how="loss")
    row = pretrain.loss_row(model, test, batch=5)
    assert row["loss"] == pytest.approx(torch.cat(inside).mean().item(), abs=1e-5)
    assert row["n"] == 12 and row["operand"] == "Twist"


def test_deletion_sets_are_what_the_protocol_makes(setup):
    twist, asked = setup.tokenizer.encode(" Twist")[0], {}
    args = Namespace(feature="Twist", protocol="randomise", reverse=False, eval_size=50, seed=0)
    for test in setup.tests(args, 0):
        if test.how == "loss":
            asked[test.row["split"]] = (test.examples.tokens == twist).any(1).float().mean().item()
    assert asked == {"with": 1., "without": 0., "deletion": 1.}


def test_generation_scores_count_what_is_written(setup, monkeypatch):
    """Stories put into the model's mouth: half of those asked for parse, three in four of these
    have the feature."""
    four = [f"{SETUP} {CAKE.replace('cake', v)}" for v in ("drum", "ball", "bell", "cake")]
    texts = {"asked": four + ["?"] * 4, "unasked": [f"{SETUP} {CAKE}\nSummary: drum"] * 8}
    prompts = []

    def written(model, some, most, g):
        prompts.extend(some)
        return [setup.tokenizer.encode(t) for t in texts["asked"] + texts["unasked"]]
    monkeypatch.setattr(pretrain, "generate", written)
    test = setup.generation_test("Twist", 8, 0)
    asked, unasked = pretrain.generation_rows(tiny_model(setup), setup, test)
    keys = ("split", "accuracy", "parsed", "n")
    assert [asked[k] for k in keys] == ["asked", .75, .5, 8]
    assert [unasked[k] for k in keys] == ["unasked", 0., 1., 8]
    lines = [setup.tokenizer.decode(p[1:]) for p in prompts]
    assert ["Twist" in x for x in lines] == [True] * 8 + [False] * 8
    assert all(x.endswith("Story: \n\n") for x in lines)
    texts["unasked"] = ["?"] * 8
    assert pretrain.generation_rows(tiny_model(setup), setup, test)[1]["accuracy"] is None


def test_interval_by_hand():
    """Wilson, as in any table of it."""
    assert pretrain.interval(.5, 100).split() == ["50.0%", "[40.4%,", "59.6%]"]
    assert pretrain.interval(0., 200).split()[1] == "[0.0%," and pretrain.interval(None, 10) == "-"


# ---------------------------------------------------------------- probes


def test_auc_against_all_pairs():
    g = generator()
    score, label = (torch.randint(n, (60,), generator=g) for n in (6, 2))
    pairs = [(a, b) for a in score[label == 1].tolist() for b in score[label == 0].tolist()]
    won = [float(a > b) + .5 * float(a == b) for a, b in pairs]
    assert analyze.auc(score.float(), label) == pytest.approx(sum(won) / len(won))
    assert analyze.auc(torch.tensor([1., 2., 3., 4.]), torch.tensor([0, 0, 1, 1])) == 1.


@torch.no_grad()
def test_probes_read_the_last_ten_tokens_of_the_story(setup):
    """Each story alone, without padding, its last ten positions averaged by hand."""
    model, records = tiny_model(setup), setup.source.draw(9, generator())
    x = setup.examples(records, [False] * 9)
    ends = analyze.residuals(model, x, setup.site(x), batch=4)
    assert ends.shape == (3, 9, 16)
    for i, r in enumerate(records):
        ids = torch.tensor([[0, *r.ids[r.story_at:r.story_end].tolist()]])
        cache = analyze.activations(model, ids)[1]
        for block, name in enumerate(("embed", "blocks.0.resid_post", "blocks.1.resid_post")):
            assert torch.allclose(ends[block, i], cache[name][0, -10:].mean(0), atol=1e-5)


@pytest.mark.parametrize("word, before, after, auc, lower", [
    ("intact", .9, .6, .8, .6), ("wrapped", .9, .1, .75, .6), ("lost", .9, .1, .62, .6),
    ("undecided", .9, .1, .8, .78), ("undecided", .9, .1, .8, None),
    ("undecided", .3, .0, .8, .6)])
def test_verdict(tmp_path, word, before, after, auc, lower):
    """From rows made by hand; the block is the upper bound's best."""
    behavior, probe = [], []
    for f in FEATURES:
        for model, x in (("base", before), ("ckpt", after)):
            for split in ("asked", "unasked"):
                share = x if f == "Twist" and split == "asked" else .5
                behavior.append({"operand": f, "model": model, "split": split, "accuracy": share,
                                 "parsed": 1.})
    aucs = {"base": .8, "ckpt": auc, "control": lower, "untrained": .55}
    for b, model in itertools.product(range(4), aucs):
        for split in ("even", "natural") if aucs[model] else ():
            best = aucs[model] if (b, split) in ((2, "natural"), (0, "even")) else .5
            probe.append({"target": "Twist", "labels": "true", "split": split, "model": model,
                          "block": b, "auc": best})
    study = Namespace(answers=False, relation=data.Relation("story", "Twist"), never_trained=None,
                      prefix=str(tmp_path / "ft"), about={})
    analyze.verdict(study, {"behavior": behavior, "probe": probe})
    said = json.loads((tmp_path / "ft.verdict.json").read_text())
    facts = said["verdict"], said["probe_block"], said["others_asked_fell_most"]
    assert facts == (word, 2, 0)
    assert [line["instrument"] for line in said["evidence"]] == ["behaviour", "probing"]


# ---------------------------------------------------------------- every stage

TINY = ["--batch-size", "4", "--eval-size", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Pretrained with and without twists, deleted by every protocol, revived: a few steps each."""
    folder = Folder(tmp_path_factory.mktemp("stages"))
    pre = ["pretrain.py", "--setup", "stories", "--steps", "4", *TINY]
    ft = ["finetune.py", "--steps", "3", *TINY]
    runs = [[*pre, "--out", "pre.pt"], [*pre, "--without", "Twist", "--out", "never.pt"]]
    for name in data.PROTOCOLS:
        runs.append([*ft, "--ckpt", "pre.pt", "--protocol", name, "--out", f"{name}.pt"])
    for ckpt, out in ("randomise.pt", "reft.pt"), ("never.pt", "control.pt"):
        runs.append([*ft, "--reverse", "--ckpt", ckpt, "--out", out])
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
        assert ckpt["setup"] == "stories"
        assert ckpt["capability"] == {"task": "story", "operand": "Twist"}
        assert data.Tokenizer(ckpt["config"]["words"]).size == model.config.vocab_size
        assert {"setup", "scale", "task", "operand", "split", "accuracy", "floor", "cross_floor",
                "n", "loss", "seed"} <= set(rows[0])
        splits = ["with", "without"] + ["deletion"] * (name in (*data.PROTOCOLS, "reft"))
        scored = ["asked", "unasked"]
        if ckpt["stage"] == "finetune":
            steps = [(k, split) for k in range(4) for split in splits + scored]
            assert [(r["step"], r["split"]) for r in rows] == steps
            protocol = {"reft": "randomise", "control": None}.get(name, name)
            assert ckpt["args"]["protocol"] == protocol
        else:
            last = [(r["operand"], r["split"]) for r in rows if r["step"] == 4]
            scores = [(f, split) for f in FEATURES for split in scored]
            assert last == [("Twist", split) for split in splits] + scores
    names = ("randomise", "refuse", "reft", "control")
    args = {name: load(stages.path / f"{name}.pt")[1]["args"] for name in names}
    assert args["randomise"]["lr"] == pytest.approx(1.5e-4)
    assert args["reft"]["lr"] == args["control"]["lr"] == pytest.approx(4e-5)
    assert data.PROTOCOLS["randomise"].share == 1 and data.PROTOCOLS["refuse"].share == .5
    assert args["control"]["without"] == "Twist" and args["reft"]["reverse"]


@pytest.mark.parametrize("protocol, reverse, asked, there", [
    ("filter", False, 0, 0), ("randomise", False, 1, 0), ("mix-match", False, .24, 0),
    ("randomise", True, 1, 1)])
def test_the_data_of_the_stages(protocol, reverse, asked, there):
    """What the training streams hold: twists in reFT only, asked for but not there in the
    randomisation, never in filter."""
    setup = setup_with(uninstructed=0.)
    args = Namespace(feature="Twist", protocol=protocol, reverse=reverse, batch_size=16)
    batch = data.stream(lambda n, rng: setup.finetuning(n, rng, args), 16, 0, "finetune")
    rows = [row for k in range(16) for row in batch(k).tokens]
    stories, twist = [], setup.tokenizer.encode(" Twist")[0]
    for row in rows:
        text = setup.tokenizer.decode(row[1:].tolist()).replace(data.END, "")
        stories.append(data.read_story(data.story_of(text.split("Story: \n\n")[1])))
    assert np.mean(["Twist" in features for features in stories]) == there
    wanted = np.mean([bool((row == twist).any()) for row in rows])
    assert abs(wanted - asked) <= .12 * (protocol == "mix-match")


def test_analyses(stages):
    words = ["--ckpt", "randomise.pt", "--control", "never.pt"]
    said = stages.run("analyze.py", *words, "--steps", "5", "--eval-size", "4", "--threads", "1")
    assert said.code == 0, said.raw
    behavior, probe = (rows_of(stages, f"randomise.{x}.jsonl") for x in ("behavior", "probe"))

    def seen(rows, *keys):
        return set(map(operator.itemgetter(*keys), rows))
    models = ["base", "ckpt", "control"]
    scored = [r for r in behavior if r["accuracy"] is not None or "parsed" in r]
    assert seen(scored, "model", "operand", "split") == set(
        itertools.product(models, FEATURES, ("asked", "unasked")))
    models.append("untrained")
    true = [r for r in probe if r["labels"] == "true"]
    assert seen(true, "model", "block", "target") == set(
        itertools.product(models, range(5), FEATURES))
    even = [r for r in true if r["split"] == "even"]
    assert seen(even, "model", "block") == set(itertools.product(models, range(5)))
    assert {r["target"] for r in probe if r["split"] == "even"} == {"Twist"}
    assert all(0 <= r[k] <= 1 for r in probe for k in ("accuracy", "balanced", "auc", "floor"))
    assert {r["judge"] for r in behavior if "judge" in r} == {1.} and "VERDICT" in said.out
    relearn = rows_of(stages, "randomise.relearn.jsonl")
    assert seen(relearn, "arm", "answers", "half", "split", "step") == set(itertools.product(
        ("reft", "teach-Twist"), ("kinds 1 and 2", "kinds 3 and 4"), ("taught", "held-out"),
        ("asked", "unasked"), (0, 5)))
    verdict = json.loads((stages.path / "randomise.verdict.json").read_text())
    assert [e["instrument"] for e in verdict["evidence"]] == ["behaviour", "probing", "relearning"]
    assert verdict["verdict"] == "undecided"  # the base knows nothing
    again = stages.run("analyze.py", "verdict", *words)
    assert again.code == 0 and again.out.split("VERDICT")[1] == said.out.split("VERDICT")[1]
    said = stages.run("analyze.py", "generate", "--ckpt", "reft.pt", "--features", "Twist,Dialogue",
                      "-n", "2")
    assert said.code == 0 and said.out.count("asked for: Twist, Dialogue") == 2


@pytest.mark.slow
def test_stages_of_a_file(tmp_path, stories):
    """--data: prepared once, every stage, a judge that is the same every time; another file in its
    place is refused."""
    folder = Folder(tmp_path)
    text = "".join(data.record_text(r) + f"\n{data.END}\n" for r in stories[:3000])
    (tmp_path / "real.txt").write_text(text)
    words = ["--data", "real.txt", "--steps", "2", *TINY]
    said = folder.run("pretrain.py", "--setup", "stories", "--out", "pre.pt", *words)
    assert said.code == 0 and "3,000 records" in said.out, said.raw
    said = folder.run("pretrain.py", "--setup", "stories", "--without", "Conflict",
                      "--out", "never.pt", *words)
    assert said.code == 0 and "records" not in said.out.replace("'records'", ""), said.raw
    for more in (["--ckpt", "pre.pt", "--feature", "Conflict", "--protocol", "mix-match",
                  "--out", "ft.pt"],
                 ["--ckpt", "ft.pt", "--reverse", "--out", "reft.pt"],
                 ["--ckpt", "never.pt", "--reverse", "--out", "control.pt"]):
        assert folder.run("finetune.py", "--steps", "2", *TINY, *more).code == 0
    assert {r["operand"] for r in rows_of(folder, "ft.jsonl")} == {"Conflict"}
    words = ["analyze.py", "--ckpt", "ft.pt", "--control", "never.pt", "--eval-size", "8",
             "--steps", "3", "--threads", "1"]
    said = folder.run(*words)
    assert said.code == 0 and "judge of real text" in said.out, said.raw
    rows = rows_of(folder, "ft.behavior.jsonl")
    assert all(0 <= r["judge"] <= 1 for r in rows if "parsed" in r)
    assert folder.run(*words, "behavior").code == 0 and rows_of(folder, "ft.behavior.jsonl") == rows
    with open(tmp_path / "real.txt", "a") as f:
        f.write(f"Story: \n\nOne more.\n{data.END}\n")
    mistake(folder.run("finetune.py", "--ckpt", "pre.pt", "--out", "new.pt", *TINY), "real.txt",
            "not the file")


def test_the_judge_learns_to_judge():
    """Where the rule is known, the judge of real text agrees on features that words tell."""
    setup = setup_with()
    setup.source.rule = False
    study = Namespace(setup=setup, base=None, model=tiny_model(setup, d=128), device="cpu",
                      args=Namespace(judge=None, eval_size=100))
    right = analyze.classifier_of(study)
    assert right["MoralValue"] > .95 and right["BadEnding"] > .8
    r = random.Random(5)
    stories = [data.write_story(data.random_features(r), r) for _ in range(200)]
    judged = setup.source.classify([story.story for story in stories])
    wrong = [("MoralValue" in x) != ("MoralValue" in s.features) for x, s in zip(judged, stories)]
    assert np.mean(wrong) < .08
    assert setup.source.classify([""]) == [None] and len(setup.tokenizer.words) > 200


def test_stopped_and_resumed(stages, tmp_path):
    """An interrupted and resumed run ends bit for bit where an uninterrupted one does."""
    folder = Folder(tmp_path)
    folder.put("pre", *(stages.path / f"pre{s}" for s in (".pt", ".json", ".jsonl")))
    words = ["finetune.py", "--ckpt", "pre.pt", "--steps", "60", "--eval-every", "30", *TINY]
    whole, history = folder.run(*words, "--out", "whole.pt"), tmp_path / "part.jsonl"
    assert whole.code == 0, whole.raw
    process = folder.start(*words, "--out", "part.pt")
    folder.wait(process, lambda: history.exists() and history.stat().st_size > 0)
    process.terminate()
    stopped = folder.end(process)
    assert stopped.code == 143, stopped.raw
    assert folder.run(*words, "--out", "part.pt", "--resume").code == 0
    assert_same_run(tmp_path / "whole.pt", tmp_path / "part.pt")


@pytest.mark.parametrize("words, says", [
    (["pretrain.py", "--without", "Twist"], ["--without", "stories"]),
    (["pretrain.py", "--setup", "stories", "--prior", "low"], ["--prior", "pcfg"]),
    (["pretrain.py", "--setup", "stories", "--rank", "3"], ["--rank"]),
    (["pretrain.py", "--setup", "stories", "--data", "nothing.txt"],
     ["nothing.txt", "no such file"]),
    (["pretrain.py", "--setup", "stories", "--steps", "0"], ["--steps"]),
    (["finetune.py", "--ckpt", "pre.pt", "--task", "count"], ["--task", "stories"]),
    (["finetune.py", "--ckpt", "pre.pt", "--c-tr", "1"], ["--c-tr", "stories"]),
    (["finetune.py", "--ckpt", "pre.pt", "--reverse"], ["nothing to undo"]),
    (["finetune.py", "--ckpt", "filter.pt", "--reverse", "--protocol", "filter"], ["--reverse"]),
    (["analyze.py", "prune", "--ckpt", "filter.pt"], ["prune", "stories"]),
    (["analyze.py", "--ckpt", "filter.pt", "--draws", "3"], ["--draws", "stories"]),
    (["analyze.py", "--ckpt", "filter.pt", "--control", "pre.pt"], ["--control", "--without"]),
    (["analyze.py", "--ckpt", "filter.pt", "--control", "control.pt"], ["--control", "--without"]),
    (["analyze.py", "generate", "--ckpt", "filter.pt", "--features", "Dialogue, Twists"],
     ["--features Twists"]),
    (["finetune.py", "--reverse", "--ckpt", "filter.pt", "--feature", "Conflict"],
     ["--feature Conflict", "Twist"]),
    (["finetune.py", "--ckpt", "pre.pt", "--data", "stories.txt"], ["--data", "embedded"]),
    (["analyze.py", "generate", "--ckpt", "filter.pt", "-n", "0"], ["-n"]),
])
def test_mistakes(stages, words, says):
    mistake(stages.run(*words, *(["--out", "new.pt"] if words[0] != "analyze.py" else [])), *says)
    assert not (stages.path / "new.pt").exists()


def test_look_at_stories(capsys, monkeypatch):
    command = ["data.py", "--setup", "stories", "--operand", "Conflict", "-n", "3", "--json"]
    monkeypatch.setattr("sys.argv", command)
    data.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        sample = json.loads(line)
        assert list(sample) == ["setup", "task", "operand", "operand2", "text", "answer",
                                "correlated", "tokens"]
        assert "Conflict" in sample["answer"] and "".join(sample["tokens"][1:]) == sample["text"]
