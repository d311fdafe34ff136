"""The parts that a recipe names: label set, prompt, answer style and rows. Loads no torch."""
