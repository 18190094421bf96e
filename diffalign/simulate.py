"""A training step without numbers: the real networks and the real loss on the meta device, every allocation counted.

Tensors on the meta device have shapes and no memory, so that a step of SDXL takes seconds on a laptop. What a GPU would
hold is read off the same graph that training builds: adapters, checkpointing, the order of calls. Two things are
supplied, since the meta device has neither: autocast as CUDA does it, and attention by a fused kernel.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .context import Context, draw_key
from .data.batch import Batch, Cond
from .data.teacher import MARK
from .denoiser import Denoiser
from .eval.scorers import parse_scorers
from .methods.base import Method, Phase
from .roles import BASE, Roles

META = torch.device("meta")
LATENTS = {"pair": ("chosen", "rejected"), "image": ("image",), "rated": ("image",), "prompt": ()}
Known = dict[Any, tuple[int, float, int]]
fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Shapes:
    """What one sample is: latents (channels, height, width), text (tokens, width), further conditioning by name, and of
    ranked lists the pictures of the longest one."""

    latents: tuple[int, int, int]
    tokens: int
    width: int
    added: tuple[tuple[str, int], ...] = ()
    longest: int = 2

    def cond(self, rows: int) -> Cond:
        """Conditioning of ``rows`` samples on the meta device."""
        return Cond(
            torch.empty(rows, self.tokens, self.width, device=META),
            {name: torch.empty(rows, width, device=META) for name, width in self.added},
        )


@dataclass(frozen=True)
class Usage:
    """Bytes and work of one micro-batch of a phase, beyond weights, adapters, gradients and optimiser states.

    ``held`` is what forward keeps for backward, ``peak`` the most at any moment, ``flops`` of forward and backward
    together, ``calls`` the samples that the loss sends through the U-Net by role (recomputation in the backward pass is
    in ``flops`` alone). ``whole`` is False where the method's loss cannot run without numbers, and one trained and one
    reference call stand in for it."""

    held: int
    peak: int
    flops: float
    calls: dict[str, int] = field(default_factory=dict)
    whole: bool = True

    def onward(self, more: Usage, steps: int) -> Usage:
        """This, of one of some equal steps, and ``more``, of two, give what ``steps`` of them take.

        The second step makes the peak what it stays but for what each keeps: from then on gradients of weights that are
        used more than once wait for one another."""
        kept = (steps - 2) * (more.held - self.held)
        flops = self.flops + (steps - 1) * (more.flops - self.flops)
        calls = {role: count + (steps - 1) * (more.calls[role] - count) for role, count in self.calls.items()}
        return Usage(more.held + kept, more.peak + kept, flops, calls, self.whole and more.whole)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, their highest sum, and floating-point operations.

    ``spare``: tensors that are counted elsewhere: weights and their gradients."""

    def __init__(self, spare: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = 0.0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in spare}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, flops = remembered(func, args, kwargs or {})
        self.flops += flops
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


Made = tuple[tuple[Any, ...], bool, float]  # shape, stride and dtype of each output, whether it is one, operations
_made: dict[Any, Made | None] = {}  # None: run it anew


def remembered(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, float]:
    """What a kernel gives, and its floating-point operations.

    On the meta device it gives shapes, which torch reckons in Python, and a U-Net asks the same of it again and again:
    kernels that write nothing and give no views are run once for the same arguments."""
    key = _key(func, args, kwargs)
    made = _made.get(key) if key is not None else None
    if made is not None:
        specs, single, flops = made
        with torch._C.DisableTorchFunction():
            outs = tuple(None if s is None else torch.empty_strided(s[0], s[1], dtype=s[2], device=META) for s in specs)
        return outs[0] if single else outs, flops
    out = func(*args, **kwargs)
    flops = work(func, args, kwargs, out)
    if key is not None and key not in _made:
        _made[key] = _spec(args, kwargs, out, flops)
    return out, flops


