"""What a run frees, the next step gets without the system clearing it again."""

import os
import platform
import subprocess
import sys

import pytest

from sami_fast.engine.memory import ALLOCATOR

PROGRAM = """
import resource, sys
from sami_fast.engine.memory import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [bytes(b"1" * (24 << 20)) for _ in range(4)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("argument", "environment", "kept"), [("keep", {}, True), ("", {}, False), ("keep", {"MALLOC_TRIM_THRESHOLD_": "1000"}, False)]
)
def test_freed_memory_is_kept(argument, environment, kept):
    """By page faults of allocating the same a second time."""
    given = {name: value for name, value in os.environ.items() if name not in ALLOCATOR} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM, argument], env=given, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1000) == kept
