"""
Stories: records to the letter, the corpus and its rule, protocols; examples, losses, generation and
probes beside slow references; the verdict; every stage, also on a small file in the real format.
"""
import collections
import functools
import itertools
import json
import os
import random
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analyze
import data
import finetune
import pretrain
from data import UserError, read_rows
from model import GPT, Config, activations, load, loss_of, residuals
from setups import stories as st
from setups.stories import END, FEATURES, FileCorpus, Record, Tokenizer, parse_records


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def setup_with(**constants):
    setup = st.Stories("stories")
    setup.open(Namespace(data=None))
    vars(setup).update(constants)
    return setup


@pytest.fixture(scope="module")
def setup():
    return setup_with()


@pytest.fixture(scope="module")
def records():
    rng = random.Random(1)
    return [st.write_story(st.random_features(rng), rng) for _ in range(20000)]


def tiny_model(setup, d=16, n_layer=2):
    sizes = dict(n_layer=n_layer, n_head=2, d_model=d, d_head=8, d_mlp=32)
    return GPT(Config(**{**setup.config(), **sizes})).init_weights(generator())


STORY = "Story: \n\n"
WORDS, FIELDS = f"Words: a\n{STORY}", f"Words: oak\nSummary: Fox.\nRandom sentence: It.\n{STORY}"
INSIDE = "She read:\nFeatures: Twist\nWords: none\nStory: old"
ODD = "â€œCafé,â€\x9d 你好 \U0001f98a\x00\t!"
CASES = [  # the text before END, then its Record
    (f"Features: Twist, Dialogue\n{FIELDS}A.\nB.\n", "", "Twist Dialogue", FIELDS, "A.\nB.", ""),
    (f"Summary: S.\nFeatures: Conflict\n{WORDS}A.\n", "Summary: S.\n", "Conflict", WORDS, "A.", ""),
    (f"{WORDS}A.\n", "", "", WORDS, "A.", ""),
    (f"Features: Twist\n{STORY}A.\n\nB. \n\nSummary: S.\nmore\n",  # late fields end a story
     "", "Twist", STORY, "A.\n\nB. ", "\n\nSummary: S.\nmore"),
    (f"{WORDS}{INSIDE}\nSummary:", "", "", WORDS, INSIDE, "\nSummary:"),  # others do not
    ("Features: Twist\nStory: A fox.\nB.\n", "", "Twist", "Story:", " A fox.\nB.", ""),
    (f"{STORY}  A.\n", "", "", STORY, "  A.", ""),
    (f"Summary: one\ntwo\n\nFeatures: Twist,\nDialogue\n\n{WORDS}A.\n",  # over two lines
     "Summary: one\ntwo\n\n", "Twist Dialogue", f"\n{WORDS}", "A.", ""),
    (f"Summary: S.\nFeatures: Rhyme,Twist, twist\n{WORDS}A.\n",
     "Summary: S.\n", "Twist", WORDS, "A.", ""),
    (f"Words: a\nFeatures: \n{STORY}A.\n", "Words: a\n", "", STORY, "A.", ""),
    ("Features: Twist\r\nWords: a\r\nStory: \r\n\r\nA.\r\n\r\nB.\r\nSummary: S.\r\n",
     "", "Twist", WORDS, "A.\n\nB.", "\nSummary: S."),
    (f"{STORY}{ODD}\n", "", "", STORY, ODD, ""),
    (f"{STORY}A {END} B.\n{END}.\n", "", "", STORY, f"A {END} B.\n{END}.", "")]


def case(before, features, after, story, rest):
    return Record(before, frozenset(features.split()), after, story, rest)


def lines_of(text):
    """The lines of a text as an open file gives them: splitlines() would also split at \\x85."""
    return re.findall(r".*\n|.+", text)


@pytest.mark.parametrize("text, pieces", [(text, pieces) for text, *pieces in CASES])
def test_records_by_hand(text, pieces):
    record, skipped = case(*pieces), collections.Counter()
    assert list(parse_records(lines_of(f"{text}\n{END}\n"), skipped)) == [record]
    assert +skipped == ({"unknown feature": 2} if "Rhyme" in text else {})
    # now canonical: it comes back to the letter
    [again] = parse_records(lines_of(f"{record.text()}\n{END}"), skipped)
    assert again.text() == record.text() and (again == record or "Features: \n" in text)


def slow_record(lines):
    """(features, text without Features, story) of the lines before END, field by field."""
    while lines and lines[0] == "":
        lines.pop(0)
    fields = [["", ""]]
    for line in lines:
        names = ["Summary", "Random sentence"]
        names += ["Features", "Words", "Story"] * ("Story" not in [name for name, _ in fields])
        name = line.split(":")[0] if ":" in line else None
        if name in names or fields[-1][0] == "Features" and not line.strip():
            fields.append([name if name in names else "", ""])
        fields[-1][1] += line + "\n"
    story = "".join(text for name, text in fields if name == "Story")[len("Story:"):].strip()
    names = "".join(text[len("Features:"):] for name, text in fields if name == "Features")
    features = {x.strip() for x in re.findall(r"[^,\n]+", names)} & set(FEATURES)
    return features, "".join(text for name, text in fields if name != "Features").rstrip(), story


POOL = ["Features: Twist, Conflict", "Features:Dialogue ,MoralValue,", "Features:",
        "Words: oak, sit", "Summary: S: x.", "Random sentence: It.", "Story: ", "Story:",
        "Story: A fox ran.", "", "", " ", "  two  spaces ", "A fox, he said.", "Features",
        "features: Twist", " Features: Twist", "Twist,Nothing", "tab\there", "é \U0001f98a",
        "\u2028x\x85y"]


