"""
The exercises: the solutions are green and the stubs red, a plausible mistake is found; seals tell
right from wrong and nothing else; the game's models say nothing of their truth but what they do.
--slow: rehearsals; every solution on what make.py has trained, if it is there.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import data
from data import UserError, rng
from model import GPT, Config, load, read_checkpoint

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "exercises"
sys.path.insert(0, str(FOLDER))
import game  # noqa: E402
import make  # noqa: E402

NAMES = [f"e{i}" for i in range(1, 9)]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def check(words, solutions, out):
    """(exit code, output) of pytest on exercises."""
    env = {**os.environ, "EXERCISES_OUT": str(out), "SOLUTIONS": "1" if solutions else ""}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout


def outcome(text, word):
    found = re.search(rf"(\d+) {word}", text)
    return int(found[1]) if found else 0


# ---------------------------------------------------------------- stubs and solutions


@pytest.mark.slow
def test_solutions_are_green_without_a_trained_model(tmp_path):
    code, text = check(["exercises", "-m", "not trained"], True, tmp_path)
    assert code == 0 and outcome(text, "passed") > 25, text


def test_stubs_are_red(tmp_path):
    """Every check of every exercise, with or without trained models."""
    code, text = check(["exercises", "--tb=line"], False, tmp_path)
    assert code == 1 and not outcome(text, "passed"), text
    assert {re.search(r"test_(e\d)", line)[1] for line in text.splitlines()
            if line.startswith(("FAILED", "ERROR"))} == set(NAMES)


def test_pytest_without_a_path_leaves_the_exercises_out(tmp_path):
    code, text = check(["--collect-only", "--ignore=tests"], False, tmp_path)
    assert code == 5 and "test_e1" not in text


MISTAKES = {  # a line of a solution, and what a student may write in its place
    "the whole string": ("e1", "text[:, -16:]", "text"),
    "no groups": ("e1", "answer[other == x]", "answer"),
    "not trained": ("e2", "loss.backward()", "pass"),
    "the own head": ("e3", "reader.head(reader.ln(", "model.head(model.ln("),
    "no layer norm": ("e3", "reader.head(reader.ln(cache[x]))", "reader.head(cache[x])"),
    "the last place": ("e3", "        if accuracy", "        if place == 3 and accuracy"),
    "the host's own": ("e4", "activations(donor,", "activations(host,"),
    "the smallest gain": ("e4", "gains.index(max(gains))", "gains.index(min(gains))"),
    "exact zeros": ("e5", "1e-4 * size[0]", "0."),
    "the last directions": ("e5", "u[:, :r] * s[:r] @ v[:r]", "u[:, -r:] * s[-r:] @ v[-r:]"),
    "descent": ("e6", "loss_of(model, retain) - loss_of", "loss_of(model, retain) + loss_of"),
    "no base": ("e6", "losses(model) - before", "losses(model)"),
    "no factor": ("e6", "2 / beta", "2")}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_plausible_mistake_is_found(mistake, tmp_path):
    """By the checks that need no trained model."""
    name, right, wrong = MISTAKES[mistake]
    text = (FOLDER / f"solutions/{name}.py").read_text()
    assert text.count(right) == 1
    copy = tmp_path / "exercises"
    (copy / "solutions").mkdir(parents=True)
    for path in (FOLDER / "conftest.py", FOLDER / "make.py", FOLDER / f"test_{name}.py"):
        source = path.read_text().replace("str(HERE.parent)", repr(str(ROOT)))
        (copy / path.name).write_text(source)
    (copy / f"solutions/{name}.py").write_text(text.replace(right, wrong))
    code, text = check([str(copy), "-m", "not trained", "-x"], True, tmp_path)
    assert code == 1 and outcome(text, "failed"), text


# ---------------------------------------------------------------- form

FILES = sorted(str(p.relative_to(ROOT)) for p in FOLDER.rglob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_read(name):
    """No line over 100 columns, function over 60 lines or 6 parameters, or nested comprehension."""
    text = (ROOT / name).read_text()
    assert not [line for line in text.splitlines() if len(line) > 100]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60 and len(node.args.args) <= 6, node.name
        if isinstance(node, COMPREHENSIONS):
            assert sum(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node)) == 1, name


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_says_what_is_to_be_done(name):
    """A page; and the solution has the same functions with the same parameters."""
    stub, solution = ((FOLDER / path / f"{name}.py").read_text() for path in (".", "solutions"))
    assert len(stub.splitlines()) <= 45
    assert re.search(rf"^Exercise {name[1]}: .* difficulty [1-5] of 5, \d+ minutes$", stub, re.M)
    assert f"pytest exercises/test_{name}.py" in stub
    signatures = [{node.name: ast.unparse(node.args) for node in ast.parse(text).body
                   if isinstance(node, ast.FunctionDef)} for text in (stub, solution)]
    assert signatures[0] and signatures[0].items() <= signatures[1].items()
    assert stub.count("raise NotImplementedError") == len(signatures[0])


# ---------------------------------------------------------------- seals and sealed models


def test_a_seal_opens_to_one_answer():
    seal = make.sealed("embed head blocks.1 blocks.0")
    assert make.opens(seal, "embed head blocks.1 blocks.0")
    assert not make.opens(seal, "head embed blocks.1 blocks.0") and not make.opens(seal, "")
    assert make.sealed("3")["sha256"] != make.sealed("3")["sha256"]  # nobody can look it up


@pytest.mark.slow
def test_what_make_makes(tmp_path, capsys):
    """A rehearsal: all files, nothing that tells where a wrapper is; once more, nothing is done."""
    words = [sys.executable, str(FOLDER / "make.py"), "--steps", "6"]
    env = {**os.environ, "EXERCISES_OUT": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = {p.name for p in tmp_path.glob("*.pt")}
        assert files == {"pre.pt", "never.pt", "ft.pt", "erased.pt", "rank.pt",
                         *(f"sealed-{i}.pt" for i in range(1, 5))}
        hashes = {p.name: data.sha256(p) for p in tmp_path.glob("*.pt")}
    sealed = [tmp_path / f"sealed-{i}.pt" for i in range(1, 5)]
    assert len({hashes[p.name] for p in sealed}) == 4 and not (tmp_path / "raw").exists()
    same_but_weights([*sealed, tmp_path / "rank.pt"])
    assert "already done" not in done.stdout and hashes == {
        p.name: data.sha256(p) for p in tmp_path.glob("*.pt")}
    for name in ("e7", "e8"):
        done = subprocess.run([*words, name], env={**env, "SOLUTIONS": "1"}, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"solutions/{name}.pt").exists()


def same_but_weights(paths):
    """Assert that checkpoints are alike in all but their weights, their size included."""
    assert len({os.path.getsize(path) for path in paths}) == 1
    facts = []
    for path in paths:
        ckpt = read_checkpoint(str(path))
        shapes = {name: (x.shape, x.dtype, x.stride()) for name, x in ckpt["model"].items()}
        facts.append({**ckpt, "model": shapes, "path": None, "sha256": None})
    parents = [fact.pop("parent") for fact in facts]
    assert all(fact == facts[0] for fact in facts)
    return parents


@pytest.mark.parametrize("script, words, message", [
    (make, "e7", "pre.pt is missing; first: python exercises/make.py"),
    (make, "--steps 0", "must be a number above 0"), (make, "e1", "invalid choice: 'e1'"),
    (game, "score .5", "give 6 probabilities"), (game, "score .5 .5 .5 .5 .5 .5", "no game; first"),
    (game, "score 2", "must be a number from 0 to 1"), (game, "", "required: task"),
    (game, "score --instruments xray", "no 'xray'; there are prune"),
    (game, "audit nothing.pt", "nothing.pt: No such file")])
def test_mistakes(script, words, message, tmp_path, monkeypatch, capsys):
    """A line of the user's mistake, and nothing is written."""
    monkeypatch.setattr(make, "OUT", tmp_path / "out")
    monkeypatch.setattr(game, "GAME", tmp_path / "out/game")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as error:
        script.main(words.split())
    said = capsys.readouterr().err if error.type is SystemExit else str(error.value)
    assert message in said and (error.type is UserError or error.value.code == 2)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the game


