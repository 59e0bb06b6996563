"""The DSH network against loops written from the paper's table, its loss against a double loop over pairs."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from simsearch.losses.dsh import DSHLoss
from simsearch.models.dsh import DSHNetwork, local_response

# ------------------------------------------------------------------------------ the network, in loops


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """5 x 5, stride 1, padding 2, of one image (C, H, W)."""
    _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2)))
    out = np.zeros((len(weight), height, width))
    for i in range(5):
        for j in range(5):
            out += np.tensordot(weight[:, :, i, j], padded[:, i : i + height, j : j + width], axes=1)
    return out + bias[:, None, None]


def pool(x: np.ndarray, what) -> np.ndarray:
    """3 x 3 windows every 2 pixels as Caffe counts them: those that stick out are cut off."""
    side = x.shape[1]
    places = math.ceil((side - 3) / 2) + 1
    out = np.empty((len(x), places, places))
    for i in range(places):
        for j in range(places):
            out[:, i, j] = what(x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], axis=(1, 2))
    return out


def normalise(x: np.ndarray) -> np.ndarray:
    """x / (1 + 5e-5 * mean over 3 x 3 of x^2)^0.75, zeros beyond the border counted."""
    out = np.empty_like(x)
    _, height, width = x.shape
    for i in range(height):
        for j in range(width):
            window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            out[:, i, j] = x[:, i, j] / (1 + 5e-5 * (window**2).sum((1, 2)) / 9) ** 0.75
    return out


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0)


def naive_code(network: DSHNetwork, image: np.ndarray) -> np.ndarray:
    p = {name: value.double().numpy() for name, value in network.state_dict().items()}
    x = image - p["mean"]
    x = normalise(relu(pool(convolve(x, p["conv1.weight"], p["conv1.bias"]), np.max)))
    assert x.shape == (32, 16, 16)
    x = normalise(relu(pool(convolve(x, p["conv2.weight"], p["conv2.bias"]), np.mean)))
    assert x.shape == (32, 8, 8)
    x = pool(relu(convolve(x, p["conv3.weight"], p["conv3.bias"])), np.mean)
    assert x.shape == (64, 4, 4)
    x = relu(p["hidden.weight"] @ x.reshape(-1) + p["hidden.bias"])
    return p["head.weight"] @ x + p["head.bias"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture
def network(images) -> DSHNetwork:
    torch.manual_seed(0)
    network = DSHNetwork(12)
    network.prepare(images, torch.arange(len(images)))
    with torch.no_grad():
        for layer in (network.conv1, network.conv2, network.conv3, network.hidden, network.head):
            layer.bias.uniform_(-0.5, 0.5)
    return network.eval()


def test_forward_equals_the_loops(network, images):
    with torch.no_grad():
        codes = network(images[:3])
    assert codes.shape == (3, 12)
    naive = np.stack([naive_code(network, image.double().numpy()) for image in images[:3]])
    np.testing.assert_allclose(codes.numpy(), naive, rtol=1e-4, atol=1e-4 * np.abs(naive).max())


def test_float_and_uint8_images_and_embed_are_one(network, images):
    with torch.no_grad():
        assert torch.equal(network(images.float()), network(images))
        assert torch.equal(network.embed(images), network(images))


@pytest.mark.parametrize(("bits", "count"), [(12, 597_840), (48, 597_840 + 36 * 501)])
def test_number_of_parameters(bits, count):
    network = DSHNetwork(bits)
    assert sum(p.numel() for p in network.parameters()) == count
    assert (network.bits, network.dimension, network.input_size) == (bits, bits, 32)


def test_layers_see_the_shapes_of_the_table(network, images):
    seen = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].shape[1:], y.shape[1:])}))
    network(images)
    assert {name: (tuple(x), tuple(y)) for name, (x, y) in seen.items()} == {
        "conv1": ((3, 32, 32), (32, 32, 32)),
        "conv2": ((32, 16, 16), (32, 16, 16)),
        "conv3": ((32, 8, 8), (64, 8, 8)),
        "hidden": ((1024,), (500,)),
        "head": ((500,), (12,)),
    }


def test_weights_are_drawn_as_caffe_does():
    network = DSHNetwork(48)
    fan_in = {"conv1": 75, "conv2": 800, "conv3": 800, "hidden": 1024, "head": 500}
    for name, inputs in fan_in.items():
        layer = getattr(network, name)
        bound = math.sqrt(3 / inputs)
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(inputs), rel=0.05)
        assert not layer.bias.any()


def test_mean_image_is_the_training_set_s():
    images = torch.randint(0, 256, (4099, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    network = DSHNetwork(12)
    for rows in (torch.arange(4099), torch.arange(1, 4099, 2)):
        network.prepare(images, rows)
        np.testing.assert_allclose(network.mean.numpy(), images[rows].numpy().mean(0, dtype=np.float64), rtol=1e-6)
    assert "mean" in network.state_dict()  # a checkpoint and a catalog keep it
    assert not any(name == "mean" for name, _ in network.named_parameters())


def test_local_response_counts_zeros_beyond_the_border():
    x = torch.full((1, 2, 3, 3), 100.0)
    x[:, 1] = 0  # each channel by itself
    y = local_response(x)
    wanted = [100 / (1 + 5e-5 * 1e4 * n / 9) ** 0.75 for n in (4, 6, 9)]
    assert [y[0, 0, 0, 0].item(), y[0, 0, 0, 1].item(), y[0, 0, 1, 1].item()] == pytest.approx(wanted)
    assert not y[:, 1].any()


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 32, 32), (2, 3, 32, 28), (3, 32, 32)])
def test_other_sizes_are_refused_with_a_way_out(shape):
    image = torch.zeros(shape, dtype=torch.uint8)
    rows = torch.arange(len(image))
    for call in (DSHNetwork(12), partial(DSHNetwork(12).prepare, rows=rows)):
        with pytest.raises(ValueError, match=r"3 x 32 x 32.*model=hashing"):
            call(image)


def test_no_bits_are_refused():
    with pytest.raises(ValueError, match="bits=0"):
        DSHNetwork(0)


# ------------------------------------------------------------------------------ the loss, in loops


def naive_loss(b: np.ndarray, labels: np.ndarray, margin: float, weight: float) -> float:
    n, total = len(b), 0.0
    for i in range(n):
        for j in range(i + 1, n):
            square = ((b[i] - b[j]) ** 2).sum()
            total += 0.5 * square if labels[i] == labels[j] else 0.5 * max(margin - square, 0)
            total += weight * (np.abs(np.abs(b[i]) - 1).sum() + np.abs(np.abs(b[j]) - 1).sum())
    return total / (n * (n - 1))


def release_gradient(b: np.ndarray, labels: np.ndarray, margin: float, weight: float) -> np.ndarray:
    n = len(b)
    gradient = np.zeros_like(b)
    for i in range(n):
        for j in range(n):
            away = b[i] - b[j]
            if i == j:
                continue
            if labels[i] == labels[j]:
                gradient[i] += away / (n * (n - 1))
            elif (away**2).sum() < margin:
                gradient[i] -= away / (n * (n - 1))
        for k, value in enumerate(b[i]):
            gradient[i, k] += weight / n * (1 if value >= 1 or -1 <= value <= 0 else -1)
    return gradient


batches = st.tuples(st.integers(2, 7), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        # Multiples of 1/8 are exact in floats, so that kinks at -1, 0 and 1 and in the margin are really met.
        arrays(np.int64, shape, elements=st.integers(-20, 20)).map(lambda x: x / 8),
        arrays(np.int64, shape[0], elements=st.integers(-1, 2)),
    )
)


@settings(max_examples=100, deadline=None)
@given(batches, st.sampled_from([None, 0.3, 50.1]), st.sampled_from([0.0, 0.01, 1.0]))
def test_loss_and_gradient_equal_the_double_loop(batch, margin, weight):
    values, labels = batch
    wide = 2.0 * values.shape[1] + 1e-3 if margin is None else margin  # no pair lies on the margin itself
    codes = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss = DSHLoss(margin=wide, weight=weight)(codes, torch.from_numpy(labels))
    loss.backward()
    assert loss.item() == pytest.approx(naive_loss(values, labels, wide, weight), rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(codes.grad.numpy(), release_gradient(values, labels, wide, weight), atol=1e-9)


def test_without_a_margin_it_is_twice_the_bits():
    codes = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(8) % 3
    by_default = DSHLoss()(codes, labels).item()
    assert by_default == pytest.approx(naive_loss(codes.numpy(), labels.numpy(), 12.0, 0.01))
    assert by_default == DSHLoss(margin=12.0)(codes, labels).item()


def test_two_codes_by_hand():
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], requires_grad=True)
    # D^2 = 4.25, margin 4: one class costs 2.125, two classes nothing; n (n - 1) = 2.
    quantisation = 0.01 * (0 + 1 + 0 + 0.5) / 2
    assert DSHLoss()(codes, torch.tensor([3, 3])).item() == pytest.approx(2.125 / 2 + quantisation)
    loss = DSHLoss()(codes, torch.tensor([3, 4]))
    assert loss.item() == pytest.approx(quantisation)
    loss.backward()
    # Only the regulariser is left: +1 at 1, 0 and -1, -1 at 0.5.
    torch.testing.assert_close(codes.grad, 0.005 * torch.tensor([[1.0, 1.0], [1.0, -1.0]]))


def test_sub_gradient_of_the_regulariser_at_its_kinks():
    values = [-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0]
    wanted = [-1, 1, 1, 1, 1, -1, 1, 1]
    codes = torch.tensor([values, values], requires_grad=True)
    DSHLoss(weight=1.0)(codes, torch.tensor([0, 0])).backward()  # equal codes of one class: nothing pulls
    assert codes.grad.tolist() == [[sign / 2 for sign in wanted]] * 2


def test_one_code_costs_nothing_and_keeps_its_graph():
    codes = torch.randn(1, 4, requires_grad=True)
    loss = DSHLoss()(codes, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0
    assert not codes.grad.any()


def test_a_batch_of_one_class_is_only_pulled_together():
    codes = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = DSHLoss(weight=0)(codes, torch.zeros(6, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(codes.var(0, correction=1).sum().item() / 2)  # sum of D^2 = n^2 * variance
    assert (codes.grad * (codes - codes.mean(0))).sum(1).min() > 0


@pytest.mark.parametrize("arguments", [{"margin": 0.0}, {"margin": -1.0}, {"weight": -0.1}])
def test_wrong_values_are_named(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"loss.{name}={value}"):
        DSHLoss(**arguments)
