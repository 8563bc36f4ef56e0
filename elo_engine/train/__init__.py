"""Training: one loop (`loop`), its optimizer (`optim`), learning-rate schedule (`schedule`) and durable state
(`state`).
"""
