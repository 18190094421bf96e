"""How much memory a run takes, part by part and activity by activity, before it is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from .data.encode import PROMPT_BATCH
from .denoiser import Denoiser
from .eval.scorers import parse_scorers
from .families import Model
from .families.quantise import weight_bytes
from .methods.base import Method, Phase
from .recipe import Recipe
from .roles import BASE, Roles
from .rollouts.cost import RoundCost, round_cost
from .simulate import META, Shapes, Usage, empty_batch, simulate_forward, simulate_phase
from .trainer import plan_slots

CONTEXT = 600_000_000  # what CUDA and its libraries take of a card (assumed)
SLACK = 0.1  # share of short-lived memory that the allocator loses in gaps (assumed)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process.

    ``parts`` is what stays while training, by part; ``activities`` the most at any moment of each activity, with what
    stays; ``peak`` the largest of them. ``phases`` has the short-lived bytes (``activations``) of a micro-batch and the
    work (``flops``) in a training step of each phase, all repeats together. ``flops`` is one training step's work on
    this process, ``calls`` the samples that it sends through the U-Net by role. ``whole`` is False where the method's
    loss could not be simulated as it is.
    ``round`` is what the samples of an online method take in a step of this process.
    """

    parts: dict[str, int]
    activations: int
    phases: dict[str, dict[str, float]]
    activities: dict[str, int]
    peak: int
    flops: float
    calls: dict[str, int]
    whole: bool
    round: RoundCost | None = None

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def optimizer_bytes(name: str, parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes of an optimiser's state: two fp32 moments; two 8-bit ones with their scales; or rows and columns."""
    if name == "adafactor":
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        rest = sum(p.numel() for p in parameters.values() if p.ndim < 2)
        return 4 * (rest + sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in matrices))
    if name == "adamw8bit":  # tensors below 4096 numbers stay in fp32; a scale for each 256
        small = sum(p.numel() for p in parameters.values() if p.numel() < 4096)
        large = sum(p.numel() for p in parameters.values()) - small
        return 8 * small + 2 * large + 2 * 4 * large // 256
    return 8 * sum(p.numel() for p in parameters.values())


def held_parts(
    model: Model, method: Method[Any], roles: Roles, recipe: Recipe, dtype: torch.dtype, world: int
) -> dict[str, int]:
    """Bytes that stay on the device while training, by part. Full shards are divided by the processes.

    A role that no phase trains, such as an average of the student, has neither gradients nor an optimiser's state."""
    learning = {role for phase in method.phases for role in phase.trains}
    copies = roles.lora is None
    shards = world if recipe.train.parallel == "fsdp" else 1
    parts: dict[str, int] = {}
    if BASE in roles.networks:
        base = weight_bytes(roles.networks[BASE], dtype, recipe.model.quantize) // shards
        idle = copies and recipe.model.offload
        parts["base, frozen" + (", on the CPU between calls" if idle else "")] = 0 if idle else base
    for role in roles.names:
        named = roles.named_parameters(role)
        size = 4 * sum(p.numel() for p in named.values()) // shards
        kind = "weights" if copies or role in roles.modules else "adapter"
        parts[f"{role}: {kind}, fp32"] = size
        if role in learning:
            parts[f"{role}: gradients, fp32"] = size
            parts[f"{role}: optimiser ({recipe.train.optimizer})"] = (
                optimizer_bytes(recipe.train.optimizer, named) // shards
            )
        if recipe.train.ema:
            parts[f"{role}: EMA, fp32"] = size
    if not recipe.data.cache:
        parts["VAE and text encoders, fp32"] = sum(4 * p.numel() for m in model.encoders() for p in m.parameters())
    return parts


def shapes_of(model: Model, recipe: Recipe) -> Shapes:
    """What the U-Net is called with at the recipe's resolution."""
    side = recipe.data.resolution or model.default_resolution
    height, width = model.latent_size(side, side)
    config = model.unet.config
    pooled = 0
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = (("text_embeds", pooled), ("time_ids", 6)) if pooled else ()
    tokens = recipe.model.long_prompts or 77
    return Shapes((config["in_channels"], height, width), tokens, config["cross_attention_dim"], added)


