"""Recurrent layers: modules and functions over sequences."""
