"""
What reading the real corpus promises: every oddity of the format, text that comes back to the letter, a preparation
that can be killed at any moment, flat memory, and draws that keep to their filter and their part of the file.
"""
import collections
import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
from data import (END, FEATURES, Record, StoryFile, Tokenizer, encode_record, features_line, parse_records, prepare,
                  record_text)

ROOT = os.path.dirname(os.path.abspath(data.__file__))
OUTPUTS = ("tokens.u16", "index.bin", "vocab.json", "state.json")


class Stop(Exception):
    """What a signal does to a real run."""


# ---------------------------------------------------------------- references


def slow_records(text):
    """The records of a text, field by field as the format is described: [(mask, text without Features, story)]."""
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
            names = ["Summary", "Random sentence"] + (["Features", "Words", "Story"] if not in_story else [])
            name = line.split(":")[0] if ":" in line else None
            if name in names or fields[-1][0] == "Features" and not line.strip():
                fields.append([name if name in names else "", ""])
            fields[-1][1] += line + "\n"
        story = "".join(text for name, text in fields if name == "Story")[len("Story:"):].strip()
        asked = re.findall(r"[^,\n]+", "".join(t[len("Features:"):] for name, t in fields if name == "Features"))
        mask = sum(1 << i for i, name in enumerate(FEATURES) if name in [x.strip() for x in asked])
        if story:
            out.append((mask, "".join(t for name, t in fields if name != "Features").rstrip(), story))
    return out


def some_record(r):
    """A Record like those of the file, from a random.Random."""
    words = "the oak a fox was red. big! ran \"Hi,\" said Tim and saw it's old café \U0001f98a “no” â€œso".split(" ")
    words.append(f"w{r.randrange(3000)}")

    def sentence(n):
        return " ".join(r.choices(words, k=n))
    mask = sum((r.random() < .3) << i for i in range(6))
    lines = [f"{name}: {sentence(3)}\n" for name in ("Words", "Summary", "Random sentence") if r.random() < .5]
    at = r.randint(0, len(lines)) if mask else 0
    story = "\n\n".join(sentence(r.randint(5, 25)) for _ in range(r.randint(1, 4)))
    return Record("".join(lines[:at]), mask, "".join(lines[at:]) + "Story: \n\n", story,
                  f"\n\nSummary: {sentence(4)}" if r.random() < .2 else "")


