"""Starts a command again and again, whose process is killed as it reads an image, as the kernel does where memory runs
out. Arguments: the image, the exit codes that are expected (-9: killed), the command's line."""

import importlib
import json
import os
import signal
import sys

from ribfast import cli, data


def start(name, words):
    child = os.fork()  # of a process without threads
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    read = data.Source.image

    def image(source, item):
        if item.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(source, item)

    data.Source.image = image
    os._exit(cli.main(words))


if __name__ == "__main__":
    importlib.import_module("ribfast.pipeline")  # once for all children
    expected = json.loads(sys.argv[2])
    codes = [start(sys.argv[1], sys.argv[3:]) for _ in expected]
    assert codes == expected, codes
