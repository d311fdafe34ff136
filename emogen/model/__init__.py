"""Weights, tokens and attention: shared-prefix computation, the answer grammar, decoding, probabilities."""
