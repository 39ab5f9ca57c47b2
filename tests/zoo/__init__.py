"""A zoo of small architectures with known answers: which FFNs must be found, and which look-alikes must be left alone.

Each module holds a registry `CASES`. Importing this package imports none of them: `huggingface` needs a second or two.
"""
