"""Train UNet and text encoder of a finished tiny teacher further; the rest stays as it is.

    python examples/tiny_teacher/polish.py --model runs/tiny_sd --workdir runs/polish --out DIR

The last stage of assets/tiny_sd: all times alike, where train.py ended on the noisy ones.
"""

import argparse
import pathlib

import numpy as np
import train

from slam_jax.data import tokenizer
from slam_jax.weights import pretrained


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--num_steps", type=int, default=1600)
    args = parser.parse_args()

    model = pretrained.read(args.model)
    tokens = tokenizer.Tokenizer.from_folder(model.tokenizer)
    images, captions = train.draw_images(train.TRAIN_SEED, 40_000)
    latents = model.vae.config["scaling_factor"] * train.encode_all(model.vae.params, images)
    params = train.train_diffusion(
        args.workdir / "polish", model.text_encoder.config,
        {"text_encoder": model.text_encoder.params, "unet": model.unet.params},
        latents, tokens.encode(captions), tokens.encode([""]),
        num_steps=args.num_steps, decay_steps=args.num_steps, max_weight=10.0,
    )  # fmt: skip
    polished = model._replace(
        unet=model.unet._replace(params=params["unet"]),
        text_encoder=model.text_encoder._replace(params=params["text_encoder"]),
    )
    pretrained.write(args.out, polished, dtype=np.float16)


if __name__ == "__main__":
    main()
