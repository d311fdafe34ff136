"""Many runs: cross-validation, sweeps, prompt comparisons, the lab."""
