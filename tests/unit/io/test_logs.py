"""Whatever Python prints in a process goes through one layer that takes secrets out."""

import io
import os
import subprocess
import sys
import threading

from llmfusion.io.logs import RedactedStream

PASSWORD = "s3cr3t-pass"
ENDPOINT = f"http://me:{PASSWORD}@127.0.0.1:9"

PROGRAM = """
import logging, os, sys, threading, traceback, warnings

early = logging.StreamHandler()  # holds the stream of before
logging.getLogger("early").addHandler(early)
from llmfusion.io.logs import redact_output
redact_output()
redact_output()  # again changes nothing
url = os.environ["HF_ENDPOINT"]
print("print", url)
print("print", "http://me:s3cr3t", sep=" ", end="")
print("-pass@127.0.0.1", flush=True)
sys.stdout.buffer.write(b"bytes " + url.encode() + b"\\n")
sys.stderr.write("stderr " + url + "\\n")
sys.__stderr__.write("original " + url + "\\n")
logging.getLogger("early").warning("early %s", url)
logging.getLogger("last.resort").warning("last resort %s", {"url": url})
warnings.warn("warning " + url)
from tqdm import tqdm
for _ in tqdm(range(2), desc="bar " + url, file=sys.stderr):
    pass
thread = threading.Thread(target=lambda: 1 / len(url[:0]) if print("thread", url) is None else 0)
thread.start()
thread.join()
class Odd:
    def __del__(self):
        raise ValueError("unraisable " + url)
Odd()
try:
    raise ValueError("cause " + url)
except ValueError as error:
    raise RuntimeError("uncaught " + url) from error
"""
SAID = ("print", "bytes", "stderr", "original", "early", "last resort", "warning", "bar", "thread", "unraisable")
SAID_AT_THE_END = ("cause", "uncaught")


def test_every_way_to_print_in_a_process_is_redacted() -> None:
    environment = {**os.environ, "HF_ENDPOINT": ENDPOINT}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 1
    assert PASSWORD not in printed
    for word in (*SAID, *SAID_AT_THE_END):
        assert f"{word} " in printed, printed
    assert printed.count("http://<user>@127.0.0.1") >= len(SAID) + len(SAID_AT_THE_END)


def test_whole_lines_are_passed_on_and_the_rest_with_a_flush() -> None:
    below = io.StringIO()
    stream = RedactedStream(below)
    assert stream.write("one\ntw") == 6
    assert below.getvalue() == "one\n"
    stream.writelines(["o", "\r", "three"])
    assert below.getvalue() == "one\ntwo\r"
    stream.flush()
    assert below.getvalue() == "one\ntwo\rthree"
    assert stream.isatty() is False


def test_lines_of_several_threads_stay_whole(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", ENDPOINT)
    below = io.StringIO()
    stream = RedactedStream(below)

    def write(name: str) -> None:
        for _ in range(200):
            for part in (name, " http://me:", PASSWORD[:4], PASSWORD[4:], "@host", "\n"):
                stream.write(part)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(below.getvalue().splitlines()) == sorted(f"{name} http://<user>@host" for name in "abcd" * 200)
