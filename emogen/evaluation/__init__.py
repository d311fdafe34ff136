"""Gold labels, predictions and probabilities -> metrics; and the files of a run folder. No torch."""
