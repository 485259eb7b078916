"""Figures computed from counts. Each function takes whole numbers and gives a float, or None.

None means that the figure is not defined (sensitivity without a positive case), which is not zero and
must never be shown or averaged as if it were.
"""
