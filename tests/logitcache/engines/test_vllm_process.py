"""The processes that vLLM starts end with the process that owns them, whichever package started them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from logitcache.engines.vllm_process import OWNER_PID, brief

ROOT = Path(__file__).parents[3]
CHILD = """
import signal, time
from logitcache.engines.vllm_process import end_with_owner

end_with_owner()
print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, flush=True)
time.sleep(600)
"""
OWNER = f"""
import subprocess, sys
from logitcache.engines.vllm_process import ends_with_this_process

with ends_with_this_process():
    child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
child.wait()
"""


@pytest.mark.slow
def test_a_process_ends_when_its_owner_is_killed_and_leaves_ctrl_c_to_it() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, ignores_ctrl_c = owner.stdout.readline().split()
    child = psutil.Process(int(pid))
    assert ignores_ctrl_c == "True"
    owner.kill()
    owner.wait()
    assert not psutil.wait_procs([child], timeout=60)[1], "it outlived its owner"


def test_the_variable_that_names_the_owner_stands_once_in_the_sources() -> None:
    sources = [*(ROOT / "logitcache").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]
    assert sum(path.read_text(encoding="utf-8").count(OWNER_PID) for path in sources) == 1


def test_the_room_imports_the_standard_library_only() -> None:
    for path in (ROOT / "logitcache" / "engines").glob("*.py"):
        imports = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(imports) <= sys.stdlib_module_names


def test_an_error_in_short_is_one_line_without_pydantics_frame_and_never_empty() -> None:
    framed = "1 validation error\n  Value error, no such model. [type=value_error, input_value=…]"
    assert brief(ValueError(framed)) == "no such model"
    assert brief(ValueError("two\nlines " + 400 * "x")) == "two lines …"
    assert brief(KeyError()) == "KeyError"
