"""Turn reports into text, plain or for `rich`. Nothing in this package prints."""
