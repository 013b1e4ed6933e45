import json
import subprocess
import sys

import ribfast
from ribfast import _ext, info


def test_says_what_serves_each_operator_and_why():
    facts = info.collect()
    assert set(facts["ops"]) == set(_ext.OPS)
    for served in facts["ops"].values():
        assert served["cpu"] == {"backend": "cpp", "reason": "compiled in"}
        assert served["cuda"]["backend"] in ("cpp", "triton", "reference") and served["cuda"]["reason"]
    assert facts["cpu"]["tier"] in facts["cpu"]["compiled"]
    text = "\n".join(info.lines())
    for fact in (ribfast.__version__, facts["torch"], facts["cpu"]["tier"], facts["built"]["compiler"]):
        assert fact in text


def test_command_prints_text_and_json():
    text = subprocess.run([sys.executable, "-m", "ribfast.info"], capture_output=True, text=True, check=True).stdout
    assert "CPU tier" in text and "gndrp" in text
    for command in (["ribfast.info"], ["ribfast", "info"]):
        command = [sys.executable, "-m", *command, "--json"]
        facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert facts["ribfast"] == ribfast.__version__


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m ribfast completion bash | head -n 1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("# bash completion") and found.stderr == ""