def _key(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What decides the shapes that ``func`` gives; None where it is to be run in any case."""
    schema = func._schema
    if schema.is_mutable or any(found.alias_info is not None for found in schema.returns):
        return None
    known: list[Any] = []
    tensors = 0
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor):
            if value.device.type != "meta":
                return None
            tensors += 1
            known.append((value.shape, value.stride(), value.dtype))
        else:
            known.append((type(value), value))
    lengths = tuple(len(value) if isinstance(value, (list, tuple)) else -1 for value in args)
    return (func, tuple(known), lengths, tuple(kwargs)) if tensors else None


def _spec(args: Sequence[Any], kwargs: dict[str, Any], out: Any, flops: float) -> Made | None:
    single = isinstance(out, Tensor)
    outs = (out,) if single else out
    if not isinstance(outs, tuple) or not all(value is None or isinstance(value, Tensor) for value in outs):
        return None
    given = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
    if any(value is not None and value.untyped_storage()._cdata in given for value in outs):
        return None  # a view that does not say so
    return tuple(None if v is None else (v.shape, v.stride(), v.dtype) for v in outs), single, flops


def work(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    """Floating-point operations of one kernel; 0 for what is no matrix product."""
    packet = func._overloadpacket
    if packet is fused_attention or packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        q, k = (args[0], args[1]) if packet is fused_attention else (args[1], args[2])
        return (4.0 if packet is fused_attention else 10.0) * q.numel() * k.shape[-2]
    formula = flop_registry.get(packet)
    return float(formula(*args, **kwargs, out_val=out)) if formula else 0.0


class _Hold(torch.autograd.Function):
    """Identity that keeps its input for the backward pass, as an 8-bit layer does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grads[0]


class CudaLike(TorchFunctionMode):
    """Autocast by CUDA's rules (matrix products and convolutions in ``dtype``, norms in fp32) and fused attention.

    ``norms`` False leaves norms in the format of their input, as the CPU's autocast does; ``holds`` makes frozen linear
    layers keep their input, as bitsandbytes' 8-bit layers do."""

    LOW = frozenset({torch.nn.functional.linear, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm})
    HIGH = frozenset({torch.group_norm, torch.layer_norm})

    def __init__(self, dtype: torch.dtype | None, norms: bool = True, holds: bool = False) -> None:
        super().__init__()
        self.dtype, self.norms, self.holds = dtype, norms, holds

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = (self._cast(x, self.dtype) if self.dtype else x for x in args[:3])
            return fused_attention(q, k, v, 0.0, False)[0]
        if self.dtype is not None:
            to = self.dtype if func in self.LOW else torch.float32 if self.norms and func in self.HIGH else None
            if to is not None:
                args = [self._cast(value, to) for value in args]
                kwargs = {name: self._cast(value, to) for name, value in kwargs.items()}
        if self.holds and func is torch.nn.functional.linear and not args[1].requires_grad and args[0].requires_grad:
            args = [_Hold.apply(args[0]), *args[1:]]
        return func(*args, **kwargs)


class _Middle(np.random.Generator):
    """Draws of which numbers of a range lie at ``share`` of it: what is expected, in place of some chance."""

    def __init__(self, share: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.share = share

    def integers(  # type: ignore[override]
        self, low: int, high: int | None = None, size: Any = None, **kwargs: Any
    ) -> Any:
        first, last = (0, low) if high is None else (low, high)
        value = int(first + self.share * (last - first))
        return value if size is None else np.full(size, value)

    def random(self, size: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self.share if size is None else np.full(size, self.share)


class _Context(Context):
    """The context of a simulated step.

    A call without gradient leaves nothing behind, so that one is run for all of its kind, and fewer rows count their
    share of it. ``known``: rows, operations and highest bytes by kind, for all phases."""

    modes: Callable[[], AbstractContextManager[object]] = nullcontext
    live: Live
    calls: Counter[str]
    known: Known

    def casting(self) -> AbstractContextManager[object]:
        return self.modes()

    def rng(self, tag: str, batch: Batch) -> list[np.random.Generator]:
        count = len(batch.ids)
        return [_Middle((i + 1) / (count + 1)) for i in range(count)]

    def noise(self, tag: str, names: Sequence[str], visits: Sequence[int], shape: Sequence[int]) -> Tensor:
        return torch.empty(len(names), *shape, device=META)

    def model(
        self, role: str, x_t: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, uncond: Cond | None = None
    ) -> Tensor:
        if torch.is_grad_enabled():
            return super().model(role, x_t, t, cond, guidance, uncond)
        # adapters have one size, and so have copies
        live, key = self.live, (role == BASE, x_t.shape[1:], cond.embeds.shape[1:], guidance == 1.0)
        rows, flops, peak = self.known.get(key, (0, 0.0, 0))
        if len(x_t) > rows:
            now, highest, done = live.now, live.peak, live.flops
            live.peak = now
            super().model(role, x_t, t, cond, guidance, uncond)
            self.known[key] = len(x_t), live.flops - done, live.peak - now
            live.peak = max(highest, live.peak)
        else:
            share = len(x_t) / rows
            self.calls[role] += len(x_t) * (1 if guidance == 1.0 else 2)
            live.flops += share * flops
            live.peak = max(live.peak, live.now + int(share * peak))
        return torch.empty(x_t.shape, device=META)


def checkpoint_under(roles: Roles, modes: Callable[[], AbstractContextManager[object]]) -> None:
    """Where networks recompute, they do so under ``modes``, which a backward pass does not bring back by itself."""

    def run(module: nn.Module, *args: Any) -> Any:
        role = roles.current

        @contextmanager
        def again() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(roles.active(role))
                stack.enter_context(modes())
                yield

        return torch.utils.checkpoint.checkpoint(
            module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again())
        )

    for network in {id(n): n for n in roles.networks.values()}.values():
        if getattr(network, "is_gradient_checkpointing", False):
            network.enable_gradient_checkpointing(run)  # type: ignore[operator]


def simulate_phase(
    method: Method[Any],
    roles: Roles,
    phase: Phase,
    shapes: Shapes,
    rows: int,
    denoiser: Denoiser,
    autocast: torch.dtype | None = None,
    *,
    norms: bool = True,
    holds: bool = False,
    decoder: Callable[[Tensor], Tensor] | None = None,
    known: Known | None = None,
) -> Usage:
    """One micro-batch of ``rows`` through ``phase``: loss and backward.

    Of ``Method.repeated`` steps one and two are run, and the others follow their difference.

    Args:
        roles: networks on the meta device.
        rows: pairs, or images of methods on images.
        autocast, norms, holds: see `CudaLike`.
        decoder: of methods that decode. What rewards take is not counted.
        known: what calls without gradient took in other phases of these roles.
    """
    steps = getattr(method.config, method.repeated) if method.repeated else 0
    if steps > 2:
        one, two = (
            simulate_phase(
                type(method)(method.config.model_copy(update={method.repeated: count})),
                *(roles, phase, shapes, rows, denoiser, autocast),
                norms=norms,
                holds=holds,
                decoder=decoder,
            )
            for count in (1, 2)
        )
        return one.onward(two, steps)

    def modes() -> AbstractContextManager[object]:
        return CudaLike(autocast, norms, holds)

    checkpoint_under(roles, modes)
    roles.train_only(phase.trains)
    calls: Counter[str] = Counter()
    hooks = [
        network.register_forward_pre_hook(lambda module, args: calls.update({roles.current: len(args[0])}))
        for network in {id(n): n for n in roles.networks.values()}.values()
    ]
    spare = [t for m in (*roles.networks.values(), *roles.modules.values()) for t in (*m.parameters(), *m.buffers())]
    trained = [parameter for role in phase.trains for parameter in roles.parameters(role)]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        spare.append(parameter.grad)
    try:
        with torch.device(META):
            ctx = _Context(roles, denoiser, 0, META, shapes.cond(1), phase=phase.name, latent_shape=shapes.latents)
            ctx.modes, ctx.calls, ctx.known = modes, calls, {} if known is None else known
            ctx.decoder = decoder
            ctx.rewards = dict.fromkeys(parse_scorers(method.rewards()), _reward) if method.needs.reward else {}
            batch = empty_batch(method, phase, shapes, rows)
            ctx.live = live = Live(spare)
            sums: dict[str, Tensor] = {}
            try:
                whole = True
                with live:
                    if method.online:  # samples leave their items; what making them takes is counted apart
                        batch, sums = _items(method, ctx, batch, rows)
                        live.flops = 0.0
                        calls.clear()
                    with torch.no_grad():
                        ctx.stats = sums | method.statistics(ctx, batch)
                    loss = method.loss(ctx, batch, phase)
                    total = (loss.values * loss.weights).sum()
            except (RuntimeError, NotImplementedError) as error:
                if META.type not in str(error).lower():
                    raise  # only a loss that looks at numbers, of which there are none, is stood in for
                whole, live = False, Live(spare)
                ctx.live = live
                calls.clear()
                with live:
                    total = _calls(method, ctx, phase, shapes, rows)
            held, made = live.now, dict(calls)
            with live:
                total.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    return Usage(held, live.peak, live.flops, made, whole)


def _items(method: Method[Any], ctx: Context, prompts: Batch, rows: int) -> tuple[Batch, dict[str, Tensor]]:
    """A micro-batch of what an online method samples, and the sums of its round."""
    with torch.no_grad(), torch.device("cpu"):
        found = method.collect(ctx, prompts)
    return found.take([i % len(found) for i in range(rows)]), dict(found.stats)


def _reward(images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
    """In the place of a scorer, whose weights are not here."""
    return images.mean((1, 2, 3))


def picture_names(method: Method[Any], shapes: Shapes) -> tuple[str, ...]:
    """Names of a row's latents."""
    if method.needs.batch == "ranked":
        return tuple(f"image_{k}" for k in range(shapes.longest))
    return LATENTS[method.needs.batch]


def empty_batch(method: Method[Any], phase: Phase, shapes: Shapes, rows: int) -> Batch:
    """A micro-batch of nothing; its ids would say a teacher's noise, which some methods make anew of them."""
    names = picture_names(method, shapes)
    scores = [f"score_{k}" for k in range(len(names))] if method.needs.batch == "ranked" else []
    return Batch(
        tuple(f"{MARK}|0|0|{i}" for i in range(rows)),
        (0,) * rows,
        {name: torch.empty(rows, *shapes.latents) for name in names},
        {"prompt": shapes.cond(rows)},
        {name: torch.empty(rows) for name in (*method.needs.columns, *scores)},
        torch.empty(rows),
        {
            draw_key(tag, phase.name, 0): (torch.zeros(rows, dtype=torch.int64), torch.empty(rows, *shapes.latents))
            for tag in method.needs.draws
        },
        {name: torch.empty(rows, 6) for name in names or ("image",)},
        ("",) * rows,
    )


def _calls(method: Method[Any], ctx: Context, phase: Phase, shapes: Shapes, rows: int) -> Tensor:
    """A trained call of all samples and, where there is a reference, a call of it."""
    rows *= max(1, len(picture_names(method, shapes)))
    x, t, cond = torch.empty(rows, *shapes.latents), torch.zeros(rows, dtype=torch.int64), shapes.cond(rows)
    role = next((name for name in phase.trains if name in ctx.roles.networks), next(iter(ctx.roles.networks)))
    error = ctx.model(role, x, t, cond).square().mean()
    if method.needs.reference:
        with torch.no_grad():
            ctx.model("base", x, t, cond)
    return error


def simulate_forward(network: nn.Module, call: Callable[[], object], autocast: torch.dtype | None = None) -> Usage:
    """The peak and work of a call of ``network`` on the meta device without gradients, such as a VAE's decoder."""
    live = Live([*network.parameters(), *network.buffers()])
    with torch.no_grad(), torch.device(META), live, CudaLike(autocast):
        call()
    return Usage(live.now, live.peak, live.flops)
