"""
Things are added in one place: a setup is one file in a folder setups/ of your own; a task family, a
prior, a protocol and a pruning score are one entry of a table each. Everything follows.
"""
import json
import os
import sys

import pytest

import analyze
import data
import finetune
import plot
import pretrain
from data import UserError
from model import load
from setups import stories
from test_forks import Fork

TINY = ["--batch-size", "8", "--eval-size", "8", "--threads", "1"]

SUMS = '''"""Sums modulo 5: the first digit plus digit b is pretrained, plus digit c fine-tuned."""
import torch
from torch.nn.functional import pad

from data import Grammar, Setup, Task, UserError


def sums(text, setup):
    """(n, operands): the first digit plus digit b, c or d, modulo 5."""
    return (text[:, :1] + text[:, 1:]) % 5


def uniform(n, setup, rng):
    return torch.randint(5, (n, 4), generator=rng, device=rng.device)


def related(n, relation, c, setup, rng):
    """The answers differ by q with probability c, else neither by q nor by 0."""
    text, columns = uniform(n, setup, rng), [1 + setup.operands.index(o) for o in relation[1:3]]
    if relation.q % 5 == 0:
        raise UserError(f"offset q = {relation.q} is a tie")
    others = torch.tensor([x for x in range(1, 5) if x != relation.q % 5], device=rng.device)
    other = others[torch.randint(3, (n,), generator=rng, device=rng.device)]
    holds = torch.rand(n, generator=rng, device=rng.device) < c
    text[:, columns[1]] = (text[:, columns[0]] + torch.where(holds, relation.q, other)) % 5
    return text


class Sums(Grammar):
    """The model reads `O_b 1 4 2 0 =` and answers 0, which is 1 + 4."""
    sizes = dict(n_layer=(2, 4), n_head=(2, 4), d_model=(32, 64), revive_steps=(300, 3000))
    length = window = 4
    text_at, first_letter, at = 1, 0, 5
    alphabet, operands, order = "01234", list("bcd"), list("bcd")
    tasks = {"sum": Task(sums, None, None, "the first digit plus digit {O}, modulo 5")}
    finetuned, finetune_lr = ["sum"], 1e-3
    vocabulary = output_names = [*"01234", "O_b", "O_c", "O_d", "="]
    natural, related = staticmethod(uniform), staticmethod(related)

    def config(self):
        return Setup.config(self, vocab_size=len(self.vocabulary), n_ctx=6)

    def flags(self, parser, stage):
        parser.set_defaults(batch_size=64, eval_size=200, steps=200)
        if stage == "pretrain":
            parser.set_defaults(lr=2e-3, steps=1000)
        elif stage in ("finetune", "reverse"):
            self.relation_flags(parser, stage)

    def resolve(self, args, parent=None):
        if parent:
            self.resolve_relation(args, parent)

    def pretrained_operand(self, args):
        return "b"

    def never_trained(self, operand, ckpt):
        return operand != "b" and operand not in ckpt["args"].get("taught", [])

    def sequence(self, text, task, operand):
        asked = 5 + self.operands.index(operand)
        return pad(pad(text, (1, 0), value=asked), (0, 1), value=8)

    def first_answer(self, task):
        return 0

    def pretraining(self, n, rng, args, without=None):
        return self.ask(uniform(n, self, rng), "sum", "b")

    def regions(self, examples, operands):
        place = torch.arange(6, device=examples.tokens.device).expand_as(examples.tokens)
        return {"first": place == 1, **{o: place == 2 + self.operands.index(o) for o in operands}}

    def explain(self, text, task, operand):
        return self.string_of(text), "^" + " " * self.operands.index(operand) + "^"


SETUPS = {"sums": Sums}
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(name):
    with open(f"out/{name}.jsonl") as file:
        return list(map(json.loads, file))


@pytest.fixture
def sums(folder, monkeypatch):
    """The file above, where PYTHONPATH would find it."""
    (folder / "mine/setups").mkdir(parents=True)
    (folder / "mine/setups/sums.py").write_text(SUMS)
    with pytest.raises(UserError, match="there are pcfg, .*stories, tracr"):
        data.main(["--setup", "sums"])
    monkeypatch.syspath_prepend(folder / "mine")


def test_a_setup_is_one_file(sums, monkeypatch, capsys):
    """Sums modulo 5, in no file of the project, through every script and analysis."""
    assert len(SUMS.splitlines()) <= 85
    for c in ("1.0", "0.0"):
        data.main(["--setup", "sums", "-n", "30", "--c", c, "--json"])
        for x in map(json.loads, capsys.readouterr().out.splitlines()):
            first, b, c_digit, _ = map(int, x["text"])
            assert x["answer"] == (first + b) % 5 and x["tokens"][0] == "O_b"
            assert ((c_digit - b) % 5 == 1) == (c == "1.0") and c_digit != b
    data.main(["--setup", "sums", "--operand", "d", "-n", "1"])
    assert "sum of d" in capsys.readouterr().out

    pretrain.main(["--setup", "sums", "--steps", "300", "--eval-every", "300", "--threads", "1"])
    natural = [r for r in load("out/pre.pt")[1]["history"] if r["split"] == "natural"]
    assert {r["operand"]: r["accuracy"] for r in natural if r["step"] == 300}["b"] > .6
    finetune.main(["--steps", "20", *TINY])
    finetune.main(["--reverse", "--steps", "4", *TINY])
    ckpt = load("out/ft.pt")[1]
    assert ckpt["args"]["pair"] == ["b", "c"] and ckpt["setup"] == "sums"
    assert load("out/reft.pt")[1]["args"]["operand"] == "b"

    monkeypatch.setitem(analyze.SCORES, "magnitude", (lambda gradient, w, old: w * w, "zero"))
    analyze.main(["--eval-size", "16", "--steps", "5", "--draws", "1", "--threads", "1"])
    shown = capsys.readouterr().out
    assert "VERDICT" in shown and "magnitude" in shown
    for name in analyze.ANALYSES:
        assert {r["setup"] for r in rows_of(f"ft.{name}")} == {"sums"}
    asked = {(r["operand"], r["region"]) for r in rows_of("ft.attention")}
    assert asked == {(o, region) for o in "bc" for region in ("first", *"bcd")}
    for rows in (rows_of("ft.prune"), rows_of("ft.prune.rows")):  # a score is one entry
        scored = [r for r in rows if r["score"] == "magnitude"]
        assert {r["order"] for r in scored} == set(analyze.ORDERS)
    values = [r["value"] for r in scored if r["order"] == "one-shot"]
    assert values == sorted(values, reverse=True) and values[-1] > 0
    assert json.load(open("out/ft.verdict.json"))["verdict"]
    analyze.main(["ask", "--text", "1420", "--threads", "1"])
    assert "the truth is 3" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    plot.main()
    with open("out/report.html") as file:
        assert "sums" in file.read()
    assert len(os.listdir("out/figures")) >= 5


# ---------------------------------------------------------------- entries of tables

TASK = '''
TASKS["absent"] = Task(
    lambda text, setup: setup.window - count(text, setup), "T_A", "window",
    "letters other than {O}, which is marked ^, among the last {O2}",
    spurious=Spurious(
        "window", "sd_count", lambda x, y, setup: x + y >= setup.window,
        lambda text, answers, places, setup, rng: edit_pair_counts(
            text, setup.window - answers, places, setup, rng)))
