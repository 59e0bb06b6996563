"""Moments against numpy.cov, projections against scikit-learn and against what whitening promises."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from simsearch.functional.whitening import ClassMoments, Moments, discriminative_projection, whitening_matrix


def vectors(n: int = 300, d: int = 12, seed: int = 0) -> torch.Tensor:
    """Correlated vectors, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 3.0


def moments(data: torch.Tensor, sizes: list[int]) -> Moments:
    summed = Moments.zeros(data.shape[1])
    for part in data.split(sizes):
        summed.add(part)
    return summed


def test_moments_over_batches_give_the_covariance_of_all():
    data = vectors()
    mean, values, rows = moments(data, [100, 1, 0, 199]).principal()
    assert mean.dtype == values.dtype == rows.dtype == torch.float64
    np.testing.assert_allclose(mean, data.double().mean(0), rtol=1e-12)
    rebuilt = rows.T @ torch.diag(values) @ rows
    np.testing.assert_allclose(rebuilt, np.cov(data.double().numpy().T), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(rows @ rows.T, np.eye(12), atol=1e-12)
    assert (values[:-1] >= values[1:]).all()


def test_split_and_order_do_not_matter():
    data = vectors()
    expected = moments(data, [300]).principal()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    for other in (moments(data, [17] * 17 + [11]), moments(data[order], [250, 50])):
        for left, right in zip(other.principal(), expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_moments_of_ranks_add_up():
    data = vectors()
    left, right = moments(data[:120], [120]), moments(data[120:], [180])
    joined = Moments(left.count + right.count, left.total + right.total, left.outer + right.outer)
    for ours, all_ in zip(joined.principal(), moments(data, [300]).principal(), strict=True):
        torch.testing.assert_close(ours, all_, rtol=1e-10, atol=1e-10)


def test_each_component_points_to_its_largest_entry():
    _, _, rows = moments(vectors(), [300]).principal()
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_equals_scikit_learn_up_to_sign(whiten):
    data = vectors()
    mean, values, rows = moments(data, [300]).principal()
    matrix = whitening_matrix(values, rows, 5, power=float(whiten))
    projected = (data.double() - mean) @ matrix.T
    peer = PCA(5, svd_solver="full", whiten=whiten).fit(data.double().numpy())
    expected = peer.transform(data.double().numpy())
    np.testing.assert_allclose(values[:5], peer.explained_variance_, rtol=1e-10)
    signs = np.sign((projected.numpy() * expected).sum(0))
    np.testing.assert_allclose(projected, expected * signs, atol=1e-9)


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
def test_projected_covariance_is_a_power_of_the_eigenvalues(power):
    """Divided by l^(power / 2), a component of variance l has variance l^(1 - power): 1 at full power."""
    data = vectors().double()
    _, values, rows = moments(data, [300]).principal()
    projected = data @ whitening_matrix(values, rows, 12, power=power).T
    covariance = np.cov(projected.numpy().T)
    np.testing.assert_allclose(covariance, np.diag(values.numpy() ** (1 - power)), atol=1e-9)
    if power == 1:
        np.testing.assert_allclose(covariance, np.eye(12), atol=1e-9)


def test_no_power_keeps_all_distances():
    data = vectors().double()
    _, values, rows = moments(data, [300]).principal()
    projected = data @ whitening_matrix(values, rows, 12, power=0).T
    torch.testing.assert_close(torch.cdist(projected, projected), torch.cdist(data, data), atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_what_no_training_vector_varies_along_weighs_nothing(power):
    """Fewer vectors than columns: new vectors differ along components whose eigenvalues are rounding errors."""
    generator = torch.Generator().manual_seed(0)
    train, new = torch.randn(2, 20, 64, generator=generator, dtype=torch.float64)
    mean, values, rows = moments(train.float(), [20]).principal()
    matrix = whitening_matrix(values, rows, 64, power=power)
    assert matrix.any(1).tolist() == [True] * 19 + [False] * 45
    wanted = whitening_matrix(values, rows, 19, power=power)
    torch.testing.assert_close((new - mean) @ matrix.T, torch.nn.functional.pad((new - mean) @ wanted.T, (0, 45)))
    assert whitening_matrix(values, rows, 64, power=0).any(1).all()
    assert whitening_matrix(values, rows, 64, power=power, shrinkage=0.1).any(1).all()


def test_full_shrinkage_is_a_rotation_up_to_one_scale():
    _, values, rows = moments(vectors(), [300]).principal()
    shrunk = whitening_matrix(values, rows, 12, power=1, shrinkage=1)
    torch.testing.assert_close(shrunk, rows / values.mean().sqrt(), rtol=1e-12, atol=1e-12)


def test_shrinkage_is_ledoit_and_wolfs_mixture_of_covariances():
    """Whitening (1 - s) C + s mean(l) I by its own decomposition."""
    data = vectors().double()
    _, values, rows = moments(data, [300]).principal()
    covariance = np.cov(data.numpy().T)
    mixed = 0.7 * covariance + 0.3 * np.trace(covariance) / 12 * np.eye(12)
    matrix = whitening_matrix(values, rows, 12, power=1, shrinkage=0.3).numpy()
    np.testing.assert_allclose(matrix @ mixed @ matrix.T, np.eye(12), atol=1e-9)


def test_fewer_vectors_than_dimensions_stay_finite():
    data = vectors(5, 12)
    _, values, rows = moments(data, [5]).principal()
    matrix = whitening_matrix(values, rows, 12, power=1)
    assert matrix.isfinite().all()
    assert float(matrix.norm(dim=1).max()) <= float(values.max() * 1e-9) ** -0.5 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0, "power": 1.0}, r"1\.\.3 \(the descriptor's width\), got 0"),
        ({"dimension": 4, "power": 1.0}, "got 4"),
        ({"dimension": 2, "power": 1.5}, r"power must lie in \[0, 1\], got 1.5"),
        ({"dimension": 2, "power": 1.0, "shrinkage": -0.1}, r"shrinkage must lie in \[0, 1\], got -0.1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        whitening_matrix(torch.ones(3).double(), torch.eye(3).double(), **arguments)


def test_degenerate_data():
    with pytest.raises(ValueError, match="at least 2 vectors, got 1"):
        moments(vectors(1), [1]).principal()
    _, values, rows = moments(torch.zeros(4, 3), [4]).principal()
    with pytest.raises(ValueError, match="all vectors are equal"):
        whitening_matrix(values, rows, 3, power=1.0)
    with pytest.raises(ValueError, match=r"\(N, 3\), got \(5, 1\)"):
        Moments.zeros(3).add(torch.ones(5, 1))


# ------------------------------------------------------------------------------------ whitening by classes


def labelled(n: int = 240, d: int = 10, classes: int = 6, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors around the centres of their classes, and int64 labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator)
    noise = torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator)
    return (centres[labels] + 0.5 * noise).double(), labels


def class_moments(data: torch.Tensor, labels: torch.Tensor, step: int = 37) -> ClassMoments:
    summed = ClassMoments.zeros(data.shape[1])
    for rows, names in zip(data.split(step), labels.split(step), strict=True):
        summed.add_labelled(rows, names)
    return summed


def test_covariance_within_classes_by_a_loop():
    data, labels = labelled()
    scatter = sum(
        np.outer(x - mean, x - mean)
        for c in labels.unique()
        for group in [data[labels == c].numpy()]
        for mean in [group.mean(0)]
        for x in group
    )
    within = class_moments(data, labels).within()
    np.testing.assert_allclose(within, scatter / (len(data) - 6), rtol=1e-9, atol=1e-12)


def test_discriminative_projection_is_lda_without_shrinkage():
    data, labels = labelled()
    mean, projection = discriminative_projection(class_moments(data, labels), 5, shrinkage=0.0)
    np.testing.assert_allclose(mean, data.mean(0), rtol=1e-10)
    expected = LinearDiscriminantAnalysis(solver="eigen").fit(data.numpy(), labels.numpy()).scalings_[:, :5].T
    ours = projection.numpy()
    cosine = (ours * expected).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(np.abs(cosine), 1.0, atol=1e-8)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 1.0])
