"""
What the training scripts promise about their files and exit codes: killed, stopped, out of disk,
given nonsense. Every run is a process of its own, in a temporary folder, with a few steps of a few
strings.
"""
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import pytest
import torch

import data
import model as model_py
from data import Stopped, UserError, sha256
from model import GPT, KEYS, Config, load, read_checkpoint, save

ROOT = os.path.dirname(os.path.abspath(model_py.__file__))
TINY = ["--batch-size", "8", "--eval-size", "16", "--threads", "1"]
PRETRAIN = ["--steps", "30", "--eval-every", "10", *TINY]
FINETUNE = ["--steps", "20", "--eval-every", "5", *TINY]

# Processes are forked from one that has imported torch: a second and a half less for each of the
# many runs below.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "tqdm", "torch", "torch._dynamo", "matplotlib.image"])


def with_moments(path):
    """Where the last step of a run is kept, as an unfinished checkpoint, which has moments."""
    return path.parent / "log" / path.name


def save_with_moments(path, ckpt):
    """model.save() in the processes below, which keeps with_moments() at the end of a run."""
    if ckpt["finished"]:
        save(with_moments(pathlib.Path(path).absolute()), {**ckpt, "finished": False})
    save(path, ckpt)


def run_forked(script, words, folder, log):
    """
    The body of a new process: `python script words` in a folder, what it prints in log.out and
    log.err.
    """
    os.chdir(folder)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [script, *words]
    runpy.run_path(os.path.join(ROOT, script), run_name="__main__")


def _script(script, words, folder, log, most_bytes, variables):
    """run_forked() with what the tests below put between."""
    os.environ.update(variables)
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    model_py.save = save_with_moments
    run_forked(script, words, folder, log)


class Folder:
    """A folder in which scripts are run."""

    def __init__(self, path):
        self.path, self.number = path, 0
        (path / "log").mkdir()

    def start(self, script, *words, most_bytes=None, variables=()):
        """
        A running process; most_bytes: no file may grow beyond, as if the disk were full; variables:
        of its environment.
        """
        self.number += 1
        log = str(self.path / "log" / str(self.number))
        words = [str(w) for w in words]
        process = FORKS.Process(target=_script, args=(script, words, self.path, log, most_bytes,
                                                      dict(variables)))
        process.start()
        process.log, process.began = log, time.time()
        return process

    def end(self, process, seconds=120):
        """
        Wait for a process. Returns code, what it printed, and the lines of stderr without the
        progress bar.
        """
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"still running after {seconds} s")
        with open(process.log + ".out") as out, open(process.log + ".err", newline="") as err:
            out, raw = out.read(), err.read()
        lines = [line.split("\r")[-1].strip() for line in raw.split("\n")]
        lines = [line for line in lines if line and "%|" not in line]
        return types.SimpleNamespace(code=process.exitcode, out=out, err=lines, raw=raw)

    def run(self, script, *words, **kw):
        """start() and end()."""
        return self.end(self.start(script, *words, **kw))

    def wait(self, process, condition, seconds=60):
        """Look every few milliseconds until condition() holds. Fails if the process ends before."""
        until = time.time() + seconds
        while not condition():
            assert process.exitcode is None and time.time() < until, self.end(process, 1).raw
            time.sleep(.003)

    def hashes(self):
        """{name: sha256} of all files but the logs."""
        return {str(p.relative_to(self.path)): hashlib.sha256(p.read_bytes()).hexdigest()
                for p in sorted(self.path.rglob("*")) if p.is_file() and p.parent.name != "log"}

    def put(self, name, *files):
        """Copy files here, as name with their own suffixes."""
        for file in files:
            shutil.copy(file, self.path / (name + file.suffix))


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """
    A folder with one finished pretraining, pre.pt, and one finished fine-tuning of it, ft.pt. Not
    to be written to.
    """
    folder = Folder(tmp_path_factory.mktemp("done"))
    for words in (["pretrain.py", *PRETRAIN, "--out", "pre.pt"],
                  ["finetune.py", *FINETUNE, "--ckpt", "pre.pt", "--out", "ft.pt"]):
        result = folder.run(*words)
        assert result.code == 0 and not result.err, result.raw
    return folder.path


@pytest.fixture
def copy(folder, done):
    """A folder with copies of the files of `done`."""
    for name in ("pre", "ft"):
        folder.put(name, *(done / (name + suffix) for suffix in (".pt", ".json", ".jsonl")))
        shutil.copy(with_moments(done / f"{name}.pt"), folder.path / "log")
    return folder


