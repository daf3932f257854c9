"""What steps read: manifests and their row index, vector columns, lookups by id, known labels, classes."""
