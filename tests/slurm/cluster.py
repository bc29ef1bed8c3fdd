"""A real SLURM on one machine: a controller and several nodes with pretended cores, memory and GPUs, on loopback only.

Everything lives in one folder and ends by process id; nothing outside of it is written, so several clusters can run at
once and an ordinary user can start one. Needs Debian's or Ubuntu's packages slurmctld, slurmd, slurm-client and munge,
no systemd, no cgroups and no accounting database. What it cannot show: enforcement of memory, real GPUs, several users.
"""

import contextlib
import ctypes
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
LIBC = ctypes.CDLL(None)
CONFIGURATION = """
ClusterName=pretended
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
MpiDefault=none
# no cgroups and no systemd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# else a job that asks for no memory takes a whole node
DefMemPerCPU=1000
GresTypes=gpu
# believe what stands here about a node, not what the machine has
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# the plugin asks the queue about jobs that have ended
MinJobAge=900
KillWait=5
SlurmdTimeout=20
ReturnToService=2
PluginDir={plugins}
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdLogFile={root}/slurmd.%n.log
SlurmdSpoolDir={root}/spool.%n
NodeName=DEFAULT CPUs=32 Boards=1 SocketsPerBoard=1 CoresPerSocket=32 ThreadsPerCore=1 \\
  RealMemory=1000000 Gres=gpu:pretended:2
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=2880 DefaultTime=10 PriorityTier=10 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=5 PriorityTier=100 State=UP
PartitionName=scavenge Nodes=ALL MaxTime=2880 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE State=UP
"""


class NoSlurm(Exception):
    """SLURM is not installed, or did not come up; says what to do."""


