"""Studies: a matrix of conditions and seeds, in parallel, with paired tests that are corrected for their number."""
