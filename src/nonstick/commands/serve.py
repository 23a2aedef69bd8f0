"""`nonstick serve`: checks everything that can be checked, then lets uvicorn run the application.

One process serves the object that was found. With `--workers` or `--reload` uvicorn starts processes that find it
again; their settings travel in an environment variable, so that a store's password is not on a command line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, NoReturn

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.supervisors import ChangeReload, Multiprocess

from nonstick.adopt import Adopted, take_over
from nonstick.app import app as make_app
from nonstick.commands import loading
from nonstick.commands import log_format as logs
from nonstick.commands.checks import check_shared
from nonstick.core.settings import Options
from nonstick.core.settings import Settings as EndpointSettings
from nonstick.errors import ConfigurationError, NonstickError, StoreUnavailable, StoreUnusable, Undecryptable
from nonstick.node.drain import GONE_AFTER, seconds_left_here
from nonstick.node.exits import exit_status
from nonstick.protocols import Draining
from nonstick.store import Store
from nonstick.stores import open_store
from nonstick.stores.encrypted.keys import keys_from

__all__ = ["DEFAULT_STORE", "Settings", "bound", "serve", "worker_app"]

DEFAULT_STORE: Final = "sqlite:///.nonstick/sessions.db"
"""In the working directory: shared by what is started there."""

PING_SECONDS: Final = 5.0
"""How long a store may take to answer before it counts as unreachable."""

_AFTER_GRACE: Final = GONE_AFTER - 0.3
"""Seconds that uvicorn waits longer than the grace period: until the node has told its clients how their requests
ended, and not so long that it could not end in time."""

_KEEPALIVE_SECONDS: Final = 15
"""Between two probes of a silent connection whose client has not answered the first."""
_LONGEST_KEEPALIVE: Final = 32_767
"""Seconds, as the kernel allows."""

_STUBBORN_SECONDS: Final = 0.3
"""For what does not stop when it is cancelled, once everything else has had to end."""

_VARIABLE: Final = "NONSTICK_SERVE"
_STARTUP_FAILURE: Final = 3
"""uvicorn's exit status of a worker that cannot start: it is not started again."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line said."""

    target: str
    store: str
    host: str = "127.0.0.1"
    port: int = 8000
    path: str = "/mcp"
    workers: int = 1
    reload: bool = False
    answer: Literal["auto", "sse", "json"] = "auto"
    placement: Literal["any", "stateless", "owner"] = "any"
    grace: float = 20.0
    lease: float = 12.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """What else was set, by its name in `nonstick.app`."""
    log_format: logs.Format = "text"
    log_level: str = "info"

    def hand_over(self) -> None:
        """Leaves these settings for the processes that this one will start."""
        os.environ[_VARIABLE] = json.dumps(dataclasses.asdict(self))

    @classmethod
    def handed_over(cls) -> Settings:
        """The settings that the parent process left."""
        return cls(**json.loads(os.environ[_VARIABLE]))


def serve(settings: Settings) -> int:
    """Serves until told to stop; returns the exit status.

    Raises:
        TargetError, ConfigurationError, StoreUnusable: It cannot work; nothing was started.
    """
    _configure_logs(settings)
    _stop_at_once_on(signal.SIGTERM)
    found = loading.find(settings.target)
    with bound(settings) as listener:
        _prepare_store(settings)
        settings = dataclasses.replace(settings, port=listener.getsockname()[1])
        if settings.workers > 1 or settings.reload:
            return _serve_in_children(settings, listener)
        app = _Deferred(settings, found)
        config = uvicorn.Config(app, **_uvicorn_options(settings))
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            try:
                return runner.run(_serve_here(app, uvicorn.Server(config), listener))
            except KeyboardInterrupt:  # Ctrl-C, raised again by uvicorn when it has finished
                return 0


def worker_app() -> _Deferred:
    """The application of a worker process: what uvicorn imports there."""
    settings = Settings.handed_over()
    _configure_logs(settings)
    try:
        return _Deferred(settings, loading.find(settings.target), is_worker=True)
    except loading.TargetError as error:
        _complain(error)
        sys.exit(_STARTUP_FAILURE)


def _complain(error: NonstickError) -> None:
    """In a worker process: in the first one the command line does it."""
    sys.stderr.write(f"{getattr(error, 'trace', '')}nonstick: {error}\n")


# ---- the application


