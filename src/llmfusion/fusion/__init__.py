"""What the field calls fusion: targets (weights over teachers), sources (their distributions) and the loss."""
