"""Models in other forms: folders of Hugging Face to GGUF files, GGUF files to checkpoints of Orbax."""
