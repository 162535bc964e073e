"""The op move_running_stats."""
