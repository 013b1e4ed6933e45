"""Shells' completion, by the shells that are there."""

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


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_values(scripts, tmp_path):
    (tmp_path / "photos").mkdir()

    def completed(*words):
        line = f'COMP_WORDS=({" ".join(words)!s}); COMP_CWORD={len(words) - 1}; _ribfast; echo "${{COMPREPLY[@]}}"'
        if words[-1] == "''":
            line = line.replace("''", '""')
        run = [shutil.which("bash"), "-c", scripts["bash"] + line]
        return subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()

    assert completed("ribfast", "train-") == ["train-classifier", "train-irn", "train-seg"]
    assert set(cli.COMMANDS) < set(completed("ribfast", "''"))
    assert completed("ribfast", "rib", "--pre") == ["--preset", "--precision"]
    assert completed("ribfast", "rib", "--preset", "f") == ["fast"]
    assert completed("ribfast", "train-classifier", "--att") == ["--attention"]  # of one method alone
    assert completed("ribfast", "train-classifier", "--method", "''") == ["bce", "eader"]
    assert completed("ribfast", "cam", "--out", "ph") == ["photos"]
    assert completed("ribfast", "rib", "--no-str") == ["--no-strict"]


def test_every_option_is_there(scripts):
    for name in cli.COMMANDS:
        parser, _ = cli._parser_of(name, [])
        words = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
        (line,) = [line for line in scripts["bash"].splitlines() if line.strip().startswith(f"{name}) options=")]
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
