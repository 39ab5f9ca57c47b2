"""Load models from files, Hugging Face directories and Python functions, and make example inputs for them."""
