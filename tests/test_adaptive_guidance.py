"""Adaptive Guidance and LinearAG against plain guidance in plain diffusers: the same pictures, or fewer calls."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffalign.denoiser import guide
from diffalign.errors import UserError
from diffalign.families.schedulers import make_scheduler
from diffalign.keyed import normal
from diffalign.pipelines.adaptive_guidance import (
    AdaptiveGuidancePipeline,
    Fit,
    LinearGuidance,
    Sums,
    alternating,
    combine,
    cosine,
)

ROOT = Path(str(resources.files("diffalign.assets")))
FILE = Path(str(resources.files("diffalign.pipelines"))) / "adaptive_guidance.py"
PROMPTS = ["a red circle above a blue square", "a green triangle", "a blue ring"]
STEPS = 10


def opened(folder: Path) -> AdaptiveGuidancePipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.scheduler = make_scheduler("ddim", {**pipe.scheduler.config})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["tiny-sd", "tiny-sdxl"])
def pipe(request: pytest.FixtureRequest) -> AdaptiveGuidancePipeline:
    return opened(ROOT / request.param)


@pytest.fixture(scope="module")
def sd() -> AdaptiveGuidancePipeline:
    return opened(ROOT / "tiny-sd")


def noise(pipe: AdaptiveGuidancePipeline, rows: slice = slice(None)) -> Tensor:
    side = pipe.unet.config.sample_size
    return normal((len(PROMPTS), 4, side, side), "noise")[rows]


def options(pipe: AdaptiveGuidancePipeline, rows: slice = slice(None), **more: Any) -> dict[str, Any]:
    shared = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    return {"prompt": PROMPTS[rows], "latents": noise(pipe, rows), **shared, **more}


def counted(pipe: AdaptiveGuidancePipeline, **given: Any) -> tuple[Any, list[int]]:
    """A call's result, and the rows of each call of the U-Net itself."""
    rows: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    try:
        return pipe(**given), rows
    finally:
        handle.remove()


