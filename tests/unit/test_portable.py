"""A request as the owner of its session sees it, which may be another node."""

from __future__ import annotations

import json

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from starlette.requests import Request

from nonstick.core.names import new_session_id
from nonstick.session.portable import HARMLESS, pack, unpack


def test_request_travels_whole_without_its_secrets() -> None:
    """P13: not even where a route, a query or a proxy's header repeats the session's id."""
    session_id = new_session_id()
    token = AccessToken(token="t0ken", client_id="ada", scopes=["read"], claims={"iss": "here"})
    request = Request(
        {
            "type": "http",
            "method": "POST",
            "path": f"/tenants/7/sessions/{session_id}",
            "path_params": {"tenant": 7, "id": session_id},
            "query_string": f"again={session_id}".encode(),
            "headers": [
                (b"mcp-session-id", session_id.encode()),
                (b"authorization", b"Bearer t0ken"),
                (b"cookie", b"c00kie"),
                (b"x-original-uri", f"/tenants/7/sessions/{session_id}".encode()),
                (b"x-api-key", b"ap1key"),
                (b"accept-language", b"de"),
            ],
            "client": ("10.0.0.1", 1234),
            "user": AuthenticatedUser(token),
        }
    )
    text = json.dumps(pack(request, more=["x-original-uri"], query=True))
    for secret in (session_id, "t0ken", "c00kie", "ap1key"):
        assert secret not in text
    there = unpack(json.loads(text), session_id)
    assert (there.method, there.url.path, there.url.query) == ("POST", request.url.path, request.url.query)
    assert there.path_params == request.path_params
    assert there.headers["x-original-uri"] == request.url.path
    assert there.headers["accept-language"] == "de"
    assert there.headers["mcp-session-id"] == session_id
    assert there.client == request.client
    assert there.user.access_token == token.model_copy(update={"token": ""})


def test_only_harmless_parts_of_request_travel() -> None:
    """P13: by its name, whatever the name of what does; and no query."""
    said = [*HARMLESS, "authorization", "x-api-key", "x-amzn-oidc-data", "x-forwarded-access-token", "mcp-token"]
    request = Request(
        {
            "type": "http",
            "method": "POST",
            "path": "/mcp",
            "query_string": b"token=secret",
            "headers": [(name.title().encode(), b"x") for name in said],
        }
    )
    session_id = new_session_id()
    there = unpack(json.loads(json.dumps(pack(request))), session_id)
    assert set(there.headers) == HARMLESS | {"mcp-session-id"}
    assert there.url.query == ""


def test_copied_token_is_not_written_either() -> None:
    """P13: into claims, as FastMCP's for debugging does, or into fields of a kind of its own."""

    class Verified(AccessToken):
        refresh: str = "r3fresh"

    token = "t0ken-of-some-length"
    claims = {"token": token, "iss": "here", "deep": [{"header": f"Bearer {token}"}, 7], "sub": "ada"}
    user = AuthenticatedUser(Verified(token=token, client_id="ada", scopes=["read"], claims=claims))
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": [], "user": user})
    text = json.dumps(pack(request))
    assert token not in text
    assert "r3fresh" not in text
    there = unpack(json.loads(text), new_session_id()).user.access_token
    assert there.claims == {"token": "", "iss": "here", "deep": [{"header": ""}, 7], "sub": "ada"}
