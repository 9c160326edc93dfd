"""The commands of the documentation: found on its pages, and run or parsed by a test (see ``commands.yaml``)."""
