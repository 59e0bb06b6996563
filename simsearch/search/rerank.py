"""Re-ranking methods with their parameters, for evaluation and search.

The mathematics is in functional.reranking and, of those that re-order a shortlist, in a module of their names.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from simsearch.functional import reranking
from simsearch.functional.diffusion import affinity_graph, diffuse
from simsearch.functional.k_reciprocal import k_reciprocal, neighbourhoods
from simsearch.functional.ranking import Junk
from simsearch.functional.reranking import RerankedGallery, nearest
from simsearch.functional.superglobal import superglobal
from simsearch.types import SearchResult


class AQE:
    """Average query expansion with the k nearest items.

    Args:
        k: Number of neighbours, 1 or more.

    Raises:
        ValueError: If `k` is below 1.
    """

    def __init__(self, k: int = 10) -> None:
        _check_counts(("k", k))
        self.k = k

    def fit(self, gallery: Tensor) -> RerankedGallery:
        """The gallery, ready to re-rank.

        Args:
            gallery: float32 (G, D), L2-normalised.
        """

        def rerank(query: Tensor, junk: Junk | None) -> tuple[Tensor, None]:
            found = nearest(query, gallery, self.k, junk)
            return reranking.average_query_expansion(query, gallery, found), None

        return RerankedGallery(gallery, rerank)


class AlphaQE:
    """Alpha query expansion with the k nearest items.

    Args:
        k: Number of neighbours, 1 or more.
        alpha: Exponent of the similarities that weigh the neighbours, 0 or more. 0 is average query expansion.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, k: int = 50, alpha: float = 3.0) -> None:
        _check_counts(("k", k))
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0 (0 is plain average query expansion), got {alpha}")
        self.k, self.alpha = k, alpha

    def fit(self, gallery: Tensor) -> RerankedGallery:
        """The gallery, ready to re-rank.

        Args:
            gallery: float32 (G, D), L2-normalised.
        """

        def rerank(query: Tensor, junk: Junk | None) -> tuple[Tensor, None]:
            found = nearest(query, gallery, self.k, junk)
            return reranking.alpha_query_expansion(query, gallery, found, self.alpha), None

        return RerankedGallery(gallery, rerank)


class DBA:
    """Database augmentation with k items, followed by average query expansion.

    A gallery item may be mixed with an item that is junk to some query. Only the query's own expansion leaves its junk
    out.

    Args:
        k: Number of items that are averaged, the item itself included, 2 or more.
        expand: Number of neighbours for query expansion. 0 skips it.

    Raises:
        ValueError: If `k` is below 2, which would change nothing, or if `expand` is negative.
    """

    def __init__(self, k: int = 20, expand: int = 0) -> None:
        if k < 2:
            raise ValueError(f"k counts the item itself: it must be at least 2 to add a neighbour, got {k}")
        if expand < 0:
            raise ValueError(f"expand must be at least 0 (0: no query expansion), got {expand}")
        self.k, self.expand = k, expand

    def fit(self, gallery: Tensor) -> RerankedGallery:
        """The augmented gallery, ready to re-rank.

        Args:
            gallery: float32 (G, D), L2-normalised.
        """
        augmented = reranking.augment_database(gallery, self.k)

        def rerank(query: Tensor, junk: Junk | None) -> tuple[Tensor, None]:
            if self.expand == 0:
                return query, None
            found = nearest(query, augmented, self.expand, junk)
            return reranking.average_query_expansion(query, augmented, found), None

        return RerankedGallery(augmented, rerank)


class CSLS:
    """Hubness correction by the mean similarity to the k nearest items.

    Args:
        k: Number of neighbours, 1 or more.

    Raises:
        ValueError: If `k` is below 1.
    """

    def __init__(self, k: int = 10) -> None:
        _check_counts(("k", k))
        self.k = k

    def fit(self, gallery: Tensor) -> RerankedGallery:
        """The gallery, ready to re-rank.

        Args:
            gallery: float32 (G, D), L2-normalised.
        """

        def rerank(query: Tensor, junk: Junk | None) -> tuple[Tensor, None]:
            return F.pad(query, (0, 1), value=1.0), None

        return RerankedGallery(reranking.csls_gallery(gallery, self.k), rerank)


