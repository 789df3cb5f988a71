"""What users of Opacus' own modes get: our samplers in its registries, and its "hooks" mode on compiled ops."""
