"""The network, its initial weights and its input are the tutorial's."""

import torch

import train
from trial import batch


def test_shape_and_parameters():
    net = train.Net()
    assert net(torch.zeros(7, 3, 32, 32)).shape == (7, 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == 62_006
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == {
        "conv1.weight": (6, 3, 5, 5),
        "conv1.bias": (6,),
        "conv2.weight": (16, 6, 5, 5),
        "conv2.bias": (16,),
        "fc1.weight": (120, 400),
        "fc1.bias": (120,),
        "fc2.weight": (84, 120),
        "fc2.bias": (84,),
        "fc3.weight": (10, 84),
        "fc3.bias": (10,),
    }


def test_the_initial_weights_are_torchs():
    torch.manual_seed(3)
    ours = train.Net().conv1.weight
    torch.manual_seed(3)
    assert torch.equal(ours, torch.nn.Conv2d(3, 6, 5).weight)


def test_normalize_is_the_tutorials():
    pixels = torch.arange(256, dtype=torch.uint8)
    expected = (pixels.double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(batch.normalize(pixels).double(), expected, atol=1e-6, rtol=0)
