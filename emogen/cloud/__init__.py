"""A rented GPU: what a run takes, Runpod's API, and the life of a job there."""
