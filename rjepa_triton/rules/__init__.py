"""Learning rules in plain torch: float64-able, on any device; what every faster path is tested against."""
