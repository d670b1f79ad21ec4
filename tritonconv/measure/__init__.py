"""Measuring: clock, comparison, tuning, compilation ahead."""
