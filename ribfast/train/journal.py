"""metrics.jsonl: what each step of a training gave, a JSON object a line."""

import json
from pathlib import Path


class Journal:
    """Appends to a file; of one that is there, the lines before `step` are kept. Without a path nothing is written."""

    def __init__(self, path: Path | None, step: int = 0):
        self._file = None
        if path is not None:
            kept = [line for line in _lines(path) if json.loads(line).get("step", 0) < step] if step else []
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 it is closed by close()
            self._file.writelines(line + "\n" for line in kept)

    def write(self, **facts) -> None:
        if self._file is not None:
            self._file.write(json.dumps(facts) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> list[str]:
    """The whole ones: a killed run may have left half a line."""
    lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
    return [line for line in lines if line.startswith("{") and line.endswith("}")]
