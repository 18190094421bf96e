"""What a method gets to train on scores: ``ctx.decode`` and ``ctx.reward``, both with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from world import batch_of, make_trainer, warm, weights

from diffalign.context import Context
from diffalign.data.batch import Batch
from diffalign.errors import UserError
from diffalign.eval.scorers import load_scorer
from diffalign.families import load_model
from diffalign.methods import make_method
from diffalign.methods.base import Loss, Method, MethodConfig, Needs, Paper, Phase
from diffalign.recipe import ModelRecipe
from diffalign.rewards import check_rewards, load_rewards

CPU = torch.device("cpu")


class AscentConfig(MethodConfig):
    reward: str = "tiny-pickscore"


class Ascent(Method[AscentConfig]):
    """Straight up a scorer's gradient, through the VAE, from one call of the student."""

    Config = AscentConfig
    paper = Paper("reward ascent", "", "a toy")
    needs = Needs(batch="image", reward=True, decode=True, reference=False)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        t, noise = ctx.draw(batch)
        x_t = ctx.denoiser.add_noise(batch.latents["image"], noise, t)
        x0 = ctx.denoiser.to_x0(ctx.model("student", x_t, t, batch.cond["prompt"]), x_t, t)
        values = -ctx.reward("tiny-pickscore", ctx.decode(x0), batch.prompts)
        return Loss(values, batch.weight)


def test_a_method_climbs_a_scorer_through_the_vae() -> None:
    trainer = make_trainer(Ascent(AscentConfig()))
    batch = batch_of(trainer)
    assert batch.prompts[2] == "a row-2" and batch.take([2]).prompts == ("a row-2",)
    assert batch.to("cpu").prompts == batch.prompts
    before = weights(trainer)
    warm(trainer, 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


@pytest.fixture(scope="module")
def tiny_sd() -> Any:
    return load_model(ModelRecipe(path="tiny-sd"), CPU, torch.float32)


def test_decode_and_reward_are_the_pipeline_and_the_scorer(tiny_sd: Any) -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    images = tiny_sd.decode_with_gradient(latents)
    torch.testing.assert_close(images, tiny_sd.decode(latents.detach()) / 2 + 0.5)
    (reward,) = load_rewards(Ascent(AscentConfig()), CPU, None).values()
    prompts = ["a red circle", "a blue square"]
    values = reward(images, prompts)
    exact = load_scorer("tiny-pickscore", device="cpu")(images.detach(), prompts)
    torch.testing.assert_close(values.detach(), exact, rtol=0, atol=0.05)  # the file's pixels have 256 levels
    values[0].backward()
    assert latents.grad is not None and bool(latents.grad[0].abs().sum() > 0) and not bool(latents.grad[1].any())


def test_a_kept_vae_does_not_leave_with_the_other_encoders(tiny_sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    for name in ("vae", "text_encoder"):
        monkeypatch.setattr(getattr(tiny_sd, name), "to", lambda device, name=name: left.append(name))
    tiny_sd.keep_vae()
    tiny_sd.release_encoders()
    assert left == ["text_encoder"]


@pytest.mark.parametrize("method", ["draft", "ddpo"])
def test_a_scorer_without_gradients_is_no_reward_to_climb(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone methods that only compare scores take it."""
    import diffalign.eval.scorers as scorers

    class Flat(scorers.Scorer):
        """No gradient: it says how bright a picture is."""

        def check_prompts(self, prompts: Any) -> None:
            pass

        def __call__(self, images: Any, prompts: Any) -> torch.Tensor:  # type: ignore[override]
            return torch.stack([image.mean() for image in images])

    Flat.__abstractmethods__ = frozenset()
    monkeypatch.setattr(scorers, "load_scorer", lambda *args, **options: Flat())
    made = make_method(method, {"reward": "pickscore"})
    if method == "draft":
        with pytest.raises(UserError, match="scorer 'pickscore' gives no gradients; take one of CLIP's kind"):
            load_rewards(made, CPU, None)
    else:
        (reward,) = load_rewards(made, CPU, None).values()
        assert reward(torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "says"),
    [("pikscore", "did you mean 'pickscore'"), ("", "no scorer given"), ("oracle", "the oracle only judges")],
)
def test_rewards_that_cannot_be_climbed(name: str, says: str) -> None:
    method = Ascent(AscentConfig(reward=name))
    with pytest.raises(UserError, match=says) as found:
        check_rewards(method)
        load_rewards(method, CPU, None)
    assert "\n" not in str(found.value)
