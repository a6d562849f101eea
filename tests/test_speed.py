"""
What makes training fast changes nothing that is promised: bfloat16, losses that are read late, recorded steps, several
processes.
"""
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

import data
import pretrain
from data import Examples, Failed, Stopped, UserError
from model import GPT, Config, load, loss_of, read_checkpoint
from pretrain import LOOK, WARM, optimizer_for, part_of, recorded, train_steps, training_dtype, update_of
from test_promises import ROOT, TINY, Folder, finite, mistake

CONFIG = Config(vocab_size=29, n_ctx=17, n_layer=2, n_head=2, d_model=20, d_head=6, d_mlp=28)
ADAM, SGD = Namespace(compiled=False), Namespace(compiled=True)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def new_model():
    return GPT(CONFIG).init_weights(torch.Generator().manual_seed(3))


def examples(n, t, seed, **more):
    """Random ones, of rows of unequal lengths."""
    draws = torch.Generator().manual_seed(seed)
    tokens, target = torch.randint(29, (2, n, t), generator=draws)
    lengths = torch.randint(1, t + 1, (n, 1), generator=draws)
    return Examples(tokens, target.masked_fill(torch.arange(t) >= lengths, -1), **more)


def history(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("device, can, expected", [
    ("cpu", {"avx512_bf16": True}, "bfloat16"), ("cpu", {"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
    ("cpu", {"avx512_bf16": False, "avx2": True}, "float32"), ("cpu", {}, "float32"),
    ("cuda", (8, 0), "bfloat16"), ("cuda", (9, 0), "bfloat16"), ("cuda", (7, 5), "float32"),
    ("mps", {}, "float32")])
def test_auto_is_what_the_device_multiplies_in(monkeypatch, device, can, expected):
    """Of a compiled model always float32; what is asked for is what one gets, or refused."""
    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: can)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    setup, compiled = (Namespace(compiled=c, device=torch.device(device)) for c in (False, True))
    assert training_dtype("auto", setup) == expected and training_dtype("auto", compiled) == "float32"
    for name in ("float32", "bfloat16"):
        assert training_dtype(name, setup) == name
    assert training_dtype("float32", compiled) == "float32"
    with pytest.raises(UserError, match="--dtype bfloat16"):
        training_dtype("bfloat16", compiled)


def test_bfloat16_is_of_training_alone(folder):
    """
    The record says what it was, another dtype is another run, weights and moments are float32, and the history holds
    the scores of the saved model in float32.
    """
    words = ["pretrain.py", "--steps", "3", "--eval-every", "3", "--save-every", "1", *TINY]
    for dtype, other in (("bfloat16", "float32"), ("float32", "bfloat16")):
        out = folder.path / f"{dtype}.pt"
        assert folder.run(*words, "--dtype", dtype, "--out", out.name).code == 0
        assert json.loads(out.with_suffix(".json").read_text())["args"]["dtype"] == dtype
        result = folder.run(*words, "--dtype", other, "--out", out.name, "--resume")
        mistake(result, f"dtype is '{dtype}' there, '{other}' here")
        last = read_checkpoint(folder.path / "log" / out.name)
        moments = itertools.chain(*(state.values() for state in last["optimizer"]["state"].values()))
        assert all(x.dtype == torch.float32 for x in (*last["model"].values(), *moments))
        model, ckpt = load(out)
        args, setup = Namespace(**ckpt["args"]), data.setup_of(ckpt)
        tests, written = setup.tests(args, 3), [row for row in history(out) if row["step"] == 3]
        ours = pretrain.evaluate(model, setup, tests)
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in written], abs=1e-6)
        assert [row["accuracy"] for row in ours] == [row["accuracy"] for row in written]
        with torch.autocast("cpu", torch.bfloat16):
            rough = pretrain.evaluate(model, setup, tests)
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(rough, written)) > 1e-4
    one, two = (read_checkpoint(folder.path / f"{dtype}.pt")["model"] for dtype in ("bfloat16", "float32"))
    assert any((one[k] != two[k]).any() for k in one)


