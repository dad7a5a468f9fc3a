"""Train assets/tiny_sd: a small Stable Diffusion on shapes2d, in diffusers' format.

    python examples/tiny_teacher/train.py --workdir runs/tiny_teacher --out assets/tiny_sd

Stages, each resumed where it was when the command is run again: vae, classifier (the judge of
the demo), tokenizer (a BPE of the captions), diffusion (text encoder and UNet together),
text_encoder (which shape lies where), diffusion again. README.md beside this file has the
numbers of the model that is shipped.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import orbax.checkpoint as ocp

from slam_jax.data import shapes2d, tokenizer
from slam_jax.diffusion import schedule
from slam_jax.nets import classifier, clip, unet, vae
from slam_jax.weights import pretrained, tensorfile, translate

TRAIN_SEED, HELD_OUT_SEED = 0, 1
VAE = vae.from_config(models.VAE)
CLASSIFIER = classifier.ShapesClassifier(shapes2d.LABEL_SIZES)


def draw_images(seed: int, num_images: int) -> tuple[np.ndarray, list[str]]:
    """The first num_images of a shapes2d dataset: uint8 [N, 32, 32, 3] and the captions."""
    source = shapes2d.Shapes2D(32, num_images, seed)
    elements = [source[i] for i in range(num_images)]
    return np.stack([e.image for e in elements]), [e.caption for e in elements]


def labels(captions: list[str]) -> np.ndarray:
    return np.stack([shapes2d.parse(caption).labels() for caption in captions])


def fit(
    workdir, params, loss, sample_batch, *, num_steps, learning_rate, ema_rate, decay_steps=None
):
    """Minimise loss(params, batch, key) with AdamW; returns the averaged parameters.

    sample_batch(step) makes the batch of a step; the learning rate falls to nothing at decay_steps
    (num_steps if None). Checkpoints lie in workdir, every 200 steps.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, 100, decay_steps or num_steps, 1e-6
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4)
    )

    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    everywhere, split = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))

    @jax.jit
    def update(state, batch):
        step, params, ema, opt_state = state
        key = jax.random.fold_in(jax.random.key(0), step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        rate = jnp.minimum(ema_rate, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, params)
        return (step + 1, params, ema, opt_state), metrics | {"loss": value}

    state = (jnp.int32(0), params, params, optimizer.init(params))
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(workdir.absolute(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        state = jax.device_put(state, everywhere)
        start = time.time()
        for step in range(first := int(state[0]), num_steps):
            state, metrics = update(state, jax.device_put(sample_batch(step), split))
            if (step + 1) % 50 == 0:
                values = " ".join(f"{k} {float(v):.5f}" for k, v in metrics.items())
                pace = (time.time() - start) / (step + 1 - first)
                print(
                    f"{workdir.name} {step + 1}/{num_steps} {values} {pace:.2f} s/step", flush=True
                )
            if (step + 1) % 200 == 0 or step + 1 == num_steps:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
    return state[2]


def normalize(images: np.ndarray) -> jax.Array:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def train_vae(workdir, images, *, num_steps):
    params = VAE.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]

    def loss(params, images, key):
        images = normalize(images)
        posterior = VAE.apply({"params": params}, images, method="encode")
        noise = jax.random.normal(key, posterior.mean.shape)
        latents = posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise
        decoded = VAE.apply({"params": params}, latents, method="decode")
        distance = jnp.sqrt((decoded - images) ** 2 + 1e-4).mean()
        kl = 0.5 * (posterior.mean**2 + jnp.exp(posterior.logvar) - 1 - posterior.logvar).mean()
        mse = ((decoded - images) ** 2).mean()
        return distance + 1e-3 * kl, {"mse": mse, "kl": kl}

    rng = np.random.default_rng(0)
    order = rng.integers(len(images), size=(num_steps, 16))
    return fit(
        workdir / "vae", params, loss, lambda step: images[order[step]],
        num_steps=num_steps, learning_rate=1.5e-3, ema_rate=0.995,
    )  # fmt: skip


def train_classifier(workdir, images, captions, *, num_steps):
    targets = labels(captions)
    params = CLASSIFIER.init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"]

    def loss(params, batch, key):
        images, targets = batch
        # Noise of up to 15 % keeps the judge from caring about a decoder's texture.
        noise_key, level_key = jax.random.split(key)
        level = jax.random.uniform(level_key, (len(images), 1, 1, 1), maxval=0.3)
        images = normalize(images) + level * jax.random.normal(noise_key, images.shape)
        _, logits = CLASSIFIER.apply({"params": params}, images)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[i], targets[:, i])
            for i in range(len(logits))
        ]
        hits = [logits[i].argmax(-1) == targets[:, i] for i in range(len(logits))]
        return jnp.stack(losses).sum(0).mean(), {"accuracy": jnp.stack(hits).all(0).mean()}

    rng = np.random.default_rng(1)
    order = rng.integers(len(images), size=(num_steps, 128))
    return fit(
        workdir / "classifier", params, loss,
        lambda step: (images[order[step]], targets[order[step]]),
        num_steps=num_steps, learning_rate=2e-3, ema_rate=0.99,
    )  # fmt: skip


