"""Two processes with half of each batch are one process with all of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from flamingo_lite import TogetherInParts, join, read_checkpoint, spread, whole

pytest.importorskip("accelerate", reason="pip install accelerate==1.15.0")

from together import TEXTS, Stopped, build, end_of, run, stop

WAYS = ["ddp", "fsdp", "fsdp-layers"]


@pytest.fixture(scope="module")
def one():
    """What one process ends with, and what it logs."""
    features, logged = build()[2], []
    looks = {"validation": (features[:4], TEXTS[:4]), "log": logged.append}
    end = end_of(*run(**looks))
    return {**end, "logged": [(n["true"], n["shuffled"]) for n in logged]}


@pytest.fixture(scope="module", params=WAYS)
def ends(request, tmp_path_factory):
    """Where two processes left their ends; one of their runs went on from one's."""
    folder, way = tmp_path_factory.mktemp("together"), request.param
    with pytest.raises(Stopped):
        run(checkpoint=folder / f"{way} one.pt", report=stop)
    # What `accelerate launch --num_processes 2` starts on GPUs; it has none for CPUs.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("together.py"))
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, str(folder), way],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, way


@pytest.mark.parametrize("name", ["straight", "resumed", "unread"])
@pytest.mark.parametrize("process", [0, 1])
def test_two_processes_end_as_one(ends, one, name, process):
    folder, way = ends
    end = torch.load(folder / f"{way} {name}{process}.end", weights_only=True)
    assert len(end["losses"]) == 4
    for loss, wanted in zip(end["losses"], one["losses"], strict=True):
        assert loss == pytest.approx(wanted, abs=1e-5)
    assert torch.tensor(end["gates"]).allclose(torch.tensor(one["gates"]), atol=2e-4)
    assert end["weights"].keys() == one["weights"].keys()
    for weight, tensor in end["weights"].items():
        assert type(tensor) is torch.Tensor and tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, one["weights"][weight], atol=1e-5, rtol=0)


def test_two_rows_of_the_table_move_and_no_other(ends):
    folder, way = ends
    model, tokenizer, _ = build()
    end = torch.load(folder / f"{way} straight0.end", weights_only=True)
    name = "lang_encoder.model.decoder.embed_tokens.weight"
    before = dict(model.named_parameters())[name]
    moved = (end["weights"][name] != before).any(dim=1).nonzero().flatten().tolist()
    new = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    assert moved == sorted(new)


def test_they_look_at_the_validation_as_one_does(ends, one):
    folder, way = ends
    looks = torch.load(folder / f"{way} straight0.end", weights_only=True)["logged"]
    assert torch.tensor(looks).allclose(torch.tensor(one["logged"]), atol=1e-5)
    assert len(looks) == len(one["logged"]) > 0


def test_one_process_writes_a_checkpoint_for_any_number(ends, one, tmp_path):
    """And a process that is alone goes on from what two wrote, in the middle, too."""
    folder, way = ends
    written = folder / f"{way}.pt"
    _, history = run(checkpoint=written)
    assert len(history) == 4
    middle = tmp_path / "middle.pt"
    shutil.copy(written.with_name(written.name + ".previous"), middle)
    end = end_of(*run(checkpoint=middle))
    for weight, tensor in end["weights"].items():
        torch.testing.assert_close(tensor, one["weights"][weight], atol=1e-5, rtol=0)


def test_each_process_finds_its_own_random_states(ends):
    folder, way = ends
    others = read_checkpoint(folder / f"{way}.pt")["random"]["others"]
    assert [sorted(states) for states in others] == [["cpu", "numpy", "python"]]


def pretend(mixed_precision="no", **plugin):
    """An accelerator that says that it uses FSDP."""
    plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, **plugin}
    return SimpleNamespace(
        distributed_type="DistributedType.FSDP",
        process_index=0,
        num_processes=1,
        is_main_process=True,
        device=torch.device("cpu"),
        mixed_precision=mixed_precision,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin)),
    )


def test_fsdp2_is_told_by_the_accelerator():
    assert isinstance(join(pretend(), None), TogetherInParts)
    assert not join(None, None).is_cut


@pytest.mark.parametrize(
    "how, line",
    [
        ({"fsdp_version": 1}, "fsdp_version=2"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading=False"),
        ({"mixed_precision": "bf16"}, "mixed_precision='no'"),
    ],
)
def test_what_does_not_work_is_refused_with_the_line_to_change(how, line):
    with pytest.raises(ValueError, match=line):
        join(pretend(**how), None)


def test_a_precision_of_the_accelerators_is_refused_with_ddp_as_well():
    """It would stay in the model's forward, and scales no loss."""
    accelerator = pretend("fp16")
    accelerator.distributed_type = "DistributedType.MULTI_GPU"
    with pytest.raises(ValueError, match="mixed_precision='no'"):
        join(accelerator, torch.nn.Linear(2, 2))


def test_the_model_is_where_the_accelerator_computes():
    """So precision and optimizers, made next, are of that device."""
    accelerator, model = pretend(), torch.nn.Linear(2, 2)
    accelerator.distributed_type = "DistributedType.MULTI_GPU"
    accelerator.device = torch.device("meta")
    assert join(accelerator, model).device.type == "meta"
    assert next(model.parameters()).device.type == "meta"


def test_muon_is_refused_where_no_process_has_a_whole_matrix():
    with pytest.raises(ValueError, match="with_muon=False"):
        run(pretend(), with_muon=True)


def test_a_whole_tensor_is_left_alone():
    tensor = torch.ones(3)
    assert whole(tensor) is tensor and spread(tensor, torch.ones(3)) is tensor
