"""Inference-time alignment on the tiny models: the pipeline, its counts, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from diffalign.errors import Interrupted, UserError
from diffalign.eval.prompts import text_id
from diffalign.eval.scorers import load_scorer
from diffalign.facts import student_record
from diffalign.keyed import normal
from diffalign.pipelines.sample import step_noise
from diffalign.pipelines.search import SearchPipeline

ROOT = Path(str(resources.files("diffalign.assets")))
FILE = Path(str(resources.files("diffalign.pipelines"))) / "search.py"
TEXTS = ["a red circle above a blue square", "a green cross left of a yellow triangle"]
SEARCHES = ("best-of-n", "beam", "greedy:children=3", "tree", "beam:beams=1,children=2,lookahead=2")


def brightness(pictures: list[Image.Image], prompts: list[str]) -> list[float]:
    """A reward that any function may be."""
    return [float(np.asarray(picture).mean()) for picture in pictures]


def pixels(image: Image.Image | None) -> np.ndarray:
    assert image is not None
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tiny-sd", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(stock: StableDiffusionPipeline) -> SearchPipeline:
    return SearchPipeline.of(stock)


class Counted:
    """How many pictures went through the networks."""

    def __init__(self, pipe: SearchPipeline) -> None:
        self.calls = self.decodes = 0
        decode = pipe.vae.decode

        def unet(module: Any, args: tuple[Any, ...]) -> None:
            self.calls += len(args[0])

        def counted(latents: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.decodes += len(latents)
            return decode(latents, *args, **options)

        self.vae, self.handle = pipe.vae, pipe.unet.register_forward_pre_hook(unet)
        pipe.vae.decode = counted

    def close(self) -> None:
        self.handle.remove()
        del self.vae.decode


@pytest.mark.parametrize("search", SEARCHES)
def test_counts_are_what_the_networks_saw(search: str, pipe: SearchPipeline) -> None:
    """And no budget is passed. Results are in the prompts' order: a prompt alone finds the same."""
    scored = [0]

    def reward(pictures: list[Image.Image], prompts: list[str]) -> Sequence[float]:
        scored[0] += len(pictures)
        return brightness(pictures, prompts)

    options: dict[str, Any] = {"search": search, "budget": 28, "num_inference_steps": 3, "guidance_scale": 3.0}
    counted = Counted(pipe)
    try:
        found = pipe(TEXTS, reward=reward, **options)
    finally:
        counted.close()
    assert counted.calls == sum(one.calls for one in found.searches)
    assert counted.decodes == sum(one.decodes for one in found.searches)
    assert scored[0] == sum(one.scores for one in found.searches)
    for one, image in zip(found.searches, found.images, strict=True):
        assert one.calls <= 28 and image is one.picture
        assert one.reward == brightness([image], [""])[0]  # that of the picture as it would be saved
    alone = pipe(TEXTS[1], reward=brightness, batch=1, **options)
    assert np.abs(pixels(alone.images[0]) - pixels(found.images[1])).max() <= 1


def test_one_picture_is_the_plain_pipeline(pipe: SearchPipeline, stock: StableDiffusionPipeline) -> None:
    """Bit for bit, whatever the scheduler."""
    plain = stock.scheduler
    euler = EulerDiscreteScheduler.from_config(plain.config)
    ddim = DDIMScheduler.from_config(plain.config, clip_sample=False)
    for scheduler in (plain, euler, ddim):
        stock.scheduler = pipe.scheduler = scheduler
        latents = normal((4, 8, 8), 3, "sample", text_id(TEXTS[0]), 0)[None]
        expected = stock(TEXTS[0], latents=latents, num_inference_steps=4, guidance_scale=3.0).images[0]
        steps = len(scheduler.timesteps)
        found = pipe(TEXTS[0], reward=brightness, budget=2 * steps, num_inference_steps=4, guidance_scale=3.0, seed=3)
        assert np.array_equal(pixels(found.images[0]), pixels(expected))
        assert (found.searches[0].finished, found.searches[0].calls) == (1, 2 * steps)
    stock.scheduler = pipe.scheduler = plain


