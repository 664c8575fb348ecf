"""What a report says of the memory in use."""

import subprocess
import sys

import pytest

CHILD = """
import torch
from flamingo_lite.reports import memory_in_use
print(memory_in_use(torch.device("cpu")))
"""
PARENT = """
import subprocess, sys
large = b"x" * 2_000_000_000
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is not told apart")
def test_memory_is_not_that_of_the_process_that_started_this_one():
    """On Linux `getrusage` begins with the memory of whoever started a process."""
    command = [sys.executable, "-c", PARENT, CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 100e6 < int(done.stdout) < 1.9e9
