"""The op concept_reason."""
