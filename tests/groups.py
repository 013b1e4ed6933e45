"""Processes that are started together, as torchrun does it, and ended with what started them."""

import contextlib
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def environment(**more):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


@contextlib.contextmanager
def free_port():
    """Bound, so that Linux gives it to nobody else; who sets SO_REUSEADDR, as torch does, can listen there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield str(held.getsockname()[1])


@contextlib.contextmanager
def started(*commands):
    """By Python. commands: (words, environment) of each."""
    children = []
    try:
        for words, variables in commands:
            words = [sys.executable, *map(str, words)]
            pipe = subprocess.PIPE
            children.append(subprocess.Popen(words, env=variables, text=True, stdout=pipe, stderr=pipe))
        yield children
    finally:
        for child in children:
            child.terminate()  # torchrun gives its own 30 seconds
        for child in children:
            with child:
                try:
                    child.wait(60)
                except subprocess.TimeoutExpired:
                    child.kill()


@contextlib.contextmanager
def ranks(*words, count=2):
    """The same command by each process of one group."""
    with free_port() as port:
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        each = [environment(**group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
        with started(*((words, variables) for variables in each)) as children:
            yield children


def ended(children):
    """(exit code, standard output, standard error) of each."""
    with ThreadPoolExecutor(len(children)) as pool:  # all at once: pipes that nobody reads are full soon
        said = list(pool.map(lambda child: child.communicate(timeout=240), children))
    return [(child.returncode, *texts) for child, texts in zip(children, said, strict=True)]
