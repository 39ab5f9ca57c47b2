"""The views of the answers, and the only module that prints (`surgeon.render.screen`)."""
