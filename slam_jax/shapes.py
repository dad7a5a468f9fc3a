"""Array vocabulary: the shapes that cross module borders.

B batch, H W image, h w latent, C channels, CC their means and then log-variances, L tokens,
D text width, P pooled text's width, T training times.
Checked by an import hook in the tests only; production pays nothing.
"""

from typing import NamedTuple

from jax import export
from jaxtyping import Array, Float, Int, Key, Real, UInt8

Image = Float[Array, "B H W 3"]
Pixels = UInt8[Array, "B H W 3"]
Latent = Float[Array, "B h w C"]
Moments = Float[Array, "B h w CC"]
Coeff = Float[Array, "B 1 1 1"]
Timestep = Int[Array, "B"]
Time = Real[Array, "B"]  # some samplers ask a network between two of training's times
TokenIds = Int[Array, "B L"]
Text = Float[Array, "B L D"]
PerExample = Float[Array, "B"]
PRNGKey = Key[Array, ""]
Guidance = float | Float[Array, ""]  # w, where 0 is the conditional prediction alone


class SDXLText(NamedTuple):
    """What an SDXL UNet is told: the text of both encoders, and sizes in pixels.

    time_ids: original height and width, the crop's top and left, target height and width.
    """

    hidden_states: Text
    pooled: Float[Array, "B P"]
    time_ids: Int[Array, "B 6"]


# So that a program that takes it can be kept (runtime/executables.py).
export.register_namedtuple_serialization(SDXLText, serialized_name="slam_jax.SDXLText")

# Of every UNet: the text alone in SD 1.x and 2.x.
Conditioning = Text | SDXLText
