"""
Other conditions of a fine-tuning: pretraining's sequences mixed in, answers for another operand, half
of the answers, a named part of the model. What the data is, and a tiny run of each.
"""
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import data
import finetune
import pretrain
from data import NUMBER, OPERAND, UserError
from model import GPT, Config, compile_program, loss_of
from test_promises import Folder, mistake

FEW = ["--steps", "3", "--batch-size", "8", "--eval-size", "16", "--threads", "1", "--dtype", "float32"]


def grammar(scale="small"):
    return data.SETUPS["pcfg"]("pcfg", scale)


def arguments(**changed):
    usual = dict(task="count", pair=["a", "b"], q=1, operand="b", c_tr=.5, prior=[.5, .3, .2], mix=0.,
                 relabel=False, answers=None)
    return Namespace(**{**usual, **changed})


def draw(setup, n=400, **changed):
    return setup.finetuning(n, data.rng(3, "some"), arguments(**changed))


@pytest.mark.parametrize("share", [.1, .5, 1.])
def test_mixed_batches_hold_their_share_of_pretraining(share):
    """
    A row is the fine-tuning's, unchanged, with one wanted output, or a whole sequence of pretraining, of
    any family and operand, with every output wanted; the share is what was asked for.
    """
    setup, n = grammar(), 2000
    plain, x = draw(setup, n), draw(setup, n, mix=share)
    wanted, width = (x.target >= 0).sum(1), plain.tokens.shape[1]
    mixed = wanted > 1
    assert abs(mixed.float().mean() - share) < 4 * (share * (1 - share) / n) ** .5 + 1e-9
    assert torch.equal(x.tokens[~mixed, :width], plain.tokens[~mixed])
    assert torch.equal(x.target[~mixed, setup.at], plain.answer[~mixed]) and (wanted[~mixed] == 1).all()
    whole = x.tokens[mixed]
    assert torch.equal(x.target[mixed, :-1], whole[:, 1:]) and (wanted[mixed] == setup.length + 8).all()
    assert len(whole[:, 1].unique()) == 5 and {OPERAND, OPERAND + 1, OPERAND + 2} <= set(whole[:, 2].tolist())
    assert torch.allclose(x.weight[~mixed].sum(1), torch.tensor(1.))
    assert torch.allclose(x.weight[mixed].sum(1), torch.tensor(1 + setup.answer_weight))


def test_nothing_mixed_in_is_what_there_was():
    assert draw(grammar()).weight is None and draw(grammar()).at == grammar().at
    assert not (draw(grammar(), mix=1e-9).target >= 0).sum(1).sub(1).any()


def test_the_loss_of_a_mixed_batch_is_the_mean_of_its_rows():
    """Of each row the loss that it has by itself, in fine-tuning or in pretraining; gradients too."""
    setup = grammar()
    model = GPT(Config(**setup.config())).init_weights(data.rng(0, "weights"))
    x = draw(setup, 40, mix=.4)
    losses = []
    for row in x.split(1):
        if (row.target >= 0).sum() == 1:
            losses.append(F.cross_entropy(model(row.tokens, setup.at), row.target[:, setup.at]))
        else:
            losses.append(loss_of(model, row._replace(weight=None, extra=(setup.at, setup.answer_weight))))
    slow = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
    fast = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    assert loss_of(model, x).item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(slow, fast))
    parts = [loss_of(model, part) * share for part, share in map(part_of_two(x), (0, 1))]
    assert (sum(parts) / 2).item() == pytest.approx(loss_of(model, x).item(), abs=1e-5)


