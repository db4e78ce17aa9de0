"""The CPU: the platform of every machine on which no other plugin claims to be it."""

from __future__ import annotations

import os
from collections.abc import Generator

from infinilm_hookspecs import Platform, hookimpl

Claims = list[type[Platform] | str]


class CpuPlatform:
    """The processors and the main memory of this machine."""

    name = "cpu"
    default_backend = "cpu"
    communication = "gloo"

    @classmethod
    def availability(cls) -> tuple[bool, str]:
        """Return that there is one."""
        return True, "every machine has a CPU"

    def device(self, local_rank: int) -> str:
        """Return "cpu", the same for every process."""
        return "cpu"

    def memory(self, device: str) -> tuple[int, int]:
        """Return (available, total) bytes of main memory, as Linux's proc(5) or POSIX's sysconf count them."""
        return _available_memory(), _sysconf("SC_PHYS_PAGES") * _sysconf("SC_PAGE_SIZE")

    def supports(self, dtype: str) -> bool:
        """Return whether torch computes in `dtype` here: IEEE and brain floating point of 2 bytes or more."""
        return dtype in ("float32", "bfloat16", "float16", "float64")


@hookimpl(wrapper=True)
def provide_platform() -> Generator[None, Claims, Claims]:
    claims = yield
    return claims or [CpuPlatform]


def _available_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass  # not Linux: pages that are free are all that POSIX counts
    return _sysconf("SC_AVPHYS_PAGES") * _sysconf("SC_PAGE_SIZE")


def _sysconf(name: str) -> int:

    return os.sysconf(name)
