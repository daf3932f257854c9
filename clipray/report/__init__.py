"""A run's page, plots and contact sheets."""
