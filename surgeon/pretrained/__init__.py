"""Models with converted layers in the files of transformers: `from_pretrained` and `save_pretrained`."""