def write_file(path, n, seed=0, size=0):
    """A file of n records, or of the same 2,000 over and over up to a size in bytes. Returns the path as a str."""
    r = random.Random(seed)
    block = "".join(record_text(some_record(r)) + f"\n{END}\n" for _ in range(n if not size else 2000)).encode()
    with open(path, "wb") as f:
        for _ in range(max(1, size // len(block))):
            f.write(block)
    return str(path)


def contents(path):
    """What prepare() wrote for a path, as bytes."""
    assert sorted(os.listdir(f"{path}.unwrap")) == sorted(OUTPUTS)
    return {name: open(os.path.join(f"{path}.unwrap", name), "rb").read() for name in OUTPUTS}


def stop_at(n, act=None):
    """A check_stop that raises Stop, or does what it is told, at its n-th call."""
    calls = iter(range(n))

    def check_stop():
        if next(calls, None) is None:
            act() if act else None
            raise Stop
    return check_stop


# ---------------------------------------------------------------- records

CASES = {  # name: (what the file holds before END, the Record)
    "all fields": ("Features: Twist, Dialogue\nWords: oak\nSummary: Fox.\nRandom sentence: It.\nStory: \n\nA.\n\nB.\n",
                   Record("", 3, "Words: oak\nSummary: Fox.\nRandom sentence: It.\nStory: \n\n", "A.\n\nB.", "")),
    "another order": ("Summary: A fox.\nWords: oak\nFeatures: Conflict\nRandom sentence: It.\nStory: \nA.\n",
                      Record("Summary: A fox.\nWords: oak\n", 32, "Random sentence: It.\nStory: \n", "A.", "")),
    "order of features": ("Features: Conflict, Twist\nStory: \n\nA.\n", Record("", 33, "Story: \n\n", "A.", "")),
    "no features": ("Words: oak\nStory: \n\nA.\n", Record("", 0, "Words: oak\nStory: \n\n", "A.", "")),
    "the story alone": ("Story:\n\n\nA.\n", Record("", 0, "Story:\n\n\n", "A.", "")),
    "summary after the story": ("Features: Twist\nStory: \n\nA.\n\nB. \n\nSummary: S.\nmore\n",
                                Record("", 1, "Story: \n\n", "A.\n\nB. ", "\n\nSummary: S.\nmore")),
    "two late fields": ("Story: \n\nA.\nSummary: S.\nRandom sentence: R.\n",
                        Record("", 0, "Story: \n\n", "A.", "\nSummary: S.\nRandom sentence: R.")),
    "field names in a story": ("Words: oak\nStory: \n\nShe read:\nFeatures: Twist\nWords: none\nStory: old\nSummary:",
                               Record("", 0, "Words: oak\nStory: \n\n",
                                      "She read:\nFeatures: Twist\nWords: none\nStory: old", "\nSummary:")),
    "field names within a line": ("Story: \n\nHis Summary: short. Features: Twist\n",
                                  Record("", 0, "Story: \n\n", "His Summary: short. Features: Twist", "")),
    "story on the same line": ("Features: Twist\nStory: A fox.\nB.\n", Record("", 1, "Story:", " A fox.\nB.", "")),
    "story on the same line, no space": ("Story:A.\n", Record("", 0, "Story:", "A.", "")),
    "indented story": ("Story: \n\n  A.\n", Record("", 0, "Story: \n\n", "  A.", "")),
    "field over two lines": ("Summary: one\ntwo\n\nFeatures: Twist,\nDialogue\n\nWords: oak\nStory: \n\nA.\n",
                             Record("Summary: one\ntwo\n\n", 3, "\nWords: oak\nStory: \n\n", "A.", "")),
    "two feature lines": ("Features: Twist\nWords: a\nFeatures: Conflict\nStory: \n\nA.\n",
                          Record("", 33, "Words: a\nStory: \n\n", "A.", "")),
    "unknown feature": ("Words: a\nFeatures: Rhyme, Twist, twist\nStory: \n\nA.\n",
                        Record("Words: a\n", 1, "Story: \n\n", "A.", "")),
    "empty features": ("Words: a\nFeatures: \nStory: \n\nA.\n", Record("Words: a\n", 0, "Story: \n\n", "A.", "")),
    "crlf": ("Features: Twist\r\nWords: a\r\nStory: \r\n\r\nA.\r\n\r\nB.\r\nSummary: S.\r\n",
             Record("", 1, "Words: a\nStory: \n\n", "A.\n\nB.", "\nSummary: S.")),
    "mojibake and utf-8": ("Story: \n\nâ€œCafé,â€\x9d 你好 \U0001f98a\x00\t!\n",
                           Record("", 0, "Story: \n\n", "â€œCafé,â€\x9d 你好 \U0001f98a\x00\t!", "")),
    "space around": ("\n\nStory: \n\nA. \n \n\n", Record("", 0, "Story: \n\n", "A.", "")),
    "end within a line": (f"Story: \n\nA {END} B.\n{END}.\n", Record("", 0, "Story: \n\n", f"A {END} B.\n{END}.", "")),
}


def lines_of(text):
    """The lines of a text as an open file gives them: splitlines() would also split at \\x85 and others."""
    return re.findall(r".*\n|.+", text)


@pytest.mark.parametrize("name", CASES)
def test_records_by_hand(name):
    text, record = CASES[name]
    skipped = {}
    assert list(parse_records(lines_of(f"{text}\n{END}\n"), skipped)) == [record]
    assert skipped == ({"unknown feature": 2} if name == "unknown feature" else {})
    again, = parse_records(lines_of(f"{record_text(record)}\n{END}"))  # now canonical: it comes back to the letter
    assert record_text(again) == record_text(record) and (again == record or name == "empty features")


@pytest.mark.parametrize("text, skipped", [
    (f"Words: oak\n{END}\n", {"no story": 1}), (f"Story: \n\n \n{END}\n", {"no story": 1}),
    (f"Story:\n\nSummary: late\n{END}\n", {"no story": 1}), (f"{END}\n{END}\n", {"no story": 2}), ("", {}),
    ("Story: \n\nA.\n", {"truncated": 1}), (f"A. {END}\n", {"truncated": 1}), (" \n\n", {}),
    ("Story:\n" + "a b \n" * 300000 + f"{END}\n", {"too long": 1}), ("Story:\n" + "a b \n" * 300000, {"truncated": 1})])
def test_what_is_left_out_is_counted(text, skipped):
    got = {}
    good = f"Story: \n\nA.\n{END}\n"
    assert list(parse_records(lines_of(good + text), got)) == [Record("", 0, "Story: \n\n", "A.", "")]
    assert got == skipped


def test_features_line():
    assert features_line(0) == "" and features_line(3) == "Features: Twist, Dialogue\n"
    assert features_line(33) == "Features: Twist, Conflict\n" and features_line(63).count(", ") == 5


def test_any_mix_of_lines_is_read_as_described_and_encoded_in_pieces():
    """Fields in any order, doubled or missing, against the slow reader; encoding in pieces is encoding the whole."""
    r, counts, records = random.Random(1), collections.Counter(), []
    pool = ["Features: Twist, Conflict", "Features:Dialogue ,MoralValue,", "Features:", "Words: oak, sit",
            "Summary: S: x.", "Random sentence: It.", "Story: ", "Story:", "Story: A fox ran.", "", "", " ",
            "  two  spaces ", "A fox, he said.", "Features", "features: Twist", " Features: Twist", "Twist,Nothing",
            "tab\there", "é â€™ \U0001f98a", "\u2028x\x85y"]
    for _ in range(3000):
        text = "".join(r.choice(pool) + r.choice(["\n", "\n", "\r\n"]) for _ in range(r.randrange(12))) + END + "\n"
        got = list(parse_records(re.findall(r".*\n", text)))
        assert [(x.mask, record_text(x._replace(mask=0)), x.story.strip()) for x in got] == slow_records(text), text
        for x in got:
            assert not x.before or x.before.endswith("\n")
            assert x.after.endswith(("Story:", "\n")) and x.story[-1] != "\n" and (not x.rest or x.rest[0] == "\n")
            counts.update(Tokenizer.pieces.findall(record_text(x)))
        records += got
    assert len(records) > 800 and len({x.mask for x in records}) > 5
    tokenizer = Tokenizer.from_counts(counts, 25)  # about half of the words
    for x in records:
        e, line = encode_record(x, tokenizer), tokenizer.encode(features_line(x.mask))
        whole = [*e.ids[:e.features_at], *line, *e.ids[e.features_at:]]
        assert whole == tokenizer.encode(record_text(x)) and tokenizer.decode(whole) == record_text(x)
        assert tokenizer.decode(e.ids[:e.features_at]) == x.before and e.ids.dtype == np.uint16 and e.mask == x.mask
        assert tokenizer.decode(e.ids[e.story_at:e.story_end]) == x.story


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_by_hand():
    t = Tokenizer([" oak", ".", "\n", "The"])
    assert t.size == 261 and t.words == (" oak", ".", "\n", "The")
    spelled = []
    assert t.encode("The oak.\n", spelled) == [260, 257, 258, 259] and not spelled
    assert t.encode("The oaks", spelled) == [260, *(1 + b for b in b" oaks")] and spelled == [" oaks"]
    assert t.encode("é") == [1 + 0xc3, 1 + 0xa9] and t.encode("") == []
    assert t.decode([260, 257, 0, 1 + 0xc3, 258]) == f"The oak{END}\ufffd."
    assert t.decode(torch.tensor([260, 257])) == t.decode(np.array([260, 257], np.uint16)) == "The oak"
    ids = t.encode(f"{END} {END}")  # END within a text is text
    assert 0 not in ids and t.decode(ids) == f"{END} {END}"


def test_most_frequent_words_with_ties_by_the_alphabet():
    counts = {"b": 2, "a": 2, "c": 5, "d": 1}
    assert Tokenizer.from_counts(counts, 3).words == ("c", "a", "b")
    assert Tokenizer.from_counts(dict(reversed(counts.items())), 9).words == ("c", "a", "b", "d")


def test_every_text_comes_back():
    r = random.Random(2)
    t = Tokenizer(["the", " the", " ", "\n", ".", " .", "é", " café", "\t", "你", "\x00"])
    alphabets = ["the caf\u00e9. \n\t", "".join(map(chr, range(256))), " \n\t\r\x0b\x0c\x1c\x85\u2028\u3000\xa0",
                 "\U0001f98a\u200d\U0001f468e\u0301\ufeff\ufffd\uffff\U0010ffff_0aZ \x00", None]
    for i in range(3000):
        anything = (r.randrange(0x110000) for _ in range(40))
        letters = alphabets[i % 5] or [chr(c) for c in anything if not 0xd800 <= c < 0xe000]
        text = "".join(r.choices(letters, k=r.randrange(60)))
        ids = t.encode(text)
        assert t.decode(ids) == text and all(0 < i < t.size for i in ids)


# ---------------------------------------------------------------- preparation


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A file of 1,000 records, each found by its place, prepared in one go: (path, contents)."""
    path = write_file(tmp_path_factory.mktemp("plain") / "stories.txt", 1000)
    told = prepare(path, 40, every=60)
    assert told["name"] == "stories.txt" and told["records"] == 1000 and len(told["sha256"]) == 64
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
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "21 records" in said and "100.00% of words whole; Twist 38.1%" in said
    assert said.endswith("left out: 1 no story, 1 truncated, 2 unknown feature\n")
    source = StoryFile(path)
    want = [record for _, record in CASES.values()] + [Record("", 0, "Story: \n\n", "bad \ufffd\ufffd bytes", "")]
    assert len(source) == len(want) and source.masks.tolist() == [record.mask for record in want]
    for i, record in enumerate(want):
        got, ref = source.record(i), encode_record(record, source.tokenizer)
        assert got.ids.tolist() == ref.ids.tolist() and got[1:] == ref[1:]


def test_the_words_are_those_of_the_beginning(tmp_path, monkeypatch):
    path = str(tmp_path / "x.txt")
    with open(path, "w") as f:
        f.write(f"Story: \n\nearly early bird\n{END}\n" + f"Story: \n\nlate late late\n{END}\n")
    monkeypatch.setattr(data, "WORDS_FROM", 30)
    prepare(path)
    assert {"Story", " early", " bird"} < set(StoryFile(path).tokenizer.words)
    assert " late" not in StoryFile(path).tokenizer.words
    assert json.load(open(f"{path}.unwrap/state.json"))["in_bytes"] == 3


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(plain, tmp_path):
    source, whole = plain
    lines = sum(1 for _ in open(source, "rb"))
    r = random.Random(3)
    for i in range(6):
        path, stops = place(source, tmp_path / f"{i}.txt"), 0
        while True:
            try:
                prepare(path, 40, stop_at(r.randrange(lines * 3 // 2 if stops < 3 else 3 * lines)), 60)
                break
            except Stop:
                stops += 1
        assert stops and contents(path) == whole


def test_killed_it_goes_on_to_the_same_bytes(plain, tmp_path):
    """kill -9 while counting words, and between two saves; the second time, what was not yet saved is lost."""
    source, whole = plain
    path = place(source, tmp_path / "stories.txt")
    lines = sum(1 for _ in open(path, "rb"))
    for at in (lines // 2, lines + lines // 2):
        child = multiprocessing.get_context("fork").Process(target=prepare, args=(
            path, 40, stop_at(at, lambda: os.kill(os.getpid(), signal.SIGKILL)), 60))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    state = json.load(open(f"{path}.unwrap/state.json"))
    assert 0 < state["records"] < 1000 and state["records"] % 60 == 0 and not state["finished"]
    with pytest.raises(ValueError, match="unfinished"):
        StoryFile(path)
    left = []
    prepare(path, 40, lambda: left.append(0), 60)
    assert len(left) < lines * .7 and contents(path) == whole  # went on, did not start over


def test_finished_it_returns_at_once(plain, monkeypatch, capsys):
    path, whole = plain
    times = {name: os.stat(f"{path}.unwrap/{name}").st_mtime_ns for name in OUTPUTS}

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(os, "makedirs", refuse)  # a finished one needs no right to write
    assert prepare(path, 40, stop_at(0))["records"] == 1000
    assert capsys.readouterr() == ("", "")
    assert times == {name: os.stat(f"{path}.unwrap/{name}").st_mtime_ns for name in OUTPUTS}


def test_what_no_longer_fits_is_made_anew(plain, tmp_path, capsys):
    source, whole = plain
    path = place(source, tmp_path / "stories.txt")
    prepare(path, 40)

    def again(why, words=40):
        capsys.readouterr()
        told = prepare(path, words)
        assert re.match(rf".*unwrap is {why}.*: starting over\n", capsys.readouterr().out)
        return told
    again("of another version or number of words", 30)
    again("of another version or number of words")
    assert contents(path) == whole
    os.truncate(f"{path}.unwrap/index.bin", 1000)
    again("damaged")
    os.remove(f"{path}.unwrap/vocab.json")
    again("damaged")
    for name, text in (("state.json", "{}"), ("state.json", "null"), ("vocab.json", "[")):
        with open(f"{path}.unwrap/{name}", "w") as f:
            f.write(text)
        again("damaged")
    assert contents(path) == whole
    with open(path, "ab") as f:
        f.write(f"Story: \n\nOne more.\n{END}\n".encode())
    assert again("of an older")["records"] == 1001
    write_file(path, 900, seed=9)
    with pytest.raises(Stop):
        prepare(path, 40, stop_at(5000), 60)
    capsys.readouterr()
    assert prepare(path, 40)["records"] == 900 and "starting over" not in capsys.readouterr().out
    fresh = place(path, tmp_path / "fresh.txt")
    prepare(fresh, 40)
    assert contents(path) == contents(fresh)


def test_a_file_that_grows_meanwhile(tmp_path):
    path = write_file(tmp_path / "x.txt", 300)

    def grow():
        with open(path, "a") as f:
            f.write(f"Story: \n\nA.\n{END}\n")
    with pytest.raises(ValueError, match="changed while it was read"):
        prepare(path, check_stop=grow)
    assert prepare(path)["records"] > 300


def test_two_at_once_prepare_once(plain, tmp_path, capsys):
    path = place(plain[0], tmp_path / "stories.txt")
    os.mkdir(f"{path}.unwrap")
    with open(f"{path}.unwrap/tokens.u16", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Stop):
            prepare(path, 40, stop_at(2))
    assert capsys.readouterr().out.count("another process: waiting") == 1
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=prepare, args=(path, 40, lambda: None, 60)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0] and contents(path) == plain[1]


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch):
    def told(path, **more):
        with pytest.raises(ValueError) as error:
            prepare(str(path), **more)
        assert "\n" not in str(error.value)
        return str(error.value)
    good, empty, wrong = (tmp_path / name for name in ("good.txt", "empty.txt", "wrong.txt"))
    assert "no such file" in told(good) and "not a file" in told(tmp_path)
    empty.write_text("")
    assert "is empty" in told(empty)
    wrong.write_text(f"Once upon a time.\n{END}\n" * 100)
    assert "holds no record" in told(wrong) and not os.path.exists(f"{wrong}.unwrap")
    wrong.write_bytes(bytes(3 * 2 ** 20))
    assert "holds no record" in told(wrong)
    write_file(good, 10)
    assert "70,000 words" in told(good, most_words=70000)
    with pytest.raises(ValueError, match="--data prepares it"):
        StoryFile(good)
    (tmp_path / "good.txt.unwrap").write_text("in the way")
    assert "cannot be written (File exists)" in told(good)
    os.remove(f"{good}.unwrap")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(os, "makedirs", refuse)
    assert "cannot be written (Read-only file system)" in told(good)


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    peaks = []
    for size in (5, 50):
        path = write_file(tmp_path / f"{size}.txt", 0, size=size * 10 ** 6)
        script = f"import sys, resource; sys.path.insert(0, {ROOT!r}); import {data.__name__} as data; " \
                 f"data.prepare({path!r}); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 8, peaks  # MB; the tokens alone are 28 MB more


# ---------------------------------------------------------------- draws


def test_draws_keep_to_their_filter_and_their_part(plain):
    path, _ = plain
    source, everything = StoryFile(path), [StoryFile(f"{path}.unwrap").record(i) for i in range(1000)]
    assert source.held_out == 10 and len(source) == 1000
    r = random.Random(0)
    assert source.tokenizer.decode(everything[0].ids) == record_text(some_record(r)._replace(mask=0))
    where = collections.defaultdict(set)
    for i, e in enumerate(everything):
        where[e.ids.tobytes()].add(i)
    for feature, has in [(None, None), ("Twist", None), ("Twist", True), ("Twist", False), ("Conflict", True)]:
        for held_out in (False, True):
            part = range(990, 1000) if held_out else range(990)
            fit = {i for i in part if has is None or (everything[i].mask >> FEATURES.index(feature) & 1) == has}
            g = generator(5)
            got = source.draw(6000, g, feature, has, held_out)
            seen = [where[e.ids.tobytes()] for e in got]
            assert all(len(x) == 1 for x in seen) and {i for x in seen for i in x} <= fit
            assert len(set().union(*seen)) > .95 * len(fit)  # 6 to 600 draws a record
            most = collections.Counter(i for x in seen for i in x).most_common(1)[0][1]
            assert most < 6000 / len(fit) + 6 * (6000 / len(fit)) ** .5
            again = source.draw(3, generator(5), feature, has, held_out)
            assert [e.ids.tolist() for e in again] == [e.ids.tolist() for e in got[:3]]
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
    with pytest.raises(ValueError, match="^no held-out record without Twist$"):
        source.draw(1, generator(0), "Twist", False, held_out=True)
    with pytest.raises(ValueError, match="^no training record with Conflict$"):
        source.draw(1, generator(0), "Conflict", True)
    path.write_text(f"Story: \n\nA.\n{END}\n")
    prepare(str(path))
    with pytest.raises(ValueError, match="^no training record$"):
        StoryFile(path).draw(1, generator(0))
