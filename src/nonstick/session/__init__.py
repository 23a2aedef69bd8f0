"""A session while this node works for it: its requests, its streams, what its log brings."""
