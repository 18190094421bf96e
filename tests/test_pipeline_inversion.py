"""Image -> noise -> image by the inversion pipeline, on the tiny base that ships."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign.assets.scenes import caption, render, sample_scenes
from diffalign.errors import UserError
from diffalign.pipelines.inversion import InversionPipeline

ROOT = Path(str(resources.files("diffalign.assets")))
FILE = Path(str(resources.files("diffalign.pipelines"))) / "inversion.py"


@pytest.fixture(scope="module")
def pipe() -> InversionPipeline:
    return InversionPipeline.from_pretrained(ROOT / "tiny-sd")


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Image.Image], list[str]]:
    rng = np.random.default_rng(0)
    scenes = sample_scenes(2, rng)
    return [Image.fromarray(x) for x in render(scenes, rng)], [caption(scene) for scene in scenes]


def test_the_fixed_point_comes_back(pipe: InversionPipeline, drawn: tuple[list[Image.Image], list[str]]) -> None:
    """Each ReNoise repetition brings the round trip closer; its fixed point is the exact inverse of sampling."""
    results = [pipe(*drawn, num_inference_steps=10, renoise=k) for k in (0, 3, 12)]
    errors = [float(result.latent_error.mean()) for result in results]
    assert errors[0] > 2 * errors[1] and errors[1] > 2 * errors[2]
    assert torch.equal(results[1].latents, pipe.invert(*drawn, num_inference_steps=10, renoise=3))
    result = results[2]
    # what is lost beyond the VAE's own loss is small
    assert float((result.error - result.vae_error).abs().max()) < 0.01
    assert len(result.images) == 2 and result.images[0].size == (32, 32)
    assert 0.6 < float(result.latents.std()) < 1.4  # it is noise


def test_a_batch_equals_its_pictures_alone(pipe: InversionPipeline, drawn: tuple[list[Image.Image], list[str]]) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "renoise": 1}
    together = pipe.invert(*drawn, **options)
    alone = [pipe.invert(image, prompt, **options) for image, prompt in zip(*drawn, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in drawn[0]])
    torch.testing.assert_close(pipe.invert(pixels, drawn[1], **options), together, rtol=1e-3, atol=1e-3)


def test_guidance_prompt_and_convention_matter(
    pipe: InversionPipeline, drawn: tuple[list[Image.Image], list[str]]
) -> None:
    plain = pipe.invert(*drawn, num_inference_steps=4)
    for changed in (
        pipe.invert(drawn[0], "a blue cross", num_inference_steps=4),
        pipe.invert(*drawn, num_inference_steps=4, guidance_scale=3.0),
        pipe.invert(*drawn, num_inference_steps=4, convention="source"),
    ):
        assert float((plain - changed).abs().max()) > 1e-3


def test_as_a_custom_pipeline(drawn: tuple[list[Image.Image], list[str]]) -> None:
    loaded = DiffusionPipeline.from_pretrained(ROOT / "tiny-sd", custom_pipeline=str(FILE), trust_remote_code=True)
    assert type(loaded).__name__ == "InversionPipeline"
    assert loaded.invert(*drawn, num_inference_steps=2).shape == (2, 4, 8, 8)


def test_sdxl_comes_back(drawn: tuple[list[Image.Image], list[str]]) -> None:
    """With its two encoders, pooled texts and sizes; under guidance a batch is its pictures alone."""
    pipe = InversionPipeline.from_pretrained(ROOT / "tiny-sdxl")
    assert float(pipe(*drawn, num_inference_steps=12).latent_error.max()) < 0.2
    options = {"num_inference_steps": 2, "guidance_scale": 2.0}
    together = pipe.invert(*drawn, **options)
    alone = [pipe.invert(image, prompt, **options) for image, prompt in zip(*drawn, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert float((pipe.invert(drawn[0], "a blue cross", **options) - together).abs().max()) > 1e-3


def test_wrong_calls_say_what_is_wrong(pipe: InversionPipeline, drawn: tuple[list[Image.Image], list[str]]) -> None:
    with pytest.raises(UserError, match="2 pictures but 1 prompts"):
        pipe.invert(drawn[0], ["a red circle"])
    with pytest.raises(UserError, match="multiples of 4"):
        pipe.invert(drawn[0][0].resize((30, 32)), "a red circle")
    with pytest.raises(UserError, match="same size"):
        pipe.invert([drawn[0][0], drawn[0][1].resize((64, 64))], "a red circle")
    with pytest.raises(UserError, match="no picture"):
        pipe.invert([], "a red circle")
