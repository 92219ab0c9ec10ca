"""What is kept: problem families, each with its verifier, and prompts outside the target."""
