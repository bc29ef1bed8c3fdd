"""Tables: cells gathered, checked against the study, and written with their uncertainty."""
