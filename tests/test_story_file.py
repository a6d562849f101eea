"""
What reading the real corpus promises: every oddity of the format, text that comes back to the
letter, a preparation that can be killed at any moment, flat memory, and draws that keep to their
filter and their part of the file.
"""
import collections
import errno
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
from data import (END, FEATURES, Record, StoryFile, Tokenizer, encode_record, features_line,
                  parse_records, prepare, record_text)

ROOT = os.path.dirname(os.path.abspath(data.__file__))
FULL, NONE = frozenset(FEATURES), frozenset()
TWIST, BOTH = frozenset({"Twist"}), frozenset({"Twist", "Conflict"})


class Stop(Exception):
    """What a signal does to a real run."""


# ---------------------------------------------------------------- references


def slow_records(text):
    """The records of a text, field by field: [(features, text without Features, story)]."""
    records, lines = [], []
    for line in text.replace("\r\n", "\n").split("\n"):
        if line.strip() == END:
            records.append(lines)
            lines = []
        else:
            lines.append(line)
    out = []
    for lines in records:
        while lines and lines[0] == "":
            lines.pop(0)
        fields = [["", ""]]
        for line in lines:
            in_story = "Story" in [name for name, _ in fields]
            names = ["Summary", "Random sentence"]
            names += ["Features", "Words", "Story"] if not in_story else []
            name = line.split(":")[0] if ":" in line else None
            if name in names or fields[-1][0] == "Features" and not line.strip():
                fields.append([name if name in names else "", ""])
            fields[-1][1] += line + "\n"
        story = "".join(text for name, text in fields if name == "Story")[len("Story:"):].strip()
        lines = "".join(t[len("Features:"):] for name, t in fields if name == "Features")
        features = {x.strip() for x in re.findall(r"[^,\n]+", lines)} & FULL
        if story:
            text = "".join(t for name, t in fields if name != "Features").rstrip()
            out.append((features, text, story))
    return out


def random_record(r):
    """A Record like those of the file, from a random.Random."""
    words = ("the oak a fox was red. big! ran \"Hi,\" said Tim and saw it's old café "
             "\U0001f98a “no” â€œso").split(" ")
    words.append(f"w{r.randrange(3000)}")

    def sentence(n):
        return " ".join(r.choices(words, k=n))
    features = frozenset(name for name in FEATURES if r.random() < .3)
    names = [x for x in ("Words", "Summary", "Random sentence") if r.random() < .5]
    lines = [f"{name}: {sentence(3)}\n" for name in names]
    at = r.randint(0, len(lines)) if features else 0
    story = "\n\n".join(sentence(r.randint(5, 25)) for _ in range(r.randint(1, 4)))
    return Record("".join(lines[:at]), features, "".join(lines[at:]) + "Story: \n\n", story,
                  f"\n\nSummary: {sentence(4)}" if r.random() < .2 else "")


