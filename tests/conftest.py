import os

import pytest
import torch

# what kernels are compared with is exact, on a GPU too
torch.backends.cudnn.conv.fp32_precision = "ieee"


def _device(name):
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    return pytest.param(name, marks=[pytest.mark.cuda, no_gpu]) if name == "cuda" else name


# RIBFAST_TEST_DEVICE: child processes that test one backend narrow the suite to the device it serves
_DEVICES = [os.environ["RIBFAST_TEST_DEVICE"]] if "RIBFAST_TEST_DEVICE" in os.environ else ["cpu", "cuda"]


def pytest_configure(config):
    # side by side, files go in their order: pytest-xdist would leave those with the fewest tests, the longest, for last
    config.option.loadscopereorder = False


@pytest.fixture(params=[_device(name) for name in _DEVICES])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory is filled with NaN, so that an output which is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