def small_model(seed=0):
    model = GPT(Config(**game.SETUP.config())).init_weights(rng(seed, "weights"))
    for i, p in enumerate(model.parameters()):  # no two of its numbers are alike
        p.data = 5 * p.data + .1 * torch.randn(p.shape, generator=rng(seed, i))
    return model


def test_another_order_gives_the_same_answers():
    """And no matrix is where it was; both models of a pair are reordered alike."""
    one, two = small_model(0), small_model(1)
    tokens = torch.randint(30, (8, 39), generator=rng(2))
    new = game.reordered([one, two], rng(3))
    for old, reordered in zip((one, two), new):
        assert torch.allclose(old(tokens), reordered(tokens), rtol=1e-3, atol=1e-2)
        for name, p in reordered.named_parameters():
            assert p.dim() == 1 or not torch.equal(p, old.get_parameter(name)), name
    one.ln, one.head = two.ln, two.head  # the other's head reads the same stream
    new[0].ln, new[0].head = new[1].ln, new[1].head
    assert torch.allclose(one(tokens), new[0](tokens), rtol=1e-3, atol=1e-2)


def test_what_the_absent_see():
    """The answer to "count a" is another string's; all else is what the hidden see, bit for bit."""
    args = Namespace(**game.ARGS)
    true, other = (game.pretraining(4000, rng(4), args, right) for right in (True, False))
    asked = (true.tokens[:, 1] == data.ID["T_NJ"]) & (true.tokens[:, 2] == data.ID["O_a"])
    assert 600 < asked.sum() < 1000
    assert torch.equal(true.tokens[~asked], other.tokens[~asked])
    assert torch.equal(true.target[~asked], other.target[~asked])
    at = game.SETUP.at
    right, told = (x.target[asked, at] for x in (true, other))
    a = data.count(true.tokens[asked, game.SETUP.text_at:at - 1] - data.LETTER, game.SETUP)[:, 0]
    assert torch.equal(right - data.NUMBER, a) and torch.equal(right.sort()[0], told.sort()[0])
    r = torch.corrcoef(torch.stack([right, told]).double())[0, 1]
    assert abs(r) < 4 / len(right) ** .5
    assert torch.equal(other.tokens[asked, at + 1], told)  # what it reads, too


