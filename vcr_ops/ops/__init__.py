"""The ops: one folder each, with its public function and its backends."""
