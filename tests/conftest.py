"""One thread, numbers of a CPU, --slow, and `tiny`: checkpoints that many tests look at."""
import os
import signal
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# The models here are tiny: one thread is faster, and the order of sums is the same everywhere.
# Processes that tests start inherit it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """
    A folder with out/pre.pt and out/ft.pt of the grammar, low prior, 20 steps each. Shared: copy it
    where a test writes into it.
    """
    import finetune
    import pretrain
    folder = tmp_path_factory.mktemp("tiny")
    words = "--steps 20 --eval-every 10 --eval-size 16 --batch-size 8 --threads 1".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain.main(words)
        finetune.main(words)
    return folder
