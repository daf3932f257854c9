"""Pure numerics of tables of vectors: no Ray, no files."""
