"""Reports as text, plain or for `rich`. Nothing here prints."""
