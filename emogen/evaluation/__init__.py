"""Gold labels, predictions and probabilities -> metrics; and what a run folder keeps. No torch."""
