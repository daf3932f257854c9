"""Bytes to vectors: pictures, models."""
