"""How well pictures show what their captions say, as a CLIP sees it.

100 x the cosine of a picture's and its caption's embedding, as most papers on text-to-image report
it. Neither clipped at 0 nor multiplied by 2.5, as CLIPScore (Hessel et al. 2021) has it.
"""

import numpy as np
from jaxtyping import Float, Float64


def per_pair(
    pictures: Float[np.ndarray, "N P"], captions: Float[np.ndarray, "N P"]
) -> Float64[np.ndarray, "N"]:
    """100 x the cosine of every picture's embedding and its caption's; of any lengths but 0.

    In [-100, 100]; real pictures have 20 to 35, whatever the CLIP. Over pairs that are independent,
    estimate.of gives mean and standard error.
    """
    pictures, captions = (np.asarray(each, np.float64) for each in (pictures, captions))
    lengths = np.linalg.norm(pictures, axis=1) * np.linalg.norm(captions, axis=1)
    return 100.0 * (pictures * captions).sum(axis=1) / lengths
