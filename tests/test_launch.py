"""What `accelerate launch` makes of the configurations that ship."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from q2t.config import Compute
from q2t.distillation import sharding
from q2t.stage import own_device

LAUNCH = Path(__file__).resolve().parents[1] / "q2t/launch"


@pytest.mark.parametrize("name, sharded", [("ddp", False), ("fsdp2", True)])
def test_a_configuration_starts_eight_processes(name, sharded, monkeypatch):
    given = ["--config_file", str(LAUNCH / f"{name}.yaml"), "-m", "stages.distill"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.multi_gpu or arguments.use_fsdp) and arguments.nproc_per_node == "8"
    assert arguments.module and arguments.training_script == "stages.distill"
    for key in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(key, raising=False)
        if key in environment:
            monkeypatch.setenv(key, environment[key])
    assert sharding.asked_for() == sharded
    assert environment.get("FSDP_VERSION") == ("2" if sharded else None)


def test_all_configurations_are_tested():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == {"ddp", "fsdp2"}


@pytest.mark.parametrize("device, rank, own", [("cuda", "3", "cuda:3"), ("cuda", None, "cuda:0"), ("cpu", "3", "cpu")])
def test_a_process_computes_on_its_own_device(device, rank, own, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert own_device(Compute(threads=1, dtype="float32", device=device)) == own
