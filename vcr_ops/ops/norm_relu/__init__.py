"""The op norm_relu."""
