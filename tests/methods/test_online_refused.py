"""What the online methods refuse or say before they train: samplers, students, groups, dropout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from test_online import LIKELIHOOD, SD, items_of, method, trainer_of
from tiny import SD_SCHEDULE

from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.facts import Facts, student_record
from diffalign.methods import make_method
from diffalign.recipe import load_recipe
from diffalign.students import check_students

REFUSED = {
    "a deterministic sampler": ({"eta": 0.0}, "method.eta=0 makes sampling deterministic"),
    "one step": ({"timesteps": [999]}, "no step of this sampler has a likelihood"),
    "beyond": ({"timesteps": [1500, 999]}, "1500 is beyond the model's schedule"),
    "a flow sampler": ({"sampler": "flow"}, "set it to ddim or renoise"),
    "a share of noise at few times": ({"timesteps": [999, 499], "eta": 0.5}, "no sampler of diffusers takes both"),
    "too many": ({"steps": 2000}, "between 1 and 1000"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_samplers_that_do_not_go(what: str) -> None:
    options, expected = REFUSED[what]
    for name in LIKELIHOOD:
        with pytest.raises(UserError, match=expected) as caught:
            method(name, **options).check(SD)
        assert "\n" not in str(caught.value)


def test_a_few_step_student_in_many_steps_and_the_reverse(tmp_path: Path) -> None:
    record = student_record(SD_SCHEDULE, [999, 749, 499, 249])
    (tmp_path / "diffalign.json").write_text(Facts(sampling=record).text())
    base = SimpleNamespace(scheduler_config={**SD_SCHEDULE, "_class_name": "PNDMScheduler"})
    student, few = f"model.loras=[{{path: {tmp_path}}}]", {"timesteps": [999, 749, 499, 249], "sampler": "renoise"}
    with pytest.raises(UserError, match=r"samples in many steps, but the student .* set method.timesteps") as caught:
        check_students(method(), load_recipe("tiny/ddpo", [student]), base)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"in 4 steps, but 'tiny-sd' is a many-step model \(PNDMScheduler\)") as other:
        check_students(method(**few), load_recipe("tiny/ddpo"), base)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) + str(other.value)
    check_students(method(**few), load_recipe("tiny/ddpo", [student]), base)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method.guidance=5 guides the student .* set method.guidance=1"):
        check_students(method(**few, guidance=5.0), load_recipe("tiny/ddpo", [student]), base)  # type: ignore[arg-type]
    check_students(method(), load_recipe("tiny/ddpo"), base)  # type: ignore[arg-type]


STUDENTS = {
    "other times": ({"timesteps": [999, 700, 249]}, {}, r"timesteps has \[700\], times that the student"),
    "another kind of step": ({"sampler": "ddim"}, {}, "set method.sampler=renoise"),
    "no new noise": ({}, {"renoise": False}, "set method.sampler=ddim"),
    "another first noise": ({}, {"scale": 14.6146}, "set method.scale=14.6146"),
}


@pytest.mark.parametrize("what", STUDENTS)
def test_a_student_is_sampled_as_it_was_made(what: str, tmp_path: Path) -> None:
    options, made, expected = STUDENTS[what]
    (tmp_path / "diffalign.json").write_text(
        Facts(sampling=student_record(SD_SCHEDULE, [999, 749, 499, 249], **made)).text()
    )
    base, recipe = SimpleNamespace(scheduler_config=SD_SCHEDULE), load_recipe("tiny/ddpo", [f"model.start={tmp_path}"])
    few = {"timesteps": [999, 749, 499, 249], "sampler": "renoise"}
    with pytest.raises(UserError, match=expected) as caught:
        check_students(method(**few | options), recipe, base)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    mended = {"scale": 14.6146} if "scale" in made else {"sampler": "ddim"} if made else {"timesteps": [999, 749]}
    check_students(method(**few | mended), recipe, base)  # type: ignore[arg-type]
    scaled = method(**few, scale=3.0)
    assert scaled.policy(SD).scale == scaled.sampling(SD_SCHEDULE).scale == 3.0  # type: ignore[attr-defined, union-attr]


def test_a_students_own_first_noise_is_walked_from() -> None:
    one, three = (trainer_of(timesteps=[999, 749], sampler="renoise", scale=scale, steps=2) for scale in (1.0, 3.0))
    plain, scaled = (items_of(trainer) for trainer in (one, three))
    torch.testing.assert_close(scaled.latents["x_t"], 3 * plain.latents["x_t"])


def test_dropout_of_adapters_is_refused() -> None:
    """What the student said while it sampled it said without."""
    base = SimpleNamespace(scheduler_config={**SD_SCHEDULE, "_class_name": "PNDMScheduler"})
    recipe = load_recipe("tiny/ddpo", ["model.lora.dropout=0.1"])
    with pytest.raises(
        UserError, match=r"model.lora.dropout=0.1 does not go with method 'ddpo'.*set model.lora.dropout=0"
    ):
        check_students(method(), recipe, base)  # type: ignore[arg-type]
    check_students(method(), load_recipe(recipe, **{"model.storage": "copies"}), base)  # type: ignore[arg-type]
    check_students(make_method("dpo", {}), recipe, base)  # type: ignore[arg-type]


def test_a_step_that_outweighs_all_others_is_told_of() -> None:
    """Sheet, appendix H: leading spacing's last step but one (w_t 14.75 of about 20), and how it goes away."""
    (said,) = method("d3po", steps=20).warnings(SD)
    assert "the step at time 51 has 73% of the weight" in said and "method.spacing=trailing" in said
    assert not method("d3po", steps=20, spacing="trailing", skip_last=True).warnings(SD)
    (said,) = make_method("spo", {}).warnings(SD)
    assert "method.time_weight=equal" in said and not make_method("spo", {"time_weight": "equal"}).warnings(SD)
    assert not method("nft").warnings(SD), "no densities"
    # without signal at the first time there is no eps to weigh by: that step does not hide the others
    bare = Denoiser.from_config({**SD_SCHEDULE, "rescale_betas_zero_snr": True}, "v_prediction")
    (said,) = method("d3po", steps=20, spacing="trailing").warnings(bare)
    assert "the step at time 49 has 79% of the weight" in said and "time 999" not in said
    assert not method("d3po", steps=20, spacing="trailing", skip_last=True).warnings(bare)


def test_a_group_of_one_is_refused() -> None:
    for name in ("ddpo", "grpo"):
        with pytest.raises(ValidationError, match="one sample a prompt has nothing to be compared with"):
            method(name, members=1)
        with pytest.raises(ValidationError, match="mean=batch with std=prompt divides"):
            method(name, mean="batch", std="prompt")
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        method("d3po", members=1)
    with pytest.raises(ValidationError, match="2 numbers for 1 scorers"):
        method("ddpo", reward_weights=[1.0, 2.0])
