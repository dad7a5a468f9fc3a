"""The judge of the demo: which two shapes a 32x32 picture shows, and its features.

Five heads, in the order of shapes2d.Scene.labels(); the 64 activations under them are the
features of the demo's Frechet distance.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from slam_jax.shapes import Image

WIDTHS = (32, 64, 96)
NUM_FEATURES = 64


class ShapesClassifier(nn.Module):
    """Strided convolutions, one dense layer of features, one linear head per label."""

    label_sizes: tuple[int, ...]

    @nn.compact
    def __call__(
        self, images: Image
    ) -> tuple[Float[Array, "B 64"], tuple[Float[Array, "B _"], ...]]:
        """images [B, 32, 32, 3] in [-1, 1] -> (features, logits of each label)."""
        x = images
        for i, width in enumerate(WIDTHS):
            x = nn.Conv(width, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), name=f"conv.{i}")(
                x
            )
            x = nn.silu(nn.GroupNorm(8, name=f"norm.{i}")(x))
        x = x.reshape(x.shape[0], -1)
        features = nn.tanh(nn.Dense(NUM_FEATURES, name="features")(x))
        heads = [
            nn.Dense(size, name=f"heads.{i}")(features) for i, size in enumerate(self.label_sizes)
        ]
        return features, tuple(head.astype(jnp.float32) for head in heads)
