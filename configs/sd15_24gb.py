"""A LoRA of Stable Diffusion 1.5 on one card of 24 GB.

The whole student with its optimizer and average is 17 GB in float32, so a LoRA is trained here:
modules as in configs/sdxl_lora.py, rank 64, learning rate 1e-4 (diffusers' LCM-LoRA script); the
rest as in configs/sd15.py, but batch 64 in 16 microbatches of 4, so that a step is not too long.
Planned for a TPU v5p chip it takes 11.0 GB of memory (benchmarks/results); no GPU was measured yet.

    python -m slam_jax.main --config configs/sd15_24gb.py --workdir runs/sd15_24gb \
        --config.data.source=FOLDER
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 6000
    config.batch_size = 64
    config.accumulate = 16
    config.ema_rate = 0.95
    config.attention = "xla"

    config.teacher = ConfigDict(
        dict(
            model="stable-diffusion-v1-5/stable-diffusion-v1-5", revision="", variant="",
            config="", dtype="bfloat16",
        )
    )  # fmt: skip
    config.student = ConfigDict(
        dict(
            dtype="bfloat16", remat="all", cond_proj="random", gamma_dim=256, start="",
            lora=dict(rank=64, alpha=64.0, targets=(
                "to_[qkv]", r"to_out\.0", "proj_(in|out)", r"ff\.net\.0\.proj", r"ff\.net\.2",
                "conv[12]", "conv_shortcut", r"(down|up)samplers\.0\.conv", "time_emb_proj",
            )),
        )
    )  # fmt: skip
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
            source="FOLDER", size=512, num_images=10**9, crop=("random",), filters=(),
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
    # Examples are spread over all devices; every device holds a copy of the whole state.
    config.mesh = ConfigDict(dict(axes=(("data", -1),), rules=((".*", ()),)))
    return config
