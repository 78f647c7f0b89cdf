"""What a tree of processes has cost: CPU time and memory, read from the kernel.

CPU is read from each process's own CPU clock (`clock_getcpuclockid`), for three reasons: it counts nanoseconds, where
utime and stime in /proc/PID/stat come in ticks of 10 ms, which is what 150 streams of floor.c cost; it covers all
threads, those that have ended too, where /proc/PID/schedstat covers the first thread alone; and it is up to date at
the moment of reading. A child that dies takes its clock with it, but when it is reaped its whole time goes to its
parent's cutime and cstime, so the sum of clock + cutime + cstime over the tree grows by what was spent and nothing
else. Ticks come in by the dead alone.

Memory is PSS: a page that k processes share counts 1/k in each, so the sum over the tree counts it once. Programs
and libraries are in it, and their share falls and rises when any process elsewhere that maps them starts and ends: on a
machine where other Pythons come and go, by several hundred KB. So the part without pages of files is given as well,
which is the tree's own doing alone. Sockets and other kernel memory are in neither.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class Tree:
    """A process and all its descendants, as they are at each moment of asking."""

    def __init__(self, root: int) -> None:
        self._root = psutil.Process(root)

    def pids(self) -> list[int]:
        """The living, the root first."""
        return [self._root.pid, *(child.pid for child in self._root.children(recursive=True))]

    def cpu_ns(self) -> int:
        """User and system time of the tree since it began, in ns, with all that have died in it."""
        return sum(_clock_ns(pid) + _dead_children_ns(pid) for pid in self.pids())

    def root_cpu_ns(self) -> int:
        """User and system time of the root alone, without its children dead or alive."""
        return _clock_ns(self._root.pid)

    def memory(self) -> "Memory":
        """What the tree occupies now."""
        return sum((_memory(pid) for pid in self.pids()), Memory(0, 0))


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one or more processes, in bytes."""

    pss: int
    unfiled: int  # of it, anonymous and shared memory: no page of any file

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.pss + other.pss, self.unfiled + other.unfiled)

    def __sub__(self, other: "Memory") -> "Memory":
        return Memory(self.pss - other.pss, self.unfiled - other.unfiled)


@dataclass(frozen=True, slots=True)
class MachineTime:
    """CPU time of the whole machine at one moment, in seconds summed over its CPUs."""

    busy_secs: float
    stolen_secs: float

    @classmethod
    def now(cls) -> "MachineTime":
        """Read it. `stolen` is what the hypervisor gave to others while we wanted to run."""
        times = psutil.cpu_times()
        return cls(times.user + times.nice + times.system + times.irq + times.softirq, times.steal)


def _clock_ns(pid: int) -> int:
    # The clock id of another process: clock_getcpuclockid(3) is not in the time module, but this is all that it does.
    # The low bits say "per process, not per thread" (0) and "scheduler's count" (2).
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:  # died and was reaped since it was listed: its parent has its time
        return 0


def _dead_children_ns(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return (int(fields[13]) + int(fields[14])) * _TICK_NS


def _memory(pid: int) -> Memory:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return Memory(0, 0)
    kilobytes = {}
    for line in rollup.splitlines()[1:]:
        name, _, value = line.partition(":")
        kilobytes[name] = int(value.split()[0])
    if not kilobytes:  # a zombie has no memory
        return Memory(0, 0)
    return Memory(kilobytes["Pss"] * 1024, (kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]) * 1024)
