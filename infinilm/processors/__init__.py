"""In-tree `select_processor` plugins: what turns text into tokens and back."""
