"""Data: generated worlds, layouts of public datasets, mixes, chat templates and labels."""
