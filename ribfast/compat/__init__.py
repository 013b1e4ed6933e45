"""Stand-ins for packages that scripts of the field import: ribfast.compat.pydensecrf."""

import sys

from . import pydensecrf

_NAMES = {
    "pydensecrf": pydensecrf,
    "pydensecrf.densecrf": pydensecrf.densecrf,
    "pydensecrf.utils": pydensecrf.utils,
}

__all__ = ["install", "pydensecrf"]


def install(*, exact: bool | None = None, nan: str | None = None) -> None:
    """Makes `import pydensecrf` mean ribfast.compat.pydensecrf in this process, for scripts that cannot be edited.

    exact, nan: set the module's settings of these names (see ribfast.compat.pydensecrf.densecrf); None leaves them.
    Call it before anything imports the real pydensecrf: names that were taken from that cannot be exchanged any more,
    so it raises RuntimeError then and changes nothing. Calling it again is harmless. A script is run by

        python -c "import ribfast.compat as c, runpy; c.install(); runpy.run_path('eval.py', run_name='__main__')"
    """
    if nan not in (None, "error", "propagate"):
        raise ValueError(f"install: expected nan to be 'error' or 'propagate', got {nan!r}")
    for name, module in sys.modules.items():
        if name.partition(".")[0] == "pydensecrf" and _NAMES.get(name) is not module:
            raise RuntimeError(
                f"install: expected to come before the first import of pydensecrf, got {name} of "
                f"{getattr(module, '__file__', None)} already imported; call install() at the start of the program"
            )
    sys.modules.update(_NAMES)
    if exact is not None:
        pydensecrf.densecrf.exact = exact
    if nan is not None:
        pydensecrf.densecrf.nan = nan
