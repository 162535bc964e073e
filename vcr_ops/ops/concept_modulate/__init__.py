"""The op concept_modulate."""
