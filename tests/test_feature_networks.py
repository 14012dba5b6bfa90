"""Inception's pool out of published state dicts, with random weights of their shapes."""

import numpy as np
import pytest
import torch

from evaluation.feature_networks import inception_features, pool_features
from evaluation.inception import WIDTH, InceptionPool
from tests.compat import relative_error
from utils.checkpoint import save_torch
from utils.config import UserError

# As torchvision 0.28 has them, without the classifiers
PARAMETERS = 21_785_568
NAMES = (
    "Conv2d_1a_3x3.conv.weight",
    "Mixed_5b.branch3x3dbl_3.bn.running_var",
    "Mixed_6a.branch3x3.conv.weight",
    "Mixed_6e.branch7x7dbl_5.conv.weight",
    "Mixed_7a.branch7x7x3_4.bn.weight",
    "Mixed_7c.branch3x3dbl_3b.conv.weight",
)


def test_the_network_has_the_published_parameters():
    with torch.device("meta"):
        network = InceptionPool("torchvision")
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert [shapes[name] for name in NAMES] == [
        (32, 3, 3, 3),
        (96,),
        (384, 288, 3, 3),
        (192, 192, 1, 7),
        (192,),
        (384, 384, 3, 1),
    ]
    assert len(shapes) == 94 * 6  # 94 convolutions, each with the five tensors of its batch norm


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """State dicts as torchvision and torch-fidelity publish them, with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = InceptionPool("2015").state_dict()
    bare = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    save_torch({**state, "fc.weight": torch.zeros(1000, WIDTH), "AuxLogits.x": torch.zeros(1)}, folder / "tv.pth")
    save_torch({**bare, "fc.weight": torch.zeros(1008, WIDTH), "fc.bias": torch.zeros(1008)}, folder / "2015.pth")
    return folder


def test_both_files_are_told_apart(files):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    settings = {"batch_size": 1, "precision": "fp32", "device": torch.device("cpu")}
    found = {name: inception_features(str(files / f"{name}.pth")) for name in ("tv", "2015")}
    assert [network.is_comparable for network in found.values()] == [False, True]
    assert len({network.sha256 for network in found.values()}) == 2  # the weights are the same, the graphs are not
    rows = {name: pool_features(network.network, [lambda: image], **settings) for name, network in found.items()}
    assert rows["tv"].shape == rows["2015"].shape == (1, WIDTH)
    assert relative_error(rows["tv"], rows["2015"]) > 0.01


def test_images_are_resized_as_the_weights_expect():
    ramp = np.repeat(np.arange(0, 250, 50, dtype=np.uint8)[None, :, None], 5, axis=0).repeat(3, axis=2)  # (5, 5, 3)
    with torch.device("meta"):  # of the network nothing but its name is asked
        networks = {name: InceptionPool(name) for name in ("2015", "torchvision")}
    old = networks["2015"].prepare(ramp)  # pixel i lies at 5 i / 299
    at = np.minimum(np.arange(299) * 5 / 299, 4) * 50
    np.testing.assert_allclose(old[0, 0].numpy(), (at - 128) / 128, atol=1e-5)
    new = networks["torchvision"].prepare(ramp)  # centres of pixels together
    at = np.clip((np.arange(299) + 0.5) * 5 / 299 - 0.5, 0, 4) * 50
    np.testing.assert_allclose(new[2, 7].numpy(), at / 127.5 - 1, atol=1e-4)


@pytest.mark.parametrize("state", [{"x": torch.zeros(1)}, {"fc.weight": torch.zeros(10, WIDTH)}])
def test_other_networks_are_refused(tmp_path, state):
    save_torch(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"features\.weights: .* has no classifier of 1000"):
        inception_features(str(tmp_path / "w.pth"))


def test_incomplete_weights_are_refused(tmp_path):
    save_torch({"fc.weight": torch.zeros(1000, WIDTH), "x": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"features\.weights: .*does not fit InceptionPool: 470 missing .*1 unexpected"):
        inception_features(str(tmp_path / "w.pth"))
