"""What both sides of a federation must agree on: plans, payloads, weights, metrics, signatures."""
