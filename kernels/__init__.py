"""Kernels of the dynamic-k FFN. `import surgeon.kernels.dynamic_k` registers the operators.

Nothing is imported here: Hugging Face's `transformers` imports a top-level package named `kernels` when it finds one,
and finds this folder when Python runs from the root of the repository.
"""