@dataclass
class Cluster:
    """A running cluster: ``environment`` for its clients, and its processes by name."""

    root: Path
    nodes: list[str]
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def environment(self) -> dict[str, str]:
        """What clients need: the configuration, and an ``srun`` that knows it, too.

        The plugin takes SLURM_CONF from the environment of the ``srun`` within a job.
        """
        return {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": f"{self.root / 'bin'}:{sbin(os.environ['PATH'])}"}

    def ask(self, *words: str, check: bool = True) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """All jobs the controller remembers, as ``scontrol show job`` describes them; one entry a task of an array."""
        shown = self.ask("scontrol", "--oneliner", "show", "job")
        return [
            dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", line))
            for line in shown.splitlines()
            if line.startswith("JobId")
        ]

    def start_node(self, node: str) -> None:
        """(Re)start a node's slurmd."""
        self._spawn(node, [program("slurmd"), "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """A node fails: its slurmd and everything its jobs run are killed at once."""
        self.processes.pop(node).kill()
        for job in self.jobs():
            if job["NodeList"] == node and job["JobState"] == "RUNNING":
                _kill_steps(self.root, node)
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=failed")

    def _spawn(self, name: str, words: list[str]) -> None:
        environment = {**os.environ, **self.environment}
        log = open(self.root / f"{name}.out", "ab")  # noqa: SIM115 - the child's
        with log:
            self.processes[name] = subprocess.Popen(
                words, env=environment, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )

    def stop(self) -> None:
        """Cancel all jobs, then end every process by its id."""
        self.ask("scancel", "--user", getpass.getuser(), check=False)
        with contextlib.suppress(AssertionError):
            wait(lambda: all(job["JobState"] not in ("RUNNING", "COMPLETING", "PENDING") for job in self.jobs()), 15)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in reversed(self.processes.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for node in self.nodes:
            _kill_steps(self.root, node)


@contextlib.contextmanager
def cluster(nodes: int = 3) -> Iterator[Cluster]:
    """A cluster for as long as the ``with`` lasts. Raises :class:`NoSlurm`."""
    _require()
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="llmfusion-slurm-"))  # short: sockets lie in it
    made = Cluster(root, [f"node{i}" for i in range(1, nodes + 1)])
    try:
        _configure(made)
        files = {
            "--key-file": "munge.key",
            "--socket": "munge.socket",
            "--pid-file": "munged.pid",
            "--log-file": "munged.log",
            "--seed-file": "munged.seed",
        }
        options = [word for option, name in files.items() for word in (option, str(root / name))]
        made._spawn("munged", [program("munged"), "--force", "--foreground", *options])
        wait(lambda: (root / "munge.socket").exists())
        made._spawn("slurmctld", [program("slurmctld"), "-D"])
        for node in made.nodes:
            made.start_node(node)
        idle = ("sinfo", "-h", "-N", "-p", "gpu", "-t", "idle", "-o", "%N")
        wait(lambda: made.ask(*idle, check=False).split() == made.nodes)
        made.seconds = time.monotonic() - began
        yield made
    except AssertionError as error:
        if made.seconds:
            raise
        raise NoSlurm(f"the cluster did not come up: {error}\n{_logs(root)}") from None
    finally:
        made.stop()
        shutil.rmtree(root, ignore_errors=True)


def _require() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name, path=sbin(os.environ["PATH"])) is None]
    if missing:
        remedy = "sudo apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        raise NoSlurm(f"these tests run on a real SLURM, and {', '.join(missing)} cannot be found: {remedy}")


def sbin(path: str) -> str:
    """``path`` with the places where daemons are."""
    return os.pathsep.join([path, "/usr/local/sbin", "/usr/sbin", "/sbin"])


def program(name: str) -> str:
    """The full path of a program that :func:`_require` has found."""
    path = shutil.which(name, path=sbin(os.environ["PATH"]))
    assert path is not None
    return path


def _configure(made: Cluster) -> None:
    root = made.root
    for name in ("state", "bin", *(f"spool.{node}" for node in made.nodes)):
        (root / name).mkdir()
    root.chmod(0o755)  # munged wants to be reached, and nobody else to write
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    ports = _free_ports(1 + len(made.nodes))
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
        for node, port in zip(made.nodes, ports[1:], strict=True)
    )
    text = CONFIGURATION.format(
        host=host, ports=ports, user=getpass.getuser(), root=root, nodes=nodes, plugins=_plugins()
    )
    (root / "slurm.conf").write_text(text)
    for device in range(2):  # a GPU must be a character device; this one can be opened by everybody
        (root / f"gpu{device}").symlink_to("/dev/null")
    (root / "gres.conf").write_text(
        f"NodeName=node[1-{len(made.nodes)}] Name=gpu Type=pretended Flags=nvidia_gpu_env File={root}/gpu[0-1]\n"
    )
    srun = root / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={root}/slurm.conf exec {program("srun")} "$@"\n')
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)


def _plugins() -> str:
    plugins = sorted(Path("/usr/lib").glob("*/slurm*/cred_munge.so"))
    if not plugins:
        raise NoSlurm("SLURM's plugins cannot be found under /usr/lib: install the package slurm-wlm-basic-plugins")
    return str(plugins[0].parent)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _die_with_parent() -> None:
    LIBC.prctl(1, signal.SIGTERM)  # a test run that is killed leaves no daemons
    os.setsid()


def _kill_steps(root: Path, node: str) -> None:
    """Kill a node's slurmstepds, then what they ran.

    They outlive their slurmd, and would report the end of what is killed before them.
    """
    import psutil

    daemons = [
        p
        for p in psutil.process_iter(["cmdline"])
        if (p.info["cmdline"] or [""])[0].startswith("slurmstepd") and _is_of_node(p.pid, root, node)
    ]
    jobs = [child for process in daemons for child in process.children(recursive=True)]
    for process in [*daemons, *jobs]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _is_of_node(pid: int, root: Path, node: str) -> bool:
    """Whether a slurmstepd holds this node's log or spool open."""
    with contextlib.suppress(OSError):
        return any(
            str(root) in (target := os.readlink(link)) and node in target for link in Path(f"/proc/{pid}/fd").iterdir()
        )
    return False


def _logs(root: Path) -> str:
    return "\n".join(
        f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(root.glob("*.[lo][ou][gt]"))
    )


def wait(condition, seconds: float = 30.0, pause: float = 0.1) -> None:  # type: ignore[no-untyped-def]
    """Wait until ``condition()``, as long as ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain"
        time.sleep(pause)


if __name__ == "__main__":  # a cluster to play with: python -m tests.slurm.cluster
    with cluster() as running:
        print(
            f"up after {running.seconds:.1f} s; Ctrl-C ends it\n"
            + "\n".join(f"export {k}={v}" for k, v in running.environment.items()),
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    sys.exit(0)
