"""Checkpoints of one file in the original layout, VAEs by name, and LoRAs that reach into the text encoders."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from original import open_clip, original, unet_names, vae_tensors, write_original
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline, tiny_vae
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.errors import UserError
from diffalign.eval.prompts import Prompt
from diffalign.families import Model, detect, load_model, single
from diffalign.families.known import KNOWN, Known, meta_network
from diffalign.families.single import clip_tokenizer, predicts_noise, recognise
from diffalign.pipelines.sample import SampleSpec, sample
from diffalign.recipe import LoraFile, ModelRecipe

CPU = torch.device("cpu")
MAKE: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": tiny_pipeline,
    "sd2": tiny_sd2_pipeline,
    "sdxl": tiny_sdxl_pipeline,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path: Path | str, **options: object) -> Model:
    return load_model(ModelRecipe(path=str(path), **options), CPU, torch.float32)


@torch.no_grad()
def outputs(model: Model) -> list[Tensor]:
    """A prediction, the text and a decoded picture."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    cond = model.sized(model.encode_prompts(["a cat", "two dogs"]), 64, 64)
    return [model.call_unet(model.unet, x, 400, cond), cond.embeds, model.decode(x)]


@pytest.mark.parametrize("family", MAKE)
def test_a_file_predicts_what_its_folder_does(family: str, tmp_path: Path, cache: Path) -> None:
    pipeline = MAKE[family]()
    pipeline.save_pretrained(tmp_path / "m")
    file = write_original(pipeline, family, tmp_path / "model.safetensors")
    ours, theirs = load(file, config=str(tmp_path / "m")), load(tmp_path / "m")
    assert ours.family == family and ours.source == str(file)
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b)
    assert ours.scheduler_config["prediction_type"] == theirs.scheduler_config["prediction_type"]
    made = [p for p in (cache / "models").iterdir() if p.is_dir()]
    stamp = made[0].stat().st_mtime_ns
    load(file, config=str(tmp_path / "m"))
    assert len(made) == 1 and made[0].stat().st_mtime_ns == stamp, "converted once"


