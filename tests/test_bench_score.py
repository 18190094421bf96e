"""`diffalign bench score`: what it counts and that its ways agree; the bars themselves are for a quiet machine."""

from __future__ import annotations

import json

import pytest
from command import diffalign

from diffalign.bench.score import measure_score
from diffalign.errors import UserError


def test_ways_agree_and_prompts_are_encoded_once() -> None:
    found = measure_score("tiny-clip,tiny-pickscore", images=4, size=96, rounds=2, device="cpu", batch=4)
    assert (found.images, found.prompts, found.size) == (4, 2, 96)
    assert found.texts == {"tiny-clip": 2, "tiny-pickscore": 2}, "two images a prompt, encoded once"
    assert found.agreement < 1e-5
    assert set(found.ratios) == set(found.work) == {"singles", "per_scorer", "reload"}
    assert all(arm.images_per_second > 0 for arm in found.arms) and len(found.arms) == 6
    assert found.ratios["reload"].median > 1.5, "reading the weights for each call costs"
    json.dumps(found.json())


def test_refusals() -> None:
    with pytest.raises(UserError, match="oracle"):
        measure_score("oracle")
    with pytest.raises(UserError, match="too few"):
        measure_score("tiny-clip", images=1)


def test_the_command() -> None:
    args = ("--images", 2, "--size", 64, "--rounds", 2, "--device", "cpu", "--scorers", "tiny-clip,tiny-pickscore")
    done = diffalign("bench", "score", *args)
    assert done.status == 0, done.err
    assert "one pass, all 2" in done.out and "prompts encoded in one pass of 1 prompts" in done.out
