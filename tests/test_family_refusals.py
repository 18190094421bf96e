"""Models that cannot be trained are refused in one line, from their configs, before any weight is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import write_tiny_model

from diffalign.errors import UserError
from diffalign.families import detect, load_model
from diffalign.recipe import ModelRecipe


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def unet(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "unet" / "config.json", **values)


def scheduler(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **values)


def sdxl(folder: Path) -> None:
    edit(folder / "unet" / "config.json", addition_embed_type="text_time", use_linear_projection=True)
    edit(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])


def refiner(folder: Path) -> None:
    edit(folder / "unet" / "config.json", addition_embed_type="text_time", use_linear_projection=True)
    edit(folder / "model_index.json", text_encoder=[None, None], requires_aesthetics_score=True)


def transformer(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    index.update(_class_name="StableDiffusion3Pipeline", transformer=["diffusers", "SD3Transformer2DModel"])
    (folder / "model_index.json").write_text(json.dumps(index))


BY_CONFIG = {
    "inpainting": (unet(in_channels=9), "an inpainting U-Net (9 input channels)"),
    "editing": (unet(in_channels=8), "an image-editing U-Net (8 input channels)"),
    "refiner": (refiner, "is an SDXL refiner"),
    "edm": (scheduler(_class_name="EDMDPMSolverMultistepScheduler", sigma_data=0.5), "is an EDM model"),
    "edm by sigma": (scheduler(sigma_data=0.5), "is an EDM model"),
    "unclip": (unet(class_embed_type="projection"), "conditioning that no family here knows"),
    "sd3": (transformer, "StableDiffusion3Pipeline without a 2-D U-Net"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not valid JSON"),
    "index a list": (lambda f: (f / "model_index.json").write_text("[]"), "holds no JSON object"),
    "no unet config": (lambda f: (f / "unet" / "config.json").unlink(), "lacks unet/config.json"),
}


@pytest.mark.parametrize("case", BY_CONFIG)
def test_refused_by_config(case: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    change, message = BY_CONFIG[case]
    change(folder)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        detect(ModelRecipe(path=str(folder)))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_the_recipes_family_must_be_the_models(tmp_path: Path, tiny_model_folder: Path) -> None:
    assert detect(ModelRecipe(path=str(tiny_model_folder), family="sd1"))[1] == "sd1"
    folder = shutil.copytree(tiny_model_folder, tmp_path / "m")
    sdxl(folder)
    with pytest.raises(UserError, match=r"is sdxl, not sd1; set model.family=auto"):
        detect(ModelRecipe(path=str(folder), family="sd1"))
    other = ModelRecipe(path=str(tiny_model_folder)).model_copy(update={"family": "sdxl"})
    with pytest.raises(UserError, match="is sd1, not sdxl"):
        detect(other)


def shard(folder: Path) -> None:
    shutil.rmtree(folder)
    write_tiny_model(folder, max_shard_size="100KB")
    sorted((folder / "unet").glob("*.safetensors"))[1].unlink()


def tear(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, {"format": "pt"})


BY_FILES = {
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "lacks its vae/"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "lacks its tokenizer/"),
    "empty tokenizer": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "has no vocab.json"),
    "no weights": (lambda f: next((f / "unet").glob("*.safetensors")).unlink(), "has no weights in unet/"),
    "missing shard": (shard, "shards in unet/"),
    "torn": (tear, "diffusion_pytorch_model.safetensors' is damaged"),
    "missing tensor": (drop_tensor, "such as conv_in.weight"),
    "other widths": (unet(block_out_channels=[8, 16]), "unet"),
    "other text": (lambda f: edit(f / "unet" / "config.json", cross_attention_dim=24), "unet"),
}


@pytest.mark.parametrize("case", BY_FILES)
def test_refused_by_files(case: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "m")
    change, message = BY_FILES[case]
    change(folder)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_model(ModelRecipe(path=str(folder)), torch.device("cpu"), torch.float32)
    assert "\n" not in str(caught.value)


def test_an_unknown_variant_names_those_present(tmp_path: Path, tiny_model_folder: Path) -> None:
    def refused(folder: Path, variant: str | None) -> str:
        with pytest.raises(UserError) as caught:
            load_model(ModelRecipe(path=str(folder), variant=variant), torch.device("cpu"), torch.float32)
        return str(caught.value)

    assert "has no variant 'fp16' in unet/; present: none: set model.variant=null" in refused(tiny_model_folder, "fp16")
    half = write_tiny_model(tmp_path / "m", variant="fp16")
    assert "has no weights without a variant" in refused(half, None)
    assert "present: fp16: set model.variant=fp16" in refused(half, "bf16")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "does not exist"),
        ("no-such-model", "does not exist"),
        ("someone/some-model", "is no folder here and model_index.json cannot be had from the hub"),
        ("pyproject.toml", "is a .toml file; give a .safetensors file or a folder"),
        ("tests", "has no model_index.json"),
    ],
)
def test_paths_that_are_no_model(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        detect(ModelRecipe(path=path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_lora_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match="is a LoRA, not a model; give its base"):
        detect(ModelRecipe(path=str(tmp_path)))


def test_pickled_weights_run_no_code(tmp_path: Path, tiny_model_folder: Path) -> None:
    """A .bin is read where there is nothing else, with weights_only: a pickle that would run code is refused."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(tiny_model_folder, tmp_path / "m")
    state = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    next((folder / "unet").glob("*.safetensors")).unlink()
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(state, file)
    loaded = load_model(ModelRecipe(path=str(folder)), torch.device("cpu"), torch.float32)
    assert torch.equal(loaded.unet.state_dict()["conv_in.weight"], state["conv_in.weight"])

    mark = tmp_path / "ran"
    torch.save({**state, "evil": Evil(mark)}, file)
    with pytest.raises(UserError, match="unet cannot be loaded"):
        load_model(ModelRecipe(path=str(folder)), torch.device("cpu"), torch.float32)
    assert not mark.exists()


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)
