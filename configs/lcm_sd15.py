"""LCM on Stable Diffusion 1.5: the control for configs/sd15.py, which differs in gamma alone.

With gamma = 1 throughout SPLAM's loss is LCM's (arXiv 2310.04378). w is fixed at 8 here as there,
where LCM's own script draws it from [5, 15] and feeds it to the student; learning rate 8e-6, EMA
0.95 and Huber loss are that script's too (MCG-NJU/SPLAM @ dc442bf was made from it).
No run of this config has been measured yet, so no hours are given.

    python -m slam_jax.main --config configs/lcm_sd15.py --workdir runs/lcm_sd15 \
        --config.data.source=FOLDER
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 6000
    config.batch_size = 400
    config.accumulate = 1
    config.ema_rate = 0.95
    config.attention = "xla"

    config.teacher = ConfigDict(
        dict(
            model="stable-diffusion-v1-5/stable-diffusion-v1-5",
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
            lora=dict(rank=0, alpha=1.0, targets=()),
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
            gamma=("ones",),
            distance=("huber", 1e-3),
        )
    )
    config.optimizer = ConfigDict(
        dict(
            learning_rate=8e-6, warmup_steps=0, clip_norm=1.0,
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