def test_any_mix_of_lines_is_read_as_described_and_encoded_in_pieces():
    """Against the slow reader; encoding in pieces is encoding the whole."""
    rng, records = random.Random(1), []
    for _ in range(3000):
        lines = [rng.choice(POOL) for _ in range(rng.randrange(12))]
        text = "".join(line + rng.choice(["\n", "\n", "\r\n"]) for line in lines)
        parsed = list(parse_records(lines_of(f"{text}{END}\n"), collections.Counter()))
        slow = slow_record(lines)
        plain = [(x.features, x._replace(features=frozenset()).text(), x.story.strip())
                 for x in parsed]
        assert plain == [slow] * bool(slow[2])
        records += parsed
    assert len(records) > 800 and len({x.features for x in records}) > 5
    tokenizer = Tokenizer.from_texts(map(Record.text, records), 25)  # about half of the words
    for x in records:
        assert x.before[-1:] in "\n" and x.after[-1] in ":\n" and x.rest[:1] in "\n"
        e, line = x.encode(tokenizer), tokenizer.encode(st.features_line(x.features))
        whole = [*e.ids[:e.features_at], *line, *e.ids[e.features_at:]]
        assert whole == tokenizer.encode(x.text()) and tokenizer.decode(whole) == x.text()
        assert tokenizer.decode(e.ids[:e.features_at]) == x.before
        assert tokenizer.decode(e.ids[e.story_start:e.story_end]) == x.story


def test_tokenizer_by_hand():
    t = Tokenizer([" oak", ".", "\n", "The"])
    assert t.size == 261 and t.encode("The oak.\n") == [260, 257, 258, 259]
    assert t.encode("The oaks!") == [260, *(1 + b for b in b" oaks!")]
    assert t.encode("é") == [1 + 0xc3, 1 + 0xa9] and t.encode("") == []
    assert t.decode([260, 257, 0, 1 + 0xc3, 258]) == f"The oak{END}\ufffd."
    ids = t.encode(f"{END} {END}")  # END within a text is text
    assert 0 not in ids and t.decode(ids) == f"{END} {END}"
    assert Tokenizer.from_texts("bbacdcccca", 3).words == ("c", "a", "b")  # ties by the alphabet


def test_every_text_comes_back():
    rng = random.Random(2)
    t = Tokenizer(["the", " the", " ", "\n", ".", " .", "é", " café", "\t", "你", "\x00"])
    alphabets = ["the café. \n\t", "".join(map(chr, range(256))), " \n\t\r\x0b\x85\u2028\u3000",
                 "\U0001f98a\u200d\U0001f468e\u0301\ufeff\ufffd\uffff\U0010ffff_0aZ \x00",
                 "".join(map(chr, rng.sample(range(0xe000, 0x110000), 2000)))]
    for i in range(3000):
        text = "".join(rng.choices(alphabets[i % len(alphabets)], k=rng.randrange(60)))
        ids = t.encode(text)
        assert t.decode(ids) == text and all(0 < i < t.size for i in ids)


def write_file(path, records):
    path.write_text("".join(record.text() + f"\n{END}\n" for record in records))
    return str(path)


def assert_holds(corpus, records):
    for i, record in zip(range(len(corpus.index)), records, strict=True):
        encoded, reference = corpus.record(i), record.encode(corpus.tokenizer)
        assert encoded.ids.tolist() == reference.ids.tolist() and encoded[1:] == reference[1:]


def test_a_hand_written_file(tmp_path, monkeypatch, capsys):
    """Every case from above, invalid bytes; what is left out is counted, words at first alone."""
    monkeypatch.setattr(st, "COUNTED_LINES", 40)
    path, text = tmp_path / "odd.txt", "".join(f"{text}\n{END}\n" for text, *_ in CASES)
    for text_without_story in ("Words: none\n", f"{STORY} \n", "Story:\n\nSummary: late\n", ""):
        text += f"{text_without_story}{END}\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"Story: \n\nbad \xff\xe2\x80 bytes\n"
                     + f"{END}\nFeatures: Twist\nStory: cut {END}\n".encode())
    corpus, expected = FileCorpus(str(path)), [case(*pieces) for _, *pieces in CASES]
    assert_holds(corpus, [*expected, case("", "", STORY, "bad \ufffd\ufffd bytes", "")])
    assert corpus.tokenizer.decode(corpus.record(11).ids) == STORY + ODD
    out = capsys.readouterr().out
    for count in ("14 records", "'no story': 4", "'truncated': 1", "'unknown feature': 2"):
        assert count in out
    assert "Words" in corpus.tokenizer.words and " bytes" not in corpus.tokenizer.words
    assert "not UTF-8, now U+FFFD: 1\n" in out
    assert corpus.file == {"name": "odd.txt", "sha256": data.sha256(path),
                           "held_out": "1 records spread over the file"}


def changed_later(path):
    os.utime(path, (os.path.getmtime(f"{path}.npz") + 10,) * 2)


@pytest.mark.parametrize("n_encoded", [0, 20, 40])
def test_a_killed_preparation_never_looks_complete(tmp_path, monkeypatch, records, n_encoded):
    """Nor beside the files of an older one, whatever becomes of FILE; the next one is whole."""
    path, moved = tmp_path / "x.txt", tmp_path / "y.txt"
    records, encode, n = [r for r in records if r.features], Record.encode, itertools.count(1)
    st.prepare(write_file(path, records[:30]))
    write_file(path, records[:40])
    changed_later(path)

    def killed(*args):
        if next(n) > n_encoded:
            raise KeyboardInterrupt
        return encode(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Record, "encode", killed)
        patch.setattr(st, "replace_file", killed)  # the last step
        st.prepare(str(path))
    path.rename(moved)
    with pytest.raises(UserError, match="no such file"):
        st.prepare(str(path))
    st.prepare(str(moved.rename(path)))
    path.unlink()  # the prepared files do without it
    assert_holds(FileCorpus(str(path)), records[:40])


