"""What all steps share: what is on disk, what a run makes, and its commit."""
