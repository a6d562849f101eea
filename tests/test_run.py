"""
What a training run promises: the same command goes on wherever it was stopped, other ones are
refused, a checkpoint is always whole, and processes that train together do what one does.
"""
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import finetune
import pretrain
from data import UserError
from model import load

ROOT = Path(__file__).parent.parent
TINY = ["--batch-size", "8", "--eval-size", "8", "--threads", "1"]
PRETRAIN = ["--steps", "24", "--eval-every", "8", "--save-every", "5", *TINY]
FINETUNE = ["--steps", "12", "--eval-every", "4", "--save-every", "5", *TINY]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with an undisturbed pretraining and fine-tuning, under out/."""
    before, path = os.getcwd(), tmp_path_factory.mktemp("finished")
    os.chdir(path)
    pretrain.main(PRETRAIN)
    finetune.main(FINETUNE)
    os.chdir(before)
    return path


def read(path):
    return torch.load(path, weights_only=True)


def assert_same_run(a, b):
    """Equal weights, bit for bit, and equal histories."""
    a, b = read(a), read(b)
    assert a["history"] == b["history"] and a["step"] == b["step"]
    assert a["finished"] and b["finished"]
    for name, x in a["model"].items():
        assert torch.equal(x, b["model"][name]), name


def script(name, *words, **more):
    """A script as a user starts it. Returns the process."""
    return subprocess.Popen([sys.executable, ROOT / name, *words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **more)


# ---------------------------------------------------------------- stopped and going on


PRE, TUNE = (pretrain.main, PRETRAIN, "out/pre.pt"), (finetune.main, FINETUNE, "out/ft.pt")


@pytest.mark.parametrize("main, words, out, step", [
    (*PRE, 7), (*PRE, 9), (*TUNE, 0), (*TUNE, 3), (*TUNE, 5), (*TUNE, 10)])
def test_a_stopped_run_goes_on(finished, folder, monkeypatch, main, words, out, step):
    """SIGTERM at a step: saved, exit 143; the same command then gives what it gives undisturbed."""
    if main is finetune.main:
        words = [*words, "--ckpt", str(finished / "out/pre.pt")]
    calls, update = [], pretrain.update

    def stopping(*args):
        update(*args)
        calls.append(0)
        if len(calls) == step + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys.modules[main.__module__], "update", stopping)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert read(out)["step"] == step + 1 and not read(out)["finished"]
    with pytest.raises(UserError, match=f"unfinished, step {step + 1}"):
        load(out)
    main(words)
    assert len(calls) == int(words[1]), "a step was trained twice or left out"
    assert_same_run(out, finished / out)
    assert [start["step"] for start in read(out)["starts"]] == [0, step + 1]


def test_stopped_while_the_untouched_model_is_scored(finished, folder, monkeypatch):
    """It is not scored again."""
    evaluate = pretrain.evaluate

    def stopping(*args):
        if not os.path.exists("out/pre.pt"):
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(pretrain, "evaluate", stopping)
    with pytest.raises(SystemExit, match="130"):
        pretrain.main(PRETRAIN)
    pretrain.main(PRETRAIN)
    assert_same_run("out/pre.pt", finished / "out/pre.pt")


def test_a_second_signal_acts_at_once(folder, monkeypatch):
    """In the middle of a step that never ends, say."""
    def endless(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(pretrain, "update", endless)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(PRETRAIN)


def test_a_killed_run_goes_on(finished, folder, request):
    """kill -9 at a moment that nobody chose (slow: three times), then once more without."""
    words, draws = [*PRETRAIN[:5], "1", *TINY], np.random.default_rng()
    kills, out = 3 if request.config.getoption("--slow") else 1, folder / "out/pre.pt"
    for _ in range(kills):
        saved = out.exists() and out.stat().st_mtime_ns
        process = script("pretrain.py", *words)
        while process.poll() is None and saved == (out.exists() and out.stat().st_mtime_ns):
            time.sleep(.002)
        time.sleep(draws.uniform(0, .2))
        process.kill()
        process.communicate()
        load(out, unfinished=True)  # whole, whenever it was killed
    step, starts = read(out)["step"], read(out)["starts"]
    process = script("pretrain.py", *words)
    assert process.communicate() and process.returncode == 0
    a, b = read(out), read(finished / "out/pre.pt")
    assert a["history"] == b["history"]
    assert all(torch.equal(x, b["model"][name]) for name, x in a["model"].items())
    assert len(a["starts"]) == len(starts) + (step < 24)


def test_the_same_command_again_is_done(finished, folder, capsys):
    pretrain.main(PRETRAIN)
    before = os.stat("out/pre.pt").st_mtime_ns
    capsys.readouterr()
    pretrain.main(PRETRAIN)
    assert "already done (24 steps" in capsys.readouterr().out
    assert os.stat("out/pre.pt").st_mtime_ns == before


# ---------------------------------------------------------------- what stands at --out


@pytest.mark.parametrize("words, named", [
    (["--seed", "1"], "--seed 0"), (["--lr", "1e-2"], "--lr 0.002"), (["--steps", "9"], "--steps 24"),
    (["--prior", "high"], r"--prior \[0.999")])
def test_another_run_is_refused_by_name(finished, folder, words, named):
    (folder / "out").mkdir()
    (folder / "out/pre.pt").write_bytes((finished / "out/pre.pt").read_bytes())
    with pytest.raises(UserError, match=f"another run, of {named}"):
        pretrain.main([*PRETRAIN, *words])
    pretrain.main([*PRETRAIN, *words, "--force", "--steps", "1"])
    assert read("out/pre.pt")["steps"] == 1


def test_what_may_differ(finished, folder):
    """How often it is saved, threads and the place of the parent make no other run."""
    for name in ("pre.pt", "ft.pt"):
        (folder / name).write_bytes((finished / "out" / name).read_bytes())
    finetune.main([*FINETUNE, "--ckpt", "pre.pt", "--out", "ft.pt", "--save-every", "100"])
    assert read("ft.pt")["starts"] == read(finished / "out/ft.pt")["starts"]
    # X.json is written anew: a kill may have come between the two files
    assert (folder / "ft.json").read_text() == (finished / "out/ft.json").read_text()


def test_another_parent_is_refused(finished, folder):
    """The same arguments, but the checkpoint behind --ckpt has changed since."""
    (folder / "ft.pt").write_bytes((finished / "out/ft.pt").read_bytes())
    pretrain.main(["--steps", "1", *TINY])
    with pytest.raises(UserError, match="another parent"):
        finetune.main([*FINETUNE, "--out", "ft.pt"])


def test_a_parent_is_not_replaced(finished, folder):
    (folder / "pre.pt").write_bytes((finished / "out/pre.pt").read_bytes())
    with pytest.raises(UserError, match="pre.pt is what this run starts from"):
        finetune.main([*FINETUNE, "--ckpt", "pre.pt", "--out", str(folder / "pre.pt"), "--force"])
    with pytest.raises(UserError, match="is a folder"):
        finetune.main([*FINETUNE, "--ckpt", "pre.pt", "--out", str(folder), "--force"])


@pytest.mark.parametrize("name", ("pre.json", "pre.pt"))
def test_a_foreign_file_is_not_replaced(folder, name):
    (folder / "out").mkdir()
    (folder / "out" / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=name):
        pretrain.main(["--steps", "1", *TINY])
    assert (folder / "out" / name).read_text() == '{"mine": 1}'


# ---------------------------------------------------------------- what a run writes


def test_the_record_is_the_checkpoint_without_tensors(finished):
    for name in ("pre", "ft"):
        ckpt = read(finished / f"out/{name}.pt")
        record = json.loads((finished / f"out/{name}.json").read_text(), parse_constant=pytest.fail)
        assert record.pop("sha256") == data.sha256(finished / f"out/{name}.pt")
        assert ckpt["optimizer"] == {}, "a finished one keeps no moments"
        tuples = [k for k, v in ckpt["config"].items() if isinstance(v, tuple)]
        for key in set(ckpt) - {"model", "optimizer"}:
            value = ckpt[key]
            if key == "config":
                value = {k: v for k, v in value.items() if k not in tuples}
            assert record.pop(key) == json.loads(json.dumps(value)), key
        assert not record
    parent = read(finished / "out/ft.pt")["parent"]
    assert parent == {"path": "out/pre.pt", "sha256": data.sha256(finished / "out/pre.pt")}


def test_history_goes_from_the_untouched_model_to_the_finished_one(finished):
    for name, steps in (("pre", {0, 8, 16, 24}), ("ft", {0, 4, 8, 12})):
        ckpt = read(finished / f"out/{name}.pt")
        assert {row["step"] for row in ckpt["history"]} == steps
        for row in ckpt["history"]:
            assert set(data.ROW) < set(row)
            assert 0 <= row["floor"] <= 1 and 0 <= row["accuracy"] <= 1
    before, after = (read(finished / f"out/{name}.pt")["history"] for name in ("pre", "ft"))
    last = {(r["operand"], r["split"]): r["accuracy"] for r in before
            if r["step"] == 24 and r["task"] == "count"}
    for row in after:
        if row["step"] == 0:
            assert row["accuracy"] == last[row["operand"], row["split"]]


def test_evaluation_does_not_touch_training(finished, folder):
    words = ["--steps", "24", *TINY, "--eval-size", "16", "--eval-every", "5"]
    pretrain.main([*words, "--out", "pre.pt"])
    other = read(finished / "out/pre.pt")["model"]
    assert all(torch.equal(x, other[name]) for name, x in read("pre.pt")["model"].items())


def test_kept_checkpoints(finished, folder):
    """--keep: whole, finished as far as analyses are concerned, on the way of the very same run."""
    words = ["--ckpt", str(finished / "out/pre.pt"), "--out", "ft.pt", "--keep", "3,7"]
    finetune.main([*FINETUNE, *words])
    for step in (3, 7):
        _, ckpt = load(f"ft.step{step}.pt")
        assert (ckpt["step"], ckpt["steps"], ckpt["finished"]) == (step, 12, True)
        assert json.loads((folder / f"ft.step{step}.json").read_text())["step"] == step
    assert not torch.equal(*(read(f"ft.step{s}.pt")["model"]["tok.weight"] for s in (3, 7)))
    other = read(finished / "out/ft.pt")["model"]
    assert all(torch.equal(x, other[name]) for name, x in read("ft.pt")["model"].items())


def test_a_run_that_diverges_stops(folder, monkeypatch):
    """Its weights are neither scored nor saved; the last good checkpoint stays."""
    calls, update = [], pretrain.update

    def diverging(model, *args):
        update(model, *args)
        calls.append(0)
        if len(calls) == 7:
            next(model.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(pretrain, "update", diverging)
    with pytest.raises(SystemExit, match="step 8: .* not finite .* --lr 0.002 .* out/pre.pt"):
        pretrain.main(PRETRAIN)
    assert read("out/pre.pt")["step"] == 5
    assert all(x.isfinite().all() for x in read("out/pre.pt")["model"].values())


# ---------------------------------------------------------------- flags and exit codes


@pytest.mark.parametrize("main, words, message", [
    (pretrain.main, ["--setup", "nonsense"], "--setup nonsense: there are .*pcfg.*stories.*tracr"),
    (pretrain.main, ["--setup", "tracr-nonsense"], "there are tracr-count, tracr-max"),
    (pretrain.main, ["--prior", "huge"], "--prior 'huge': give low"),
    (pretrain.main, ["--device", "cuda:7"], "--device cuda:7"),
    (finetune.main, ["--ckpt", "nothing.pt"], "nothing.pt: No such file"),
    (finetune.main, ["--ckpt", "."], r"\.: Is a directory"),
    (finetune.main, ["--operand", "a"], "--operand a is what .* was pretrained on"),
    (finetune.main, ["--operand", "x"], "--operand x: there are a, b, c"),
    (finetune.main, ["--q", "0"], "offset q = 0 leaves no count strings"),
    (finetune.main, ["--q", "17"], "offset q = 17 leaves"),
    (finetune.main, ["--only", "nothing"], "--only nothing: matches no parameter"),
    (finetune.main, ["--only", "("], r"--only \("),
    (finetune.main, ["--reverse", "--ckpt", "out/pre.pt"], "was not fine-tuned")])
def test_mistakes_of_arguments(finished, monkeypatch, main, words, message):
    monkeypatch.chdir(finished)
    with pytest.raises(UserError, match=message):
        main([*words, "--out", "new.pt"])
    assert not os.path.exists("new.pt")


@pytest.mark.parametrize("main, words", [
    (pretrain.main, ["--steps", "0"]), (pretrain.main, ["--lr", "nan"]), (pretrain.main, ["--eval", "3"]),
    (pretrain.main, ["--batch-size", "many"]), (pretrain.main, ["--keep", "1,x"]),
    (pretrain.main, ["--c-tr", "1"]), (finetune.main, ["--c-tr", "1.5"]),
    (finetune.main, ["--prior", "low"]), (pretrain.main, ["--setup", "stories", "--prior", "low"]),
    (finetune.main, ["--reverse", "--ckpt", "out/ft.pt", "--operand", "c"]),
    (pretrain.main, ["--out", ""])])
def test_mistakes_of_flags(finished, monkeypatch, capsys, main, words):
    """argparse's own errors: exit code 2. A flag of another setup, or half of one, is unknown."""
    monkeypatch.chdir(finished)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and words[-2] in capsys.readouterr().err