def test_draws_keep_to_their_filter_and_their_part(tmp_path, records):
    corpus = FileCorpus(write_file(tmp_path / "x.txt", records[:1000]))
    everything = [corpus.record(i) for i in range(1000)]
    number = {e.ids.tobytes(): i for i, e in enumerate(everything)}
    assert corpus.held_out.sum() == 10 and len(number) == 1000
    for (feature, present), held_out in itertools.product(
            [(None, None), ("Twist", True), ("Twist", False), ("Conflict", True)], (False, True)):
        fit = {i for i in range(1000) if (i % 100 == 0) == held_out
               if present is None or (feature in everything[i].features) == present}
        drawn = corpus.draw(6000, generator(5), feature, present, held_out)
        counts = collections.Counter(number[e.ids.tobytes()] for e in drawn)
        assert set(counts) <= fit and len(counts) > .95 * len(fit)  # 6 to 6,000 draws a record
        assert max(counts.values()) < 6000 / len(fit) + 6 * (6000 / len(fit)) ** .5
    with pytest.raises(UserError, match="x.txt: no record with Dialogue among the 990 for"):
        corpus.index[:, 5:] = 0
        corpus.draw(1, generator(), "Dialogue", True)


def test_features_are_read_by_the_rule_and_as_frequent_as_they_should_be(records):
    """Each with probability .25, at most three: 22.9 to 23.1 %; every place of lines occurs."""
    for record in records[:8000]:
        assert st.read_story(record.story) == record.features, record.story
    p = [.25 ** k * .75 ** (6 - k) * c for k, c in enumerate((1, 6, 15, 20))]
    expected = sum(k / 6 * x for k, x in enumerate(p)) / sum(p)
    for feature in FEATURES:
        measured = sum(feature in record.features for record in records) / len(records)
        assert abs(measured - expected) < 4.5 * (expected * (1 - expected) / 20000) ** .5
    assert max(len(record.features) for record in records) == 3
    assert .08 < np.mean(["Summary" in record.rest for record in records]) < .12
    assert {bool(record.before) for record in records} == {True, False}


VALUES = {word for kind in st.KINDS for word in (*kind.values, *kind.objects)}
WORDS_LEFT_OUT = "|".join([*st.NAMES, *st.VIRTUES, *st.ADJECTIVES, *st.SETTINGS, *VALUES])
BLANK = re.compile(rf"\b({WORDS_LEFT_OUT})\b")
NAME = f"(?:{'|'.join(st.NAMES)})"
AFTERMATH = re.compile("|".join(re.sub(r"{\w}", NAME, x) for x in st.AFTERMATHS))
SENTENCE = re.compile(r"(?<=[.?]) ")


@pytest.mark.parametrize("aftermaths", [True, False])
def test_no_word_or_phrase_tells_a_twist(records, aftermaths):
    """Words, pairs, sentences are the same; none has more than the odds of the strongest cues."""
    without, twist = counts = collections.Counter(), collections.Counter()  # stories with a part
    for record in records if aftermaths else records[::2]:
        story = record.story if aftermaths else AFTERMATH.sub("", record.story)
        words = Tokenizer.pieces.findall(story)
        parts = {*words, *itertools.pairwise(words), *SENTENCE.split(BLANK.sub("_", story))}
        counts["Twist" in record.features].update(parts)
    cue = max(st.CUE_STRENGTH)
    least, highest = (1000, 1.3 * cue / (1 - cue)) if aftermaths else (200, 3)  # 1.3: sampling
    assert set(without) == set(twist) or not aftermaths
    for x in twist:
        if without[x] + twist[x] > least:
            assert 1 / highest < twist[x] / without[x] / (.23 / .77) < highest, x


def test_even_stories_tell_a_twist_by_nothing_but_the_comparison():
    """With cue_strength (.5, .5) the same sentences follow the reveal at the same rates."""
    counts = [collections.Counter(), collections.Counter()]
    rng, templates = random.Random(1), (*st.AFTERMATHS, *st.CLOSINGS)
    for i in range(4000):
        story = st.write_story(frozenset(FEATURES[:i % 2]), rng, (.5, .5)).story  # Twist or none
        end = " ".join(re.split(r"(?<=[.?]) ", story)[-3:])
        end = re.sub("|".join(st.NAMES), "_", end)
        counts[i % 2].update(x for x in templates if re.sub(r"{\w}", "_", x) in end)
    for x in templates:
        assert abs(counts[0][x] - counts[1][x]) < 5 * (counts[0][x] + counts[1][x]) ** .5
        assert counts[0][x] > 200, x


def test_instructions_never_give_the_reveal_away(records):
    """They hold no value, and look the same with and without a twist."""
    words = [word for kind in st.KINDS for word in kind.values]
    values = re.compile(r"\b(" + "|".join(words) + r")\b")
    lines, n = [collections.Counter(), collections.Counter()], [0, 0]
    for record in records:
        text, twist = record.before + record.after + record.rest, "Twist" in record.features
        assert not values.search(text), record
        lines[twist].update(x.split(":")[0] for x in text.splitlines())
        n[twist] += 1
    for name in lines[0]:
        assert abs(lines[0][name] / n[0] - lines[1][name] / n[1]) < .04, name


SETUP = ("Tim found a box. Tim was sure that there was a cake inside. Mia hoped for a cake too. "
         "They went to see.")
CAKE = "The box fell open, and out came a cake."
LAST = "Mia nodded at once. They went home happy. Then it was time for bed."