def label_hits(classifier_params, images: np.ndarray, captions: list[str]) -> float:
    """Share of the images in which the classifier finds all that the caption says."""
    apply = jax.jit(CLASSIFIER.apply)
    _, logits = apply({"params": classifier_params}, normalize(images))
    found = np.stack([np.argmax(x, -1) for x in logits], -1)
    return float((found == labels(captions)).all(-1).mean())


def train_text_encoder(workdir, text_config, encoder_params, ids, captions, *, num_steps):
    """Teach the text encoder which of the two shapes lies where.

    As CLIP's contrastive training does for the real one: the last token's state must tell the
    picture's labels through a linear head. The UNet's loss alone had taught it both objects
    after 2,000 steps, but not which is above or on the left (LOG.md).
    """
    text_encoder = clip.from_config(text_config)
    targets = labels(captions)
    width, num_labels = text_config["hidden_size"], sum(shapes2d.LABEL_SIZES)
    heads = jax.random.normal(jax.random.key(4), (width, num_labels)) * width**-0.5
    params = {"encoder": encoder_params, "heads": heads}

    def loss(params, batch, key):
        del key
        ids, targets = batch
        states = text_encoder.apply({"params": params["encoder"]}, ids)
        logits = jnp.split(
            states[:, -1] @ params["heads"], np.cumsum(shapes2d.LABEL_SIZES)[:-1], -1
        )
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[i], targets[:, i])
            for i in range(len(logits))
        ]
        hits = [logits[i].argmax(-1) == targets[:, i] for i in range(len(logits))]
        return jnp.stack(losses).sum(0).mean(), {"accuracy": jnp.stack(hits).all(0).mean()}

    order = np.random.default_rng(3).integers(len(ids), size=(num_steps, 64))
    params = fit(
        workdir / "text_encoder", params, loss,
        lambda step: (ids[order[step]], targets[order[step]]),
        num_steps=num_steps, learning_rate=1e-3, ema_rate=0.99,
    )  # fmt: skip
    return params["encoder"]


