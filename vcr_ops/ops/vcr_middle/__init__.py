"""The op vcr_middle."""
