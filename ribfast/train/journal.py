"""metrics.jsonl: what each step of a training gave, a JSON object a line."""

import json
from pathlib import Path

from .. import files


class Journal:
    """Appends to a file; of one that is there, the lines before `step` are kept. Without a path nothing is written."""

    def __init__(self, path: Path | None, step: int = 0):
        self._path = path
        if path is not None:
            kept = [facts for facts in files.lines(path) if facts.get("step", 0) < step] if step else []
            files.write(path, "".join(json.dumps(facts) + "\n" for facts in kept).encode())

    def write(self, **facts) -> None:
        if self._path is not None:
            files.append(self._path, facts)
