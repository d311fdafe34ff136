"""Texts -> labels: the classifiers, ensembles of them, and files of any size."""