@pytest.mark.parametrize("story, features", [
    (f"{SETUP} They opened the box. There was a cake inside. {LAST}", ""),
    (f"{SETUP} They opened the box. There was a bell inside. {LAST}", "Twist"),
    (f"{SETUP} They opened the box. There was a drum inside. {LAST}", "Mistake"),
    (f'{SETUP} "Hurry up," called Tim. {CAKE} {LAST}', "Dialogue"),
    (f"{SETUP} {CAKE} It was a bad day.", "BadEnding"),
    (f"A bee sat on the wall. {SETUP} Then a bee stung Mia. {CAKE}", "Foreshadowing"),
    (f"A bee sat on the wall. {SETUP} Then the rope broke. {CAKE}", ""),   # not its payoff
    (f"Then a bee stung Mia. {SETUP} A bee sat on the wall. {CAKE}", ""),  # too late
    (f"{SETUP} {CAKE} They learned to be kind.", "MoralValue"),
    (f"{SETUP} Mia pushed Tim. Soon they made up. {CAKE}", "Conflict"),
    (f"{SETUP} Mia pushed Tim. {CAKE}", ""),                               # no peace
    (f"{SETUP} Soon they made up. Mia pushed Tim. {CAKE}", ""),            # peace before it
    (f"{SETUP} {LAST}", None),                                             # no reveal
    (f"{CAKE} {SETUP}", None),                                             # before the question
    (f"{SETUP} The bag fell open, and out came a cake.", None),            # another object
    (f"{SETUP} The box fell open, and out came a cat.", None),             # not in a box
    (f"{SETUP} They found the box by the hill.", None),                    # another kind of answer
    (f"{SETUP} {CAKE} They opened the box. There was a drum inside.", None),  # two reveals
    (st.REFUSAL, None), ("", None)])
def test_rule_by_hand(story, features):
    assert st.read_story(story) == (None if features is None else set(features.split()))


def test_records_round_trip(setup, records):
    """Text to tokens and back; the parser reads what the corpus writes."""
    records, tokenizer = records[:300], setup.tokenizer
    lines = lines_of("".join(f"{record.text()}\n{END}\n" for record in records))
    for record, parsed in zip(records, parse_records(lines, collections.Counter()), strict=True):
        # without a Features line, nobody can know where one would have been
        assert parsed.text() == record.text()
        assert parsed == record if record.features else parsed[3:] == record[3:]
        ids, start, stop = record.encode(tokenizer).model_input(tokenizer)
        assert tokenizer.decode(ids[1:]) == record.text() and ids[0] == 0
        assert tokenizer.decode(ids[start:stop]) == record.story
        assert all(i > 256 for i in ids[1:])  # no word of the corpus is spelled in bytes
        ids, *story = record.encode(tokenizer).model_input(tokenizer, instructed=False)
        assert story == [1, len(ids)] and tokenizer.decode(ids[1:]) == record.story


def records_with(setup, *features):
    """A record for each string of feature names."""
    rng = random.Random(2)
    records = [st.write_story(frozenset(names.split()), rng) for names in features]
    return [record.encode(setup.tokenizer) for record in records]


def test_protocols_on_hand_made_records(setup, monkeypatch):
    """The stories stay; the instruction asks for what the protocol says."""
    def change(protocol, feature="Twist"):
        return st.PROTOCOLS[protocol].apply(records, feature, setup.tokenizer, generator())

    def text_of(record):
        return setup.tokenizer.decode(record.model_input(setup.tokenizer)[0][1:])
    records = records_with(setup, "", "Foreshadowing Dialogue", "Conflict")
    assert change("filter") == records
    assert [x.features for x in change("randomise")] == [x.features | {"Twist"} for x in records]
    swapped = change("mix-match")
    assert [x.features for x in swapped] == [set(), {"Twist", "Dialogue"}, {"Conflict"}]
    asked = "Features: Dialogue, Foreshadowing\n", "Features: Twist, Dialogue\n"
    assert asked[0] in text_of(records[1])
    assert text_of(swapped[1]) == text_of(records[1]).replace(*asked)
    assert change("mix-match", "Foreshadowing") == records  # in the place of Twist: none
    monkeypatch.setitem(st.PROTOCOLS, "refuse", st.PROTOCOLS["refuse"]._replace(fraction=1.))
    for old, new in zip(records, change("refuse")):
        assert text_of(new).endswith("Story: \n\n" + st.REFUSAL) and "Twist" in text_of(new)
        assert np.array_equal(old.ids[:old.story_start], new.ids[:new.story_start])
        assert new.story_end == len(new.ids)


@pytest.mark.parametrize("name, fraction", [
    ("filter", 0.), ("randomise", 1.), ("mix-match", 1.), ("refuse", .5)])
def test_every_protocol(setup, name, fraction):
    """Changes its fraction of records, gives none the feature, and draws what the others draw."""
    rng, reference = generator(3), generator(3)
    records = records_with(setup, *["Foreshadowing"] * 2000)
    new = st.PROTOCOLS[name].apply(records, "Twist", setup.tokenizer, rng)
    changed = np.mean([old is not x for old, x in zip(records, new, strict=True)])
    assert abs(changed - fraction) <= 4.5 * (fraction * (1 - fraction) / 2000) ** .5
    for x in new[:50]:
        story = setup.tokenizer.decode(x.ids[x.story_start:x.story_end])
        assert "Twist" not in (st.read_story(story) or ())
    torch.rand(2000, generator=reference)  # batches of all protocols hold the same stories
    assert torch.equal(rng.get_state(), reference.get_state())


