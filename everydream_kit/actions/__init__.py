"""What a person can do with a project, without widgets: estimates, comparisons, background tasks, presets."""
