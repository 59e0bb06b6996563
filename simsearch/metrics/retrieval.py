"""Retrieval metrics as a torchmetrics Metric: collects descriptors over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from simsearch.functional.code_statistics import CodeMoments
from simsearch.functional.codes import pack_codes
from simsearch.functional.ranking import measure_ranking
from simsearch.types import Descriptors

Part = Literal["query", "gallery"]


def mean_name(name: str) -> str:
    """The name of a per-query metric's mean: AP becomes mAP, also below a folder; others keep theirs."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{'m' if last.startswith('AP') else ''}{last}"


class RetrievalMetrics(Metric):
    """Full-ranking retrieval metrics of the descriptors that were collected, exact under ties.

    `update` takes embeddings (B, D) float, their labels and collection rows int64 (B,), optionally
    their junk groups, and whether they are queries or gallery. Rows that came twice (a padded
    sampler) count once. With `bits` the signs of the embeddings are compared by Hamming distance.
    `compute` gives the means over queries with at least one relevant item.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, ks: Sequence[int] = (1, 10, 100), bits: int | None = None, exclude_self: bool = False) -> None:
        super().__init__()
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be ranks from 1, got {list(ks)}")
        self.ks, self.bits, self.exclude_self = tuple(ks), bits, exclude_self
        for part in ("query", "gallery"):
            for name in ("vectors", "label", "index", "group"):
                self.add_state(f"{part}_{name}", default=[], dist_reduce_fx="cat")
        if bits is not None:
            zeros = CodeMoments.zeros(bits)
            for name in ("count", "total", "products", "error"):
                default = torch.as_tensor(getattr(zeros, name), dtype=torch.float64)
                self.add_state(f"code_{name}", default=default, dist_reduce_fx="sum")

    def update(self, part: Part, embedding: Tensor, label: Tensor, index: Tensor, group: Tensor | None = None) -> None:
        """Adds a batch to the queries or to the gallery. Raises ValueError for another part."""
        if part not in ("query", "gallery"):
            raise ValueError(f"part must be query or gallery, got {part!r}")
        vectors = embedding.detach().float()
        if self.bits is not None:
            if vectors.shape[1] != self.bits:
                raise ValueError(f"codes of {self.bits} bits need embeddings as wide, got {vectors.shape[1]}")
            if not torch.isfinite(vectors).all():
                raise ValueError("the real-valued codes hold NaN or infinity: their signs mean nothing")
            if part == "gallery":
                moments = CodeMoments.zeros(self.bits)
                moments.add(vectors)
                for name in ("count", "total", "products", "error"):
                    state = getattr(self, f"code_{name}")
                    state += torch.as_tensor(getattr(moments, name), dtype=state.dtype, device=state.device)
            vectors = pack_codes(vectors)
        group = torch.full_like(index, -1) if group is None else group
        for name, value in (("vectors", vectors), ("label", label), ("index", index), ("group", group)):
            getattr(self, f"{part}_{name}").append(value.detach())

    def forward(self, part: Part, embedding: Tensor, label: Tensor, index: Tensor, group: Tensor | None = None) -> None:
        """Adds a batch, as `update` does: a batch of one part alone has nothing to rank."""
        self.update(part, embedding, label, index, group)

    def descriptors(self, part: Part) -> Descriptors:
        """The collected queries or gallery by ascending row, each row once, on the CPU."""

        def column(name: str) -> Tensor:
            value = getattr(self, f"{part}_{name}")
            if isinstance(value, list):  # a gathered state is a tensor already
                if not value:
                    raise ValueError(f"no {part} items were collected")
                value = torch.cat(value)
            return value.cpu()

        first = torch.from_numpy(np.unique(column("index").numpy(), return_index=True)[1])
        vectors, label, index, group = (column(name)[first] for name in ("vectors", "label", "index", "group"))
        return Descriptors(vectors.contiguous(), label, index, bits=self.bits, group=group)

    def code_statistics(self) -> dict[str, float]:
        """Health of the gallery's codes (functional.code_statistics); empty for float descriptors.

        A padded sampler's doubles count twice here.
        """
        if self.bits is None:
            return {}
        count, error = int(self.code_count), float(self.code_error)
        return CodeMoments(count, self.code_total.cpu(), self.code_products.cpu(), error).statistics()

    def per_query(self) -> dict[str, Tensor]:
        """Metrics of each query: name -> float64 (Q,), queries by ascending row."""
        return measure_ranking(
            self.descriptors("query"), self.descriptors("gallery"), ks=self.ks, exclude_self=self.exclude_self
        )

    def compute(self) -> dict[str, Tensor]:
        """Means over queries: name -> float64 scalar; NaN where no query has a relevant item."""
        values = self.per_query()
        del values["relevant"]
        return {mean_name(name): value.nanmean() for name, value in values.items()}
