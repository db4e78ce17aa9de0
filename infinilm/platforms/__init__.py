"""In-tree `provide_platform` plugins, one module each."""
