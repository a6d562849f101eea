import os
import signal
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# The models here are tiny: one thread is faster, above all beside other work, and the order of sums
# stays the same on every machine. Processes that tests start inherit it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # of a shell's & it is ignored, and would stay so
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what they compare are the numbers of a CPU


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (several minutes more)")
    parser.addoption("--tries", type=int, default=300, help="random changes and nasty flags (slow)")
    parser.addoption("--tries-seed", type=int, default=0, help="seed of the tries")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