def test_discriminative_projection_solves_the_generalised_problem(shrinkage):
    data, labels = labelled()
    summed = class_moments(data, labels)
    within = summed.within().numpy()
    within = (1 - shrinkage) * within + shrinkage * within.trace() / 10 * np.eye(10)
    _, expected = scipy.linalg.eigh(np.cov(data.numpy().T, bias=True), within)  # columns v with v.T W v = 1, ascending
    _, ours = discriminative_projection(summed, 4, shrinkage=shrinkage)
    np.testing.assert_allclose(np.abs(ours), np.abs(expected[:, ::-1][:, :4].T), rtol=1e-6, atol=1e-9)


def test_unknown_classes_and_the_cut_into_batches_change_nothing():
    data, labels = labelled()
    wider = torch.cat([data, 9 * torch.ones(5, 10, dtype=torch.float64)])
    unknown = torch.cat([labels, torch.full((5,), -1)])
    expected = discriminative_projection(class_moments(data, labels, step=240), 3, shrinkage=0.2)
    for ours, other in zip(
        discriminative_projection(class_moments(wider, unknown, 11), 3, shrinkage=0.2), expected, strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


def test_whitening_by_classes_says_what_it_needs():
    data, _ = labelled(n=6)
    with pytest.raises(ValueError, match="2 training images"):
        class_moments(data, torch.arange(6)).within()
    with pytest.raises(ValueError, match="equal"):
        discriminative_projection(class_moments(torch.ones(4, 3), torch.zeros(4).long()), 2, shrinkage=0.5)
    moments_ = class_moments(*labelled())
    for wrong in ({"dimension": 11, "shrinkage": 0.1}, {"dimension": 2, "shrinkage": 1.5}):
        with pytest.raises(ValueError, match="must lie in"):
            discriminative_projection(moments_, wrong["dimension"], shrinkage=wrong["shrinkage"])
