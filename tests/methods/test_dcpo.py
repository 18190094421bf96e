"""DCPO: a caption a picture (offline sheet, section 8), the rules that perturb captions, sources."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small import settings, write_pairs
from test_data_readers import picks, recipe
from tiny import SD_SCHEDULE, tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline, write_tiny_model
from torch import Tensor
from world import batch_of, make_trainer, warm

from diffalign import load_recipe, train
from diffalign.data.batch import Batch, Cond
from diffalign.data.perturb import GROUPS, LEVELS, perturb
from diffalign.data.readers import read_pairs
from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.families import load_model
from diffalign.methods import make_method
from diffalign.plan import make_plan
from diffalign.recipe import ModelRecipe
from diffalign.trainer import Trainer

LONG = "A red fox, standing in the snowy forest behind a small wooden house at night, oil painting by a master."


def logits(trainer: Trainer, batch: Batch) -> Tensor:
    with torch.no_grad():
        return trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0]).metrics["logit"]


def with_captions(batch: Batch, scale: float = 1.0) -> Batch:
    """The loser's own caption: another text embedding."""
    own = batch.cond["prompt"]
    return replace(batch, cond={"prompt": own, "rejected_prompt": Cond(own.embeds.flip(2) * scale)})


# ---- the objective --------------------------------------------------------------------------------------------------


def test_equal_captions_are_dpo_and_the_start_is_log_two() -> None:
    """8.6 (a) and (b)."""
    trainer = make_trainer(make_method("dcpo", {"beta": 100.0}))
    batch = batch_of(trainer)
    with torch.no_grad():
        start = trainer.method.loss(trainer.ctx, with_captions(batch), trainer.method.phases[0]).values
    torch.testing.assert_close(start, torch.full((4,), math.log(2)), rtol=0, atol=1e-6)
    warm(trainer)
    same = replace(batch, cond=batch.cond | {"rejected_prompt": batch.cond["prompt"]})
    dpo = make_trainer(make_method("dpo", {"beta": 100.0}))
    dpo.ctx.roles = trainer.ctx.roles
    torch.testing.assert_close(logits(trainer, same), logits(dpo, batch), rtol=0, atol=0)
    assert float((logits(trainer, with_captions(batch)) - logits(dpo, batch)).abs().max()) > 1e-3


def test_captions_go_with_their_pictures() -> None:
    """8.6 (c): pictures and captions exchanged together mirror the logit, pictures alone do not."""
    trainer = warm(make_trainer(make_method("dcpo", {"beta": 100.0})))
    batch = with_captions(batch_of(trainer))
    turned = {"chosen": batch.latents["rejected"], "rejected": batch.latents["chosen"]}
    captions = {"prompt": batch.cond["rejected_prompt"], "rejected_prompt": batch.cond["prompt"]}
    found = logits(trainer, batch)
    torch.testing.assert_close(logits(trainer, replace(batch, latents=turned, cond=captions)), -found)
    assert float((logits(trainer, replace(batch, latents=turned)) + found).abs().max()) > 1e-3
    # the winner's error does not see the loser's caption
    other = with_captions(batch_of(trainer), 2.0)
    with torch.no_grad():
        errors = [trainer.method.errors(trainer.ctx, trainer.method.noise(trainer.ctx, b)) for b in (batch, other)]
    torch.testing.assert_close(errors[0].chosen, errors[1].chosen)
    assert float((errors[0].rejected - errors[1].rejected).abs().max()) > 1e-4


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline])
def test_two_captions_on_each_family(make: Any, tmp_path: Path) -> None:
    """8.6 (f), and on SDXL the loser's pooled text is its own caption's."""
    make().save_pretrained(tmp_path)
    model = load_model(ModelRecipe(path=str(tmp_path)), torch.device("cpu"), torch.float32)
    both = model.encode_prompts(["a cat", "a red dog"])
    apart = Cond.cat([model.encode_prompts(["a cat"]), model.encode_prompts(["a red dog"])])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    batch = Batch(
        ("a",),
        (0,),
        {"chosen": torch.zeros(1, 4, 8, 8), "rejected": torch.ones(1, 4, 8, 8)},
        {"prompt": both.take([0]), "rejected_prompt": both.take([1])},
        {},
        torch.ones(1),
        sizes={"chosen": sizes, "rejected": 2 * sizes},
    )
    seen = make_method("dcpo", {}).pair_cond(batch)
    torch.testing.assert_close(seen.embeds, apart.embeds, rtol=1e-4, atol=1e-5)
    assert float((seen.embeds[0] - seen.embeds[1]).abs().max()) > 1e-3
    for name in seen.added.keys() - {"time_ids"}:
        torch.testing.assert_close(seen.added[name], apart.added[name], rtol=1e-4, atol=1e-5)
    if seen.added:
        assert torch.equal(seen.added["time_ids"], torch.cat([sizes, 2 * sizes]))


