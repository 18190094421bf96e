"""What a plan knows of score distillation: each phase is simulated whole, on networks without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SD_SCHEDULE
from world import family, make_roles

from diffalign import load_recipe
from diffalign.denoiser import Denoiser
from diffalign.methods import make_method
from diffalign.plan import make_plan
from diffalign.simulate import Shapes, simulate_phase

SETTINGS: dict[str, dict[str, Any]] = {
    "sid": {"timesteps": [999, 499], "start": "unit", "gan_weight": 0.1, "step_fake": True},
    "tdm": {"timesteps": [899, 449], "target": "score"},
    "distillation_dpo": {"timesteps": [999, 499]},
    "pso": {},
    "phased_dmd": {},
    "disback": {"stage": "degrade"},
    "twinflow": {"order": 2},
    "scm": {"tangent": "jvp", "gan_weight": 0.5, "gan_width": 8},
}


def test_an_average_has_no_gradients_and_no_optimiser(tmp_path: Path) -> None:
    """LCM's target, which follows the student, is held as weights alone; heads and fake scores are trained."""
    for name, options, still in (
        ("tiny/lcm", ["method.target_ema=0.9"], {"target"}),
        ("tiny/pcm", ["method.target_ema=0.9", "method.gan_weight=0.1", "model.storage=copies"], {"target"}),
        ("tiny/dmd2", [], set[str]()),
    ):
        plan = make_plan(load_recipe(name, [*options, f"data.cache_dir={tmp_path}"]))
        parts = plan.memory["parts"]
        for role, count in plan.roles.items():
            of_role = {
                part.partition(": ")[2].partition(" ")[0]: size
                for part, size in parts.items()
                if part.startswith(f"{role}: ")
            }
            assert sum(size for kind, size in of_role.items() if kind in ("adapter,", "weights,")) == 4 * count
            trained = {"gradients,": 4 * count, "optimiser": 8 * count} if role not in still else {}
            assert {k: v for k, v in of_role.items() if k in ("gradients,", "optimiser")} == trained, (name, role)
        assert still <= plan.roles.keys()


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