def test_guidance_that_never_stops_is_plain_guidance_bit_for_bit(pipe: AdaptiveGuidancePipeline) -> None:
    found, rows = counted(pipe, **options(pipe), threshold=1.1)
    assert torch.equal(found.images, pipe.stock(**options(pipe)).images)
    assert rows == [6] * STEPS and found.evaluations == [2 * STEPS] * 3
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_guidance_that_stops_at_once_is_one_guided_step_and_then_none(pipe: AdaptiveGuidancePipeline) -> None:
    found, rows = counted(pipe, **options(pipe), threshold=-1.0)
    assert rows == [6, *[3] * (STEPS - 1)] and found.evaluations == [STEPS + 1] * 3

    def unguide(stock: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stock._guidance_scale = 1.0 if step == 0 else stock._guidance_scale
        if step == 0:
            stock_embeds = tensors["prompt_embeds"]
            tensors["prompt_embeds"] = stock_embeds[len(stock_embeds) // 2 :]
        return tensors

    if pipe.text_encoder_2 is None:  # the same by diffusers' own means
        ours = pipe.stock(
            **options(pipe), callback_on_step_end=unguide, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )
        torch.testing.assert_close(found.images, ours.images, rtol=1e-4, atol=1e-5)
    plain = pipe.stock(**options(pipe)).images
    assert float((found.images - plain).abs().mean()) > 1e-3


def test_each_picture_stops_by_itself(sd: AdaptiveGuidancePipeline) -> None:
    """With pictures that stop at different steps: rows are really left out, and a batch is a loop of singles."""
    whole = sd(**options(sd), threshold=1.1)
    curves = np.array(whole.similarity)
    assert curves.shape == (STEPS, 3) and (np.abs(curves) <= 1 + 1e-9).all()
    limit = float(np.sort(curves.max(0))[1]) - 1e-6  # two of three ever reach it
    found, rows = counted(sd, **options(sd), threshold=limit)
    first = [next((k for k in range(STEPS) if curves[k, row] >= limit), STEPS - 1) for row in range(3)]
    assert len(set(first)) > 1
    assert found.evaluations == [2 * (k + 1) + STEPS - 1 - k for k in first] and sum(rows) == sum(found.evaluations)
    for row, stop in enumerate(first):
        assert all(math.isnan(found.similarity[k][row]) == (k > stop) for k in range(STEPS))
        alone = sd(**options(sd, slice(row, row + 1)), threshold=limit)
        assert alone.evaluations == found.evaluations[row : row + 1]
        torch.testing.assert_close(alone.images[0], found.images[row], rtol=1e-3, atol=1e-4)


def test_similarity_is_of_the_noise_predictions(sd: AdaptiveGuidancePipeline) -> None:
    """Also where the network predicts v: what it says is turned into noise first. Equal branches stop at once."""
    a, b = normal((2, 4, 8, 8), "a"), normal((2, 4, 8, 8), "b")
    by_hand = (a * b).sum((1, 2, 3)) / (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).sqrt()
    torch.testing.assert_close(cosine(a, b).float(), by_hand)
    calls: list[tuple[Tensor, Tensor]] = []
    handle = sd.unet.register_forward_hook(lambda module, args, output: calls.append((args[0], output[0])))
    plain = sd.scheduler
    try:
        sd.scheduler = make_scheduler("ddim", {**plain.config, "prediction_type": "v_prediction"})
        found = sd(**options(sd), threshold=1.1)
        alpha = float(sd.scheduler.alphas_cumprod[int(sd.scheduler.timesteps[2])]) ** 0.5
    finally:
        handle.remove()
        sd.scheduler = plain
    x, output = calls[2]
    eps = (1 - alpha**2) ** 0.5 * x + alpha * output
    expected = torch.cosine_similarity(*eps.flatten(1).chunk(2))
    assert found.similarity[2] == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.similarity[2] != pytest.approx(torch.cosine_similarity(*output.flatten(1).chunk(2)).tolist(), abs=1e-3)
    same = sd(**options(sd, negative_prompt=PROMPTS), threshold=0.9999)
    assert same.evaluations == [STEPS + 1] * 3
    torch.testing.assert_close(same.images, sd.stock(**options(sd, guidance_scale=1.0)).images, rtol=1e-3, atol=1e-4)


def test_no_guidance_costs_one_call_a_step(sd: AdaptiveGuidancePipeline) -> None:
    found = sd(**options(sd, guidance_scale=1.0))
    assert found.evaluations == [STEPS] * 3
    assert torch.equal(found.images, sd.stock(**options(sd, guidance_scale=1.0)).images)


# ---- LinearAG -------------------------------------------------------------------------------------------------------


def test_the_regression_finds_what_is_linear() -> None:
    """u_1 = .5 c_1 - .25 c_0 + .75 u_0 + .1, from sums over several batches; what is not explained is said."""
    sums = Sums([1])
    for batch in range(3):
        c = [normal((2, 4, 8, 8), "c", batch, k) for k in range(2)]
        u = {0: normal((2, 4, 8, 8), "u", batch)}
        u[1] = 0.5 * c[1] - 0.25 * c[0] + 0.75 * u[0] + 0.1
        sums.add(c, u)
    fit = sums.solve()[1]
    assert fit.cond == pytest.approx((-0.25, 0.5), abs=1e-6) and fit.uncond == pytest.approx({0: 0.75}, abs=1e-6)
    assert fit.bias == pytest.approx(0.1, abs=1e-6) and fit.residual < 1e-10
    torch.testing.assert_close(combine(fit, c, {0: u[0]}), u[1], rtol=1e-5, atol=1e-5)
    sums.add(c, {**u, 1: normal((2, 4, 8, 8), "other")})
    assert sums.solve()[1].residual > 0.1


def test_every_second_call_of_the_first_half_is_estimated() -> None:
    assert (
        alternating(10) == (5, [1, 3])
        and alternating(20) == (10, [1, 3, 5, 7, 9])
        and alternating(4, 1.0) == (4, [1, 3])
    )


def test_linear_guidance_saves_calls_and_stays_near(pipe: AdaptiveGuidancePipeline, tmp_path: Path) -> None:
    texts = [*PROMPTS, "a red star", "a blue circle left of a red ring"]
    generator = torch.Generator().manual_seed(0)
    linear = pipe.fit(texts, num_inference_steps=STEPS, guidance_scale=4.0, until=0.6, generator=generator, batch=3)
    assert list(linear.fits) == [1, 3, 5] and linear.until == 6
    assert all(fit.residual < 0.02 for fit in linear.fits.values())
    found, rows = counted(pipe, **options(pipe), linear=linear.save(tmp_path / "linear.json"))
    assert rows == [6, 3] * 3 + [3] * 4 and found.evaluations == [STEPS + 3] * 3
    plain = pipe.stock(**options(pipe)).images
    # what the estimates add brings the pictures closer than no guidance at these calls
    copied = LinearGuidance(
        times=linear.times,
        guidance=4.0,
        until=6,
        fits={k: Fit(cond=(*[0.0] * k, 1.0), uncond={}, bias=0.0, residual=1.0) for k in (1, 3, 5)},
    )
    without = pipe(**options(pipe), linear=copied).images
    assert float((found.images - plain).square().mean()) < float((without - plain).square().mean())
    alone = pipe(**options(pipe, slice(1, 2)), linear=linear).images
    torch.testing.assert_close(alone[0], found.images[1], rtol=1e-3, atol=1e-3)


def test_an_exact_estimate_is_plain_guidance(sd: AdaptiveGuidancePipeline) -> None:
    """Where the other branch is the prompt's own, its score is cond[-1]: estimating it changes nothing."""
    known = sd.fit(PROMPTS, num_inference_steps=4, guidance_scale=4.0, until=1.0)
    exact = {k: Fit(cond=(*[0.0] * k, 1.0), uncond={}, bias=0.0, residual=0.0) for k in known.fits}
    linear = LinearGuidance(times=known.times, guidance=4.0, until=4, fits=exact)
    given = options(sd, num_inference_steps=4, negative_prompt=PROMPTS)
    torch.testing.assert_close(sd(**given, linear=linear).images, sd.stock(**given).images, rtol=1e-3, atol=1e-4)
    cond, uncond = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 1.0)
    assert float(guide(cond, uncond, 2.0)) == 5.0  # diffusers' convention: w = 1 is conditional only


def test_bad_input_is_one_line(sd: AdaptiveGuidancePipeline, tmp_path: Path) -> None:
    linear = sd.fit(PROMPTS[:1], num_inference_steps=4, guidance_scale=4.0)
    (tmp_path / "odd.json").write_text('{"times": [1]}')
    wrong = {
        "fitted for 4 calls": lambda: sd(**options(sd), linear=linear),
        "must be a number": lambda: sd(**options(sd), threshold=math.nan),
        "no regression of LinearAG": lambda: sd(**options(sd), linear=tmp_path / "odd.json"),
        "there are none": lambda: sd.fit([]),
        "guides nothing": lambda: sd.fit(PROMPTS, guidance_scale=1.0),
        "leaves none to estimate": lambda: sd.fit(PROMPTS[:1], num_inference_steps=2),
        "a share of the calls": lambda: sd.fit(PROMPTS[:1], until=0.0),
    }
    for text, call in wrong.items():
        with pytest.raises(UserError) as caught:
            call()
        assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not sd.unet._forward_hooks and not sd.unet._forward_pre_hooks
