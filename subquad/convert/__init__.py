"""Put a mechanism into a pretrained model (`swap`), take it out again (`restore`), teach it (`distill`)."""