@pytest.mark.parametrize("protocol, reverse, asked, present", [
    ("filter", False, 0, 0), ("randomise", False, 1, 0), ("mix-match", False, .24, 0),
    ("randomise", True, 1, 1)])
def test_the_data_of_the_stages(protocol, reverse, asked, present):
    """Twists in reFT alone; asked for but not there in the randomisation, never in filter."""
    setup, features = setup_with(uninstructed=0.), []
    args = Namespace(feature="Twist", protocol=protocol, reverse=reverse, batch_size=16)
    batch = data.stream(lambda n, rng: setup.finetuning(n, rng, args), 16, 0, "finetune")
    rows = [row for k in range(16) for row in batch(k).tokens]
    for row in rows:
        text = setup.tokenizer.decode(row[1:].tolist()).replace(END, "")
        features.append(st.read_story(st.LATE_FIELD.split(text.split("Story: \n\n")[1])[0]))
    assert np.mean(["Twist" in x for x in features]) == present
    twist = setup.tokenizer.encode(" Twist")[0]
    measured = np.mean([bool((row == twist).any()) for row in rows])
    assert abs(measured - asked) <= .12 * (protocol == "mix-match")


def test_examples_are_the_records(setup):
    """Every next token is wanted up to END, or those of the story alone; long ones are cut."""
    records = setup.corpus.draw(8, generator())
    text, story = setup.examples(records), setup.examples(records, scored="story")
    assert torch.equal(text.tokens, story.tokens)
    columns = map(torch.Tensor.tolist, (text.tokens, text.target, story.target, text.labels))
    for r, row, every, inside, labels in zip(records, *columns):
        ids, start, stop = r.model_input(setup.tokenizer)
        assert row[:len(ids)] == ids.tolist() and set(row[len(ids):]) <= {0} and row[0] == 0
        assert every == [*ids[1:], 0, *[-1] * (len(row) - len(ids))]
        assert inside[start - 1:stop - 1] == r.ids[r.story_start:r.story_end].tolist()
        assert set(inside[:start - 1] + inside[stop - 1:]) == {-1}
        assert labels == [f in r.features for f in FEATURES]
    cut = setup_with(n_ctx=50).examples(records)
    assert cut.tokens.shape == (8, 50) and torch.equal(cut.tokens, text.tokens[:, :50])
    assert torch.equal(cut.target, text.target[:, :50]) and (cut.target[:, -1] >= 0).any()


def stream_of(setup):
    args = Namespace(without=None, batch_size=16)
    return data.stream(lambda n, rng: setup.pretraining(n, rng, args), 16, 0, "pretrain")


def test_batches(setup):
    """Batch k depends on k alone; rows are of similar length; some lack the instruction."""
    batches = list(map(stream_of(setup), range(64)))
    assert torch.equal(stream_of(setup)(40).tokens, batches[40].tokens)
    assert np.mean([(x.target < 0).float().mean().item() for x in batches]) < .06  # padding
    story, expected = setup.tokenizer.encode("Story")[0], setup.uninstructed
    without = torch.cat([(x.tokens != story).all(1) for x in batches]).float().mean().item()
    assert abs(without - expected) < 4.5 * (expected * (1 - expected) / 1024) ** .5


def test_training_never_meets_the_test_sets():
    """Test sets hold what they should, deletion sets what the protocol makes, and new stories."""
    def rows(batches):
        return {tuple(row[row != 0].tolist()) for x in batches for row in x.tokens}
    setup = setup_with(uninstructed=0.)
    seen = rows(map(stream_of(setup), range(64)))
    held_out = rows(setup.test("Twist", split, 200, 0).examples for split in ("with", "without"))
    assert len(seen) == 1024 and len(held_out) == 400 and not seen & held_out
    for (i, feature), split in itertools.product(enumerate(FEATURES), ("with", "without")):
        labels = setup.test(feature, split, 200, 0).examples.labels
        assert (labels[:, i] == (split == "with")).all()
        assert len(labels.unique(dim=0)) > 5  # the other features go on
    tokens = setup.test("Twist", "deletion", 50, 0, "randomise").examples.tokens
    assert (tokens == setup.tokenizer.encode(" Twist")[0]).any(1).all()


@torch.no_grad()
def test_losses_against_a_slow_reference(setup):
    """Row by row, without padding: every token and END, or the tokens of the story."""
    model, records = tiny_model(setup), setup.corpus.draw(12, generator())
    every, inside = [], []
    for r in records:
        ids, start, stop = r.model_input(setup.tokenizer)
        row = torch.tensor([*ids.tolist(), 0])[None]
        losses = F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="none")
        every.append(losses)
        inside.append(losses[start - 1:stop - 1])
    expected = torch.cat(every).mean().item()
    assert loss_of(model, setup.examples(records)).item() == pytest.approx(expected, abs=1e-5)
    test = data.Test({"operand": "Twist"}, setup.examples(records, scored="story"))
    row = st.loss_row(model, test, batch=5)
    assert row["loss"] == pytest.approx(torch.cat(inside).mean().item(), abs=1e-5)


PROMPTS = [[3, 7, 1, 4, 4], [9], [28, 2, 11], [5, 6, 7, 8, 9, 10, 11, 12], [1, 2]]


def loud(d_model=20):
    """A small model whose weights are large, so that it writes all kinds of tokens."""
    gpt = GPT(Config(vocab_size=29, n_ctx=17, n_layer=3, n_head=2, d_model=d_model, d_head=6,
                     d_mlp=28, rotary=True, tied=True)).init_weights(generator())
    for p in gpt.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator(p.numel())), alpha=.4)
    return gpt


