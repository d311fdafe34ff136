"""What a recipe names: labels, prompt, answer style, rows. No torch."""
