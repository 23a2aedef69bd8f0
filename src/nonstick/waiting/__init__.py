"""How to wait: for a bell, until a deadline, in the background."""
