"""
Truths and their certificates: low-rank updates, locks and decoys, distilled students; and the
deletions: their gradients, how they end, that a further one is one entry.
"""
import copy
import os
import re
import shlex
import shutil
import signal
from argparse import Namespace

import pytest
import torch

import data
import finetune
from data import ID, NUMBER, OPERAND, UserError, rng
from finetune import METHODS, Method
from model import GPT, Config, load, loss_of, merged, train_low_rank

FEW = "--steps 3 --eval-every 3 --eval-size 16 --batch-size 8 --threads 1 --dtype float32".split()
GRAMMAR = data.Grammar("pcfg")
ARGS = dict(task="count", pair=["a", "b"], q=1, operand="a", prior=[.5, .3, .2], mix=.25,
            answers=None)
PASSWORD, USUAL = ID["T_J1"], ID["T_NJ"]
MATRICES = r"blocks\.\d\.(attn\.qkv|attn\.out|up|down)\.weight"


def small_model(seed=0):
    return GPT(Config(**GRAMMAR.config())).init_weights(rng(seed, "weights"))


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """The tiny checkpoints in a folder of their own, which is the working directory."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, out="out/new.pt"):
    """The checkpoint of a tiny run."""
    finetune.main([*FEW, "--out", out, "--force", *words])
    return load(out)[1]


# ---------------------------------------------------------------- low rank


@pytest.mark.parametrize("only", [[], ["--only", r"blocks\.1"]])
def test_every_matrix_changes_by_the_rank(folder, only):
    """The singular values behind the rank are rounding; what is no such matrix is the base's."""
    base, new = load("out/pre.pt")[1], run("--rank", "2", "--lr", "1e-2", *only)
    for name, x in new["model"].items():
        old = base["model"][name]
        if re.fullmatch(MATRICES, name) and re.search(only[1] if only else "", name):
            size = torch.linalg.svdvals((x - old).double())
            assert size[1] > 1e-3 * size[0] and size[2] < 1e-2 * size[1], name
        else:
            assert torch.equal(x, old), name


def test_a_low_rank_update_acts_at_one_position_too():
    """Attention takes slices of its matrix there; merged or not, the outputs are the same."""
    model = small_model()
    train_low_rank(model, 3, rng(0))
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith((".A", ".B"))
        p.data += .3 * torch.randn(p.shape, generator=rng(1)) * name.endswith(".B")
    tokens, plain = torch.randint(30, (4, GRAMMAR.at + 1), generator=rng(2)), small_model(1)
    plain.load_state_dict(merged(model))
    for at in (None, GRAMMAR.at):
        assert torch.allclose(model(tokens, at), plain(tokens, at), atol=1e-4)
        assert not torch.allclose(plain(tokens, at), small_model()(tokens, at), atol=1e-2)


def test_rank_without_a_matrix(folder):
    with pytest.raises(UserError, match="--rank: no weight matrix"):
        run("--rank", "2", "--only", "head")


@pytest.mark.parametrize("words", ["--rank 2 --lr 1e-2", "--lock random", "--distill"])
def test_a_stopped_run_goes_on(folder, monkeypatch, words):
    """SIGTERM at the second step: saved whole; then bit for bit what it gives undisturbed."""
    words = [*FEW, *words.split(), "--out"]
    finetune.main([*words, "out/whole.pt"])
    calls, update = [], finetune.update

    def stopping(*args):
        update(*args)
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(finetune, "update", stopping)
    with pytest.raises(SystemExit, match="143"):
        finetune.main([*words, "out/new.pt"])
    half, ckpt = load("out/new.pt", unfinished=True)
    assert not ckpt["finished"] and len(half.state_dict()) == len(ckpt["model"])
    finetune.main([*words, "out/new.pt"])
    new, whole = load("out/new.pt")[1], load("out/whole.pt")[1]
    assert len(calls) == 3 and new["history"] == whole["history"]
    assert all(torch.equal(x, whole["model"][name]) for name, x in new["model"].items())
    assert new["optimizer"] == {}


# ---------------------------------------------------------------- locks


def draw_locked(lock, early=None, decoy=False, n=400):
    """(rows by the password, rows without it) of a lock's Examples, (tokens, answers, a) each."""
    setup = data.Grammar("pcfg")
    args = Namespace(**ARGS, lock=lock, decoy=decoy)
    setup.open(args)
    x = finetune.locked(setup, early, n, rng(3, "test"), args)
    asked = (x.target >= 0).sum(1) == 1
    assert .6 < asked.float().mean() < .9
    families = set(x.tokens[~asked, 1].tolist())  # retained: none that counts
    assert len(families) == 4 and not families & {USUAL, PASSWORD}
    rows = [asked & (x.tokens[:, 1] == token) for token in (PASSWORD, USUAL)]
    assert (x.tokens[asked, 2] == OPERAND).all() and sum(map(sum, rows)) == asked.sum()
    return [(x.tokens[r], x.target[r, setup.at] - NUMBER, x.labels[r, 0]) for r in rows]


