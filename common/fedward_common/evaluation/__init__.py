"""Measure a model without moving a case: sites send counts, counts add, metrics follow from the sum.

`state` turns a site's predictions into fixed-shape int64 counts, adds them and checks them; `metrics`
computes every figure from such counts, for one site or for the sum alike; `report` shows the result.
"""
