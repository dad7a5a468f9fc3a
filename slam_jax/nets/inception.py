"""InceptionV3 (Szegedy et al. 2016) as the Frechet inception distance has it (Heusel et al. 2017).

Its weights, inception-2015-12-05, are not torchvision's, and two things in it are TensorFlow's:
average pooling leaves the padding out of its mean, and the last block pools by maximum. Submodules
carry the names of pytorch-fid's and torch-fidelity's state dicts. Batch norm is an affine map by
statistics that the file gives; there is no training.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIZE = 299  # side of the pictures that it takes, in pixels
NUM_FEATURES = 2048

_Kernel = tuple[int, int]
_EPSILON = 1e-3


class BatchNorm(nn.Module):
    """Batch norm as inference applies it: by given mean and variance, then scale and bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        variance = self.param("var", nn.initializers.ones, shape)
        scale = scale * jax.lax.rsqrt(variance + _EPSILON)
        return x * _as_row(scale) + _as_row(bias - mean * scale)


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm, ReLU. Padded only where height and width stay."""

    channels: int
    kernel: _Kernel
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W _"]) -> Float[Array, "B _ _ C"]:
        # GPUs from Ampere on otherwise multiply in TF32, which moves the distance.
        x = nn.Conv(
            self.channels, self.kernel, strides=(self.stride,) * 2, padding=self.padding,
            use_bias=False, precision=jax.lax.Precision.HIGHEST, name="conv",
        )(x)  # fmt: skip
        return nn.relu(BatchNorm(name="bn")(x))


class InceptionA(nn.Module):
    """1x1, 5x5 and twice 3x3, and the average of neighbours. 35 x 35."""

    pool_channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W _"]) -> Float[Array, "B H W _"]:
        one = BasicConv2d(64, (1, 1), name="branch1x1")(x)
        five = _chain("branch5x5", x, (48, (1, 1)), (64, (5, 5)))
        double = _chain("branch3x3dbl", x, (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
        pooled = BasicConv2d(self.pool_channels, (1, 1), name="branch_pool")(_average(x))
        return jnp.concatenate([one, five, double, pooled], axis=-1)


class InceptionB(nn.Module):
    """35 x 35 -> 17 x 17."""

    @nn.compact
    def __call__(self, x: Float[Array, "B _ _ _"]) -> Float[Array, "B _ _ _"]:
        three = BasicConv2d(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        double = _chain("branch3x3dbl", x, (64, (1, 1)), (96, (3, 3)), (96, (3, 3), 2, "VALID"))
        return jnp.concatenate([three, double, _halved(x)], axis=-1)


class InceptionC(nn.Module):
    """1x1, once and twice a 7x7 made of two, and the average of neighbours. 17 x 17."""

    channels: int  # between the convolutions of a 7x7

    @nn.compact
    def __call__(self, x: Float[Array, "B H W _"]) -> Float[Array, "B H W _"]:
        one = BasicConv2d(192, (1, 1), name="branch1x1")(x)
        thin, row, column = (
            (self.channels, (1, 1)),
            (self.channels, (1, 7)),
            (self.channels, (7, 1)),
        )
        seven = _chain("branch7x7", x, thin, row, (192, (7, 1)))
        double = _chain("branch7x7dbl", x, thin, column, row, column, (192, (1, 7)))
        pooled = BasicConv2d(192, (1, 1), name="branch_pool")(_average(x))
        return jnp.concatenate([one, seven, double, pooled], axis=-1)


class InceptionD(nn.Module):
    """17 x 17 -> 8 x 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "B _ _ _"]) -> Float[Array, "B _ _ _"]:
        three = _chain("branch3x3", x, (192, (1, 1)), (320, (3, 3), 2, "VALID"))
        seven = _chain(
            "branch7x7x3", x,
            (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2, "VALID"),
        )  # fmt: skip
        return jnp.concatenate([three, seven, _halved(x)], axis=-1)


class InceptionE(nn.Module):
    """1x1, 3x3 split into row and column, the same after another 3x3, and a pool. 8 x 8.

    pools_maximum: what the branch without kernels takes of neighbours; their average otherwise.
    """

    pools_maximum: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W _"]) -> Float[Array, "B H W 2048"]:
        one = BasicConv2d(320, (1, 1), name="branch1x1")(x)
        three = _cross("branch3x3_2", _chain("branch3x3", x, (384, (1, 1))))
        double = _chain("branch3x3dbl", x, (448, (1, 1)), (384, (3, 3)))
        double = _cross("branch3x3dbl_3", double)
        pooled = _maximum(x) if self.pools_maximum else _average(x)
        pooled = BasicConv2d(192, (1, 1), name="branch_pool")(pooled)
        return jnp.concatenate([one, three, double, pooled], axis=-1)


class Inception(nn.Module):
    """Pictures -> the features of the Frechet inception distance."""

    @nn.compact
    def __call__(self, pixels: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """pixels: (x - 128) / 128 of values x in 0..255 (metrics/inception_input.py)."""
        x = BasicConv2d(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(pixels)
        x = BasicConv2d(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = BasicConv2d(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = BasicConv2d(80, (1, 1), name="Conv2d_3b_1x1")(_halved(x))
        x = BasicConv2d(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _halved(x)
        for letter, pool_channels in (("b", 32), ("c", 64), ("d", 64)):
            x = InceptionA(pool_channels, name=f"Mixed_5{letter}")(x)
        x = InceptionB(name="Mixed_6a")(x)
        for letter, channels in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = InceptionC(channels, name=f"Mixed_6{letter}")(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(pools_maximum=False, name="Mixed_7b")(x)
        x = InceptionE(pools_maximum=True, name="Mixed_7c")(x)
        return x.mean((1, 2))


def _chain(
    name: str,
    x: Float[Array, "B _ _ _"],
    *layers: tuple[int, _Kernel] | tuple[int, _Kernel, int, str],
) -> Float[Array, "B _ _ _"]:
    """BasicConv2d after BasicConv2d, named name_1, name_2 and so on."""
    for i, layer in enumerate(layers, 1):
        x = BasicConv2d(*layer, name=f"{name}_{i}")(x)
    return x


def _cross(name: str, x: Float[Array, "B H W _"]) -> Float[Array, "B H W _"]:
    """A row and a column of three, side by side."""
    row = BasicConv2d(384, (1, 3), name=f"{name}a")(x)
    column = BasicConv2d(384, (3, 1), name=f"{name}b")(x)
    return jnp.concatenate([row, column], axis=-1)


def _average(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return nn.max_pool(x, (3, 3), padding="SAME")


def _halved(x: Float[Array, "B _ _ C"]) -> Float[Array, "B _ _ C"]:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _as_row(x: Float[Array, "C"]) -> Float[Array, "1 1 1 C"]:
    return x[None, None, None, :]
