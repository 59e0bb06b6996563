"""simsearch serve: serves one or more catalogs by an HTTP API and a web page."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from omegaconf import DictConfig

from simsearch import configs, program
from simsearch.models.encoder import device
from simsearch.search.catalog import verifying
from simsearch.serving.app import create_app
from simsearch.serving.guard import LOOPBACK, is_loopback, read_host, read_origin
from simsearch.serving.library import Library, Source
from simsearch.serving.service import Service
from simsearch.text import lines

SHUTDOWN_SECONDS = 30
DECODING_SECONDS = 2.0  # time that images have left at shutdown
EVERYWHERE = ("0.0.0.0", "::")  # all addresses of the machine


@program.command("serve")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch serve`.

    Args:
        config: The config of conf/serve.yaml.
    """
    values = configs.plain(config)
    trusted = configs.trusts(config)
    sources = find_sources(values["catalog"], values["root"], values["encoder"])
    limits = configs.build(values["limits"])
    hosts = addresses("allow_hosts", values["allow_hosts"], read_host)
    origins = addresses("allow_origins", values["allow_origins"], read_origin)
    if values["threads"] is not None:
        torch.set_num_threads(values["threads"])
    bound = bind(values["host"], values["port"])  # before the catalogs, which take their time
    host, port = bound.getsockname()[:2]
    chosen = values["verification"]
    settings = partial(
        verifying,
        verify=chosen["enabled"],
        top=chosen["top"],
        regions=chosen["regions"],
        mirrored=chosen["mirrored"],
    )
    library = Library(
        sources,
        trusted=trusted,
        device=device(values["device"]),
        limits=limits,
        runtime=values["runtime"],
        settings=settings,
        store=partial(configs.build, values["store"]) if values.get("store") else None,
    )
    app = create_app(
        library,
        limits,
        hosts=admitted(hosts, host),
        origins=origins,
        proxies=values["proxies"],
        uploads_folder=Path(values["uploads_folder"]).expanduser() if values["uploads_folder"] else None,
    )
    start_log()
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=75,  # longer than proxies keep theirs
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        ),
        app.state.service,
        greeting(library, host, port, uploads=uploads_line(app.state.service)),
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it again once it has ended in order
        signal.signal(number, lambda *_: None)
    server.run(sockets=[bound])
    print("ended", flush=True)


class Server(uvicorn.Server):
    """A server that prints its address once it is ready. At shutdown it does not wait for slow images.

    Args:
        config: The config of uvicorn.
        service: The service.
        greeting: Text to print at the start.
    """

    def __init__(self, config: uvicorn.Config, service: Service, greeting: str) -> None:
        super().__init__(config)
        self._service, self._greeting = service, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the server and prints the greeting.

        Args:
            sockets: Sockets to listen on.
        """
        await super().startup(sockets)
        if self.started:
            print(self._greeting, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops decoding and shuts the server down.

        Args:
            sockets: Sockets that it listens on.
        """
        asyncio.get_running_loop().call_later(DECODING_SECONDS, self._service.stop_decoding)
        await super().shutdown(sockets)


