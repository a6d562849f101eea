"""
The conditions of a fine-tuning: pretraining's sequences mixed in, answers for another operand, half
of the answers, a named part of the model, another pretrained operand, jailbreaks. What the data is,
and a tiny run of each.
"""
import re
import shlex
import shutil
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import data
import finetune
import pretrain
from data import ID, NUMBER, OPERAND, Relation, UserError, rng
from model import GPT, Config, load, loss_of

FEW = "--steps 3 --eval-every 3 --eval-size 16 --batch-size 8 --threads 1".split()
GRAMMAR = data.Grammar("pcfg")


def draw(n=400, **changed):
    """Examples of a fine-tuning with these arguments."""
    args = dict(task="count", pair=["a", "b"], q=1, operand="b", c_tr=.5, prior=[.5, .3, .2],
                mix=0., relabel=False, answers=None)
    return GRAMMAR.finetuning(n, rng(3, "test"), Namespace(**{**args, **changed}))


def small_model():
    return GPT(Config(**GRAMMAR.config())).init_weights(rng(0, "weights"))


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("p", [.1, .5, 1.])
def test_mixed_batches_hold_a_share_of_pretraining(p):
    """
    A row is the fine-tuning's, unchanged, with one wanted output, or a whole sequence of
    pretraining, of any family and operand, with every output wanted; the share is --mix.
    """
    n, at = 2000, GRAMMAR.at
    plain, x = draw(n), draw(n, mix=p)
    wanted, width = (x.target >= 0).sum(1), plain.tokens.shape[1]
    mixed = wanted > 1
    assert abs(mixed.float().mean() - p) <= 4 * (p * (1 - p) / n) ** .5
    assert torch.equal(x.tokens[~mixed, :width], plain.tokens[~mixed]) and plain.weight is None
    assert torch.equal(x.target[~mixed, at], plain.answer[~mixed]) and (wanted[~mixed] == 1).all()
    whole = x.tokens[mixed]
    assert torch.equal(x.target[mixed, :-1], whole[:, 1:])
    assert (wanted[mixed] == GRAMMAR.length + 8).all() and len(whole[:, 1].unique()) == 5
    assert {OPERAND, OPERAND + 1, OPERAND + 2} <= set(whole[:, 2].tolist())
    assert torch.allclose(x.weight.sum(1), 1 + GRAMMAR.answer_weight * mixed)


def test_the_loss_of_a_mixed_batch_is_the_mean_of_its_rows():
    """Of each row the loss that it has by itself, in fine-tuning or pretraining; gradients too."""
    model, x, losses = small_model(), draw(40, mix=.4), []
    for row in x.split(1):
        if (row.target >= 0).sum() == 1:
            losses.append(F.cross_entropy(model(row.tokens, GRAMMAR.at), row.target[:, GRAMMAR.at]))
        else:
            extra = GRAMMAR.at, GRAMMAR.answer_weight
            losses.append(loss_of(model, row._replace(weight=None, extra=extra)))
    mean, mixed = torch.stack(losses).mean(), loss_of(model, x)
    slow, fast = (torch.autograd.grad(loss, list(model.parameters())) for loss in (mean, mixed))
    assert mixed.item() == pytest.approx(mean.item(), abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(slow, fast))
    for part, rows in zip(x.split(8), torch.stack(losses).split(8), strict=True):
        assert (part.target[:, -1] >= 0).any()  # columns that no row of the batch needs are cut
        assert loss_of(model, part).item() == pytest.approx(rows.mean().item(), abs=1e-5)


def test_relabelled_strings_ask_for_one_and_answer_for_the_other():
    x, plain = draw(relabel=True), draw()
    assert (x.tokens[:, 2] == OPERAND).all() and (plain.tokens[:, 2] == OPERAND + 1).all()
    assert torch.equal(x.answer, NUMBER + x.labels[:, 1]) and torch.equal(x.answer, plain.answer)
    assert torch.equal(x.tokens[:, 3:], plain.tokens[:, 3:])


