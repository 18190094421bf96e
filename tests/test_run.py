"""Whole runs through Python: what lies in the folder, what others can open, and what is never trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from small import curve, log_of, lora_of, picture, same_tree, settings, write_pairs

import diffalign
from diffalign.errors import UserError
from diffalign.recipe import load_recipe
from diffalign.run import Run, Session, flushes_denormals, train


def make(model: Path, data: Path, out: Path, **changes: Any) -> tuple[Run, list[Session]]:
    """A run, and its session with the live networks."""
    name, *overrides = settings(model, data, out, **changes)
    seen: list[Session] = []
    return train(load_recipe(name, overrides), progress=False, watch=seen.append), seen


def draw(pipe: StableDiffusionPipeline) -> np.ndarray:
    """An image of a pipeline, as numbers: fixed noise, DDIM, no clipping."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    found = pipe("a red cat 0", latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="np")
    image: np.ndarray = found.images[0]
    return image


def live(session: Session, role: str = "student") -> np.ndarray:
    """The same image from the networks in memory."""
    roles, model = session.trainer.roles, session.parts.model
    with roles.active(role):
        if roles.lora is None:
            return draw(model.assemble(unet=roles.networks[role], **model.parts()))
        return draw(model.pipeline())


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pairs(place: Path) -> Path:
    return write_pairs(place / "pairs")


@pytest.fixture(scope="module")
def done(tiny_model_folder: Path, pairs: Path, place: Path) -> tuple[Run, Session]:
    """LoRA with alpha 6 and rank 4, validation and pictures every 4 steps, a checkpoint every 2, two of them kept."""
    run, seen = make(
        tiny_model_folder,
        pairs,
        place / "run",
        validate__every=4,
        validate__images=2,
        train__save_every=2,
        train__keep=2,
        output__merged="true",
    )
    return run, seen[0]


def test_the_folder_of_a_run(done: tuple[Run, Session], tiny_model_folder: Path) -> None:
    run, _ = done
    names = {"recipe.yaml", "log.jsonl", "checkpoints", "samples", "model", "merged", "report.html"}
    assert {p.name for p in run.dir.iterdir()} == names
    assert {p.name for p in run.model.iterdir()} == {"pytorch_lora_weights.safetensors", "README.md", "diffalign.json"}
    assert [p.name for p in sorted((run.dir / "samples").iterdir())] == [f"step-{s:06d}.png" for s in (0, 4, 8, 12)]
    assert load_recipe(run.dir / "recipe.yaml") == run.recipe
    head = (run.dir / "recipe.yaml").read_text().splitlines()
    hashed = {line.split(":")[0] for line in head if line.startswith("#")}
    assert hashed == {"# data", "# unet", "# vae", "# text_encoder", "# tokenizer"}
    facts = json.loads((run.model / "diffalign.json").read_text())
    assert (facts["base"], facts["method"], facts["step"]) == (str(tiny_model_folder), "dpo", 12)
    assert facts["recipe"] == run.recipe.dump()
    page = run.report.read_text()
    assert "<svg" in page or "data:image/png" in page
    assert [row["step"] for row in log_of(run.dir)] == [4, 8, 12]
    assert [row["step"] for row in log_of(run.dir, "validate")] == [0, 4, 8, 12]
    row = log_of(run.dir)[0]
    health = {"loss", "chosen_error", "rejected_error", "margin", "accuracy", "logit_abs", "grad_norm/student", "lr"}
    assert health <= row.keys()
    assert {"brightness", "saturation", "chosen_gain"} <= log_of(run.dir, "validate")[0].keys()


def test_checkpoints_kept_are_the_newest_and_the_best(done: tuple[Run, Session]) -> None:
    run, session = done
    losses = {step: loss for step, loss in run.curve("loss", "validate") if step}
    best = min(losses, key=lambda step: losses[step])
    assert session.best.step == best
    assert [int(p.name[5:]) for p in run.checkpoints] == sorted({best, 10, 12})


