"""What answers at an address, where it is not what a store's URL says.

Asked only after a connection has failed in a way that a wrong scheme or port would explain. Sends no credentials.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Literal

__all__ = ["Protocol", "distrust", "spoken_at", "wants_certificate"]

Protocol = Literal["redis", "postgres", "http", "tls"]
"""`tls`: that, and what is in it was not looked at."""

_PING: Final = b"PING\r\n"
_SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)
"""PostgreSQL answers this with one letter.

Source: https://www.postgresql.org/docs/current/protocol-message-formats.html (SSLRequest)
"""

_EXPIRED: Final = (9, 10)
_MISNAMED: Final = (62, 64)
"""Verification errors of OpenSSL: not valid yet or any more; issued for another host name or address."""


async def spoken_at(host: str, port: int, *, seconds: float) -> Protocol | None:
    """What is spoken there; None if that is not one of these, or nothing answers in time."""
    try:
        async with asyncio.timeout(seconds):
            match await _first_byte(host, port, _PING):
                case b"+" | b"-":
                    return "redis"
                case b"H":
                    return "http"
                case b"\x15":  # a TLS alert
                    return "tls"
                case _:
                    pass
            if await _first_byte(host, port, _SSL_REQUEST) in (b"S", b"N"):
                return "postgres"
            return "tls" if await _shakes_hands(host, port) else None
    except (OSError, TimeoutError):
        return None


def distrust(error: ssl.SSLCertVerificationError, advice: str) -> str:
    """Why the server's certificate is not trusted, without the names in it; `advice` where its issuer is not known."""
    if error.verify_code in _EXPIRED:
        return (
            "the certificate of the store's server is not valid at this time: renew it, or correct this machine's clock"
        )
    if error.verify_code in _MISNAMED:
        return (
            "the certificate of the store's server was made for another name or address than the URL has: "
            "write the one that it carries, or have it made for this one"
        )
    return f"the certificate of the store's server is not trusted here: {advice}"


@asynccontextmanager
async def _open(host: str, port: int, context: ssl.SSLContext | None = None) -> AsyncIterator[_Streams]:
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)  # in which the socket is closed: this loop may not run any more afterwards


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _first_byte(host: str, port: int, question: bytes) -> bytes:
    """Of the answer; nothing if the connection was closed without one, or there was none for a while."""
    async with _open(host, port) as (reader, writer):
        writer.write(question)
        try:
            async with asyncio.timeout(_PATIENCE):
                return await reader.read(1)
        except (ConnectionError, TimeoutError):
            return b""


_PATIENCE: Final = 0.25
_RESET: Final = "RESET"


async def _shakes_hands(host: str, port: int) -> bool:
    # A server that knows no common version or wants a certificate has answered in TLS all the same.
    reason = await _handshake(host, port, ssl.TLSVersion.MAXIMUM_SUPPORTED)
    return not reason or "ALERT" in reason


async def wants_certificate(host: str, port: int, *, seconds: float) -> bool:
    """Whether a TLS server there turns away clients that show no certificate."""
    try:
        async with asyncio.timeout(seconds):
            # Up to this version it fails the handshake; later ones end that first, and then close.
            reason = await _handshake(host, port, ssl.TLSVersion.TLSv1_2)
    except (OSError, TimeoutError):
        return False
    return any(sign in reason for sign in ("HANDSHAKE_FAILURE", "CERTIFICATE", _RESET))


async def _handshake(host: str, port: int, version: ssl.TLSVersion) -> str:
    """Why a handshake of this version at most failed; nothing if it did not."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    try:
        async with _open(host, port, context):
            return ""
    except ssl.SSLError as error:
        return error.reason or "UNKNOWN"
    except ConnectionResetError:
        return _RESET
