"""One training loop for SFT, SeqKD, knowledge fusion and unified fusion; they differ in their spec only."""
