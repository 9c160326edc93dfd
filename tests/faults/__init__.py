"""Kills and damage, and what becomes of a command after them. ``make faults`` runs the long form."""
