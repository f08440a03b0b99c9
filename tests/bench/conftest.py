from bench.tiny import folder, llama, text, tokenizer  # noqa: F401  fixtures
