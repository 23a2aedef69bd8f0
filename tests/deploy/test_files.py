"""What the files in `deploy/` promise to each other."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from nonstick.commands.serve_options import ServeOptions

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
GRACE: Final = next(field.default for field in fields(ServeOptions) if field.name == "grace")


def documents(name: str) -> dict[str, Any]:
    """By kind."""
    found = yaml.safe_load_all((DEPLOY / name).read_text())
    return {document["kind"]: document for document in found}


def test_proxies_stick_sessions_to_no_node() -> None:
    """P1. Neither to an address nor to a cookie nor to a hash of the session id."""
    assert documents("kubernetes/nonstick.yaml")["Service"]["spec"]["sessionAffinity"] == "None"
    for path in DEPLOY.rglob("*"):
        if path.suffix in {".cfg", ".conf", ".yaml"}:
            lines = [line.partition("#")[0].lower() for line in path.read_text().splitlines()]
            text = "\n".join(lines)
            for word in ("cookie", "stick", "ip_hash", "ring_hash", "maglev", "hash "):
                assert word not in text.replace("nonstick", ""), (path.name, word)


def test_platform_waits_longer_than_the_drain() -> None:
    """P8."""
    pod = documents("kubernetes/nonstick.yaml")["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    asked = container["args"]
    grace = float(asked[asked.index("--grace") + 1])
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + grace + 5
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert isinstance(GRACE, float)
    assert float(services["node-1"]["stop_grace_period"].removesuffix("s")) > GRACE + 5


def test_probes_name_routes_that_serve_has() -> None:
    """A liveness probe that asked for the store would restart every pod when the store is away (P9)."""
    container = documents("kubernetes/nonstick.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_disruption_budget_lets_one_pod_go() -> None:
    """The budget selects the pods of the deployment."""
    found = documents("kubernetes/nonstick.yaml")
    deployment, budget = found["Deployment"]["spec"], found["PodDisruptionBudget"]["spec"]
    assert budget["selector"] == deployment["selector"] == {"matchLabels": found["Service"]["spec"]["selector"]}
    assert budget["minAvailable"] < deployment["replicas"]


def test_envoy_ends_no_stream() -> None:
    """P3. 0 s is no limit, which the default of 15 s would be."""
    found = yaml.safe_load((DEPLOY / "envoy.yaml").read_text())["static_resources"]
    chain = found["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    route = chain["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    assert route["timeout"] == "0s"
    assert "5xx" not in route["retry_policy"]["retry_on"]
    assert found["clusters"][0]["lb_policy"] == "LEAST_REQUEST"


@pytest.mark.parametrize("name", ["haproxy.cfg", "nginx.conf", "envoy.yaml"])
def test_proxies_and_compose_name_same_nodes(name: str) -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    text = (DEPLOY / name).read_text()
    for node in ("node-1", "node-2", "node-3"):
        assert node in services
        assert node in text