def encode_all(vae_params, images: np.ndarray) -> np.ndarray:
    """Posterior mean and standard deviation of every image's latents, [2, N, 8, 8, 4]."""
    encode = jax.jit(lambda x: VAE.apply({"params": vae_params}, x, method="encode"))
    posteriors = [encode(normalize(chunk)) for chunk in np.split(images, len(images) // 500)]
    return np.stack(
        [
            np.concatenate([p.mean for p in posteriors]),
            np.concatenate([np.exp(0.5 * p.logvar) for p in posteriors]),
        ]
    )


def init_diffusion(text_config, ids):
    """Random parameters of text encoder and UNet."""
    return {
        "text_encoder": clip.from_config(text_config).init(jax.random.key(2), ids[:1])["params"],
        "unet": unet.from_config(models.UNET).init(
            jax.random.key(3), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32),
            jnp.zeros((1, 77, 64)),
        )["params"],
    }  # fmt: skip


def train_diffusion(
    workdir,
    text_config,
    params,
    latents,
    ids,
    null_ids,
    *,
    num_steps,
    decay_steps,
    max_weight,
    share_noisy=0.0,
    ema_rate=0.999,
):
    """UNet and text encoder together, on eps-prediction; captions are dropped one time in ten.

    max_weight: the error of eps counts 1 / alpha_t^2 times, but at most this. With 1 it is the
    plain loss, in which the noisy times, where it is decided what lies where, hardly count.
    share_noisy: of the times are drawn from the last 300 only.
    """
    mean, std = latents
    levels = schedule.from_config(models.SCHEDULER)
    text_encoder, net = clip.from_config(text_config), unet.from_config(models.UNET)

    def loss(params, batch, key):
        mean, std, ids = batch
        posterior_key, noise_key, time_key, noisy_key, drop_key = jax.random.split(key, 5)
        x_0 = mean + std * jax.random.normal(posterior_key, mean.shape)
        noise = jax.random.normal(noise_key, mean.shape)
        noisy = jax.random.uniform(noisy_key, (len(mean),)) < share_noisy
        t = jax.random.randint(time_key, (len(mean),), jnp.where(noisy, 700, 0), 1000)
        ids = jnp.where(jax.random.uniform(drop_key, (len(mean), 1)) < 0.1, null_ids, ids)
        text = text_encoder.apply({"params": params["text_encoder"]}, ids)
        alpha, sigma = levels(t)
        weight = jnp.minimum(alpha**-2, max_weight)
        eps = net.apply({"params": params["unet"]}, alpha * x_0 + sigma * noise, t, text)
        error = ((eps - noise) ** 2).mean()
        return (weight * (eps - noise) ** 2).mean() / weight.mean(), {"eps_error": error}

    order = np.random.default_rng(2).integers(len(ids), size=(decay_steps, 64))
    return fit(
        workdir, params, loss,
        lambda step: (mean[order[step]], std[order[step]], ids[order[step]]),
        num_steps=num_steps, decay_steps=decay_steps, learning_rate=1.5e-3, ema_rate=ema_rate,
    )  # fmt: skip


def write_classifier(folder: pathlib.Path, params) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensorfile.write(folder / "model.safetensors", translate.to_tensors(params), np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--num_images", type=int, default=40_000)
    args = parser.parse_args()
    images, captions = draw_images(TRAIN_SEED, args.num_images)
    held_out, held_out_captions = draw_images(HELD_OUT_SEED, 2000)

    vae_params = train_vae(args.workdir, images, num_steps=2500)
    decoded = np.asarray(jax.jit(VAE.apply)({"params": vae_params}, normalize(held_out)))
    rounded = np.clip(np.rint((decoded + 1) * 127.5), 0, 255).astype(np.uint8)
    mean, std = encode_all(vae_params, held_out)
    vae_config = models.VAE | {"scaling_factor": float((mean.var() + (std**2).mean()) ** -0.5)}

    classifier_params = train_classifier(args.workdir, images, captions, num_steps=1500)
    report = {
        "vae_mse": float(((decoded - np.asarray(normalize(held_out))) ** 2).mean()),
        "classifier_accuracy": label_hits(classifier_params, held_out, held_out_captions),
        "classifier_accuracy_decoded": label_hits(classifier_params, rounded, held_out_captions),
    }
    print(json.dumps(report), flush=True)

    tokenizer_folder = args.workdir / "tokenizer"
    vocabulary = [scene.caption() for scene in shapes2d.all_scenes()]
    vocab_size = models.write_tokenizer(tokenizer_folder, vocabulary)
    tokens = tokenizer.Tokenizer.from_folder(tokenizer_folder)
    text_config = models.TEXT_ENCODER | {"vocab_size": vocab_size}
    text_config |= {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos}
    ids, null_ids = tokens.encode(captions), tokens.encode([""])
    latents_file = args.workdir / "latents.npy"
    if not latents_file.exists():
        np.save(latents_file, encode_all(vae_params, images))
    latents = vae_config["scaling_factor"] * np.load(latents_file)

    def diffusion(number, params, **kwargs):
        return train_diffusion(
            args.workdir / f"diffusion_{number}", text_config, params, latents, ids, null_ids,
            **kwargs,
        )  # fmt: skip

    # As the shipped model was made, detours included (LOG.md).
    params = init_diffusion(text_config, ids)
    params = diffusion(1, params, num_steps=2000, decay_steps=4500, max_weight=1.0)
    params["text_encoder"] = train_text_encoder(
        args.workdir, text_config, params["text_encoder"], ids, captions, num_steps=1000
    )
    params = diffusion(2, params, num_steps=500, decay_steps=2000, max_weight=1.0)
    params = diffusion(3, params, num_steps=500, decay_steps=1500, max_weight=20.0)
    params = diffusion(
        4, params, num_steps=800, decay_steps=800, max_weight=100.0, share_noisy=0.75, ema_rate=0.99
    )
    model = pretrained.Pretrained(
        unet=pretrained.Component(models.UNET, params["unet"]),
        vae=pretrained.Component(vae_config, vae_params),
        text_encoder=pretrained.Component(text_config, params["text_encoder"]),
        scheduler=models.SCHEDULER,
        tokenizer=tokenizer_folder,
    )
    pretrained.write(args.out, model, dtype=np.float16)
    write_classifier(args.out / "classifier", classifier_params)
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
