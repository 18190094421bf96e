"""Preference methods, one file each."""
