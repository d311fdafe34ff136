"""A recipe -> a tuned model: checks, sampling, the trainers, scores during training."""