def test_best_of_n_draws_what_the_sampler_draws_each_time(
    pipe: SearchPipeline, stock: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number 0, 1, 2 of a prompt, each with first noise and, under eta, steps' noise of its own, in any batches."""
    scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    for one in (pipe, stock):
        monkeypatch.setattr(one, "scheduler", scheduler)
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
    drawn: dict[tuple[float, int], dict[str, list[np.ndarray]]] = {}
    for eta, batch in ((0.0, 8), (1.0, 1), (1.0, 8)):
        seen: dict[str, list[np.ndarray]] = {text: [] for text in TEXTS}

        def reward(pictures: list[Image.Image], prompts: list[str], seen: Any = seen) -> list[float]:
            for picture, prompt in zip(pictures, prompts, strict=True):
                seen[prompt].append(pixels(picture))
            return brightness(pictures, prompts)

        pipe(TEXTS, reward=reward, search=f"best-of-n:eta={eta}", budget=6, batch=batch, **settings)
        drawn[eta, batch] = seen
    for text in TEXTS:
        latents = torch.stack([normal((4, 8, 8), 0, "sample", text_id(text), draw) for draw in range(3)])
        for eta, batch in drawn:
            noise = [step_noise(0, text_id(text), draw) for draw in range(3)]
            plain = stock([text] * 3, latents=latents, generator=noise, eta=eta, **settings).images
            for found, expected in zip(drawn[eta, batch][text], plain, strict=True):
                assert np.abs(found - pixels(expected)).max() <= 1
        assert np.abs(drawn[1.0, 8][text][0] - drawn[0.0, 8][text][0]).max() > 1


def test_a_beam_of_one_is_plain_ddim_with_noise(pipe: SearchPipeline, stock: StableDiffusionPipeline) -> None:
    """diffusers' own DDIM steps (eta 1, the last one without noise), given the keyed noises."""
    name = text_id(TEXTS[0])
    scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(5)
    x = normal((4, 8, 8), 0, "sample", name, 0)[None]
    cond, uncond = stock.encode_prompt(TEXTS[0], "cpu", 1, True)
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            free, told = stock.unet(torch.cat([x] * 2), t, torch.cat([uncond, cond])).sample.chunk(2)
            noise = normal((4, 8, 8), 0, "search", name, f"step-{k}", "0")[None]
            output = free + 3.0 * (told - free)
            x = scheduler.step(output, t, x, eta=float(k < 4), variance_noise=noise if k < 4 else None).prev_sample
        decoded = stock.vae.decode(x / stock.vae.config.scaling_factor).sample
    expected = stock.image_processor.postprocess(decoded)[0]
    search = "beam:beams=1,children=1"
    found = pipe(TEXTS[0], reward=brightness, search=search, budget=10, num_inference_steps=5, guidance_scale=3.0)
    assert np.abs(pixels(found.images[0]) - pixels(expected)).max() <= 1


def test_more_is_better_and_equal_seeds_are_equal(pipe: SearchPipeline) -> None:
    options: dict[str, Any] = {"reward": "tiny-pickscore", "num_inference_steps": 3, "guidance_scale": 1.0}
    few, many = (pipe(TEXTS, search="tree", budget=budget, **options) for budget in (6, 18))
    assert (many.rewards >= few.rewards).all() and (many.rewards > few.rewards).any()
    again = pipe(TEXTS[::-1], search="tree", budget=18, batch=3, **options)
    torch.testing.assert_close(again.rewards.flip(0), many.rewards, rtol=1e-4, atol=1e-3)
    assert not torch.equal(pipe(TEXTS, search="tree", budget=6, seed=1, **options).rewards, few.rewards)
    scorer = pipe.scorer("tiny-pickscore")
    scores = torch.tensor([float(scorer([image], [text])[0]) for image, text in zip(many.images, TEXTS, strict=True)])
    torch.testing.assert_close(scores, many.rewards, rtol=1e-4, atol=1e-3)


def test_a_scorer_that_knows_times_is_told_them(pipe: SearchPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPO's preference model judges guesses at their time and finished pictures at 0."""
    scorer = load_scorer("spm", str(ROOT / "tiny-pickscore"))
    seen: list[int] = []
    plain = type(scorer).reward

    def reward(self: Any, images: torch.Tensor, prompts: Any, t: torch.Tensor) -> torch.Tensor:
        seen.extend(t.tolist())
        return plain(self, images, prompts, t)

    monkeypatch.setattr(type(scorer), "reward", reward)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0}
    found = pipe(TEXTS[0], reward=scorer, search="greedy:children=2", budget=7, **options)
    assert seen == [501, 501, 251, 251, 0, 0]
    torch.testing.assert_close(scorer(list(found.images), TEXTS[:1]), found.rewards, rtol=1e-3, atol=1e-2)


def test_as_a_custom_pipeline_and_sdxl() -> None:
    for name in ("tiny-sd", "tiny-sdxl"):
        loaded = DiffusionPipeline.from_pretrained(ROOT / name, custom_pipeline=str(FILE), trust_remote_code=True)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded).__name__ == "SearchPipeline"
        options: dict[str, Any] = {"reward": brightness, "num_inference_steps": 2, "guidance_scale": 2.0}
        plain = loaded(TEXTS[0], budget=4, **options)
        for search in ("best-of-n", "tree", "beam:beams=2"):
            best = loaded(TEXTS[0], search=search, budget=24, **options)
            assert best.searches[0].calls > 12 and pixels(best.images[0]).shape == (32, 32, 3)
        assert loaded(TEXTS[0], budget=12, **options).rewards >= plain.rewards


