"""Programs that make what the package carries and what its docs show; they are not part of it."""
