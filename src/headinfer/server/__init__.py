"""The HTTP server of one model: OpenAI's interface over `headinfer.serving`, for long prompts."""