def part_of_two(x):
    def part(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", "2")
            return pretrain.part_of(x)
    return part


def test_relabelled_strings_ask_for_one_and_answer_for_the_other():
    x, plain = draw(grammar(), relabel=True), draw(grammar())
    assert (x.tokens[:, 2] == OPERAND).all() and (plain.tokens[:, 2] == OPERAND + 1).all()
    assert torch.equal(x.answer, NUMBER + x.labels[:, 1]) and torch.equal(x.answer, plain.answer)
    assert torch.equal(x.tokens[:, 3:], plain.tokens[:, 3:])


@pytest.mark.parametrize("answers", ["even", "odd"])
@pytest.mark.parametrize("name, task, pair", [("pcfg", "count", "ab"), ("pcfg", "index", "ab"),
                                              ("tracr-count", "count", "ab"), ("tracr-max", None, "57")])
def test_only_even_or_odd_answers_are_taught(name, task, pair, answers):
    """Of the operand that is asked for, whatever the other one has; several answers are left."""
    setup = data.SETUPS[name](name)
    task = task or setup.finetuned[0]
    changed = dict(task=task, pair=list(pair), operand=pair[0], c_tr=0., answers=answers,
                   q=setup.default_q(*pair))
    x = draw(setup, **changed)
    asked, other = (x.labels[:, setup.operands.index(o)] for o in pair)
    assert (asked % 2 == (answers == "odd")).all() and len(asked.unique()) > 2
    assert len((other % 2).unique()) == 2
    assert torch.equal(x.answer, setup.first_answer(task) + asked)


def test_all_but_the_named_part_is_frozen():
    model = GPT(Config(**grammar().config()))
    finetune.train_only(model, r"blocks\.1\.(up|down)")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"blocks.1.{x}.{y}" for x in ("up", "down") for y in ("weight", "bias")]
    setup = data.SETUPS["tracr-count"]("tracr-count")
    program = compile_program(setup.program.steps("a"), setup.alphabet, setup.room)
    for wrong in ("blocks.9", "(", "head"):  # the output map of a compiled model is never trained
        with pytest.raises(UserError, match="--only"):
            finetune.train_only(program, wrong)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("conditions"))
    assert folder.run("pretrain.py", *FEW, "--prior", "high", "--out", "pre.pt").code == 0
    assert folder.run("pretrain.py", "--setup", "tracr-count", "--eval-size", "16", "--out", "pro.pt").code == 0
    return folder


@pytest.mark.parametrize("ckpt, more", [
    ("pre.pt", ["--mix", ".5"]), ("pre.pt", ["--relabel"]), ("pre.pt", ["--answers", "odd"]),
    ("pre.pt", ["--mix", ".1", "--relabel", "--answers", "even"]), ("pro.pt", ["--answers", "even"]),
    ("pre.pt", ["--only", r"blocks.0|tok"]), ("pro.pt", ["--only", "up", "--lr", "1e-2"])])
def test_tiny_runs(pretrained, ckpt, more):
    """Every condition trains and its record says so; with --only all else is the base bit by bit, noise included."""
    name = "".join(x.strip("-") for x in more if x.isascii())[:9].replace(".", "") + ckpt
    result = pretrained.run("finetune.py", *FEW, "--ckpt", ckpt, *more, "--out", name)
    assert result.code == 0 and not result.err, result.raw
    before, after = (torch.load(pretrained.path / x, weights_only=True) for x in (ckpt, name))
    args = after["args"]
    if "--only" in more:
        pattern = args["only"]
        moved = {k for k, v in after["model"].items() if not torch.equal(v, before["model"][k])}
        assert moved and all(any(part in k for part in pattern.split("|")) for k in moved)
    for flag, value in zip(more, more[1:]):
        if flag in ("--mix", "--answers"):
            assert str(args[flag[2:]]).lstrip("0") == value
    reft = pretrained.run("finetune.py", *FEW, "--reverse", "--ckpt", name, "--out", "reft-" + name)
    assert reft.code == 0, reft.raw
    args = torch.load(pretrained.path / ("reft-" + name), weights_only=True)["args"]
    assert args["only"] is None and not args["answers"] and not args.get("mix") and not args.get("relabel")


def test_conditions_that_cannot_be(pretrained):
    for more, says in ((["--mix", "1.5"], "--mix 1.5"), (["--only", "nothing"], "--only nothing"),
                       (["--only", "("], "--only ("), (["--answers", "none"], "--answers")):
        result = pretrained.run("finetune.py", *FEW, "--ckpt", "pre.pt", *more, "--out", "no.pt")
        assert result.code == 2 and says in result.raw and "Traceback" not in result.raw
    mistake(pretrained.run("finetune.py", *FEW, "--ckpt", "pro.pt", "--relabel", "--out", "no.pt"), "--relabel", "pcfg")
    assert not (pretrained.path / "no.pt").exists()
