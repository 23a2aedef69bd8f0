"""The last release and this code on one store (P12)."""