def test_a_run_for_notebooks(done: tuple[Run, Session], place: Path) -> None:
    run, _ = done
    again = diffalign.open_run(run.dir)
    assert again.step == run.step == 12 and again.recipe == run.recipe
    assert again.curve("accuracy") == run.curve("accuracy") and len(again.curve("margin")) == 3
    assert "log=" not in repr(run)
    with pytest.raises(UserError, match="is no run folder"):
        diffalign.open_run(place)


def test_plain_diffusers_draws_the_students_image(done: tuple[Run, Session], tiny_model_folder: Path) -> None:
    """alpha is not the rank: a lost alpha would show."""
    run, session = done
    student, base = live(session), live(session, "base")
    assert gap(student, base) > 1e-2, "training moved the picture"
    plain = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    assert gap(draw(plain), base) < 1e-5
    plain.load_lora_weights(run.model)
    assert gap(draw(plain), student) < 1e-5
    assert gap(draw(run.pipeline()), student) < 1e-5
    assert gap(draw(StableDiffusionPipeline.from_pretrained(run.dir / "merged")), student) < 1e-4


def test_the_cards_snippet_runs(done: tuple[Run, Session]) -> None:
    run, session = done
    card = (run.model / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("PATH/OF/THIS/FOLDER", str(run.model)), names)
    assert names["image"].size == (64, 64) and gap(draw(names["pipe"]), live(session)) < 1e-5
    for text in ("2311.12908", "| method.beta | 1000", "| LoRA rank | 4 |", "| LoRA alpha | 6", "PNDMScheduler"):
        assert text in card


def test_a_second_run_starts_from_the_first(
    done: tuple[Run, Session], tiny_model_folder: Path, pairs: Path, place: Path
) -> None:
    """A LoRA fused at half strength, given by the run's folder: base is what it draws, and the card says all of it."""
    first, _ = done
    loras = f"[{{path: {first.dir}, scale: 0.5}}]"
    run, (session,) = make(tiny_model_folder, pairs, place / "second", model__loras=loras, train__steps=4)
    fused = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    fused.load_lora_weights(first.model)
    fused.fuse_lora(lora_scale=0.5)
    fused.unload_lora_weights()
    start = draw(fused)
    assert gap(start, live(session, "base")) < 1e-4
    assert gap(start, draw(StableDiffusionPipeline.from_pretrained(tiny_model_folder))) > 1e-3
    student = live(session)
    assert gap(student, start) > 1e-3
    assert gap(draw(run.pipeline()), student) < 1e-4
    code = re.search(r"```python\n(.*?)```", (run.model / "README.md").read_text(), re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("PATH/OF/THIS/FOLDER", str(run.model)), names)
    assert gap(draw(names["pipe"]), student) < 1e-4


def test_full_copies_leave_a_whole_pipeline(tiny_model_folder: Path, pairs: Path, place: Path) -> None:
    run, (session,) = make(
        tiny_model_folder, pairs, place / "copies", model__storage="copies", train__lr=1e-4, train__steps=4
    )
    student = live(session)
    assert gap(student, live(session, "base")) > 1e-3
    assert gap(draw(StableDiffusionPipeline.from_pretrained(run.model)), student) < 1e-5
    assert gap(draw(run.pipeline()), student) < 1e-5
    card = (run.model / "README.md").read_text()
    assert "load_lora_weights" not in card and "LoRA rank" not in card


def test_averages_are_exported_and_validated(tiny_model_folder: Path, pairs: Path, place: Path) -> None:
    run, (session,) = make(tiny_model_folder, pairs, place / "ema", train__ema=0.9, train__steps=6)
    exported = lora_of(run.dir)
    names = list(session.trainer.roles.named_parameters("student"))
    shadow = dict(zip(names, session.trainer.ema["student"].shadow, strict=True))
    weights = session.trainer.roles.state_dict("student")
    key = next(name for name in names if "lora_B" in name)
    stored = exported["unet." + key.replace(".student.", ".")]
    assert torch.equal(stored, shadow[key]) and not torch.equal(stored, weights[key])


