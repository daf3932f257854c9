"""Steps that measure retrieval."""
