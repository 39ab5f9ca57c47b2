"""How answers look, and the one place that prints (`surgeon.render.screen`)."""
