"""What lies inside an index of FAISS: its parts, their training, codes and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
from torch import Tensor

_CODES = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2, faiss.IndexPQ, faiss.IndexScalarQuantizer)
_LISTS = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
_LISTS += tuple(getattr(faiss, name) for name in ("IndexIVFRaBitQ",) if hasattr(faiss, name))  # of releases from 1.12


def parts_of(index: Any) -> Iterator[Any]:
    """Yields an index and every index and transform inside it, each as its own class.

    Args:
        index: FAISS's own index, of floats or codes.
    """
    binary = isinstance(index, faiss.IndexBinary)
    index = faiss.downcast_IndexBinary(index) if binary else faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # FAISS's type stubs call this C++ vector a list
        for position in range(chain.size()):
            yield faiss.downcast_VectorTransform(chain.at(position))
    for name in ("index", "base_index", "refine_index", "storage", "quantizer"):
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index | faiss.IndexBinary):
            yield from parts_of(inner)


def copied(target: Any, source: Any, rows: Tensor) -> bool:
    """Copies codes to the end of an index of the same training. False if this kind of index cannot.

    Args:
        target: The index that is added to.
        source: The index whose codes are copied.
        rows: int64 (n,), ascending rows of `source`.
    """
    target, source = next(parts_of(target)), next(parts_of(source))
    if type(target) is not type(source):
        return False
    done = False
    if isinstance(target, faiss.IndexPreTransform):
        done = copied(target.index, source.index, rows)
    elif isinstance(target, faiss.IndexRefine):
        done = copied(target.base_index, source.base_index, rows)
        done = done and copied(target.refine_index, source.refine_index, rows)
    elif type(target) in _LISTS:
        done = True
        first, places = int(target.ntotal), np.full(int(source.ntotal), -1, dtype=np.int64)
        places[rows.numpy()] = np.arange(len(rows))
        own, others = target.invlists, source.invlists
        for number in range(target.nlist):
            if not (size := others.list_size(number)):
                continue
            ids = others.get_ids(number)
            codes = others.get_codes(number)
            try:
                new = places[faiss.rev_swig_ptr(ids, size)]
                kept = faiss.rev_swig_ptr(codes, size * others.code_size).reshape(size, -1)[new >= 0]
                if len(kept):
                    kept, new = np.ascontiguousarray(kept), np.ascontiguousarray(new[new >= 0] + first)
                    own.add_entries(number, len(kept), faiss.swig_ptr(new), faiss.swig_ptr(kept))
            finally:
                others.release_ids(number, ids)
                others.release_codes(number, codes)
    elif type(target) in _CODES:
        done = True
        codes = faiss.rev_swig_ptr(source.codes.data(), source.ntotal * source.code_size)
        kept = np.ascontiguousarray(codes.reshape(source.ntotal, -1)[rows.numpy()])
        target.add_sa_codes(kept)
    if done:
        target.ntotal = int(target.ntotal) + (0 if type(target) in _CODES else len(rows))
    return done


def decoded(index: Any, positions: np.ndarray) -> np.ndarray:
    """The stored vectors at some positions, float32 (n, D).

    FAISS decodes item by item. Where the codes of all items lie side by side, they are decoded together, many times
    faster.

    Args:
        index: FAISS's own index of floats.
        positions: int64 (n,).

    Raises:
        RuntimeError: If FAISS cannot decode the items.
    """
    part = next(parts_of(index))
    for name in ("refine_index", "storage"):
        part = faiss.downcast_index(getattr(part, name, part))
    if not isinstance(part, faiss.IndexFlatCodes):
        return index.reconstruct_batch(positions)
    codes: Any = part.codes
    stored = faiss.rev_swig_ptr(codes.data(), part.ntotal * part.code_size).reshape(part.ntotal, -1)
    return part.sa_decode(np.ascontiguousarray(stored[positions]))


def read_without_items(path: str, flags: int, binary: bool) -> Any:
    """The index in a file, trained as it is, without its items. What FAISS maps of them is not read.

    Args:
        path: The file.
        flags: The flags with which FAISS maps it.
        binary: Whether the index is of codes.

    Raises:
        RuntimeError: If FAISS cannot read the file.
    """
    index = (faiss.read_index_binary if binary else faiss.read_index)(path, flags)
    _let_go(index)
    index.reset()
    return index


def _let_go(index: Any) -> None:
    """Puts own, empty lists, codes and links in place of those in a mapped file, which FAISS could not reset."""
    api: Any = faiss  # the stubs know nothing of these types
    part = next(parts_of(index))
    for name in ("index", "base_index", "refine_index", "storage"):  # but not what finds lists
        if isinstance(inner := getattr(part, name, None), faiss.Index):
            _let_go(inner)
    if isinstance(part, faiss.IndexIVF | faiss.IndexBinaryIVF):
        if isinstance(api.downcast_InvertedLists(part.invlists), api.OnDiskInvertedLists):
            lists = api.ArrayInvertedLists(part.nlist, part.code_size)
            part.replace_invlists(lists, True)
            lists.this.disown()
    elif isinstance(getattr(part, "codes", None), api.MaybeOwnedVectorUInt8):
        part.codes = api.MaybeOwnedVectorUInt8()
    if hasattr(part, "hnsw"):
        part.hnsw.neighbors = api.MaybeOwnedVectorInt32()


def keeps_vectors(index: Any) -> bool:
    """Whether the stored vectors that FAISS decodes are those that were added, up to the rounding of a rotation.

    Args:
        index: FAISS's own index of floats.
    """
    part = next(parts_of(index))
    for name in ("refine_index", "storage"):  # what `decoded` reads
        if hasattr(part, name):
            return keeps_vectors(getattr(part, name))
    if isinstance(part, faiss.IndexPreTransform):
        chain: Any = part.chain
        transforms = [faiss.downcast_VectorTransform(chain.at(position)) for position in range(chain.size())]
        return all(map(_turns_back, transforms)) and keeps_vectors(part.index)
    return isinstance(part, faiss.IndexFlat | faiss.IndexIVFFlat)


def _turns_back(transform: Any) -> bool:
    """Whether a transform loses nothing and FAISS can undo it: rotations and added columns, not L2norm or PCA64."""
    if transform.d_out < transform.d_in:
        return False
    if isinstance(transform, faiss.LinearTransform):
        return bool(transform.is_orthonormal) or isinstance(transform, faiss.RandomRotationMatrix)
    return isinstance(transform, faiss.RemapDimensionsTransform)


def centroids_of(part: Any) -> int:
    """The number of centroids of the largest k-means that training a part runs: FAISS wants as many vectors.

    Args:
        part: One of `parts_of`.
    """
    if isinstance(part, faiss.OPQMatrix):
        return 256  # its own quantiser of 8 bits
    lists = getattr(part, "nlist", 0) if getattr(part, "quantizer_trains_alone", 0) != 1 else 0
    pq = getattr(part, "pq", None)
    return max(1, lists, pq.ksub if pq is not None else 0)


def train_seeded(index: Any, array: np.ndarray, seed: int) -> None:
    """Trains with k-means seeded wherever FAISS runs one; its other generators have fixed seeds.

    Args:
        index: FAISS's own index, untrained.
        array: float32 (n, D) or uint8 (n, bits / 8).
        seed: The seed.

    Raises:
        RuntimeError: If FAISS refuses.
    """
    clusterings, opqs = [], []
    for part in parts_of(index):
        if isinstance(part, faiss.OPQMatrix):
            # FAISS would make its own quantiser, out of reach; it borrows this one.
            pq = faiss.ProductQuantizer(part.d_out, part.M, 8)
            part.pq = pq
            opqs.append((part, pq))
            clusterings.append(pq.cp)
        elif getattr(part, "pq", None) is not None:
            clusterings.append(part.pq.cp)
        if hasattr(part, "cp"):
            clusterings.append(part.cp)
        if hasattr(part, "do_polysemous_training"):
            # The factory turns on an annealing that reorders the codebooks for Hamming filtering, which no
            # search here uses: two seconds a sub-quantiser, many times all the rest.
            part.do_polysemous_training = False
    for clustering in clusterings:
        clustering.seed = seed
        # FAISS warns on stderr for each of its k-means runs, hundreds of lines for OPQ: once is enough.
        clustering.min_points_per_centroid = 1
    try:
        index.train(array)
    finally:
        for part, _ in opqs:
            part.pq = None


def code_bytes_of(index: Any) -> int:
    """The size in bytes of an item's code, without its id and links.

    Args:
        index: FAISS's own index.
    """
    index = next(parts_of(index))
    if isinstance(index, faiss.IndexRefine):
        return code_bytes_of(index.base_index) + code_bytes_of(index.refine_index)
    for name in ("index", "storage"):
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index | faiss.IndexBinary):
            return code_bytes_of(inner)
    return int(index.code_size)


def serialised_bytes(index: Any) -> int:
    """The size in bytes that FAISS would write, without holding it.

    Args:
        index: FAISS's own index.
    """
    size = 0

    def count(block: bytes) -> None:
        nonlocal size
        size += len(block)

    write = faiss.write_index_binary if isinstance(index, faiss.IndexBinary) else faiss.write_index
    write(index, faiss.PyCallbackIOWriter(count))  # type: ignore[attr-defined]  # missing in the stubs
    return size