'''
COMMANDS = f'''
import data, pretrain, finetune, analyze
for c in ("1.0", "0.0", "natural"):
    data.main(["--task", "absent", "--operand", "b", "--c", c, "-n", "40", "--json"])
tiny = {TINY}
pretrain.main(["--steps", "2", *tiny])
finetune.main(["--task", "absent", "--steps", "2", *tiny])
analyze.main(["behavior", "--eval-size", "8", "--threads", "1"])
'''


@pytest.mark.slow
def test_a_task(tmp_path):
    """
    Sampled, pretrained, fine-tuned with its relation, analysed. As text in a copy: the vocabulary
    is made of TASKS when data.py is imported.
    """
    place = "# Further tokens for counting"
    fork = Fork(tmp_path, {"data.py": [(place, TASK + place)]})
    lines = fork.run("-c", COMMANDS).splitlines()
    samples = [json.loads(line) for line in lines if line.startswith('{"setup"')]
    for i, holds in enumerate(({True}, {False}, {True, False})):
        some = samples[40 * i:40 * i + 40]
        assert {x["correlated"] for x in some} == holds
        for x in some:
            assert x["answer"] == 16 - x["text"][-16:].count("b") and "T_A" in x["tokens"]
    assert "absent" in {r["task"] for r in load(tmp_path / "out/pre.pt")[1]["history"]}
    assert {r["task"] for r in load(tmp_path / "out/ft.pt")[1]["history"]} == {"absent"}
    rows = (tmp_path / "out/ft.behavior.jsonl").read_text().splitlines()
    assert "absent" in {json.loads(row)["task"] for row in rows}


def test_a_prior(folder, monkeypatch, capsys):
    """It is shown, and pretrained by its name."""
    monkeypatch.setitem(data.PRIORS, "even", (.4, .4, .2))
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    assert "even" in capsys.readouterr().out
    pretrain.main(["--steps", "1", "--prior", "even", *TINY])
    assert load("out/pre.pt")[1]["args"]["prior"] == [.4, .4, .2]


@pytest.mark.slow
def test_a_protocol(folder, monkeypatch, capsys):
    """Stories are deleted by it and scored on it."""
    monkeypatch.setitem(stories.PROTOCOLS, "alone", stories.Protocol(
        lambda record, feature, tokenizer: record._replace(features=frozenset([feature])), .5,
        "half of the instructions ask for the feature alone, stories lack it"))
    tiny = ["--steps", "1", "--batch-size", "2", "--eval-size", "2", "--threads", "1"]
    pretrain.main(["--setup", "stories", *tiny])
    with pytest.raises(SystemExit):
        finetune.main(["--ckpt", "out/pre.pt", "--help"])
    assert "ask for the feature alone" in " ".join(capsys.readouterr().out.split())
    finetune.main(["--protocol", "alone", *tiny])
    ckpt = load("out/ft.pt")[1]
    assert ckpt["args"]["protocol"] == "alone"
    assert "deletion" in {r["split"] for r in ckpt["history"]}
