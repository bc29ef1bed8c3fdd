"""One module a Snakemake rule, of the same name: parse the spec, verify the inputs, call one function of a room, publish."""
