"""Files on any URL: folders, Parquet with checksums, the log of events, and what a machine does to files."""
