"""Every loss against its definition written as loops, and its gradient against that of the loops."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor, nn

from simsearch.losses.classification import ClassificationLoss
from simsearch.losses.greedyhash import GreedyHashLoss
from simsearch.losses.hashnet import HashNetLoss
from simsearch.losses.memory import CrossBatchMemory
from simsearch.losses.orthohash import OrthoHashLoss, _hadamard, binary_targets
from simsearch.losses.triplet import BatchHardTripletLoss, TripletLoss

LABELS = torch.tensor([0, 2, 0, 1, 1, 0, 2])


def batch(rows: int = 7, width: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, dtype=torch.float64, generator=generator, requires_grad=True)


def same_value_and_gradient(mine, naive, x: Tensor, parameters=()) -> None:
    wanted = torch.autograd.grad(naive(x), [x, *parameters])
    value = mine(x)
    assert value.shape == ()
    torch.testing.assert_close(value, naive(x))
    for got, want in zip(torch.autograd.grad(value, [x, *parameters]), wanted, strict=True):
        torch.testing.assert_close(got, want)


def softmax_cost(logits: list[Tensor], label: int) -> Tensor:
    return -torch.log(logits[label].exp() / sum(one.exp() for one in logits))


# ------------------------------------------------------------------------------ HashNet


def hashnet(x: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    similar, dissimilar = [], []
    for i in range(len(x)):
        for j in range(i + 1, len(x)):
            product = alpha * sum(torch.tanh(beta * a) * torch.tanh(beta * b) for a, b in zip(x[i], x[j], strict=True))
            likelihood = 1 / (1 + torch.exp(-product))
            if labels[i] == labels[j]:
                similar.append(-torch.log(likelihood))
            else:
                dissimilar.append(-torch.log(1 - likelihood))
    total = len(similar) + len(dissimilar)
    weighted = sum(total / len(similar) * c for c in similar) + sum(total / len(dissimilar) * c for c in dissimilar)
    return weighted / total


def test_hashnet_against_loops():
    loss = HashNetLoss(alpha=0.3, growth=0.5).eval()
    loss.step.fill_(6)  # beta = sqrt(1 + 0.5 * 6) = 2
    same_value_and_gradient(lambda x: loss(x, LABELS), lambda x: hashnet(x, LABELS, 0.3, 2.0), batch())
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS), batch())


def test_hashnet_alpha_is_ten_by_bits():
    x = batch(width=5)
    torch.testing.assert_close(HashNetLoss()(x, LABELS), HashNetLoss(alpha=2.0)(x, LABELS))


def test_hashnet_beta_grows_in_training_and_goes_on_after_a_resume():
    loss = HashNetLoss(growth=0.1)
    betas = []
    for _ in range(4):
        betas.append(float(loss.beta))
        loss(batch(), LABELS)
    assert betas == pytest.approx([math.sqrt(1 + 0.1 * t) for t in range(4)])
    loss.eval()(batch(), LABELS)
    other = HashNetLoss(growth=0.1)
    other.load_state_dict(loss.state_dict())
    assert float(other.beta) == pytest.approx(math.sqrt(1.4))


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0]], ids=["all similar", "none similar", "one row"])
def test_hashnet_where_a_kind_of_pair_is_missing(labels):
    x = batch(len(labels))
    value = HashNetLoss()(x, torch.tensor(labels))
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
    assert (value == 0) == (len(labels) == 1)


def test_hashnet_does_not_overflow():
    x = (1e4 * batch()).requires_grad_()
    assert HashNetLoss(alpha=1e3)(x, LABELS).isfinite()


# ------------------------------------------------------------------------------ GreedyHash


def test_greedyhash_value_and_straight_through_gradient_by_hand():
    loss = GreedyHashLoss(bits=2, classes=2, weight=0.5)
    with torch.no_grad():
        loss.classifier.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[0.5, -3.0], [0.0, 2.0]], requires_grad=True)
    value = loss(x, torch.tensor([0, 1]))
    # Signs (1, -1) and (-1, 1): logits of the own class 1, of the other -1, so p = 1 / (1 + e^-2).
    p = 1 / (1 + math.exp(-2))
    gaps = (0.5**3 + 2**3 + 1**3 + 1**3) / 4
    assert value.item() == pytest.approx(-math.log(p) + 0.5 * gaps)
    value.backward()
    # Cross-entropy: (p - 1) / 2 on the own bit, (1 - p) / 2 on the other. Penalty: 0.5 * 3 gap^2 sign / 4.
    own, other = (p - 1) / 2, (1 - p) / 2
    wanted = [
        [own - 0.375 * 0.25, other - 0.375 * 4],
        [other + 0.375 * 1, own + 0.375 * 1],
    ]
    torch.testing.assert_close(x.grad, torch.tensor(wanted))


def test_greedyhash_against_loops():
    loss = GreedyHashLoss(bits=6, classes=3).double()
    weight = loss.classifier.weight

    def naive(x: Tensor) -> Tensor:
        signs = [[1.0 if u > 0 else -1.0 for u in row] for row in x.tolist()]
        codes = x + (torch.tensor(signs, dtype=torch.float64) - x).detach()
        entropy = sum(softmax_cost([(w * c).sum() for w in weight], y) for c, y in zip(codes, LABELS, strict=True))
        gap = sum((x[i, k] - signs[i][k]).abs() ** 3 for i in range(7) for k in range(6))
        return entropy / 7 + 0.1 * gap / 42

    same_value_and_gradient(lambda x: loss(x, LABELS), naive, batch(), [weight])


# ------------------------------------------------------------------------------ OrthoHash


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64, 128, 256])
def test_hadamard_matrices(bits):
    matrix = _hadamard(bits)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, bits * torch.eye(bits))
    assert (matrix[0] == 1).all()


@pytest.mark.parametrize(("classes", "bits"), [(10, 12), (10, 24), (10, 36), (10, 48), (7, 12), (32, 32)])
def test_targets_are_orthogonal_and_balanced(classes, bits):
    targets = binary_targets(classes, bits, seed=5)
    assert targets.shape == (classes, bits)
    assert torch.equal(targets @ targets.T, bits * torch.eye(classes))
    if classes < bits:
        assert (targets.sum(1) == 0).all()
    assert torch.equal(targets, binary_targets(classes, bits, seed=5))
    assert not torch.equal(targets, binary_targets(classes, bits, seed=6))


@pytest.mark.parametrize(("classes", "bits"), [(20, 12), (6, 4), (10, 10), (10, 15), (100, 16)])
def test_targets_without_a_hadamard_matrix_are_balanced_and_distinct(classes, bits):
    targets = binary_targets(classes, bits, seed=5)
    assert ((targets == 1).sum(1) == bits // 2).all()
    assert (targets.abs() == 1).all()
    assert len(targets.unique(dim=0)) == classes
    assert torch.equal(targets, binary_targets(classes, bits, seed=5))


def test_orthohash_against_loops():
    loss = OrthoHashLoss(bits=6, classes=3, scale=5.0, margin=0.3).double()

    def naive(x: Tensor) -> Tensor:
        total = 0.0
        for u, y in zip(x, LABELS.tolist(), strict=True):
            cosines = [(u * t).sum() / (u.norm() * t.norm()) for t in loss.targets]
            total = total + softmax_cost([5.0 * (cos - 0.3 * (c == y)) for c, cos in enumerate(cosines)], y)
        return total / 7

    same_value_and_gradient(lambda x: loss(x, LABELS), naive, batch())
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS), batch())


def test_orthohash_targets_travel_with_the_checkpoint():
    loss, other = OrthoHashLoss(16, 10, seed=1), OrthoHashLoss(16, 10, seed=2)
    assert not torch.equal(loss.targets, other.targets)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss.targets, other.targets)
    assert not list(loss.parameters())


# ------------------------------------------------------------------------------ classification


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_against_loops(smoothing):
    loss = ClassificationLoss(dimension=6, classes=4, smoothing=smoothing).double()
    weight, bias = loss.classifier.weight, loss.classifier.bias

    def naive(x: Tensor) -> Tensor:
        total = 0.0
        for u, y in zip(x, LABELS.tolist(), strict=True):
            logits = [(w * u).sum() + b for w, b in zip(weight, bias, strict=True)]
            for c in range(4):
                target = (1 - smoothing) * (c == y) + smoothing / 4
                total = total + target * softmax_cost(logits, c)
        return total / 7

    same_value_and_gradient(lambda x: loss(x, LABELS), naive, batch(), [weight, bias])


# ------------------------------------------------------------------------------ triplets


def test_triplets_against_loops():
    labels = torch.tensor([0, 0, 1, 2, 2, 0, 1, 1, 2])

    def naive(x: Tensor) -> Tensor:
        total = 0.0
        for t in range(3):
            q, p, n = x[3 * t : 3 * t + 3]
            total = total + 0.5 * torch.relu(4.2 + (q - p).norm() ** 2 - (q - n).norm() ** 2)
        return total / 3

    x = batch(rows=9, width=3, seed=2)
    values = [0.5 * (4.2 + (a - b).square().sum() - (a - c).square().sum()) for a, b, c in x.detach().split(3)]
    assert min(values) < 0 < max(values)
    same_value_and_gradient(lambda x: TripletLoss(margin=4.2)(x, labels), naive, x)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 1], [0, 0, 1, 2], [], [0, 0, 1, 0, 1, 0]])
def test_triplets_refuse_other_batches(labels):
    with pytest.raises(ValueError, match="MinedTriplets with its mining callback"):
        TripletLoss()(batch(len(labels)), torch.tensor(labels, dtype=torch.int64))


def test_batch_hard_against_loops():
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])  # the 2 is alone: no anchor, but a negative

    def naive(x: Tensor) -> Tensor:
        costs = []
        for a in range(7):
            positives = [(x[a] - x[j]).norm() for j in range(7) if j != a and labels[j] == labels[a]]
            negatives = [(x[a] - x[j]).norm() for j in range(7) if labels[j] != labels[a]]
            if positives:
                costs.append(torch.relu(0.2 + max(positives) - min(negatives)))
        assert len(costs) == 6
        return sum(costs) / 6

    same_value_and_gradient(lambda x: BatchHardTripletLoss(0.2)(x, labels), naive, batch(width=3, seed=3))


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_batch_hard_without_anchors_costs_nothing(labels):
    x = batch(3)
    value = BatchHardTripletLoss()(x, torch.tensor(labels))
    value.backward()
    assert value == 0
    assert (x.grad == 0).all()


def test_batch_hard_of_equal_rows_has_a_finite_gradient():
    x = torch.ones(4, 3, requires_grad=True)
    value = BatchHardTripletLoss(0.2)(x, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value.item() == pytest.approx(0.2)
    assert x.grad.isfinite().all()


# ------------------------------------------------------------------------------ memory


def stream(count: int, rows: int = 5, width: int = 4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(rows, width, generator=generator), torch.randint(3, (rows,), generator=generator)


@pytest.mark.parametrize("size", [5, 15, 17, 64])
@pytest.mark.parametrize("make", [pml.ContrastiveLoss, pml.MultiSimilarityLoss, pml.NTXentLoss])
def test_memory_against_the_librarys(size, make):
    mine = CrossBatchMemory(make(), size=size, dimension=4)
    theirs = pml.CrossBatchMemory(make(), embedding_size=4, memory_size=size)
    for x, y in stream(9):
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        value, wanted = mine(one, y), theirs(two, y)
        torch.testing.assert_close(value, wanted)
        value.backward()
        wanted.backward()
        torch.testing.assert_close(one.grad, two.grad)


class SumOfPairs(nn.Module):
    """Adds up inner products of similar pairs and subtracts those of others."""

    def forward(self, x: Tensor, y: Tensor, pairs=None, reference=None, reference_labels=None) -> Tensor:
        if pairs is None:
            return x.sum()
        a, p, b, n = pairs
        assert (y[a] == reference_labels[p]).all()
        assert (y[b] != reference_labels[n]).all()
        return (x[a] * reference[p]).sum() - (x[b] * reference[n]).sum()


def test_memory_against_loops():
    loss = CrossBatchMemory(SumOfPairs(), size=12, dimension=4, start=2)
    past: list[tuple[int, Tensor, int]] = []
    for step, (x, y) in enumerate(stream(8)):
        x.requires_grad_()
        value = loss(x, y)
        if step < 2:
            torch.testing.assert_close(value, x.sum())
            continue
        past = (past + [(5 * step + i, x[i].detach(), int(y[i])) for i in range(5)])[-12:]
        expected = 0.0
        for i in range(5):
            for key, other, label in past:
                if key != 5 * step + i:
                    expected = expected + (x[i] * other).sum() * (1 if label == y[i] else -1)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        (wanted,) = torch.autograd.grad(expected, x)
        (got,) = torch.autograd.grad(value, x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_memory_goes_on_after_a_resume(cut, tmp_path):
    def make() -> CrossBatchMemory:
        return CrossBatchMemory(pml.ContrastiveLoss(), size=12, dimension=4, start=2)

    loss, batches = make(), list(stream(9))
    values = [loss(x, y) for x, y in batches]
    first = make()
    for x, y in batches[:cut]:
        first(x, y)
    torch.save(first.state_dict(), tmp_path / "state")
    second = make()
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert [second(x, y) for x, y in batches[cut:]] == values[cut:]


def test_the_librarys_memory_forgets_after_a_resume():
    # The reason for ours: if this fails, theirs may do.
    theirs = pml.CrossBatchMemory(pml.ContrastiveLoss(), embedding_size=4, memory_size=12)
    batches = list(stream(4))
    for x, y in batches[:3]:
        theirs(x, y)
    resumed = pml.CrossBatchMemory(pml.ContrastiveLoss(), embedding_size=4, memory_size=12)
    resumed.load_state_dict(theirs.state_dict())
    assert resumed(*batches[3]) != theirs(*batches[3])


def test_memory_rests_outside_of_training():
    loss = CrossBatchMemory(SumOfPairs(), size=12, dimension=4)
    (x, y), (z, w) = stream(2)
    loss(x, y)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    torch.testing.assert_close(loss.eval()(z, w), z.sum())
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HashNetLoss(alpha=0), "alpha=0"),
        (lambda: HashNetLoss(growth=-1), "growth=-1"),
        (lambda: GreedyHashLoss(0, 10), "bits=0"),
        (lambda: GreedyHashLoss(12, 1), "classes=1"),
        (lambda: GreedyHashLoss(12, 10, weight=-1), "weight=-1"),
        (lambda: OrthoHashLoss(12, 10, scale=0), "scale=0"),
        (lambda: OrthoHashLoss(12, 10, margin=3), "margin=3"),
        (lambda: OrthoHashLoss(3, 10), "there are not 10 balanced codes"),
        (lambda: ClassificationLoss(None, 10), "dimension=None"),
        (lambda: ClassificationLoss(8, 10, smoothing=1), "smoothing=1"),
        (lambda: TripletLoss(0), "margin=0"),
        (lambda: BatchHardTripletLoss(-1), "margin=-1"),
        (lambda: CrossBatchMemory(SumOfPairs(), 0, 4), "size=0"),
        (lambda: CrossBatchMemory(SumOfPairs(), 8, None), "dimension=None"),
        (lambda: CrossBatchMemory(SumOfPairs(), 8, 4, start=-1), "start=-1"),
        (lambda: CrossBatchMemory(SumOfPairs(), 3, 4)(*next(stream(1))), "size=3 is less than a batch of 5"),
        (lambda: GreedyHashLoss(6, 2)(batch().float(), LABELS), r"0\.\.2, outside the classifier's 0\.\.1"),
        (lambda: OrthoHashLoss(6, 2)(batch(), LABELS), "set loss.classes"),
        (lambda: ClassificationLoss(6, 9)(batch().float(), LABELS - 1), r"-1\.\.1"),
    ],
)
def test_wrong_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
