"""Steps that label rows, and that measure labels."""
