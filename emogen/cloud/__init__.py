"""Rented GPUs: what a run takes, Runpod's API, and the life of a job on a pod."""
