"""What is measured: one experiment a file. An experiment turns a protocol into records."""
