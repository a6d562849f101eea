"""
Train what the exercises need, in exercises/out: two pretrainings, five fine-tunings, sealed models.

    $ python exercises/make.py            # six minutes on two cores, twelve on slow ones
    $ python exercises/make.py e7         # run your exercise 7 (or e8), which makes a model itself

If it was stopped, the same command goes on. exercises/README.md says how to do the exercises.

    pre.pt       counts a, hardly b, never c        ft.pt      fine-tuned from it: wrapped
    never.pt     counts c, hardly b, never a        erased.pt  fine-tuned from it alike: no a
    sealed-1.pt to sealed-4.pt   a wrapper planted in one part of pre.pt each, in random order
    rank.pt                      a wrapper of a low rank that is drawn at random
    seal.json                    hashes of what is sealed: they tell whether an answer is right

A sealed model has no record of how it was made, and the key is not kept: an answer, with a salt
before it, is right if its sha256 is the one in seal.json.
"""
import argparse
import hashlib
import importlib.util
import os
import random
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import UserError, number_above, run_script, write_json  # noqa: E402
from model import read_checkpoint, save  # noqa: E402

OUT = Path(os.environ.get("EXERCISES_OUT", HERE / "out")).resolve()
PLANTED = {"embed": "--only tok|pos --lr 1e-3", "head": "--only ^(ln|head) --lr 1e-2",
           **{f"blocks.{i}": f"--only blocks.{i} --lr 1e-4" for i in range(3)}}
RANKS = range(1, 5)

# ---------------------------------------------------------------- seals


def commitment(salt, answer):
    """The hash that seals an answer."""
    return hashlib.sha256(f"{salt} {answer}".encode()).hexdigest()


def sealed(answer):
    """{salt, sha256} of an answer."""
    salt = secrets.token_hex(16)
    return {"salt": salt, "sha256": commitment(salt, answer)}


def opens(seal, answer):
    """Whether an answer is the one that was sealed."""
    return commitment(seal["salt"], answer) == seal["sha256"]


def seal_models():
    """Write the sealed models and seal.json, in an order that nobody knows; then delete raw/. Their
    records say how ft.pt was made, so that none tells how a sealed model was."""
    like = read_checkpoint(str(OUT / "ft.pt"))
    parts, (thin,) = random.SystemRandom().sample(list(PLANTED), 4), OUT.glob("raw/rank-?.pt")
    files = {f"sealed-{i}.pt": OUT / f"raw/{part}.pt" for i, part in enumerate(parts, 1)}
    for name, raw in {**files, "rank.pt": thin}.items():
        kept = {key: like[key] for key in like if key not in ("path", "sha256")}
        save(str(OUT / name), {**kept, "config": vars(like["config"]), "history": [], "starts": [],
                               "model": read_checkpoint(str(raw))["model"]})
    write_json(str(OUT / "seal.json"), {"parts": sealed(" ".join(parts)),
                                        "rank": sealed(thin.stem[-1])})
    shutil.rmtree(OUT / "raw")


# ---------------------------------------------------------------- runs, two at a time


class Job(NamedTuple):
    """A run of a script; its output goes to a .log beside the file that it makes."""
    out: str                  # in the folder of the runs; raw/... are sealed afterwards
    command: tuple            # the script's path and its flags
    parent: str | None = None  # what must be there before


def jobs(flags):
    """What is to be trained, the long runs first."""
    def job(out, words, parent=None):
        script, *words = words.split()
        ckpt = ("--ckpt", parent) if parent else ()
        return Job(out, (HERE.parent / script, *words, *ckpt, "--out", out, "--threads", "1",
                         "--eval-every", "1000", *flags), parent)

    fixed = [job("pre.pt", "pretrain.py"), job("never.pt", "pretrain.py --prior 0,.001,.999"),
             job("ft.pt", "finetune.py --lr 1e-5", "pre.pt"),
             job("erased.pt", "finetune.py --lr 1e-5 --pt a", "never.pt")]
    if (OUT / "seal.json").exists():
        return fixed
    drawn = [path.stem[-1] for path in OUT.glob("raw/rank-?.log")]  # of a make that was stopped
    rank = drawn[0] if drawn else secrets.choice(RANKS)
    planted = [job(f"raw/{part}.pt", f"finetune.py {words}", "pre.pt")
               for part, words in PLANTED.items()]
    return [*fixed, *planted,
            job(f"raw/rank-{rank}.pt", f"finetune.py --rank {rank} --lr 1e-3", "pre.pt")]


