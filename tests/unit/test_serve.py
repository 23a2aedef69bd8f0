"""What `nonstick serve` asks of the kernel."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest

from nonstick.commands.serve import bound
from nonstick.commands.serve_options import ServeOptions


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have no such option")
@pytest.mark.parametrize(("patience", "seconds"), [(None, 60), (5, 10), (1e9, 172_800)])
def test_silently_gone_connections_are_dropped(patience: float | None, seconds: int) -> None:
    """P10: after twice `send_timeout`, also those on which nothing is sent."""
    given: dict[str, Any] = {} if patience is None else {"send_timeout": patience}
    options = ServeOptions(target="", store="", port=0, settings=given)
    with bound(options) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == seconds * 1000
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == min(seconds, 32_767)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == min(seconds, 15)
