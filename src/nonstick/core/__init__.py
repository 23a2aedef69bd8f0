"""What sessions, streams, requests and logs are. Pure: no clock, no event loop, no I/O."""
