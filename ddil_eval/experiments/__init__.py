"""The experiments. Each one turns a protocol into records."""
