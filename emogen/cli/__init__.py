"""The `emogen` command, one file for each group of commands. Nothing imports it."""
