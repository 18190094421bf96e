"""kohya's names on the real module trees, and files that plain diffusers reads back layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import tiny_unet
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.families.known import KNOWN, meta_network
from diffalign.families.kohya import kohya_metadata, kohya_names, to_kohya
from diffalign.families.lora import LoraWeights, read_lora
from diffalign.families.targets import adaptable, lora_targets

# (family, layers of the tree, parameters in millions as published: 0.86, 0.87 and 2.57 billion)
REAL = [("sd1", 282, 859.5), ("sd2", 282, 865.9), ("sdxl", 794, 2567.5)]
# A layer and, below it, its name as sd-scripts' files have it; diffusers' reader is the second witness.
DIFFUSERS_NAMES = """
down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q
  down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0
  mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0
up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj
  up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj
down_blocks.1.attentions.1.proj_in
  down_blocks_1_attentions_1_proj_in
up_blocks.0.resnets.0.conv_shortcut
  up_blocks_0_resnets_0_conv_shortcut
down_blocks.2.downsamplers.0.conv
  down_blocks_2_downsamplers_0_conv
"""
ORIGINAL_NAMES = """
down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q
  input_blocks_4_1_transformer_blocks_0_attn1_to_q
down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v
  input_blocks_8_1_transformer_blocks_9_attn2_to_v
mid_block.attentions.0.transformer_blocks.3.ff.net.2
  middle_block_1_transformer_blocks_3_ff_net_2
up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0
  output_blocks_0_1_transformer_blocks_0_attn1_to_out_0
up_blocks.1.attentions.2.proj_out
  output_blocks_5_1_proj_out
down_blocks.0.resnets.0.conv1
  input_blocks_1_0_in_layers_2
down_blocks.1.resnets.0.time_emb_proj
  input_blocks_4_0_emb_layers_1
down_blocks.2.resnets.1.conv2
  input_blocks_8_0_out_layers_3
down_blocks.1.resnets.0.conv_shortcut
  input_blocks_4_0_skip_connection
down_blocks.0.downsamplers.0.conv
  input_blocks_3_0_op
mid_block.resnets.1.conv1
  middle_block_2_in_layers_2
up_blocks.0.upsamplers.0.conv
  output_blocks_2_2_conv
up_blocks.2.resnets.2.conv_shortcut
  output_blocks_8_0_skip_connection
time_embedding.linear_2
  time_embed_2
add_embedding.linear_1
  label_emb_0_0
conv_in
  input_blocks_0_0
conv_out
  out_2
"""
GOLDEN = {
    family: dict(zip(*[iter(text.split())] * 2, strict=True))
    for family, text in {"sd1": DIFFUSERS_NAMES, "sd2": DIFFUSERS_NAMES, "sdxl": ORIGINAL_NAMES}.items()
}


def shapes(unet: nn.Module, layer: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    weight = unet.get_submodule(layer).weight
    return (rank, *weight.shape[1:]), (weight.shape[0], rank, *[1] * (weight.ndim - 2))


def adapter(unet: nn.Module, layers: list[str], rank: int = 1) -> dict[str, Tensor]:
    """Peft's names; B is unlike for each layer."""
    state: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        down, up = shapes(unet, layer, rank)
        state[f"{layer}.lora_A.weight"] = torch.zeros(down, dtype=torch.float16)
        state[f"{layer}.lora_B.weight"] = torch.full(up, float(number), dtype=torch.float16)
    return state


def weights(state: Mapping[str, Tensor], **options: object) -> LoraWeights:
    layers = [name.removesuffix(".lora_A.weight") for name in state if "lora_A" in name]
    return LoraWeights(dict(state), LoraConfig(target_modules=layers, **options))


@pytest.mark.parametrize(("family", "count", "millions"), REAL)
def test_every_layer_of_the_real_network_has_one_name_that_diffusers_reads_back(
    family: str, count: int, millions: float, tmp_path: Path
) -> None:
    unet = meta_network(family)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    layers = adaptable(unet)
    assert len(layers) == count and set(lora_targets(unet, "all")) < set(layers)
    names = kohya_names(layers, family, unet.config)
    assert len(set(names.values())) == count
    for layer, name in GOLDEN[family].items():
        assert names[layer] == f"lora_unet_{name}"
    sgm = any("input_blocks" in name for name in names.values())
    assert sgm == (family == "sdxl") and not any("." in name for name in names.values())

    file = tmp_path / "lora.safetensors"
    save_file(to_kohya(weights(adapter(unet, layers), r=1, lora_alpha=1.0), family, unet.config), file)
    back = read_lora(file, unet)  # by diffusers' own converter
    assert set(back.layers) == set(layers)
    for number, layer in enumerate(layers):
        assert back.up(layer).flatten()[0] == number, layer
        assert (back.down(layer).shape, back.up(layer).shape) == shapes(unet, layer, 1)