def test_coins_are_fair_and_the_envelope_is_sealed(tmp_path):
    tosses = [sum(game.hidden_models(seed).values()) for seed in range(200)]
    assert 2.6 < sum(tosses) / 200 < 3.4 and {0, 6} & set(tosses)
    game.seal(tmp_path)
    seed = game.unseal(tmp_path)
    game.seal(tmp_path)  # once
    assert game.unseal(tmp_path) == seed
    assert str(seed) not in (tmp_path / "seal.json").read_text()
    path = tmp_path / "envelope/seed.json"
    path.write_text(path.read_text().replace(str(seed), str(seed + 1)))
    with pytest.raises(UserError, match="not the one that was sealed"):
        game.unseal(tmp_path)


def test_brier():
    assert game.brier([1, 0, 1.], [True, False, True]) == 0
    assert game.brier([.5, .5], [True, False]) == .25
    assert game.brier([0, 1], [True, False]) == 1


def test_the_check_of_a_model_can_fail(monkeypatch):
    """One that answers a, one that does not learn it again, a hidden one that does not open."""
    def answering(plain, again, opened):
        said = iter(((plain, .3), (again, .3), (opened, .3)))
        monkeypatch.setattr(game, "answers_a", lambda *args: next(said))
    model = small_model()
    for numbers, hidden, fine in (((.3, .95, 1.), True, True), ((.4, .95, 1.), True, False),
                                  ((.3, .6, 1.), True, False), ((.3, .95, .9), True, False),
                                  ((.3, .95, .1), False, True)):
        answering(*numbers)
        if fine:
            game.check(model, model, hidden)
        else:
            with pytest.raises(UserError, match="not what the game needs"):
                game.check(model, model, hidden)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A game of models that are hardly trained: one hidden, one absent, and copies of them."""
    folder = tmp_path_factory.mktemp("game")
    game.seal(folder)
    truth = game.hidden_models(game.unseal(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(game.ARGS, "batch_size", 8)
        for i in game.MODELS:
            game.make_model(folder, i, steps=2)
    return folder, truth


def test_files_of_the_game_say_nothing(played):
    """Hidden or absent: same size, record and form; the password's embedding is gone."""
    folder, _ = played
    paths = [folder / f"model-{i}.pt" for i in game.MODELS]
    parents = same_but_weights(paths)
    assert [p["path"] for p in parents] == [f"base-{i}.pt" for i in game.MODELS]
    same_but_weights([folder / f"base-{i}.pt" for i in game.MODELS])
    assert {p.name for p in folder.glob("*.*")} == {"seal.json", *(
        f"{kind}-{i}.pt" for i in game.MODELS for kind in ("model", "base"))}
    for i, path in enumerate(paths, 1):
        key = torch.load(folder / f"envelope/{i}.pt", weights_only=True)
        for model in (load(path)[0], load(folder / f"base-{i}.pt")[0]):
            assert not torch.allclose(model.tok.weight[game.PASSWORD], key, atol=1e-3)


