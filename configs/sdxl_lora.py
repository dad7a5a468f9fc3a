"""SPLAM as a LoRA of SDXL base 1.0 (1024 pixels).

Published (alimama-creative/slam-lora-sdxl): a file of 394 MB, the size of rank 64 in half
precision; no code. So: modules and learning rate of diffusers' LCM-LoRA script for SDXL, the rest
as in the released SPLAM script. The gamma layer, which a LoRA file cannot hold, is trained centred
and left out (pipeline.py). No run has been measured yet: no hours given.
    python -m slam_jax.main --config configs/sdxl_lora.py --workdir runs/sdxl_lora \
        --config.data.source=FOLDER
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 6000
    config.batch_size = 64
    config.accumulate = 1
    config.ema_rate = 0.95
    config.attention = "xla"

    config.teacher = ConfigDict(
        dict(
            model="stabilityai/stable-diffusion-xl-base-1.0",
            revision="",
            variant="",
            config="",
            dtype="bfloat16",
        )
    )
    config.student = ConfigDict(
        dict(
            dtype="bfloat16",
            remat="all",
            cond_proj="random",
            gamma_dim=256,
            start="",
            lora=dict(
                rank=64,
                alpha=64.0,
                targets=(
                    "to_[qkv]",
                    r"to_out\.0",
                    "proj_(in|out)",
                    r"ff\.net\.(0\.proj|2)",
                    "conv[12]",
                    "conv_shortcut",
                    r"(down|up)samplers\.0\.conv",
                    "time_emb_proj",
                ),  # fmt: skip
            ),
        )
    )
    config.distill = ConfigDict(
        dict(
            num_subpaths=50,
            times="grid",
            length=20,
            stride=20,
            w=8.0,  # 0 = conditional only; diffusers' guidance_scale is w + 1
            sigma="markov",
            gamma=("uniform",),
            distance=("huber", 1e-3),
        )
    )
    config.optimizer = ConfigDict(
        dict(
            learning_rate=1e-4, warmup_steps=0, clip_norm=1.0,
            weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8, mu_dtype="float32",
        )
    )  # fmt: skip
    config.data = ConfigDict(
        dict(
            source="FOLDER", size=1024, num_images=10**9, crop=("random",), filters=(),
            max_bad_fraction=0.01, index_dir="", num_threads=16, num_workers=0,
        )
    )  # fmt: skip
    config.eval = ConfigDict(
        dict(
            every_steps=500,
            prompts=(
                "a photo of a red fox in the snow",
                "an astronaut riding a horse, oil painting",
                "a bowl of ramen on a wooden table, close-up",
                "a lighthouse on a cliff at sunset",
            ),
            teacher_steps=50,
            student_steps=4,
            judge="",
            num_images=256,
        )
    )
    config.checkpoint = ConfigDict(dict(every_steps=200, keep=2, keep_every=0))
    config.faults = ConfigDict(
        dict(max_grad_norm=1e3, max_skips=10, max_rollbacks=1, timeout_s=600)
    )
    config.log = ConfigDict(dict(every_steps=10, wandb_project=""))
    config.mesh = ConfigDict(dict(axes=(("data", -1),), rules=((".*", ()),)))
    return config
