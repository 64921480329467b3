"""How packed weights lie in memory: rows, planes, and e4m3 operands."""
