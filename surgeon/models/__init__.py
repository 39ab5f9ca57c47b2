"""Where models come from: files, Hugging Face directories, Python functions, and example inputs for them."""
