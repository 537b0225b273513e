"""Measuring what compression cost and what it gained."""
