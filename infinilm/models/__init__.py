"""In-tree model plugins: one self-contained file per family."""
