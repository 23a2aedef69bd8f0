"""`nonstick serve`: checks everything that can be checked, then lets uvicorn run the application.

One process serves the object that was found. With `--workers` or `--reload` uvicorn starts processes that find it
again; their options travel in an environment variable, so that a store's password is not on a command line.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import uvicorn
from uvicorn.supervisors import ChangeReload, Multiprocess

from nonstick.commands import loading, log_format
from nonstick.commands.access_log import Logged
from nonstick.commands.application import PING_SECONDS, DeferredApp, complain
from nonstick.commands.serve_options import DEFAULT_STORE, ServeOptions
from nonstick.core.settings import Settings
from nonstick.errors import ConfigurationError, StoreUnavailable, StoreUnusable
from nonstick.node.drain import GONE_AFTER
from nonstick.store import Store
from nonstick.stores import open_store
from nonstick.stores.encrypted.keys import keys_from

__all__ = ["bound", "serve", "worker_app"]

_AFTER_GRACE: Final = GONE_AFTER - 0.3
"""Seconds that uvicorn waits longer than the grace period: until the node has told its clients how their requests
ended, and not so long that it could not end in time."""

_KEEPALIVE_SECONDS: Final = 15
"""Between two probes of a silent connection whose client has not answered the first."""
_LONGEST_KEEPALIVE: Final = 32_767
"""Seconds, as the kernel allows."""

_STARTUP_FAILURE: Final = 3
"""uvicorn's exit status of a worker that cannot start: it is not started again."""

logger = logging.getLogger(__name__)


def serve(options: ServeOptions) -> int:
    """Serves until told to stop; returns the exit status.

    Raises:
        TargetError, ConfigurationError, StoreUnusable: The server, an option or the store cannot work. Nothing was
            started.
    """
    _configure_logs(options)
    _stop_at_once_on(signal.SIGTERM)
    found = loading.find(options.target)
    with bound(options) as listener:
        _prepare_store(options)
        options = replace(options, port=listener.getsockname()[1])
        if options.workers > 1 or options.reload:
            return _serve_in_children(options, listener)
        app = DeferredApp(options, found)
        config = uvicorn.Config(app, **_uvicorn_options(options))
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            try:
                return runner.run(_serve_here(app, uvicorn.Server(config), listener))
            except KeyboardInterrupt:  # Ctrl-C, raised again by uvicorn when it has finished
                return 0


def worker_app() -> DeferredApp:
    """The application of a worker process: what uvicorn imports there."""
    options = ServeOptions.handed_over()
    _configure_logs(options)
    try:
        return DeferredApp(options, loading.find(options.target), is_worker=True)
    except loading.TargetError as error:
        complain(error)
        sys.exit(_STARTUP_FAILURE)


# ---- the processes


def _uvicorn_options(options: ServeOptions) -> dict[str, Any]:
    return {
        "host": options.host,
        "port": options.port,
        "log_config": None,  # `log_format.configure` has been there
        "log_level": options.log_level,
        "lifespan": "on",
        "http": Logged,
        "interface": "asgi3",
        "loop": "nonstick.protocols:Loop",
        "timeout_graceful_shutdown": options.grace + _AFTER_GRACE,
    }


async def _serve_here(app: DeferredApp, server: uvicorn.Server, listener: socket.socket) -> int:
    await app.prepare()  # before uvicorn: what goes wrong here is told in one paragraph
    try:
        await server.serve(sockets=[listener])
    except SystemExit as stop:  # by `_stop_at_once`, once uvicorn is done, or by uvicorn
        if app.failure is not None:
            raise app.failure from None
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _serve_in_children(options: ServeOptions, listener: socket.socket) -> int:
    options.hand_over()
    config = uvicorn.Config(
        "nonstick.commands.serve:worker_app",
        factory=True,
        workers=options.workers,
        reload=options.reload,
        # A worker answers only once it has imported everything, which on a busy machine takes longer than the default
        # of 5 s: it would be restarted for ever.
        timeout_worker_healthcheck=15,
        **_uvicorn_options(options),
    )
    if options.reload:
        ChangeReload(config, target=uvicorn.Server(config).run, sockets=[listener]).run()
        return 0
    supervisor = Multiprocess(config, sockets=[listener])
    supervisor.run()
    return 1 if any(process.exitcode == _STARTUP_FAILURE for process in supervisor.processes) else 0