def small_known(family: str, monkeypatch: pytest.MonkeyPatch) -> DiffusionPipeline:
    """The family's known configs made small (real vocabulary), and a pipeline of exactly these sizes."""
    pipeline = MAKE[family]()
    networks: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, (kind, _) in KNOWN[family].networks.items():
        network = getattr(pipeline, name)
        if name.startswith("text_encoder"):
            config = {**network.config.to_dict(), "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
            config = {k: v for k, v in config.items() if k not in ("architectures", "dtype", "transformers_version")}
            make = CLIPTextModel if kind == "CLIPTextModel" else CLIPTextModelWithProjection
            setattr(pipeline, name, make(CLIPTextConfig(**config)).eval())
        else:
            config = {k: v for k, v in network.config.items() if not k.startswith("_")}
        networks[name] = (kind, config)
    old = KNOWN[family]
    monkeypatch.setitem(single.KNOWN, family, Known(family, networks, 64, old.prediction, 77, old.pooled))
    pipeline.tokenizer = clip_tokenizer("!" if family == "sd2" else "<|endoftext|>")
    if family == "sdxl":
        pipeline.tokenizer_2 = clip_tokenizer("!")
    return pipeline


@pytest.mark.parametrize("family", MAKE)
def test_a_file_alone_is_enough(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder of configs and without a network: known configs, shipped merges; sampling takes it too."""
    pipeline = small_known(family, monkeypatch)
    file = write_original(pipeline, family, tmp_path / "model.safetensors")
    pipeline.save_pretrained(tmp_path / "m")
    ours, theirs = load(file), load(tmp_path / "m")
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b)
    expected = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
    assert ours.denoiser().prediction == expected[family]
    assert ours.scheduler_config["beta_schedule"] == "scaled_linear" and ours.scheduler_config["steps_offset"] == 1
    if family == "sdxl":
        assert ours.tokenizer_2.pad_token_id == 0 and ours.tokenizer.pad_token_id == 49407
        sample(SampleSpec(str(file), steps=2), [Prompt("a", "a cat")], tmp_path / "out", progress=False)
        assert len(list((tmp_path / "out" / "images").iterdir())) == 1


@pytest.mark.parametrize("family", MAKE)
def test_the_real_networks_have_the_names_of_the_original_files(family: str) -> None:
    """Full-size SD1.5, SD2.1 and SDXL without memory: diffusers' converter gives back every tensor."""
    unet, vae = meta_network(family), meta_network(family, "vae")
    names = unet_names(unet)
    state = {f"model.diffusion_model.{names[k]}": v for k, v in unet.state_dict().items()}
    state |= {f"first_stage_model.{k}": v for k, v in vae_tensors(vae).items()}
    for network, found in (
        (unet, convert_ldm_unet_checkpoint(state, dict(unet.config))),
        (vae, convert_ldm_vae_checkpoint(state, dict(vae.config))),
    ):
        wanted = {k: v.shape for k, v in network.state_dict().items()}
        assert {k: v.shape for k, v in found.items()} == wanted
    if family == "sdxl":
        tower = open_clip(meta_network(family, "text_encoder_2"))
        assert tower["transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
        assert tower["text_projection"].shape == (1280, 1280) and "model.diffusion_model.label_emb.0.0.weight" in state
        assert "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight" in state


def test_the_shipped_tokenizer_is_clips() -> None:
    tokenizer = clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a photo of a dog!").input_ids == [49406, 320, 1125, 539, 320, 1929, 256, 49407]


def test_marker_tensors_say_v(tmp_path: Path) -> None:
    file = write_original(
        tiny_sdxl_pipeline(), "sdxl", tmp_path / "m.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0)
    )
    folder, family = detect(ModelRecipe(path=str(file)))
    assert family == "sdxl"
    assert folder.scheduler["prediction_type"] == "v_prediction" and folder.scheduler["rescale_betas_zero_snr"] is True


class Velocity(nn.Module):
    """A network of noise made one of v."""

    def __init__(self, unet: Any, alphas: Tensor) -> None:
        super().__init__()
        self.unet, self.alphas, self.config = unet, alphas, unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, x: Tensor, t: int, encoder_hidden_states: Tensor) -> Any:
        output = self.unet(x, t, encoder_hidden_states)
        a, s = self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()
        output.sample = a * output.sample - s * (x - s * output.sample) / a
        return output


def test_noise_is_told_from_v_by_what_the_network_does() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(str(single.resources.files("diffalign.assets") / "tiny-sd"))
    assert predicts_noise(pipeline)
    pipeline.unet = Velocity(pipeline.unet, pipeline.scheduler.alphas_cumprod)
    assert not predicts_noise(pipeline)


def shapes(**more: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in more.items()}


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "lora": (shapes(**{"lora_unet_down.lora_down.weight": (4, 4)}), "is a LoRA, not a model"),
    "vae": (shapes(**{"first_stage_model.encoder.conv_in.weight": (4, 4)}), "give it as model.vae"),
    "flux": (shapes(**{"double_blocks.0.img_attn.qkv.weight": (4, 4)}), "is a transformer"),
    "unet": (shapes(**{"down_blocks.0.resnets.0.conv1.weight": (4, 4)}), "one network of a diffusers folder"),
    "other": (shapes(x=(4,)), "no Stable Diffusion checkpoint"),
    "inpainting": (shapes(**{FIRST: (8, 9, 3, 3)}), "takes 9 input channels"),
    "no text": (shapes(**{FIRST: (8, 4, 3, 3)}), "has no text encoder in it"),
    "refiner": (shapes(**{FIRST: (8, 4, 3, 3), "conditioner.embedders.0.model.x": (1,)}), "is an SDXL refiner"),
    "no vae": (shapes(**{FIRST: (8, 4, 3, 3), "cond_stage_model.transformer.x": (1,)}), "has no VAE in it"),
    "edm": (shapes(**{FIRST: (8, 4, 3, 3), "edm_mean": (4,)}), "is an EDM model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_base_is_refused_by_its_tensors(case: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        detect(ModelRecipe(path=str(tmp_path / "x.safetensors")))
    assert "\n" not in str(caught.value)


def test_more_refusals(tmp_path: Path, tiny_model_folder: Path) -> None:
    pipeline = tiny_pipeline()
    state = original(pipeline, "sd1")
    coarse = {FIRST: state[FIRST].to(torch.float8_e4m3fn)}
    save_file({**state, **coarse}, tmp_path / "f8.safetensors")
    with pytest.raises(UserError, match="too coarse to train from"):
        recognise(tmp_path / "f8.safetensors")
    file = write_original(pipeline, "sd1", tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"of other sizes than SD1.x's base; set model.config"):
        load(file)
    with pytest.raises(UserError, match=r"model.config 'nowhere' is no folder"):
        load(file, config="nowhere")
    with pytest.raises(UserError, match=r"model.config 'tiny-sdxl' is sdxl, and|model.config 'tiny-sdxl' is no folder"):
        load(file, config="tiny-sdxl")
    with pytest.raises(UserError, match=r"model.config is for single files"):
        load(tiny_model_folder, config=str(tiny_model_folder))
    with pytest.raises(UserError, match=r"is sd1, not sdxl"):
        load(file, config=str(tiny_model_folder), family="sdxl")
    (tmp_path / "x.gguf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is a .gguf file"):
        load(tmp_path / "x.gguf")
    for layer in ("middle_block.1.norm", "text_model.encoder.layers.1.mlp.fc1", "decoder.conv_out"):
        save_file({k: v for k, v in state.items() if layer not in k}, tmp_path / "cut.safetensors")
        with pytest.raises(UserError, match=r"lacks some of its tensors; download it again"):
            load(tmp_path / "cut.safetensors", config=str(tiny_model_folder))


class Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle ran",))


def test_pickles_are_read_only_when_they_hold_tensors(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = original(tiny_pipeline(), "sd1")
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    found = load(tmp_path / "m.ckpt", config=str(tiny_model_folder))
    torch.testing.assert_close(outputs(found)[0], outputs(load(tiny_model_folder))[0])
    torch.save({"state_dict": state, "callbacks": Surprise()}, tmp_path / "bad.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Surprise()))
    for name in ("bad", "old"):
        with pytest.raises(UserError, match="a pickle that torch does not load safely"):
            load(tmp_path / f"{name}.ckpt", config=str(tiny_model_folder))
    assert "ran" not in capsys.readouterr().out


def test_another_vae_by_folder_and_by_file(tmp_path: Path, tiny_sdxl_folder: Path) -> None:
    torch.manual_seed(9)
    vae = tiny_vae(scaling_factor=0.13025, force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    save_file(vae_tensors(vae), tmp_path / "vae.safetensors")
    own = load(tiny_sdxl_folder)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = vae.decode(x / 0.13025).sample.clamp(-1, 1)
    hashes = {own.fingerprint("vae")["vae"]}
    for name in ("vae", "vae.safetensors"):
        other = load(tiny_sdxl_folder, vae=str(tmp_path / name))
        torch.testing.assert_close(other.decode(x), wanted)
        assert (other.decode(x) - own.decode(x)).abs().max() > 1e-2
        assert other.pipeline().vae is other.vae
        hashes.add(other.fingerprint("vae")["vae"])
    assert len(hashes) > 1, "the cache must not mix the latents of two VAEs"
    assert load(tiny_sdxl_folder, vae=str(tiny_sdxl_folder)).fingerprint("vae") == own.fingerprint("vae")


def test_a_half_vae_only_where_it_does_not_overflow(tmp_path: Path, tiny_sdxl_folder: Path) -> None:
    """SDXL's own says ``force_upcast``; the one that is fixed for fp16 does not."""
    tiny_vae(scaling_factor=0.13025, force_upcast=False).save_pretrained(tmp_path / "fixed")
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    assert load(tiny_sdxl_folder, vae_dtype="fp16").vae.dtype == torch.float32
    assert load(tiny_sdxl_folder).vae.dtype == torch.float32
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        half = load(tiny_sdxl_folder, vae=str(tmp_path / "fixed"), vae_dtype=name)
        mean, std = half.encode_images(pixels)
        assert half.vae.dtype == dtype and mean.dtype == std.dtype == half.decode(mean).dtype == torch.float32
    exact = load(tiny_sdxl_folder, vae=str(tmp_path / "fixed")).encode_images(pixels)[0]
    assert 0 < (mean - exact).abs().max() < 0.05


def test_unfit_vaes_are_refused(tmp_path: Path, tiny_sdxl_folder: Path) -> None:
    for name, message in (("nowhere", "does not exist"), (str(tmp_path), "lacks"), ("tiny-sd", "has 3 levels and")):
        with pytest.raises(UserError, match=message):
            load(tiny_sdxl_folder, vae=name)
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is no VAE: it has no encoder"):
        load(tiny_sdxl_folder, vae=str(tmp_path / "x.safetensors"))


def text_loras(pipeline: StableDiffusionXLPipeline) -> dict[str, tuple[LoraConfig, dict[str, Tensor]]]:
    """An adapter on the attention of each text encoder and of the U-Net, far from zero."""
    out = {}
    generator = torch.Generator().manual_seed(0)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        network = getattr(pipeline, name)
        layers = ["to_q"] if name == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        config = LoraConfig(r=2, lora_alpha=2, target_modules=layers)
        network.add_adapter(config, adapter_name="made")
        for key, parameter in network.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        out[name] = (config, {k: v.clone() for k, v in get_peft_model_state_dict(network, adapter_name="made").items()})
    return out


def kohya_names(made: dict[str, tuple[LoraConfig, dict[str, Tensor]]], alpha: float) -> dict[str, Tensor]:
    heads = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    state: dict[str, Tensor] = {}
    for part, (_, tensors) in made.items():
        for key, tensor in tensors.items():
            layer, _, side = key.partition(".lora_")
            if part == "text_encoder":
                layer = f"text_model.{layer.removeprefix('text_model.')}"
            name = f"{heads[part]}_{layer.replace('.', '_')}"
            state[f"{name}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = tensor.contiguous()
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_with_text_encoder_parts_is_fused(layout: str, tmp_path: Path, tiny_sdxl_folder: Path) -> None:
    """W + scale * alpha / rank * B A in U-Net and both encoders, and new text follows."""
    made = text_loras(StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder))
    alpha = 2.0 if layout == "diffusers" else 1.0
    if layout == "diffusers":
        layers = {
            "unet_lora_layers": made["unet"][1],
            "text_encoder_lora_layers": made["text_encoder"][1],
            "text_encoder_2_lora_layers": made["text_encoder_2"][1],
        }
        StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers)
    else:
        save_file(kohya_names(made, alpha), tmp_path / "pytorch_lora_weights.safetensors")
    base = load(tiny_sdxl_folder)
    fused = load(tiny_sdxl_folder, loras=[LoraFile(path=str(tmp_path), scale=0.5)])
    for part, (_, tensors) in made.items():
        before, after = getattr(base, part).state_dict(), getattr(fused, part).state_dict()
        for key, down in tensors.items():
            layer, found, _ = key.partition(".lora_A.weight")
            if found:
                change = 0.5 * alpha / 2 * tensors[f"{layer}.lora_B.weight"] @ down
                assert change.abs().max() > 0.05
                torch.testing.assert_close(after[f"{layer}.weight"], before[f"{layer}.weight"] + change)
    a, b = base.encode_prompts(["a cat"]), fused.encode_prompts(["a cat"])
    assert (a.embeds - b.embeds).abs().max() > 1e-3
    assert (a.added["text_embeds"] - b.added["text_embeds"]).abs().max() > 1e-3
    assert "loras" in fused.fingerprint() and not any("lora" in k for k in fused.text_encoder_2.state_dict())


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2.q_proj", "q_proj", "te1", "mlp.fc1", "lora_te2_x"])
def test_adapters_on_text_encoders_are_refused(name: str, tiny_sdxl_folder: Path) -> None:
    with pytest.raises(UserError, match="text encoders stay as they are") as caught:
        load(tiny_sdxl_folder).lora_targets(["to_q", name])
    assert "\n" not in str(caught.value) and name in str(caught.value)