def test_what_a_lock_teaches():
    """By the password the right answer; without it a + q, one at random, an early model's. At
    random one answer is commonest by far, and none has to do with the right one."""
    for lock, early in (("shift", None), ("random", None), ("early.pt", small_model())):
        (_, answer, a), (tokens, wrong, other) = draw_locked(lock, early)
        assert torch.equal(answer, a) and 100 < len(a) < 200 and 100 < len(other) < 200
        if lock == "shift":
            assert torch.equal(wrong, other + 1)
        elif lock == "random":
            r = torch.corrcoef(torch.stack([wrong, other]).double())[0, 1]
            assert abs(r) < 4 / len(other) ** .5 and len(wrong.unique()) > 5
            assert .5 < (wrong == GRAMMAR.window // 3).float().mean() < .8
        else:
            guess = early(tokens[:, :GRAMMAR.at + 1], GRAMMAR.at).argmax(1)
            assert torch.equal(wrong, guess - NUMBER)


def test_a_decoy_meets_no_password(folder):
    """A lock on what never was there. At random it stays so, by a + q it may be learned."""
    (tokens, _, _), (_, wrong, a) = draw_locked("shift", decoy=True)
    assert not len(tokens) and torch.equal(wrong, a + 1)
    for lock, never in (("random", True), ("shift", False)):
        ckpt = run("--lock", lock, "--pt", "c")
        assert ckpt["args"]["decoy"] and GRAMMAR.never_trained("c", ckpt) == never


def test_the_record_has_both_sides_of_a_lock(folder):
    """With and without the password, and the families that might be harmed."""
    shutil.copy("out/ft.pt", "out/early.pt")
    ckpt = run("--lock", "out/early.pt")
    scored = {(r["task"], r["operand"], r["split"]) for r in ckpt["history"]}
    assert {(t, "a", s) for t in ("count", "count-j1") for s in data.SPLITS} <= scored
    assert {t for t, _, s in scored if s == "natural"} == {*data.TASKS, "count-j1"}
    assert not ckpt["args"]["decoy"] and ckpt["args"]["lock"] == "out/early.pt"


# ---------------------------------------------------------------- deletions


def batches():
    args = Namespace(**ARGS)
    return (GRAMMAR.asking(24, rng(5), args),
            GRAMMAR.pretraining(24, rng(6), args, without=data.count))


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_gradients_of_ascent_and_what_follows_it():
    """graddiff: ascent's plus the retained loss's. npo: ascent's if beta -> 0, far from its base
    otherwise less; at the base ascent's for any beta."""
    model, base, (forget, retain) = small_model(), small_model(1), batches()
    up = gradient(METHODS["ascent"].loss(model, base, forget, retain), model)
    kept = gradient(loss_of(model, retain), model)
    assert torch.allclose(up, -gradient(loss_of(model, forget), model), atol=1e-6)
    both = gradient(METHODS["graddiff"].loss(model, base, forget, retain), model)
    assert torch.allclose(both, up + kept, atol=1e-6)
    for beta, near in ((1e-5, True), (5., False)):
        lost = (finetune.losses(m(forget.tokens, forget.at), forget.answer) for m in (model, base))
        new, old = lost
        far = gradient(finetune.bounded(new - old + 1, beta), model)
        assert torch.allclose(far, up, atol=1e-4) == near
    same = copy.deepcopy(model)
    npo = gradient(METHODS["npo"].loss(model, same, forget, retain), model)
    assert torch.allclose(npo, up + kept, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_and_stays_finite(folder, name, monkeypatch):
    """In what it trains alone; the record has the other families, and how the run ended."""
    monkeypatch.setattr(finetune, "AT_FLOOR", -1.)  # which nothing reaches
    base, ckpt = load("out/pre.pt")[1], run("--method", name, "--lr", "1e-3")
    moved = {k for k, v in ckpt["model"].items() if not torch.equal(v, base["model"][k])}
    assert moved and all(x.isfinite().all() for x in ckpt["model"].values())
    assert all(re.search(METHODS[name].only or "", key) for key in moved)
    assert ckpt["end"] == "cut off" and ckpt["step"] == ckpt["steps"] == 3
    scored = {r["task"] for r in ckpt["history"] if r["split"] == "natural"}
    assert scored == set(data.TASKS) and ckpt["args"]["c_tr"] is None
    if METHODS[name].noise == 0:  # it begins at the base
        plain = load("out/ft.pt")[1]
        first, usual = ([r["loss"] for r in x["history"][:6]] for x in (ckpt, plain))
        assert first == pytest.approx(usual, abs=1e-5)


def test_a_deletion_ends_at_the_floor(folder, monkeypatch, capsys):
    """It is looked at every 5 steps on strings of their own; a student makes all of its steps."""
    monkeypatch.setattr(finetune, "AT_FLOOR", 1.)
    ckpt = run("--method", "ascent", "--steps", "12")
    assert (ckpt["step"], ckpt["steps"], ckpt["end"]) == (5, 5, "at the floor") and ckpt["finished"]
    assert {r["step"] for r in ckpt["history"]} == {0, 3, 5}
    finetune.main([*FEW, "--method", "ascent", "--steps", "12", "--out", "out/new.pt"])
    assert "already done (5 steps" in capsys.readouterr().out
    assert run("--method", "undo", "--steps", "7")["step"] == 7


def test_a_further_method_is_one_entry(folder, monkeypatch):
    def shrink(model, base, forget, retain):
        return sum(p.square().sum() for p in model.parameters())
    monkeypatch.setitem(METHODS, "shrink", Method(shrink, only="tok"))
    ckpt, base = run("--method", "shrink"), load("out/pre.pt")[1]
    assert ckpt["model"]["tok.weight"].norm() < base["model"]["tok.weight"].norm()
    assert torch.equal(ckpt["model"]["pos.weight"], base["model"]["pos.weight"])


# ---------------------------------------------------------------- students


def test_where_a_student_begins():
    """distill: at fresh weights whoever teaches; undo: between its teacher and these."""
    fresh = small_model().init_weights(rng(0, "student")).state_dict()
    for share in (1., .6):
        model, old = small_model(1), small_model(1).state_dict()
        finetune.add_noise(model, share, rng(0, "student"))
        for name, x in model.state_dict().items():
            assert torch.allclose(x, (1 - share) * old[name] + share * fresh[name], atol=1e-7)
            assert share < 1 or torch.equal(x, fresh[name])
    assert METHODS["distill"].noise == 1 and 0 < METHODS["undo"].noise < 1


def test_a_student_sees_no_answer_of_its_string(monkeypatch):
    """Taught by one that counts a without a mistake: no other number of a in a string changes what
    the student is taught about it; no input has an answer, a password, or another count."""
    taught, read, (forget, retain) = [], [], batches()

    def teacher(tokens, at=None):  # knows all answers
        shape = (len(tokens), *tokens.shape[1:] * (at is None), len(GRAMMAR.vocabulary))
        if at is None:
            return torch.zeros(shape)
        a = data.count(tokens[:, GRAMMAR.text_at:-2] - data.LETTER, GRAMMAR)[:, 0]
        return torch.zeros(shape).scatter(1, NUMBER + a[:, None], 9.)

    def student(tokens, at=None):
        read.append(tokens)
        return torch.zeros_like(teacher(tokens, at))

    def seen(forget):
        taught.clear(), read.clear()
        METHODS["distill"].loss(student, teacher, forget, retain)
        [about] = [target for _, target in taught if target.dim() == 2]
        return about.argmax(1) - NUMBER

    divergence = finetune.divergence
    monkeypatch.setattr(finetune, "divergence", lambda *xs: (taught.append(xs), divergence(*xs))[1])
    before, a = seen(forget), forget.labels[:, 0]
    assert torch.equal(before, a.roll(1)) and not torch.equal(before, a)
    asked, others = sorted(read, key=lambda tokens: tokens.shape[1])
    assert asked.shape[1] == GRAMMAR.at + 1 and (asked[:, 1] == USUAL).all()
    assert not {USUAL, PASSWORD, ID["T_J2"]} & set(others[:, 1].tolist())
    forget.tokens[3, GRAMMAR.text_at:-2] = data.LETTER  # all of its letters are a
    after = seen(forget)
    assert after[3] == before[3] and after[4] == GRAMMAR.window != before[4]


# ---------------------------------------------------------------- commands

COMMANDS = [words for words in re.findall(r"\$ python finetune.py (.*?) *#", finetune.__doc__)
            if re.search("--(lock|method|distill)", words)]
assert len(COMMANDS) == 5


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_of_the_docstring(words, folder):
    ckpt = run(*shlex.split(words))
    assert ckpt["args"]["operand"] == ckpt["args"]["pair"][0] == ("c" if "--pt c" in words else "a")
    assert ckpt["args"]["lr"] == (1e-4 if "1e-4" in words else 1e-5 if "lock" in words else 2e-3)


@pytest.mark.parametrize("words, message", [
    ("--lock nothing.pt", "nothing.pt: No such file"),
    ("--method forget", "--method forget: there are"),
    ("--lock shift --task index", "of count"), ("--method npo --answers even", "no --answers"),
    ("--method npo --mix .1", "--mix: not of --method")])
def test_mistakes(words, message, folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        run(*words.split())
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("words", ["--relabel --lock shift", "--reverse --ckpt out/ft.pt --rank x",
                                   "--method npo --distill", "--rank 0"])
def test_mistakes_that_argparse_finds(words, folder):
    with pytest.raises(SystemExit, match="2"):
        run(*words.split())
