"""ImageReward and the aesthetic head on random weights in the published layouts, against plain torch written here."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eval_tiny import golden, write_tiny_clip
from PIL import Image

from diffalign.errors import UserError
from diffalign.eval.preprocess import P1
from diffalign.eval.scorers import load_scorer
from diffalign.eval.scorers.aesthetic import Aesthetic
from diffalign.eval.scorers.imagereward import HEAD, MEAN, STD, ImageReward

State = dict[str, torch.Tensor]
EYES, WORDS, LAYERS, TEXT_HEADS, VOCAB, SIDE, PATCH = 128, 64, 2, 4, 60, 32, 8  # width 128: two heads of 64
STACK = (64, 32, 16, 8, 4, 1)
PROMPTS = ["a cat", "two dogs on a mat", "x", "a red circle", "b"]


def reward_state(seed: int = 0) -> State:
    """The tensors of ImageReward.pt at toy sizes, by their published names."""
    draw = torch.Generator().manual_seed(seed)
    state: State = {}

    def linear(name: str, into: int, out: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, generator=draw) * into**-0.5
        state[f"{name}.bias"] = torch.randn(out, generator=draw) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=draw)

    eyes, text = "blip.visual_encoder", "blip.text_encoder"
    state[f"{eyes}.cls_token"] = torch.randn(1, 1, EYES, generator=draw)
    state[f"{eyes}.pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, EYES, generator=draw)
    linear(f"{eyes}.patch_embed.proj", 3 * PATCH * PATCH, EYES)
    state[f"{eyes}.patch_embed.proj.weight"] = state[f"{eyes}.patch_embed.proj.weight"].view(EYES, 3, PATCH, PATCH)
    norm(f"{eyes}.norm", EYES)
    for i in range(LAYERS):
        block = f"{eyes}.blocks.{i}"
        norm(f"{block}.norm1", EYES), norm(f"{block}.norm2", EYES)
        linear(f"{block}.attn.qkv", EYES, 3 * EYES), linear(f"{block}.attn.proj", EYES, EYES)
        linear(f"{block}.mlp.fc1", EYES, 4 * EYES), linear(f"{block}.mlp.fc2", 4 * EYES, EYES)
    state[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(VOCAB + 2, WORDS, generator=draw)
    state[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(64, WORDS, generator=draw)
    state[f"{text}.embeddings.position_ids"] = torch.arange(64)[None]
    norm(f"{text}.embeddings.LayerNorm", WORDS)
    for i in range(LAYERS):
        layer = f"{text}.encoder.layer.{i}"
        for kind, into in (("attention", WORDS), ("crossattention", EYES)):
            linear(f"{layer}.{kind}.self.query", WORDS, WORDS)
            linear(f"{layer}.{kind}.self.key", into, WORDS), linear(f"{layer}.{kind}.self.value", into, WORDS)
            linear(f"{layer}.{kind}.output.dense", WORDS, WORDS), norm(f"{layer}.{kind}.output.LayerNorm", WORDS)
        linear(f"{layer}.intermediate.dense", WORDS, 4 * WORDS), linear(f"{layer}.output.dense", 4 * WORDS, WORDS)
        norm(f"{layer}.output.LayerNorm", WORDS)
    linear("blip.vision_proj", EYES, 8), linear("blip.text_proj", WORDS, 8)
    for number, (into, out) in zip((0, 2, 4, 6, 7), itertools.pairwise(STACK), strict=True):
        linear(f"mlp.layers.{number}", into, out)
    return state


def write_reward(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({"num_attention_heads": TEXT_HEADS, "hidden_size": WORDS}))
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), "cat", "dog", "red"]
    (folder / "vocab.txt").write_text("\n".join(words[:VOCAB]) + "\n")
    return folder


def plain_reward(s: State, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ImageReward in plain torch from its own names: pre-norm ViT (eps 1e-6), post-norm BERT (1e-12), head, (N,)."""

    def lin(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def ln(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, bias: torch.Tensor | float
    ) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weight = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return (weight @ v).transpose(1, 2).flatten(2)

    e = "blip.visual_encoder"
    x = F.conv2d(pixels, s[f"{e}.patch_embed.proj.weight"], s[f"{e}.patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([s[f"{e}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + s[f"{e}.pos_embed"]
    for i in range(LAYERS):
        b = f"{e}.blocks.{i}"
        q, k, v = lin(f"{b}.attn.qkv", ln(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + lin(f"{b}.attn.proj", attend(q, k, v, EYES // 64, 0.0))
        x = x + lin(f"{b}.mlp.fc2", F.gelu(lin(f"{b}.mlp.fc1", ln(f"{b}.norm2", x, 1e-6))))
    seen = ln(f"{e}.norm", x, 1e-6)
    t = "blip.text_encoder"
    y = s[f"{t}.embeddings.word_embeddings.weight"][ids]
    y = ln(f"{t}.embeddings.LayerNorm", y + s[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]], 1e-12)
    hide = (1 - mask[:, None, None].float()) * -10000
    for i in range(LAYERS):
        for kind, other, bias in (("attention", None, hide), ("crossattention", seen, 0.0)):
            p = f"{t}.encoder.layer.{i}.{kind}"
            source = y if other is None else other
            got = attend(
                lin(f"{p}.self.query", y),
                lin(f"{p}.self.key", source),
                lin(f"{p}.self.value", source),
                TEXT_HEADS,
                bias,
            )
            y = ln(f"{p}.output.LayerNorm", y + lin(f"{p}.output.dense", got), 1e-12)
        p = f"{t}.encoder.layer.{i}"
        y = ln(f"{p}.output.LayerNorm", y + lin(f"{p}.output.dense", F.gelu(lin(f"{p}.intermediate.dense", y))), 1e-12)
    value = y[:, 0]
    for name in HEAD:
        value = lin(name, value)
    return (value[:, 0] - MEAN) / STD


@pytest.fixture(scope="module")
def state() -> State:
    return reward_state()


@pytest.fixture(scope="module")
def scorer(state: State, tmp_path_factory: pytest.TempPathFactory) -> ImageReward:
    folder = write_reward(tmp_path_factory.mktemp("reward"), state)
    found = load_scorer("imagereward", str(folder / "ImageReward.pt"), device="cpu")
    assert isinstance(found, ImageReward)
    return found


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [golden(*size) for size in [(40, 40), (32, 32), (33, 70), (90, 41), (227, 224)]]


@torch.no_grad()
def test_the_published_layout_gives_the_same_reward(
    scorer: ImageReward, state: State, pictures: list[Image.Image]
) -> None:
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt")
    assert tokens.input_ids[0, 0] == scorer.tokenizer.cls_token_id  # not [ENC]
    want = plain_reward(state, P1(SIDE, "torchvision")(pictures), tokens.input_ids, tokens.attention_mask)
    have = scorer(pictures, PROMPTS)
    assert torch.allclose(have, want, atol=2e-5) and float(have.std()) > 0.05
    alone = torch.cat([scorer(p, t) for p, t in zip(pictures, PROMPTS, strict=True)])
    assert torch.allclose(have, alone, atol=1e-5)
    assert scorer.preprocess_id.startswith("p1-32-torchvision") and have.dtype == torch.float32
    assert scorer.fingerprint["max_tokens"] == "35"


def test_the_head_is_one_affine_map(
    scorer: ImageReward, state: State, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    x = torch.randn(100, STACK[0], generator=torch.Generator().manual_seed(1))
    stacked = x
    for name in HEAD:
        stacked = F.linear(stacked, state[f"{name}.weight"], state[f"{name}.bias"])
    assert torch.allclose(x @ scorer.weight + scorer.bias, stacked[:, 0], atol=1e-5)
    moved = {**state, f"{HEAD[-1]}.bias": state[f"{HEAD[-1]}.bias"] + 0.5 * STD}
    other = load_scorer("imagereward", str(write_reward(tmp_path, moved)), device="cpu")
    assert torch.allclose(other(pictures, PROMPTS) - scorer(pictures, PROMPTS), torch.full((5,), 0.5), atol=1e-5)


def test_text_ends_after_35_tokens(scorer: ImageReward, pictures: list[Image.Image]) -> None:
    full = "a " * 33
    assert scorer.truncated([full, full + "b", ""]) == [False, True, False]
    scores = scorer([pictures[0]] * 2, [full, full + "cat dog red"])
    assert float(scores[0]) == float(scores[1])
    assert float(scorer(pictures[0], "a " * 32)) != float(scores[0])


def test_imagereward_has_gradients(scorer: ImageReward) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    live = images.clone().requires_grad_()
    reward = scorer.reward(live, PROMPTS[:2])
    assert torch.allclose(reward.detach(), scorer(images, PROMPTS[:2]), atol=1e-5)
    reward.sum().backward()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ahead, behind = (scorer.reward(images + s * 1e-3 * direction, PROMPTS[:2]) for s in (1, -1))
    assert live.grad is not None
    assert torch.allclose((ahead - behind) / 2e-3, (live.grad * direction).flatten(1).sum(1), rtol=0.05, atol=5e-3)


def test_towers_in_bf16_end_in_fp32(
    scorer: ImageReward, pictures: list[Image.Image], state: State, tmp_path: Path
) -> None:
    half = load_scorer("imagereward", str(write_reward(tmp_path, state)), device="cpu", dtype="bf16")
    scores = half(pictures, PROMPTS)
    assert scores.dtype == torch.float32 and half.fingerprint["dtype"] == "bf16"
    assert torch.allclose(scores, scorer(pictures, PROMPTS), atol=0.1) and not torch.equal(
        scores, scores.bfloat16().float()
    )


def test_imagereward_refuses_other_files(state: State, tmp_path: Path) -> None:
    short = {k: v for k, v in state.items() if "crossattention.self.key" not in k}
    spare = {**state, "blip.itm_head.weight": torch.zeros(2, 2)}
    lacks = {k: v for k, v in state.items() if k != "blip.visual_encoder.blocks.1.norm2.bias"}
    for name, other, says in [
        ("short", short, "not laid out as ImageReward"),
        ("spare", spare, "it holds 'blip.itm_head.weight'"),
        ("lacks", lacks, "do not fit a BlipVisionModel"),
        ("clip", {"logit_scale": torch.ones(1)}, "it holds 'logit_scale'"),
    ]:
        with pytest.raises(UserError, match=says) as found:
            load_scorer("imagereward", str(write_reward(tmp_path / name, other)))
        assert "\n" not in str(found.value)
    (write_reward(tmp_path / "words", state) / "vocab.txt").unlink()
    with pytest.raises(UserError, match="bert-base-uncased"):
        load_scorer("imagereward", str(tmp_path / "words"))


def write_head(file: Path, sizes: tuple[int, ...], numbers: tuple[int, ...], seed: int = 0) -> State:
    draw, state = torch.Generator().manual_seed(seed), {}
    for number, into, out in zip(numbers, sizes, sizes[1:], strict=False):
        state[f"layers.{number}.weight"] = torch.randn(out, into, generator=draw) * into**-0.5 * 2
        state[f"layers.{number}.bias"] = torch.randn(out, generator=draw)
    torch.save(state, file)
    return state


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_aesthetic_is_the_stack_on_the_unit_embedding(clip: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    head = write_head(tmp_path / "head.pth", (12, 10, 8, 6, 4, 1), (0, 2, 4, 6, 7))
    scorer = load_scorer("aes_v2", f"{tmp_path / 'head.pth'}@{clip}", device="cpu")
    assert isinstance(scorer, Aesthetic) and scorer.weights_note == "unknown hash: not checked"
    embedded = scorer.towers.embed_pixels(P1(32, "torchvision")(pictures))
    value = embedded
    for number in (0, 2, 4, 6, 7):
        value = F.linear(value, head[f"layers.{number}.weight"], head[f"layers.{number}.bias"])
    scores = scorer(pictures, "whatever")
    assert torch.allclose(scores, value[:, 0], atol=1e-5)
    assert torch.equal(scores, scorer(pictures, "something else")) and float(scores.std()) > 1e-3
    assert torch.allclose(scores, torch.cat([scorer(p, "") for p in pictures]), atol=1e-5)
    assert torch.allclose(
        scorer.value(embedded) + scorer.value(-embedded), torch.full((5,), 2 * scorer.bias), atol=1e-5
    )
    assert torch.allclose(embedded.norm(dim=1), torch.ones(5))  # unit: the length of the raw embedding is nothing
    live = torch.rand(2, 3, 40, 32, requires_grad=True)
    scorer.reward(live, "").sum().backward()
    assert live.grad is not None and bool((live.grad.flatten(1).abs().sum(1) > 0).all())


def test_aesthetic_heads_by_name(clip: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    torch.save({"weight": torch.randn(1, 12), "bias": torch.ones(1)}, tmp_path / "v1.pth")
    one = load_scorer("aes_v1", f"{tmp_path / 'v1.pth'}@{clip}", device="cpu")
    assert one(pictures, "").shape == (5,)
    write_head(tmp_path / "v2.pth", (12, 10, 8, 6, 4, 1), (0, 2, 4, 6, 7))
    write_head(tmp_path / "relu.pth", (12, 10, 8, 6, 4, 1), (0, 3, 6, 9, 11))
    write_head(tmp_path / "wide.pth", (16, 10, 8, 6, 4, 1), (0, 2, 4, 6, 7))
    broken = torch.load(tmp_path / "v2.pth", weights_only=True)
    torch.save({**broken, "layers.4.weight": torch.zeros(3, 3)}, tmp_path / "broken.pth")
    (tmp_path / "sac+logos+ava1-l14-linearMSE.pth").write_bytes((tmp_path / "v2.pth").read_bytes())
    for name, file, says in [
        ("aes_v1", "v2.pth", "not what 'aes_v1' stands for"),
        ("aes_v2", "v1.pth", "not what 'aes_v2' stands for"),
        ("aes_v2", "relu.pth", "not what 'aes_v2' stands for"),
        ("aes_v2", "wide.pth", "reads 16 numbers, this CLIP gives 12"),
        ("aes_v2", "broken.pth", "do not chain"),
        ("aes_v2", "sac+logos+ava1-l14-linearMSE.pth", "is not the published"),
    ]:
        with pytest.raises(UserError, match=says) as found:
            load_scorer(name, f"{tmp_path / file}@{clip}", device="cpu")
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="needs the file of its head"):
        load_scorer("aes_v1")
    with pytest.raises(UserError, match="@CLIP_FOLDER"):
        load_scorer("aes_v2", str(tmp_path / "v2.pth"))
