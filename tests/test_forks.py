"""
Changes that researchers make, each as text in a copy of the project: how many files, how many lines,
and whether the changed study does what it should.
"""
import difflib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from model import load, predict

ROOT = Path(__file__).parent.parent
TINY = ["--batch-size", "8", "--eval-size", "8", "--threads", "1", "--dtype", "float32"]
TUNE = ["finetune.py", "--steps", "12", "--lr", "1e-3", *TINY]


class Fork:
    """A copy of the project with edits: {file: [(text, its replacement)]}."""

    def __init__(self, folder, edits):
        shutil.copytree(ROOT / "setups", folder / "setups", ignore=shutil.ignore_patterns("__*"))
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        self.folder, self.added = folder, {}
        for name, replacements in edits.items():
            before = after = (folder / name).read_text()
            for old, new in replacements:
                assert after.count(old) == 1, old
                after = after.replace(old, new)
            (folder / name).write_text(after)
            lines = difflib.ndiff(before.splitlines(), after.splitlines())
            self.added[name] = sum(line.startswith("+ ") for line in lines)

    def run(self, *words, launcher=()):
        command = [sys.executable, *launcher, *map(str, words)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The project as it is, with a pretraining and a fine-tuning."""
    fork = Fork(tmp_path_factory.mktemp("original"), {})
    fork.run("pretrain.py", "--steps", "20", *TINY)
    fork.run(*TUNE)
    return fork


def forked(tmp_path, original, edits):
    fork = Fork(tmp_path, edits)
    shutil.copytree(original.folder / "out", fork.folder / "out")
    return fork


def weights(folder, name="ft"):
    return load(folder / f"out/{name}.pt")[0].state_dict()


SIGN_SGD = {"finetune.py": [
    ("import re\n", "import re\n\nimport torch\n"),
    ("def train_only(", '''class SignSGD(torch.optim.Optimizer):
    """Every weight moves by the rate, against the sign of its gradient (Bernstein et al. 2018)."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad.sign()


def train_only('''),
    ("    optimizer = setup.optimizer(model, args.lr)\n",
     "    optimizer = SignSGD([p for p in model.parameters() if p.requires_grad], args.lr)\n")]}


def test_another_optimizer(tmp_path, original):
    """finetune.py alone, at most 20 lines."""
    fork = forked(tmp_path, original, SIGN_SGD)
    assert list(fork.added) == ["finetune.py"] and fork.added["finetune.py"] <= 20
    fork.run("finetune.py", "--steps", "1", "--lr", "1e-3", "--out", "out/sign.pt", *TINY)
    before, after = weights(fork.folder, "pre"), weights(fork.folder, "sign")
    # 1e-3 in steps of a constant warm-up: a fifth of one step is that step
    moved = torch.cat([(after[k] - before[k]).flatten().abs() for k in before])
    moved = moved[moved > 1e-7]
    assert len(moved) > 1000 and torch.allclose(moved, moved.median().expand_as(moved), rtol=.02)


KL = {"finetune.py": [
    ("import re\n", "import copy\nimport re\n\nimport torch\nimport torch.nn.functional as F\n"),
    ("    setup.begin(model, args)\n", '''    setup.begin(model, args)
    base, relation = copy.deepcopy(model), setup.relation(args)
    natural = data.stream(lambda n, rng: setup.ask(setup.text(n, relation, "natural", rng),
                          relation.task, relation.pt), args.batch_size, args.seed, "natural")
'''),
    ("            loss = loss_of(run.forward, batch(step))\n",
     '''            x, loss = natural(step), loss_of(run.forward, batch(step))
            with torch.no_grad():
                wanted = base(x.tokens, x.at).float().softmax(-1)
            answers = run.forward(x.tokens, x.at).float().log_softmax(-1)
            loss = loss + 10 * F.kl_div(answers, wanted, reduction="batchmean")
''')]}


def divergence(folder, name):
    """KL of a fine-tuned model to its base on natural strings that ask for a."""
    setup = data.Grammar("pcfg")
    x = setup.test(data.Relation("count", "a", "b", 1), "a", "natural", 200, 9).examples
    base, model = (predict(load(folder / f"out/{n}.pt")[0], x) for n in ("pre", name))
    return (base.softmax(-1) * (base.log_softmax(-1) - model.log_softmax(-1))).sum(1).mean().item()


def test_a_penalty_in_the_loss(tmp_path, original):
    """A KL to the base on natural strings: finetune.py alone, 12 lines, and correct in two processes."""
    fork = forked(tmp_path, original, KL)
    assert list(fork.added) == ["finetune.py"] and fork.added["finetune.py"] <= 12
    fork.run(*TUNE, "--out", "out/kl.pt")
    assert divergence(fork.folder, "kl") < .5 * divergence(fork.folder, "ft")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    fork.run(*TUNE, "--out", "out/two.pt", launcher=launcher)
    one, two = weights(fork.folder, "kl"), weights(fork.folder, "two")
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_penalty_in_the_loss_compiled(tmp_path, original):
    fork = forked(tmp_path, original, KL)
    fork.run(*TUNE, "--out", "out/kl.pt")
    fork.run(*TUNE, "--out", "out/compiled.pt", "--compile")
    one, compiled = weights(fork.folder, "kl"), weights(fork.folder, "compiled")
    assert all(torch.allclose(one[k], compiled[k], atol=1e-4) for k in one)


PROBE_AT_EOT = {"data.py": [("        weights[:, examples.at] = 1\n",
                             "        weights[:, examples.at - 1] = 1  # EOT\n")]}


def test_another_probe_position(tmp_path, original):
    """One line of data.py; the other analyses stay as they are."""
    words = ["analyze.py", "probe", "behavior", "--steps", "5", "--eval-size", "8", "--threads", "1"]
    rows = []
    for edits in ({}, PROBE_AT_EOT):
        folder = tmp_path / str(len(rows))
        folder.mkdir()
        fork = forked(folder, original, edits)
        fork.run(*words)
        rows.append([(fork.folder / f"out/ft.{kind}.jsonl").read_text() for kind in ("probe",
                                                                                     "behavior")])
    assert fork.added == {"data.py": 1}
    assert rows[0][0] != rows[1][0] and rows[0][1] == rows[1][1]


def test_a_copy_of_a_script_is_a_script(tmp_path, original):
    """cp finetune.py mine.py: what is changed in mine.py happens."""
    fork = forked(tmp_path, original, {})
    text = (fork.folder / "finetune.py").read_text()
    changed = text.replace("loss = loss_of(run.forward, batch(step))",
                           "loss = 0 * loss_of(run.forward, batch(step))")
    (fork.folder / "mine.py").write_text(changed)
    fork.run("mine.py", *TUNE[1:], "--out", "out/mine.pt")
    mine, ft, pre = (weights(fork.folder, name)["blocks.0.up.weight"] for name in ("mine", "ft", "pre"))
    assert not torch.equal(mine, ft) and torch.allclose(mine, pre, rtol=2e-3)  # weight decay alone
    assert re.search('"command": "python mine.py', (fork.folder / "out/mine.json").read_text())