def test_auto_and_compiled_models(folder):
    """The record says what auto was; bfloat16 is refused in one line, by both stages, and nothing is written."""
    tracr = ["pretrain.py", "--setup", "tracr-count", "--eval-size", "16", "--threads", "1", "--out", "pre.pt"]
    mistake(folder.run(*tracr, "--dtype", "bfloat16"), "--dtype bfloat16", "compiled")
    assert not folder.hashes()
    assert folder.run(*tracr).code == 0
    assert read_checkpoint(folder.path / "pre.pt")["args"]["dtype"] == "float32"
    before = folder.hashes()
    result = folder.run("finetune.py", "--ckpt", "pre.pt", "--dtype", "bfloat16", "--out", "ft.pt")
    mistake(result, "--dtype bfloat16", "compiled")
    assert folder.hashes() == before
    assert folder.run("pretrain.py", "--steps", "1", *TINY, "--out", "x.pt").code == 0
    expected = training_dtype("auto", Namespace(compiled=False, device=torch.device("cpu")))
    assert json.loads((folder.path / "x.json").read_text())["args"]["dtype"] == expected


# ---------------------------------------------------------------- losses that are read late


@pytest.mark.parametrize("first, stop", [(0, 40), (7, 50), (3, 4)])
@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_finite_is_named_soon(first, stop, part):
    """
    Loss (0) or gradient norm (1), at any step: Failed names that step and its rate, at most LOOK updates later and
    before the finished model is seen. Without, all batches and rates come in their order, the last loss with its step.
    """
    for bad in range(first, stop + 1):  # stop: never
        done, seen = [], []

        def update(x, lr):
            done.append((x, lr))
            numbers = torch.tensor([10. + x, 1.])
            numbers[part] = (torch.nan, torch.inf, -torch.inf)[x % 3] if x == bad else numbers[part]
            return numbers

        def go():
            for step, loss in train_steps(update, lambda step: step, lambda step: step / 8, range(first, stop)):
                seen.append((step, loss))
        if bad == stop:
            go()
            assert done == [(step, step / 8) for step in range(first, stop)]
            assert seen == [(first, None)] + [(step, 9 + step) for step in range(first + 1, stop + 1)]
            continue
        with pytest.raises(Failed, match=rf"^step {bad}: .*(nan|inf).* lr {bad / 8:.3g}: not finite$"):
            go()
        assert bad < len(done) + first <= bad + LOOK and seen[-1][0] < stop


def test_reading_losses_waits_for_nothing_in_between(monkeypatch):
    """One look at the numbers every LOOK updates: a device computes on meanwhile."""
    looks, usual = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts: looks.append(len(parts)) or usual(parts))
    list(train_steps(lambda *_: torch.ones(2), lambda step: step, lambda step: 1., range(5, 45)))
    assert looks == [LOOK, LOOK, 40 - 2 * LOOK]


@pytest.mark.parametrize("method", ["save", "log"])
def test_weights_that_are_not_finite_go_nowhere(method, tmp_path):
    """Neither into a checkpoint nor into the history, whatever the losses were: Failed, and no file is touched."""
    run = object.__new__(pretrain.Run)
    run.model, run.step, run.leads, run.path = new_model(), 5, True, str(tmp_path / "x.pt")
    run.history_path, run.optimizer = str(tmp_path / "x.jsonl"), optimizer_for(run.model, .25, ADAM)
    for value in (torch.nan, torch.inf):
        run.model.blocks[1].up.bias.data[3] = value
        with pytest.raises(Failed, match="step 5: the weights are not finite, lr 0.25"):
            run.log(5, [{}]) if method == "log" else run.save(5)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- recorded steps


