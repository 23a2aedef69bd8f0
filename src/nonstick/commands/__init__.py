"""The command line: `nonstick serve`, `doctor`, `migrate` and `demo`, and what only they need."""
