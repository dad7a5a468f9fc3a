"""What a student starts as."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

from slam_jax import experiment, settings, students
from slam_jax.errors import UserError
from slam_jax.weights import pretrained, translate
from slam_jax.weights import student as student_folder

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"


def _settings(start: pathlib.Path, gamma_dim: int = 8) -> settings.Settings:
    config = runpy.run_path(str(CONFIG))["get_config"]().to_dict()
    config["student"] |= {"start": str(start), "gamma_dim": gamma_dim}
    return settings.from_config(config)


@pytest.fixture
def other(tiny_folder):
    """The teacher, all its parameters changed."""
    model = pretrained.read(tiny_folder)
    unet = model.unet._replace(params=jax.tree.map(lambda x: x + 1, model.unet.params))
    return model._replace(unet=unet)


def _start(chosen, teacher):
    return translate.load(experiment.student(chosen, teacher).params)


def test_a_student_goes_on_from_a_student(tiny_folder, other, tmp_path):
    rng = np.random.default_rng(0)
    unet = students.student_of(other.unet, 8, students.random_cond_proj, rng)
    pretrained.write(tmp_path / "start", student_folder.student(other, unet))
    teacher = pretrained.find(tiny_folder).unet
    params = _start(_settings(tmp_path / "start"), teacher)
    jax.tree.map(np.testing.assert_array_equal, params, unet.params)

    with pytest.raises(UserError, match=r"cond_proj.kernel is \(8, 8\) there and \(16, 8\)"):
        experiment.student(_settings(tmp_path / "start", gamma_dim=16), teacher)


def test_a_student_starts_as_a_plain_unet(tiny_folder, other, tmp_path):
    pretrained.write(tmp_path / "start", other)
    teacher = pretrained.find(tiny_folder).unet
    params = _start(_settings(tmp_path / "start"), teacher)
    # configs/tiny.py has that layer start at zero.
    assert np.all(params["time_embedding"].pop("cond_proj")["kernel"] == 0)
    jax.tree.map(np.testing.assert_array_equal, params, other.unet.params)
