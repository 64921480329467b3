"""Studies: cells of a cross product of models, pipelines, formats and data, from one TOML file."""
