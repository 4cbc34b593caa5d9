"""Timing of the ops and of whole layers: scripts over one harness and one table of shapes.

Times and prints; never asserts a speed. Not installed with the package.
"""
