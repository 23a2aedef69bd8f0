"""Session logs: every call to the store in time, one writer, one reader, what may go."""
