"""The SD1.x family: every way a folder may come, encoding as the base pipeline does it, LoRA layers, fusing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import write_tiny_model

from diffalign.errors import UserError
from diffalign.families import Model, detect, load_model, pick_device, pick_dtype, save_lora
from diffalign.families.attention import set_attention
from diffalign.families.folder import builtin_models, open_folder
from diffalign.families.targets import lora_targets
from diffalign.recipe import LoraFile, ModelRecipe

CPU = torch.device("cpu")
LONG = "abcdefghij" * 10  # 100 letters, 102 tokens


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load(tiny_model_folder)


def load(folder: Path | str, dtype: torch.dtype = torch.float32, **options: object) -> Model:
    return load_model(ModelRecipe(path=str(folder), **options), CPU, dtype)


def plain(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def some_lora(
    folder: Path, model: Model, targets: str = "all", rank: int = 4, alpha: float = 12, seed: int = 0
) -> Path:
    """A LoRA with weights of some size, made by peft on another copy of the U-Net, saved by diffalign."""
    unet = UNet2DConditionModel.from_config(model.unet.config)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=model.lora_targets(targets))
    unet.add_adapter(config, adapter_name="made")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return save_lora(get_peft_model_state_dict(unet, adapter_name="made"), config, folder).parent


def test_the_model_says_what_it_is(model: Model, tiny_model_folder: Path) -> None:
    assert (model.family, model.source) == ("sd1", str(tiny_model_folder))
    assert (model.factor, model.default_resolution, model.latent_size(64, 96)) == (8, 64, (8, 12))
    assert model.scheduler_config["beta_schedule"] == "scaled_linear"
    assert model.denoiser().prediction == "epsilon"
    assert not any(p.requires_grad for part in (model.unet, model.vae, model.text_encoder) for p in part.parameters())
    with pytest.raises(UserError, match="height 60 is not a multiple of 8"):
        model.latent_size(60, 64)


def test_text_is_encoded_as_the_pipeline_does_it(model: Model, tiny_model_folder: Path) -> None:
    prompts = ["a red cat", "", LONG]
    embeds, negative = plain(tiny_model_folder).encode_prompt(prompts, "cpu", 1, True)
    torch.testing.assert_close(model.encode_prompts(prompts, batch=2).embeds, embeds)
    torch.testing.assert_close(model.uncond(3).embeds, negative)
    assert len(model.encode_prompts([])) == 0


def test_lost_tokens_are_counted(model: Model) -> None:
    assert model.token_overflow(["a" * 75, "a" * 76, LONG, ""]) == [0, 1, 25, 0]
    assert model.token_overflow([]) == []


def test_latents_are_scaled_mean_and_std(model: Model) -> None:
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode_images(pixels, batch=2)
    with torch.no_grad():
        posterior = model.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, posterior.mean * 0.18215)
        torch.testing.assert_close(std, posterior.std * 0.18215)
        decoded = model.vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(mean, batch=2), decoded, atol=1e-5, rtol=1e-5)


def test_a_batch_of_calls_is_a_loop_of_singles(model: Model) -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1, 500, 999])
    cond = model.encode_prompts(["a", "b", "c"])
    with torch.no_grad():
        batch = model.call_unet(model.unet, x, t, cond)
        for i in range(3):
            single = model.call_unet(model.unet, x[i : i + 1], int(t[i]), cond.take([i]))
            torch.testing.assert_close(batch[i : i + 1], single, atol=1e-5, rtol=1e-5)


def test_a_bf16_base_keeps_fp32_encoders_and_gives_fp32_predictions(model: Model, tiny_model_folder: Path) -> None:
    half = load(tiny_model_folder, torch.bfloat16, channels_last=True)
    assert half.unet.dtype == torch.bfloat16 and half.vae.dtype == half.text_encoder.dtype == torch.float32
    assert half.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        output = half.call_unet(half.unet, x, 500, half.uncond(2))
        exact = model.call_unet(model.unet, x, 500, model.uncond(2))
    assert output.dtype == torch.float32
    assert 0 < (output - exact).abs().max() < 0.1
    pipeline = half.pipeline("ddim")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet is half.unet
    assert pipeline("a cat", num_inference_steps=2).images[0].size == (64, 64)
    assert half.vae.dtype == torch.float32


@pytest.mark.parametrize("how", ["fp16", "sharded", "fp16 sharded", "late variant name"])
def test_variants_and_shards(how: str, tmp_path: Path, tiny_model_folder: Path, model: Model) -> None:
    variant = "fp16" if how != "sharded" else None
    write_tiny_model(tmp_path / "m", variant=variant, max_shard_size="100KB" if "sharded" in how else "10GB")
    names = [f.name for f in (tmp_path / "m" / "unet").glob("*.safetensors")]
    assert len(names) > 1 if "sharded" in how else names == [f"diffusion_pytorch_model.{variant}.safetensors"]
    if how == "late variant name":  # beside it, the weights of another model without a variant
        other = write_tiny_model(tmp_path / "other", seed=5)
        for part, name in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        ):
            shutil.copy(other / part / f"{name}.safetensors", tmp_path / "m" / part)
    loaded = load(tmp_path / "m", variant=variant)
    tolerance = 0 if variant is None else 1e-3
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(model, part).state_dict()
        for name, tensor in getattr(loaded, part).state_dict().items():
            torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance)
    same = loaded.fingerprint() == model.fingerprint()
    assert same == (variant is None), "the split into shards does not matter, the number format does"


def test_a_hub_id_is_found_in_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    from huggingface_hub import constants

    for commit, seed in (("a" * 40, 0), ("b" * 40, 3)):
        folder = tmp_path / "models--maker--tiny" / "snapshots" / commit
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_tiny_model(folder, seed=seed)
    refs = tmp_path / "models--maker--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    (refs / "second").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    main, second = load("maker/tiny"), load("maker/tiny", revision="second")
    assert main.fingerprint() == load(tiny_model_folder).fingerprint()
    assert main.fingerprint("unet") != second.fingerprint("unet")
    with pytest.raises(UserError, match="maker/other"):
        load("maker/other")


def test_builtin_models_open_by_name() -> None:
    assert "tiny-sd" in builtin_models()
    for name in builtin_models():
        assert detect(ModelRecipe(path=name))[0].path.name == name
    with pytest.raises(UserError, match=r"does not exist.*did you mean 'tiny-sd'"):
        open_folder("tiny-sdd")
    model = load("tiny-sd")
    assert model.encode_prompts(["a red circle"]).embeds.shape[-1] == model.unet.config.cross_attention_dim


def test_fingerprint_follows_the_weights(tmp_path: Path, tiny_model_folder: Path, model: Model) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "m")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, file)
    changed = load(folder).fingerprint()
    differing = {part for part, value in model.fingerprint().items() if changed[part] != value}
    assert differing == {"vae"}
    assert set(changed) == {"unet", "vae", "text_encoder", "tokenizer"}
    config = folder / "unet" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "_diffusers_version": "0.1"}))
    assert load(folder).fingerprint("unet") == model.fingerprint("unet")
    config.write_text(json.dumps({**values, "sample_size": 16}))
    assert load(folder).fingerprint("unet") != model.fingerprint("unet")


# -- LoRA layers -------------------------------------------------------------------------------------------------------

SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "total", "preset", "layers", "millions"),
    [
        ({"sample_size": 64, "cross_attention_dim": 768}, 859_520_964, "attention", 128, 12.75),
        ({"sample_size": 64, "cross_attention_dim": 768}, 859_520_964, "all", 278, 67.25),
        (SDXL, 2_567_463_684, "attention", 560, 92.90),
        (SDXL, 2_567_463_684, "all", 788, 196.75),
    ],
)
def test_presets_on_the_real_networks(config: dict, total: int, preset: str, layers: int, millions: float) -> None:
    """Layer counts and rank-64 parameters as in the published LoRAs (787 MB for DMD2's SDXL file in fp32)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(p.numel() for p in unet.parameters()) == total
    names = lora_targets(unet, preset)
    assert len(names) == len(set(names)) == layers
    weights = [unet.get_submodule(name).weight for name in names]
    parameters = sum(64 * (w[0].numel() + w.shape[0]) for w in weights)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.005)


