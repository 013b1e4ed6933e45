"""Shells' completion, by the shells that are there."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys

import pytest

from ribfast import cli


@pytest.fixture(scope="module")
def scripts():
    return {
        shell: subprocess.run(
            [sys.executable, "-m", "ribfast", "completion", shell], capture_output=True, text=True, check=True
        ).stdout
        for shell in ("bash", "zsh", "fish")
    }


class Bash:
    """An interactive one, at whose keyboard words are typed."""

    def __init__(self, script, folder):
        (folder / "script").write_text(script)
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.environ |= {"TERM": "dumb", "INPUTRC": "/dev/null", "PS1": "$ "}
            os.execv(shutil.which("bash"), ["bash", "--norc", "--noprofile", "-i"])
        self.type("bind 'set enable-bracketed-paste off'\r. ./script\r")

    def type(self, text):
        os.write(self.terminal, text.encode())

    def completed(self, text, before="ribfast"):
        """The line after Tab, which a command shows that is written around it."""
        self.type(f"{before} {text}\t\x01printf '<%s>\\n' '\x05'\r")
        found, said = None, b""
        while found is None:
            ready, _, _ = select.select([self.terminal], [], [], 60)
            assert ready, said
            said += os.read(self.terminal, 4096)
            found = re.search(rb"\n<(.*)>\r?\n", said)
        return found[1].decode().removeprefix(f"{before} ")

    def close(self):
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture
def bash(scripts, tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    (tmp_path / "photos" / "train images").mkdir(parents=True)
    (tmp_path / "phone.pth").touch()
    started = Bash(scripts["bash"], tmp_path)
    yield started
    started.close()


CASES = {
    "train-c": "train-classifier ", "rib --preset f": "rib --preset fast ", "rib --pres": "rib --preset ",
    "train-classifier --att": "train-classifier --attention ",  # of one method alone
    "rib --no-str": "rib --no-strict ", "rib --preset=f": "rib --preset=fast ",
    "cam --data fol": "cam --data folder:", "cam --data=fol": "cam --data=folder:",
    "cam --data folder:": "cam --data folder:photos/",  # a folder alone
    "cam --data folder:ph": "cam --data folder:photos/", "cam --data=voc:pho": "cam --data=voc:photos/",
    "cam --data coco:photos/t": "cam --data coco:photos/train\\ images/",
    "cam --out photos/t": "cam --out photos/train\\ images/", "cam --checkpoint phone": "cam --checkpoint phone.pth ",
    "report --stage CAM=phone": "report --stage CAM=phone.pth ",
    "report --stage=CAM=photo": "report --stage=CAM=photos/",
    "run --set ph": "run --set ph", "rib --scales ph": "rib --scales ph", "rib --seed ph": "rib --seed ph",
    "cam --split ph": "cam --split ph", "report --stage ph": "report --stage ph",
}  # fmt: skip


def test_bash_completes_what_is_typed(bash):
    found = {typed: bash.completed(typed) for typed in CASES}
    assert found == CASES
    bash.type("COMP_WORDBREAKS=${COMP_WORDBREAKS//:}\r")  # as some set it
    cases = {typed: CASES[typed] for typed in ("cam --data folder:ph", "cam --data=fol", "report --stage CAM=phone")}
    cases |= {"cam --data folder:ph": "cam --data folder:photos", "cam --data=voc:pho": "cam --data=voc:photos"}
    assert {typed: bash.completed(typed).replace("\\:", ":") for typed in cases} == cases


def test_every_option_is_there(scripts):
    for name in cli.COMMANDS:
        parser, _ = cli._parser_of(name, [])
        words = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
        (line,) = [line for line in scripts["bash"].splitlines() if line.strip().startswith(f"{name}) takes=")]
        for word in words:
            assert word in line.replace("'", " ").split()
            assert f"'__fish_seen_subcommand_from {name}' -l {word[2:]} " in scripts["fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_ones_that_shells_read(scripts, shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    path = tmp_path / "script"
    path.write_text(scripts[shell])
    subprocess.run([shell, "-n", str(path)], check=True)
