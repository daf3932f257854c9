"""Answers without Ray: search and labels from the command line."""