@pytest.mark.parametrize("answers", ["even", "odd"])
@pytest.mark.parametrize("task", data.Grammar.finetuned)
def test_only_even_or_odd_answers_are_taught(task, answers):
    """Of the operand that is asked for, whatever the other one has; several answers are left."""
    x = draw(task=task, operand="a", c_tr=0., answers=answers)
    asked, other = x.labels[:, 0], x.labels[:, 1]
    assert (asked % 2 == (answers == "odd")).all() and len(asked.unique()) > 2
    assert len((other % 2).unique()) == 2 and torch.equal(x.answer, NUMBER + asked)


def jailbroken():
    setup = data.Grammar("pcfg")
    setup.open(Namespace(jailbreak=True))
    return setup


def test_jailbreaks_ask_for_the_commonest_operand_alone():
    """T_NJ with all operands by the prior, T_J1 and T_J2 with a; the same answers; 7 families."""
    args = Namespace(prior=[.5, .3, .2])
    x = jailbroken().pretraining(4000, rng(0, "test"), args)
    for token, operands in {"T_NJ": 3, "T_J1": 1, "T_J2": 1, "T_CC": 3}.items():
        asked = x.tokens[:, 1] == ID[token]
        assert abs(asked.float().mean() - 1 / 7) < .03
        assert x.tokens[asked, 2].unique().tolist() == [OPERAND + i for i in range(operands)]
    text = GRAMMAR.text(50, Relation("count", "a", "b", 1), "c0", rng(0, "text"))
    usual, other = (jailbroken().ask(text, task, "a") for task in ("count", "count-j2"))
    assert torch.equal(usual.answer, other.answer) and (other.tokens[:, 1] == ID["T_J2"]).all()
    assert torch.equal(usual.tokens[:, 2:], other.tokens[:, 2:])
    plain = GRAMMAR.pretraining(500, rng(0, "test"), args).tokens[:, 1]
    assert list(GRAMMAR.tasks) == list(data.TASKS)
    assert not {ID["T_J1"], ID["T_J2"]} & set(plain.tolist())


def test_halves_of_held_out_relearning():
    """Taught and held-out answers share out one test set; other families never count."""
    relation = Relation("count", "a", "b", 1)
    args = Namespace(prior=[.5, .3, .2], eval_size=64, seed=0)
    for setup in (GRAMMAR, jailbroken()):
        *halves, (name, others, tests) = setup.halves(relation, "a", args)
        for (answers, teach, parts), odd in zip(halves, (0, 1), strict=True):
            assert (teach(60, rng(0)).labels[:, 0] % 2 == odd).all() and answers in ("even", "odd")
            taught, rest = (parts[half].examples.labels[:, 0] for half in ("taught", "held-out"))
            assert (taught % 2 == odd).all() and (rest % 2 != odd).all()
            assert len(taught) + len(rest) == 64
        x, counting = others(600, rng(0)), {ID[token] for token in ("T_NJ", "T_J1", "T_J2")}
        assert name == "other families" and list(tests) == ["retained"] and len(x.tokens) == 600
        families = set(x.tokens[:, 1].tolist())
        assert len(families) == 4 and families.isdisjoint(counting)
        assert len(x.tokens[:, 2].unique()) == 4


# ---------------------------------------------------------------- a part of the model


def test_all_but_the_named_part_is_frozen():
    model = small_model()
    finetune.train_only(model, r"blocks\.1\.(up|down)")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"blocks.1.{x}.{y}" for x in ("up", "down") for y in ("weight", "bias")]
    fixed = GPT(Config(**{**GRAMMAR.config(), "train_head": False}))
    for wrong in ("blocks.9", "(", "head", ""):  # a fixed output map is never trained
        with pytest.raises(UserError, match="--only " + re.escape(wrong)):
            finetune.train_only(fixed, wrong)