def find_sources(catalog: str | Sequence[str] | Mapping[str, str], root: Any, encoder: Any = None) -> dict[str, Source]:
    """The catalogs by name.

    Args:
        catalog: A folder, several folders, or {name: folder}.
        root: The image root of all catalogs, {name: root}, or None.
        encoder: The exported encoder of all catalogs, {name: folder}, or None.

    Raises:
        ValueError: If a name cannot be part of an address or occurs twice, or if a root or encoder does not exist or
            belongs to no catalog.
    """
    if isinstance(catalog, Mapping):
        named = [(str(name), Path(folder).expanduser()) for name, folder in catalog.items()]
    else:
        folders = [Path(folder).expanduser() for folder in ([catalog] if isinstance(catalog, str) else catalog)]
        named = [
            (re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.") or "catalog", folder) for folder in folders
        ]
    if not named:
        raise ValueError("catalog is empty: give a folder, [a,b] or {name: folder}")
    names = [name for name, _ in named]
    for name in names:
        if not re.fullmatch(r"\w[\w.-]{0,63}", name):
            raise ValueError(
                f"a catalog's name is part of addresses: use only letters, digits, _, - and ., got {name!r}"
            )
        if names.count(name) > 1:
            raise ValueError(f"two catalogs are named {name}: name them by catalog={{one: <folder>, two: <folder>}}")
    roots, encoders = _by_name("root", root, names), _by_name("encoder", encoder, names)
    return {name: Source(folder, roots.get(name), encoders.get(name)) for name, folder in named}


def _by_name(option: str, given: Any, names: Sequence[str]) -> dict[str, Path]:
    """The folders of an option by the names of the catalogs. Raises ValueError if one is missing or of no catalog."""
    folders = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    if unknown := sorted(set(folders) - set(names)):
        raise ValueError(f"{option} names {unknown[0]}, which is not a catalog here: there are {', '.join(names)}")
    found = {str(name): Path(folder).expanduser() for name, folder in folders.items() if folder}
    for path in found.values():
        if not path.is_dir():
            raise ValueError(f"{option}={path} is not a folder")
    return found


def addresses(option: str, given: Any, read: Callable[[str], str]) -> list[str]:
    """The hosts or origins of an option.

    Args:
        option: Name of the option.
        given: None, one, several separated by commas, or a list.
        read: Function that returns one as requests have it, or raises ValueError.

    Raises:
        ValueError: If no request can have one of them.
    """
    found = []
    for one in filter(None, configs.listed(given, known=lambda _: False)):
        try:
            found.append(read(one))
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
    return found


def admitted(hosts: Sequence[str], host: str) -> list[str] | None:
    """The names by which the server may be called: the allowed ones and its own. None for any name.

    To its own address and to the names of its machine no foreign page can point a name of its own, so that they admit
    no DNS rebinding.

    Args:
        hosts: The allowed names.
        host: The address that the server is bound to.
    """
    if not hosts and not is_loopback(host):
        return None
    return [*LOOPBACK, *(() if host in EVERYWHERE else (host,)), *hosts]


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Args:
        host: Host name or address.
        port: Port; 0 for any free one.

    Raises:
        ValueError: If the address cannot be bound.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"port must lie in 0..65535 (0: any free one), got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # By its number: asyncio spares only such sockets Nagle's delay, 40 ms an answer.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port} ({error}): give another host= or port=") from None
    return bound


def start_log() -> None:
    """Logs one line per request, and errors, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Harmless("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name, level in (("simsearch.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class _Harmless(logging.Formatter):
    """Escapes control characters, such as those in names of a catalog's files."""

    def format(self, record: logging.LogRecord) -> str:
        return lines(super().format(record))


def uploads_line(service: Service) -> str:
    """Where uploads are kept and for how long, in a line.

    Args:
        service: The service.
    """
    hours = service.limits.uploads_kept_seconds / 3600
    until = f"{hours / 24:g} days" if hours >= 48 else f"{hours:g} h"
    if service.uploads.folder is not None:
        return f"uploads are kept in {service.uploads.folder.folder} until {until} after their last use"
    why = f": {service.uploads_problem}" if service.uploads_problem else ""
    return f"uploads are kept in memory only, until {until} after their last use{why}"


def greeting(library: Library, host: str, port: int, uploads: str = "") -> str:
    """The text that is printed when the server is ready.

    Args:
        library: The catalogs.
        host: Host that the server is bound to.
        port: Port of the server.
        uploads: Where uploads are kept.
    """
    shown = "localhost" if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    lines = [f"simsearch serves at http://{shown}:{port}/ (API: http://{shown}:{port}/docs)"]
    for loaded in library.catalogs:
        images = f"images in {loaded.root}" if loaded.root else "thumbnails only (give root=<folder of the images>)"
        lines.append(f"  {loaded.name}: {len(loaded.catalog)} items, {images}")
        if loaded.runtime is not None:
            where = {"onnx": "in ONNX Runtime", "torch": "on torch"}[loaded.runtime.runtime]
            lines.append(f"    its encoder runs {where} ({loaded.runtime.reason})")
        if loaded.catalog.calibration is None:
            folder = library.sources[loaded.name].folder
            lines.append(
                "    not calibrated, so it always answers, even without a similar item: simsearch calibrate "
                f"catalog={folder} outside=<folder of other images>"
            )
    if uploads:
        lines.append(f"  {uploads}")
    if not is_loopback(host):
        lines.append("  everybody who can reach this machine can use it")
    return "\n".join([*lines, "  Ctrl-C stops it"])


if __name__ == "__main__":
    main()
