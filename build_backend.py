"""The build backend: setuptools, building against the torch that is already installed.

A C++ extension of torch only loads in the torch it was built with. `pip install .` builds in an environment of its
own, where `requires = ["torch"]` would fetch whatever is newest; so the torch of the environment that is being
installed into is used, and one is fetched only where there is none. Front ends that build in a virtual environment of
their own (uv, `python -m build`) hide it: give those --no-build-isolation.
"""

import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

CANDIDATES = [Path(sysconfig.get_path("purelib")), Path(site.getusersitepackages())]
TARGET = next((path for path in CANDIDATES if (path / "torch" / "version.py").is_file()), None)
HAS_TORCH = TARGET is not None
if HAS_TORCH and str(TARGET) not in sys.path:
    sys.path.append(str(TARGET))  # last: the build environment's own packages go first


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + ([] if HAS_TORCH else ["torch>=2.6", "numpy"])


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + ([] if HAS_TORCH else ["torch>=2.6", "numpy"])


def get_requires_for_build_sdist(config_settings=None):
    return build_meta.get_requires_for_build_sdist(config_settings)
