"""What all nodes share beside sessions: one call that tells everyone, and the `requestState` keys."""

from nonstick.cluster.cluster import Cluster

__all__ = ["Cluster"]
