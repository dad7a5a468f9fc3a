"""FID on 5,000 images: every image of COCO 2017's validation set, by its caption of the lowest id.

Few images for 2,048 features: the FID is biased upwards by points, much the same for all models,
so it compares models here and says little of others' numbers. 512 pixels drawn and measured,
references the 5,000 images themselves, their middle squares.

    python -m slam_jax.evaluate --protocol configs/eval/coco2017_5k.py --out runs/coco2017 \
        --captions annotations/captions_val2017.json --reference val2017 --model runs/sd15/student
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.metrics = ("fid", "kid", "clip")
    config.kid_subset = 500
    config.bootstrap = 50

    config.prompts = ConfigDict(dict(source="coco", count=5_000, seed=0, file_sha256="", sha256=""))
    config.images = ConfigDict(dict(size=512, resize=512, filter="lanczos"))
    config.features = ConfigDict(
        dict(network="inception", mode="clean", weights="pt_inception-2015-12-05-6726825d.pth")
    )
    config.clip = ConfigDict(dict(model="openai/clip-vit-large-patch14", prefix="", hps=""))
    config.reference = ConfigDict(
        dict(source="pictures", count=5_000, seed=0, crop="middle", sha256="", file="")
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
