"""Steps that encode rows of a manifest."""