def bound(options: ServeOptions) -> socket.socket:
    """A socket that is bound to the host and port of these options, and does not listen yet.

    Raises:
        ConfigurationError: There is no such address, or the port cannot be had.
    """
    host, port = options.host, options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise ConfigurationError(f"{host!r} is no address of this machine. Use 127.0.0.1, 0.0.0.0 or ::.") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _cut_off_the_unreachable(listener, options)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigurationError(_bind_failed(error, host, port)) from error
    listener.set_inheritable(True)
    return listener


def _cut_off_the_unreachable(listener: socket.socket, options: ServeOptions) -> None:
    """Has the kernel drop connections whose other side takes nothing, or is gone without a word (P10).

    A node that gives a client up can only ask for the connection to be closed, and that waits until what was written is
    taken: for ever, if the client never reads. Connections inherit this from the socket that they come in by.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux has it
    patience = options.settings.get("send_timeout", Settings.send_timeout)
    if option is not None and isinstance(patience, int | float):
        seconds = math.ceil(2 * min(patience, 86_400))
        listener.setsockopt(socket.IPPROTO_TCP, option, 1000 * seconds)
        # A client that waits for a plain answer is sent nothing that it could leave unacknowledged.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(seconds, _LONGEST_KEEPALIVE))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(seconds, _KEEPALIVE_SECONDS))


def _bind_failed(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use. Choose another with --port (0 for any), or stop what listens there."
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges that this process does not have. Choose one from 1024 on with --port."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine. Use 127.0.0.1, 0.0.0.0 or ::."
    return f"cannot listen on {host} port {port}: {error.strerror}."


def _stop_at_once_on(signum: signal.Signals) -> None:
    """Ends the process with status 0 on this signal.

    uvicorn has its own handler while it runs, and raises the signal again for this one when it has finished.
    """

    def stop(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signum, stop)


def _configure_logs(options: ServeOptions) -> None:
    colour = log_format.wants_colour(sys.stderr, os.environ)
    node = os.environ.get("NONSTICK_NODE") or socket.gethostname()
    log_format.configure(style=options.log_format, level=options.log_level, node=node, colour=colour)


# ---- the store


def _prepare_store(options: ServeOptions) -> None:
    """Checks that nothing has to be changed before the store can be used. A store that is away is no reason to stop.

    Raises:
        ConfigurationError: The URL names no store, or one that cannot serve several processes; or an encryption key is
            none.
        StoreUnusable: The store cannot be used as it is. The message says where the store is, and what to do.
    """
    keys_from(os.environ)
    if options.store == DEFAULT_STORE:
        file = Path(DEFAULT_STORE.removeprefix("sqlite:///"))
        logger.info("no --store: sessions are kept in %s, for what is started in this directory", file)
        _make_home(file.parent)
    if options.store.lower().startswith("memory:") and options.workers > 1:
        raise ConfigurationError(
            "several --workers cannot share memory:, each would have sessions of its own. "
            f"Leave --store out to share {DEFAULT_STORE}, or give sqlite:///FILE or redis://HOST:PORT."
        )
    asyncio.run(_ping(open_store(options.store)))


async def _ping(store: Store) -> None:
    try:
        async with asyncio.timeout(PING_SECONDS), store:
            await store.ping()
    except StoreUnusable as error:
        raise StoreUnusable(f"the store at {store.url} cannot be used: {error}") from error
    except (TimeoutError, StoreUnavailable) as error:
        what = str(error) or f"no answer within {PING_SECONDS:.0f} s"
        logger.warning(
            "the store at %s cannot be reached yet: %s. This node starts all the same, and is ready (/readyz) once the "
            "store is there. `nonstick doctor --store URL` says more, once it can",
            store.url,
            what,
        )


def _make_home(home: Path) -> None:
    """The directory of the default store: for this user only, and no part of anybody's repository."""
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        (home / ".gitignore").write_text("*\n")
    except OSError as error:
        why = f"cannot write to {home.absolute()}: {error.strerror}"
        raise ConfigurationError(f"{why}. Give a place for the sessions with --store sqlite:///FILE.") from error
