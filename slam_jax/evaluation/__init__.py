"""What a number stands on: prompts, references, features, and how they become a table."""