class _Deferred:
    """The application, made at start-up in the event loop that will run it: a factory may be async."""

    def __init__(self, settings: Settings, found: loading.Found, *, is_worker: bool = False) -> None:
        self.failure: NonstickError | None = None
        """Why it could not start."""
        self._settings = settings
        self._found = found
        self._is_worker = is_worker
        self._app: Starlette | None = None

    async def prepare(self) -> None:
        """Makes it, once.

        Raises:
            TargetError: The factory failed.
        """
        if self._app is None:
            server = await loading.call(self._found, self._settings.target)
            logs.gather()
            try:
                self._app = _application(server, self._settings)
            except ConfigurationError:
                raise
            except (TypeError, ValueError) as error:  # the SDK checks its own arguments
                if not self._settings.options:
                    raise
                raise ConfigurationError(f"a setting given with --set cannot work: {error}") from error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            assert self._app is not None
            await self._app(scope, receive, send)
            return
        try:
            await self.prepare()
        except NonstickError as error:
            self._refuse(error)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": ""})
            return
        assert self._app is not None
        try:
            await self._app(scope, self._stopping(receive), self._announcing(adopted_in(self._app), send))
        except BaseException:
            if self.failure is None:
                raise

    def _refuse(self, error: NonstickError) -> None:
        self.failure = error
        if self._is_worker:
            _complain(error)

    def _stopping(self, receive: Receive) -> Receive:
        """Has the application stop at once if it cannot work."""

        async def stop() -> Message:
            return await receive() if self.failure is None else {"type": "lifespan.shutdown"}

        return stop

    async def _say_what_is_not_shared(self, adopted: Adopted) -> None:
        if self._settings.store.lower().startswith("memory:"):
            return  # nobody is there to share it with
        for finding in await check_shared(adopted):
            if finding.level != "ok":
                logger.warning("clients of %s: %s. %s", finding.subject, finding.text, finding.advice)

    def _announcing(self, adopted: Adopted, send: Send) -> Send:
        """Says where this node serves once it has started, or that it will not."""
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host

        async def announce(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and (error := _mistake(sys.exception())) is not None:
                self._refuse(error)
            if message["type"] == "lifespan.startup.complete" and (misfit := _misfit(adopted)) is not None:
                self._refuse(ConfigurationError(f"the store cannot be used: {misfit}"))
                return
            if self.failure is not None:
                await send({"type": "lifespan.startup.failed", "message": ""})
                return
            if message["type"] == "lifespan.startup.complete":
                logs.set_node(adopted.managers[0].node)
                await self._say_what_is_not_shared(adopted)
                for path, manager in zip(adopted.paths, adopted.managers, strict=True):
                    url = f"http://{host}:{self._settings.port}{path}"
                    logger.info("serving", extra={"url": url, "store": manager.store.url, "pid": os.getpid()})
            elif message["type"] == "lifespan.shutdown.complete":
                _end_in_time()
                # The interpreter's end looks for garbage in all that is left, several times, for half a second.
                gc.freeze()
            await send(message)

        return announce


def _mistake(error: BaseException | None) -> ConfigurationError | None:
    """The first mistake of configuration in this; task groups put what is raised in them into groups."""
    if isinstance(error, BaseExceptionGroup):
        return next((found for one in error.exceptions if (found := _mistake(one)) is not None), None)
    return error if isinstance(error, ConfigurationError) else None


def _misfit(adopted: Adopted) -> StoreUnusable | None:
    """Why a store will not do until somebody changes something."""
    misfits = (manager.cluster.misfit for manager in adopted.managers)
    return next((misfit for misfit in misfits if isinstance(misfit, StoreUnusable)), None)


def _application(server: loading.AnyServer, settings: Settings) -> Starlette:
    named = Options(
        answer=settings.answer,
        placement=settings.placement,
        grace=settings.grace,
        lease=settings.lease,
        encryption_keys=keys_from(os.environ),
    )
    options: Any = {**settings.options, **named}
    if isinstance(server, Starlette):
        app = server
        take_over(app, store=settings.store, cluster=None, given={}, options=options)
    else:
        app = make_app(server, store=settings.store, path=settings.path, host=settings.host, **options)
    taken = {getattr(route, "path", None) for route in app.routes}
    for probe in (Route("/healthz", _healthz), Route("/readyz", _Ready(adopted_in(app)).answer)):
        if probe.path not in taken:  # the server's own route of that name stays
            app.router.routes.insert(0, probe)
    return app


def adopted_in(app: Starlette) -> Adopted:
    """What nonstick serves in this app."""
    adopted: Adopted = app.state.nonstick
    return adopted


def _healthz(_request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


class _Ready:
    """Whether this node should get requests: its store can be reached, and it is not draining."""

    def __init__(self, adopted: Adopted) -> None:
        self._adopted = adopted

    async def answer(self, _request: Request) -> JSONResponse:
        try:
            async with asyncio.timeout(PING_SECONDS):
                await self._adopted.check_ready()
        except Undecryptable as error:
            logger.warning("not ready: %s", error)
            return _not_ready("what the session store keeps is encrypted under keys that this node was not given")
        except StoreUnusable as error:
            return _not_ready(f"the session store cannot be used: {error}")
        except (TimeoutError, StoreUnavailable) as error:
            # The address of the store is for the log: anybody may ask here.
            logger.warning("not ready: %s", str(error) or f"the store did not answer within {PING_SECONDS:.0f} s")
            return _not_ready("the session store cannot be reached")
        except NonstickError as error:
            return _not_ready(str(error))
        return JSONResponse({"status": "ready"})


def _not_ready(reason: str) -> JSONResponse:
    return JSONResponse({"status": "not ready", "reason": reason}, status_code=503, headers={"retry-after": "1"})


# ---- the processes


def _uvicorn_options(settings: Settings) -> dict[str, Any]:
    return {
        "host": settings.host,
        "port": settings.port,
        "log_config": None,  # `logs.configure` has been there
        "log_level": settings.log_level,
        "lifespan": "on",
        "http": Draining,
        "loop": "nonstick.protocols:Loop",
        "timeout_graceful_shutdown": settings.grace + _AFTER_GRACE,
    }


async def _serve_here(app: _Deferred, server: uvicorn.Server, listener: socket.socket) -> int:
    await app.prepare()  # before uvicorn: what goes wrong here is told in one paragraph
    try:
        await server.serve(sockets=[listener])
    except SystemExit as stop:  # by `_stop_at_once`, once uvicorn is done, or by uvicorn
        if app.failure is not None:
            raise app.failure from None
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _end_in_time() -> None:
    """Sees to it that the process ends, though a handler does not stop, or blocks a thread (P8).

    Everything else has ended, and whoever waited for such a handler was told.
    """
    threading.Thread(
        target=_end_after, args=(max(seconds_left_here(), 0.0) + _STUBBORN_SECONDS,), name="nonstick-end", daemon=True
    ).start()


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    # Not reached where the interpreter came to its end.
    logger.warning("handlers did not stop when they were cancelled: the process ends all the same")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status())


def _serve_in_children(settings: Settings, listener: socket.socket) -> int:
    settings.hand_over()
    config = uvicorn.Config(
        "nonstick.commands.serve:worker_app",
        factory=True,
        workers=settings.workers,
        reload=settings.reload,
        # A worker answers only once it has imported everything, which on a busy machine takes longer than the default
        # of 5 s: it would be restarted for ever.
        timeout_worker_healthcheck=15,
        **_uvicorn_options(settings),
    )
    if settings.reload:
        ChangeReload(config, target=uvicorn.Server(config).run, sockets=[listener]).run()
        return 0
    supervisor = Multiprocess(config, sockets=[listener])
    supervisor.run()
    return 1 if any(process.exitcode == _STARTUP_FAILURE for process in supervisor.processes) else 0


def bound(settings: Settings) -> socket.socket:
    """A socket bound there, not listening yet.

    Raises:
        ConfigurationError: It cannot be had.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise ConfigurationError(f"{host!r} is no address of this machine. Use 127.0.0.1, 0.0.0.0 or ::.") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _cut_off_the_unreachable(listener, settings)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigurationError(_bind_failed(error, host, port)) from error
    listener.set_inheritable(True)
    return listener


def _cut_off_the_unreachable(listener: socket.socket, settings: Settings) -> None:
    """Has the kernel drop connections whose other side takes nothing, or is gone without a word (P10).

    A node that gives a client up can only ask for the connection to be closed, and that waits until what was written is
    taken: for ever, if the client never reads. Connections inherit this from the socket that they come in by.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux has it
    patience = settings.options.get("send_timeout", EndpointSettings.send_timeout)
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


def _configure_logs(settings: Settings) -> None:
    colour = logs.wants_colour(sys.stderr, os.environ)
    node = os.environ.get("NONSTICK_NODE") or socket.gethostname()
    logs.configure(style=settings.log_format, level=settings.log_level, node=node, colour=colour)


# ---- the store


def _prepare_store(settings: Settings) -> None:
    """Sees that nothing has to be changed before the store can be used. That it cannot be reached is no reason to stop.

    Raises:
        ConfigurationError: The URL names no store, or one that cannot serve several processes; or an encryption key is
            none.
        StoreUnusable: It will not do like this. The message says where it is and what to do.
    """
    keys_from(os.environ)
    if settings.store == DEFAULT_STORE:
        file = Path(DEFAULT_STORE.removeprefix("sqlite:///"))
        logger.info("no --store: sessions are kept in %s, for what is started in this directory", file)
        _make_home(file.parent)
    if settings.store.lower().startswith("memory:") and settings.workers > 1:
        raise ConfigurationError(
            "several --workers cannot share memory:, each would have sessions of its own. "
            f"Leave --store out to share {DEFAULT_STORE}, or give sqlite:///FILE or redis://HOST:PORT."
        )
    asyncio.run(_ping(open_store(settings.store)))


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
