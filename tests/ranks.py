"""One process of several: runs the command lines of a JSON file. RANK:COMMAND:IMAGES after it: the process of that rank
dies, the first time, once that command has made so many."""

import json
import os
import signal
import sys
from pathlib import Path

from ribfast import cli


def main(path, *victims):
    first, codes = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0", []
    for number, words in enumerate(json.loads(Path(path).read_text())):
        for victim in victims:
            rank, command, images = map(int, victim.split(":"))
            if first and (rank, command) == (int(os.environ["RANK"]), number):
                cli._progress = lambda title="", images=images: dying(images)
        codes.append(cli.main(words))
    sys.exit(max(codes))


def dying(images):
    left = iter(range(images))

    def dies(done, total, name):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return dies


if __name__ == "__main__":
    main(*sys.argv[1:])
