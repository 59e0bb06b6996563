"""Retrieval metrics as a torchmetrics Metric: descriptors are collected over batches and ranks, then ranked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from simsearch.functional.code_health import CodeMoments
from simsearch.functional.codes import pack_codes
from simsearch.functional.ranking import mean_name, measure_ranking
from simsearch.functional.sharded import Ranks, Sharded
from simsearch.types import Descriptors

Role = Literal["query", "gallery"]


class RetrievalMetrics(Metric):
    """The retrieval metrics of full rankings of all collected descriptors, exact under ties.

    `update` collects batches of queries and of gallery items. Rows that came twice, as a sampler with padding gives
    them, count once. `compute` returns the means over queries with at least one relevant item.

    With several ranks, `compute` returns the metrics of all items on each rank, yet the descriptors stay on the rank
    that collected them: each rank ranks its own part of the gallery (functional.sharded). The explicit `sync` of
    torchmetrics still gathers all descriptors on every rank.

    Args:
        ks: Cutoffs k, 1 or more.
        bits: Width of binary codes: the signs of the embeddings are then compared by Hamming distance. None compares
            float embeddings by inner product.
        exclude_self: Take each query's own collection row out of its ranking.

    Raises:
        ValueError: If `ks` is empty or holds a value below 1.

    Example:
        >>> metrics = RetrievalMetrics(ks=(1,))
        >>> metrics.update("query", torch.ones(1, 1), label=torch.tensor([0]), index=torch.tensor([9]))
        >>> gallery = torch.tensor([[3.0], [2.0]])
        >>> metrics.update("gallery", gallery, label=torch.tensor([1, 0]), index=torch.tensor([0, 1]))
        >>> metrics.compute()["mAP"]
        tensor(0.5000, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, ks: Sequence[int] = (1, 10, 100), bits: int | None = None, exclude_self: bool = False) -> None:
        super().__init__(sync_on_compute=False)
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be ranks from 1, got {list(ks)}")
        self.ks, self.bits, self.exclude_self = tuple(ks), bits, exclude_self
        for role in ("query", "gallery"):
            for name in ("vectors", "label", "index", "group"):
                self.add_state(f"{role}_{name}", default=[], dist_reduce_fx="cat")
        if bits is not None:
            zeros = CodeMoments.zeros(bits)
            for name in ("count", "total", "products", "error"):
                default = torch.as_tensor(getattr(zeros, name), dtype=torch.float64)
                self.add_state(f"code_{name}", default=default, dist_reduce_fx="sum")

    def update(self, role: Role, embedding: Tensor, label: Tensor, index: Tensor, group: Tensor | None = None) -> None:
        """Adds a batch to the queries or to the gallery.

        Args:
            role: "query" or "gallery".
            embedding: Floating point (B, D), or real-valued codes (B, bits).
            label: int64 (B,), -1 where unknown.
            index: int64 (B,), collection rows.
            group: int64 (B,), groups of items that are junk to each other, -1 for no group; None for no groups.

        Raises:
            ValueError: If `role` is another word, or if codes have another width or hold NaN or infinity.
        """
        if role not in ("query", "gallery"):
            raise ValueError(f"role must be query or gallery, got {role!r}")
        vectors = embedding.detach().float()
        if self.bits is not None:
            if vectors.shape[1] != self.bits:
                raise ValueError(f"codes of {self.bits} bits need embeddings as wide, got {vectors.shape[1]}")
            if not torch.isfinite(vectors).all():
                raise ValueError("the real-valued codes hold NaN or infinity, whose signs mean nothing")
            if role == "gallery":
                moments = CodeMoments.zeros(self.bits)
                moments.add(vectors)
                for name in ("count", "total", "products", "error"):
                    state = getattr(self, f"code_{name}")
                    state += torch.as_tensor(getattr(moments, name), dtype=state.dtype, device=state.device)
            vectors = pack_codes(vectors)
        group = torch.full_like(index, -1) if group is None else group
        for name, value in (("vectors", vectors), ("label", label), ("index", index), ("group", group)):
            getattr(self, f"{role}_{name}").append(value.detach())

    def forward(self, role: Role, embedding: Tensor, label: Tensor, index: Tensor, group: Tensor | None = None) -> None:
        """Adds a batch, as `update` does. It returns nothing, since queries or gallery items alone cannot be ranked.

        Args:
            role: "query" or "gallery".
            embedding: Floating point (B, D), or real-valued codes (B, bits).
            label: int64 (B,), -1 where unknown.
            index: int64 (B,), collection rows.
            group: int64 (B,), groups of items that are junk to each other, -1 for no group; None for no groups.

        Raises:
            ValueError: As `update` does.
        """
        self.update(role, embedding, label, index, group)

    def descriptors(self, role: Role) -> Descriptors:
        """The queries or the gallery of this rank on the CPU, ordered by collection row, each row once.

        Args:
            role: "query" or "gallery".

        Raises:
            ValueError: If nothing was collected, or as Descriptors does.
        """

        def column(name: str) -> Tensor:
            value = getattr(self, f"{role}_{name}")
            if isinstance(value, list):  # a gathered state is a tensor already
                if not value:
                    raise ValueError(f"no {role} items were collected")
                value = torch.cat([part.cpu() for part in value])  # a GPU has no room for all of them twice
            return value.cpu()

        vectors, label, index, group = (column(name) for name in ("vectors", "label", "index", "group"))
        first = torch.from_numpy(np.unique(index.numpy(), return_index=True)[1])
        if not torch.equal(first, torch.arange(len(index))):  # a copy only where it is needed
            vectors, label, index, group = (values[first] for values in (vectors, label, index, group))
        return Descriptors(vectors.contiguous(), label, index, bits=self.bits, group=group)

    def sharded(self, role: Role) -> Sharded:
        """The queries or the gallery of all ranks. A row that several ranks collected stays on the lowest of them.

        Every rank must call. A rank may have collected nothing.

        Args:
            role: "query" or "gallery".

        Raises:
            ValueError: If no rank collected anything, if embeddings differ in width, or as Descriptors does.
            RuntimeError: If the items of another rank are at fault.
        """
        ranks = Ranks.here(self.device)
        vectors = getattr(self, f"{role}_vectors")
        own_width = vectors[0].shape[-1] if len(vectors) else 0
        width = int(ranks.largest(torch.tensor(own_width)))
        own, error = None, None
        try:
            if width == 0:
                raise ValueError(f"no {role} items were collected")
            if own_width == 0:
                none = torch.zeros(0, dtype=torch.int64)
                empty = torch.zeros(0, width, dtype=torch.float32 if self.bits is None else torch.uint8)
                own = Descriptors(empty, none, none, bits=self.bits, group=none)
            elif own_width == width:
                own = self.descriptors(role)
            else:
                raise ValueError(f"{role} embeddings have {own_width} columns here, {width} on another rank")
        except ValueError as problem:
            error = problem
        ranks.raise_together(error)
        assert own is not None
        return Sharded.spread(own, ranks)

    def code_statistics(self, ranks: Ranks = Ranks()) -> dict[str, float]:  # noqa: B008  (frozen)
        """The health of the gallery's codes over all ranks, by name; empty for float descriptors.

        See `CodeMoments.statistics` for the names. All of `ranks` must call. Rows that came twice count twice here.

        Args:
            ranks: The ranks that collected codes.

        Raises:
            ValueError: If no codes were collected.
        """
        if self.bits is None:
            return {}
        count, total, products, error = (
            ranks.sum(getattr(self, f"code_{name}")).cpu() for name in ("count", "total", "products", "error")
        )
        return CodeMoments(int(count), total, products, float(error)).statistics()

    def per_query(self) -> dict[str, Tensor]:
        """The metrics of each query of all ranks: name -> float64 (Q,), ordered by collection row.

        See `measure_ranking` for the names.
        """
        query, gallery = self.sharded("query"), self.sharded("gallery")
        return measure_ranking(query, gallery, ks=self.ks, exclude_self=self.exclude_self)

    def compute(self) -> dict[str, Tensor]:
        """The means over queries: name -> float64 scalar. A mean is NaN where no query has a relevant item."""
        values = self.per_query()
        del values["relevant"]
        return {mean_name(name): value.nanmean() for name, value in values.items()}
