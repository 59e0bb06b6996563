"""What FAISS makes of a factory string."""

from __future__ import annotations

import math
import re
from typing import Any

import faiss

METRICS = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
ADVISED_PER_CENTROID = 39  # ClusteringParameters.min_points_per_centroid
if faiss.cvar.distance_compute_blas_threshold == 128_000:
    # FAISS 1.15 compares Q queries of D columns by a product of matrices from Q D = 128,000 on, which suits tens of
    # threads. One thread needs 3 to 10 times as long as by BLAS from 800 on (its pull request 5109).
    faiss.cvar.distance_compute_blas_threshold = 800 * faiss.omp_get_max_threads()
OTHER_METRIC = "FAISS makes it for L2 distances alone"
FOLLOWS = re.compile(r"IVF(?=[,_(]|$)")  # an IVF whose number of lists follows the number of items


def lists_for(count: int) -> int:
    """The number of lists of an IVF index: the power of two nearest to 4 sqrt(count), at most count / 39.

    Args:
        count: Number of items.

    Example:
        >>> lists_for(1_000), lists_for(1_000_000), lists_for(10_000_000)
        (16, 4096, 16384)
    """
    most = max(1, count // ADVISED_PER_CENTROID)
    return min(2 ** round(math.log2(4 * math.sqrt(max(1, count)))), 2 ** (most.bit_length() - 1))


def builds(factory: str, metric: str, width: int) -> bool:
    """Whether this release of FAISS makes such an index.

    Args:
        factory: A factory string, as in FaissIndex.
        metric: "ip", "l2" or "hamming".
        width: Number of columns of the vectors or packed codes.
    """
    dimension = 8 * width if metric == "hamming" else width
    return factory_failure(FOLLOWS.sub("IVF1", factory), metric, dimension) is None


def new_index(factory: str, metric: str, dimension: int) -> Any:
    """FAISS's own empty index.

    Args:
        factory: A factory string, as in FaissIndex.
        metric: "ip", "l2" or "hamming".
        dimension: D of the vectors, or the number of bits.

    Raises:
        RuntimeError: If FAISS refuses, or makes an index of another metric.
    """
    if metric == "hamming":
        return faiss.index_binary_factory(dimension, factory)
    index = faiss.index_factory(dimension, factory, METRICS[metric])
    if index.metric_type != METRICS[metric]:  # graphs of product codes, spectral hashing
        raise RuntimeError(f"{OTHER_METRIC}: take metric=l2, or a factory of other codes such as HNSW32_SQ8")
    return index


def factory_failure(factory: str, metric: str, dimension: int) -> str | None:
    """Why FAISS refuses the factory at this dimension, None where it does not.

    Args:
        factory: A factory string, as in FaissIndex.
        metric: "ip", "l2" or "hamming".
        dimension: D of the vectors, or the number of bits.
    """
    try:
        new_index(factory, metric, dimension)
    except RuntimeError as error:
        return reason_of(error)
    return None


def reason_of(error: RuntimeError) -> str:
    """The message of an error of FAISS without the C++ signature and source line in front of it.

    Args:
        error: The error.
    """
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)


def explained(factory: str, metric: str, dimension: int, reason: str) -> str:
    """The message that says why FAISS refuses a factory and what to do.

    Args:
        factory: The factory string.
        metric: "ip", "l2" or "hamming".
        dimension: D of the vectors, or the number of bits.
        reason: What `factory_failure` returned.
    """
    parts = re.findall(r"PQ(\d+)", factory)
    if "subquantizers" in reason and parts:
        m = int(parts[-1])
        divisors = ", ".join(str(d) for d in range(1, min(dimension, 128) + 1) if dimension % d == 0)
        return (
            f"PQ{m} cuts a vector into {m} equal parts, which {dimension} dimensions (or what a transform "
            f"in front leaves of them) do not allow: take one of {divisors} parts, or put "
            f"OPQ{m}_{m * max(1, dimension // m)} in front, which brings the vector to a fitting dimension"
        )
    return f"FAISS refuses the factory {factory!r} for dimension {dimension} and metric {metric!r}: {reason}"


def mapping_flags(factory: str) -> int:
    """The flags with which FAISS reads a file without reading all of it. 0 where it cannot.

    Args:
        factory: The factory string of the index in the file.
    """
    lists = "IVF" in factory
    if re.search(r"x\d+fs|RaBitQfs", factory):  # these lists are arranged anew when they are read
        if not re.search("Refine|RFlat", factory):
            return 0
        lists = False  # the codes of the refinement lie beside them
    return getattr(faiss, "IO_FLAG_MMAP" if lists else "IO_FLAG_MMAP_IFC", 0)
