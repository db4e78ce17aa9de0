"""In-tree `provide_logits_processors` plugins."""
