"""Finished runs behind an HTTP endpoint."""
