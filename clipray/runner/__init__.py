"""A job as a whole: run, plan, status, verify, submit."""