def estimate(
    model: Model,
    method: Method[Any],
    roles: Roles,
    recipe: Recipe,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    world: int = 1,
    cuda: bool = True,
    longest: int = 2,
) -> Memory:
    """The memory of a recipe.

    Args:
        model, roles: on the meta device.
        dtype: of the frozen base; autocast: what computes.
        cuda: the device is a GPU with a context, and norms compute in fp32 under autocast.
        longest: pictures of the longest list, where rows are ranked lists.
    """
    parts = held_parts(model, method, roles, recipe, dtype, world)
    if method.needs.decode and recipe.data.cache:
        parts["VAE, fp32, for the method"] = sum(4 * p.numel() for p in model.vae.parameters())
    shapes = replace(shapes_of(model, recipe), longest=longest)
    share = -(-recipe.train.batch // world)
    micro = min(recipe.train.micro_batch or share, share)
    slots = plan_slots(method)
    used: dict[str, Usage] = {}
    known: dict[Any, tuple[int, float, int]] = {}
    for slot in slots:
        if slot.phase.name not in used:
            used[slot.phase.name] = simulate_phase(
                method,
                roles,
                slot.phase,
                shapes,
                micro,
                model.denoiser(),
                autocast,
                norms=cuda,
                holds=recipe.model.quantize == "8bit",
                decoder=model.decode_with_gradient if method.needs.decode else None,
                known=known,
            )
    calls = sum((Counter(used[slot.phase.name].calls) for slot in slots), Counter[str]())
    step = max(usage.peak for usage in used.values())
    repeats = Counter(slot.phase.name for slot in slots)
    phases = {
        name: {"activations": usage.peak, "flops": repeats[name] * usage.flops * share / micro}
        for name, usage in used.items()
    }
    cost = round_of(method, slots[0].phase, shapes, model.denoiser(), share) if method.online else None
    if cost is not None:
        name, counted = slots[0].phase.name, Counter(cost.sampled) + Counter(cost.trained)
        calls = Counter({role: count * micro / share for role, count in counted.items()})
        once = max((flops / rows / (1 if key[3] else 2) for key, (rows, flops, _) in known.items()), default=0.0)
        updates = used[name].flops / micro * cost.items * method.repeats(slots[0].phase)
        updates /= method.parts(slots[0].phase)
        phases[name]["flops"] = updates + once * sum(cost.sampled.values())
        parts["samples of a round"] = cost.bytes
    if recipe.model.offload and roles.lora is None and BASE in roles.networks:
        step += weight_bytes(roles.networks[BASE], dtype)  # on the device while it is called
    if recipe.train.parallel == "fsdp":
        step += 2 * _largest_block(roles)
    pictures, encoding = _around_training(model, roles, recipe, shapes, micro, autocast)
    gradients = sum(size for part, size in parts.items() if "gradients" in part)
    stays = sum(parts.values())
    context = CONTEXT if cuda else 0
    activities = {
        "encoding": context + int(encoding[0] + (1 + SLACK) * encoding[1]),
        "training step": context + int(stays + (1 + SLACK) * step),
        "sample pictures": context + int(stays - gradients + pictures[0] + (1 + SLACK) * pictures[1]),
    }
    return Memory(
        parts,
        step,
        phases,
        activities,
        max(activities.values()),
        sum(phase["flops"] for phase in phases.values()),
        {role: round(count * share / micro) for role, count in calls.items()},
        all(usage.whole for usage in used.values()),
        cost,
    )


def round_of(method: Method[Any], phase: Phase, shapes: Shapes, denoiser: Denoiser, prompts: int) -> RoundCost:
    """What the samples of a step take."""
    with torch.device(META):
        batch, uncond = empty_batch(method, phase, shapes, prompts), shapes.cond(1)
        if not batch.latents:
            batch.latents = {"": torch.empty(prompts, *shapes.latents)}
    names = list(parse_scorers(method.rewards())) if method.needs.reward else []
    return round_cost(method, phase, denoiser, batch, uncond, names)


def _largest_block(roles: Roles) -> int:
    """Bytes of the largest group of weights that FSDP gathers at a time."""
    network = next(iter(roles.networks.values()))
    blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]  # type: ignore[misc]
    return 4 * max(sum(p.numel() for p in block.parameters()) for block in blocks)


def _around_training(
    model: Model, roles: Roles, recipe: Recipe, shapes: Shapes, micro: int, autocast: torch.dtype | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(what stays, what is short-lived) beside the trained parts while pictures are sampled, and while encoding."""
    side = shapes.latents[1] * model.factor
    encoders = list(model.encoders())
    weights = [4 * sum(p.numel() for p in module.parameters()) for module in encoders]
    at_once = model.at_once(side, side)
    rows = min(recipe.data.encode_batch, at_once)
    vae = model.vae
    encode = simulate_forward(vae, lambda: vae.encode(torch.empty(rows, 3, side, side)).latent_dist.mean)
    widest = max(getattr(m.config, "intermediate_size", 0) for m in encoders[1:])
    text = 2 * 4 * PROMPT_BATCH * shapes.tokens * widest
    if recipe.model.offload:  # one encoder on the device at a time
        encoding = max(weights[0] + encode.peak, max(weights[1:]) + text), 0
        stays = weights[0]
    else:
        encoding = sum(weights), max(encode.peak, text)
        stays = sum(weights)
    drawn = min(8, micro, recipe.validate_.images)
    guided = drawn * (2 if recipe.validate_.guidance != 1 else 1)
    role = roles.names[0] if roles.names[0] in roles.networks else BASE
    x, t = torch.empty(guided, *shapes.latents, device=META), torch.zeros(guided, dtype=torch.int64, device=META)
    network = roles.networks[role]
    call = simulate_forward(network, lambda: roles(role, x, t, shapes.cond(guided)), autocast)
    latents = torch.empty(min(drawn, at_once), vae.config.latent_channels, *shapes.latents[1:], device=META)
    decode = simulate_forward(vae, lambda: vae.decode(latents).sample)
    return (stays, max(call.peak, decode.peak)), encoding
