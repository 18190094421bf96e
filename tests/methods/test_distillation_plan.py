"""What a plan knows of score distillation: each phase is simulated whole, on networks without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SD_SCHEDULE
from world import family, make_roles

from diffalign.denoiser import Denoiser
from diffalign.methods import make_method
from diffalign.simulate import Shapes, simulate_phase

SETTINGS: dict[str, dict[str, Any]] = {
    "sid": {"timesteps": [999, 499], "start": "unit", "gan_weight": 0.1, "step_fake": True},
    "tdm": {"timesteps": [899, 449], "target": "score"},
    "distillation_dpo": {"timesteps": [999, 499]},
    "pso": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_phase_is_simulated_whole(name: str) -> None:
    method = make_method(name, SETTINGS[name])
    with torch.device("meta"):
        modules = method.build(family())
        roles = make_roles([role for role in method.roles if role not in modules], modules=modules)
    shapes = Shapes((4, 8, 8), 5, 16)
    for phase in method.phases:
        used = simulate_phase(method, roles, phase, shapes, 2, Denoiser.from_config(SD_SCHEDULE))
        assert used.whole and used.peak > 0, (name, phase.name)
        if name == "sid" and phase.name == "student":
            # the student's roll-out and last call; teacher and fake score guided, in calls of twice the rows
            assert used.calls["base"] == used.calls["fake"] - 2 == 4
