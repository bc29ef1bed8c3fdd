"""One module a Snakemake rule, of the same name: parse the spec, verify the inputs, call a room, publish."""