@pytest.mark.parametrize("main, words, shown", [
    (pretrain.main, [], "--prior PRIOR"), (pretrain.main, ["--scale", "paper"], "default: 50000"),
    (pretrain.main, ["--setup", "tracr-max"], "--rank"),
    (finetune.main, [], "default: 1e-05"), (finetune.main, ["--ckpt", "out/pre.pt"], "--c-tr"),
    (finetune.main, ["--reverse"], "default: out/reft.pt")])
def test_help_shows_the_flags_and_defaults_of_the_setup(finished, monkeypatch, capsys, main, words,
                                                        shown):
    monkeypatch.chdir(finished)
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0 and shown in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_2(folder):
    process = script("finetune.py", "--ckpt", "nothing.pt")
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert len(err.splitlines()) == 1 and "nothing.pt: No such file" in err


# ---------------------------------------------------------------- a step


def test_update_is_a_plain_step_of_adamw():
    """Against the same written out: clipped gradients, the rate of this step, gradients cleared."""
    models, losses = [torch.nn.Linear(3, 2) for _ in range(2)], []
    models[1].load_state_dict(models[0].state_dict())
    setup = data.Grammar("pcfg")
    optimizers = [setup.optimizer(models[0], 1.),
                  torch.optim.AdamW(models[1].parameters(), betas=(.9, .95), weight_decay=.1)]
    x = torch.randn(5, 3)
    for lr in (.1, .02):
        losses = [10 * m(x).square().sum() for m in models]
        pretrain.update(models[0], optimizers[0], losses[0], lr, clip=.5)
        losses[1].backward()
        norm = sum(p.grad.square().sum() for p in models[1].parameters()).sqrt()
        for p in models[1].parameters():
            p.grad *= .5 / norm
        optimizers[1].param_groups[0]["lr"] = lr
        optimizers[1].step()
        optimizers[1].zero_grad()
    for p, q in zip(*(m.parameters() for m in models)):
        assert torch.allclose(p, q, atol=1e-6) and p.grad is None


