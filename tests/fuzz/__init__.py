"""Coverage-guided fuzzing of what a guest or a VMM can send."""
