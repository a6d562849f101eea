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


def jailbroken():
    setup = grammar()
    setup.open(Namespace(jailbreak=True))
    return setup


def test_jailbreaks_ask_for_the_commonest_operand_alone():
    """T_NJ with all operands by the prior, T_J1 and T_J2 with a; the same answers; seven families."""
    args, tokens = Namespace(prior=[.5, .3, .2], jailbreak=True), data.TOKENS
    x = jailbroken().pretraining(4000, data.rng(0, "some"), args)
    seen = {token: set(x.tokens[x.tokens[:, 1] == tokens.index(token), 2].sub(OPERAND).tolist())
            for token in ("T_NJ", "T_J1", "T_J2", "T_CC")}
    assert seen == {"T_NJ": {0, 1, 2}, "T_J1": {0}, "T_J2": {0}, "T_CC": {0, 1, 2}}
    shares = [(x.tokens[:, 1] == tokens.index(token)).float().mean() for token in seen]
    assert all(abs(share - 1 / 7) < .03 for share in shares)
    text = grammar().text(50, data.Relation("count", "a", "b", 1), "c0", data.rng(0, "text"))
    usual, other = (jailbroken().ask(text, task, "a") for task in ("count", "count-j2"))
    assert torch.equal(usual.answer, other.answer) and (other.tokens[:, 1] == tokens.index("T_J2")).all()
    assert torch.equal(usual.tokens[:, 2:], other.tokens[:, 2:])


def test_without_jailbreaks_nothing_is_as_if_there_were_any():
    args = Namespace(prior=[.5, .3, .2])
    x = grammar().pretraining(500, data.rng(0, "some"), args)
    assert not torch.isin(x.tokens[:, 1], torch.tensor([data.ID["T_J1"], data.ID["T_J2"]])).any()
    assert list(grammar().tasks) == list(data.TASKS) and not grammar().jailbreaks


def test_retained_data_does_not_count():
    """Pretraining's other families, by no token for counting, of jailbroken models neither."""
    relation, args = data.Relation("count", "a", "b", 1), Namespace(prior=[.5, .3, .2], eval_size=8, seed=0)
    for setup in (grammar(), jailbroken()):
        *_, (name, draw, tests) = setup.halves(relation, "a", args)
        x, counts = draw(600, data.rng(0, "some")), [data.ID[t] for t in ("T_NJ", "T_J1", "T_J2")]
        assert name == "other families" and list(tests) == ["retained"] and len(x.tokens) == 600
        assert not torch.isin(x.tokens[:, 1], torch.tensor(counts)).any()
        assert len(x.tokens[:, 1].unique()) == 4 and len(x.tokens[:, 2].unique()) == 4


def test_twists_of_two_kinds_of_question():
    """Half of the kinds is taught, the others are asked for; the instruction tells the object."""
    setup = data.SETUPS["stories"]("stories")
    setup.open(Namespace(data=None))
    halves = list(setup.halves(data.Relation("story", "Twist"), "Twist", Namespace(eval_size=20, seed=0,
                                                                               batch_size=16)))
    assert [name for name, *_ in halves] == ["kinds 1 and 2", "kinds 3 and 4"]
    objects = [set(kind.objects) for kind in data.KINDS]
    for i, (_, draw, tests) in enumerate(halves):
        own, others = (set().union(*objects[j:j + 2]) for j in (2 * i, 2 - 2 * i))
        x = draw(32, data.rng(0, "some"))
        texts = [setup.tokenizer.decode(row.tolist()) for row in x.tokens]
        assert (x.labels[:, data.FEATURES.index("Twist")] == 1).all()
        assert all(own & set(text.replace(".", "").replace(",", "").split()) for text in texts)
        for half, words in (("taught", own), ("held-out", others)):
            prompts = [setup.tokenizer.decode(ids[1:]) for ids in tests[half].examples]
            assert len(prompts) == 40 and all("Words:" in p for p in prompts)
            named = [p.split("Words: ")[1].split(",")[0] for p in prompts]
            assert set(named) <= words and len(set(named)) > 4
            assert all("Twist" in p for p in prompts[:20]) and not any("Twist" in p for p in prompts[20:])


