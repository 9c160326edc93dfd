"""Finished students in the formats of other programs. Each format is one file and one row of ``formats.FORMATS``."""
