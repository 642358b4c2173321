"""One page a target: x86, arm, cuda, jetson, eyeriss (device side).

Load one by its name with :func:`greenprune.registry.load_target`.
"""