def test_rates():
    """Up in a fifth of the steps, then down along half a cosine; reFT's stays where it is."""
    lr_at = pretrain.cosine(1., 100, final=.01)
    assert [lr_at(s) for s in (0, 9, 19, 20)] == pytest.approx([.05, .5, 1., 1.])
    assert lr_at(60) == pytest.approx(.505) and lr_at(100) == pytest.approx(.01)
    constant = pretrain.constant(2.)
    assert [constant(s) for s in (0, 9, 19, 20, 10000)] == pytest.approx([.1, 1., 2., 2., 2.])


def test_steps_that_are_evaluated():
    assert pretrain.eval_steps(100, 40) == {0, 40, 80, 100}
    assert pretrain.eval_steps(25, 0) == {0, 1, 2, 3, 5, 8, 10, 20, 25}


def test_dtype(monkeypatch):
    """auto: bfloat16 where the CPU multiplies in it; never in a setup that is exact."""
    setup = Namespace(device=torch.device("cpu"), exact=False)
    for can, enabled in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: can)
        assert (pretrain.training_dtype("auto", setup) == "bfloat16") == enabled
    for name, exact, enabled in (("bfloat16", False, True), ("bfloat16", True, False),
                                 ("float32", False, False)):
        setup.exact = exact
        assert (pretrain.training_dtype(name, setup) == "bfloat16") == enabled