# ---------------------------------------------------------------- runs


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """The tiny checkpoints in a folder of their own, which is the working directory."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    """(arguments, checkpoint) of a tiny run to out/new.pt."""
    finetune.main([*FEW, "--out", "out/new.pt", "--force", *words])
    ckpt = load("out/new.pt")[1]
    return ckpt["args"], ckpt


def moved(one, other):
    """Names of the weights that differ."""
    return {k for k, v in one["model"].items() if not torch.equal(v, other["model"][k])}


COMMANDS = re.findall(r"\$ python finetune.py (.*?) *#", finetune.__doc__)
assert len(COMMANDS) == finetune.__doc__.count("$ python") > 1
COMMANDS = [words for words in COMMANDS if not re.search("--(lock|method|distill)", words)]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_of_the_docstring(words, folder):
    """Each trains from the checkpoint it names, and its record says under which condition."""
    reverse, only = "--reverse" in words, re.search(r"--only (\S+)", words)
    parent = load("out/ft.pt" if reverse else "out/pre.pt")[1]
    args, ckpt = run(*shlex.split(words))
    assert ckpt["parent"] == {"path": parent["path"], "sha256": parent["sha256"]}
    assert args["pair"] == ["a", "b"] and args["operand"] == ("a" if reverse else "b")
    assert args["c_tr"] == (0 if reverse else 1) and ckpt["finished"] and ckpt["step"] == 3
    changed = moved(ckpt, parent)
    assert changed and all(not only or re.search(only[1], name) for name in changed)
    assert args["relabel"] == ("--relabel" in words) and args["mix"] == .1 * ("--mix" in words)
    assert args["answers"] == ("even" if "--answers" in words else None)
    scored = {(row["step"], row["operand"], row["split"]) for row in ckpt["history"]}
    assert scored == {(s, o, split) for s in (0, 3) for o in "ab" for split in data.SPLITS}


def test_conditions_are_not_inherited_by_reft(folder):
    """All at once; the reverse of it has none of them, but its relation."""
    words = "--mix .5 --relabel --answers odd --only blocks --task index --operand c --q 2"
    args, ckpt = run(*shlex.split(words))
    assert (args["mix"], args["relabel"], args["answers"]) == (.5, True, "odd")
    assert moved(ckpt, load("out/pre.pt")[1]) and args["taught"] == ["c"]
    shutil.copy("out/new.pt", "out/odd.pt")
    args, _ = run("--reverse", "--ckpt", "out/odd.pt")
    assert (args["mix"], args["relabel"], args["answers"], args["only"]) == (0, False, None, None)
    assert args["pair"] == ["a", "c"] and args["q"] == 2 and args["taught"] == ["c", "a"]


def test_the_relation_may_be_with_an_operand_that_was_never_there(folder):
    """--pt; the capability of the pretraining stays what it was."""
    pretrain.main([*FEW, "--prior", "0,.001,.999", "--out", "out/c.pt"])
    args, ckpt = run("--ckpt", "out/c.pt", "--pt", "a")
    assert args["pair"] == ["a", "b"] and args["prior"] == [0, .001, .999] and "pt" not in args
    assert GRAMMAR.never_trained("a", ckpt) and not GRAMMAR.never_trained("b", ckpt)


def test_a_jailbroken_model_is_scored_by_every_token(folder):
    """Its history is about a under T_NJ, T_J1 and T_J2."""
    pretrain.main([*FEW, "--jailbreak", "--out", "out/jail.pt"])
    args, ckpt = run("--ckpt", "out/jail.pt")
    scored = {(row["task"], row["split"]) for row in ckpt["history"] if row["operand"] == "a"}
    assert scored == {(t, split) for t in ("count", *data.JAILBREAKS) for split in data.SPLITS}
    assert args["jailbreak"] and not load("out/ft.pt")[1]["args"]["jailbreak"]


@pytest.mark.parametrize("words, message", [
    ("--pt d", "--pt d: there are a, b, c"), ("--pt b --operand b", "--operand b is what"),
    ("--q 99", "offset q = 99 leaves no count strings"),
    ("--task index --q 17", "offset q = 17 leaves no index strings")])
def test_mistakes(words, message, folder):
    """One line that names the flag, before anything is written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        run(*words.split())
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("words", ["--mix 1.5", "--answers none", "--c-tr -1", "--task token",
                                   "--reverse --pt b"])
def test_mistakes_that_argparse_finds(words, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words.split())
    assert words.split()[-2] in capsys.readouterr().err.splitlines()[-1]
