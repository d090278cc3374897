"""A recipe: strict YAML becomes frozen sections that know where each value came from."""
