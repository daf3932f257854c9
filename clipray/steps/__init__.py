"""What a job can do, a file each, in the order in which data flows."""
