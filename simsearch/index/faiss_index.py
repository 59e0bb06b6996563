"""One interface over FAISS's float and binary indexes.

Johnson, Douze, Jegou: Billion-scale similarity search with GPUs (2017); Douze et al.: The Faiss
library (2024). Factory strings: https://github.com/facebookresearch/faiss/wiki/The-index-factory
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from simsearch.files import read_json, replacing, sha256, write_json
from simsearch.index.selection import Selection
from simsearch.types import SearchResult, check_vectors

_METRICS = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
_ADVISED_PER_CENTROID = 39  # ClusteringParameters.min_points_per_centroid
# Searching n selected of N items (measured in experiments/2026-11-23-art-recommender/filters.py): an IVF index visits
# _MORE_LISTS N / n times its lists, an HNSW graph keeps _MORE_KEPT N / n times its candidates. Where these are so many
# that they cost more than _KEPT_ROWS rows each, or where there are no more than _FEW items, all of them are compared.
_MORE_LISTS, _MORE_KEPT, _KEPT_ROWS, _FEW = 4, 16, 5, 1000
# Nanoseconds, for flat and IVF indexes: each query tests each visited item and compares each selected one that it
# visits; instead, the selected rows can be decoded once, and each is compared with all queries at once.
_TEST, _COMPARE, _DECODE, _COMPARE_ROWS = 2, 60, 150, 15
_BLOCK = 2**14  # stored rows that are decoded together
_FIRST_READ = threading.Lock()  # of all indexes: one of its own could not be copied with the index
SETTINGS = ("factory", "metric", "nprobe", "ef_search", "k_factor", "train_size", "seed")
_FOLLOWS = re.compile(r"IVF(?=[,_(]|$)")  # an IVF whose number of lists follows the number of items


class FaissIndex:
    """A FAISS index of float vectors or binary codes, empty at first, that returns the most similar items, best first.

    The dimension is that of the first vectors that are added; nothing is allocated before. Items are known by their
    position in the order of addition. Equal input gives an equal index.

    Vectors are float32 (N, D), codes uint8 (N, bits / 8). Tensors on other devices are copied to the CPU, where FAISS
    works and where results lie.

    Args:
        factory: A FAISS factory string. For float vectors "Flat", "IVF256,Flat", "PQ16", "IVF256,PQ16", "HNSW32",
            "SQ8", "OPQ16,PQ16", ... For packed codes it begins with B: "BFlat", "BIVF256", "BHNSW32". In "IVF,Flat" or
            "BIVF" the number of lists follows the number of items (see `settle`).
        metric: "ip" (inner product, the cosine of L2-normalised vectors) or "l2" for float vectors. Codes are always
            compared by Hamming distance ("hamming"), whose order is that of "ip" and "l2" on entries of +1 and -1.
        nprobe: Number of lists that an IVF index visits per query (FAISS: 1; where lists follow the items: they too).
        ef_search: Number of candidates that an HNSW graph keeps (FAISS: 16).
        train_size: Largest number of vectors, a random choice, that train centroids and codebooks.
        seed: Seed of that choice and of k-means.
        k_factor: Number of candidates that a refining index ("...,Refine(SQ8)") compares again, in multiples of k
            (FAISS: 1).

    Raises:
        ValueError: If FAISS cannot parse the factory string, if it cannot decode the items (RaBitQ without a
            refinement), or if an argument is out of range.

    Example:
        >>> index = FaissIndex("Flat")
        >>> index.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> index.search(torch.tensor([[0.0, 2.0]]), k=1)
        SearchResult(ids=tensor([[1]]), scores=tensor([[2.]]))
    """

    def __init__(
        self,
        factory: str,
        metric: str = "ip",
        nprobe: int | None = None,
        ef_search: int | None = None,
        train_size: int = 100_000,
        seed: int = 0,
        k_factor: float | None = None,
    ) -> None:
        if not isinstance(factory, str) or not factory:
            raise ValueError(f"factory must be a FAISS factory string such as 'IVF256,Flat', got {factory!r}")
        self.factory = factory
        self.is_binary = factory.startswith("B")
        allowed = (*_METRICS, "hamming") if self.is_binary else tuple(_METRICS)
        if metric not in allowed:
            raise ValueError(f"metric of {factory!r} must be one of {', '.join(allowed)}, got {metric!r}")
        if "IDMap" in factory:
            raise ValueError(f"leave IDMap out of {factory!r}: ids are positions in the order of addition")
        if "RaBitQ" in factory and "Refine" not in factory and "RFlat" not in factory:
            raise ValueError(
                f"the codes of {factory!r} cannot be decoded: FAISS decodes one bit of RaBitQ's, or wrongly; add what "
                "keeps better ones, as in 'IVF256,RaBitQfs,Refine(SQ8)'"
            )
        meant = (
            ("nprobe", nprobe, "IVF|IMI"),
            ("ef_search", ef_search, "HNSW"),
            ("k_factor", k_factor, "Refine|RFlat"),
        )
        for name, value, part in meant:
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value is not None and not re.search(part, factory):
                raise ValueError(
                    f"{name}={value} has no meaning for {factory!r}, which has no {part.split('|')[0]}: "
                    f"leave {name} out"
                )
        if train_size < 1:
            raise ValueError(f"train_size must be at least 1, got {train_size}")
        self.metric = "hamming" if self.is_binary else metric
        self.nprobe = nprobe
        self.ef_search = ef_search
        self.k_factor = k_factor
        self.train_size = train_size
        self.seed = seed
        self._index: Any = None  # FAISS's own index, once the dimension is known
        self._file: Path | None = None  # that the index is mapped from
        self._codes: Tensor | None = None  # of a binary index, for `rows`
        self._empty_bytes = 0
        # A misspelt factory should not wait for hours of feature extraction to be noticed; what
        # depends on the dimension waits for the vectors.
        reason = _factory_failure(_FOLLOWS.sub("IVF1", factory), self.metric, dimension=64)
        if reason is not None and re.search("could not parse|did not generate", reason):
            example = "'BFlat', 'BIVF256', 'BHNSW32'" if self.is_binary else "'Flat', 'IVF256,PQ16', 'HNSW32'"
            raise ValueError(f"FAISS cannot parse the factory {factory!r} ({reason}); examples: {example}")

    def __len__(self) -> int:
        return 0 if self._index is None else int(self._index.ntotal)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make an index with the same settings."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def dimension(self) -> int | None:
        """D of the float vectors; None before the first vectors and for a binary index."""
        return None if self._index is None or self.is_binary else int(self._index.d)

    @property
    def bits(self) -> int | None:
        """The number of bits of the codes with padding; None before the first codes and for a float index."""
        return int(self._index.d) if self._index is not None and self.is_binary else None

    def settle(self, count: int) -> None:
        """Replaces what follows the number of items by numbers. Training does so by itself with its own vectors.

        Of N items there are about 4 sqrt(N) lists, a power of two, but no more than FAISS can learn from N vectors. If
        `nprobe` is None, 16 sqrt(lists / 256) of them are visited: 16 of 256, 64 of 4,096. `train_size` is raised to
        what FAISS advises for as many lists. A factory that names its lists stays as it is.

        Args:
            count: Number of items that the index will hold.
        """
        if self._index is not None or not _FOLLOWS.search(self.factory):
            return
        lists = lists_for(count)
        self.factory = _FOLLOWS.sub(f"IVF{lists}", self.factory)
        self.nprobe = self.nprobe or min(lists, round(16 * math.sqrt(lists / 256)) or 1)
        self.train_size = max(self.train_size, _ADVISED_PER_CENTROID * lists)

    def tune(self, nprobe: int | None = None, ef_search: int | None = None, k_factor: float | None = None) -> None:
        """Sets how thoroughly the index searches.

        Args:
            nprobe: Number of lists that an IVF index visits. None leaves it as it is, like the others.
            ef_search: Number of candidates that an HNSW graph keeps.
            k_factor: Number of candidates that a refining index compares again, in multiples of k.
        """
        self.nprobe = self.nprobe if nprobe is None else nprobe
        self.ef_search = self.ef_search if ef_search is None else ef_search
        self.k_factor = self.k_factor if k_factor is None else k_factor
        if self._index is not None:
            self._configure(self._index)

    def train(self, vectors: Tensor) -> None:
        """Trains centroids and codebooks on the vectors, or on a random choice of them. It adds nothing.

        `add` trains with its first vectors. Call this method where these do not represent the others.

        Args:
            vectors: float32 (N, D) or codes uint8 (N, bits / 8).

        Raises:
            ValueError: If the vectors are wrong or too few, if FAISS refuses the factory at this dimension, or if the
                index is already trained.
        """
        if self._index is not None:
            raise ValueError("the index is trained already: make a new FaissIndex to train another")
        self._train(self._checked(vectors))

    def learns(self, width: int) -> bool:
        """Whether training learns anything from vectors. Flat and HNSW learn nothing.

        Args:
            width: Number of columns of the vectors.

        Raises:
            ValueError: If FAISS refuses the factory at this width.
        """
        return not self._allocated(width).is_trained

    def sample(self, count: int) -> Tensor:
        """The positions int64 (n,) of the vectors that training uses, in its order.

        Args:
            count: Number of vectors to choose from.
        """
        if count <= self.train_size:
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[: self.train_size]

    def emptied(self) -> FaissIndex:
        """An index with the same settings and the same training, without items."""
        other = FaissIndex(**self.settings)
        if self._index is not None and not _new_index(self.factory, self.metric, self._index.d).is_trained:
            if self._file is not None:  # what is mapped cannot be emptied
                empty = (faiss.read_index_binary if self.is_binary else faiss.read_index)(str(self._file))
            else:
                clone = faiss.clone_binary_index if self.is_binary else faiss.clone_index  # type: ignore[attr-defined]
                empty = clone(self._index)
            empty.reset()
            other._finish(empty)
        return other

    def trained(self) -> Tensor:
        """The trained state as bytes, uint8 (n,), for `load_trained`, without items.

        Raises:
            ValueError: If there is no trained state.
        """
        index = self.emptied()._index
        if index is None:
            raise ValueError(f"{self.factory!r} was not trained: it has no state to pass on")
        write = faiss.serialize_index_binary if self.is_binary else faiss.serialize_index
        return torch.from_numpy(write(index))

    def load_trained(self, state: Tensor) -> None:
        """Loads the trained state of an index with the same settings.

        Args:
            state: uint8 (n,), from `trained`.
        """
        read = faiss.deserialize_index_binary if self.is_binary else faiss.deserialize_index
        self._finish(read(state.numpy()))

    @staticmethod
    def joined(choices: Sequence[tuple[FaissIndex, Tensor]]) -> FaissIndex:
        """A new index of some items of several indexes, in the order given, with the training of the first.

        Codes are copied, so that scores stay what they are. Where FAISS does not give codes out (fast-scan), and in a
        graph, which is made anew, the decoded vectors are added.

        Args:
            choices: Indexes of equal settings and training, each with the ascending positions int64 (n,) of its items.

        Raises:
            ValueError: If there is no index, or if FAISS cannot decode the factory.
        """
        if not choices:
            raise ValueError("there is no index to take items of: give at least one")
        made = choices[0][0].emptied()
        if made._index is not None and all(_copied(made._index, one._index, rows) for one, rows in choices):
            made._drop_maps()  # they know nothing of what was copied
            return made
        made = choices[0][0].emptied()
        for one, rows in choices:
            for block in rows.split(_BLOCK):
                made.add(one.rows(block))
        return made

    def add(self, vectors: Tensor) -> None:
        """Adds vectors at the positions len(index), len(index) + 1, ...

        Args:
            vectors: float32 (N, D) or codes uint8 (N, bits / 8).

        Raises:
            ValueError: If the vectors are wrong. The first vectors train the index, and errors are as in `train`.
        """
        array = self._checked(vectors)
        if self._index is None:
            self._train(array)
        self._codes = None
        self._index.add(array)

    def search(self, vectors: Tensor, k: int, among: Tensor | Selection | None = None) -> SearchResult:
        """The k most similar items of each of Q queries, best first.

        Scores are inner products, minus squared L2 distances, or minus Hamming distances. The scores of a compressed
        index are asymmetric: an exact query against a decoded item. Equal scores come in the order of addition. Which
        of the items that tie with the k-th score are returned: the first added for l2 and Hamming, FAISS's choice for
        the inner product.

        A choice `among` the items is made inside FAISS, not among its answers. The fewer items are chosen, the more
        lists an IVF index visits and the more candidates an HNSW graph keeps, so that recall holds up. Where few items
        are chosen, or where the kind of index cannot select (PQ, RFlat, IVF of codes, ...), all chosen items are
        decoded and compared.

        Args:
            vectors: float32 (Q, D) or codes uint8 (Q, bits / 8).
            k: Number of items, 1..N.
            among: The items that may be returned, as a selection or bool (N,); None for all.

        Returns:
            Positions and scores (Q, k). Where an approximate index finds fewer than k items, or where fewer are chosen,
                the id is -1 and the score -inf.

        Raises:
            ValueError: If the queries or `among` are wrong, if the index is empty, or if k is out of range.
        """
        array = self._checked(vectors)
        if len(self) == 0:
            raise ValueError("the index is empty: add vectors before searching")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if k > len(self):
            raise ValueError(f"k={k} neighbours are more than the index's {len(self)} items: lower k")
        if among is None:
            return self._result(*self._index.search(array, k))
        if isinstance(among, Tensor):
            if among.dtype != torch.bool or among.shape != (len(self),):
                raise ValueError(f"among must be bool ({len(self)},), got {among.dtype} {tuple(among.shape)}")
            among = Selection.of(among)
        if among.total != len(self):
            raise ValueError(f"among selects from {among.total} items, the index has {len(self)}: select from its own")
        parameters = self._selecting(among, len(array))
        if parameters is not None:
            try:
                return self._result(*self._index.search(array, k, params=parameters))
            except RuntimeError:  # a kind, or a release of FAISS, that takes no selector
                pass
        return self._search_rows(array, k, among.positions)

    def _selecting(self, among: Selection, queries: int) -> Any:
        """FAISS's search parameters that select items; None where all selected rows are to be compared instead."""
        if len(among) == 0:
            return None
        api: Any = faiss  # the stubs know nothing of what FAISS's Python layer adds
        wider = len(self) / len(among)
        visited, refined, arguments = 1.0, None, {}
        kind = api.SearchParameters
        for part in _parts(self._index):
            if isinstance(part, faiss.IndexRefine):
                refined = part.k_factor
            if isinstance(part, faiss.IndexIVF):
                lists = min(part.nlist, math.ceil(_MORE_LISTS * wider * part.nprobe))
                kind, arguments, visited = api.SearchParametersIVF, {"nprobe": lists}, lists / part.nlist
                break
            if hasattr(part, "hnsw"):
                kept = math.ceil(_MORE_KEPT * wider * part.hnsw.efSearch)
                if len(among) <= _KEPT_ROWS * kept:
                    return None
                kind, arguments, visited = api.SearchParametersHNSW, {"efSearch": kept}, 0.0  # of what it tests
                break
        by_rows = len(among) * (_DECODE + _COMPARE_ROWS * queries)
        if len(among) <= _FEW or by_rows <= queries * visited * (_TEST * len(self) + _COMPARE * len(among)):
            return None
        sel = api.IDSelectorBitmap(among.bitmap)
        parameters = kind(sel=sel, **arguments)
        if refined is not None:
            parameters = api.IndexRefineSearchParameters(k_factor=refined, base_index_params=parameters)
        return parameters

    def _search_rows(self, array: np.ndarray, k: int, positions: np.ndarray) -> SearchResult:
        """The answer among the items at ascending `positions` (n,), by a comparison with all of them."""
        found = [(np.empty((len(array), 0), np.float32), np.empty((len(array), 0), np.int64))]
        for start in range(0, len(positions), _BLOCK):
            block = positions[start : start + _BLOCK].astype(np.int64)
            width = self._index.d
            flat: Any = (
                faiss.IndexBinaryFlat(width) if self.is_binary else faiss.IndexFlat(width, _METRICS[self.metric])
            )
            flat.add(self.rows(torch.from_numpy(block)).numpy())
            values, places = flat.search(array, min(k, len(block)))
            found.append((values, block[places]))
        values, ids = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        if len(found) > 2:  # stable, and earlier blocks first: equal scores stay in the order of addition
            best = np.argsort(-values if self.metric == "ip" else values, axis=1, kind="stable")[:, :k]
            values, ids = np.take_along_axis(values, best, axis=1), np.take_along_axis(ids, best, axis=1)
        missing = ((0, 0), (0, k - ids.shape[1]))
        return self._result(np.pad(values, missing), np.pad(ids, missing, constant_values=-1))

    def _result(self, values: np.ndarray, positions: np.ndarray) -> SearchResult:
        ids = torch.from_numpy(positions)
        scores = torch.from_numpy(values).to(torch.float32)
        if self.metric != "ip":
            scores = 0.0 - scores  # a plain minus would print -0.0
        scores[ids < 0] = -math.inf
        return SearchResult(*_ties_in_order(ids, scores))

    def reconstruct(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The stored items start..stop-1, float32 (N, D) or codes uint8.

        They are decoded for PQ and SQ, and the input itself for Flat, IVF-Flat and HNSW-Flat. The product of a query
        with a row (or their distance) is the score of `search`, so that blocks of rows can measure the full ranking of
        a compressed index. There are two exceptions. Fast-scan PQ ("PQ16x4fs") scores only roughly so. PCA with the
        inner product and L2norm change the query too: transform the vectors before the index instead.

        Args:
            start: First position.
            stop: Last position plus one; None for the end.

        Raises:
            ValueError: If the range lies outside the index, or if FAISS cannot decode the factory.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows {start}:{stop} are not within the {len(self)} items of the index")
        if start == stop:
            width = 0 if self._index is None else int(self._index.d)
            return torch.empty((0, width // 8), dtype=torch.uint8) if self.is_binary else torch.empty((0, width))
        try:
            return torch.from_numpy(self._index.reconstruct_n(start, stop - start))
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot decode the items of {self.factory!r}: {_reason(error)}") from None

    def rows(self, positions: Tensor) -> Tensor:
        """The stored items at some positions, float32 (n, D) or codes uint8, as `reconstruct` returns them.

        The first call on an IVF index makes a map of 8 bytes per item, on a binary index a copy of its codes. Several
        threads may call this method and `search` at once.

        Args:
            positions: int64 (n,).

        Raises:
            ValueError: If a position lies outside the index, or if FAISS cannot decode the factory.
        """
        if len(positions) == 0:
            return self.reconstruct(0, 0)
        if int(positions.min()) < 0 or int(positions.max()) >= len(self):
            raise ValueError(f"positions must lie in 0 .. {len(self) - 1}, got {positions[:5].tolist()} ...")
        if self.is_binary:
            with _FIRST_READ:
                if self._codes is None:
                    self._codes = self.reconstruct()
            return self._codes[positions]
        try:
            with _FIRST_READ:
                for part in () if isinstance(self._index, faiss.IndexRefine) else _parts(self._index):
                    if isinstance(part, faiss.IndexIVF) and part.direct_map.no():
                        part.make_direct_map()
            return torch.from_numpy(self._index.reconstruct_batch(np.ascontiguousarray(positions.numpy())))
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot decode the items of {self.factory!r}: {_reason(error)}") from None

    @property
    def keeps_vectors(self) -> bool:
        """Whether `rows` are the added vectors (Flat, HNSW of Flat, codes) and not decoded approximations."""
        return self.is_binary or self.dimension is None or self.code_bytes >= 4 * self.dimension

    @property
    def bytes_per_item(self) -> float:
        """The size of an item in bytes: code, id and graph links, without shared data.

        It is measured: the serialised size minus that of the trained empty index (centroids, codebooks, rotation),
        divided by the number of items. IVF takes 8 bytes per id and shares the lengths of its lists among all items.
        HNSW takes 4 bytes per link, and levels and offsets.

        Raises:
            ValueError: If the index is empty.
        """
        if len(self) == 0:
            raise ValueError("the index is empty: bytes per item are measured on items")
        self._drop_maps()
        return (_serialised_bytes(self._index) - self._empty_bytes) / len(self)

    @property
    def code_bytes(self) -> int:
        """The size of an item's code alone in bytes: 4 D for Flat, 16 for PQ16, bits / 8 for binary codes.

        Raises:
            ValueError: If no vectors were added yet.
        """
        if self._index is None:
            raise ValueError("the size of a code is only known once vectors were added")
        return _code_bytes(self._index)

    def save(self, path: str | Path) -> None:
        """Writes the index into a folder: index.faiss, as FAISS itself writes it, and index.json, the settings.

        Both files are written beside their place and moved there, and replace older files. index.json holds the SHA-256
        of index.faiss, so that `load` notices an interruption between the two moves.

        Args:
            path: The folder.

        Raises:
            ValueError: If the index was neither trained nor filled.
        """
        if self._index is None:
            raise ValueError("nothing to save: the index was neither trained nor filled")
        self._drop_maps()
        folder = Path(path)
        with replacing(folder / "index.faiss") as data:
            write = faiss.write_index_binary if self.is_binary else faiss.write_index
            write(self._index, str(data))
            content = self.settings | {"empty_bytes": self._empty_bytes, "sha256": sha256(data)}
        write_json(folder / "index.json", content)

    @classmethod
    def load(cls, path: str | Path, *, mapped: bool = False) -> FaissIndex:
        """The index that `save` wrote into a folder.

        Args:
            path: The folder.
            mapped: Read codes, lists and graphs from the disk when they are needed, where FAISS can (Flat, SQ, PQ,
                HNSW, IVF, what refines; not binary codes and fast-scan lists). The file's digest is not checked.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged. The message names the file.
        """
        data, settings = Path(path) / "index.faiss", Path(path) / "index.json"
        for file in (settings, data):
            if not file.is_file():
                raise FileNotFoundError(f"no index file {file}: save an index there first")
        try:
            content = {"k_factor": None} | read_json(settings)  # older ones have none
            index = cls(**{name: content[name] for name in SETTINGS})
            index._empty_bytes = content["empty_bytes"]
            digest = content["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"damaged index settings {settings} ({error}): save the index again") from None
        if not mapped and sha256(data) != digest:
            raise ValueError(
                f"damaged index file {data}: its SHA-256 is not the one in {settings.name}; save the index again"
            )
        flags = _mapping_flags(index.factory) if mapped else 0
        try:
            index._index = (faiss.read_index_binary if index.is_binary else faiss.read_index)(str(data), flags)
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot read {data}: {_reason(error)}") from None
        index._file = data if flags else None
        index._configure(index._index)
        return index

    def _checked(self, vectors: Tensor) -> np.ndarray:
        """Returns vectors as FAISS wants them. Every check of what comes in from outside is here."""
        if not isinstance(vectors, Tensor):
            raise ValueError(f"expected a torch tensor, got {type(vectors).__name__}: use torch.from_numpy")
        shape, dtype = tuple(vectors.shape), vectors.dtype
        if self.is_binary and dtype != torch.uint8:
            raise ValueError(
                f"{self.factory!r} holds packed codes, uint8 (N, bits / 8), got {dtype} {shape}: take the "
                "signs, pad with zeros to a multiple of 8 bits and pack 8 to a byte (numpy.packbits)"
            )
        if not self.is_binary and dtype != torch.float32:
            hint = "codes need a binary factory such as 'BFlat'" if dtype == torch.uint8 else "call .float()"
            raise ValueError(f"{self.factory!r} holds float32 vectors (N, D), got {dtype} {shape}: {hint}")
        if vectors.ndim != 2 or shape[1] == 0:
            what = "codes must be (N, bits / 8)" if self.is_binary else "vectors must be (N, D)"
            raise ValueError(f"{what}, got shape {shape}; for a single one write x[None]")
        width = shape[1] * 8 if self.is_binary else shape[1]
        if self._index is not None and width != self._index.d:
            unit = "bits" if self.is_binary else "dimensions"
            raise ValueError(f"the index has {self._index.d} {unit}, the vectors have {width}")
        if not self.is_binary:
            check_vectors("vectors", vectors)
        return np.ascontiguousarray(vectors.detach().cpu().numpy())

    def _train(self, array: np.ndarray) -> None:
        """Allocates an index for the arrays' width and trains it."""
        self.settle(len(array))
        index = self._allocated(array.shape[1])
        if not index.is_trained:
            count = min(len(array), self.train_size)
            needed = max(_centroids(part) for part in _parts(index))
            if count < needed:
                hint = (
                    "give more vectors or choose a factory with fewer centroids"
                    if len(array) < needed
                    else f"raise train_size (now {self.train_size})"
                )
                raise ValueError(f"{self.factory!r} needs at least {needed} vectors to train, got {count}: {hint}")
            if count < len(array):
                array = array[self.sample(len(array)).numpy()]
            if count < _ADVISED_PER_CENTROID * needed and needed > 1:
                warnings.warn(
                    f"{self.factory!r} learns {needed} centroids from {count} vectors: fewer than the "
                    f"{_ADVISED_PER_CENTROID * needed} that FAISS advises, so they may be poor",
                    stacklevel=3,
                )
            try:
                _train_seeded(index, array, self.seed)
            except RuntimeError as error:
                raise ValueError(f"FAISS cannot train {self.factory!r} on {count} vectors: {_reason(error)}") from None
        self._finish(index)

    def _allocated(self, width: int) -> Any:
        dimension = width * 8 if self.is_binary else width
        reason = _factory_failure(self.factory, self.metric, dimension)
        if reason is not None:
            raise ValueError(_explain(self.factory, self.metric, dimension, reason))
        return _new_index(self.factory, self.metric, dimension)

    def _finish(self, index: Any) -> None:
        """Takes a trained index without items."""
        self._configure(index)
        self._empty_bytes = _serialised_bytes(index)
        self._index = index

    def _drop_maps(self) -> None:
        """Takes away what `rows` made, which FAISS would write too."""
        for part in _parts(self._index):
            if isinstance(part, faiss.IndexIVF):
                part.set_direct_map_type(faiss.DirectMap.NoMap)  # type: ignore[attr-defined]

    def _configure(self, index: Any) -> None:
        """Sets the search-time options wherever in the index they belong (behind OPQ, refinement, ...)."""
        for part in _parts(index):
            if self.nprobe is not None and hasattr(part, "nprobe"):
                part.nprobe = self.nprobe
            if self.ef_search is not None and hasattr(part, "hnsw"):
                part.hnsw.efSearch = self.ef_search
            if self.k_factor is not None and isinstance(part, faiss.IndexRefine):
                part.k_factor = self.k_factor


def lists_for(count: int) -> int:
    """The number of lists of an IVF index: the power of two nearest to 4 sqrt(count), at most count / 39.

    Args:
        count: Number of items.

    Example:
        >>> lists_for(1_000), lists_for(1_000_000), lists_for(10_000_000)
        (16, 4096, 16384)
    """
    most = max(1, count // _ADVISED_PER_CENTROID)
    return min(2 ** round(math.log2(4 * math.sqrt(max(1, count)))), 2 ** (most.bit_length() - 1))


def builds(factory: str, metric: str, width: int) -> bool:
    """Whether this release of FAISS makes such an index.

    Args:
        factory: A factory string, as in FaissIndex.
        metric: "ip", "l2" or "hamming".
        width: Number of columns of the vectors or packed codes.
    """
    dimension = 8 * width if metric == "hamming" else width
    return _factory_failure(_FOLLOWS.sub("IVF1", factory), metric, dimension) is None


def _new_index(factory: str, metric: str, dimension: int) -> Any:
    if metric == "hamming":
        return faiss.index_binary_factory(dimension, factory)
    return faiss.index_factory(dimension, factory, _METRICS[metric])


def _factory_failure(factory: str, metric: str, dimension: int) -> str | None:
    """Returns why FAISS refuses the factory at this dimension, None where it does not."""
    try:
        _new_index(factory, metric, dimension)
    except RuntimeError as error:
        return _reason(error)
    return None


def _reason(error: RuntimeError) -> str:
    """Returns a FAISS error without the C++ signature and source line in front of it."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)


def _explain(factory: str, metric: str, dimension: int, reason: str) -> str:
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


def _parts(index: Any) -> Iterator[Any]:
    """Yields an index and every index and transform inside it, each as its own class."""
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
            yield from _parts(inner)


def _mapping_flags(factory: str) -> int:
    """How FAISS reads a file without reading all of it. 0 where it cannot."""
    lists = "IVF" in factory
    if re.search(r"x\d+fs|RaBitQfs", factory):  # these lists are arranged anew when they are read
        if not re.search("Refine|RFlat", factory):
            return 0
        lists = False  # the codes of the refinement lie beside them
    return getattr(faiss, "IO_FLAG_MMAP" if lists else "IO_FLAG_MMAP_IFC", 0)


def _copied(target: Any, source: Any, rows: Tensor) -> bool:
    """Copies the codes of ascending rows to the end of an index of the same training. False if this kind cannot."""
    target, source = next(_parts(target)), next(_parts(source))
    if type(target) is not type(source):
        return False
    done = False
    if isinstance(target, faiss.IndexPreTransform):
        done = _copied(target.index, source.index, rows)
    elif isinstance(target, faiss.IndexRefine):
        done = _copied(target.base_index, source.base_index, rows)
        done = done and _copied(target.refine_index, source.refine_index, rows)
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


_CODES = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2, faiss.IndexPQ, faiss.IndexScalarQuantizer)
_LISTS = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
_LISTS += tuple(getattr(faiss, name) for name in ("IndexIVFRaBitQ",) if hasattr(faiss, name))  # of releases from 1.12


def _centroids(part: Any) -> int:
    """Returns the largest k-means that training this part runs: FAISS wants as many vectors."""
    if isinstance(part, faiss.OPQMatrix):
        return 256  # its own quantiser of 8 bits
    lists = getattr(part, "nlist", 0) if getattr(part, "quantizer_trains_alone", 0) != 1 else 0
    pq = getattr(part, "pq", None)
    return max(1, lists, pq.ksub if pq is not None else 0)


def _train_seeded(index: Any, array: np.ndarray, seed: int) -> None:
    """Trains with k-means seeded wherever FAISS runs one; its other generators have fixed seeds."""
    clusterings, opqs = [], []
    for part in _parts(index):
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


def _code_bytes(index: Any) -> int:
    index = next(_parts(index))
    if isinstance(index, faiss.IndexRefine):
        return _code_bytes(index.base_index) + _code_bytes(index.refine_index)
    for name in ("index", "storage"):
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index | faiss.IndexBinary):
            return _code_bytes(inner)
    return int(index.code_size)


def _serialised_bytes(index: Any) -> int:
    """Returns the size FAISS would write, without holding it."""
    size = 0

    def count(block: bytes) -> None:
        nonlocal size
        size += len(block)

    write = faiss.write_index_binary if isinstance(index, faiss.IndexBinary) else faiss.write_index
    write(index, faiss.PyCallbackIOWriter(count))  # type: ignore[attr-defined]  # missing in the stubs
    return size


def _ties_in_order(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ids and scores with equal scores in ascending order of id, empty places last."""
    wrong = (scores[:, 1:] == scores[:, :-1]) & (ids[:, 1:] < ids[:, :-1]) & (ids[:, 1:] >= 0)
    rows = wrong.any(1).nonzero()[:, 0]
    if len(rows):  # few as a rule: only these are sorted
        some, values = ids[rows], scores[rows]
        by_id = torch.where(some < 0, torch.iinfo(torch.int64).max, some).argsort(dim=1)
        order = by_id.gather(1, values.gather(1, by_id).argsort(dim=1, descending=True, stable=True))
        ids[rows] = some.gather(1, order)  # the scores are sorted already
    return ids, scores
