"""Settings of every test run: no network, no more threads than cores, no deadlines."""

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker; subprocesses of tests inherit it
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Shape checks and first calls of torch are slow and uneven: no deadlines. CI draws the same
# examples every time.
hypothesis.settings.register_profile(
    "hooked-vlm",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("hooked-vlm")


@pytest.fixture
def no_grad():
    """For references whose weights have gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def one_thread():
    """For models too small to share their work: on busy cores, threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
