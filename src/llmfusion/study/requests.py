"""What a job asks a cluster for: memory and time by the size of its models and data, as the estimate has it."""

import math

from llmfusion.study.workload import Assumptions, JobWork, assumed_seconds, seconds_of

GB = 1e9
PROGRAM = 4 * GB  # torch, transformers and two processes of Snakemake
MARGIN = 4  # times the estimated seconds: for slower GPUs than assumed
SHORTEST = 60  # minutes
UNLIMITED = 7 * 24 * 60  # minutes: of a job that no cluster ends


def memory_mb(job: JobWork, attempt: int) -> int:
    """Megabytes of the machine's memory, in whole gigabytes; more with each attempt.

    A model passes through the machine's memory on its way to the GPUs, and stays there where there are none: as much
    as its GPUs hold. Other jobs hold samples, or one tensor of some models, and are judged by the size of their result.
    """
    held = job.gpus * job.gpu_memory if job.gpus else min(20 * job.disk, 8 * GB) + job.disk / 8
    return math.ceil((PROGRAM + held) / GB) * 1000 * attempt


def minutes(job: JobWork, attempt: int, most: int | None = None) -> int:
    """Minutes in steps of ten, never above ``most``. A job that resumes does not ask for more when it is tried again.

    Not measured times but the assumptions count, so that Snakemake's processes in a job come to the same number.
    """
    seconds = MARGIN * seconds_of(job.work, assumed_seconds(Assumptions())[job.rates])
    wanted = max(SHORTEST, 10 * math.ceil(seconds / 600)) * (1 if job.resume else attempt)
    return wanted if most is None else min(wanted, most)
