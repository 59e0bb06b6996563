"""One interface over FAISS's float and binary indexes.

Johnson, Douze, Jegou: Billion-scale similarity search with GPUs (2017); Douze et al.: The Faiss
library (2024). Factory strings: https://github.com/facebookresearch/faiss/wiki/The-index-factory
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from simsearch.files import read_json, replacing, sha256, write_json
from simsearch.index.factories import (
    ADVISED_PER_CENTROID,
    FOLLOWS,
    METRICS,
    OTHER_METRIC,
    explained,
    factory_failure,
    lists_for,
    mapping_flags,
    new_index,
    reason_of,
)
from simsearch.index.parts import (
    centroids_of,
    code_bytes_of,
    copied,
    decoded,
    keeps_vectors,
    parts_of,
    read_without_items,
    serialised_bytes,
    train_seeded,
)
from simsearch.index.selection import Selection, checked_choice
from simsearch.index.visits import keeping, lists_of_some, selecting, visits_of_each
from simsearch.types import SearchResult, check_vectors

_BLOCK = 2**14  # stored rows that are decoded together
_FIRST_READ = threading.Lock()  # of all indexes: one of its own could not be copied with the index
SETTINGS = ("factory", "metric", "nprobe", "ef_search", "k_factor", "train_size", "seed")


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
        ef_search: Number of candidates that an HNSW graph keeps (FAISS: 16). A search for more items keeps as many.
        train_size: Largest number of vectors, a random choice, that train centroids and codebooks.
        seed: Seed of that choice and of k-means.
        k_factor: Number of candidates that a refining index ("...,Refine(SQ8)") compares again, in multiples of k
            (FAISS: 1).

    Raises:
        ValueError: If FAISS cannot parse the factory string, if it has the index for another metric alone (graphs of
            product codes: l2), if it cannot decode the items (RaBitQ without a refinement, BHash) or add further ones
            (NSG), or if an argument is out of range.

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
        allowed = (*METRICS, "hamming") if self.is_binary else tuple(METRICS)
        if metric not in allowed:
            raise ValueError(f"metric of {factory!r} must be one of {', '.join(allowed)}, got {metric!r}")
        if "IDMap" in factory:
            raise ValueError(f"leave IDMap out of {factory!r}: ids are positions in the order of addition")
        if "RaBitQ" in factory and "Refine" not in factory and "RFlat" not in factory:
            raise ValueError(
                f"the codes of {factory!r} cannot be decoded: FAISS decodes one bit of RaBitQ's, or wrongly; add what "
                "keeps better ones, as in 'IVF256,RaBitQfs,Refine(SQ8)'"
            )
        if "BHash" in factory:
            raise ValueError(f"FAISS cannot decode the items of {factory!r}: take 'BFlat', 'BIVF' or 'BHNSW32'")
        if "NSG" in factory:
            raise ValueError(f"FAISS cannot add further items to {factory!r}: take another graph, as in 'HNSW32'")
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
        self._some: tuple[np.ndarray, np.ndarray] | None = None  # items and their lists, for filters
        self._empty_bytes = 0
        # A misspelt factory should not wait for hours of feature extraction to be noticed; what
        # depends on the dimension waits for the vectors.
        reason = factory_failure(FOLLOWS.sub("IVF1", factory), self.metric, dimension=64)
        if reason is not None and re.search("could not parse|did not generate", reason):
            example = "'BFlat', 'BIVF256', 'BHNSW32'" if self.is_binary else "'Flat', 'IVF256,PQ16', 'HNSW32'"
            raise ValueError(f"FAISS cannot parse the factory {factory!r} ({reason}); examples: {example}")
        if reason is not None and OTHER_METRIC in reason:
            raise ValueError(f"the factory {factory!r} has no metric {metric!r}: {reason}")

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
        self._name_lists(lists_for(count))

    def settle_as(self, other: FaissIndex) -> None:
        """Replaces what follows the number of items by what follows the number of lists of another index.

        Args:
            other: The index. If it has no lists, nothing is replaced.
        """
        if (found := re.search(r"IVF(\d+)", other.factory)) is not None:
            self._name_lists(int(found[1]))

    def _name_lists(self, lists: int) -> None:
        if self._index is not None or not FOLLOWS.search(self.factory):
            return
        self.factory = FOLLOWS.sub(f"IVF{lists}", self.factory)
        self.nprobe = self.nprobe or min(lists, round(16 * math.sqrt(lists / 256)) or 1)
        self.train_size = max(self.train_size, ADVISED_PER_CENTROID * lists)

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
        if self._index is not None and not new_index(self.factory, self.metric, self._index.d).is_trained:
            if self._file is not None:  # what is mapped cannot be emptied
                empty = read_without_items(str(self._file), mapping_flags(self.factory), self.is_binary)
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
        if made._index is not None and all(copied(made._index, one._index, rows) for one, rows in choices):
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
        self._codes = self._some = None
        self._index.add(array)

    def search(self, vectors: Tensor, k: int, among: Tensor | Selection | None = None) -> SearchResult:
        """The k most similar items of each of Q queries, best first.

        Scores are inner products, minus squared L2 distances, or minus Hamming distances. The scores of a compressed
        index are asymmetric: an exact query against a decoded item. Equal scores come in the order of addition. Which
        of the items that tie with the k-th score are returned: the first added for l2 and Hamming, FAISS's choice for
        the inner product.

        A choice `among` the items is made inside FAISS, not among its answers. The fewer items are chosen, the more
        lists an IVF index visits and the more candidates an HNSW graph keeps, so that recall holds up; a query from
        which the chosen items lie far visits more lists, all of them if it finds fewer than k. Where few items are
        chosen, or where the kind of index cannot select (PQ, RFlat, IVF of codes, ...), all chosen items are decoded
        and compared.

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
        among = checked_choice(k, among, len(self))
        if among is None:
            return self._result(*self._index.search(array, k, params=keeping(self._index, k)))
        found = self._search_among(array, k, among)
        short = (found.ids[:, min(k, len(among)) - 1] < 0).nonzero()[:, 0] if len(among) else found.ids[:0, 0]
        if len(short):  # what is chosen lies far from these queries
            again = self._search_among(array[short.numpy()], k, among, all_lists=True)
            found.ids[short], found.scores[short] = again.ids, again.scores
        return found

    def _search_among(self, array: np.ndarray, k: int, among: Selection, all_lists: bool = False) -> SearchResult:
        visits, usual = visits_of_each(self._index, array, among, self._sampled, all_lists)
        if visits is not None:
            try:
                ids, scores = torch.empty(len(array), k, dtype=torch.int64), torch.empty(len(array), k)
                for visited in np.unique(visits):
                    rows = np.flatnonzero(visits == visited)
                    parameters = selecting(self._index, k, among, int(visited), bool(visited > usual))
                    part = self._result(*self._index.search(array[rows], k, params=parameters))
                    ids[rows], scores[rows] = part.ids, part.scores
                return SearchResult(ids, scores)
            except RuntimeError:  # a kind, or a release of FAISS, that takes no selector
                pass
        return self._search_rows(array, k, among.positions)

    def _sampled(self, ivf: Any) -> tuple[np.ndarray, np.ndarray]:
        with _FIRST_READ:
            if self._some is None:
                self._some = lists_of_some(ivf)
            return self._some

    def _search_rows(self, array: np.ndarray, k: int, positions: np.ndarray) -> SearchResult:
        """The answer among the items at ascending `positions` (n,), by a comparison with all of them."""
        api: Any = faiss  # the stubs know nothing of what FAISS's Python layer adds
        found = [(np.empty((len(array), 0), np.float32), np.empty((len(array), 0), np.int64))]
        for start in range(0, len(positions), _BLOCK):
            block = positions[start : start + _BLOCK].astype(np.int64)
            rows, few = self.rows(torch.from_numpy(block)).numpy(), min(k, len(block))
            if self.is_binary:
                flat: Any = faiss.IndexBinaryFlat(self._index.d)
                flat.add(rows)
                values, places = flat.search(array, few)
            else:
                values, places = api.knn(array, rows, few, metric=METRICS[self.metric])
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
            raise ValueError(f"FAISS cannot decode the items of {self.factory!r}: {reason_of(error)}") from None

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
                for part in () if isinstance(self._index, faiss.IndexRefine) else parts_of(self._index):
                    if isinstance(part, faiss.IndexIVF) and part.direct_map.no():
                        part.make_direct_map()
            return torch.from_numpy(decoded(self._index, np.ascontiguousarray(positions.numpy())))
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot decode the items of {self.factory!r}: {reason_of(error)}") from None

    @property
    def keeps_vectors(self) -> bool:
        """Whether `rows` are the added vectors (Flat, HNSW of Flat, RFlat, codes) and not decoded approximations."""
        return self._index is None or self.is_binary or keeps_vectors(self._index)

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
        return (serialised_bytes(self._index) - self._empty_bytes) / len(self)

    @property
    def code_bytes(self) -> int:
        """The size of an item's code alone in bytes: 4 D for Flat, 16 for PQ16, bits / 8 for binary codes.

        Raises:
            ValueError: If no vectors were added yet.
        """
        if self._index is None:
            raise ValueError("the size of a code is only known once vectors were added")
        return code_bytes_of(self._index)

    def save(self, path: str | Path) -> None:
        """Writes the index into a folder: index.faiss, as FAISS itself writes it, and index.json, the settings.

        Both files are written beside their place and moved there, and replace older files. index.json holds the SHA-256
        of index.faiss, so that `load` notices an interruption between the two moves.

        Args:
            path: The folder.

        Raises:
            ValueError: If the index was neither trained nor filled.
            OSError: If the file cannot be written. An older one stays.
        """
        if self._index is None:
            raise ValueError("nothing to save: the index was neither trained nor filled")
        self._drop_maps()
        folder = Path(path)
        with replacing(folder / "index.faiss") as data:
            write = faiss.write_index_binary if self.is_binary else faiss.write_index
            try:
                write(self._index, str(data))
            except RuntimeError as error:
                raise OSError(f"cannot write {folder / 'index.faiss'}: {reason_of(error)}") from None
            # FAISS only prints that the last bytes found no room when it closes the file.
            if data.stat().st_size != (size := serialised_bytes(self._index)):
                raise OSError(f"cannot write {folder / 'index.faiss'}: {data.stat().st_size} of {size} bytes arrived")
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
        flags = mapping_flags(index.factory) if mapped else 0
        try:
            index._index = (faiss.read_index_binary if index.is_binary else faiss.read_index)(str(data), flags)
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot read {data}: {reason_of(error)}") from None
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
            needed = max(centroids_of(part) for part in parts_of(index))
            if count < needed:
                hint = (
                    "give more vectors or choose a factory with fewer centroids"
                    if count < self.train_size
                    else f"raise index.train_size (now {self.train_size})"
                )
                raise ValueError(f"{self.factory!r} needs at least {needed} vectors to train, got {count}: {hint}")
            if count < len(array):
                array = array[self.sample(len(array)).numpy()]
            if count < ADVISED_PER_CENTROID * needed and needed > 1:
                warnings.warn(
                    f"{self.factory!r} learns {needed} centroids from {count} vectors: fewer than the "
                    f"{ADVISED_PER_CENTROID * needed} that FAISS advises, so they may be poor",
                    stacklevel=3,
                )
            try:
                train_seeded(index, array, self.seed)
            except RuntimeError as error:
                raise ValueError(
                    f"FAISS cannot train {self.factory!r} on {count} vectors: {reason_of(error)}"
                ) from None
        self._finish(index)

    def check_width(self, width: int) -> None:
        """Checks that FAISS makes such an index, and that it may learn from enough vectors.

        Args:
            width: Number of columns of the vectors or packed codes.

        Raises:
            ValueError: If FAISS makes none, or if `train_size` is smaller than the number of centroids.
        """
        settled = {"factory": FOLLOWS.sub("IVF1", self.factory)}  # the number of items is not known yet
        index = FaissIndex(**self.settings | settled)._allocated(width)
        needed = 1 if index.is_trained else max(centroids_of(part) for part in parts_of(index))
        if self.train_size < needed and not FOLLOWS.search(self.factory):  # else it is raised with their number
            raise ValueError(
                f"{self.factory!r} needs at least {needed} vectors to train: raise index.train_size (now "
                f"{self.train_size})"
            )

    def _allocated(self, width: int) -> Any:
        dimension = width * 8 if self.is_binary else width
        reason = factory_failure(self.factory, self.metric, dimension)
        if reason is not None:
            raise ValueError(explained(self.factory, self.metric, dimension, reason))
        return new_index(self.factory, self.metric, dimension)

    def _finish(self, index: Any) -> None:
        """Takes a trained index without items."""
        self._configure(index)
        self._empty_bytes = serialised_bytes(index)
        self._index = index

    def _drop_maps(self) -> None:
        """Takes away what `rows` made, which FAISS would write too."""
        for part in parts_of(self._index):
            if isinstance(part, faiss.IndexIVF):
                part.set_direct_map_type(faiss.DirectMap.NoMap)  # type: ignore[attr-defined]

    def _configure(self, index: Any) -> None:
        """Sets the search-time options wherever in the index they belong (behind OPQ, refinement, ...)."""
        for part in parts_of(index):
            if self.nprobe is not None and hasattr(part, "nprobe"):
                part.nprobe = self.nprobe
            if self.ef_search is not None and hasattr(part, "hnsw"):
                part.hnsw.efSearch = self.ef_search
            if self.k_factor is not None and isinstance(part, faiss.IndexRefine):
                part.k_factor = self.k_factor


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
