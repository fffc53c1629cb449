"""What a run will need, before any device is rented: parameters, memory, products, days and cost.

The run's own model takes a training step on tensors without values, which costs neither memory nor weights.
"""