# ---------------------------------------------------------------- several processes


def torchrun(*words):
    """Two processes, as a user starts them, with a time limit of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=240)


def test_two_processes_train_as_one(finished, folder):
    """The same batches in slices: equal but for rounding. One of them scores, saves and prints."""
    one, two = ([*FINETUNE, "--ckpt", finished / "out/pre.pt", "--dtype", "float32", "--lr", "1e-3",
                 "--out", folder / f"{name}.pt"] for name in ("one", "two"))
    finetune.main(list(map(str, one)))
    done = torchrun(ROOT / "finetune.py", *two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    a, b = read("one.pt"), read("two.pt")
    start = read(finished / "out/pre.pt")["model"]
    for name, x in a["model"].items():
        assert torch.allclose(x, b["model"][name], atol=1e-5), name
    assert not torch.allclose(a["model"]["tok.weight"], start["tok.weight"], atol=1e-4)
    assert len(a["history"]) == len(b["history"])


def test_slices_of_a_batch(monkeypatch):
    """Together they are the batch; a batch that cannot be shared evenly is refused."""
    setup = data.Grammar("pcfg")
    args = Namespace(prior=[.5, .3, .2])
    draw = lambda n, rng: setup.pretraining(n, rng, args)
    whole, parts = data.stream(draw, 6, 0, "pretrain")(3), []
    for process in range(3):
        monkeypatch.setattr(data, "processes", lambda process=process: (process, 3))
        parts.append(data.stream(draw, 6, 0, "pretrain")(3))
    rows = torch.cat([part.tokens for part in parts])
    assert torch.equal(rows.sort(0).values, whole.tokens.sort(0).values)
    assert all(len(part.tokens) == 2 for part in parts)
    with pytest.raises(UserError, match="not divisible by 3"):
        data.stream(draw, 8, 0, "pretrain")