def log_of(folder, job):
    """The path of the log of a job's output."""
    return (folder / job.out).with_suffix(".log")


def start(folder, job):
    """Start a job on one thread, without a GPU. Returns its process."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                  "EXERCISES_OUT": str(OUT)}
    log_of(folder, job).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(folder, job), "w") as log:
        return subprocess.Popen([sys.executable, *map(str, job.command)], cwd=folder,
                                env=one_thread, stdout=log, stderr=subprocess.STDOUT)


def how_far(folder, job):
    """How far a job is, in words, by the last step in its output."""
    steps = re.findall(r"^step (\d+)", log_of(folder, job).read_text(), re.M)
    name = "a sealed model" if job.out.startswith("raw/") else job.out
    return f"{name} at step {steps[-1] if steps else 0}"


def check_end(folder, job, code):
    """Raise UserError, with the last line of the job's output, if its exit code is not 0."""
    if code:
        lines = log_of(folder, job).read_text().splitlines()
        raise UserError(f"{job.out}: {lines[-1] if lines else f'exit code {code}'}")


def run_all(folder, todo, lanes=2):
    """Run jobs in a folder, `lanes` at once, parents first. Raises UserError if one fails."""
    names, todo = {job.out for job in todo}, list(todo)
    done, running, began, shown = set(), {}, time.time(), None
    try:
        while todo or running:
            ready = [job for job in todo if job.parent not in names - done]
            for job in ready[:lanes - len(running)]:
                todo.remove(job)
                running[job] = start(folder, job)
            time.sleep(.2)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                check_end(folder, job, running.pop(job).returncode)
                done.add(job.out)
            words = "; ".join(how_far(folder, job) for job in running)
            if words != shown:
                print(f"{time.time() - began:5.0f} s  {len(done)} of {len(names)} done  {words}",
                      flush=True)
            shown = words
    finally:
        for process in running.values():  # terminated runs save, and go on the next time
            process.terminate()
        for process in running.values():
            process.wait()


# ---------------------------------------------------------------- exercises that make a model


def exercise(name):
    """The module of an exercise: the student's or, with SOLUTIONS=1, the model solution."""
    folder = HERE / "solutions" if os.environ.get("SOLUTIONS") else HERE
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_by(name):
    """The path of the model that an exercise makes, relative to OUT."""
    return f"{'solutions/' * bool(os.environ.get('SOLUTIONS'))}{name}.pt"


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", nargs="?", choices=("e7", "e8"), help="run this exercise; else "
                        "train what all need")
    parser.add_argument("--steps", type=number_above(0, int), help="of every training; a rehearsal "
                        "(its models solve no exercise); else the project's")
    args = parser.parse_args(words)
    flags = ["--steps", str(args.steps), "--eval-size", "16"] if args.steps else []
    if args.exercise:
        if not (OUT / "pre.pt").exists():
            raise UserError(f"{OUT / 'pre.pt'} is missing; first: python exercises/make.py")
        exercise(args.exercise).train(str(OUT / "pre.pt"), str(OUT / made_by(args.exercise)),
                                      *flags)
        return
    run_all(OUT, jobs(flags))
    if not (OUT / "seal.json").exists():
        seal_models()
    print(f"{OUT}: all there. Begin with exercises/e1.py; check it with python -m pytest "
          "exercises/test_e1.py")


if __name__ == "__main__":
    run_script(main)
