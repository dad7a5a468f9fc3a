"""How well pictures show what their captions say, as a CLIP sees it.

100 x the cosine of a picture's and its caption's embedding, as most papers on text-to-image report
it. Neither clipped at 0 nor multiplied by 2.5, as CLIPScore (Hessel et al. 2021) has it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64


class ClipScore(NamedTuple):
    """In [-100, 100]; real pictures have 20 to 35, whatever the CLIP."""

    mean: float
    standard_error: float


def per_pair(
    pictures: Float[np.ndarray, "N P"], captions: Float[np.ndarray, "N P"]
) -> Float64[np.ndarray, "N"]:
    """100 x the cosine of every picture's embedding and its caption's; of any lengths but 0."""
    pictures, captions = (np.asarray(each, np.float64) for each in (pictures, captions))
    lengths = np.linalg.norm(pictures, axis=1) * np.linalg.norm(captions, axis=1)
    return 100.0 * (pictures * captions).sum(axis=1) / lengths


def clip_score(pictures: Float[np.ndarray, "N P"], captions: Float[np.ndarray, "N P"]) -> ClipScore:
    """Mean over N >= 2 pairs and its standard error, the pairs taken as independent."""
    scores = per_pair(pictures, captions)
    return ClipScore(float(scores.mean()), float(scores.std(ddof=1) / np.sqrt(len(scores))))
