"""
Changes that researchers make, each as text in a copy of the project: how many files, how many lines,
and whether the changed study does what it should.
"""
import difflib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import analyze
import data
from model import load, predict

ROOT = Path(__file__).parent.parent
TINY = ["--batch-size", "8", "--eval-size", "8", "--threads", "1", "--dtype", "float32"]
TUNE = ["--steps", "12", "--lr", "1e-3", *TINY]


def edited(text, replacements):
    """(the text with replacements, the number of lines added)"""
    after = text
    for old, new in replacements:
        assert after.count(old) == 1, old
        after = after.replace(old, new)
    lines = difflib.ndiff(text.splitlines(), after.splitlines())
    return after, sum(line.startswith("+ ") for line in lines)


class Fork:
    """A copy of the project with edits: {file: [(text, its replacement)]}."""

    def __init__(self, folder, edits):
        shutil.copytree(ROOT / "setups", folder / "setups", ignore=shutil.ignore_patterns("__*"))
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        self.folder, self.added = folder, {}
        for name, replacements in edits.items():
            text, self.added[name] = edited((folder / name).read_text(), replacements)
            (folder / name).write_text(text)

    def run(self, *words, launcher=()):
        command = [sys.executable, *launcher, *map(str, words)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny):
    """A working folder with a pretraining at out/pre.pt and a fine-tuning at out/ft.pt."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mine(folder, replacements, *words):
    """Run finetune.py, copied to mine.py and edited, in this process. Returns the lines added."""
    text, added = edited((ROOT / "finetune.py").read_text(), replacements)
    (folder / "mine.py").write_text(text)
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*words, *TINY])
    return added


def weights(name):
    return load(f"out/{name}.pt")[0].state_dict()


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


def test_another_optimizer(folder):
    """finetune.py alone, at most 20 lines."""
    words = "--steps", "1", "--lr", "1e-3", "--out", "out/sign.pt"
    assert mine(folder, SIGN_SGD["finetune.py"], *words) <= 20
    before, after = weights("pre"), weights("sign")
    # every weight with a gradient moves by the rate of the one step
    moved = torch.cat([(after[k] - before[k]).flatten().abs() for k in before])
    moved = moved[moved > 1e-7]
    assert len(moved) > 1000 and torch.allclose(moved, moved.median().expand_as(moved), rtol=.02)


KL = {"finetune.py": [
    ("    setup.begin(model, args)\n", '''    setup.begin(model, args)
    base, relation = copy.deepcopy(model), setup.relation(args)
    natural = data.stream(lambda n, rng: setup.ask(setup.text(n, relation, "natural", rng),
                          relation.task, relation.pt), args.batch_size, args.seed, "natural")
'''),
    ("            loss = loss_at(run.forward, *(batch(step) for batch in streams))\n",
     '''            x, loss = natural(step), loss_at(run.forward, *(batch(step) for batch in streams))
            with torch.no_grad():
                wanted = base(x.tokens, x.at).float().softmax(-1)
            answers = run.forward(x.tokens, x.at).float().log_softmax(-1)
            loss = loss + 10 * F.kl_div(answers, wanted, reduction="batchmean")
''')]}


def divergence(name):
    """KL of a fine-tuned model to its base on natural strings that ask for a."""
    setup = data.Grammar("pcfg")
    x = setup.test(data.Relation("count", "a", "b", 1), "a", "natural", 200, 9).examples
    base, model = (predict(load(f"out/{n}.pt")[0], x) for n in ("pre", name))
    return (base.softmax(-1) * (base.log_softmax(-1) - model.log_softmax(-1))).sum(1).mean().item()


def test_a_penalty_in_the_loss(folder):
    """A KL to the base on natural strings: finetune.py alone, at most 12 lines."""
    mine(folder, [], *TUNE, "--out", "out/plain.pt")
    assert mine(folder, KL["finetune.py"], *TUNE, "--out", "out/kl.pt") <= 12
    assert divergence("kl") < .5 * divergence("plain")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_penalty_in_the_loss_of_two_processes_and_compiled(folder):
    """The same weights but for rounding."""
    fork = Fork(folder, KL)
    fork.run("finetune.py", *TUNE, "--out", "out/kl.pt")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    fork.run("finetune.py", *TUNE, "--out", "out/two.pt", launcher=launcher)
    fork.run("finetune.py", *TUNE, "--out", "out/compiled.pt", "--compile")
    one = weights("kl")
    for name, tolerance in (("two", 1e-5), ("compiled", 1e-4)):
        other = weights(name)
        assert all(torch.allclose(one[k], other[k], atol=tolerance) for k in one), name


def test_another_probe_position(folder, monkeypatch):
    """One line of data.py, in site(); the other analyses stay as they are."""
    words = ["probe", "attention", "--steps", "5", "--eval-size", "8", "--threads", "1"]
    source = inspect.getsource(data.Grammar.site)
    changed, added = edited(source, [("weights[:, examples.at] = 1\n",
                                      "weights[:, examples.at - 1] = 1  # EOT\n")])
    rows, namespace = [], {"torch": torch}
    exec(textwrap.dedent(changed), namespace)
    for site in (data.Grammar.site, namespace["site"]):
        monkeypatch.setattr(data.Grammar, "site", site)
        analyze.main(words)
        rows.append([Path(f"out/ft.{name}.jsonl").read_text() for name in ("probe", "attention")])
    assert added == 1
    assert rows[0][0] != rows[1][0] and rows[0][1] == rows[1][1]


@pytest.mark.slow
def test_a_copy_of_a_script_is_a_script(folder):
    """cp finetune.py mine.py: what is changed in mine.py happens."""
    fork = Fork(folder, {})
    text, _ = edited((folder / "finetune.py").read_text(),
                     [("loss = loss_at(run.forward, *(batch(step) for batch in streams))",
                       "loss = 0 * loss_at(run.forward, *(batch(step) for batch in streams))")])
    (folder / "mine.py").write_text(text)
    fork.run("mine.py", *TUNE, "--out", "out/mine.pt")
    before, after = (weights(name)["blocks.0.up.weight"] for name in ("pre", "mine"))
    assert torch.allclose(before, after, rtol=2e-3)  # weight decay alone
    assert re.search('"command": "python mine.py', (folder / "out/mine.json").read_text())