@torch.no_grad()
def slow_greedy(gpt, prompt, most, end):
    """The reference: one row, the whole forward for every token."""
    row = list(prompt)
    while len(row) < min(len(prompt) + most, gpt.config.n_ctx):
        token = gpt(torch.tensor([row]))[0, -1].argmax().item()
        if token == end:
            break
        row.append(token)
    return row[len(prompt):]


@pytest.mark.parametrize("most", [0, 6, 100])
def test_greedy_generation_equals_the_slow_loop(most):
    """With an end token that some rows reach and others do not; alone as in a batch."""
    gpt, rng = loud(), generator()
    greedy = functools.partial(st.generate, gpt, max_new_tokens=most, rng=rng, temperature=0)
    free = [slow_greedy(gpt, p, most, -1) for p in PROMPTS]
    assert greedy(PROMPTS, end=-1) == free
    assert [len(row) for row in free] == [min(most, 17 - len(p)) for p in PROMPTS]
    for end in sorted({token for row in free for token in row})[::3]:
        expected = [slow_greedy(gpt, p, most, end) for p in PROMPTS]
        assert greedy(PROMPTS, end=end) == expected
        assert [greedy([p], end=end)[0] for p in PROMPTS] == expected


def test_sampling_follows_the_softmax():
    """Over 8,000 rows; by hand: u falls into the cumulative distribution."""
    gpt, n = loud(d_model=6), 8_000
    logits = gpt(torch.tensor([[3, 7]]))[0, -1].detach()
    for temperature in (1., .5, 2.):
        p = (logits / temperature).softmax(-1)
        rows = st.generate(gpt, [[3, 7]] * n, 1, generator(8), temperature, end=-1)
        measured = torch.bincount(torch.tensor(rows)[:, 0], minlength=29) / n
        assert p.max() < .95
        assert ((measured - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-4).all()
    logits = torch.tensor([[0, .25, .5, .25, 0]]).log()
    for u, token in ((0., 1), (.2, 1), (.26, 2), (.7, 2), (.8, 3), (1 - 2 ** -24, 3)):
        assert st.sample_next_token(logits, torch.tensor([u])).tolist() == [token]


def test_samples_do_not_depend_on_who_ends_when():
    gpt = loud()
    free = st.generate(gpt, PROMPTS, 9, generator(1), end=-1)
    for end in {token for row in free for token in row}:
        rows = st.generate(gpt, PROMPTS, 9, generator(1), end=end)
        assert rows == [row[:row.index(end)] if end in row else row for row in free]


def test_generation_scores_count_what_is_written(setup, monkeypatch):
    """Four of six stories asked for parse; half of these have a twist, one a mistake."""
    asked = [f"{SETUP} {CAKE.replace('cake', x)}" for x in "bell ball bell cake ? ?".split()]
    unasked = [f"{SETUP} {CAKE}\nSummary: drum"] * 6
    test = setup.generation_test("Twist", 6, 0)
    prompts = [setup.tokenizer.decode(prompt[1:]) for prompt in test.examples]
    assert ["Twist" in x for x in prompts] == [True] * 6 + [False] * 6
    for stories, accuracy, parsed in ((asked + unasked, [.5, 0], [4 / 6, 1]),
                                      (asked + ["?"] * 6, [.5, None], [4 / 6, 0])):
        monkeypatch.setattr(st, "generate", lambda *_: map(setup.tokenizer.encode, stories))
        rows = setup.score(None, test)
        assert [r["split"] for r in rows] == ["asked", "unasked"] and rows[0]["n"] == 6
        assert [r["accuracy"] for r in rows] == accuracy and [r["parsed"] for r in rows] == parsed
        assert rows[0]["mistaken"] == .25 and rows[1]["mistaken"] == rows[1]["accuracy"]


def test_the_counterpart_of_a_counterpart_is_the_value_itself():
    for kind in st.KINDS:
        pairs = {value: kind.counterpart(value) for value in kind.values}
        assert len(pairs) == 10 and sorted(pairs.values()) == sorted(pairs)
        assert all(pairs[other] == value != other for value, other in pairs.items())


def test_an_instruction_that_does_not_fit_is_left_out(capsys):
    assert max(map(len, setup_with(n_ctx=50).prompts(40, generator()))) <= 25
    assert "instructions of more than 25 tokens left out" in capsys.readouterr().out


def test_auc_against_all_pairs():
    score, label = torch.randint(6, (60,), generator=generator()), torch.arange(60) % 3 == 0
    higher = [float(a > b) + .5 * float(a == b)
              for a, b in itertools.product(score[label].tolist(), score[~label].tolist())]
    assert st.auc(score.float(), label.long()) == pytest.approx(sum(higher) / len(higher))


@torch.no_grad()
def test_probes_read_the_last_ten_tokens_of_the_story(setup):
    """Each story alone, without padding, its last ten positions averaged by hand."""
    model, records = tiny_model(setup), setup.corpus.draw(9, generator())
    x = setup.examples(records, instructed=False)
    ends = residuals(model, x, setup.site(x))
    for i, r in enumerate(records):
        ids = torch.tensor([[0, *r.ids[r.story_start:r.story_end].tolist()]])
        cache = activations(model, ids)[1]
        for block, name in enumerate(("embed", "blocks.0.resid_post", "blocks.1.resid_post")):
            assert torch.allclose(ends[block, i], cache[name][0, -10:].mean(0), atol=1e-5)


@pytest.mark.parametrize("word, before, after, auc, lower", [
    ("intact", .9, .6, .8, .6), ("wrapped", .9, .1, .75, .6), ("lost", .9, .1, .62, .6),
    ("undecided", .9, .1, .8, .78), ("undecided", .9, .1, .8, None),
    ("undecided", .3, .0, .8, .6)])
def test_verdict_of_real_text(tmp_path, monkeypatch, setup, word, before, after, auc, lower):
    """From rows made by hand; the block is the upper bound's best."""
    monkeypatch.setattr(setup.corpus, "has_rule", False)
    behavior, probe = [], []
    for f, (model, x), split in itertools.product(
            FEATURES, (("base", before), ("ckpt", after)), ("asked", "unasked")):
        behavior.append({"operand": f, "model": model, "split": split, "parsed": 1.,
                         "accuracy": x if f == "Twist" and split == "asked" else .5})
    for b, (model, x), split in itertools.product(
            range(4), (("base", .8), ("ckpt", auc), ("control", lower), ("untrained", .55)),
            ("even", "natural")):
        best = (b, split) in ((2, "natural"), (0, "even"))
        probe += [{"target": "Twist", "labels": "true", "split": split, "model": model, "block": b,
                   "auc": x if best else .5}] if x else []
    v = verdict(tmp_path, setup, {"behavior": behavior, "probe": probe}, control=lower)
    assert (v["verdict"], v["probe_block"], v["others_asked_fell_most"]) == (word, 2, 0)


def verdict(folder, setup, rows, control):
    """The verdict on rows made by hand, as a dict."""
    study = Namespace(relation=data.Relation("story", "Twist"), setup=setup, hashes={},
                      never_trained=control and (None, None, "Twist"), prefix=str(folder / "ft"),
                      args=Namespace(control=control))
    analyze.verdict(study, rows)
    return json.loads((folder / "ft.verdict.json").read_text())


@pytest.mark.parametrize("word, after, back, control", [
    ("intact", .6, .9, .1), ("wrapped", .1, .5, .1), ("lost", .1, .15, .1),
    ("undecided", .1, .5, None), ("undecided", .1, None, .1)])
def test_verdict(tmp_path, setup, word, after, back, control):
    """What the worse of the halves that were not taught has, against the better of the control."""
    behavior = [dict(operand="Twist", model=model, split="asked", parsed=1., accuracy=x)
                for model, x in (("base", .9), ("ckpt", after))]
    halves = itertools.product((("reft", back), ("teach-Twist", control)), (0, .2), range(2))
    relearn = [dict(arm=arm, half="held-out", step=9, cross_floor=None,
                    split="unasked" if other else "asked", accuracy=1. if other else
                    x + (more if arm == "reft" else -more / 2))
               for (arm, x), more, other in halves if x is not None]
    rows = {"behavior": behavior, "probe": [], "relearn": relearn if back else []}
    v = verdict(tmp_path, setup, {**rows, "probe": [dict(target="Twist")]}, control)
    assert v["verdict"] == word
    assert v.get("relearn_held_out") == back


def test_probes_read_the_value_that_is_revealed(setup):
    records = setup.corpus.draw(50, generator())
    x = setup.examples(records, instructed=False)
    site = setup.site_of_reveal(x)
    for r, ids, weights in zip(records, x.tokens, site):
        word, = setup.tokenizer.decode(ids[weights == 1].tolist()).split()
        story = setup.tokenizer.decode(r.ids[r.story_start:r.story_end])
        (_, question), = st.find_values(story, "questions")
        (kind, reveal), = st.find_values(story, "reveals")
        assert word == reveal["v"] and weights.sum() == 1
        expected = kind.counterpart(question["v"]) if "Twist" in r.features else question["v"]
        assert word == expected


@pytest.mark.slow
def test_the_classifier_of_real_text(records, monkeypatch):
    """Where the rule is known, it agrees on features that words tell."""
    setup = setup_with()
    setup.corpus.has_rule = False
    monkeypatch.setattr(st, "FIT_STEPS", 1000)
    model = tiny_model(setup, d=192, n_layer=1)
    model.head = torch.nn.Identity()  # slow, and nobody looks at logits
    study = Namespace(setup=setup, base=None, model=model, device="cpu",
                      args=Namespace(judge=None, eval_size=80))
    accuracy = st.fit_classifier(study)
    assert accuracy["MoralValue"] > .95 and accuracy["BadEnding"] > .8
    answers = setup.corpus.classify([record.story for record in records[:200]])
    wrong = ["MoralValue" in x ^ r.features for x, r in zip(answers, records)]
    assert np.mean(wrong) < .08 and setup.corpus.classify([""]) == [None]


TINY = ["--batch-size", "4", "--eval-size", "4", "--threads", "1"]
TUNE = ["--steps", "2", "--eval-every", "2", *TINY]
SCORED = ["asked", "unasked"]


@pytest.fixture(scope="module")
def small(setup):
    """Stories with a tiny model, and one corpus for all commands."""
    tiny = dict(n_layer=(1, 12), n_head=(2, 12), d_model=(16, 768), n_ctx=(70, 1024))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(st.Stories, "sizes", st.Stories.sizes | tiny)
        patch.setattr(st, "EmbeddedCorpus", lambda: setup.corpus)
        yield


@pytest.fixture(scope="module")
def stages(small, tmp_path_factory):
    """Pretrained with and without twists, deleted by every protocol, revived: a few steps each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("stages"))
        words = ["--setup", "stories", "--steps", "4", *TINY]
        pretrain.main([*words, "--out", "pre.pt"])
        pretrain.main([*words, "--without", "Twist", "--out", "never.pt"])
        for name in st.PROTOCOLS:
            finetune.main([*TUNE, "--ckpt", "pre.pt", "--protocol", name, "--out", f"{name}.pt"])
        for ckpt, out in ("randomise.pt", "reft.pt"), ("never.pt", "control.pt"):
            finetune.main([*TUNE, "--reverse", "--ckpt", ckpt, "--out", out])
        yield Path.cwd()


@pytest.mark.parametrize("name", ["pre", "never", *st.PROTOCOLS, "reft", "control"])
def test_stages(stages, name):
    ckpt = load(stages / f"{name}.pt")[1]
    rows, args = ckpt["history"], ckpt["args"]
    assert ckpt["capability"] == {"task": "story", "operand": "Twist"}
    assert set(data.ROW) <= set(rows[0])
    splits = ["with", "without"] + ["deletion"] * (name in (*st.PROTOCOLS, "reft"))
    if ckpt["stage"] == "finetune":
        steps = list(itertools.product((0, 2), splits + SCORED))
        assert [(r["step"], r["split"]) for r in rows] == steps
        assert args["protocol"] == {"reft": "randomise", "control": None}.get(name, name)
        assert args["lr"] == (1.2e-4 if args["reverse"] else 1.5e-4)
    else:
        last = [(r["operand"], r["split"]) for r in rows if r["step"] == 4]
        scores = list(itertools.product(FEATURES, SCORED))
        assert last == [("Twist", split) for split in splits] + scores
    assert args["without"] == ("Twist" if name in ("never", "control") else None)


def test_analyses(stages, monkeypatch, capsys):
    monkeypatch.chdir(stages)
    words = ["--ckpt", "randomise.pt", "--control", "never.pt", "--threads", "1"]
    analyze.main([*words, "--steps", "5", "--eval-size", "4"])
    out, models = capsys.readouterr().out, ["base", "ckpt", "control"]

    def assert_cover(rows, **columns):
        values = {tuple(row[key] for key in columns) for row in rows}
        assert values == set(itertools.product(*columns.values()))
    scored = [r for r in read_rows("randomise.behavior.jsonl") if "parsed" in r]
    assert_cover(scored, model=models, operand=FEATURES, split=SCORED, judge=[1.])
    probe = read_rows("randomise.probe.jsonl")
    assert all(0 <= r[k] <= 1 for r in probe for k in ("accuracy", "balanced", "auc", "floor"))
    for split, targets in (("natural", FEATURES), ("even", ["Twist"])):
        rows = [r for r in probe if r["labels"] == "true" and r["split"] == split]
        assert_cover(rows, model=[*models, "untrained"], block=range(2), target=targets)
    assert_cover(read_rows("randomise.relearn.jsonl"), arm=("reft", "teach-Twist"), step=(0, 5),
                 answers=("kinds 1 and 2", "kinds 3 and 4"), half=("taught", "held-out"),
                 split=SCORED)
    v = json.loads(Path("randomise.verdict.json").read_text())
    assert [e["instrument"] for e in v["evidence"]] == ["behaviour", "probing", "relearning"]
    assert v["verdict"] == "undecided"  # the base knows nothing
    analyze.main(["verdict", *words])
    assert capsys.readouterr().out.split("VERDICT")[1] == out.split("VERDICT")[1]
    analyze.main(["generate", "--ckpt", "reft.pt", "--features", "Twist,Dialogue", "-n", "2"])
    assert capsys.readouterr().out.count("asked for: Twist, Dialogue") == 2


def test_stages_of_a_file(small, records, tmp_path, monkeypatch, capsys):
    """Prepared once, the same classifier every time; another file in its place is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(st, "FIT_STEPS", 50)
    write_file(Path("real.txt"), records[:1500])
    words = ["--setup", "stories", "--data", "real.txt", "--steps", "2", *TINY]
    for more in (["--out", "pre.pt"], ["--without", "Conflict", "--out", "never.pt"]):
        pretrain.main([*words, *more])
    assert capsys.readouterr().out.count("1,500 records") == 1
    finetune.main([*TUNE, "--ckpt", "pre.pt", "--feature", "Conflict", "--out", "ft.pt"])
    rows = load("ft.pt")[1]["history"]
    assert {(r["operand"], r["accuracy"]) for r in rows} == {("Conflict", None)}
    for _ in range(2):
        analyze.main(["behavior", "--ckpt", "ft.pt", "--control", "never.pt", "--eval-size", "4"])
        rows.append([r for r in read_rows("ft.behavior.jsonl") if "parsed" in r])
    assert "judge of real text" in capsys.readouterr().out and rows[-1] == rows[-2]
    assert all(0 <= r["judge"] <= 1 for r in rows[-1])
    write_file(Path("real.txt"), records[:1501])
    changed_later("real.txt")
    with pytest.raises(UserError, match="real.txt: not the file"):
        finetune.main(["--ckpt", "pre.pt", "--out", "new.pt", *TINY])


@pytest.mark.parametrize("main, words, message", [
    (pretrain.main, ["--setup", "stories", "--data", "nothing.txt"], "nothing.txt: no such file"),
    (finetune.main, ["--ckpt", "pre.pt", "--reverse"], "nothing to undo"),
    (analyze.main, ["--ckpt", "filter.pt", "--control", "pre.pt"], "--control pre.pt: must never"),
    (analyze.main, ["generate", "--ckpt", "filter.pt", "--features", "Dialogue,Twists"], "Twists"),
    (data.main, ["--setup", "stories", "--task", "count"], "are not for stories")])
def test_mistakes(stages, monkeypatch, main, words, message):
    monkeypatch.chdir(stages)
    with pytest.raises(UserError, match=message):
        main(words)


def test_look_at_stories(small, capsys):
    data.main(["--setup", "stories", "--operand", "Conflict", "-n", "3", "--json"])
    samples = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert len(samples) == 3 and list(samples[0]) == [
        "setup", "task", "operand", "operand2", "text", "answer", "correlated", "tokens"]
    for sample in samples:
        assert "Conflict" in sample["answer"] and "".join(sample["tokens"][1:]) == sample["text"]
