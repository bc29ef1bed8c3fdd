# PYTHON_ARGCOMPLETE_OK
"""``llmfusion COMMAND ...``: one console script. A command's module is imported when it is the one asked for.

Each module has ``add_arguments(parser)`` and ``run(arguments) -> exit status``; its docstring is the command's
description.
"""

import argparse
import gc
import os
import signal
import sys
from importlib import import_module

from llmfusion import __version__
from llmfusion.errors import UserError
from llmfusion.io import job_log
from llmfusion.io.hub_address import require_hub_address
from llmfusion.io.logs import redact_output

COMMANDS = {
    "check": "check studies: all mistakes at once, nothing is started",
    "doctor": "check whether this machine can do what a study needs",
    "estimate": "what a study will take: jobs, GPU-hours, wall time, disk, memory",
    "merge": "merge checkpoints that were fine-tuned from one pivot",
    "verify": "walk from a result to every hash behind it, and list all licences",
    "cost": "what the rows of finished tables took",
    "replicate": "write the same study over several seeds",
    "report": "write finished tables of a study to one HTML page",
    "sandbox": "run untrusted programs to verdicts",
    "grade": "grade stored answers to verdicts",
    "schema": "print the JSON schema of a study",
    "warm": "run a command whose steps fork instead of importing torch anew (no GPU)",
    "step": "make one artifact; rules call this",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns its exit status: 0, 1 for what went wrong, 2 for mistakes in what was given, 130 after Ctrl-C.
    """
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as __main__ leaves it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(words: list[str]) -> int:
    redact_output()
    parser = _parser(_command_of(words))
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    parsed = parser.parse_args(words)
    if parsed.command is None:
        parser.print_help()
        return 2
    try:
        require_hub_address()
        return int(import_module(f"llmfusion.cli.{parsed.command}").run(parsed))
    except UserError as error:  # of a command that has no words of its own for it, e.g. a plug-in that lacks something
        job_log.report(f"error: {error}", getattr(parsed, "log", None))
        return 1


def entry() -> None:
    """The console script.

    A merge ends its process at once: collecting and unloading what numba has loaded is a quarter of its start-up.
    """
    at_once = sys.argv[1:2] == ["merge"]
    if at_once:
        gc.disable()
    status = main()
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _command_of(words: list[str]) -> str | None:
    """The command whose options the parser must know: the first word, here or on the line that a shell completes."""
    if "_ARGCOMPLETE" in os.environ:
        # argcomplete's protocol: the number, from 1, of the word on the line that is the program
        words = os.environ.get("COMP_LINE", "").split()[int(os.environ["_ARGCOMPLETE"]) :]
    return next((word for word in words if not word.startswith("-")), None)


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of one."""
    parser = argparse.ArgumentParser(prog="llmfusion", description="Fuse several language models into one.")
    parser.add_argument("--version", action="version", version=f"llmfusion {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        module = import_module(f"llmfusion.cli.{name}") if name == command else None
        one = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__ if module else summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module:
            module.add_arguments(one)
    return parser
