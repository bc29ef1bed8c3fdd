"""A system-call filter for untrusted programs.

No new process, thread or program, no signal, no socket, no shared memory, no debugging or administration of the kernel.

Resource limits alone do not do: RLIMIT_NPROC does not bind root, and memory shared between processes or kept in queues
is not counted by RLIMIT_AS. The filter is a classic BPF program (linux/filter.h, linux/seccomp.h) that refuses the
calls named here with EPERM and allows the others; of calls that stand for many by their command, it allows the commands
named here and refuses the others. Calls of another architecture, the 32-bit ones included, end the process.
"""

import platform
import struct

from llmfusion.errors import UserError

# name: number on x86_64, number on aarch64 (None: has no such call)
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "socket": (41, 198), "socketpair": (53, 199), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "vmsplice": (278, 75), "personality": (135, 92),
    "modify_ldt": (154, None), "ioperm": (173, None), "iopl": (172, None), "quotactl": (179, 60), "acct": (163, 89),
    "swapon": (167, 224), "reboot": (169, 142), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "syslog": (103, 116),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "io_setup": (206, 0),
    # What can be done with such an object by its number, should there ever be one.
    "inotify_add_watch": (254, 27), "fanotify_mark": (301, 263), "io_destroy": (207, 1), "io_submit": (209, 2),
    "io_cancel": (210, 3), "io_getevents": (208, 4), "io_pgetevents": (333, 292), "shmat": (30, 196),
    "shmctl": (31, 195), "shmdt": (67, 197), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182), "mq_timedreceive": (243, 183), "mq_notify": (244, 184), "mq_getsetattr": (245, 185),
    # What keeps the disks, the cache, the processors or the memory of the machine busy, or counts against its user.
    "sync": (162, 81), "syncfs": (306, 267), "fsync": (74, 82), "fdatasync": (75, 83), "sync_file_range": (277, 84),
    "msync": (26, 227), "flock": (73, 32), "readahead": (187, 213), "fadvise64": (221, 223), "membarrier": (324, 283),
    "mlock": (149, 228), "mlock2": (325, 284), "mlockall": (151, 230), "timer_create": (222, 107),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "set_mempolicy_home_node": (450, 450),
    # What belongs to the administration of the machine, whatever capabilities may be left.
    "quotactl_fd": (443, 443), "swapoff": (168, 225), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "vhangup": (153, 58), "seccomp": (317, 277), "capset": (126, 91), "get_robust_list": (274, 100),
    "open_tree_attr": (467, 467), "lsm_set_self_attr": (460, 460),
    # Nothing may be done to the process that forks for the programs, or to itself by its number.
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "setpgid": (109, 154), "setsid": (112, 157),
    # A read-only bubblewrap mount does not cover /dev/null and /dev/urandom: root, their owner, could change them.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
# name: (number on x86_64, on aarch64, which argument is the command, commands that are allowed). Of fcntl, nothing
# that sends signals, locks, leases, watches or enlarges; of ioctl, what Python asks of its own files; of prctl, names.
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ = 0, 1, 2, 3, 4, 1030, 1032
TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451
PR_SET_NAME, PR_GET_NAME, PR_SET_VMA = 15, 16, 0x53564D41
COMMANDS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "fcntl": (72, 25, 1, (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ)),
    "ioctl": (16, 29, 1, (TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX)),
    "prctl": (157, 167, 0, (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)),
}  # fmt: skip
O_ASYNC = 0x2000  # of F_SETFL: a signal whenever the file is ready
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # machine: column above, AUDIT_ARCH_*
X32 = 0x4000_0000  # x86_64 calls in the x32 numbering, which would slip through
# BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_JMP|JSET|K, BPF_RET|K
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, REFUSE, ALLOW = 0x8000_0000, 0x0005_0001, 0x7FFF_0000  # KILL_PROCESS, ERRNO with EPERM, ALLOW
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def filter_program(machine: str | None = None) -> bytes:
    """The filter for ``machine`` (default: this one) as an array of ``struct sock_filter``.

    Raises :class:`UserError` for an architecture whose call numbers are not known here: never a weaker sandbox.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise UserError(
            f"programs can be run only in a sandbox, and it has no system-call filter for {machine}; "
            f"score on one of: {', '.join(ARCHITECTURES)}"
        )
    column, architecture = ARCHITECTURES[machine]
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL),
    ]  # fmt: skip
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    for call in COMMANDS.values():
        block = _allowed_commands(call[2], call[3])
        code += [(EQUAL, 0, len(block), (call[0], call[1])[column]), *block]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in [*code, (RETURN, 0, 0, ALLOW)])


def _allowed_commands(argument: int, allowed: tuple[int, ...]) -> list[Instruction]:
    """Allow some commands of one call and refuse the others; F_SETFL without O_ASYNC."""
    code: list[Instruction] = [(LOAD, 0, 0, _low_half(argument))]
    for command in allowed:
        code += [(EQUAL, 0, 1, command), (RETURN, 0, 0, ALLOW)]
    if F_SETFL in allowed:
        at = code.index((EQUAL, 0, 1, F_SETFL))
        flags: list[Instruction] = [(LOAD, 0, 0, _low_half(2)), (ANY_BIT, 0, 1, O_ASYNC), (RETURN, 0, 0, REFUSE)]
        code[at : at + 1] = [(EQUAL, 0, 4, F_SETFL), *flags]
    return [*code, (RETURN, 0, 0, REFUSE)]


def _low_half(argument: int) -> int:
    """Offset of the lower 32 bits of an argument: all that the kernel reads of a command, and first in memory."""
    return ARGUMENTS + 8 * argument
