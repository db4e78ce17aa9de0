"""In-tree `open_checkpoint` plugins, one module each."""
