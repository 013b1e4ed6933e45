"""One process of several: runs the command lines of a JSON file. RANK:COMMAND after it: the process of that rank dies,
the first time, as that command has made its first image; the others begin it when that one has something in hand."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from ribfast import claims, cli


def main(path, *victims):
    path, codes = Path(path), []
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again:
        path.with_suffix(".again").touch()
    victims = dict(tuple(map(int, victim.split(":")))[::-1] for victim in victims if not again)
    for number, words in enumerate(json.loads(path.read_text())):
        in_hand = path.with_suffix(f".{number}")
        if victims.get(number) == int(os.environ["RANK"]):
            die(in_hand)
        elif number in victims:
            while not in_hand.exists():
                time.sleep(0.02)
        codes.append(cli.main(words))
    sys.exit(max(codes))


def die(in_hand):
    """At the first image."""
    take = claims.Claims.take

    def taken(self, *what):
        took = take(self, *what)
        if took:
            in_hand.touch()
        return took

    claims.Claims.take = taken
    cli._progress = lambda title="": lambda done, total, name: name and os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
