"""CLIP score against torch's cosine and the spread of repeated draws."""

import numpy as np
import pytest
import torch

from slam_jax.metrics import clip_score, estimate


def test_pairs_have_a_hundred_times_torchs_cosine():
    rng = np.random.default_rng(0)
    pictures, captions = (rng.normal(size=(7, 5)).astype(np.float32) for _ in range(2))
    theirs = torch.cosine_similarity(*map(torch.from_numpy, (pictures, captions))).numpy()
    scores = clip_score.per_pair(pictures, 1000 * captions)
    np.testing.assert_allclose(scores, 100 * theirs, rtol=1e-5)
    assert scores.min() < 0  # not clipped
    assert estimate.of(clip_score.per_pair(pictures, captions)).mean == pytest.approx(
        100 * theirs.mean()
    )


def test_standard_error_is_the_spread_of_means():
    """Of 4000 draws of 20 pairs; its own error is about 1 %."""
    rng = np.random.default_rng(1)
    angles = rng.uniform(0, 1, (4000, 20))
    pictures = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    captions = np.broadcast_to([1.0, 0.0], (20, 2))
    draws = [estimate.of(clip_score.per_pair(each, captions)) for each in pictures]
    spread = np.std([draw.mean for draw in draws])
    assert np.mean([draw.standard_error for draw in draws]) == pytest.approx(spread, rel=0.05)
