"""simsearch: similar-image search, from an experiment to an engine.

The Python API. Each name is imported on first use:

    open_catalog(folder)                 opens a catalog to search by images, ids, filters and counter-examples
    load_encoder(run)                    loads a trained encoder, which describes images
    evaluate(vectors, labels, ...)       evaluates any embeddings
    build_catalog(encoder, images, out)  builds a catalog of a folder of images
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simsearch.api import (
        Answer,
        Hit,
        LoadedEncoder,
        OpenCatalog,
        Report,
        build_catalog,
        evaluate,
        load_encoder,
        open_catalog,
    )
    from simsearch.errors import SimsearchError
    from simsearch.images import ImageError
    from simsearch.models.backbones import WeightsError
    from simsearch.saved_run import RunError
    from simsearch.search.errors import CatalogError
    from simsearch.trust import Untrusted

__version__ = "0.2.0"
__all__ = [
    "Answer",
    "CatalogError",
    "Hit",
    "ImageError",
    "LoadedEncoder",
    "OpenCatalog",
    "Report",
    "RunError",
    "SimsearchError",
    "Untrusted",
    "WeightsError",
    "build_catalog",
    "evaluate",
    "load_encoder",
    "open_catalog",
]
_ERRORS = {
    "CatalogError": "simsearch.search.errors",
    "ImageError": "simsearch.images",
    "RunError": "simsearch.saved_run",
    "SimsearchError": "simsearch.errors",
    "Untrusted": "simsearch.trust",
    "WeightsError": "simsearch.models.backbones",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'simsearch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ERRORS.get(name, "simsearch.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
