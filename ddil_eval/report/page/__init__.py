"""The report as one self-contained HTML page, from records and the pictures beside them (see ``write``)."""
