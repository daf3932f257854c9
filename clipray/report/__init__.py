"""A run's page, and plots."""
