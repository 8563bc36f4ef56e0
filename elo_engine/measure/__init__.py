"""What a run costs: counted (`flops`), predicted (`planner`, `expected`), traced (`tensor_trace`), measured (`meter`),
taken apart (`profiler`, `breakdown`, `roofline`), and on what (`environment`, `machine`, `cards`, `device_state`).
"""
