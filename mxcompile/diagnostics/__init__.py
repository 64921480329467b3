"""What a run did and what it cost: measurements, dumps, ledger, report page, evaluation, bisection, explain."""
