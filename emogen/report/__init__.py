"""Run folders -> pages, pictures, model cards and comparisons."""
