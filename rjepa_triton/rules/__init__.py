"""Learning rules in plain torch, for any floating dtype and device: the reference for every faster path's tests."""
