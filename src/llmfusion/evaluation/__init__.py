"""Evaluation: lm-eval asks, answers are stored, and cells are graded from them without a GPU."""