def write_file(path, n, seed=0, size=0):
    """A file of n records, or of the same 2,000 up to a size in bytes. Returns its path, a str."""
    r = random.Random(seed)
    n = n if not size else 2000
    block = "".join(record_text(random_record(r)) + f"\n{END}\n" for _ in range(n)).encode()
    with open(path, "wb") as f:
        for _ in range(max(1, size // len(block))):
            f.write(block)
    return str(path)


def contents(path):
    """What prepare() wrote for a path: {name: bytes}."""
    folder = f"{path}.unwrap"
    names = [x for x in os.listdir(folder) if re.fullmatch(r"\d{5}\.pt", x)]
    return {name: open(os.path.join(folder, name), "rb").read() for name in names}


def stop_at(monkeypatch, n, act=None):
    """Let check_stop() raise Stop, or do `act`, at its n-th call. Returns the list of its calls."""
    calls = []

    def check_stop():
        calls.append(0)
        if len(calls) > n:
            act() if act else None
            raise Stop
    monkeypatch.setattr(data, "check_stop", check_stop)
    return calls


def in_children(n, act):
    """Call act() in n processes at once. Returns their exit codes."""
    children = [multiprocessing.get_context("fork").Process(target=act) for _ in range(n)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


# ---------------------------------------------------------------- records

STORY = "Story: \n\n"
FIELDS = "Words: oak\nSummary: Fox.\nRandom sentence: It.\n"
CASES = {  # name: (the text before END, the Record)
    "all fields": (f"Features: Twist, Dialogue\n{FIELDS}{STORY}A.\n\nB.\n",
                   Record("", TWIST | {"Dialogue"}, FIELDS + STORY, "A.\n\nB.", "")),
    "another order": (
        "Summary: A fox.\nWords: oak\nFeatures: Conflict\nRandom sentence: It.\nStory: \nA.\n",
        Record("Summary: A fox.\nWords: oak\n", BOTH - TWIST, "Random sentence: It.\nStory: \n",
               "A.", "")),
    "order of features": (f"Features: Conflict, Twist\n{STORY}A.\n",
                          Record("", BOTH, STORY, "A.", "")),
    "no features": (f"Words: oak\n{STORY}A.\n", Record("", NONE, f"Words: oak\n{STORY}", "A.", "")),
    "the story alone": ("Story:\n\n\nA.\n", Record("", NONE, "Story:\n\n\n", "A.", "")),
    "summary after the story": (f"Features: Twist\n{STORY}A.\n\nB. \n\nSummary: S.\nmore\n",
                                Record("", TWIST, STORY, "A.\n\nB. ", "\n\nSummary: S.\nmore")),
    "two late fields": (f"{STORY}A.\nSummary: S.\nRandom sentence: R.\n",
                        Record("", NONE, STORY, "A.", "\nSummary: S.\nRandom sentence: R.")),
    "field names in a story": (
        f"Words: oak\n{STORY}She read:\nFeatures: Twist\nWords: none\nStory: old\nSummary:",
        Record("", NONE, f"Words: oak\n{STORY}",
               "She read:\nFeatures: Twist\nWords: none\nStory: old", "\nSummary:")),
    "field names within a line": (
        f"{STORY}His Summary: short. Features: Twist\n",
        Record("", NONE, STORY, "His Summary: short. Features: Twist", "")),
    "story on the same line": ("Features: Twist\nStory: A fox.\nB.\n",
                               Record("", TWIST, "Story:", " A fox.\nB.", "")),
    "story on the same line, no space": ("Story:A.\n", Record("", NONE, "Story:", "A.", "")),
    "indented story": (f"{STORY}  A.\n", Record("", NONE, STORY, "  A.", "")),
    "field over two lines": (
        f"Summary: one\ntwo\n\nFeatures: Twist,\nDialogue\n\nWords: oak\n{STORY}A.\n",
        Record("Summary: one\ntwo\n\n", TWIST | {"Dialogue"}, f"\nWords: oak\n{STORY}", "A.", "")),
    "two feature lines": (f"Features: Twist\nWords: a\nFeatures: Conflict\n{STORY}A.\n",
                          Record("", BOTH, f"Words: a\n{STORY}", "A.", "")),
    "unknown feature": (f"Words: a\nFeatures: Rhyme, Twist, twist\n{STORY}A.\n",
                        Record("Words: a\n", TWIST, STORY, "A.", "")),
    "empty features": (f"Words: a\nFeatures: \n{STORY}A.\n",
                       Record("Words: a\n", NONE, STORY, "A.", "")),
    "crlf": (
        "Features: Twist\r\nWords: a\r\nStory: \r\n\r\nA.\r\n\r\nB.\r\nSummary: S.\r\n",
        Record("", TWIST, f"Words: a\n{STORY}", "A.\n\nB.", "\nSummary: S.")),
    "mojibake and utf-8": (
        f"{STORY}â€œCafé,â€\x9d 你好 \U0001f98a\x00\t!\n",
        Record("", NONE, STORY, "â€œCafé,â€\x9d 你好 \U0001f98a\x00\t!", "")),
    "space around": (f"\n\n{STORY}A. \n \n\n", Record("", NONE, STORY, "A.", "")),
    "end within a line": (f"{STORY}A {END} B.\n{END}.\n",
                          Record("", NONE, STORY, f"A {END} B.\n{END}.", "")),
}


def lines_of(text):
    """The lines of a text as an open file gives them: splitlines() would also split at \\x85."""
    return re.findall(r".*\n|.+", text)


@pytest.mark.parametrize("name", CASES)
def test_records_by_hand(name):
    text, record = CASES[name]
    skipped = collections.Counter()
    assert list(parse_records(lines_of(f"{text}\n{END}\n"), skipped)) == [record]
    assert +skipped == ({"unknown feature": 2} if name == "unknown feature" else {})
    # now canonical: it comes back to the letter
    again, = parse_records(lines_of(f"{record_text(record)}\n{END}"), skipped)
    assert record_text(again) == record_text(record)
    assert again == record or name == "empty features"


@pytest.mark.parametrize("text, skipped", [
    (f"Words: oak\n{END}\n", {"no story": 1}), (f"Story: \n\n \n{END}\n", {"no story": 1}),
    (f"Story:\n\nSummary: late\n{END}\n", {"no story": 1}), (f"{END}\n{END}\n", {"no story": 2}),
    ("Story: \n\nA.\n", {"truncated": 1}), (f"A. {END}\n", {"truncated": 1}), (" \n\n", {}),
    ("", {}),
    ("Story:\n" + "a b \n" * 300000 + f"{END}\n", {"too long": 1}),
    ("Story:\n" + "a b \n" * 300000, {"truncated": 1})])
def test_what_is_left_out_is_counted(text, skipped):
    counts, good = collections.Counter(), f"Story: \n\nA.\n{END}\n"
    records = list(parse_records(lines_of(good + text), counts))
    assert records == [Record("", NONE, "Story: \n\n", "A.", "")] and +counts == skipped


def test_features_line():
    assert features_line(NONE) == "" and features_line(FULL).count(", ") == 5
    assert features_line({"Conflict", "Twist"}) == "Features: Twist, Conflict\n"


def test_any_mix_of_lines_is_read_as_described_and_encoded_in_pieces():
    """Against the slow reader; encoding in pieces is encoding the whole."""
    r, records = random.Random(1), []
    pool = ["Features: Twist, Conflict", "Features:Dialogue ,MoralValue,", "Features:",
            "Words: oak, sit", "Summary: S: x.", "Random sentence: It.", "Story: ", "Story:",
            "Story: A fox ran.", "", "", " ", "  two  spaces ", "A fox, he said.", "Features",
            "features: Twist", " Features: Twist", "Twist,Nothing", "tab\there",
            "é â€™ \U0001f98a", "\u2028x\x85y"]
    for _ in range(3000):
        lines = [r.choice(pool) + r.choice(["\n", "\n", "\r\n"]) for _ in range(r.randrange(12))]
        text = "".join(lines) + END + "\n"
        parsed = list(parse_records(re.findall(r".*\n", text), collections.Counter()))
        plain = [record_text(x._replace(features=NONE)) for x in parsed]
        features, stories = [x.features for x in parsed], [x.story.strip() for x in parsed]
        assert list(zip(features, plain, stories)) == slow_records(text)
        for x in parsed:
            assert not x.before or x.before.endswith("\n")
            assert x.after.endswith(("Story:", "\n")) and x.story[-1] != "\n"
            assert not x.rest or x.rest[0] == "\n"
        records += parsed
    assert len(records) > 800 and len({x.features for x in records}) > 5
    tokenizer = Tokenizer.from_texts(map(record_text, records), 25)  # about half of the words
    for x in records:
        e, line = encode_record(x, tokenizer), tokenizer.encode(features_line(x.features))
        whole = [*e.ids[:e.features_at], *line, *e.ids[e.features_at:]]
        assert whole == tokenizer.encode(record_text(x)) and e.features == x.features
        assert tokenizer.decode(whole) == record_text(x) and e.ids.dtype == np.uint16
        assert tokenizer.decode(e.ids[:e.features_at]) == x.before
        assert tokenizer.decode(e.ids[e.story_at:e.story_end]) == x.story


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_by_hand():
    t = Tokenizer([" oak", ".", "\n", "The"])
    assert t.size == 261 and t.words == (" oak", ".", "\n", "The")
    assert t.encode("The oak.\n") == [260, 257, 258, 259]
    assert t.encode("The oaks!") == [260, *(1 + b for b in b" oaks!")]
    assert t.encode("é") == [1 + 0xc3, 1 + 0xa9] and t.encode("") == []
    assert t.decode([260, 257, 0, 1 + 0xc3, 258]) == f"The oak{END}\ufffd."
    assert t.decode(torch.tensor([260, 257])) == "The oak"
    assert t.decode(np.array([260, 257], np.uint16)) == "The oak"
    ids = t.encode(f"{END} {END}")  # END within a text is text
    assert 0 not in ids and t.decode(ids) == f"{END} {END}"


def test_most_frequent_words_with_ties_by_the_alphabet():
    texts = [*"bbacdcccc", "a"]
    assert Tokenizer.from_texts(texts, 3).words == ("c", "a", "b")
    assert Tokenizer.from_texts(reversed(texts)).words == ("c", "a", "b", "d")


def test_every_text_comes_back():
    r = random.Random(2)
    t = Tokenizer(["the", " the", " ", "\n", ".", " .", "é", " café", "\t", "你", "\x00"])
    alphabets = ["the caf\u00e9. \n\t", "".join(map(chr, range(256))),
                 " \n\t\r\x0b\x0c\x1c\x85\u2028\u3000\xa0",
                 "\U0001f98a\u200d\U0001f468e\u0301\ufeff\ufffd\uffff\U0010ffff_0aZ \x00", None]
    for i in range(3000):
        anything = (r.randrange(0x110000) for _ in range(40))
        letters = alphabets[i % 5] or [chr(c) for c in anything if not 0xd800 <= c < 0xe000]
        text = "".join(r.choices(letters, k=r.randrange(60)))
        ids = t.encode(text)
        assert t.decode(ids) == text and all(0 < i < t.size for i in ids)


# ---------------------------------------------------------------- preparation


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "SHARD", 60)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A file of 1,000 records, each found by its place, prepared in one go: (path, contents)."""
    path = write_file(tmp_path_factory.mktemp("plain") / "stories.txt", 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD", 60)
        source = prepare(path, 40)
    assert source["name"] == "stories.txt" and source["records"] == 1000
    assert len(source["sha256"]) == 64 and len(contents(path)) == 17
    return path, contents(path)


def place(source, path):
    """A copy of a file, of the same age: where a preparation can be tried again."""
    with open(source, "rb") as f, open(path, "wb") as g:
        g.write(f.read())
    os.utime(path, ns=(0, os.stat(source).st_mtime_ns))
    return str(path)


def test_a_hand_written_file(tmp_path, capsys):
    """Every case from above in one file, with invalid bytes and a last record cut short."""
    path = str(tmp_path / "odd.txt")
    with open(path, "wb") as f:
        for text, _ in CASES.values():
            f.write(f"{text}\n{END}\n".encode())
        f.write(b"Story: \n\nbad \xff\xe2\x80 bytes\n")
        f.write(f"{END}\nWords: none\n{END}\nFeatures: Twist\nStory: cut".encode())
    assert prepare(path)["records"] == len(CASES) + 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for count in ("21 records", "1 no story", "1 truncated", "2 unknown feature"):
        assert count in out
    source = StoryFile(path)
    want = [record for _, record in CASES.values()]
    want += [Record("", NONE, "Story: \n\n", "bad \ufffd\ufffd bytes", "")]
    assert len(source) == len(want)
    for i, record in enumerate(want):
        encoded, reference = source.record(i), encode_record(record, source.tokenizer)
        assert encoded.ids.tolist() == reference.ids.tolist() and encoded[1:] == reference[1:]


@pytest.mark.parametrize("shard", [1, 7, 10, 20, 21])
def test_a_file_of_whole_shards(tmp_path, monkeypatch, shard):
    """Records and counts do not depend on the shards; the last one may be full, or empty."""
    path = write_file(tmp_path / "x.txt", 20)
    with open(path, "a") as f:
        f.write(f"Words: none\n{END}\ncut")
    monkeypatch.setattr(data, "SHARD", shard)
    prepare(path)
    source, r = StoryFile(path), random.Random(0)
    assert len(source) == 20 and len(source.shards) == 20 // shard + 1
    for i in range(20):
        record = encode_record(random_record(r), source.tokenizer)
        assert source.record(i).ids.tolist() == record.ids.tolist()
        assert source.record(i)[1:] == record[1:]
    assert source.shards[-1]["about"]["totals"]["truncated"] == 1


def test_the_words_are_those_of_the_beginning(tmp_path, monkeypatch):
    path = str(tmp_path / "x.txt")
    with open(path, "w") as f:
        f.write(f"Story: \n\nearly early bird\n{END}\n" + f"Story: \n\nlate late late\n{END}\n")
    monkeypatch.setattr(data, "WORDS_FROM", 30)
    prepare(path)
    assert {"Story", " early", " bird"} < set(StoryFile(path).tokenizer.words)
    assert " late" not in StoryFile(path).tokenizer.words


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(plain, tmp_path, monkeypatch):
    source, whole = plain
    lines = sum(1 for _ in open(source, "rb"))
    r = random.Random(3)
    for i in range(6):
        path, stops = place(source, tmp_path / f"{i}.txt"), 0
        while True:
            stop_at(monkeypatch, r.randrange(lines * 3 // 2 if stops < 3 else 3 * lines))
            try:
                prepare(path, 40)
                break
            except Stop:
                stops += 1
        assert stops and contents(path) == whole


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_it_goes_on_to_the_same_bytes(plain, tmp_path, monkeypatch):
    """kill -9 while words are counted, and within a shard: it goes on at the last whole one."""
    source, whole = plain
    path = place(source, tmp_path / "stories.txt")
    lines = sum(1 for _ in open(path, "rb"))
    for at in (lines // 2, lines + lines // 2):
        stop_at(monkeypatch, at, kill)
        assert in_children(1, lambda: prepare(path, 40)) == [-signal.SIGKILL]
    n = len(contents(path))
    assert 0 < n < 17 and all(whole[name] == content for name, content in contents(path).items())
    with pytest.raises(ValueError, match="unfinished"):
        StoryFile(path)
    left = stop_at(monkeypatch, 2 * lines)
    prepare(path, 40)
    assert len(left) < lines * .7 and contents(path) == whole  # went on, did not start over


@pytest.mark.parametrize("when", ["replace", "fsync"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_killed_while_a_file_is_written(plain, tmp_path, monkeypatch, when, n):
    """kill -9 in front of the n-th os.replace or os.fsync of the process."""
    source, whole = plain
    path, calls, act = place(source, tmp_path / "stories.txt"), [], getattr(os, when)

    def killed(*args):
        calls.append(0)
        return act(*args) if len(calls) < n else kill()
    with monkeypatch.context() as patch:
        patch.setattr(os, when, killed)
        assert in_children(1, lambda: prepare(path, 40)) == [-signal.SIGKILL]
    assert all(whole[name] == content for name, content in contents(path).items())
    prepare(path, 40)
    assert contents(path) == whole


def test_finished_it_returns_at_once(plain, monkeypatch, capsys):
    path, whole = plain
    times = {name: os.stat(f"{path}.unwrap/{name}").st_mtime_ns for name in whole}
    stop_at(monkeypatch, 0)
    monkeypatch.setattr(data, "replace_file", read_only)
    assert prepare(path, 40)["records"] == 1000
    assert capsys.readouterr() == ("", "")
    assert times == {name: os.stat(f"{path}.unwrap/{name}").st_mtime_ns for name in whole}


def read_only(path, *_, **__):
    raise OSError(errno.EROFS, "Read-only file system", path)


def test_what_no_longer_fits_is_made_anew(plain, tmp_path, capsys, monkeypatch):
    source, whole = plain
    path = place(source, tmp_path / "stories.txt")
    folder = tmp_path / "stories.txt.unwrap"
    prepare(path, 40)
    (folder / "notes.md").write_text("mine")

    def again(message, words=40):
        capsys.readouterr()
        answer = prepare(path, words)
        assert capsys.readouterr().out.count(message) == 1
        return answer
    for change in ({"words": 30}, {}):
        again("shard 0 is damaged, or of another", **change)
    with monkeypatch.context() as patch:
        patch.setattr(data, "SHARD", 50)
        again("starting over")
    again("starting over")
    assert {name: contents(path)[name] for name in whole} == whole
    for k in (0, 3, 16):
        good = whole[f"{k:05}.pt"]
        for content in (b"", good[:-1], good[:100], b"null", b"{}", b"PK\3\4"):
            (folder / f"{k:05}.pt").write_bytes(content)
            again(f"shard {k} is damaged")
            assert {name: contents(path)[name] for name in whole} == whole
    with monkeypatch.context() as patch:
        patch.setattr(data, "FORMAT", data.FORMAT + 1)
        with pytest.raises(ValueError, match="prepares it"):
            StoryFile(path)
        again("shard 0 is damaged, or of another file or version")  # an older format
    again("starting over")
    (folder / "00003.pt").unlink()
    with pytest.raises(ValueError, match="damaged"):
        StoryFile(path)
    prepare(path, 40)
    assert {name: contents(path)[name] for name in whole} == whole
    with open(path, "ab") as f:
        f.write(f"Story: \n\nOne more.\n{END}\n".encode())
    assert again("starting over")["records"] == 1001
    write_file(path, 900, seed=9)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 5000)
        prepare(path, 40)
    assert prepare(path, 40)["records"] == 900
    capsys.readouterr()
    assert prepare(path, 40)["records"] == 900 and capsys.readouterr().out == ""
    fresh = place(path, tmp_path / "fresh.txt")
    prepare(fresh, 40)
    assert contents(path).items() >= contents(fresh).items()
    assert (folder / "notes.md").read_text() == "mine"


def test_a_file_that_grows_meanwhile(tmp_path, monkeypatch):
    path, calls = write_file(tmp_path / "x.txt", 300), []

    def grow():
        calls.append(0)
        if len(calls) == grow.at:
            with open(path, "a") as f:
                f.write(f"Story: \n\nA.\n{END}\n")
    monkeypatch.setattr(data, "check_stop", grow)
    lines = sum(1 for _ in open(path, "rb"))
    for grow.at, files in ((10, 0), (lines * 3 // 2, 2)):  # while words are counted; later
        calls.clear()
        with pytest.raises(ValueError, match="changed while it was read"):
            prepare(path)
        assert len(contents(path)) >= files  # whole shards of the older file
    assert prepare(path)["records"] == 302


def test_two_at_once(plain, tmp_path, capfd):
    """All end well, with the same bytes, whatever one finds of another, or of an older file."""
    path = place(plain[0], tmp_path / "stories.txt")
    for _ in range(5):
        assert in_children(3, lambda: prepare(path, 40)) == [0, 0, 0] and contents(path) == plain[1]
        os.remove(f"{path}.unwrap/00001.pt")
        assert in_children(2, lambda: prepare(path, 40)) == [0, 0] and contents(path) == plain[1]
        os.truncate(f"{path}.unwrap/00000.pt", 100)
    assert sorted(os.listdir(f"{path}.unwrap")) == sorted(plain[1])


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch):
    def message(path):
        with pytest.raises(ValueError) as error:
            prepare(str(path))
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)
    good, empty, wrong = (tmp_path / name for name in ("good.txt", "empty.txt", "wrong.txt"))
    assert "no such file" in message(good) and "is a directory" in message(tmp_path)
    empty.write_text("")
    assert "holds no record" in message(empty)
    wrong.write_text(f"Once upon a time.\n{END}\n" * 100)
    assert "holds no record" in message(wrong)
    wrong.write_bytes(bytes(3 * 2 ** 20))
    assert "holds no record" in message(wrong)
    write_file(good, 10)
    with pytest.raises(ValueError, match="--data prepares it"):
        StoryFile(good)
    (tmp_path / "good.txt.unwrap").write_text("in the way")
    assert "good.txt.unwrap: file exists" in message(good)
    os.remove(f"{good}.unwrap")
    for target in ("os.makedirs", "builtins.open"):
        with monkeypatch.context() as patch:
            patch.setattr(target, read_only)
            assert "read-only file system" in message(good)


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    peaks = []
    for size in (5, 50):
        path = write_file(tmp_path / f"{size}.txt", 0, size=size * 10 ** 6)
        script = f"import sys, resource; sys.path.insert(0, {ROOT!r}); import data; " \
                 f"data.SHARD = 2000; data.prepare({path!r}); " \
                 "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                             check=True)
        peaks.append(int(run.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 8, peaks  # MB; the tokens alone are 28 MB more


# ---------------------------------------------------------------- draws


def test_draws_keep_to_their_filter_and_their_part(plain):
    path, _ = plain
    source = StoryFile(path)
    everything = [source.record(i) for i in range(1000)]
    assert source.held_out == 10 and len(source) == 1000
    first = random_record(random.Random(0))._replace(features=NONE)
    assert source.tokenizer.decode(everything[0].ids) == record_text(first)
    where = collections.defaultdict(set)
    for i, e in enumerate(everything):
        where[e.ids.tobytes()].add(i)
    for feature, has in [(None, None), ("Twist", None), ("Twist", True), ("Twist", False),
                         ("Conflict", True)]:
        for held_out in (False, True):
            part = range(990, 1000) if held_out else range(990)
            fit = {i for i in part if has is None or (feature in everything[i].features) == has}
            records = source.draw(6000, generator(5), feature, has, held_out)
            seen = [where[e.ids.tobytes()] for e in records]
            assert all(len(x) == 1 for x in seen) and set().union(*seen) <= fit
            assert len(set().union(*seen)) > .95 * len(fit)  # 6 to 600 draws a record
            highest = max(collections.Counter(min(x) for x in seen).values())
            assert highest < 6000 / len(fit) + 6 * (6000 / len(fit)) ** .5
            again = source.draw(3, generator(5), feature, has, held_out)
            assert [e.ids.tolist() for e in again] == [e.ids.tolist() for e in records[:3]]
    e = source.draw(1, generator(0))[0]
    e.ids[:] = 0  # a copy
    assert e.ids.base is None and type(e.features_at) is int


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_a_draw_from_nothing(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(f"Features: Twist\nStory: \n\nA.\n{END}\n" * 2)
    prepare(str(path))
    source = StoryFile(path)
    assert source.held_out == 1 and len(source.draw(4, generator(0), "Twist", True)) == 4
    with pytest.raises(ValueError, match=": no held-out record without Twist$"):
        source.draw(1, generator(0), "Twist", False, held_out=True)
    with pytest.raises(ValueError, match=": no training record with Conflict$"):
        source.draw(1, generator(0), "Conflict", True)
    path.write_text(f"Story: \n\nA.\n{END}\n")
    prepare(str(path))
    with pytest.raises(ValueError, match=": no training record$"):
        StoryFile(path).draw(1, generator(0))