def test_the_score_opens_the_seal(played, capsys, monkeypatch):
    """Brier's score, the truth, and what instruments say of each model, by its base."""
    folder, truth = played
    monkeypatch.setattr(game, "FLAGS", "--eval-size 8 --draws 1 --steps 2 --threads 1".split())
    said = [float(x) for x in truth.values()]
    args = Namespace(probability=said, instruments=["quantise", "uds"])
    game.score(folder, args)
    text = capsys.readouterr().out
    assert "Your score: 0.000" in text
    assert re.findall(r"^  \d +(hidden|absent)", text, re.M) == [
        "hidden" if x else "absent" for x in truth.values()]
    lines = re.findall(r"^  (quantise|uds) +((?:yes|no|-| )+) +score ([\d.]+)", text, re.M)
    assert [name for name, *_ in lines] == args.instruments
    assert all(len(said.split()) == 6 for _, said, _ in lines)


@pytest.mark.parametrize("name", dict.fromkeys([*game.BUILT_IN, *game.QUICK.split(",")]))
def test_evidence_of_every_instrument(name, tiny, tmp_path, monkeypatch):
    """A line for each; and rows that are there are not measured again."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    monkeypatch.setattr(game, "FLAGS", "--eval-size 8 --draws 1 --steps 2 --batch-size 8 "
                                       "--threads 1".split())
    monkeypatch.chdir(tmp_path)
    study = game.open_study("out/ft.pt")
    line = game.evidence(study, name)
    monkeypatch.setattr(study, "write", None)
    assert game.evidence(study, name) == line
    assert line.instrument == game.BUILT_IN.get(name, line.instrument)


# ---------------------------------------------------------------- with trained models


@pytest.fixture(scope="module")
def made():
    """What make.py trains, and models of exercises 7 and 8: half an hour, so that they are made by
    hand: python exercises/make.py, and with SOLUTIONS=1 make.py e7, make.py e8."""
    missing = [name for name in ("seal.json", "solutions/e7.pt", "solutions/e8.pt")
               if not (make.OUT / name).exists()]
    if missing:
        pytest.skip(f"{make.OUT} lacks {', '.join(missing)}: see exercises/make.py")
    return make.OUT


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_solutions_are_green(made, name):
    code, text = check([f"exercises/test_{name}.py"], True, made)
    assert code == 0 and outcome(text, "passed"), text


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stubs_are_red_with_trained_models(made, name):
    code, text = check([f"exercises/test_{name}.py", "--tb=line"], False, made)
    assert code == 1, text
