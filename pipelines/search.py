"""Inference-time alignment as a diffusers pipeline for SD1.x, SD2.x and SDXL: spend U-Net calls on best-of-N, beam
search, greedy resampling or Diffusion Tree Search, and get the best picture by any scorer.

Also usable as ``custom_pipeline``:

    pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5",
                                             custom_pipeline="diffalign/pipelines/search.py", trust_remote_code=True)
    found = pipe("a cat in the rain", search="tree", reward="pickscore", budget=800)
    found.images[0], found.rewards[0], found.searches[0].calls

or over an opened pipeline, whose networks, LoRA and scheduler it shares: ``SearchPipeline.of(pipe)``. Scorers need no
gradients, and ``reward`` may be any function: ``reward=lambda pictures, prompts: [...]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from diffalign.errors import Interrupted, UserError
from diffalign.eval.prompts import text_id
from diffalign.eval.scorers import Scorer
from diffalign.facts import SamplingRecord, recorded
from diffalign.families.schedulers import recorded_scheduler
from diffalign.pipelines import stock
from diffalign.pipelines.sample import TextCache
from diffalign.pipelines.searches.core import Found
from diffalign.pipelines.searches.diffusion import DiffusionWorld, Reward, reward_of
from diffalign.pipelines.searches.options import SearchOptions, parse_search
from diffalign.pipelines.searches.run import search as run_search
from diffalign.pipelines.spec import DEFAULTS, allowed_guidance


@dataclass
class SearchOutput(BaseOutput):
    """What a call found, one a prompt and in their order.

    Args:
        images: the best picture; None where the search was interrupted before one was finished.
        rewards: its score, fp32 (P,); -inf where there is none.
        searches: what it took, see `searches.core.Found`.
    """

    images: list[Image.Image | None]
    rewards: torch.Tensor
    searches: list[Found]


class SearchPipeline(stock.StockPipeline):
    """Searches for pictures of high reward under a budget of U-Net calls; see the module's text."""

    record: SamplingRecord | None = None

    @cached_property
    def scorers(self) -> dict[str, Scorer | Reward]:
        """Those that were asked for by name, once loaded."""
        return {}

    @classmethod
    def of(cls, pipe: DiffusionPipeline, record: SamplingRecord | None = None) -> SearchPipeline:
        """Over an opened pipeline of a family; ``record``: of a few-step student."""
        made = super().of(pipe)
        made.record = record
        made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return made

    @property
    def stock(self) -> DiffusionPipeline:
        """diffusers' own pipeline of this family over the same networks, without a bar of its own."""
        made = super().stock
        made.set_progress_bar_config(disable=True)
        return made

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        reward: str | Scorer | Reward,
        budget: int,
        search: str | SearchOptions = "best-of-n",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        ids: Sequence[str] | None = None,
        batch: int = 8,
    ) -> SearchOutput:
        """Searches each prompt with ``budget`` U-Net calls; a picture through the U-Net once is one call, so that a
        guided step counts two.

        Args:
            reward: a scorer's name (``name=PATH`` for weights of your own), a scorer, or any function of pictures
                (PIL) and their prompts that gives a number each; the higher the better.
            search: ``best-of-n``, ``beam``, ``greedy`` or ``tree``, with settings as ``beam:beams=4,children=2``, or
                the options of `searches.options`. Beam, greedy and tree draw by DDIM steps that add noise, best-of-n by
                the pipeline's own scheduler.
            num_inference_steps, guidance_scale: those of a student's record, else 25 and 7.5.
            seed: decides everything, with the prompts' ids: the texts' hashes, or ``ids``.
            batch: pictures that go through the networks at once; it changes no result, but for rounding.

        Raises:
            UserError: what does not fit together: unknown names, a budget without a picture, no noise to search by.
            Interrupted: by Ctrl-C before any picture was finished; after that, the best so far is returned.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        named = [text_id(text) for text in texts] if ids is None else list(ids)
        if not texts or len(named) != len(texts):
            raise UserError(f"{len(texts)} prompts and {len(named)} ids; give one id a prompt, and one prompt at least")
        how = parse_search(search) if isinstance(search, str) else search
        source = str(self.config.get("_name_or_path") or "")
        record = self.record or (recorded(source) if source else None)
        steps = num_inference_steps or (record.steps if record else DEFAULTS["steps"])
        guidance = DEFAULTS["guidance"] if guidance_scale is None else guidance_scale
        if record is not None:
            given = allowed_guidance(record, guidance_scale)
            guidance = record.guidance if given is None else given
        stock = self.stock
        if record is not None:
            stock.scheduler = recorded_scheduler(record)
        own = self.unet.config.sample_size * stock.vae_scale_factor
        size = (height or own, width or own)
        world = DiffusionWorld(
            stock,
            texts,
            [(seed, name) for name in named],
            TextCache(stock, texts, negative_prompt, guidance > 1).rows(range(len(texts))),
            self.scorer(reward),
            size=size,
            steps=steps,
            guidance=guidance,
            eta=how.eta,
            record=record,
        )
        with self.progress_bar(total=budget * len(texts)) as bar:
            found = run_search(world, how, budget, batch, bar.update)
        self.maybe_free_model_hooks()
        if all(one.picture is None for one in found):
            raise Interrupted("stopped before any picture was finished")
        rewards = torch.tensor([one.reward for one in found])
        return SearchOutput(images=[one.picture for one in found], rewards=rewards, searches=found)

    def scorer(self, reward: str | Scorer | Reward) -> Scorer | Reward:
        """A scorer by name, loaded once, or what is given."""
        if not isinstance(reward, str):
            return reward
        if reward not in self.scorers:
            self.scorers[reward] = reward_of(reward, self._execution_device.type)
        return self.scorers[reward]
