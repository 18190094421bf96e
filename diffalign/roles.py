"""Who there is: one frozen base with named LoRA adapters, or full copies (DESIGN 4).

Three traps are closed here, once for every method: switching adapters walks a kept list of layers instead of the module
tree; switching never touches ``requires_grad`` (the phase decides who trains); gradient checkpointing recomputes each
call under the role that made it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .data.batch import Cond
from .families.extras import Extra

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .shards import Shards

BASE = "base"
Forward = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]


class _Reached(Exception):
    """The layers that were asked for have answered."""


class Roles:
    """The networks of a run by role name.

    Args:
        unet: the frozen base. With ``copies`` and ``reference=False`` it is trained in place.
        forward: one forward of a U-Net, ``forward(unet, x_t, t, cond) -> prediction``.
        trained: names of the roles that are versions of the U-Net.
        lora: adapter settings; None means full copies.
        modules: trained roles that are modules of their own (heads). Those that enter the U-Net's call (`Extra`: soft
            tokens, user attention) are versions of the U-Net too: the frozen base with these parts on.
        checkpointing: recompute activations in the backward pass.
        reference: False when ``base`` is never called.
        seed: keys the adapters' initial values.
    """

    def __init__(
        self,
        unet: nn.Module,
        forward: Forward,
        trained: Sequence[str] = ("student",),
        lora: LoraConfig | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        checkpointing: bool = False,
        reference: bool = True,
        seed: int = 0,
    ) -> None:
        self.unet = unet.requires_grad_(False).eval()
        self.forward = forward
        self.lora = lora
        self.modules = dict(modules or {})
        self.extras = {name: module for name, module in self.modules.items() if isinstance(module, Extra)}
        self.trained = tuple(trained)
        self.layers: list[BaseTunerLayer] = []
        self.networks: dict[str, nn.Module] = {BASE: unet}
        self.current = BASE
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self.shards: Shards | None = None
        self._resting: list[tuple[nn.Parameter, Tensor]] = []
        if lora is not None:
            self._add_adapters(seed)
        else:
            self._copy(reference)
        for name, extra in self.extras.items():
            extra.attach(self.unet)
            self.networks[name] = self.unet
        for name, module in self.modules.items():
            self._parameters[name] = dict(module.float().eval().named_parameters())
        for role in self.names:
            for parameter in self._parameters[role].values():
                parameter.requires_grad_(False)
        if checkpointing:
            for network in {id(n): n for n in self.networks.values()}.values():
                network.enable_gradient_checkpointing(self._checkpoint)  # type: ignore[operator]
        self._dropouts = [
            drop for layer in self.layers for drop in layer.lora_dropout.values() if isinstance(drop, nn.Dropout)
        ]

    def _add_adapters(self, seed: int) -> None:
        assert self.lora is not None
        with torch.random.fork_rng(devices=[]):
            for index, role in enumerate(self.trained):
                torch.manual_seed((seed * 1000003 + index) & 0xFFFFFFFF)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
                    self.unet.add_adapter(copy.deepcopy(self.lora), adapter_name=role)  # type: ignore[operator]
        self.layers = [m for m in self.unet.modules() if isinstance(m, BaseTunerLayer)]
        for role in self.trained:
            mark = f".{role}."
            self._parameters[role] = {n: p for n, p in self.unet.named_parameters() if "lora_" in n and mark in n}
            for parameter in self._parameters[role].values():
                parameter.data = parameter.data.float()
            self.networks[role] = self.unet
        if self.trained:
            self.current = self.trained[-1]
            self.activate(BASE)

    def _copy(self, reference: bool) -> None:
        for index, role in enumerate(self.trained):
            in_place = not reference and index == 0
            network = self.unet if in_place else copy.deepcopy(self.unet)
            self.networks[role] = network.float()
            self._parameters[role] = dict(network.named_parameters())
        if not reference:
            del self.networks[BASE]

    @property
    def names(self) -> tuple[str, ...]:
        """Every role that has parameters to train."""
        return (*self.trained, *self.modules)

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the student and, apart from it, the base over the processes (FSDP2); for copies with one role."""
        from .shards import Shards, shard

        (student,) = self.trained
        self.train_only((student,))
        kind = type(self.networks[student])
        for network in self.networks.values():
            shard(network, mesh)
        self.shards = Shards(self.networks[student], kind)
        self._parameters[student] = dict(self.networks[student].named_parameters())

    def rest(self) -> None:
        """From now on the base of full copies waits in the processor's memory between calls."""
        for weight in self.networks[BASE].parameters():
            home = weight.data.to("cpu")
            self._resting.append((weight, home.pin_memory() if weight.is_cuda else home))
            weight.data = self._resting[-1][1]

    @contextmanager
    def _awake(self, role: str, device: torch.device) -> Iterator[None]:
        """A resting base on the device for one call; it stays until the next one where a graph may need its weights."""
        resting = self._resting if role == BASE else []
        for weight, home in resting:
            weight.data = home.to(device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            if not torch.is_grad_enabled():
                for weight, home in resting:
                    weight.data = home

    def whole(self, role: str, keep: bool = True) -> nn.Module | None:
        """A role's network for saving; gathered to the CPU where it is sharded (then None unless ``keep``)."""
        return self.networks[role] if self.shards is None else self.shards.whole(keep)

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Trainable tensors of a role by name; this process's slices where they are sharded."""
        return self._parameters[role] if self.shards is None else self.shards.local

    def parameters(self, role: str) -> list[nn.Parameter]:
        """Trainable tensors of a role, as a list (never an iterator that clipping would exhaust)."""
        return list(self.named_parameters(role).values())

    @torch.no_grad()
    def pull(self, role: str, towards: str, share: float) -> None:
        """Move a role's weights by ``share`` of the way towards another's, both versions of the U-Net.

        Of adapters the factors A and B move, so that their product does so only nearly: see `share_factors`."""
        mine: list[Tensor] = [*self.parameters(role)]
        theirs: list[Tensor] = [*self.parameters(towards)]
        torch._foreach_lerp_(mine, theirs, share)

    @torch.no_grad()
    def share_factors(self, role: str, towards: str) -> None:
        """Give an untrained adapter another's factors A; with its B of zeros it stays nothing."""
        theirs = self.named_parameters(towards).values()
        for (name, mine), other in zip(self.named_parameters(role).items(), theirs, strict=True):
            if "lora_A" in name:
                mine.copy_(other)

    def train_only(self, roles: Sequence[str]) -> None:
        """Exactly these roles receive gradients from now on."""
        for name, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name in roles)

    def activate(self, role: str) -> None:
        """Switch adapters and extra parts of the shared network. Costs one pass over the kept layers."""
        if role == self.current:
            return
        for name, extra in self.extras.items():
            extra.on = name == role
        off = role == BASE or role in self.extras
        for layer in self.layers:
            layer._disable_adapters = off
            if not off:
                layer._active_adapter = [role]
        self.current = role

    @contextmanager
    def active(self, role: str) -> Iterator[None]:
        """A role active for a while: for recomputation, sampling and saving."""
        before = self.current
        self.activate(role)
        try:
            yield
        finally:
            self.activate(before)

    def _checkpoint(self, module: nn.Module, *args: Any) -> Any:
        role = self.current  # the role of this call, not of the backward pass

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), self.active(role)

        return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)

    def __call__(self, role: str, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's own prediction (B, C, h, w) for noisy latents at times t (B,).

        A graph is built only where a trained role or a given tensor asks for one."""
        self.activate(role)
        if role not in self.networks:
            raise KeyError(f"there is no network '{role}'; this run has {', '.join(self.networks)}")
        with self._awake(role, x_t.device):
            return self.forward(self.networks[role], x_t, t, cond)

    def features(self, role: str, x_t: Tensor, t: Tensor, cond: Cond, layer: str) -> Tensor:
        """Output of the sub-module ``layer`` during a role's forward; what comes after it is not computed."""
        return self.features_of(role, x_t, t, cond, (layer,))[0]

    def features_of(self, role: str, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[str]) -> list[Tensor]:
        """Outputs of several sub-modules during a role's forward, each of which is called once; what comes after the
        last of them is not computed."""
        found: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output
                if len(found) == len(layers):
                    raise _Reached

            return keep

        network = self.networks[role]
        handles = [network.get_submodule(name).register_forward_hook(keeper(name)) for name in layers]
        try:
            self(role, x_t, t, cond)
        except _Reached:
            return [found[name] for name in layers]
        finally:
            for handle in handles:
                handle.remove()
        missing = next(name for name in layers if name not in found)
        raise KeyError(f"the forward pass of '{role}' does not come through '{missing}'")

    @property
    def has_dropout(self) -> bool:
        """Whether any adapter drops activations."""
        return any(module.p > 0 for module in self._dropouts)

    def dropout(self, on: bool) -> None:
        """Dropout of adapters and own modules on for a trained call, off elsewhere."""
        for own in self.modules.values():
            own.train(on)
        for module in self._dropouts:
            module.train(on)

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """Trainable tensors of a role, detached; whole ones on the CPU where they are sharded (all processes call)."""
        if self.shards is not None:
            return {name: self.shards.gather(name, part) for name, part in self.shards.local.items()}
        return {name: parameter.detach() for name, parameter in self._parameters[role].items()}

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copy tensors back; names must match exactly."""
        own = self.named_parameters(role)
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[:3]
            raise ValueError(f"role '{role}' does not fit: {len(own)} tensors here, {len(state)} given, such as {odd}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name] if self.shards is None else self.shards.cut(name, state[name]))


class Ema:
    """Averages of a role's trainable tensors in fp32; warm-up as in k-diffusion: min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.updates = 0
        self.shadow = [p.detach().clone().float() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in self.parameters], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in place of the live weights for a while."""
        live = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.shadow)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, live)

    def state_dict(self) -> dict[str, Any]:
        """Count and tensors."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back from ``state_dict``."""
        self.updates = int(state["updates"])
        torch._foreach_copy_(self.shadow, list(state["shadow"]))
