def add_to(a): pass
