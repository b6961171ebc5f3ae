"""The processors that this process may use."""

import os

CPU_QUOTA = "/sys/fs/cgroup/cpu.max"  # of a container, as Docker and Kubernetes set it


def num_processors() -> int:
    """Return the number of processors that this process may use, at least 1.

    The affinity mask (`taskset`, Slurm) and the processor quota of a container (cgroup version 2) limit it.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(CPU_QUOTA) as file:
            quota, period = file.read().split()
        return max(1, min(found, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max", which is no limit
        return found
