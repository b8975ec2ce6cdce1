"""Settings of the whole suite: one CPU thread, uninitialised memory that cannot pass for data, GPU cases skipped without a GPU.

Without a GPU the Triton kernels run through Triton's interpreter, which has to be decided before Triton is imported.
"""

import os
import threading

# Read when numpy is imported. Beside another worker, threads of matrix products took four times as long as one alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-losses", action="store_true", help="write tests/losses/*.json anew instead of comparing with them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums are taken in the same order on every machine, and a busy machine stays usable."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory(request):
    """Code that skips an element of `torch.empty` fails at once: deterministic mode fills it with NaN."""
    if "gpu" in request.keywords:  # there the mode would also change which kernels run
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _linear_stays_torchs():
    """DeepSpeed's ZeRO 3 puts a `linear` of its own into torch, for the rest of the process."""
    own = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = own


@pytest.fixture(autouse=True)
def _normal_priority():
    """An AV1 encoder makes the thread that calls it a real-time one where it may, as root; the tests beside it would come to a halt."""
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(autouse=True)
def _emulated_cuda(request, monkeypatch):
    """Without a GPU, backend "cuda" of a test's parameters is the emulator."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("backend") != "cuda" or torch.cuda.is_available():
        return
    from helpers import emulator

    from sami_fast.ops import backend, launchers

    missing, home, cuda = backend._missing, launchers._home, emulator()
    monkeypatch.setitem(backend.HOME_DEVICES, "cuda", "cpu")
    monkeypatch.setattr(backend, "_missing", lambda name: None if name == "cuda" else missing(name))
    monkeypatch.setattr(launchers, "_home", lambda file, name: cuda if name == "cuda" else home(file, name))


@pytest.fixture
def no_thread_is_left():
    """Threads that a test starts end with it."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), thread.name
