"""torch-fidelity's Inception and resize, with random weights: what ours are compared with.

torch-fidelity asks for torchvision, of which not every torch has a build; these modules do not
need it. So it is installed by `pip install --no-deps`, and its __init__, which imports the whole of
it, is passed by.
"""

import importlib
import importlib.util
import sys
import types
from unittest import mock

import numpy as np
import torch


def module(name: str) -> types.ModuleType:
    """torch_fidelity.NAME."""
    if "torch_fidelity" not in sys.modules:
        package = types.ModuleType("torch_fidelity")
        spec = importlib.util.find_spec("torch_fidelity")
        assert spec, "pip install --no-deps torch_fidelity==0.4.0"
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["torch_fidelity"] = package
    return importlib.import_module(f"torch_fidelity.{name}")


def untrained() -> torch.nn.Module:
    """With random weights and batch norms' statistics, every number its own."""
    net_type = module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    # torch's own first weights take seconds to draw.
    with (
        mock.patch.object(torch, "load"),
        mock.patch.object(net_type, "load_state_dict"),
        torch.device("meta"),
    ):
        net = net_type("inception", ["2048"], "unread")
    net.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for name, tensor in net.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.6, 1.4)
        elif tensor.is_floating_point():
            tensor.normal_(0.0, 0.5)
        else:
            tensor.fill_(1)
    return net


def inception() -> torch.nn.Module:
    """The same after its batch norms have seen pictures, so that activations keep their scale."""
    net = untrained()
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    net.train()(to_torch(pictures(2, 40, 40)))
    return net.eval()


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """uint8 [count, height, width, 3]: smooth waves with some noise, each picture its own."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / 10.0
    frequency, phase = rng.uniform(-2, 2, (2, count, 1, 1, 3)), rng.uniform(0, 6, (count, 1, 1, 3))
    waves = np.sin(frequency[0] * y[..., None] + frequency[1] * x[..., None] + phase)
    noisy = 127.5 + 100.0 * waves + rng.normal(0, 40, waves.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def to_torch(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
