"""The model side: what a family is (`spec`, `names`), its maths (`reference`, `ops`, `layers`), and the two models
made of it (`shallow`, `full`).
"""