def test_sdxl_is_told_the_same_in_a_search_as_in_its_pipeline() -> None:
    """Sizes, pooled and other texts, the unconditional branch first; at the first step, whose latents are equal too."""
    loaded = StableDiffusionXLPipeline.from_pretrained(ROOT / "tiny-sdxl")
    loaded.set_progress_bar_config(disable=True)
    pipe, told = SearchPipeline.of(loaded), []  # type: SearchPipeline, list[list[torch.Tensor]]

    def keep(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        added = options["added_cond_kwargs"]
        told.append([args[0], options["encoder_hidden_states"], added["text_embeds"], added["time_ids"]])

    handle = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    for search in ("best-of-n", "beam:beams=1,children=1"):
        told.append([])
        options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 64, "width": 32}
        pipe(TEXTS[0], reward=brightness, search=search, budget=4, **options)
    handle.remove()
    starts = [k for k, found in enumerate(told) if not found]
    for one, other in zip(*(told[k + 1] for k in starts), strict=True):
        torch.testing.assert_close(one, other)


def test_a_students_own_steps_are_searched(stock: StableDiffusionPipeline) -> None:
    """Those that draw new noise, at the recorded times, from the scaled first noise; a deterministic student's not."""
    renoise = student_record(stock.scheduler.config, (999, 666, 333), scale=0.9)
    still = student_record(stock.scheduler.config, (999, 666, 333), renoise=False)
    options: dict[str, Any] = {"reward": brightness, "budget": 15}
    found = SearchPipeline.of(stock, renoise)(TEXTS, search="tree", **options)
    assert all(one.calls <= 15 and one.finished > 5 for one in found.searches), "no guidance: a step is one call"
    assert SearchPipeline.of(stock, still)(TEXTS[0], **options).searches[0].finished == 5
    with pytest.raises(UserError, match=r"needs steps that add noise.*take best-of-n"):
        SearchPipeline.of(stock, still)(TEXTS[0], search="tree", **options)


def test_a_beam_of_one_is_the_students_own_sampler(stock: StableDiffusionPipeline) -> None:
    """x0 and new noise at the recorded times, from the scaled first noise, without guidance; x0 at the end."""
    times, name = (999, 666, 333), text_id(TEXTS[0])
    bars = DDIMScheduler.from_config(stock.scheduler.config).alphas_cumprod
    x = 0.9 * normal((4, 8, 8), 0, "sample", name, 0)[None]
    cond, _ = stock.encode_prompt(TEXTS[0], "cpu", 1, False)
    with torch.no_grad():
        for k, t in enumerate(times):
            eps = stock.unet(x, t, cond).sample
            x0 = (x - (1 - bars[t]).sqrt() * eps) / bars[t].sqrt()
            if k < 2:
                noise = normal((4, 8, 8), 0, "search", name, f"step-{k}", "0")[None]
                x = bars[times[k + 1]].sqrt() * x0 + (1 - bars[times[k + 1]]).sqrt() * noise
        decoded = stock.vae.decode(x0 / stock.vae.config.scaling_factor).sample
    expected = stock.image_processor.postprocess(decoded)[0]
    pipe = SearchPipeline.of(stock, student_record(stock.scheduler.config, times, scale=0.9))
    found = pipe(TEXTS[0], reward=brightness, search="beam:beams=1,children=1", budget=3)
    assert np.abs(pixels(found.images[0]) - pixels(expected)).max() <= 1


def test_an_interrupt_returns_what_there_is(pipe: SearchPipeline) -> None:
    asked = [0]

    def reward(pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        asked[0] += 1
        if asked[0] == stop:
            raise KeyboardInterrupt
        return brightness(pictures, prompts)

    options: dict[str, Any] = {"budget": 40, "num_inference_steps": 2, "guidance_scale": 1.0, "search": "tree"}
    stop = 4
    found = pipe(TEXTS[0], reward=reward, **options)
    assert found.searches[0].interrupted and found.searches[0].finished == 3
    asked[0], stop = 0, 1
    with pytest.raises(Interrupted, match="before any picture"):
        pipe(TEXTS[0], reward=reward, **options)


def test_wrong_calls_say_what_is_wrong(stock: StableDiffusionPipeline) -> None:
    pipe = SearchPipeline.of(stock)
    pipe.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    options: dict[str, Any] = {"reward": brightness, "num_inference_steps": 5, "guidance_scale": 3.0}
    with pytest.raises(UserError, match="budget 9: 'best-of-n' takes 10 U-Net calls for one picture at 5 steps"):
        pipe(TEXTS[0], budget=9, **options)
    with pytest.raises(UserError, match="for one pass at 5 steps"):
        pipe(TEXTS[0], budget=9, search="beam", **options)
    with pytest.raises(UserError, match="eta 0"):
        pipe(TEXTS[0], budget=90, search="beam:eta=0", **options)
    with pytest.raises(UserError, match="unknown scorer 'pickscor'"):
        pipe(TEXTS[0], budget=90, **{**options, "reward": "pickscor"})
    with pytest.raises(UserError, match="2 prompts and 1 ids"):
        pipe(TEXTS, budget=90, ids=["a"], **options)
    with pytest.raises(UserError, match="captions of the tiny world only"):
        pipe("a photo of a cat", budget=90, **{**options, "reward": load_scorer("oracle")})
    with pytest.raises(UserError, match="gave 1 numbers for 2 pictures"):
        pipe(TEXTS[0], budget=30, batch=2, **{**options, "reward": lambda pictures, prompts: [1.0]})
