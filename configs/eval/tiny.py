"""The embedded model: 256 captions of shapes2d, 4,000 real drawings, features of its classifier.

What `make demo` ends with, and the same numbers for any other model of these drawings; without
--model for the teacher, the embedded student, and that of `make demo` if there is one:

    python -m slam_jax.evaluate --protocol configs/eval/tiny.py --out runs/tiny_eval
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 1
    config.metrics = ("fid", "kid", "precision", "recall", "prompt_accuracy")
    config.kid_subset = 32
    config.bootstrap = 200

    config.prompts = ConfigDict(
        dict(
            source="shapes2d", count=256, seed=2, file_sha256="",
            sha256="9105fccb9cf709ab758c9b00b26a6b257259c90f327a390dbd23b86fab013e0f",
        )
    )  # fmt: skip
    config.images = ConfigDict(dict(size=32, resize=32, filter="lanczos"))
    config.features = ConfigDict(
        dict(network="classifier", mode="", weights="assets/tiny_sd/classifier")
    )
    config.clip = ConfigDict(dict(model="", prefix="", hps=""))
    config.reference = ConfigDict(
        dict(source="shapes2d", count=4000, seed=3, crop="none", sha256="", file="")
    )
    config.comparison = ConfigDict(
        dict(
            models=("assets/tiny_sd", "slam_jax/tiny_student", "runs/tiny/student"),
            teacher_samplers=("ddim",),
            teacher_steps=(50, 4, 2, 1),
            student_steps=(4, 2, 1),
            w=(8.0,),  # 0 = conditional only; diffusers' guidance_scale is w + 1
            original_steps=50,
            spacing="trailing",  # DDIM and students start at the last time too
            batch_size=128,
            dtype="float32",
            attention="xla",
        )
    )
    return config