class KReciprocal:
    """k-reciprocal re-ranking of a shortlist.

    Args:
        k1: Number of neighbours for reciprocity, 1 or more.
        k2: Number of neighbours for local expansion, in 1..k1.
        lambda_: Weight of the original cosine, in [0, 1]. 1 uses the cosine alone.
        depth: Length of the shortlist, `k1` or more.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, k1: int = 20, k2: int = 6, lambda_: float = 0.3, depth: int = 200) -> None:
        _check_counts(("k1", k1), ("k2", k2), ("depth", depth))
        if k2 > k1 or depth < k1:
            raise ValueError(
                f"k2 <= k1 <= depth must hold, got k2={k2}, k1={k1}, depth={depth}: raise depth or lower k"
            )
        if not 0 <= lambda_ <= 1:
            raise ValueError(f"lambda_ must lie in [0, 1] (1: the cosine alone), got {lambda_}")
        self.k1, self.k2, self.lambda_, self.depth = k1, k2, lambda_, depth

    def fit(self, gallery: Tensor) -> RerankedGallery:
        """The gallery, ready to re-rank.

        Args:
            gallery: float32 (G, D), L2-normalised.
        """
        encoded = neighbourhoods(gallery, self.k1, self.k2)

        def rerank(query: Tensor, junk: Junk | None) -> tuple[Tensor, SearchResult]:
            return query, k_reciprocal(nearest(query, gallery, self.depth, junk), encoded, self.lambda_)

        return RerankedGallery(gallery, rerank)


class Diffusion:
    """Diffusion over a shortlist, on the graph of mutual k-nearest neighbours.

    Args:
        k: Number of neighbours in the graph, 1 or more.
        seeds: Number of nearest items from which diffusion starts, in 1..depth.
        gamma: Exponent of the similarities, 0 or more. 0 gives all neighbours the same weight.
        alpha: Spread of the diffusion, above 0 and at most 0.99999. Closer to 1, float32 scores would be wrong by more
            than a hundredth.
        iterations: Number of solver iterations, 1 or more.
        depth: Length of the shortlist, `seeds` or more.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        k: int = 50,
        seeds: int = 10,
        gamma: float = 3.0,
        alpha: float = 0.99,
        iterations: int = 20,
        depth: int = 1000,
    ) -> None:
        _check_counts(("k", k), ("seeds", seeds), ("iterations", iterations), ("depth", depth))
        if seeds > depth:
            raise ValueError(f"seeds are taken from the shortlist: raise depth={depth} to at least seeds={seeds}")
        if not 0 < alpha <= 0.99999:
            raise ValueError(f"alpha must lie above 0 and at most at 0.99999 (near 1: wider spread), got {alpha}")
        if not gamma >= 0:
            raise ValueError(f"gamma must be at least 0 (0: all neighbours alike), got {gamma}")
        self.k, self.seeds, self.gamma = k, seeds, gamma
        self.alpha, self.iterations, self.depth = alpha, iterations, depth

    def fit(self, gallery: Tensor) -> RerankedGallery:
        """The gallery and its neighbour graph, ready to re-rank.

        Args:
            gallery: float32 (G, D), L2-normalised.
        """
        graph = affinity_graph(gallery, self.k, self.gamma)

        def rerank(query: Tensor, junk: Junk | None) -> tuple[Tensor, SearchResult]:
            found = nearest(query, gallery, self.depth, junk)
            return query, diffuse(found, graph, seeds=self.seeds, alpha=self.alpha, iterations=self.iterations)

        return RerankedGallery(gallery, rerank)


class SuperGlobal:
    """Re-ranking of a shortlist by descriptors that are refined from their neighbours.

    Args:
        k: Number of neighbours that refine an item, 1 or more. The expanded query is made of one item more.
        beta: Weight of the neighbours, 0 or more. 0 leaves the items as they are.
        depth: Length of the shortlist, above `k`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, k: int = 9, beta: float = 0.15, depth: int = 400) -> None:
        _check_counts(("k", k))
        if depth <= k:
            raise ValueError(f"the k={k} neighbours are taken from the shortlist: raise depth={depth} above k")
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta must be a finite number of 0 or more (0: items as they are), got {beta}")
        self.k, self.beta, self.depth = k, beta, depth

    def fit(self, gallery: Tensor) -> RerankedGallery:
        """The gallery, ready to re-rank.

        Args:
            gallery: float32 (G, D), L2-normalised.
        """

        def rerank(query: Tensor, junk: Junk | None) -> tuple[Tensor, SearchResult]:
            found = nearest(query, gallery, self.depth, junk)
            return query, superglobal(query, found, gallery, k=self.k, beta=self.beta)

        return RerankedGallery(gallery, rerank)


def _check_counts(*counts: tuple[str, int]) -> None:
    for name, value in counts:
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