def test_alpha_is_kept_and_rslora_is_folded_into_it(tmp_path: Path) -> None:
    unet = tiny_unet()
    layers = lora_targets(unet, "all")
    for options, alpha in (
        ({"r": 4, "lora_alpha": 1.0}, 1.0),
        ({"r": 4, "lora_alpha": 9.0}, 9.0),
        ({"r": 4, "lora_alpha": 8.0, "use_rslora": True}, 16.0),
    ):
        lora = weights(adapter(unet, layers, 4), **options)
        save_file(to_kohya(lora, "sd1", unet.config), tmp_path / "a.safetensors")
        stored = load_file(tmp_path / "a.safetensors")
        assert {float(v) for k, v in stored.items() if k.endswith(".alpha")} == {alpha}
        back = read_lora(tmp_path / "a.safetensors", unet)
        assert set(back.alphas.values()) == {alpha} == set(lora.alphas.values())


def test_layers_with_a_rank_or_alpha_of_their_own(tmp_path: Path) -> None:
    """diffusers misreads alphas that differ, so they are made alike; the change of every layer stays."""
    unet = tiny_unet()
    layers = lora_targets(unet, "attention")
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for layer in layers:
        down, up = shapes(unet, layer, 2 if layer.endswith("to_k") else 4)
        state |= {f"{layer}.lora_A.weight": torch.randn(down), f"{layer}.lora_B.weight": torch.randn(up)}
    lora = weights(state, r=4, lora_alpha=8.0, rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 3.0}, use_rslora=True)
    save_file(to_kohya(lora, "sd1", unet.config), tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert len({float(v) for k, v in stored.items() if k.endswith(".alpha")}) == 1
    back = read_lora(tmp_path / "a.safetensors", unet)
    for layer in layers:
        rank = lora.ranks[layer]
        wanted = lora.alphas[layer] / rank * (lora.up(layer) @ lora.down(layer))
        found = back.alphas[layer] / rank * (back.up(layer) @ back.down(layer))
        assert torch.allclose(found, wanted, atol=1e-5), layer


def test_metadata_that_readers_choose_by() -> None:
    unet = meta_network("sdxl")
    lora = weights(adapter(unet, ["conv_in"], 4), r=4, lora_alpha=2.0)
    found = kohya_metadata(lora, "sdxl", "epsilon", 1024, "cats")
    assert found["ss_base_model_version"] == "sdxl_base_v1-0" and found["ss_v2"] == "False"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2")
    assert found["ss_network_args"] == '{"conv_dim": "4", "conv_alpha": "2"}'
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["modelspec.resolution"] == "1024x1024" and found["modelspec.prediction_type"] == "epsilon"
    second = kohya_metadata(lora, "sd2", "v_prediction", 768, "cats")
    assert second["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert second["ss_base_model_version"] == "sd_v2_v" and second["ss_v2"] == "True"
    assert all(isinstance(value, str) for value in {**found, **second}.values())


def test_what_the_format_cannot_hold() -> None:
    unet = meta_network("sdxl")
    with pytest.raises(UserError, match="DoRA"):
        to_kohya(weights(adapter(unet, ["conv_in"]), r=1, use_dora=True), "sdxl", unet.config)
    with pytest.raises(UserError, match="no name for the layer"):
        kohya_names(["down_blocks.0.resnets.0.norm9"], "sdxl", unet.config)
    with pytest.raises(UserError, match="not built as SDXL"):
        kohya_names(["conv_in"], "sdxl", {**unet.config, "layers_per_block": [2, 2, 2]})
    assert KNOWN["sdxl"].unet["layers_per_block"] == 2


def test_a_lora_of_another_network_is_refused(tmp_path: Path) -> None:
    small = tiny_unet()
    layers = lora_targets(small, "attention")
    save_file(to_kohya(weights(adapter(small, layers), r=1), "sd1", small.config), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="for another network"):
        read_lora(tmp_path / "a.safetensors", tiny_unet(cross=24))
    save_file({"nothing": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds no LoRA"):
        read_lora(tmp_path / "b.safetensors", small)
    (tmp_path / "c.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        read_lora(tmp_path / "c.safetensors", small)
