"""What a person asks for: one YAML file and dotted overrides, read into a frozen, typed tree."""
