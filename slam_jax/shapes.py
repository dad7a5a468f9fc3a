"""Array vocabulary: the shapes that cross module borders.

B batch, H W image, h w latent, C channels, L tokens, D text width, T training times.
Checked by an import hook in the tests only; production pays nothing.
"""

from jaxtyping import Array, Float, Int, Key

Image = Float[Array, "B H W 3"]
Latent = Float[Array, "B h w C"]
Coeff = Float[Array, "B 1 1 1"]
Timestep = Int[Array, "B"]
TokenIds = Int[Array, "B L"]
Text = Float[Array, "B L D"]
PerExample = Float[Array, "B"]
PRNGKey = Key[Array, ""]