def test_held_out_rows_are_never_trained_on(done: tuple[Run, Session]) -> None:
    _, session = done
    held = {session.parts.cache.ids[int(i)] for i in session.parts.heldout.indices}  # type: ignore[union-attr]
    seen = {name for n in range(40) for part in session.trainer._load(n) for name in part.ids}
    assert len(held) == 2 and len(seen) == 10 and not held & seen


def test_validation_repeats_its_numbers(
    done: tuple[Run, Session], tiny_model_folder: Path, pairs: Path, place: Path
) -> None:
    """Fixed (t, noise): the same rows look the same in another run, in other micro-batches, and when asked twice."""
    from diffalign.validate import heldout_metrics

    run, session = done
    once = heldout_metrics(session.trainer, session.parts.heldout, run.recipe.validate_)  # type: ignore[arg-type]
    last = log_of(run.dir, "validate")[-1]
    assert all(last[name] == value for name, value in once.items())
    other, _ = make(tiny_model_folder, pairs, place / "again", validate__every=4, train__micro_batch=1, train__steps=4)
    for a, b in zip(log_of(run.dir, "validate")[:2], log_of(other.dir, "validate"), strict=True):
        assert a["chosen_error"] == pytest.approx(b["chosen_error"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_the_same_command_gives_the_same_run(tiny_model_folder: Path, pairs: Path, place: Path) -> None:
    """Two runs in one process, with other draws of every global generator in between."""
    one, _ = make(tiny_model_folder, pairs, place / "one", train__steps=4)
    torch.manual_seed(99), np.random.seed(99), torch.randn(7)
    two, _ = make(tiny_model_folder, pairs, place / "two", train__steps=4)
    three, _ = make(tiny_model_folder, pairs, place / "three", train__steps=4, train__seed=1)
    assert same_tree(lora_of(one.dir), lora_of(two.dir)) and curve(one.dir) == curve(two.dir)
    assert not same_tree(lora_of(one.dir), lora_of(three.dir))


def test_training_takes_denormals_for_zero(tiny_model_folder: Path, pairs: Path, place: Path) -> None:
    """Saturated losses make gradients below 1e-38, at which a CPU is slow; the caller's setting comes back."""
    seen: list[bool] = []
    for outside in (False, True):
        name, *overrides = settings(tiny_model_folder, pairs, place / f"denormals-{outside}", train__steps=1)
        torch.set_flush_denormal(outside)
        try:
            train(load_recipe(name, overrides), "never", False, lambda session: seen.append(flushes_denormals()))
            assert flushes_denormals() is outside
        finally:
            torch.set_flush_denormal(False)
    assert seen == [True, True]


def test_a_plain_image_folder_trains_sft(tiny_model_folder: Path, place: Path) -> None:
    """The layout that `datasets` calls imagefolder: file_name and a caption."""
    folder = place / "images"
    folder.mkdir()
    lines = []
    for i in range(6):
        picture(i, (80, 64)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "prompt": f"a thing {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    sft: dict[str, Any] = {"method__beta": None, "train__steps": 4, "validate__pairs": 1}
    overrides = settings(tiny_model_folder, folder, place / "sft", **sft)[1:]
    recipe = load_recipe("tiny/sft", overrides)
    run = train(recipe, progress=False)
    assert run.step == 4 and "chosen_error" in log_of(run.dir)[-1]
    chosen = settings(tiny_model_folder, write_pairs(place / "sft-pairs"), place / "sft-chosen", **sft)[1:]
    assert diffalign.train("tiny/sft", chosen, progress=False).step == 4, "the chosen pictures of pairs"


def photo(folder: Path, name: str, size: tuple[int, int], key: int, orientation: int = 1, alpha: bool = False) -> str:
    image = picture(key, size)
    if alpha:
        image.putalpha(Image.linear_gradient("L").resize(size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {} if alpha else {"exif": exif}
    image.save(folder / name, **options)
    return name


def test_ordinary_photos_train_with_the_same_command(tiny_model_folder: Path, place: Path) -> None:
    """Mixed sizes and formats, a phone's rotation, transparency, grey; one file is no picture: counted, not fatal."""
    folder = place / "photos"
    folder.mkdir()
    kinds: list[dict[str, Any]] = [
        {"name": "{}.jpg", "size": (300, 200)},
        {"name": "{}.jpeg", "size": (120, 400), "orientation": 6},
        {"name": "{}.png", "size": (70, 71), "alpha": True},
        {"name": "{}.webp", "size": (640, 480)},
        {"name": "{}.JPG", "size": (40, 30), "orientation": 3},
    ]
    rows = []
    for i in range(8):
        a, b = kinds[i % 5], kinds[(2 * i + 1) % 5]
        chosen = photo(folder, **{**a, "name": a["name"].format(f"w{i}"), "key": 2 * i})
        rejected = photo(folder, **{**b, "name": b["name"].format(f"l{i}"), "key": 2 * i + 1})
        rows.append({"prompt": f"holiday {i}", "chosen": chosen, "rejected": rejected})
    (folder / "broken.jpg").write_bytes((folder / "w0.jpg").read_bytes()[:500])
    rows.append({"prompt": "broken", "chosen": "broken.jpg", "rejected": "w0.jpg"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name, *overrides = settings(tiny_model_folder, folder, place / "holiday", train__steps=4)
    recipe = load_recipe(name, overrides)
    session = Session(recipe, progress=False)
    run = session.run()
    assert run.step == 4 and len(session.parts.rows) == 8
    latents = session.parts.cache[0].latents["chosen"]
    assert latents.shape == (4, 8, 8) and bool(torch.isfinite(latents).all())
    turned = session.parts.cache[1].sizes["chosen"].tolist()
    assert turned[:2] == [120, 400], "height and width after the rotation that EXIF asks for"


def test_curves_go_to_tensorboard_once(tiny_model_folder: Path, pairs: Path, place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    same = {"output__trackers": "[tensorboard]", "train__log_every": 1, "train__save_every": 2, "validate__every": 2}
    make(tiny_model_folder, pairs, place / "board", train__steps=2, **same)
    run, _ = make(tiny_model_folder, pairs, place / "board", train__steps=4, **same)  # goes on from step 2
    events = EventAccumulator(str(run.dir / "tensorboard")).Reload()
    drawn = {e.step: e.value for e in events.Scalars("train/loss")}
    assert drawn == pytest.approx(dict(run.curve("loss")), rel=1e-5) and list(drawn) == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("validate/loss")] == [s for s, _ in run.curve("loss", "validate")]


def test_the_best_weights_can_be_exported(tiny_model_folder: Path, pairs: Path, place: Path) -> None:
    hasty = {"train__lr": 0.2, "train__steps": 6, "validate__every": 1, "train__save_every": 1, "train__keep": 1}
    run, _ = make(tiny_model_folder, pairs, place / "best", output__weights="best", **hasty)
    losses = dict(run.curve("loss", "validate"))
    best = min((s for s in losses if s > 0), key=lambda s: losses[s])
    assert best < 6, "the last step is the best: nothing is tested"
    saved = torch.load(run.dir / f"checkpoints/step-{best:06d}/state.pt", weights_only=True)["roles"]["student"]
    exported = lora_of(run.dir)
    assert all(torch.equal(exported["unet." + k.replace(".student.", ".")], v) for k, v in saved.items())


def test_a_checkpoint_is_bound_to_its_weights(tiny_model_folder: Path, pairs: Path, place: Path) -> None:
    import shutil

    from diffusers import UNet2DConditionModel

    model = shutil.copytree(tiny_model_folder, place / "model")
    make(model, pairs, place / "bound", train__steps=2)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    with torch.no_grad():
        unet.conv_in.weight.add_(0.1)
    unet.save_pretrained(model / "unet")
    with pytest.raises(UserError, match="trained on other weights"):
        make(model, pairs, place / "bound", train__steps=4)
