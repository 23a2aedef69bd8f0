"""The application of `nonstick serve`: the server's own, taken over, with probes. Its start says what is wrong."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from nonstick.adopt import Adopted, take_over
from nonstick.app import app
from nonstick.commands import loading, log_format
from nonstick.commands.checks import check_shared
from nonstick.commands.serve_options import ServeOptions
from nonstick.core.settings import Options
from nonstick.errors import ConfigurationError, NonstickError, StoreUnavailable, StoreUnusable, Undecryptable
from nonstick.node.drain import seconds_left_here
from nonstick.node.exits import exit_status
from nonstick.stores.encrypted.keys import keys_from

__all__ = ["PING_SECONDS", "DeferredApp", "application", "complain"]

logger = logging.getLogger(__name__)

PING_SECONDS: Final = 5.0
"""How long a store may take to answer before it counts as unreachable."""

_STUBBORN_SECONDS: Final = 0.3
"""For what does not stop when it is cancelled, once everything else has had to end."""


class DeferredApp:
    """The application, made at start-up in the event loop that will run it: a factory may be async."""

    def __init__(self, options: ServeOptions, found: loading.Found, *, is_worker: bool = False) -> None:
        self.failure: NonstickError | None = None
        """Why it could not start."""
        self._options = options
        self._found = found
        self._is_worker = is_worker
        self._app: Starlette | None = None

    async def prepare(self) -> None:
        """Makes the application, once.

        Raises:
            TargetError: The factory failed.
        """
        if self._app is None:
            server = await loading.call(self._found, self._options.target)
            log_format.gather()
            try:
                self._app = application(server, self._options)
            except ConfigurationError:
                raise
            except (TypeError, ValueError) as error:  # the SDK checks its own arguments
                if not self._options.settings:
                    raise
                raise ConfigurationError(f"a setting given with --set cannot work: {error}") from error

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "lifespan":
            return self._live(scope, receive, send)
        assert self._app is not None
        return self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the lifespan."""
        try:
            await self.prepare()
        except NonstickError as error:
            self._refuse(error)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": ""})
            return
        assert self._app is not None
        try:
            await self._app(scope, self._stopping(receive), self._announcing(_adopted_in(self._app), send))
        except BaseException:
            if self.failure is None:
                raise

    def _refuse(self, error: NonstickError) -> None:
        self.failure = error
        if self._is_worker:
            complain(error)

    def _stopping(self, receive: Receive) -> Receive:
        """Has the application stop at once if it cannot work."""

        async def stop() -> Message:
            return await receive() if self.failure is None else {"type": "lifespan.shutdown"}

        return stop

    async def _say_what_is_not_shared(self, adopted: Adopted) -> None:
        if self._options.store.lower().startswith("memory:"):
            return  # nobody is there to share it with
        for finding in await check_shared(adopted):
            if finding.level != "ok":
                logger.warning("clients of %s: %s. %s", finding.subject, finding.text, finding.advice)

    def _announcing(self, adopted: Adopted, send: Send) -> Send:
        """Says where this node serves once it has started, or that it will not."""
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host

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
                log_format.set_node(adopted.managers[0].node)
                await self._say_what_is_not_shared(adopted)
                for path, manager in zip(adopted.paths, adopted.managers, strict=True):
                    url = f"http://{host}:{self._options.port}{path}"
                    logger.info("serving", extra={"url": url, "store": manager.store.url, "pid": os.getpid()})
            elif message["type"] == "lifespan.shutdown.complete":
                _end_in_time()
                # The interpreter's end looks for garbage in all that is left, several times, for half a second.
                gc.freeze()
            await send(message)

        return announce


def _mistake(error: BaseException | None) -> ConfigurationError | None:
    """The first mistake of configuration in an error, which a task group may have put into a group."""
    if isinstance(error, BaseExceptionGroup):
        return next((found for one in error.exceptions if (found := _mistake(one)) is not None), None)
    return error if isinstance(error, ConfigurationError) else None


def _misfit(adopted: Adopted) -> StoreUnusable | None:
    """Why one of the stores cannot be used until somebody changes something; None if all can be used."""
    misfits = (manager.cluster.misfit for manager in adopted.managers)
    return next((misfit for misfit in misfits if isinstance(misfit, StoreUnusable)), None)


def application(server: loading.AnyServer, options: ServeOptions) -> Starlette:
    """The app that serves this server, with probes. A server that comes in an app keeps that app."""
    named = Options(
        answer=options.answer,
        placement=options.placement,
        grace=options.grace,
        lease=options.lease,
        encryption_keys=keys_from(os.environ),
    )
    settings: Any = {**options.settings, **named}
    if isinstance(server, Starlette):
        served = server
        take_over(served, store=options.store, cluster=None, given={}, options=settings)
    else:
        served = app(server, store=options.store, path=options.path, host=options.host, **settings)
    taken = {getattr(route, "path", None) for route in served.routes}
    for probe in (Route("/healthz", _healthz), Route("/readyz", _Ready(_adopted_in(served)).answer)):
        if probe.path not in taken:  # the server's own route of that name stays
            served.router.routes.insert(0, probe)
    return served


def _adopted_in(app: Starlette) -> Adopted:
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


def _end_in_time() -> None:
    """Sees to it that the process ends, though a handler does not stop, or blocks a thread (P8).

    Everything else has ended, and the clients that waited for such a handler were told.
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


def complain(error: NonstickError) -> None:
    """Says in a worker process why it cannot start. In the first process the command line says it."""
    sys.stderr.write(f"{getattr(error, 'trace', '')}nonstick: {error}\n")
