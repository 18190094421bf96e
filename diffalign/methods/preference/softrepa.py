"""SoftREPA (Lee et al. 2025, arXiv 2503.08250): soft text tokens by a contrast of images and texts, without pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ...errors import UserError
from ...families.extras import SoftTokens, blocks
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase, on_device

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...families import Model


def softrepa_loss(
    errors: Tensor,
    temperature: float = 0.07,
    scale: float = 4.0,
    dweight: float = 0.0,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (n,) and contrast (n,) of n images from their errors (n, m) under the texts of the group, own text first.

    l_ij = scale exp(-E_ij / temperature); the contrast is the cross-entropy of row i with its own text, and the loss
    adds dweight E_i0. Equal errors give log m. Since l lies in (0, scale], the contrast is at least
    log(1 + (m - 1) exp(-scale)), and a constant added to a row changes it. ``known`` (n, m): texts that count; the own
    one always does.
    """
    logits = scale * torch.exp(-errors / temperature)
    if known is not None:
        own = torch.arange(errors.shape[1], device=errors.device) == 0
        logits = logits.masked_fill(~(known | own), float("-inf"))
    contrast = torch.logsumexp(logits, 1) - logits[:, 0]
    return contrast + dweight * errors[:, 0], contrast


class SoftREPAConfig(MethodConfig):
    """Settings of SoftREPA."""

    group: int = Field(4, ge=2, description="images, and so texts, that are compared with one another")
    tokens: int = Field(4, ge=1, description="soft tokens, put after the text's first token")
    where: tuple[Literal["down", "mid", "up"], ...] = Field(
        ("down",), min_length=1, description="parts of the U-Net that see them (SDXL: down and mid)"
    )
    times: int = Field(
        0, ge=0, le=1000, description="rows of a learned table of time offsets (authors: 100); 0 for none"
    )
    init: Literal["auto", "empty", "normal"] = Field(
        "auto", description="start: the empty prompt's first embedding (auto: not on SDXL), or N(0, 0.02)"
    )
    temperature: float = Field(0.07, gt=0, description="of the errors")
    scale: float = Field(4.0, gt=0, description="of the logits")
    dweight: float = Field(10.0, ge=0, description="weight of the denoising error beside the contrast (SD3: 0)")
    error_space: Literal["network", "epsilon"] = Field(
        "network", description="where errors are measured: the network's own prediction, or rescaled to noise error"
    )

    @field_validator("where")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a part is named twice")
        return value


class SoftREPA(Method[SoftREPAConfig]):
    """Frozen U-Net, a handful of learned text tokens: each image shall be denoised better under its own text than under
    those of its group.

    A step's rows are cut into groups of ``group``; all n x n combinations of a group share one t and one noise: those
    of the row with the smallest id, so that neither order nor micro-batches matter. The authors declare temperature and
    scale trainable and never give them to the optimiser: constants here. Of pairs the chosen image is used.

    Ours: a group's other row with the same text is no negative (captions repeat in preference data), nor is a row of
    weight 0; several groups a step where ``train.batch`` is larger than ``group``, each with its own t.
    """

    Config = SoftREPAConfig
    paper = Paper(
        title="Aligning Text to Image in Diffusion Models is Easier Than You Think",
        arxiv="2503.08250",
        implements="the U-Net form: image-to-text contrast of denoising errors in a group, tokens in chosen parts, "
        "time offsets by option",
        differs="equal texts are no negatives; a smooth cosine in place of their staircase of learning rates",
    )
    needs = Needs(batch="image", reference=False)
    couples = "group"

    def __init__(self, config: SoftREPAConfig) -> None:
        super().__init__(config)
        self.group = config.group

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The tokens as the student: the frozen U-Net with them is its network.

        Raises UserError when no block of the chosen parts attends to the text."""
        config = self.config
        if not blocks(family.unet, config.where):
            raise UserError(
                f"method.where={','.join(config.where)}: no block there attends to the text; name other parts"
            )
        width, first = int(family.unet.config.cross_attention_dim), None
        if config.init == "empty" or (config.init == "auto" and family.family != "sdxl"):
            meta = family.device.type == "meta"
            first = torch.zeros(width) if meta else family.encode_prompts([""]).embeds[0, 0].cpu()
        span = int(family.scheduler_config.get("num_train_timesteps", 1000))
        return {"student": SoftTokens(config.tokens, width, config.where, config.times, span, first)}

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Contrast of each row within its group; one student call of every image under every text of its group."""
        t, noise = ctx.draw(batch)
        places, leaders = combinations(batch.ids, batch.visits, self.group)
        image, text, column = (on_device(part, ctx.device) for part in places)
        lead = on_device(leaders, ctx.device)
        t, noise = t[lead][image], noise[lead][image]
        x0, cond = batch.latents["image"][image], batch.cond["prompt"].take(text)
        if cond.added:
            cond = cond.sized(batch.sizes["image"][image])
        denoiser = ctx.denoiser
        error = ctx.error("student", denoiser.add_noise(x0, noise, t), t, cond, denoiser.target(x0, noise, t))
        if self.config.error_space == "epsilon":
            error = error * denoiser.eps_error_scale(t)
        embeds = batch.cond["prompt"].embeds
        other = (embeds[image] != embeds[text]).flatten(1).any(1) & (batch.weight[text] > 0)
        shape = (len(batch), self.group)
        errors = error.new_zeros(shape).index_put((image, column), error)
        known = torch.zeros(shape, dtype=torch.bool, device=error.device).index_put((image, column), other)
        config = self.config
        values, contrast = softrepa_loss(errors, config.temperature, config.scale, config.dweight, known)
        nearest = errors.detach().masked_fill(~known, float("inf")).amin(1)  # of the other texts
        accuracy = (errors[:, 0].detach() < nearest).float()
        return Loss(values, batch.weight, {"chosen_error": errors[:, 0], "contrast": contrast, "accuracy": accuracy})


def combinations(
    ids: Sequence[str], visits: Sequence[int], size: int
) -> tuple[tuple[list[int], list[int], list[int]], list[int]]:
    """Every image with every text of its group: (rows of the images, rows of the texts, columns), each a list, with the
    own text in column 0; and the leader of each row's group, which is the row of the smallest id.

    Groups are consecutive rows, the last one perhaps smaller than ``size``."""
    image, text, column, leaders = [], [], [], []
    for start in range(0, len(ids), size):
        rows = range(start, min(start + size, len(ids)))
        leaders += [min(rows, key=lambda row: (ids[row], visits[row]))] * len(rows)
        for row in rows:
            for shift in range(len(rows)):
                image.append(row)
                text.append(start + (row - start + shift) % len(rows))
                column.append(shift)
    return (image, text, column), leaders
