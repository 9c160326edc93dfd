"""From a reference to a model in memory: who has it, whether its files are whole and fit, and what it needs."""
