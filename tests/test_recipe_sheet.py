"""Recipes of real size hold what the papers' tables and code say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from diffalign.methods import make_method
from diffalign.recipe import load_recipe

# The sheet of offline methods: 0.9 (shared defaults), 1.3 (Diffusion-DPO), 2 (SFT), 3.3 (MaPO).
LAUNCHER = {
    "model.storage": "copies",
    "train.lr": 1e-8 * 2048,  # base rate with scale_lr: times the pairs of a step
    "train.batch": 2048,
    "train.steps": 2000,
    "train.warmup": 500,
    "train.schedule": "constant",
    "data.resolution": 512,
    "data.caption_dropout": 0.2,
}
SHARED = {
    "train.optimizer": "adamw",
    "train.betas": [0.9, 0.999],
    "train.eps": 1e-8,
    "train.weight_decay": 1e-2,
    "train.max_grad_norm": 1.0,
    "train.schedule": "constant",
    "data.ties": "skip",
    "train.ema": None,
}
XL = {
    "train.optimizer": "adafactor",
    "train.warmup": 200,
    "data.resolution": 1024,
    "model.gradient_checkpointing": True,
}
LORA = {
    "model.storage": "adapters",
    "model.lora.rank": 8,
    "model.lora.alpha": None,
    "model.lora.targets": "attention",
    "train.lr": 1e-5,
    "train.warmup": 0,
    "data.caption_dropout": 0.0,
}
DISTIL = {"train.warmup": 500, "train.max_grad_norm": 10.0, "validate.pairs": 0}
SAMPLED_XL = {
    "model.path": "stabilityai/stable-diffusion-xl-base-1.0",
    "model.storage": "adapters",
    "model.gradient_checkpointing": True,
    "model.lora.rank": 64,
    "model.lora.targets": "attention",
    "train.lr": 1e-5,
    "data.resolution": 1024,
}
SHEET: dict[str, dict[str, Any]] = {
    "sd15/dpo": {**SHARED, **LAUNCHER, "method.name": "dpo", "method.beta": 5000},
    "sd15/sft": {**SHARED, **LAUNCHER, "method.name": "sft"},
    # diffusers' script: beta 2500 is 5000 in the convention of the paper's code
    "sd15/dpo-lora": {**SHARED, **LORA, "method.name": "dpo", "method.beta": 2 * 2500, "train.batch": 32}
    | {"train.steps": 10000, "data.resolution": 512},
    # given for SDXL only; the README's run at SD1.5's resolution
    "sd15/mapo": {**SHARED, **LORA, "method.name": "mapo", "method.beta": 0.1, "train.batch": 8 * 2}
    | {"train.steps": 2000, "data.resolution": 512, "model.gradient_checkpointing": True},
    "sdxl/dpo": {**SHARED, **LAUNCHER, **XL, "method.name": "dpo", "method.beta": 5000},
    "sdxl/sft": {**SHARED, **LAUNCHER, **XL, "method.name": "sft"},
    "sdxl/dpo-lora": {**SHARED, **LORA, "method.name": "dpo", "method.beta": 5000, "train.batch": 8 * 2}
    | {"train.steps": 2000, "data.resolution": 1024},
    "sdxl/mapo": {**SHARED, **LORA, "method.name": "mapo", "method.beta": 0.1, "train.batch": 8 * 2}
    | {"train.steps": 2000, "data.resolution": 1024, "model.gradient_checkpointing": True},
    **{
        name: {**SHARED, **LAUNCHER, **(XL if name.startswith("sdxl") else {}), "method.beta": beta}
        | {"train.batch": 1024, "train.lr": 1e-8 * 1024, "train.steps": steps, "train.warmup": warmup}
        | {"method.inversion_steps": points}
        for name, beta, steps, warmup, points in (
            ("sd15/inpo", 2000, 400, 200, 10),
            ("sdxl/inpo", 5000, 400, 200, 10),
            ("sd15/smpo", 2000, 200, 100, 5),
            ("sdxl/smpo", 5000, 200, 100, 10),
        )
    },
    "sdxl/inversion_dpo": {**SHARED, **LAUNCHER, **XL, "method.name": "inversion_dpo", "method.beta": 2000}
    | {"method.inversion_steps": 80, "method.guidance": 2.0, "train.lr": 1e-8 * 8, "train.batch": 8}
    | {"train.warmup": 1000, "data.caption_dropout": 0.0},
    "sd15/kto": {**SHARED, "method.name": "kto", "method.beta": 1000, "method.positive_ratio": 0.8}
    | {"model.storage": "copies", "train.lr": 1e-7, "train.batch": 4 * 2, "train.warmup": 200, "train.steps": 20000}
    | {"data.resolution": 512, "data.caption_dropout": 0.2},
    "sd21/curriculum-dpo": {"method.name": "dpo", "method.beta": 2000, "model.lora.rank": 8, "train.lr": 1e-4}
    | {"train.batch": 8, "data.caption_dropout": 0.25, "data.min_gap": 0.2, "model.storage": "adapters"}
    | {"data.curriculum.chunks": 6, "data.curriculum.steps": 500, "data.curriculum.top": 150_000},
    # section 9: the paper's batch and steps; the rest is ours
    "sdxl/rankdpo": {"method.name": "rankdpo", "train.batch": 1024, "train.steps": 400, "method.normalize": "pairs"},
    "sd15/dspo": {**SHARED, **LAUNCHER, "method.name": "dspo", "method.beta": 0.001, "train.steps": 1000},
    "sdxl/dspo": {**SHARED, **LAUNCHER, **XL, "method.form": "sdxl", "method.beta": 5000, "train.steps": 700},
    # sheet 13 and the launcher it was read from; "smooth" restarts: 10 times 500 steps
    **{
        name: {**SHARED, "method.name": "softrepa", "method.group": 4, "method.tokens": 4, "method.where": where}
        | {"method.temperature": 0.07, "method.scale": 4.0, "method.dweight": 10, "train.lr": 1e-3, "train.batch": 4}
        | {"train.weight_decay": 1e-4, "train.schedule": "cosine", "train.period": 5000, "train.max_grad_norm": None}
        | {"data.resolution": 512}
        for name, where in (("sd15/softrepa", ["down"]), ("sdxl/softrepa", ["down", "mid"]))
    },
    # sheet 12: Stable Cascade's numbers; beta and the U-Nets are ours
    **{
        name: {**SHARED, "method.name": "ppd", "train.lr": 1e-5, "train.batch": 768, "data.resolution": side}
        for name, side in (("sd15/ppd", 512), ("sdxl/ppd", 1024))
    },
    "sdxl/orpo": {**SHARED, **LORA, "method.name": "orpo", "method.beta": 0.1, "model.lora.rank": 4}
    | {"train.lr": 5e-4, "train.batch": 4, "data.resolution": 1024},
    "sd21/dcpo": {**SHARED, **LAUNCHER, "method.name": "dcpo", "method.beta": 500, "method.error_space": "epsilon"}
    | {"train.batch": 128 * 8, "train.lr": 1e-8 * 128 * 8, "data.caption_dropout": 0.0, "data.resolution": 768},
    # no numbers of the authors: those of SD2.1 with the changes of the SDXL launcher
    "sdxl/dcpo": {**SHARED, **LAUNCHER, **XL, "method.name": "dcpo", "method.beta": 500}
    | {"train.batch": 128 * 8, "train.lr": 1e-8 * 128 * 8, "data.caption_dropout": 0.0},
    # online sheet 5, 7 and 3: 8 GPUs x 8 x 4 samples; batch and rounds of DanceGRPO ours; 2 batches of 10 prompts
    "sd15/ddpo": {**SHARED, "method.name": "ddpo", "method.steps": 50, "method.eta": 1.0, "method.guidance": 5.0}
    | {"method.clip": 1e-4, "method.most": 5.0, "method.members": 4, "method.updates": 4, "train.batch": 64}
    | {"train.lr": 3e-4, "model.lora.rank": 4, "train.weight_decay": 1e-4, "train.steps": 100, "data.resolution": 512},
    "sd15/grpo": {**SHARED, "method.name": "grpo", "method.steps": 50, "method.eta": 1.0, "method.guidance": 5.0}
    | {"method.members": 16, "method.shared_noise": True, "method.share": 0.6, "method.skip_last": True}
    | {"method.clip": 1e-4, "method.unbiased": True, "method.floor": 1e-8, "method.kl": 0.0, "method.reward": "hpsv21"}
    | {"train.lr": 1e-5, "model.storage": "copies", "train.steps": 300, "data.resolution": 512},
    "sd15/d3po": {**SHARED, "method.name": "d3po", "method.steps": 20, "method.eta": 1.0, "method.guidance": 5.0}
    | {"method.beta": 0.1, "method.clip": 0.1, "method.members": 2, "method.shared_noise": True, "train.batch": 20}
    | {"train.lr": 3e-5, "train.weight_decay": 1e-4, "train.steps": 400, "model.lora.rank": 4, "data.resolution": 512},
    # online sheet 4 (256 pictures an update, 1600 updates in rounds of four) and 8
    "sd15/dro": {**SHARED, "method.name": "dro", "model.storage": "copies", "method.steps": 20, "method.margin": 1e-3}
    | {"method.guidance": 1.0, "train.lr": 1e-4, "train.batch": 256, "train.steps": 400, "method.updates": 4}
    | {"data.caption_dropout": 0.2, "data.resolution": 512, "train.ema": 0.999},
    "sd15/nft": {**SHARED, "method.name": "nft", "method.steps": 10, "method.guidance": 1.0, "method.members": 24}
    | {"method.beta": 1.0, "method.kl": 1e-4, "method.std": "batch", "method.floor": 1e-4, "method.most": 5.0}
    | {"model.lora.rank": 32, "model.lora.alpha": 64, "train.lr": 3e-4, "train.weight_decay": 1e-4, "train.ema": 0.9}
    | {"train.batch": 48, "method.updates": 1, "data.resolution": 512},
    # online sheet 6: 24 x 48, ten steps but the last, KL 0.01 for PickScore, std over all, 2 updates an epoch
    "sd15/flow-grpo": {**SHARED, "method.name": "grpo", "method.steps": 10, "method.guidance": 4.5, "method.kl": 0.01}
    | {"method.members": 24, "train.batch": 48, "method.std": "batch", "method.floor": 1e-4, "method.most": 5.0}
    | {"method.unbiased": False, "method.clip": 1e-4, "method.skip_last": True, "method.share": 1.0}
    | {"method.updates": 2, "train.lr": 3e-4, "train.ema": 0.9, "model.lora.rank": 32, "model.lora.alpha": 64}
    | {"train.weight_decay": 1e-4, "method.mean": "prompt", "method.shared_noise": False},
    # SDXL, of which these authors have nothing: the methods' numbers as above, rank and rate of SPO's SDXL (1B)
    "sdxl/ddpo": {**SAMPLED_XL, "method.name": "ddpo", "method.steps": 50, "method.eta": 1.0, "method.guidance": 5.0}
    | {"method.clip": 1e-4, "method.most": 5.0, "method.members": 4, "method.updates": 4, "train.batch": 64},
    "sdxl/grpo": {**SAMPLED_XL, "method.name": "grpo", "method.steps": 50, "method.eta": 1.0, "method.guidance": 5.0}
    | {"method.members": 16, "method.shared_noise": True, "method.share": 0.6, "method.skip_last": True}
    | {"method.clip": 1e-4, "method.unbiased": True, "method.floor": 1e-8, "method.kl": 0.0, "method.reward": "hpsv21"},
    "sdxl/d3po": {**SAMPLED_XL, "method.name": "d3po", "method.steps": 20, "method.eta": 1.0, "method.guidance": 5.0}
    | {"method.beta": 0.1, "method.clip": 0.1, "method.members": 2, "method.shared_noise": True, "train.batch": 20},
    "sdxl/dro": {**SAMPLED_XL, "method.name": "dro", "method.steps": 20, "method.margin": 1e-3, "train.lr": 1e-4}
    | {
        "method.guidance": 1.0,
        "train.batch": 256,
        "train.steps": 400,
        "method.updates": 4,
        "data.caption_dropout": 0.2,
    },
    "sdxl/nft": {**SAMPLED_XL, "method.name": "nft", "method.steps": 10, "method.guidance": 1.0, "method.members": 24}
    | {"method.beta": 1.0, "method.kl": 1e-4, "method.std": "batch", "model.lora.rank": 32, "model.lora.alpha": 64}
    | {"train.lr": 3e-4, "train.ema": 0.9, "train.batch": 48, "method.updates": 1},
    "sdxl/draft": {**SAMPLED_XL, "method.name": "draft", "method.steps": 50, "method.guidance": 5.0}
    | {"method.through": 1, "method.coefficient": 0.01, "train.max_grad_norm": 1.0, "train.guards.hacking": "stop"}
    | {"model.lora.rank": 16, "train.lr": 1e-4},
    # online sheet 10: no numbers are public
    "sd15/tree_rpo": {"method.name": "tree_rpo", "method.branch": 2, "method.clip": 1e-4, "data.resolution": 512},
    "sdxl/tree_rpo": {**SAMPLED_XL, "method.name": "tree_rpo", "method.branch": 2, "method.clip": 1e-4},
    # online sheet 2A (Turbo, one GPU) and 2B: lr 4e-5 or 2e-4, 200 to 2000 steps; the prior is not the release's 0.5
    "sdxl/pso_online": {**SHARED, "method.name": "pso_online", "method.timesteps": [999, 749, 499, 249]}
    | {"method.beta": 50.0, "method.clip": 0.1, "method.guidance": 1.0, "method.sampler": "ddim", "method.eta": 1.0}
    | {"model.lora.rank": 32, "train.lr": 1e-5, "train.optimizer": "adamw8bit", "train.weight_decay": 1e-6}
    | {"train.batch": 4 * 4, "method.updates": 4 * 4 // (4 * 2), "data.resolution": 512, "data.max_pairs": 4000}
    | {"data.path": "yuvalkirstain/pickapic_v1", "model.path": "stabilityai/sdxl-turbo", "method.members": 2},
    **{
        f"sdxl/{name}": {**SHARED, "method.name": "pso_pictures", "method.timesteps": [999, 749, 499, 249]}
        | {"method.beta": 5.0, "method.guidance": 1.0, "model.lora.rank": 16, "train.lr": lr, "train.batch": 1 * 4}
        | {"data.resolution": 512, "train.steps": steps, "method.negative": negative, "method.prior": prior}
        for name, lr, steps, negative, prior in (
            ("pso_pictures", 4e-5, 2000, 1.0, 0.0),
            ("pso-concept", 2e-4, 500, 0.1, 0.2),
        )
    },
    # online sheet, 1A; one GPU of four has 16 pairs
    **{
        f"spm/{family}": {"method.name": "spm", "method.start": "yuvalkirstain/PickScore_v1", "method.guidance": 5.0}
        | {"train.lr": lr, "train.steps": steps, "train.batch": 16 * 4, "train.warmup": 500, "train.seed": 42}
        | {"train.schedule": "linear", "train.weight_decay": 0.3, "train.max_grad_norm": 1.0, "data.ties": "keep"}
        | {"data.posterior": "sample", "data.resolution": side, "data.scorer": scorer, "method.labels": labels}
        | {"data.path": "yuvalkirstain/pickapic_v1", "method.threshold": 0.1}
        for family, lr, steps, side, labels, scorer in (
            ("sd15", 3e-6, 8000, 512, "data", None),
            ("sdxl", 1e-6, 7000, 1024, "scores", "pickscore"),
        )
    },
    # online sheet, 1B; one GPU of four samples 10 (SDXL: 2) prompts, and 10 x 4,000 of them are sampled in all
    **{
        f"{family}/spo": {"method.name": "spo", "method.beta": 10.0, "method.clip": 0.1, "method.steps": 20}
        | {"method.eta": 1.0, "method.guidance": 5.0, "method.start_step": 4, "method.pool": pool}
        | {"method.threshold": threshold, "method.segment": segment, "method.time_weight": "none"}
        | {"model.lora.rank": rank, "model.lora.alpha": None, "model.lora.targets": "attention", "train.lr": lr}
        | {"train.betas": [0.9, 0.999], "train.weight_decay": 1e-4, "train.eps": 1e-8, "train.max_grad_norm": None}
        | {"train.batch": 4 * prompts, "train.steps": 10 * 4000 // (4 * prompts), "data.max_pairs": 4000}
        | {"data.resolution": side, "data.path": "yuvalkirstain/pickapic_v1", "method.reward": f"spm=runs/spm-{family}"}
        for family, rank, lr, prompts, pool, threshold, segment, side in (
            ("sd15", 4, 6e-5, 10, 4, 0.3, 1, 512),
            ("sdxl", 64, 1e-5, 2, 2, 0.4, 4, 1024),
        )
    },
    # online sheet, 9: AlignProp; batch, steps of training and eta are ours
    "sd15/draft": {"method.name": "draft", "method.steps": 50, "method.guidance": 5.0, "method.through": 50 - 42}
    | {"method.spread": 5.0, "method.coefficient": 0.01, "train.lr": 1e-3, "train.max_grad_norm": 1.0}
    | {"train.guards.hacking": "stop", "model.storage": "adapters"},
    # online sheet, 2B: the released concept script; both sizes the same but for the resolution
    **{
        f"{family}/pso": {**SHARED, **LORA, "method.name": "pso", "method.beta": 5.0, "model.lora.rank": 16}
        | {"method.timesteps": [999, 749, 499, 249], "method.negative": 1.0, "method.prior": 0.0}
        | {"train.lr": 2e-4, "train.batch": 4, "train.steps": 2000, "data.resolution": side}
        for family, side in (("sd15", 512), ("sdxl", 1024))
    },
    # distillation sheet 2.3 (from memory) and 3.4: DMD, and DMD2's first stage on SD1.5
    "sd15/dmd": {**SHARED, **DISTIL, "model.storage": "copies", "method.timesteps": [999], "method.guidance": 3.0}
    | {"method.regression_weight": 0.25, "method.critic_steps": 1, "train.lr": 1e-5, "train.batch": 2304}
    | {"data.resolution": 512},
    "sd15/dmd2": {**SHARED, **DISTIL, "model.storage": "copies", "method.timesteps": [999], "method.guidance": 1.75}
    | {"method.critic_steps": 10, "train.lr": 1e-5, "train.batch": 64 * 32, "train.steps": 39000}
    | {"method.gan_weight": 0.0, "data.resolution": 512},
    # 3.4's LoRA column, with the fake score as 24.4 and 29.3 advise; 4.4, 7 and 8 ask for the same with their own terms
    **{
        f"sdxl/{name}": {**SHARED, **DISTIL, "model.lora.rank": 64, "model.lora.alpha": 8, "model.lora.targets": "all"}
        | {"train.lr": 5e-5, "train.role_lr.fake": 1e-4, "train.batch": 64 * 2, "train.steps": 16000}
        | {"method.timesteps": [999, 749, 499, 249], "method.guidance": 8.0, "method.critic_steps": 5}
        | {"data.resolution": 1024, "model.gradient_checkpointing": True, "method.name": name}
        | more
        for name, more in (
            ("dmd2", {"method.gan_weight": 0.0}),
            ("decoupled_dmd", {"method.schedule": "hybrid", "method.relative_floor": 0.1}),
            ("f_distill", {"method.divergence": "js", "method.gan_weight": 5e-3, "method.gan_features": "base"}),
            # 8: and the divergence's own settings
            (
                "diff_instruct",
                {"method.timesteps": [399], "method.guidance": 7.5, "method.critic_steps": 1}
                | {"method.reward": "hpsv21", "method.divergence": "huber", "method.start": "unit"},
            ),
            # 3.3's one step of SDXL, which needs a regression, in DMD's order (2)
            (
                "dmd",
                {"method.timesteps": [399], "method.critic_steps": 1, "method.regression_weight": 0.25}
                | {"method.start": "unit", "method.batches": "reuse"},
            ),
        )
    },
    # 3.8: the toolkit's DMD2 for SD1.5, which 7 builds on; 3.4's GAN weight
    "sd15/f_distill": {**SHARED, **DISTIL, "model.storage": "copies", "method.timesteps": [999]}
    | {"method.guidance": 1.75, "method.critic_steps": 10, "method.start": "sigma", "train.lr": 1e-5}
    | {"train.batch": 64 * 32, "method.gan_weight": 1e-3, "method.divergence": "js", "data.resolution": 512},
    # 4.4 and 8 for what is theirs; the rest is ours
    **{
        f"sd15/{name}": {**SHARED, **DISTIL, "model.lora.rank": 64, "model.lora.alpha": 8, "train.lr": 5e-5}
        | {"train.role_lr.fake": 1e-4, "data.resolution": 512}
        | more
        for name, more in (
            ("decoupled_dmd", {"method.schedule": "hybrid", "method.timesteps": [999, 749, 499, 249]}),
            ("diff_instruct", {"method.divergence": "kl", "method.guidance": 7.5, "method.normalise": "none"}),
        )
    },
    # distillation sheet 5.5 and 5.7 (36.7k steps of 512; half-life of 50,000 pictures), 5.6, 24.4 and 29.3
    "sd15/sid": {"model.storage": "copies", "data.resolution": 512, "train.steps": 36700, "train.batch": 512}
    | {"train.lr": 1e-6, "train.betas": [0.0, 0.999], "train.eps": 1e-8, "train.weight_decay": 0.0}
    | {"train.ema": 0.9929, "train.warmup": 0, "method.timesteps": [625], "method.start": "sigma"}
    | {"method.guidance": 1.5, "method.alpha": 1.0, "method.name": "sid", "train.precision": "fp32"}
    | {"method.text_dropout": 0.1, "train.max_grad_norm": None},
    "sdxl/sid": {"model.storage": "adapters", "model.lora.rank": 64, "model.lora.alpha": 8, "train.batch": 256}
    | {"train.betas": [0.0, 0.999], "train.lr": 5e-5, "train.role_lr.fake": 1e-4, "method.guidance": 4.5}
    | {"method.timesteps": [999, 749, 499, 249], "method.start": "unit", "data.resolution": 1024}
    | {"method.text_dropout": 0.0},  # 5.6: context dropout off in the few-step launcher
    # distillation sheet 6.5 (the demo) and 29.4; for SDXL 24.4 and 29.3
    "sd15/tdm": {"model.storage": "copies", "data.resolution": 512, "train.batch": 64, "train.lr": 4e-6}
    | {"train.role_lr.fake": 2e-5, "train.betas": [0.0, 0.95], "train.weight_decay": 1e-2, "train.warmup": 50}
    | {"train.max_grad_norm": 1.0, "train.schedule": "cosine", "method.guidance": 4.5}
    | {"method.timesteps": [899, 674, 449, 224]},
    "sdxl/tdm": {"model.storage": "adapters", "model.lora.rank": 64, "model.lora.alpha": 8, "train.lr": 5e-5}
    | {"train.role_lr.fake": 1e-4, "train.betas": [0.0, 0.95], "method.guidance": 4.5, "data.resolution": 1024}
    | {"method.timesteps": [899, 674, 449, 224]},
    # distillation sheet 9, whose guidance counts one less: the full script, and that of the LoRA
    "sd15/lcm": {**SHARED, "model.storage": "copies", "train.lr": 1e-6, "method.target_ema": 0.95}
    | {"method.guidance": [3.0 + 1, 15.0 + 1], "method.solver_steps": 1000 // 20, "data.caption_dropout": 0.0}
    | {"method.loss": "huber", "method.timesteps": [999, 759, 499, 259], "data.resolution": 512}
    | {"model.guidance_embedding": 256, "method.tell_guidance": True},
    "sdxl/lcm": {**SHARED, "model.storage": "adapters", "model.lora.rank": 64, "train.lr": 1e-4}
    | {"method.guidance": [3.0 + 1, 15.0 + 1], "method.target_ema": 0.0, "data.caption_dropout": 0.0}
    | {"data.resolution": 1024, "method.timesteps": [999, 759, 499, 259]},
    # 10.1: 8 GPUs x 20 (SDXL: 10) pictures; every other one of 5,000 (20,000) iterations trains the student
    **{
        f"{family}/pcm": {"train.betas": [0.9, 0.999], "model.storage": "adapters", "model.lora.rank": 64}
        | {"method.segments": 4, "method.solver_steps": solver, "method.guidance": [w + 1, w + 2], "train.lr": lr}
        | {"method.loss": "huber", "method.gan_weight": 0.1, "train.role_lr.head": 1e-5, "train.weight_decay": decay}
        | {"train.batch": 8 * rows, "train.steps": iterations // 2, "data.resolution": side}
        for family, solver, w, lr, decay, rows, iterations, side in (
            ("sd15", 50, 4.0, 5e-6, 1e-3, 20, 5000, 512),
            ("sdxl", 40, 6.0, 2e-6, 0.0, 10, 20000, 1024),
        )
    },
    # 10.2: the first stage, with a squared distance alone; the released LoRA's rank and layers
    **{
        f"{family}/tscd": {"method.segments": 8, "method.loss": "mse", "method.gan_weight": 0.0}
        | {"model.storage": "adapters", "model.lora.rank": 64, "model.lora.targets": "all", "data.resolution": side}
        for family, side in (("sd15", 512), ("sdxl", 1024))
    },
    # 10.2: from the last stage; the unified LoRA at the times of trailing steps
    **{
        f"{family}/hypersd-feedback": {"method.segments": 1, "model.lora.rank": 64, "model.lora.targets": "all"}
        | {"method.reward": "aes_v2,imagereward", "data.resolution": side}
        for family, side in (("sd15", 512), ("sdxl", 1024))
    },
    **{
        f"{family}/hypersd-dmd": {"method.timesteps": [999, 874, 749, 624, 499, 374, 249, 124]}
        | {"model.lora.rank": 64, "model.lora.targets": "all", "data.resolution": side}
        for family, side in (("sd15", 512), ("sdxl", 1024))
    },
    # distillation sheet 11.1; rank and rate of the LoRA are ours
    **{
        f"{family}/scm": {"model.storage": storage, "train.lr": lr, "method.guidance": [4.0, 5.0]}
        | {"method.warmup": 4000, "train.max_grad_norm": 0.1, "method.normalise": 0.1, "method.time_std": 1.6}
        | {"method.timesteps": [999, 719]}
        | {"method.time_mean": round(0.2 - math.log(0.5), 3), "data.resolution": side}
        | {"method.gan_weight": gan, "method.tell_guidance": gan > 0, "method.gan_time_std": 1.0}
        | {"method.gan_time_mean": round(-0.6 - math.log(0.5), 3)}
        for family, storage, lr, side, gan in (
            ("sd15", "copies", 1e-6, 512, 0.5),
            ("sdxl", "adapters", 1e-5, 1024, 0.0),
        )
    },
    # distillation sheet 20: no settings for pictures; those of 24.4 and 29.3, DMD2's guidance (3.4)
    **{
        f"{family}/distillation_dpo": {"model.storage": "adapters", "model.lora.rank": 64, "model.lora.alpha": 8}
        | {"train.lr": 5e-5, "train.role_lr.fake": 1e-4, "train.role_lr.loser": 1e-4, "method.critic_steps": 5}
        | {"method.guidance": guidance, "method.timesteps": times, "train.max_grad_norm": 10.0}
        for family, guidance, times in (("sd15", 1.75, [999]), ("sdxl", 8.0, [999, 749, 499, 249]))
    },
    # distillation sheet 17; the fake score's rate of adapters is that of 29.3
    **{
        f"{family}/phased_dmd": {"model.storage": "adapters", "model.lora.rank": 64, "model.lora.alpha": 8}
        | {"train.lr": 5e-5, "train.role_lr.fake": 1e-4, "method.critic_steps": 5, "train.batch": 64}
        | {"method.timesteps": [999, 749, 499, 249], "method.phases": [2, 2], "data.resolution": side}
        for family, side in (("sd15", 512), ("sdxl", 1024))
    },
    # distillation sheet 16; layers, batch and steps are ours
    **{
        f"{family}/twinflow": {"model.lora.rank": 64, "model.lora.alpha": 64, "train.lr": 1e-4, "method.order": 1}
        | {
            "train.betas": [0.9, 0.99],
            "train.weight_decay": 0.0,
            "train.max_grad_norm": 1.0,
            "method.guidance": 1 + 0.8,
        }
        | {"method.target_ema": 0.99, "method.rectify": 0.5, "method.robust": 1.0, "method.width": 1e-3}
        for family in ("sd15", "sdxl")
    },
    # distillation sheet 14, and DMD2's guidance (3.4); adapters as in 29.3
    **{
        f"{family}/disback": {"method.every": 1000, "method.timesteps": times, "method.guidance": guidance}
        | {"model.lora.rank": 64, "model.lora.alpha": 8, "train.lr": 5e-5, "train.role_lr.fake": 1e-4}
        for family, times, guidance in (("sd15", [999], 1.75), ("sdxl", [399], 8.0))
    },
    # DCPO's run on this model, but at its own size and on its own prediction (sheet 8.3 and 8.7)
    "sd21/dpo": {**SHARED, **LAUNCHER, "method.name": "dpo", "method.beta": 500, "method.error_space": "epsilon"}
    | {"train.batch": 128 * 8, "train.lr": 1e-8 * 128 * 8, "data.caption_dropout": 0.0, "data.resolution": 768},
}


def value_at(data: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    if section == "method" and name not in data["method"]:  # the method's default
        options = {k: v for k, v in data["method"].items() if k != "name"}
        return make_method(data["method"]["name"], options).config.model_dump(mode="json")[name]
    for part in key.split("."):
        data = data[part]
    return data


@pytest.mark.parametrize("name", SHEET)
def test_recipes_hold_the_papers_settings(name: str) -> None:
    found = load_recipe(name).dump()
    for key, expected in SHEET[name].items():
        value = value_at(found, key)
        assert value == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected), key


def test_methods_default_to_the_papers_settings() -> None:
    tdm = make_method("tdm", {}).config
    assert (tdm.segments, tdm.target, tdm.loss, tdm.huber, tdm.snr_max) == ("separate", "x0", "huber", 1e-3, 5.0)
    sid = make_method("sid", {})
    assert (sid.config.alpha, sid.config.strategy, sid.config.text_dropout) == (1.0, "lsg", 0.1)
    assert [phase.name for phase in sid.phases] == ["critic", "student"] and sid.repeats(sid.phases[0]) == 1
    assert make_method("dpo", {}).config.model_dump()["beta"] == 5000
    mapo = make_method("mapo", {}).config.model_dump()
    assert mapo["beta"] == 0.1