def test_v_prediction_regresses_on_v() -> None:
    """The authors' script regresses a v network on the noise; a network that says v has no error here."""
    trainer = make_trainer(make_method("dcpo", {}))
    denoiser = trainer.ctx.denoiser = Denoiser.from_config({**SD_SCHEDULE, "prediction_type": "v_prediction"})
    noised = trainer.method.noise(trainer.ctx, batch_of(trainer))
    x0 = torch.cat([*batch_of(trainer).latents.values()])
    a = denoiser.alphas_cumprod[noised.t].float().reshape(-1, 1, 1, 1)
    noise = (noised.x_t - a.sqrt() * x0) / (1 - a).sqrt()
    torch.testing.assert_close(noised.target, a.sqrt() * noise - (1 - a).sqrt() * x0, rtol=1e-3, atol=1e-3)


# ---- the rules ------------------------------------------------------------------------------------------------------


def edits(a: str, b: str) -> int:
    """Word edit distance."""
    first, second = a.split(), b.split()
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def test_the_level_is_the_word_edit_distance() -> None:
    texts = [LONG, "a red circle above a blue cross", "cat", "the the", "Zwei Hunde, laufend", "a  dog\n on a mat"]
    for text in texts:
        count = len(text.split())
        last = 0
        assert perturb(text, 0.0) == text  # 8.6 (e)
        for share in (0.2, *LEVELS.values(), 1.0):
            made = perturb(text, share)
            assert made.strip() and made == perturb(text, share) != text
            expected = min(max(1, math.floor(share * count + 0.5)), max(1, count - 1))
            assert edits(text, made) == expected >= last, (text, made)
            last = expected
    assert perturb(LONG, 0.6) != perturb(LONG, 0.6, seed=1)
    assert perturb("", 0.6) == ""


def test_words_become_others_of_their_kind() -> None:
    for seed in range(4):
        made = perturb("Red circle, above (blue) cross!", 0.8, seed).split()
        assert len(made) == 5, "words of a group stay words"
        group = {word: group for group in GROUPS for word in group}
        for new, old in zip(made, ("red", "circle", "above", "blue", "cross"), strict=True):
            assert new.lower().strip(",!()") in group[old], (new, old)
        assert made[0].istitle() and made[1].endswith(",") and made[3].startswith("(") and made[4].endswith("!")
    assert sorted(w for g in GROUPS for w in g) == sorted({w for g in GROUPS for w in g}), "a word has one group"


# ---- where captions come from ---------------------------------------------------------------------------------------


def test_perturbed_while_read(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs", 6)
    plain = read_pairs(recipe(data)).rows
    rows = read_pairs(recipe(data, perturb="medium")).rows
    assert [r.id for r in rows] == [r.id for r in plain] and {r.rejected_prompt for r in plain} == {None}
    assert [r.rejected_prompt for r in rows] == [perturb(r.prompt, 0.6) for r in plain]
    assert [r.rejected_prompt for r in read_pairs(recipe(data, perturb="weak")).rows] != [
        r.rejected_prompt for r in rows
    ]
    turned = read_pairs(recipe(data, perturb="medium", shuffle_labels=True)).rows
    assert [r.prompt for r in turned] == [r.prompt for r in plain], "the loser as labelled is the perturbed one"
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines[0]["rejected_prompt"] = "mine"
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_pairs(recipe(data, perturb="medium")).rows
    assert rows[0].rejected_prompt == "mine" and rows[1].rejected_prompt == perturb(rows[1].prompt, 0.6)


def test_pick_double_caption_moves_captions_with_pictures(tmp_path: Path) -> None:
    """8.6 (d), by the data set's own columns."""
    found = picks([1.0, 0.0]) | {"caption_0": ["first 0", "first 1"], "caption_1": ["second 0", "second 1"]}
    pq.write_table(pa.table(found), tmp_path / "pairs.parquet")
    a, b = read_pairs(recipe(tmp_path / "pairs.parquet")).rows
    assert (a.prompt, a.rejected_prompt, a.chosen.read()) == ("first 0", "second 0", found["jpg_0"][0])
    assert (b.prompt, b.rejected_prompt, b.chosen.read()) == ("second 1", "first 1", found["jpg_1"][1])


def test_no_captions_is_one_line_and_some_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = write_tiny_model(tmp_path / "model"), write_pairs(tmp_path / "pairs")
    changes = {"method__name": "dcpo", "train__steps": 1, "validate__every": 100}
    name, *options = settings(model, data, tmp_path / "run", **changes)
    for start in (train, lambda name, options: make_plan(load_recipe(name, options))):
        with pytest.raises(UserError, match="make them with `diffalign pairs caption`"):
            start(name, options)
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines[3]["rejected_prompt"] = "another fish"
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(name, options)
    assert "11 of 12 rows have no rejected_prompt" in " ".join(capsys.readouterr().err.split())
    assert not make_plan(load_recipe(name, [*options, "data.perturb=weak"])).notes
