"""The CPUs that a cgroup leaves us, read from made-up /proc and /sys trees."""

import os
from pathlib import Path

import pytest

from forkd import cpus


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = "0::/system.slice/forkd.service\n"
V1 = "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": ""}, None),
        ({"proc/self/cgroup": "garbage\n\n:::::"}, None),
        ({"proc/self/cgroup": V2}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/forkd.service/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/forkd.service/cpu.max": "250000 100000\n"}, 2.5),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/forkd.service/cpu.max": "lots\n"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/system.slice/forkd.service/cpu.max": "1 0\n"}, None),
        # a tighter quota above rules over a looser one below
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/system.slice/forkd.service/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/system.slice/cpu.max": "150000 100000\n",
            },
            1.5,
        ),
        # in a container without a cgroup namespace the path is the host's, and only the top is mounted
        ({"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpus.cgroup_quota(tree(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "count"), [("50000", 1), ("100000", 1), ("199999", 1), ("1000000000", None)])
def test_available_is_at_least_one_and_at_most_the_affinity(tmp_path: Path, quota: str, count: int | None) -> None:
    tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert cpus.available(tmp_path) == (len(os.sched_getaffinity(0)) if count is None else count)


def test_without_a_quota_the_affinity_rules(tmp_path: Path) -> None:
    assert cpus.available(tmp_path) == len(os.sched_getaffinity(0))


def test_the_real_system() -> None:
    assert 1 <= cpus.available() <= len(os.sched_getaffinity(0))
