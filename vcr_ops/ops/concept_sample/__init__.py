"""The op concept_sample."""
