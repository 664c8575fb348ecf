"""Two processes with half of each batch are one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from flamingo_lite import Together

pytest.importorskip("accelerate", reason="pip install accelerate==1.15.0")

from together import Stopped, end_of, run, stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes left their ends; one of their runs went on from one.pt."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(Stopped):
        run(checkpoint=folder / "one.pt", report=stop)
    # What `accelerate launch --num_processes 2` starts on GPUs; it has none for CPUs.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("together.py"))
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["straight", "resumed"])
@pytest.mark.parametrize("process", [0, 1])
def test_two_processes_end_as_one(folder, name, process):
    end = torch.load(folder / f"{name}{process}.pt.end", weights_only=True)
    wanted = end_of(*run())
    assert len(end["losses"]) == 4
    for loss, one in zip(end["losses"], wanted["losses"], strict=True):
        assert loss == pytest.approx(one, abs=1e-5)
    for weight, tensor in end["weights"].items():
        torch.testing.assert_close(tensor, wanted["weights"][weight], atol=1e-5, rtol=0)


def test_one_process_writes_a_checkpoint_for_any_number(folder):
    """And a process that is alone goes on from what two wrote."""
    _, history = run(checkpoint=folder / "straight.pt")
    assert len(history) == 4


def test_fsdp_is_refused_by_name():
    accelerator = SimpleNamespace(distributed_type="DistributedType.FSDP")
    with pytest.raises(ValueError, match="launch with DDP"):
        Together(accelerator, None)