def test_explicit_targets(model: Model) -> None:
    attention = model.lora_targets("attention")
    assert model.lora_targets(["to_q", "to_k", "to_v", "to_out.0"]) == attention
    first = next(name for name in attention if name.endswith("attn2.to_k"))
    assert model.lora_targets([first]) == [first]
    assert all("attn1" in name for name in model.lora_targets(["attn1.to_q"]))
    assert model.lora_targets(["conv_in", "time_embedding.linear_1"]) == ["conv_in", "time_embedding.linear_1"]
    for wrong, hint in (("to_qq", "to_q"), ("attn1.to_kk", "attn1.to_k"), ("norm1", "known|did you mean")):
        with pytest.raises(UserError, match=f"no linear or convolution layer '{wrong}'.*({hint})"):
            model.lora_targets([wrong])
    with pytest.raises(UserError, match=r"unknown model.lora.targets 'attn'; did you mean 'attention'"):
        model.lora_targets("attn")
    with pytest.raises(UserError, match="empty"):
        model.lora_targets([])


def test_targets_do_not_change_once_adapters_are_in(tiny_model_folder: Path) -> None:
    fresh = load(tiny_model_folder)
    before = fresh.lora_targets("all")
    fresh.unet.add_adapter(LoraConfig(r=2, target_modules=before), adapter_name="student")
    assert fresh.lora_targets("all") == before


# -- fusing an earlier LoRA --------------------------------------------------------------------------------------------