@pytest.fixture
def no_gpu(monkeypatch):
    """A graph that is no graph: what is recorded runs as usual. Returns, for each, what it shares memory with."""
    recordings = []
    monkeypatch.setattr(pretrain, "aside", lambda run: run())
    monkeypatch.setattr(pretrain, "record",
                        lambda run, earlier: recordings.append(earlier) or Namespace(replay=run))
    return recordings


def as_if_on_gpu(model):
    return Namespace(tok=Namespace(weight=Namespace(is_cuda=True)), parameters=model.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [ADAM, SGD])
def test_recorded_steps_train_as_others_do(no_gpu, dtype, kind):
    """Examples of two shapes in turn: losses, norms and weights bit for bit; each shape is recorded once."""
    batches = [examples(*((4, 9) if i % 2 else (3, 12)), i, extra=(0, .5)) for i in range(2 * WARM + 8)]
    runs = []
    for shown in (lambda model: model, as_if_on_gpu):
        model = new_model()
        update = update_of(shown(model), optimizer_for(model, 1., kind), lambda x: loss_of(model, x), .1, dtype)
        numbers = [update(x, 1e-2 * i) for i, x in enumerate(batches)]
        runs.append([*numbers, *model.state_dict().values()])
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(map(torch.equal, *runs)) and len(no_gpu) == 2 and no_gpu[0] is None is not no_gpu[1]
    assert all(x.isfinite().all() for x in runs[0]) and len({x[0].item() for x in numbers}) == len(batches)


def test_a_recorded_step_reads_and_writes_its_own_places(no_gpu):
    """
    As a graph must: new examples are copied to where the first ones of their shape were; what a call has given back is
    not overwritten by the next; WARM calls of a shape come before its recording.
    """
    places, result = {}, torch.zeros(2)

    def step(x):
        places.setdefault((x.tokens.shape, x.at), set()).add((x.tokens.data_ptr(), x.target.data_ptr()))
        return result.copy_(torch.stack((x.tokens.sum(), x.target.sum() + x.labels.sum())))

    call, said, wanted = recorded(step), [], []
    for i in range(3 * (WARM + 3)):
        x = examples(3, 5 + i % 2, i, labels=torch.full((3, 2), i), at=3 if i % 3 else None)
        original = x.tokens.clone()
        said.append(call(x))
        wanted.append([x.tokens.sum().item(), (x.target.sum() + 6 * i).item()])
        assert torch.equal(x.tokens, original)
        expected = {(j % 2, j % 3 == 0) for j in range(i + 1)
                    if sum((k % 2, k % 3 == 0) == (j % 2, j % 3 == 0) for k in range(i + 1)) > WARM}
        assert len(no_gpu) == len(expected), "recorded once, after WARM calls of the shape"
    assert torch.stack(said).tolist() == wanted
    assert len(places) == 4 and all(len(addresses) == 1 for addresses in places.values())


