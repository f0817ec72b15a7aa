"""A run of an ablation, and what can be refused before the first."""
