"""A picture counts only when every label is found."""

import numpy as np

from slam_jax.metrics import prompt_accuracy


def test_one_wrong_label_of_two_spoils_the_picture():
    shapes = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [5.0, 1.0]])
    colors = np.array([[0.0, 0.0, 9.0], [1.0, 0.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 0.0]])
    labels = np.array([[0, 2], [1, 0], [1, 1], [0, 0]])
    assert prompt_accuracy.prompt_accuracy([shapes, colors], labels) == 0.75