def test_the_rate_is_one_tensor(no_gpu):
    """Set anew before each step where a recording reads it; also after a resume; beyond float32 it is infinite."""
    for kind in (ADAM, SGD):
        model = new_model()
        optimizer = optimizer_for(model, .5, kind)
        update = update_of(model, optimizer, lambda x: loss_of(model, x))
        [group] = optimizer.param_groups
        rate = group["lr"]
        update(examples(3, 5, 0), .125)
        assert group["lr"] is rate and rate.item() == .125
        state = optimizer.state_dict()
        again = optimizer_for(model, .5, kind)
        pretrain.restore(again, {"optimizer": state})
        assert again.param_groups[0]["lr"] is again.defaults["lr"] is not rate
        state["param_groups"][0]["lr"] = .125  # as it was saved before there was a tensor
        pretrain.restore(again, {"optimizer": state})
        assert torch.is_tensor(again.param_groups[0]["lr"])
        update(examples(3, 5, 0), 1e39)
        assert rate.isinf() and not model.head.weight.isfinite().all()


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("more", [{}, {"at": 2}, {"extra": (1, .5)}])
def test_parts_of_a_batch_count_what_they_hold(monkeypatch, world, more):
    """However rows and wanted outputs are spread: the mean of the processes' losses is the loss of the batch."""
    model, x = new_model(), examples(7, 11, 1, **more)
    if more:  # these have all columns
        x = x._replace(target=x.target.abs())
    monkeypatch.setenv("WORLD_SIZE", str(world))
    losses, rows = [], []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        part, share = part_of(x)
        losses.append(loss_of(model, part) * share)
        rows += part.tokens.tolist()
    assert sorted(rows) == sorted(x.tokens.tolist())
    whole, parts = loss_of(model, x), sum(losses) / world
    assert abs(whole - parts) < 1e-5
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (whole, parts))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_two(folder, *words):
    """Two running processes that know of each other as those of torchrun do."""
    about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [folder.start(*words, variables={**about, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def assert_close_runs(one, two):
    """Weights to 1e-4, losses of the history to 1e-5, all else in checkpoint and history, but accuracies, the same."""
    a, b = read_checkpoint(one), read_checkpoint(two)
    assert {**a, "model": 0} == {**b, "model": 0} and a["finished"]
    for name, x in a["model"].items():
        assert (x - b["model"][name]).abs().max() < 1e-4, name
    ours, theirs = history(one), history(two)
    losses = [[row["loss"] or 0. for row in rows] for rows in (ours, theirs)]  # of generations there is none
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)
    same = dict.fromkeys(("loss", "accuracy", "parsed"))
    assert [{**row, **same} for row in ours] == [{**row, **same} for row in theirs]


FEW = ["--steps", "6", "--eval-every", "3", "--eval-size", "16", "--threads", "1", "--dtype", "float32",
       "--device", "cpu"]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A folder with one pretrained model and one compiled. Not to be written to."""
    folder = Folder(tmp_path_factory.mktemp("parents"))
    for name, words in (("pre", ["--steps", "3", *TINY]), ("tracr", ["--setup", "tracr-count", "--eval-size", "16"])):
        assert folder.run("pretrain.py", *words, "--out", f"{name}.pt").code == 0
    return folder.path


@pytest.mark.parametrize("words", [
    ["pretrain.py", "--batch-size", "3"],
    ["pretrain.py", "--setup", "stories", "--batch-size", "5", "--lr", "1e-3", "--eval-size", "2"],
    ["finetune.py", "--ckpt", "pre.pt", "--batch-size", "8", "--lr", "1e-3"],
    ["finetune.py", "--ckpt", "tracr.pt", "--batch-size", "5", "--lr", "1e-3", "--steps", "3"]],
    ids=["pretraining", "stories", "fine-tuning", "compiled"])
def test_two_processes_learn_what_one_learns(folder, parents, words):
    """Of batches that are no two halves, and rows of unequal lengths; one of them writes and speaks."""
    for name in ("pre", "tracr"):
        folder.put(name, parents / f"{name}.pt")
    script, *words = words
    both = start_two(folder, script, *FEW, *words, "--out", "two.pt")
    one = folder.start(script, *FEW, *words, "--out", "one.pt")
    leader, other, single = (folder.end(process) for process in (*both, one))
    for result in (leader, other, single):
        assert result.code == 0 and not result.err, result.raw
    assert not other.out and "wrote two.pt" in leader.out
    shown = [float(re.findall(r"  loss ([\d.]+)", result.out)[-1]) for result in (leader, single)]
    assert shown[0] == pytest.approx(shown[1], rel=.01)
    assert_close_runs(folder.path / "one.pt", folder.path / "two.pt")
    assert {p.name for p in folder.path.glob("two*")} == {"two.pt", "two.json", "two.jsonl"}


def test_torchrun(folder):
    """The command itself, with a batch that is no two halves."""
    words = ["--batch-size", "95", *FEW, "--steps", "4"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, *torchrun, os.path.join(ROOT, "pretrain.py"), *words, "--out", "two.pt"]
    done = subprocess.run(command, cwd=folder.path, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("wrote two.pt") == done.stdout.count("pretrain: ") == 1
    assert folder.run("pretrain.py", *words, "--out", "one.pt").code == 0
    assert_close_runs(folder.path / "one.pt", folder.path / "two.pt")


LONG = ["pretrain.py", "--batch-size", "8", *FEW, "--steps", "60", "--eval-every", "30", "--save-every", "2"]


def test_a_process_that_is_killed_ends_the_others(folder):
    """In one line that names the last good checkpoint; a single process goes on there, as if nothing had been."""
    one = folder.start(*LONG, "--out", "one.pt")
    leader, other = start_two(folder, *LONG, "--out", "two.pt")
    two = folder.path / "two.pt"
    folder.wait(leader, lambda: (folder.path / "two.jsonl").exists() and read_checkpoint(two)["step"] >= 4)
    other.kill()
    result = folder.end(leader)
    assert result.code == 1 and len(result.err) == 1, result.raw
    assert "another process ended (" in result.err[0] and "); the last good checkpoint is two.pt" in result.err[0]
    ckpt = read_checkpoint(two)
    assert finite(two) and 4 <= ckpt["step"] < 60 and not ckpt["finished"]
    for process in (one, folder.start(*LONG, "--out", "two.pt", "--resume")):
        assert folder.end(process).code == 0
    assert_close_runs(folder.path / "one.pt", two)


def test_two_processes_are_stopped(folder):
    """As one: saved at the step where they were, 128 + signal; two go on and end where one ends."""
    one = folder.start(*LONG, "--out", "one.pt")
    words = [*LONG, "--out", "two.pt"]
    both, two = start_two(folder, *words), folder.path / "two.pt"
    folder.wait(both[0], lambda: (folder.path / "two.jsonl").exists() and read_checkpoint(two)["step"] >= 4)
    for process in both:
        process.terminate()
    leader, other = map(folder.end, both)
    assert leader.code == other.code == 143 and not leader.err + other.err, leader.raw + other.raw
    step = read_checkpoint(two)["step"]
    assert 4 <= step < 60 and f"stopped and saved at step {step} of 60" in leader.out and not other.out
    for process in (one, *start_two(folder, *words, "--resume")):
        assert folder.end(process).code == 0
    assert_close_runs(folder.path / "one.pt", two)


@pytest.mark.parametrize("signals, kind", [([signal.SIGTERM], Stopped), ([], Failed)])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_other_process_went_first(monkeypatch, signals, kind, rank):
    """What gloo raises then means a stop to whom was stopped too, and is saved; to others, a failure."""
    run, saved = object.__new__(pretrain.Run), []
    run.leads, run.step, run.path, run.args = rank == "0", 7, "x.pt", Namespace(steps=9)
    run.bar, run.save, run.give_back = Namespace(close=lambda: None), saved.append, lambda: None
    monkeypatch.setattr(data, "signals", signals)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(kind) as error, run:
        raise RuntimeError("Connection closed by peer")
    assert saved == [7] * len(signals)
    assert signals or str(error.value) == "step 7: another process ended (Connection closed by peer); the " \
        "last good checkpoint is x.pt"


def test_nothing_is_taught_before_all_processes_have_answered(monkeypatch):
    """One that has ended is noticed before the weights change: they are still those of the step that is named."""
    model, before = new_model(), new_model().state_dict()

    def gone(loss):
        raise RuntimeError("Connection closed by peer")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_reduce", gone)
    update = update_of(model, optimizer_for(model, .1, ADAM), lambda x: loss_of(model, x))
    with pytest.raises(RuntimeError, match="peer"):
        update(examples(4, 6, 0), .1)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_more_processes_than_rows(folder):
    """Refused by each, in one line."""
    for process in start_two(folder, "pretrain.py", *FEW, "--batch-size", "1"):
        mistake(folder.end(process), "--batch-size 1", "2 processes")
    assert not folder.hashes()
