"""`nonstick demo`: real node processes, a balancer without affinity, the official client, and kill -9."""
