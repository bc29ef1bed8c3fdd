"""What a study takes before it is run, and what its rows took afterwards. Imports no torch."""
