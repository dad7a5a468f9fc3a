"""FID on 10,000 captions and pictures of your own from LAION-Aesthetics, which has no fixed list.

Captions: a text file, one a line; the 10,000 first by sha256("SEED CAPTION"). References: a folder
of 10,000 pictures or so. What they were is in the protocol's hash, so numbers of other lists are
not taken for the same.

    python -m slam_jax.evaluate --protocol configs/eval/laion_10k.py --out runs/laion \
        --captions captions.txt --reference pictures --model runs/sd15/student
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.metrics = ("fid", "kid", "precision", "recall", "clip")
    config.kid_subset = 500
    config.bootstrap = 50

    config.prompts = ConfigDict(
        dict(source="lines", count=10_000, seed=0, file_sha256="", sha256="")
    )
    config.images = ConfigDict(dict(size=512, resize=512, filter="lanczos"))
    config.features = ConfigDict(
        dict(network="inception", mode="clean", weights="pt_inception-2015-12-05-6726825d.pth")
    )
    config.clip = ConfigDict(dict(model="openai/clip-vit-large-patch14", prefix="", hps=""))
    config.reference = ConfigDict(
        dict(source="pictures", count=0, seed=0, crop="middle", sha256="", file="")
    )
    config.comparison = ConfigDict(
        dict(
            models=(),
            teacher_samplers=("ddim",),
            teacher_steps=(50, 8, 4, 2),
            student_steps=(8, 4, 2, 1),
            w=(2.0, 6.5),  # 0 = conditional only; diffusers' guidance_scale is w + 1
            original_steps=50,
            spacing="trailing",
            batch_size=16,
            dtype="bfloat16",
            attention="xla",
        )
    )
    return config