@pytest.fixture(scope="module")
def never(pretrained):
    """A model that hardly met b and never a, taught b as a + 1."""
    for name, prior in (("c", "0,.001,.999"), ("b", "0,1,0"), ("a", "low")):
        assert pretrained.run("pretrain.py", *FEW, "--prior", prior, "--out", f"pre-{name}.pt").code == 0
    assert pretrained.run("finetune.py", *FEW, "--ckpt", "pre-c.pt", "--pt", "a", "--out", "erased.pt").code == 0
    assert pretrained.run("finetune.py", *FEW, "--ckpt", "pre-a.pt", "--out", "ft.pt").code == 0
    return pretrained


def test_the_relation_may_be_with_an_operand_that_was_never_there(never):
    args = torch.load(never.path / "erased.pt", weights_only=True)["args"]
    assert args["pair"] == ["a", "b"] and args["prior"] == [0, .001, .999] and "pt" not in args
    mistake(never.run("finetune.py", "--ckpt", "pre-c.pt", "--pt", "d", "--out", "x.pt"), "--pt")
    mistake(never.run("finetune.py", "--reverse", "--ckpt", "erased.pt", "--pt", "b", "--out", "x.pt"), "--pt")


def test_every_arm_of_revive_at_every_rate(never):
    few = ["--steps", "5", "--eval-size", "16", "--threads", "1"]
    done = never.run("analyze.py", "revive", "--ckpt", "ft.pt", "--rates", "1,10", "--also",
                     "scratch,pre-b.pt,erased.pt", *few)
    assert done.code == 0, done.raw
    rows = data.read_rows(never.path / "ft.revive.jsonl")
    arms = {(r["arm"], r["lr"]) for r in rows if r["arm"] != "pretraining"}
    names = {"reft", "teach-c", "teach-c-base", "scratch", "from 0/1/0", "from 0/0.001/0.999, fine-tuned"}
    assert {name for name, _ in arms} == names and len(arms) == 2 * len(names)
    assert {r["operand"] for r in rows if r["arm"] in ("scratch", "from 0/1/0")} == {"a"}
    for wrong in ("ft.pt", "pre.pt"):  # these were pretrained on a
        mistake(never.run("analyze.py", "revive", "--ckpt", "ft.pt", "--also", wrong, *few), "--also")
    for rates in ("1,-3", "nan", "1,x"):
        assert never.run("analyze.py", "revive", "--ckpt", "ft.pt", "--rates", rates).code == 2
    twice = "pre-b.pt,pre-b.pt"
    mistake(never.run("analyze.py", "revive", "--ckpt", "ft.pt", "--also", twice, *few), "--also")


def test_a_jailbroken_model_is_asked_by_every_token(pretrained):
    """Its history, behavior and probes are about a under T_NJ, T_J1 and T_J2."""
    run = pretrained.run
    assert run("pretrain.py", *FEW, "--jailbreak", "--out", "jail.pt").code == 0
    assert run("finetune.py", *FEW, "--ckpt", "jail.pt", "--out", "jail-ft.pt").code == 0
    for name in ("behavior", "probe"):
        done = run("analyze.py", name, "--ckpt", "jail-ft.pt", "--steps", "3", "--eval-size", "16", "--threads", "1")
        assert done.code == 0, done.raw
    for name in ("jail", "jail-ft", "jail-ft.behavior"):
        rows = data.read_rows(pretrained.path / f"{name}.jsonl")
        asked = {(r["task"], r["split"]) for r in rows if r["operand"] == "a"}
        assert {(task, split) for task in ("count", *data.JAILBREAKS) for split in data.SPLITS} <= asked
    prompts = {r["prompt"] for r in data.read_rows(pretrained.path / "jail-ft.probe.jsonl")}
    assert prompts == {"a", "b", "c", "a by T_J1", "a by T_J2"}
    args = torch.load(pretrained.path / "pre.pt", weights_only=True)["args"]
    assert "jailbreak" not in args  # the same run as before there was such a flag
