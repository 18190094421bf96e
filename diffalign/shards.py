"""Full fine-tuning over several GPUs with weights, gradients and optimiser states in shards (FSDP2, DESIGN 8).

Torch's ``fully_shard`` keeps each weight as a slice of its first axis on every process and gathers a block when it is
called. The optimiser, EMA and clipping see plain tensors: aliases of this process's slices. Checkpoints hold whole
tensors, so that a run goes on with any number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .errors import UserError
from .methods.base import Method
from .recipe import Recipe

BLOCKS = (ResnetBlock2D, BasicTransformerBlock)  # what is gathered at a time; gradient checkpointing cuts there too


def check_parallel(recipe: Recipe, method: Method[Any], world: int = 0) -> None:
    """Raises UserError, in one line, for what does not go with ``train.parallel=fsdp``.

    Args:
        world: processes; 0 where they are not known yet.
    """
    model, train = recipe.model, recipe.train
    if train.parallel != "fsdp":
        return
    ahead = recipe.data.reference_errors or type(method).prepare is not Method.prepare
    wrong: list[tuple[bool, str, str]] = [
        (model.storage != "copies", "model.storage=adapters", "adapters are small: set train.parallel=ddp, or copies"),
        (
            method.roles != ("student",),
            f"method '{recipe.method.name}'",
            "it trains more roles; set train.parallel=ddp",
        ),
        (method.online, f"method '{recipe.method.name}'", "it samples while it trains; set train.parallel=ddp"),
        (model.quantize != "none", f"model.quantize={model.quantize}", "set model.quantize=none"),
        (model.compile, "model.compile=true", "set model.compile=false"),
        (model.offload, "model.offload=true", "set model.offload=false"),
        (model.channels_last, "model.channels_last=true", "set model.channels_last=false"),
        (train.optimizer != "adamw", f"train.optimizer={train.optimizer}", "set train.optimizer=adamw"),
        (train.precision == "fp16", "train.precision=fp16", "set train.precision=bf16 or fp32"),
        (
            bool(ahead),
            "columns that are computed ahead of training",
            "set data.reference_errors=null or train.parallel=ddp",
        ),
    ]
    for found, what, mend in wrong:
        if found:
            raise UserError(f"train.parallel=fsdp does not go with {what}; {mend}")
    if world == 1:
        raise UserError(
            "train.parallel=fsdp needs several processes; start it with torchrun --nproc_per_node N -m diffalign train "
            "..., or set train.parallel=ddp"
        )


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network in place, block by block; its weights come to the mesh's device as they are cut.

    Whether a weight is trained must be settled before: FSDP remembers it."""
    for module in network.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh)
    # by default the outermost keeps what it gathered: validation under EMA weights would leave those for the next step
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():  # slices take their last place in memory at the first gathering
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def make_mesh(device: torch.device, world: int) -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh(device.type, (world,))


class Shards:
    """The slices of a sharded network's weights on this process.

    Args:
        network: after `shard`.
        kind: its class before.
    """

    def __init__(self, network: nn.Module, kind: type[nn.Module]) -> None:
        self.network, self.kind = network, kind
        self.weights: dict[str, DTensor] = dict(network.named_parameters())  # type: ignore[arg-type]
        self.local = {
            name: nn.Parameter(weight.to_local().detach(), requires_grad=False) for name, weight in self.weights.items()
        }

    def take_gradients(self) -> None:
        """Gradients, summed over processes, move from the network's weights to the slices."""
        for name, weight in self.weights.items():
            if isinstance(weight.grad, DTensor):
                # FSDP gives the mean over processes
                self.local[name].grad = weight.grad.to_local().mul_(weight.device_mesh.size())
            weight.grad = None

    def gather(self, name: str, part: Tensor) -> Tensor:
        """A whole tensor on the CPU from what each process holds of it: a weight's slice, or a state of its shape."""
        like = self.weights[name]
        whole = DTensor.from_local(
            part.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return whole.full_tensor().to("cpu", copy=True)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This process's slice of a whole tensor."""
        like = self.weights[name]
        pieces = whole.chunk(like.device_mesh.size())
        rank = like.device_mesh.get_local_rank()
        return pieces[rank] if rank < len(pieces) else whole[:0]

    def gather_optimizer(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A ``state_dict`` of the optimiser over `local`, in order, with whole tensors."""
        return self._map(state, self.gather)

    def cut_optimizer(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The other way round."""
        return self._map(state, self.cut)

    def _map(self, state: Mapping[str, Any], change: Any) -> dict[str, Any]:
        names = list(self.local)
        moments = {
            index: {k: change(names[index], v) if v.ndim else v for k, v in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": moments}

    def whole(self, keep: bool) -> nn.Module | None:
        """The network on the CPU with whole weights; None where ``keep`` is False. All processes call it."""
        state = {}
        for name, part in self.local.items():
            tensor = self.gather(name, part)
            if keep:
                state[name] = tensor
        if not keep:
            return None
        with torch.device("meta"):
            network: nn.Module = self.kind.from_config(self.network.config)  # type: ignore[attr-defined]
        network.load_state_dict(state, assign=True)
        return network
