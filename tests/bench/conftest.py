from bench.tiny import folder, llama, narrow, text, tokenizer  # noqa: F401  fixtures
