"""Real servers as child processes, a bad network in front of them, a balancer, and node processes."""
