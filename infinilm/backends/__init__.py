"""In-tree backend plugins: what runs a model."""
