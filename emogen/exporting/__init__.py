"""Tuned models for other programs, scored there before they are called done."""
