"""
What the tests of the exercises share. `pytest exercises/test_e1.py` checks e1.py; with SOLUTIONS=1
in the environment, solutions/e1.py. The trained models are those of make.py, in exercises/out or,
if it is given, in EXERCISES_OUT.
"""
import functools
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import analyze  # noqa: E402
import make  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: one thread is fastest


def pytest_configure(config):
    config.addinivalue_line("markers", "trained: needs the models of exercises/make.py")


def pytest_ignore_collect(collection_path, config):
    """Stubs are red until they are solved: `pytest` without a path leaves them out."""
    asked = [Path(config.invocation_params.dir, arg.split("::")[0]).resolve()
             for arg in config.args]
    return None if any(path.is_relative_to(HERE) for path in asked) else True


@pytest.fixture(scope="module")
def mine(request):
    """The module under test: the student's, or the model solution."""
    return make.exercise(request.path.stem.removeprefix("test_"))


@pytest.fixture(scope="session")
def trained():
    """A function: the path of a file that `command` made; the test fails if it is missing."""
    def path(name, command="python exercises/make.py"):
        file = make.OUT / name
        if not file.exists():
            pytest.fail(f"{file} is missing; first: {command}")
        return str(file)
    return path


@pytest.fixture(scope="session")
def study(trained):
    """A function: the Study of a checkpoint of make.py, on 500 strings a set, or n."""
    @functools.cache
    def open_study(name, n=500):
        return analyze.open_study(["--ckpt", trained(name), "--eval-size", str(n), "--device",
                                   "cpu", "--threads", "1"])
    return open_study
