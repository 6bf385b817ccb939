"""What prompts are made from: prose, chat templates, examples of benchmarks."""