def test_fused_loras_become_the_base(tmp_path: Path, tiny_model_folder: Path, model: Model) -> None:
    """Two LoRAs at their scales, into a bf16 base too: equal to what diffusers fuses, and free for new adapters."""
    files = [some_lora(tmp_path / str(i), model, seed=i) for i in range(2)]
    recipe = [LoraFile(path=str(files[0]), scale=0.5), LoraFile(path=str(files[1]))]
    fused = load(tiny_model_folder, loras=recipe)
    reference = plain(tiny_model_folder)
    for file, scale in zip(files, (0.5, 1.0), strict=True):
        reference.load_lora_weights(file)
        reference.fuse_lora(lora_scale=scale)
        reference.unload_lora_weights()
    moved = 0.0
    for name, tensor in reference.unet.state_dict().items():
        torch.testing.assert_close(fused.unet.state_dict()[name], tensor)
        moved = max(moved, float((tensor - model.unet.state_dict()[name]).abs().max()))
    assert moved > 0.05, "the LoRAs must do something, else nothing was tested"
    assert fused.fingerprint()["loras"].count("*") == 2 and "loras" not in model.fingerprint()
    assert not any("lora" in name for name, _ in fused.unet.named_modules())
    assert not any(p.requires_grad for p in fused.unet.parameters())
    fused.unet.add_adapter(LoraConfig(r=2, target_modules=fused.lora_targets("all")), adapter_name="student")

    half = load(tiny_model_folder, torch.bfloat16, loras=recipe)
    for name, tensor in reference.unet.state_dict().items():
        assert torch.equal(half.unet.state_dict()[name], tensor.to(torch.bfloat16)), "rounded once, after fusing"


def test_a_text_encoder_lora_changes_the_text(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Also the unconditional branch, which was already encoded before."""
    pipeline = plain(tiny_model_folder)
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "out_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipeline.text_encoder.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    state = get_peft_model_state_dict(pipeline.text_encoder)
    StableDiffusionPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=state)
    fused = load(tiny_model_folder)
    before = fused.uncond().embeds.clone()
    fused.fuse_loras([LoraFile(path=str(tmp_path), scale=0.5)])
    assert not any("lora" in name for name, _ in fused.text_encoder.named_modules())
    reference = plain(tiny_model_folder)
    reference.load_lora_weights(tmp_path)
    reference.fuse_lora(components=["text_encoder"], lora_scale=0.5)
    embeds, negative = reference.encode_prompt(["a cat"], "cpu", 1, True)
    torch.testing.assert_close(fused.encode_prompts(["a cat"]).embeds, embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.uncond().embeds, negative, atol=1e-5, rtol=1e-5)
    assert (fused.uncond().embeds - before).abs().max() > 0.05


def test_loras_that_cannot_be_fused(tmp_path: Path, tiny_model_folder: Path, model: Model) -> None:
    def refused(path: Path | str, **options: object) -> str:
        with pytest.raises(UserError) as caught:
            load(tiny_model_folder, loras=[LoraFile(path=str(path), **options)])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in refused(tmp_path / "none")
    assert "no .safetensors" in refused(tmp_path)
    good = some_lora(tmp_path / "good", model)
    assert "no other.safetensors" in refused(good, weight_name="other.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((good / "pytorch_lora_weights.safetensors").read_bytes()[:-100])
    assert "damaged" in refused(torn)
    pickled = tmp_path / "lora.bin"
    pickled.write_bytes(b"x")
    assert "only .safetensors" in refused(pickled)
    weights = load_file(good / "pytorch_lora_weights.safetensors")
    strange = tmp_path / "strange.safetensors"
    save_file({k.replace("down_blocks.0", "down_blocks.7"): v for k, v in weights.items()}, strange)
    assert "another network" in refused(strange)
    wide = tmp_path / "wide.safetensors"
    save_file({k: v.repeat(1, 2, *[1] * (v.ndim - 2)) if "lora_A" in k else v for k, v in weights.items()}, wide)
    assert "does not fit" in refused(wide)
    other = tmp_path / "other.safetensors"
    save_file({"transformer." + k: v for k, v in weights.items()}, other)
    assert "no layer for this model" in refused(other)


# -- devices, dtypes, attention ----------------------------------------------------------------------------------------


def test_devices_and_dtypes() -> None:
    assert pick_device("cpu") == CPU
    assert pick_dtype("auto", CPU) == torch.float32 and pick_dtype("bf16", CPU) == torch.bfloat16
    if not torch.cuda.is_available():
        assert pick_device("auto").type in {"cpu", "mps"}
        with pytest.raises(UserError, match="'cuda' was asked for"):
            pick_device("cuda")
    with pytest.raises(UserError, match="unknown device"):
        pick_device("tpu")
    with pytest.raises(UserError, match="unknown dtype"):
        pick_dtype("fp8", CPU)


def test_attention_kernels_need_their_gpu(tiny_model_folder: Path) -> None:
    for name in ("flash", "xformers"):
        with pytest.raises(UserError, match=f"{name} needs a CUDA GPU"):
            load(tiny_model_folder, attention=name)
    model = load(tiny_model_folder, attention="sdpa")
    assert all(isinstance(p, AttnProcessor2_0) for p in model.unet.attn_processors.values())
    with pytest.raises(UserError, match=r"unknown model.attention"):
        set_attention(model.unet, "fast", CPU)


def test_scheduler_config_is_the_models_own(tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "m")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    assert load(folder).denoiser().prediction == "v_prediction"
