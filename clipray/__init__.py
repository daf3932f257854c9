"""clipray: a Parquet manifest of pictures and texts in, tables that people can query out."""

__version__ = "0.1.0"
