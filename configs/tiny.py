"""SPLAM on the embedded teacher: captioned drawings of two coloured shapes, 32x32 pixels.

Teacher: assets/tiny_sd, a small Stable Diffusion trained by examples/tiny_teacher. No network,
no GPU.

    python -m slam_jax.main --config configs/tiny.py --workdir runs/tiny
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 600
    config.batch_size = 32
    config.accumulate = 1
    config.ema_rate = 0.95
    config.attention = "xla"

    config.teacher = ConfigDict(
        dict(model="assets/tiny_sd", revision="", variant="", config="", dtype="float32")
    )
    config.student = ConfigDict(
        dict(
            dtype="float32",
            remat="none",
            cond_proj="zero",
            gamma_dim=256,
            start="",
            # The modules of LCM-LoRA.
            lora=dict(
                rank=0,
                alpha=16.0,
                targets=(
                    r"(to|proj)_\w+(\.0)?",
                    r"ff\.net\..*",
                    r"conv(\d|_shortcut)?",
                    "time_emb_proj",
                ),
            ),
        )
    )
    config.distill = ConfigDict(
        dict(
            num_subpaths=50,
            times="grid",
            length=200,
            stride=100,
            w=8.0,  # 0 = conditional only; diffusers' guidance_scale is w + 1
            sigma="fixed",
            gamma=("annealed", 0.0, 1.0, 0.5),
            distance=("huber", 1e-3),
        )
    )
    config.optimizer = ConfigDict(
        dict(
            learning_rate=2e-4, warmup_steps=20, clip_norm=1.0,
            weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8, mu_dtype="float32",
        )
    )  # fmt: skip
    config.data = ConfigDict(
        dict(
            source="shapes2d", size=32, num_images=100_000, crop=("center",), filters=(),
            max_bad_fraction=0.01, index_dir="", num_threads=1, num_workers=0,
        )
    )  # fmt: skip
    config.eval = ConfigDict(
        dict(
            every_steps=200,
            prompts=(
                "a red circle above a blue square",
                "a green triangle left of a yellow cross",
                "an orange square below a purple circle on a white background",
                "a blue cross right of a red triangle on a black background",
            ),
            teacher_steps=50,
            student_steps=4,
            judge="assets/tiny_sd/classifier",
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
