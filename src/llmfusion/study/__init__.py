"""Studies: strict YAML, typed sections, cross-checks, and the graph of all artifacts. Imports no torch."""
