"""Fusion of teachers into a student: targets (weights over teachers), teachers (their distributions) and the loss."""
