"""Arrow blocks in and out: rows are fetched, decoded, encoded, or rejected alone."""
