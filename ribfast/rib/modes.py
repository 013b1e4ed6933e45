"""The modes in which images are adapted, whatever the caller's are."""

import contextlib

import torch

_SETTINGS = (
    torch.backends.cudnn.conv,
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.matmul,
)


@contextlib.contextmanager
def plain(device: torch.device, *, benchmark: bool = False):
    """Gradients may be taken, 16 bits are where they are asked for, and float32 is float32.

    benchmark: try out convolutions, for shapes that are few; not where the caller wants deterministic ones.
    """
    cudnn = torch.backends.cudnn
    before, benchmarked = [setting.fp32_precision for setting in _SETTINGS], cudnn.benchmark
    for setting in _SETTINGS:
        setting.fp32_precision = "ieee"
    cudnn.benchmark = benchmark and not cudnn.deterministic
    try:
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.benchmark = benchmarked
        for setting, value in zip(_SETTINGS, before, strict=True):
            setting.fp32_precision = value
