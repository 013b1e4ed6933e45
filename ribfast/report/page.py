"""A report as one HTML file: its style, its script and its facts inside, and a policy that lets it fetch nothing."""

import base64
import hashlib
import json
from pathlib import Path

from .. import files

Report = dict  # of what JSON has

_HERE = Path(__file__).parent


def page(report: Report) -> str:
    """Names reach the page as JSON in which no tag can begin, and its script sets them as text alone."""
    parts = {name: (_HERE / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    style, script = _hash(parts["css"]), _hash(parts["js"])
    policy = f"default-src 'none'; style-src '{style}'; script-src '{script}'"
    facts = json.dumps(report, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    text = parts.pop("html")
    for name, part in {
        "policy": policy,
        **parts,
        "facts": facts,
    }.items():  # the facts last: nothing in them is replaced
        text = text.replace(f"{{{{{name}}}}}", part, 1)
    return text


def write_report(path: Path, report: Report) -> None:
    """Whole or not at all."""
    files.write(Path(path), page(report).encode())


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
