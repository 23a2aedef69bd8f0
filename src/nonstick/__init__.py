"""Any replica of an MCP server serves any session.

    app = nonstick.app(mcp, store="redis://cache:6379")

Layers, each usable alone: `app` (one line), `adopt` (for an app that is there already), `SessionManager` (takes the
place of the SDK's manager), `Session` (one session's transport, for routing of your own), `Store` (the protocol for
where sessions live). Errors are in `nonstick.errors`, the store contract suite in `nonstick.testing`.
"""

from nonstick.adopt import adopt
from nonstick.app import App, app
from nonstick.cluster import Cluster
from nonstick.encryption import EncryptedStore
from nonstick.exchange import current_attempt
from nonstick.manager import SessionManager
from nonstick.session import current_connection
from nonstick.state import session_state
from nonstick.store import Store
from nonstick.transport import Session

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
