"""Training in shards (FSDP2): every process keeps its share of the weights, the gradient and AdamW's moments.

A layer is whole only while it runs, as in ZeRO stage 3 (arXiv 1910.02054), so that a student needs 16 bytes a parameter
of all processes together and not of each.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from q2t.config import Distill
from q2t.distillation.objective import Objective


def asked_for() -> bool:
    """Whether `accelerate launch` was told to use FSDP, by its configuration file or by --use_fsdp."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check(settings: Distill) -> None:
    """Refuse what FSDP can't train.

    Raises:
        ValueError: the run needs a student that is whole between steps.
    """
    phases = settings.in_phases()
    needs = {
        "adapter": settings.adapter is not None,
        "on_policy": any(phase.on_policy for phase in phases),
        "sparsity": any(phase.sparsity for phase in phases),
    }
    if named := [key for key, needed in needs.items() if needed]:
        raise ValueError(
            f"{', '.join(named)}: needs the student's weights whole, and FSDP keeps them in shards; leave it out, or "
            "launch without FSDP"
        )


def shard(objective: Objective, device: torch.device) -> None:
    """Deal the parameters out among the processes, in place; from the CPU to `device`, layer after layer."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    for module in (*objective.student.model.layers, objective):
        fully_shard(module, mesh=mesh)
        # Losses are divided by the tokens of the whole step, so that gradients are to be added up. And by a sum that
        # every backend has.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(objective: Objective) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in objective.parameters())


def whole(value: Any) -> Any:
    """A tensor's shards put together, which all processes have to ask for; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(parameter: Tensor, value: Any) -> Any:
    """What `whole` gave, in shards if the parameter is."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def gathered(student: Any) -> Any:
    """A student without shards, in the memory of the CPU, that computes the same."""
    from accelerate import init_empty_weights

    # Copies, since what is put together of uneven shards is a view of a larger storage, which safetensors refuses.
    weights = {name: nn.Parameter(whole(p.detach()).to("cpu", copy=True)) for name, p in student.named_parameters()}
    with init_empty_weights():
        plain = type(student)(student.config)
    plain.load_state_dict(weights, strict=False, assign=True)  # tied weights are there once
    plain.tie_weights()
    plain.generation_config = student.generation_config
    return plain
