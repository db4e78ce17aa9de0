"""The C++ tests of the cpu backend: kernels and models of every level against double precision, threads, its table."""

from __future__ import annotations

import subprocess

import pytest
from cpu_library import build, isas


@pytest.mark.parametrize("name", ["thread_pool", "memory", "packing", "kernels", "model", "table", "fuzz"])
def test_cpp(name):
    program = build() / "tests" / f"{name}_test"
    done = subprocess.run([program], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_machine_has_the_baseline():
    assert isas()[0] == "scalar"
