"""How many CPUs this process may really use.

A container's limit is a quota of the cgroup's scheduler, not a smaller machine: `os.cpu_count` still tells of the host.
So the quota is read, in cgroup v2 from ``cpu.max`` and in v1 from ``cpu.cfs_quota_us``, at every level from our own
cgroup up to the root, because the tightest one rules. See cgroups(7) and the kernel's admin-guide/cgroup-v2.
"""

import os
from pathlib import Path, PurePosixPath


def available(root: Path = Path("/")) -> int:
    """The CPUs to plan for: the quota rounded down, but at least 1 and at most the scheduler's affinity."""
    allowed = len(os.sched_getaffinity(0))
    quota = cgroup_quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """The CPUs that the cgroup's quota allows, in fractions; None where there is no quota or no cgroup.

    root stands for ``/``, where /proc and /sys are.
    """
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, own = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [controllers, "cpu"] if controllers else ["", "unified"]
        for mount in mounts:
            # In a container the path may be the host's, which is not mounted here; its upper levels then are.
            path = PurePosixPath("/", own)
            for level in [path, *path.parents]:
                quotas.append(_quota(root / "sys/fs/cgroup" / mount / str(level).lstrip("/"), v2=not controllers))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(directory: Path, *, v2: bool) -> float | None:
    if v2:
        words = _read(directory / "cpu.max").split()  # "max 100000" or "150000 100000"
    else:
        words = (_read(directory / "cpu.cfs_quota_us") + " " + _read(directory / "cpu.cfs_period_us")).split()
    try:
        quota, period = (int(word) for word in words)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None  # v1 says -1 for none


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")  # the one that is always loaded
    except OSError:
        return ""
