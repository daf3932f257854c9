"""Finished indexes, opened and searched: no Ray, no torch."""
