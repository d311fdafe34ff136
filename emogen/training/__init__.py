"""A recipe -> a tuned model: checks, sampling, trainers, scores."""
