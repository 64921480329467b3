"""What quantization did to a model: measurements, dumps, ledger, report page, evaluation, bisection, explain."""
