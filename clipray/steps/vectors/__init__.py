"""Steps over vectors: components, clusters, duplicates, index, search."""
