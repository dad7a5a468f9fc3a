"""Share of pictures that show what their prompts say, as a classifier sees it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def prompt_accuracy(
    logits: Sequence[Float[np.ndarray, "N _"]], labels: Int[np.ndarray, "N K"]
) -> float:
    """logits: one array per label, K of them; a picture counts when all K are found. In [0, 1]."""
    found = np.stack([np.argmax(head, axis=-1) for head in logits], axis=-1)
    return float((found == labels).all(axis=-1).mean())
