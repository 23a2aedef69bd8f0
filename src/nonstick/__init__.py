"""Any replica of an MCP server serves any session.

    app = nonstick.app(mcp, store="redis://cache:6379")

Layers, each usable alone: `app` (one line), `adopt` (for an app that is there already), `SessionManager` (takes the
place of the SDK's manager), `Session` (one session's transport, for routing of your own), `Store` (the protocol for
where sessions live). Errors are in `nonstick.errors`, the store contract suite in `nonstick.testing`.
"""

from nonstick.adopt import adopt
from nonstick.app import App, app
from nonstick.cluster.cluster import Cluster
from nonstick.http.manager import SessionManager
from nonstick.http.transport import Session
from nonstick.session.exchange import current_attempt
from nonstick.session.live import current_connection
from nonstick.session.state import session_state
from nonstick.store import Store
from nonstick.stores.encrypted import EncryptedStore

__all__ = [
    "App",
    "Cluster",
    "EncryptedStore",
    "Session",
    "SessionManager",
    "Store",
    "adopt",
    "app",
    "current_attempt",
    "current_connection",
    "session_state",
]
__version__ = "0.2.0.dev0"
