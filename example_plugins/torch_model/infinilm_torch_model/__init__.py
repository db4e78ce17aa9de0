"""Runs `parallax` checkpoints. The model is named by a string: listing plugins imports neither it nor torch."""

from infinilm.plugins import ModelSpec

spec = ModelSpec(model_type="parallax", backend="infinilm_torch_model.parallax:make_backend")
