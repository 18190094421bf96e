"""`diffalign export`: every form draws the run's image in plain diffusers, in a process that never saw this package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import diffalign
from diffusers import DiffusionPipeline, LCMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import settings, write_pairs
from tiny import tiny_sdxl_pipeline, write_tiny_model

from diffalign.errors import UserError
from diffalign.facts import Facts, SamplingRecord, read_facts, recorded
from diffalign.publish import export_model
from diffalign.recipe import load_recipe
from diffalign.run import Run, train

PLAIN = """
import json, sys
import numpy, torch
from diffusers import DiffusionPipeline
jobs = json.loads(sys.argv[1])
for number, (base, lora, weight_name) in enumerate(jobs):
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora, **({"weight_name": weight_name} if weight_name else {}))
    image = pipe("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    numpy.save(f"{sys.argv[2]}/{number}.npy", image)
assert not any(name.startswith("diffalign") for name in sys.modules)
"""


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=3, generator=generator, output_type="np").images


def elsewhere(jobs: list[tuple[str, str | None, str | None]], folder: Path) -> list[np.ndarray]:
    """Each (base, lora, weight name) drawn by plain diffusers in a fresh process."""
    folder.mkdir()
    shown = json.dumps([[str(part) if part else None for part in job] for job in jobs])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, shown, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.load(folder / f"{number}.npy") for number in range(len(jobs))]


def make(model: Path, pairs: Path, out: Path, **changes: Any) -> Run:
    name, *overrides = settings(model, pairs, out, **{"train__steps": 4, "validate__every": 4, **changes})
    return train(load_recipe(name, overrides), progress=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def pairs(place: Path) -> Path:
    return write_pairs(place / "pairs")


@pytest.fixture(scope="module")
def lora(tiny_model_folder: Path, pairs: Path, place: Path) -> Run:
    """Linear and convolution layers, alpha 6 of rank 4, and an average."""
    return make(tiny_model_folder, pairs, place / "lora", model__lora__targets="all", train__ema=0.9, name="my/cats")


@pytest.fixture(scope="module")
def full(tiny_model_folder: Path, pairs: Path, place: Path) -> Run:
    return make(tiny_model_folder, pairs, place / "full", model__storage="copies", train__lr=1e-4)


@pytest.fixture(scope="module")
def big(pairs: Path, place: Path) -> tuple[Path, Run]:
    """An SDXL model of the real classes, and a LoRA run on it."""
    tiny_sdxl_pipeline().save_pretrained(place / "sdxl")
    return place / "sdxl", make(place / "sdxl", pairs, place / "big", model__lora__targets="all", data__resolution=64)


def test_every_form_draws_the_same_image_elsewhere(
    lora: Run, full: Run, big: tuple[Path, Run], tiny_model_folder: Path, place: Path
) -> None:
    jobs: list[tuple[str, str | None, str | None]] = []
    wanted: list[np.ndarray] = []
    for base, run in ((tiny_model_folder, lora), big):
        live = draw(run.pipeline())
        plain = draw(DiffusionPipeline.from_pretrained(base))
        assert np.abs(live - plain).max() > 1e-2, "the adapter must be seen, else nothing is tested"
        for form in ("diffusers", "kohya", "merged"):
            found = diffalign("export", run.dir, "--format", form)
            assert found.status == 0, found.err
            target = run.dir / "export" / form
            weights = None if form == "merged" else next(target.glob("*.safetensors")).name
            jobs.append((str(target), None, None) if form == "merged" else (str(base), str(target), weights))
            wanted.append(live)
    assert diffalign("export", full.dir, "--format", "diffusers").status == 0
    jobs.append((str(full.dir / "export" / "diffusers"), None, None))
    wanted.append(draw(full.pipeline()))
    for job, found, live in zip(jobs, elsewhere(jobs, place / "drawn"), wanted, strict=True):
        assert np.abs(found - live).max() < 2e-4, job


def test_the_kohya_file(lora: Run, big: tuple[Path, Run]) -> None:
    export_model(str(lora.dir), "kohya", lora.dir.parent / "k1")
    file = lora.dir.parent / "k1" / "my-cats.safetensors"
    stored = load_file(file)
    assert {float(v) for k, v in stored.items() if k.endswith(".alpha")} == {6.0}
    assert "lora_unet_mid_block_resnets_0_conv1.lora_down.weight" in stored
    assert stored["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"].shape[1:] == (4, 1, 1)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "6")
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora" and header["ss_output_name"] == "my-cats"
    export_model(str(big[1].dir), "kohya", lora.dir.parent / "k2", dtype="fp16")
    stored = load_file(next((lora.dir.parent / "k2").glob("*.safetensors")))
    names = {key.partition(".")[0] for key in stored}
    assert all(re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_\d", name) for name in names)
    assert {v.dtype for k, v in stored.items() if k.endswith("weight")} == {torch.float16}


def test_formats_turn_into_each_other(lora: Run, tiny_model_folder: Path, place: Path) -> None:
    """An exported LoRA names no path of this machine, so its base is given; nothing is lost on the way round."""
    first = export_model(str(lora.dir), "kohya", place / "round1")
    with pytest.raises(UserError, match="--base MODEL"):
        export_model(str(first.folder), "diffusers", place / "round2")
    second = export_model(str(first.weights), "diffusers", place / "round2", base=str(tiny_model_folder))
    was, now = load_file(lora.model / "pytorch_lora_weights.safetensors"), load_file(second.weights)
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
    facts = read_facts(second.folder)
    assert facts is not None and (facts.method, facts.step, facts.export) == ("dpo", 4, "diffusers")
    text = "".join(f.read_text() for f in (*first.folder.glob("*.[jm]*"), *second.folder.glob("*.[jm]*")))
    assert str(place) not in text and str(tiny_model_folder) not in text


def test_the_cards_snippets_run(lora: Run, full: Run, big: tuple[Path, Run], tiny_model_folder: Path) -> None:
    for run, base in ((lora, tiny_model_folder), (full, tiny_model_folder), (big[1], big[0])):
        for form in ("kohya", "merged") if run is not full else ("merged",):
            target = run.dir.parent / f"card-{run.dir.name}-{form}"
            export_model(str(run.dir), form, target)
            text = (target / "README.md").read_text()
            code = re.search(r"```python\n(.*?)```", text, re.S)
            assert code is not None
            source = code[1].replace("PATH/OF/THIS/FOLDER", str(target)).replace(f"PATH/OF/{base.name}", str(base))
            names: dict[str, Any] = {}
            exec(source, names)
            assert np.abs(draw(names["pipe"]) - draw(run.pipeline())).max() < 2e-4
            assert ("ComfyUI" in text) == (form == "kohya")
            assert ("StableDiffusionXLPipeline" in text) == (run is big[1])


def test_roles_of_the_last_checkpoint(lora: Run, full: Run, tiny_model_folder: Path, place: Path) -> None:
    """What `model/` holds is the average; the live weights differ from it."""
    found = {}
    for role in (None, "ema", "student"):
        done = export_model(str(lora.dir), "diffusers", place / f"role-{role}", role=role)
        found[role] = load_file(done.weights)
    assert all(torch.equal(found[None][name], found["ema"][name]) for name in found[None])
    assert not all(torch.equal(found[None][name], found["student"][name]) for name in found[None])
    merged = export_model(str(lora.dir), "merged", place / "role-merged", role="ema")
    assert np.abs(draw(DiffusionPipeline.from_pretrained(merged.folder)) - draw(lora.pipeline())).max() < 2e-4
    whole = export_model(str(full.dir), "merged", place / "role-full", role="student")
    assert np.abs(draw(DiffusionPipeline.from_pretrained(whole.folder)) - draw(full.pipeline())).max() < 2e-4
    with pytest.raises(UserError, match="no role 'teacher'"):
        export_model(str(lora.dir), "diffusers", place / "no", role="teacher")
    with pytest.raises(UserError, match="no role 'ema'"):
        export_model(str(full.dir), "merged", place / "no", role="ema")
    with pytest.raises(UserError, match="is no run's folder"):
        export_model(str(tiny_model_folder), "merged", place / "no", role="student")


def test_numbers_in_half(lora: Run, full: Run, place: Path) -> None:
    merged = export_model(str(full.dir), "merged", place / "half", dtype="fp16")
    assert {t.dtype for t in load_file(merged.folder / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    small = export_model(str(lora.dir), "diffusers", place / "small", dtype="bf16")
    assert {t.dtype for t in load_file(small.weights).values()} == {torch.bfloat16}
    assert merged.bytes > small.bytes > 1000


REFUSED = [
    (["{full}", "--format", "kohya"], "is a whole model, and kohya's format holds LoRAs"),
    (["{lora}", "--format", "gguf"], "'gguf' is not one of"),
    (["{nowhere}", "--format", "merged"], "does not exist"),
    (["{pairs}", "--format", "kohya"], "holds no .safetensors file"),
    (["{base}", "--format", "merged"], "say where to write with --out"),
    (["{lora}", "--format", "kohya", "--out", "{pairs}"], "holds other files"),
    (["{lora}", "--format", "kohya", "--out", "{file}"], "is a file; give a folder"),
    (["{lora}", "--format", "kohya", "--out", "{file}/x"], "cannot be written"),
    (["{lora}", "--format", "kohya", "--private"], "add --push-to-hub"),
    (["{lora}", "--format", "kohya", "--push-to-hub", "me/cats"], "HF_HUB_OFFLINE is set"),
    (["{lora}", "--format", "kohya", "--push-to-hub", "a//b"], "no name of a hub repository"),
    (["{lora}", "--format", "kohya", "--base", "{other}"], "for another network"),
    (["{torn}", "--format", "merged"], "is damaged"),
    (["{unfinished}", "--format", "kohya"], "--role student to export step-000004"),
    (["{foreign}", "--format", "kohya"], "has no model.path in its recipe.yaml"),
    (["{broken}", "--format", "kohya"], "is not valid YAML"),
    (["{facts}", "--format", "kohya"], "diffalign.json' is damaged"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_one_line_and_nothing_written(
    words: list[str], said: str, lora: Run, full: Run, tiny_model_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    import shutil

    def copy(name: str) -> Path:
        shutil.copytree(lora.dir, tmp_path / name, ignore=shutil.ignore_patterns("export", "samples", "*.html"))
        return tmp_path / name

    places = {"lora": lora.dir, "full": full.dir, "pairs": pairs, "base": tiny_model_folder}
    places |= {"nowhere": tmp_path / "no" / "where", "file": tmp_path / "file", "other": tmp_path / "other"}
    places["file"].touch()
    if "{other}" in words:
        write_tiny_model(places["other"])
        config = json.loads((places["other"] / "unet" / "config.json").read_text())
        config["cross_attention_dim"] = 24
        (places["other"] / "unet" / "config.json").write_text(json.dumps(config))
    for name in ("torn", "unfinished", "foreign", "broken", "facts"):
        if "{" + name + "}" in words:
            places[name] = copy(name)
            file = places[name] / "model" / "pytorch_lora_weights.safetensors"
            if name == "torn":
                file.write_bytes(file.read_bytes()[:-100])
            elif name == "unfinished":
                shutil.rmtree(places[name] / "model")
            elif name == "foreign":
                (places[name] / "recipe.yaml").write_text("steps: 3\n")
            elif name == "broken":
                (places[name] / "recipe.yaml").write_text("model: [")
            else:
                (places[name] / "model" / "diffalign.json").write_text('{"format": 2, "step": "many"}')
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    done = diffalign("export", *[word.format(**places) for word in words])
    assert done.status == 2 and said in done.line
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_an_earlier_export_is_replaced_whole_or_kept(lora: Run, full: Run, place: Path) -> None:
    out = place / "again"
    export_model(str(lora.dir), "kohya", out)
    (out / "left.txt").write_text("from before")
    with pytest.raises(UserError, match="holds an export as kohya"):
        export_model(str(lora.dir), "diffusers", out)
    export_model(str(lora.dir), "kohya", out)
    assert {p.name for p in out.iterdir()} == {"my-cats.safetensors", "README.md", "diffalign.json"}
    bytes_before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = diffalign("export", lora.dir, "--format", "kohya", "--out", out, file_bytes=20000)
    assert done.status == 1 and "nothing of it was kept" in done.line
    assert {p.name: p.read_bytes() for p in out.iterdir()} == bytes_before
    done = diffalign("export", full.dir, "--format", "merged", "--out", place / "none", file_bytes=20000)
    assert done.status == 1 and not list(place.glob("*none*")) and not list(place.glob(".*"))
    # killed between the two renames: the old one is hidden, and comes back
    out.rename(place / ".again.old")
    with pytest.raises(UserError, match="holds an export as kohya"):
        export_model(str(lora.dir), "diffusers", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == bytes_before


# ---- few-step models ------------------------------------------------------------------------------------------------

TIMES = (999, 749, 499, 249)


def few(folder: Path, **changes: Any) -> SamplingRecord:
    """Makes the model or LoRA in ``folder`` say that it is a few-step one."""
    config = dict(LCMScheduler(original_inference_steps=4, beta_schedule="scaled_linear").config)
    values = {"scheduler": "LCMScheduler", "config": config, "steps": 4, "guidance": 1.0, "timesteps": TIMES, **changes}
    record = SamplingRecord.model_validate(values)
    facts = read_facts(folder) or Facts(kind="pipeline", family="sd1")
    (folder / "diffalign.json").write_text(facts.model_copy(update={"sampling": record}).text())
    return record


def test_a_few_step_model_is_sampled_as_it_says(lora: Run, tiny_model_folder: Path, tmp_path: Path) -> None:
    """A LoRA that carries scheduler and times: by its folder, exported, merged, and by `diffalign sample`."""
    import shutil

    run = tmp_path / "few"
    shutil.copytree(lora.dir, run, ignore=shutil.ignore_patterns("export", "samples"))
    record = few(run / "model")
    assert recorded(str(run)) == recorded(str(tiny_model_folder), str(run)) == record and not record.deterministic
    assert recorded(str(lora.dir)) is None is recorded(str(tiny_model_folder))
    done = diffalign("sample", run, "--prompts", "a cat", "--out", tmp_path / "a", "--quiet")
    assert done.status == 0, done.err
    said = json.loads((tmp_path / "a" / "sample.json").read_text())["settings"]
    assert (said["steps"], said["guidance"], said["scheduler"]) == (4, 1.0, "recorded")
    assert said["recorded"]["timesteps"] == list(TIMES)

    for form in ("diffusers", "kohya", "merged"):
        target = export_model(str(run), form, tmp_path / form).folder
        scheduler = json.loads((target / "scheduler" / "scheduler_config.json").read_text())
        assert scheduler["_class_name"] == "LCMScheduler" and scheduler["original_inference_steps"] == 4
        text = (target / "README.md").read_text()
        assert "timesteps=[999, 749, 499, 249]" in text and "new noise at every step" in text
        code = re.search(r"```python\n(.*?)```", text, re.S)
        assert code is not None
        calls: dict[str, Any] = {}
        source = code[1].replace("PATH/OF/THIS/FOLDER", str(target))
        exec(source.replace(f"PATH/OF/{tiny_model_folder.name}", str(tiny_model_folder)), calls)
        assert calls["pipe"].scheduler.timesteps.tolist() == list(TIMES)
        assert type(calls["pipe"].scheduler).__name__ == "LCMScheduler"
        calls["pipe"].scheduler.set_timesteps(4)  # the saved config alone gives the same times
        assert calls["pipe"].scheduler.timesteps.tolist() == list(TIMES)
    lora_words = ["--lora", tmp_path / "kohya"]
    for name, words in (("b", [tiny_model_folder, *lora_words]), ("c", [tmp_path / "merged"])):
        done = diffalign("sample", *words, "--prompts", "a cat", "--out", tmp_path / name, "--quiet")
        assert done.status == 0, done.err
    from PIL import Image

    pictures = [np.asarray(Image.open(next((tmp_path / n / "images").iterdir())), dtype=int) for n in "abc"]
    assert max(np.abs(pictures[0] - other).max() for other in pictures[1:]) <= 1
    few(run / "model", timesteps=(999, 600, 300, 100))
    assert diffalign("sample", run, "--prompts", "a cat", "--out", tmp_path / "f", "--quiet").status == 0
    others = np.asarray(Image.open(next((tmp_path / "f" / "images").iterdir())), dtype=int)
    assert np.abs(others - pictures[0]).max() > 3, "the recorded times are used"
    by_hand = ["--steps", "2", "--scheduler", "ddim", "--guidance", "3"]
    done = diffalign("sample", tmp_path / "merged", "--prompts", "a cat", "--out", tmp_path / "d", "--quiet", *by_hand)
    said = json.loads((tmp_path / "d" / "sample.json").read_text())["settings"]
    assert done.status == 0 and (said["steps"], said["scheduler"]) == (2, "ddim") and "recorded" not in said


def test_a_record_that_does_not_hold_together(tiny_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_model_folder, tmp_path / "m")
    good = few(tmp_path / "m")
    for change, said in (
        ({"timesteps": (999, 249)}, "2 timesteps for 4 steps"),
        ({"timesteps": (249, 499, 749, 999)}, "timesteps must fall"),
        ({"timesteps": (1000, 749, 499, 249)}, "beyond the scheduler's range"),
        ({"steps": 0}, "greater than 0"),
        ({"scheduler": "os.system"}, "pattern"),
        ({"surprise": 1}, "surprise"),
    ):
        entry = {**good.model_dump(mode="json"), **change}
        (tmp_path / "m" / "diffalign.json").write_text(json.dumps({"format": 2, "sampling": entry}))
        with pytest.raises(UserError, match=said):
            recorded(str(tmp_path / "m"))
    done = diffalign("sample", tmp_path / "m", "--prompts", "a cat", "--out", tmp_path / "out")
    assert done.status == 2 and "surprise" in done.line and not (tmp_path / "out").exists()
    (tmp_path / "m" / "diffalign.json").unlink()
    few(tmp_path / "m", scheduler="DDIMScheduler", config={})
    done = diffalign("sample", tmp_path / "m", "--prompts", "a cat", "--out", tmp_path / "out")
    assert done.status == 2 and "which it cannot take" in done.line
    done = diffalign("sample", tiny_model_folder, "--prompts", "a", "--out", tmp_path / "o", "--scheduler", "recorded")
    assert done.status == 2 and "carries no scheduler" in done.line


def test_a_method_may_name_the_sampler(lora: Run, tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """What a distillation method returns from `sampling` is saved with its student."""
    from diffalign.methods.preference.dpo import DPO

    record = few(write_tiny_model(tmp_path / "unused"))
    held: list[Any] = []

    def sampling(self: Any, scheduler: Any) -> SamplingRecord:
        held.append(scheduler)
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPO, "sampling", sampling)
        run = make(tiny_model_folder, pairs, tmp_path / "run", output__merged="true")
    assert held[0]["_class_name"] == "PNDMScheduler"
    assert recorded(str(run.dir)) == record
    assert LCMScheduler.from_pretrained(run.model, subfolder="scheduler").config.original_inference_steps == 4
    assert type(DiffusionPipeline.from_pretrained(run.dir / "merged").scheduler).__name__ == "LCMScheduler"


def test_a_lora_that_also_changes_the_text_encoder(lora: Run, tiny_model_folder: Path, place: Path) -> None:
    """Merged whole; refused as a LoRA, since half of it would be lost."""
    tensors = load_file(lora.model / "pytorch_lora_weights.safetensors")
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{layer}.lora_A.weight": torch.randn(4, 16), f"{layer}.lora_B.weight": torch.randn(16, 4)}
    save_file(tensors, place / "text.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="also changes text_encoder"):
        export_model(str(place / "text.safetensors"), "kohya", place / "t1", base=str(tiny_model_folder))
    merged = export_model(str(place / "text.safetensors"), "merged", place / "t2", base=str(tiny_model_folder))
    plain = DiffusionPipeline.from_pretrained(tiny_model_folder)
    plain.load_lora_weights(place / "text.safetensors")
    assert np.abs(draw(DiffusionPipeline.from_pretrained(merged.folder)) - draw(plain)).max() < 2e-4