def mistake(result, *says):
    """Exit code 2, one line on stderr that names what is wrong, no traceback."""
    assert result.code == 2, result.raw
    assert len(result.err) == 1, result.raw
    for word in says:
        assert word in result.err[0], result.raw


def equal(x, y):
    """Whether two nested dicts and lists are the same, tensors bit for bit."""
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return isinstance(y, dict) and list(x) == list(y) and all(equal(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return type(x) is type(y) and len(x) == len(y) and all(map(equal, x, y))
    return type(x) is type(y) and x == y


def moments(path):
    """The optimizer state at the last step of a finished run."""
    ckpt = read_checkpoint(with_moments(path))
    assert ckpt["step"] == ckpt["steps"] and (ckpt["optimizer"]["state"] or not ckpt["steps"])
    assert equal(ckpt["model"], read_checkpoint(path)["model"])
    return ckpt["optimizer"]


def assert_same_run(one, two):
    """Weights, moments, everything else in the checkpoint, and the bytes of the history."""
    assert equal(read_checkpoint(one), read_checkpoint(two))
    assert equal(moments(one), moments(two))
    assert one.with_suffix(".jsonl").read_bytes() == two.with_suffix(".jsonl").read_bytes()


def finite(path):
    """Whether a checkpoint's weights are."""
    return all(bool(x.isfinite().all()) for x in read_checkpoint(path)["model"].values())


# ---------------------------------------------------------------- what a run leaves


def test_files_of_a_run(done):
    """
    Checkpoint, record and history: parent, capability, arguments; steps from 0 on; fractions, no
    clock times.
    """
    pre, ft = read_checkpoint(done / "pre.pt"), read_checkpoint(done / "ft.pt")
    assert set(pre) == set(ft) == set(KEYS) and pre["finished"] and ft["finished"]
    assert (pre["stage"], ft["stage"]) == ("pretrain", "finetune")
    assert pre["parent"] is None and ft["parent"]["sha256"] == sha256(done / "pre.pt")
    assert pre["capability"] == ft["capability"] == {"task": "count", "operand": "a"}
    assert not equal(pre["model"], ft["model"])
    for name, steps in (("pre", [0, 10, 20, 30]), ("ft", [0, 5, 10, 15, 20])):
        record = json.loads((done / f"{name}.json").read_text())
        assert {"command", "args", "git", "versions", "device", "started", "seconds"} <= set(record)
        rows = [json.loads(line) for line in (done / f"{name}.jsonl").read_text().splitlines()]
        assert sorted({row["step"] for row in rows}) == steps
        assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
        for row in rows:
            assert set(row) == {"setup", "scale", "task", "operand", "split", "accuracy", "floor",
                                "cross_floor", "n", "loss", "seed", "step"}
            assert 0 <= row["accuracy"] <= 1 and 0 < row["floor"] <= 1 and row["n"] == 16
        for step in steps:
            got = {(r["operand"], r["split"]) for r in rows
                   if r["step"] == step and r["task"] == "count"}
            assert {(o, s) for o in "ab" for s in ("c0", "c1", "natural")} <= got
    assert not list(done.glob("*.part"))


def test_finished_checkpoint_holds_no_optimizer_state(copy):
    """A third of the size of the last unfinished one, which has two moments a weight."""
    for script, words in (("pretrain.py", PRETRAIN),
                          ("finetune.py", [*FINETUNE, "--ckpt", "pre.pt"])):
        words = [*words, "--steps", "120", "--eval-every", "60", "--out", "x.pt", "--force"]
        history = copy.path / "x.jsonl"
        history.unlink(missing_ok=True)
        process = copy.start(script, *words)
        copy.wait(process, lambda: history.exists() and history.read_text().count("\n"))
        process.terminate()
        assert copy.end(process).code == 143
        unfinished, size = read_checkpoint(copy.path / "x.pt"), (copy.path / "x.pt").stat().st_size
        assert not unfinished["finished"] and 0 < unfinished["step"] < unfinished["steps"]
        assert unfinished["optimizer"]["state"]
        assert copy.run(script, *words[:-1], "--resume").code == 0
        ckpt = read_checkpoint(copy.path / "x.pt")
        assert ckpt["finished"] and ckpt["optimizer"] == {}
        assert .3 < (copy.path / "x.pt").stat().st_size / size < .4
        words = [*FINETUNE, "--ckpt", "x.pt", "--out", "y.pt", "--force"]
        assert copy.run("finetune.py", *words).code == 0


def test_imports_without_fcntl():
    """Windows does not have it."""
    lines = ["import sys", "sys.modules['fcntl'] = None",
             "import data, model, pretrain, finetune, analyze, plot"]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------- resumed = uninterrupted


RUNS = {"pretrain": ("pretrain.py", ["--steps", "40", "--eval-every", "6", "--save-every", "3",
                                     "--dtype", "bfloat16", *TINY]),
        "finetune": ("finetune.py", ["--steps", "40", "--eval-every", "6", "--save-every", "3",
                                     "--dtype", "float32", "--ckpt", "pre.pt", *TINY])}


@pytest.mark.parametrize("stage", RUNS)
def test_killed_at_random_moments(copy, stage):
    """
    kill -9, several times, anywhere: what is there loads, and --resume ends where the uninterrupted
    run ends.
    """
    script, words = RUNS[stage]
    whole = copy.start(script, *words, "--out", "whole.pt")
    assert copy.end(whole).code == 0
    longest = time.time() - whole.began
    moments, out = random.Random(stage), copy.path / "x.pt"
    killed_at = []
    for kills in range(7):
        process = copy.start(script, *words, "--out", "x.pt", "--resume")
        process.join(moments.uniform(.1, .6) * longest)
        process.kill()
        code = copy.end(process).code
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        if out.exists():
            killed_at.append(load(out, unfinished=True)[1]["step"])  # whole, whenever it was killed
    assert kills >= 2 and killed_at, "too slow or too fast to be killed in the middle"
    assert copy.run(script, *words, "--out", "x.pt", "--resume").code == 0
    assert_same_run(out, copy.path / "whole.pt")
    assert not list(copy.path.glob("*.part"))
    assert json.loads((copy.path / "x.json").read_text())["args"] == read_checkpoint(out)["args"]


@pytest.mark.parametrize("stage, number, code, dtype", [
    ("pretrain", signal.SIGTERM, 143, "float32"), ("finetune", signal.SIGINT, 130, "bfloat16")])
def test_stopped_while_training(copy, stage, number, code, dtype):
    """
    One signal: saved at the very step, told how to go on, 128 + signal; resumed, it ends as the
    uninterrupted run.
    """
    script = f"{stage}.py"
    words = ["--steps", "120", "--eval-every", "50", "--dtype", dtype, *TINY]
    words += ["--ckpt", "pre.pt"] if stage == "finetune" else []
    assert copy.run(script, *words, "--out", "whole.pt").code == 0
    process = copy.start(script, *words, "--out", "x.pt")
    history = copy.path / "x.jsonl"
    copy.wait(process, lambda: history.exists() and history.read_text().count("\n"))
    time.sleep(.1)
    os.kill(process.pid, number)
    result = copy.end(process)
    assert result.code == code and not result.err, result.raw
    ckpt = read_checkpoint(copy.path / "x.pt")
    assert 0 < ckpt["step"] < 120 and not ckpt["finished"]
    assert f"stopped and saved at step {ckpt['step']} of 120" in result.out \
        and "--resume" in result.out
    assert copy.run(script, *words, "--out", "x.pt", "--resume").code == 0
    assert_same_run(copy.path / "x.pt", copy.path / "whole.pt")
    resumes = json.loads((copy.path / "x.json").read_text())["resumes"]
    assert [r["step"] for r in resumes] == [ckpt["step"]] and "--resume" in resumes[0]["command"]


def test_stopped_while_evaluating(copy):
    """
    A long evaluation does not hold up the end, and leaves no half of its rows; it is made again on
    resuming.
    """
    words = ["--steps", "1", "--batch-size", "8", "--eval-size", "1000", "--threads", "1",
             "--ckpt", "pre.pt"]
    assert copy.run("finetune.py", *words, "--out", "whole.pt").code == 0
    process = copy.start("finetune.py", *words, "--out", "x.pt")
    history = copy.path / "x.jsonl"
    copy.wait(process, history.exists)  # empty now: the evaluation of step 0 begins
    time.sleep(.1)
    began = time.time()
    process.terminate()
    result = copy.end(process)
    assert result.code == 143 and not result.err, result.raw
    assert time.time() - began < 5 and history.read_text() == "" \
        and read_checkpoint(copy.path / "x.pt")["step"] == 0
    assert copy.run("finetune.py", *words, "--out", "x.pt", "--resume").code == 0
    assert_same_run(copy.path / "x.pt", copy.path / "whole.pt")


def test_stop_is_looked_at_while_test_sets_are_prepared(monkeypatch):
    """At the paper's scale with many strings this takes long as well."""
    setup, args = data.Grammar("pcfg", "small"), {"eval_size": 4, "seed": 0, "steps": 1}
    finetuning = types.SimpleNamespace(task="count", pair=["a", "b"], q=1, **args)
    pretraining = types.SimpleNamespace(prior=[1., 0., 0.], **args)
    monkeypatch.setattr(data, "signals", [signal.SIGTERM])
    for prepare in (lambda: setup.tests(finetuning, 0), lambda: setup.tests(finetuning),
                    lambda: setup.tests(pretraining, 0), lambda: setup.tests(pretraining)):
        with pytest.raises(Stopped):
            prepare()


def test_second_signal_exits_at_once(tmp_path):
    """The first is left to the script, even one that does not look; the second is not."""
    script = tmp_path / "deaf.py"
    script.write_text("import time\nfrom pretrain import run_script\n"
                      "def main():\n    print('ready', flush=True)\n    time.sleep(60)\n"
                      "run_script(main)\n")
    folder = Folder(tmp_path)
    for first, second, code in ((signal.SIGTERM, signal.SIGINT, 130),
                                (signal.SIGINT, signal.SIGTERM, 143),
                                (signal.SIGTERM, signal.SIGTERM, 143)):
        process = folder.start(script)
        said = folder.path / (process.log + ".out")
        folder.wait(process, lambda: said.exists() and "ready" in said.read_text())
        os.kill(process.pid, first)
        time.sleep(.2)
        assert process.exitcode is None
        began = time.time()
        os.kill(process.pid, second)
        assert folder.end(process).code == code and time.time() - began < 5


def test_resume_cuts_the_history_back(copy):
    """
    Rows at and after the checkpoint's step, a row twice, and one cut short by a kill: the history
    comes out as it was.
    """
    words = [*FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt"]
    process = copy.start("finetune.py", *words, "--save-every", "5")
    copy.wait(process, lambda: (copy.path / "x.jsonl").exists()
              and (copy.path / "x.jsonl").read_text().count("\n") >= 12)
    process.kill()
    copy.end(process)
    step = read_checkpoint(copy.path / "x.pt")["step"]
    rows = (copy.path / "ft.jsonl").read_text().splitlines(keepends=True)
    before = [row for row in rows if json.loads(row)["step"] < step]
    (copy.path / "x.jsonl").write_text("".join(rows[:len(before) + 8]) + rows[-1][:40])
    assert copy.run("finetune.py", *words, "--resume").code == 0
    assert_same_run(copy.path / "x.pt", copy.path / "ft.pt")


def test_resume_from_the_very_beginning(copy):
    """
    --resume with nothing there starts; so it does when the run was killed before its first save.
    """
    for script, words in (("pretrain.py", PRETRAIN),
                          ("finetune.py", [*FINETUNE, "--ckpt", "pre.pt"])):
        name = "pre" if script == "pretrain.py" else "ft"
        assert copy.run(script, *words, "--out", "x.pt", "--resume").code == 0
        assert_same_run(copy.path / "x.pt", copy.path / f"{name}.pt")
        # the record alone: what a kill between record and first save leaves
        (copy.path / "x.pt").unlink()
        (copy.path / "x.jsonl").unlink()
        before = copy.hashes()
        mistake(copy.run(script, *words, "--out", "x.pt"), "unfinished", "--resume", "--force")
        assert copy.hashes() == before
        assert copy.run(script, *words, "--out", "x.pt", "--resume").code == 0
        assert_same_run(copy.path / "x.pt", copy.path / f"{name}.pt")
        for file in copy.path.glob("x.*"):
            file.unlink()


# ---------------------------------------------------------------- the same path again


def unfinished(folder, **other):
    """x.pt in the folder: the fine-tuning ft.pt as if it had been stopped at step 11."""
    for suffix in (".json", ".jsonl"):
        shutil.copy(folder.path / f"ft{suffix}", folder.path / f"x{suffix}")
    torch.save({**read_checkpoint(folder.path / "ft.pt"), "finished": False, "step": 11, **other},
               folder.path / "x.pt")


def test_same_run_again_is_already_done(copy):
    """
    Exit code 0, one line, nothing touched, with --resume as without, wherever the parent lies now.
    """
    before = copy.hashes()
    elsewhere, ft = f"../{copy.path.name}/pre.pt", ["finetune.py", *FINETUNE, "--out", "ft.pt"]
    for words in (["pretrain.py", *PRETRAIN, "--out", "pre.pt"], [*ft, "--ckpt", "pre.pt"],
                  [*ft, "--ckpt", "pre.pt", "--resume"],
                  [*ft, "--ckpt", elsewhere, "--save-every", "7"],
                  [*ft, "--ckpt", "pre.pt", "--lr", "0.00001", "--c-tr", "1.0", "--q", "1"]):
        result = copy.run(*words)
        assert result.code == 0 and not result.err \
            and len(result.out.splitlines()) == 1, result.raw + result.out
        assert "already done" in result.out and copy.hashes() == before


@pytest.mark.parametrize("words, names", [
    (["--lr", "2e-5"], ["lr", "1e-05", "2e-05"]), (["--seed", "3"], ["seed", "0", "3"]),
    (["--c-tr", "0.5"], ["c_tr", "1.0", "0.5"]), (["--q", "2"], ["q", "1", "2"]),
    (["--task", "index"], ["task", "count", "index"]), (["--steps", "21"], ["steps", "20", "21"]),
    (["--operand", "c", "--batch-size", "9"], ["batch_size", "8", "9", "more"])])
def test_other_arguments_at_the_same_path(copy, words, names):
    """Refused, naming what differs, with --resume as without; finished or not."""
    unfinished(copy)
    before = copy.hashes()
    for out in (["ft.pt"], ["ft.pt", "--resume"], ["x.pt"], ["x.pt", "--resume"]):
        result = copy.run("finetune.py", *FINETUNE, "--ckpt", "pre.pt", *words, "--out", *out)
        mistake(result, out[0], "--out", "--force", *names)
        assert copy.hashes() == before


def test_another_parent_at_the_same_path(copy):
    """
    The parent is known by its contents: another one under the same name is refused, the other way
    round not.
    """
    assert copy.run("pretrain.py", *PRETRAIN, "--seed", "1", "--out", "other.pt").code == 0
    unfinished(copy)
    before = copy.hashes()
    for out in (["ft.pt"], ["x.pt", "--resume"]):
        mistake(copy.run("finetune.py", *FINETUNE, "--ckpt", "other.pt", "--out", *out), "parent")
    mistake(copy.run("pretrain.py", *PRETRAIN, "--out", "ft.pt"), "stage", "finetune", "pretrain")
    assert copy.hashes() == before


def test_unfinished_run_at_the_same_path(copy):
    """Refused, naming --resume and --force; later stages refuse it as a parent."""
    unfinished(copy)
    before = copy.hashes()
    result = copy.run("finetune.py", *FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt")
    mistake(result, "unfinished", "11 of 20", "--resume", "--force")
    mistake(copy.run("finetune.py", *FINETUNE, "--ckpt", "x.pt", "--out", "y.pt", "--reverse"),
            "unfinished", "11 of 20")
    assert copy.hashes() == before


def test_force_replaces(copy):
    """--force makes the run that was asked for, of a finished, an unfinished and a broken one."""
    words = [*FINETUNE, "--ckpt", "pre.pt", "--seed", "5"]
    assert copy.run("finetune.py", *words, "--out", "fresh.pt").code == 0
    unfinished(copy)
    (copy.path / "broken.pt").write_bytes(b"not a checkpoint")
    for name in ("ft", "x", "broken"):
        result = copy.run("finetune.py", *words, "--out", f"{name}.pt", "--force")
        assert result.code == 0 and not result.err, result.raw
        assert_same_run(copy.path / f"{name}.pt", copy.path / "fresh.pt")
        assert json.loads((copy.path / f"{name}.json").read_text())["args"]["seed"] == 5


def test_how_often_one_evaluates_or_saves_changes_nothing(copy):
    """Other --eval-every, --eval-size and --save-every: the same weights and moments."""
    for script, words, name in (("pretrain.py", [], "pre"),
                                ("finetune.py", ["--ckpt", "pre.pt"], "ft")):
        steps = ["--steps", {"pre": "30", "ft": "20"}[name]]
        assert copy.run(script, *words, *TINY, *steps, "--eval-every", "3", "--eval-size", "5",
                        "--save-every", "4", "--out", "x.pt", "--force").code == 0
        one, two = read_checkpoint(copy.path / "x.pt"), read_checkpoint(copy.path / f"{name}.pt")
        assert equal(one["model"], two["model"]) and equal(one["optimizer"], two["optimizer"])
        assert equal(moments(copy.path / "x.pt"), moments(copy.path / f"{name}.pt"))


# ---------------------------------------------------------------- files not whole, or not ours


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of a few kilobytes, for many tries. Returns its path and bytes."""
    path = tmp_path_factory.mktemp("small") / "x.pt"
    gpt = GPT(Config(vocab_size=5, n_ctx=4, n_layer=1, n_head=2, d_model=4, d_head=2, d_mlp=8))
    save(path, {"model": gpt.state_dict(), "optimizer": {}, "config": vars(gpt.config),
                "args": {"prior": [1., 0., 0.], "seed": 0, "lr": .1}, "setup": "pcfg",
                "scale": "small", "stage": "pretrain", "step": 1, "steps": 1, "finished": True,
                "parent": None, "capability": {"task": "count", "operand": "a"}})
    return path, path.read_bytes()


def refused(path):
    """
    Whether load() refuses a file, which it may do by UserError alone, in one line that names it.
    """
    try:
        load(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return True
    return False


def test_truncated_checkpoints_are_refused(small, tmp_path):
    """At every length."""
    path, whole = tmp_path / "x.pt", small[1]
    for length in [*range(0, len(whole), 97), len(whole) - 1, len(whole) - 2, len(whole) - 22]:
        path.write_bytes(whole[:length])
        assert refused(path), length


def test_flipped_bits_are_refused_or_do_no_harm(small, tmp_path):
    """
    Every byte of the archive's directory, one tensor's entry bit for bit, and many others: never
    other weights, never another exception. (One bit of an entry calls it a folder: such a tensor
    would come back as whatever memory held.)
    """
    path, whole = tmp_path / "x.pt", small[1]
    dice, right = random.Random(0), read_checkpoint(small[0])
    directory, tensor = whole.index(b"PK\x01\x02"), whole.rindex(b"data/0")
    after = whole.index(b"PK\x01\x02", tensor)  # the end of the entry of the first tensor
    some = [*range(directory, len(whole)), *dice.sample(range(directory), 800)]
    places = [(place, dice.randrange(8)) for place in some]
    places += [(place, bit) for place in range(tensor - 54, after) for bit in range(8)]
    count = 0
    for place, bit in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        if refused(path):
            count += 1
        else:
            assert equal(read_checkpoint(path), right), place
    assert count > len(places) / 4  # the others: padding, time stamps


class Evil:
    """Makes a file when it is unpickled by a reader that lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def foreign_files(folder, evil):
    """{name: bytes} of files that somebody might take for a checkpoint."""
    def saved(value, **kw):
        f = io.BytesIO()
        torch.save(value, f, **kw)
        return f.getvalue()

    def zipped(kind, name="a.txt", content=b"text"):
        f = io.BytesIO()
        with zipfile.ZipFile(f, "w", kind) as archive:
            archive.writestr(name, content)
        return f.getvalue()

    ckpt = read_checkpoint(folder / "pre.pt")
    compressed = io.BytesIO()
    with zipfile.ZipFile(folder / "pre.pt") as archive, \
            zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as out:
        for name in archive.namelist():
            out.writestr(name, archive.read(name))
    whole = (folder / "pre.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 8
    return {"empty": b"", "text": b"a text\n" * 50, "zip": zipped(zipfile.ZIP_STORED),
            "deflated zip": zipped(zipfile.ZIP_DEFLATED), "list": saved([1, 2, torch.ones(3)]),
            "state dict": saved(ckpt["model"]), "pickle": pickle.dumps({"model": 1}),
            "compressed": compressed.getvalue(), "truncated": whole[:len(whole) * 2 // 3],
            "flipped": bytes(flipped),
            "evil pickle": pickle.dumps(evil), "evil saved": saved(evil),
            "evil among the right keys": saved({**ckpt, "args": evil}),
            "evil of old": saved({**ckpt, "args": evil}, _use_new_zipfile_serialization=False),
            "evil zip": zipped(zipfile.ZIP_STORED, "x/data.pkl", pickle.dumps(evil)),
            "lying config": saved({**ckpt, "config": {**ckpt["config"], "d_model": 68}}),
            "huge config": saved({**ckpt, "config": {**ckpt["config"], "vocab_size": 10 ** 12}})}


def test_foreign_and_hostile_files(copy):
    """
    As a parent, at --out and at --out --resume: exit code 2, one line, nothing run, nothing
    changed.
    """
    sentinel = copy.path / "created"
    for name, content in foreign_files(copy.path, Evil(str(sentinel))).items():
        (copy.path / "bad.pt").write_bytes(content)
        before = copy.hashes()
        mistake(copy.run("finetune.py", *FINETUNE, "--ckpt", "bad.pt", "--out", "y.pt"), "bad.pt")
        if "config" not in name:
            out = ["--out", "bad.pt"] + ["--resume"] * (len(content) % 2)
            mistake(copy.run("pretrain.py", *PRETRAIN, *out), "bad.pt", "--force")
        assert not sentinel.exists() and copy.hashes() == before, name


@pytest.mark.parametrize("wrong", [{"args": {}}, {"args": []}, {"scale": "huge"},
                                   {"stage": "other"}, {"stage": "finetune"},
                                   {"capability": None}, {"setup": "other"}])
def test_whole_checkpoint_with_nonsense_inside(copy, wrong):
    """
    A file of the right form that no script of ours wrote: refused in one line as well, as a parent
    and at --out.
    """
    torch.save({**read_checkpoint(copy.path / "pre.pt"), **wrong}, copy.path / "bad.pt")
    before = copy.hashes()
    mistake(copy.run("finetune.py", *FINETUNE, "--ckpt", "bad.pt", "--out", "y.pt"), "bad.pt")
    if "args" in wrong or "stage" in wrong:
        mistake(copy.run("pretrain.py", *PRETRAIN, "--out", "bad.pt"), "bad.pt")
    assert copy.hashes() == before


# ---------------------------------------------------------------- runs that fail


def test_full_disk(copy):
    """
    Exit code 1, one line that names the file; what was there is there, whole, and no half-written
    file beside it.
    """
    before = copy.hashes()
    for words in (["--out", "new.pt"], ["--out", "ft.pt", "--seed", "9", "--force"]):
        result = copy.run("finetune.py", *FINETUNE, "--ckpt", "pre.pt", *words, most_bytes=100_000)
        assert result.code == 1 and len(result.err) == 1 and words[1] in result.err[0], result.raw
        assert {k: v for k, v in copy.hashes().items() if k != "new.json"} == before


def test_disk_full_in_the_middle(copy):
    """
    The last checkpoint stays, and with room again --resume ends where the uninterrupted run ends.
    """
    process = copy.start("finetune.py", *FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt",
                         "--save-every", "2")
    copy.wait(process, lambda: (copy.path / "x.jsonl").exists())
    process.terminate()
    assert copy.end(process).code == 143
    saved = (copy.path / "x.pt").read_bytes()
    result = copy.run("finetune.py", *FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt", "--resume",
                      most_bytes=100_000)
    assert result.code == 1 and len(result.err) == 1 and "x.pt" in result.err[0], result.raw
    assert (copy.path / "x.pt").read_bytes() == saved and not list(copy.path.glob("*.part"))
    assert copy.run("finetune.py", *FINETUNE, "--ckpt", "pre.pt", "--out", "x.pt",
                    "--resume").code == 0
    assert_same_run(copy.path / "x.pt", copy.path / "ft.pt")


@pytest.mark.parametrize("script, words", [
    ("pretrain.py", ["--lr", "1e30"]), ("finetune.py", ["--lr", "1e30", "--ckpt", "pre.pt"]),
    ("finetune.py", ["--lr", "1e39", "--ckpt", "pre.pt", "--save-every", "1"]),
    ("finetune.py", ["--lr", "1e39", "--ckpt", "pre.pt", "--steps", "1"]),
    ("finetune.py", ["--lr", "1e39", "--ckpt", "pre.pt", "--eval-every", "1"])])
def test_loss_that_is_not_finite(copy, script, words):
    """
    Exit code 1 and one line with the step, the rate and the last good checkpoint, which loads and
    is finite, even if every step is saved; a last step that ends in nonsense does not count as
    finished. The history stays JSON. The step is at most 16 after the first that was nonsense.
    """
    words = {"pretrain.py": PRETRAIN, "finetune.py": FINETUNE}[script] + words
    result = copy.run(script, *words, "--out", "x.pt")
    assert result.code == 1 and len(result.err) == 1, result.raw
    for word in ("lr", "not finite", "the last good checkpoint is x.pt"):
        assert word in result.err[0]
    assert 1 <= int(re.search(r"step (\d+):", result.err[0])[1]) <= 16
    ckpt = load(copy.path / "x.pt", unfinished=True)[1]
    assert not ckpt["finished"] and finite(copy.path / "x.pt")
    mistake(copy.run("finetune.py", *FINETUNE, "--ckpt", "x.pt", "--out", "y.pt"), "unfinished")

    def no_json(word):
        raise AssertionError(f"{word} in the history is no JSON")
    for line in (copy.path / "x.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_json)


# ---------------------------------------------------------------- the user's mistakes


FT = ["finetune.py", *FINETUNE, "--out", "y.pt"]
PRE = ["pretrain.py", *PRETRAIN, "--out", "y.pt"]


@pytest.mark.parametrize("words, says", [
    ([*FT, "--ckpt", "none.pt"], ["none.pt", "no such"]),
    ([*FT, "--ckpt", "folder.pt"], ["folder.pt", "directory"]),
    ([*FT, "--ckpt", "unfinished.pt"], ["unfinished.pt", "unfinished", "--resume"]),
    ([*FT, "--ckpt", "pre.pt", "--c-tr", "1.5"], ["--c-tr 1.5"]),
    ([*FT, "--ckpt", "pre.pt", "--c-tr", "-0.1"], ["--c-tr -0.1"]),
    ([*FT, "--ckpt", "pre.pt", "--c-tr", "nan"], ["--c-tr nan"]),
    ([*FT, "--ckpt", "pre.pt", "--q", "99"], ["--q 99"]),
    ([*FT, "--ckpt", "pre.pt", "--q", "0"], ["--q 0"]),
    ([*FT, "--ckpt", "pre.pt", "--operand", "a"], ["--operand a", "--reverse"]),
    ([*FT, "--ckpt", "pre.pt", "--operand", "d"], ["--operand d", "a, b, c"]),
    ([*FT, "--ckpt", "pre.pt", "--task", "token"], ["--task token", "count, index"]),
    ([*FT, "--ckpt", "pre.pt", "--reverse"], ["--reverse", "pre.pt"]),
    ([*FT, "--ckpt", "ft.pt", "--reverse", "--operand", "b"], ["--reverse", "--operand"]),
    ([*FT, "--ckpt", "pre.pt", "--steps", "0"], ["--steps 0"]),
    ([*FT, "--ckpt", "pre.pt", "--lr", "-0.001"], ["--lr -0.001"]),
    ([*FT, "--ckpt", "pre.pt", "--lr", "nan"], ["--lr nan"]),
    ([*FT, "--ckpt", "pre.pt", "--lr", "inf"], ["--lr inf"]),
    ([*FT, "--ckpt", "pre.pt", "--out", "pre.pt"], ["pre.pt", "overwritten"]),
    ([*FT, "--ckpt", "pre.pt", "--out", "pre.pt", "--force"], ["pre.pt", "overwritten"]),
    ([*FT, "--ckpt", "pre.pt", "--out", "link.pt", "--force"], ["link.pt", "overwritten"]),
    ([*FT, "--ckpt", "pre.pt", "--out", "y"], ["--out y", ".pt"]),
    ([*FT, "--ckpt", "pre.pt", "--out", "pre.json"], ["--out pre.json", ".pt"]),
    ([*FT, "--ckpt", "pre.pt", "--out", "folder.pt"], ["--out folder.pt"]),
    ([*FT, "--ckpt", "pre.pt", "--out", "pre.json/y.pt"], ["--out pre.json/y.pt"]),
    ([*PRE, "--prior", "lowish"], ["lowish"]),
    ([*PRE, "--prior", ".5,.5,.5"], [".5,.5,.5"]),
    ([*PRE, "--steps", "-1"], ["--steps -1"]),
    ([*PRE, "--batch-size", "0"], ["--batch-size 0"]),
    ([*PRE, "--eval-size", "0"], ["--eval-size 0"]),
    ([*PRE, "--eval-every", "-1"], ["--eval-every -1"]),
    ([*PRE, "--save-every", "0"], ["--save-every 0"]),
    ([*PRE, "--clip", "0"], ["--clip 0"]),
    ([*PRE, "--seed", "-1"], ["--seed -1"]),
    ([*PRE, "--threads", "-1"], ["--threads -1"]),
    pytest.param([*PRE, "--device", "cuda"], ["--device cuda"],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="is there")),
    pytest.param([*PRE, "--device", "mps"], ["--device mps"],
                 marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="is there"))])
def test_mistakes(copy, words, says):
    """
    Exit code 2 and one line that names the flag or file; no traceback, nothing written, nothing
    destroyed.
    """
    (copy.path / "folder.pt").mkdir()
    (copy.path / "link.pt").symlink_to("pre.pt")
    torch.save({**read_checkpoint(copy.path / "pre.pt"), "finished": False, "step": 3},
               copy.path / "unfinished.pt")
    before = copy.hashes()
    mistake(copy.run(*words), words[0], *says)
    assert copy.hashes() == before


@pytest.mark.parametrize("words", [[*FT, "--ckpt"], [*FT, "--learning-rate", "1"],
                                   [*FT, "--steps", "ten"], [*PRE, "--scale", "large"],
                                   [*PRE, "--dtype", "int8"], [*PRE, "word"]])
def test_words_that_the_parser_refuses(copy, words):
    """argparse's own mistakes: its usage and one line, exit code 2, nothing written."""
    before = copy.hashes()
    result = copy.run(*words)
    assert result.code == 2 and "Traceback" not in result.raw \
        and f"{words[0]}: error: " in result.err[-1]
    assert copy.hashes() == before


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_help(folder, script):
    """Says every flag with its default, and does nothing else."""
    result = folder.run(script, "--help")
    assert result.code == 0 and not result.err and not folder.hashes()
    for flag in ("--lr", "--steps", "--batch-size", "--out", "--resume", "--force", "--save-every",
                 "--eval-every", "--eval-size", "--seed", "--device", "--threads", "--dtype"):
        assert flag in result.out
    assert result.out.count("(default: ") >= 10
