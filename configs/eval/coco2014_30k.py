"""FID on 30,000 captions of COCO 2014's validation images, 512 pixels drawn, 256 measured.

As DMD2, GigaGAN and others report it, but for the captions, which each of them chose in another
way: here one an image, that of the lowest id, for images in the order of sha256("SEED ID").
References are all 40,504 images of val2014, their middle squares, brought to 256 pixels by the
same Lanczos filter. Features are clean-fid's.

Fetch val2014.zip and annotations_trainval2014.zip from cocodataset.org, Inception's weights from
the releases of mseitzer/pytorch-fid and a CLIP such as openai/clip-vit-large-patch14, and:

    python -m slam_jax.evaluate --protocol configs/eval/coco2014_30k.py --out runs/coco2014 \
        --captions annotations/captions_val2014.json --reference val2014 \
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --model runs/sd15/student
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.metrics = ("fid", "kid", "clip")
    config.kid_subset = 1000
    config.bootstrap = 20

    config.prompts = ConfigDict(
        dict(source="coco", count=30_000, seed=0, file_sha256="", sha256="")
    )
    config.images = ConfigDict(dict(size=512, resize=256, filter="lanczos"))
    config.features = ConfigDict(
        dict(network="inception", mode="clean", weights="pt_inception-2015-12-05-6726825d.pth")
    )
    config.clip = ConfigDict(dict(model="openai/clip-vit-large-patch14", prefix="", hps=""))
    config.reference = ConfigDict(
        dict(source="pictures", count=40_504, seed=0, crop="middle", sha256="", file="")
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
